"""Whole runs through the real Trainer: the budget to the FLOP, the record, resume, refusals."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Command
from safetensors.torch import load_file
from transformers import AutoModel

from embedscale import cli
from embedscale.data.store import PairStore
from embedscale.errors import DONE, FAILED, INTERRUPTED, WRONG
from embedscale.files import read_json
from embedscale.run.cost import cost_of
from embedscale.run.directory import RunDirectory
from embedscale.run.families import shape_by_name
from embedscale.run.settings import load
from embedscale.run.stop import StopRequest
from embedscale.training.batches import Batches
from embedscale.training.plan import plan_run
from embedscale.training.train import train
from slurm.scheduler.processes import rank_environment

METHODS = {
    "full": ["method.name=full"],
    "freeze": ["method.name=freeze", "method.active_fraction=0.5"],
    "bias": ["method.name=bias"],
    "lora": ["method.name=lora", "method.rank=4"],
}
BUDGET = "budget=5e9"


def run_of(tmp_path, tiny_run, *words):
    config = load(None, [*tiny_run, f"output={tmp_path / 'runs'}", BUDGET, *words])
    return config, RunDirectory(config.folder)


@pytest.mark.parametrize("name", METHODS)
def test_spends_the_budget_to_the_pair_and_records_it(tmp_path, tiny_run, name):
    config, directory = run_of(tmp_path, tiny_run, "backbone.revision=step1000", *METHODS[name])
    assert train(config) == DONE
    record = directory.read_record()
    assert record.status == "done" and record.run_id == config.run_id and record.method == name
    assert record.backbone_revision == "step1000"

    # Recounted from the batches themselves, pair by pair.
    store, plan = PairStore.open(config.data.store), json.loads(directory.plan.read_text())["plan"]
    tokens = 0
    for step in range(plan["steps"]):
        start = plan["first_pair"] + step * 16
        batch = store.batch(start, min(start + 16, plan["first_pair"] + plan["pairs"]))
        assert batch.lengths.sum() == len(batch.tokens)
        tokens += len(batch.tokens)
    following = len(store.batch(plan["first_pair"] + plan["pairs"], plan["first_pair"] + plan["pairs"] + 1).tokens)
    cost = cost_of(shape_by_name(config.backbone.name), config.method)
    price = cost.flop_per_token
    assert record.tokens == tokens and record.spent_flop == tokens * price
    assert config.budget - following * price < record.spent_flop <= config.budget
    assert record.flop_per_token == price == 2 * (record.n_forward + record.n_backward + record.n_updated)
    assert record.spent_flop_exact > 0.9 * record.spent_flop
    assert record.pairs == plan["pairs"] and record.steps == plan["steps"]

    rows = directory.read_metrics()
    evaluations = [row for row in rows if row.loss is not None]
    assert [row.step for row in evaluations] == sorted({math.ceil(f * plan["steps"]) for f in (0.25, 0.5, 0.75, 1)})
    assert evaluations[-1].loss == record.loss < math.log(32)
    assert rows[-1].spent_flop == record.spent_flop
    assert record.attempts[0].ended == "done"
    for key in ("data_digest", "seed", "versions", "code", "device", "evaluation", "train_loss", "recall_at_10"):
        assert getattr(record, key) is not None
    assert not directory.checkpoints.exists() and not directory.lease.exists()


def test_a_run_is_the_plain_loop(tmp_path, tiny_run):
    """Sequence by sequence through transformers, torch's AdamW, and formulas written out."""
    words = ["training.weight_decay=0.3", "training.clip=20.0", "training.warmup_fraction=0.2", "loss.temperature=0.1"]
    config, directory = run_of(tmp_path, tiny_run, *words, "training.final_fraction=0.1", "resources.log_every=1")
    assert train(config) == DONE
    rows = [row for row in directory.read_metrics() if row.train_loss is not None]
    store, plan = PairStore.open(config.data.store), json.loads(directory.plan.read_text())["plan"]
    body = AutoModel.from_pretrained(config.backbone.name, dtype=torch.float32)
    begun = {name: weight.detach().clone() for name, weight in body.named_parameters()}
    optimizer = torch.optim.AdamW(body.parameters(), weight_decay=0.3)
    steps, norms = plan["steps"], []
    warm = math.ceil(0.2 * steps)
    for step in range(steps):
        start = plan["first_pair"] + 16 * step
        batch = store.batch(start, min(start + 16, plan["first_pair"] + plan["pairs"]))
        texts = torch.from_numpy(batch.tokens).long().split(batch.lengths.tolist())
        vectors = torch.cat([body(text[None]).last_hidden_state.mean(1) for text in texts])
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        scores = vectors[: batch.pairs] @ vectors[batch.pairs :].T / 0.1
        loss = -(scores.log_softmax(0).diagonal() + scores.log_softmax(1).diagonal()).mean() / 2
        assert rows[step].train_loss == pytest.approx(loss.item(), rel=1e-3), step
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(body.parameters(), 20.0)))
        cosine = (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        optimizer.param_groups[0]["lr"] = 0.003 * ((step + 1) / warm if step < warm else 0.1 + 0.9 * cosine)
        assert rows[step].learning_rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
    assert min(norms) < 20 < max(norms), norms
    trained = load_file(directory.model / "trainable.safetensors")
    assert trained.keys() == dict(body.named_parameters()).keys()
    timed = sum(row.tokens_per_second * row.seconds for row in rows)
    assert timed == pytest.approx(plan["tokens"], rel=0.1)
    for name, weight in body.named_parameters():
        if not name.endswith("query_key_value.bias"):  # a key's changes no attention: Adam goes by its rounding
            assert (trained[name] - weight).norm() < 1e-3 * (weight - begun[name]).norm(), name
    found = []
    for group in range(2):  # of 64 pairs, each among 31 negatives
        batch = store.held_out_batch(32 * group, 32 * group + 32)
        with torch.no_grad():
            texts = torch.from_numpy(batch.tokens).long().split(batch.lengths.tolist())
            vectors = torch.cat([body(text[None]).last_hidden_state.mean(1) for text in texts])
        scores = torch.cosine_similarity(vectors[:32, None], vectors[None, 32:], dim=2)
        logits = scores / config.evaluation.temperature
        loss = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()).mean() / 2
        better = (scores >= scores.diagonal()[:, None]).sum(1)
        found.append([loss.item(), (better <= 1).double().mean().item(), (better <= 10).double().mean().item()])
    record = directory.read_record()
    assert record.loss == pytest.approx(np.mean(found, 0)[0], rel=0.01)
    assert [record.recall_at_1, record.recall_at_10] == pytest.approx(np.mean(found, 0)[1:], abs=2.1 / 64)


