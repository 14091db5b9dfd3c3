"""Send what is left of a sweep to its scheduler and return at once, or run it on this machine.

The grid is compared with the run directories and with the queue: only runs that are missing, interrupted or, on
request, failed go out. A submit holds a lease while it looks and sends, so that two of them never send the same run.
"""

import shlex
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from embedscale.code import ROOT, digest_of, files_of
from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError, allowed
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import Lease, leased
from embedscale.run.record import Damaged
from embedscale.texts import counted
from slurm import grid
from slurm.arrange import arrange, throttles
from slurm.grid import Sweep
from slurm.plan import Estimate, SweepPlan, plan_sweep, refuse_above
from slurm.scheduler import node
from slurm.scheduler.choice import scheduler_of
from slurm.scheduler.local import Local
from slurm.scheduler.over import tell_if_over
from slurm.scheduler.scheduler import Array, Job, Request, Scheduler
from slurm.scheduler.slurm import ignored_variables
from slurm.scheduler.snapshot import CodeCopy, snapshot
from slurm.scheduler.submissions import Orders, Submission, Submissions
from slurm.scoring import checked
from slurm.status import RunState, damage, survey

TASK_SECONDS = 300.0  # assumed duration of one mteb task, by which runs to score are grouped into jobs


@dataclass(frozen=True)
class Wish:
    """Which runs of a sweep are wanted."""

    retry_failed: bool = False
    """Whether failed runs go out too."""
    max_gpu_hours: float | None = None
    """GPU-hours above which the submission is refused; None: any number."""
    scores: tuple[str, ...] = ()
    """Tasks of mteb on which finished runs are scored, instead of training."""
    dry: bool = False
    """Whether to show what would go out; nothing is sent or written."""


def choose(sweep: Sweep, plan: SweepPlan, jobs: Mapping[str, Job] | None, wish: Wish) -> list[Estimate]:
    """Return the runs to send out, and print how many runs are in each state.

    `jobs` are the queued and running jobs by run id; None if the queue cannot be asked. Raises UserError if the runs
    are estimated to need more than `wish.max_gpu_hours`.
    """
    if wish.scores:
        chosen, counts, what = _to_score(sweep, plan, jobs or {}, wish.scores)
    else:
        chosen, counts, what = _to_train(sweep, plan, jobs, wish.retry_failed)
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items()))
    print(f"{sweep.name}: {counted(len(sweep.by_id), 'run')}: {states}; {len(chosen):,} {what}")
    refuse_above(SweepPlan(sweep, chosen), wish.max_gpu_hours)
    return chosen


def _to_train(
    sweep: Sweep, plan: SweepPlan, jobs: Mapping[str, Job] | None, retry_failed: bool
) -> tuple[list[Estimate], Counter[str], str]:
    blocked = {each.run_id for each in plan.blocked}
    outgoing = {RunState.MISSING, RunState.INTERRUPTED} | ({RunState.FAILED} if retry_failed else set())
    statuses = survey(sweep, jobs)
    states = {each.run_id: each.state for each in statuses}
    for line in damage(sweep, statuses):
        print(line)
    chosen = [plan.by_id[run_id] for run_id, state in states.items() if state in outgoing and run_id not in blocked]
    counts = Counter("cannot be run" if run_id in blocked else str(state) for run_id, state in states.items())
    return chosen, counts, "to submit"


def _to_score(
    sweep: Sweep, plan: SweepPlan, jobs: Mapping[str, Job], names: Sequence[str]
) -> tuple[list[Estimate], Counter[str], str]:
    counts: Counter[str] = Counter()
    chosen = []
    for run_id, run in sweep.by_id.items():
        directory = RunDirectory(sweep.folder / run_id)
        record = directory.read_record()
        missing = [name for name in names if not directory.score(name).exists()]
        if isinstance(record, Damaged):
            counts["damaged"] += 1
            print(f"damaged: {record}")
        elif record is None or record.status != "done":
            counts["not done"] += 1
        elif not missing:
            counts["scored"] += 1
        elif run_id in jobs:
            counts["queued"] += 1
        else:
            counts["without all scores"] += 1
            alone = replace(run, resources=replace(run.resources, nodes=1, devices=1, shard=False))
            chosen.append(replace(plan.by_id[run_id], run=alone, seconds=TASK_SECONDS * len(missing)))
    return chosen, counts, f"to score on {counted(len(names), 'task')}"


