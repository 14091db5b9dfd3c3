"""IsoFLOP optima: which model size reaches the lowest loss at each budget, and whether the grid of sizes can tell.

The best hyper-parameters are chosen for each size first (`grouping`). Then the optimum is estimated by a parabola in
ln N within a window about the best size, by an Akima interpolation (Porian et al. 2024), by the joint law, or as the
best run. A parabola is biased, even without noise, where the grid is wide or off-centre; therefore all are kept.

Every budget has a state, and only interior optima enter a law. An optimum is "interior" if
- the best size lies between two others ("edge" otherwise, "diverged" if the runs beyond it diverged),
- no run near it lies far off the joint law, and the losses near it rise outward on both sides, but for `SIGMAS`
  standard deviations of the noise ("uneven" otherwise: a run is bad, or the sizes are of two kinds),
- the sizes of the curve span a factor of at least `NARROW`, and the parabola bends upward by at least `BENT` standard
  errors ("too narrow" otherwise),
- its loss lies below the best run by at most `SIGMAS` standard deviations of the noise and what the curve explains,
  `DEPTH` of the valley's depth at the best size or `RISE` of the lower end's rise ("below all runs" otherwise).
`tests/benchmarks/states.py` counts how often these rules err.

Everything is batched: losses have the shape [draws, sizes], and a thousand draws cost little more than one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fits import Estimator, State
from analysis.fitting.laws import Array, Law
from embedscale.errors import UserError
from embedscale.run.families import family_with
from embedscale.texts import apart, counted, number

ESTIMATORS = get_args(Estimator)
AKIMA_STEPS = 25  # grid points for each interval between sizes, as in Porian et al.
LAW_STEPS = 801  # grid points between the smallest and the largest size
NARROW = 1.5  # factor between the smallest and the largest size of a curve
BENT = 2.0  # standard errors of the curvature
STABLER = "a lower learning rate, or add sizes"
SIGMAS = 3.0  # standard deviations of ln L of one run
# A parabola through three evenly spaced runs dips below the best by at most a quarter of the depth of their valley.
DEPTH, RISE = 0.5, 0.05


# --- Estimators ------------------------------------------------------------------------------------------------------


def near_best(log_n: Array, best: int, window: float) -> NDArray[np.bool_]:
    """Return which sizes [sizes] a curve is fitted to: within a factor `window` of the best, and its neighbours."""
    near: NDArray[np.bool_] = np.abs(log_n - log_n[best]) <= np.log(window) + 1e-9
    near[max(best - 1, 0) : best + 2] = True
    return near


def parabola(log_n: Array, log_loss: Array, window: float = 4.0) -> tuple[Array, Array, Array]:
    """Return ln N at the vertex, ln L there and the curvature [draws] of a parabola through points near the best size.

    `log_n` [sizes] ascends; `log_loss` is [draws, sizes]. The window holds the sizes within a factor `window` of the
    best size, and always its two neighbours. NaN where the best size is the first or the last, where the parabola has
    no minimum, and where the minimum lies outside the grid.
    """
    draws, sizes = log_loss.shape
    vertex, lowest, curvature = (np.full(draws, np.nan) for _ in range(3))
    best = log_loss.argmin(1)
    for i in range(1, sizes - 1):
        rows = np.flatnonzero(best == i)
        if not len(rows):
            continue
        near = near_best(log_n, i, window)
        x = log_n[near] - log_n[i]
        a, b, c = np.linalg.pinv(np.stack([x**2, x, np.ones_like(x)], 1)) @ log_loss[np.ix_(rows, near)].T
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            top = np.where(a > 0, -b / (2 * a), np.nan) + log_n[i]
            low = c - b**2 / (4 * a)
        inside = (top > log_n[0]) & (top < log_n[-1])
        vertex[rows] = np.where(inside, top, np.nan)
        lowest[rows] = np.where(inside, low, np.nan)
        curvature[rows] = np.where(inside, a, np.nan)
    return vertex, lowest, curvature


def lowest_run(log_n: Array, log_loss: Array) -> tuple[Array, Array]:
    """Return ln N and ln L [draws] of the best run; NaN where its size is the first or the last."""
    best = log_loss.argmin(1)
    inside = (best > 0) & (best < len(log_n) - 1)
    return np.where(inside, log_n[best], np.nan), np.where(inside, log_loss[np.arange(len(best)), best], np.nan)


def akima(log_n: Array, log_loss: Array) -> tuple[Array, Array]:
    """Return ln N and ln L [draws] at the lowest point of an Akima interpolation; NaN at an end of the grid."""
    from scipy.interpolate import Akima1DInterpolator

    grid = np.linspace(log_n[0], log_n[-1], AKIMA_STEPS * (len(log_n) - 1))
    curve = Akima1DInterpolator(log_n, log_loss.T)(grid)  # [grid, draws]
    best = curve.argmin(0)
    inside = (best > 0) & (best < len(grid) - 1)
    lowest = curve[best, np.arange(curve.shape[1])]
    return np.where(inside, grid[best], np.nan), np.where(inside, lowest, np.nan)


def estimate(estimator: str, log_n: Array, log_loss: Array, window: float) -> tuple[Array, Array]:
    """Return ln N and ln L [draws] of the optima by "parabola", "akima" or "best-run"; NaN where there is none."""
    if estimator == "akima":
        return akima(log_n, log_loss)
    if estimator == "best-run":
        return lowest_run(log_n, log_loss)
    return parabola(log_n, log_loss, window)[:2]


def law_optimum(law: Law, values: Array, points: pd.DataFrame, budget_flop: float) -> tuple[Array, Array, Array]:
    """Return ln N*, ln D* and ln L* [draws] of a joint law's coefficients [draws, p] or [p] at a budget.

    The sizes range from the smallest to the largest of `points`. Between sizes, ln (FLOP a token) and S are
    interpolated. NaN where the best size is the smallest or the largest.
    """
    sizes = points.groupby("n_parameters")[["flop_per_token", "trainable_fraction"]].median()
    log_n = np.log(sizes.index.to_numpy(float))
    grid = np.linspace(log_n[0], log_n[-1], LAW_STEPS)
    log_cost = np.interp(grid, log_n, np.log(sizes["flop_per_token"]))
    s = np.interp(grid, log_n, sizes["trainable_fraction"].fillna(1.0))
    return law.optimum(values, budget_flop, grid, log_cost, s)


# --- The optimum of each budget, and its state -----------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """An IsoFLOP profile: the best points of a method at one budget, by ascending size."""

    budget: float
    points: pd.DataFrame
    diverged: tuple[float, ...] = ()  # sizes all of whose runs diverged
    off: Mapping[float, float] = field(default_factory=dict)  # sizes whose runs lie far off the joint law, and how far

    @property
    def log_n(self) -> Array:
        return np.log(self.points["n_parameters"].to_numpy(float))

    @property
    def log_loss(self) -> Array:
        return np.log(self.points["loss"].to_numpy(float))

    def tokens_at(self, log_n: Array) -> Array:
        """Return D at sizes ln N. ln (FLOP a token) is interpolated, which is exact for full fine-tuning."""
        log_cost = np.log(self.points["flop_per_token"].to_numpy(float))
        return self.budget / np.exp(np.interp(log_n, self.log_n, log_cost))

    def state(self, noise: float | None = None, window: float = 4.0) -> tuple[State, str, float | None]:
        """Return the state before an estimator is asked, the reason in words, and the parameters of the size to add.

        `noise` is the standard deviation of ln L of one run, if it is known.
        """
        sizes = self.points["n_parameters"].to_numpy(float)
        if len(sizes) < 3:
            if len(sizes) + len(self.diverged) >= 3:
                every = len(sizes) + len(self.diverged)
                return "diverged", f"{len(self.diverged)} of {every} sizes diverged: run them with {STABLER}", None
            return "too few", f"{counted(len(sizes), 'size')}, a minimum needs at least 3: add sizes", None
        best = int(self.log_loss.argmin())
        if told := self._far_off(best, window):
            return "uneven", f"{told}: look at it, run it again, or take it out of the table", None
        if 0 < best < len(sizes) - 1:
            between = [size for size in self.diverged if sizes[best - 1] < size < sizes[best + 1]]
            if between:  # the minimum may lie among the sizes that diverged
                told = f"the best size is beside {number(between[0], 4)}, whose runs diverged"
                return "diverged", f"{told}: run them with {STABLER}", None
            return self._uneven(best, noise, window) or self._narrow(best, noise, window)
        below = best == 0
        beyond = [size for size in self.diverged if (size < sizes[0] if below else size > sizes[-1])]
        if beyond:
            nearest = max(beyond) if below else min(beyond)
            told = f"the best size is the last before {number(nearest, 4)}, whose runs diverged"
            return "diverged", f"{told}: run them with {STABLER}", None
        added = next_size(sizes, below)
        word, end = ("below", "smallest") if below else ("above", "largest")
        return "edge", f"the best size is the {end}: add one {word} it, of about {number(added, 2)} parameters", added

    def near_off(self, best: int, window: float) -> list[float]:
        """Return the sizes near the best one, and it itself, whose runs lie far off the joint law."""
        sizes = self.points["n_parameters"].to_numpy(float)
        return [size for size in sizes[near_best(self.log_n, best, window)] if size in self.off]

    def _far_off(self, best: int, window: float) -> str:
        """Return which runs near the best size lie far off the joint law, in words; empty if none do."""
        found = self.near_off(best, window)
        if not found:
            return ""
        away = max((self.off[size] for size in found), key=abs)
        told = f"lies {apart(away, 'the joint law')}"
        if len(found) > 1:
            return f"each of {len(found)} sizes near the best lies far off the joint law; the farthest {told}"
        seeds = int(self.points["seeds"][self.points["n_parameters"] == found[0]].iloc[0])
        what = f"mean of {seeds} runs" if seeds > 1 else "run"
        return f"the {what} of {number(found[0], 4)} parameters {told}"

    def _uneven(self, best: int, noise: float | None, window: float) -> tuple[State, str, float | None] | None:
        """Return the state "uneven" where a size near the best is worse than one farther out; else None."""
        near, y, seeds = near_best(self.log_n, best, window), self.log_loss, self.points["seeds"].to_numpy(float)
        for outward in (range(best - 1, -1, -1), range(best + 1, len(y))):
            for i, j in pairwise(outward):
                apart = SIGMAS * (noise or 0.0) * np.sqrt(1 / seeds[i] + 1 / seeds[j])
                if near[i] and y[i] - y[j] > apart + 1e-9:
                    size, above = number(float(np.exp(self.log_n[i])), 4), number(100 * float(np.expm1(y[i] - y[j])))
                    told = f"the run of {size} parameters is {above} % worse than the next one farther out"
                    return "uneven", f"{told}, more than noise explains: run it again, or leave it out", None
        return None

    def _narrow(self, best: int, noise: float | None, window: float) -> tuple[State, str, float | None]:
        """Return "interior", or "too narrow" where the sizes near the best do not fix a curve."""
        near = near_best(self.log_n, best, window)
        x, y = self.log_n[near] - self.log_n[best], self.log_loss[near]
        span = float(np.exp(np.ptp(x)))
        below = -x[0] < x[-1]  # the side that reaches less far
        added = next_size(np.exp(self.log_n[near]), below, least=2.0)
        if span < NARROW:
            told = f"the sizes span a factor {span:.3g} only, a curve needs {NARROW:g}"
            return "too narrow", f"{told}: add sizes on both sides, such as about {number(added, 2)} parameters", added
        weight = np.sqrt(self.points["seeds"].to_numpy(float)[near])
        design = np.stack([x**2, x, np.ones_like(x)], 1) * weight[:, None]
        bend = float(np.linalg.lstsq(design, y * weight, rcond=None)[0][0])
        error = (noise or 0.0) * float(np.sqrt(np.linalg.pinv(design.T @ design)[0, 0]))
        if bend <= BENT * error:
            told = f"the curve bends upward by {bend:.2g} ± {error:.2g}, within {BENT:g} standard errors of a line"
            told = told if bend > 0 else "the curve bends downward"
            outside = np.abs(self.log_n[~near] - self.log_n[best])
            if len(outside):
                wider = math.ceil(np.exp(outside.min()))
                return (
                    "too narrow",
                    f"{told}: sizes farther out were run, so fit with --window {wider}, or add seeds",
                    None,
                )
            size = float(np.exp(self.log_n[best]))
            added = min(max(added, size / window), size * window)  # a size beyond would enter no curve
            return (
                "too narrow",
                f"{told}: add sizes farther out, of about {number(added, 2)} parameters, or seeds",
                added,
            )
        return "interior", "", None

    def too_deep(self, log_loss: float, noise: float | None, window: float = 4.0) -> bool:
        """Return whether a minimum of ln L lies below the best run by more than noise and curve explain."""
        best, x, y = int(self.log_loss.argmin()), self.log_n, self.log_loss
        if not 0 < best < len(x) - 1:
            return False
        valley = np.interp(x[best], x[[best - 1, best + 1]], y[[best - 1, best + 1]]) - y[best]
        ends = y[near_best(x, best, window)][[0, -1]]
        explained = max(DEPTH * valley, RISE * (ends.min() - y[best])) + SIGMAS * (noise or 0.0)
        return bool(y[best] - log_loss > explained + 1e-9)


def next_size(sizes: Array, below: bool, least: float = 1.0) -> float:
    """Return the size to add beyond the grid: of the sizes' family if they have one, else one more step like the last.

    The size of a family is the nearest that is at least a factor 1.5 away. The step is at least a factor `least`.
    """
    end = sizes.min() if below else sizes.max()
    family = family_with(sizes)
    if family:
        every = [row.parameters for row in family.sizes.values()]
        found = [n for n in every if (n < end / 1.5 if below else n > end * 1.5)]
        if found:
            return float(found[-1] if below else found[0])
    ordered = np.sort(sizes)
    step = max(ordered[1] / ordered[0] if below else ordered[-1] / ordered[-2], least)
    return float(end / step if below else end * step)


def profiles(points: pd.DataFrame, diverged: pd.DataFrame) -> list[Profile]:
    """Return a profile for each budget, including budgets at which every run diverged.

    `diverged` are the method's excluded runs that diverged. Those of unknown size or budget are ignored.
    """
    lost = diverged.dropna(subset=["n_parameters", "budget_flop"]).astype({"n_parameters": float, "budget_flop": float})
    budgets = np.unique(points["budget_flop"].to_numpy(float))
    # A lost run belongs to the nearest budget with points if that is nearly equal, else to a budget of its own.
    nearest = budgets[np.abs(np.log(lost["budget_flop"].to_numpy()[:, None] / budgets)).argmin(1)]
    close = np.isclose(lost["budget_flop"], nearest, rtol=0.1)
    of_lost = np.where(close, nearest, lost["budget_flop"])
    result = []
    for budget in np.union1d(budgets, of_lost):
        here = points[points["budget_flop"] == budget].sort_values("n_parameters")
        gone = set(lost["n_parameters"][of_lost == budget]) - set(here["n_parameters"])
        result.append(Profile(float(budget), here, tuple(sorted(gone))))
    return result


def check_estimator(name: str, window: float) -> Estimator:
    """Return the estimator of that name. Raise UserError for an unknown name or a window out of range."""
    if name not in ESTIMATORS:
        raise UserError(f"optimum: {name!r} is unknown; allowed: {', '.join(ESTIMATORS)}")
    if not window > 1:
        raise UserError(f"window: {window} is out of range; allowed: above 1")
    return cast(Estimator, name)
