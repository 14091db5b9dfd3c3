"""What runs in a job: work through a bundle of runs until the job's time is up, then requeue the job.

Signals have one owner. SIGTERM, SIGUSR1, SIGUSR2 and the clock raise one flag, and the runs save a checkpoint after
their current step. SIGCONT, which SLURM sends along with SIGTERM, is ignored. Then the job asks to be put back into the
queue and waits to be ended: a job that exited by itself would count as finished. If the node cannot ask, the job waits
for the scheduler's own requeue, or leaves its runs interrupted for the next submit.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.files import now
from embedscale.process import job_number
from embedscale.run.stop import StopRequest
from embedscale.texts import counted
from slurm.scheduler.choice import scheduler_of
from slurm.scheduler.over import tell_if_over
from slurm.scheduler.processes import Place, import_everything, rank_environment, work_through
from slurm.scheduler.scheduler import Allocation, Requeue, Scheduler
from slurm.scheduler.submissions import Orders, Submissions

RETRY_SECONDS = 5.0  # between two requests to a scheduler that is away
REQUEUED_SECONDS = 120.0  # most time from an accepted requeue to the end of the job's processes
PATIENCE_SECONDS = 900.0  # for the scheduler's own requeue, where the job cannot ask: longer than most grace times
SELF_TEST_SECONDS = 180.0  # after which a node's self-test counts as hanging


def work(folder: str, submission: str, task: int) -> NoReturn:
    """Run the runs of one job of a submission, the job with this index; each process of the job calls this.

    Exits with DONE, FAILED or INTERRUPTED, or is killed by a requeue.
    """
    submissions = Submissions(Path(folder))
    orders = submissions.read_orders(submission, task)
    scheduler = scheduler_of(orders.scheduler, submissions.folder)
    allocation = scheduler.allocation()
    end = time.time() + orders.limit_seconds if allocation.end is None else allocation.end
    stop = StopRequest(end - orders.warning_seconds)
    stop.on_signals()
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    _become_rank(allocation)
    what = counted(len(orders.runs), "run")
    print(f"{now()} {submission}: {what} on {allocation.node}, code {orders.code.digest}", flush=True)
    import_everything()
    if fault := self_test(orders.gpus, orders.memory_gb):
        _leave_sick_node(submissions, scheduler, allocation, orders, fault)
    threads, sharing = max(1, orders.cpus // orders.side_by_side), min(orders.side_by_side, len(orders.runs))
    places = [Place(threads=threads, sharing=sharing)] * sharing
    outcomes = work_through(orders.runs.values(), orders.scores, places, stop)
    if allocation.rank == 0 and orders.on_done:
        noted = submissions.noted()
        sent = [noted[submission]] if orders.scores else noted.values()
        runs = {run_id for each in sent for job in each.tasks for run_id in job}
        tell_if_over(submissions, orders.on_done, sorted(runs), orders.scores, once=True)
    if "interrupted" in outcomes.values():
        _go_on_later(scheduler, allocation, orders, stop, end)
    if allocation.processes > 1 and "elsewhere" in outcomes.values():
        sys.exit(INTERRUPTED)  # not DONE: the other processes wait for this one
    sys.exit(FAILED if "failed" in outcomes.values() else DONE)


def _become_rank(allocation: Allocation) -> None:
    """Set the variables by which the processes of a run find each other, if the job has several."""
    if allocation.processes > 1:
        os.environ.update(
            rank_environment(
                allocation.rank,
                allocation.processes,
                allocation.local_rank,
                allocation.processes // allocation.nodes,
                allocation.node_rank,
                allocation.address,
                allocation.port,
            )
        )


def self_test(gpus: int, memory_gb: float) -> str | None:
    """Return what is wrong with this node, or None if its GPUs work and 80 % of the promised memory are free.

    The GPUs compute in a process of their own: a broken driver may hang or crash.
    """
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 1e6  # type: ignore[index]
    if free < 0.8 * memory_gb:
        return f"{free:.1f} GB of memory are free, but {memory_gb:g} GB were promised"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_compute, args=(gpus, sender))
    process.start()
    process.join(SELF_TEST_SECONDS)
    if process.is_alive():
        process.kill()
        return f"the self-test did not end within {SELF_TEST_SECONDS:.0f} s"
    if receiver.poll():
        return str(receiver.recv())
    return None if process.exitcode == 0 else f"the self-test ended with exit status {process.exitcode}"


def _compute(gpus: int, sender: Connection) -> None:
    import torch

    if torch.cuda.device_count() < gpus:
        sender.send(f"{torch.cuda.device_count()} GPUs are visible, but {gpus} were promised")
        return
    for device in ["cpu", *(f"cuda:{number}" for number in range(gpus))]:
        try:
            ones = torch.ones(256, 256, device=device)
            wrong = float((ones @ ones).sum()) != 256.0**3
            message = "gives a wrong product" if wrong else ""
        except RuntimeError as error:
            message = str(error).split("\n")[0]
        if message:
            sender.send(f"{device}: {message}")
            return


def _leave_sick_node(
    submissions: Submissions, scheduler: Scheduler, allocation: Allocation, orders: Orders, fault: str
) -> NoReturn:
    """Note the node as sick, and start the job again on another one."""
    print(f"{now()} {allocation.node} is sick: {fault}", flush=True)
    submissions.note_sick(allocation.node, fault, job_number())
    if orders.requeue and scheduler.requeue(allocation.job, list(submissions.sick_nodes())) == Requeue.ACCEPTED:
        _stay(REQUEUED_SECONDS)
    sys.exit(INTERRUPTED)


def _go_on_later(
    scheduler: Scheduler, allocation: Allocation, orders: Orders, stop: StopRequest, end: float
) -> NoReturn:
    """Put the job back into the queue; its runs have saved their checkpoints. `end` is the time of the job's limit."""
    print(f"{now()} stopped ({stop.reason})", flush=True)
    if allocation.rank > 0:
        _stay(PATIENCE_SECONDS)  # the first process asks for the whole job
    if not orders.requeue:
        print("this cluster does not requeue: the next submit goes on", flush=True)
        sys.exit(INTERRUPTED)
    by_itself = "the scheduler's own requeue or the next submit goes on"
    answer = scheduler.requeue(allocation.job)
    if answer == Requeue.AWAY:
        print(f"the scheduler does not answer; asked again until {_clock(end)}", flush=True)
    while answer == Requeue.AWAY and time.time() < end:
        time.sleep(RETRY_SECONDS)
        answer = scheduler.requeue(allocation.job)
    if answer == Requeue.ACCEPTED:
        print(f"requeued job {allocation.job}", flush=True)
        _stay(REQUEUED_SECONDS)
    if answer == Requeue.UNREACHABLE:
        # The scheduler requeues a preempted job once it has killed it. At the time limit it requeues nothing.
        print(f"{allocation.node} cannot ask the scheduler: {by_itself}", flush=True)
        _stay(min(PATIENCE_SECONDS, end - orders.warning_seconds - time.time()))
    if answer in (Requeue.REFUSED, Requeue.PREEMPTED):
        print(f"the scheduler refuses to requeue: {by_itself}", flush=True)
        _stay(PATIENCE_SECONDS if answer == Requeue.PREEMPTED else 0)
    sys.exit(INTERRUPTED)  # cancelled, or in the queue already


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _stay(seconds: float) -> NoReturn:
    """Wait for the scheduler to kill this process after a requeue; exit when the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.5)
    sys.exit(INTERRUPTED)


if __name__ == "__main__":
    try:
        work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except UserError as error:
        sys.exit(f"embedscale: {error}")
