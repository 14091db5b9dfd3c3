"""Parts of a command for a rented GPU: each has seconds of its own, and what it found is saved and printed at once.

All parts run in one worker process, so that imports and the GPU's start are paid once. A part that fails, hangs or
breaks the GPU's state ends with its worker; the next part gets a new one. So no part takes another's results or time.
"""

import argparse
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

START_SECONDS = 90.0  # for a worker's imports
REHEARSAL = 20  # times the seconds, on a CPU
LEAST_SECONDS = 5.0  # with less time left, a part is not begun


@dataclass(frozen=True)
class Setting:
    """What every part is told."""

    folder: Path  # where it may write
    cpu: bool  # a rehearsal: small sizes, no GPU

    def pick(self, gpu: Any, cpu: Any) -> Any:
        """Return the value for a GPU, or the one for a rehearsal."""
        return cpu if self.cpu else gpu


Row = dict[str, Any]
"""`name` and values; `ok` says whether a check passed."""


@dataclass(frozen=True)
class Part:
    """`rows(setting)` yields what it finds, piece by piece, for at most `seconds`."""

    name: str
    seconds: float
    rows: Callable[[Setting], Iterator[Row]]


def command(text: str, title: str, parts: Sequence[Part], seconds: float) -> int:
    """Run a command whose help is `text`; return the number of parts that failed."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="rehearse on a CPU, in small sizes")
    parser.add_argument("--seconds", type=float, default=seconds, help="of all parts together")
    parser.add_argument("--only", nargs="+", default=[], choices=[part.name for part in parts], metavar="PART")
    args = parser.parse_args()
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return run(title, parts, Setting(args.out.absolute(), args.cpu), args.seconds, args.only)


def run(title: str, parts: Sequence[Part], setting: Setting, seconds: float, only: Sequence[str] = ()) -> int:
    """Run the parts in turn, for at most `seconds` in all; return how many failed. A rehearsal may take far longer."""
    seconds *= setting.pick(1, REHEARSAL)
    setting.folder.mkdir(parents=True, exist_ok=True)
    begun, worker = time.monotonic(), None
    ends: list[tuple[str, str, float, int]] = []
    with (setting.folder / f"{title}.jsonl").open("w") as file, (setting.folder / f"{title}.txt").open("w") as text:

        def save(row: Row) -> None:
            file.write(json.dumps(row, default=str) + "\n")
            text.write(line(row) + "\n")
            for each in (file, text):
                each.flush()
            print(line(row), flush=True)

        for part in parts:
            if only and part.name not in only:
                continue
            left = seconds - (time.monotonic() - begun)
            if left < LEAST_SECONDS:
                ends.append((part.name, "not begun", 0.0, 0))
                continue
            if worker is None or not worker.alive:
                worker = Worker(setting, min(START_SECONDS * setting.pick(1, REHEARSAL), left))
            left = seconds - (time.monotonic() - begun)
            started, rows, error = time.monotonic(), 0, worker.error
            most = min(part.seconds * setting.pick(1, REHEARSAL), left)
            for row in worker.rows(part, most) if not error else ():
                if "error" in row:
                    error = row["error"]
                    break
                rows += 1
                save({"part": part.name} | row)
                if row.get("ok") is False:
                    error = "a check failed"
            took = time.monotonic() - started
            if error:
                save({"part": part.name, "name": "failed", "error": error})
            if not worker.alive or (error and error != "a check failed"):
                worker.end()
                worker = None
            ends.append((part.name, (error or "done").strip().splitlines()[-1][:60], took, rows))
            save({"part": part.name, "name": "end", "seconds": round(took, 1), "of": part.seconds})
        if worker is not None:
            worker.end()
        table = Table("part", "end", "seconds", "rows", title=f"{title}: {time.monotonic() - begun:.0f} s in all")
        for name, end, took, rows in ends:
            table.add_row(name, end, f"{took:.1f}", str(rows))
        for console in (Console(width=110), Console(width=110, file=text)):
            console.print(table)
    return sum(end != "done" for _, end, _, _ in ends)


def line(row: Row) -> str:
    """One row as a line that a person reads."""
    passed = {True: "ok ", False: "BAD", None: "   "}[row.get("ok")]
    values = (f"{key}={_short(value)}" for key, value in row.items() if key not in ("part", "name", "ok"))
    return f"{passed} {row['part']:<12} {row['name']:<28} {'  '.join(values)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Worker:
    """A process that runs parts and sends their rows."""

    def __init__(self, setting: Setting, seconds: float):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Not a daemon: loaders have processes of their own.
        self.process = context.Process(target=_serve, args=(theirs, setting))
        self.process.start()
        theirs.close()
        self.error = None if self._received(seconds) == "ready" else "the worker did not start"

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def rows(self, part: Part, seconds: float) -> Iterator[Row]:
        """Yield a part's rows; the last one has an `error` if the part did not end well within its seconds."""
        last = time.monotonic() + seconds
        self.pipe.send(part.rows)
        while True:
            found = self._received(last - time.monotonic())
            if found == "end":
                return
            if not isinstance(found, dict):
                found = {"error": found or f"the part took more than {seconds:.0f} s"}
            yield found
            if "error" in found:
                return

    def _received(self, seconds: float) -> Any:
        """Return the next message; None if the time is over first."""
        try:
            return self.pipe.recv() if self.pipe.poll(max(0.0, seconds)) else None
        except (EOFError, OSError):
            self.process.join(1)
            return f"the worker ended with status {self.process.exitcode}"

    def end(self) -> None:
        """Kill the worker and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self.process.kill()
        self.process.join()


def _serve(pipe: Any, setting: Setting) -> None:
    os.setpgid(0, 0)  # `end` kills the group
    import gc

    import torch

    from embedscale.run.stop import end_with_parent

    end_with_parent()
    pipe.send("ready")
    while True:
        try:
            rows = pipe.recv()
        except EOFError:
            return
        try:
            for row in rows(setting):
                pipe.send(row)
            pipe.send("end")
        except Exception as error:
            pipe.send(
                {"error": f"{''.join(traceback.format_tb(error.__traceback__)[-3:])}{type(error).__name__}: {error}"}
            )
        finally:
            gc.collect()  # a module and its Trainer hold each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
