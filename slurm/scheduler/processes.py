"""Bring runs to their end, each in a child process: what a job does with its runs, and this machine with a sweep.

A child is forked from a process that has imported everything and touched no GPU. So a run of seconds does not pay for
imports, and a run that crashes ends no other run. The parent alone decides to stop: it passes the request on, waits for
the checkpoints, and leaves no child behind. A run whose process was killed is tried again, unless ten attempts in a row
have left no new checkpoint.
"""

import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.files import now
from embedscale.imports import importing, load
from embedscale.process import job_number
from embedscale.run.config import RunConfig
from embedscale.run.directory import Attempt, RunDirectory
from embedscale.run.lease import STALE_SECONDS, lease_holder, leased, remove_what_is_left_over
from embedscale.run.record import RunRecord, sound
from embedscale.run.stop import StopRequest
from slurm.scoring import score_all
from slurm.tables import duration

# Attempts in a row without a new checkpoint after which a run has failed. Kills say nothing about a run, but a run that
# kills its machine must end some time.
ATTEMPTS = 10
ELSEWHERE = 3  # exit status of a child that found another process at its run
POLL_SECONDS = 0.5  # between two looks at the children
FAREWELL_SECONDS = 30.0  # that the processes of a run have to end once the first of them has ended
OUTCOMES = {DONE: "done", FAILED: "failed", INTERRUPTED: "interrupted", ELSEWHERE: "elsewhere"}


@dataclass(frozen=True)
class Place:
    """Where one run at a time may run."""

    processes: Sequence[Mapping[str, str]] = ({},)
    """Environment variables of each of the run's processes."""
    threads: int = 1
    """Threads of each process."""
    sharing: int = 1
    """Places on the same device: a GPU or, without GPUs, the cores of one task."""
    beside: int = 1
    """Places on other cores of the same machine, which share its memory."""


@dataclass
class _Running:
    run: RunConfig
    place: Place
    processes: list[BaseProcess]
    logs: list[Path]
    """Output of each process."""
    ended_first: Sequence[int] = ()
    """Ranks of the processes that had ended at the first look that found any: the others end because of them."""
    deadline: float = math.inf
    """Time by which the others must have ended, by time.monotonic()."""
    begun: float = field(default_factory=time.monotonic)


def work_through(
    runs: Iterable[RunConfig], scores: Sequence[str], places: Sequence[Place], stop: StopRequest
) -> dict[str, str]:
    """Train the runs or, with `scores`, score them on these mteb tasks, until `stop` is requested.

    Returns the outcome by run id: done, failed (or diverged), interrupted (stopped, or never begun), or elsewhere
    (another process is at the run).
    """
    return score_all(list(runs), scores, stop) if scores else run_all(runs, places, stop)


def run_all(runs: Iterable[RunConfig], places: Sequence[Place], stop: StopRequest) -> dict[str, str]:
    """Train runs, as many at once as there are places, until `stop` is requested.

    Returns outcomes as `work_through` does, and prints them, with the time that is left by the FLOP that are spent.
    Only the main thread may call this, before it has touched a GPU.
    """
    import_everything()
    waiting, free = deque(runs), list(places)
    running: list[_Running] = []
    outcomes: dict[str, str] = {}
    total, began = len(waiting), time.monotonic()
    flop, spent = sum(run.budget for run in waiting), 0.0
    while running or (waiting and not stop.requested):
        while waiting and free and not stop.requested:
            run = waiting.popleft()
            try:
                ended = _ended_before(run, stop)
                if ended is None:
                    running.append(_start(run, free[-1]))
                    free.pop()
                    continue
                _say(run, ended)
            except (UserError, OSError) as error:  # a damaged file of one run ends no other run
                ended = "failed"
                _say(run, str(error))
            outcomes[run.run_id] = ended
            flop -= run.budget
        wait([process.sentinel for each in running for process in each.processes if process.is_alive()], POLL_SECONDS)
        for each in [each for each in running if _over(each, stop)]:
            running.remove(each)
            free.append(each.place)
            try:
                outcome = _outcome(each, stop)
                if outcome:
                    spent += each.run.budget
                    seconds = (time.monotonic() - began) * (flop / spent - 1)
                    more = f", about {duration(seconds)} left" if running or waiting else ""
                    _say(each.run, f"{_told(each, outcome)} ({len(outcomes) + 1} of {total}{more})")
                else:
                    _say(each.run, "was killed; it is tried again")
            except (UserError, OSError) as error:
                outcome = "failed"
                _say(each.run, str(error))
            if outcome is None:
                waiting.appendleft(each.run)
            else:
                outcomes[each.run.run_id] = outcome
    return outcomes | {run.run_id: "interrupted" for run in waiting}


