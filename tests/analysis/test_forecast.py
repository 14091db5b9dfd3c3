"""Forecasts against the laws that drew the runs: what is known, what is not, and what the table forbids to say."""

import re
import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from analysis import recipe, runs
from analysis.advice.evidence import Limit
from analysis.advice.forecast import Outlook
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA
from analysis.noise import Noise
from embedscale.errors import UserError
from embedscale.texts import number

LAW = np.array([1.7, 400.0, 2000.0, 0.34, 0.37])
BUDGETS = 1e17 * 4.0 ** np.arange(5)


def table(budgets=BUDGETS, sizes=7, noise: float = 0.0, law=LAW) -> pd.DataFrame:
    """Return runs of Chinchilla's law: at each budget, sizes about the best one, a factor of two apart."""
    rng, rows = np.random.default_rng(0), []
    for budget in budgets:
        n = optimum(budget, law)[0] * 2.0 ** (np.arange(sizes) - (sizes - 1) / 2)
        loss = CHINCHILLA.predict(law, n, budget / (6 * n)) * np.exp(noise * rng.standard_normal(sizes))
        rows.append(pd.DataFrame({"n_parameters": n, "tokens": budget / (6 * n), "budget_flop": budget, "loss": loss}))
    return pd.concat(rows)


def optimum(budget: float, law=LAW) -> tuple[float, float]:
    """Return the closed form of N* and the loss there."""
    _, a, b, alpha, beta = law
    n = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))
    return n, float(CHINCHILLA.predict(law, np.array([n]), np.array([budget / (6 * n)]))[0])


def outlook(frame: pd.DataFrame, **settings) -> Outlook:
    fits = fit(runs.load(frame), **{"bootstrap": 100} | settings)
    return Outlook(fits.methods["full"], fits.noise)


@pytest.mark.parametrize("noise", [0.0, 0.003])
@pytest.mark.parametrize("factor", [1, 2, 4, 16])
def test_a_floor_that_a_power_law_ignores_is_in_the_forecast(noise, factor):
    """At 16 times the largest budget, the line through the optima lies 5 % below the truth."""
    found = outlook(table(noise=noise), **({"noise": noise} if noise else {})).at(factor * BUDGETS[-1])
    n, loss = optimum(factor * BUDGETS[-1])
    (value, ends), (size, of_size) = found.loss(0.95), found.n_opt(0.95)
    assert value == pytest.approx(loss, rel=0.01) and ends[0] <= loss <= ends[1]
    assert size == pytest.approx(n, rel=0.1) and of_size[0] <= n <= of_size[1]
    assert np.allclose(found.log_n + found.log_d, np.log(factor * BUDGETS[-1] / 6))
    line = outlook(table(noise=noise)).fit.power_laws.loss
    assert factor < 4 or line.at(16 * BUDGETS[-1]) < 0.96 * optimum(16 * BUDGETS[-1])[1]


def test_the_spread_grows_with_the_distance_and_hold_outs_choose_the_law():
    found = outlook(table())
    widths = [np.ptp(np.percentile(found.at(x * BUDGETS[-1]).log_loss, [2.5, 97.5])) for x in (1, 2, 4, 16, 256)]
    assert widths == sorted(widths)
    assert found.laws["power law"] < 0.05
    few = outlook(table(BUDGETS[:3]))
    assert few.laws["power law"] > found.laws["power law"]


def test_the_interval_of_a_noise_free_table_holds_its_optimum_and_its_law():
    """A power law through these optima is 5.780 where the first optimum is 5.892, and 2.861 where the law is 3.275."""
    floor, exponent, beyond = 2.73718481, 0.20457165, 5694.66
    term = (5.892 - floor) / 2 * (BUDGETS[0] / 6) ** exponent
    fits = fit(
        runs.load(table(law=np.array([floor, term, term, 2 * exponent, 2 * exponent]))), bootstrap=100, residual="log"
    )
    for budget, by_line, true in ((BUDGETS[0], 5.78, 5.892), (beyond * BUDGETS[0], 2.861, 3.275)):
        assert fits.methods["full"].power_laws.loss.at(budget) == pytest.approx(by_line, rel=1e-3)
        printed = dict(recipe.lines(recipe.recipe(fits, Limit(flop=budget)), 0.95))["at the best size"]
        value, *ends = map(float, re.findall(r"\d\.\d+", printed))
        assert value == pytest.approx(true, rel=2e-3)
        assert not ends or ends[0] <= true <= ends[1]
        assert ends or budget == BUDGETS[0]


