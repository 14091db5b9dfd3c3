"""The run directory: the only module that knows how the files of a run are called. No torch here."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.files import now, read_json, write_atomically, write_json


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
