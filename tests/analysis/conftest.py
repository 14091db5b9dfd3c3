"""A fitted sweep like the paper's, for the tests of this folder."""

from pathlib import Path

import pytest
from sweeps import BUDGETS, fitted, paper_like


@pytest.fixture(scope="session")
def paper_folder(tmp_path_factory) -> Path:
    table = paper_like()
    # One run is missing, and bias-only has no optimum inside the grid at the largest budget.
    table.loc[
        (table["method"] == "full") & (table["n_parameters"] == 302_311_424) & (table["budget_flop"] == 6e15), "status"
    ] = "diverged"
    edge = (table["method"] == "bias") & (table["budget_flop"] == BUDGETS[-1]) & (table["n_parameters"] > 18_915_328)
    return fitted(table[~edge], tmp_path_factory.mktemp("paper"))
