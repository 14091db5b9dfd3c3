"""Runs that are stopped, killed, taken over or damaged and then resumed give the result of an undisturbed run."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from command import Command
from training_runs import StopAfter, comparable, run_of

from embedscale.errors import DONE, FAILED, INTERRUPTED, WRONG
from embedscale.files import read_json
from embedscale.run.directory import RunDirectory
from embedscale.run.settings import load
from embedscale.run.stop import StopRequest
from embedscale.training.train import train


def test_stops_at_every_step_do_not_change_the_result(tmp_path, tiny_run):
    words = ["method.name=lora", "method.rank=2", "method.dropout=0.2", "resources.log_every=3"]
    config, whole = run_of(tmp_path / "a", tiny_run, *words)
    assert train(config) == DONE
    config, directory = run_of(tmp_path / "b", tiny_run, *words, "resources.chunk_tokens=100000")
    codes = []
    while not codes or codes[-1] != DONE:
        codes.append(train(config, StopAfter(2 + len(codes) % 3)))
    assert set(codes) == {INTERRUPTED, DONE} and len(codes) > 5
    assert comparable(directory) == comparable(whole)
    ended = [attempt.ended for attempt in directory.read_record().attempts]
    assert ended == ["interrupted"] * (len(codes) - 1) + ["done"]


def test_after_a_stop_in_the_last_evaluation_only_the_evaluation_is_left(tmp_path, tiny_run, capsys):
    config, whole = run_of(tmp_path / "a", tiny_run)
    assert train(config) == DONE
    config, directory = run_of(tmp_path / "b", tiny_run)
    steps = whole.read_record().steps
    too_few, too_many = 0, 4 * steps  # looks at the flag: some in each step, some in the evaluation
    while True:
        looks = (too_few + too_many) // 2
        shutil.rmtree(directory.path, ignore_errors=True)
        if train(config, StopAfter(looks)) == DONE:
            too_many = looks
        elif directory.read_attempts()[-1].to_step < steps:
            too_few = looks
        else:
            break
    assert not directory.record.exists()
    capsys.readouterr()
    assert train(config, StopAfter(0)) == INTERRUPTED
    assert f"{config.run_id}: interrupted (test) at step {steps}" in capsys.readouterr().out
    assert train(config) == DONE
    assert f"{config.run_id} is done: held-out loss" in capsys.readouterr().out
    assert directory.read_attempts()[-1].from_step == steps
    assert comparable(directory) == comparable(whole)


class FailsAtTheEnd(StopRequest):
    """A stop request that raises an error at the first look after the last checkpoint, in the last evaluation."""

    def __init__(self, directory, steps):
        super().__init__()
        self.directory, self.steps = directory, steps

    @property
    def requested(self):
        if self.directory.newest_step == self.steps:
            raise ZeroDivisionError
        return False


def test_an_evaluation_that_fails_at_the_end_loses_no_step(tmp_path, tiny_run):
    config, whole = run_of(tmp_path / "a", tiny_run, "evaluation.at=[]")
    assert train(config) == DONE
    config, directory = run_of(tmp_path / "b", tiny_run, "evaluation.at=[]")
    assert train(config, FailsAtTheEnd(directory, whole.read_record().steps)) == FAILED
    assert directory.read_attempts()[-1].reason == "ZeroDivisionError: "
    assert train(config) == DONE
    assert directory.read_attempts()[-1].from_step == whole.read_record().steps
    assert comparable(directory) == comparable(whole)


def test_a_second_ctrl_c_ends_a_run_at_once_and_prints_it(tmp_path, tiny_run, capsys):
    class Impatient(StopRequest):
        """A stop request that is made twice, at the third look."""

        looks = 0

        @property
        def requested(self):
            self.looks += 1
            if self.looks == 3:
                self.on_signals([signal.SIGINT])
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
            return self.reason is not None

    config, directory = run_of(tmp_path, tiny_run)
    assert train(config, Impatient()) == INTERRUPTED
    assert f"{config.run_id}: interrupted (SIGINT) at step" in capsys.readouterr().out
    assert directory.read_attempts()[-1].reason == "SIGINT"


def test_a_stopped_run_prints_a_line_and_no_empty_one(tmp_path, tiny_run, capsys):
    config, _ = run_of(tmp_path, tiny_run)
    assert train(config, StopAfter(3)) == INTERRUPTED
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines() == [said.out.strip()]


class LosesTheLease(StopRequest):
    """At the n-th look, another process has taken over the run, as after a suspension."""

    def __init__(self, directory, looks):
        super().__init__()
        self.directory, self.looks = directory, looks

    @property
    def requested(self):
        self.looks -= 1
        if self.looks == 0:
            self.directory.lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "another's"}))
            self.then = everything(self.directory)
        return self.reason is not None


def everything(directory):
    files = [path for path in directory.path.rglob("*") if path.is_file() and path.name != "attempt.json"]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("before_the_end", [False, True])
def test_a_run_that_lost_its_lease_stops_and_writes_nothing_more(tmp_path, tiny_run, before_the_end):
    words = ["resources.checkpoint_minutes=0", "resources.log_every=1"]
    config, whole = run_of(tmp_path / "a", tiny_run, *words)
    assert train(config) == DONE
    config, directory = run_of(tmp_path / "b", tiny_run, *words)
    stop = LosesTheLease(directory, 10**9)
    if before_the_end:  # one look before the end of the last step
        assert train(config, stop) == DONE
        stop = LosesTheLease(directory, 10**9 - stop.looks - 1)
        shutil.rmtree(directory.path)
    else:
        stop = LosesTheLease(directory, 9)
    assert train(config, stop) == INTERRUPTED
    assert everything(directory) == stop.then
    (attempt,) = directory.read_attempts()
    assert (attempt.ended, attempt.reason) == ("interrupted", "another process has taken this run over")
    directory.lease.unlink()
    assert train(config) == DONE
    assert comparable(directory) == comparable(whole)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, tiny_run, capsys):
    words = ["resources.checkpoint_minutes=0", "resources.log_every=1"]
    config, whole = run_of(tmp_path / "a", tiny_run, *words)
    assert train(config) == DONE
    config, directory = run_of(tmp_path / "b", tiny_run, *words)
    assert train(config, StopAfter(9)) == INTERRUPTED
    assert "goes on from" not in capsys.readouterr().out
    older, newest = sorted(directory.checkpoints.iterdir())
    newest.write_bytes(newest.read_bytes()[:-2000])
    assert train(config) == DONE
    said, step = capsys.readouterr(), int(older.stem.split("-")[1])
    assert f"{newest} is damaged" in said.err
    assert f"{config.run_id}: goes on from step {step} ({older})\n" in said.out
    assert directory.read_attempts()[-1].from_step == step
    assert comparable(directory) == comparable(whole)


def test_torn_files_of_a_dead_node_are_removed(tmp_path, tiny_run):
    """Half a checkpoint, and pages of the metrics after the last checkpoint that never reached the disk."""
    config, whole = run_of(tmp_path / "a", tiny_run, "resources.log_every=1")
    assert train(config) == DONE
    config, directory = run_of(tmp_path / "b", tiny_run, "resources.log_every=1")
    assert train(config, StopAfter(9)) == INTERRUPTED
    torn = directory.checkpoints / ".step-000000012.pt.0123abcd.partial"
    torn.write_bytes(bytes(1000))
    with directory.metrics.open("ab") as file:
        file.write(bytes(200) + b'\xff": 0.5}\n{"step": 11, "loss": 0.1}\n{"step": 12, "lo')
    assert train(config, StopAfter(1)) == INTERRUPTED
    assert not torn.exists()
    assert train(config) == DONE
    assert comparable(directory) == comparable(whole)


def test_metrics_are_on_disk_before_the_checkpoint_of_their_steps(tmp_path, tiny_run, monkeypatch):
    """A power cut must not lose rows of steps that a resumed run does not repeat."""
    config, directory = run_of(tmp_path, tiny_run, "resources.checkpoint_minutes=0", "resources.log_every=1")
    secured, fsync, save = [], os.fsync, torch.save

    def note(number):
        fsync(number)
        if Path(f"/proc/self/fd/{number}").readlink() == directory.metrics:
            secured.append(max(row.step for row in directory.read_metrics()))

    def check(state, file):
        assert secured[-1] == state["step"]
        save(state, file)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(torch, "save", check)
    assert train(config) == DONE
    assert len(secured) > 20


def test_the_second_process_of_a_run_stops_and_changes_nothing(server, tmp_path, tiny_run):
    words = [*tiny_run, f"output={tmp_path / 'runs'}", "budget=1e12", "data.repeat=true"]
    config = load(None, words)
    directory = RunDirectory(config.folder)
    first = Command(server, ["train", *words], dict(os.environ), tmp_path)
    try:
        while not directory.read_metrics():
            assert first.returncode is None
            time.sleep(0.05)
        token = read_json(directory.lease)["token"]
        attempts = sorted(directory.attempts.glob("*"))
        second = Command(server, ["train", *words], dict(os.environ), tmp_path)
        said, _ = second.communicate(timeout=120)
        assert second.returncode == WRONG
        assert "another process is already at work here" in said and len(said.strip().splitlines()) == 1
        assert sorted(directory.attempts.glob("*")) == attempts
        assert read_json(directory.lease)["token"] == token and first.returncode is None
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=120)
    assert first.returncode == INTERRUPTED and not directory.lease.exists()
