"""Where a sweep stands: run directories first, the queue second, accounting where there is any.

A run is done when its record says so, whatever SLURM calls its job. The queue only tells apart runs that will go on by
themselves from runs that wait for the next `submit`; accounting only explains what ended a job. Both may be missing.
"""

import os
import signal
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from embedscale.errors import DONE, UserError
from embedscale.run.config import bounded
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import lease_holder
from embedscale.run.record import AttemptRecord, sound
from slurm import grid
from slurm.grid import Sweep
from slurm.plan import Narrowed, SweepPlan, duration, plan_sweep
from slurm.scheduler import local, queue
from slurm.scheduler.queue import Job

ENDED = ("failed", "diverged", "done")
SILENT = "ended without a word"
STATES = {
    "running": "has a process at it",
    "queued": "waits in the queue for its first attempt",
    "preempted": "was stopped and waits in the queue to go on",
    "interrupted": "was stopped; the next submit goes on with it",
    "missing": "was never started and is not queued",
    "failed": "ended with an error; submit --retry-failed tries again",
    "diverged": "ended with a loss that is no number",
    "done": "spent its budget and has its record",
}


@dataclass(frozen=True)
class RunStatus:
    """One run as its directory and the queue tell it."""

    run_id: str
    state: str  # a key of STATES
    attempts: int = 0
    device_hours: float = 0.0  # of all attempts
    wasted_hours: float = 0.0  # device-hours whose work had to be done again
    spent_flop: float = 0.0
    budget_flop: float = 0.0
    seconds_left: float | None = None
    host: str | None = None
    job_id: str | None = None
    reason: str | None = None  # of a failure, a divergence or an interruption


def survey(sweep: Sweep, jobs: Mapping[str, Job] | None) -> list[RunStatus]:
    """The status of every run of the grid, in its order.

    `jobs` are the queued and running jobs by run id, as `queue.jobs_by_run` gives them; None where nobody could say.
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
        return RunStatus(run_id, "missing", budget_flop=budget)
    return RunStatus(run_id, "queued", budget_flop=budget, job_id=job.id, reason=job.reason)


def status_of(directory: RunDirectory, run_id: str, budget: float, devices: int, job: Job | None) -> RunStatus:
    """One run's status. Raises UserError where a file of the run is damaged."""
    record = sound(directory.read_record())
    if record is not None:
        attempts = record.attempts
        return RunStatus(
            run_id,
            record.status,
            attempts=len(attempts),
            device_hours=record.gpu_hours,
            wasted_hours=wasted_hours(attempts) * devices,
            spent_flop=record.spent_flop,
            budget_flop=record.budget_flop,
            reason=attempts[-1].reason if attempts and record.status != "done" else None,
        )
    attempts = sound(directory.read_attempts())
    holder = lease_holder(directory.lease)
    hours = sum(_hours(attempt, now=holder is not None and attempt is attempts[-1]) for attempt in attempts) * devices
    common: dict[str, Any] = {
        "attempts": len(attempts),
        "device_hours": hours,
        "wasted_hours": wasted_hours(attempts) * devices,
        "budget_flop": budget,
    }
    if holder is not None:
        return RunStatus(
            run_id,
            "running",
            **common,
            spent_flop=holder.get("spent_flop", 0),
            seconds_left=holder.get("seconds_left"),
            host=holder["host"],
            job_id=holder.get("job_id"),
        )
    if not attempts:
        return _unstarted(run_id, budget, job)
    last = attempts[-1]
    # A job that has seen the run fail is done with it, and works on at the others of its bundle; one that begins will
    # try it again.
    if last.ended == "failed" and (job is None or (job.running and job.id == last.job_id)):
        state = "failed"
    else:
        state = "interrupted" if job is None else "preempted"
    return RunStatus(
        run_id,
        state,
        **common,
        spent_flop=last.to_flop or last.from_flop or 0,
        host=last.host,
        job_id=job.id if job else last.job_id,
        reason=last.reason or (SILENT if last.ended in (None, "killed") else None),
    )


