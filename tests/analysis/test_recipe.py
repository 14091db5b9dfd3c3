"""Recipes against the laws that made the runs: size, data, cost, rank, loss, and the loss of other choices."""

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sweeps import BACKBONES, BUDGETS, FLOP_AN_HOUR, LAWS, fitted, paper_like

from analysis import recipe
from analysis.advice.evidence import Limit, parse_limit
from analysis.fitting.laws import CHINCHILLA
from embedscale.cli import main
from embedscale.errors import UserError
from embedscale.run.cost import cost_of
from embedscale.run.families import PYTHIA
from embedscale.run.method import Method
from embedscale.texts import number


def loss_of(method: str, backbone: str, budget: float, rank: int | None = None) -> float:
    row = PYTHIA.sizes[backbone]
    tokens = budget / cost_of(row.shape, Method(method, rank=rank)).flop_per_token
    return float(np.ravel(CHINCHILLA.predict(LAWS[method], row.parameters, tokens))[0])


@pytest.fixture(scope="module")
def study(paper_folder):
    return recipe.read(paper_folder)


@pytest.mark.parametrize("budget", [6e15, 5e16])
def test_a_budget_within_the_runs_gets_the_size_of_the_closed_form_and_the_true_loss(study, budget):
    found = recipe.recipe(*study[:1], Limit(flop=budget), study[1])
    best = found.best
    assert (best.method, best.basis, found.extrapolates) == ("full", "forecast", [])
    _, a, b, alpha, beta = LAWS["full"]
    optimum = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))
    assert found.n_opt == pytest.approx(optimum, rel=0.2)
    assert found.n_opt_interval[0] < found.n_opt < found.n_opt_interval[1]
    truth = {name: loss_of("full", name, budget) for name in PYTHIA.sizes}
    assert truth[best.backbone] < 1.01 * min(truth.values())
    assert best.loss == pytest.approx(truth[best.backbone], rel=0.02)
    assert best.tokens == pytest.approx(budget / cost_of(PYTHIA.sizes[best.backbone].shape, Method()).flop_per_token)
    assert best.pairs == pytest.approx(best.tokens / 78, rel=1e-3)
    assert best.steps == math.ceil(best.pairs / 1024)
    assert best.learning_rate == pytest.approx(PYTHIA.sizes[best.backbone].pretraining_learning_rate / 10)


def test_at_an_edge_the_best_run_comes_before_the_law(tmp_path):
    table = paper_like().query("method == 'full'")
    cut = table[
        (table["budget_flop"] < BUDGETS[-1]) | (table["n_parameters"] < 2e7)
    ]  # all smaller than the best size of the largest budget
    found = recipe.recipe(*recipe.read(fitted(cut, tmp_path))[:1], Limit(flop=BUDGETS[-1]))
    measured = cut.loc[cut["budget_flop"] == BUDGETS[-1], "loss"].min()
    assert found.best.basis == "best run" and found.best.loss == pytest.approx(measured)
    assert any("no optimum lies inside the grid" in note for note in found.notes)


def test_the_method_changes_where_the_laws_cross_and_lora_has_its_rank(study):
    low, high = (recipe.recipe(study[0], Limit(flop=budget), study[1]) for budget in (BUDGETS[0], 4 * BUDGETS[-1]))
    assert (low.best.method, high.best.method, high.best.rank) == ("full", "lora", 32)
    assert high.best.learning_rate == 1e-3
    assert high.best.tokens == pytest.approx(
        high.best.budget_flop / cost_of(PYTHIA.sizes[high.best.backbone].shape, Method("lora", rank=32)).flop_per_token
    )
    assert high.extrapolates == [f"budget: 4 times the largest ({number(BUDGETS[-1])} FLOP)"]
    few = recipe.recipe(study[0], Limit(flop=BUDGETS[0] / 100))
    assert any(told.startswith("budget: ") and "times below the smallest" in told for told in few.extrapolates)
    assert (
        high.best.loss_interval[1] - high.best.loss_interval[0] < 0.2 * high.best.loss
        and high.best.loss_interval[0] < loss_of("lora", high.best.backbone, high.best.budget_flop, 32) * 1.02
    )


