"""Show how a training step's time on a CPU divides into operations: with padding, and in our module.

    python tests/benchmarks/where.py [--bf16] [--llama] [--sizes SIZE …] [--figure FILE]   # about nine minutes

The method is full fine-tuning on the pairs of train.py, with one thread: each core of a training step has one thread,
and the profiler sees all of its work.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from train import LEARNING_RATE, WARM, ours, padded, save_model

from analysis.figures.style import TWO, style

PAIRS = {"pythia-14m": 256, "pythia-70m": 64, "pythia-160m": 32, "pythia-410m": 8}
PARTS = {  # part → beginnings of the names of its operations
    "products of dense layers": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "GELU": ("aten::gelu", "aten::silu"),
    "norms": ("aten::native_layer_norm", "aten::pow", "aten::mean", "aten::rsqrt"),
    "rotation, residuals, biases": ("aten::mul", "aten::add", "aten::neg", "aten::sum", "aten::sub"),
    "copies and fills": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index", "aten::embedding"),
    "AdamW": ("aten::_fused_adamw",),
}

COLORS = [matplotlib.colormaps["tab10"](number) for number in (0, 1, 4, 2, 8, 9, 3, 7)]  # of PARTS, then of the rest


def parts_of(turn) -> dict[str, float]:
    """Return seconds per step by part. `the rest` is everything in no part, Python included."""
    turn(1)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        turn(1)
    seconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in found.key_averages():
        part = next((name for name, begins in PARTS.items() if event.key.startswith(begins)), "the rest")
        seconds[part] += event.self_cpu_time_total / 1e6 / (WARM + 1)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pythia-14m", "pythia-160m", "pythia-410m"], choices=PAIRS)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--llama", action="store_true", help="Llama's blocks in these sizes")
    parser.add_argument("--figure", metavar="FILE", help="the shares as bars")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for size in args.sizes:
        words = [f"training.batch_size={PAIRS[size]}", f"training.learning_rate={LEARNING_RATE}"]
        words += ["training.precision=bf16"] if args.bf16 else []
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            save_model(size, args.llama, folder)
            before, after = parts_of(padded(words, folder)), parts_of(ours(words, "full", folder))
        found[size] = before, after
        kind = f"{size}{' as Llama' * args.llama}, {PAIRS[size]} pairs, {'bf16' if args.bf16 else 'float32'}"
        table = Table("", "padded", "", "ours", "", title=f"{kind}: seconds of a step on one thread")
        for column in table.columns[1:]:
            column.justify = "right"
        for part in before:
            shares = [f"{each[part] / sum(each.values()):.0%}" for each in (before, after)]
            table.add_row(part, f"{before[part]:.3f}", shares[0], f"{after[part]:.3f}", shares[1])
        table.add_row("in all", f"{sum(before.values()):.3f}", "", f"{sum(after.values()):.3f}", "")
        Console(width=110).print(table)
    if args.figure:
        draw(found, args.figure)


def draw(found: dict[str, tuple[dict[str, float], dict[str, float]]], file: str) -> None:
    """Draw two bars for each size, as shares of the padded step."""
    with style():
        figure = Figure(figsize=(TWO, 0.55 + 0.5 * len(found)))
        axes = figure.subplots()
        ticks = []
        for row, (size, both) in enumerate(found.items()):
            whole = sum(both[0].values())
            for place, name, seconds in zip((row - 0.2, row + 0.2), ("padded", "ours"), both, strict=True):
                left = 0.0
                for part, color in zip(seconds, COLORS, strict=True):
                    share = 100 * seconds[part] / whole
                    axes.barh(place, share, 0.36, left, color=color, label=part if not ticks else None)
                    left += share
                ticks.append((place, f"{size}, {name}"))
        axes.set_yticks(*map(list, zip(*ticks, strict=True)))
        axes.grid(False, axis="y")
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.set_xlabel("time of a step, % of the padded way's")
        figure.legend(loc="outside upper center", ncols=4)
        figure.savefig(file)


if __name__ == "__main__":
    main()
