"""What a training step asks of a GPU, counted without one: kernels, bytes read and written, FLOP; no waits.

    python tests/benchmarks/gpu/count.py [--sizes pythia-14m …] [--methods full …] [--batch 1024] [--what] [key=value …]

On the simulated GPU of tests/fake_gpu.py, with the paper's lengths, bf16, one chunk unless a setting says otherwise. A
wait for the GPU would end the program. *Bound* is the largest of three times on an H100: bytes at 3.0 TB/s, FLOP at 790
TFLOP/s, and kernels at 5 µs of the host each. `--what` lists the operations that move most.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
import fake_gpu

BYTES, FLOP, LAUNCH = 3.0e12, 790e12, 5e-6  # a second; seconds a kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings of the run")
    parser.add_argument("--sizes", nargs="+", default=["pythia-14m", "pythia-70m", "pythia-160m", "pythia-410m"])
    parser.add_argument("--methods", nargs="+", default=["full", "freeze-0.5", "bias", "lora-r32"])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--what", action="store_true", help="list the operations that move most")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fake_gpu.load(Path(folder))
        fake_gpu.pretend()
    print("| size | method | chunks | kernels | GB | TFLOP | peak, GB | bytes, ms | FLOP, ms | launches, ms |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        for method in args.methods:
            words = args.words or ["training.precision=bf16"]
            row = fake_gpu.step(method, *words, size=size, batch=args.batch, chunk=args.chunk_tokens)
            times = (row["bytes"] / BYTES, row["flop"] / FLOP, row["kernels"] * LAUNCH)
            print(
                f"| {size} | {method} | {row['chunks']} | {row['kernels']:,} | {row['bytes'] / 1e9:.1f} "
                f"| {row['flop'] / 1e12:.2f} | {row['peak'] / 1e9:.1f} "
                f"| {' | '.join(f'{1000 * each:.1f}' for each in times)} |",
                flush=True,
            )
            if args.what:
                found = sorted(row["operations"].items(), key=lambda each: -each[1][1])
                for name, (number, size_) in found[:25]:
                    print(f"    {name:<40} {number:>6} {size_ / 1e9:>8.2f} GB")


if __name__ == "__main__":
    main()
