"""A fitted sweep of the paper's shape for the tests of this folder."""

from pathlib import Path

import pytest
from sweeps import BUDGETS, fitted, paper_like


@pytest.fixture(scope="session")
def paper_folder(tmp_path_factory) -> Path:
    table = paper_like()
    # One run lost, and no optimum inside the grid for bias-only at the largest budget.
    table.loc[(table["method"] == "full") & (table["params"] == 302_311_424) & (table["budget"] == 6e15), "status"] = (
        "diverged"
    )
    edge = (table["method"] == "bias") & (table["budget"] == BUDGETS[-1]) & (table["params"] > 18_915_328)
    return fitted(table[~edge], tmp_path_factory.mktemp("paper"))
