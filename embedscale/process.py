"""Which process this is, what it may use, and whether a process that a file names still runs.

A process number says little: containers number their processes on their own, machines may share a name, and numbers are
given again. A process is therefore named by its machine, the machine's boot, its namespace of process numbers, its
number and its start. Where one of the first three differs, nothing is known of it here, and its heartbeat must decide.
"""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from embedscale.values import ProcessNumber, Value


@dataclass(frozen=True)
class ProcessName(Value):
    """A process, so that another process can find it."""

    host: str
    """Name of the machine."""
    pid: ProcessNumber
    """Number of the process on its machine."""
    born: str | None = None
    """`start_time` of the process; null in files of early code."""
    boot: str | None = None
    """Number that the machine drew when it started; null where it is unknown."""
    namespace: str | None = None
    """The namespace in which the process has its number, one for each container; null where it is unknown."""

    @classmethod
    def of_this_process(cls, **more: Any) -> Self:
        """Return the name of this process, with the other fields of a subclass."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, start_time(pid), *_here(), **more)

    def lives(self) -> bool | None:
        """Return whether the process runs; None if that cannot be seen from here."""
        if not (self.born and self.boot and self.namespace) or self.host != socket.gethostname():
            return None
        return process_alive(self.pid, self.born) if (self.boot, self.namespace) == _here() else None


@cache
def _of_this_boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _here() -> tuple[str | None, str | None]:
    """Return this machine's boot and this process's namespace."""
    try:
        return _of_this_boot(), str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return _of_this_boot(), None


def process_alive(pid: int, born: str | None = None) -> bool:
    """Return whether a process of this machine runs. `born` is its `start_time`; None if it was not noted."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    try:
        state, started = _state_and_start(pid)
    except OSError:
        return True  # /proc may hide other users' processes
    # A zombie answers signals but will never write again.
    return state != "Z" and born in (None, started)


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since boot; empty if it does not run.

    Number and start together name one process: a number alone is given again to later processes.
    """
    try:
        state, started = _state_and_start(pid)
    except OSError:
        return ""
    return "" if state == "Z" else started


def _state_and_start(pid: int) -> tuple[str, str]:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return fields[0], fields[19]


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def job_number() -> str | None:
    """Return SLURM's number of the job that this process belongs to; None outside of a job."""
    return os.environ.get("SLURM_JOB_ID")
