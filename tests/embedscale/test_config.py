"""Settings: files and words become dataclasses, every setting has an explanation, and run ids stay."""

from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from embedscale.cli import main
from embedscale.errors import UserError
from embedscale.run.config import Evaluation, Loss, RunConfig, Source, Training
from embedscale.run.method import Method
from embedscale.run.settings import commented, load, markdown, read, to_yaml
from embedscale.values import descriptions
from slurm.cluster import Cluster, ResourceClass
from slurm.grid import SweepFile

SECTIONS = [kind for kind in get_type_hints(RunConfig).values() if is_dataclass(kind)]


def test_every_setting_has_one_line_that_explains_it():
    for schema in (*SECTIONS, Source, SweepFile, Cluster, ResourceClass):
        said = descriptions(schema)
        assert {item.name for item in fields(schema)} == said.keys(), schema
        assert all(len(line) < 160 and line.endswith(".") for line in said.values()), schema
    assert {"budget", "output"} <= descriptions(RunConfig).keys()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["budget=3e16", "method.name=lora", "method.rank=8", "method.targets=[dense]"],
        ["data.sources=[{path: a.jsonl}, {kind: parquet, path: 'b*.parquet', weight: 0.5}]", "evaluation.at=[]"],
        ["backbone.name='yes'", "resources.loggers=[wandb]", "training.learning_rate=1e-5", "budget=1234567"],
    ],
)
def test_printed_settings_read_back_equal(tmp_path, capsys, words):
    assert main(["config", *words]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert load(file) == load(None, words)
    file.write_text(to_yaml(load(None, words)))
    assert load(file) == load(None, words)


def test_config_prints_value_meaning_and_the_default_where_it_differs(capsys):
    assert main(["config", "configs/quickstart.yaml", "training.seed=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (seed,) = (line for line in lines if line.lstrip().startswith("seed:"))
    assert seed.split("#")[0].split() == ["seed:", "7"]
    assert seed.endswith("Seed of the order of the pairs, of dropout and of random weights. Default: 0.")
    (clip,) = (line for line in lines if line.lstrip().startswith("clip:"))
    assert clip.endswith("Largest norm of the gradient; default: no clipping.")


@pytest.mark.parametrize(
    ("kind", "schema", "file"),
    [("sweep", SweepFile, "configs/sweep/paper.yaml"), ("cluster", Cluster, "configs/cluster/a100.yaml")],
)
def test_sweep_and_cluster_files_are_printed_too(tmp_path, capsys, kind, schema, file):
    assert main(["config", "--of", kind, file]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert read(schema, again) == read(schema, file)


def test_the_tables_of_the_documentation_name_every_setting():
    text = markdown(RunConfig)
    for line in commented(RunConfig()).splitlines():
        name = line.split(":")[0].strip()
        assert f".{name}`" in text or f"`{name}`" in text, name
    assert "| `training.batch_size` | `1024` | Pairs in a step, over all GPUs. |" in text
    assert "| `classes` | `6 of them` |" in markdown(Cluster)


def test_unknown_settings_are_refused_with_the_nearest_known_one():
    with pytest.raises(UserError, match="training.sed: unknown setting; did you mean 'training.seed'"):
        load(None, ["training.sed=1"])


@pytest.mark.parametrize(
    ("words", "run_id"),
    [  # names of the first version
        ([], "pythia-14m_full_1.5e15_s0_44136fa3"),
        (
            ["budget=3e16", "loss.temperature=0.05", "backbone.name=EleutherAI/pythia-12b", "method.name=bias"],
            "pythia-12b_bias_3e16_s0_0ada7f99",
        ),
        (
            [
                "method.name=freeze",
                "method.active_fraction=0.1667",
                "data.context=128",
                "training.learning_rate=0.001",
                "training.seed=3",
                "evaluation.at=[0.1]",
                "resources.devices=2",
                "output=x",
            ],
            "pythia-14m_freeze-0.167_1.5e15_s3_9ad63f0d",
        ),
        (
            ["method.name=lora", "method.rank=8", "method.targets=[dense]", "backbone.weights=random", "loss.form=gte"],
            "pythia-14m_lora-r8_1.5e15_s0_f8417821",
        ),
    ],
)
def test_run_ids_are_those_of_the_first_version(words, run_id):
    assert load(None, words).run_id == run_id


def test_integers_from_python_make_the_run_of_the_same_file():
    given = RunConfig(
        budget=10**15,
        method=Method("lora", rank=8, alpha=16, dropout=0),
        loss=Loss(temperature=1),
        training=Training(learning_rate=1, clip=2, final_fraction=1),
        evaluation=Evaluation(temperature=1),
    )
    words = ["budget=1e15", "method.name=lora", "method.rank=8", "method.alpha=16", "loss.temperature=1"]
    words += ["training.learning_rate=1", "training.clip=2", "training.final_fraction=1", "evaluation.temperature=1"]
    assert given.run_id == load(None, words).run_id
    given = RunConfig(method=Method("freeze", active_fraction=1))
    assert given.run_id == load(None, ["method.name=freeze", "method.active_fraction=1"]).run_id
