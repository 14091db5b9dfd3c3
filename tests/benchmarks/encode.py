"""Texts a second of our encoder and of sentence-transformers' `encode`, side by side: same weights, same texts.

    python tests/benchmarks/encode.py [--sizes pythia-14m pythia-70m] [--context 512] [--texts 4000] [--bf16]

The weights are random, which costs the same as trained ones; the texts are docstrings and functions of the installed
Python, short and long ones mixed. Both sides tokenise and both sort by length; sentence-transformers gets the batch
size, of those tried, that suits it best. Repetitions alternate, and the fastest of each side counts.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModel, GPTNeoXConfig

from embedscale import corpora
from embedscale.config import load
from embedscale.embedder import Embedder
from embedscale.export import _write_model
from embedscale.pythia import shape_by_name

BATCHES = (16, 32, 64, 128)


def texts_of_this_machine(number: int) -> list[str]:
    """Alternately a docstring and a function, each once."""
    files = corpora.installed_files()
    step = max(1, len(files) // 4000)
    pairs = (pair for path in files[::step] for pair in corpora._functions(path, Counter()))
    texts = dict.fromkeys(text for pair in pairs for text in (pair.query.strip(), pair.positive.strip()) if text)
    return list(itertools.islice(texts, number))


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE of 8,192 symbols: Pythia's kind, smaller."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def embedder_of(size: str, tokenizer: Path, context: int, precision: str) -> Embedder:
    shape = shape_by_name(f"EleutherAI/{size}")
    assert shape is not None
    torch.manual_seed(0)
    heads = {"pythia-14m": 4, "pythia-31m": 8, "pythia-70m": 8, "pythia-160m": 12, "pythia-410m": 16}[size]
    config = GPTNeoXConfig(
        vocab_size=8192,
        hidden_size=shape.width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=2048,
    )
    body = AutoModel.from_config(config, dtype=torch.float32).eval()
    words = [f"data.context={context}", f"data.tokenizer={tokenizer}", f"training.precision={precision}"]
    return Embedder(body, load(None, words), {"width": shape.width}, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pythia-14m", "pythia-70m"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = texts_of_this_machine(args.texts)
    title = f"{len(texts):,} texts, {torch.get_num_threads()} threads, {'bf16' if args.bf16 else 'float32'}"
    table = Table(
        "size", "tokens a text", "ours, texts/s", "theirs", "batch", "ratio", "largest difference", title=title
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_tokenizer(folder / "tokenizer", texts)
        for size in args.sizes:
            ours = embedder_of(size, folder / "tokenizer", args.context, "bf16" if args.bf16 else "float32")
            exported = folder / size
            exported.mkdir()
            _write_model(ours, exported)
            kinds = {"model_kwargs": {"dtype": torch.bfloat16}} if args.bf16 else {}
            theirs = SentenceTransformer(str(exported), device="cpu", **kinds)
            lengths = [min(len(e.ids), args.context) for e in ours.tokenizer.encode_batch(texts)]
            best = {0: 0.0} | dict.fromkeys(BATCHES, 0.0)
            for _ in range(args.repeats):
                for batch in best:
                    begun = time.perf_counter()
                    if batch:
                        other = theirs.encode(texts, batch_size=batch, convert_to_numpy=True)
                    else:
                        found = ours.encode(texts)
                    best[batch] = max(best[batch], len(texts) / (time.perf_counter() - begun))
            fastest = max(BATCHES, key=lambda batch: best[batch])
            ratio = f"{best[0] / best[fastest]:.2f}"
            speeds = (f"{best[0]:,.0f}", f"{best[fastest]:,.0f}", str(fastest), ratio)
            table.add_row(size, f"{np.mean(lengths):.0f}", *speeds, f"{np.abs(found - other).max():.1e}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
