"""Intervals hold the true value as often as they state."""

import numpy as np
import pandas as pd
import pytest

from analysis import runs
from analysis.fitting import uncertainty
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA, TRAINABLE_FRACTION, interval
from analysis.fitting.optima import Profile
from analysis.fitting.solver import fit_joint
from analysis.fitting.uncertainty import resampled

REPEATS = 200
NOISE = 0.005


def chinchilla_sweep(alpha: float, beta: float, shift: float):
    """Return coefficients, N, D, S of nine sizes at six budgets, `shift` decades away from the optima."""
    budgets = 1.5e15 * 4.0 ** np.arange(6)
    a = 400.0
    b = a * alpha / beta * 3e7**-alpha * (budgets[2] / 6 / 3e7) ** beta  # N* is 3e7 at the third budget
    share = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    best = share * (budgets / 6) ** (beta / (alpha + beta))
    n = np.ravel(best[:, None] * 10 ** (np.linspace(-1.5, 1.5, 9) + shift))
    return np.array([0.4, a, b, alpha, beta]), n, np.repeat(budgets, 9) / 6 / n, np.ones_like(n)


def freezing_sweep(alpha: float, beta: float, shift: float):
    axes = np.geomspace(1.2e6, 2.5e9, 6) * 10**shift, 1.5e15 * 4.0 ** np.arange(4), np.array([1, 2, 4]) / 4
    n, c, s = (axis.ravel() for axis in np.meshgrid(*axes))
    return np.array([0.4, 1.0, 60.0, 60.0, 1.5, 900.0, alpha, beta]), n, c / (2 * n + 4 * s * n), s


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "alpha", "beta", "shift"),
    [
        (CHINCHILLA, 0.35, 0.35, 0.0),
        (CHINCHILLA, 0.35, 0.35, 0.5),
        (CHINCHILLA, 0.3, 0.45, 0.0),
        (CHINCHILLA, 0.3, 0.45, 0.5),
        (TRAINABLE_FRACTION, 0.3, 0.45, 0.5),
    ],
)
def test_intervals_cover_the_truth(law, alpha, beta, shift):
    """Checked over 200 sweeps for the 95 % intervals of coefficients and of a prediction at 16 times the budget."""
    sweep = chinchilla_sweep if law is CHINCHILLA else freezing_sweep
    values, n, d, s = sweep(alpha, beta, shift)
    beyond = np.array([4 * n.max()]), np.array([4 * d.max()]), np.array([0.5])
    truth, future = np.ravel(law.predict(values, n, d, s)), law.predict(values, *beyond)
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(REPEATS):
        loss = truth * np.exp(NOISE * rng.standard_normal(len(n)))
        fit = fit_joint(law, n, d, loss, s, residual="log", starts=4)
        draws = resampled(fit, list(loss[:, None]), 100, rng)  # the fewest that `fit` takes
        drawn = np.column_stack([draws, law.predict(draws, *beyond)])
        ends = [interval(column) for column in drawn.T]
        hits.append([low <= true <= high for (low, high), true in zip(ends, [*values, future[0]], strict=True)])
    covered = np.mean(hits, 0)
    print(
        f"\n{law.name} alpha={alpha} beta={beta} shift={shift}:",
        dict(zip((*law.coefficients, "future"), covered, strict=True)),
    )
    assert covered.min() >= 0.90
    assert covered.max() <= 0.98


def test_more_seeds_narrow_the_interval():
    values, n, d, _ = chinchilla_sweep(0.35, 0.35, 0.0)
    truth = np.ravel(CHINCHILLA.predict(values, n, d))
    widths = []
    for seeds in (1, 16):
        rng = np.random.default_rng(0)
        losses = truth[:, None] * np.exp(0.02 * rng.standard_normal((len(n), seeds)))
        fit = fit_joint(CHINCHILLA, n, d, losses.mean(1), residual="log", weights=np.full(len(n), seeds))
        draws = resampled(fit, list(losses), 400, rng)
        low, high = interval(draws[:, 3])
        assert low < 0.35 < high
        widths.append(high - low)
    # Both runs and seeds are drawn, which needs √2 times the noise of a mean.
    assert widths[0] / widths[1] == pytest.approx(4 / np.sqrt(2), rel=0.35)


