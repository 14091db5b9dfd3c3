"""The run directory: its files, written whole or not at all, its lease, its attempts and its done-marker.

Only this module knows how the files of a run are called. It needs neither torch nor a lock server.
"""

import json
import os
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from embedscale.errors import UserError

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 180.0  # a lease of another host without a heartbeat for so long is left behind


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that, whatever happens, it holds all of the old content or all of the new.

    The temporary file lies beside its target: a rename across file systems would be a copy. Where the system refuses,
    raises its OSError with the target's name, whatever `write` made of it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _write_to_disk(temporary, write)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # whoever refuses to unlink has refused to write, and that is the error to hear of
            temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_to_disk(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        try:
            write(file)
        except Exception:
            # torch, NumPy and safetensors have errors of their own for a full disk: it is asked again.
            file.write(bytes(2**20))
            file.flush()
            raise
    # safetensors puts a file of its own in this one's place, which its owner alone may read.
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
            path.chmod(mode)
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> Any:
    """The file's value, or None where it is missing. Raises UserError where it is no JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path}: is no valid JSON") from None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Entry:
    """A path in a run directory, built when it is asked for: `status` looks at few of ten thousand runs' files."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, directory: "RunDirectory", owner: type) -> Path:
        return directory.path / self.name


class RunDirectory:
    """runs/RUN_ID and what lies in it."""

    config = _Entry("config.yaml")
    plan = _Entry("plan.json")
    metrics = _Entry("metrics.jsonl")
    checkpoints = _Entry("checkpoints")
    attempts = _Entry("attempts")
    record = _Entry("record.json")
    lease = _Entry("lease.json")
    model = _Entry("model")
    scores = _Entry("scores")

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def score(self, task: str) -> Path:
        """The file of an mteb task's score."""
        return self.scores / f"{task}.json"

    def read_record(self) -> dict[str, Any] | None:
        """The record of a finished run, or None."""
        record = read_json(self.record)
        if record is not None and not isinstance(record, dict):
            raise UserError(f"{self.record}: is no run record")
        return record

    def read_attempts(self) -> list[dict[str, Any]]:
        """Every attempt that began, in order."""
        try:
            numbers = sorted(int(entry.name) for entry in os.scandir(self.attempts) if entry.name.isdigit())
        except FileNotFoundError:
            return []
        found = (read_json(self.attempts / str(number) / "attempt.json") for number in numbers)
        return [attempt for attempt in found if attempt]

    def begin_attempt(self, **facts: Any) -> "Attempt":
        """Open attempts/N with the next free N."""
        number = 1 + max((a["number"] for a in self.read_attempts()), default=0)
        while True:
            try:
                (self.attempts / str(number)).mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        attempt = Attempt(self.attempts / str(number), {"number": number, "start": now(), "host": socket.gethostname()})
        attempt.write(job_id=os.environ.get("SLURM_JOB_ID"), pid=os.getpid(), **facts)
        return attempt

    def clear_up(self, last_seen: str | None) -> None:
        """After attempts that ended without a word (SIGKILL, a dead node): say that they were killed, and when, and
        remove the half of a checkpoint that they may have left."""
        for torn in self.path.glob("*/.*.partial"):
            torn.unlink(missing_ok=True)
        for facts in self.read_attempts():
            if "ended" not in facts:
                attempt = Attempt(self.attempts / str(facts["number"]), facts)
                attempt.write(end=max(last_seen or "", facts["start"]), ended="killed")

    def append_metrics(self, row: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def secure_metrics(self) -> None:
        """See to it that the rows so far outlive a power cut; to be called before a checkpoint is written."""
        with self.metrics.open("ab") as file:
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl up to a torn line, which a power cut leaves only behind what was secured."""
        try:
            text = self.metrics.read_text(errors="replace")
        except FileNotFoundError:
            return []
        rows = []
        with suppress(ValueError):
            for line in text.split("\n")[:-1]:
                rows.append(json.loads(line))
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows beyond `step`, which a resumed run will write again."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.metrics, lambda file: file.write(text.encode()))


class Attempt:
    """One process's try at a run: attempts/N."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.facts = facts

    def write(self, **facts: Any) -> None:
        self.facts |= facts
        write_json(self.path / "attempt.json", self.facts)

    def end(self, why: str, traceback: str | None = None, **facts: Any) -> None:
        """`why`: done, diverged, interrupted or failed."""
        if traceback:
            (self.path / "traceback.txt").write_text(traceback)
        self.write(end=now(), ended=why, **facts)


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
