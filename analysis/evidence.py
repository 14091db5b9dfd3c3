"""What fits say of one method at any size and budget, and what a budget may be: the ground that a recipe stands on."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.fitting.laws import CHINCHILLA, Array, interval
from embedscale.errors import UserError
from embedscale.run.families import SUITE

UNITS = {"flop": 1.0, "flops": 1.0, "": 1.0} | {
    f"{letter}{word}": 10.0 ** (3 * power) * seconds
    for power, letter in enumerate("kmgtpezy", 1)
    for word, seconds in (("flop", 1.0), ("flops", 1.0), ("flop-day", 86400.0), ("flop-days", 86400.0))
}
HOURS = ("gpu-hour", "gpu-hours", "gpuh", "gpu-h")
MOST = 1e30  # FLOP, as of a run
REACH = 1e4  # how far beyond the sizes that were run a joint law's best size is looked for


@dataclass(frozen=True)
class Limit:
    """What is given: FLOP or GPU-hours (one of them, or none), and at most so many tokens (or none)."""

    flop: float | None = None
    gpu_hours: float | None = None
    tokens: float | None = None

    @property
    def text(self) -> str:
        spent = f"{self.flop:.4g} FLOP" if self.flop else f"{self.gpu_hours:.4g} GPU-hours" if self.gpu_hours else ""
        data = f"{self.tokens:.4g} tokens" if self.tokens else ""
        return " and at most ".join(part for part in (spent, data) if part)


def parse_limit(budget: str | None, tokens: str | None = None) -> Limit:
    """`1e17`, `100 PFLOP`, `2 PFLOP-days`, `24 GPU-hours`; tokens `2e9`. Raises UserError for what is no amount."""
    limit: dict[str, float] = {}
    if budget is not None:
        found = re.fullmatch(r"\s*([-+]?[\d.,_]+(?:e[-+]?\d+)?)\s*([a-z-]*)\s*", budget.lower())
        unit = found[2] if found else ""
        if not found or (unit not in UNITS and unit not in HOURS):
            raise UserError(
                f"budget: {budget!r} is no amount with a unit we know; allowed: 1e17, "
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
    # A comma between other groups of digits would be a decimal one.
    if "," in text and not re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?(e[-+]?\d+)?", text.lower()):
        raise UserError(f"{name}: {text!r} has a comma that separates no thousands; allowed: 1.5e17 or 1,500,000")
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        raise UserError(f"{name}: {text!r} is no number") from None
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name}: {text} is out of range; allowed: above 0")
    return value


def same_budget(a: float, b: float) -> bool:
    """Whether runs of these budgets can be compared: nearly equal ones form a profile (`optima.group_budgets`)."""
    return math.isclose(a, b, rel_tol=0.1)


class Evidence:
    """One method's points and laws as functions of size and budget."""

    def __init__(self, name: str, facts: Mapping[str, Any], names: Mapping[float, str]):
        self.name = name
        self.points = facts["points"]
        self.optima = facts["optima"]
        self.names = names
        self.lines = facts["power_laws"]
        law = facts["joint_laws"].get(CHINCHILLA.name) or {}
        self.law = law if "E" in law else None
        self.interior = [row for row in self.optima if row["state"] == "interior"]
        curves = [row["curve"]["curvature"] for row in self.interior if row["curve"]]
        self.curvature = float(np.median(curves)) if curves else 0.0
        self.sizes = np.unique([point["params"] for point in self.points])

    def basis(self, limit: Limit, reach: float = 1.1) -> str:
        """What tells of this limit: a law, the best run, or nothing.

        Where the nearest budget that was run, at most `reach` times smaller, has no optimum inside the grid, what was
        measured there is known better than what a law extends to it: more FLOP lose nothing.
        """
        lines = "power laws" if self.lines["loss"] and self.lines["n_opt"] else None
        law = "joint law" if self.law else None
        if limit.tokens:  # a parabola says nothing far from its vertex
            return law or ""
        if limit.gpu_hours:
            return (law or lines or "") if self._rates() else ""
        known = [(row["budget"], row["state"]) for row in self.optima if row["best"]]
        if limit.flop and known:
            flop = limit.flop
            budget, state = min(known, key=lambda each: abs(math.log(each[0] / flop)))
            if state != "interior" and (same_budget(flop, budget) or 1 < flop / budget <= reach):
                return "best run"
        return lines or law or "best run"

    def cost(self, params: Array, budget: float | None = None) -> Array:
        """FLOP a token: the points' ratio to N, between sizes interpolated, beyond them held."""
        nearest = self._nearest_points(budget)
        sizes = np.array([point["params"] for point in nearest])
        ratio = np.array([point["flop_per_token"] for point in nearest]) / sizes
        return params * np.interp(np.log(params), np.log(sizes), ratio)

    def _nearest_points(self, budget: float | None) -> list[Mapping[str, Any]]:
        """Of each size the point nearest in budget, by ascending size."""
        log_budget = math.log(budget) if budget else math.inf
        found = []
        for size in self.sizes:
            own = [point for point in self.points if point["params"] == size]
            found.append(min(own, key=lambda point: abs(math.log(point["budget"]) - min(log_budget, 700.0))))
        return found

    def nearest_budget(self, budget: float) -> float:
        """The nearest budget that was run."""
        found: float = min((point["budget"] for point in self.points), key=lambda each: abs(math.log(each / budget)))
        return found

    def measured(self, budget: float | None) -> list[Mapping[str, Any]]:
        """The points at the nearest budget that was run, one a size, by ascending size."""
        assert budget is not None
        nearest = self.nearest_budget(budget)
        return [each for each in self._nearest_points(nearest) if same_budget(each["budget"], nearest)]

    def _rates(self) -> list[tuple[float, float]]:
        """(size, FLOP a GPU-hour) of the sizes whose runs carry timings; the longest run tells most."""
        rates = []
        for size in self.sizes:
            timed = [point for point in self.points if point["params"] == size and (point.get("gpu_hours") or 0) > 0]
            if timed:
                longest = max(timed, key=lambda point: point["gpu_hours"])
                rates.append((float(size), longest["budget"] / longest["gpu_hours"]))
        return rates

    def rate(self, params: Array) -> Array | None:
        rates = self._rates()
        if not rates:
            return None
        sizes, values = np.log(np.array(rates)).T
        return np.exp(np.interp(np.log(params), sizes, values))

    def budget_of(self, params: Array, limit: Limit) -> Array:
        """The FLOP that the limit allows for each size."""
        allowed = np.full(len(params), np.inf)
        if limit.flop:
            allowed = np.full(len(params), limit.flop)
        if limit.gpu_hours:
            rate = self.rate(params)
            assert rate is not None
            allowed = limit.gpu_hours * rate
        if limit.tokens:
            allowed = np.minimum(allowed, limit.tokens * self.cost(params))
        return allowed

    def log_loss(self, params: Array, budget: Array, basis: str) -> tuple[Array, Array | None]:
        """ln L of each size at its budget [k], and draws of it [draws, k]."""
        if basis == "power laws":
            centre = np.array([[math.log(self.lines[key]["coefficient"]), self.lines[key]["exponent"]] for key in
                               ("loss", "n_opt")])  # fmt: skip
            values: Array = self._bowl(centre[:, None], params, budget)[0]
            drawn = [np.asarray(self.lines[key]["draws"], float) for key in ("loss", "n_opt")]
            return values, self._bowl(np.stack(drawn), params, budget) if len(drawn[0]) else None
        if basis == "joint law":
            assert self.law is not None
            tokens = budget / self.cost(params)
            law = np.array([self.law[name] for name in CHINCHILLA.names])
            with np.errstate(invalid="ignore"):
                drawn_loss = np.log(CHINCHILLA.predict(np.asarray(self.law["draws"], float), params, tokens))
            return np.log(np.ravel(CHINCHILLA.predict(law, params, tokens))), drawn_loss
        losses = {point["params"]: point["loss"] for point in self.measured(float(budget[0]))}
        return np.log([losses[size] for size in params]), None

    def _bowl(self, laws: Array, params: Array, budget: Array) -> Array:
        """ln L = ln L*(C) + curvature (ln N − ln N*(C))² for laws [2, draws, 2]: [draws, sizes]."""
        lowest, size = (law[:, :1] + law[:, 1:] * np.log(budget) for law in laws)
        return lowest + self.curvature * (np.log(params) - size) ** 2

    def optimum(self, limit: Limit, basis: str, confidence: float) -> tuple[float, list[float] | None]:
        """The continuous best size, with its interval; for the best run, its size."""
        if basis == "power laws" and limit.flop:
            law = self.lines["n_opt"]
            draws = np.asarray(law["draws"], float)
            spread = draws[:, 0] + draws[:, 1] * math.log(limit.flop) if len(draws) else np.array([])
            return law["coefficient"] * limit.flop ** law["exponent"], interval(np.exp(spread), confidence)
        if basis == "best run":
            lowest = min(self.measured(limit.flop), key=lambda point: point["loss"])
            return float(lowest["params"]), None
        reach = 1.0 if limit.tokens else REACH  # with the data fixed, larger is better for ever
        low, high = math.log(self.sizes[0] / reach), math.log(self.sizes[-1] * reach)
        grid = np.exp(np.linspace(low, high, max(401, round(50 * (high - low)))))
        values, drawn = self.log_loss(grid, self.budget_of(grid, limit), basis)
        best = int(values.argmin())
        if drawn is None or not 0 < best < len(grid) - 1:
            return float(grid[best]), None
        return float(grid[best]), interval(grid[np.nan_to_num(drawn, nan=np.inf).argmin(1)], confidence)

    def nearest(self, params: float, budget: float) -> Mapping[str, Any]:
        """The point whose size, and then whose budget, is nearest: its hyper-parameters are taken."""

        def distance(point: Mapping[str, Any]) -> tuple[float, float]:
            size, spent = (abs(math.log(point[key] / value)) for key, value in (("params", params), ("budget", budget)))
            return round(size, 6), spent

        found: Mapping[str, Any] = min(self.points, key=distance)
        return found

    def available(self, limit: Limit, basis: str) -> list[tuple[str, float]]:
        """Backbones that may be used, by ascending size.

        The Pythia suite where the runs are of it and a law reaches beyond them, else the sizes that were run; for the
        best run those that were run at its budget.
        """
        suite = {float(row.parameters): row.name for row in SUITE.values()}
        if basis != "best run" and set(map(float, self.sizes)) <= set(suite):
            return sorted(((name, size) for size, name in suite.items()), key=lambda each: each[1])
        sizes = [point["params"] for point in self.measured(limit.flop)] if basis == "best run" else self.sizes
        return [(self.names.get(float(size), f"{size:.4g} parameters"), float(size)) for size in sizes]
