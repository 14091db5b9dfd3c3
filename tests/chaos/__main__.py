"""Disturb embedscale at random moments, and compare every result with one that was left alone.

    python tests/chaos [--minutes 10] [--seed 0] [--parts local verbs files slurm] [--results build/chaos.jsonl]

It may be interrupted at any time; the next call adds to the same results. It prints tables of what was hit, and one
verdict: passed (0), failed (1) or inconclusive (3), where too little was hit. The seed decides what is done; when it
strikes depends on the machine too, so a second call does not repeat the first.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import analysis  # noqa: F401  # before tests/ is on the path, which has folders of the same names
import embedscale  # noqa: F401
import slurm  # noqa: F401

TESTS = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(TESTS), str(TESTS / "slurm"), str(TESTS / "analysis")]

import damaged  # noqa: E402
import jobs  # noqa: E402
import runs  # noqa: E402
import verbs  # noqa: E402
from bench import Bench  # noqa: E402
from tally import Tally  # noqa: E402

PARTS = {"local": runs.disturb, "verbs": verbs.disturb, "files": damaged.disturb, "slurm": jobs.disturb}
# Modules that the commands of a part need, beside those of `train`.
MODULES = {
    "local": [],
    "verbs": ["embedscale.serving.encode", "embedscale.serving.evaluate", "mteb", "slurm.submit"],
    "files": ["embedscale.serving.encode", "slurm.status", "analysis.report", "matplotlib.pyplot"],
    "slurm": ["slurm.submit", "slurm.status"],
}


def main() -> int:
    top = argparse.ArgumentParser(prog="python tests/chaos", description=__doc__.splitlines()[0])
    top.add_argument(
        "--minutes", type=float, default=10, help="time of all parts together; 0: print the tables (default: 10)"
    )
    top.add_argument("--seed", type=int, default=0, help="what is done, and in which order (default: 0)")
    top.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to disturb (default: all)")
    top.add_argument("--results", type=Path, default=Path("build/chaos.jsonl"), help="file to add the hits to")
    args = top.parse_args()
    tally = Tally(args.results, args.minutes)
    if not args.minutes:
        return tally.report(args.parts)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        bench = Bench(folder, [module for part in args.parts for module in MODULES[part]])
        tally.end = time.monotonic() + 60 * args.minutes
        for number, part in enumerate(args.parts):
            tally.until = time.monotonic() + (tally.end - time.monotonic()) / (len(args.parts) - number)
            PARTS[part](bench, tally, random.Random(f"{part} {args.seed}"))
    except KeyboardInterrupt:
        tally.say("interrupted: the run at work is not counted")
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        if not list(folder.glob("broken-*")):
            shutil.rmtree(folder, ignore_errors=True)
    return tally.report(args.parts)


if __name__ == "__main__":
    sys.exit(main())
