"""Group runs: which form a profile, what a run would lose at its profile's budget, the best setting of each size.

The best hyper-parameters are chosen for each budget and size before sizes are compared (paper, section 4.2). Budgets
are often only nearly equal, because steps are whole or because a table was read off a figure. Each run keeps its own
budget where a joint law is fitted. Where losses of one profile are compared, each loss is moved to the profile's budget
first: by the joint law, or by a surface through the runs where there is no law. The price is an error of second order
in the distance of the budgets.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import BACKBONE, HYPERPARAMETERS
from analysis.fitting.laws import Array

NEARLY = 0.1  # runs whose budgets lie within this share of their middle form one profile
EQUAL = 1e-6  # budgets that differ by less differ in their last digits only
Losses = Callable[[Array, Array], Array]  # a law: the loss of N and D

# --- Profiles --------------------------------------------------------------------------------------------------------


def group_budgets(budgets: Array, nearly: float = NEARLY) -> Array:
    """Replace each budget by the median of its group; a group spans at most ± `nearly` about its middle.

    The ordered budgets are cut at their widest gap until no group is too wide. Gaps of one width are cut together, so
    that an even ladder of budgets falls apart into its steps.
    """
    log_budget, place = np.unique(np.log(budgets), return_inverse=True)
    width = math.log((1 + nearly) / (1 - nearly)) + 1e-9
    group = np.zeros(len(log_budget), int)
    pending = [(0, len(log_budget))]
    while pending:
        first, last = pending.pop()
        if log_budget[last - 1] - log_budget[first] <= width:
            group[first:last] = first
            continue
        gaps = np.diff(log_budget[first:last])
        ends = [first, *(first + 1 + np.flatnonzero(gaps >= gaps.max() * (1 - EQUAL))), last]
        pending += pairwise(ends)
    middles = pd.Series(np.asarray(budgets, float)).groupby(group[place]).transform(_middle)
    return middles.to_numpy()


def profiles_of(budgets: Array, bins: float | None) -> Array:
    """Replace each budget by that of its profile: of nearly equal budgets, or the median of its bin.

    `bins` of equal width make a decade (Hoffmann et al. 2022).
    """
    if not bins:
        return group_budgets(budgets)
    place = np.floor(np.log10(budgets) * bins + 1e-9)
    return pd.Series(np.asarray(budgets, float)).groupby(place).transform(_middle).to_numpy()


def _middle(budgets: "pd.Series[float]") -> float:
    ordered = np.sort(budgets.to_numpy())
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(low if low == high else math.sqrt(low * high))


def at_profile(runs: pd.DataFrame, law: Losses | None) -> pd.DataFrame:
    """Return the runs of one method with `budget_flop` and `loss` at the budget of their `profile`.

    `own_budget` and `own_loss` keep what was run. A law moves each loss along its size; without one, a surface does.
    """
    cost = runs["budget_flop"] / runs["tokens"]
    cost = runs["flop_per_token"].fillna(cost) if "flop_per_token" in runs else cost
    moved = runs.assign(own_budget=runs["budget_flop"], own_loss=runs["loss"], flop_per_token=cost)
    shift = log_shift(runs, law)
    if not shift.any():
        return moved
    return moved.assign(budget_flop=runs["profile"], loss=runs["loss"] * np.exp(shift))


def log_shift(runs: pd.DataFrame, law: Losses | None = None) -> Array:
    """Return ln L at the profile's budget less ln L at the own budget, for each run; 0 where the budgets are equal."""
    own, profile, n, tokens = (
        runs[name].to_numpy(float) for name in ("budget_flop", "profile", "n_parameters", "tokens")
    )
    far = np.log(profile / own)
    apart = np.abs(far) > EQUAL
    if not apart.any():
        return np.zeros(len(runs))
    if law is not None:
        return np.where(apart, np.log(law(n, tokens * profile / own)) - np.log(law(n, tokens)), 0.0)
    return np.where(apart, _slope(runs) * far, 0.0)


