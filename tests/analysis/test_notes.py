"""The notes of a fit: biased parabolas, the selection bias of many settings, and the low losses of akima."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
from law_sweep import BUDGETS, FULL, SIZES, sweep

from analysis import fits, runs
from analysis.fitting import laws, uncertainty
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA, power_law
from analysis.fitting.optima import Profile
from embedscale.run.cost import cost_of
from embedscale.run.families import PYTHIA
from embedscale.run.method import Method


def bias_notes(method: str, cost_of_size, sizes, budgets, noise: float = 0.002) -> tuple[fits.JointLaw, list[str]]:
    """Return the joint law of a sweep without noise, and the notes on the exponent of N*."""
    law = np.array([0.08, 900.0, 145.0, 0.45, 0.267])
    rows = [
        {
            "method": method,
            "n_parameters": n,
            "budget_flop": c,
            "tokens": c / cost_of_size(n),
            "flop_per_token": cost_of_size(n),
        }
        | {"loss": float(np.ravel(CHINCHILLA.predict(law, n, c / cost_of_size(n)))[0])}
        for c in budgets
        for n in sizes
    ]
    found = fit(runs.load(pd.DataFrame(rows)), noise=noise, bootstrap=200, residual="log")
    return found.methods[method].joint_laws["chinchilla"], [note for note in found.notes if "grows" in note]


def test_without_proportional_cost_the_best_size_has_no_exponent():
    """The share of adapters of rank 128, and so the cost of a token per parameter, falls with the size."""
    backbones = [PYTHIA.sizes[f"pythia-{name}"] for name in ("14m", "31m", "70m", "160m", "410m", "1b")]
    costs = {row.parameters: cost_of(row.shape, Method("lora", rank=128)).flop_per_token for row in backbones}
    law, notes = bias_notes("lora", costs.get, list(costs), BUDGETS)
    assert [law.coefficients["alpha"], law.coefficients["beta"]] == pytest.approx([0.45, 0.267], rel=1e-3)
    assert notes == []  # the optima follow the law
    assert law.n_exponent is law.n_exponent_interval is None
    law, notes = bias_notes("full", lambda n: 6 * n, list(costs), BUDGETS)
    assert law.n_exponent == pytest.approx(0.267 / 0.717, rel=1e-3)
    assert notes == []


def test_the_interval_allows_for_the_bias_of_parabolas_on_a_wide_grid():
    """The law's profiles are not symmetric, so parabolas through distant sizes have another exponent."""
    law, notes = bias_notes("full", lambda n: 6 * n, np.geomspace(1e6, 1e9, 5), 1e16 * 8.0 ** np.arange(3), 5e-4)
    assert law.n_exponent == pytest.approx(0.267 / 0.717, rel=1e-3)
    assert notes == []


def test_the_interval_of_a_power_law_holds_what_its_optima_miss_it_by():
    """A law with a floor has no exponent of its loss: each end of the table has its own. The optima have no noise."""
    table = runs.load(sweep(noise=0.0, methods=("full",)))
    law = fit(table, noise=1e-6, bootstrap=200, residual="log").methods["full"].power_laws.loss
    rows = fit(table, noise=1e-6, bootstrap=200, residual="log").methods["full"].interior
    found = np.array([(row.budget_flop, row.loss) for row in rows])
    assert len(found) >= 4
    for kept in (found[1:], found[:-1]):
        exponent = float(power_law(*kept.T)[1])
        assert law.exponent_interval[0] < exponent < law.exponent_interval[1]
        assert abs(exponent - law.exponent) > 1e-3


def test_a_joint_law_that_misses_the_optima_is_noted():
    """Losses 10 % low at ten times the best size pull the law, not the optima."""
    rows = []
    for c in BUDGETS:
        best = (0.45 / 0.35) ** (1 / 0.8) * (c / 6) ** (0.35 / 0.8)
        for n in 1e6 * 2.0 ** np.arange(12):
            loss = CHINCHILLA.predict(FULL, n, c / 6 / n).item() * (0.9 if n > 10 * best else 1)
            rows.append({"n_parameters": n, "budget_flop": c, "tokens": c / 6 / n, "loss": loss})
    found = fit(runs.load(pd.DataFrame(rows)), noise=1e-3, bootstrap=100, residual="log")
    (note,) = [note for note in found.notes if "grows" in note]
    assert "by the joint law, outside the interval: the joint law does not follow these runs near" in note
    low, high = found.methods["full"].power_laws.n_opt.exponent_interval
    assert low < 0.35 / 0.8 < high


