"""Training by a recipe: every setting of the configuration that `embedscale train --recipe` builds."""

import json
import os

import numpy as np
import own_tables
import pandas as pd
import pytest
from sweeps import BACKBONES, BUDGETS, LAWS, fitted, miniature, paper_like, write_run

from analysis import recipe, runs
from analysis import study as studies
from analysis.advice.evidence import Limit
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA
from embedscale.cli import main
from embedscale.errors import UserError
from embedscale.run.cost import cost_of
from embedscale.run.families import PYTHIA
from embedscale.run.method import METHODS, Method


def test_a_recipe_takes_other_settings_from_the_most_similar_run(tmp_path, capsys):
    folder = miniature(tmp_path / "runs", scores=False)
    assert own_tables.fit(folder) == 0
    capsys.readouterr()
    advised = recipe.recipe(*recipe.read(folder)[:1], Limit(flop=3e11)).best
    config = recipe.configuration(str(folder), "3e11", None, ["training.seed=7"])
    assert config.backbone.name == f"configs/quickstart/backbones/{advised.backbone}"
    assert (config.budget, config.method.name, config.training.seed) == (3e11, advised.method, 7)
    assert (config.data.store, config.training.batch_size, config.output) == ("stores/tiny", 128, str(folder))
    assert config.training.learning_rate == advised.learning_rate
    assert (
        "a miniature: models of 6,592 to 84,912 parameters"
        in recipe.recipe(recipe.read(folder)[0], Limit(flop=3e11)).notes[-1]
    )


def test_with_fixed_data_the_loss_is_that_of_the_tokens_whatever_share_of_the_blocks_trains(tmp_path):
    """A token of a small share costs less: the tokens, and not their FLOP, say what the law expects."""
    rows = []
    for i, budget in enumerate(1e11 * 4.0 ** np.arange(4)):
        for n in 1e4 * 2.5 ** np.arange(5):
            share = (0.25, 0.5)[i % 2]
            cost = n * (2 + 4 * share)
            loss = float(np.ravel(CHINCHILLA.predict(LAWS["full"], n, budget / cost))[0])
            rows.append({"method": "freeze", "n_parameters": n, "budget_flop": budget, "tokens": budget / cost}
                        | {"flop_per_token": cost, "trainable_fraction": share, "loss": loss})  # fmt: skip
    fits = recipe.read(fitted(pd.DataFrame(rows), tmp_path, noise=0.003))[0]
    for tokens in (5e5, 1e6, 1e7):
        found = recipe.recipe(fits, Limit(tokens=tokens))
        assert found.best.tokens == pytest.approx(tokens) and found.best.n_parameters == pytest.approx(found.n_opt)
        assert found.best.loss == pytest.approx(found.lowest_loss, rel=1e-6)


def test_runs_that_ended_after_the_fits_are_named(tmp_path, capsys):
    folder = miniature(tmp_path / "runs", scores=False)
    late = sorted(path for path in folder.iterdir() if path.is_dir())[:2]
    for path in late:
        path.rename(tmp_path / path.name)
    assert own_tables.fit(folder) == 0
    capsys.readouterr()
    assert main(["recipe", str(folder), "3e11"]) == 0
    assert "fit` again" not in capsys.readouterr().out
    for path in late:
        (tmp_path / path.name).rename(path)
        os.utime(path / "record.json")
    assert main(["recipe", str(folder), "3e11"]) == 0
    assert "2 runs of" in (told := capsys.readouterr().out) and "run `embedscale fit` again" in told


def test_a_recipe_takes_other_settings_from_the_file_that_is_named(tmp_path, capsys):
    folder = miniature(tmp_path / "runs", scores=False)
    assert own_tables.fit(folder) == 0
    own = tmp_path / "own.yaml"
    own.write_text("output: elsewhere\ndata: {store: stores/own}\n")
    config = recipe.configuration(str(folder), "3e11", str(own), [])
    assert (config.output, config.data.store) == ("elsewhere", "stores/own")


