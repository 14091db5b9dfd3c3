"""Measure what a run costs besides its steps: its start, its checkpoints, its resumption.

    python tests/benchmarks/runs.py [--sizes pythia-14m …] [--methods full lora-r32] [--repeats 3]   # five minutes

These are real runs with few pairs per step on a prepared store, from random weights in the hub's format. The command
trains in a fresh process until its first step is done, is stopped, and is resumed in another fresh process. The same
run is also started as a job of a sweep starts it: in a process forked from one that has imported everything. That run
is not interrupted until it has passed the step at which the first run was resumed. Seconds are medians of wall-clock
time; all cases take turns. The files were just written, so they are read from the machine's cache.
"""

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepare import save_tokenizer, write_corpus
from rich.console import Console
from rich.table import Table

from embedscale.data.prepare import prepare
from embedscale.errors import INTERRUPTED
from embedscale.run.config import Backbone, RunConfig
from embedscale.run.cost import cost_of
from embedscale.run.directory import RunDirectory
from embedscale.run.families import PYTHIA
from embedscale.run.settings import load, to_yaml
from embedscale.run.stop import StopRequest
from embedscale.training import callbacks, train
from embedscale.training.pricing.calibrate import build
from embedscale.training.pricing.calibration import config_of
from slurm.plan import CHECKPOINT_BYTES
from slurm.scheduler.processes import Place, import_everything, run_all

PAIRS = 2  # per step: few, because the steps themselves are not measured
STEPS = 100  # planned steps: more than any of these runs makes
POLL_SECONDS = 0.002
Report = dict[str, float]  # the measurements of one turn of a case, by name


def settings(folder: Path) -> list[str]:
    source = f"[{{kind: jsonl, path: {folder / 'pairs.jsonl'}}}]"
    return [
        f"output={folder / 'runs'}",
        f"data.store={folder / 'store'}",
        f"data.tokenizer={folder / 'tokenizer'}",
        f"data.sources={source}",
        "data.held_out=0.1",
        "evaluation.pool=64",
        "evaluation.negatives=31",
        "evaluation.at=[]",
        f"training.batch_size={PAIRS}",
        "training.learning_rate=1e-4",
        "resources.log_every=1",
    ]


def furnish(folder: Path, sizes: list[str]) -> None:
    """Write the pairs, their store and the backbones."""
    corpus = folder / "pairs.jsonl"
    write_corpus(corpus, 4000, np.array([f"{number:x}" for number in range(30_000)]))
    save_tokenizer(folder / "tokenizer", corpus)
    prepare(load(None, settings(folder)))
    torch.manual_seed(0)
    for size in sizes:
        build(size).save_pretrained(folder / size)  # type: ignore[operator]


def run_of(folder: Path, size: str, label: str) -> RunConfig:
    config = config_of(load(None, settings(folder)), size, label)
    budget = 2.0 * STEPS * PAIRS * config.data.context * cost_of(PYTHIA.sizes[size].shape, config.method).flop_per_token
    return replace(config, backbone=Backbone(str(folder / size)), budget=budget)


def by_command(config: RunConfig, stop: signal.Signals) -> tuple[float, dict[str, Any]]:
    """Run `embedscale train` for one step, then stop it. Return the seconds until the step's row, and the row."""
    directory, file = RunDirectory(config.folder), Path(config.output).with_suffix(".yaml")
    file.write_text(to_yaml(config))
    before = max((row.step for row in directory.read_metrics()), default=0)
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "embedscale.cli", "train", str(file)], stdout=subprocess.DEVNULL)
    while not (rows := [row for row in directory.read_metrics() if row.step > before]):
        assert child.poll() is None, f"embedscale train ended with {child.returncode}"
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - begun
    child.send_signal(stop)
    assert child.wait() in (INTERRUPTED, -stop), child.returncode
    return seconds, rows[0]


class Beyond(StopRequest):
    """A stop request that is made when a run has finished the step `step`."""

    def __init__(self, directory: RunDirectory, step: int):
        super().__init__()
        self.directory, self.step = directory, step

    @property
    def requested(self) -> bool:
        if any(row.step >= self.step for row in self.directory.read_metrics()):
            self.request(f"step {self.step} is done")
        return self.reason is not None


class Clock:
    """Times at which functions begin and end, in this process and in processes forked from it."""

    def __init__(self) -> None:
        self.queue = get_context("fork").SimpleQueue()

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **words: Any) -> Any:
            begun = time.perf_counter()
            found = function(*args, **words)
            self.queue.put((name, begun, time.perf_counter()))
            return found

        setattr(owner, name, timed)

    def read(self) -> dict[str, list[tuple[float, float]]]:
        found = defaultdict(list)
        while not self.queue.empty():
            name, begun, ended = self.queue.get()
            found[name].append((begun, ended))
        return found


