"""Laws against published fits, closed forms and numerical derivatives."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import runs
from analysis.fitting import laws, solver, uncertainty
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA, LAWS, TIED, TRAINABLE_FRACTION, Data, Law
from analysis.fitting.solver import fit_joint
from embedscale.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
EPOCH = SHARED / "chinchilla_epoch" / "runs.csv"
PORIAN = SHARED / "porian_isoflop"
needs_epoch = pytest.mark.skipif(not EPOCH.exists(), reason="the published Chinchilla runs are not on this machine")
needs_porian = pytest.mark.skipif(not PORIAN.exists(), reason="Porian et al.'s sweeps are not on this machine")

TRUE = {
    "chinchilla": np.array([0.4, 300.0, 900.0, 0.34, 0.37]),
    "trainable_fraction": np.array([0.4, 1.0, 60.0, 60.0, 1.5, 900.0, 0.35, 0.33]),
    "tied": np.array([0.4, 300.0, 900.0, 0.35]),
}


def grid(sizes: int = 8, budgets: int = 6, fractions: int = 6):
    """Return N, D, S of a sweep of freezing."""
    axes = (
        np.geomspace(1.2e6, 2.5e9, sizes),
        1.5e15 * 4.0 ** np.arange(budgets),
        np.arange(1, fractions + 1) / fractions,
    )
    n, c, s = (axis.ravel() for axis in np.meshgrid(*axes))
    return n, c / (2 * n + 4 * s * n), s


def epoch(dropped: bool = True) -> pd.DataFrame:
    runs = pd.read_csv(EPOCH)
    return runs[runs["loss"] < np.sort(runs["loss"])[-5]] if dropped else runs


def columns(runs: pd.DataFrame):
    return (runs[name].to_numpy() for name in ("N", "D", "loss"))


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_slopes_equal_numerical_derivatives_and_coordinates_invert(law):
    n, d, s = grid()
    data = Data.of(n, d, s)
    theta = law.internal(TRUE[law.name][None], data)
    assert law.published(theta, data)[0] == pytest.approx(TRUE[law.name], rel=1e-12)
    loss, slopes = law.gradient(theta, data)
    assert loss[0] == pytest.approx(np.ravel(law.predict(TRUE[law.name], n, d, s)), rel=1e-12)
    for i in range(len(law.coefficients)):
        step = np.zeros_like(theta)
        step[0, i] = 1e-6
        above, below = (np.log(law.gradient(theta + sign * step, data)[0][0]) for sign in (1, -1))
        assert slopes[0, i] == pytest.approx((above - below) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_second_derivatives_equal_differences_of_the_gradient(law):
    """A law without a closed form also uses differences of the gradient."""
    n, d, s = grid(4, 3, 3)
    data = Data.of(n, d, s)
    theta = law.internal(TRUE[law.name][None], data)
    weights = np.random.default_rng(0).standard_normal((1, len(n)))
    slopes = law.gradient(theta, data)[1]
    exact = law.curvature(theta, data, slopes, weights)
    assert exact == pytest.approx(Law.curvature(law, theta, data, slopes, weights), abs=1e-6)


@pytest.mark.parametrize("residual", solver.RESIDUALS)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_every_residual_recovers_a_law_without_noise(law, residual):
    n, d, s = grid()
    loss = np.ravel(law.predict(TRUE[law.name], n, d, s))
    fit = fit_joint(law, n, d, loss, s, residual=residual)
    assert fit.values == pytest.approx(TRUE[law.name], rel=1e-4)
    assert fit.predict(n, d, s).ravel() == pytest.approx(loss, rel=1e-6)
    assert fit.not_fixed == ()


@needs_epoch
def test_least_absolute_deviations_reproduce_the_published_coefficients():
    """The coefficients of arXiv 2404.10102, for 240 runs and for all 245."""
    fit = fit_joint(CHINCHILLA, *columns(epoch()), residual="lad")
    assert fit.values == pytest.approx([1.81686, 482.00572, 2085.43420, 0.34781, 0.36585], rel=1e-4)
    assert fit.agreeing >= 0.5 * fit.starts
    fit = fit_joint(CHINCHILLA, *columns(epoch(dropped=False)), residual="lad")
    log_a, log_b, log_e, alpha, beta = 6.13834459, 9.43584213, 0.63412782, 0.3453568, 0.45189211
    assert np.log(fit.values[:3]) == pytest.approx([log_e, log_a, log_b], rel=1e-6)
    assert fit.values[3:] == pytest.approx([alpha, beta], rel=1e-6)


@needs_epoch
def test_huber_is_at_least_as_good_as_the_published_optimum():
    fit = fit_joint(CHINCHILLA, *columns(epoch()), residual="huber", delta=1e-3)
    assert fit.objective <= 0.0010182740346
    assert fit.values == pytest.approx([1.817218, 477.826, 2143.42, 0.347310, 0.367172], rel=1e-4)
    assert fit.gradient < 1e-4
    assert fit.agreeing >= 0.9 * fit.starts  # some begin where a law fits one wild run


@needs_epoch
def test_the_raw_fit_reproduces_its_printed_digits():
    runs = epoch()
    runs = runs[runs["C"] < 1e21]
    n, d, loss = columns(runs)
    fit = fit_joint(CHINCHILLA, n / 1e6, d / 1e9, loss, residual="raw")
    assert len(runs) == 217
    assert [round(value, 4) for value in fit.values] == [1.9051, 4.0005, 1.0509, 0.3511, 0.4587]
    assert round(2 * fit.objective, 6) == 0.062414
    fit = fit_joint(CHINCHILLA, n / 1e6, d / 1e9, loss, residual="log")
    assert [round(value, 4) for value in fit.values] == [1.8926, 4.0146, 1.0571, 0.3522, 0.4430]


@needs_epoch
def test_bootstrap_reproduces_the_published_intervals():
    n, d, loss = columns(epoch())
    fit = fit_joint(CHINCHILLA, n, d, loss)
    draws = uncertainty.resampled(fit, [np.array([each]) for each in loss], 4000, np.random.default_rng(0))
    published = [(1.769, 1.871), (285.2, 743.6), (1042.4, 5810.3), (0.317, 0.373), (0.331, 0.415)]
    for i, ends in enumerate(published):
        assert laws.interval(draws[:, i]) == pytest.approx(ends, rel=0.05)


@needs_epoch
def test_batched_refits_equal_those_of_scipy():
    from scipy.optimize import minimize

    n, d, loss = columns(epoch())
    fit = fit_joint(CHINCHILLA, n, d, loss)
    weights = np.random.default_rng(1).multinomial(len(loss), np.full(len(loss), 1 / len(loss)), 8).astype(float)

    def huber(theta, w):
        e, a, b, alpha, beta = theta
        model = np.logaddexp(np.logaddexp(e, a - alpha * fit.data.log_n), b - beta * fit.data.log_d)
        size = np.abs(model - np.log(loss))
        return 1e3 * (w * np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4))).sum()

    for w, found in zip(weights, fit.refit(weights=weights), strict=True):
        best = min(
            (minimize(huber, fit.theta + shift, (w,), "BFGS", options={"gtol": 1e-8}) for shift in (0, 0.03, -0.03)),
            key=lambda answer: answer.fun,
        )
        ours = huber(CHINCHILLA.internal(found[None], fit.data)[0], w)
        assert ours <= best.fun * (1 + 1e-6)


@needs_porian
def test_power_laws_reproduce_porians_exponents():
    pairs, published = pd.read_csv(PORIAN / "optimal_pairs.csv"), pd.read_csv(PORIAN / "published_fits.csv")
    assert len(published) == 15
    for row in published.itertuples():
        mine = pairs[pairs["experiment"] == row.experiment]
        budgets, sizes = mine["flops"].to_numpy(), mine["n_star"].to_numpy()
        weights = mine["n_star_log_std"].to_numpy() ** -2
        log_coefficient, exponent = laws.power_law(budgets, sizes, weights)
        assert exponent == pytest.approx(row.n_exponent, abs=1e-6)
        assert np.exp(log_coefficient) == pytest.approx(row.n_coef, rel=1e-6)
        assert laws.power_law(budgets, sizes)[1] == pytest.approx(row.n_exponent_basic, abs=1e-6)


def test_power_laws_skip_missing_optima_and_need_two_points():
    budgets = np.array([1e15, 4e15, 1.6e16])
    values = np.array([2 * budgets**0.5, [np.nan, 1.0, 2.0], [np.nan, 1.0, np.nan]])
    log_coefficient, exponent = laws.power_law(budgets, values)
    assert exponent[:2] == pytest.approx([0.5, 0.5])
    assert np.exp(log_coefficient[0]) == pytest.approx(2)
    assert np.isnan(exponent[2])


def test_coefficients_that_the_data_do_not_fix_are_named():
    rng = np.random.default_rng(0)
    # Every size saw the same data, so B, beta and E cannot be separated.
    n, d = np.geomspace(1e6, 1e9, 12), np.full(12, 1e10)
    loss = CHINCHILLA.predict(TRUE["chinchilla"], n, d) * np.exp(0.002 * rng.standard_normal(12))
    assert {"B", "beta"} <= set(fit_joint(CHINCHILLA, n, d, loss).not_fixed)
    # With one trainable fraction, the data do not show how the loss depends on it.
    n, d, _ = grid(fractions=1)
    loss = TRAINABLE_FRACTION.predict(TRUE["trainable_fraction"], n, d) * np.exp(0.002 * rng.standard_normal(len(n)))
    assert {"a_s", "b_s"} <= set(fit_joint(TRAINABLE_FRACTION, n, d, loss, np.full(len(n), 0.5)).not_fixed)


def test_outliers_move_huber_and_lad_less_than_squares():
    n, d, _s = grid()
    loss = CHINCHILLA.predict(TRUE["chinchilla"], n, d)
    loss[::40] *= 1.5
    error = {
        kind: abs(fit_joint(CHINCHILLA, n, d, loss, residual=kind).coefficients["alpha"] / 0.34 - 1)
        for kind in ("log", "huber", "lad")
    }
    assert error["lad"] < 1e-6
    assert error["huber"] < 0.01 * error["log"]


def test_a_trainable_fraction_above_one_counts_as_one():
    law, sizes = np.array([0.1, 1.0, 9.0, 5.0, 2.0, 30.0, 0.3, 0.3]), np.full(3, 1e7)
    whole, more, half = TRAINABLE_FRACTION.predict(law, sizes, sizes, np.array([1.0, 1.7, 0.5]))
    assert whole == more < half


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": "cubic"}, "residual: 'cubic' is unknown; allowed: huber, lad, log, raw"),
        ({"delta": 0.0}, "delta: 0.0 is out of range; allowed: above 0"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    n, d, _ = grid()
    with pytest.raises(UserError, match=message):
        fit_joint(CHINCHILLA, n, d, np.ones_like(n), **change)


def test_data_without_enough_runs_for_a_law_are_refused():
    n, d, _s = grid()
    with pytest.raises(UserError, match="has 5 coefficients and needs more runs than that; found 5"):
        fit_joint(CHINCHILLA, n[:5], d[:5], np.ones(5))
    two = np.where(n > 1e8, 1e9, 1e7)
    with pytest.raises(UserError, match="at least 3 sizes; found 2"):
        fit_joint(CHINCHILLA, two, d, np.ones_like(n))


def test_the_best_size_of_a_tied_law_grows_as_the_root_of_the_budget():
    """Hoffmann et al. 2022, equation 4, with alpha = beta and 6 N FLOP a token: N* = (A/B)^(1/2alpha) (C/6)^(1/2)."""
    e, a, b, alpha = TRUE["tied"]
    log_n = np.linspace(np.log(1e5), np.log(1e12), 4001)
    for budget in (1e18, 1e20):
        n, d, loss = (float(np.exp(each[0])) for each in TIED.optimum(TRUE["tied"], budget, log_n, np.log(6) + log_n))
        best = (a / b) ** (1 / (2 * alpha)) * (budget / 6) ** 0.5
        assert n == pytest.approx(best, rel=1e-3) and n * d == pytest.approx(budget / 6, rel=1e-6)
        assert loss == pytest.approx(e + a / best**alpha + b / (budget / 6 / best) ** alpha, rel=1e-6)
    assert TIED.size_exponent(TRUE["tied"]) == pytest.approx(0.5)


def test_a_tied_law_is_recovered_from_noisy_losses():
    n, d, s = grid()
    loss = np.ravel(TIED.predict(TRUE["tied"], n, d)) * np.exp(0.002 * np.random.default_rng(0).standard_normal(len(n)))
    fit = fit_joint(TIED, n, d, loss, s)
    assert fit.coefficients["alpha"] == pytest.approx(TRUE["tied"][3], rel=0.02)
    assert fit.coefficients["E"] == pytest.approx(TRUE["tied"][0], rel=0.02)


def test_the_setting_chooses_the_law_that_is_fitted():
    table = pd.DataFrame(dict(zip(("n_parameters", "tokens", "trainable_fraction"), grid(6, 4, 1), strict=True)))
    table["loss"] = TIED.predict(TRUE["tied"], table["n_parameters"], table["tokens"])
    found = fit(runs.load(table), law="tied", bootstrap=100, noise=0.002).methods["full"].joint_laws
    assert list(found) == ["tied"]
    assert list(found["tied"].coefficients.values()) == pytest.approx(TRUE["tied"], rel=1e-4)
    assert found["tied"].n_exponent == pytest.approx(0.5)
    with pytest.raises(UserError, match="law: 'kaplan' is unknown; allowed: chinchilla, tied"):
        fit(runs.load(table), law="kaplan")
