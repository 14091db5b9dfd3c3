"""The protocol between a sweep and a scheduler, and the values that pass between them.

A scheduler moves calls of one function, `Request.work`, to machines. The arguments of a call are the folder of the
sweep, the name of the submission and the index of the job. Configurations and run ids travel through files
(`submissions.Orders`), so a scheduler never serialises them. The price is a folder that all machines can see; run
directories need one anyway.

To add a scheduler, write a class with the methods of `Scheduler` and name it in `choice.SCHEDULERS`. A cluster file
selects it: `scheduler: NAME`. tests/slurm/file_queue.py is an example of a hundred lines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from embedscale.run.config import RunConfig
from slurm.cluster import Cluster, ResourceClass


@dataclass(frozen=True)
class Job:
    """A queued or running job. Each task of an array is a job of its own."""

    id: str
    """The scheduler's number of the job; a waiting task of an array may have the array's number."""
    array: str
    """Number of the array; for a single job, the job's own number."""
    task: int | None
    """Index in the array; None for a single job."""
    name: str
    """Name of the submission, under which the job's runs are noted."""
    running: bool = False
    """Whether the job runs; else it waits."""
    host: str = ""
    """Machine on which the job runs."""
    reason: str | None = None
    """Why the job waits."""

    @property
    def handle(self) -> str:
        """The text by which `cancel` and `requeue` find this job and no other one."""
        return self.array if self.task is None else f"{self.array}_{self.task}"


@dataclass(frozen=True)
class Limits:
    """What a scheduler accepts."""

    jobs_per_array: int = 1001
    """Most jobs of one array."""
    foreground: bool = False
    """Whether `submit` runs the jobs itself and returns when they have ended; else they wait in a queue."""


@dataclass(frozen=True)
class Array:
    """Jobs of one shape, and the runs that each of them works through."""

    shape: ResourceClass
    """Memory, cores, time limit, partition and constraint of each job."""
    nodes: int
    """Nodes of each job."""
    devices: int
    """Processes on each node, each with a GPU if the shape has GPUs."""
    tasks: list[dict[str, RunConfig]]
    """The runs of each job, by run id."""
    scores: tuple[str, ...] = ()
    """Tasks of mteb on which the runs are scored; empty: the runs are trained."""

    @property
    def gpus(self) -> int:
        """GPUs that one of its jobs holds; processes where the shape has no GPU."""
        return self.nodes * self.devices


@dataclass(frozen=True)
class Request:
    """One array, and how it is to go out."""

    name: str
    """Unique name; `Scheduler.jobs` returns it with each job."""
    array: Array
    """The jobs."""
    cluster: Cluster
    """The cluster file's settings: account, environment, warning before the time limit."""
    work: Callable[[str, str, int], None]
    """Function that each job calls with the sweep's folder, `name` and the job's index in the array.

    Its module does the same as a program with these three words."""
    parallel: int = 1
    """Most jobs of the array that may run at the same time."""
    after: tuple[str, ...] = ()
    """Jobs that must have ended before the first job begins."""
    avoid: tuple[str, ...] = ()
    """Nodes on which no job may run."""
    code: Path | None = None
    """Folder with the copy of the code that the jobs import."""


@dataclass(frozen=True)
class Allocation:
    """What a job gives to a process inside of it."""

    job: str
    """The job's handle."""
    node: str
    """Name of the node, as the scheduler spells it."""
    end: float | None = None
    """Time at which the scheduler ends the job, seconds since 1970; None if unknown."""
    rank: int = 0
    """Number of this process among all processes of the job."""
    local_rank: int = 0
    """Number of this process among those of its node."""
    node_rank: int = 0
    """Number of this process's node among those of the job."""
    processes: int = 1
    """Processes of the job."""
    nodes: int = 1
    """Nodes of the job."""
    address: str = "127.0.0.1"
    """Address of the node with rank 0."""
    port: int = 0
    """Port on the node with rank 0, by which the processes find each other."""


class Requeue(StrEnum):
    """The answer to a job's request to be requeued."""

    ACCEPTED = "accepted"  # the scheduler ends the job's processes and starts the job again later
    REFUSED = "refused"
    PREEMPTED = "preempted"  # refused, but the scheduler itself requeues the job once it has ended it
    UNREACHABLE = "unreachable"  # the scheduler cannot be asked from this node, now or ever
    AWAY = "away"  # the scheduler does not answer now, and may answer later
    OVER = "over"  # the job was cancelled, or is in the queue again already


class Scheduler(Protocol):
    """A scheduler, seen from one sweep. It is constructed with the sweep's folder.

    The first six methods are called where sweeps are submitted and watched; the last two inside of a job.
    """

    def limits(self) -> Limits | None:
        """Return what the scheduler accepts, or None if this machine has no such scheduler."""

    def jobs(self) -> list[Job] | None:
        """Return this user's queued and running jobs, of other sweeps too, or None if the queue cannot be asked."""

    def submit(self, request: Request) -> str:
        """Send an array out and return its number. Raises UserError if the scheduler refuses it."""

    def script(self, request: Request) -> str:
        """Return what `submit` would send, for a reader; nothing is sent or written."""

    def cancel(self, handles: Sequence[str]) -> None:
        """Remove jobs from the queue and end those that run. Raises UserError if the scheduler refuses."""

    def accounting(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return how jobs ended (TIMEOUT, NODE_FAIL, …) by job id; empty where nothing is recorded."""

    def allocation(self) -> Allocation:
        """Return what the job of this process gives it."""

    def requeue(self, job: str, avoid: Sequence[str] = ()) -> Requeue:
        """Put the running job of this process back into the queue; it must not start on the nodes `avoid`."""
