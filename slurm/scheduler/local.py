"""Runs on this machine, each in a child process: what a node does with its bundle, and a laptop with a whole sweep.

A child is forked from a process that has imported everything and touched no GPU, so that a run of seconds does not
pay for imports, and a run that crashes takes no other with it. The parent owns the decision to stop: it passes it on,
waits for the checkpoints, and never leaves a child behind. A run that dies is tried again while it makes progress.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.files import now, read_json, write_json
from embedscale.imports import importing
from embedscale.run.config import RunConfig
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import STALE_SECONDS, lease_holder, leased, process_alive, start_time
from embedscale.run.record import sound
from embedscale.run.stop import StopRequest
from slurm.grid import Sweep
from slurm.scheduler import queue
from slurm.scoring import score_all

ATTEMPTS = 3  # without a new checkpoint, then a run has failed
ELSEWHERE = 3  # exit status of a child that found another process at its run
POLL_SECONDS = 0.5
FAREWELL_SECONDS = 30.0  # for the other processes of a run whose first has ended
OUTCOMES = {DONE: "done", FAILED: "failed", INTERRUPTED: "interrupted", ELSEWHERE: "elsewhere"}


@dataclass(frozen=True)
class Place:
    """Where one run at a time may run: the environment of each of its processes, and the threads of one."""

    processes: Sequence[Mapping[str, str]] = ({},)
    threads: int = 1
    sharing: int = 1  # places on the same device, a GPU or, without GPUs, the cores of a task
    beside: int = 1  # places with cores of their own in the same machine's memory


@dataclass
class _Running:
    run: RunConfig
    place: Place
    processes: list[BaseProcess]
    deadline: float | None = field(default=None)  # once one process has ended, for the others


def run_all(runs: Iterable[RunConfig], places: Sequence[Place], stop: StopRequest) -> dict[str, str]:
    """Bring runs to their end, as many at once as there are places, until `stop` is requested.

    Returns by run id: done, failed (diverged too), interrupted (stopped, or never begun), or elsewhere (another
    process is at the run). Only the main thread may call this, before it has touched a GPU.
    """
    import_everything()
    waiting, free = deque(runs), list(places)
    running: list[_Running] = []
    outcomes: dict[str, str] = {}
    while running or (waiting and not stop.requested):
        while waiting and free and not stop.requested:
            run = waiting.popleft()
            ended = _ended_before(run, stop)
            if ended is None:
                running.append(_start(run, free.pop()))
            else:
                outcomes[run.run_id] = ended
                _say(run, ended)
        wait([process.sentinel for each in running for process in each.processes if process.is_alive()], POLL_SECONDS)
        for each in [each for each in running if _over(each, stop)]:
            running.remove(each)
            free.append(each.place)
            outcome = _outcome(each, stop)
            _say(each.run, outcome or "died, and is tried again")
            if outcome is None:
                waiting.appendleft(each.run)
            else:
                outcomes[each.run.run_id] = outcome
    return outcomes | {run.run_id: "interrupted" for run in waiting}


def _say(run: RunConfig, what: str) -> None:
    print(f"{now()} {run.run_id}: {what}", flush=True)


def import_everything() -> None:
    """What a run imports, once, for the children to inherit."""
    with importing():
        import peft  # noqa: F401
        import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401

        import embedscale.training.train  # noqa: F401


def _ended_before(run: RunConfig, stop: StopRequest) -> str | None:
    """The run's outcome where it is not to be started, else None."""
    directory = RunDirectory(run.folder)
    if (record := sound(directory.read_record())) is not None:
        return "done" if record.status == "done" else "failed"
    if int(os.environ.get("RANK", 0)) > 0:
        return None  # the first process decides
    # After the loss of a node SLURM starts the job again before the lost process's lease has aged.
    deadline = time.monotonic() + STALE_SECONDS
    while (holder := lease_holder(directory.lease)) is not None:
        own = holder.get("job_id") is not None and holder.get("job_id") == os.environ.get("SLURM_JOB_ID")
        if not own or holder["host"] == socket.gethostname() or stop.requested or time.monotonic() > deadline:
            return "elsewhere"
        time.sleep(1)
    if stalled(directory):
        reasons = [attempt.reason for attempt in sound(directory.read_attempts()) if attempt.reason]
        why = f"; the last to say why: {reasons[-1]}" if reasons else ""
        note_failure(directory, f"{ATTEMPTS} attempts without a new checkpoint{why}")
        return "failed"
    return None