def test_a_finished_run_says_so_and_is_left_alone(tmp_path, tiny_run, capsys):
    config, directory = run_of(tmp_path, tiny_run)
    assert train(config) == DONE
    before = {path: path.stat().st_mtime_ns for path in directory.path.rglob("*")}
    assert train(config) == DONE
    assert f"{config.run_id} is done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in directory.path.rglob("*")}


def test_loss_falls_and_retrieval_rises(tmp_path, tiny_run):
    config, directory = run_of(tmp_path, tiny_run, "budget=2.5e10", "data.repeat=true", "evaluation.at=[0.02,0.5]")
    assert train(config) == DONE
    first, *_, last = (row for row in directory.read_metrics() if row.loss is not None)
    assert last.loss < 0.6 * first.loss
    assert last.recall_at_1 > first.recall_at_1 + 0.2
    assert last.recall_at_10 > first.recall_at_10
    assert directory.read_record().train_loss < 0.5 * math.log(16)


def comparable(directory: RunDirectory):
    """All that two runs of one config must have in common, times and attempts aside."""
    times = {"attempt", "tokens_per_second", "seconds"}
    metrics = [{k: v for k, v in row.to_json().items() if k not in times} for row in directory.read_metrics()]
    record = directory.read_record().to_json()
    for key in ("attempts", "wall_seconds", "gpu_hours", "code"):  # the commit may move while tests run
        record.pop(key)
    return metrics, record, (directory.model / "trainable.safetensors").read_bytes()


