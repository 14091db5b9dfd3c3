"""Sources of text pairs, stores made from them by the command line, and the expected content in plain Python."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
from saved import WORDS

from embedscale import cli
from embedscale.data.corpora import UNIT_SIZE, UnitSize
from embedscale.data.prepare import BUCKET_BYTES, prepare
from embedscale.data.store import PairStore
from embedscale.run.settings import load

WORDS = WORDS.split()


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(query: str, positive: str, *negatives: str) -> dict:
    return {"query": query, "pos": [positive], "neg": [*negatives]}


def some_rows(n: int, seed: int = 0, name: str = "") -> list[dict]:
    """Return rows with repeated queries, repeated pairs and empty texts."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        if rows and rng.random() < 0.1:
            rows.append(rng.choice(rows))
            continue
        query = f"{name} {' '.join(rng.sample(WORDS, 2))} {rng.randrange(n // 2)}"
        positive = rng.choice([" ".join(rng.choices(WORDS, k=rng.randint(1, 9))), "", " \n "])
        rows.append(row(query, positive if rng.random() < 0.1 else f"{positive} é {rng.randrange(n)}"))
    return rows


def words_of(store: Path, tokenizer: Path, *sources: dict, context: int = 40, held_out: float = 0.1) -> list[str]:
    listed = json.dumps([{"kind": "jsonl"} | source for source in sources])
    return [
        f"data.store={store}",
        f"data.tokenizer={tokenizer}",
        f"data.sources={listed}",
        f"data.context={context}",
        f"data.held_out={held_out}",
    ]


def made(*args, **settings) -> PairStore:
    words = words_of(*args, **settings)
    assert cli.main(["prepare", *words]) == 0
    return PairStore.open(args[0])


def made_in_small_parts(*args, unit_size: UnitSize = UNIT_SIZE, bucket_bytes: int = BUCKET_BYTES, **more) -> PairStore:
    """Make small corpora use several units and buckets, as a large corpus does."""
    assert prepare(load(None, words_of(*args, **more)), unit_size, bucket_bytes) == 0
    return PairStore.open(args[0])


def contents(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the (query, positive) token ids of each pair."""
    ids = [tuple(part.tolist()) for part in np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])]
    return list(zip(ids[: batch.pairs], ids[batch.pairs :], strict=True))


def training(store: PairStore):
    return contents(store.batch(0, store.pairs))


def held_out(store: PairStore):
    return contents(store.held_out_batch(0, store.held_out))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the time and size of every file and folder in a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
    }


# The expected content of a store, computed without NumPy, Arrow or buckets.

MASK = 2**64 - 1


def mixed(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def expected_order(rows: list[dict], share: float) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the (training, held-out) pairs of texts, in the store's order."""
    pairs = {(r["query"], r["pos"][0]) for r in rows if r["query"].strip() and r["pos"][0].strip()}
    order = sorted(pairs, key=lambda pair: mixed(text_hash(pair[0]) ^ mixed(text_hash(pair[1]))))
    apart = {query for query, _ in pairs if text_hash(query) / 2**64 < share}
    return [pair for pair in order if pair[0] not in apart], [pair for pair in order if pair[0] in apart]
