"""Measure texts per second of our encoder and of sentence-transformers' `encode`: same weights, same texts.

    python tests/benchmarks/encode.py [--sizes pythia-14m pythia-70m] [--context 512] [--texts 4000] [--bf16]

The weights are random: the cost is that of trained weights. The texts are docstrings and functions of the installed
Python, short and long ones mixed. Both sides tokenise and sort by length. sentence-transformers runs with its default
batch size and with its fastest batch size of `BATCHES`. Each side has its own process; repetitions alternate, and the
fastest of each side counts. Our side is set up like `embedscale encode`.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from turns import Contestant

from embedscale.data.installed_python import documented_functions, installed_files
from embedscale.model.hardware import keep_freed_memory
from embedscale.run.families import PYTHIA
from embedscale.run.settings import load
from embedscale.serving.embedder import Embedder
from embedscale.serving.export import write_model
from embedscale.training.calibrate import build

BATCHES = (8, 16, 32, 64)  # 32 is the default of sentence-transformers


def texts_of_this_machine(number: int) -> list[str]:
    """Return docstrings and functions in turn, each once."""
    files = installed_files()
    step = max(1, len(files) // 4000)
    pairs = (pair for path in files[::step] for pair in documented_functions(path, Counter()))
    texts = dict.fromkeys(text for pair in pairs for text in (pair.query.strip(), pair.positive.strip()) if text)
    return list(itertools.islice(texts, number))


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    """Save a byte-level BPE tokenizer like Pythia's, with 8,192 symbols."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def embedder_of(size: str, tokenizer: Path, context: int, precision: str) -> Embedder:
    torch.manual_seed(0)
    body = build(size, vocabulary=8192).eval()
    words = [f"data.context={context}", f"data.tokenizer={tokenizer}", f"training.precision={precision}"]
    record = SimpleNamespace(width=PYTHIA.sizes[size].shape.width, tokenizer_digest=None)
    return Embedder(body, load(None, words), record, "cpu")


def ours(size: str, tokenizer: Path, context: int, precision: str, texts: list[str]) -> Callable[[], Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    keep_freed_memory()
    embedder = embedder_of(size, tokenizer, context, precision)
    return lambda: timed(lambda: embedder.encode(texts))


def theirs(folder: Path, bf16: bool, texts: list[str]) -> Callable[[int], Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    kinds = {"model_kwargs": {"dtype": torch.bfloat16}} if bf16 else {}
    model = SentenceTransformer(str(folder), device="cpu", **kinds)
    return lambda batch: timed(lambda: model.encode(texts, batch_size=batch, convert_to_numpy=True))


def timed(encode: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    begun = time.perf_counter()
    found = encode()
    return time.perf_counter() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pythia-14m", "pythia-70m"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    texts, precision = texts_of_this_machine(args.texts), "bf16" if args.bf16 else "float32"
    table = Table(
        "size", "tokens a text", "ours, texts/s", "theirs", "ratio", "theirs at best", "ratio", "largest difference",
        title=f"{len(texts):,} texts, {torch.get_num_threads()} threads, {precision}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_tokenizer(folder / "tokenizer", texts)
        for size in args.sizes:
            embedder = embedder_of(size, folder / "tokenizer", args.context, precision)
            (folder / size).mkdir()
            write_model(embedder, folder / size)
            lengths = [min(len(e.ids), args.context) for e in embedder.tokenizer.encode_batch(texts)]
            own = Contestant(ours, size, folder / "tokenizer", args.context, precision, texts)
            other = Contestant(theirs, folder / size, args.bf16, texts)
            best = {0: float("inf")} | dict.fromkeys(BATCHES, float("inf"))
            found = np.empty(0)
            for _ in range(args.repeats):
                for batch in best:
                    seconds, vectors = other.turn(batch) if batch else own.turn()
                    best[batch] = min(best[batch], seconds)
                    found = vectors if not batch else found
            fastest = min(BATCHES, key=lambda batch: best[batch])
            speeds = [f"{len(texts) / best[0]:,.0f}"]
            for batch in (32, fastest):
                speeds += [f"{len(texts) / best[batch]:,.0f} (batch {batch})", f"{best[batch] / best[0]:.2f}"]
            difference = f"{np.abs(found - vectors).max():.1e}"
            table.add_row(size, f"{np.mean(lengths):.0f}", *speeds, difference)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
