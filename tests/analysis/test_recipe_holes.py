"""Recipes of grids with holes: a size a budget, a budget half done."""

import numpy as np
import pandas as pd
import pytest
from sweeps import fitted

from analysis import recipe
from analysis.advice.evidence import Limit
from analysis.fitting.laws import CHINCHILLA
from embedscale.errors import UserError


def test_one_size_at_a_budget_is_no_profile_and_leaves_the_choice_to_the_law(tmp_path):
    """Sizes crossed with tokens: each budget has one size, and a joint law says which would have been better."""
    n, d = (each.ravel() for each in np.meshgrid(1e7 * 2.0 ** np.arange(6), 1e9 * 10 ** (np.arange(4) / 2)))
    table = pd.DataFrame({"method": "full", "n_parameters": n, "tokens": d, "budget_flop": 6 * n * d})
    table["loss"] = np.ravel(CHINCHILLA.predict((1.8, 400, 400, 0.34, 0.28), n, d))
    fits = recipe.read(fitted(table, tmp_path, noise=0.01))[0]
    for budget in np.unique(table["budget_flop"])[4:-4]:
        best = recipe.recipe(fits, Limit(flop=budget)).best
        true = np.ravel(CHINCHILLA.predict((1.8, 400, 400, 0.34, 0.28), np.unique(n), budget / 6 / np.unique(n)))
        assert best.basis == "joint law" and true[np.unique(n) == best.n_parameters] < 1.01 * true.min()


def test_a_best_run_that_a_smaller_budget_beats_is_no_advice(tmp_path):
    """A grid half done: the larger budget was run with the largest model only."""
    losses = {(5e9, 6744): 0.4014, (5e9, 31456): 1.902, (5e9, 90192): 4.833, (2e10, 90192): 4.511}
    table = pd.DataFrame(
        [{"method": "full", "backbone": f"llama-{n}", "n_parameters": n, "budget_flop": c, "tokens": c / 6 / n}
         | {"loss": loss} for (c, n), loss in losses.items()]
    )  # fmt: skip
    fits = recipe.read(fitted(table, tmp_path))[0]
    assert recipe.recipe(fits, Limit(flop=5e9)).best.backbone == "llama-6744"
    for budget in (2e10, 3e10):
        with pytest.raises(UserError, match="4.511, but llama-6744 reached 0.4014 at 5e9 FLOP; add runs of about"):
            recipe.recipe(fits, Limit(flop=budget))