def _slope(runs: pd.DataFrame) -> Array:
    """Return d ln L / d ln C at each run, of a surface through the best runs: quadratic if their number allows it."""
    best = runs.loc[runs.groupby(["profile", "n_parameters"])["loss"].idxmin()]
    n, c = (np.log(runs[name].to_numpy(float)) for name in ("n_parameters", "budget_flop"))
    own_n, own_c = (np.log(best[name].to_numpy(float)) for name in ("n_parameters", "budget_flop"))
    x, y, own_x, own_y = n - own_n.mean(), c - own_c.mean(), own_n - own_n.mean(), own_c - own_c.mean()
    one, zero = np.ones_like(own_x), np.zeros_like(x)
    terms = [(one, zero), (own_y, zero + 1), (own_x, zero), (own_x**2, zero), (own_x * own_y, x), (own_y**2, 2 * y)]
    if best["profile"].nunique() < 2 or len(best) < 5:
        return zero
    terms = terms[: 6 if len(best) >= 9 and best["profile"].nunique() >= 3 else 4]
    design = np.stack([each for each, _ in terms], 1)
    solution = np.linalg.lstsq(design, np.log(best["loss"].to_numpy(float)), rcond=1e-9)[0]
    return np.stack([slope for _, slope in terms], 1) @ solution


# --- Settings --------------------------------------------------------------------------------------------------------


def varied(table: pd.DataFrame) -> list[str]:
    """Return the hyper-parameters that take several values among these runs."""
    found = [name for name in HYPERPARAMETERS if name in table and table[name].nunique(dropna=False) > 1]
    # The rank sets the trainable fraction of a size, so the fraction is not a choice of its own.
    if "rank" in found and "trainable_fraction" in found:
        found.remove("trainable_fraction")
    return found


def _chosen(table: pd.DataFrame) -> list[str]:
    """Return the columns in which two settings of one budget and size differ."""
    return [*(name for name in BACKBONE if name in table), *varied(table)]


def settings(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting in a table of one method's runs.

    `loss` is the mean of the replicates, `losses` are their losses and `seeds` is their number.
    """
    # Equal budgets may differ in their last digits. Budgets that are only nearly equal do not make replicates.
    table = table.assign(budget_flop=group_budgets(table["budget_flop"].to_numpy(float), EQUAL))
    rows = []
    for _, group in table.groupby(["budget_flop", "n_parameters", *_chosen(table)], dropna=False, sort=True):
        row = group.iloc[0].to_dict()
        row["losses"] = group["loss"].to_numpy()
        row["loss"], row["seeds"] = float(group["loss"].mean()), len(group)
        row["tokens"] = float(np.exp(np.log(group["tokens"]).mean()))
        row |= {name: float(group[name].mean()) for name in ("own_budget", "own_loss") if name in group}
        rows.append(row)
    return pd.DataFrame(rows)


def best_points(cells: pd.DataFrame, by: tuple[str, ...] = ("n_parameters",)) -> pd.DataFrame:
    """Return the best of `settings` for each profile and size, with the number of settings that were `tried`.

    Without a column `profile`, each budget is a profile. A setting that was run at several nearly equal budgets keeps a
    row for each. `at_grid_end` names the hyper-parameters whose best value is the first or the last of at least three.
    """
    # A fraction cannot exceed 1, nor can there be more active blocks than blocks: their ends are not the grid's.
    chosen = [name for name in varied(cells) if name not in (*by, "trainable_fraction", "active_blocks")]
    choices = [name for name in chosen if pd.api.types.is_numeric_dtype(cells[name])]
    if "profile" not in cells:
        cells = cells.assign(profile=cells["budget_flop"])
    level = cells["loss"] * np.exp(log_shift(cells))
    keys = _chosen(cells)
    rows = []
    for _, group in cells.assign(level=level).groupby(["profile", *by], dropna=False, sort=True):
        setting = group.groupby(keys, dropna=False, sort=True).ngroup() if keys else pd.Series(0, group.index)
        means = group["level"].groupby(setting).mean()
        for _, row in group[setting == means.idxmin()].sort_values("budget_flop").iterrows():
            found: dict[Any, Any] = row.drop("level").to_dict()
            found["tried"] = len(means)
            found["at_grid_end"] = [
                name
                for name in choices
                if group[name].nunique() >= 3 and row[name] in (group[name].min(), group[name].max())
            ]
            rows.append(found)
    return pd.DataFrame(rows)


def costs_in_proportion(points: pd.DataFrame) -> bool:
    """Return whether the cost of a token is proportional to N, to within 1 %.

    Adapters and frozen blocks cost small models more for their size; then N* is not a power of C.
    """
    cost = points["flop_per_token"] / points["n_parameters"]
    return bool(cost.max() < 1.01 * cost.min())
