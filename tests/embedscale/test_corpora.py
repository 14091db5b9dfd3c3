"""Sources of pairs: every row is read once, however units are cut; odd rows are counted; unreadable files are named."""

import ast
import bz2
import gzip
import json
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from embedscale.data.corpora import UNIT_SIZE, UnitSize, read, units_of
from embedscale.data.installed_python import documented_functions, installed_files
from embedscale.data.pair import Pair
from embedscale.errors import UserError
from embedscale.run.config import Source


def everything(size: UnitSize = UNIT_SIZE, **settings) -> tuple[list[Pair], Counter]:
    source, counts = Source(**settings), Counter()
    pairs = [pair for unit in units_of(0, source, size) for pair in read(unit, source, counts, size)]
    return pairs, counts


def rows(n: int) -> list[dict]:
    return [
        {"query": f"query {i} " + "é" * (i % 7), "pos": [f"positive {i}", "another"], "neg": [f"n{i}"] * (i % 3)}
        for i in range(n)
    ]


def as_pairs(rows: list[dict], negatives: bool = True) -> list[Pair]:
    return [Pair(r["query"], r["pos"][0], tuple(r["neg"]) if negatives else ()) for r in rows]


def write_jsonl(path: Path, rows: list[dict], ending: str = "\n") -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + ending for row in rows), newline="")
    return path


@pytest.mark.parametrize("unit", [1, 7, 64, 65, 1000, 10**9])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_every_line_is_read_once_however_units_are_cut(tmp_path, unit, ending):
    path = write_jsonl(tmp_path / "pairs.jsonl", rows(40), ending)
    path.write_bytes(path.read_bytes().rstrip())  # the last line has no line feed
    pairs, counts = everything(UnitSize(unit), path=str(path), negative="neg")
    assert pairs == as_pairs(rows(40))
    assert counts == {"read": 40}


def test_a_large_corpus_has_larger_units_and_not_more(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", rows(1000))
    assert len(units_of(0, Source(path=str(path)), UnitSize(1))) <= UNIT_SIZE.most_units


def test_a_file_a_folder_and_a_glob_are_the_same_corpus(tmp_path):
    folder = tmp_path / "odd [name]"
    (folder / "deeper").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", rows(5))
    (folder / "deeper" / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "b", rows(9)[5:]).read_bytes()))
    (folder / "dataset_infos.json").write_text("{}")  # the hub's folders hold this file beside the data
    expected = as_pairs(rows(9), negatives=False)
    assert everything(path=str(folder))[0] == expected
    assert everything(path=str(folder / "a.jsonl"))[0] == expected[:5]
    write_jsonl(tmp_path / "one.jsonl", rows(2)), write_jsonl(tmp_path / "two.jsonl", rows(4)[2:])
    assert everything(path=str(tmp_path / "*.jsonl"))[0] == expected[:4]


def test_folders_that_are_links_and_tables_that_are_folders_are_read(tmp_path):
    for name, first in (("near", 0), ("far", 3)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "part.jsonl", rows(first + 3)[first:])
    (tmp_path / "near" / "there").symlink_to("../far")
    assert everything(path=str(tmp_path / "near"))[0] == as_pairs(rows(6), negatives=False)
    table = tmp_path / "spark" / "table.parquet"  # as Spark writes one
    table.mkdir(parents=True)
    parquet.write_table(pa.table(plain_columns(3)), table / "part-0.parquet")
    columns = {"kind": "parquet", "query": "question", "positive": "answer"}
    for path in (table, table.parent, tmp_path / "spark" / "*.parquet", tmp_path / "spa*" / "**"):
        assert everything(path=str(path), **columns)[0] == [Pair(f"q{i}", f"a{i}") for i in range(3)]
    (tmp_path / "near" / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):  # the command line prints it as one line
        everything(path=str(tmp_path / "near"))


def plain_columns(n: int) -> dict[str, list]:
    return {"question": [f"q{i}" for i in range(n)], "answer": [f"a{i}" for i in range(n)], "id": [*range(n)]}


@pytest.mark.parametrize("large", [False, True])
def test_parquet_with_plain_and_with_list_columns(tmp_path, large):
    text = pa.large_string() if large else pa.string()
    some = pa.large_list if large else pa.list_
    table = pa.table({"question": pa.array([f"q{i}" for i in range(10)], text), "id": pa.array(range(10))})
    table = table.append_column("answers", pa.array([[f"a{i}", "b"] for i in range(10)], some(text)))
    table = table.append_column("wrong", pa.array([None if i == 3 else f"w{i}" for i in range(10)], text))
    parquet.write_table(table, tmp_path / "pairs.parquet", row_group_size=3)
    settings = {"kind": "parquet", "query": "question", "positive": "answers", "negative": "wrong"}
    pairs, counts = everything(path=str(tmp_path), **settings)
    assert pairs == [Pair(f"q{i}", f"a{i}", () if i == 3 else (f"w{i}",)) for i in range(10)]
    assert counts == {"read": 10}


