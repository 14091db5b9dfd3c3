"""Who may write into a run directory: a lease, kept alive by a heartbeat, without a lock server."""

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.files import now, read_json, write_json
from embedscale.run.directory import RunDirectory

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 180.0  # a lease of another host without a heartbeat for so long is left behind


def process_alive(pid: int, born: str | None = None) -> bool:
    """`born`: the `start_time` of the process that is meant; None where it was not noted."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    try:
        state, started = _state_and_start(pid)
    except OSError:
        return True  # /proc may hide other users' processes
    # A zombie answers signals but will never write again.
    return state != "Z" and born in (None, started)


def start_time(pid: int) -> str:
    """Of a process, in clock ticks since boot: tells it from a later one of the same number. Empty where it is gone."""
    try:
        state, started = _state_and_start(pid)
    except OSError:
        return ""
    return "" if state == "Z" else started


def _state_and_start(pid: int) -> tuple[str, str]:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return fields[0], fields[19]


def lease_holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lease, or None where nobody does or its holder is gone.

    On the holder's own host the process decides, however long it has been silent; elsewhere, and beside the process
    where a lease of older code does not tell when that was born, the age of the last heartbeat.
    """
    try:
        text, beaten = path.read_text(), path.stat().st_mtime
    except FileNotFoundError:
        return None
    holder: dict[str, Any] = {"host": "unknown", "pid": 0}
    with suppress(ValueError, TypeError):  # of a damaged one the age alone tells
        holder |= json.loads(text)
    if holder["host"] == socket.gethostname():
        # A number may be another process's by now: after a reboot, or in a container that was started again.
        born = holder.get("born")
        if not process_alive(holder["pid"], born):
            return None
        if born is not None:
            return holder
    return holder if _clock_of(path.parent) - beaten < STALE_SECONDS else None


def _clock_of(folder: Path) -> float:
    """The time by the clock that stamps the folder's files: a file server's may not be this machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:  # a folder that may be read, not written
        return time.time()


class Lease:
    """The right to write into a run directory, kept by a heartbeat that also tells the progress.

    A holder that was silent for too long, suspended say, may find its lease taken over. It then neither beats nor
    releases any more, and `when_lost` is called once, in whichever thread has noticed.
    """

    def __init__(self, path: Path, when_lost: Callable[[], object] = lambda: None):
        self.path = path
        self.when_lost = when_lost
        self.facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": start_time(os.getpid()),
            "token": uuid.uuid4().hex,
            "start": now(),
        }
        self.facts["job_id"] = os.environ.get("SLURM_JOB_ID")
        self.progress: dict[str, Any] = {}
        self.left_behind: str | None = None  # the last heartbeat of a dead holder whose lease was taken over
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    def _create(self) -> bool:
        # A link appears with its whole content, or fails because another one was first.
        temporary = self.path.with_name(f".{self.path.name}.{self.facts['token'][:8]}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.facts))
            os.link(temporary, self.path)
            return True
        except (FileExistsError, FileNotFoundError):  # the latter where another one has just removed the folder
            return False
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def take(self) -> None:
        """Make the folder one's own; it need not be there. Raises UserError where another process holds the run."""
        for _ in range(3):
            if self._create():
                self._thread.start()
                return
            holder = lease_holder(self.path)
            if holder is not None:
                raise UserError(
                    f"{self.path.parent}: another process is at this run "
                    f"(host {holder['host']}, process {holder['pid']}); nothing was touched"
                )
            aside = self.path.with_name(f".{self.path.name}.{self.facts['token'][:8]}.stale")
            try:
                self.path.rename(aside)
            except FileNotFoundError:
                continue
            if lease_holder(aside) is not None:  # a third process took it over between the look and the rename
                with suppress(OSError):
                    os.link(aside, self.path)
            with suppress(UserError):
                self.left_behind = (read_json(aside) or {}).get("time")
            aside.unlink()
        self.path.parent.mkdir(parents=True, exist_ok=True)  # it was no other process where this cannot be
        raise UserError(f"{self.path.parent}: another process is taking this run; nothing was touched")

    def held(self) -> bool:
        """Whether nobody has taken the lease over. To be asked before each write that another holder might not expect.

        A file server that does not answer takes nothing away.
        """
        with suppress(OSError, UserError):
            if not self._lost and not self._ours():
                self._lost = True
                self.when_lost()
        return not self._lost

    def _ours(self) -> bool:
        return (read_json(self.path) or {}).get("token") == self.facts["token"]

    def beat(self) -> None:
        """Say that the holder lives, and how far it is."""
        with suppress(OSError):
            if self.held():
                write_json(self.path, self.facts | self.progress | {"time": now()})

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self.beat()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(UserError):
            if self._ours():
                self.path.unlink(missing_ok=True)


@contextmanager
def leased(directory: RunDirectory, when_lost: Callable[[], object] = lambda: None) -> Iterator[Lease]:
    """Hold a run directory's lease. Raises UserError where another process holds it."""
    lease = Lease(directory.lease, when_lost)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()
