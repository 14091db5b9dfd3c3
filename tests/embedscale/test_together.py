"""Runs of several processes, with copies of the model or sharded weights, train like one process."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from training_runs import BUDGET, comparable

from embedscale.data.store import PairStore
from embedscale.errors import DONE, INTERRUPTED
from embedscale.run.directory import RunDirectory
from embedscale.run.families import shape_by_name
from embedscale.run.settings import load
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


def _rank(words, environment):
    os.environ.update(environment)
    os._exit(train(load(None, words)))


def on_two_ranks(server, words):
    """Train a run with two processes, as a job launches it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = [rank_environment(rank, 2, rank, 2, 0, "127.0.0.1", free.getsockname()[1]) for rank in (0, 1)]
    processes = [server.Process(target=_rank, args=(words, place)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [DONE, DONE]
    return RunDirectory(load(None, words).folder)


ALONE = ["budget=1e10", "resources.checkpoint_minutes=0", "data.repeat=true", "training.clip=1.0"]


TOGETHER = [*ALONE, "resources.devices=2", "resources.chunk_tokens=200"]


@pytest.fixture(scope="module")
def copies(server, tmp_path_factory, tiny_run):
    """A run on two ranks that each have the whole model, without an interruption."""
    return on_two_ranks(server, [*tiny_run, *TOGETHER, f"output={tmp_path_factory.mktemp('copies')}"])


@pytest.mark.parametrize("how", [[], ["resources.shard=true"]], ids=["copies", "shards"])
def test_two_processes_train_like_one_and_resume(server, tmp_path, tiny_run, copies, how):
    """Two gloo ranks, launched by the command, stopped by SIGTERM and resumed by a job, equal an undisturbed run.

    Copies of the model are compared with one process, and shards with copies.
    """
    words = [*tiny_run, *TOGETHER, *how, f"output={tmp_path / 'stopped'}"]
    directory = RunDirectory(load(None, words).folder)
    first = command(words)
    while not list(directory.checkpoints.glob("step-*[3-9].pt")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    first.terminate()
    first.communicate(timeout=120)
    assert first.returncode == INTERRUPTED
    assert on_two_ranks(server, words).path == directory.path
    two = directory.read_record()
    assert [a.ended for a in two.attempts] == ["interrupted", "done"]
    if how:
        whole = on_two_ranks(server, [*tiny_run, *TOGETHER, *how, f"output={tmp_path / 'whole'}"])
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
    assert two.spent_flop <= one.spent_flop <= 1e10 and two.device.count == 2
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
