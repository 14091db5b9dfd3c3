"""Laws of the optimum against the budget, as draws: a power law, one with an offset, and the optima of joint laws.

Each law is a function of ln C, because a forecast asks for it at budgets of which only the caller knows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.fits import Point
from analysis.fitting.laws import LAWS, VALID, Array, Law

OFFSETS = np.geomspace(0.01, 1.0, 80)  # exponents that a power law with an offset may have
REACH = 1e4  # factor beyond the sizes that were run within which a joint law's best size is looked for
STEPS = 50  # grid points of this search for a factor e in size

Trend = Callable[[Array], Array]
"""ln C [k] → draws [draws, k]."""
Trends = dict[str, Trend]
Coefficients = Mapping[str, Array]
"""Joint law → coefficients [draws, p]."""


def nearest_points(points: Sequence[Point], budget: float | None) -> list[Point]:
    """Return the point of each size that is nearest in budget, by ascending size; without a budget, the largest."""
    log_budget = min(math.log(budget) if budget else math.inf, 700.0)
    found: dict[float, Point] = {}
    for point in sorted(points, key=lambda point: abs(math.log(point.budget_flop) - log_budget)):
        found.setdefault(point.n_parameters, point)
    return [found[size] for size in sorted(found)]


def cost(points: Sequence[Point], sizes: Array, budget: float | None = None) -> Array:
    """Return FLOP a token of sizes [k]: its ratio to N is interpolated between the points, and constant beyond."""
    nearest = nearest_points(points, budget)
    known = np.array([point.n_parameters for point in nearest])
    ratio = np.array([point.flop_per_token for point in nearest]) / known
    return sizes * np.interp(np.log(sizes), np.log(known), ratio)


# --- Laws of the optimum ---------------------------------------------------------------------------------------------


def line(x: Array, y: Array) -> Trend:
    """Return the line of least squares through y [draws, n] at x [n]; a constant through one point."""
    centre = x.mean()
    level, slope = y.mean(1), y @ (x - centre) / max(np.square(x - centre).sum(), 1e-300)
    return lambda at: level[:, None] + slope[:, None] * (at - centre)


def offset(x: Array, y: Array) -> Trend:
    """Return ln (E + a C^-b) through y = ln L [draws, n], by least squares of the relative error, E and a ≥ 0."""
    centre = x.mean()
    p = np.exp(-y)
    u = np.exp(-np.outer(OFFSETS, x - centre))  # [exponents, n]
    pp, p1 = np.square(p).sum(1)[:, None], p.sum(1)[:, None]
    pu, uu, u1 = np.square(p) @ u.T, np.square(p) @ np.square(u).T, p @ u.T  # [draws, exponents]
    determinant = np.maximum(pp * uu - pu**2, 1e-300)
    e, a = (p1 * uu - u1 * pu) / determinant, (u1 * pp - p1 * pu) / determinant
    a = np.where(e < 0, u1 / uu, a)
    e = np.maximum(e, 0.0)
    error = e**2 * pp + 2 * e * a * pu + a**2 * uu - 2 * e * p1 - 2 * a * u1
    best = np.where(a > 0, error, np.inf).argmin(1)
    rows = np.arange(len(y))
    e, a, b = e[rows, best][:, None], np.maximum(a[rows, best], 1e-300)[:, None], OFFSETS[best][:, None]
    return lambda at: np.log(e + a * np.exp(-b * (at - centre)))


def joint_optimum(law: Law, values: Array, points: Sequence[Point]) -> tuple[Trend, Trend]:
    """Return ln L* and ln N* of a joint law's coefficients [draws, p]; NaN where most draws have no optimum."""
    sizes = [point.n_parameters for point in points]
    low, high = math.log(min(sizes) / REACH), math.log(max(sizes) * REACH)
    grid = np.linspace(low, high, round(STEPS * (high - low)))
    known: dict[float, tuple[Array, Array]] = {}

    def optimum(x: float) -> tuple[Array, Array]:
        if x not in known:
            log_cost = np.log(cost(points, np.exp(grid), math.exp(x)))
            with np.errstate(over="ignore", invalid="ignore"):  # draws far off their data
                log_n, _, log_loss = law.optimum(values, math.exp(x), grid, log_cost)
            valid = np.flatnonzero(np.isfinite(log_n) & np.isfinite(log_loss))
            # Draws without an optimum are replaced by others that have one.
            rows = np.where(np.isin(np.arange(len(log_n)), valid), np.arange(len(log_n)), np.resize(valid, len(log_n)))
            enough = len(valid) >= max(1, VALID * len(log_n))
            known[x] = (log_loss[rows], log_n[rows]) if enough else (np.full(len(log_n), np.nan),) * 2
        return known[x]

    return (
        lambda at: np.stack([optimum(float(x))[0] for x in at], 1),
        lambda at: np.stack([optimum(float(x))[1] for x in at], 1),
    )


@dataclass(frozen=True)
class Optima:
    """Optima of a method: ln C [n], and ln L* and ln N* [draws, n]."""

    x: Array
    log_loss: Array
    log_n: Array

    def first(self, count: int) -> "Optima":
        """Return the optima of the smallest budgets."""
        return Optima(self.x[:count], self.log_loss[:, :count], self.log_n[:, :count])


def trends_of(optima: Optima, joint: Coefficients, points: Sequence[Point], fewest: int) -> tuple[Trends, Trends]:
    """Return the laws of ln L* and of ln N*. A power law needs `fewest` optima, and one more with an offset."""
    losses: Trends = {}
    sizes: Trends = {}
    if len(optima.x) >= fewest:
        losses["power law"], sizes["power law"] = line(optima.x, optima.log_loss), line(optima.x, optima.log_n)
    if len(optima.x) > fewest:
        losses["power law with an offset"] = offset(optima.x, optima.log_loss)
    for name, values in joint.items():
        losses[f"{name} law"], sizes[f"{name} law"] = joint_optimum(LAWS[name], values, points)
    return losses, sizes
