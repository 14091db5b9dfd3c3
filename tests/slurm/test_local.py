"""Runs on this machine have the directories and rules of a cluster, and Ctrl-C leaves no process behind."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import psutil
import pytest

from embedscale.errors import FAILED
from embedscale.files import read_json
from embedscale.run.config import RunConfig
from embedscale.run.directory import RunDirectory
from embedscale.run.stop import StopRequest
from slurm import grid
from slurm.scheduler.local import places
from slurm.scheduler.processes import (
    ATTEMPTS,
    POLL_SECONDS,
    Place,
    import_everything,
    next_attempt,
    run_all,
    stalled,
)

two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs side by side take two cores")


def checkpoints(directory: RunDirectory) -> bool:
    return any(directory.checkpoints.glob("step-*.pt"))


def sweep_of(laptop, name, budget, seeds):
    base = {"resources.checkpoint_minutes": 0, "resources.log_every": 1}
    axes = {"budget": [budget], "training.seed": seeds}
    return laptop.write(name, base=base, axes=axes, methods=[{"name": "lora", "rank": 4}], cluster={"max_gpus": 2})


@two_cores
@pytest.mark.slow
def test_interrupted_and_killed_runs_end_with_the_same_bits(laptop, until, same):
    whole = sweep_of(laptop, "whole", 1.5e10, [0, 1])
    assert "2 done" in laptop.sweep("submit", whole, "--to", "here")
    broken = sweep_of(laptop, "broken", 1.5e10, [0, 1])

    first = laptop.start("submit", broken, "--to", "here")
    held = {}

    def both_held():
        for directory in laptop.directories("broken"):
            if checkpoints(directory) and directory.path not in held:
                held[directory.path] = laptop.hold(directory)
        return len(held) == 2

    until(both_held)
    children = psutil.Process(first.pid).children()
    first.send_signal(signal.SIGINT)
    time.sleep(2 * POLL_SECONDS)  # until the parent passes the signal on
    for pid in held.values():
        os.kill(pid, signal.SIGCONT)
    output = first.communicate(timeout=240)[0]
    assert first.returncode == 75, output
    assert "2 interrupted" in output
    assert not any(child.is_running() for child in children)
    assert "2 interrupted; 2 to submit" in laptop.sweep(
        "submit", broken, "--to", "here", "--max-gpu-hours", "0", code=2
    )

    second = laptop.start("submit", broken, "--to", "here")
    directory = laptop.directories("broken")[0]
    pid = until(lambda: directory.lease.exists() and json.loads(directory.lease.read_text())["pid"], 240)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(directory.read_attempts()) == 3, 240)
    pid = laptop.hold(directory)
    assert "1 process on this machine" in laptop.sweep("cancel", broken, "--yes")
    time.sleep(2 * POLL_SECONDS)
    os.kill(pid, signal.SIGCONT)
    output = second.communicate(timeout=240)[0]
    assert second.returncode == 75 and "stopped by SIGTERM" in output, output
    assert "was killed; it is tried again" in output
    assert "2 done" in laptop.sweep("submit", broken, "--to", "here")
    assert [a.ended for a in directory.read_attempts()] == [
        "interrupted",
        "killed",
        "interrupted",
        "done",
    ]
    reasons = [a.reason for a in directory.read_attempts()]
    assert reasons == ["SIGINT", "killed by SIGKILL", "SIGTERM", None]
    for directory in laptop.directories("broken"):
        assert same(directory) == same(RunDirectory(laptop.folder / "runs" / "whole" / directory.path.name))
    assert "2 done; 0 to submit" in laptop.sweep("submit", broken, "--to", "here")


@pytest.mark.slow
def test_runs_that_were_never_started_are_not_called_interrupted(laptop, until):
    axes = {"budget": [1.5e10], "training.seed": [0, 1, 2]}
    sweep = laptop.write("stopped", base={}, axes=axes, methods=["full"], cluster={"max_gpus": 1})
    process = laptop.start("submit", sweep, "--to", "here")
    until(lambda: laptop.directories("stopped"))
    process.send_signal(signal.SIGINT)
    assert "1 interrupted, 2 not started" in process.communicate(timeout=240)[0]
    assert process.returncode == 75


def attempt(directory, ended, **facts):
    directory.begin_attempt().end(ended, **facts)


def test_ten_attempts_without_a_new_checkpoint_are_a_failure(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.checkpoints.mkdir()
    for _ in range(ATTEMPTS - 1):
        attempt(directory, "killed", from_step=4)
        assert not stalled(directory)
    (directory.checkpoints / "step-000000004.pt").touch()
    for _ in range(ATTEMPTS):
        attempt(directory, "interrupted", from_step=4)
    assert not stalled(directory), "whoever interrupts a run at a desk says nothing of the run"
    with monkeypatch.context() as job:
        job.setenv("SLURM_JOB_ID", "7")
        for _ in range(ATTEMPTS):
            attempt(directory, "interrupted", from_step=4)
    assert stalled(directory)
    (directory.checkpoints / "step-000000005.pt").touch()
    assert not stalled(directory)
    attempt(directory, "killed", from_step=5)
    for _ in range(ATTEMPTS - 2):
        attempt(directory, "killed")  # killed before it wrote its step
    assert not stalled(directory), "the first of them made a checkpoint"
    attempt(directory, "killed", from_step=5)
    assert stalled(directory)
    attempt(directory, "failed")
    assert not stalled(directory), "a retry counts anew"


def test_a_run_that_crashes_before_its_attempt_has_failed_and_not_never_begun(laptop, backbone_folder):
    """No process of the run could write down what transformers raised; the sweep's next submit must not repeat it."""
    model = laptop.folder / "wrong"
    shutil.copytree(backbone_folder, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "unheard"}))
    sweep = laptop.write("crash", base={"backbone.name": str(model)}, axes={"budget": [1e9]}, methods=["full"])
    assert "1 failed" in laptop.sweep("submit", sweep, "--to", "here", code=1)
    (directory,) = laptop.directories("crash")
    (only,) = directory.read_attempts()
    assert only.ended == "failed" and "unheard" in only.reason
    assert "unheard" in directory.attempt(1).traceback.read_text()
    assert "1 failed; 0 to submit" in laptop.sweep("submit", sweep, "--to", "here")


