"""The frontier over methods: which is best at which budget, where they cross, and whom the noise separates."""

import math
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.fitting import uncertainty
from analysis.fitting.uncertainty import OptimumDraws, interval

Array = NDArray[np.float64]


def frontier(
    methods: dict[str, Any],
    draws: dict[str, dict[float, OptimumDraws]],
    sigma: float | None,
    budgets: Array,
    confidence: float,
    bootstrap: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The lower envelope of the methods' laws of the loss (figure 1), where they cross, and whom noise separates."""
    laws = {name: each["power_laws"]["loss"] for name, each in methods.items() if each["power_laws"]["loss"]}
    lines = {name: np.array([math.log(law["coefficient"]), law["exponent"]]) for name, law in laws.items()}
    low, high = np.log([budgets.min(), budgets.max()])
    meetings = [float(uncertainty.crossing(lines[a], lines[b])) for a, b in combinations(lines, 2)]
    ends = [low, *sorted(x for x in meetings if low < x < high), high]
    segments: list[dict[str, Any]] = []
    for start, stop in pairwise(ends):
        if not lines:
            break
        middle = (start + stop) / 2
        best = min(lines, key=lambda name: lines[name][0] + lines[name][1] * middle)
        if segments and segments[-1]["method"] == best:
            segments[-1]["to"] = math.exp(stop)
        else:
            segments.append({"method": best, "from": math.exp(start), "to": math.exp(stop)})
    crossings = []
    for below, above in pairwise(segments):
        a, b = below["method"], above["method"]
        drawn = np.array([])
        if laws[a]["draws"] and laws[b]["draws"]:
            drawn = uncertainty.crossing(_all_draws(methods, draws, a), _all_draws(methods, draws, b))
            # Lines that hardly differ meet anywhere; a meeting far from the budgets is none.
            drawn = np.where((drawn > low - math.log(100)) & (drawn < high + math.log(100)), drawn, np.nan)
        crossings.append(
            {
                "budget": below["to"],
                "interval": interval(np.exp(drawn), confidence) if len(drawn) else None,
                "share": float(np.isfinite(drawn).mean()) if len(drawn) else None,
                "below": a,
                "above": b,
            }
        )
    return {
        "segments": segments,
        "crossings": crossings,
        "comparisons": _comparisons(methods, draws, sigma, confidence, bootstrap, rng),
    }


def _all_draws(methods: dict[str, Any], draws: dict[str, dict[float, OptimumDraws]], method: str) -> Array:
    budgets = [row["budget"] for row in methods[method]["optima"] if row["state"] == "interior"]
    drawn = np.array([draws[method][budget].log_loss for budget in budgets])
    return uncertainty.power_law_draws(np.array(budgets), drawn)


def _comparisons(
    methods: dict[str, Any],
    draws: dict[str, dict[float, OptimumDraws]],
    sigma: float | None,
    confidence: float,
    bootstrap: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """At each budget, each two methods' lowest losses: optima where interior, else the best runs."""
    found: dict[float, dict[str, tuple[float, Array | None]]] = {}
    for name, each in methods.items():
        for row in each["optima"]:
            if row["best"] is None:
                continue
            spread = draws[name].get(row["budget"])
            value = math.log(row["loss"] if row["state"] == "interior" else row["best"]["loss"])
            drawn = None if spread is None else spread.log_loss
            if sigma is not None:
                # A draw whose minimum is at an end of the grid has a lowest loss nevertheless, that of a run.
                own = value + sigma / math.sqrt(row["best"]["seeds"]) * rng.standard_normal(bootstrap)
                drawn = own if drawn is None else np.where(np.isfinite(drawn), drawn, own)
            found.setdefault(row["budget"], {})[name] = (value, drawn)
    result = []
    for budget in sorted(found):
        for a, b in combinations(found[budget], 2):
            (value_a, drawn_a), (value_b, drawn_b) = found[budget][a], found[budget][b]
            ends = interval(drawn_a - drawn_b, confidence) if drawn_a is not None and drawn_b is not None else None
            result.append(
                {"budget": budget, "a": a, "b": b, "difference": value_a - value_b, "interval": ends}
                | {"distinguishable": None if ends is None else bool(ends[0] > 0 or ends[1] < 0)}
            )
    return result
