"""The forms in which people keep their pairs and texts: all are read alike, or one line says why not."""

import bz2
import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from stores import made, row, some_rows, words_of, write

from embedscale import cli
from embedscale.data.corpora import read, units_of
from embedscale.data.pair import Pair
from embedscale.data.store import PairStore
from embedscale.errors import DONE, WRONG, UserError
from embedscale.run.config import Source
from embedscale.serving.embedder import Embedder
from embedscale.serving.encode import encode, texts_of

PAIRS = [Pair("a query", "a positive"), Pair("NA", "null"), Pair("1900", 'the, "year"\nbefore 1901 é')]
ROWS = [{"query": pair.query, "pos": [pair.positive]} for pair in PAIRS]
LINES = "".join(json.dumps(each) + "\n" for each in ROWS)


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def as_csv(delimiter: str) -> bytes:
    with open("cells", "w", newline="", encoding="utf-8") as file:  # noqa: PTH123
        csv.writer(file, delimiter=delimiter).writerows([("query", "pos"), *((p.query, p.positive) for p in PAIRS)])
    return Path("cells").read_bytes()


FORMS = {
    "pairs.jsonl": lambda: LINES.encode(),
    "named otherwise": lambda: gzip.compress(LINES.encode()),
    "pairs.jsonl.bz2": lambda: bz2.compress(LINES.encode()),
    "pairs.jsonl.zst": lambda: zstd(LINES.encode()),
    "array.json": lambda: json.dumps(ROWS).encode(),
    "indented.json": lambda: b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "array.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "lists.jsonl": lambda: "".join(json.dumps([p.query, p.positive]) + "\n" for p in PAIRS).encode(),
    "pairs.csv": lambda: as_csv(","),
    "pairs.tsv": lambda: as_csv("\t"),
    "pairs.csv.gz": lambda: gzip.compress(as_csv(",")),
}


@pytest.mark.parametrize("name", FORMS)
def test_pairs_of_every_form_are_the_same_pairs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(FORMS[name]())
    source, counts = Source(kind="csv" if ".csv" in name or ".tsv" in name else "jsonl", path=name), Counter()
    assert [pair for unit in units_of(0, source) for pair in read(unit, source, counts)] == PAIRS
    assert counts == {"read": 3}


def test_lists_of_three_texts_hold_a_negative_if_negatives_are_asked_for(tmp_path):
    path = tmp_path / "triplets.jsonl"
    path.write_text('["q", "p", "n", "m"]\n["alone"]\n')
    for negative, expected in (("neg", ("n", "m")), (None, ())):
        source, counts = Source(path=str(path), negative=negative), Counter()
        assert [p for u in units_of(0, source) for p in read(u, source, counts)] == [Pair("q", "p", expected)]
        assert counts == {"read": 2, "malformed": 1}


def test_a_field_of_a_column_has_a_dotted_name(tmp_path):
    rows = [{"query": {"text": "q", "id": 1}, "pos": ["p"]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    write(tmp_path / "pairs.jsonl", rows)
    for kind in ("parquet", "jsonl"):
        source = Source(kind=kind, path=str(tmp_path), query="query.text")
        assert [p for u in units_of(0, source) for p in read(u, source, Counter())] == [Pair("q", "p")]


def two_columns_of_a_name() -> pa.Table:
    return pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["p"])], names=["query", "query", "pos"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (two_columns_of_a_name(), "pairs.parquet: there are 2 columns 'query'; rename all but one"),
        (pa.table({"query": [{"text": "q", "id": 1}], "pos": ["p"]}), "name one of its fields: query.text, query.id"),
        (pa.table({"query": [1900], "pos": ["p"]}), "pairs.parquet: column 'query' holds int64; expected texts"),
    ],
)
def test_a_column_that_holds_no_texts_is_one_line(tmp_path, capsys, bytes_tokenizer, table, message):
    parquet.write_table(table, tmp_path / "pairs.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "pairs.parquet")}
    assert cli.main(["prepare", *words_of(tmp_path / "store", bytes_tokenizer, source)]) == WRONG
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "store").exists()


def test_shards_without_rows_are_passed_over_and_counted(tmp_path, capsys, bytes_tokenizer):
    folder = tmp_path / "shards"
    folder.mkdir()
    table = pa.Table.from_pylist([{"query": f"q{i}", "pos": f"p{i}"} for i in range(50)])
    parquet.write_table(table, folder / "0.parquet")
    parquet.write_table(table.slice(0, 0), folder / "1.parquet")
    with parquet.ParquetWriter(folder / "2.parquet", table.schema):
        pass  # not even a row group
    store = made(tmp_path / "store", bytes_tokenizer, {"kind": "parquet", "path": str(folder)})
    assert store.pairs + store.held_out == 50
    assert "data.sources[0]: 2 of 3 files hold no row" in capsys.readouterr().err


