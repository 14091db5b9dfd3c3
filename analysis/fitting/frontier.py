"""The frontier over methods: which method is best at which budget, where two cross, and which two noise separates."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np

from analysis.fits import Comparison, Crossing, Frontier, MethodFit, Segment
from analysis.fitting import uncertainty
from analysis.fitting.laws import Array, interval
from analysis.fitting.uncertainty import OptimumDraws

REACH = math.log(100)  # two laws that meet farther from the budgets than this do not cross
Draws = Mapping[str, Mapping[float, OptimumDraws]]


def frontier(
    methods: Mapping[str, MethodFit],
    draws: Draws,
    sigma: float | None,
    budgets: Array,
    confidence: float,
    bootstrap: int,
    rng: np.random.Generator,
) -> Frontier:
    """Return the lower envelope of the methods' power laws of the loss (figure 1), and the methods compared.

    `draws` are those of the interior optima of each method and budget; `sigma` is the standard deviation of ln L.
    """
    laws = {name: each.power_laws.loss for name, each in methods.items() if each.power_laws.loss}
    lines = {name: np.array([math.log(law.coefficient), law.exponent]) for name, law in laws.items()}
    low, high = np.log([budgets.min(), budgets.max()])
    segments = _envelope(lines, low, high)
    crossings = []
    for below, above in pairwise(segments):
        a, b = below.method, above.method
        drawn = np.array([])
        if laws[a].draws and laws[b].draws:
            drawn = uncertainty.crossing(_all_draws(methods, draws, a), _all_draws(methods, draws, b))
            # Lines that hardly differ can meet anywhere.
            drawn = np.where((drawn > low - REACH) & (drawn < high + REACH), drawn, np.nan)
        ends = interval(np.exp(drawn), confidence) if len(drawn) else None
        share = float(np.isfinite(drawn).mean()) if len(drawn) else None
        crossings.append(Crossing(below.to_flop, a, b, ends, share))
    comparisons = _comparisons(methods, draws, sigma, confidence, bootstrap, rng)
    return Frontier(tuple(segments), tuple(crossings), tuple(comparisons))


def _envelope(lines: Mapping[str, Array], low: float, high: float) -> list[Segment]:
    """Return the lowest of the lines (ln coefficient, exponent) between two values of ln C."""
    if not lines:
        return []
    meetings = [float(uncertainty.crossing(lines[a], lines[b])) for a, b in combinations(lines, 2)]
    segments: list[Segment] = []
    for start, stop in pairwise([low, *sorted(x for x in meetings if low < x < high), high]):
        middle = (start + stop) / 2
        best = min(lines, key=lambda name: lines[name][0] + lines[name][1] * middle)
        begins = segments.pop().from_flop if segments and segments[-1].method == best else math.exp(start)
        segments.append(Segment(best, begins, math.exp(stop)))
    return segments


def _all_draws(methods: Mapping[str, MethodFit], draws: Draws, method: str) -> Array:
    budgets = [row.budget_flop for row in methods[method].interior]
    drawn = np.array([draws[method][budget].log_loss for budget in budgets])
    return uncertainty.power_law_draws(np.array(budgets), drawn)


def _comparisons(
    methods: Mapping[str, MethodFit],
    draws: Draws,
    sigma: float | None,
    confidence: float,
    bootstrap: int,
    rng: np.random.Generator,
) -> Sequence[Comparison]:
    """Compare the lowest losses of each two methods at each budget: optima where interior, else the best runs."""
    found: dict[float, dict[str, tuple[float, Array | None]]] = {}
    for name, each in methods.items():
        for row in each.optima:
            if row.best is None or row.lowest_loss is None:
                continue
            spread = draws[name].get(row.budget_flop)
            value = math.log(row.lowest_loss)
            drawn = None if spread is None else spread.log_loss
            if sigma is not None:
                # A draw whose minimum is at an end of the grid still has a lowest loss: that of a run.
                own = value + sigma / math.sqrt(row.best.seeds) * rng.standard_normal(bootstrap)
                drawn = own if drawn is None else np.where(np.isfinite(drawn), drawn, own)
            found.setdefault(row.budget_flop, {})[name] = (value, drawn)
    result = []
    for budget in sorted(found):
        for a, b in combinations(found[budget], 2):
            (value_a, drawn_a), (value_b, drawn_b) = found[budget][a], found[budget][b]
            ends = interval(drawn_a - drawn_b, confidence) if drawn_a is not None and drawn_b is not None else None
            told = None if ends is None else bool(ends[0] > 0 or ends[1] < 0)
            result.append(Comparison(budget, a, b, value_a - value_b, ends, told))
    return result
