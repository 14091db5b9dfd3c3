"""Published procedures are settings of `fit`, and give the published numbers."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import runs
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA
from analysis.fitting.solver import fit_joint

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
EPOCH, PORIAN = SHARED / "chinchilla_epoch" / "runs.csv", SHARED / "porian_isoflop"
LADDER = SHARED / "olmo_ladder"
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


@pytest.mark.skipif(not LADDER.exists(), reason="the OLMo ladder is not on this machine")
def test_the_ladder_predicts_seven_tasks_as_published():
    """Bhagia et al. (arXiv 2412.04403), step 1: the 13B model from 16 runs; the flattest tasks have no floor."""
    table = pd.read_csv(LADDER / "runs.csv")
    published = pd.read_csv(LADDER / "published_step1_main.csv").set_index("Task")
    ladder, largest = table[table["role"] == "fit"], table.iloc[-1:]
    n, d = (ladder[name].to_numpy(float) for name in ("N", "D"))
    tasks = [name for name in table if name.startswith("bpb_") and name.endswith("_mean5")]
    assert len(tasks) == 7
    for name in tasks:
        found = fit_joint(CHINCHILLA, n, d, ladder[name].to_numpy(float), residual="huber", delta=1e-3)
        predicted = found.predict(*(largest[column].to_numpy(float) for column in ("N", "D")))
        task = name.removeprefix("bpb_").replace("_mean5", "_5shot")
        assert float(predicted[0]) == pytest.approx(published["Pred"][task], abs=2e-5), task


def test_isoflop_curves_as_courses_give_them_recover_their_law(tmp_path):
    """Sizes, budgets and final losses alone, as JSON: D is C / 6N. Nine budgets, noise of 0.2 %."""
    law, rng, rows = np.array([1.69, 406.4, 410.7, 0.34, 0.28]), np.random.default_rng(0), []
    for budget in (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21):
        for size in np.geomspace(0.2, 5, 8) * 0.27 * budget**0.4516:
            loss = float(CHINCHILLA.predict(law, size, budget / 6 / size)[0]) * np.exp(0.002 * rng.standard_normal())
            rows.append({"parameters": int(size), "compute_budget": budget, "final_loss": loss})
    (tmp_path / "isoflops.json").write_text(json.dumps(rows))
    found = fit(runs.load(tmp_path / "isoflops.json"), bootstrap=300).methods["full"]
    low, high = found.power_laws.n_opt.exponent_interval
    assert low < 0.28 / (0.34 + 0.28) < high and high - low < 0.04
    fitted = found.joint_laws["chinchilla"]
    for name, true in zip(CHINCHILLA.coefficients, law, strict=True):
        low, high = fitted.intervals[name]
        assert low < true < high, name
