"""Files of a run that were damaged on the disk: each is noticed before it is used, and an older good one serves."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from training_runs import StopAfter, comparable, run_of

from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.run.directory import RunDirectory
from embedscale.run.record import Damaged
from embedscale.run.stop import StopRequest
from embedscale.serving.embedder import Embedder
from embedscale.training.callbacks import newest_checkpoint
from embedscale.training.train import train

WORDS = ["resources.checkpoint_minutes=0", "resources.log_every=1"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_run):
    """A run with two checkpoints, and the same run left alone."""
    folder = tmp_path_factory.mktemp("damage")
    config, whole = run_of(folder / "whole", tiny_run, *WORDS)
    assert train(config) == DONE
    config, directory = run_of(folder / "stopped", tiny_run, *WORDS)
    assert train(config, StopAfter(9)) == INTERRUPTED
    assert len(directory.checkpoint_paths()) == 2
    return config, directory, whole


@pytest.fixture
def damaged(stopped, tmp_path):
    """A copy of the stopped run to be damaged, at its own place; the whole run."""
    config, directory, whole = stopped
    shutil.copytree(directory.path, tmp_path / "kept")
    yield config, directory, whole
    shutil.rmtree(directory.path)
    shutil.copytree(tmp_path / "kept", directory.path)


def flipped(content: bytes, rng: random.Random) -> bytes:
    """The content with one bit flipped anywhere."""
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """The content with a block of 4 KB lost, as by a power cut; not one that was zero already."""
    while True:
        start = 4096 * rng.randrange(len(content) // 4096)
        if any(content[start : start + 4096]):
            return content[:start] + bytes(4096) + content[start + 4096 :]


@pytest.mark.parametrize(("damage", "times"), [(flipped, 100), (zeroed, 40)])
def test_a_damaged_checkpoint_is_never_used(damaged, capsys, record_property, damage, times):
    config, directory, _ = damaged
    older, newest = directory.checkpoint_paths()
    content, rng, found = newest.read_bytes(), random.Random(19), []
    for _ in range(times):
        newest.write_bytes(damage(content, rng))
        found.append(newest_checkpoint(directory, config.run_id)["step"])
    assert found == [int(older.stem.split("-")[1])] * times
    assert capsys.readouterr().err.count(f"{newest} is damaged") == times
    newest.write_bytes(content)
    assert newest_checkpoint(directory, config.run_id)["step"] == int(newest.stem.split("-")[1])
    record_property("shown", f"checkpoint, {damage.__name__}: {times} of {times} noticed")


def test_a_run_resumed_beside_a_damaged_checkpoint_ends_with_the_same_bits(damaged, capsys):
    config, directory, whole = damaged
    older, newest = directory.checkpoint_paths()
    newest.write_bytes(flipped(newest.read_bytes(), random.Random(3)))
    assert train(config, StopAfter(1)) == INTERRUPTED
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert directory.read_attempts()[-1].from_step == int(older.stem.split("-")[1])
    assert len(directory.checkpoint_paths()) >= 2, "a damaged checkpoint takes no good one's place"
    assert train(config) == DONE
    assert comparable(directory) == comparable(whole)


def test_a_checkpoint_whose_digest_is_cut_off_is_not_taken_for_an_early_one(damaged):
    config, directory, _ = damaged
    older, newest = directory.checkpoint_paths()
    newest.write_bytes(newest.read_bytes()[:-26])
    assert newest_checkpoint(directory, config.run_id)["step"] == int(older.stem.split("-")[1])


def test_a_checkpoint_of_early_code_serves_and_says_that_it_cannot_be_verified(damaged, capsys):
    config, directory, whole = damaged
    for path in directory.checkpoint_paths():
        state = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in state.items() if not key.startswith("rows")}, path)
    directory.metrics.write_text(directory.metrics.read_text() + '{"step": 900, "loss": 1.0}\n')
    plan = json.loads(directory.plan.read_text())
    directory.plan.write_text(json.dumps({k: v for k, v in plan.items() if k not in ("threads", "checksum")}))
    assert train(config) == DONE
    assert capsys.readouterr().err.count("is of an earlier version, without a digest") == 1
    assert comparable(directory) == comparable(whole)


def test_damaged_weights_are_never_used(runs, tmp_path, record_property):
    shutil.copytree(runs["bias"], tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    content, rng = directory.weights.read_bytes(), random.Random(5)
    before = Embedder.load(directory.path).encode(["a text"])
    noticed = 0
    for _ in range(30):
        directory.weights.write_bytes(flipped(content, rng))
        try:
            after = Embedder.load(directory.path).encode(["a text"])
        except UserError as error:
            assert str(directory.weights) in str(error)
            noticed += 1
        else:  # the bit was in white space, or in what describes no tensor
            np.testing.assert_array_equal(after, before)
    record_property("shown", f"weights, flipped: {noticed} of 30 noticed, the others changed no embedding")


def test_a_backbone_that_has_changed_since_the_training_is_named(runs, tmp_path, backbone_folder):
    shutil.copytree(runs["bias"], tmp_path / "run")
    backbone = shutil.copytree(backbone_folder, tmp_path / "backbone")
    directory = RunDirectory(tmp_path / "run")
    directory.config.write_text(directory.config.read_text().replace(str(backbone_folder), str(backbone)))
    weights = bytearray((backbone / "model.safetensors").read_bytes())
    weights[-1000] ^= 4
    (backbone / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=f"^{backbone}: has other weights than the backbone of .*; restore them$"):
        Embedder.load(directory.path)


def test_a_damaged_record_is_never_used(stopped, record_property):
    _, _, whole = stopped
    content, rng, before, noticed = whole.record.read_bytes(), random.Random(13), whole.read_record(), 0
    for _ in range(200):
        whole.record.write_bytes(flipped(content, rng))
        found = whole.read_record()
        noticed += isinstance(found, Damaged)
        assert isinstance(found, Damaged) or found == before  # the bit was in the name of the checksum
    whole.record.write_bytes(content)
    record_property("shown", f"record.json, flipped: {noticed} of 200 noticed, the others changed no value")


def test_settings_that_changed_since_the_training_are_refused(runs, tmp_path):
    shutil.copytree(runs["lora"], tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    text = directory.config.read_text()
    for before, after, name in (
        ("context: 40", "context: 41", "data.context"),
        ("pooling: mean", "pooling: last", "backbone.pooling"),
        ("rank: 4", "rank: 5", "method"),
    ):
        assert before in text
        directory.config.write_text(text.replace(before, after))
        with pytest.raises(UserError, match=f"config.yaml: {name} is .*, but the run was trained with .*; restore it"):
            Embedder.load(directory.path)


def emptied(text: bytes, rng: random.Random) -> bytes:
    return b""


def halved(text: bytes, rng: random.Random) -> bytes:
    return text[: len(text) // 2]


def without_a_row(text: bytes, rng: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    del lines[rng.randrange(len(lines) - 2)]
    return b"".join(lines)


def flipped_early(text: bytes, rng: random.Random) -> bytes:
    """With a bit flipped in a row that both checkpoints know."""
    early = text.rindex(b"\n", 0, text.rindex(b"\n", 0, -1))
    return flipped(text[:early], rng) + text[early:]


@pytest.mark.parametrize("damage", [emptied, halved, without_a_row, flipped_early])
def test_metrics_that_lost_what_every_checkpoint_knows_are_one_line_and_nothing_is_trained(
    damaged, record_property, damage
):
    config, directory, whole = damaged
    content, rng = directory.metrics.read_bytes(), random.Random(7)
    for _ in range(10):
        directory.metrics.write_bytes(damage(content, rng))
        attempts = directory.read_attempts()
        with pytest.raises(UserError, match="metrics.jsonl: is damaged or has lost rows") as error:
            train(config)
        assert "\n" not in str(error.value) and directory.read_attempts() == attempts
    directory.metrics.unlink()
    with pytest.raises(UserError, match="metrics.jsonl: is damaged or has lost rows"):
        train(config)
    directory.metrics.write_bytes(content)
    assert train(config) == DONE
    assert comparable(directory) == comparable(whole)
    record_property("shown", f"metrics.jsonl, {damage.__name__}: 10 of 10 noticed")


def test_a_row_lost_since_the_older_checkpoint_sends_the_run_back_to_it(damaged, capsys):
    config, directory, whole = damaged
    older, newest = directory.checkpoint_paths()
    content = directory.metrics.read_bytes()
    directory.metrics.write_bytes(content[:-10])
    assert train(config) == DONE
    assert f"{newest} is whole, but {directory.metrics} has lost or changed rows" in capsys.readouterr().err
    assert directory.read_attempts()[-1].from_step == int(older.stem.split("-")[1])
    assert comparable(directory) == comparable(whole)


class ChangesARow(StopRequest):
    """At the fifth look, a digit of the first row becomes another one."""

    def __init__(self, directory):
        super().__init__()
        self.directory, self.looks = directory, 0

    @property
    def requested(self):
        self.looks += 1
        if self.looks == 5:
            text = self.directory.metrics.read_text()
            self.directory.metrics.write_text(text.replace('"tokens": ', '"tokens": 1', 1))
        return False


def test_a_row_changed_while_the_run_is_at_work_is_no_result(tmp_path, tiny_run, capsys):
    config, directory = run_of(tmp_path, tiny_run, *WORDS)
    assert train(config, ChangesARow(directory)) == FAILED
    assert "metrics.jsonl: has been changed while the run was at work" in capsys.readouterr().err
    assert not directory.record.exists()
    with pytest.raises(UserError, match="metrics.jsonl: is damaged or has lost rows"):
        train(config)


def test_one_bad_line_hides_no_good_one_behind_it(stopped):
    _, _, whole = stopped
    rows = whole.read_metrics()
    content = whole.metrics.read_bytes()
    lines = content.splitlines(keepends=True)
    for bad in (b"\xff\xfe\n", b"{torn\n", b"\n", b"[]\n", b"0\n", b'{"step": "x"}\n', b"[" * 100_000 + b"\n"):
        whole.metrics.write_bytes(b"".join([*lines[:3], bad, *lines[3:]]))
        assert whole.read_metrics() == rows
    whole.metrics.write_bytes(content)


def test_a_plan_that_was_changed_or_lost_beside_its_checkpoints_is_one_line(damaged, record_property):
    config, directory, _ = damaged
    content, rng, noticed = directory.plan.read_bytes(), random.Random(11), 0
    for _ in range(40):
        changed = flipped(content, rng)
        directory.plan.write_bytes(changed)
        if b'"checksum"' in changed:  # without this key it is a file of earlier code; the rest is unchanged
            with pytest.raises(UserError, match="plan.json") as error:
                train(config, StopAfter(0))
            assert "\n" not in str(error.value)
            noticed += 1
    record_property("shown", f"plan.json, flipped: {noticed} of 40 noticed, the others changed no value")
    directory.plan.unlink()
    with pytest.raises(UserError, match="plan.json: is missing; without it, no checkpoint can be continued: restore"):
        train(config)


def test_a_resumed_run_computes_with_as_many_threads_as_it_began_with(damaged, capsys):
    config, directory, whole = damaged
    assert json.loads(directory.plan.read_text())["threads"] == torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        assert train(config) == DONE
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert "goes on with 1 threads, as it began, not 2" in capsys.readouterr().err
    assert comparable(directory) == comparable(whole)
    assert directory.read_record().device.threads == 1
