"""Tables of a user's own: a sweep with the losses of a law, under the names that papers use."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embedscale.cli import main

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared tables are not there")


def sweep(**columns) -> pd.DataFrame:
    """Four sizes at three budgets with the losses of a law, under the names that papers use."""
    n, c = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 8e7, 4), 1e17 * 4.0 ** np.arange(3)))
    d = c / (6 * n)
    table = pd.DataFrame({"N": n, "D": d, "C": c, "loss": 1.7 + 400 / n**0.34 + 2000 / d**0.37})
    return table.assign(**columns)


def crossed(name: str, values: list, worse: float = 1.1, **columns) -> pd.DataFrame:
    """The sweep for each value of a column: the loss of the second value is `worse` times the first, and so on."""
    tables = [sweep(**{name: value}).assign(**columns) for value in values]
    return pd.concat([table.assign(loss=table["loss"] * worse**i) for i, table in enumerate(tables)], ignore_index=True)


def saved(folder: Path, table: pd.DataFrame, name: str = "runs.csv") -> Path:
    table.to_csv(folder / name, index=False)
    return folder / name


def fit(*words: object) -> int:
    """Run `embedscale fit` at its quickest: see `sweeps.fitted`."""
    return main(["fit", *map(str, words), "--bootstrap", "100", "--residual", "log"])
