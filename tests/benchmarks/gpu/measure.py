"""How fast is this GPU? One command of at most 430 seconds; every result is printed and saved at once.

    python tests/benchmarks/gpu/measure.py OUT [--cpu] [--seconds 430] [--only PART …]

Writes OUT/measure.jsonl, OUT/measure.txt, OUT/calibration.json and OUT/compiled.json. `--cpu` rehearses every part on a
CPU in small sizes. What matters most comes first, should the time run out.
"""

import os

# Before torch is imported: as `embedscale train` sets them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from parts import Part, Row, Setting, command
from whole import calibrated

BENCHMARKS = Path(__file__).parents[1]


def full(size: str, setting: Setting) -> Iterator[Row]:
    return calibrated(setting, size, ("full",), 5.0)


def lora(size: str, setting: Setting) -> Iterator[Row]:
    return calibrated(setting, size, ("lora-r32",), 5.0)


def compiled(size: str, setting: Setting) -> Iterator[Row]:
    return calibrated(setting, size, ("full",), 5.0, compiled=True)


def ratio(size: str, batch: int, setting: Setting) -> Iterator[Row]:
    """Our step beside sentence-transformers' trainer, as it comes and tuned: the table of tests/benchmarks/train.py."""
    words = ["--size", setting.pick(size, "pythia-14m"), "--batch", str(setting.pick(batch, 8)), "--bf16", "--tuned"]
    words += ["--turns", "1", "--steps", setting.pick("10", "1")]
    done = subprocess.run([sys.executable, str(BENCHMARKS / "train.py"), *words], stdout=subprocess.PIPE, text=True)
    yield {"name": f"{size}, {batch} pairs", "ok": done.returncode == 0, "table": "\n" + done.stdout}


def paper(setting: Setting) -> Iterator[Row]:
    """What the paper's grid would cost at the measured speeds."""
    cluster = setting.folder / "cluster.yaml"
    cluster.write_text(
        f"device: H100\npeak_flop_per_second: 989e12\ncalibration: {setting.folder / 'calibration.json'}\n"
    )
    words = ["-m", "embedscale.cli", "sweep", "plan", "configs/sweep/paper.yaml", f"cluster={cluster}"]
    root = BENCHMARKS.parents[1]
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, cwd=root)
    yield {"name": "the paper's grid", "ok": done.returncode == 0, "plan": "\n" + done.stdout}


PARTS = [
    Part("14m", 25, partial(full, "pythia-14m")),
    Part("160m", 25, partial(full, "pythia-160m")),
    Part("410m", 25, partial(full, "pythia-410m")),
    Part("ratio-14m", 70, partial(ratio, "pythia-14m", 1024)),
    Part("70m", 25, partial(full, "pythia-70m")),
    Part("1b", 30, partial(full, "pythia-1b")),
    Part("2.8b", 45, partial(full, "pythia-2.8b")),
    Part("lora-410m", 25, partial(lora, "pythia-410m")),
    Part("ratio-160m", 70, partial(ratio, "pythia-160m", 512)),
    Part("compiled-160m", 45, partial(compiled, "pythia-160m")),
    Part("lora-2.8b", 45, partial(lora, "pythia-2.8b")),
    Part("compiled-14m", 45, partial(compiled, "pythia-14m")),
    Part("1.4b", 35, partial(full, "pythia-1.4b")),
    Part("paper", 20, paper),
]


if __name__ == "__main__":
    sys.exit(command(__doc__, "measure", PARTS, 430.0))
