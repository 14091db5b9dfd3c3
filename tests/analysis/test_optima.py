"""IsoFLOP optima: the sweeps of Porian et al., exact parabolas, and every state."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fitting import grouping, laws, optima, uncertainty
from analysis.fitting.laws import CHINCHILLA, lowest_point, power_law
from analysis.fitting.optima import Profile
from embedscale.errors import UserError
from embedscale.run.families import PYTHIA

PORIAN = Path(__file__).resolve().parents[3] / "shared" / "data" / "porian_isoflop"
needs_porian = pytest.mark.skipif(not PORIAN.exists(), reason="Porian et al.'s sweeps are not on this machine")


def profile(sizes, losses, diverged=(), budget: float = 1e17) -> Profile:
    sizes = np.asarray(sizes, float)
    points = pd.DataFrame(
        {"n_parameters": sizes, "loss": losses, "flop_per_token": 6 * sizes, "seeds": 1, "budget_flop": budget}
    )
    return Profile(budget, points, tuple(diverged))


def sweeps():
    """Return (published row, [(budget, ln N, losses)]) of each experiment."""
    points, published = pd.read_csv(PORIAN / "isoflop_points.csv"), pd.read_csv(PORIAN / "published_fits.csv")
    for row in published.itertuples():
        mine = points[points["experiment"] == row.experiment].sort_values("N")
        yield row, [(c, np.log(part["N"].to_numpy()), part["loss"].to_numpy()) for c, part in mine.groupby("flops")]


@needs_porian
def test_akima_and_the_windowed_parabola_reproduce_porians_exponents():
    seen = 0
    for row, profiles in sweeps():
        budgets = np.array([budget for budget, *_ in profiles])
        by_akima = np.exp([optima.akima(x, np.log(loss)[None])[0][0] for _, x, loss in profiles])
        by_parabola = np.exp([optima.parabola(x, np.log(loss)[None])[0][0] for _, x, loss in profiles])
        assert power_law(budgets, by_akima)[1] == pytest.approx(row.n_exponent, abs=0.01)
        assert power_law(budgets, by_parabola)[1] == pytest.approx(row.n_exponent, abs=0.035)
        seen += 1
    assert seen == 15


@needs_porian
def test_the_noise_bootstrap_reproduces_porians_intervals():
    rng = np.random.default_rng(0)
    for row, profiles in sweeps():
        noise = 0.002 if row.dataset == "rw" else 0.01  # standard deviation of the loss, as in their code
        budgets = np.array([budget for budget, *_ in profiles])
        draws = [
            optima.akima(x, np.log(loss + noise * rng.standard_normal((1000, len(x)))))[0] for _, x, loss in profiles
        ]
        floors = np.array([0.33 * 25 * np.ptp(x) / (25 * (len(x) - 1) - 1) for _, x, _ in profiles])
        weights = uncertainty.floored_spread(np.array(draws), floors) ** -2
        exponents = uncertainty.power_law_draws(budgets, np.array(draws), weights)[:, 1]
        assert laws.interval(exponents) == pytest.approx([row.n_exponent_ci_lo, row.n_exponent_ci_hi], abs=0.01)


def test_a_parabola_is_exact_and_each_draw_has_its_own_window():
    x = np.log(np.geomspace(1e6, 1e9, 13))
    tops = np.array([x[2], x[6] + 0.1, x[10] - 0.1])
    loss = 0.02 * (x - tops[:, None]) ** 2 + 0.5
    log_n, lowest, curvature = optima.parabola(x, loss)
    assert log_n == pytest.approx(tops)
    assert lowest == pytest.approx([0.5] * 3)
    assert curvature == pytest.approx([0.02] * 3)


def test_a_far_point_does_not_move_the_windowed_parabola():
    x = np.log(np.geomspace(1e6, 1e9, 13))
    loss = (0.02 * (x - x[6]) ** 2)[None]
    loss[0, -1] += 5
    assert optima.parabola(x, loss, window=4)[0] == pytest.approx([x[6]])
    assert abs(optima.parabola(x, loss, window=1e6)[0][0] - x[6]) > 0.1


def test_the_window_holds_the_neighbours_of_the_best_size_at_any_distance():
    x = np.log(1e7 * np.array([0.1, 0.2, 0.26, 1, 3.9, 5, 10]))
    loss = 0.02 * (x - x[3] - 0.1) ** 2
    far = loss + np.array([0.9, 0.8, 0, 0, 0, 0.8, 0.9])  # at 5 and 10 times the best size, and at a fifth of it
    assert optima.parabola(x, far[None], window=4)[0] == pytest.approx([x[3] + 0.1])
    assert abs(optima.parabola(x, far[None], window=8)[0][0] - x[3] - 0.1) > 0.01
    apart = np.log(np.geomspace(1e6, 1e9, 4))
    assert optima.parabola(apart, (apart - apart[1] - 0.3)[None] ** 2, window=4)[0] == pytest.approx([apart[1] + 0.3])


def test_a_vertex_outside_the_sizes_does_not_count():
    x, loss = np.log(2) * np.arange(7), np.array([[6, 5, 4, 3, 2, 1, 1.01]])
    fitted = np.polyfit(x, loss[0], 2)
    assert fitted[0] > 0 and -fitted[1] / (2 * fitted[0]) > x[-1]
    assert np.isnan(optima.parabola(x, loss, window=1e6)).all()


def test_the_minimum_of_a_curve_is_finer_than_its_grid():
    grid = np.linspace(0, 1, 11)
    vertex, lowest = lowest_point(grid, 3 * (grid - np.array([[0.43], [0.5]])) ** 2 + 0.2)
    assert vertex == pytest.approx([0.43, 0.5]) and lowest == pytest.approx([0.2, 0.2])


def test_a_diverged_run_belongs_to_a_nearly_equal_budget():
    points = pd.DataFrame({"n_parameters": [1e6, 2e6, 4e6] * 2, "budget_flop": [1e15] * 3 + [4e15] * 3, "loss": 1.0})
    lost = pd.DataFrame({"n_parameters": [8e6, 9e6], "budget_flop": [1.05e15, 2e15]})
    found = {each.budget: each.diverged for each in optima.profiles(points, lost)}
    assert found == {1e15: (8e6,), 2e15: (9e6,), 4e15: ()}


def test_a_minimum_at_an_end_does_not_count():
    x = np.log(np.geomspace(1e6, 1e9, 7))
    ends = np.stack([x, -x])
    assert np.isnan(optima.parabola(x, ends)[0]).all()
    assert np.isnan(optima.akima(x, ends)[0]).all()


@pytest.mark.parametrize(("alpha", "beta"), [(0.35, 0.35), (0.3, 0.45)])
def test_the_laws_optimum_is_the_closed_form(alpha, beta):
    """Hoffmann et al. 2022, equation 4."""
    values, budget = np.array([0.4, 300.0, 900.0, alpha, beta]), 1e18
    points = profile(np.geomspace(1e5, 1e11, 4), [1, 1, 1, 1]).points.assign(trainable_fraction=1.0)
    found = optima.law_optimum(CHINCHILLA, values, points, budget)
    share = (alpha * 300 / (beta * 900)) ** (1 / (alpha + beta))
    assert np.exp(found[0]) == pytest.approx([share * (budget / 6) ** (beta / (alpha + beta))], rel=1e-4)
    assert 6 * np.exp(found[0] + found[1]) == pytest.approx([budget], rel=1e-9)
    at_an_end = optima.law_optimum(CHINCHILLA, values, points, 1e9)
    assert np.isnan(at_an_end[0]).all()


SUITE_SIZES = [PYTHIA.sizes[name].parameters for name in ("pythia-31m", "pythia-70m", "pythia-160m")]


@pytest.mark.parametrize(
    ("case", "state", "add", "told"),
    [
        (profile([1, 4, 16], [2, 1, 2]), "interior", None, ""),
        (profile([1, 4, 16], [3, 2, 1]), "edge", 64, "the best size is the largest: add one above it, of about 64"),
        (profile([1, 4, 16], [1, 2, 3]), "edge", 0.25, "the best size is the smallest: add one below it"),
        (profile(SUITE_SIZES, [3, 2, 1]), "edge", PYTHIA.sizes["pythia-410m"].parameters, "about 3e8 parameters"),
        (profile(SUITE_SIZES, [1, 2, 3]), "edge", PYTHIA.sizes["pythia-14m"].parameters, "about 1.2e6 parameters"),
        (profile([1, 4], [2, 1]), "too few", None, "2 sizes"),
        (profile([], []), "too few", None, "0 sizes"),
        (profile([1, 4], [2, 1], diverged=[16]), "diverged", None, "1 of 3 sizes diverged"),
        (profile([], [], diverged=[1, 4, 16]), "diverged", None, "3 of 3 sizes diverged"),
        (profile([1, 4, 16], [3, 2, 1], diverged=[64]), "diverged", None, "the last before 64"),
        (profile([1, 4, 16], [1, 2, 3], diverged=[64]), "edge", 0.25, "smallest"),
        (profile([1, 4, 16], [2, 1, 2], diverged=[64]), "interior", None, ""),
        (profile([1, 4, 64], [2, 1, 2], diverged=[16]), "diverged", None, "beside 16, whose runs diverged"),
        (profile([1, 16, 64], [2, 1, 2], diverged=[4]), "diverged", None, "beside 4, whose runs diverged"),
        (profile([1, 4, 16, 256], [2, 1, 2, 3], diverged=[64]), "interior", None, ""),
    ],
)
def test_every_state_names_the_size_to_add(case, state, add, told):
    found, why, size = case.state()
    assert (found, size) == (state, pytest.approx(add) if add else None)
    assert told in why
    assert bool(told) == bool(why)


def test_hyperparameters_are_chosen_at_each_size_first():
    rows = [
        {
            "budget_flop": 1e15,
            "n_parameters": n,
            "tokens": 1e15 / 6 / n,
            "rank": r,
            "learning_rate": rate,
            "seed": seed,
            "loss": loss,
        }
        for n, base in ((1e6, 2.0), (4e6, 1.8))
        for r, worse in ((8, 0.3), (32, 0.0), (128, 0.1))
        for rate, more in ((1e-4, 0.2), (1e-3, 0.1), (1e-2, 0.0))
        for seed, loss in ((0, base + worse + more - 0.01), (1, base + worse + more + 0.01))
    ]
    cells = grouping.settings(pd.DataFrame(rows))
    assert len(cells) == 18
    assert set(cells["seeds"]) == {2}
    best = grouping.best_points(cells)
    assert list(best["loss"]) == pytest.approx([2.0, 1.8])
    assert (list(best["rank"]), list(best["tried"])) == ([32, 32], [9, 9])
    assert list(best["at_grid_end"]) == [["learning_rate"]] * 2
    two = grouping.best_points(cells[cells["learning_rate"] > 1e-4])
    assert list(two["at_grid_end"]) == [[]] * 2, "of two values each is an end"
    found, _ = uncertainty.noise_of(None, {"lora": uncertainty.Measured(cells, [], None)}, 4)
    expected = np.sqrt(np.mean([np.var(np.log(each), ddof=1) for each in cells["losses"]]))
    assert (found.log_loss, found.degrees_of_freedom, found.source) == (pytest.approx(expected), 18, "replicates")


def test_nearly_equal_budgets_form_one_profile():
    budgets = np.array([1e15, 1.05e15, 4e15, 4.1e15, 4e15, 1.6e16])
    grouped = grouping.group_budgets(budgets)
    assert len(np.unique(grouped)) == 3
    assert grouped[0] == grouped[1] == pytest.approx(np.sqrt(1e15 * 1.05e15))
    assert grouped[5] == 1.6e16


def test_settings_are_checked():
    with pytest.raises(UserError, match="optimum: 'cubic' is unknown; allowed: parabola, akima, law"):
        optima.check_estimator("cubic", 4)
    with pytest.raises(UserError, match="window: 1.0 is out of range; allowed: above 1"):
        optima.check_estimator("parabola", 1.0)
