"""Send what is left of a sweep to SLURM, and return at once.

What is wanted (the grid) is held against what is there (run directories) and what is on its way (the queue); only runs
that are missing, interrupted or, on demand, failed go out. Runs that need the same resources share arrays, short ones
share jobs, and over all arrays the sweep never holds more GPUs than its cluster file allows.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embedscale.errors import DONE, UserError
from embedscale.run.lease import Lease
from slurm import grid
from slurm.cluster import Cluster, ResourceClass
from slurm.grid import Sweep
from slurm.plan import Estimate, SweepPlan, plan_sweep, refuse_above
from slurm.scheduler import node, queue
from slurm.scheduler.queue import Job
from slurm.scheduler.snapshot import snapshot
from slurm.scoring import checked, to_score
from slurm.status import survey

MAX_ARRAY = 1001  # SLURM's default, where it cannot be asked
LOOK_SECONDS = 20.0  # for a job that sbatch did submit before it lost touch with the controller
LOST_TOUCH = re.compile("time|contact|connect|communicat|transmi|recei", re.IGNORECASE)
OUTGOING = ("missing", "interrupted")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Array:
    """Jobs of one shape, each with the runs that it works through."""

    resource_class: ResourceClass
    nodes: int
    devices: int  # tasks a node, a GPU each
    tasks: list[list[str]]  # run ids
    scores: tuple[str, ...] = ()  # mteb tasks to score the runs on; none: train them

    @property
    def gpus(self) -> int:
        """That one of its jobs holds, of the sweep's `max_gpus`; without GPUs, its processes."""
        return self.nodes * self.devices


def reconcile(
    sweep: Sweep, plan: SweepPlan, jobs: Mapping[str, Job] | None, retry_failed: bool = False
) -> list[Estimate]:
    """The runs to send out, and a line that counts every state of the grid."""
    blocked = {each.run_id for each in plan.blocked}
    outgoing = (*OUTGOING, "failed") if retry_failed else OUTGOING
    states = {each.run_id: each.state for each in survey(sweep, jobs)}
    chosen = [run_id for run_id, state in states.items() if state in outgoing and run_id not in blocked]
    counts = Counter("cannot be run" if run_id in blocked else state for run_id, state in states.items())
    said = ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items()))
    print(f"{sweep.name}: {len(states):,} runs: {said}; {len(chosen):,} to submit")
    return [plan.by_id[run_id] for run_id in chosen]


def arrange(estimates: Sequence[Estimate], cluster: Cluster, max_array: int = MAX_ARRAY) -> list[Array]:
    """Runs into jobs, and jobs into arrays of equal shape, none longer than `max_array`."""
    shapes: dict[tuple[ResourceClass, int, int], list[Estimate]] = defaultdict(list)
    for each in estimates:
        resources = each.run.resources
        # What only plans and names must not part an array.
        shape = replace(each.resource_class, name="", up_to=math.inf, utilisation=1.0)
        shapes[shape, resources.nodes, resources.devices].append(each)
    arrays = []
    for (shape, nodes, devices), members in shapes.items():
        tasks = _bundles(members, cluster, shape.hours) if nodes * devices == 1 else [[m.run_id] for m in members]
        count = math.ceil(len(tasks) / max_array)
        size = math.ceil(len(tasks) / count)
        arrays += [Array(shape, nodes, devices, tasks[i : i + size]) for i in range(0, len(tasks), size)]
    return arrays


def _bundles(estimates: Sequence[Estimate], cluster: Cluster, hours: float) -> list[list[str]]:
    """Runs of one process into jobs of about `bundle_minutes`, the longest first."""
    limit = min(60 * cluster.bundle_minutes, 0.8 * 3600 * hours) * cluster.side_by_side
    bundles: list[list[str]] = []
    room = 0.0
    for each in sorted(estimates, key=lambda each: -each.seconds):
        if not bundles or each.seconds > room:
            bundles.append([])
            room = limit
        bundles[-1].append(each.run_id)
        room -= each.seconds
    return bundles


