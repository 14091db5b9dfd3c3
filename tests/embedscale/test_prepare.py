"""The stores of `embedscale prepare` against plain Python: pairs, their order, the split, mixtures, token ids."""

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import LONG_WORD
from scipy import stats
from stores import (
    WORDS,
    expected_order,
    held_out,
    made,
    made_in_small_parts,
    row,
    some_rows,
    training,
    words_of,
    write,
)

from embedscale import cli
from embedscale.data import corpora, prepare
from embedscale.data.corpora import UnitSize
from embedscale.data.installed_python import installed_files
from embedscale.data.tokens import CHARACTERS, tokenizer_digest
from embedscale.run.config import Source


def byte_ids(text: str, tokenizer, context: int) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, truncation=True, max_length=context)["input_ids"])


@pytest.mark.parametrize("buckets", [2, 16])
def test_a_store_holds_each_distinct_pair_once_in_the_order_of_its_hash(tmp_path, bytes_tokenizer, buckets):
    from transformers import AutoTokenizer

    rows = some_rows(1500)
    path = write(tmp_path / "pairs.jsonl", rows)
    store = made_in_small_parts(
        tmp_path / "store",
        bytes_tokenizer,
        {"path": str(path)},
        context=20,
        unit_size=UnitSize(10_000),
        bucket_bytes=path.stat().st_size // (buckets - 1),
    )
    assert len(store.manifest.parts.train) == buckets
    tokenizer = AutoTokenizer.from_pretrained(bytes_tokenizer)
    expected = [
        [tuple(byte_ids(text, tokenizer, 20) for text in pair) for pair in part] for part in expected_order(rows, 0.1)
    ]
    assert [training(store), held_out(store)] == expected
    counts = store.manifest.counts
    assert counts["read"] == 1500 and counts["empty"] > 20 and counts["duplicate"] > 50
    assert counts["kept"] == store.pairs + store.held_out == 1500 - counts["empty"] - counts["duplicate"]
    tokens = store.manifest.tokens
    queries, positives = ([len(pair[side]) for pair in expected[0]] for side in (0, 1))
    assert tokens.longest_query == max(queries) and tokens.longest_positive == max(positives) == 20
    assert tokens.mean_query == pytest.approx(np.mean(queries), abs=1e-3)
    assert tokens.mean_positive == pytest.approx(np.mean(positives), abs=1e-3)


def test_each_query_is_in_one_part_and_more_pairs_do_not_move_it(tmp_path, bytes_tokenizer):
    rows = some_rows(3000)
    few = made(tmp_path / "few", bytes_tokenizer, {"path": str(write(tmp_path / "few.jsonl", rows[:1500]))})
    many = made(tmp_path / "many", bytes_tokenizer, {"path": str(write(tmp_path / "many.jsonl", rows))})
    assert not {query for query, _ in training(many)} & {query for query, _ in held_out(many)}
    assert set(held_out(few)) <= set(held_out(many)) and set(training(few)) <= set(training(many))
    queries = {query for query, _ in training(many)}, {query for query, _ in held_out(many)}
    n, share = len(queries[0] | queries[1]), len(queries[1])
    assert abs(share - 0.1 * n) < 4 * (0.09 * n) ** 0.5


def test_the_shuffle_is_uniform(tmp_path, bytes_tokenizer):
    n = 4000
    path = write(tmp_path / "pairs.jsonl", [row(f"{i}", f"text {i % 10}") for i in range(n)])
    store = made(tmp_path / "store", bytes_tokenizer, {"path": str(path)}, held_out=0.001)
    digits = {ids: byte for byte, ids in enumerate(_digit_ids(bytes_tokenizer))}
    place = np.array([int("".join(str(digits[token]) for token in query)) for query, _ in training(store)])
    assert abs(stats.spearmanr(np.arange(len(place)), place).statistic) < 4 / n**0.5
    counts = np.histogram2d(np.arange(len(place)), place, bins=10)[0]
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    assert np.sum(np.abs(np.diff(place)) == 1) < 12  # neighbours that stay neighbours; two are expected


