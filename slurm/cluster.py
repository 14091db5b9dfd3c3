"""What a cluster gives a run: resource classes by backbone size, limits, and what its GPUs reach.

The defaults suit A100 or H100 GPUs with 80 GB. A cluster file (`configs/cluster/*.yaml`) states what differs.
Which GPUs a run uses stands in its `resources` alone; a class only supplies the default, so that plan, submission
and training can never disagree.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.run.config import bounded, read_yaml, structured
from embedscale.run.families import shape_by_name
from embedscale.run.shape import BackboneShape


@dataclass(frozen=True)
class ResourceClass:
    """What a job of one run asks for, for every backbone up to a size. Equal classes share an array."""

    name: str = "any"
    up_to: float = float("inf")  # the largest backbone of the class, non-embedding parameters
    gpus: int = 1  # a node; a task each
    nodes: int = 1
    cpus: int = 4  # a task
    memory_gb: float = 32  # of the node, a task
    hours: float = 24  # time limit; a run that needs more is requeued
    partition: str | None = None  # default the cluster's
    constraint: str | None = None
    chunk_tokens: int | None = None  # resources.chunk_tokens of its runs
    activation_checkpointing: bool = False  # likewise
    shard: bool = False  # likewise
    utilisation: float = 0.4  # of the device's peak, assumed where nothing was measured

    def __post_init__(self) -> None:
        bounded("classes.up_to", self.up_to, 0, above=True)
        bounded("classes.gpus", self.gpus, 0)
        bounded("classes.nodes", self.nodes, 1)
        bounded("classes.cpus", self.cpus, 1)
        bounded("classes.memory_gb", self.memory_gb, 0, above=True)
        bounded("classes.hours", self.hours, 0, above=True)
        bounded("classes.chunk_tokens", self.chunk_tokens, 1)
        bounded("classes.utilisation", self.utilisation, 0, 1, above=True)

    def resources(self) -> dict[str, Any]:
        """The settings of `resources` that a run of this class starts from."""
        return {
            "devices": max(1, self.gpus),
            "nodes": self.nodes,
            "chunk_tokens": self.chunk_tokens,
            "activation_checkpointing": self.activation_checkpointing,
            "shard": self.shard,
        }


def default_classes() -> list[ResourceClass]:
    """One 80 GB GPU for every size of the paper; eight that share one model for larger ones.

    A chunk's activations, about 34 bytes a token, block and unit of width in bf16, stay under 25 GB, beside
    16 bytes a trained parameter. Small backbones leave a GPU waiting for its own kernel launches.
    """
    return [
        ResourceClass("up-to-70m", 2e7, cpus=4, memory_gb=24, hours=4, chunk_tokens=65536, utilisation=0.1),
        ResourceClass("160m", 1e8, cpus=4, memory_gb=24, hours=4, chunk_tokens=65536, utilisation=0.25),
        ResourceClass("410m", 5e8, cpus=6, memory_gb=32, hours=8, chunk_tokens=16384, utilisation=0.35),
        ResourceClass("1b-to-1.4b", 2e9, cpus=8, memory_gb=64, hours=12, chunk_tokens=8192),
        ResourceClass("2.8b", 3e9, cpus=8, memory_gb=96, hours=24, chunk_tokens=4096),
        ResourceClass(
            "larger", gpus=8, cpus=8, memory_gb=96, chunk_tokens=2048, activation_checkpointing=True, shard=True
        ),
    ]


@dataclass(frozen=True)
class Cluster:
    """A cluster, or this machine: all that a sweep needs to know of it."""

    partition: str | None = None  # default SLURM's
    account: str | None = None
    qos: str | None = None
    max_gpus: int = 64  # that the sweep may hold at once, over all of its arrays
    requeue: bool = True  # the site lets a preempted job come back by itself
    warning_seconds: int = 120  # a job is told to stop so long before its time limit
    bundle_minutes: float = 60  # runs estimated shorter share a job of about this length
    side_by_side: int = 1  # runs of a bundle that share a GPU at the same time
    setup: list[str] = field(default_factory=list)  # shell lines before the job, such as module load
    environment: dict[str, str] = field(default_factory=dict)  # variables of the job
    offline: bool = True  # nodes have no network: load from local folders alone
    device: str = "A100"  # the assumption behind GPU-hours where nothing was measured
    peak_flop_per_second: float = 312e12  # of one device, in the runs' precision (A100: dense bf16)
    calibration: str | None = None  # what `embedscale calibrate` measured there, a JSON file
    classes: list[ResourceClass] = field(default_factory=default_classes)

    def __post_init__(self) -> None:
        bounded("max_gpus", self.max_gpus, 1)
        bounded("warning_seconds", self.warning_seconds, 1)
        bounded("bundle_minutes", self.bundle_minutes, 0)
        bounded("side_by_side", self.side_by_side, 1)
        bounded("peak_flop_per_second", self.peak_flop_per_second, 0, above=True)
        if not self.classes:
            raise UserError("classes: none is given; a cluster needs at least one")
        sizes = [each.up_to for each in self.classes]
        if sizes != sorted(set(sizes)):
            raise UserError(f"classes.up_to: {sizes} does not rise from class to class")

    def class_of(self, parameters: int | None) -> ResourceClass:
        """The first class that reaches a backbone of so many non-embedding parameters; the last where none does,
        or where the size is not known."""
        for each in self.classes:
            if parameters is not None and parameters <= each.up_to:
                return each
        return self.classes[-1]


def load(path: str | Path | None) -> Cluster:
    """The `Cluster` of a YAML file, or the defaults. Raises UserError for what is wrong in it."""
    if path is None:
        return Cluster()
    cluster: Cluster = structured(Cluster, read_yaml(path), origin=str(path))
    return cluster


def shape_of(backbone: str) -> BackboneShape:
    """The shape of a backbone, from the Pythia table or from its folder's config.json, without torch.

    Raises UserError where neither knows it.
    """
    shape = shape_by_name(backbone)
    if shape is None:
        raise UserError(
            f"backbone.name: {backbone!r} is neither of the Pythia suite nor a folder with a GPT-NeoX config.json"
        )
    return shape
