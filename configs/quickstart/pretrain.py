"""Make the quickstart's backbones: tiny Pythia-shaped decoders, pre-trained as byte-level language models.

    python configs/quickstart/pretrain.py [--bytes 40e6] [NAME ...]

The corpus is Python source that every machine with this project has: the standard library and the installed packages.
One file in a hundred, by the hash of its content, is held out. The weights are stored in float16, in the hub's format,
under configs/quickstart/backbones/NAME, and the measured losses in pretraining.json beside them.
"""

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

sys.path.append(str(Path(__file__).parents[1]))  # configs
from study.pretrain import LENGTH, body_parameters, byte_tokenizer, loss_of, new_model, symbols

LADDER = {  # width, blocks, heads
    "tiny-7k": (16, 2, 2),
    "tiny-13k": (16, 4, 2),
    "tiny-25k": (32, 2, 2),
    "tiny-50k": (32, 4, 2),
    "tiny-85k": (48, 3, 3),
    "tiny-200k": (64, 4, 4),
}
FOLDER = Path(__file__).parent / "backbones"
SEQUENCES = 96
PEAK = 4e-3  # learning rate at width 64; other widths have PEAK · √(64 / width)


def corpus(limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of training files (about `limit`, in the order of their hashes) and of held-out files."""
    files = [p for name in ("stdlib", "purelib") for p in Path(sysconfig.get_path(name)).rglob("*.py")]
    contents = {}
    for path in files:
        text = path.read_bytes()
        contents[hashlib.sha256(text).digest()] = text
    train, held_out, size = [], [], 0
    for digest in sorted(contents):
        if digest[-1] < 3:
            held_out.append(contents[digest])
        elif size < limit:
            train.append(contents[digest])
            size += len(contents[digest])
    table = symbols()
    return tuple(table[np.frombuffer(b"\n".join(part), dtype=np.uint8)] for part in (train, held_out))


def pretrain(name: str, train: np.ndarray, held_out: np.ndarray, total: int) -> None:
    width, blocks, heads = LADDER[name]
    model = new_model(width, blocks, heads)
    parameters = body_parameters(model)
    steps = total // (LENGTH * SEQUENCES)
    peak = PEAK * math.sqrt(64 / width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    rng, begun = np.random.default_rng(0), time.monotonic()
    for step in track(range(steps), description=name):
        share = step / steps
        rate = min(1, (step + 1) / (0.02 * steps)) * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)
        optimizer.param_groups[0]["lr"] = peak * rate
        starts = rng.integers(0, len(train) - LENGTH - 1, SEQUENCES)
        loss = loss_of(model, train[starts[:, None] + np.arange(LENGTH + 1)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        starts = np.random.default_rng(1).integers(0, len(held_out) - LENGTH - 1, 2048)
        rows = held_out[starts[:, None] + np.arange(LENGTH + 1)]
        final = float(np.mean([float(loss_of(model, part)) for part in np.array_split(rows, 16)]))
    model.to(torch.float16).save_pretrained(FOLDER / name)
    byte_tokenizer().save_pretrained(FOLDER / name)
    measured = {
        "non_embedding_parameters": parameters,
        "bytes_read": steps * LENGTH * SEQUENCES,
        "bytes_of_corpus": len(train),
        "steps": steps,
        "held_out_nats_per_byte": round(final, 4),
        "seconds": round(time.monotonic() - begun),
        "torch": torch.__version__.split("+")[0],
    }
    (FOLDER / name / "pretraining.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(name, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(LADDER)}")
    parser.add_argument("--bytes", type=float, default=40e6, help="read in pre-training, by each")
    args = parser.parse_args()
    train, held_out = corpus(int(args.bytes))
    for name in args.names or LADDER:
        pretrain(name, train, held_out, int(args.bytes))


if __name__ == "__main__":
    main()
