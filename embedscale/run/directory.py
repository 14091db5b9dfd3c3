"""The run directory: the one module that knows how the files of a run are called, and that reads and writes them.

A file that exists but does not hold what it should is returned as `Damaged`, so that one damaged run does not hide the
others; `sound` turns it into a UserError where only this run matters.
"""

import json
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.files import now, write_atomically, write_json
from embedscale.run.record import AttemptRecord, Damaged, Metric, RunRecord, sound


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
    lease = _Entry("lease.json")
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
        return int(paths[-1].stem.split("-")[1]) if paths else None

    def score(self, task: str) -> Path:
        """Return the path of the score on an mteb task."""
        return self.scores / f"{task}.json"

    def score_paths(self) -> list[Path]:
        """Return the files of scores that exist."""
        return sorted(self.scores.glob("*.json"))

    def log(self, attempt: int, rank: int = 0) -> Path:
        """Return the path of the output of one process of an attempt."""
        return self.attempts / (f"{attempt}.rank{rank}.log" if rank else f"{attempt}.log")

    def begun(self) -> bool:
        """Whether this folder is a run directory: something was written into it."""
        return self.record.exists() or self.config.exists() or self.attempts.exists()

    # --- The record ---

    def read_record(self) -> RunRecord | Damaged | None:
        """Return the record of a finished run; None if there is none yet."""
        return RunRecord.read(self.record)

    def write_record(self, record: RunRecord) -> None:
        write_json(self.record, record.to_json())

    # --- Attempts ---

    def read_attempts(self) -> list[AttemptRecord] | Damaged:
        """Return every attempt that began, in order; or the first damaged file."""
        found = []
        for number in self._numbers():
            attempt = AttemptRecord.read(self.attempt(number).file)
            if isinstance(attempt, Damaged):
                return attempt
            if attempt is not None:
                found.append(attempt)
        return found

    def _numbers(self) -> list[int]:
        try:
            return sorted(int(entry.name) for entry in os.scandir(self.attempts) if entry.name.isdigit())
        except FileNotFoundError:
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
            job_id=os.environ.get("SLURM_JOB_ID"),
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
        for torn in self.path.glob("*/.*.partial"):
            torn.unlink(missing_ok=True)
        for attempt in self.open_attempts():
            attempt.write(end=max(last_seen or "", attempt.record.start), ended="killed")

    # --- Metrics ---

    def append_metric(self, row: Metric) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(row.to_json()) + "\n")

    def secure_metrics(self) -> None:
        """Make the rows so far survive a power cut; to be called before a checkpoint is written."""
        with self.metrics.open("ab") as file:
            os.fsync(file.fileno())

    def read_metrics(self) -> list[Metric]:
        """Return the rows of metrics.jsonl up to a torn line, which a power cut leaves only after secured rows."""
        try:
            text = self.metrics.read_text(errors="replace")
        except FileNotFoundError:
            return []
        rows = []
        with suppress(ValueError, UserError):
            for line in text.split("\n")[:-1]:
                rows.append(Metric.from_json(json.loads(line)))
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows beyond `step`, which a resumed run will write again."""
        self._write_metrics(row for row in self.read_metrics() if row.step <= step)

    def _write_metrics(self, rows: Iterable[Metric]) -> None:
        text = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
        write_atomically(self.metrics, lambda file: file.write(text.encode()))


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