def throttles(arrays: Sequence[Array], max_gpus: int, held: Sequence[tuple[str, int]]) -> list[tuple[int, list[str]]]:
    """For each array, how many of its jobs may run at once, and after the end of which it may begin.

    All of them together, with the arrays that `held` names (job, GPUs) as already in the queue, stay within `max_gpus`:
    an array for which nothing is left takes over what earlier ones hold. Of this call's own arrays the result gives the
    index as "#0". Raises UserError where one run needs more.
    """
    holders = list(held)
    free = max(0, max_gpus - sum(gpus for _, gpus in held))
    result = []
    for index, array in enumerate(arrays):
        if array.gpus > max_gpus:
            raise UserError(f"max_gpus: {max_gpus} are fewer than the {array.gpus} that one run needs")
        wanted = [len(each.tasks) * each.gpus for each in arrays[index:]]
        after: list[str] = []
        if free >= array.gpus:
            parallel = min(len(array.tasks), max(1, int(free * wanted[0] / sum(wanted)) // array.gpus))
            free -= parallel * array.gpus
        else:
            share, free = free, 0
            while share < array.gpus:
                job, gpus = holders.pop(0)
                after.append(job)
                share += gpus
            parallel = min(len(array.tasks), share // array.gpus)
            if share > parallel * array.gpus:  # the last one holds more than this array takes over
                holders.insert(0, (after[-1], share - parallel * array.gpus))
        holders.append((f"#{index}", parallel * array.gpus))
        result.append((parallel, after))
    return result


def submit(
    sweep: Sweep,
    plan: SweepPlan,
    retry_failed: bool = False,
    max_gpu_hours: float | None = None,
    scores: Sequence[str] = (),
) -> int:
    """Send out what is missing, interrupted or, with `retry_failed`, failed; returns how many runs went out.

    With `scores`, names of mteb tasks, what is sent out is instead the scoring of finished runs.

    Raises UserError where the queue cannot be asked, another submit is at work, or sbatch refuses: the arrays that
    were submitted before are named, stay in the queue, and are known to the next submit.
    """
    with _alone(sweep.folder) as lease:
        jobs = queue.jobs_by_run(sweep.folder)
        if jobs is None:
            raise UserError("squeue: cannot be asked, so that runs might go out twice; nothing was submitted")
        chosen = to_score(sweep, plan, scores, jobs) if scores else reconcile(sweep, plan, jobs, retry_failed)
        refuse_above(SweepPlan(sweep, chosen), max_gpu_hours)
        if not chosen:
            return 0
        if sick := node.sick_nodes(sweep.folder):
            print(f"kept away from: {', '.join(f'{name} ({fault})' for name, fault in sick.items())}")
        copy, facts = snapshot(sweep.folder / queue.FOLDER / "code")
        arrays = [replace(each, scores=tuple(scores)) for each in arrange(chosen, sweep.cluster, _max_array())]
        sent: dict[str, str] = {}
        for index, (parallel, after) in enumerate(throttles(arrays, sweep.cluster.max_gpus, _held(sweep.folder, jobs))):
            dependencies = [sent.get(job, job) for job in after]
            try:
                if not lease.held():
                    raise UserError("another submit of this sweep has taken over from this one, which was suspended")
                sent[f"#{index}"] = _send(sweep, arrays[index], parallel, dependencies, sorted(sick), copy, facts)
            except UserError as error:
                done = ", ".join(sent.values()) or "none"
                raise UserError(f"{error}; submitted before: {done}; submit again for the rest") from None
        count = sum(len(array.tasks) for array in arrays)
        print(f"submitted {len(chosen):,} runs as {count:,} jobs in {len(arrays):,} arrays: {', '.join(sent.values())}")
        return len(chosen)


@contextmanager
def _alone(folder: Path) -> Iterator[Lease]:
    """Two submits at once would both find the same runs missing."""
    lease = Lease(folder / queue.FOLDER / "submit.lease")
    try:
        lease.take()
    except UserError as error:
        raise UserError(f"another submit of this sweep is at work: {error}") from None
    try:
        yield lease
    finally:
        lease.release()


def _max_array() -> int:
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return MAX_ARRAY
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize" and value.strip().isdigit():
            return max(1, int(value))
    return MAX_ARRAY


def _held(folder: Path, jobs: Mapping[str, Job]) -> list[tuple[str, int]]:
    """The sweep's arrays in the queue, and the most GPUs that each may still hold."""
    waiting = Counter((job.array, job.name) for job in set(jobs.values()))
    noted = queue.submissions(folder)
    return [
        (array, min(count, noted[name].get("parallel", count)) * noted[name].get("gpus", 1))
        for (array, name), count in waiting.items()
    ]


def _send(
    sweep: Sweep,
    array: Array,
    parallel: int,
    after: Sequence[str],
    sick: Sequence[str],
    copy: Path,
    code: Mapping[str, Any],
) -> str:
    """Submit one array; returns its job number."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    cluster, shape = sweep.cluster, array.resource_class
    name = f"{sweep.name}-{uuid.uuid4().hex[:8]}"
    minutes = math.ceil(60 * shape.hours - 1e-6)
    if cluster.warning_seconds >= 60 * minutes:
        raise UserError(f"warning_seconds: {cluster.warning_seconds} leave nothing of a job of {minutes} minutes")
    folder = sweep.folder.absolute()
    node.Orders(
        runs={run_id: asdict(sweep.by_id[run_id]) for task in array.tasks for run_id in task},
        limit_seconds=60 * minutes,
        warning_seconds=cluster.warning_seconds,
        requeue=cluster.requeue,
        side_by_side=cluster.side_by_side if array.gpus == 1 else 1,
        gpus=array.devices if shape.gpus else 0,
        cpus=shape.cpus,
        memory_gb=shape.memory_gb * array.devices,
        code=dict(code),
        scores=list(array.scores),
    ).write(folder, name)
    note = {"parallel": parallel, "gpus": array.gpus}
    queue.note_submission(sweep.folder, name, array.tasks, **note)
    files = folder / queue.FOLDER / name
    executor = submitit.SlurmExecutor(files)
    given = {
        "partition": shape.partition or cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": shape.constraint,
        "gpus_per_node": array.devices if shape.gpus else None,
        "exclude": ",".join(sick) or None,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
    }
    executor.update_parameters(
        job_name=name,
        time=minutes,
        nodes=array.nodes,
        ntasks_per_node=array.devices,
        cpus_per_task=shape.cpus,
        mem=f"{math.ceil(1000 * shape.memory_gb * array.devices)}M",
        array_parallelism=parallel,
        signal_delay_s=cluster.warning_seconds,
        stderr_to_stdout=True,
        setup=_setup(cluster, copy),
        # Since 22.05 srun does not take --cpus-per-task over from sbatch.
        srun_args=[f"--cpus-per-task={shape.cpus}", "--kill-on-bad-exit=1"],
        additional_parameters={"requeue" if cluster.requeue else "no-requeue": True},
        **{key: value for key, value in given.items() if value is not None},
    )
    tasks = [(str(folder), name, task) for task in array.tasks]
    try:
        with _clean_environment():
            job = executor.map_array(node.work, *zip(*tasks, strict=True))[0].job_id.split("_")[0]
    except (FailedJobError, FailedSubmissionError) as error:
        lines = str(error).splitlines()
        why = ([line for line in lines if "error" in line.lower()] or lines)[-1].strip()
        job = _look_for(name, LOOK_SECONDS if LOST_TOUCH.search(why) else 0)
        if job is None:
            raise UserError(f"sbatch: {why}") from None
        print(f"sbatch failed, but job {job} is in the queue under its name")
        _write_pickles(files, job, tasks)
    queue.note_submission(sweep.folder, name, array.tasks, job_id=job, **note)
    return job


def _setup(cluster: Cluster, copy: Path) -> list[str]:
    """Shell lines before srun. Without PYTHONSAFEPATH the folder of submission would come before the copied code."""
    variables = {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    if cluster.offline:
        variables |= dict.fromkeys(OFFLINE, "1")
    lines = [f"export {key}={shlex.quote(str(value))}" for key, value in (variables | cluster.environment).items()]
    return [*cluster.setup, *lines]


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Without the variables of a job that this process may itself be in; where SLURM's configuration lies stays."""
    from submitit.helpers import clean_env

    own = os.environ.get("SLURM_CONF")
    with clean_env([name for name in os.environ if name.startswith("PMI")]):
        if own is not None:
            os.environ["SLURM_CONF"] = own
        yield


def _look_for(name: str, seconds: float) -> str | None:
    """The number of the job that bears the name: sbatch may time out after the controller has taken the job."""
    deadline = time.monotonic() + seconds
    while True:
        found = [job.array for job in queue.jobs() or [] if job.name == name]
        if found or time.monotonic() > deadline:
            return found[0] if found else None
        time.sleep(2)


def _write_pickles(files: Path, job: str, tasks: Sequence[tuple[str, str, list[str]]]) -> None:
    """What submitit would have written, had sbatch told it the job's number; jobs wait a minute for it."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    for index, task in enumerate(tasks):
        paths = JobPaths(files, f"{job}_{index}" if len(tasks) > 1 else job)
        DelayedSubmission(node.work, *task).dump(paths.submitted_pickle)


def command(args: Any) -> int:
    """`embedscale sweep submit SWEEP.yaml [key=value …] [--to …] [--retry-failed] [--evaluate TASK …]`."""
    from slurm.scheduler import local

    scores = checked(args.evaluate or [])
    sweep = grid.load(args.sweep, args.words)
    plan = plan_sweep(sweep)
    to = args.to or ("slurm" if shutil.which("sbatch") else "here")
    if to == "slurm":
        if shutil.which("sbatch") is None:
            raise UserError("--to slurm: there is no sbatch here; allowed: here, this-process")
        if submit(sweep, plan, args.retry_failed, args.max_gpu_hours, scores):
            print(f"embedscale sweep watch {args.sweep}")
        return DONE
    jobs = queue.jobs_by_run(sweep.folder)
    chosen = to_score(sweep, plan, scores, jobs) if scores else reconcile(sweep, plan, jobs, args.retry_failed)
    refuse_above(SweepPlan(sweep, chosen), args.max_gpu_hours)
    if not chosen:
        return DONE
    # The longest first, so that none of them is begun last and runs on alone.
    runs = [each.run for each in sorted(chosen, key=lambda each: -each.seconds)]
    with local.announced(sweep.folder):
        if scores:
            return local.score_here(runs, scores)
        return (local.run_here if to == "here" else local.run_in_this_process)(sweep, runs)