def stalled(directory: RunDirectory) -> bool:
    """Whether the last attempts, since a failure was last noted, have left no new checkpoint.

    Those that a Ctrl-C or `cancel` ended on this machine do not count: they say nothing of the run.
    """
    attempts = [a for a in sound(directory.read_attempts()) if a.ended != "interrupted" or a.job_id]
    since = max((i + 1 for i, attempt in enumerate(attempts) if attempt.ended == "failed"), default=0)
    recent = attempts[since:][-ATTEMPTS:]
    if len(recent) < ATTEMPTS:
        return False
    begun = recent[0].from_step
    return begun is None or (directory.newest_step or 0) <= begun


def note_failure(directory: RunDirectory, reason: str) -> None:
    """Write an attempt that failed for a reason that no training process could write down."""
    with leased(directory) as lease:
        directory.clear_up(lease.left_behind)
        directory.begin_attempt().end("failed", reason=reason)


def _start(run: RunConfig, place: Place) -> _Running:
    directory = RunDirectory(run.folder)
    directory.attempts.mkdir(parents=True, exist_ok=True)
    number = next_attempt(directory, int(os.environ.get("RANK", 0)))
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    for environment in place.processes:
        log = directory.log(number, int((os.environ | environment).get("RANK", 0)))
        processes.append(context.Process(target=_child, args=(run, dict(environment), place, log)))
    for process in processes:
        process.start()
    _say(run, f"attempt {number}, {', '.join(f'process {process.pid}' for process in processes)}")
    return _Running(run, place, processes)


def next_attempt(directory: RunDirectory, task: int) -> int:
    """The number of the attempt that a job's task takes part in, which the first task may have begun already."""
    number = 1 + max((attempt.number for attempt in sound(directory.read_attempts())), default=0)
    begun = task > 0 and number > 1 and not directory.log(number - 1, task).exists()
    return number - begun


def _child(run: RunConfig, environment: dict[str, str], place: Place, log: Path) -> None:
    stop = StopRequest()
    stop.on_signals()
    os.environ.update(environment)
    with log.open("ab") as output:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(train_here(run, place, stop))


def train_here(run: RunConfig, place: Place, stop: StopRequest) -> int:
    """Train in this process, a user's mistake being the run's failure: one run's must not end the others."""
    import torch

    from embedscale.training.train import train

    torch.set_num_threads(place.threads)
    os.environ["OMP_NUM_THREADS"] = str(place.threads)
    directory = RunDirectory(run.folder)
    try:
        return train(run, stop, place.sharing, place.beside)
    except UserError as error:
        print(f"embedscale: {error}", file=sys.stderr)
        if lease_holder(directory.lease) is not None:
            return ELSEWHERE
        if int(os.environ.get("RANK", 0)) == 0:
            note_failure(directory, str(error))
        return FAILED


def _over(each: _Running, stop: StopRequest) -> bool:
    """Pass on a request to stop; end the processes that wait in vain for one that has ended."""
    alive = [process for process in each.processes if process.is_alive()]
    if stop.requested:
        for process in alive:
            _signal(process, signal.SIGTERM)
    if alive and len(alive) < len(each.processes):
        each.deadline = each.deadline or time.monotonic() + FAREWELL_SECONDS
        if time.monotonic() > each.deadline:
            for process in alive:
                _signal(process, signal.SIGKILL)
    return not alive


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid or 0, number)


def _outcome(each: _Running, stop: StopRequest) -> str | None:
    """How a run ended, or None where it is to be tried again: killed, or stopped though nobody asked this parent."""
    for process in each.processes:
        process.join()
    codes = [process.exitcode or 0 for process in each.processes]
    lost = [code for code in codes if code not in OUTCOMES]
    code = lost[0] if lost else codes[0]
    directory = RunDirectory(each.run.folder)
    if code == INTERRUPTED and stop.requested:
        # The child knows only that this parent asked it, not why.
        for last in sound(directory.read_attempts())[-1:]:
            if last.pid == each.processes[0].pid and last.ended == "interrupted":
                directory.reopen(last).write(reason=stop.reason)
        return "interrupted"
    if code in OUTCOMES and code != INTERRUPTED:
        return OUTCOMES[code]
    if lost and lease_holder(directory.lease) is None:
        # Written here, for the dead cannot; one that died before it began its attempt has used up one all the same.
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        for attempt in directory.open_attempts() or [directory.begin_attempt()]:
            attempt.write(end=now(), ended="killed", reason=why)
    return "interrupted" if stop.requested else None