def test_a_budget_at_which_the_laws_have_no_optimum_is_refused():
    """All sizes are below the best one, so that the joint law alone speaks; at 1e30 FLOP its N* is far beyond them."""
    best = optimum(BUDGETS[0])[0]
    frame = table(BUDGETS[:3], sizes=9)
    fits = fit(runs.load(frame[frame["n_parameters"] < best / 2]), noise=0.003, bootstrap=100, residual="log")
    assert not fits.methods["full"].interior and fits.methods["full"].joint_laws
    assert recipe.recipe(fits, Limit(flop=1e20)).best.basis == "joint law"
    with pytest.raises(UserError, match="about 1e30 FLOP; full: no law has an optimum within 10,000 times"):
        recipe.recipe(fits, Limit(flop=1e30))


def test_a_forecast_at_a_budget_that_was_run_is_its_optimum():
    found = outlook(table(noise=0.003), noise=0.003)
    for row in found.fit.interior:
        here = found.at(row.budget_flop)
        for (value, ends), true, own in (
            (here.loss(0.95), row.loss, row.loss_interval),
            (here.n_opt(0.95), row.n_opt, row.n_opt_interval),
        ):
            assert value == pytest.approx(true, rel=1e-3)
            assert ends[0] <= true <= ends[1]
            assert own[1] / own[0] <= 1.02 * ends[1] / ends[0] <= 1.2 * own[1] / own[0]


def test_a_line_through_two_optima_extrapolates_nothing():
    """Two budgets of three sizes: six runs, too few for a joint law with a hold-out, and optima that fix a line."""
    frame = table(BUDGETS[:2], sizes=3).iloc[:-1]
    more = table(BUDGETS[1:2], sizes=3)
    frame = pd.concat([frame.iloc[:3], more]).iloc[:6]
    fits = fit(runs.load(frame[frame["n_parameters"] > 0]), noise=0.003, bootstrap=100, residual="log")
    fits.methods["full"].joint_laws.clear()
    found = Outlook(fits.methods["full"], Noise(0.003, "given", 0))
    assert not found.covers(4 * BUDGETS[1]) and found.covers(2 * BUDGETS[0])
    assert "two optima and no joint law, from which nothing follows for other budgets; add runs" in found.missing
    assert f"{number(4 * BUDGETS[1])} FLOP" in found.missing


def test_no_forecast_lies_above_what_a_smaller_budget_reached():
    """A run of a size far outside the profiles beats every law; thirteen runs do not tell that it is far off theirs."""
    frame = table(BUDGETS[:3], sizes=4, noise=0.001)
    lucky = pd.DataFrame([{"n_parameters": 3e9, "tokens": 1e9, "budget_flop": 1.8e19, "loss": 2.0}])
    found = outlook(pd.concat([frame, lucky]), noise=0.001)
    value, ends = found.at(4e19).loss(0.95)
    assert value <= 2.0 * 1.002 and ends[0] <= 2.0
    assert found.at(1e19).loss(0.95)[0] > 2.1


def advised(budget: float, fits) -> tuple[float, recipe.Recipe]:
    """Return the true loss of the size that the recipe for a budget names, and the recipe."""
    found = recipe.recipe(fits, Limit(flop=budget))
    n = found.best.n_parameters
    return float(CHINCHILLA.predict(LAW, n, budget / (6 * n))[0]), found


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_where_the_best_size_was_not_run_the_largest_that_was_is_expected_at_its_law(noise):
    """A parabola rises without end: at 1e5 times the largest budget it said 2.45 for a loss of 1.97."""
    fits = fit(runs.load(table(noise=noise)), bootstrap=100, residual="log", **({"noise": noise} if noise else {}))
    expected = []
    for factor in (10, 1e3, 1e5):
        true, found = advised(factor * BUDGETS[-1], fits)
        assert found.best.loss == pytest.approx(true, rel=0.005)
        assert found.best.loss_interval[0] < true < found.best.loss_interval[1]
        assert factor < 1e3 or found.best.n_parameters == max(p.n_parameters for p in fits.methods["full"].points)
        expected.append(found.best.loss)
    assert expected == sorted(expected, reverse=True)


def test_without_a_joint_law_no_size_is_expected_to_lose_by_more_compute():
    fits = fit(runs.load(table(noise=0.003)), bootstrap=100, residual="log", noise=0.003)
    fits.methods["full"].joint_laws.clear()
    expected = [advised(factor * BUDGETS[-1], fits)[1].best.loss for factor in (4, 10, 1e3, 1e5)]
    assert all(after <= before * 1.001 for before, after in pairwise(expected))