def test_the_loss_of_other_choices_follows_the_laws(study):
    budget = BUDGETS[2]
    found = recipe.recipe(study[0], Limit(flop=budget), study[1])
    lost = {each.what: each for each in found.others}
    assert set(lost) > {"lora", "freeze", "bias"}
    truth = loss_of("full", found.best.backbone, budget)
    bias = lost["bias"]
    assert bias.distinguishable is True
    assert bias.lost == pytest.approx(loss_of("bias", bias.choice.backbone, budget) / truth - 1, abs=0.03)
    for what, each in lost.items():
        if what.startswith("the next"):
            true = loss_of("full", each.choice.backbone, budget) / truth - 1
            assert each.lost == pytest.approx(true, abs=0.08)
    high = recipe.recipe(study[0], Limit(flop=4 * BUDGETS[-1]), study[1])
    ranks = {each.what.split(",")[0]: each.lost for each in high.others if each.what.startswith("rank")}
    assert set(ranks) == {"rank 8", "rank 512"}
    assert min(ranks.values()) > 0


@pytest.mark.slow
def test_a_backbone_that_was_not_run_gets_the_learning_rate_of_the_paper(tmp_path):
    fits, _ = recipe.read(fitted(paper_like().assign(learning_rate=0.01), tmp_path))
    found = recipe.recipe(fits, parse_limit("1e21"))
    choices = [found.best, *(each.choice for each in found.others)]
    run = {row.name for row in BACKBONES}
    assert {choice.backbone in run for choice in choices} == {False, True}
    for choice in choices:
        own = PYTHIA.sizes[choice.backbone].pretraining_learning_rate / 10
        by_rule = own if choice.method in ("full", "freeze") else 1e-3
        assert choice.learning_rate == (0.01 if choice.backbone in run else by_rule)


def test_gpu_hours_buy_what_the_same_flop_buy(study):
    hours = recipe.recipe(study[0], Limit(gpu_hours=0.3), study[1])
    assert hours.best.budget_flop == pytest.approx(0.3 * FLOP_AN_HOUR)
    assert hours.best.gpu_hours == pytest.approx(0.3)
    truth = {row.name: loss_of("full", row.name, 0.3 * FLOP_AN_HOUR) for row in BACKBONES}
    assert truth[hours.best.backbone] < 1.01 * min(truth.values())


def test_the_best_run_of_a_budget_counts_there_and_bounds_the_budgets_above(tmp_path):
    table = paper_like().query("method == 'full'")
    edge = BUDGETS[1]  # all larger than its best size; the law starts at the next budget
    cut = table[(table["budget_flop"] > edge) | ((table["budget_flop"] == edge) & (table["n_parameters"] > 5e7))]
    measured = cut.loc[cut["budget_flop"] == edge, "loss"].min()
    fits = recipe.read(fitted(cut, tmp_path))[0]
    near = recipe.recipe(fits, Limit(flop=1.05 * edge))
    assert near.best.basis == "best run" and near.best.loss == pytest.approx(measured)
    above = recipe.recipe(fits, Limit(flop=1.2 * edge))  # its runs are no forecast for other budgets
    assert above.best.basis == "forecast" and above.best.loss < measured * 1.005
    assert recipe.recipe(fits, Limit(flop=0.5 * edge)).best.basis == "forecast"
    assert recipe.recipe(fits, Limit(flop=1.2 * BUDGETS[3])).best.basis == "forecast"


@pytest.mark.parametrize(
    "budget, said", [("1e31", "at most 1e30 FLOP"), ("1e8", "1e8 FLOP is less than one pair costs")]
)
def test_an_absurd_budget_is_refused(study, budget, said):
    with pytest.raises(UserError, match=f"budget: .*{said}"):
        recipe.recipe(*study[:1], parse_limit(budget), study[1])


def test_without_the_noise_of_a_run_no_method_is_decided(tmp_path):
    """One run a method and budget: by its draws, all of them equal, one method was the best with 100 %."""
    table = paper_like().query("method == 'full'").drop(columns=["backbone", "gpu_hours"])
    sizes = np.sort(table["n_parameters"].unique())[1:4]
    table = table[table["n_parameters"].isin(sizes) & (table["rank"].isna())]
    table["method"] = table["n_parameters"].map(dict(zip(sizes, "abc", strict=True)))
    fits = recipe.read(fitted(table, tmp_path))[0]
    assert fits.noise.source == "none"
    found = recipe.recipe(fits, Limit(flop=BUDGETS[1]))
    assert not found.decided and not found.chances
    told = dict(recipe.lines(found, 0.95))["lowest loss"]
    assert told == "not decided: the noise of a run is not known; give it to fit by --noise"


