"""Is everything right on this GPU? One command of at most 250 seconds; every result is printed and saved at once.

    python tests/benchmarks/gpu/check.py OUT [--cpu] [--seconds 250] [--only PART …]

Writes OUT/check.jsonl and OUT/check.txt. `--cpu` rehearses every part on a CPU in small sizes. README.md beside this
file says what to bring to a machine without a network, and what each number means.
"""

import os

# Before torch is imported: as `embedscale train` sets them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys

import equality
import timing
import whole
from parts import Part, command

PARTS = [
    Part("machine", 20, timing.machine),
    Part("attention", 25, equality.attention),
    Part("methods", 35, equality.methods),
    Part("step", 40, timing.step),
    Part("train", 60, whole.train),
    Part("memory", 30, timing.memory),
    Part("calibrate", 40, whole.calibrate_two),
    Part("encode", 20, whole.encode),
    Part("variants", 40, equality.variants),
]


if __name__ == "__main__":
    sys.exit(command(__doc__, "check", PARTS, 250.0))