class StopAfter(StopRequest):
    """Raises its flag at the n-th look."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        if self.looks < 0:
            self.request("test")
        return self.reason is not None


def test_stopped_at_every_step_and_resumed_is_bit_for_bit_the_same(tmp_path, tiny_run):
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


def test_a_stop_during_the_last_evaluation_leaves_only_that_to_do(tmp_path, tiny_run, capsys):
    config, whole = run_of(tmp_path / "a", tiny_run)
    assert train(config) == DONE
    config, directory = run_of(tmp_path / "b", tiny_run)
    steps = whole.read_record().steps
    too_few, too_many = 0, 4 * steps  # looks at the flag, some in each step and some in the evaluation
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
    """Raises an error when it is looked at after the last checkpoint: in the last evaluation."""

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


def test_a_second_ctrl_c_ends_a_run_at_once_and_says_so(tmp_path, tiny_run, capsys):
    class Impatient(StopRequest):
        """Asked twice, at the third look."""

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


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_held_out_pairs_that_cannot_be_read_are_found_before_the_training(tmp_path, tiny_run, capsys, damage):
    store = tmp_path / "store"
    shutil.copytree(load(None, tiny_run).data.store, store)
    part = min((store / "held_out").glob("*.arrow"))
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-100])
    words = [*tiny_run, f"output={tmp_path / 'runs'}", BUDGET, f"data.store={store}"]
    assert cli.main(["train", *words]) == WRONG
    assert f"data.store: {part} is missing or damaged" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_hours_of_a_device_are_shared_out_attempt_by_attempt(tmp_path, tiny_run):
    config, directory = run_of(tmp_path, tiny_run)
    assert train(config, StopAfter(5), sharing=4) == INTERRUPTED
    (first,) = directory.read_attempts()
    start = datetime.fromisoformat(first["start"]) - timedelta(hours=2)
    (directory.attempts / "1" / "attempt.json").write_text(json.dumps(first | {"start": start.isoformat()}))
    assert train(config, beside=2) == DONE  # on cores of its own
    record = directory.read_record()
    assert [attempt.sharing for attempt in record.attempts] == [4, 1]
    assert record["wall_seconds"] >= 7200
    assert record["gpu_hours"] == pytest.approx((record["wall_seconds"] - 7200) / 3600 + 0.5, abs=0.01)


def test_a_stopped_run_prints_a_line_and_no_empty_one(tmp_path, tiny_run, capsys):
    config, _ = run_of(tmp_path, tiny_run)
    assert train(config, StopAfter(3)) == INTERRUPTED
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines() == [said.out.strip()]


class LosesTheLease(StopRequest):
    """At the n-th look another process has taken the run over, as one may from a process that was suspended."""

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
def test_a_run_whose_lease_is_taken_over_writes_nothing_more_and_stops(tmp_path, tiny_run, before_the_end):
    words = ["resources.checkpoint_minutes=0", "resources.log_every=1"]
    config, whole = run_of(tmp_path / "a", tiny_run, *words)
    assert train(config) == DONE
    config, directory = run_of(tmp_path / "b", tiny_run, *words)
    stop = LosesTheLease(directory, 10**9)
    if before_the_end:  # one look from the last step's end
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
    older, newest = sorted(directory.checkpoints.iterdir())
    newest.write_bytes(newest.read_bytes()[:-2000])
    assert train(config) == DONE
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert directory.read_attempts()[-1].from_step == int(older.stem.split("-")[1])
    assert comparable(directory) == comparable(whole)


def test_what_a_dead_node_left_torn_is_cleared_up(tmp_path, tiny_run):
    """Half of a checkpoint; and of the metrics, pages behind the last checkpoint that never came to the disk."""
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


def test_metrics_are_on_the_disk_before_the_checkpoint_that_they_lead_to(tmp_path, tiny_run, monkeypatch):
    """A power cut must not take the rows of steps that no resumed run goes through again."""
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


def test_a_loss_that_turns_nan_is_recorded_as_diverged(tmp_path, tiny_run, capsys):
    config, directory = run_of(tmp_path, tiny_run, "training.learning_rate=1e30", "resources.log_every=1")
    assert train(config) == FAILED
    record = directory.read_record()
    assert record.status == "diverged" and record.loss is None
    rows = directory.read_metrics()
    assert record.diverged_at_step == len(rows) + 1
    assert all(np.isfinite(row.train_loss) for row in rows if row.train_loss is not None)
    assert "diverged" in capsys.readouterr().err
    assert train(config) == FAILED and directory.read_record() == record


def test_a_last_step_that_ruins_the_weights_is_recorded_as_diverged(tmp_path, tiny_run, capsys):
    """No later loss tells of it, and similarities that are no numbers would rank every positive first."""
    config, directory = run_of(tmp_path, tiny_run, "budget=2e8", "training.learning_rate=1e30")
    assert train(config) == FAILED
    record = directory.read_record()
    assert (record.status, record.loss, record.recall_at_1) == ("diverged", None, None)
    assert record.steps == record.diverged_at_step == 1
    assert [row.step for row in directory.read_metrics() if np.isfinite(row.train_loss)] == [1]


def test_the_seed_decides_the_run(tmp_path, tiny_run):
    losses = []
    for seed in (0, 1):
        config, directory = run_of(tmp_path, tiny_run, f"training.seed={seed}")
        assert train(config) == DONE
        losses.append(directory.read_record().loss)
    assert losses[0] != losses[1]


def test_bf16_and_hard_negatives_and_loggers(tmp_path, tiny_run):
    words = ["training.precision=bf16", "loss.hard_negatives=1", "loss.mask_equal_texts=true", "training.clip=1.0"]
    config, directory = run_of(tmp_path, tiny_run, *words, "resources.loggers=[tensorboard,wandb]")
    assert train(config) == DONE
    assert list(directory.path.glob("tensorboard/**/events*")) and list(directory.path.glob("wandb/offline-run-*"))
    assert directory.read_record().spent_flop <= config.budget


def command(config_words, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "embedscale.cli", "train", *config_words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_on_one_run_the_second_stops_and_touches_nothing(server, tmp_path, tiny_run):
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


def _rank(words, environment):
    os.environ.update(environment)
    os._exit(train(load(None, words)))


def on_two_ranks(server, words):
    """A run as a node launches it, a process a rank."""
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
    """A run on two ranks, each with all of the model, left alone."""
    return on_two_ranks(server, [*tiny_run, *TOGETHER, f"output={tmp_path_factory.mktemp('copies')}"])


@pytest.mark.parametrize("how", [[], ["resources.shard=true"]], ids=["copies", "shards"])
def test_two_processes_train_as_one_and_resume(server, tmp_path, tiny_run, copies, how):
    """Two ranks over gloo, launched by the command and stopped by SIGTERM, resumed as a node does: as if left alone.
    Copies of the model against one process, shards against copies.
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
            torch.testing.assert_close(shards[name], weight, rtol=0, atol=3e-4)  # a tenth of a step
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
def test_shards_are_fed_in_as_many_chunks_on_each_rank(tiny_run, chunk_tokens):
    """The same sequences as without, in chunks that are none the larger."""
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metod.name=full"], "metod: unknown setting; did you mean 'method'"),
        (["training.learning_rat=1"], "did you mean 'training.learning_rate'"),
        (["budget=10"], "budget: 10 FLOP is too small; one pair costs"),
        (["budget=1e15"], "more than one epoch of"),
        (["budget=1e29", "data.repeat=true"], "budget: 1e+29 FLOP buy"),
        (["data.context=4000"], "data.context: 4000 is longer than pythia-tiny's; allowed: at most 256"),
        (["data.context=41"], "was prepared with 40"),
        (["data.store=/nowhere"], "/nowhere"),
        (["backbone.name=EleutherAI/pythia-13m"], "backbone.name: 'EleutherAI/pythia-13m' is neither a local folder"),
        (["method.name=adapter"], "method.name: 'adapter' is unknown"),
        (["method.name=lora", "method.rank=1000"], "method.rank: 1000 is out of range"),
        (["method.name=freeze", "method.active_fraction=0.3"], "method.active_fraction: 0.3 of 4 blocks"),
        (["training.learning_rate=null"], "training.learning_rate: no value is given"),
        (["evaluation.pool=32000"], "held-out pairs are asked for"),
        (["loss.hard_negatives=5"], "loss.hard_negatives: 5, but"),
        (["resources.shard=true"], "resources.shard: one process has nothing to share"),
        (["resources.devices=3"], "training.batch_size: 16 does not divide by 3"),
        (["resources.memory_gb=.inf"], "resources.memory_gb: inf is out of range"),
        (["evaluation.at=[0]"], "evaluation.at: 0.0 is out of range; allowed: above 0, at most 1"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(tmp_path, tiny_run, capsys, words, message):
    output = tmp_path / "runs"
    assert cli.main(["train", *tiny_run, f"output={output}", BUDGET, *words]) == WRONG
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1, said
    assert not output.exists()


def test_a_store_of_another_tokenizer_is_refused(tmp_path, tiny_run, backbone_folder, capsys):
    other = tmp_path / "other"
    shutil.copytree(backbone_folder, other)
    file = json.loads((other / "tokenizer.json").read_text())
    vocabulary = file["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(file))
    words = [*tiny_run, f"output={tmp_path / 'runs'}", BUDGET, f"backbone.name={other}"]
    assert cli.main(["train", *words]) == WRONG
    assert "was made with tokenizer" in capsys.readouterr().err


def test_tokens_that_the_backbone_does_not_have_are_refused(tmp_path, tiny_run, save_decoder, capsys):
    """Not looked up beyond the embedding's rows, which on a GPU ends in an assertion of a kernel."""
    words = [*tiny_run, BUDGET, f"backbone.name={save_decoder(tmp_path / 'small', vocab_size=100)}"]
    for verb in ("train", "flops"):
        assert cli.main([verb, *words]) == WRONG
        assert "made with one of 256 tokens, but small has 100 embeddings" in capsys.readouterr().err


def test_a_directory_of_another_run_is_refused(tmp_path, tiny_run, capsys):
    config, directory = run_of(tmp_path, tiny_run)
    assert train(config, StopAfter(3)) == INTERRUPTED
    text = directory.config.read_text()
    directory.config.write_text(text.replace("batch_size: 16", "batch_size: 32"))
    assert cli.main(["train", *tiny_run, f"output={tmp_path / 'runs'}", BUDGET]) == WRONG
    assert "is the directory of another run: training is" in capsys.readouterr().err
    directory.config.write_text(text)
    plan = json.loads(directory.plan.read_text())
    directory.plan.write_text(json.dumps(plan | {"backbone_digest": "0"}))
    assert cli.main(["train", *tiny_run, f"output={tmp_path / 'runs'}", BUDGET]) == WRONG
    assert "this run began with backbone_digest 0" in capsys.readouterr().err


def test_flops_prints_both_conventions_without_weights(tmp_path, tiny_run, capsys):
    assert cli.main(["flops", "method.name=lora", "method.rank=8", "--budgets", "1.5e15", "6e15"]) == 0
    said = capsys.readouterr().out
    row = shape_by_name("pythia-14m")
    config = load(None, ["method.name=lora", "method.rank=8"])
    cost = cost_of(row, config.method)
    assert f"{cost.flop_per_token:,}" in said and f"{cost.forward:,}" in said
    assert f"{int(1.5e15) // cost.flop_per_token:,}" in said
    assert cli.main(["flops", *tiny_run, BUDGET]) == 0
    assert "counted in" in capsys.readouterr().out
    for store in ([], ["data.store=/nowhere"]):
        assert cli.main(["flops", *tiny_run, *store, "--budgets", "1e10", "1"]) == WRONG
        assert "budget: 1 FLOP is too small; one pair costs" in capsys.readouterr().err
    assert cli.main(["flops", *tiny_run, BUDGET, "loss.hard_negatives=2"]) == WRONG
    assert "loss.hard_negatives: 2, but" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["flops", "budget=1e15"]])
def test_starts_without_torch(words):
    code = f"import sys; from embedscale import cli\ntry: cli.main({words!r})\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parent)
