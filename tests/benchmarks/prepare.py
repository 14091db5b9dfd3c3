"""Measure memory and time of `embedscale prepare` for growing corpora, and the time to read a batch.

    python tests/benchmarks/prepare.py [--pairs 200000 2000000] [--folder FOLDER]

Memory is that of the whole process tree, sampled ten times a second. The first figure is the proportional set size,
which counts a shared page once. The second is the sum of resident sizes, which counts shared pages and mapped files
(the kernel may drop these at any time) once for each process.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from embedscale.data.store import PairStore


def write_corpus(path: Path, pairs: int, words: np.ndarray, seed: int = 0) -> None:
    """Write a corpus like BAAI-MTP: queries of up to 20 words, positives of up to 110, by Zipf's law; 2 % repeated."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for start in range(0, pairs, 10_000):
            n = min(10_000, pairs - start)
            lengths = np.stack([rng.integers(4, 21, n), rng.integers(20, 111, n)], 1)
            drawn = iter(words[np.minimum(rng.zipf(1.2, lengths.sum()) - 1, len(words) - 1)].tolist())
            line = ""
            for number, (query, positive) in enumerate(lengths.tolist()):
                if number % 50 or not line:
                    texts = [" ".join(islice(drawn, length)) for length in (query, positive)]
                    line = json.dumps({"query": texts[0], "pos": [texts[1]], "neg": []}) + "\n"
                file.write(line)


def save_tokenizer(folder: Path, corpus: Path, symbols: int = 8192) -> Path:
    """Save a byte-level BPE tokenizer like Pythia's, but smaller, trained on the beginning of the corpus."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    with corpus.open() as file:
        sample = [next(file) for _ in range(2000)]
    tokenizer.train_from_iterator(
        sample, trainers.BpeTrainer(vocab_size=symbols, initial_alphabet=alphabet, show_progress=False)
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tree_memory(process: psutil.Process) -> tuple[int, int]:
    """Return the bytes of a process and all its descendants: (proportional, resident)."""
    proportional = resident = 0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            memory = each.memory_full_info()
            proportional, resident = proportional + memory.pss, resident + memory.rss
    return proportional, resident


def measure(words: list[str]) -> tuple[float, int, int]:
    """Return the seconds and peak bytes of a command."""
    begun = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "embedscale.cli", *words])
    peak = (0, 0)
    while child.poll() is None:
        with suppress(psutil.Error):
            peak = tuple(map(max, peak, tree_memory(psutil.Process(child.pid))))
        time.sleep(0.1)
    assert child.returncode == 0, child.returncode
    return time.monotonic() - begun, *peak


def batch_milliseconds(folder: Path, size: int = 1024, batches: int = 200) -> tuple[float, float]:
    """Return the median and 99th percentile of reading a batch in training order, after one pass over all files."""
    store = PairStore.open(folder)
    store.token_counts()
    times = []
    for number in range(batches):
        begun = time.perf_counter()
        store.batch(number * size, (number + 1) * size)
        times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times)), float(np.percentile(times, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=int, default=[200_000, 2_000_000])
    parser.add_argument("--folder", help="for the corpus and the stores; default a temporary one")
    args = parser.parse_args()
    letters = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = np.array(["".join(letters.choices(syllables, k=letters.randint(1, 4))) for _ in range(30_000)])
    table = Table("pairs", "corpus MB", "store MB", "seconds", "pairs/s", "peak MB", "resident MB", "batch of 1024, ms")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        tokenizer = None
        for pairs in args.pairs:
            corpus, store = folder / f"{pairs}.jsonl", folder / f"store-{pairs}"
            write_corpus(corpus, pairs, words)
            tokenizer = tokenizer or save_tokenizer(folder / "tokenizer", corpus)
            source = json.dumps([{"kind": "jsonl", "path": str(corpus)}])
            seconds, proportional, resident = measure(
                ["prepare", f"data.store={store}", f"data.tokenizer={tokenizer}", f"data.sources={source}"]
            )
            median, slow = batch_milliseconds(store)
            size = sum(path.stat().st_size for path in store.rglob("*.arrow"))
            sizes = (corpus.stat().st_size, size, proportional, resident)
            read, held, peak, whole = (f"{each / 2**20:,.0f}" for each in sizes)
            row = (f"{pairs:,}", read, held, f"{seconds:.1f}", f"{pairs / seconds:,.0f}", peak, whole)
            table.add_row(*row, f"{median:.2f} (99 %: {slow:.2f})")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
