"""IsoFLOP optima: at each budget, which model size reaches the lowest loss, and whether the grid can say so.

The best hyper-parameters are chosen for each size first (paper, section 4.2). Then a parabola in ln N within a window
about the best size, or an Akima interpolation (Porian et al. 2024), or the joint law gives the optimum. A minimum at
the end of a grid is no optimum (trap A17): every budget has a state, and only interior optima enter a law. A parabola
is biased even without noise where the grid is wide or off-centre (trap A16), so that all three are kept.

Everything is batched: `losses` are [draws, sizes], and the bootstrap's draws cost little more than one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fits import BACKBONE, HYPERPARAMETERS
from embedscale.errors import UserError
from embedscale.run.families import SUITE

Array = NDArray[np.float64]
ESTIMATORS = ("parabola", "akima", "law")
STATES = ("interior", "edge", "too few", "diverged")
AKIMA_STEPS = 25  # of the interpolation for each interval between sizes, as in Porian et al.


# --- Points: the best run of each method, budget and size ------------------------------------------------------------


def group_budgets(budgets: Array, tolerance: float = 0.1) -> Array:
    """Each budget replaced by the geometric mean of those within `tolerance` above the smallest of its group.

    Budgets that were not planned as profiles, read off a figure, form profiles so.
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
    """The hyper-parameters that take several values among these runs."""
    found = [name for name in HYPERPARAMETERS if name in table and table[name].nunique(dropna=False) > 1]
    # A rank sets the trainable fraction of a size; the fraction that follows is no choice of its own.
    if "rank" in found and "trainable_fraction" in found:
        found.remove("trainable_fraction")
    return found


