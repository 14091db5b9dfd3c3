"""What a reader should know before using the fits, a line each: missing optima, doubtful laws, luck and noise."""

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from analysis.fits import FitSettings, Frontier, MethodFit, Noise
from analysis.fitting.laws import LAWS, power_law

FEW_DRAWS = 0.9  # share of draws with an optimum below which a note says so
FEW_STARTS = 0.25  # share of starts that agree below which a note says so


def notes_of(settings: FitSettings, noise: Noise, methods: Mapping[str, MethodFit], line: Frontier) -> list[str]:
    """Return what a reader should know before using the fits, a line each."""
    notes = []
    for name, method in methods.items():
        notes += _notes_of_optima(name, method)
        for law in LAWS:
            if law in method.refused:
                notes.append(f"{name}: {method.refused[law]}")
            if law not in method.joint_laws:
                continue
            fitted = method.joint_laws[law]
            if fitted.not_fixed:
                notes.append(f"{name}, {law} law: the data do not fix {', '.join(fitted.not_fixed)}")
            starts, agreeing = fitted.convergence.starts, fitted.convergence.agreeing
            if agreeing < FEW_STARTS * starts:
                notes.append(f"{name}, {law} law: only {agreeing} of {starts} starts agree on the minimum")
            if missed := fitted.convergence.missed_refits:
                draws = settings.bootstrap
                notes.append(f"{name}, {law} law: {missed} of {draws} refits did not converge and are left out")
        if method.power_laws.loss is None:
            notes.append(f"{name}: fewer than two interior optima, so no power law and no place on the frontier")
        notes += _parabola_bias(name, method)
    if noise.source == "none":
        notes.append(
            "noise: it follows neither from replicates nor from residuals, so optima have no intervals; "
            "give it by --noise"
        )
    elif settings.optimum == "akima":
        notes.append(
            "akima: its curve goes through every point, so its lowest loss is too low; the denser the grid, the less "
            "often the interval of the loss holds the true loss (half as often as stated, at fifteen sizes within the "
            "noise)"
        )
    elif settings.optimum == "best-run":
        notes.append(
            "best-run: the lowest of several runs is low by its noise too, so losses are too low, and best sizes are "
            "as coarse as the grid"
        )
    notes += _selection(noise, methods)
    for why in dict.fromkeys(gap.why for gap in line.gaps):
        budgets = [f"{gap.budget_flop:.3g}" for gap in line.gaps if gap.why == why]
        told = ", ".join(budgets[:6]) + (f" and {len(budgets) - 6} more" if len(budgets) > 6 else "")
        notes.append(f"no frontier at {told} FLOP: {why}")
    notes += [
        f"{each.budget_flop:.3g} FLOP: {each.a} and {each.b} are not distinguishable"
        for each in line.comparisons
        if each.distinguishable is False
    ]
    return notes


def _notes_of_optima(name: str, method: MethodFit) -> list[str]:
    notes = []
    few = [row for row in method.optima if row.state == "too few"]
    if len(few) > 3:
        notes.append(f"{name}: {len(few)} budgets have fewer than three sizes, too few for an optimum")
    for row in method.optima:
        if row.state == "too few" and len(few) > 3:
            continue
        where = f"{name}, {row.budget_flop:.3g} FLOP"
        if not row.interior:
            notes.append(f"{where}: no optimum ({row.state}): {row.why}")
        elif row.valid_share is not None and row.valid_share < FEW_DRAWS:
            notes.append(f"{where}: only {100 * row.valid_share:.0f} % of draws within the noise have an optimum")
        for end in row.best.at_grid_end if row.best else ():
            assert row.best is not None
            notes.append(f"{where}: the best {end}, {row.best.setting(end):.4g}, is at the end of its grid")
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


def _parabola_bias(name: str, method: MethodFit) -> list[str]:
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
        "outside the interval: a wide or off-centre grid biases parabolas"
    ]