def test_hours_that_end_before_the_tokens_leave_the_size_its_interval(study):
    found = recipe.recipe(study[0], Limit(gpu_hours=0.3, tokens=1e13), study[1])
    assert found.n_opt_interval and found.best.tokens < 1e12
    assert not any("with the data fixed" in note for note in found.notes)


def test_a_loss_that_was_measured_is_told_apart_from_the_curve_of_its_budget(study):
    told = dict(recipe.lines(recipe.recipe(study[0], Limit(flop=BUDGETS[2]), study[1]), 0.95))
    assert told["expected loss"].endswith(", as measured")
    assert "law" in told["at the best size"]
    other = dict(recipe.lines(recipe.recipe(study[0], Limit(flop=1.7 * BUDGETS[2]), study[1]), 0.95))
    assert "law" in other["expected loss"] and other["at the best size"].endswith(")")


def test_fixed_data_take_the_largest_model_unless_a_budget_stops_it(study):
    free = recipe.recipe(study[0], Limit(tokens=1e8), study[1])
    assert free.best.n_parameters == max(row.parameters for row in BACKBONES)
    assert free.best.tokens == pytest.approx(1e8)
    assert free.best.budget_flop == pytest.approx(1e8 * free.best.flop_per_token)
    bound = recipe.recipe(study[0], Limit(flop=5e16, tokens=1e8), study[1])
    assert bound.best.tokens <= 1e8 * (1 + 1e-9)
    assert bound.best.budget_flop <= 5e16 * (1 + 1e-9)
    truth = {}
    for row in BACKBONES:
        tokens = min(1e8, 5e16 / (6 * row.parameters))
        truth[row.name] = float(np.ravel(CHINCHILLA.predict(LAWS["full"], row.parameters, tokens))[0])
    assert truth[bound.best.backbone] < 1.01 * min(truth.values())


def test_with_fixed_data_no_loss_is_forecast_above_runs_with_less(tmp_path):
    """Nine runs of the quickstart. A law that they do not fix gave an interval of the lowest loss up to 2.6e5."""
    sizes, budgets = (6592, 25472, 84912), (1e11, 2.5e11, 3.5e11)
    losses = (4.0003, 4.1431, 4.3464, 3.6716, 3.4685, 3.7521, 3.5803, 3.2111, 3.4478)
    grid = [(n, c) for c in budgets for n in sizes]
    table = pd.DataFrame(grid, columns=["n_parameters", "budget_flop"]).assign(method="full", loss=losses)
    table["tokens"] = table["budget_flop"] / (6 * table["n_parameters"])
    fits = recipe.read(fitted(table, tmp_path))[0]
    for tokens in (1e6, 3e6):
        best = table.loc[table["tokens"] <= tokens, "loss"].min()
        found = recipe.recipe(fits, Limit(tokens=tokens))
        assert found.lowest_loss_interval[1] < best * math.exp(5 * fits.noise.log_loss)


def test_without_a_law_the_recipe_names_the_best_run(tmp_path):
    table = paper_like()
    table = table[(table["method"] == "full") & (table["budget_flop"] <= BUDGETS[1])]
    table = table[table["n_parameters"].isin([row.parameters for row in BACKBONES[3:]])]
    table = table[(table["n_parameters"] != BACKBONES[3].parameters) | (table["budget_flop"] == BUDGETS[0])]
    found = recipe.recipe(*recipe.read(fitted(table, tmp_path))[:1], Limit(flop=BUDGETS[0]))
    assert found.best.basis == "best run"
    here = table[table["budget_flop"] == BUDGETS[0]]
    assert found.best.loss == pytest.approx(here["loss"].min())
    assert found.best.n_parameters == here.loc[here["loss"].idxmin(), "n_parameters"]
    assert any("no optimum" in note for note in found.notes)
    with pytest.raises(UserError, match="for 1e8 tokens a recipe needs a joint law, which no method"):
        recipe.recipe(recipe.read(tmp_path)[0], Limit(tokens=1e8))


def loss_at(budget: float, row) -> float:
    return float(np.ravel(CHINCHILLA.predict(LAWS["full"], row.parameters, budget / (6 * row.parameters)))[0])


