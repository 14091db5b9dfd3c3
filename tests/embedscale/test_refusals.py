"""`train` refuses bad input: one line that names the setting, exit status 2, and nothing is written."""

import json
import shutil

import pytest
from training_runs import BUDGET, StopAfter, run_of

from embedscale import cli
from embedscale.errors import INTERRUPTED, WRONG
from embedscale.run.settings import load
from embedscale.training.train import train


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_unreadable_held_out_pairs_are_found_before_training(tmp_path, tiny_run, capsys, damage):
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metod.name=full"], "metod: unknown setting; did you mean 'method'"),
        (["training.learning_rat=1"], "did you mean 'training.learning_rate'"),
        (["budget=10"], "budget: 10 FLOP is too small; one pair costs"),
        (["budget=2e8"], "budget: buys less than one batch of 16 pairs"),
        (["budget=1e15"], "more than one epoch of"),
        (["budget=1e29", "data.repeat=true"], "budget: 1e+29 FLOP buy"),
        (["data.context=4000"], "data.context: 4000 is longer than pythia-tiny's; allowed: at most 256"),
        (["data.context=41"], "was prepared with 40"),
        (["data.store=/nowhere"], "/nowhere"),
        (["backbone.name=EleutherAI/pythia-13m"], "backbone.name: 'EleutherAI/pythia-13m' is neither a local folder"),
        (["method.name=adapter"], "method.name: 'adapter' is unknown"),
        (["method.name=lora", "method.rank=1000"], "method.rank: 1000 is out of range"),
        (["method.name=freeze", "method.active_fraction=0.3"], "method.active_fraction: 0.3 of 4 blocks"),
        (["training.learning_rate=null"], "training.learning_rate: the paper's rule has no value for"),
        (["evaluation.pool=32000"], "held-out pairs; lower evaluation.pool"),
        (["loss.hard_negatives=5"], "loss.hard_negatives: 5, but"),
        (["resources.shard=true"], "resources.shard: one process has nothing to share"),
        (["resources.devices=3"], "training.batch_size: 16 is not divisible by 3"),
        (["resources.memory_gb=.inf"], "resources.memory_gb: inf is out of range"),
        (["training.learning_rate=.inf"], "training.learning_rate: inf is out of range"),
        (["evaluation.at=[0]"], "evaluation.at: 0.0 is out of range; allowed: above 0, at most 1"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, tiny_run, capsys, words, message):
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


def test_tokens_without_an_embedding_are_refused(tmp_path, tiny_run, save_decoder, capsys):
    """A lookup beyond the rows of the embedding would fail in a kernel on a GPU."""
    words = [*tiny_run, BUDGET, f"backbone.name={save_decoder(tmp_path / 'small', vocab_size=100)}"]
    for verb in ("train", "flops"):
        assert cli.main([verb, *words]) == WRONG
        assert "prepared with a tokenizer of 256 tokens, but small has 100 embeddings" in capsys.readouterr().err


def test_a_directory_of_another_run_is_refused(tmp_path, tiny_run, capsys):
    config, directory = run_of(tmp_path, tiny_run)
    assert train(config, StopAfter(3)) == INTERRUPTED
    text = directory.config.read_text()
    directory.config.write_text(text.replace("batch_size: 16", "batch_size: 32"))
    assert cli.main(["train", *tiny_run, f"output={tmp_path / 'runs'}", BUDGET]) == WRONG
    assert "is the directory of another run: training is" in capsys.readouterr().err
    directory.config.write_text(text)
    plan = json.loads(directory.plan.read_text())
    del plan["checksum"]  # as in a file of earlier code
    directory.plan.write_text(json.dumps(plan | {"backbone_digest": "0"}))
    assert cli.main(["train", *tiny_run, f"output={tmp_path / 'runs'}", BUDGET]) == WRONG
    said, folder = capsys.readouterr().err, config.backbone.name
    assert "this run began with backbone_digest 0" in said and said.endswith(f"; restore {folder}\n")
    directory.plan.write_text(json.dumps(plan | {"body": "cpu" if plan["body"] == "plain" else "plain"}))
    assert cli.main(["train", *tiny_run, f"output={tmp_path / 'runs'}", BUDGET]) == WRONG
    assert f"now it is {plan['body']}" in capsys.readouterr().err, "the two bodies round differently"
