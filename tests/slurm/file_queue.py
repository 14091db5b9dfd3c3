"""A scheduler whose queue is a JSON file: sweeps are submitted, watched, run and cancelled without any daemon.

It is also the example of docs/extending.md. A test decides when jobs start and how they end (`start`, `end`), or lets
`work_off` run them one after another.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from embedscale.errors import UserError
from embedscale.files import write_json
from slurm.scheduler.scheduler import Allocation, Job, Limits, Request, Requeue

# What a job runs: this module names the scheduler, then the job's function is called with its arguments.
PROGRAM = """
import json, sys
from slurm.scheduler.choice import SCHEDULERS
from file_queue import FileQueue
from slurm.scheduler.node import work
SCHEDULERS["file"] = FileQueue
work(*json.loads(sys.argv[1]))
"""


class FileQueue:
    """The queue of one sweep: the file `queue.json` in the sweep's folder."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "queue.json"

    def read(self) -> dict:
        start = {"jobs": {}, "ended": {}, "numbers": 100, "largest": 1001, "answers": True, "refusal": None}
        return start | (json.loads(self.file.read_text()) if self.file.exists() else {})

    def write(self, **changes) -> None:
        """Change the file; `answers=False` and `refusal="…"` make the scheduler fail."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.read() | changes)

    # --- The methods of a `Scheduler` ---

    def limits(self) -> Limits:
        return Limits(self.read()["largest"])

    def jobs(self) -> list[Job] | None:
        state = self.read()
        return [Job(**each["job"]) for each in state["jobs"].values()] if state["answers"] else None

    def submit(self, request: Request) -> str:
        state = self.read()
        if state["refusal"]:
            raise UserError(f"file queue: {state['refusal']}")
        number = str(state["numbers"])
        for task, runs in enumerate(request.array.tasks):
            job = {"id": number, "array": number, "task": task, "name": request.name, "reason": "Priority"}
            facts = {"runs": list(runs), "after": request.after, "parallel": request.parallel}
            state["jobs"][f"{number}_{task}"] = {"job": job} | facts
        self.write(jobs=state["jobs"], numbers=state["numbers"] + 1)
        return number

    def script(self, request: Request) -> str:
        return f"{self.file}: {len(request.array.tasks)} jobs called {request.name}"

    def cancel(self, handles: Sequence[str]) -> None:
        if self.read()["refusal"]:
            raise UserError(f"file queue: {self.read()['refusal']}")
        for handle in handles:
            self.end(handle, "CANCELLED")

    def accounting(self, job_ids: Sequence[str]) -> dict[str, str]:
        return {number: how for number, how in self.read()["ended"].items() if number in job_ids}

    def allocation(self) -> Allocation:
        return Allocation(os.environ["FILE_QUEUE_JOB"], "file-node")

    def requeue(self, job: str, avoid: Sequence[str] = ()) -> Requeue:
        return Requeue.REFUSED

    # --- What a test does to the queue ---

    def start(self, handle: str) -> None:
        """Mark a job as running. Like a task of a SLURM array, the running job gets another number."""
        state = self.read()
        job = state["jobs"][handle]["job"]
        job |= {"id": f"{job['array']}.{job['task']}", "running": True, "host": "file-node", "reason": None}
        self.write(jobs=state["jobs"])

    def end(self, handle: str, how: str = "COMPLETED") -> None:
        """Remove a job from the queue, and note for accounting how the job ended."""
        state = self.read()
        job = state["jobs"].pop(handle)["job"]
        self.write(jobs=state["jobs"], ended=state["ended"] | {job["id"]: how})

    def work_off(self) -> list[str]:
        """Run every job in a process of its own; returns what the jobs printed."""
        printed = []
        while jobs := self.read()["jobs"]:
            handle, facts = next(iter(jobs.items()))
            self.start(handle)
            call = json.dumps([str(self.folder), facts["job"]["name"], facts["job"]["task"]])
            environment = os.environ | {"FILE_QUEUE_JOB": handle, "PYTHONPATH": str(Path(__file__).parent)}
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, call], env=environment, capture_output=True, text=True, timeout=300
            )
            printed.append(done.stdout + done.stderr)
            self.end(handle, "COMPLETED" if done.returncode == 0 else "FAILED")
        return printed
