"""What the fits of one method say at any size and budget, and what a budget may be: the basis of a recipe.

No pandas here, because `embedscale recipe` starts without it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from analysis.advice import trends
from analysis.advice.forecast import DRAWS, SAME, Outlook, summary
from analysis.advice.trends import REACH, nearest_points
from analysis.columns import FLOP, TOKENS, amount
from analysis.fits import Fits, Interval, MethodFit, Point, same_budget
from analysis.fitting.laws import Array, interval, size_law
from embedscale.errors import UserError
from embedscale.run.families import family_with
from embedscale.texts import number

HOURS = r"(device|gpu)[ -]?h(ours?)?"  # the unit of device-hours
MOST = 1e30  # FLOP or tokens; the most of a run
Basis = Literal["forecast", "joint law", "best run", ""]


@dataclass(frozen=True)
class Limit:
    """What a run may use: FLOP or device-hours (one of them, or neither), and a number of tokens (or none)."""

    flop: float | None = None
    gpu_hours: float | None = None
    tokens: float | None = None

    @property
    def text(self) -> str:
        amounts = {"FLOP": self.flop, "device-hours": self.gpu_hours if not self.flop else None, "tokens": self.tokens}
        told = [f"{number(value, 4)} {unit}" for unit, value in amounts.items() if value]
        return " and at most ".join(told)


def parse_limit(budget: str | None, tokens: str | None = None) -> Limit:
    """Return the limit of `1e17`, `100 PFLOP`, `2 PFLOP-days` or `24 device-hours`, and of tokens such as `2B`.

    Raises UserError for a text that is not an amount.
    """
    limit: dict[str, float] = {}
    if budget is not None:
        hours = re.fullmatch(rf"(.*?)\s*{HOURS}\s*", budget, re.IGNORECASE)
        limit["gpu_hours" if hours else "flop"] = (
            _amount("budget", hours[1], {}) if hours else _amount("budget", budget, FLOP)
        )
    if tokens is not None:
        limit["tokens"] = _amount("--tokens", tokens, TOKENS)
    if limit.get("flop", 0) > MOST:
        raise UserError(f"budget: {budget} is out of range; allowed: at most {number(MOST)} FLOP")
    if limit.get("tokens", 0) > MOST:
        raise UserError(f"--tokens: {tokens} is out of range; allowed: at most {number(MOST)} tokens")
    if not limit:
        raise UserError("budget: nothing is given; allowed: a budget such as 1e17, --tokens, or both")
    return Limit(**limit)


def _amount(name: str, text: str, units: Mapping[str, float]) -> float:
    try:
        value = amount(text, units)
    except ValueError as error:
        if "comma" in str(error):
            raise UserError(f"{name}: {text!r} was found; {error}") from None
        allowed = "1e17, 100 PFLOP, 2 PFLOP-days, 24 device-hours" if name == "budget" else "2e9, 2B, 2 billion tokens"
        raise UserError(f"{name}: {text!r} is not an amount with a known unit; allowed: {allowed}") from None
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name}: {text} is out of range; allowed: above 0")
    return value


def log_distance(a: float, b: float) -> float:
    """Return |ln a − ln b|."""
    return abs(math.log(a / b))


def gather(fits: Fits) -> dict[str, "Evidence"]:
    """Return the evidence of each method that has points."""
    names = {point.n_parameters: point.backbone for fit in fits.methods.values() for point in fit.points}
    named = {size: name for size, name in names.items() if name}
    settings = fits.settings
    return {
        name: Evidence(name, fit, named, Outlook(fit, fits.noise_of(name), settings.confidence, (settings.seed, i)))
        for i, (name, fit) in enumerate(fits.methods.items())
        if fit.points
    }


class Evidence:
    """The points, laws and forecasts of one method as functions of size and budget."""

    def __init__(self, name: str, fit: MethodFit, names: Mapping[float, str], outlook: Outlook):
        self.name = name
        self.fit = fit
        self.points = fit.points
        self.names = names
        self.outlook = outlook
        # A law that has no finite loss over the budgets that were run says nothing.
        self.law = None if outlook.missing else size_law(fit.joint_laws)
        curves = [row.curve.curvature for row in fit.interior if row.curve]
        self.curvature = float(np.median(curves)) if curves else 0.0
        self.sizes = np.unique([point.n_parameters for point in self.points])
        self._optima: dict[tuple[Limit, Basis, float], tuple[float, Interval | None]] = {}  # a recipe asks three times

    @property
    def not_fixed(self) -> tuple[str, ...]:
        """Coefficients of the joint law that the data do not fix."""
        return self.fit.joint_laws[self.law.law.name].not_fixed if self.law else ()

    def basis(self, limit: Limit, reach: float = 1.0) -> Basis:
        """Return what a prediction for this limit rests on: a law, the best run, or nothing.

        The best run is preferred to a law where three sizes or more were run at this budget and show no optimum: what
        was measured there is known better than what a law extends to it. Without a law, a budget at most `reach` times
        smaller serves too.
        """
        law: Basis = "joint law" if self.law else ""
        if limit.tokens:  # a parabola says nothing far from its vertex
            return law
        if limit.gpu_hours:
            lines: Basis = "forecast" if self.curvature and not self.outlook.missing else ""
            return (law or lines) if self._rates else ""
        known = [(row.budget_flop, row.interior or row.state == "too few") for row in self.fit.optima if row.best]
        if not limit.flop or not known:
            return law
        budget, by_law = min(known, key=lambda each: log_distance(each[0], limit.flop or 0.0))
        near, sound = same_budget(limit.flop, budget), self._overtaken(budget) is None
        if near and not by_law and sound:
            return "best run"
        covered = self.outlook.covers(limit.flop)
        if self.curvature and covered:
            return "forecast"
        if law and covered:
            return law
        return "best run" if sound and (near or 1 < limit.flop / budget <= reach) else ""

    def missing(self, flop: float | None) -> str:
        """Return why nothing is known at a budget, and which runs to add; empty where that is not for lack of runs."""
        budget = self.nearest_budget(flop) if flop else 0.0
        less = self._overtaken(budget) if flop and log_distance(flop, budget) < math.log(2) else None
        if less is None:
            return self.outlook.missing
        here = min(point.loss for point in self.measured(budget))
        return (
            f"the best run at {number(budget)} FLOP reached {number(here, 4)}, but {less.backbone or 'a run'} reached "
            f"{number(less.loss, 4)} at {number(less.budget_flop)} FLOP; add runs of about {number(less.n_parameters)} "
            f"parameters at {number(budget)} FLOP"
        )

    def _overtaken(self, budget: float) -> Point | None:
        """Return the best run with less than a budget if it is better than every run of that budget, else None."""
        here = min(point.loss for point in self.measured(budget))
        less = [point for point in self.points if point.budget_flop <= budget * (1 + SAME) and point.off is None]
        best = min(less, key=lambda point: point.loss, default=None)
        return best if best and best.loss < here else None

    def cost(self, sizes: Array, budget: float | None = None) -> Array:
        """Return FLOP a token of sizes [k] (`trends.cost`)."""
        return trends.cost(self.points, sizes, budget)

    def nearest_budget(self, budget: float) -> float:
        """Return the nearest budget that was run."""
        return min((point.budget_flop for point in self.points), key=lambda each: log_distance(each, budget))

    def measured(self, budget: float) -> list[Point]:
        """Return the points at the nearest budget that was run, one a size, by ascending size."""
        nearest = self.nearest_budget(budget)
        return [each for each in nearest_points(self.points, nearest) if same_budget(each.budget_flop, nearest)]

    @cached_property
    def _rates(self) -> list[tuple[float, float]]:
        """Return (size, FLOP a device-hour) of each size whose runs carry timings, by its longest run."""
        rates = []
        for size in self.sizes:
            timed = [(point.gpu_hours or 0.0, point.budget_flop) for point in self.points if point.n_parameters == size]
            hours, flop = max(timed, key=lambda each: each[0])
            if hours > 0:
                rates.append((float(size), flop / hours))
        return rates

    def rate(self, sizes: Array) -> Array | None:
        """Return FLOP a device-hour of sizes [k], or None where no run carries timings."""
        if not self._rates:
            return None
        known, values = np.log(np.array(self._rates)).T
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

    def log_loss(self, sizes: Array, budget: Array, basis: Basis, per_token: float | None = None) -> Array:
        """Return draws of ln L of each size at its budget [draws, k], with FLOP a token if they are not `cost`."""
        if basis == "forecast":
            at = np.log(budget)
            return self.outlook.log_loss(at) + self._rise(np.log(sizes), budget, self.outlook.log_size(at))
        if basis == "joint law":
            assert self.law is not None
            with np.errstate(invalid="ignore"):
                drawn = np.log(np.atleast_2d(self.law.drawn(sizes, budget / (per_token or self.cost(sizes)))))
            return np.resize(drawn, (DRAWS, len(sizes))) + self.outlook.drift(self.law.law, np.log(budget))
        losses = {point.n_parameters: point for point in self.measured(float(budget[0]))}
        return np.stack([self.outlook.measured(losses[size]) for size in sizes], 1)

    @cached_property
    def _valley(self) -> tuple[trends.Trend, trends.Trend]:
        """ln L* and ln N* of the joint law itself, without draws."""
        assert self.law is not None
        return trends.joint_optimum(self.law.law, self.law.values[None], self.points)

    def _rise(self, log_n: Array, budget: Array, best: Array) -> Array:
        """Return how far ln L of each size at its budget lies above ln L* [draws, k], if ln N* is `best` [draws, k].

        The valley is that of the joint law, moved to `best`. A parabola, which stands where there is no law, rises
        without end; the loss does not, because one term of a law ends where the other begins.
        """
        away = log_n - best
        parabola = self.curvature * away**2
        if self.law is None:
            return parabola
        lowest, own = (trend(np.log(budget)) for trend in self._valley)  # [1, k]
        moved = np.exp(away + own)
        tokens = budget / np.stack([self.cost(moved[:, k], spent) for k, spent in enumerate(budget)], 1)
        with np.errstate(over="ignore", invalid="ignore"):
            risen = np.log(self.law.law.predict(self.law.values, moved, tokens)) - lowest
        return np.where(np.isfinite(risen), np.maximum(risen, 0.0), parabola)

    def _runs_of(self, size: float) -> list[Point]:
        return [point for point in self.points if math.isclose(point.n_parameters, size, rel_tol=1e-6)]

    def run_of(self, size: float, budget: float) -> Point | None:
        """Return the run of a size at a budget, or None."""
        own = self._runs_of(size)
        return next((point for point in own if math.isclose(point.budget_flop, budget, rel_tol=SAME)), None)

    def expected(self, size: float, budget: float, basis: Basis, per_token: float | None = None) -> Array:
        """Return draws [draws] of ln L of one size at a budget, with FLOP a token if they are not `cost`.

        A run of this size at this budget stands before a law. Runs of this size with less bind the law from above, as
        they would if they went on.
        """
        here = self.run_of(size, budget)
        if here:
            return self.outlook.measured(here)
        measured = basis == "best run" or (basis == "forecast" and self.outlook.has_optimum(budget))
        spent = np.array([budget])
        if not measured and self.law is None:  # its parabola may rise with the budget
            first = min(point.budget_flop for point in self.points)
            spent = budget / 2.0 ** np.arange(1 + max(0, math.floor(math.log2(budget / first))))
        drawn = self.log_loss(np.full(len(spent), size), spent, basis, per_token).min(1)
        if not measured:
            self.outlook.bind(drawn, self._runs_of(size), math.log(budget))
        return drawn

    def lowest(self, limit: Limit, basis: Basis, confidence: float) -> tuple[float, Interval | None]:
        """Return the loss at the best size, not rounded to a backbone, with its interval."""
        if basis != "best run" and limit.flop and not limit.tokens:
            return self.outlook.at(limit.flop).loss(confidence)
        size = np.array([self.optimum(limit, basis, confidence)[0]])
        drawn = self.log_loss(size, self.budget_of(size, limit), basis)[:, 0]
        if basis != "best run":
            allowed = self.budget_of(np.array([point.n_parameters for point in self.points]), limit) * (1 + SAME)
            within = [point for point, most in zip(self.points, allowed, strict=True) if point.budget_flop <= most]
            self.outlook.bind(drawn, within, math.inf)
        return summary(drawn, confidence)

    def optimum(self, limit: Limit, basis: Basis, confidence: float) -> tuple[float, Interval | None]:
        """Return the best size, not rounded to a backbone, with its interval; for the best run, its size."""
        asked = (limit, basis, confidence)
        if asked not in self._optima:
            self._optima[asked] = self._optimum(*asked)
        return self._optima[asked]

    def _optimum(self, limit: Limit, basis: Basis, confidence: float) -> tuple[float, Interval | None]:
        if basis != "best run" and limit.flop and not limit.tokens:
            return self.outlook.at(limit.flop).n_opt(confidence)
        if basis == "best run":
            return min(self.measured(limit.flop or 0.0), key=lambda point: point.loss).n_parameters, None
        reach = 1.0 if limit.tokens else REACH  # with the data fixed, the loss falls with the size without end
        low, high = math.log(self.sizes[0] / reach), math.log(self.sizes[-1] * reach)
        grid = np.exp(np.linspace(low, high, max(401, round(50 * (high - low)))))
        drawn = self.log_loss(grid, self.budget_of(grid, limit), basis)
        best = int(_medians(drawn).argmin())
        if not 0 < best < len(grid) - 1:
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
        sizes = self.sizes
        if basis == "best run":
            sizes = np.array([point.n_parameters for point in self.measured(limit.flop or 0.0)])
        return [(self.names.get(float(size), f"{number(size, 4)} parameters"), float(size)) for size in sizes]


def _medians(drawn: Array) -> Array:
    """Return the medians of draws [draws, k], as `np.nanmedian` does, which is five times as slow without any NaN."""
    found = np.median(drawn, 0)
    lacking = np.isnan(found)
    if lacking.any():
        found[lacking] = np.nanmedian(drawn[:, lacking], 0)
    return found
