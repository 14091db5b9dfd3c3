"""What a cluster gives to a run: resource classes by backbone size, limits, and the speed of its GPUs.

The defaults suit A100 or H100 GPUs with 80 GB. A cluster file (`configs/cluster/*.yaml`) states what differs.
The `resources` of a run alone decide which GPUs the run uses. A class only supplies their defaults, so that plan,
submission and training cannot disagree.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from embedscale.errors import UserError, bounded
from embedscale.run.families import SUITES, shape_by_name
from embedscale.run.settings import beside, read_yaml, structured
from embedscale.run.shape import BackboneShape


def one_word(name: str, value: str | None) -> None:
    """Raise UserError for an option of the scheduler that has white space or other invisible characters."""
    if value is not None and (not value.isprintable() or len(value.split()) != 1):
        raise UserError(f"{name}: {value!r} is not one word; expected a name without spaces and line breaks")


# Options of sbatch that embedscale sets, and the setting that they follow; "" where there is none.
TAKEN = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "time": "classes.hours",
    "mem": "classes.memory_gb",
    "cpus-per-task": "classes.cpus",
    "nodes": "classes.nodes",
    "ntasks-per-node": "classes.gpus",
    "constraint": "classes.constraint",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "signal": "warning_seconds",
    **dict.fromkeys(["array", "dependency", "error", "job-name", "ntasks", "open-mode", "output", "test-only"], ""),
    **dict.fromkeys(["parsable", "wait", "wrap"], ""),
}


def _check_options(options: dict[str, str]) -> None:
    """Raise UserError for an option of sbatch that cannot be one, or that another setting decides."""
    for name, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise UserError(f"sbatch: {name!r} is not the long name of an option without its dashes, such as mail-type")
        if name in TAKEN:
            raise UserError(f"sbatch.{name}: embedscale sets this option; {TAKEN[name] or 'it cannot be changed'}")
        if not isinstance(value, str) or not value.isprintable():
            raise UserError(f"sbatch.{name}: {value!r} is given; expected a text on one line")


@dataclass(frozen=True)
class ResourceClass:
    """The resources of one job, for every backbone up to a size. Jobs of equal classes share an array."""

    name: str = "any"
    """Name of the class in plans and messages."""
    up_to: float = float("inf")
    """Largest backbone of the class, in non-embedding parameters."""
    gpus: int = 1
    """GPUs of each node, one a process; 0 for runs on CPU cores."""
    nodes: int = 1
    """Nodes of a job."""
    cpus: int = 4
    """Cores of each process."""
    memory_gb: float = 32
    """Memory of the machine for each process, GB."""
    hours: float = 24
    """Time limit of a job, hours. A run that needs more is requeued and goes on."""
    partition: str | None = None
    """Partition of the scheduler, or several with commas between them; default: the cluster's."""
    constraint: str | None = None
    """Feature that each node must have, as SLURM's --constraint."""
    gpu_type: str | None = None
    """Type of the GPUs, as the site calls it in its generic resources (gpu:TYPE:COUNT); default: any."""
    chunk_tokens: int | None = None
    """Default of resources.chunk_tokens for the runs of the class."""
    activation_checkpointing: bool = False
    """Default of resources.activation_checkpointing for the runs of the class."""
    shard: bool = False
    """Default of resources.shard for the runs of the class."""
    utilisation: float = 0.4
    """Share of the device's peak speed that the plan assumes where no speed was measured."""

    def __post_init__(self) -> None:
        bounded("classes.up_to", None if self.up_to == math.inf else self.up_to, 0, above=True)
        for name in ("partition", "constraint", "gpu_type"):
            one_word(f"classes.{name}", getattr(self, name))
        bounded("classes.gpus", self.gpus, 0)
        bounded("classes.nodes", self.nodes, 1)
        bounded("classes.cpus", self.cpus, 1)
        bounded("classes.memory_gb", self.memory_gb, 0, above=True)
        bounded("classes.hours", self.hours, 0, above=True)
        bounded("classes.chunk_tokens", self.chunk_tokens, 1)
        bounded("classes.utilisation", self.utilisation, 0, 1, above=True)

    @property
    def minutes(self) -> int:
        """Time limit of a job in whole minutes, rounded up."""
        return math.ceil(60 * self.hours - 1e-6)

    def resources(self) -> dict[str, Any]:
        """Return the values of a run's `resources` that the class supplies."""
        return {
            "devices": max(1, self.gpus),
            "nodes": self.nodes,
            "chunk_tokens": self.chunk_tokens,
            "activation_checkpointing": self.activation_checkpointing,
            "shard": self.shard,
        }


