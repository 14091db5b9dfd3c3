"""What runs in a job: bring a bundle of runs as far as the job's time goes, then see to it that somebody goes on.

One owner of every signal: SIGTERM, SIGUSR1, SIGUSR2 and the clock raise one flag, for which the runs save a checkpoint
after their step; SIGCONT, which SLURM sends along, means nothing. Only then the job is put back into the queue, by
`scontrol requeue`, and waits to be killed: a job that exited by itself would count as ended. Where a node has no
scontrol, the job waits for SLURM's own requeue, or leaves its runs interrupted for the next submit.
"""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from embedscale.errors import DONE, FAILED, INTERRUPTED
from embedscale.files import now, read_json, write_json
from embedscale.run.config import RunConfig, structured
from embedscale.run.stop import StopRequest
from slurm.scheduler import queue
from slurm.scheduler.local import Place, import_everything, rank_environment, run_all
from slurm.scoring import score_all

REQUEUED_SECONDS = 120.0  # from `scontrol requeue` to the kill
PATIENCE_SECONDS = 900.0  # for SLURM's own requeue, where the job cannot ask: longer than most grace times
SELF_TEST_SECONDS = 180.0
SICK_HOURS = 24.0  # that a node is kept away from


@dataclass(frozen=True)
class Orders:
    """What a submission tells its jobs; beside it, only run ids travel."""

    runs: dict[str, dict[str, Any]]  # complete configurations, by run id
    limit_seconds: float
    warning_seconds: float
    requeue: bool
    side_by_side: int
    gpus: int  # a node
    cpus: int  # a task
    memory_gb: float  # a node
    code: dict[str, Any]
    scores: Sequence[str] = ()  # mteb tasks to score the runs on; none: train them

    def write(self, folder: Path, submission: str) -> None:
        path = _orders(folder, submission)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, folder: Path, submission: str) -> "Orders":
        return cls(**read_json(_orders(folder, submission)))

    def run(self, run_id: str) -> RunConfig:
        config: RunConfig = structured(RunConfig, self.runs[run_id])
        return config


def _orders(folder: Path, submission: str) -> Path:
    return folder / queue.FOLDER / submission / "orders.json"