def test_the_selection_bias_of_many_settings_is_noted():
    """Two methods have equal laws, but one was run at twelve ranks, so its best loss is the lowest of twelve draws."""
    rng, rows = np.random.default_rng(0), []
    for name, settings in (("full", 1), ("lora", 12)):
        for c in BUDGETS[:3]:
            for n in SIZES:
                for rank in range(settings):
                    loss = np.ravel(CHINCHILLA.predict(FULL, n, c / 6 / n))[0] * np.exp(0.005 * rng.standard_normal())
                    row = {
                        "method": name,
                        "n_parameters": n,
                        "budget_flop": c,
                        "tokens": c / 6 / n,
                        "loss": float(loss),
                    }
                    rows.append(row | {"rank": 2.0**rank if settings > 1 else np.nan, "trainable_fraction": 0.1})
    table = pd.DataFrame(rows)
    found = fit(runs.load(table), noise=0.005, bootstrap=100, residual="log")
    (note,) = [note for note in found.notes if "settings a size" in note]
    low = -100 * 0.005 * rng.standard_normal((100_000, 12)).min(1).mean()
    assert note.startswith("methods are the best of 1 (full), 12 (lora) settings a size: of 12 equal ones")
    assert float(re.search(r"lies (.*) % low", note)[1]) == pytest.approx(low, rel=0.02)
    fair = fit(runs.load(table[~(table["rank"] > 1)]), noise=0.005, bootstrap=100, residual="log")
    assert not any("settings a size" in note for note in fair.notes)


def test_the_low_losses_of_akima_are_noted():
    """Fifteen sizes are within the noise of the best, so a 95 % interval holds the true loss only half the time."""
    x = np.log(1e8) + np.linspace(-np.log(8), np.log(8), 15)
    points = pd.DataFrame({"n_parameters": np.exp(x), "flop_per_token": 6 * np.exp(x), "seeds": 1})
    rng, held = np.random.default_rng(0), {"akima": [], "parabola": []}
    for _ in range(60):
        loss = np.exp(0.02 * (x - x[7]) ** 2 + 0.01 * rng.standard_normal(15))
        for kind, found in held.items():
            draws = uncertainty.optimum_draws(Profile(1e18, points.assign(loss=loss)), kind, 4.0, 0.01, 200, rng)
            low, high = laws.interval(draws.log_loss)
            found.append(low <= 0 <= high)
    assert np.mean(held["akima"]) < 0.7 < 0.85 < np.mean(held["parabola"])
    table = runs.load(sweep(methods=("full",)))
    for kind in held:
        notes = fit(table, optimum=kind, bootstrap=100, residual="log").notes
        assert any(note.startswith("akima: ") for note in notes) == (kind == "akima")


@pytest.mark.parametrize("kind", ["constant", "tiny", "noise", "steep", "falling", "narrow"])
def test_no_warning_of_a_library_reaches_the_terminal(kind):
    rng = np.random.default_rng(0)
    rows = []
    for budget in 1e15 * 4.0 ** np.arange(3):
        for size in 1e6 * (1.001 if kind == "narrow" else 3.0) ** np.arange(4):
            losses = {
                "constant": 2.0,
                "tiny": 1e-9 * (1 + rng.random()),
                "noise": 0.1 + rng.random(),
                "steep": (1e7 / size) ** 9 + 1e-12,
                "falling": 1 + 1 / size,
                "narrow": 1 + rng.random(),
            }
            row = {"n_parameters": size, "tokens": budget / 6 / size, "budget_flop": budget, "loss": losses[kind]}
            rows.append(row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(runs.load(pd.DataFrame(rows)), bootstrap=100, residual="log")
