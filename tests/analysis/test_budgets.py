"""Budgets that are only nearly equal: one profile, each run at its own budget, and losses compared at one budget."""

import numpy as np
import pandas as pd
import pytest
from law_sweep import BUDGETS, FULL, sweep

from analysis import runs
from analysis.fitting import grouping
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA

LAW = np.array([0.55, 300.0, 60.0, 0.35, 0.3])  # N* grows as C^(0.3 / 0.65) = C^0.4615


def jittered(spread: float, seed: int = 0, noise: float = 5e-4) -> pd.DataFrame:
    """Seven sizes about the best of four budgets; each run's budget is off by up to `spread`."""
    rng, rows = np.random.default_rng(seed), []
    for budget in 1e15 * 4.0 ** np.arange(4):
        best = (0.35 * 300 / (0.3 * 60)) ** (1 / 0.65) * (budget / 6) ** (0.3 / 0.65)
        for n in best * 1.6 ** np.arange(-3, 4):
            c = budget * (1 + spread * rng.uniform(-1, 1))
            loss = np.ravel(CHINCHILLA.predict(LAW, n, c / 6 / n))[0] * np.exp(noise * rng.standard_normal())
            rows.append({"n_parameters": n, "tokens": c / 6 / n, "budget_flop": c, "loss": loss})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("spread", [0.03, 0.05, 0.1])
def test_a_spread_of_budgets_moves_neither_the_exponent_nor_its_interval(spread):
    held = []
    for seed in range(6):
        exact, found = (fit(runs.load(jittered(each, seed)), bootstrap=200, residual="log") for each in (0.0, spread))
        assert len(found.runs.budgets) == 4
        line, own = (each.methods["full"].power_laws.n_opt for each in (found, exact))
        assert line.exponent == pytest.approx(own.exponent, abs=0.003)
        low, high = line.exponent_interval
        held.append(low <= 0.3 / 0.65 <= high)
    assert sum(held) >= 5


def test_without_a_law_a_surface_moves_the_losses():
    table = jittered(0.05, noise=0.0)
    table["profile"] = grouping.group_budgets(table["budget_flop"].to_numpy())
    truth = CHINCHILLA.predict(LAW, table["n_parameters"], table["profile"] / 6 / table["n_parameters"])
    moved = grouping.at_profile(table, None)
    before, after = (np.abs(np.log(each["loss"] / truth)).max() for each in (table, moved))
    assert after < 0.2 * before
    assert moved["own_loss"].tolist() == table["loss"].tolist()
    assert moved["own_budget"].tolist() == table["budget_flop"].tolist()


def test_the_best_run_is_told_as_it_was_run():
    table = jittered(0.05)
    for row in fit(runs.load(table), bootstrap=100, residual="log").methods["full"].optima:
        assert (row.best.loss, row.best.budget_flop) in zip(table["loss"], table["budget_flop"], strict=True)


def test_budgets_within_a_tenth_of_their_middle_are_one_profile():
    rng = np.random.default_rng(0)
    for factor in (1.5, 2, 4):
        middle = 1e15 * factor ** np.arange(5)
        spread = (middle[:, None] * rng.uniform(0.9, 1.1, (5, 7))).ravel()
        grouped = grouping.group_budgets(spread).reshape(5, 7)
        assert (grouped == grouped[:, :1]).all() and len(np.unique(grouped)) == 5
    ladder = 1e15 * 1.2 ** np.arange(10)
    assert grouping.group_budgets(ladder).tolist() == ladder.tolist()
    assert grouping.group_budgets(np.array([1e17] * 5 + [1.05e17])).tolist() == [1e17] * 6


def test_equal_budgets_that_differ_in_their_last_digits_make_replicates():
    table = sweep(methods=("full",), seeds=2)
    table["budget_flop"] *= 1 + 1e-9 * table["seed"]
    found = fit(runs.load(table), bootstrap=100, residual="log")
    assert {point.seeds for point in found.methods["full"].points} == {2}
    assert found.noise.replicates_freedom == 30


def test_the_setting_is_chosen_before_the_budgets_last_per_cent_counts():
    """Three learning rates at budgets 1 % apart: the best rate stands, not a point for each budget."""
    rows = []
    for number, (rate, worse) in enumerate([(1e-4, 1.02), (1e-3, 1.0), (1e-2, 1.03)]):
        part = sweep(methods=("full",), noise=0.0)
        c = part["budget_flop"] * (1 + 0.01 * number)
        loss = CHINCHILLA.predict(FULL, part["n_parameters"], c / 6 / part["n_parameters"]) * worse
        rows.append(part.assign(budget_flop=c, tokens=c / 6 / part["n_parameters"], loss=loss, learning_rate=rate))
    points = fit(runs.load(pd.concat(rows)), bootstrap=100, residual="log").methods["full"].points
    assert {(point.setting("learning_rate"), point.tried) for point in points} == {(1e-3, 3)}
    assert len(points) == 6 * len(BUDGETS)


def test_bins_of_compute_give_optima_where_no_budget_repeats():
    """Runs at random budgets and sizes; the lowest of each bin follows the law (Hoffmann et al. 2022, approach 1)."""
    rng = np.random.default_rng(0)
    c = np.exp(rng.uniform(np.log(1e15), np.log(1e18), 400))
    best = (0.35 * 300 / (0.3 * 60)) ** (1 / 0.65) * (c / 6) ** (0.3 / 0.65)
    n = best * np.exp(rng.uniform(-2, 2, 400))
    table = pd.DataFrame({"n_parameters": n, "budget_flop": c, "tokens": c / 6 / n})
    table["loss"] = CHINCHILLA.predict(LAW, n, c / 6 / n)
    found = fit(runs.load(table), bootstrap=100, residual="log", bins=4, optimum="best-run")
    assert len(found.runs.budgets) in (12, 13)
    line = found.methods["full"].power_laws.n_opt
    assert line.points >= 10 and line.exponent == pytest.approx(0.3 / 0.65, abs=0.03)
    for row in found.methods["full"].interior:
        assert np.abs(np.log(row.n_opt / n)).min() < 1e-9