def default_classes() -> list[ResourceClass]:
    """Return classes with one 80 GB GPU for every size of the paper, and eight GPUs that share a larger model.

    Up to 160M, a chunk has as many tokens as the GPU's memory holds: the paper's whole batch, 80,000 tokens in 31 GB or
    less, which saves GradCache's second forward pass. For larger backbones, the activations of a chunk, about 34 bytes
    per token, block and unit of width in bf16, stay below 25 GB, in addition to 16 bytes per trained parameter. Small
    backbones have a low utilisation: their kernels move more bytes than they make FLOP.
    """
    return [
        ResourceClass("up-to-70m", 2e7, cpus=4, memory_gb=24, hours=4, utilisation=0.1),
        ResourceClass("160m", 1e8, cpus=4, memory_gb=24, hours=4, utilisation=0.25),
        ResourceClass("410m", 5e8, cpus=6, memory_gb=32, hours=8, chunk_tokens=16384, utilisation=0.35),
        ResourceClass("1b-to-1.4b", 2e9, cpus=8, memory_gb=64, hours=12, chunk_tokens=8192),
        ResourceClass("2.8b", 3e9, cpus=8, memory_gb=96, hours=24, chunk_tokens=4096),
        ResourceClass(
            "larger", gpus=8, cpus=8, memory_gb=96, chunk_tokens=2048, activation_checkpointing=True, shard=True
        ),
    ]


@dataclass(frozen=True)
class Cluster:
    """A cluster, or this machine: what a sweep needs to know about it."""

    listed_by: ClassVar[str] = "embedscale config --of cluster"

    scheduler: str = "slurm"
    """Name of the scheduler that jobs go to: slurm, here (this machine), or one added in slurm/scheduler/choice.py."""
    partition: str | None = None
    """Partition of jobs whose class names none, or several with commas; default: SBATCH_PARTITION, then the site's."""
    account: str | None = None
    """Account that jobs are charged to, as SLURM's --account; default: SBATCH_ACCOUNT."""
    qos: str | None = None
    """Quality of service, as SLURM's --qos; default: SBATCH_QOS."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch by their long names, such as {mail-type: END}; "" for one without a value."""
    max_gpus: int = 64
    """Most GPUs that the sweep holds at the same time, over all of its jobs; processes where a class has no GPU."""
    requeue: bool = True
    """Whether the site lets a preempted job come back by itself."""
    warning_seconds: int = 120
    """Time before a job's limit at which its runs save a checkpoint and stop, seconds."""
    bundle_minutes: float = 60
    """Runs that are estimated to be shorter share a job of about this length, minutes."""
    side_by_side: int = 1
    """Runs of a job that share a GPU at the same time."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the start of each job, such as module load."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of each job."""
    command_prefix: str = ""
    """Shell words before the Python of each process, such as those that start a container."""
    python: str | None = None
    """Python that runs the jobs, by its path on the nodes; default: the one that submits."""
    on_done: str | None = None
    """Shell command that the job runs whose end leaves no run of the sweep to wait for; it reads the counts of runs."""
    offline: bool = True
    """Whether nodes have no network, so that runs load models and data from local folders alone."""
    device: str = "A100"
    """Name of the device whose speed is `peak_flop_per_second`."""
    peak_flop_per_second: float = 312e12
    """Peak of one device in the runs' precision, FLOP/s (A100: dense bf16), for plans without a measured speed."""
    calibration: str | None = None
    """JSON file with the speeds that `embedscale calibrate` measured on this cluster."""
    classes: list[ResourceClass] = field(default_factory=default_classes)
    """Resource classes in the order of their `up_to`."""

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos"):
            one_word(name, getattr(self, name))
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise UserError(
                    f"environment: {name!r} cannot be the name of a variable; allowed: letters, digits and _"
                )
            if not isinstance(self.environment[name], str):
                raise UserError(f"environment.{name}: {self.environment[name]} is given; expected a text")
        _check_options(self.sbatch)
        for name in ("command_prefix", "python", "on_done"):
            if not (getattr(self, name) or "").isprintable():
                raise UserError(f"{name}: {getattr(self, name)!r} has invisible characters; expected one line")
        bounded("max_gpus", self.max_gpus, 1)
        bounded("warning_seconds", self.warning_seconds, 1)
        bounded("bundle_minutes", self.bundle_minutes, 0)
        bounded("side_by_side", self.side_by_side, 1)
        bounded("peak_flop_per_second", self.peak_flop_per_second, 0, above=True)
        if not self.classes:
            raise UserError("classes: the list is empty; a cluster needs one class or more")
        sizes = [each.up_to for each in self.classes]
        if sizes != sorted(set(sizes)):
            raise UserError(f"classes.up_to: {sizes} does not rise from class to class; sort the classes by size")

    def class_of(self, parameters: int | None) -> ResourceClass:
        """Return the first class whose `up_to` is at least this number of non-embedding parameters.

        Return the last class if there is none, for which the plan refuses the run, or if the number is unknown (None).
        """
        for each in self.classes:
            if parameters is not None and parameters <= each.up_to:
                return each
        return self.classes[-1]


def load(path: str | Path | None) -> Cluster:
    """Return the `Cluster` of a YAML file, or the defaults without a file. Raises UserError for a wrong setting."""
    if path is None:
        return Cluster()
    cluster: Cluster = structured(Cluster, read_yaml(path), origin=str(path))
    return replace(cluster, calibration=beside(path, cluster.calibration))


def shape_of(backbone: str, revision: str | None = None) -> BackboneShape:
    """Return the shape of a backbone from the table of its family or from its `config.json`, without torch.

    Raise UserError if neither is known, and for a model that is not supported.
    """
    shape = shape_by_name(backbone, revision)
    if shape is None:
        raise UserError(
            f"backbone.name: {backbone!r} is no folder, is not in the hub's local cache, and is no size of {SUITES}; "
            "fetch it first (embedscale sweep prefetch), or give a folder"
        )
    return shape
