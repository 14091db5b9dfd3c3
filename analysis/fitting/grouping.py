"""Grouping: which runs form a profile, what the replicates of a setting say, and the best setting of each size.

The best hyper-parameters are chosen for each budget and size before sizes are compared (paper, section 4.2).
"""

from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import BACKBONE, HYPERPARAMETERS
from analysis.fitting.laws import Array


def group_budgets(budgets: Array, tolerance: float = 0.1) -> Array:
    """Replace each budget by the geometric mean of its group: those up to `tolerance` above the group's smallest.

    Budgets that were not planned as profiles, such as those read off a figure, become profiles in this way.
    """
    ordered = np.unique(budgets)
    grouped = np.empty_like(ordered)
    first = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] > ordered[first] * (1 + tolerance):
            same = i - first == 1 or ordered[i - 1] <= ordered[first] * (1 + 1e-9)
            grouped[first:i] = ordered[first] if same else np.exp(np.log(ordered[first:i]).mean())
            first = i
    return grouped[np.searchsorted(ordered, budgets)]


def varied(table: pd.DataFrame) -> list[str]:
    """Return the hyper-parameters that take several values among these runs."""
    found = [name for name in HYPERPARAMETERS if name in table and table[name].nunique(dropna=False) > 1]
    # The rank sets the trainable fraction of a size, so the fraction is not a choice of its own.
    if "rank" in found and "trainable_fraction" in found:
        found.remove("trainable_fraction")
    return found


def settings(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting in a table of one method's runs.

    `loss` is the mean of the replicates, `losses` are their losses and `seeds` is their number.
    """
    # Equal budgets may differ in their last digits. Budgets that are only nearly equal do not make replicates.
    table = table.assign(budget=group_budgets(table["budget_flop"].to_numpy(float), 1e-6))
    keys = ["budget_flop", "n_parameters", *(name for name in BACKBONE if name in table), *varied(table)]
    rows = []
    for _, group in table.groupby(keys, dropna=False, sort=True):
        row = group.iloc[0].to_dict()
        row["losses"] = group["loss"].to_numpy()
        row["loss"], row["seeds"] = float(group["loss"].mean()), len(group)
        row["tokens"] = float(np.exp(np.log(group["tokens"]).mean()))
        rows.append(row)
    return pd.DataFrame(rows)


def best_points(cells: pd.DataFrame, by: tuple[str, ...] = ("budget_flop", "n_parameters")) -> pd.DataFrame:
    """Return the best of `settings` for each budget and size, with the number of settings that were `tried`.

    `at_grid_end` names the hyper-parameters whose best value is the first or the last of at least three values.
    """
    # A fraction cannot exceed 1, nor can there be more active blocks than blocks: their ends are not the grid's.
    chosen = [name for name in varied(cells) if name not in (*by, "trainable_fraction", "active_blocks")]
    choices = [name for name in chosen if pd.api.types.is_numeric_dtype(cells[name])]
    rows = []
    for _, group in cells.groupby(list(by), dropna=False, sort=True):
        row: dict[Any, Any] = group.iloc[int(group["loss"].argmin())].to_dict()
        row["tried"] = len(group)
        row["at_grid_end"] = [
            name
            for name in choices
            if group[name].nunique() >= 3 and row[name] in (group[name].min(), group[name].max())
        ]
        rows.append(row)
    return pd.DataFrame(rows)


def noise_of(cells: pd.DataFrame) -> tuple[float | None, int]:
    """Return the pooled standard deviation of ln L among replicates, or None, and its degrees of freedom."""
    groups = [np.log(losses) for losses in cells["losses"] if len(losses) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None, 0
    return float(np.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom)), freedom


def costs_in_proportion(points: pd.DataFrame) -> bool:
    """Return whether the cost of a token is proportional to N, to within 1 %.

    Adapters and frozen blocks cost small models more for their size; then N* is not a power of C.
    """
    cost = points["flop_per_token"] / points["n_parameters"]
    return bool(cost.max() < 1.01 * cost.min())
