"""What the fits of one method say at any size and budget, and what a budget may be: the basis of a recipe.

No pandas here, because `embedscale recipe` starts without it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.fits import Interval, MethodFit, Point
from analysis.fitting.laws import Array, interval, size_law
from embedscale.errors import UserError
from embedscale.run.families import family_with

UNITS = {"flop": 1.0, "flops": 1.0, "": 1.0} | {
    f"{letter}{word}": 10.0 ** (3 * power) * seconds
    for power, letter in enumerate("kmgtpezy", 1)
    for word, seconds in (("flop", 1.0), ("flops", 1.0), ("flop-day", 86400.0), ("flop-days", 86400.0))
}
HOURS = ("gpu-hour", "gpu-hours", "gpuh", "gpu-h")
MOST = 1e30  # FLOP; the largest budget of a run
REACH = 1e4  # factor beyond the sizes that were run within which a joint law's best size is looked for
Basis = Literal["power laws", "joint law", "best run", ""]


@dataclass(frozen=True)
class Limit:
    """What a run may use: FLOP or GPU-hours (one of them, or neither), and a number of tokens (or none)."""

    flop: float | None = None
    gpu_hours: float | None = None
    tokens: float | None = None

    @property
    def text(self) -> str:
        spent = f"{self.flop:.4g} FLOP" if self.flop else f"{self.gpu_hours:.4g} GPU-hours" if self.gpu_hours else ""
        data = f"{self.tokens:.4g} tokens" if self.tokens else ""
        return " and at most ".join(part for part in (spent, data) if part)


def parse_limit(budget: str | None, tokens: str | None = None) -> Limit:
    """Return the limit of `1e17`, `100 PFLOP`, `2 PFLOP-days` or `24 GPU-hours`, and of tokens such as `2e9`.

    Raises UserError for a text that is not an amount.
    """
    limit: dict[str, float] = {}
    if budget is not None:
        found = re.fullmatch(r"\s*([-+]?[\d.,_]+(?:e[-+]?\d+)?)\s*([a-z-]*)\s*", budget.lower())
        unit = found[2] if found else ""
        if not found or (unit not in UNITS and unit not in HOURS):
            raise UserError(
                f"budget: {budget!r} is not an amount with a known unit; allowed: 1e17, "
                "100 PFLOP, 2 PFLOP-days, 24 GPU-hours"
            )
        limit["gpu_hours" if unit in HOURS else "flop"] = _amount("budget", found[1]) * UNITS.get(unit, 1.0)
    if tokens is not None:
        limit["tokens"] = _amount("--tokens", tokens)
    if limit.get("flop", 0) > MOST:
        raise UserError(f"budget: {budget} is out of range; allowed: at most {MOST:g} FLOP")
    if not limit:
        raise UserError("budget: nothing is given; allowed: a budget such as 1e17, --tokens, or both")
    return Limit(**limit)


def _amount(name: str, text: str) -> float:
    # A comma between other groups of digits would be a decimal comma.
    if "," in text and not re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?(e[-+]?\d+)?", text.lower()):
        raise UserError(f"{name}: {text!r} has a comma that does not separate thousands; write 1.5e17 or 1,500,000")
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        raise UserError(f"{name}: {text!r} is not a number; write 1.5e17 or 1,500,000") from None
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name}: {text} is out of range; allowed: above 0")
    return value


def same_budget(a: float, b: float) -> bool:
    """Return whether runs of these budgets can be compared: within 10 %, as in `grouping.group_budgets`."""
    return math.isclose(a, b, rel_tol=0.1)


def log_distance(a: float, b: float) -> float:
    """Return |ln a − ln b|."""
    return abs(math.log(a / b))


class Evidence:
    """The points and laws of one method as functions of size and budget."""

    def __init__(self, name: str, fit: MethodFit, names: Mapping[float, str]):
        self.name = name
        self.fit = fit
        self.points = fit.points
        self.names = names
        self.lines = fit.power_laws
        self.law = size_law(fit.joint_laws)
        curves = [row.curve.curvature for row in fit.interior if row.curve]
        self.curvature = float(np.median(curves)) if curves else 0.0
        self.sizes = np.unique([point.n_parameters for point in self.points])

    @property
    def not_fixed(self) -> tuple[str, ...]:
        """Coefficients of the joint law that the data do not fix."""
        return self.fit.joint_laws[self.law.law.name].not_fixed if self.law else ()

    def basis(self, limit: Limit, reach: float = 1.1) -> Basis:
        """Return what a prediction for this limit rests on: a law, the best run, or nothing.

        The best run is preferred to a law where the nearest budget that was run, at most `reach` times smaller, has no
        optimum inside the grid: what was measured there is known better than what a law extends to it.
        """
        lines: Basis = "power laws" if self.lines.loss and self.lines.n_opt else ""
        law: Basis = "joint law" if self.law else ""
        if limit.tokens:  # a parabola says nothing far from its vertex
            return law
        if limit.gpu_hours:
            return (law or lines) if self._rates() else ""
        known = [(row.budget_flop, row.interior) for row in self.fit.optima if row.best]
        if limit.flop and known:
            flop = limit.flop
            budget, interior = min(known, key=lambda each: log_distance(each[0], flop))
            if not interior and (same_budget(flop, budget) or 1 < flop / budget <= reach):
                return "best run"
        return lines or law or "best run"

    def cost(self, sizes: Array, budget: float | None = None) -> Array:
        """Return FLOP a token of sizes [k]: its ratio to N is interpolated between the points, and constant beyond."""
        nearest = self._nearest_points(budget)
        known = np.array([point.n_parameters for point in nearest])
        ratio = np.array([point.flop_per_token for point in nearest]) / known
        return sizes * np.interp(np.log(sizes), np.log(known), ratio)

    def _nearest_points(self, budget: float | None) -> list[Point]:
        """Return the point of each size that is nearest in budget, by ascending size; without a budget, the largest."""
        log_budget = min(math.log(budget) if budget else math.inf, 700.0)
        found = []
        for size in self.sizes:
            own = [point for point in self.points if point.n_parameters == size]
            found.append(min(own, key=lambda point: abs(math.log(point.budget_flop) - log_budget)))
        return found

    def nearest_budget(self, budget: float) -> float:
        """Return the nearest budget that was run."""
        return min((point.budget_flop for point in self.points), key=lambda each: log_distance(each, budget))

    def measured(self, budget: float | None) -> list[Point]:
        """Return the points at the nearest budget that was run, one a size, by ascending size."""
        assert budget is not None
        nearest = self.nearest_budget(budget)
        return [each for each in self._nearest_points(nearest) if same_budget(each.budget_flop, nearest)]

    def _rates(self) -> list[tuple[float, float]]:
        """Return (size, FLOP a GPU-hour) of each size whose runs carry timings, by its longest run."""
        rates = []
        for size in self.sizes:
            timed = [(point.gpu_hours or 0.0, point.budget_flop) for point in self.points if point.n_parameters == size]
            hours, flop = max(timed, key=lambda each: each[0])
            if hours > 0:
                rates.append((float(size), flop / hours))
        return rates

    def rate(self, sizes: Array) -> Array | None:
        """Return FLOP a GPU-hour of sizes [k], or None where no run carries timings."""
        rates = self._rates()
        if not rates:
            return None
        known, values = np.log(np.array(rates)).T
        return np.exp(np.interp(np.log(sizes), known, values))

    def budget_of(self, sizes: Array, limit: Limit) -> Array:
        """Return the FLOP that the limit allows for each size."""
        allowed = np.full(len(sizes), np.inf)
        if limit.flop:
            allowed = np.full(len(sizes), limit.flop)
        if limit.gpu_hours:
            rate = self.rate(sizes)
            assert rate is not None
            allowed = limit.gpu_hours * rate
        if limit.tokens:
            allowed = np.minimum(allowed, limit.tokens * self.cost(sizes))
        return allowed

    def log_loss(self, sizes: Array, budget: Array, basis: Basis) -> tuple[Array, Array | None]:
        """Return ln L of each size at its budget [k], and draws of it [draws, k]."""
        if basis == "power laws":
            lines = [self.lines.loss, self.lines.n_opt]
            centre = np.array([[math.log(line.coefficient), line.exponent] for line in lines if line])
            drawn = np.array([np.asarray(line.draws, float) for line in lines if line])
            values: Array = self._bowl(centre[:, None], sizes, budget)[0]
            return values, self._bowl(drawn, sizes, budget) if drawn.size else None
        if basis == "joint law":
            assert self.law is not None
            tokens = budget / self.cost(sizes)
            with np.errstate(invalid="ignore"):
                drawn = np.log(self.law.drawn(sizes, tokens))
            return np.log(self.law.loss(sizes, tokens)), drawn
        losses = {point.n_parameters: point.loss for point in self.measured(float(budget[0]))}
        return np.log([losses[size] for size in sizes]), None

    def _bowl(self, laws: Array, sizes: Array, budget: Array) -> Array:
        """Return ln L = ln L*(C) + curvature (ln N − ln N*(C))² [draws, sizes] for laws [2, draws, 2] of L* and N*."""
        lowest, size = (law[:, :1] + law[:, 1:] * np.log(budget) for law in laws)
        return lowest + self.curvature * (np.log(sizes) - size) ** 2

    def optimum(self, limit: Limit, basis: Basis, confidence: float) -> tuple[float, Interval | None]:
        """Return the best size, not rounded to a backbone, with its interval; for the best run, its size."""
        line = self.lines.n_opt
        if basis == "power laws" and limit.flop and line:
            draws = np.asarray(line.draws, float)
            spread = draws[:, 0] + draws[:, 1] * math.log(limit.flop) if len(draws) else np.array([])
            return line.at(limit.flop), interval(np.exp(spread), confidence)
        if basis == "best run":
            return min(self.measured(limit.flop), key=lambda point: point.loss).n_parameters, None
        reach = 1.0 if limit.tokens else REACH  # with the data fixed, the loss falls with the size without end
        low, high = math.log(self.sizes[0] / reach), math.log(self.sizes[-1] * reach)
        grid = np.exp(np.linspace(low, high, max(401, round(50 * (high - low)))))
        values, drawn = self.log_loss(grid, self.budget_of(grid, limit), basis)
        best = int(values.argmin())
        if drawn is None or not 0 < best < len(grid) - 1:
            return float(grid[best]), None
        return float(grid[best]), interval(grid[np.nan_to_num(drawn, nan=np.inf).argmin(1)], confidence)

    def nearest(self, size: float, budget: float) -> Point:
        """Return the point nearest in size, and then in budget: its hyper-parameters are taken."""

        def distance(point: Point) -> tuple[float, float]:
            return round(log_distance(point.n_parameters, size), 6), log_distance(point.budget_flop, budget)

        return min(self.points, key=distance)

    def available(self, limit: Limit, basis: Basis) -> list[tuple[str, float]]:
        """Return the backbones (name, size) that may be used, by ascending size.

        For the best run these are the sizes that were run at its budget. A law reaches beyond: to a whole family if all
        sizes that were run are of that family, else to all sizes that were run.
        """
        family = family_with(self.sizes)
        if basis != "best run" and family:
            return [(row.name, float(row.parameters)) for row in family.sizes.values()]
        sizes = [point.n_parameters for point in self.measured(limit.flop)] if basis == "best run" else self.sizes
        return [(self.names.get(float(size), f"{size:.4g} parameters"), float(size)) for size in sizes]