def test_a_run_far_off_the_law_binds_no_other_budget():
    """One loss a fifth too low at the smallest budget was the forecast for a decade above it."""
    frame = table(noise=0.002).reset_index(drop=True)
    frame.loc[3, "loss"] *= 0.8
    found_fits = fit(runs.load(frame), noise=0.002, bootstrap=100)  # Huber's residual is for such runs
    found = Outlook(found_fits.methods["full"], found_fits.noise)
    for factor in (1.5, 3.99, 4.04, 10):
        value, ends = found.at(factor * BUDGETS[0]).loss(0.95)
        true = optimum(factor * BUDGETS[0])[1]
        assert value == pytest.approx(true, rel=0.01) and ends[0] < true < ends[1]
    (told,) = [note for note in advised(4.04 * BUDGETS[0], found_fits)[1].notes if "not counted" in note]
    assert told.startswith(f"a run at {number(BUDGETS[0])} FLOP reached {number(frame['loss'][3], 4)}, far below")


@pytest.mark.parametrize("kind", ["lucky", "rising"])
def test_an_optimum_that_was_measured_stands_whatever_runs_with_less_reached(kind):
    """A run 20 % below all others, and losses that rise with the budget: more compute should not be worse."""
    frame = table(noise=0.001).reset_index(drop=True)
    if kind == "lucky":
        frame.loc[7 * 2 + 3, "loss"] *= 0.8
    else:
        frame["loss"] *= (frame["budget_flop"] / BUDGETS[0]) ** 0.15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = fit(runs.load(frame), noise=0.001, bootstrap=100, residual="log")
        for budget in BUDGETS:
            best = frame.loc[frame["budget_flop"] == budget, "loss"].min()
            found = recipe.recipe(fits, Limit(flop=budget))
            assert found.best.loss == pytest.approx(best, rel=0.01)
            assert found.lowest_loss == pytest.approx(best, rel=0.01)
    told = [note for note in fits.notes if "worse than one with less: look at these runs" in note]
    count = {"lucky": 2, "rising": 4}[kind]
    assert len(told) == 1 and f"{count} of 5 budgets" in told[0]
    assert number(frame["loss"].min(), 4) in told[0]


def test_budgets_that_have_no_optimum_are_told_apart_from_those_that_were_run():
    frame = table(noise=0.001)
    cut = frame[(frame["budget_flop"] < BUDGETS[3]) | (frame["n_parameters"] < optimum(BUDGETS[3])[0] / 2.5)]
    fits = fit(runs.load(cut), noise=0.001, bootstrap=100, residual="log")
    assert [row.interior for row in fits.methods["full"].optima] == [True] * 3 + [False] * 2
    told = recipe.recipe(fits, Limit(flop=16 * BUDGETS[-1])).extrapolates
    assert told[0] == f"budget: 16 times the largest ({number(BUDGETS[-1])} FLOP)"
    assert told[1] == f"budget with an optimum: 256 times the largest ({number(BUDGETS[2])} FLOP)"


def test_a_budget_for_which_most_draws_have_no_optimum_is_refused():
    fits = fit(runs.load(table()), bootstrap=100, residual="log")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="nothing is known about 1 FLOP; full: no law has an optimum"):
            recipe.recipe(fits, Limit(flop=1.0))


def test_what_cannot_be_known_is_refused_in_one_line():
    frame = pd.concat([table(BUDGETS[:2], sizes=3)])
    fits = fit(runs.load(frame), noise=0.003, bootstrap=100, residual="log")
    fits.methods["full"].joint_laws.clear()
    with pytest.raises(UserError, match="budget: nothing is known about 1e19 FLOP; full: two optima and no joint law"):
        recipe.recipe(fits, Limit(flop=1e19))


def test_which_method_is_best_is_a_probability():
    """LoRA is 0.1 % worse at a noise of 1 %, freezing 20 %."""
    every = [
        table(noise=0.01).assign(method="full"),
        table(noise=0.01, law=LAW * [1.001, 1, 1, 1, 1]).assign(method="lora"),
        table(law=LAW * [1.3, 1.2, 1.2, 1, 1]).assign(method="freeze"),
    ]
    fits = fit(runs.load(pd.concat(every)), noise=0.01, bootstrap=100, residual="log")
    found = recipe.recipe(fits, Limit(flop=4 * BUDGETS[-1]))
    assert sum(found.chances.values()) == pytest.approx(1)
    assert not found.decided and found.chances["freeze"] < 0.01
    assert {"full", "lora"} == {name for name, chance in found.chances.items() if chance > 0.05}
    assert "not decided" in dict(recipe.lines(found, 0.95))["lowest loss"]
