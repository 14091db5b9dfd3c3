"""What SLURM says: which of its jobs hold which runs, what ended them, and how to take them out of the queue.

A submission is written down beside the run directories before it goes out, under the job name that it goes out with:
the queue is then read by name, so that a job counts even where sbatch timed out and never told its number.
Only this module runs squeue, sacct and scancel. Any of them may be missing.
"""

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.files import read_json, write_json

FOLDER = ".submissions"  # in the sweep's folder
SECONDS = 60.0  # that a command of SLURM may take
IDS_AT_ONCE = 500  # on one command line


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, that the queue still knows."""

    id: str  # its own number, what SLURM_JOB_ID says inside it; of an array's task that waits, the array's number
    array: str  # the array's number, or its own
    task: int | None  # index in the array; None for a single job
    name: str
    state: str  # as squeue spells it: PENDING, RUNNING, …
    host: str
    reason: str | None  # why it waits

    @property
    def running(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING")

    @property
    def handle(self) -> str:
        """What scancel takes for this job and no other."""
        return self.array if self.task is None else f"{self.array}_{self.task}"


def note_submission(folder: Path, job_name: str, tasks: Sequence[Sequence[str]], **facts: Any) -> None:
    """Write down which runs each task of the job named `job_name` holds; call it before sbatch, and again after."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(folder / FOLDER / f"{job_name}.json", {"name": job_name, "tasks": [list(t) for t in tasks], **facts})


def submissions(folder: Path) -> dict[str, dict[str, Any]]:
    """Every submission of a sweep by its job name."""
    found = {}
    for file in sorted((folder / FOLDER).glob("*.json")):
        noted = read_json(file)
        if noted:
            found[noted["name"]] = noted
    return found


def jobs() -> list[Job] | None:
    """This user's jobs, array tasks one by one, or None where the queue cannot be asked."""
    text = _run(["squeue", "--noheader", "--array", "--me", "--format=%A|%F|%K|%T|%N|%r|%j"])
    if text is None:
        return None
    found = []
    for line in filter(None, text.splitlines()):
        number, array, task, state, host, reason, name = line.split("|", 6)
        index = int(task) if task.isdigit() else None
        found.append(Job(number, array, index, name, state, host, None if reason in ("", "None") else reason))
    return found


def jobs_by_run(folder: Path) -> dict[str, Job] | None:
    """The queued or running job of each run of the sweep in `folder`; None where the queue cannot be asked."""
    found = jobs()
    if found is None:
        return None
    noted = submissions(folder)
    by_run: dict[str, Job] = {}
    for job in found:
        tasks, index = noted.get(job.name, {}).get("tasks", []), job.task or 0
        for run_id in tasks[index] if index < len(tasks) else []:
            by_run[run_id] = job
    return by_run


def accounting(job_ids: Sequence[str]) -> dict[str, str]:
    """How accounting says that jobs ended (TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, …); empty where there is none."""
    states: dict[str, str] = {}
    for start in range(0, len(job_ids), IDS_AT_ONCE):
        chosen = ",".join(job_ids[start : start + IDS_AT_ONCE])
        text = _run(
            ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={chosen}", "--format=JobIDRaw,State"]
        )
        for line in (text or "").splitlines():
            with suppress(ValueError):
                number, state = line.split("|")
                states[number] = state.split(" by ")[0]
    return states


def cancel(handles: Sequence[str]) -> None:
    """Take jobs out of the queue. Raises UserError where scancel refuses."""
    for start in range(0, len(handles), IDS_AT_ONCE):
        if _run(["scancel", *handles[start : start + IDS_AT_ONCE]]) is None:
            raise UserError("scancel: is missing or refused; look at squeue before trying again")


def _run(words: Sequence[str]) -> str | None:
    """The command's output, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(list(words), capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