def full_sweep(plan: dict[float, slice], method: str = "full", worse: float = 1.0) -> pd.DataFrame:
    """Return runs of full fine-tuning without noise: some of the Pythias at each budget."""
    rows = []
    for budget, chosen in plan.items():
        for row in BACKBONES[chosen]:
            cost = 6 * row.parameters
            rows.append(
                {"method": method, "backbone": row.name, "n_parameters": row.parameters, "budget_flop": budget}
                | {"tokens": budget / cost, "flop_per_token": cost, "gpu_hours": budget / FLOP_AN_HOUR}
                | {"loss": worse * loss_at(budget, row)}
            )
    return pd.DataFrame(rows)


def test_the_best_run_has_spent_the_budget(tmp_path):
    """At the lowest budget only three sizes were run, all too large. Larger sizes spent larger budgets."""
    table = full_sweep({1.5e15: slice(2, 5), 2.4e16: slice(0, 5), 3.8e17: slice(1, 6), 6e18: slice(2, 6)})
    fits = recipe.read(fitted(table, tmp_path, noise=0.003))[0]
    found = recipe.recipe(fits, Limit(flop=1.5e15))
    truth = {row.name: loss_at(1.5e15, row) for row in BACKBONES[2:5]}
    assert (found.best.backbone, found.best.basis) == ("pythia-70m", "best run")
    assert found.best.loss == pytest.approx(truth["pythia-70m"])
    assert found.n_opt == PYTHIA.sizes["pythia-70m"].parameters
    (other,) = found.others  # no smaller size was run at this budget
    assert other.choice.backbone == "pythia-160m"
    assert other.lost == pytest.approx(truth["pythia-160m"] / truth["pythia-70m"] - 1)
    assert any("best run at 1.5e15 FLOP" in note for note in found.notes)


def test_a_method_without_a_law_is_compared_only_at_its_budget(tmp_path):
    """LoRA is 3 % worse everywhere and was run at one budget; its loss there says nothing about a smaller budget."""
    plan = {budget: slice(0, 6) for budget in BUDGETS}
    table = pd.concat([full_sweep(plan), full_sweep({BUDGETS[2]: slice(0, 6)}, "other", 1.03)])
    fits = recipe.read(fitted(table, tmp_path, noise=0.003))[0]
    here = recipe.recipe(fits, Limit(flop=BUDGETS[2]))
    assert here.best.method == "full"
    (other,) = [each for each in here.others if each.what == "other"]
    assert other.lost == pytest.approx(0.03, abs=0.01)
    for budget in (BUDGETS[2] / 1.8, BUDGETS[2] * 1.8):
        found = recipe.recipe(fits, Limit(flop=budget))
        assert found.best.method == "full"
        assert found.best.loss == pytest.approx(min(loss_at(budget, row) for row in PYTHIA.sizes.values()), rel=0.02)
        (note,) = [note for note in found.notes if note.startswith("other: neither a law nor a run at this budget")]
        assert "one optimum and no joint law, from which nothing follows for other budgets; add runs" in note


def test_without_laws_only_methods_with_equal_budgets_are_compared(tmp_path):
    table = pd.concat([full_sweep({2e16: slice(0, 3)}), full_sweep({8e16: slice(0, 3)}, "other", 1.03)])
    fits = recipe.read(fitted(table, tmp_path, noise=0.003))[0]
    found = recipe.recipe(fits, Limit(flop=2.5e16))
    assert (found.best.method, found.best.basis) == ("full", "best run")
    assert found.best.loss == pytest.approx(min(loss_at(2e16, row) for row in BACKBONES[:3]))
    assert any("best run at 2e16 FLOP" in note for note in found.notes)
    assert not [each for each in found.others if each.what == "other"]


@pytest.mark.parametrize("hours", [1e5, 5e6])
def test_the_best_size_of_a_joint_law_is_found_at_any_size(tmp_path, hours):
    fits = recipe.read(fitted(full_sweep({budget: slice(0, 5) for budget in BUDGETS}), tmp_path, noise=0.002))[0]
    found = recipe.recipe(fits, Limit(gpu_hours=hours))
    _, a, b, alpha, beta = LAWS["full"]
    budget = hours * FLOP_AN_HOUR
    true = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))
    largest = BACKBONES[4].parameters
    assert found.best.basis == "joint law" and true > 4 * largest
    assert found.n_opt == pytest.approx(true, rel=0.03)
    assert found.n_opt_interval[0] <= found.n_opt <= found.n_opt_interval[1]
    assert f"best size: {found.n_opt / largest:.3g} times the largest" in found.extrapolates[1]