def test_a_run_that_stalls_or_cannot_begin_fails_with_a_reason(laptop):
    broken = laptop.write(
        "nostore",
        base={"data.store": str(laptop.folder / "store")},
        axes={"budget": [1e9]},
        methods=["full"],
        expected_pairs=10**6,
    )
    output = laptop.sweep("submit", broken, "--to", "here", code=1)
    assert "1 failed" in output
    (directory,) = laptop.directories("nostore")
    (only,) = directory.read_attempts()
    assert only.ended == "failed" and str(laptop.folder / "store") in only.reason
    assert "1 failed; 0 to submit" in laptop.sweep("submit", broken, "--to", "here")
    assert "1 failed; 1 to submit" in laptop.sweep("submit", broken, "--to", "here", "--retry-failed", code=1)
    for _ in range(ATTEMPTS):
        attempt(directory, "killed", from_step=0, reason="out of memory")
    laptop.sweep("submit", broken, "--to", "here", code=1)
    reason = directory.read_attempts()[-1].reason
    assert reason.startswith("10 attempts without a new checkpoint") and reason.endswith("out of memory")


@two_cores
def test_runs_on_other_cores_share_the_memory(laptop):
    """A process holds 0.25 to 0.5 GB before its first step; the whole batch would take another GB."""
    laptop.environment["SLURM_MEM_PER_NODE"] = "2100"
    for name, seeds in {"alone": [0], "beside": [0, 1]}.items():
        axes = {"budget": [2e10], "training.seed": seeds}
        file = {"base": {"training.batch_size": 512}, "axes": axes, "methods": ["full"], "cluster": {"max_gpus": 2}}
        assert f"{len(seeds)} done" in laptop.sweep("submit", laptop.write(name, **file), "--to", "here")
    (alone,) = laptop.directories("alone")
    assert read_json(alone.plan)["chunk_tokens"] is None
    chunks = [read_json(each.plan)["chunk_tokens"] for each in laptop.directories("beside")]
    assert len(chunks) == 2 and None not in chunks
    for each in laptop.directories("beside"):  # each run has its own cores, so its hours are not divided
        record = each.read_record()
        assert record.gpu_hours == pytest.approx(record.wall_seconds / 3600, abs=1e-4)


