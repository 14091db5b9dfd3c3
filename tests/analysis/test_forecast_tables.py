"""No recipe contradicts the public tables: at each budget of a table, its optimum and its runs are in the intervals."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import recipe, runs
from analysis.advice.evidence import Limit, gather
from analysis.fitting.fit import fit
from embedscale.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="the published tables are not on this machine")
MOST = 12  # budgets of a table that are asked for


def tables() -> dict[str, pd.DataFrame]:
    """Return N, D and the loss of every table, by name."""
    if not SHARED.exists():
        return {}
    found = {name: pd.read_csv(SHARED / name / "runs.csv") for name in ("chinchilla_epoch", "farseer")}
    ladder = pd.read_csv(SHARED / "olmo_ladder" / "runs.csv")
    found |= {f"olmo {name}": ladder.assign(loss=ladder[name]) for name in ladder if name.endswith("_mean5")}
    points = pd.read_csv(SHARED / "porian_isoflop" / "isoflop_points.csv").rename(columns={"flops": "C"})
    found |= {f"porian {name}": part for name, part in points.groupby("experiment")}
    return found


TABLES = tables()


def frame(name: str) -> pd.DataFrame:
    table = TABLES[name].dropna(subset=["loss"])
    n, d = table["N"].astype(float), table["D"].astype(float)
    budget = table["C"].astype(float) if "C" in table else 6 * n * d
    return pd.DataFrame({"n_parameters": n, "tokens": d, "budget_flop": budget, "loss": table["loss"]})


def holds(ends, value: float) -> bool:
    """Return whether an interval, or no interval, leaves room for a value."""
    return ends is None or ends[0] * (1 - 1e-9) <= value <= ends[1] * (1 + 1e-9)


@pytest.mark.parametrize("name", TABLES)
def test_no_interval_excludes_a_run_or_an_optimum_of_the_table(name):
    fits = fit(runs.load(frame(name)), bootstrap=100)
    every, noise = gather(fits), fits.noise.log_loss or 0.0
    rows = fits.methods["full"].optima
    chosen = np.unique(np.linspace(0, len(rows) - 1, MOST).round().astype(int))
    points = fits.methods["full"].points
    for row in (rows[i] for i in chosen):
        if row.best is None:
            continue
        for budget in {row.budget_flop, row.best.budget_flop}:
            try:
                found = recipe.recipe(fits, Limit(flop=budget), every=every)
            except UserError:
                continue
            assert all(each.lost >= 0 for each in found.others if each.what.startswith("the next")), budget
            reached = min(point.loss for point in points if point.budget_flop <= budget * 1.001)
            assert found.lowest_loss <= reached * np.exp(3 * noise), budget
            assert found.lowest_loss_interval is None or found.lowest_loss_interval[0] <= reached * (1 + 1e-9), budget
            if row.interior and budget == row.budget_flop:
                assert holds(found.lowest_loss_interval, row.loss), budget
                assert holds(found.n_opt_interval, row.n_opt), budget
            for choice in [found.best, *(each.choice for each in found.others if each.choice)]:
                for point in points:
                    if (point.n_parameters, point.budget_flop) == (choice.n_parameters, choice.budget_flop):
                        assert holds(choice.loss_interval, point.loss), budget
