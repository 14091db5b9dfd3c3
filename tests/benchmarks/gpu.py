"""Make all measurements that need a GPU, in one call; a second call continues where the first one stopped.

    python tests/benchmarks/gpu.py OUT [--seconds 5]

On one GPU, in bf16: `embedscale calibrate` for every size and the four methods (OUT/calibration.json), and with
compiled blocks for the small sizes (OUT/compiled.json); training next to sentence-transformers at four sizes; and the
cost of the paper's grid at the measured speeds. This takes about half an hour.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from embedscale.run.families import PYTHIA

# Size → pairs per batch. The padded batch must fit next to the weights of two other contestants.
RATIOS = {"pythia-14m": 1024, "pythia-160m": 256, "pythia-410m": 128, "pythia-1b": 64}
SMALL = ("pythia-14m", "pythia-70m", "pythia-160m", "pythia-410m")
LAST = ("pythia-6.9b", "pythia-12b")  # measured last, in case the time runs out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each size and method is measured for")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: this machine has no GPU that torch can use", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    command, seconds = [sys.executable, "-m", "embedscale.cli"], ["--seconds", str(args.seconds)]
    settings = ["training.precision=bf16", "resources.workers=4"]

    def calibrate(file: str, sizes: Sequence[str], *more: str) -> Path:
        out = args.out / file
        words = ["calibrate", *settings, *more, "--sizes", *sizes, "--out", str(out), *seconds]
        said(out.with_suffix(".txt"), [*command, *words])
        return out

    calibrate("calibration.json", [size for size in PYTHIA.sizes if size not in LAST])
    calibrate("compiled.json", SMALL, "resources.compile=true")
    for size, batch in RATIOS.items():
        words = ["--size", size, "--batch", str(batch), "--bf16", "--turns", "2"]
        said(args.out / f"train-{size}.txt", [sys.executable, "tests/benchmarks/train.py", *words], once=True)
    calibration = calibrate("calibration.json", PYTHIA.sizes)
    cluster = args.out / "cluster.yaml"
    cluster.write_text(f"device: {torch.cuda.get_device_name()}\ncalibration: {calibration.absolute()}\n")
    said(args.out / "plan.txt", [*command, "sweep", "plan", "configs/sweep/paper.yaml", f"cluster={cluster}"])
    return 0


def said(path: Path, command: list[str], once: bool = False) -> None:
    """Run a command, print its output and write it to `path`; with `once`, only print an output that is there.

    A command that fails leaves no output, and does not stop the others.
    """
    if once and path.exists():
        print(path.read_text(), flush=True)
        return
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        print(f"gpu.py: status {done.returncode} of {' '.join(command)}", file=sys.stderr)
    else:
        path.write_text(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