@pytest.mark.slow
@pytest.mark.parametrize("method", [
    Method("lora", rank=32, alpha=16.0, dropout=0.1, targets=["dense", "query_key_value"], embedding=True),
    Method("freeze", active_fraction=0.5, blocks="first"),
    Method("freeze", active_blocks=0, blocks="one"),
])  # fmt: skip
@pytest.mark.parametrize("as_text", [False, True])
def test_a_recipe_trains_the_method_that_was_fitted(tmp_path, method, as_text):
    """Every setting of the method is kept, for a table from records and for a table read as text."""
    backbones, rows = BACKBONES[2:5], []
    for row in backbones:
        cost = cost_of(row.shape, method)
        share = len(method.training_blocks(row.shape.blocks)) / row.shape.blocks
        for budget in BUDGETS:
            tokens = budget / cost.flop_per_token
            rows.append(
                {"method": method.name, "backbone": row.name, "n_parameters": row.parameters, "budget_flop": budget}
                | {"tokens": tokens, "flop_per_token": cost.flop_per_token, "backbone_revision": "step1000"}
                | {"loss": float(np.ravel(CHINCHILLA.predict(LAWS["lora"], row.parameters, tokens))[0])}
                | {"trainable_fraction": share or cost.n_updated / cost.n_parameters, "rank": method.rank}
                | {"alpha": method.alpha, "dropout": method.dropout, "targets": " ".join(method.targets)}
                | {"embedding": method.embedding, "blocks": method.blocks, "active_blocks": method.active_blocks}
            )
    table = pd.DataFrame(rows)
    folder = fitted(table.astype({"embedding": str} if as_text else {}), tmp_path, noise=0.003)
    for budget in (BUDGETS[1], BUDGETS[3]):
        found = recipe.recipe(recipe.read(folder)[0], Limit(flop=budget))
        config = recipe.configuration(str(folder), f"{budget}", None, [])
        assert config.method == method
        assert config.backbone.name == f"EleutherAI/{found.best.backbone}" and config.backbone.revision == "step1000"
        assert found.best.flop_per_token == cost_of(PYTHIA.sizes[found.best.backbone].shape, method).flop_per_token
        told = dict(recipe.lines(found, 0.95))["method"]
        assert ("embedding True" if method.name == "lora" else f"blocks {method.blocks}") in told


def test_a_recipe_takes_other_settings_from_the_best_run(tmp_path):
    """The second of three weight decays is the best everywhere."""
    for budget in (5e10, 2e11, 6e11):
        for size in (6592, 12864, 25472, 50176):
            best = 20000 * (budget / 2e11) ** 0.4
            for decay, worse in ((0.01, 1.1), (0.1, 1.0), (0.3, 1.2)):
                loss = 4.0 * (budget / 5e10) ** -0.18 * np.exp(0.06 * np.log(size / best) ** 2) * worse
                path = write_run(tmp_path, budget, size, "full", loss, f"own/tiny-{size}", int(100 * decay))
                for name, part in (("config.yaml", "training"), ("record.json", "hyperparameters")):
                    values = json.loads((path / name).read_text())
                    values[part]["weight_decay"] = decay
                    (path / name).write_text(json.dumps(values))
    loaded = runs.load(tmp_path)
    studies.write(fit(loaded, noise=0.003, bootstrap=100, residual="log"), loaded, tmp_path)
    for budget in ("5e10", "3e11"):
        config = recipe.configuration(str(tmp_path), budget, None, [])
        assert config.training.weight_decay == 0.1
        assert config.backbone.name.startswith("own/tiny-")


@pytest.mark.parametrize("row", PYTHIA.sizes.values(), ids=PYTHIA.sizes)
def test_settings_of_other_backbones_are_adapted_to_this_one(row):
    for share in (1 / 16, 1 / 6, 1 / 3, 0.5, 5 / 6, 1.0):
        (found,) = METHODS["freeze"].settings_like({"trainable_fraction": share}, row.shape).values()
        blocks = found * row.shape.blocks
        assert blocks == pytest.approx(round(blocks)) and blocks >= 1
        assert abs(blocks - max(1, share * row.shape.blocks)) <= 0.5
        cost_of(row.shape, Method("freeze", active_fraction=found))
    assert METHODS["lora"].settings_like({"rank": 8}, row.shape) == {"rank": 8}
    cost_of(row.shape, Method("lora", **METHODS["lora"].settings_like({"rank": 10**6}, row.shape)))


@pytest.mark.slow
def test_a_recipe_from_a_table_knows_the_names_of_the_hub(paper_folder, tmp_path, capsys):
    config = recipe.configuration(str(paper_folder), "5e16", None, [])
    assert config.backbone.name.startswith("EleutherAI/pythia-")
    assert config.method == Method("full")
    table = paper_like().assign(backbone="own")
    table["n_parameters"] *= 1.01
    folder = fitted(table, tmp_path)
    with pytest.raises(UserError, match=r"--recipe: the folder of '.*' is not known; give backbone.name=FOLDER"):
        recipe.configuration(str(folder), "5e16", None, [])
    assert recipe.configuration(str(folder), "5e16", None, ["backbone.name=here"]).backbone.name == "here"