def test_a_last_file_with_other_columns_is_found_before_any_work(tmp_path, monkeypatch, capsys, bytes_tokenizer):
    from embedscale.data import prepare

    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(2):
        write(folder / f"{number}.jsonl", some_rows(30, number))
    write(folder / "2.jsonl", [{"query": "q", "positive": ["p"]}])
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(folder)})
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "worker_pool", lambda _: pytest.fail("begun"))
        assert cli.main(["prepare", *words]) == WRONG
    assert "2.jsonl: there is no column 'pos'; it has: query, positive" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_finished_work_is_kept_whatever_is_wrong_with_another_file(tmp_path, capsys, bytes_tokenizer):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(6):
        write(folder / f"{number}.jsonl", some_rows(300, number, str(number)))
    # The first rows of this array are in order, so nothing is noticed before the work begins.
    (folder / "9.jsonl").write_text(json.dumps(some_rows(9000, 9))[:-400])
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(folder)})
    assert cli.main(["prepare", *words]) == WRONG
    assert "9.jsonl: is an array that is cut off or not valid JSON behind row" in capsys.readouterr().err
    assert len(list((tmp_path / "store" / "work").glob("unit-*.json"))) >= 1


def test_prepare_says_how_many_rows_have_how_many_negatives_and_leaves_out_the_short_ones(
    tmp_path, capsys, bytes_tokenizer
):
    rows = [row(f"q{i}", f"p{i}", *(["n1", "n2", "n3"] if i % 20 else [])) for i in range(100)]
    source = {"path": str(write(tmp_path / "pairs.jsonl", rows)), "negative": "neg"}
    store = made(tmp_path / "all", bytes_tokenizer, source)
    said = capsys.readouterr().out
    none, three = (int(re.search(rf"{number}: (\d+)", said.split("hard negatives:")[1])[1]) for number in (0, 3))
    assert none + three == store.pairs and 0 < none <= 5 and store.negatives == 0
    assert "data.sources.least_negatives=3 would leave out" in said
    store = made(tmp_path / "some", bytes_tokenizer, source | {"least_negatives": 3})
    assert store.negatives == 3 and store.pairs + store.held_out == 95
    assert store.manifest.counts["few_negatives"] == 5
    assert "hard negatives:" not in capsys.readouterr().out


def test_a_store_made_before_a_setting_existed_is_the_store_of_its_default(tmp_path, bytes_tokenizer):
    source = {"path": str(write(tmp_path / "pairs.jsonl", some_rows(50)))}
    digest = made(tmp_path / "store", bytes_tokenizer, source).digest
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    del manifest["checksum"], manifest["digests"], manifest["settings"]["sources[0].least_negatives"]
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    assert made(tmp_path / "store", bytes_tokenizer, source).digest == digest
    assert PairStore.open(tmp_path / "store").manifest.digests is not None


# --- Texts to encode ---

TEXTS = ["one", "", "1900 é", "NA"]
FORMS_OF_TEXTS = {
    "texts.txt": "\n".join(TEXTS).encode() + b"\n",
    "texts.txt.gz": gzip.compress("\n".join(TEXTS).encode() + b"\n"),
    "texts.jsonl": "".join(json.dumps({"text": text or None}) + "\n\n" for text in TEXTS).encode(),
    "texts.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "texts.csv": ("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS))).encode(),
    "texts.tsv.bz2": bz2.compress(("id\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(TEXTS))).encode()),
    "texts.jsonl.zst": zstd("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()),
}


@pytest.mark.parametrize("name", FORMS_OF_TEXTS)
def test_texts_of_every_form_are_the_same_texts(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS_OF_TEXTS[name])
    assert list(texts_of(tmp_path / name)) == TEXTS


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_texts_of_every_type_of_a_table_are_the_same_texts(tmp_path, kind):
    column = pa.array(TEXTS, pa.string()).cast(kind)
    parquet.write_table(pa.table({"text": column}), tmp_path / "texts.parquet")
    assert list(texts_of(tmp_path / "texts.parquet")) == TEXTS


def test_two_columns_of_texts_of_one_name_are_one_line(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(table, tmp_path / "texts.parquet")
    with pytest.raises(UserError, match="texts.parquet: there are 2 columns 'text'"):
        list(texts_of(tmp_path / "texts.parquet"))


def test_a_blank_text_gets_a_row_of_zeros_or_none_and_is_counted(tmp_path, runs, capsys):
    (tmp_path / "texts.txt").write_text("a\n\nb\n")
    words = ["encode", str(runs["bias"]), str(tmp_path / "texts.txt")]
    assert cli.main([*words, str(tmp_path / "zero")]) == DONE
    printed = capsys.readouterr().out
    assert "texts.txt: 1 blank text; each gets a row of zeros" in printed
    assert "3 embeddings of 32 numbers in 1 file\n" in printed
    assert cli.main([*words, str(tmp_path / "drop"), "--blank", "drop"]) == DONE
    zero, drop = (np.load(tmp_path / name / "00000.npy") for name in ("zero", "drop"))
    expected = Embedder.load(runs["bias"]).encode(["a", "b"])
    np.testing.assert_allclose(drop, expected, atol=1e-6)
    np.testing.assert_allclose(zero, [expected[0], np.zeros_like(expected[0]), expected[1]], atol=1e-6)
    with pytest.raises(UserError, match="--blank: 'none' is unknown; allowed: zero, drop"):
        encode(*words[1:], str(tmp_path / "other"), blank="none")
