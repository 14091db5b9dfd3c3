"""Encode texts with a finished run: in parts, continued after a kill, without a network; bad texts are refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from command import in_fresh_process
from damage import CONTENTS
from pyarrow import parquet
from tokenizers import Tokenizer

from embedscale.cli import main
from embedscale.errors import DONE, UserError
from embedscale.run.directory import RunDirectory
from embedscale.run.settings import load
from embedscale.serving.embedder import Embedder
from embedscale.serving.encode import encode


@pytest.mark.parametrize("form", ["npy", "arrow"])
def test_encode_works_in_parts_and_continues_after_a_kill(tmp_path, runs, form, monkeypatch):
    texts = [f"text number {i} {'word ' * (i % 60)}".strip() for i in range(230)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    words = [str(runs["full"]), str(tmp_path / "texts.jsonl"), str(tmp_path / "out"), "body", form, 50]
    calls, whole = [], Embedder.encode

    def dying(self, texts, progress=lambda n: None):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, texts, progress)

    monkeypatch.setattr(Embedder, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        encode(*words)
    assert len(list((tmp_path / "out").glob(f"*.{form}"))) == 2
    assert encode(*words) == DONE
    assert calls == [50, 50, 50, 50, 50, 30]  # the first two are not encoded again
    parts = sorted((tmp_path / "out").glob(f"*.{form}"))
    if form == "npy":
        found = np.concatenate([np.load(part) for part in parts])
    else:
        import pyarrow

        tables = [pyarrow.ipc.open_file(part).read_all() for part in map(str, parts)]
        found = np.concatenate([t.column(0).combine_chunks().flatten().to_numpy().reshape(len(t), -1) for t in tables])
    np.testing.assert_allclose(found, whole(Embedder.load(runs["full"]), texts), atol=1e-6)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'out'}: holds another encoding: run_id"):
        encode(str(runs["lora"]), *words[1:])


def test_any_content_of_encoding_json_is_one_line_before_the_model_is_loaded(tmp_path, runs, monkeypatch):
    (tmp_path / "texts.txt").write_text("one\n")
    index = tmp_path / "out" / "encoding.json"
    index.parent.mkdir()
    monkeypatch.delattr(Embedder, "load")
    for content in CONTENTS.values():
        index.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{index}: [^\n]*$"):
            encode(str(runs["full"]), str(tmp_path / "texts.txt"), str(index.parent))


def test_encode_skips_a_byte_order_mark_and_draws_no_bar_into_a_pipe(tmp_path, runs, capsys):
    from transformers.utils import logging

    (tmp_path / "plain.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "marked.jsonl").write_text('\ufeff{"text": "one"}\n')
    logging.enable_progress_bar()
    for name in ("plain", "marked"):
        words = ["encode", str(runs["full"]), str(tmp_path / f"{name}.jsonl"), str(tmp_path / name)]
        assert main(words) == DONE
    assert not capsys.readouterr().err
    assert (tmp_path / "plain/00000.npy").read_bytes() == (tmp_path / "marked/00000.npy").read_bytes()


def test_a_text_without_tokens_has_similarity_zero(runs):
    found = Embedder.load(runs["full"]).encode(["", "a", ""])
    assert not found[0].any() and not found[2].any() and np.linalg.norm(found[1]) == pytest.approx(1)


BAD = {
    "no text": ("encode", "empty.txt", "empty.txt: no text"),
    "no UTF-8": ("encode", "latin.txt", "line 1 is not UTF-8"),
    "half a character": ("encode", "half.jsonl", "line 1 is not UTF-8"),
    "no JSON": ("encode", "deep.jsonl", "is an array that is cut off or not valid JSON"),
    "no UTF-8 in a table": ("encode", "latin.parquet", "text 3 is not UTF-8"),
    "a damaged table": ("encode", "damaged.parquet", "damaged.parquet: cannot be read"),
    "another ending": ("encode", "texts.xml", ".xml is not known"),
    "a missing column": ("encode", "texts.jsonl", "not a JSON object with a column 'text'"),
    "a missing file": ("encode", "nothing.txt", "TEXTS: there is no file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_texts_are_refused_in_one_line(tmp_path, runs, capsys, case):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name, last in (("latin", b"caf\xe9"), ("damaged", b"four")):
        texts = pa.array([b"one", b"two", last])
        texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())  # no check is made here, nor by other writers
        parquet.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet")
    with (tmp_path / "damaged.parquet").open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 12)
    (tmp_path / "texts.xml").write_text("a,b\n")
    (tmp_path / "texts.jsonl").write_text('{"other": "a"}\n')
    verb, file, expected = BAD[case]
    assert main([verb, str(runs["full"]), str(tmp_path / file), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_was_changed_since_the_training_is_refused(tmp_path, runs, backbone_folder):
    shutil.copytree(runs["full"], tmp_path / "run")
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    directory = RunDirectory(tmp_path / "run")
    config = directory.config.read_text()
    directory.config.write_text(config.replace(str(backbone_folder), str(tmp_path / "backbone")))
    file = tmp_path / "backbone" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["the"])
    tokenizer.save(str(file))
    with pytest.raises(UserError, match="data.tokenizer: .* but the run was trained with"):
        Embedder.load(directory.path)


WITHOUT_SOCKETS = """
import socket, sys
def refused(*words, **more): raise OSError("no network in this test")
socket.socket.connect = refused
socket.create_connection = socket.getaddrinfo = refused
from embedscale.cli import main
words, run, folder = sys.argv[4:], sys.argv[1], sys.argv[2]
assert main(["train", *words]) == 0
assert main(["evaluate", run]) == 0
assert main(["export", run, folder + "/model"]) == 0
assert main(["encode", run, sys.argv[3], folder + "/embeddings"]) == 0
"""


def test_the_whole_chain_needs_no_network(tmp_path, tiny_run):
    words = [*tiny_run, "budget=1e9", f"output={tmp_path / 'runs'}"]
    (tmp_path / "texts.txt").write_text("one text\nanother\n")
    in_fresh_process(WITHOUT_SOCKETS, str(load(None, words).folder), str(tmp_path), str(tmp_path / "texts.txt"), *words)
    assert np.load(tmp_path / "embeddings" / "00000.npy").shape[0] == 2


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"text number {i}\n" for i in range(130)))
    return path


def test_encode_killed_before_its_first_rename_goes_on(tmp_path, runs, texts):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".encoding.json.0123abcd.partial").write_text('{"run_')
    (out / ".lease.json.0123abcd.partial").write_text("{")
    assert encode(str(runs["bias"]), str(texts), str(out), texts_a_part=50) == DONE
    assert sorted(path.name for path in out.iterdir()) == ["00000.npy", "00001.npy", "00002.npy", "encoding.json"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()], ids=["cut", "flipped", "removed"])
def test_a_part_that_was_damaged_since_is_embedded_again(tmp_path, runs, texts, capsys, damage):
    words = (str(runs["bias"]), str(texts), str(tmp_path / "out"))
    assert encode(*words, texts_a_part=50) == DONE
    parts = sorted((tmp_path / "out").glob("*.npy"))
    before = [part.read_bytes() for part in parts]
    damage(parts[1])
    (tmp_path / "out" / ".00002.npy.0123abcd.partial").write_bytes(b"torn")
    capsys.readouterr()
    assert encode(*words, texts_a_part=50) == DONE
    assert f"{parts[1]}: is missing or damaged; its texts are embedded again" in capsys.readouterr().err
    assert [part.read_bytes() for part in parts] == before
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_texts_come_from_a_folder_a_glob_and_standard_input_alike(tmp_path, runs):
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("one\n\ntwo\n")
    (folder / "below" / "b.jsonl").write_text('{"text": "three"}\n{"text": null}\n')
    (folder / "notes.md").write_text("not read\n")
    run = str(runs["bias"])
    for source, out in ((folder, "folder"), (f"{folder}/**/[ab].*", "glob")):
        assert main(["encode", run, str(source), str(tmp_path / out)]) == DONE
    words = [sys.executable, "-m", "embedscale.cli", "encode", run, "-", str(tmp_path / "piped"), "--blank", "drop"]
    done = subprocess.run(words, input="one\n\ntwo\nthree\n\n", text=True, capture_output=True)
    assert done.returncode == DONE, done.stderr
    found = {name: np.load(tmp_path / name / "00000.npy") for name in ("folder", "glob", "piped")}
    assert found["folder"].shape[0] == 5 and not found["folder"][[1, 4]].any()
    np.testing.assert_array_equal(found["glob"], found["folder"])
    np.testing.assert_allclose(found["piped"], found["folder"][[0, 2, 3]], atol=1e-6)