def _told(each: _Running, outcome: str) -> str:
    record = RunDirectory(each.run.folder).read_record() if outcome == "done" else None
    loss = f", held-out loss {record.loss:.4g}" if isinstance(record, RunRecord) and record.loss else ""
    return f"{outcome} after {duration(time.monotonic() - each.begun)}{loss}"


def _say(run: RunConfig, what: str) -> None:
    print(f"{now()} {run.run_id}: {what}", flush=True)


def import_everything() -> None:
    """Import what a run needs, once, so that forked children inherit it."""
    with importing():
        import peft  # noqa: F401
        import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401
    load("embedscale.training.train:train")


def _ended_before(run: RunConfig, stop: StopRequest) -> str | None:
    """Return the run's outcome if it must not be started, else None."""
    directory = RunDirectory(run.folder)
    if (record := sound(directory.read_record())) is not None:
        remove_what_is_left_over(directory)
        return "done" if record.status == "done" else "failed"
    if not _is_first():
        return None  # the first process decides
    # After the loss of a node, SLURM starts the job again before the lease of the lost process counts as stale.
    deadline = time.monotonic() + STALE_SECONDS
    while (holder := lease_holder(directory.lease)) is not None:
        own = holder.job_id is not None and holder.job_id == job_number()
        if not own or holder.lives() or stop.requested or time.monotonic() > deadline:
            return "elsewhere"
        time.sleep(1)
    if stalled(directory):
        reasons = [attempt.reason for attempt in sound(directory.read_attempts()) if attempt.reason]
        why = f"; last reason: {reasons[-1]}" if reasons else ""
        note_failure(directory, f"{ATTEMPTS} attempts without a new checkpoint{why}")
        return "failed"
    return None


