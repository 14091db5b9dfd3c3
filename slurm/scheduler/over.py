"""Tell that a sweep is over: run the command `on_done` of the cluster file once nothing is left to wait for.

The job that ends last runs the command, so no process waits for the sweep. The price: where the last job was killed, as
by a dead node, nobody tells; `sweep watch` ends in any case.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

from embedscale.run.directory import RunDirectory
from embedscale.run.lease import lease_holder
from embedscale.run.record import Damaged, RunRecord
from slurm.scheduler.submissions import Submissions

SECONDS = 60.0  # most time that the command may take


def tell_if_over(
    submissions: Submissions, command: str | None, runs: Sequence[str], scores: Sequence[str] = (), once: bool = False
) -> None:
    """Run the shell command if all `runs` have ended or, with `scores`, have these scores.

    The command reads a line with the number of runs in each state, and finds the sweep's name and folder in the
    variables EMBEDSCALE_SWEEP and EMBEDSCALE_FOLDER. With `once`, it runs once for the submissions noted so far.
    """
    if not command:
        return
    folder = submissions.folder
    states = Counter(_end_of(RunDirectory(folder / run_id), scores) for run_id in runs)
    if None in states or (once and not submissions.first_to_tell()):
        return
    line = f"{folder.name}: {', '.join(f'{count:,} {state}' for state, count in states.items())}\n"
    variables = {"EMBEDSCALE_SWEEP": folder.name, "EMBEDSCALE_FOLDER": str(folder)}
    try:
        done = subprocess.run(
            command, shell=True, input=line, text=True, env=os.environ | variables, timeout=SECONDS, check=False
        )
        why = f"exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"no end within {SECONDS:g} s"
    if why:
        print(f"on_done: {command}: {why}", file=sys.stderr, flush=True)


def _end_of(directory: RunDirectory, scores: Sequence[str]) -> str | None:
    """Return how a run ended; None if a job may still work on it, or a score is missing."""
    if scores:
        return "scored" if all(directory.score(name).exists() for name in scores) else None
    record = directory.read_record()
    if isinstance(record, RunRecord):
        return record.status
    attempts = directory.read_attempts() if record is None else record
    if isinstance(attempts, Damaged):
        return "damaged"
    if attempts and attempts[-1].ended == "failed":
        return None if lease_holder(directory.lease) else "failed"
    return None
