"""How a run ends when its surroundings do not: a reader that leaves, a closed terminal, kills, missing metadata."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from training_runs import StopAfter, comparable, run_of

from embedscale.errors import DONE, FAILED, INTERRUPTED, WRONG
from embedscale.files import read_json
from embedscale.run.lease import Holder
from embedscale.training.train import train


def started(words, **more):
    return subprocess.Popen([sys.executable, "-m", "embedscale.cli", "train", *words], **more)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_neither_fails_a_run_nor_changes_its_exit_status(tmp_path, tiny_run, unbuffered):
    _, directory = run_of(tmp_path, tiny_run)
    reader, writer = os.pipe()
    process = started(
        [*tiny_run, f"output={tmp_path / 'runs'}", "budget=5e9"],
        stdout=writer,
        stderr=writer,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    os.close(reader)
    assert process.wait(120) == DONE
    assert directory.read_record().status == "done"
    assert [attempt.ended for attempt in directory.read_attempts()] == ["done"]


def running(directory, process):
    while not directory.read_metrics():
        assert process.poll() is None
        time.sleep(0.02)


NO_THREAD = """
import sys
from torch.utils.data import dataloader

def fail(*words, **more):
    raise RuntimeError("can't start new thread")

dataloader._MultiProcessingDataLoaderIter._reset = fail
from embedscale.cli import main

sys.exit(main(sys.argv[1:]))
"""


def test_an_error_while_the_loader_is_built_ends_the_process(tmp_path, tiny_run):
    """Its workers ignore SIGTERM, and Python waited for them for ever. Found with little memory, by `make chaos`."""
    _, directory = run_of(tmp_path, tiny_run, "resources.workers=2")
    words = ["train", *tiny_run, f"output={tmp_path / 'runs'}", "budget=5e9", "resources.workers=2"]
    done = subprocess.run([sys.executable, "-c", NO_THREAD, *words], timeout=120, capture_output=True, text=True)
    assert done.returncode == FAILED, done.stderr
    (attempt,) = directory.read_attempts()
    (told,) = directory.messages(1)
    assert attempt.ended == "failed" and "can't start new thread" in told.read_text()


def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path, tiny_run):
    words = [*tiny_run, f"output={tmp_path / 'runs'}", "budget=1e12", "data.repeat=true", "resources.log_every=1"]
    _, directory = run_of(tmp_path, tiny_run, "budget=1e12", "data.repeat=true", "resources.log_every=1")
    terminal, end = os.openpty()
    hears = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    process = started(words, stdin=end, stdout=end, stderr=end, start_new_session=True, preexec_fn=hears)
    os.close(end)
    running(directory, process)
    os.close(terminal)  # writing to it is an error from now on
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == INTERRUPTED
    (attempt,) = directory.read_attempts()
    assert (attempt.ended, attempt.reason) == ("interrupted", "SIGHUP")
    assert directory.newest_step == attempt.to_step


def test_nohup_keeps_its_meaning(tmp_path, tiny_run):
    words = ["budget=1e12", "data.repeat=true", "resources.log_every=1"]
    _, directory = run_of(tmp_path, tiny_run, *words)
    process = started(
        [*tiny_run, f"output={tmp_path / 'runs'}", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    running(directory, process)
    process.send_signal(signal.SIGHUP)
    step = directory.read_metrics()[-1].step
    while directory.read_metrics()[-1].step < step + 20:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == INTERRUPTED


def test_what_the_record_needs_is_asked_for_before_the_first_step(tmp_path, tiny_run, monkeypatch, capsys):
    """As in a checkout that was never installed, and in an environment whose metadata were removed."""
    from importlib.metadata import PackageNotFoundError

    from embedscale import cli
    from embedscale.training import outcome

    lacking = "embedscale"

    def version(name):
        if name == lacking:
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(outcome, "version", version)
    config, _ = run_of(tmp_path, tiny_run)
    assert train(config) == DONE, "the code knows its own version"
    lacking = "peft"
    words = [*tiny_run, f"output={tmp_path / 'others'}", "budget=5e9"]
    assert cli.main(["train", *words]) == WRONG
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "embedscale: the package 'peft' has no metadata, which the record needs; install it again"
    assert not (tmp_path / "others").exists()


def test_checkpoints_of_a_finished_run_do_not_stay(tmp_path, tiny_run):
    """The run was killed after it wrote its record and before it removed files that it no longer needs."""
    config, directory = run_of(tmp_path, tiny_run)
    assert train(config) == DONE
    before = comparable(directory)
    for name in ("checkpoints/step-000000009.pt", ".config.yaml.0123abcd.partial", "model/.tmpx1Y2z3"):
        path = directory.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
    attempt = directory.attempt(1).path / ".attempt.json.0123abcd.partial"
    attempt.write_text("{")
    assert train(config) == DONE
    left = {path.name for path in directory.path.rglob("*") if path.is_file()}
    assert left == {"config.yaml", "plan.json", "metrics.jsonl", "attempt.json", "trainable.safetensors", "record.json"}
    assert comparable(directory) == before


def test_the_lease_of_a_finished_run_does_not_stay(tmp_path, tiny_run):
    """The run was killed after it had removed its checkpoints and before it released the lease."""
    config, directory = run_of(tmp_path, tiny_run)
    assert train(config) == DONE
    ended = subprocess.Popen(["true"])
    ended.wait()
    directory.lease.write_text(json.dumps(replace(Holder.of_this_process(), pid=ended.pid).to_json()))
    assert train(config) == DONE
    assert not directory.lease.exists()


def test_half_written_files_at_any_depth_are_removed_by_the_next_attempt(tmp_path, tiny_run):
    config, directory = run_of(tmp_path, tiny_run)
    assert train(config, StopAfter(3)) == INTERRUPTED
    torn = [directory.path / ".plan.json.0123abcd.partial", directory.attempt(1).path / ".attempt.json.0.partial"]
    for path in torn:
        path.write_text("{")
    assert train(config) == DONE
    assert not any(path.exists() for path in torn)
    assert read_json(directory.record)["checksum"] and json.loads(directory.plan.read_text())["checksum"]
