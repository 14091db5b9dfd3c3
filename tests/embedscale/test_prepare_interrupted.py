"""`embedscale prepare` after a stop, a kill, an error or a second call: it continues and makes the same store."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from stores import made, row, snapshot, some_rows, words_of, write

from embedscale import cli
from embedscale.data import prepare
from embedscale.data.store import PairStore
from embedscale.errors import INTERRUPTED, WRONG, UserError
from embedscale.run import lease as leases
from embedscale.run.lease import Lease


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, bytes_tokenizer) -> tuple[Path, str]:
    """Return sources of many units that take seconds, and the digest of a store made without an interruption."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "source").mkdir()
    for part in range(40):
        write(folder / "source" / f"{part:02d}.jsonl", some_rows(1000, part, f"part {part}"))
    return folder / "source", made(folder / "store", bytes_tokenizer, {"path": str(folder / "source")}).digest


@pytest.fixture
def large(tmp_path, bytes_tokenizer, undisturbed) -> tuple[list[str], Path, str]:
    """Return settings, the path of their store, and the expected digest."""
    source, digest = undisturbed
    source = shutil.copytree(source, tmp_path / "source")
    return words_of(tmp_path / "store", bytes_tokenizer, {"path": str(source)}), tmp_path / "store", digest


def started(words: list[str], store: Path, units: int) -> subprocess.Popen:
    """Start `prepare` in another process and wait until this many units are done."""
    command = [sys.executable, "-m", "embedscale.cli", "prepare", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    while len(list((store / "work").glob("unit-*.json"))) < units:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    return process


def test_a_killed_prepare_continues_to_the_same_store(large):
    words, store, digest = large
    for units in (1, 15, 30):
        process = started(words, store, units)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(children, timeout=20)
        assert not any(child.is_running() for child in children), "workers outlive their parent"
        with pytest.raises(UserError, match="not finished"):
            PairStore.open(store)
    finished = [name for name in snapshot(store / "work") if name.endswith(".json") and name.startswith("unit")]
    assert len(finished) >= 30
    (store / "train" / ".00000.arrow.0123abcd.partial").write_text("torn")
    # Finished units are not read again, so their files may hold anything. (The first file is read to check the source.)
    for number in sorted(int(name[5:11]) for name in finished)[1:]:
        file = store.parent / "source" / f"{number:02d}.jsonl"
        file.write_bytes(b" " * file.stat().st_size)
    assert cli.main(["prepare", *words]) == 0
    assert PairStore.open(store).digest == digest
    assert {path.name for path in store.iterdir()} == {"train", "held_out", "manifest.json"}
    assert not list(store.rglob("*.partial"))


@pytest.mark.parametrize(
    ("send", "sent"),
    [(os.kill, [signal.SIGTERM]), (os.killpg, [signal.SIGTERM]), (os.killpg, [signal.SIGINT] * 4)],
    ids=["SIGTERM", "SIGTERM to its workers too", "impatient Ctrl-C"],
)
def test_after_a_signal_prepare_can_be_resumed(large, send, sent):
    words, store, digest = large
    process = started(words, store, 5)
    for number in sent:
        send(process.pid, number)
        time.sleep(0.02)  # the system merges signals that follow too fast
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert errors.decode() == "embedscale: interrupted\n"
    assert not (store / "work" / "lease.json").exists()
    assert cli.main(["prepare", *words]) == 0
    assert PairStore.open(store).digest == digest


def test_an_interrupt_does_not_wait_for_the_end_of_a_compressed_file(tmp_path, bytes_tokenizer):
    """A compressed file is one unit and may take hours; no machine tokenises this one in a minute."""
    text = "".join(json.dumps(row(f"query {i}", "positive")) + "\n" for i in range(20_000))
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(text.encode(), 1) * 1000)
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(tmp_path / "pairs.jsonl.gz")})
    process = started(words, tmp_path / "store", 0)
    while not list((tmp_path / "store" / "work").glob(".unit-*.partial")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and errors.decode() == "embedscale: interrupted\n"
    assert not list((tmp_path / "store" / "work").glob("*unit*"))


def test_ctrl_c_while_workers_start_prints_one_line(large):
    words, store, _ = large
    process = started(words, store, 0)
    while not any("forkserver" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    for _ in range(10):  # during the imports of the process that forks the workers
        time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode()) == (INTERRUPTED, "embedscale: interrupted\n")


IN_SMALL_BUCKETS = """
import sys
from embedscale import cli
from embedscale.data import prepare
whole = prepare.prepare
prepare.prepare = lambda config: whole(config, bucket_bytes=500)
sys.exit(cli.main(["prepare", *sys.argv[1:]]))
"""


def interrupted_in_the_second_pass(words: list[str], store: Path) -> int:
    """Interrupt a `prepare` of many buckets after its first ones, and return its exit status."""
    process = subprocess.Popen([sys.executable, "-c", IN_SMALL_BUCKETS, *words], stderr=subprocess.DEVNULL)
    while len(list((store / "work").glob("bucket-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def interrupted_before_the_manifest(words: list[str], store: Path) -> int:
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "manifest_of", interrupt)
        return cli.main(["prepare", *words])


@pytest.mark.parametrize("interrupted", [interrupted_in_the_second_pass, interrupted_before_the_manifest])
def test_a_late_interrupt_leaves_no_store_and_prepare_continues(
    tmp_path, bytes_tokenizer, interrupted: Callable[[list[str], Path], int]
):
    source = {"path": str(write(tmp_path / "pairs.jsonl", some_rows(500)))}
    digest = made(tmp_path / "whole", bytes_tokenizer, source).digest
    words = words_of(tmp_path / "store", bytes_tokenizer, source)
    assert interrupted(words, tmp_path / "store") == INTERRUPTED
    with pytest.raises(UserError, match="not finished"):
        PairStore.open(tmp_path / "store")
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(row("new", "row")) + "\n")
    assert cli.main(["prepare", *words]) == WRONG  # a store must not mix two versions of a corpus
    write(tmp_path / "pairs.jsonl", some_rows(500))
    assert cli.main(["prepare", *words]) == 0
    assert PairStore.open(tmp_path / "store").digest == digest


def test_a_second_process_changes_nothing(tmp_path, capsys, bytes_tokenizer):
    source = {"path": str(write(tmp_path / "pairs.jsonl", some_rows(300)))}
    (tmp_path / "store" / "work").mkdir(parents=True)
    lease = Lease(tmp_path / "store" / "work" / "lease.json")
    lease.take()
    before = snapshot(tmp_path)
    assert cli.main(["prepare", *words_of(tmp_path / "store", bytes_tokenizer, source)]) == WRONG
    assert "another process" in capsys.readouterr().err
    after = snapshot(tmp_path)
    assert {name for name in after if "." in Path(name).name} == {name for name in before if "." in Path(name).name}
    lease.release()


def test_a_store_that_another_process_finishes_meanwhile_is_found(tmp_path, monkeypatch, capsys, bytes_tokenizer):
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(write(tmp_path / "p.jsonl", some_rows(300)))})
    units_of = prepare.units_of

    def slowly(*args):
        monkeypatch.setattr(prepare, "units_of", units_of)
        assert cli.main(["prepare", *words]) == 0
        return units_of(*args)

    monkeypatch.setattr(prepare, "units_of", slowly)
    assert cli.main(["prepare", *words]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "pairs a second" in first and f"{tmp_path / 'store'} is there" in second
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["held_out", "manifest.json", "train"]


def test_no_file_of_another_process_is_removed(tmp_path, monkeypatch, bytes_tokenizer):
    release, next_one = Lease.release, Lease(tmp_path / "store" / "work" / "lease.json")

    def then_the_next_comes(lease):
        release(lease)
        if lease is not next_one:
            next_one.take()

    monkeypatch.setattr(Lease, "release", then_the_next_comes)
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(write(tmp_path / "p.jsonl", some_rows(300)))})
    for _ in range(2):  # the first makes the store, the second finds it
        assert cli.main(["prepare", *words]) == 0
        assert next_one.held()
    next_one.release()
    assert cli.main(["prepare", *words]) == 0
    assert not (tmp_path / "store" / "work").exists()


