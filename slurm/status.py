"""Where a sweep stands: run directories first, the scheduler's queue second, accounting (if available) third.

A run is done when its record says so, whatever the scheduler says about its job. The queue only separates runs that
will go on by themselves from runs that wait for the next `submit`. Accounting only explains what ended a job. Both may
be missing.
"""

import os
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedscale.adaptive.choices import Choices
from embedscale.errors import DONE, bounded
from embedscale.files import now
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import lease_holder
from embedscale.run.record import AttemptRecord, Damaged, RunRecord
from embedscale.terminal import console, reader_left, shortened
from embedscale.texts import counted
from embedscale.values import print_json
from slurm import grid
from slurm.grid import Sweep
from slurm.plan import SweepPlan, plan_sweep
from slurm.scheduler.choice import scheduler_of
from slurm.scheduler.local import Local
from slurm.scheduler.scheduler import Job, Scheduler
from slurm.scheduler.submissions import Submissions
from slurm.tables import Narrowed, duration

SILENT = "ended without a message"
BLOCKED = "cannot be run"
ROWS = 20  # of a table of running runs or a list of damaged files, at most


class RunState(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    QUEUED = "queued"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"
    MISSING = "missing"
    FAILED = "failed"
    DIVERGED = "diverged"
    DAMAGED = "damaged"
    DONE = "done"


ENDED = (RunState.FAILED, RunState.DIVERGED, RunState.DAMAGED, RunState.DONE)
MEANINGS = {
    RunState.RUNNING: "a process works on it",
    RunState.QUEUED: "waits in the queue for its first attempt",
    RunState.PREEMPTED: "was stopped and waits in the queue to go on",
    RunState.INTERRUPTED: "was stopped; the next submit goes on with it",
    RunState.MISSING: "was never started and is not queued",
    RunState.FAILED: "ended with an error; submit --retry-failed tries again",
    RunState.DIVERGED: "ended because its loss was not finite",
    RunState.DAMAGED: "has a file that cannot be read; no submit touches it",
    RunState.DONE: "spent its budget and has its record",
}


@dataclass(frozen=True)
class RunStatus:
    """What its directory and the queue say about a run."""

    run_id: str
    """Id of the run."""
    state: RunState
    """Where the run stands."""
    attempts: int = 0
    """Number of attempts that began."""
    device_hours: float = 0.0
    """Hours of devices that all attempts took."""
    wasted_hours: float = 0.0
    """Hours of devices whose work had to be repeated."""
    spent_flop: float = 0.0
    """FLOP spent so far, by the paper's convention."""
    budget_flop: float = 0.0
    """FLOP that the run was given."""
    seconds_left: float | None = None
    """Time until a running run ends, by its own estimate."""
    host: str | None = None
    """Machine of the last attempt."""
    job_id: str | None = None
    """Number of the run's job, or of its last attempt's job."""
    reason: str | None = None
    """Why the run failed, diverged, was interrupted, or waits; which file is damaged, and how."""
    messages: list[Path] = field(default_factory=list)
    """Of a run that failed or diverged: the traceback and the log of its last attempt, as far as they exist."""


@dataclass(frozen=True)
class SweepStatus:
    """What `sweep status --json` prints."""

    name: str
    """Name of the sweep."""
    folder: Path
    """Folder of the run directories."""
    queue_answers: bool
    """Whether the scheduler's queue was asked; if not, runs that wait in it are interrupted or missing here."""
    runs: list[RunStatus]
    """Status of each run, in the grid's order."""


def survey(sweep: Sweep, jobs: Mapping[str, Job] | None) -> list[RunStatus]:
    """Return the status of every run of the grid, in the grid's order.

    `jobs` are the queued and running jobs by run id, as `Submissions.jobs_by_run` returns them; None if the queue
    cannot be asked. A run with a damaged file is `RunState.DAMAGED`.
    """
    jobs = jobs or {}
    present = _names(sweep.folder)
    found = []
    for run_id, run in sweep.by_id.items():
        if run_id in present:
            devices = run.resources.devices * run.resources.nodes
            directory = RunDirectory(sweep.folder / run_id)
            found.append(status_of(directory, run_id, run.budget, devices, jobs.get(run_id)))
        else:
            found.append(_unstarted(run_id, run.budget, jobs.get(run_id)))
    return found


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return set()


def _unstarted(run_id: str, budget: float, job: Job | None) -> RunStatus:
    if job is None:
        return RunStatus(run_id, RunState.MISSING, budget_flop=budget)
    return RunStatus(run_id, RunState.QUEUED, budget_flop=budget, job_id=job.id, reason=job.reason)


def status_of(directory: RunDirectory, run_id: str, budget: float, devices: int, job: Job | None) -> RunStatus:
    """Return one run's status; `devices` is the number of devices of each attempt, `job` the run's job in the queue."""
    record = directory.read_record()
    if isinstance(record, RunRecord):
        return _finished(record, run_id, devices, directory)
    attempts = directory.read_attempts() if record is None else record
    if isinstance(attempts, Damaged):
        return RunStatus(run_id, RunState.DAMAGED, budget_flop=budget, reason=str(attempts))
    holder = lease_holder(directory.lease)
    hours = sum(_hours(attempt, now=holder is not None and attempt is attempts[-1]) for attempt in attempts)
    so_far = RunStatus(
        run_id,
        RunState.RUNNING,
        attempts=len(attempts),
        device_hours=hours * devices,
        wasted_hours=wasted_hours(attempts) * devices,
        budget_flop=budget,
    )
    if holder is not None:
        return replace(
            so_far,
            spent_flop=holder.spent_flop,
            seconds_left=holder.seconds_left,
            host=holder.host,
            job_id=holder.job_id,
        )
    if not attempts:
        return _unstarted(run_id, budget, job)
    last = attempts[-1]
    # A running job that has seen this run fail works on the other runs of its bundle. A job that starts again, or
    # another job, will try the run again.
    if last.ended == "failed" and (job is None or (job.running and job.id == last.job_id)):
        state = RunState.FAILED
    else:
        state = RunState.INTERRUPTED if job is None else RunState.PREEMPTED
    return replace(
        so_far,
        state=state,
        spent_flop=last.to_flop or last.from_flop or 0,
        host=last.host,
        job_id=job.id if job else last.job_id,
        reason=last.reason or (SILENT if last.ended in (None, "killed") else None),
        messages=directory.messages(last.number) if state == RunState.FAILED else [],
    )


def _finished(record: RunRecord, run_id: str, devices: int, directory: RunDirectory) -> RunStatus:
    done = record.status == "done"
    return RunStatus(
        run_id,
        RunState(record.status),
        attempts=len(record.attempts),
        device_hours=record.gpu_hours,
        wasted_hours=wasted_hours(record.attempts) * devices,
        spent_flop=record.spent_flop,
        budget_flop=record.budget_flop,
        reason=record.attempts[-1].reason if record.attempts and not done else None,
        messages=[] if done or not record.attempts else directory.messages(record.attempts[-1].number),
    )


def _hours(attempt: AttemptRecord, now: bool = False) -> float:
    """Return the hours that an attempt took of each device, divided by the runs that shared the device.

    An open attempt counts until now if `now` is True; else its end is unknown, and it counts as 0.
    """
    if attempt.end is None and not now:
        return 0.0
    return max(0.0, attempt.seconds) / 3600 / attempt.sharing


def wasted_hours(attempts: Sequence[AttemptRecord]) -> float:
    """Return the hours of work that a later attempt had to repeat, because no checkpoint held the work.

    The work of an attempt is kept up to the FLOP at which the next attempt began. A killed attempt did not say which
    FLOP it reached: the kept FLOP become hours at the speed of the run's other attempts, and the rest of its hours are
    wasted. All hours of a failed last attempt are wasted.
    """
    flop = seconds = 0.0
    for attempt in attempts:
        if attempt.to_flop is not None and attempt.from_flop is not None:
            flop += attempt.to_flop - attempt.from_flop
            seconds += _hours(attempt)
    wasted = 0.0
    for attempt, successor in zip_longest(attempts, attempts[1:]):
        hours, began, reached = _hours(attempt), attempt.from_flop or 0, attempt.to_flop
        if successor is None:
            wasted += hours if attempt.ended == "failed" else 0.0
            continue
        kept = (successor.from_flop or 0) - began
        if reached is not None and reached > began:
            wasted += hours * (1 - min(1.0, kept / (reached - began)))
        elif kept <= 0:
            wasted += hours
        elif flop:
            wasted += max(0.0, hours - kept * seconds / flop)
    return wasted


def explained(statuses: Sequence[RunStatus], scheduler: Scheduler) -> list[RunStatus]:
    """Return the statuses with what accounting says about attempts that ended without a message."""
    silent = {each.job_id for each in statuses if each.reason == SILENT and each.job_id}
    said = scheduler.accounting(sorted(silent)) if silent else {}
    return [
        replace(each, reason=f"{SILENT}; accounting says {said[each.job_id]}")
        if each.reason == SILENT and each.job_id in said
        else each
        for each in statuses
    ]


def render(sweep: Sweep, plan: SweepPlan, statuses: Sequence[RunStatus], jobs: Mapping[str, Job] | None) -> Group:
    """Return the status as tables: counts by state, running runs, and the reasons of stopped and failed runs.

    `jobs` is None if the queue cannot be asked.
    """
    blocked = {each.run_id for each in plan.blocked}
    by_state: dict[str, list[RunStatus]] = defaultdict(list)
    for each in statuses:
        by_state[BLOCKED if each.run_id in blocked and each.state == RunState.MISSING else each.state].append(each)
    parts: list[RenderableType] = [_counts(sweep, by_state)]
    if by_state[RunState.RUNNING]:
        parts.append(_running(by_state[RunState.RUNNING]))
    for state in (RunState.PREEMPTED, RunState.INTERRUPTED, RunState.FAILED, RunState.DIVERGED):
        if by_state[state]:
            parts += _grouped(state, by_state[state])
    parts += _notes(sweep, plan, by_state[RunState.DONE])
    if jobs is None:
        parts.append(
            f"The queue of {sweep.cluster.scheduler} cannot be asked from this machine: runs that wait in it are shown "
            "as interrupted or missing."
        )
    return Group(*parts)


def damage(sweep: Sweep, statuses: Sequence[RunStatus]) -> list[str]:
    """Return a line for each damaged file of these runs and of the sweep's submissions; at most `ROWS` lines."""
    files = [each.reason or "" for each in statuses if each.state == RunState.DAMAGED]
    files += map(str, Submissions(sweep.folder).damaged())
    return [f"damaged: {line}" for line in shortened(files, ROWS)]


def _counts(sweep: Sweep, by_state: Mapping[str, list[RunStatus]]) -> Narrowed:
    table = Table(title=f"{sweep.name}: {counted(len(sweep.by_id), 'run')} in {sweep.folder}", title_justify="left")
    for name in ("state", "runs", "attempts", "FLOP spent", "of budget", "device-hours", "wasted"):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    table.add_column("meaning", min_width=24)
    meanings: dict[str, str] = {str(state): text for state, text in MEANINGS.items()}
    meanings[BLOCKED] = "see embedscale sweep plan"
    for state, meaning in meanings.items():
        if by_state.get(state):
            table.add_row(state, *_sums(by_state[state]), meaning)
    table.add_section()
    every = [each for members in by_state.values() for each in members]
    table.add_row("total", *_sums(every), "", style="bold")
    return Narrowed(table, "wasted", "attempts", "FLOP spent", "device-hours")


def _sums(members: Sequence[RunStatus]) -> list[str]:
    spent, budget = sum(each.spent_flop for each in members), sum(each.budget_flop for each in members)
    return [
        f"{len(members):,}",
        f"{sum(each.attempts for each in members):,}",
        f"{spent:.3g}",
        f"{spent / budget:.0%}" if budget else "–",
        f"{sum(each.device_hours for each in members):,.2f}",
        f"{sum(each.wasted_hours for each in members):,.2f}",
    ]


def _running(members: Sequence[RunStatus]) -> Narrowed:
    table = Table(title="running", title_justify="left")
    for name in ("run", "spent", "of FLOP", "left", "attempt", "host", "job"):
        table.add_column(name, justify="left" if name in ("run", "host", "job") else "right", no_wrap=True)
    for each in members[:ROWS]:
        table.add_row(
            each.run_id,
            f"{each.spent_flop / each.budget_flop:.0%}",
            f"{each.budget_flop:.3g}",
            "–" if each.seconds_left is None else duration(each.seconds_left),
            f"{each.attempts}",
            each.host or "",
            each.job_id or "",
        )
    if len(members) > ROWS:
        table.add_row(f"and {len(members) - ROWS:,} more")
    return Narrowed(table, "job", "attempt", "host", "of FLOP")


def _grouped(state: str, members: Sequence[RunStatus]) -> list[RenderableType]:
    """Return a table with a row for each reason, and what the example of each reason has printed."""
    groups: dict[str, list[RunStatus]] = defaultdict(list)
    for each in members:
        groups[each.reason or "–"].append(each)
    table = Table(title=f"{state} runs, grouped by reason", title_justify="left")
    table.add_column("runs", justify="right")
    for name in ("reason", "hosts", "for example"):
        table.add_column(name, overflow="fold")
    for reason, alike in sorted(groups.items(), key=lambda item: -len(item[1])):
        hosts = Counter(each.host for each in alike if each.host)
        named = ", ".join(f"{host} ({count})" for host, count in hosts.most_common(3))
        table.add_row(f"{len(alike):,}", reason, named, alike[0].run_id)
    paths = [f"  {path}" for alike in groups.values() for path in alike[0].messages]
    # Without the table's folds: a path is there to be copied.
    return [table, Text("\n".join(paths), no_wrap=True, overflow="ignore")] if paths else [table]


def _notes(sweep: Sweep, plan: SweepPlan, done: Sequence[RunStatus]) -> Iterable[str]:
    estimated = sum(plan.by_id[each.run_id].gpu_hours for each in done)
    used = sum(each.device_hours for each in done)
    if done and estimated:
        runs = counted(len(done), "run")
        yield f"Estimate: {estimated:,.2f} device-hours for the {runs} done; {used:,.2f} were used."
    others = sum(
        RunDirectory(sweep.folder / name).attempts.exists() for name in _names(sweep.folder) - set(sweep.by_id)
    )
    if others:
        yield f"{counted(others, 'other run')} in {sweep.folder}: not of this sweep file."


def command(args: Namespace) -> int:
    """`embedscale sweep status SWEEP.yaml [key=value …]`."""
    sweep = grid.load(args.sweep, args.words)
    scheduler = scheduler_of(sweep.cluster.scheduler, sweep.folder)
    queue = scheduler.jobs()
    jobs = Submissions(sweep.folder).jobs_by_run(queue)
    statuses = explained(survey(sweep, jobs), scheduler)
    if args.json:
        print_json(SweepStatus(sweep.name, sweep.folder, queue is not None, statuses))
        return DONE
    console(150).print(render(sweep, plan_sweep(sweep), statuses, jobs))
    for line in damage(sweep, statuses):
        print(line)
    if choices := Choices.of(sweep.folder):
        print("\n".join(choices.lines()))
    return DONE


def watch(args: Namespace) -> int:
    """`embedscale sweep watch SWEEP.yaml [--every SECONDS]`: the status, until Ctrl-C or until nothing runs or waits.

    A terminal shows all tables anew each time. A file or a pipe gets a line when a run has changed its state, and the
    tables at the end.
    """
    from rich.live import Live

    bounded("--every", args.every, 0, 86_400, above=True)
    sweep = grid.load(args.sweep, args.words)
    scheduler = scheduler_of(sweep.cluster.scheduler, sweep.folder)
    plan = plan_sweep(sweep)
    blocked = {each.run_id for each in plan.blocked}
    output, last, over = console(150), "", False
    with suppress(KeyboardInterrupt), Live(console=output, auto_refresh=False) as live:
        while True:
            jobs = Submissions(sweep.folder).jobs_by_run(scheduler.jobs())
            statuses = survey(sweep, jobs)
            awaited = [each for each in statuses if each.state != RunState.MISSING or each.run_id not in blocked]
            over = reader_left() or not _waits(sweep, awaited, jobs)
            shown = Group(render(sweep, plan, statuses, jobs), *damage(sweep, statuses))
            if output.is_terminal:
                live.update(shown, refresh=True)
            elif over:  # Live would print no end of line
                output.print(shown)
            elif (line := counts_line(sweep, statuses)) != last:
                print(f"{now()} {line}", flush=True)
                last = line
            if over:
                break
            time.sleep(args.every)
    if over and {each.state for each in awaited} & {RunState.INTERRUPTED, RunState.MISSING}:
        print("nothing runs or waits; `embedscale sweep submit` goes on with the rest")
    return DONE


def counts_line(sweep: Sweep, statuses: Sequence[RunStatus]) -> str:
    """Return how many runs are in each state, on one line."""
    counts = Counter(each.state for each in statuses)
    return f"{sweep.name}: " + ", ".join(f"{counts[state]:,} {state}" for state in RunState if counts[state])


def _waits(sweep: Sweep, statuses: Sequence[RunStatus], jobs: Mapping[str, Job] | None) -> bool:
    """Return whether a run may still change its state without another submit."""
    states, here = {each.state for each in statuses}, Local(sweep.folder)
    if states <= set(ENDED):
        return False
    if jobs is None or states & {RunState.RUNNING, RunState.QUEUED, RunState.PREEMPTED}:
        return True  # a queue that cannot be asked may hold the others
    # A process of another host may have left its note behind. If it lives, its run's lease says so.
    return any(job.host == here.host for job in here.jobs())
