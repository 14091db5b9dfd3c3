"""A store as training reads it: slices of the prepared pairs, in order, in any process, without torch."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from embedscale import cli
from embedscale.data.store import PairStore
from embedscale.errors import UserError

WORDS = ["open", "read", "write", "parse", "token", "batch", "model", "train", "loss", "file", "path", "sort", "merge"]


@pytest.fixture(scope="module")
def texts() -> dict[str, tuple[str, list[str]]]:
    """Return query → (positive, negatives): 600 pairs with two or three negatives; a few positives are equal."""
    rng = np.random.default_rng(0)

    def some(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    return {
        f"{some(5)} {i}": (some(3) if i % 5 else "the same", [f"{some(6)} {i} {k}" for k in range(2 + i % 2)])
        for i in range(600)
    }


@pytest.fixture(scope="module")
def store(texts, tmp_path_factory, backbone_folder) -> PairStore:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"query": query, "pos": [positive], "neg": negatives} for query, (positive, negatives) in texts.items()]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"[{{kind: jsonl, path: {folder / 'pairs.jsonl'}, negative: neg}}]"
    words = [f"data.store={folder / 'store'}", f"data.tokenizer={backbone_folder}", f"data.sources={source}"]
    assert cli.main(["prepare", *words, "data.context=30", "data.held_out=0.1"]) == 0
    return PairStore.open(folder / "store")


@pytest.fixture(scope="module")
def tokenizer(backbone_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(backbone_folder)


def sequences(batch) -> list[tuple[int, ...]]:
    ends = np.cumsum(batch.lengths)
    return [tuple(batch.tokens[end - n : end].tolist()) for n, end in zip(batch.lengths, ends, strict=True)]


def decoded(batch, tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for ids in sequences(batch)]


def same(one, other) -> bool:
    return one.pairs == other.pairs and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "lengths", "texts")
    )


@pytest.mark.parametrize("hard_negatives", [0, 1, 2])
def test_a_batch_is_queries_then_positives_then_the_negatives_of_each_pair(store, texts, tokenizer, hard_negatives):
    batch = store.batch(7, 40, hard_negatives)
    assert (batch.tokens.dtype, batch.lengths.dtype, batch.texts.dtype) == (np.int32, np.int32, np.uint64)
    assert batch.pairs == 33 and len(batch.lengths) == len(batch.texts) == 33 * (2 + hard_negatives)
    assert batch.lengths.sum() == len(batch.tokens) and batch.lengths.min() > 0
    found = decoded(batch, tokenizer)
    whole = {query[:30]: value for query, value in texts.items()}
    assert len(whole) == len(texts)  # a byte is a token, so cut queries still differ
    for i in range(33):
        positive, negatives = whole[found[i]]
        assert found[33 + i] == positive[:30]
        first = 66 + i * hard_negatives
        assert found[first : first + hard_negatives] == [text[:30] for text in negatives[:hard_negatives]]


def test_every_pair_is_read_once_and_then_the_first_again(store, texts, tokenizer):
    assert store.pairs + store.held_out == len(texts)
    once = decoded(store.batch(0, store.pairs), tokenizer)[: store.pairs]
    held_out = decoded(store.held_out_batch(0, store.held_out), tokenizer)[: store.held_out]
    assert sorted(once + held_out) == sorted(query[:30] for query in texts)
    for start, stop in [(store.pairs - 3, store.pairs + 4), (5 * store.pairs + 1, 8 * store.pairs), (0, 1)]:
        found = decoded(store.batch(start, stop), tokenizer)[: stop - start]
        assert found == [once[i % store.pairs] for i in range(start, stop)]


def test_slices_join_across_the_files_of_a_store(store):
    assert sum(size > 0 for size in store.manifest.parts.train) > 1
    whole = sequences(store.batch(0, store.pairs))
    for size in (1, 64, 100):
        queries, positives = [], []
        for start in range(0, store.pairs, size):
            part = sequences(store.batch(start, min(start + size, store.pairs)))
            queries += part[: len(part) // 2]
            positives += part[len(part) // 2 :]
        assert queries + positives == whole


@pytest.mark.parametrize("hard_negatives", [0, 1, 2])
def test_token_counts_equal_those_of_the_batches(store, hard_negatives):
    counts = store.token_counts(hard_negatives)
    assert counts.dtype == np.int32 and len(counts) == store.pairs
    one_by_one = [len(store.batch(i, i + 1, hard_negatives).tokens) for i in range(store.pairs)]
    assert counts.tolist() == one_by_one
    if not hard_negatives:
        assert counts.sum() == store.manifest.tokens.training


def test_equal_texts_have_equal_hashes(store, tokenizer):
    batch = store.batch(0, store.pairs, 1)
    found = decoded(batch, tokenizer)
    by_hash, by_text = {}, {}
    for text, number in zip(found, batch.texts.tolist(), strict=True):
        assert by_hash.setdefault(number, text) == text
        by_text.setdefault(text, set()).add(number)
    assert len(by_text["the same"]) == 1
    assert found.count("the same") > 50


def test_a_store_sent_to_a_worker_is_small_and_reads_the_same(store):
    store.batch(0, store.pairs)
    sent = pickle.dumps(store)
    assert len(sent) < 10_000
    assert same(pickle.loads(sent).batch(3, 50, 2), store.batch(3, 50, 2))


def test_held_out_pairs_do_not_depend_on_how_many_are_read(store):
    whole = sequences(store.held_out_batch(0, store.held_out))[: store.held_out]
    parts = [sequences(store.held_out_batch(i, i + 1))[0] for i in range(store.held_out)]
    assert parts == whole


def test_an_unfinished_or_damaged_store_is_refused(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store.folder, copy)
    damaged = next((copy / "train").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match="missing or damaged"):
        PairStore.open(copy).batch(0, store.pairs)
    shutil.copyfile(next((copy / "held_out").iterdir()), damaged)  # a complete file of another store
    with pytest.raises(UserError, match="missing or damaged"):
        PairStore.open(copy).token_counts()
    shutil.rmtree(copy / "train")
    with pytest.raises(UserError, match="missing or damaged"):
        PairStore.open(copy).token_counts()
    (copy / "manifest.json").write_text(json.dumps(store.manifest.to_json() | {"format": 0}))
    with pytest.raises(UserError, match="is not a store of format 1"):
        PairStore.open(copy)
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="not a store"):
        PairStore.open(copy)
    (copy / "manifest.json").write_text('{"format": ')
    with pytest.raises(UserError, match="cannot be read"):
        PairStore.open(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="not finished; run `embedscale prepare`"):
        PairStore.open(copy)
    with pytest.raises(UserError, match="nowhere does not exist"):
        PairStore.open(tmp_path / "nowhere")


def test_neither_reading_nor_preparing_imports_torch():
    code = "import sys, embedscale.data.store, embedscale.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
