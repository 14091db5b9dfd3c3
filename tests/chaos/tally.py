"""What was hit, in which phase, and what came of it: a file of JSON lines, tables, and one verdict.

A hit is written only after its run was compared with the undisturbed one, or at once if something went wrong. Several
sittings append to one file, and the tables count all of them.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

METHODS = ("full", "freeze", "bias", "lora")
KILLS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


@dataclass(frozen=True)
class Hit:
    """One fault."""

    part: str
    """local, verbs, files or slurm."""
    target: str
    """What was hit: a method, a verb or a file."""
    fault: str
    """What was done to it."""
    phase: str
    """At which moment; for a file, which command read it."""
    outcome: str
    """What followed, in a few words."""
    run: str
    """The run that was disturbed, for the number of different runs."""
    problem: str | None = None
    """What should not have happened; None if the promise was kept."""


@dataclass(frozen=True)
class Goal:
    """A number of hits below which nothing is concluded."""

    what: str
    least: int
    counts: Callable[[Hit], bool]


def _kill(hit: Hit) -> bool:
    return hit.fault in KILLS


GOALS = {
    "local": [
        Goal("local kills", 400, _kill),
        *(Goal(f"… of {name}", 60, lambda h, name=name: _kill(h) and h.target.startswith(name)) for name in METHODS),
        Goal("… in start-up or imports", 100, lambda h: _kill(h) and h.phase in ("start-up", "imports")),
        Goal("… in a checkpoint's write", 60, lambda h: _kill(h) and h.phase == "checkpoint"),
        Goal("… in the record's writing", 40, lambda h: _kill(h) and h.phase == "record"),
    ],
    "verbs": [Goal("kills of other verbs", 40, lambda h: True)],
    "files": [Goal("damaged files", 500, lambda h: True)],
    "slurm": [
        Goal("faults on SLURM", 80, lambda h: True),
        Goal("… in runs at work", 40, lambda h: h.phase == "at work"),
    ],
}
RUNS = 12  # on SLURM, that must have been hit


class Tally:
    """Counts hits, shows how far the sitting is, and knows when its time is up."""

    def __init__(self, path: Path, minutes: float):
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.until = self.end  # the end of the part that is at work
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.hits = [Hit(**json.loads(line)) for line in lines]
        self._shown = 0.0

    @property
    def left(self) -> float:
        """Seconds until the end of the part that is at work."""
        return self.until - time.monotonic()

    def add(self, hits: Iterable[Hit]) -> None:
        """Count hits whose outcome is known."""
        with self.path.open("a") as file:
            for hit in hits:
                self.hits.append(hit)
                file.write(json.dumps(asdict(hit)) + "\n")
                if hit.problem:
                    self.say(f"PROBLEM {hit.target}, {hit.fault} ({hit.phase}), {hit.run}: {hit.problem}")

    def say(self, text: str) -> None:
        print(f"\r{text:<100}", flush=True)

    def show(self, doing: str) -> None:
        """Show the time left and what is being done: one line on a terminal, else a line every 20 seconds."""
        bar = sys.stdout.isatty()
        if time.monotonic() - self._shown < (0.2 if bar else 20):
            return
        self._shown = time.monotonic()
        minutes, seconds = divmod(max(0, int(self.end - time.monotonic())), 60)
        text = f"{minutes:3d}:{seconds:02d} left, {len(self.hits)} hits: {doing}"
        print(f"\r{text[:100]:<100}", end="" if bar else "\n", flush=True)

    def report(self, parts: Iterable[str]) -> int:
        """Print the tables and the verdict on these parts; return 0 passed, 1 failed, 3 inconclusive."""
        parts = list(parts)
        for part in parts:
            print(f"\n{part}\n\n{self._table(part)}")
        print("\n| goal | least | seen |\n|---|---|---|")
        seen = [
            (goal.what, goal.least, sum(hit.part == part and goal.counts(hit) for hit in self.hits))
            for part in parts
            for goal in GOALS[part]
        ]
        if "slurm" in parts:
            seen.append(("… different runs", RUNS, len({hit.run for hit in self.hits if hit.part == "slurm"} - {""})))
        print("\n".join(f"| {what} | {least} | {number} |" for what, least, number in seen))
        short = [what for what, least, number in seen if number < least]
        wrong = [hit for hit in self.hits if hit.problem and hit.part in parts]
        for hit in wrong[:20]:
            print(f"\n{hit.part}: {hit.target}, {hit.fault}, {hit.phase}, {hit.run}\n    {hit.problem}")
        if wrong:
            print(f"\nFAILED: {len(wrong)} promises were broken")
            return 1
        if short:
            print(f"\nINCONCLUSIVE: too few {', '.join(short)}; no promise was broken so far")
            return 3
        print("\nPASSED: nothing was lost, nothing differed in silence, no traceback")
        return 0

    def _table(self, part: str) -> str:
        """Return faults by phase, or for files what followed, as a table in Markdown."""
        hits = [hit for hit in self.hits if hit.part == part]
        row = (lambda h: h.target) if part in ("files", "verbs") else (lambda h: h.fault)
        column = (lambda h: h.phase) if part in ("local", "slurm") else (lambda h: h.outcome)
        seen = Counter((row(hit), column(hit)) for hit in hits)
        rows, columns = sorted({r for r, _ in seen}), sorted({c for _, c in seen})
        lines = [["", *columns, "all"], ["---"] * (len(columns) + 2)]
        lines += [[r, *(str(seen[r, c]) for c in columns), str(sum(seen[r, c] for c in columns))] for r in rows]
        lines += [["all", *(str(sum(seen[r, c] for r in rows)) for c in columns), str(len(hits))]]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
