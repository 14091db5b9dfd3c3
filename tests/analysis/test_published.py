"""Published procedures are settings of `fit`, and give the published numbers."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import runs
from analysis.fitting.fit import fit

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
EPOCH, PORIAN = SHARED / "chinchilla_epoch" / "runs.csv", SHARED / "porian_isoflop"
NAMES = {"N": "n_parameters", "D": "tokens", "C": "budget_flop", "flops": "budget_flop"}


@pytest.mark.skipif(not PORIAN.exists(), reason="Porian et al.'s sweeps are not on this machine")
@pytest.mark.parametrize(
    "experiment", ["rw__tuned__short__const__standard__val", "owt2__base__short__kaplan__standard__val"]
)
def test_akima_and_weights_are_the_procedure_of_porian(experiment):
    """arXiv 2406.19146: weighted exponents and their intervals, with their noise of the loss."""
    points = pd.read_csv(PORIAN / "isoflop_points.csv").rename(columns=NAMES)
    published = pd.read_csv(PORIAN / "published_fits.csv").set_index("experiment").loc[experiment]
    table = points[points["experiment"] == experiment][["n_parameters", "tokens", "budget_flop", "loss"]]
    noise = (0.002 if published["dataset"] == "rw" else 0.01) / table["loss"].median()
    found = fit(runs.load(table), optimum="akima", noise=noise, bootstrap=300).methods["full"].power_laws.n_opt.weighted
    assert found.exponent == pytest.approx(published["n_exponent"], abs=0.006)
    ends = [published["n_exponent_ci_lo"], published["n_exponent_ci_hi"]]
    assert found.exponent_interval == pytest.approx(ends, abs=0.012)


@pytest.mark.skipif(not EPOCH.exists(), reason="the published Chinchilla runs are not on this machine")
@pytest.mark.parametrize("bins", [None, 3])
def test_the_lowest_runs_of_chinchilla_give_its_exponent(bins):
    """Hoffmann et al. 2022, table 2: 0.50 (0.488 to 0.502) by the lowest loss of each compute, 0.49 by profiles."""
    table = pd.read_csv(EPOCH).rename(columns=NAMES)
    table = table[table["loss"] < np.sort(table["loss"])[-5]]
    line = fit(runs.load(table), optimum="best-run", bins=bins, bootstrap=200).methods["full"].power_laws.n_opt
    assert line.exponent == pytest.approx(0.5, abs=0.03)
    low, high = line.exponent_interval
    assert low < 0.49 < 0.502 < high
