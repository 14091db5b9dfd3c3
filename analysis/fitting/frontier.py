"""The frontier over methods: which method is best at which budget, where two cross, and which two noise separates."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np

from analysis.fits import Comparison, Crossing, Frontier, Gap, MethodFit, Segment
from analysis.fitting import uncertainty
from analysis.fitting.grouping import EQUAL
from analysis.fitting.laws import Array, interval
from analysis.fitting.uncertainty import OptimumDraws

REACH = math.log(100)  # two laws that meet farther from the budgets than this do not cross
SIGMAS = 3.0  # standard deviations of ln L by which a measured run may lie below the frontier
LEAST = 1e-3  # of ln L, by which it may in any case
Draws = Mapping[str, Mapping[float, OptimumDraws]]


def frontier(
    methods: Mapping[str, MethodFit],
    draws: Draws,
    spread: Mapping[str, Array | None],
    confidence: float,
    rng: np.random.Generator,
) -> Frontier:
    """Return the lower envelope of the methods' power laws of the loss (figure 1), and the methods compared.

    `draws` are those of the interior optima of each method and budget; `spread` are draws of its noise of ln L. The
    envelope runs between neighbouring budgets at both of which a method has an optimum between its sizes, its own or
    its joint law's, and no run was measured below the envelope by more than the noise.
    """
    laws = {name: each.power_laws.loss for name, each in methods.items() if each.power_laws.loss}
    lines = {name: np.array([math.log(law.coefficient), law.exponent]) for name, law in laws.items()}
    noise = max((float(np.median(drawn)) for drawn in spread.values() if drawn is not None), default=0.0)
    budgets = sorted({row.budget_flop for each in methods.values() for row in each.optima if row.best})
    held = {budget: _holding(methods, lines, budget, noise) for budget in budgets}
    segments: list[Segment] = []
    for low, high in pairwise(budgets):
        both = {name: lines[name] for name in lines if name in held[low][0] and name in held[high][0]}
        for found in _envelope(both, math.log(low), math.log(high)):
            last = segments[-1] if segments else None
            if last and last.method == found.method and last.to_flop == found.from_flop:
                found = Segment(found.method, segments.pop().from_flop, found.to_flop)
            segments.append(found)
    for budget in budgets:  # one whose neighbours are gaps stands alone
        names, low, high = held[budget][0], budget * (1 - EQUAL), budget * (1 + EQUAL)
        if names and not any(row.from_flop <= high and row.to_flop >= low for row in segments):
            least = _lowest({name: lines[name] for name in names}, math.log(budget))
            segments.append(Segment(least, budget, budget))
    segments.sort(key=lambda row: row.from_flop)
    crossings = []
    for below, above in pairwise(segments):
        a, b = below.method, above.method
        if a == b or below.to_flop != above.from_flop:
            continue
        if abs(float(uncertainty.crossing(lines[a], lines[b])) - math.log(below.to_flop)) > EQUAL:
            continue  # the laws do not meet here: one of the methods has no optimum on one side
        drawn = np.array([])
        if laws[a].draws and laws[b].draws:
            drawn = uncertainty.crossing(*(_all_draws(methods, draws, name, rng) for name in (a, b)))
            # Lines that hardly differ can meet anywhere.
            near = (drawn > math.log(budgets[0]) - REACH) & (drawn < math.log(budgets[-1]) + REACH)
            drawn = np.where(near, drawn, np.nan)
        ends = interval(np.exp(drawn), confidence) if len(drawn) else None
        share = float(np.isfinite(drawn).mean()) if len(drawn) else None
        crossings.append(Crossing(below.to_flop, a, b, ends, share))
    comparisons = _comparisons(methods, draws, spread, confidence, rng)
    gaps = tuple(Gap(budget, why) for budget, (names, why) in held.items() if not names)
    return Frontier(tuple(segments), tuple(crossings), tuple(comparisons), gaps)


def _holding(
    methods: Mapping[str, MethodFit], lines: Mapping[str, Array], budget: float, noise: float
) -> tuple[list[str], str]:
    """Return the methods whose power law of the loss holds at a budget; if there is none, why."""
    rows = {name: row for name, each in methods.items() for row in each.optima if row.budget_flop == budget}
    names = [name for name in lines if name in rows and (rows[name].interior or rows[name].law)]
    if not names:
        return [], "no method with a power law has an optimum between its sizes"
    runs = {name: row.best for name, row in rows.items() if row.best}
    best = min(runs, key=lambda name: runs[name].loss)
    by_line = {name: lines[name][0] + lines[name][1] * math.log(runs[best].budget_flop) for name in names}
    least = min(names, key=lambda name: by_line[name])
    allowed = max(SIGMAS * math.hypot(noise, _misfit(methods[least], lines[least])), LEAST)
    if by_line[least] > math.log(runs[best].loss) + allowed:
        said, found = math.exp(by_line[least]), runs[best].loss
        return [], f"the power law of {least} says {said:.4g}, but {best} was measured at {found:.4g}"
    return names, ""


def _misfit(method: MethodFit, line: Array) -> float:
    """Return the standard deviation of a method's ln L* about its power law; 0 for a line through two optima."""
    left = [math.log(row.loss) - line[0] - line[1] * math.log(row.budget_flop) for row in method.interior if row.loss]
    return math.sqrt(sum(each**2 for each in left) / (len(left) - 2)) if len(left) > 2 else 0.0


def _lowest(lines: Mapping[str, Array], x: float) -> str:
    """Return the name of the lowest of the lines (ln coefficient, exponent) at ln C."""
    return min(lines, key=lambda name: float(lines[name][0] + lines[name][1] * x))


def _envelope(lines: Mapping[str, Array], low: float, high: float) -> list[Segment]:
    """Return the lowest of the lines (ln coefficient, exponent) between two values of ln C."""
    if not lines:
        return []
    meetings = [float(uncertainty.crossing(lines[a], lines[b])) for a, b in combinations(lines, 2)]
    segments: list[Segment] = []
    for start, stop in pairwise([low, *sorted(x for x in meetings if low < x < high), high]):
        middle = (start + stop) / 2
        best = _lowest(lines, middle)
        begins = segments.pop().from_flop if segments and segments[-1].method == best else math.exp(start)
        segments.append(Segment(best, begins, math.exp(stop)))
    return segments


def _all_draws(methods: Mapping[str, MethodFit], draws: Draws, method: str, rng: np.random.Generator) -> Array:
    found = {row.budget_flop: row.loss for row in methods[method].interior}
    budgets, losses = (np.array(list(each), float) for each in (found, found.values()))
    drawn = np.array([draws[method][budget].log_loss for budget in found])
    drawn = uncertainty.with_misfit(budgets, np.log(losses), drawn, rng)
    return uncertainty.power_law_draws(budgets, drawn)


def _comparisons(
    methods: Mapping[str, MethodFit],
    draws: Draws,
    noise: Mapping[str, Array | None],
    confidence: float,
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
            of_run = noise[name]
            if of_run is not None:
                # A draw whose minimum is at an end of the grid still has a lowest loss: that of a run.
                own = value + of_run / math.sqrt(row.best.seeds) * rng.standard_normal(len(of_run))
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