def submit(sweep: Sweep, plan: SweepPlan, scheduler: Scheduler, wish: Wish) -> int:
    """Send out the runs that `wish` asks for; returns how many went out.

    Raises UserError if the queue cannot be asked, another submit is at work, or the scheduler refuses. The message then
    names the arrays that were submitted before: they stay in the queue, and the next submit knows them.
    """
    submissions, limits = Submissions(sweep.folder), scheduler.limits()
    if limits is None:
        raise UserError(f"--to {sweep.cluster.scheduler}: this machine cannot submit to it; allowed: here")
    # Two submits at once would both find the same runs missing.
    with nullcontext() if wish.dry else leased(submissions.lease) as lease:
        jobs = _jobs_by_run(sweep, scheduler, submissions, wish.dry)
        chosen = choose(sweep, plan, jobs, wish)
        if not chosen:
            return 0
        arrays = arrange(chosen, sweep.cluster, limits, wish.scores)
        _refuse_brief_jobs(arrays, sweep.cluster.warning_seconds)
        avoid = _avoided(submissions)
        deliver: Callable[[Request], str]
        if lease is None:  # a dry run
            copy, deliver = submissions.code / digest_of(files_of(ROOT)), partial(_show, scheduler)
        else:
            copy, facts = snapshot(submissions.code)
            deliver = partial(_send, scheduler, submissions, lease, facts)
        sent: dict[str, str] = {}
        shares = throttles(arrays, sweep.cluster.max_gpus, _held(submissions, jobs))
        for index, (array, (parallel, holders)) in enumerate(zip(arrays, shares, strict=True)):
            name, after = f"{sweep.name}-{uuid.uuid4().hex[:8]}", tuple(sent.get(job, job) for job in holders)
            request = Request(name, array, sweep.cluster, node.work, parallel, after, avoid, copy)
            try:
                sent[f"#{index}"] = deliver(request)
            except UserError as error:
                done = ", ".join(sent.values()) or "none"
                raise UserError(f"{error}; submitted before: {done}; submit again for the rest") from None
        count = sum(len(array.tasks) for array in arrays)
        what = f"{counted(len(chosen), 'run')} as {counted(count, 'job')} in {counted(len(arrays), 'array')}"
        print(f"\nwould submit {what}" if wish.dry else f"submitted {what}: {', '.join(sent.values())}")
        return len(chosen)


def _jobs_by_run(sweep: Sweep, scheduler: Scheduler, submissions: Submissions, dry: bool) -> dict[str, Job]:
    """Return the job in the queue that holds each run of the sweep; of a silent queue, none in a dry run.

    Raises UserError if the queue cannot be asked, or if it has a job whose runs are not known.
    """
    queue = scheduler.jobs()
    if queue is None and dry:
        print(f"{sweep.cluster.scheduler}: the queue cannot be asked; shown as if no job of yours were in it")
        return {}
    if queue is None:
        raise UserError(
            f"{sweep.cluster.scheduler}: the queue cannot be asked; nothing was submitted, try again later "
            "(or run the sweep on this machine: --to here)"
        )
    waiting = {job.name: job.array for job in queue}
    for each in submissions.damaged():
        if each.path.stem in waiting:  # its runs must not go out twice
            raise UserError(f"{each}; its job {waiting[each.path.stem]} is queued: cancel it, or wait for its end")
    return submissions.jobs_by_run(queue) or {}


def _refuse_brief_jobs(arrays: Sequence[Array], warning_seconds: float) -> None:
    """Raise UserError if the runs of a job would be asked to stop as soon as it begins."""
    for minutes in (array.shape.minutes for array in arrays):
        if warning_seconds >= 60 * minutes:
            raise UserError(
                f"warning_seconds: {warning_seconds} s before the end of a job of {minutes} minutes leave no time to "
                "train; lower it or raise classes.hours"
            )


def _avoided(submissions: Submissions) -> tuple[str, ...]:
    """Return the nodes on which no job may run; print them, and the variables that no job follows."""
    sick = submissions.sick_nodes()
    if sick:
        print(f"avoided nodes: {', '.join(f'{name} ({fault})' for name, fault in sick.items())}")
    if ignored := ignored_variables():
        print(f"ignored: {', '.join(ignored)}; the cluster file says what jobs ask for")
    return tuple(sorted(sick))


def _held(submissions: Submissions, jobs: Mapping[str, Job]) -> list[tuple[str, int]]:
    """Return the sweep's arrays in the queue, each with the most GPUs that it may still hold."""
    waiting = Counter((job.array, job.name) for job in set(jobs.values()))
    noted = submissions.noted()
    return [
        (array, min(count, noted[name].parallel or count) * noted[name].gpus)
        for (array, name), count in waiting.items()
    ]