def turn(config: RunConfig, clock: Clock) -> Report:
    """Measure one repetition of a case: started, resumed, and without an interruption."""
    resumed, whole = (replace(config, output=f"{config.output}/{name}") for name in ("resumed", "whole"))
    Path(config.output).mkdir()
    fresh, first = by_command(resumed, signal.SIGTERM)
    again, row = by_command(resumed, signal.SIGKILL)

    directory = RunDirectory(whole.folder)
    begun = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        run_all([whole], [Place(threads=torch.get_num_threads())], Beyond(directory, row.step))
    did = {name: times[0] for name, times in clock.read().items()}
    rows = {each.step: each for each in directory.read_metrics()}

    size = next(directory.checkpoints.iterdir()).stat().st_size
    loading = time.perf_counter()
    state = callbacks.newest_checkpoint(directory, whole.run_id)
    loaded = time.perf_counter()
    assert state is not None
    shutil.rmtree(config.output)
    return {
        "fresh": fresh,
        "started": fresh - first.seconds,
        "backbone": did["load_body"][1] - did["load_body"][0],
        "forked": did["write"][1] - begun - rows[1].seconds,
        "resumed": again,
        "step": row.step,
        "loss": row.train_loss,
        "equal": row.train_loss == rows[row.step].train_loss,
        "trained": sum(weight.numel() for weight in state["weights"].values()),
        "bytes": size,
        "write": did["save"][1] - did["save"][0],
        "load": loaded - loading,
    }


def import_seconds() -> float:
    """Return the time of the command's imports, without the end of the process."""
    code = "\n".join(
        (
            "from embedscale.imports import importing",
            "with importing(): import embedscale.training.train",
            "print(flush=True)",
        )
    )
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.read(1)
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pythia-14m", "pythia-70m", "pythia-160m"])
    parser.add_argument("--methods", nargs="+", default=["full", "lora-r32"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_everything()
    clock = Clock()
    for owner, name in ((train, "load_body"), (callbacks.Checkpoints, "save"), (callbacks.Log, "write")):
        clock.watch(owner, name)
    reports: dict[tuple[str, str], list[Report]] = defaultdict(list)
    imports = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # In a separate process: a process that forks must not have started threads.
        furnishing = get_context("spawn").Process(target=furnish, args=(folder, args.sizes))
        furnishing.start()
        furnishing.join()
        assert furnishing.exitcode == 0
        for _ in range(args.repeats):
            imports.append(import_seconds())
            for size in args.sizes:
                for label in args.methods:
                    reports[size, label].append(turn(run_of(folder, size, label), clock))
    show(reports, float(np.median(imports)), load(None).resources.checkpoint_minutes)


def show(reports: dict[tuple[str, str], list[Report]], imports: float, minutes: float) -> None:
    starts = Table(
        "", "", "command", "imports", "backbone", "the rest", "forked", "backbone", "the rest",
        title="Seconds from the start of a run to its first step: the command's, and forked by a node",
    )  # fmt: skip
    checkpoints = Table(
        "", "", "trained", "MB", f"at {CHECKPOINT_BYTES} bytes each", "write, s", f"of {minutes:g} min", "load, s",
        title="Checkpoints",
    )  # fmt: skip
    steps = Table(
        "", "", "fresh", "resumed", "resumed step", "its loss", "of the uninterrupted run",
        title="Seconds from the command to the end of its first step: fresh, and resumed",
    )  # fmt: skip
    for (size, label), turns in reports.items():
        found = {name: float(np.median([each[name] for each in turns])) for name in turns[0]}
        started, forked, backbone = found["started"], found["forked"], found["backbone"]
        split = (started, imports, backbone, started - imports - backbone, forked, backbone, forked - backbone)
        starts.add_row(size, label, *(f"{seconds:.2f}" for seconds in split))
        promised = CHECKPOINT_BYTES * found["trained"]
        checkpoints.add_row(
            size,
            label,
            f"{found['trained']:,.0f}",
            f"{found['bytes'] / 1e6:,.1f}",
            f"{promised / 1e6:,.1f}",
            f"{found['write']:.3f}",
            f"{found['write'] / (60 * minutes):.3%}",
            f"{found['load']:.3f}",
        )
        last = turns[-1]
        verdict = "the same, to the last bit" if all(each["equal"] for each in turns) else "another"
        seconds = (f"{found['fresh']:.2f}", f"{found['resumed']:.2f}")
        steps.add_row(size, label, *seconds, f"{last['step']}", repr(last["loss"]), verdict)
    for table in (starts, checkpoints, steps):
        for column in table.columns[2:]:
            column.justify = "right"
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