def work(folder: str, submission: str, run_ids: Sequence[str]) -> NoReturn:
    """What each task of a job runs, under srun. Exits DONE, FAILED or INTERRUPTED, or is killed by a requeue."""
    orders = Orders.read(Path(folder), submission)
    stop = StopRequest(_end_of_job(orders) - orders.warning_seconds)
    stop.on_signals()
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    rank = _become_rank()
    print(f"{now()} {submission}: {len(run_ids)} runs on {_node()}, code {orders.code}", flush=True)
    import_everything()
    if fault := self_test(orders):
        _leave_sick_node(Path(folder), orders, fault)
    runs = [orders.run(run_id) for run_id in run_ids]
    threads, sharing = max(1, orders.cpus // orders.side_by_side), min(orders.side_by_side, len(runs))
    places = [Place(threads=threads, sharing=sharing)] * sharing
    outcomes = score_all(runs, orders.scores, stop) if orders.scores else run_all(runs, places, stop)
    left = [run_id for run_id, outcome in outcomes.items() if outcome == "interrupted"]
    if left:
        _go_on_later(orders, stop, rank)
    if rank is not None and "elsewhere" in outcomes.values():
        sys.exit(INTERRUPTED)  # and not 0: the other ranks wait for this one
    sys.exit(FAILED if "failed" in outcomes.values() else DONE)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _job() -> str:
    """The job's number; of an array's task by index, since one of them shares its own number with the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _end_of_job(orders: Orders) -> float:
    """The time at which SLURM will end this job, in seconds since 1970."""
    if "SLURM_JOB_END_TIME" in os.environ:  # since SLURM 23.02
        return float(os.environ["SLURM_JOB_END_TIME"])
    end = (_scontrol("--oneliner", "show", "job", _job()) or {}).get("EndTime", "")
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:
        return time.time() + orders.limit_seconds


def _become_rank() -> int | None:
    """Where the job has several tasks, tell this one's process which of them it is; its number."""
    tasks, rank = int(os.environ.get("SLURM_NTASKS", 1)), int(os.environ.get("SLURM_PROCID", 0))
    if tasks == 1:
        return None
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    # Another port after a requeue, and for every job that may share the node.
    port = 12000 + (7 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_RESTART_COUNT", 0))) % 20000
    local, node = int(os.environ["SLURM_LOCALID"]), int(os.environ["SLURM_NODEID"])
    # The job's script, and with it srun, runs on the first node.
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    os.environ.update(rank_environment(rank, tasks, local, tasks // nodes, node, address, port))
    return rank


def self_test(orders: Orders) -> str | None:
    """What is wrong with this node, tried in a process of its own: a broken driver may hang or crash."""
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 1e6  # type: ignore[index]
    if free < 0.8 * orders.memory_gb:
        return f"{free:.1f} GB of memory are free of the {orders.memory_gb:g} GB that were promised"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_compute, args=(orders.gpus, sender))
    process.start()
    process.join(SELF_TEST_SECONDS)
    if process.is_alive():
        process.kill()
        return f"the self-test hangs for more than {SELF_TEST_SECONDS:.0f} s"
    if receiver.poll():
        return str(receiver.recv())
    return None if process.exitcode == 0 else f"the self-test ended with exit status {process.exitcode}"


def _compute(gpus: int, sender: Connection) -> None:
    import torch

    if torch.cuda.device_count() < gpus:
        sender.send(f"{torch.cuda.device_count()} GPUs are visible of {gpus}")
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


def _leave_sick_node(folder: Path, orders: Orders, fault: str) -> NoReturn:
    """Name the node, keep this job and the array's waiting ones away from it, and start again elsewhere."""
    print(f"{now()} {_node()} is sick: {fault}", flush=True)
    note_sick(folder, _node(), fault)
    names = ",".join(sick_nodes(folder))
    if orders.requeue and _scontrol("requeue", _job()) is not None:
        # Refused while a job runs, so after the requeue; this process has KillWait seconds for it.
        for _ in range(5):
            if _scontrol("update", f"JobId={_job()}", f"ExcNodeList={names}") is not None:
                break
            time.sleep(1)
        if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
            _scontrol("update", f"JobId={array}", f"ExcNodeList={names}")  # refused for those of its tasks that run
        _stay(REQUEUED_SECONDS)
    sys.exit(INTERRUPTED)


def note_sick(folder: Path, node: str, fault: str) -> None:
    path = folder / queue.FOLDER / "sick" / f"{node}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"node": node, "fault": fault, "time": now(), "job_id": os.environ.get("SLURM_JOB_ID")})


def sick_nodes(folder: Path) -> dict[str, str]:
    """The nodes that failed a self-test within `SICK_HOURS`, and why."""
    found = {}
    for path in sorted((folder / queue.FOLDER / "sick").glob("*.json")):
        noted = read_json(path)
        if noted and time.time() - datetime.fromisoformat(noted["time"]).timestamp() < 3600 * SICK_HOURS:
            found[noted["node"]] = noted["fault"]
    return found


def _go_on_later(orders: Orders, stop: StopRequest, rank: int | None) -> NoReturn:
    """Put the job back into the queue, by whatever can; its runs have their checkpoints."""
    print(f"{now()} stopped ({stop.reason})", flush=True)
    if rank:
        _stay(PATIENCE_SECONDS)  # the first task asks for all
    if not orders.requeue:
        print("this cluster does not requeue: the next submit goes on", flush=True)
        sys.exit(INTERRUPTED)
    job = _scontrol("--oneliner", "show", "job", _job())
    if job is None:
        # A preempted job is requeued by SLURM itself, once it has killed it; at the time limit nobody would.
        print(f"no scontrol on {_node()}: SLURM's own requeue or the next submit goes on", flush=True)
        _stay(PATIENCE_SECONDS if stop.deadline is None else min(PATIENCE_SECONDS, stop.deadline - time.time()))
    if job.get("JobState") == "RUNNING":  # else it was cancelled, or SLURM has requeued it already
        if _scontrol("requeue", _job()) is not None:
            print(f"requeued job {_job()}", flush=True)
            _stay(REQUEUED_SECONDS)
        print("scontrol refuses to requeue: SLURM's own requeue or the next submit goes on", flush=True)
        _stay(PATIENCE_SECONDS if "PreemptTime" in job and job["PreemptTime"] != "None" else 0)
    sys.exit(INTERRUPTED)


def _stay(seconds: float) -> NoReturn:
    """Wait to be killed, which a requeue does; leave in the end, for nobody may come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.5)
    sys.exit(INTERRUPTED)


def _scontrol(*words: str) -> dict[str, str] | None:
    """The key=value words that scontrol prints, or None where it is missing, fails or hangs."""
    # A requeue signals all processes of the job at once, so that scontrol itself might die of what it asked for.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if done.returncode:
        print(f"scontrol {' '.join(words)}: {done.stderr.strip()}", file=sys.stderr, flush=True)
        return None
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