@pytest.mark.parametrize(("share", "units"), [(0, 8), (0.2, 4), (0.45, 2), (9, 1)])
def test_small_row_groups_are_read_together_and_each_once(tmp_path, share, units):
    path = tmp_path / "pairs.parquet"
    parquet.write_table(pa.table(plain_columns(22)), path, row_group_size=3)
    size = UnitSize(int(share * path.stat().st_size))
    settings = {"kind": "parquet", "query": "question", "positive": "answer", "path": str(path)}
    assert len(units_of(0, Source(**settings), size)) == units
    assert everything(size, **settings) == ([Pair(f"q{i}", f"a{i}") for i in range(22)], {"read": 22})
    assert len(units_of(0, Source(**settings), replace(size, most_units=2))) <= 2


def test_hugging_face_datasets_saved_and_in_the_hubs_form(tmp_path):
    import datasets

    size = UnitSize(200)  # several shards
    whole = datasets.Dataset.from_dict(plain_columns(50))
    columns = {"kind": "dataset", "query": "question", "positive": "answer"}
    expected = [Pair(f"q{i}", f"a{i}") for i in range(50)]
    whole.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": whole, "other": whole.select([0])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "hub").mkdir()
    for part in range(2):
        whole.shard(2, part).to_parquet(str(tmp_path / "hub" / f"train-0000{part}-of-00002.parquet"))
    assert len(units_of(0, Source(path=str(tmp_path / "saved"), **columns), size)) > 2
    assert len(units_of(0, Source(path=str(tmp_path / "hub"), **columns), size)) == 2
    assert everything(size, path=str(tmp_path / "saved"), **columns) == (expected, {"read": 50})
    assert everything(size, path=str(tmp_path / "splits"), split="test", **columns) == (expected, {"read": 50})
    assert everything(size, path=str(tmp_path / "hub"), **columns) == (expected, {"read": 50})


ODD_ROWS = [
    (b'{"query": "q\xff", "pos": ["p"]}', "not_utf8"),
    (b'{"query": "q", "pos": ["\\ud800"]}', "not_utf8"),  # half a surrogate pair: possible in JSON, impossible in UTF-8
    ('{"query": "q", "pos": ["p"]}'.encode("utf-16"), "not_utf8"),
    (b'{"query": "q", "pos": ["p"]', "malformed"),
    (b'["query", "pos"]', "malformed"),
    (b"[" * 100_000, "malformed"),
    (b'{"query": 5, "pos": ["p"]}', "malformed"),
    (b'{"query": ["an instruction", "q"], "pos": ["p"]}', "malformed"),
    (b'{"query": "q", "pos": [["p"]]}', "malformed"),
    (b'{"query": "q", "pos": {"text": "p"}}', "malformed"),
    (b'{"query": "q", "pos": []}', "empty"),
    (b'{"query": null, "pos": ["p"]}', "empty"),
    (b'{"query": "q"}', "empty"),
]


@pytest.mark.parametrize(("line", "reason"), ODD_ROWS, ids=[str(i) for i in range(len(ODD_ROWS))])
def test_an_odd_row_is_counted_and_the_others_are_read(tmp_path, line, reason):
    path = write_jsonl(tmp_path / "pairs.jsonl", rows(3))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + line + b"\n" + path.read_bytes())
    pairs, counts = everything(path=str(path), negative="neg")
    assert pairs == as_pairs(rows(3)) * 2
    assert counts["read"] == 6 + counts[reason]
    assert counts[reason] >= 1 and len(counts) == 2


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
@pytest.mark.parametrize("in_list", [False, True])
def test_text_that_is_not_utf8_in_tables_is_counted(tmp_path, kind, in_list):
    texts = pa.array([b"good", b"b\xffd", b"fine"])
    texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())  # no check is made here, nor by other writers
    if in_list:
        texts = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts)
    parquet.write_table(pa.table({"query": ["a", "b", "c"], "pos": texts}), tmp_path / "pairs.parquet")
    pairs, counts = everything(kind=kind, path=str(tmp_path))
    assert pairs == [Pair("a", "good"), Pair("c", "fine")]
    assert counts == {"read": 3, "not_utf8": 1}


