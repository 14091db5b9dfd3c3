"""Ask a SLURM site for its settings, partitions and nodes, and a node for its cores and GPUs through srun.

The doctor holds these values against the cluster file. Sizes are in GB of 1000 MB, times in hours or seconds.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.cluster import Cluster, ResourceClass
from slurm.scheduler.node import work
from slurm.scheduler.scheduler import Array, Request
from slurm.scheduler.slurm import SECONDS, Slurm, ask, clean_variables, gpus_asked, placement, settings

# What a sweep cannot do without each program.
PROGRAMS = {
    "sbatch": "sweeps run on this machine alone",
    "srun": "jobs cannot start their processes, and nothing can be submitted",
    "squeue": "submit cannot see what is queued",
    "scancel": "sweep cancel does not work",
    "scontrol": "limits are guessed, and jobs cannot requeue themselves",
    "sacct": "why a job ended without a message stays unknown",
}
NODE_SECONDS = 600.0  # most time that a node may take to answer through srun


@dataclass(frozen=True)
class Partition:
    """A partition, as scontrol shows it."""

    name: str
    """Name of the partition."""
    default: bool
    """Whether jobs that name no partition go here."""
    state: str
    """UP if jobs are started."""
    hours: float
    """Time limit of a job, hours; inf without a limit."""
    preempt_mode: str
    """What preemption does to a job: REQUEUE, CANCEL, SUSPEND or OFF."""
    grace_seconds: int
    """Time from SIGTERM to SIGKILL for a preempted job."""


@dataclass(frozen=True)
class Node:
    """A node, as scontrol shows it."""

    name: str
    """Name of the node."""
    partitions: tuple[str, ...]
    """Partitions that the node belongs to."""
    features: tuple[str, ...]
    """Features that a constraint can name."""
    cpus: int
    """Cores."""
    memory_gb: float
    """Memory, GB."""
    gpus: int
    """GPUs of all types."""


@dataclass(frozen=True)
class Site:
    """The answers of SLURM's controller and of its accounting."""

    name: str
    """Name of the cluster."""
    version: str
    """Version of SLURM."""
    jobs_per_array: int
    """MaxArraySize; 0 if arrays are off."""
    kill_seconds: int
    """KillWait: time from SIGTERM to SIGKILL at the time limit."""
    requeues: bool
    """JobRequeue: whether SLURM requeues a preempted job by itself."""
    accounting: str | None
    """Kind of accounting storage; None if accounting is off."""
    accounting_answers: bool
    """Whether sacct works."""
    jobs_per_user: int | None
    """Most jobs that this user may have submitted; None without a limit."""
    partitions: dict[str, Partition]
    """Partitions by name."""
    nodes: list[Node]
    """All nodes."""


