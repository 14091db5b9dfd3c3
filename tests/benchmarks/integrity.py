"""What digests cost: writing and reading a checkpoint with and without its seal, and verifying the shards of a store.

    python tests/benchmarks/integrity.py [--parameters 30e6] [--turns 9] [--folder FOLDER]

The two sides take turns in one process. Without a seal, a checkpoint is written as version 0.2 did: by torch with its
own checksum, which torch never verifies. Every checkpoint is written to the disk and synchronised.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from embedscale.files import digest_file, seal_fits, write_atomically
from embedscale.run.directory import RunDirectory
from embedscale.training.callbacks import save_state


def timed(what: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and seconds of processors: other work on the machine disturbs the former more."""
    begun, used = time.perf_counter(), time.process_time()
    what()
    return time.perf_counter() - begun, time.process_time() - used


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--parameters", type=float, default=30e6, help="that train (default: 30e6)")
    words.add_argument("--turns", type=int, default=9)
    words.add_argument("--folder", help="on the disk to be measured")
    args = words.parse_args()
    n = int(args.parameters)
    state = {"weights": torch.randn(n), "first": torch.randn(n), "second": torch.rand(n)}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        directory, before = RunDirectory(folder), Path(folder) / "before.pt"
        sealed = directory.checkpoint(1)
        rows: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ("write", "write sealed", "read", "read sealed", "digest")
        }
        for turn in range(args.turns):
            sides = {
                "write": lambda: write_atomically(before, lambda file: torch.save(state, file)),
                "write sealed": lambda: directory.write_checkpoint(1, lambda file: save_state(state, file)),
            }
            for name in sorted(sides, reverse=bool(turn % 2)):
                rows[name].append(timed(sides[name]))
            rows["read"].append(timed(lambda: torch.load(before, weights_only=True)))
            rows["read sealed"].append(timed(lambda: (seal_fits(sealed), torch.load(sealed, weights_only=True))))
            rows["digest"].append(timed(lambda: digest_file(before)))
        size = before.stat().st_size
    print(f"{n:,} parameters, {size / 1e6:,.0f} MB, {args.turns} turns")
    for name, pairs in rows.items():
        seconds, used = np.median(pairs, axis=0)
        print(f"{name:13} {seconds:7.3f} s  {size / seconds / 1e9:6.2f} GB/s  {used:7.3f} s of processors")
    for name in ("write", "read"):
        ratios = np.array(rows[f"{name} sealed"]) / np.array(rows[name])
        for what, (low, middle, high) in zip(
            ("clock", "processors"), np.quantile(ratios, [0.25, 0.5, 0.75], axis=0).T, strict=True
        ):
            print(f"{name}, {what}: sealed / before {middle:.3f} (quartiles {low:.3f}, {high:.3f})")


if __name__ == "__main__":
    main()