def test_a_process_that_lost_its_store_ends(large, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    words, store, _ = large
    lease = store / "work" / "lease.json"

    def take_over():
        while not lease.exists():
            time.sleep(0.002)
        for _ in range(5):  # the old holder may be writing its heartbeat
            lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "other"}))
            time.sleep(0.02)

    thread = threading.Thread(target=take_over)
    thread.start()
    assert cli.main(["prepare", *words]) == INTERRUPTED
    thread.join()
    assert json.loads(lease.read_text())["token"] == "other"


def test_units_done_before_a_read_error_are_kept(tmp_path, capsys, bytes_tokenizer):
    """A file server may fail for a minute, and a file that is cut off may be found after hours."""
    (tmp_path / "source").mkdir()
    text = write(tmp_path / "source" / "0.jsonl", some_rows(300)).read_bytes()
    for number in range(1, 8):
        (tmp_path / "source" / f"{number}.jsonl.gz").write_bytes(gzip.compress(text.replace(b"read", b"%d" % number)))
    last, whole = tmp_path / "source" / "7.jsonl.gz", (tmp_path / "source" / "7.jsonl.gz").read_bytes()
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(tmp_path / "source")})
    last.write_bytes(whole[:-9] + bytes(9))  # a file server may return such content for a while
    assert cli.main(["prepare", *words]) == WRONG
    assert "7.jsonl.gz: cannot be read" in capsys.readouterr().err
    assert len(list((tmp_path / "store" / "work").glob("unit-*.json"))) == 7
    last.write_bytes(whole)
    digest = made(tmp_path / "other", bytes_tokenizer, {"path": str(tmp_path / "source")}).digest
    for number in range(1, 7):  # these are not read again, but for their first row
        file = tmp_path / "source" / f"{number}.jsonl.gz"
        first = gzip.compress(gzip.decompress(file.read_bytes()).splitlines(keepends=True)[0])
        file.write_bytes(first + bytes(file.stat().st_size - len(first)))
    assert cli.main(["prepare", *words]) == 0
    assert PairStore.open(tmp_path / "store").digest == digest
