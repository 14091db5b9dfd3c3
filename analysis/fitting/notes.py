"""What a reader should know before using the fits, a line each: missing optima, doubtful laws, luck and noise."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from statistics import NormalDist

import numpy as np

from analysis.fits import FitSettings, Frontier, MethodFit, same_budget
from analysis.fitting.laws import LAWS, power_law
from analysis.fitting.optima import SIGMAS
from analysis.noise import Noise
from embedscale.texts import counted, listed, number

FEW_DRAWS = 0.9  # share of draws with an optimum below which a note says so
FEW_STARTS = 0.25  # share of starts that agree below which a note says so
MISSED = 0.01  # share of refits without a minimum above which a note says so
MANY_ALIKE = 12  # groups of methods that noise does not separate, above which pairs are counted instead of named
# The weights of notes: a number that is missing, biased or doubtful, and a limit of the data.
MISSING, BIAS, DOUBT, LIMIT = range(4)


def notes_of(settings: FitSettings, noise: Noise, methods: Mapping[str, MethodFit], line: Frontier) -> list[str]:
    """Return what a reader should know before using the fits, a line each, in order of weight.

    First what has no number, then what biases a number, then what makes it doubtful, then what limits the data set.
    """
    notes: list[tuple[int, str]] = []
    for name, method in methods.items():
        notes += _notes_of_optima(name, method)
        if method.power_laws.loss is None:
            told = f"{name}: fewer than two interior optima, so no power law and no place on the frontier"
            notes.append((MISSING, told))
        notes += [(LIMIT, f"{name}: {method.refused[law]}") for law in LAWS if law in method.refused]
        notes += [
            (DOUBT, told) for law in LAWS if law in method.joint_laws for told in _law(settings, name, method, law)
        ]
        notes += [(DOUBT, told) for told in _far_off(name, method)]
        notes += [(BIAS, told) for told in _disagreement(name, method)]
        notes += [(BIAS, told) for told in _worse_with_more(name, method, method.noise or noise)]
    if noise.source == "none":
        told = "noise: it follows neither from replicates nor from residuals, so optima have no intervals; "
        notes.append((MISSING, told + "give it by --noise"))
    elif settings.optimum == "akima":
        told = (
            "akima: its curve goes through every point, so its lowest loss is too low; the denser the grid, the less "
            "often the interval of the loss holds the true loss (half as often as stated, at fifteen sizes within the "
            "noise)"
        )
        notes.append((BIAS, told))
    elif settings.optimum == "best-run":
        told = "best-run: the lowest of several runs is low by its noise too, so losses are too low; "
        notes.append((BIAS, told + "best sizes are as coarse as the grid"))
    lined = any(method.power_laws.loss for method in methods.values())  # else it is said above
    for why in dict.fromkeys(gap.why for gap in line.gaps if lined):
        budgets = [number(gap.budget_flop) for gap in line.gaps if gap.why == why]
        told = ", ".join(budgets[:6]) + (f" and {len(budgets) - 6} more" if len(budgets) > 6 else "")
        notes.append((MISSING, f"no frontier at {told} FLOP: {why}"))
    if own := [name for name, method in methods.items() if method.noise]:
        told = f"{listed(own)} differ in the noise of their runs (F test), so each has intervals by its own"
        notes.append((LIMIT, told))
    met = {each.budget_flop for each in line.crossings}
    for below, above in pairwise(line.segments):
        if below.method != above.method and below.to_flop == above.from_flop and below.to_flop not in met:
            at, told = number(below.to_flop), "has an optimum on one side of it only"
            gone = f"the frontier goes from {below.method} to {above.method} at {at} FLOP because one of them {told}"
            notes.append((BIAS, f"{gone}, not because their laws meet"))
    notes += [(BIAS, told) for told in _selection(noise, methods)]
    notes += [(DOUBT, told) for told in _alike(line)]
    return [told for _, told in sorted(notes, key=lambda note: note[0])]


def _law(settings: FitSettings, name: str, method: MethodFit, law: str) -> list[str]:
    """Return what makes a joint law doubtful."""
    fitted, where = method.joint_laws[law], f"{name}, {law} law"
    starts, agreeing, missed = (getattr(fitted.convergence, key) for key in ("starts", "agreeing", "missed_refits"))
    notes = []
    if fitted.not_fixed:
        notes.append(f"{where}: the data do not fix {', '.join(fitted.not_fixed)}")
    if agreeing < FEW_STARTS * starts:
        notes.append(f"{where}: only {agreeing} of {starts} starts agree on the minimum")
    if missed > MISSED * settings.bootstrap:
        notes.append(f"{where}: {missed} of {settings.bootstrap} refits did not converge and are left out")
    return notes


def _alike(line: Frontier) -> list[str]:
    """Return one sentence on the methods that noise does not separate; none where it separates all."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for budget in dict.fromkeys(each.budget_flop for each in line.comparisons):
        alike = [(e.a, e.b) for e in line.comparisons if e.budget_flop == budget and e.distinguishable is False]
        for group in _cliques(alike):
            groups.setdefault(group, []).append(number(budget))
    told = "; ".join(f"{listed(group)} at {', '.join(budgets)} FLOP" for group, budgets in groups.items())
    if sum(map(len, groups.values())) > MANY_ALIKE:
        count = sum(each.distinguishable is False for each in line.comparisons)
        told = f"{count} of {len(line.comparisons)} pairs of methods at one budget"
    return [f"not distinguishable within the noise: {told}"] if groups else []