def test_a_best_size_above_all_known_backbones_is_reported(tmp_path):
    table = full_sweep({budget: slice(0, 4) for budget in BUDGETS}).assign(backbone="own")
    table["n_parameters"] *= 1.01
    found = recipe.recipe(recipe.read(fitted(table, tmp_path, noise=0.003))[0], Limit(flop=1e20))
    largest = 1.01 * BACKBONES[3].parameters
    assert found.best.n_parameters == largest and found.n_opt > 2 * largest
    assert any(told.startswith(f"best size: {found.n_opt / largest:.3g} times") for told in found.extrapolates)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_with_missing_runs_gives_a_recipe_or_one_line(seed, tmp_path):
    table = paper_like(seed=seed).sample(frac=[0.7, 0.3, 0.15][seed % 3], random_state=seed)
    if seed % 2:
        table = table.drop(columns=["gpu_hours", "backbone", "pairs"])
    folder = fitted(table, tmp_path)
    fits, rows = recipe.read(folder)
    for limit in (Limit(flop=1e16), Limit(flop=1e21), Limit(gpu_hours=1.0), Limit(tokens=1e9)):
        try:
            found = recipe.recipe(fits, limit, rows)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert found.best.loss > 0
        assert recipe.lines(found, 0.95)


def test_folders_without_fits_and_fits_of_another_version_are_refused(tmp_path, paper_folder, capsys):
    for verb in ("recipe", "report"):
        words = ["1e17"] if verb == "recipe" else []
        assert main([verb, str(tmp_path), *words]) == 2
        assert "does not exist; write it by embedscale fit RUNS" in capsys.readouterr().err
    fits = json.loads((paper_folder / "fits.json").read_text()) | {"format": 99, "version": "9.9"}
    del fits["checksum"]
    (tmp_path / "fits.json").write_text(json.dumps(fits))
    for verb in ("recipe", "report"):
        assert main([verb, str(tmp_path), *(["1e17"] if verb == "recipe" else [])]) == 2
        assert "made by version 9.9 in format 99" in capsys.readouterr().err


