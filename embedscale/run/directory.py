"""The run directory: the one module that knows how the files of a run are called, and that reads and writes them.

A file that exists but does not hold what it should is returned as `Damaged`, so that one damaged run does not hide the
others; `sound` turns it into a UserError where only this run matters.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_64

from embedscale.errors import UserError
from embedscale.files import half_written, now, write_atomically, write_json, write_sealed
from embedscale.process import job_number
from embedscale.run.record import AttemptRecord, Damaged, Metric, RunRecord, sound

LEASE = "lease.json"
KEPT = 2  # checkpoints: if the newest one is damaged, the one before serves


class _Entry:
    """A path in a run directory, built when it is asked for: `status` looks at few of ten thousand runs' files."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, directory: "RunDirectory", owner: type) -> Path:
        return directory.path / self.name


class RunDirectory:
    """runs/RUN_ID and the files in it."""

    config = _Entry("config.yaml")
    plan = _Entry("plan.json")
    metrics = _Entry("metrics.jsonl")
    checkpoints = _Entry("checkpoints")
    attempts = _Entry("attempts")
    record = _Entry("record.json")
    lease = _Entry(LEASE)
    model = _Entry("model")
    weights = _Entry("model/trainable.safetensors")
    scores = _Entry("scores")
    tensorboard = _Entry("tensorboard")

    def __init__(self, path: str | Path):
        self.path = Path(path)

    # --- Paths that need a number or a name ---

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:09d}.pt"

    def checkpoint_paths(self) -> list[Path]:
        """Return the checkpoints that exist, the newest last."""
        return sorted(self.checkpoints.glob("step-*.pt"))

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        paths = self.checkpoint_paths()
        return _step_of(paths[-1]) if paths else None

    def write_checkpoint(self, step: int, write: Callable[[BinaryIO], object]) -> None:
        """Write a sealed checkpoint; remove older ones, but for the `KEPT` newest.

        A newer one, which could not be used when this attempt began, stays until the run writes it again or ends.
        """
        self.checkpoints.mkdir(exist_ok=True)
        write_sealed(self.checkpoint(step), write)
        for old in [path for path in self.checkpoint_paths() if _step_of(path) <= step][:-KEPT]:
            old.unlink()

    def score(self, task: str) -> Path:
        """Return the path of the score on an mteb task."""
        return self.scores / f"{task}.json"

    def score_paths(self) -> list[Path]:
        """Return the files of scores that exist."""
        return sorted(self.scores.glob("*.json"))

    def log(self, attempt: int, rank: int = 0) -> Path:
        """Return the path of the output of one process of an attempt."""
        return self.attempts / (f"{attempt}.rank{rank}.log" if rank else f"{attempt}.log")

    def messages(self, attempt: int) -> list[Path]:
        """Return the traceback and the log of an attempt, as far as they exist."""
        return [path for path in (self.attempt(attempt).traceback, self.log(attempt)) if path.exists()]

    def begun(self) -> bool:
        """Return whether this folder is a run directory: whether it holds a file of a run."""
        return self.record.exists() or self.config.exists() or self.attempts.exists()

    # --- The record ---

    def read_record(self) -> RunRecord | Damaged | None:
        """Return the record of a finished run; None if there is none yet."""
        return RunRecord.read(self.record)

    def write_record(self, record: RunRecord) -> None:
        record.write(self.record)

    # --- Attempts ---

    def read_attempts(self) -> list[AttemptRecord] | Damaged:
        """Return every attempt that began, in order; or the first damaged file."""
        found = []
        try:
            numbers = self._numbers()
        except OSError as error:
            return Damaged(self.attempts, f"cannot be read ({error.strerror})")
        for number in numbers:
            attempt = AttemptRecord.read(self.attempt(number).file)
            if isinstance(attempt, Damaged):
                return attempt
            if attempt is not None and attempt.number != number:
                return Damaged(self.attempt(number).file, f"number: {attempt.number} was found; expected {number}")
            if attempt is not None:
                found.append(attempt)
        return found

    def _numbers(self) -> list[int]:
        try:
            return sorted(int(entry.name) for entry in os.scandir(self.attempts) if entry.name.isdecimal())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def attempt(self, number: int) -> "Attempt":
        """Return the folder of an attempt, whether it exists or not."""
        return Attempt(self.attempts / str(number), number)

    def begin_attempt(self, sharing: int = 1) -> "Attempt":
        """Open attempts/N with the next free N."""
        number = 1 + max(self._numbers(), default=0)
        while True:
            attempt = self.attempt(number)
            try:
                attempt.path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        attempt.write(
            start=now(),
            host=socket.gethostname(),
            job_id=job_number(),
            pid=os.getpid(),
            sharing=sharing,
        )
        return attempt

    def open_attempts(self) -> list["Attempt"]:
        """Return the attempts that did not say how they ended. Raise UserError if the file of one is damaged."""
        return [self.reopen(each) for each in sound(self.read_attempts()) if each.ended is None]

    def reopen(self, record: AttemptRecord) -> "Attempt":
        """Return an attempt to be written on."""
        return Attempt(self.attempts / str(record.number), record.number, record)

    def clear_up(self, last_seen: str | None) -> None:
        """Clean up after attempts that ended without saying so (SIGKILL, a dead node).

        Record that they were killed and when they were last seen, and remove partly written files.
        """
        self.remove_partial_files()
        for attempt in self.open_attempts():
            attempt.write(end=max(last_seen or "", attempt.record.start), ended="killed")

    def remove_partial_files(self) -> None:
        """Remove what killed processes left half-written. Only for who holds the lease.

        Scores are written without the lease: a half-written one is removed when it is an hour old.
        """
        for torn in (*half_written(self.path), *self.model.glob(".tmp*")):  # the second kind is safetensors'
            with suppress(FileNotFoundError):
                if torn.parent != self.scores or time.time() - torn.stat().st_mtime > 3600:
                    torn.unlink()

    def left_over(self) -> bool:
        """Return whether a finished run still has checkpoints, half-written files or its lease, as after a kill."""
        return self.checkpoints.exists() or self.lease.exists() or any(half_written(self.path))

    def remove_checkpoints(self) -> None:
        """Remove all checkpoints of a finished run."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    # --- Metrics ---

    def read_metrics(self) -> list[Metric]:
        """Return the sound rows of metrics.jsonl; lines that are damaged, or half-written, are left out."""
        rows = []
        for line in self._metric_lines():
            with suppress(ValueError, RecursionError, UserError):  # UnicodeDecodeError is a ValueError
                rows.append(Metric.from_json(json.loads(line)))
        return rows

    def _metric_lines(self) -> list[bytes]:
        try:
            return self.metrics.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []

    def cut_metrics(self, rows: int) -> None:
        """Keep the first `rows` rows: those of a checkpoint. A resumed run will write the others again."""
        self._write_metrics(self._metric_lines()[:rows])

    def cut_metrics_after(self, step: int) -> None:
        """Keep the sound rows up to a step, for a checkpoint of early code, which does not know its rows."""
        self._write_metrics([_line_of(row) for row in self.read_metrics() if row.step <= step])

    def _write_metrics(self, lines: list[bytes]) -> None:
        write_atomically(self.metrics, lambda file: file.write(b"".join(lines)))

    def has_metrics(self, rows: int, digest: str) -> bool:
        """Return whether the first `rows` rows of metrics.jsonl have this digest."""
        lines = self._metric_lines()[:rows]
        return len(lines) == rows and xxh3_64(b"".join(lines)).hexdigest() == digest


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.split("-")[1])


def _line_of(row: Metric) -> bytes:
    return (json.dumps(row.to_json()) + "\n").encode()


class MetricsLog:
    """Appends rows to metrics.jsonl, and knows how many rows it holds and their digest, which go into a checkpoint.

    The digest is of the rows as they were written. So damage that the file takes while the run is at work is noticed.
    """

    def __init__(self, directory: RunDirectory):
        self.directory = directory
        lines = directory._metric_lines()
        self.rows, self._digest = len(lines), xxh3_64(b"".join(lines))

    @property
    def digest(self) -> str:
        return str(self._digest.hexdigest())

    def append(self, row: Metric) -> None:
        line = _line_of(row)
        with self.directory.metrics.open("ab") as file:
            file.write(line)
        self.rows += 1
        self._digest.update(line)

    def secure(self) -> None:
        """Make the rows so far survive a power cut; to be called before a checkpoint is written."""
        with self.directory.metrics.open("ab") as file:
            os.fsync(file.fileno())

    def check(self) -> None:
        """Raise UserError if the file does not hold what was written."""
        if not self.directory.has_metrics(self.rows, self.digest):
            raise UserError(f"{self.directory.metrics}: has been changed while the run was at work; run it again")


class Attempt:
    """One process's try at a run: the folder attempts/N."""

    def __init__(self, path: Path, number: int, record: AttemptRecord | None = None):
        self.path = path
        self.file = path / "attempt.json"
        self.traceback = path / "traceback.txt"
        self.record = record or AttemptRecord(number, now())

    def write(self, **changes: Any) -> None:
        """Write the attempt's file with changed fields of its record."""
        self.record = replace(self.record, **changes)
        write_json(self.file, self.record.to_json())

    def end(self, ended: str, traceback: str | None = None, **changes: Any) -> None:
        """Write how the attempt ended (see `AttemptRecord.ended`) and, where there is one, the traceback."""
        if traceback:
            self.traceback.write_text(traceback)
        self.write(end=now(), ended=ended, **changes)


def finished(directory: RunDirectory) -> RunRecord:
    """Return the record of a finished run. Raises UserError if the run is not done."""
    record = sound(directory.read_record())
    if record is None:
        state = "is not finished" if directory.path.is_dir() else "does not exist"
        raise UserError(f"{directory.path}: this run {state}; expected the directory of a finished run")
    if record.status != "done":
        raise UserError(f"{directory.path}: this run {record.status}; expected a finished run")
    return record