def settings(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting of a method: replicates averaged, `loss` their mean and `seeds` their number.

    `table` holds runs of one method. `losses` keeps the replicates' own.
    """
    # Equal budgets may differ in their last digits; nearly equal ones are no replicates.
    table = table.assign(budget=group_budgets(table["budget"].to_numpy(float), 1e-6))
    keys = ["budget", "params", *(name for name in BACKBONE if name in table), *varied(table)]
    rows = []
    for _, group in table.groupby(keys, dropna=False, sort=True):
        row = group.iloc[0].to_dict()
        row["losses"] = group["loss"].to_numpy()
        row["loss"], row["seeds"] = float(group["loss"].mean()), len(group)
        row["tokens"] = float(np.exp(np.log(group["tokens"]).mean()))
        rows.append(row)
    return pd.DataFrame(rows)


def best_points(cells: pd.DataFrame, by: tuple[str, ...] = ("budget", "params")) -> pd.DataFrame:
    """The best of `settings` for each budget and size, with `tried` and `at_grid_end`.

    `at_grid_end` names the hyper-parameters whose best value is the first or the last of three or more tried.
    """
    # The ends of trainable fractions and of blocks are nature's, not the grid's.
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
    """The standard deviation of ln L among replicates, pooled, and its degrees of freedom; None without replicates."""
    groups = [np.log(losses) for losses in cells["losses"] if len(losses) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None, 0
    return float(np.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom)), freedom


# --- Estimators ------------------------------------------------------------------------------------------------------


def parabola(log_n: Array, log_loss: Array, window: float = 4.0) -> tuple[Array, Array, Array]:
    """Vertex ln N, ln L there and curvature [draws] of a parabola through the points near the best size.

    `log_n` [sizes] ascends; `log_loss` is [draws, sizes]. The window holds the sizes within a factor `window` of the
    best one and always its two neighbours; NaN where the best size is the first or the last, where the parabola has
    no minimum, and where that lies outside the grid.
    """
    draws, sizes = log_loss.shape
    vertex, lowest, curvature = (np.full(draws, np.nan) for _ in range(3))
    best = log_loss.argmin(1)
    for i in range(1, sizes - 1):
        rows = np.flatnonzero(best == i)
        if not len(rows):
            continue
        near = np.abs(log_n - log_n[i]) <= np.log(window) + 1e-9
        near[i - 1 : i + 2] = True
        x = log_n[near] - log_n[i]
        a, b, c = np.linalg.pinv(np.stack([x**2, x, np.ones_like(x)], 1)) @ log_loss[np.ix_(rows, near)].T
        with np.errstate(divide="ignore", invalid="ignore"):
            top = np.where(a > 0, -b / (2 * a), np.nan) + log_n[i]
            low = c - b**2 / (4 * a)
        inside = (top > log_n[0]) & (top < log_n[-1])
        vertex[rows] = np.where(inside, top, np.nan)
        lowest[rows] = np.where(inside, low, np.nan)
        curvature[rows] = np.where(inside, a, np.nan)
    return vertex, lowest, curvature


def akima(log_n: Array, log_loss: Array) -> tuple[Array, Array]:
    """ln N and ln L [draws] at the lowest point of an Akima interpolation; NaN at an end of the grid."""
    from scipy.interpolate import Akima1DInterpolator

    grid = np.linspace(log_n[0], log_n[-1], AKIMA_STEPS * (len(log_n) - 1))
    curve = Akima1DInterpolator(log_n, log_loss.T)(grid)  # [grid, draws]
    best = curve.argmin(0)
    inside = (best > 0) & (best < len(grid) - 1)
    lowest = curve[best, np.arange(curve.shape[1])]
    return np.where(inside, grid[best], np.nan), np.where(inside, lowest, np.nan)


def law_optimum(
    predict: Callable[[Array, Array, Array], Array], points: pd.DataFrame, budget: float
) -> tuple[Array, Array, Array]:
    """ln N*, ln D*, ln L* [draws] of a joint law at a budget, over sizes from the smallest to the largest of `points`.

    `predict(params, tokens, s)` gives losses [draws, sizes]. The cost a token and S of sizes in between are
    interpolated. NaN where the best size is an end.
    """
    sizes = points.groupby("params")[["flop_per_token", "trainable_fraction"]].median()
    log_n = np.log(sizes.index.to_numpy(float))
    grid = np.linspace(log_n[0], log_n[-1], 801)
    log_cost = np.interp(grid, log_n, np.log(sizes["flop_per_token"]))
    s = np.interp(grid, log_n, sizes["trainable_fraction"].fillna(1.0))
    with np.errstate(invalid="ignore"):
        log_loss = np.log(np.atleast_2d(predict(np.exp(grid), budget / np.exp(log_cost), s)))
    vertex, lowest = lowest_point(grid, log_loss)
    return vertex, np.log(budget) - np.interp(vertex, grid, log_cost), lowest


def lowest_point(grid: Array, log_loss: Array) -> tuple[Array, Array]:
    """ln N and ln L [draws] at the minimum of smooth curves [draws, grid], between the steps of a uniform grid.

    NaN at an end of the grid.
    """
    log_loss = np.where(np.isfinite(log_loss), log_loss, np.inf)
    best = log_loss.argmin(1)
    middle = np.clip(best, 1, len(grid) - 2)
    rows = np.arange(len(best))
    before, here, after = (log_loss[rows, middle + k] for k in (-1, 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = 0.5 * (before - after) / (before - 2 * here + after)
        lowest = here - 0.25 * (before - after) * shift
    shift = np.where(np.isfinite(shift), shift, 0.0)
    inside = middle == best
    vertex = grid[middle] + shift * (grid[1] - grid[0])
    return np.where(inside, vertex, np.nan), np.where(inside, np.where(np.isfinite(lowest), lowest, here), np.nan)


# --- The optimum of each budget, and its state -----------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """One IsoFLOP profile: a method's best points at one budget, by ascending size."""

    budget: float
    points: pd.DataFrame
    diverged: tuple[float, ...] = ()  # sizes all of whose runs diverged

    @property
    def log_n(self) -> Array:
        return np.log(self.points["params"].to_numpy(float))

    @property
    def log_loss(self) -> Array:
        return np.log(self.points["loss"].to_numpy(float))

    def tokens_at(self, log_n: Array) -> Array:
        """D at any size: ln (FLOP a token) is interpolated between sizes, which for full fine-tuning is exact."""
        log_cost = np.log(self.points["flop_per_token"].to_numpy(float))
        return self.budget / np.exp(np.interp(log_n, self.log_n, log_cost))

    def state(self) -> tuple[str, str, float | None]:
        """State, the reason in words, and the parameters of the size to add."""
        sizes = self.points["params"].to_numpy(float)
        if len(sizes) < 3:
            if len(sizes) + len(self.diverged) >= 3:
                return "diverged", f"{len(self.diverged)} of {len(sizes) + len(self.diverged)} sizes diverged", None
            return "too few", f"{len(sizes)} sizes, a minimum needs at least 3", None
        best = int(self.log_loss.argmin())
        if 0 < best < len(sizes) - 1:
            between = [size for size in self.diverged if sizes[best - 1] < size < sizes[best + 1]]
            if between:  # the minimum may lie there
                return "diverged", f"the best size is beside {between[0]:.4g}, whose runs diverged", None
            return "interior", "", None
        below = best == 0
        beyond = [size for size in self.diverged if (size < sizes[0] if below else size > sizes[-1])]
        if beyond:
            nearest = max(beyond) if below else min(beyond)
            return "diverged", f"the best size is the last before {nearest:.4g}, whose runs diverged", None
        added = next_size(sizes, below)
        word, end = ("below", "smallest") if below else ("above", "largest")
        return "edge", f"the best size is the {end}: add one {word} it, such as {added:.4g} parameters", added


def next_size(sizes: Array, below: bool) -> float:
    """The size to add beyond the grid: the nearest Pythia at least a factor 1.5 away, else one more like step."""
    end = sizes.min() if below else sizes.max()
    suite = sorted(row.parameters for row in SUITE.values())
    # A Pythia helps only a grid of Pythias.
    if set(sizes) <= set(suite):
        found = [n for n in suite if (n < end / 1.5 if below else n > end * 1.5)]
        if found:
            return float(found[-1] if below else found[0])
    ordered = np.sort(sizes)
    step = ordered[1] / ordered[0] if below else ordered[-1] / ordered[-2]
    return float(end / step if below else end * step)


def profiles(points: pd.DataFrame, diverged: pd.DataFrame) -> list[Profile]:
    """A profile for each budget, those among them at which every run diverged.

    `diverged` are the excluded runs of the method that diverged (`params`, `budget`; unknown ones are ignored).
    """
    lost = diverged.dropna(subset=["params", "budget"]).astype({"params": float, "budget": float})
    budgets = np.unique(points["budget"].to_numpy(float))
    # A lost run belongs to the nearest budget that has points, or else stands for one of its own.
    nearest = budgets[np.abs(np.log(lost["budget"].to_numpy()[:, None] / budgets)).argmin(1)]
    close = np.isclose(lost["budget"], nearest, rtol=0.1)
    of_lost = np.where(close, nearest, lost["budget"])
    result = []
    for budget in np.union1d(budgets, of_lost):
        here = points[points["budget"] == budget].sort_values("params")
        gone = set(lost["params"][of_lost == budget]) - set(here["params"])
        result.append(Profile(float(budget), here, tuple(sorted(gone))))
    return result


def check_estimator(name: str, window: float) -> None:
    if name not in ESTIMATORS:
        raise UserError(f"optimum: {name!r} is unknown; allowed: {', '.join(ESTIMATORS)}")
    if not window > 1:
        raise UserError(f"window: {window} is out of range; allowed: above 1")