def _digit_ids(folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(str(digit)).ids[0] for digit in range(10)]


def test_ids_equal_those_of_transformers_without_special_tokens(tmp_path, bpe_tokenizer):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bpe_tokenizer)
    texts = ["open read", "Ünicode 北京 🙂", "<|endoftext|> inside", "a\n\n  b", "x", " ".join(WORDS * 9)]
    # Long texts: in some a token has few characters, in others very many.
    texts += ["\x07" * 5000, " batch" * 40 * CHARACTERS, "    " * 3000 + "end", f" {LONG_WORD}" * 300]
    assert len(tokenizer.tokenize(f" {LONG_WORD}")) == 1 and len(LONG_WORD) > 2 * CHARACTERS
    rows = [row(f"query {i}", text) for i, text in enumerate(texts)]
    path = write(tmp_path / "pairs.jsonl", rows)
    store = made(tmp_path / "store", bpe_tokenizer, {"path": str(path)}, context=11, held_out=0.0001)
    expected = {tuple(byte_ids(text, tokenizer, 11) for text in (r["query"], r["pos"][0])) for r in rows}
    assert set(training(store)) == expected and store.pairs == len(rows)
    assert store.manifest.vocabulary == len(tokenizer)


def test_text_after_many_dropped_characters_is_kept(tmp_path, bpe_tokenizer):
    file = json.loads((bpe_tokenizer / "tokenizer.json").read_text())
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tmp_path / "strips").mkdir()
    (tmp_path / "strips" / "tokenizer.json").write_text(json.dumps(file | {"normalizer": strip}))
    rows = [row("open", text) for text in ("read write", " " * 100_000 + "read write")]
    path = write(tmp_path / "pairs.jsonl", rows)
    store = made(tmp_path / "store", tmp_path / "strips", {"path": str(path)}, context=11, held_out=0.0001)
    first, second = training(store)
    assert first == second and len(first[1]) > 1