def test_the_verb_prints_the_recipe_and_how_to_train_it(paper_folder, capsys):
    assert main(["recipe", str(paper_folder), "50", "PFLOP"]) == 0
    printed = capsys.readouterr().out
    for text in ("recipe for 5e16 FLOP", "pythia-", "tokens, about", "95 %", "extrapolates:", "instead:", "--recipe"):
        assert text in printed
    assert main(["recipe", str(paper_folder), "5e16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["budget_flop"] == 5e16


@pytest.mark.slow
def test_other_ranks_are_compared_by_the_best_of_their_other_settings(tmp_path):
    """There are three learning rates, the largest of which is bad for one rank, and two seeds, whose mean counts."""
    rows = []
    for row in BACKBONES[:5]:
        for rank, penalty in ((8, 1.04), (32, 1.0), (128, 1.03)):
            cost = cost_of(row.shape, Method("lora", rank=rank))
            for rate, worse in ((1e-4, 1.5), (1e-3, 1.0), (1e-2, 3.0 if rank == 32 else 1.2)):
                for seed, luck in ((0, 1 + rank / 10**4), (1, 1 - rank / 10**4)):
                    for budget in BUDGETS[:4]:
                        tokens = budget / cost.flop_per_token
                        loss = np.ravel(CHINCHILLA.predict(LAWS["lora"], row.parameters, tokens))[0]
                        rows.append(
                            {
                                "method": "lora",
                                "backbone": row.name,
                                "n_parameters": row.parameters,
                                "budget_flop": budget,
                            }
                            | {"tokens": tokens, "flop_per_token": cost.flop_per_token, "rank": rank, "seed": seed}
                            | {"trainable_fraction": cost.n_updated / row.parameters, "learning_rate": rate}
                            | {"loss": float(loss * penalty * worse * luck)}
                        )
    table = pd.DataFrame(rows)
    fits, read = recipe.read(fitted(table, tmp_path, noise=0.003))
    found = recipe.recipe(fits, Limit(flop=BUDGETS[2]), read)
    assert (found.best.rank, found.best.learning_rate) == (32, 1e-3)
    here = table[(table["budget_flop"] == BUDGETS[2]) & (table["n_parameters"] == found.best.n_parameters)]
    lowest = here.groupby(["rank", "learning_rate"])["loss"].mean().groupby("rank").min()
    lost = {each.what.split(",")[0]: each.lost for each in found.others if each.choice is None}
    assert lost == pytest.approx({f"rank {rank}": lowest[rank] / lowest[32] - 1 for rank in (8, 128)})
    assert min(lost.values()) > 0


def test_a_size_without_a_name_is_printed_once(tmp_path):
    fits, read = recipe.read(fitted(paper_like().query("method == 'full'").drop(columns="backbone"), tmp_path))
    told = dict(recipe.lines(recipe.recipe(fits, Limit(flop=BUDGETS[2]), read), 0.95))
    assert told["model"].count("parameters") == 1 and "," in told["model"]


def test_the_next_sizes_are_other_sizes(tmp_path):
    """Each size ran twice, with a few parameters more the second time."""
    table = paper_like().query("method == 'full'").drop(columns="backbone")
    near = table.assign(n_parameters=table["n_parameters"] * 1.0004, loss=table["loss"] * 1.0001)
    found = recipe.recipe(recipe.read(fitted(pd.concat([table, near]), tmp_path))[0], Limit(flop=BUDGETS[2]))
    sizes = [each.choice.n_parameters for each in found.others if "the next" in each.what]
    assert len(sizes) == 2
    assert sizes[0] < found.best.n_parameters / 1.5 and sizes[1] > found.best.n_parameters * 1.5


@pytest.mark.slow
def test_methods_that_cannot_be_the_best_are_named_together(tmp_path):
    """Of seven methods, the first is 20 % better than all others."""
    table = paper_like().query("method == 'full'")
    every = [table] + [table.assign(method=f"other-{i}", loss=table["loss"] * 1.2) for i in range(6)]
    told = recipe.lines(recipe.recipe(recipe.read(fitted(pd.concat(every), tmp_path))[0], Limit(flop=BUDGETS[2])), 0.95)
    assert dict(told)["lowest loss"] == "full 100 %, 6 others below 1 % each"


@pytest.mark.parametrize(("share", "told"), [(1.0, "freeze, all blocks active"), (0.5, "freeze, 0.5 of the blocks")])
def test_a_freezing_fraction_is_a_share_of_the_blocks(tmp_path, share, told):
    table = paper_like().query(f"method == 'freeze' and trainable_fraction == {share}")
    found = recipe.recipe(recipe.read(fitted(table, tmp_path))[0], Limit(flop=BUDGETS[2]))
    assert found.best.label.startswith(told)


def test_fit_report_and_recipe_start_without_slow_imports(paper_folder):
    """torch takes seconds to import; pandas and matplotlib take most of a second."""
    for verb, words, slow in (
        ("recipe", ["recipe", str(paper_folder), "1e16"], ("torch", "pandas", "matplotlib", "scipy", "lightning")),
        ("report", ["report", "nowhere"], ("torch", "matplotlib", "scipy", "lightning")),
        ("fit", ["fit", "nowhere"], ("torch", "matplotlib", "scipy", "lightning")),
    ):
        code = (
            f"import sys; from embedscale.cli import main; main({words!r}); "
            f"print([name for name in {slow!r} if name in sys.modules], file=sys.stderr)"
        )
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
        assert told.splitlines()[-1] == "[]", (verb, told)


def test_a_joint_law_without_a_finite_loss_is_no_law(tmp_path):
    """Losses hardly fall with the data, so the draws of the joint law's data term leave a float's range."""
    budgets, sizes = 1e15 * 4.0 ** np.arange(3), 1e6 * 3.0 ** np.arange(3)
    rows = [(n, c / 6 / n, c, 1 + 1 / n - 1e-12 * np.log(c / 6 / n)) for c in budgets for n in sizes]
    table = pd.DataFrame(rows, columns=["n_parameters", "tokens", "budget_flop", "loss"])
    fits = recipe.read(fitted(table, tmp_path))[0]
    assert fits.methods["full"].joint_laws
    with pytest.raises(UserError, match="nothing is known about 1e18 FLOP; full: no optimum and no joint law"):
        recipe.recipe(fits, Limit(flop=1e18))
