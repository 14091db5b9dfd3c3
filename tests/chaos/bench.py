"""What every part stands on: tiny inputs, processes that start within milliseconds, and moments of a run.

A process is suspended before it is hit. So its phase is read from files that cannot change meanwhile, and not guessed.
"""

import gc
import multiprocessing.forkserver
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from command import Command
from saved import save_backbone, write_pairs
from transformers.utils.logging import disable_progress_bar

from embedscale.errors import DONE
from embedscale.run.directory import RunDirectory
from embedscale.run.record import AttemptRecord

METHODS = {
    "full": ["method.name=full"],
    "freeze": ["method.name=freeze", "method.active_fraction=0.5"],
    "bias": ["method.name=bias"],
    "lora": ["method.name=lora", "method.rank=4"],
}
PRELOADED = ["embedscale.training.train", "transformers.models.gpt_neox.modeling_gpt_neox", "peft", "embedscale.cli"]
SECONDS = 600.0  # that any command may take on a busy machine


class Bench:
    """A folder with a backbone and a store, and a server that forks commands with all imports done."""

    def __init__(self, folder: Path, preloaded: list[str]):
        self.folder = folder
        disable_progress_bar()
        gc.disable()
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload([*PRELOADED, *preloaded])
        multiprocessing.forkserver.ensure_running()
        self.environment = os.environ | {"SLURM_CONF": os.devnull}
        self.outputs = folder / "outputs"
        self.outputs.mkdir(parents=True)
        self.backbone = save_backbone(folder / "pythia-tiny")
        self.pairs = write_pairs(folder / "pairs.jsonl", 1500)
        gc.enable()
        self.data = [
            f"backbone.name={self.backbone}",
            f"data.sources=[{{kind: jsonl, path: {self.pairs}, negative: neg}}]",
            "data.context=40",
            "data.held_out=0.1",
        ]
        self.words = [*self.data, f"data.store={folder / 'store'}", "training.batch_size=16", "evaluation.pool=128"]
        self.words += ["evaluation.negatives=31", "training.learning_rate=0.003"]
        code, said = self.call("prepare", *self.words)
        assert code == DONE, said

    def start(self, *words: str, fresh: bool = False) -> Command:
        """Start a command: forked, or with `fresh` in a new interpreter, which imports everything."""
        if fresh:
            return Fresh(list(words), self.environment, self.outputs)
        return Command(self.server, list(words), self.environment, self.outputs)

    def call(self, *words: str, fresh: bool = False) -> tuple[int | None, str]:
        """Run a command to its end; return its status and output."""
        process = self.start(*words, fresh=fresh)
        return self.end(process)

    def end(self, process: Command, seconds: float = SECONDS) -> tuple[int | None, str]:
        """Wait for a command; return its status, None if it hangs and had to be killed, and its output."""
        code = process.wait(seconds)
        if code is None:
            process.send_signal(signal.SIGKILL)
            process.wait(SECONDS)
        said = process.stdout.read()
        Path(process.output).unlink()
        return code, said


class Fresh(Command):
    """A command in a new interpreter, with the methods of `Command`."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path):
        path = folder / f"fresh-{time.monotonic_ns()}.out"
        with path.open("wb") as file:
            line = [sys.executable, "-m", "embedscale.cli", *words]
            self.started = subprocess.Popen(line, env=environment, cwd=folder, stdout=file, stderr=file)
        self.output, self.pid, self.stdout = str(path), self.started.pid, SimpleNamespace(read=path.read_text)

    @property
    def returncode(self) -> int | None:
        return self.started.poll()

    def wait(self, timeout: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.started.wait(timeout)
        return None


def suspend(pid: int) -> bool:
    """Suspend a process and wait until it stands still; return False if it has ended."""
    with suppress(OSError):
        os.kill(pid, signal.SIGSTOP)
        while (state := Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]) != "T":
            if state in "ZX":
                return False
            time.sleep(0.0002)
        return True
    return False


def phase_of(directory: RunDirectory, pid: int, evaluated_after: list[int]) -> str:
    """Return what a process of `train` is doing, from the files of its run.

    The run must log every step. `evaluated_after` are the steps after which it evaluates.
    """
    numbers = [int(path.name) for path in directory.attempts.glob("*") if path.name.isdecimal()]
    attempt = AttemptRecord.read(directory.attempt(max(numbers)).file) if numbers else None
    if not isinstance(attempt, AttemptRecord) or attempt.pid != pid or attempt.from_step is None:
        return "start-up"
    if attempt.ended is not None or any(directory.model.glob(".*")) or any(directory.path.glob(".record.json.*")):
        return "record"
    if any(directory.checkpoints.glob(".step-*.partial")):
        return "checkpoint"
    rows = directory.read_metrics()
    if rows and rows[-1].step in evaluated_after and rows[-1].loss is None:
        return "evaluation"
    return "step"


def tracebacks(said: str) -> str | None:
    """Return the end of an output that holds a traceback; what Python says of half-made objects of torch is none."""
    shown = re.sub(r"^Exception ignored in: .*\nTraceback .*\n(  .*\n)*.*$", "", said, flags=re.MULTILINE)
    return said[-900:] if re.search(r"^(\[rank\d+\]: )?Traceback", shown, re.MULTILINE) else None
