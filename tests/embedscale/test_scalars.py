"""A text setting keeps the text that is written, a number is finite, and `~/` is the home folder."""

import pytest

from embedscale.cli import main, parse
from embedscale.errors import UserError
from embedscale.run.settings import load, read, read_yaml, to_yaml
from slurm import grid
from slurm.cluster import Cluster

TEXTS = [
    "no",
    "yes",
    "on",
    "695e0514",
    "0123",
    "1e5",
    "1_000",
    "0x10",
    "12:30:00",
    "2026-01-31",
    "1.10",
    "=",
    "y",
    "007",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_setting_keeps_the_text(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(f"backbone: {{name: {text}}}\ndata: {{sources: [{{path: {text}, subset: {text}}}]}}\n")
    for config in (
        load(file),
        load(None, [f"backbone.name={text}", f"data.sources=[{{path: {text}, subset: {text}}}]"]),
    ):
        assert config.backbone.name == config.data.sources[0].path == config.data.sources[0].subset == text
        file.write_text(to_yaml(config))
        assert load(file) == config


@pytest.mark.parametrize("text", TEXTS)
def test_so_do_the_texts_of_a_sweep_and_of_a_cluster(tmp_path, text):
    file = tmp_path / "cluster.yaml"
    file.write_text(f"account: {text}\nenvironment: {{A: {text}}}\nsetup: [{text}]\n")
    cluster = read(Cluster, file)
    assert (cluster.account, cluster.environment, cluster.setup) == (text, {"A": text}, [text])
    sweep = tmp_path / "sweep.yaml"
    base = (
        f"base: {{data.store: {text}}}\naxes: {{budget: [1e15, 2e15]}}\nexclude: [{{data.store: {text}, budget: 2e15}}]"
    )
    sweep.write_text(f"name: {text}\noutput: {tmp_path}\n{base}\nbackbones: [{text}]\n")
    found = grid.load(sweep)
    (run,) = found.runs
    assert (found.name, run.data.store, run.backbone.name, found.excluded) == (text, text, text, 1)
    assert found.folder == tmp_path / text


def test_other_settings_read_the_text_by_their_type(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "budget: 1e15\ndata: {repeat: yes, tokenizer: null}\ntraining: {seed: 0123, clip: ~, warmup_fraction: 1}"
    )
    config = load(file, ["evaluation.at=[1e-1, 0.5]", "resources.shard=off", "method.rank="])
    assert (config.budget, config.data.repeat, config.data.tokenizer) == (1e15, True, None)
    assert (config.training.seed, config.training.clip, config.training.warmup_fraction) == (123, None, 1.0)
    assert (config.evaluation.at, config.resources.shard, config.method.rank) == ([0.1, 0.5], False, None)


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-inf", ".inf", "1e999", "[nan]"])
@pytest.mark.parametrize(
    "setting",
    ["budget", "data.held_out", "training.learning_rate", "resources.memory_gb", "evaluation.at", "method.alpha"],
)
def test_a_number_that_is_not_finite_is_refused(setting, value):
    words = ["method.name=lora", "method.rank=4", f"{setting}={value}"]
    with pytest.raises(UserError, match=setting.replace(".", "\\.")):
        load(None, words)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "many"])
@pytest.mark.parametrize(
    "words",
    ["sweep plan S --max-gpu-hours", "sweep submit S --max-gpu-hours", "sweep watch S --every", "fit R --noise"],
)
def test_so_is_one_behind_an_option(capsys, words, value):
    option = words.split()[-1]
    assert main([*words.split()[:-1], f"{option}={value}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"embedscale: {option}: '{value}' is not a number")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output: ~/runs\ndata: {store: '~/store', sources: [{path: ~/pairs}]}")
    config = load(tmp_path / "run.yaml", ["data.tokenizer=~/t"])
    paths = [config.output, config.data.store, config.data.sources[0].path, config.data.tokenizer]
    assert paths == [str(tmp_path / name) for name in ("runs", "store", "pairs", "t")]
    assert parse(["fit", "~/runs", "--out=~/x"]).out == str(tmp_path / "x")
    with pytest.raises(UserError, match="output"):
        load(None, ["output=~"])  # null


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("budget: 1\nbudget: 2")
    with pytest.raises(UserError, match="found the key 'budget' twice"):
        read_yaml(tmp_path / "run.yaml")