@contextmanager
def announced(folder: Path) -> Iterator[None]:
    """Write down, beside the run directories, that this process is at the sweep: `cancel` ends it."""
    process = {"host": socket.gethostname(), "pid": os.getpid(), "born": start_time(os.getpid())}
    note = folder / queue.FOLDER / f"{process['host']}-{process['pid']}.process"
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, process)
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def processes_at(folder: Path) -> list[dict[str, Any]]:
    """The processes that are at the sweep, on this machine and, for all that is known here, on others."""
    found = [noted for note in (folder / queue.FOLDER).glob("*.process") if (noted := read_json(note))]
    own = socket.gethostname()
    return [each for each in found if each["host"] != own or process_alive(each["pid"], each["born"])]


def run_here(sweep: Sweep, runs: Sequence[RunConfig]) -> int:
    """Run what is left of a sweep on this machine's GPUs or, where it has none, on its cores.

    Returns DONE, FAILED where a run failed, INTERRUPTED where it was stopped (SIGTERM, Ctrl-C) and can go on.
    """
    stop = StopRequest()
    stop.on_signals()
    alike: dict[tuple[int, int, int], list[RunConfig]] = defaultdict(list)
    for run in runs:
        alike[run.resources.nodes, run.resources.devices, sweep.resource_class(run).cpus].append(run)
    gpus = _gpus()
    outcomes: dict[str, str] = {}
    for (nodes, devices, threads), members in alike.items():
        most = min(sweep.cluster.max_gpus // (nodes * devices), len(members))
        outcomes |= run_all(members, _places(gpus, nodes, devices, threads, most), stop)
    counts = Counter(outcomes.values())
    print(f"{sweep.name}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if counts["interrupted"]:
        print(f"stopped by {stop.reason}; submit again to go on")
        return INTERRUPTED
    return FAILED if counts["failed"] else DONE


def run_in_this_process(sweep: Sweep, runs: Sequence[RunConfig]) -> int:
    """One run after the other, without a child, where a debugger can follow. Returns as `run_here` does."""
    codes = []
    for run in runs:
        stop = StopRequest()
        stop.on_signals()
        ended = _ended_before(run, stop)
        place = Place(threads=sweep.resource_class(run).cpus)
        codes.append(train_here(run, place, stop) if ended is None else DONE * (ended != "failed"))
        if codes[-1] == INTERRUPTED:
            return INTERRUPTED
    return FAILED if FAILED in codes else DONE


def score_here(runs: Sequence[RunConfig], names: Sequence[str]) -> int:
    """Score finished runs in this process. Returns as `run_here` does."""
    stop = StopRequest()
    stop.on_signals()
    outcomes = set(score_all(runs, names, stop).values())
    return INTERRUPTED if "interrupted" in outcomes else FAILED if "failed" in outcomes else DONE


def _gpus() -> list[str]:
    """The GPUs that this process may use, asked in another: CUDA does not survive a fork."""
    if shutil.which("nvidia-smi") is None:
        return []
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    count = int(done.stdout) if done.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[:count] if visible != [""] else [str(number) for number in range(count)]


def _places(gpus: Sequence[str], nodes: int, devices: int, threads: int, most: int) -> list[Place]:
    """At most `most` places, but one, for runs of nodes × devices processes, a GPU each or, where there is none,
    `threads` cores each.
    """
    size = nodes * devices
    if 0 < len(gpus) < size:
        raise UserError(f"resources: a run asks for {size} GPUs; this machine has {len(gpus)}")
    room = len(gpus) // size if gpus else len(os.sched_getaffinity(0)) // (size * threads)
    count = max(1, min(room, most))
    beside = 1 if gpus else count * nodes
    places = []
    for number in range(count):
        port = _free_port()
        processes = []
        for rank in range(size):
            node, local = divmod(rank, devices)
            first = number * size + node * devices
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + devices])} if gpus else {}
            if size > 1:
                environment |= rank_environment(rank, size, local, devices, node, "127.0.0.1", port)
            processes.append(environment)
        places.append(Place(processes, threads, beside=beside))
    return places


def rank_environment(
    rank: int, size: int, local: int, local_size: int, node: int, address: str, port: int
) -> dict[str, str]:
    """What one process of a run of several reads to find the others."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(local_size),
        "NODE_RANK": str(node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