def test_ids_of_a_large_vocabulary_have_32_bits(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [f"w{i}" for i in range(70_000)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    path = write(tmp_path / "pairs.jsonl", [row("w69999 w1", "w65536")])
    store = made(tmp_path / "store", tmp_path / "words", {"path": str(path)}, held_out=0.0001)
    assert training(store) == [((69999, 1), (65536,))]


def test_a_tokenizer_digest_depends_on_behaviour_and_not_on_the_file(tmp_path, bytes_tokenizer, bpe_tokenizer):
    text = json.loads((bpe_tokenizer / "tokenizer.json").read_text())
    for name, change in [
        ("same", {"padding": None, "truncation": None}),
        ("other", {"normalizer": {"type": "Lowercase"}}),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(text | change, indent=4))
    assert tokenizer_digest(str(tmp_path / "same")) == tokenizer_digest(str(bpe_tokenizer))
    assert len({tokenizer_digest(str(f)) for f in (tmp_path / "other", bpe_tokenizer, bytes_tokenizer)}) == 3


@contextmanager
def one_core() -> Iterator[None]:
    """Let this process use one core only."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def test_the_same_pairs_make_the_same_store_whatever_the_format_and_the_cores(tmp_path, bytes_tokenizer):
    import pandas as pd

    rows = some_rows(400)
    path = write(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    pd.DataFrame(rows).to_parquet(tmp_path / "pairs.parquet", row_group_size=100)
    stores = [
        made(tmp_path / "plain", bytes_tokenizer, {"path": str(path)}),
        made(tmp_path / "gz", bytes_tokenizer, {"path": f"{path}.gz"}),
        made(tmp_path / "parquet", bytes_tokenizer, {"path": str(tmp_path / "pairs.parquet"), "kind": "parquet"}),
    ]
    # The text size of a compressed file is estimated, so its number of buckets may differ.
    sizes = {"unit_size": UnitSize(5000), "bucket_bytes": 3000}
    with one_core():
        stores.append(made_in_small_parts(tmp_path / "alone", bytes_tokenizer, {"path": str(path)}, **sizes))
    assert len({len(store.manifest.parts.train) for store in stores}) == 2
    assert len({store.digest for store in stores}) == 1
    other = made(
        tmp_path / "other", bytes_tokenizer, {"path": str(write(tmp_path / "more.jsonl", [*rows, row("a", "b")]))}
    )
    assert other.digest != stores[0].digest


def test_a_mixture_has_the_given_shares_and_ends_with_its_first_used_up_source(tmp_path, capsys, bytes_tokenizer):
    few = [row(f"few {i}", f"text {i}") for i in range(600)]
    many = [row(f"many {i}", f"text {i}") for i in range(3000)] * 2  # every row twice
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("few", few), ("many", many))]
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    store = made(tmp_path / "store", bytes_tokenizer, *sources)
    found = [source.counts for source in store.manifest.sources]
    assert found[0]["kept"] == 600
    assert abs(found[1]["kept"] - 1800) < 4 * (3000 * 0.6 * 0.4) ** 0.5
    assert found[1]["duplicate"] == 3000 and found[1]["left_out"] == 3000 - found[1]["kept"]
    assert "left out" in capsys.readouterr().out
    all_kept = made(tmp_path / "all", bytes_tokenizer, *({"path": str(path)} for path in paths))
    assert all_kept.pairs + all_kept.held_out == 3600


def test_the_pair_with_the_fewest_negatives_sets_their_number(tmp_path, bytes_tokenizer):
    rows = [row(f"q{i}", f"p{i}", *(f"n{i}{k}" for k in range(2 + i % 3)), " ") for i in range(200)]
    path = write(tmp_path / "pairs.jsonl", rows)
    assert made(tmp_path / "with", bytes_tokenizer, {"path": str(path), "negative": "neg"}).negatives == 2
    assert made(tmp_path / "without", bytes_tokenizer, {"path": str(path)}).negatives == 0


def test_text_that_is_not_utf8_is_counted_and_reported(tmp_path, capsys, bytes_tokenizer):
    path = write(tmp_path / "pairs.jsonl", some_rows(300))
    with path.open("ab") as file:
        file.write(b'{"query": "\xff", "pos": ["p"]}\n' * 3)
    store = made(tmp_path / "store", bytes_tokenizer, {"path": str(path)})
    assert store.manifest.counts["not_utf8"] == store.manifest.sources[0].counts["not_utf8"] == 3
    assert "3 not utf8" in capsys.readouterr().out


def test_a_store_with_fewer_held_out_pairs_than_the_pool_is_made_and_said_to_be_refused(
    tmp_path, capsys, bytes_tokenizer
):
    words = words_of(tmp_path / "s", bytes_tokenizer, {"path": str(write(tmp_path / "pairs.jsonl", some_rows(200)))})
    for pool, lines in (("evaluation.pool=4096", 1), ("evaluation.pool=2", 0)):
        for _ in range(2):  # the second finds the store
            assert cli.main(["prepare", *words, pool, "evaluation.negatives=1"]) == 0
            said = capsys.readouterr().err
            assert said.count("\n") == lines
            assert not lines or "a run will be refused: evaluation.pool: 4096, but" in said


@pytest.mark.slow
def test_installed_python_becomes_a_store(tmp_path, monkeypatch, bytes_tokenizer):
    """A few files stand for all installed packages, because a worker reads each unit alone."""
    chosen = [replace(corpora.units_of(0, Source(kind="installed-python"))[0], stop=80)]
    assert len(installed_files()) > 1000
    monkeypatch.setattr(prepare, "units_of", lambda *_: chosen)
    store = made(tmp_path / "store", bytes_tokenizer, {"kind": "installed-python"})
    assert store.pairs > 300