def missing_programs() -> list[str]:
    """Return the programs of SLURM that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def ask_site() -> Site | None:
    """Return the settings of the site, or None if the controller does not answer."""
    config = settings(ask("scontrol", "show", "config") or "")
    if not config:
        return None
    kind = config.get("AccountingStorageType", "(null)")
    largest = config.get("MaxArraySize", "0")
    off = kind in ("(null)", "accounting_storage/none", "")
    return Site(
        name=config.get("ClusterName", "cluster"),
        version=config.get("SLURM_VERSION", "?"),
        jobs_per_array=int(largest) if largest.isdigit() else 0,
        kill_seconds=int(config.get("KillWait", "30 sec").split()[0]),
        requeues=config.get("JobRequeue", "1") == "1",
        accounting=None if off else kind,
        accounting_answers=not off and ask("sacct", "-n") is not None,
        jobs_per_user=_jobs_per_user(),
        partitions=_partitions(config.get("PreemptMode", "OFF")),
        nodes=_nodes(),
    )


def _rows(kind: str) -> list[dict[str, str]]:
    """Return the answer of `scontrol --oneliner show`: a line of key=value words for each thing."""
    lines = filter(None, (ask("scontrol", "--oneliner", "show", kind) or "").splitlines())
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]


def _partitions(preempt_mode: str) -> dict[str, Partition]:
    found = {}
    for row in _rows("partition"):
        name = row.get("PartitionName", "")
        found[name] = Partition(
            name=name,
            default=row.get("Default") == "YES",
            state=row.get("State", "UP"),
            hours=hours_of(row.get("MaxTime", "UNLIMITED")),
            preempt_mode=row.get("PreemptMode", preempt_mode),
            grace_seconds=int(row.get("GraceTime", "0")),
        )
    return found


def _nodes() -> list[Node]:
    return [
        Node(
            name=row.get("NodeName", ""),
            partitions=tuple(row.get("Partitions", "").split(",")),
            features=tuple(row.get("AvailableFeatures", "").split(",")),
            cpus=int(row.get("CPUTot", 0)),
            memory_gb=int(row.get("RealMemory", 0)) / 1000,
            gpus=gpus_of(row.get("Gres", "")),
        )
        for row in _rows("node")
    ]


def _jobs_per_user() -> int | None:
    user = f"user={os.environ.get('USER') or os.getuid()}"
    words = ("sacctmgr", "--noheader", "--parsable2", "show", "assoc", user, "format=MaxSubmitJobs,MaxJobs")
    first = [line.split("|")[0] for line in (ask(*words) or "").splitlines()]
    return min((int(limit) for limit in first if limit.isdigit()), default=None)


def gpus_of(gres: str) -> int:
    """Return the number of GPUs in a node's generic resources: 4 of `gpu:a100:4(S:0-1)`."""
    counts = [entry.split("(")[0].split(":") for entry in gres.split(",") if entry.startswith("gpu")]
    return sum(int(parts[-1]) if parts[-1].isdigit() else 1 for parts in counts)


def hours_of(limit: str) -> float:
    """Return the hours of a time limit in SLURM's form, days-hours:minutes:seconds."""
    if limit in ("UNLIMITED", "INFINITE", "NONE"):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return 24 * int(days or 0) + hours + minutes / 60 + seconds / 3600


def refusal(cluster: Cluster, shape: ResourceClass, folder: Path) -> str | None:
    """Return why sbatch would refuse a job of a class, or None if it would not; nothing is submitted."""
    array = Array(shape, shape.nodes, max(1, shape.gpus), [{}])
    script = Slurm(folder).script(Request("embedscale-doctor", array, cluster, work))
    words = ["sbatch", "--test-only"]
    try:
        done = subprocess.run(
            words, input=script, capture_output=True, text=True, timeout=SECONDS, env=clean_variables()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    return None if done.returncode == 0 else (done.stderr.strip().split("\n") or [""])[-1]


def run_on_node(cluster: Cluster, shape: ResourceClass, command: Sequence[str]) -> tuple[str | None, str]:
    """Run a command on a node of a class through srun.

    Returns what it printed, or None if it failed, and the last line of its errors.
    """
    words = ["srun", "--immediate=120", "--time=5", "--ntasks=1", "--nodes=1", "--job-name=embedscale-doctor"]
    words += [f"--cpus-per-task={shape.cpus}", f"--mem={int(shape.memory_gb * 1000)}M"]
    gpus = gpus_asked(cluster, shape, shape.gpus)
    given = placement(cluster, shape) | {"gpus-per-node": gpus} | cluster.sbatch
    words += [f"--{option}={value}" if value else f"--{option}" for option, value in given.items() if value is not None]
    if cluster.command_prefix:
        command = ["sh", "-c", f'exec {cluster.command_prefix} "$@"', "sh", *command]
    try:
        done = subprocess.run(
            [*words, *command], capture_output=True, text=True, timeout=NODE_SECONDS, env=clean_variables()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, type(error).__name__
    return (done.stdout if done.returncode == 0 else None), (done.stderr.strip().split("\n") or [""])[-1]
