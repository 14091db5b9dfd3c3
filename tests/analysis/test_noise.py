"""The noise behind the intervals: replicates and residuals together, and what few degrees of freedom leave open."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from law_sweep import sweep

from analysis import fits, runs, summary
from analysis.fitting.fit import fit
from analysis.fitting.laws import power_law
from analysis.noise import Noise

EPOCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "chinchilla_epoch" / "runs.csv"


def test_accidental_duplicates_do_not_set_the_noise(capsys):
    """Two pairs of runs that differ by 0.0002, in a table whose runs lie 0.01 about their law."""
    table = sweep(noise=0.01, methods=("full",))
    again = table.iloc[[3, 17]].assign(seed=1, loss=lambda rows: rows["loss"] * 1.0002)
    found = fit(runs.load(pd.concat([table, again])), bootstrap=100, residual="log")
    assert found.noise.source == "residuals" and found.noise.degrees_of_freedom > 4
    assert found.noise.log_loss == pytest.approx(0.01, rel=0.5)
    assert (found.noise.replicates, found.noise.replicates_freedom) == (pytest.approx(1.414e-4, rel=1e-3), 2)
    summary.show_fits(found, summary.console())
    told = " ".join(capsys.readouterr().out.split())
    assert "degrees of freedom; replicates alone 0.00014, 2 degrees of freedom)" in told


def test_replicates_and_residuals_that_agree_are_pooled():
    found = fit(runs.load(sweep(seeds=3, methods=("full",))), bootstrap=100, residual="log").noise
    assert found.source == "pooled"
    assert found.degrees_of_freedom == found.replicates_freedom + found.residuals_freedom > 60
    assert found.log_loss == pytest.approx(0.004, rel=0.15)


def test_few_degrees_of_freedom_widen_the_intervals_as_in_students_t():
    rng = np.random.default_rng(0)
    for freedom, quantile in ((2, 4.303), (5, 2.571), (30, 2.042)):
        spread = Noise(0.01, "residuals", freedom).draws(200_000, rng)
        drawn = spread * rng.standard_normal(len(spread))
        assert np.percentile(drawn, 97.5) == pytest.approx(0.01 * quantile, rel=0.04)
    assert set(Noise(0.01, "given", 0).draws(10, rng)) == {0.01}


def two_methods(noise: float, other: float, seed: int) -> fits.Fits:
    """The fits of full fine-tuning and LoRA that have one law, and a noise each."""
    full = sweep(noise=noise, seed=seed, methods=("full",))
    lora = sweep(noise=other, seed=seed + 100, methods=("full",)).assign(method="lora", rank=8)
    return fit(runs.load(pd.concat([full, lora])), bootstrap=100, residual="log")


def test_methods_whose_noise_differs_have_intervals_by_their_own():
    """One noise for both was too small for LoRA, which then was the best method with 100 %."""
    found = two_methods(0.002, 0.02, 0)
    full, lora = (found.methods[name] for name in ("full", "lora"))
    assert 0.001 < full.noise.log_loss < 0.004 < 0.01 < lora.noise.log_loss < 0.04
    assert found.noise_of("lora") == lora.noise
    assert any(note.startswith("full and lora differ in the noise of their runs") for note in found.notes)
    quiet_at = {row.budget_flop: row for row in full.interior}
    both = [(row, quiet_at[row.budget_flop]) for row in lora.interior if row.budget_flop in quiet_at]
    assert both
    for noisy, quiet in both:
        widths = [np.log(row.loss_interval[1] / row.loss_interval[0]) for row in (noisy, quiet)]
        assert widths[0] > 3 * widths[1]


def test_methods_of_one_noise_share_it():
    alike = [two_methods(0.01, 0.01, seed) for seed in range(4)]
    assert sum(found.methods["lora"].noise is None for found in alike) >= 3
    shared = next(found for found in alike if found.methods["lora"].noise is None)
    assert shared.noise_of("full") == shared.noise == shared.noise_of("lora")


def test_power_laws_of_nothing_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        log_coefficient, exponent = power_law(np.array([1e15, 4e15]), np.array([[0.0, 1.0], [np.inf, 2.0]]))
        assert np.isnan(exponent).all() and np.isnan(log_coefficient).all()


@pytest.mark.skipif(not EPOCH.exists(), reason="the published Chinchilla runs are not on this machine")
@pytest.mark.parametrize("optimum", ["parabola", "akima", "best-run"])
def test_the_fit_of_the_chinchilla_table_is_silent(optimum):
    table = pd.read_csv(EPOCH).rename(columns={"N": "n_parameters", "D": "tokens", "C": "budget_flop"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = fit(runs.load(table), bootstrap=100, residual="log", optimum=optimum)
    assert found.methods["full"].power_laws.n_opt.exponent == pytest.approx(0.51, abs=0.06)
