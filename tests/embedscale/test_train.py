"""Whole runs through the real Trainer: the exact budget, a plain loop as reference, the record, divergence."""

import json
import math
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import BUDGET, METHODS, StopAfter, run_of
from transformers import AutoModel

from embedscale import cli
from embedscale.data.store import PairStore
from embedscale.errors import DONE, FAILED, INTERRUPTED, WRONG
from embedscale.run.cost import cost_of
from embedscale.run.families import shape_by_name
from embedscale.run.settings import load
from embedscale.training.train import train


@pytest.mark.parametrize("name", METHODS)
def test_spends_the_budget_to_the_pair_and_records_it(tmp_path, tiny_run, name):
    config, directory = run_of(tmp_path, tiny_run, "backbone.revision=step1000", *METHODS[name])
    assert train(config) == DONE
    record = directory.read_record()
    assert record.status == "done" and record.run_id == config.run_id and record.method == name
    assert record.backbone_revision == "step1000"

    # Counted again from the batches, pair by pair.
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


def test_the_record_names_the_processor(tmp_path, tiny_run):
    config, directory = run_of(tmp_path, tiny_run, "budget=1e9")
    assert train(config) == DONE
    named = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert directory.read_record().device.name == (named[1].strip() if named else platform.machine())


def test_a_run_equals_a_plain_loop(tmp_path, tiny_run):
    """The plain loop uses transformers sequence by sequence, torch's AdamW, and formulas written out."""
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
        if not name.endswith("query_key_value.bias"):  # a key's bias has no gradient but rounding errors
            assert (trained[name] - weight).norm() < 1e-3 * (weight - begun[name]).norm(), name
    found = []
    for group in range(2):  # two groups of 32 pairs: each query has 31 negatives
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


def test_the_speed_of_a_row_is_that_since_the_row_before(tmp_path, tiny_run):
    """So the time of an evaluation between two training rows does not count."""
    config, directory = run_of(tmp_path, tiny_run, "resources.log_every=4")
    assert train(config) == DONE
    rows = directory.read_metrics()
    for before, row in pairwise(rows):
        if row.seconds is not None:
            assert row.seconds * row.tokens_per_second == pytest.approx(row.tokens - before.tokens, rel=0.02), row
    assert any(row.loss is not None and row.step % 4 for row in rows[:-1]), "an evaluation between two rows"


def test_the_last_lines_show_losses_to_few_digits_and_none_of_a_batch_cut_short(tmp_path, tiny_run, capsys):
    config, directory = run_of(tmp_path, tiny_run, "resources.log_every=1")
    assert train(config) == DONE
    said, record = capsys.readouterr(), directory.read_record()
    *_, full, cut = (row.train_loss for row in directory.read_metrics() if row.train_loss is not None)
    assert record.pairs % 16 and f"{full:.4f}" != f"{cut:.4f}"
    assert f"step {record.steps}/{record.steps}, loss {full:.4f}, held-out {record.loss:.4f}, " in said.err
    assert said.out == f"{config.run_id} is done: held-out loss {record.loss:.4g}, record {directory.record}\n"


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


def test_device_hours_are_divided_for_each_attempt(tmp_path, tiny_run):
    config, directory = run_of(tmp_path, tiny_run)
    assert train(config, StopAfter(5), sharing=4) == INTERRUPTED
    (first,) = directory.read_attempts()
    start = datetime.fromisoformat(first.start) - timedelta(hours=2)
    directory.attempt(1).path.joinpath("attempt.json").write_text(
        json.dumps(first.to_json() | {"start": start.isoformat()})
    )
    assert train(config, beside=2) == DONE  # other cores, so the hours are not divided
    record = directory.read_record()
    assert [attempt.sharing for attempt in record.attempts] == [4, 1]
    assert record.wall_seconds >= 7200
    assert record.gpu_hours == pytest.approx((record.wall_seconds - 7200) / 3600 + 0.5, abs=0.01)


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


def test_a_last_step_that_breaks_the_weights_is_recorded_as_diverged(tmp_path, tiny_run, capsys):
    """No later loss shows it, and similarities that are NaN would rank every positive first."""
    words = ["budget=2e8", "training.batch_size=14", "training.learning_rate=1e30"]  # one step
    config, directory = run_of(tmp_path, tiny_run, *words)
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
    for seed in (0, 1):  # each run has its own logs, also in one process
        settings = [*words, "resources.loggers=[tensorboard,wandb]", f"training.seed={seed}"]
        config, directory = run_of(tmp_path, tiny_run, *settings)
        assert train(config) == DONE
        assert list(directory.path.glob("tensorboard/**/events*"))
        assert len(list(directory.path.glob("wandb/offline-run-*"))) == 1
        assert directory.read_record().spent_flop <= config.budget


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


def test_flops_counts_without_a_pool_and_a_learning_rate(tiny_run, capsys):
    words = ["evaluation.pool=32000", "training.learning_rate=null", "--json"]
    assert cli.main(["flops", *tiny_run, BUDGET, *words]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["counted_in"] == load(None, tiny_run).data.store and counted["budgets"][0]["pairs"] > 100


def test_flops_names_a_damaged_store_instead_of_estimating(tmp_path, tiny_run, capsys):
    shutil.copytree(load(None, tiny_run).data.store, tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text("{")
    assert cli.main(["flops", *tiny_run, BUDGET, f"data.store={tmp_path / 'store'}"]) == WRONG
    assert "manifest.json cannot be read; remove the store and prepare it again" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["flops", "budget=1e15"]])
def test_starts_without_torch(words):
    code = f"import sys; from embedscale import cli\ntry: cli.main({words!r})\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parent)
