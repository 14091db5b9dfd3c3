"""`embedscale prepare` refuses other settings, bad sources and bad folders in one line, and writes nothing."""

from pathlib import Path

import pytest
from stores import made, row, snapshot, some_rows, words_of, write

from embedscale import cli
from embedscale.data import prepare
from embedscale.errors import WRONG


def test_a_finished_store_is_kept_and_other_settings_are_refused(tmp_path, capsys, bytes_tokenizer, bpe_tokenizer):
    path, store = write(tmp_path / "pairs.jsonl", some_rows(300)), tmp_path / "store"
    made(store, bytes_tokenizer, {"path": str(path)})
    path.unlink()  # the file is not read again
    before = snapshot(tmp_path)
    capsys.readouterr()
    made(store, bytes_tokenizer, {"path": str(path)})
    assert "is there" in capsys.readouterr().out
    others = [
        ("data.context", words_of(store, bytes_tokenizer, {"path": str(path)}, context=41)),
        ("data.held_out", words_of(store, bytes_tokenizer, {"path": str(path)}, held_out=0.2)),
        ("data.tokenizer", words_of(store, bpe_tokenizer, {"path": str(path)})),
        ("data.sources[0].path", words_of(store, bytes_tokenizer, {"path": "other.jsonl"})),
        ("data.sources[1].kind", words_of(store, bytes_tokenizer, *[{"path": str(path)}] * 2)),
    ]
    for field, words in others:
        assert cli.main(["prepare", *words]) == WRONG
        assert f"{field}: {store} was made with" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


BAD = [
    ({"path": "nowhere.jsonl"}, {}, "data.sources.path: there is no file nowhere.jsonl"),
    ({"path": "good.jsonl", "query": "question"}, {}, "no column 'question'; it has: query, pos, neg"),
    ({"path": "good.jsonl", "kind": "json"}, {}, "data.sources.kind: 'json' is unknown; allowed: jsonl"),
    ({"path": "good.jsonl", "weight": 0}, {}, "data.sources.weight: 0.0 is out of range"),
    ({"path": "good.jsonl", "pth": "x"}, {}, "pth"),
    ({"kind": "parquet"}, {}, "data.sources.path: no path is given"),
    ({"path": "empty.jsonl"}, {}, "data.sources[0]: empty.jsonl yields no pair (nothing read)"),
    ({"path": "nulls.jsonl"}, {}, "data.sources[0]: nulls.jsonl yields no pair (7 read, 7 empty)"),
    ({"path": "blank.jsonl"}, {}, "yield no training pair (4 read, 4 empty)"),
    ({"path": "good.jsonl", "kind": "parquet"}, {}, "good.jsonl: not a readable Parquet file"),
    ({"path": "nobody/nothing", "kind": "dataset"}, {}, "the dataset 'nobody/nothing' cannot be loaded"),
    ({"path": "good.jsonl"}, {"context": 0}, "data.context: 0 is out of range"),
    ({"path": "good.jsonl"}, {"held_out": 0.6}, "data.held_out: 0.6 is out of range"),
    ({"path": "good.jsonl"}, {"tokenizer": "nobody/nothing"}, "data.tokenizer: 'nobody/nothing' is neither a local"),
    ({"path": "good.jsonl"}, {"tokenizer": "folder"}, "data.tokenizer: folder holds no tokenizer.json"),
    ({"path": "good.jsonl"}, {"tokenizer": "broken"}, "broken/tokenizer.json is not a readable tokenizer"),
    ({"path": "good.jsonl"}, {"store": "folder"}, "data.store: folder holds other files"),
    ({"path": "good.jsonl"}, {"store": "good.jsonl"}, "data.store: good.jsonl holds other files"),
    ({"path": "good.jsonl"}, {"store": "good.jsonl/below"}, "data.store: good.jsonl/below cannot be made"),
]


@pytest.mark.parametrize(("source", "settings", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, bytes_tokenizer, source, settings, message
):
    monkeypatch.chdir(tmp_path)
    write(Path("good.jsonl"), some_rows(20))
    write(Path("blank.jsonl"), [row(" ", "text")] * 4)
    write(Path("nulls.jsonl"), [{"query": "q", "pos": None}] * 7)
    Path("empty.jsonl").touch()
    Path("folder").mkdir()
    (Path("folder") / "notes.txt").write_text("mine")
    Path("broken").mkdir()
    (Path("broken") / "tokenizer.json").write_text("{")
    before = snapshot(tmp_path)
    settings = {"store": "new/below/store", "tokenizer": bytes_tokenizer} | settings
    words = words_of(settings.pop("store"), settings.pop("tokenizer"), source, **settings)
    assert cli.main(["prepare", *words]) == WRONG
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert snapshot(tmp_path) == before


def test_a_wrong_source_is_found_before_any_source_is_tokenised(tmp_path, monkeypatch, capsys, bytes_tokenizer):
    monkeypatch.setattr(prepare, "worker_pool", lambda _: pytest.fail("begun"))
    good = {"path": str(write(tmp_path / "good.jsonl", some_rows(20)))}
    nulls = {"path": str(write(tmp_path / "nulls.jsonl", [{"query": "q", "pos": None}] * 7))}
    for wrong, said in ((good | {"positive": "answer"}, "no column 'answer'"), (nulls, "data.sources[1]:")):
        assert cli.main(["prepare", *words_of(tmp_path / "s", bytes_tokenizer, good, wrong)]) == WRONG
        assert said in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_mixtures_need_all_weights_and_at_least_one_source(tmp_path, capsys, bytes_tokenizer):
    path = str(write(tmp_path / "pairs.jsonl", some_rows(20)))
    assert cli.main(
        ["prepare", *words_of(tmp_path / "s", bytes_tokenizer, {"path": path, "weight": 1}, {"path": path})]
    )
    assert "data.sources.weight: some sources have a weight" in capsys.readouterr().err
    assert cli.main(["prepare", *words_of(tmp_path / "s", bytes_tokenizer)]) == WRONG
    assert "data.sources: nothing is given" in capsys.readouterr().err
    again = [{"path": path, "weight": 1}] * 2  # equal pairs count for the first source
    assert cli.main(["prepare", *words_of(tmp_path / "s", bytes_tokenizer, *again)]) == WRONG
    assert "data.sources[1].weight: no pair of this source is left" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