def _hours(attempt: AttemptRecord, now: bool = False) -> float:
    """Hours that an attempt took of a device, shared out as in a record's `gpu_hours`; of one that is still open, until
    now; zero where its end is not known.
    """
    if attempt.end is None and not now:
        return 0.0
    return max(0.0, attempt.seconds) / 3600 / attempt.sharing


def wasted_hours(attempts: Sequence[AttemptRecord]) -> float:
    """Hours of work that a later attempt had to repeat, because no checkpoint held it.

    An attempt's share kept is what its successor began with over what it had reached. One that was killed did not say
    what it had reached: its time beyond that of its successor's beginning, at the speed of the run's other attempts,
    was lost. An attempt that failed has lost all that it did.
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


def render(
    sweep: Sweep, plan: SweepPlan, statuses: Sequence[RunStatus], jobs: Mapping[str, Job] | None, rows: int = 20
) -> Group:
    """The status as tables: counts by state, what runs, what was interrupted, failures by their last line."""
    blocked = {each.run_id for each in plan.blocked}
    by_state: dict[str, list[RunStatus]] = defaultdict(list)
    for each in statuses:
        by_state["cannot be run" if each.run_id in blocked and each.state == "missing" else each.state].append(each)
    parts: list[Any] = [_counts(sweep, by_state)]
    if by_state["running"]:
        parts.append(_running(by_state["running"], rows))
    for state in ("preempted", "interrupted", "failed", "diverged"):
        if by_state[state]:
            parts.append(_grouped(state, by_state[state]))
    parts += _notes(sweep, plan, by_state["done"])
    if jobs is None:
        parts.append(
            "The queue cannot be asked (squeue is missing or fails): what waits in it counts as interrupted or missing."
        )
    return Group(*parts)


def _counts(sweep: Sweep, by_state: Mapping[str, list[RunStatus]]) -> Narrowed:
    table = Table(title=f"{sweep.name}: {len(sweep.by_id):,} runs in {sweep.folder}", title_justify="left")
    for name in ("state", "runs", "attempts", "FLOP spent", "of budget", "device-hours", "wasted"):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    table.add_column("meaning", min_width=24)
    meanings = STATES | {"cannot be run": "see embedscale sweep plan"}
    for state, meaning in meanings.items():
        if by_state.get(state):
            table.add_row(state, *_sums(by_state[state]), meaning)
    table.add_section()
    every = [each for members in by_state.values() for each in members]
    table.add_row("in all", *_sums(every), "", style="bold")
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


def _running(members: Sequence[RunStatus], rows: int) -> Narrowed:
    table = Table(title="running", title_justify="left")
    for name in ("run", "spent", "of FLOP", "left", "attempt", "host", "job"):
        table.add_column(name, justify="left" if name in ("run", "host", "job") else "right", no_wrap=True)
    for each in members[:rows]:
        table.add_row(
            each.run_id,
            f"{each.spent_flop / each.budget_flop:.0%}",
            f"{each.budget_flop:.3g}",
            "–" if each.seconds_left is None else duration(each.seconds_left),
            f"{each.attempts}",
            each.host or "",
            each.job_id or "",
        )
    if len(members) > rows:
        table.add_row(f"and {len(members) - rows:,} more")
    return Narrowed(table, "job", "attempt", "host", "of FLOP")


def _grouped(state: str, members: Sequence[RunStatus]) -> Table:
    groups: dict[str, list[RunStatus]] = defaultdict(list)
    for each in members:
        groups[each.reason or "–"].append(each)
    table = Table(title=f"{state}, by the last that they said", title_justify="left")
    table.add_column("runs", justify="right")
    for name in ("why", "hosts", "such as"):
        table.add_column(name, overflow="fold")
    for reason, alike in sorted(groups.items(), key=lambda item: -len(item[1])):
        hosts = Counter(each.host for each in alike if each.host)
        named = ", ".join(f"{host} ({count})" for host, count in hosts.most_common(3))
        table.add_row(f"{len(alike):,}", reason, named, alike[0].run_id)
    return table


def _notes(sweep: Sweep, plan: SweepPlan, done: Sequence[RunStatus]) -> Iterable[str]:
    estimated = sum(plan.by_id[each.run_id].gpu_hours for each in done)
    used = sum(each.device_hours for each in done)
    if done and estimated:
        yield f"Estimate: {estimated:,.2f} device-hours for the {len(done):,} runs done; they took {used:,.2f}."
    others = sum(
        RunDirectory(sweep.folder / name).attempts.exists() for name in _names(sweep.folder) - set(sweep.by_id)
    )
    if others:
        yield f"{others:,} other runs in {sweep.folder} are none of this sweep file."


def command(args: Any) -> int:
    """`embedscale sweep status SWEEP.yaml [key=value …]`."""
    sweep = grid.load(args.sweep, args.words)
    jobs = queue.jobs_by_run(sweep.folder)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=150)
    console.print(render(sweep, plan_sweep(sweep), explained(survey(sweep, jobs)), jobs), highlight=False)
    return DONE


def watch(args: Any) -> int:
    """`embedscale sweep watch SWEEP.yaml [--every SECONDS]`: the same, refreshed until Ctrl-C or until all is done."""
    from rich.live import Live

    bounded("--every", args.every, 0, 86_400, above=True)
    sweep = grid.load(args.sweep, args.words)
    plan = plan_sweep(sweep)
    blocked = {each.run_id for each in plan.blocked}
    with suppress(KeyboardInterrupt), Live(console=Console(), auto_refresh=False) as live:
        while True:
            jobs = queue.jobs_by_run(sweep.folder)
            statuses = survey(sweep, jobs)
            live.update(render(sweep, plan, statuses, jobs), refresh=True)
            if all(each.state in ENDED or each.run_id in blocked for each in statuses):
                break
            time.sleep(args.every)
    return DONE


def cancel(args: Any) -> int:
    """`embedscale sweep cancel SWEEP.yaml [--yes]`: end the sweep's jobs, and its processes here. Asks first."""
    sweep = grid.load(args.sweep, args.words)
    jobs = queue.jobs_by_run(sweep.folder)
    processes = local.processes_at(sweep.folder)
    here = [each["pid"] for each in processes if each["host"] == socket.gethostname()]
    for each in processes:
        if each["pid"] not in here:
            print(f"a process of {each['host']} ({each['pid']}) is at this sweep; cancel it there")
    if jobs is None and not here:
        raise UserError("squeue: cannot be asked here, so that no job of the sweep is known; nothing was cancelled")
    jobs = jobs or {}
    handles = {job.handle for run_id, job in jobs.items() if run_id in sweep.by_id}
    if not handles and not here:
        print(f"{sweep.name}: no job in the queue; nothing to cancel")
        return DONE
    what = [f"{len(here)} processes on this machine"] if here else []
    if handles:
        # A job goes as a whole, with the runs that it bundles and this call's file and settings do not name.
        going = {run_id: job for run_id, job in jobs.items() if job.handle in handles}
        running = sum(job.running for job in going.values())
        what.append(f"{len(handles):,} jobs with {len(going):,} runs, {running:,} of them in jobs that run now")
        if others := len(going.keys() - sweep.by_id.keys()):
            what.append(f"{others:,} of these runs were not asked for, but share a job with one that was")
    print(f"{sweep.name}: {'; '.join(what)}.")
    print("What they have checkpointed stays; the next submit goes on with them.")
    if not args.yes:
        try:
            answer = input("Cancel them? [y/N] ")
        except EOFError:
            raise UserError("cancel: nobody is there to answer; add --yes") from None
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was cancelled")
            return DONE
    for pid in here:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    queue.cancel(sorted(handles))
    print(f"cancelled {len(handles):,} jobs" + (f", asked {len(here)} processes to save and stop" if here else ""))
    return DONE


def explained(statuses: Sequence[RunStatus]) -> list[RunStatus]:
    """Attempts that ended without a word, explained by accounting where there is any."""
    silent = {each.job_id for each in statuses if each.reason == SILENT and each.job_id}
    said = queue.accounting(sorted(silent)) if silent else {}
    return [
        replace(each, reason=f"{SILENT}; accounting says {said[each.job_id]}")
        if each.reason == SILENT and each.job_id in said
        else each
        for each in statuses
    ]