@pytest.mark.parametrize(
    ("devices", "threads", "most", "count"),
    [(1, 1, 99, 8), (1, 4, 99, 2), (2, 2, 99, 2), (1, 16, 99, 1), (1, 1, 3, 3)],
)
def test_runs_at_the_same_time_divide_the_cores(devices, threads, most, count):
    found = places([], 8, 1, devices, threads, most)
    assert [(len(each.processes), each.threads, each.beside) for each in found] == [(devices, threads, count)] * count
    found = places(["0", "2", "4", "5"], 8, 1, devices, threads, 99)
    gpus = [each.processes[0]["CUDA_VISIBLE_DEVICES"] for each in found]
    assert gpus == (["0,2", "4,5"] if devices == 2 else ["0", "2", "4", "5"])


def test_tasks_of_a_job_agree_on_the_attempt_in_any_order(tmp_path):
    directory = RunDirectory(tmp_path)
    assert [next_attempt(directory, task) for task in (0, 1)] == [1, 1]
    directory.begin_attempt()
    assert next_attempt(directory, 1) == 1, "the first task was faster"
    (directory.attempts / "1.rank1.log").touch()
    assert [next_attempt(directory, task) for task in (0, 1)] == [2, 2]


def test_nine_hard_kills_before_the_first_checkpoint_fail_no_run(laptop):
    sweep = laptop.write("killed", axes={"budget": [1e9]}, methods=["full"])
    (run,) = grid.load(sweep).runs
    directory = RunDirectory(run.folder)
    for _ in range(9):
        attempt(directory, "killed", reason="killed by SIGKILL")
    assert "1 done" in laptop.sweep("submit", sweep, "--to", "here")


TWO = Place([{"RANK": "0"}, {"RANK": "1"}])


def hang(*attempt):
    time.sleep(120)


def fail(*attempt):
    raise ZeroDivisionError


def crash(*attempt):
    os.kill(os.getpid(), signal.SIGKILL)


def note(reason, after=0.0):
    """Return a first process that ends its attempt as failed."""

    def first(attempt):
        time.sleep(after)
        attempt.end("failed", reason=reason)

    return first


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (note("no memory"), hang, [("failed", "no memory")]),
        (
            note("connection closed", after=0.3),
            crash,
            [("killed", "process 1 killed by SIGKILL")] * ATTEMPTS
            + [("failed", "10 attempts without a new checkpoint; last reason: process 1 killed by SIGKILL")],
        ),
        (hang, fail, [("failed", "process 1 failed; see {attempts}/1.rank1.log")]),
        (note("connection closed", after=0.3), fail, [("failed", "connection closed")]),
    ],
    ids=["hangs", "is-killed", "fails-alone", "fails-first"],
)
def test_a_run_ends_by_what_its_second_process_did(tmp_path, monkeypatch, first, second, expected):
    run = RunConfig(output=str(tmp_path))
    directory = RunDirectory(run.folder)

    def train(*settings):
        """Do what the processes of a run do in place of training."""
        if os.environ["RANK"] == "0":
            first(directory.begin_attempt())
        else:
            while not directory.open_attempts():
                time.sleep(0.01)
            second()
        return FAILED

    monkeypatch.setattr("embedscale.training.train.train", train)
    monkeypatch.setattr("slurm.scheduler.processes.FAREWELL_SECONDS", 1)
    import_everything()
    assert run_all([run], [TWO], StopRequest(time.time() + 60)) == {run.run_id: "failed"}
    expected = [(ended, reason.format(attempts=directory.attempts)) for ended, reason in expected]
    assert [(attempt.ended, attempt.reason) for attempt in directory.read_attempts()] == expected


def test_no_process_of_a_run_stays_where_the_machine_takes_no_more(tmp_path, monkeypatch, capsys):
    fork, forked = os.fork, []

    def one_fork():
        if forked:
            raise OSError(errno.EAGAIN, "no more processes")
        forked.append(fork())
        return forked[0]

    import_everything()
    monkeypatch.setattr("embedscale.training.train.train", hang)
    monkeypatch.setattr(os, "fork", one_fork)
    run = RunConfig(output=str(tmp_path))
    assert run_all([run], [TWO], StopRequest()) == {run.run_id: "failed"}
    assert "no more processes" in capsys.readouterr().out
    assert forked and not multiprocessing.active_children()
