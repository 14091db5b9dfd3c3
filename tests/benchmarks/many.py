"""How long `sweep status` and `fit` take for ten thousand run directories, fifty of them damaged in different ways.

    python tests/benchmarks/many.py [FOLDER]

It prints the time by the clock and the processor time of each command; the second hardly depends on what else runs.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from damage import every_way
from records import record

from embedscale.run.cost import cost_of
from embedscale.run.families import PYTHIA
from slurm import grid

SIZES = [PYTHIA.sizes[f"pythia-{name}"] for name in ("14m", "31m", "70m", "160m", "410m", "1b")]
BUDGETS = [1.5e15 * 4.0**power for power in range(5)]
SEEDS = 334  # 10,020 runs
DAMAGED = 50


def write_sweep(folder: Path) -> grid.Sweep:
    """Write a sweep file and a finished run directory for each of its runs."""
    names = [f"EleutherAI/{size.name}" for size in SIZES]
    axes = {"budget": BUDGETS, "training.seed": list(range(SEEDS))}
    file = {"name": "many", "output": str(folder), "axes": axes, "backbones": names, "methods": ["full"]}
    (folder / "many.yaml").write_text(json.dumps(file))
    sweep, rng = grid.load(folder / "many.yaml"), np.random.default_rng(0)
    shapes = {f"EleutherAI/{size.name}": size for size in SIZES}
    for run_id, run in sweep.by_id.items():
        size = shapes[run.backbone.name]
        cost = cost_of(size.shape, run.method)
        tokens = int(run.budget / cost.flop_per_token)
        loss = (0.1 + 900 / size.parameters**0.45 + 90 / tokens**0.25) * np.exp(0.004 * rng.standard_normal())
        facts = {"backbone": size.name, "n_parameters": size.parameters, "tokens": tokens, "loss": float(loss)}
        facts |= {"budget_flop": run.budget, "spent_flop": int(run.budget), "flop_per_token": int(cost.flop_per_token)}
        path = sweep.folder / run_id
        (path / "attempts" / "1").mkdir(parents=True)
        start = {"number": 1, "start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T01:00:00+00:00", "ended": "done"}
        (path / "attempts" / "1" / "attempt.json").write_text(json.dumps(start))
        found = record(run_id=run_id, seed=run.training.seed, attempts=[start], **facts)
        (path / "record.json").write_text(json.dumps(found))
    return sweep


def damage(sweep: grid.Sweep) -> None:
    rng = random.Random(0)
    runs = rng.sample(sorted(sweep.by_id), DAMAGED)
    ways = [content for _, content in every_way(sweep.folder / runs[0] / "record.json", rng, values=60)]
    for number, run_id in enumerate(runs):
        record_file, attempt = sweep.folder / run_id / "record.json", sweep.folder / run_id / "attempts/1/attempt.json"
        if number % 2:  # without a record, the attempts tell the state
            record_file.unlink()
        (attempt if number % 2 else record_file).write_bytes(ways[number % len(ways)])


def timed(*words: str) -> str:
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "embedscale.cli", *words], capture_output=True, text=True)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{' '.join(words[:2]):40.40} exit {done.returncode}, {seconds:6.1f} s by the clock, {used:6.1f} s of processor"
    )
    return done.stdout + done.stderr


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        sweep = write_sweep(folder)
        damage(sweep)
        for _ in range(2):  # the second time, the files are in memory
            status = timed("sweep", "status", str(folder / "many.yaml"))
            fit = timed("fit", str(sweep.folder), "--where", "method=full")
        print(*[line for line in status.splitlines() if "damaged" in line][:3], sep="\n")
        print(*[line for line in fit.splitlines() if "left out" in line or "damaged" in line][:6], sep="\n")


if __name__ == "__main__":
    main()
