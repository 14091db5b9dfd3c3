"""All that a GPU can say about this repository, in one call; run again, it goes on where it was stopped.

    python tests/benchmarks/gpu.py OUT [--seconds 5]

On one GPU, bf16: `embedscale calibrate` for every size and the four methods (OUT/calibration.json), and for the small
sizes with compiled blocks too (OUT/compiled.json); training beside sentence-transformers at four sizes, and what the
paper's grid would cost at the measured speeds. About half an hour.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from embedscale.pythia import SUITE

RATIOS = {"pythia-14m": 1024, "pythia-160m": 1024, "pythia-410m": 512, "pythia-1b": 256}  # size: pairs a batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each size and method is measured for")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: this machine has no GPU that torch can use", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    calibration = args.out / "calibration.json"
    settings = ["training.precision=bf16", "resources.workers=4"]
    command = [sys.executable, "-m", "embedscale.cli"]
    measure = [*command, "calibrate", *settings, "--sizes", *SUITE, "--out", str(calibration)]
    said(args.out / "calibrate.txt", [*measure, "--seconds", str(args.seconds)])
    small = [
        "--sizes",
        "pythia-14m",
        "pythia-70m",
        "pythia-160m",
        "pythia-410m",
        "--out",
        str(args.out / "compiled.json"),
    ]
    compiled = [*command, "calibrate", *settings, "resources.compile=true", *small, "--seconds", str(args.seconds)]
    said(args.out / "compiled.txt", compiled)
    cluster = args.out / "cluster.yaml"
    cluster.write_text(f"device: {torch.cuda.get_device_name()}\ncalibration: {calibration.absolute()}\n")
    said(args.out / "plan.txt", [*command, "sweep", "plan", "configs/sweep/paper.yaml", f"cluster={cluster}"])
    for size, batch in RATIOS.items():
        words = ["--size", size, "--batch", str(batch), "--bf16", "--turns", "2"]
        said(args.out / f"train-{size}.txt", [sys.executable, "tests/benchmarks/train.py", *words], once=True)
    return 0


def said(path: Path, command: list[str], once: bool = False) -> None:
    """Print what a command prints, and keep it; with `once`, not again where it was kept."""
    if not (once and path.exists()):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        path.write_text(done.stdout)
    print(path.read_text(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