def test_the_spread_of_an_optimum_follows_its_parabola():
    """With three points at distance h, the vertex spreads by noise / (2 a h √2) around the middle point."""
    h, curvature, noise = np.log(3), 0.05, 1e-4
    x = np.log(1e8) + h * np.arange(-1, 2)
    loss = np.exp(curvature * (x - x[1]) ** 2)
    points = pd.DataFrame(
        {"n_parameters": np.exp(x), "loss": loss, "flop_per_token": 6 * np.exp(x), "seeds": [1, 1, 1]}
    )
    draws = uncertainty.optimum_draws(Profile(1e18, points), "parabola", 4, noise, 20000, np.random.default_rng(0))
    assert draws.log_n.std() == pytest.approx(noise / (2 * curvature * h * np.sqrt(2)), rel=0.03)
    assert draws.valid_share == 1
    assert draws.log_n + draws.log_d == pytest.approx(np.log(1e18 / 6))


def test_seeds_narrow_the_spread_of_a_point():
    x = np.log(np.geomspace(1e6, 1e9, 7))
    points = pd.DataFrame(
        {"n_parameters": np.exp(x), "loss": np.exp(0.02 * (x - x[3]) ** 2), "flop_per_token": 6 * np.exp(x)}
    )
    spreads = [
        uncertainty.optimum_draws(
            Profile(1e18, points.assign(seeds=seeds)), "akima", 4, 1e-3, 4000, np.random.default_rng(0)
        ).log_n.std()
        for seeds in (1, 4)
    ]
    assert spreads[0] > 1.3 * spreads[1]


def test_intervals_are_percentiles_of_finite_draws():
    draws = np.arange(1001.0)
    assert interval(draws) == pytest.approx([25, 975])
    assert interval(draws, 0.8) == pytest.approx([100, 900])
    draws[:400] = np.nan
    assert interval(draws) == pytest.approx([415, 985])
    draws[:600] = np.nan
    assert interval(draws) is None


def test_crossings_are_where_lines_meet():
    a, b = np.array([8.39, -0.21]), np.array([8.93, -0.2238])
    assert np.exp(uncertainty.crossing(a, b)) == pytest.approx(np.exp(0.54 / 0.0138))
    assert np.isnan(uncertainty.crossing(a, a))


def test_the_spread_of_a_budget_has_a_minimum_and_grows_with_missing_draws():
    draws = np.array([[1.0, 3.0, np.nan, np.nan], [5.0, 5.0, 5.0, 5.0], [1.0, 1.0, 3.0, 3.0]])
    assert uncertainty.floored_spread(draws, np.full(3, 0.1)) == pytest.approx([2.0, 0.1, 1.0])


def test_intervals_of_optima_hold_the_truth_on_a_wide_grid():
    """Parabolas through sizes a factor 4.5 apart are biased by more than their noise; the intervals allow for it."""
    rows, held = [], []
    sizes = 1.2e6 * 4.5 ** np.arange(6)
    for budget in 1.5e15 * 4.0 ** np.arange(5):
        best = (0.45 / 0.35) ** (1 / 0.8) * (budget / 6) ** (0.35 / 0.8)
        loss = CHINCHILLA.predict(np.array([0.3, 900, 900, 0.45, 0.35]), sizes, budget / 6 / sizes)
        columns = {"budget_flop": budget, "n_parameters": sizes, "tokens": budget / 6 / sizes, "loss": loss}
        rows.append(pd.DataFrame(columns).assign(best=best))
    table = pd.concat(rows, ignore_index=True)
    for seed in range(6):
        noise = 0.002 * np.random.default_rng(seed).standard_normal(len(table))
        drawn = runs.load(table.drop(columns="best").assign(loss=table["loss"] * np.exp(noise)))
        found = fit(drawn, bootstrap=200, residual="log")
        for row in found.methods["full"].interior:
            truth = table["best"][np.isclose(table["budget_flop"], row.budget_flop)].iloc[0]
            held.append(row.n_opt_interval[0] <= truth <= row.n_opt_interval[1])
    assert len(held) >= 20 and np.mean(held) >= 0.85
