"""MTEB scores of a sweep's finished runs, in jobs apart from training: one GPU each, a task at a time."""

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.run.config import RunConfig
from embedscale.run.directory import RunDirectory
from embedscale.run.record import sound
from embedscale.run.stop import StopRequest
from embedscale.serving.tasks import HELD_OUT, names_of, task_of
from slurm.grid import Sweep
from slurm.plan import Estimate, SweepPlan
from slurm.scheduler.queue import Job

TASK_SECONDS = 300.0  # assumed of a task, for sharing jobs


def checked(words: Sequence[str]) -> list[str]:
    """Task names, suites written out. Raises UserError for one that mteb does not know, before a job is sent."""
    names = names_of(words)
    for name in names:
        if name != HELD_OUT:
            task_of(name)
    return names


def to_score(sweep: Sweep, plan: SweepPlan, names: Sequence[str], jobs: Mapping[str, Job] | None) -> list[Estimate]:
    """The finished runs that lack a score and are not on their way, and a line that counts the grid."""
    counts: Counter[str] = Counter()
    chosen = []
    for run_id, run in sweep.by_id.items():
        directory = RunDirectory(sweep.folder / run_id)
        record = sound(directory.read_record())
        missing = [name for name in names if not directory.score(name).exists()]
        if record is None or record.status != "done":
            counts["not done"] += 1
        elif not missing:
            counts["scored"] += 1
        elif run_id in (jobs or {}):
            counts["queued"] += 1
        else:
            counts["without all scores"] += 1
            alone = replace(run, resources=replace(run.resources, nodes=1, devices=1, shard=False))
            chosen.append(replace(plan.by_id[run_id], run=alone, seconds=TASK_SECONDS * len(missing)))
    said = ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items()))
    print(f"{sweep.name}: {len(sweep.by_id):,} runs: {said}; {len(chosen):,} to score on {len(names)} tasks")
    return chosen


def score_all(runs: Sequence[RunConfig], names: Sequence[str], stop: StopRequest) -> dict[str, str]:
    """Score runs one after the other; a stopped one goes on at its first task without a score. Outcomes by run id."""
    from embedscale.serving.evaluate import evaluate

    outcomes = dict.fromkeys((run.run_id for run in runs), "interrupted")
    for run in runs:
        if stop.requested:
            break
        try:
            code = evaluate(str(run.folder), names, stop=stop)
        except UserError as error:
            print(f"{run.run_id}: {error}", flush=True)
            code = FAILED
        except Exception:  # a task can fail in many ways, and the other runs are not to be left without scores
            traceback.print_exc()
            code = FAILED
        outcomes[run.run_id] = {DONE: "done", INTERRUPTED: "interrupted"}.get(code, "failed")
    return outcomes