def _cliques(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Return groups of names in which each two are one of the pairs, so that each pair is in one of the groups."""
    names, alike = dict.fromkeys(chain(*pairs)), set(map(frozenset, pairs))
    groups: list[tuple[str, ...]] = []
    for pair in pairs:
        if any(set(pair) <= set(group) for group in groups):
            continue
        group = [*pair]
        for name in names:
            if all(frozenset((name, each)) in alike for each in group):
                group.append(name)
        groups.append(tuple(group))
    return groups


def _notes_of_optima(name: str, method: MethodFit) -> list[tuple[int, str]]:
    notes: list[tuple[int, str]] = []
    few = [row for row in method.optima if row.state == "too few"]
    if len(few) > 3:
        notes.append((MISSING, f"{name}: {len(few)} budgets have fewer than three sizes, too few for an optimum"))
    for row in method.optima:
        if row.state == "too few" and len(few) > 3:
            continue
        where = f"{name}, {number(row.budget_flop)} FLOP"
        if not row.interior:
            notes.append((MISSING, f"{where}: no optimum ({row.state}): {row.why}"))
        elif row.valid_share is not None and row.valid_share < FEW_DRAWS:
            told = f"only {100 * row.valid_share:.0f} % of draws within the noise have an optimum"
            notes.append((DOUBT, f"{where}: {told}"))
        for end in row.best.at_grid_end if row.best else ():
            assert row.best is not None
            told = f"the best {end}, {number(row.best.setting(end), 4)}, is at the end of its grid"
            notes.append((BIAS, f"{where}: {told}"))
    return notes


def _selection(noise: Noise, methods: Mapping[str, MethodFit]) -> list[str]:
    """Return a note where methods are the best of unequal numbers of settings.

    The best of many settings is low by its noise too, and more so the more settings were tried. Drawing the noise of
    every setting again would not remove this but add as much again.
    """
    tried = {name: max(point.tried for point in method.points) for name, method in methods.items()}
    most, sigma = max(tried.values()), noise.log_loss
    if min(tried.values()) == most or not sigma:
        return []
    luck = -sigma * NormalDist().inv_cdf((1 - 0.375) / (most + 0.25))  # the least of `most` normal draws (Blom)
    return [
        f"methods are the best of {', '.join(f'{count} ({name})' for name, count in tried.items())} settings a size: "
        f"of {most} equal ones the best run lies {100 * luck:.2g} % low by its noise alone; no interval and no "
        '"distinguishable" allows for this'
    ]


def _far_off(name: str, method: MethodFit) -> list[str]:
    """Return a note on runs that lie far off the joint law and are not named with the state of their budget."""
    uneven = {row.budget_flop for row in method.optima if row.state == "uneven"}
    far = [
        (point.off, point)
        for point in method.points
        if point.off is not None and not any(same_budget(point.budget_flop, budget) for budget in uneven)
    ]
    if not far:
        return []
    off, point = max(far, key=lambda each: abs(each[0]))
    return [
        f"{name}: {counted(len(far), 'point')} of {len(method.points)} far off the joint law, most of all (by "
        f"{number(100 * math.expm1(off))} %) {number(point.n_parameters, 4)} parameters at "
        f"{number(point.budget_flop)} FLOP: the run is bad, or the law is wrong there"
    ]


def _worse_with_more(name: str, method: MethodFit, noise: Noise) -> list[str]:
    """Return a note where the best run of a budget is worse than one with less, and no missing size explains it."""
    rows = [row for row in method.optima if row.best and row.state not in ("edge", "too few", "diverged")]
    worse = []
    for place, row in enumerate(rows[1:], 1):
        before = min(rows[:place], key=lambda each: each.best.loss if each.best else math.inf)
        assert row.best and before.best
        apart = SIGMAS * (noise.log_loss or 0.0) * math.sqrt(1 / row.best.seeds + 1 / before.best.seeds)
        if math.log(row.best.loss / before.best.loss) > apart:
            worse.append((before, row))
    if not worse:
        return []
    before, row = worse[-1]
    assert row.best and before.best
    return [
        f"{name}: the best run at {number(row.budget_flop)} FLOP, {number(row.best.loss, 4)}, is worse than that at "
        f"{number(before.budget_flop)} FLOP, {number(before.best.loss, 4)}; {len(worse)} of {len(rows)} budgets are "
        "worse than one with less: look at these runs before using any law of theirs"
    ]


def _disagreement(name: str, method: MethodFit) -> list[str]:
    """Return a note where the exponent of the joint law's optima lies outside the interval of the power law."""
    line, interior = method.power_laws.n_opt, method.interior
    if line is None or line.exponent_interval is None or not all(row.law for row in interior):
        return []
    pairs = np.array([(row.budget_flop, row.law.n_opt) for row in interior if row.law])
    by_law = power_law(*pairs.T)[1]
    if line.exponent_interval[0] <= by_law <= line.exponent_interval[1]:
        return []
    return [
        f"{name}: N* grows as C^{line.exponent:.3f} by the optima, as C^{by_law:.3f} by the joint law, "
        "outside the interval: the joint law does not follow these runs near their best sizes"
    ]
