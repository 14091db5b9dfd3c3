"""The lease of a run directory: which process may write into it. A file and a heartbeat, no lock server.

A process takes the lease by creating lease.json, and keeps it by writing the file again every HEARTBEAT_SECONDS, with
its progress. Where the holder's process can be seen (same machine, boot and container), the process is looked up. From
anywhere else, a lease without a heartbeat for STALE_SECONDS, by the file system's clock, counts as left behind. The
price is that a run whose machine died waits for that time.
"""

import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from embedscale.errors import UserError
from embedscale.files import now, write_json
from embedscale.process import ProcessName, job_number
from embedscale.run.directory import RunDirectory
from embedscale.values import Amount, Count, Damaged, Time

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 180.0


@dataclass(frozen=True)
class Holder(ProcessName):
    """lease.json: the process that holds a lease, and how far its run is."""

    token: str | None = None
    """Text that no other holder has."""
    start: Time | None = None
    """Time at which the lease was taken, ISO 8601."""
    job_id: str | None = None
    """SLURM's number of the job; null outside SLURM."""
    time: Time | None = None
    """Time of the last heartbeat, ISO 8601; null before the first."""
    step: Count | None = None
    """Steps made."""
    steps: Count | None = None
    """Steps of the whole run."""
    spent_flop: Count = 0
    """FLOP spent so far."""
    budget_flop: Amount | None = None
    """FLOP that the run was given."""
    tokens_per_second: Amount | None = None
    """Mean speed of the attempt."""
    seconds_left: Amount | None = None
    """Estimated time until the budget is spent."""


def lease_holder(path: Path) -> Holder | None:
    """Return who holds the lease; None if nobody does or the holder is gone.

    Where the holder's process can be seen, the process decides, however long it has been silent. Elsewhere the age of
    the last heartbeat decides, and also for a damaged lease and a lease of early code.
    """
    holder = Holder.read(path)
    if holder is None:
        return None
    if isinstance(holder, Damaged):
        holder = Holder("unknown", 0)
    if (lives := holder.lives()) is not None:
        return holder if lives else None
    try:
        silent = _clock_of(path.parent) - path.stat().st_mtime
    except FileNotFoundError:  # released since it was read
        return None
    return holder if silent < STALE_SECONDS else None


def _clock_of(folder: Path) -> float:
    """Return the time of the clock that stamps the folder's files; a file server's may differ from this machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:  # the folder may be read but not written
        return time.time()


class Lease:
    """The right to write into a run directory, kept by a heartbeat that also reports the progress.

    A holder that was silent for too long, for example suspended, may lose its lease to another process. It then writes
    no heartbeat and releases nothing, and `when_lost` is called once, in whichever thread notices.
    """

    def __init__(self, path: Path, when_lost: Callable[[], object] = lambda: None):
        self.path = path
        self.when_lost = when_lost
        self.holder = Holder.of_this_process(token=uuid.uuid4().hex, start=now(), job_id=job_number())
        self.left_behind: str | None = None  # last heartbeat of a dead holder whose lease was taken over
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    def take(self) -> None:
        """Take the lease; the folder is created if needed. Raise UserError if another process holds it."""
        for _ in range(3):
            if self._create():
                self._thread.start()
                return
            holder = lease_holder(self.path)
            if holder is not None:
                raise UserError(
                    f"{self.path.parent}: another process is already at work here "
                    f"(host {holder.host}, process {holder.pid}); nothing was changed"
                )
            aside = self._beside("stale")
            try:
                self.path.rename(aside)
            except FileNotFoundError:
                continue
            if lease_holder(aside) is not None:  # a third process took it over between the look and the rename
                with suppress(OSError):
                    os.link(aside, self.path)
            before = Holder.read(aside)
            self.left_behind = before.time if isinstance(before, Holder) else None
            aside.unlink()
        self.path.parent.mkdir(parents=True, exist_ok=True)  # its error is the reason, if the folder cannot exist
        raise UserError(f"{self.path.parent}: another process is just beginning here; nothing was changed")

    def _create(self) -> bool:
        # A link appears with its whole content, or fails because another process was first.
        temporary = self._beside("partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.holder.to_json()))
            os.link(temporary, self.path)
            return True
        except (FileExistsError, FileNotFoundError):  # the second if another process has just removed the folder
            return False
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{(self.holder.token or '')[:8]}.{ending}")

    def held(self) -> bool:
        """Return whether this process still has the lease; call this before each write into the run directory.

        While the file server does not answer, the lease counts as held.
        """
        with suppress(OSError):
            found = None if self._lost else Holder.read(self.path)
            # A damaged file is not known to be another holder's.
            if not self._lost and not isinstance(found, Damaged) and not self._is_own(found):
                self._lost = True
                self.when_lost()
        return not self._lost

    def _is_own(self, found: Holder | Damaged | None) -> bool:
        return isinstance(found, Holder) and found.token == self.holder.token

    def report(
        self,
        step: int,
        steps: int,
        spent_flop: int,
        budget_flop: float,
        tokens_per_second: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Set what the next heartbeat says of the progress."""
        self.holder = replace(
            self.holder,
            step=step,
            steps=steps,
            spent_flop=spent_flop,
            budget_flop=budget_flop,
            tokens_per_second=tokens_per_second,
            seconds_left=seconds_left,
        )

    def beat(self) -> None:
        """Write a heartbeat: the holder is alive, and how far its run is."""
        with suppress(OSError):
            if self.held():
                write_json(self.path, replace(self.holder, time=now()).to_json())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self.beat()

    def release(self) -> None:
        """Stop the heartbeat and remove lease.json if it is still this holder's."""
        self._stop.set()
        self._thread.join()
        if self._is_own(Holder.read(self.path)):
            self.path.unlink(missing_ok=True)


@contextmanager
def leased(path: Path, when_lost: Callable[[], object] = lambda: None) -> Iterator[Lease]:
    """Hold the lease at a path. Raise UserError if another process holds it."""
    lease = Lease(path, when_lost)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


def remove_what_is_left_over(directory: RunDirectory) -> None:
    """Remove what a run that was killed behind its record left: checkpoints, half-written files, its lease."""
    if directory.left_over():
        with suppress(UserError, OSError), leased(directory.lease):  # another holds it, or it is read-only
            directory.remove_partial_files()
            directory.remove_checkpoints()
