"""Runs of several processes, with copies of the model or sharded weights, train like one process."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import BUDGET, comparable

from embedscale.data.store import PairStore
from embedscale.errors import DONE, FAILED, INTERRUPTED
from embedscale.run.directory import RunDirectory
from embedscale.run.families import shape_by_name
from embedscale.run.settings import load
from embedscale.training import callbacks
from embedscale.training.batches import Batches
from embedscale.training.plan import plan_run
from embedscale.training.train import train
from slurm.scheduler.processes import rank_environment


def command(config_words, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "embedscale.cli", "train", *config_words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _rank(words, environment, output, spoil):
    os.environ.update(environment)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if environment["RANK"] == "1":
        spoil()
    os._exit(train(load(None, words)))


def nothing():
    pass


def on_two_ranks(server, words, code=DONE, spoil=nothing):
    """Train a run with two processes, as a job launches it; the second one calls `spoil` first.

    Returns the directory, and what each process wrote to its standard error.
    """
    directory = RunDirectory(load(None, words).folder)
    directory.path.parent.mkdir(parents=True, exist_ok=True)
    outputs = [directory.path.parent / f"rank{rank}.txt" for rank in (0, 1)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = [rank_environment(rank, 2, rank, 2, 0, "127.0.0.1", free.getsockname()[1]) for rank in (0, 1)]
    processes = [
        server.Process(target=_rank, args=(words, place, str(output), spoil))
        for place, output in zip(places, outputs, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [code, code]
    return directory, [output.read_text() for output in outputs]


ALONE = ["budget=5e9", "resources.checkpoint_minutes=0", "data.repeat=true", "training.clip=1.0"]


TOGETHER = [*ALONE, "resources.devices=2", "resources.chunk_tokens=200"]


@pytest.fixture(scope="module")
def copies(server, tmp_path_factory, tiny_run):
    """A run on two ranks that each have the whole model, without an interruption."""
    return on_two_ranks(server, [*tiny_run, *TOGETHER, f"output={tmp_path_factory.mktemp('copies')}"])[0]


def stop_after_three_steps(words):
    """Launch a run by the command, and end it by SIGTERM when it has made three steps."""
    directory = RunDirectory(load(None, words).folder)
    process = command(words)
    while not list(directory.checkpoints.glob("step-*[3-9].pt")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED


@pytest.mark.parametrize("how", [[], ["resources.shard=true"]], ids=["copies", "shards"])
def test_two_processes_train_like_one_and_resume(server, tmp_path, tiny_run, copies, how):
    """Two gloo ranks, launched by the command, stopped by SIGTERM and resumed by a job, equal an undisturbed run.

    Copies of the model are compared with one process, and shards with copies.
    """
    words = [*tiny_run, *TOGETHER, *how, f"output={tmp_path / 'stopped'}"]
    stop_after_three_steps(words)
    directory, _ = on_two_ranks(server, words)
    two = directory.read_record()
    assert [a.ended for a in two.attempts] == ["interrupted", "done"]
    if how:
        whole, _ = on_two_ranks(server, [*tiny_run, *TOGETHER, *how, f"output={tmp_path / 'whole'}"])
        assert comparable(directory) == comparable(whole)
        shards, plain = (load_file(each.model / "trainable.safetensors") for each in (directory, copies))
        assert shards.keys() == plain.keys()
        for name, weight in plain.items():
            torch.testing.assert_close(shards[name], weight, rtol=0, atol=3e-4)  # a tenth of a step's change
        assert two.loss == pytest.approx(copies.read_record().loss, rel=1e-3)
        return
    assert comparable(directory) == comparable(copies)
    words = [*tiny_run, *ALONE, f"output={tmp_path / 'one'}"]
    alone = RunDirectory(load(None, words).folder)
    assert train(load(None, words)) == DONE
    one = alone.read_record()
    assert two.spent_flop <= one.spent_flop <= 5e9 and two.device.count == 2
    assert two.pairs == one.pairs - one.pairs % 2
    assert two.loss == pytest.approx(one.loss, rel=0.02)
    rows = [{r.step: r.train_loss for r in d.read_metrics() if r.train_loss is not None} for d in (alone, directory)]
    assert rows[1][10] == pytest.approx(rows[0][10], rel=1e-3)


@pytest.mark.parametrize("chunk_tokens", [None, 50])
def test_sharded_ranks_have_equally_many_chunks(tiny_run, chunk_tokens):
    """The sequences are those of an unsharded run, and no chunk is larger."""
    words, numbers = [*tiny_run, BUDGET, "resources.devices=4", "loss.hard_negatives=1"], []
    store = PairStore.open(load(None, words).data.store)
    configs = [load(None, [*words, f"resources.shard={shard}"]) for shard in ("false", "true")]
    plan = plan_run(configs[0], shape_by_name(configs[0].backbone.name), store)
    for step in range(plan.steps):
        plain, shards = (
            [Batches(store, plan, config, chunk_tokens, rank)[step] for rank in range(4)] for config in configs
        )
        numbers.append([len(batch.chunks) for batch in plain])
        assert {len(batch.chunks) for batch in shards} == {max(numbers[-1])}
        for one, other in zip(plain, shards, strict=True):
            assert max(len(c.tokens) for c in other.chunks) <= max(len(c.tokens) for c in one.chunks)
            found = [
                sorted(p.tolist() for c in b.chunks for p in c.tokens.split(c.lengths.tolist())) for b in (one, other)
            ]
            assert found[0] == found[1]
            assert torch.equal(one.texts, other.texts)
    assert chunk_tokens is None or any(len(set(each)) > 1 for each in numbers)


def hide_the_newest_checkpoint():
    every = RunDirectory.checkpoint_paths
    RunDirectory.checkpoint_paths = lambda directory: every(directory)[:-1]


def test_processes_that_find_different_checkpoints_fail_with_the_same_line(server, tmp_path, tiny_run):
    """A node may not see yet what another one has just written on a shared file system."""
    words = [*tiny_run, *TOGETHER, f"output={tmp_path}"]
    stop_after_three_steps(words)
    directory = RunDirectory(load(None, words).folder)
    older, newest = (int(path.stem.split("-")[1]) for path in directory.checkpoint_paths())
    _, said = on_two_ranks(server, words, FAILED, hide_the_newest_checkpoint)
    expected = f"different checkpoints, after step {older} and after step {newest}; run it again when"
    assert [sum(expected in line for line in text.splitlines()) for text in said] == [1, 1]
    assert expected in directory.read_attempts()[-1].reason


def fail_in_the_third_step():
    def refuse(run, batch):
        if run.module.step == 2:
            raise ZeroDivisionError

    callbacks.refuse_overspending = refuse


def test_an_error_of_the_second_process_is_told(server, tmp_path, tiny_run):
    directory, said = on_two_ranks(server, [*tiny_run, *TOGETHER, f"output={tmp_path}"], FAILED, fail_in_the_third_step)
    assert "ZeroDivisionError" in said[1] and "in refuse" in said[1]
    (attempt,) = directory.read_attempts()
    assert attempt.ended == "failed" and "ZeroDivisionError" not in attempt.reason


def look_for_the_record_at_the_end():
    folder, leave = Path("/proc/self/fd/2").readlink().parent, os._exit

    def look(code):
        print(len(list(folder.glob("*/record.json"))), "records", file=sys.stderr, flush=True)
        leave(code)

    os._exit = look


def test_the_second_process_waits_for_the_record_of_the_first(server, tmp_path, tiny_run):
    """Otherwise `run_all` would kill the first process while it writes the weights of a large model."""
    words = [*tiny_run, *TOGETHER, "budget=1e9", f"output={tmp_path}"]
    _, said = on_two_ranks(server, words, spoil=look_for_the_record_at_the_end)
    assert said[1] == "1 records\n"