def _is_first() -> bool:
    """Return whether this is the first process of a run, or the first task of a job: the one that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def stalled(directory: RunDirectory) -> bool:
    """Return whether the last `ATTEMPTS` attempts, since a failure was last noted, have left no new checkpoint.

    Attempts that a Ctrl-C or `sweep cancel` ended on this machine do not count: they say nothing about the run.
    """
    attempts = [a for a in sound(directory.read_attempts()) if a.ended != "interrupted" or a.job_id]
    since = max((i + 1 for i, attempt in enumerate(attempts) if attempt.ended == "failed"), default=0)
    recent = attempts[since:][-ATTEMPTS:]
    if len(recent) < ATTEMPTS:
        return False
    begun = recent[0].from_step
    return begun is None or (directory.newest_step or 0) <= begun


def note_failure(directory: RunDirectory, reason: str, traceback: str | None = None) -> None:
    """Write an attempt that failed for a reason that no training process could write down."""
    with leased(directory.lease) as lease:
        directory.clear_up(lease.left_behind)
        directory.begin_attempt().end("failed", traceback, reason=reason)


def _start(run: RunConfig, place: Place) -> _Running:
    directory = RunDirectory(run.folder)
    directory.attempts.mkdir(parents=True, exist_ok=True)
    number = next_attempt(directory, int(os.environ.get("RANK", 0)))
    context = multiprocessing.get_context("fork")
    logs = [directory.log(number, int((os.environ | each).get("RANK", 0))) for each in place.processes]
    processes: list[BaseProcess] = []
    try:
        for environment, log in zip(place.processes, logs, strict=True):
            child = context.Process(target=_child, args=(run, dict(environment), place, log))
            child.start()
            processes.append(child)
    except OSError:  # the machine takes no more processes
        for process in processes:
            process.kill()
            process.join()
        raise
    if number > 1:
        _say(run, f"attempt {number}")
    return _Running(run, place, processes, logs)


def next_attempt(directory: RunDirectory, rank: int) -> int:
    """Return the number of the attempt that the process `rank` takes part in; rank 0 may have begun it already."""
    number = 1 + max((attempt.number for attempt in sound(directory.read_attempts())), default=0)
    begun = rank > 0 and number > 1 and not directory.log(number - 1, rank).exists()
    return number - begun


def _child(run: RunConfig, environment: dict[str, str], place: Place, log: Path) -> None:
    """Train a run in this child process. An error fails this run and no other."""
    stop = StopRequest()
    stop.on_signals()
    os.environ.update(environment)
    with log.open("ab") as output:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import torch

    from embedscale.training.train import train

    torch.set_num_threads(place.threads)
    os.environ["OMP_NUM_THREADS"] = str(place.threads)
    directory = RunDirectory(run.folder)
    try:
        sys.exit(train(run, stop, place.sharing, place.beside))
    except UserError as error:
        print(f"embedscale: {error}", file=sys.stderr)
        if _is_first() and lease_holder(directory.lease) is not None:
            sys.exit(ELSEWHERE)
        reason, text = str(error), None
    except Exception as error:  # before the run's own attempt, which would have written it down
        reason, text = f"{type(error).__name__}: {error}", traceback.format_exc()
        print(text, file=sys.stderr)
    if _is_first():
        with suppress(UserError):  # a damaged file of the run, which `status` names
            note_failure(directory, reason, text)
    sys.exit(FAILED)


def _over(each: _Running, stop: StopRequest) -> bool:
    """Pass on a request to stop, kill the processes that still wait for one that has ended, and return whether all
    have ended."""
    alive = [process for process in each.processes if process.is_alive()]
    if not each.ended_first and len(alive) < len(each.processes):
        each.ended_first = [rank for rank, process in enumerate(each.processes) if process not in alive]
        each.deadline = time.monotonic() + FAREWELL_SECONDS
    if stop.requested:
        for process in alive:
            _signal(process, signal.SIGTERM)
    if time.monotonic() > each.deadline:
        for process in alive:
            _signal(process, signal.SIGKILL)
    return not alive


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid or 0, number)


def _outcome(each: _Running, stop: StopRequest) -> str | None:
    """Return how a run ended, or None if it is to be tried again: it was killed, or it stopped without a request.

    Of several processes, those that ended first say why: one that was lost, or else one that failed. The others fail
    because of it, or wait for it until `_over` kills them.
    """
    for process in each.processes:
        process.join()
    codes = [process.exitcode or 0 for process in each.processes]
    if codes[0] in (DONE, ELSEWHERE):
        return OUTCOMES[codes[0]]
    lost = [rank for rank in each.ended_first if codes[rank] not in OUTCOMES]
    failed = [rank for rank in each.ended_first if codes[rank] == FAILED]
    rank = (lost or failed or [0])[0]
    code = codes[rank]
    if code == FAILED:
        if rank > 0:
            _end_attempt(each, "failed", f"process {rank} failed; see {each.logs[rank]}")
        return "failed"
    if code != INTERRUPTED:
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        _end_attempt(each, "killed", f"process {rank} {why}" if rank > 0 else why)
    elif stop.requested:
        # The child knows that this parent asked it to stop; only the parent knows why.
        attempt = _own_attempt(each)
        if attempt is not None and attempt.record.ended == "interrupted":
            attempt.write(reason=stop.reason)
    return "interrupted" if stop.requested else None


def _own_attempt(each: _Running) -> Attempt | None:
    """Return the attempt that the first process began, to be written on; None if the process ended before that."""
    directory = RunDirectory(each.run.folder)
    for last in sound(directory.read_attempts())[-1:]:
        if last.pid == each.processes[0].pid:
            return directory.reopen(last)
    return None


def _end_attempt(each: _Running, ended: str, reason: str) -> None:
    """Write how a run ended onto the attempt of its first process, which could not say it.

    That the first process failed, because it had lost another one, gives way to "killed".
    """
    directory = RunDirectory(each.run.folder)
    if not _is_first() or lease_holder(directory.lease) is not None:
        return
    # A process that died before it began its attempt has used up one attempt all the same.
    attempt = _own_attempt(each) or directory.begin_attempt()
    if attempt.record.ended is None or (attempt.record.ended, ended) == ("failed", "killed"):
        attempt.write(end=attempt.record.end or now(), ended=ended, reason=reason)


def rank_environment(
    rank: int, size: int, local: int, local_size: int, node: int, address: str, port: int
) -> dict[str, str]:
    """Return the variables by which one process of a run of several finds the others."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(local_size),
        "NODE_RANK": str(node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
