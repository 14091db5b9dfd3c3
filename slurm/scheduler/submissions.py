"""What submissions leave beside the run directories: the folder `.submissions` of a sweep, and every name in it.

A submission is noted before it goes out, under the name that its jobs carry. The queue is then read by name, so a job
counts even if the scheduler accepted it without returning its number.
"""

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from embedscale.errors import UserError
from embedscale.files import now, read_json, write_json
from embedscale.process import ProcessName
from embedscale.run.config import RunConfig
from embedscale.run.settings import structured
from embedscale.values import Damaged, Time, Value
from slurm.scheduler.scheduler import Job
from slurm.scheduler.snapshot import CodeCopy

V = TypeVar("V", bound=Value)

SICK_SECONDS = 24 * 3600.0  # for which no job is sent to a node that failed its self-test


@dataclass(frozen=True)
class Submission(Value):
    """The note of one submitted array."""

    name: str
    """Name of the submission and of its jobs."""
    tasks: list[list[str]]
    """Run ids of each job."""
    parallel: int | None = None
    """Most jobs that may run at the same time; None: all."""
    gpus: int = 1
    """GPUs that one job holds."""
    job_id: str | None = None
    """Number of the array; None until the scheduler returned it."""


@dataclass(frozen=True)
class Orders:
    """What a submission tells its jobs. Apart from it, a job receives run ids only."""

    runs: Mapping[str, RunConfig]
    """Configurations by run id."""
    tasks: Sequence[Sequence[str]]
    """Run ids of each job."""
    limit_seconds: float
    """Time limit of a job."""
    warning_seconds: float
    """Time before the limit at which the runs save a checkpoint and stop."""
    requeue: bool
    """Whether a stopped job asks to be put back into the queue."""
    side_by_side: int
    """Runs of a job that share a GPU at the same time."""
    gpus: int
    """GPUs that each node must have."""
    cpus: int
    """Cores of each process."""
    memory_gb: float
    """Memory that each node must have, GB."""
    code: CodeCopy
    """The copy of the code that the jobs run."""
    scores: tuple[str, ...] = ()
    """Tasks of mteb to score the runs on; empty: train the runs."""
    scheduler: str = "slurm"
    """Name of the scheduler that runs the jobs."""
    on_done: str | None = None
    """Shell command that the last job runs at its end."""


@dataclass(frozen=True)
class SickNode(Value):
    """A node that failed its self-test."""

    node: str
    """Name of the node, as the scheduler spells it."""
    fault: str
    """What is wrong with the node."""
    time: Time
    """Time of the self-test, ISO 8601."""
    job_id: str | None = None
    """Number of the job that tested the node."""


class Submissions:
    """The folder `.submissions` of the sweep in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.path = self.folder / ".submissions"
        self.lease = self.path / "submit.lease"  # held by a submit that looks at the queue and sends jobs out
        self.code = self.path / "code"  # copies of the code, for jobs

    def files(self, name: str) -> Path:
        """Return the folder of one submission's own files: orders, logs and what the scheduler's client needs."""
        return self.path / name

    def note(self, submission: Submission) -> None:
        """Write a submission down; to be called before it goes out, and again when its number is known."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / f"{submission.name}.json", submission.to_json())

    def noted(self) -> dict[str, Submission]:
        """Return every submission by name, without those whose note is `damaged`."""
        return {each.name: each for each in self._sound(Submission, "*.json")}

    def _sound(self, kind: type[V], pattern: str) -> Iterator[V]:
        found = (kind.read(file) for file in sorted(self.path.glob(pattern)))
        return (each for each in found if isinstance(each, kind))

    def damaged(self) -> list[Damaged]:
        """Return the damaged files of submissions. The other methods leave them out."""
        kinds: dict[str, type[Value]] = {"*.json": Submission, "sick/*.json": SickNode, "*.process": ProcessName}
        found = (kind.read(file) for pattern, kind in kinds.items() for file in sorted(self.path.glob(pattern)))
        return [each for each in found if isinstance(each, Damaged)]

    def jobs_by_run(self, jobs: Iterable[Job] | None) -> dict[str, Job] | None:
        """Return, of the jobs of a queue, the one that holds each run of this sweep.

        `jobs` is None if the queue cannot be asked. Then the result is None too, unless nothing was ever submitted.
        """
        if jobs is None:
            return None if any(self.path.glob("*.json")) else {}
        noted = self.noted()
        by_run: dict[str, Job] = {}
        for job in jobs:
            tasks, index = noted[job.name].tasks if job.name in noted else [], job.task or 0
            for run_id in tasks[index] if index < len(tasks) else []:
                by_run[run_id] = job
        return by_run

    def write_orders(self, name: str, orders: Orders) -> None:
        """Write what the jobs of a submission read first."""
        self.files(name).mkdir(parents=True, exist_ok=True)
        write_json(self.files(name) / "orders.json", asdict(orders))

    def read_orders(self, name: str, task: int) -> Orders:
        """Return a submission's orders, with the runs of one of its jobs. Raises UserError for a damaged file."""
        path = self.files(name) / "orders.json"
        try:
            found = read_json(path)
            runs = {run_id: structured(RunConfig, found["runs"][run_id]) for run_id in found["tasks"][task]}
            code = CodeCopy.from_json(found["code"])
            return Orders(**found | {"runs": runs, "code": code, "scores": tuple(found.get("scores", ()))})
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{path}: does not hold the orders of {name} ({error!r}); submit again") from None

    def note_sick(self, node: str, fault: str, job: str | None = None) -> None:
        """Note that a node failed its self-test."""
        path = self.path / "sick" / f"{node}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, SickNode(node, fault, now(), job).to_json())

    def sick_nodes(self) -> dict[str, str]:
        """Return the nodes that failed a self-test within the last day, each with its fault."""
        found = {}
        for noted in self._sound(SickNode, "sick/*.json"):
            if time.time() - datetime.fromisoformat(noted.time).timestamp() < SICK_SECONDS:
                found[noted.node] = noted.fault
        return found

    def first_to_tell(self) -> bool:
        """Return whether no other job has told that the submissions noted so far are over; from now on, one has."""
        self.path.mkdir(parents=True, exist_ok=True)
        names = hashlib.sha256(" ".join(self.noted()).encode()).hexdigest()[:12]
        try:
            (self.path / f"{names}.told").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def announce(self, process: ProcessName) -> Path:
        """Note a process that works at the sweep, so that `sweep cancel` finds it; returns the note."""
        note = self.path / f"{process.host}-{process.pid}-{uuid.uuid4().hex[:8]}.process"  # pids repeat in containers
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, process.to_json())
        return note

    def processes(self) -> list[ProcessName]:
        """Return the noted processes, which may have ended."""
        return list(self._sound(ProcessName, "*.process"))