def test_an_unreadable_source_is_named(tmp_path):
    import datasets

    good = write_jsonl(tmp_path / "good.jsonl", rows(3))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good.read_bytes())[:-9])
    (tmp_path / "cut.jsonl.bz2").write_bytes(bz2.compress(good.read_bytes())[:-9])
    (tmp_path / "text.parquet").write_text("no table")
    (tmp_path / "empty").mkdir()
    parquet.write_table(pa.table(plain_columns(3)), tmp_path / "plain.parquet")
    datasets.Dataset.from_dict(plain_columns(3)).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"a": datasets.Dataset.from_dict(plain_columns(3))}).save_to_disk(str(tmp_path / "splits"))
    datasets.Dataset.from_dict(plain_columns(0)).save_to_disk(str(tmp_path / "no rows"))
    (tmp_path / "differing").mkdir()
    write_jsonl(tmp_path / "differing" / "train-1.jsonl", [{"query": "q", "pos": "p"}])
    write_jsonl(tmp_path / "differing" / "train-2.jsonl", rows(3))
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("query,pos\na,b\nc,d,e\n")
    wrong = [
        ("jsonl", "nowhere.jsonl", {}, "no file .*nowhere.jsonl"),
        ("jsonl", "empty", {}, r"empty holds no file named \*\.jsonl"),
        ("jsonl", "good.jsonl", {"query": "qeury"}, "no column 'qeury'; it has: query, pos, neg"),
        ("jsonl", "good.jsonl", {"negative": "hard"}, "no column 'hard'"),
        ("jsonl", "cut.jsonl.gz", {}, r"cut\.jsonl\.gz: cannot be read"),
        ("jsonl", "cut.jsonl.bz2", {}, r"cut\.jsonl\.bz2: cannot be read"),
        ("parquet", "text.parquet", {}, "not a readable Parquet file"),
        ("parquet", "plain.parquet", {"query": "question"}, "no column 'pos'; it has: question, answer, id"),
        ("dataset", "saved", {"query": "question"}, "no column 'pos'; it has: question, answer, id"),
        ("dataset", "splits", {}, "'train' is not in .*allowed: a"),
        ("dataset", "empty", {}, "cannot be loaded"),
        ("dataset", "no rows", {}, "cannot be loaded"),
        ("dataset", "differing", {}, "differing: cannot be read .*pos: list<.*column names"),
        ("dataset", "csv", {}, "csv: cannot be (loaded|read)"),
        ("dataset", "nowhere", {}, "cannot be loaded"),
    ]
    for kind, name, settings, message in wrong:
        with pytest.raises(UserError, match=message) as caught:
            everything(kind=kind, path=str(tmp_path / name), **settings)
        assert "\n" not in str(caught.value)


MODULE = '''
"""A module's docstring is no pair."""
import os

class Reader:
    """Nor is a class's."""

    @property
    def size(self):
        """The size,
        in bytes.

        More is not asked for.
        """
        # a comment stays
        return os.stat(self.path).st_size

    async def fetch(self):
        r\'\'\'Fetch it.\'\'\'
        if self:
            def inner(x):
                "Double it."
                return 2 * x
        return inner(1)

def undocumented():
    return 1

def only_documented():
    """Nothing to do."""

def short(): "Too short."; return 1
'''


def python_pairs(files: list[Path]) -> tuple[list[Pair], Counter]:
    counts = Counter()
    return [pair for file in files for pair in documented_functions(file, counts)], counts


def test_functions_become_pairs_of_docstring_and_code(tmp_path):
    (tmp_path / "module.py").write_text(MODULE)
    pairs, counts = python_pairs([tmp_path / "module.py"])
    assert [pair for pair in pairs if pair.positive] == [
        Pair(
            "The size, in bytes.",
            "def size(self):\n    # a comment stays\n    return os.stat(self.path).st_size",
        ),
        Pair(
            "Fetch it.",
            'async def fetch(self):\n    if self:\n        def inner(x):\n            "Double it."\n'
            "            return 2 * x\n    return inner(1)",
        ),
        Pair("Double it.", "def inner(x):\n    return 2 * x"),
    ]
    assert counts == {"read": 4}  # the one-line function has no code besides its docstring; `prepare` drops it as empty


def test_odd_files_are_counted(tmp_path):
    good = 'def f(x):\n    """Say so."""\n    return x\n'
    contents = {
        "latin.py": ('# """\n' + good + "# \xe9\n").encode("latin-1"),
        "python2.py": b'"""old"""\nprint "hello"\n',
        "null.py": b'"""a"""\n\0',
        "deep.py": b'"""a"""\nx = ' + b"(" * 5000 + b")" * 5000,
        "windows.py": good.replace("\n", "\r\n").encode(),
        "empty.py": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in contents] + [tmp_path / "gone.py"]
    pairs, counts = python_pairs(files)
    assert pairs == [Pair("Say so.", "def f(x):\n    return x")]
    assert counts == {"read": 6, "not_utf8": 1, "malformed": 4}


def test_pairs_of_the_standard_library_are_functions_without_their_docstrings():
    """The text of each pair parses to the function in the file, without its docstring."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / name for name in ("argparse.py", "statistics.py", "asyncio/tasks.py", "ast.py", "inspect.py")]
    expected = Counter()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                first = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
                node.body, node.decorator_list = node.body[1:], []
                if node.body:
                    expected[first, ast.dump(node)] += 1
    pairs, _ = python_pairs(files)
    assert Counter((pair.query, ast.dump(ast.parse(pair.positive).body[0])) for pair in pairs) == expected
    assert expected.total() > 150


def test_installed_files_are_listed_in_a_fixed_order():
    files = installed_files()
    assert len(files) == len(set(files))
    names = [str(path) for path in files]
    library, packages = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    own = [name for name in names if name.startswith(packages)]
    assert own == sorted(own) and any(name.endswith("/numpy/__init__.py") for name in own)
    assert f"{library}/argparse.py" in names
    assert not any("site-packages" in name.removeprefix(packages) for name in names if name.startswith(library))