def _show(scheduler: Scheduler, request: Request) -> str:
    """Print an array's runs, job by job, and its script; return its name in place of the number it would get."""
    array = request.array
    jobs = "\n".join(f"#   {number}: {', '.join(task)}" for number, task in enumerate(array.tasks))
    heading = f"# --- {counted(len(array.tasks), 'job')}, at most {request.parallel:,} at the same time"
    print(f"\n{heading}\n{jobs}\n{scheduler.script(request)}".rstrip())
    return request.name


def _send(scheduler: Scheduler, submissions: Submissions, lease: Lease, code: CodeCopy, request: Request) -> str:
    """Write an array's orders and its note, submit it, and return its number."""
    if not lease.held():
        raise UserError("this submit was suspended, and another one has taken over")
    array, cluster, shape = request.array, request.cluster, request.array.shape
    orders = Orders(
        runs={run_id: run for task in array.tasks for run_id, run in task.items()},
        tasks=[list(task) for task in array.tasks],
        limit_seconds=60 * shape.minutes,
        warning_seconds=cluster.warning_seconds,
        requeue=cluster.requeue,
        side_by_side=cluster.side_by_side if array.gpus == 1 else 1,
        gpus=array.devices if shape.gpus else 0,
        cpus=shape.cpus,
        memory_gb=shape.memory_gb * array.devices,
        code=code,
        scores=array.scores,
        scheduler=cluster.scheduler,
        on_done=cluster.on_done,
    )
    submissions.write_orders(request.name, orders)
    note = Submission(request.name, [list(task) for task in array.tasks], request.parallel, array.gpus)
    submissions.note(note)
    job = scheduler.submit(request)
    submissions.note(replace(note, job_id=job))
    return job


def run_here(sweep: Sweep, plan: SweepPlan, wish: Wish) -> int:
    """Run or score on this machine what `wish` asks for; tell if no run of the plan is left to wait for.

    Returns DONE, FAILED if a run failed, or INTERRUPTED if it was stopped (SIGTERM, Ctrl-C) and can go on.
    """
    jobs = Submissions(sweep.folder).jobs_by_run(scheduler_of(sweep.cluster.scheduler, sweep.folder).jobs())
    # The longest first: a long run that begins last would run on alone.
    chosen = sorted(choose(sweep, plan, jobs, wish), key=lambda each: -each.seconds)
    if wish.dry:
        print("\n".join([f"would run {len(chosen):,} here, in this order:", *(each.run_id for each in chosen)]))
        return DONE
    if not chosen:
        return DONE
    here = Local(sweep.folder)
    with here.announced():
        for array in arrange(chosen, sweep.cluster, here.limits(), wish.scores):
            parallel = sweep.cluster.max_gpus // array.gpus
            here.submit(Request(sweep.name, array, sweep.cluster, node.work, parallel))
    awaited = [each.run_id for each in (chosen if wish.scores else plan.runnable)]
    tell_if_over(here.submissions, sweep.cluster.on_done, awaited, wish.scores)
    counts: Counter[str] = Counter()
    for run_id, outcome in here.outcomes.items():
        begun = outcome != "interrupted" or RunDirectory(sweep.folder / run_id).attempts.exists()
        counts[outcome if begun else "not started"] += 1
    print(f"{sweep.name}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if counts["interrupted"] or counts["not started"]:
        print(f"stopped by {here.stop.reason}; submit again to go on")
        return INTERRUPTED
    return FAILED if counts["failed"] else DONE


def destination(sweep: Sweep, to: str | None) -> str:
    """Return where runs go: "here" or the cluster's scheduler. None stands for the scheduler, if there is one."""
    if to is None:
        limits = scheduler_of(sweep.cluster.scheduler, sweep.folder).limits()
        to = "here" if limits is None or limits.foreground else sweep.cluster.scheduler
    allowed("--to", to, list(dict.fromkeys([sweep.cluster.scheduler, "here"])))
    return to


def command(args: Namespace) -> int:
    """`embedscale sweep submit SWEEP.yaml [key=value …] [--to …] [--dry-run] [--retry-failed] [--evaluate TASK …]`."""
    wish = Wish(args.retry_failed, args.max_gpu_hours, tuple(checked(args.evaluate or [])), args.dry_run)
    sweep = grid.load(args.sweep, args.words)
    plan = plan_sweep(sweep)
    if destination(sweep, args.to) == "here":
        return run_here(sweep, plan, wish)
    if submit(sweep, plan, scheduler_of(sweep.cluster.scheduler, sweep.folder), wish) and not wish.dry:
        print(f"embedscale sweep watch {shlex.join([args.sweep, *args.words])}")
    return DONE
