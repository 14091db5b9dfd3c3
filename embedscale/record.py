"""The run directory: its files, written whole or not at all, its lease, its attempts and its done-marker.

Only this module knows how the files of a run are called. It needs neither torch nor a lock server.
"""

import json
import os
import socket
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
        try:
            write(file)
        except Exception:
            # torch, NumPy and safetensors have errors of their own for a full disk: it is asked again.
            file.write(bytes(2**20))
            file.flush()
            raise
        file.flush()
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

    def close_lost_attempts(self, last_seen: str | None) -> None:
        """Say of attempts that ended without a word (SIGKILL, a dead node) that they were killed, and when."""
        for facts in self.read_attempts():
            if "ended" not in facts:
                attempt = Attempt(self.attempts / str(facts["number"]), facts)
                attempt.write(end=max(last_seen or "", facts["start"]), ended="killed")

    def append_metrics(self, row: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The complete rows of metrics.jsonl; a torn last line is no row."""
        try:
            text = self.metrics.read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1] if line]

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


def process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # A zombie answers signals but will never write again.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return True


def lease_holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lease, or None where nobody does or its holder is gone.

    On the holder's own host the process decides; elsewhere the age of the last heartbeat.
    """
    try:
        text, age = path.read_text(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        holder: dict[str, Any] = json.loads(text)
        host, pid = holder["host"], holder["pid"]
    except (ValueError, KeyError, TypeError):
        return None if age > STALE_SECONDS else {"host": "unknown", "pid": 0}
    if host == socket.gethostname():
        return holder if process_alive(pid) else None
    return holder if age < STALE_SECONDS else None


class Lease:
    """The right to write into a run directory, kept by a heartbeat that also tells the progress."""

    def __init__(self, path: Path):
        self.path = path
        self.facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
            "start": now(),
        }
        self.facts["job_id"] = os.environ.get("SLURM_JOB_ID")
        self.progress: dict[str, Any] = {}
        self.left_behind: str | None = None  # the last heartbeat of a dead holder whose lease was taken over
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    def _create(self) -> bool:
        # A link appears with its whole content, or fails because another one was first.
        temporary = self.path.with_name(f".{self.path.name}.{self.facts['token'][:8]}.partial")
        temporary.write_text(json.dumps(self.facts))
        try:
            os.link(temporary, self.path)
            return True
        except FileExistsError:
            return False
        finally:
            temporary.unlink()

    def take(self) -> None:
        """Raises UserError where another process holds the run."""
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
        raise UserError(f"{self.path.parent}: another process is taking this run; nothing was touched")

    def beat(self) -> None:
        """Say that the holder lives, and how far it is."""
        with suppress(OSError):
            write_json(self.path, self.facts | self.progress | {"time": now()})

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self.beat()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)


@contextmanager
def leased(directory: RunDirectory) -> Iterator[Lease]:
    """Hold a run directory's lease. Raises UserError where another process holds it."""
    lease = Lease(directory.lease)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()
