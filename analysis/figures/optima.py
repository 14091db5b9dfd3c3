"""Figures of what was run: frontier (1), IsoFLOP profiles (2, 4), fractions and ranks (3, 5), model sizes (6, 13).

The numbers are those of the paper's figures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.figures import style
from analysis.figures.style import Drawn, NotDrawn
from analysis.fits import Interval, Optimum, PowerLaw
from analysis.fitting.laws import Array, size_law
from analysis.study import Study
from embedscale.run.method import METHODS, Choice
from embedscale.texts import listed, measured, number, short_name

EXACT = 3  # points that a parabola goes through exactly, and optima below which a power law leaves no residual
LONG = 32  # characters above which two names stand on two lines of a legend
NO_OPTIMUM = "best run, no optimum"
MOST_CURVES = 10  # budgets of a panel of profiles; of more, an even selection is drawn
MANY = 12  # budgets above which those with fewer than three sizes are not drawn


def _present(study: Study, methods: Sequence[str]) -> list[str]:
    found = [method for method in methods if method in study.methods]
    if not found:
        raise NotDrawn(f"there is no run of {' or '.join(map(style.label, methods))}")
    return found


def _hollow(optima: Sequence[Optimum]) -> str:
    """Return what a caption says of hollow marks; empty where there are none."""
    states = sorted({row.state for row in optima if not row.interior})
    return f" Hollow marks are no optima ({', '.join(states)}) and enter no line." if states else ""


def _hollow_handle(optima: Sequence[Optimum]) -> list[Line2D]:
    """Return the legend entry of hollow marks; none where there are none."""
    look = style.hollow({"color": style.GREY, "marker": "o"})
    return [Line2D([], [], label=NO_OPTIMUM, **look)] if any(not row.interior for row in optima) else []


def _handle(study: Study, method: str, line: bool, optima: Sequence[Optimum]) -> list[Line2D]:
    """Return the legend entry of a method as it is drawn: with a line, with marks, or with hollow marks alone."""
    look = style.method_style(method, study.methods)
    if not any(row.interior for row in optima):
        look = style.hollow(look)
    elif not line:
        look |= {"linestyle": "none"}
    return [Line2D([], [], label=style.label(method), **look)] if optima else []


def _error(value: float, ends: Interval | None) -> list[list[float]] | None:
    """Return the ends of an interval as the distances that error bars take."""
    return None if ends is None else [[max(value - ends[0], 0)], [max(ends[1] - value, 0)]]


def line_band(law: PowerLaw, budgets: Array, confidence: float) -> tuple[Array, Array | None]:
    """Return a power law over budgets, and its interval [2, budgets] from the draws."""
    value = law.at(budgets)
    if not law.draws:
        return value, None
    drawn = np.asarray(law.draws, float)
    drawn = drawn[np.isfinite(drawn).all(1)]
    tail = 50 * (1 - confidence)
    return value, np.exp(np.percentile(drawn[:, :1] + drawn[:, 1:] * np.log(budgets), [tail, 100 - tail], axis=0))


def line_budgets(law: PowerLaw, study: Study, inside: Sequence[float]) -> Array:
    """Return the budgets over which a power law is drawn: all or, through fewer than three optima, their own."""
    ends = (0.8 * min(study.budgets), 1.25 * max(study.budgets)) if law.points >= EXACT else (min(inside), max(inside))
    return np.geomspace(*ends, 60)


def bowl(study: Study, points: pd.DataFrame, optimum: Optimum) -> tuple[Array, Array]:
    """Return sizes and losses of the parabola of a budget with an interior optimum, over the points of its fit."""
    assert optimum.curve and optimum.parabola
    size = points["n_parameters"].to_numpy(float)[study.window(points)]
    grid = np.geomspace(size.min(), size.max(), 80)
    return grid, optimum.parabola.loss * np.exp(optimum.curve.curvature * (np.log(grid) - optimum.curve.log_n) ** 2)


def _draw_line(axes: Axes, law: PowerLaw, study: Study, inside: Sequence[float], look: dict[str, Any]) -> None:
    """Draw the law over its optima and, where it has at least three, thinner over all budgets, with its interval."""
    budgets = line_budgets(law, study, inside)
    value, band = line_band(law, budgets, study.fits.settings.confidence)
    own = (budgets >= min(inside) * 0.999) & (budgets <= max(inside) * 1.001)
    axes.plot(budgets, value, color=look["color"], linestyle=look["linestyle"], linewidth=0.6)
    axes.plot(budgets[own], value[own], color=look["color"], linestyle=look["linestyle"])
    if band is not None:
        axes.fill_between(budgets, *band, color=look["color"], alpha=0.13, linewidth=0)


def _through_two(laws: Sequence[tuple[str, PowerLaw | None]]) -> str:
    """Return what a caption says of power laws through two optima; empty where there are none."""
    found = [style.label(method) for method, law in laws if law and law.points < EXACT]
    return f" Two optima fix the line of {listed(found)} exactly: it says nothing beyond them." if found else ""


def frontier(study: Study) -> Drawn:
    """Draw figure 1: the lowest loss of each method against the budget."""
    figure, (axes,) = style.panels(1, height=2.9)
    rows: list[dict[str, Any]] = []
    handles: list[Line2D] = []
    marked: list[Optimum] = []
    laws = [(method, study.fits.methods[method].power_laws.loss) for method in study.methods]
    for method, law in laws:
        fit = study.fits.methods[method]
        look, own = style.method_style(method, study.methods), []
        for row in fit.optima:
            loss, ends = row.lowest_loss, row.loss_interval
            rows.append(
                {"method": method, "budget_flop": row.budget_flop, "state": row.state, "why": row.why, "loss": loss}
                | {"low": ends and ends[0], "high": ends and ends[1]}
            )
            if loss is None or (row.state == "too few" and len(study.budgets) > MANY):
                continue
            own.append(row)
            marks = look | {"linestyle": "none"} if row.interior else style.hollow(look)
            axes.errorbar(row.budget_flop, loss, _error(loss, ends), linewidth=0.8, **marks)
        if law:
            _draw_line(axes, law, study, [row.budget_flop for row in fit.interior], look)
        handles += _handle(study, method, bool(law), own)
        marked += own
    if not marked:
        raise NotDrawn("no method has a loss at any budget")
    handles += _hollow_handle(marked)
    line = study.fits.frontier
    for segment in line.segments:
        best = study.fits.methods[segment.method].power_laws.loss
        budgets = np.array([segment.from_flop, segment.to_flop])
        if best:
            axes.plot(budgets, best.at(budgets), color="black", alpha=0.25, linewidth=5, zorder=0.5)
    if line.segments:
        handles.append(Line2D([], [], color="black", alpha=0.25, linewidth=5, label="optimal frontier"))
    for crossing in line.crossings:
        axes.axvline(crossing.budget_flop, color=style.GREY, linewidth=0.7, linestyle=":")
        if crossing.interval:
            axes.axvspan(*crossing.interval, color="black", alpha=0.06, linewidth=0)
        below, above = style.label(crossing.below), style.label(crossing.above)
        apart = "\n" if len(below + above) > LONG else " "
        told = f"{below} →{apart}{above}: {number(crossing.budget_flop, 2)} FLOP"
        handles.append(Line2D([], [], color=style.GREY, linewidth=0.7, linestyle=":", label=told))
    low, high = min(study.budgets), max(study.budgets)
    axes.set_xlim(low * 0.6, high * 1.7)
    style.log_axis(axes.xaxis)
    style.log_axis(axes.yaxis)
    axes.set(xlabel=style.BUDGET, ylabel="lowest " + style.LOSS)
    style.legend_below(figure, handles, columns=2)
    parts = [
        "Lowest held-out loss of each method",
        f", with a power law through its interior optima ({study.fits.settings.percent} bands)" if any(
            law for _, law in laws) else "",
        " and the lower envelope of the laws" if line.segments else "",
        ". Vertical: where the best method changes, with its interval" if line.crossings else "",
    ]  # fmt: skip
    return Drawn(figure, pd.DataFrame(rows), f"{''.join(parts)}.{_through_two(laws)}{_hollow(marked)}")


# --- IsoFLOP profiles ------------------------------------------------------------------------------------------------


def choice_of(method: str) -> Choice | None:
    """Return the hyper-parameter that a sweep of the method compares: rank or share of active blocks, or none."""
    return METHODS[method].choice if method in METHODS else None


def _choice(method: str, row: Mapping[Any, Any]) -> str:
    """Return the text beside a point: the best rank, or the best share of active blocks."""
    choice = choice_of(method)
    value = row.get(choice.column) if choice else None
    return choice.write(value) if choice and value and np.isfinite(value) else ""


@dataclass(frozen=True)
class _Profile:
    """What is drawn of one budget: rows of the figure's table, labels beside points, points of the parabola."""

    rows: list[dict[str, Any]]
    labels: list[tuple[float, float, str]]
    parabola: int


def _profile(axes: Axes, study: Study, method: str, optimum: Optimum) -> _Profile | None:
    """Draw the points of one budget, their parabola and its optimum. Return None if the budget has no points."""
    budget = optimum.budget_flop
    points = study.profile(method, budget)
    if points.empty:
        return None
    look = style.budget_style(budget, study)
    size, loss = points["n_parameters"].to_numpy(float), points["loss"].to_numpy(float)
    axes.plot(size, loss, linestyle="none", **look)
    best = int(loss.argmin())
    rows, labels = [], []
    for place, row in enumerate(points.to_dict("records")):
        choice = _choice(method, row)
        rows.append(
            {
                "method": method,
                "budget_flop": budget,
                "n_parameters": row["n_parameters"],
                "loss": row["loss"],
                "choice": choice,
            }
            | {"seeds": row["seeds"], "state": optimum.state if place == best else "", "run": row.get("run")}
        )
        if choice:
            labels.append((row["n_parameters"], row["loss"], choice))
    if not (optimum.interior and optimum.curve and optimum.parabola and optimum.n_opt and optimum.loss):
        axes.plot(size, loss, color=look["color"], linewidth=0.8, linestyle=":")
        axes.plot(size[best], loss[best], markersize=8, zorder=4, **style.hollow(look))
        return _Profile(rows, labels, 0)
    near = study.window(points)
    axes.plot(*bowl(study, points, optimum), color=look["color"], linestyle="--" if near.sum() == EXACT else "-")
    if not near.all():  # the parabola does not show which of the other points belong together
        axes.plot(size, loss, color=look["color"], linewidth=0.4)
    axes.errorbar(
        optimum.n_opt, optimum.loss, _error(optimum.loss, optimum.loss_interval),
        _error(optimum.n_opt, optimum.n_opt_interval), marker="*", markersize=8, color="black",
        markerfacecolor=look["color"], markeredgewidth=0.6, linewidth=0.8, zorder=4,
    )  # fmt: skip
    rows.append(
        {"method": method, "budget_flop": budget, "n_parameters": optimum.n_opt, "loss": optimum.loss}
        | {"choice": "", "seeds": None, "state": "optimum", "run": None, "points": int(near.sum())}
    )
    return _Profile(rows, labels, int(near.sum()))


def _worth_drawing(optima: Sequence[Optimum]) -> list[Optimum]:
    """Return the optima, of very many only those with at least three sizes."""
    return [row for row in optima if len(optima) <= MANY or row.state != "too few"]


def isoflop(study: Study, methods: Sequence[str]) -> Drawn:
    """Draw figures 2 and 4: loss against size, a curve a budget, with the best fraction or rank beside each point."""
    found = _present(study, methods)
    figure, every = style.panels(len(found), height=3.0)
    rows: list[dict[str, Any]] = []
    labels: list[list[tuple[float, float, str]]] = [[] for _ in found]
    drawn: list[Optimum] = []
    possible, parabolas = 0, set[int]()
    for place, (axes, method) in enumerate(zip(every, found, strict=True)):
        optima = _worth_drawing(study.fits.methods[method].optima)
        possible += len(optima)
        for optimum in style.even(optima, MOST_CURVES):  # curves of more cannot be told apart
            profile = _profile(axes, study, method, optimum)
            if profile:
                rows += profile.rows
                labels[place] += profile.labels
                drawn.append(optimum)
                parabolas.add(profile.parabola)
        axes.margins(0.06)
        style.log_axis(axes.xaxis, "sizes")
        style.log_axis(axes.yaxis)
        letter = f"({'ab'[place]}) " if len(found) > 1 else ""
        axes.set(xlabel=style.PARAMETERS, title=letter + style.label(method))
    every[0].set_ylabel(style.LOSS)
    if not drawn:
        raise NotDrawn("no budget has three sizes")
    budgets = [budget for budget in study.budgets if any(np.isclose(budget, each.budget_flop, 0.1) for each in drawn)]
    handles = style.budget_handles(study, budgets)
    if EXACT in parabolas:
        told = "three points: exact, no residual"
        handles.append(Line2D([], [], color=style.GREY, linestyle="--", label=told))
    style.legend_below(figure, handles + _hollow_handle(drawn), "budget (FLOP)", 3 if len(found) == 1 else 8)
    for axes, each in zip(every, labels, strict=True):
        style.place_labels(axes, each)
    lost = pd.concat([study.left_out(method) for method in found])
    chosen = [f"the best {choice.title}" for choice in map(choice_of, found) if choice]
    caption = [
        "IsoFLOP profiles: the best hyper-parameters of each size",
        f" at an even selection of {len(budgets)} budgets" if len(drawn) < possible else "",
        f", a parabola near the best size, and its minimum (star, {study.fits.settings.percent} intervals)" if max(
            parabolas) else "",
        f". Beside a point, where there is room: {' or '.join(chosen)}" if chosen else "",
        ". A large hollow mark is a budget without an optimum between its sizes" if 0 in parabolas else "",
        ". Dashed: a parabola through exactly three points is exact and has no residual that could speak against it"
        if EXACT in parabolas else "",
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    return Drawn(figure, pd.concat([table, lost], ignore_index=True) if len(lost) else table, "".join(caption) + ".")


# --- Fractions and ranks ---------------------------------------------------------------------------------------------


def by_choice(study: Study, methods: Sequence[str]) -> Drawn:
    """Draw figures 3 and 5: loss against the share of active blocks or the rank, a panel a size, a colour a budget."""
    (method,) = _present(study, methods)
    drawn = choice_panels(study, study.cells[method], method, "loss")
    return replace(drawn, rows=pd.concat([drawn.rows.assign(state=""), study.left_out(method)], ignore_index=True))


def choice_panels(study: Study, rows: pd.DataFrame, method: str, measure: str) -> Drawn:
    """Draw the panels of figures 3 and 5, with the lowest loss, and of figures 9 and 11, with the highest score."""
    choice = METHODS[method].choice
    assert choice
    column, low = choice.column, measure == "loss"
    alone = f"no size of {style.label(method)} has a {measure} at two values of the {choice.title}"
    if column not in rows:
        raise NotDrawn(alone)
    cells = rows.dropna(subset=[column]).groupby(["budget_flop", "n_parameters", column])[measure]
    best = (cells.min() if low else cells.max()).reset_index()
    compared = best.groupby(["budget_flop", "n_parameters"])[column].transform("size") > 1
    if not compared.any():
        raise NotDrawn(alone)
    sizes = [size for size in study.sizes if (best["n_parameters"] == size).any()]
    budgets = [budget for budget in study.budgets if np.isclose(best["budget_flop"], budget, rtol=0.1).any()]
    figure, every = style.panels(len(sizes), 4 if len(sizes) > 4 else len(sizes), 1.75, sharex=True, sharey=True)
    for axes, size in zip(every, sizes, strict=True):
        for budget in budgets:
            part = best[(best["n_parameters"] == size) & np.isclose(best["budget_flop"], budget, rtol=0.1)]
            if part.empty:
                continue
            look = style.budget_style(budget, study)
            axes.plot(part[column], part[measure], linewidth=0.9, **look | {"markersize": 3})
            chosen = part.iloc[int(part[measure].argmin() if low else part[measure].argmax())]
            at_end = len(part) > 1 and chosen[column] in (part[column].min(), part[column].max())
            ring = {"markerfacecolor": "white" if at_end else look["color"], "markeredgecolor": "black"}
            axes.plot(chosen[column], chosen[measure], markersize=5.5, markeredgewidth=0.7, **look | ring)
        axes.set_title(short_name(study.names[size]), pad=2)
    values = np.unique(best[column])
    every[0].margins(0.06)
    for axes in every:
        if column == "rank":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(list(values)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
            axes.tick_params(axis="x", labelsize=style.SMALLEST, labelrotation=45)
        else:
            axes.set_xlim(0, 1.05)
    if low:
        style.log_axis(every[0].yaxis)
    style.outer_labels(every, choice.title, style.LOSS if low else "mean score")
    style.legend_below(figure, style.budget_handles(study, budgets), "budget (FLOP)")
    return Drawn(
        figure,
        best,
        f"{'Held-out loss' if low else 'Score'} against the {choice.title}, for each size. The ringed mark is "
        "the best; it is hollow where it is the first or the last value tried.",
    )


# --- Model sizes -----------------------------------------------------------------------------------------------------


def sizes(study: Study, methods: Sequence[str]) -> Drawn:
    """Draw figures 6 and 13: the optimal size against the budget, of the methods that have two budgets or more."""
    shown = {
        method: _worth_drawing([row for row in study.fits.methods[method].optima if row.best])
        for method in _present(study, methods)
    }
    found = [method for method, rows in shown.items() if len(rows) > 1]
    if not found:
        many = any(len(study.fits.methods[method].optima) > 1 for method in shown)
        told = "have three sizes at fewer than two budgets" if many else "ran at one budget"
        raise NotDrawn(f"{listed(list(map(style.label, shown)))} {told}, which shows no growth")
    figure, every = style.panels(len(found), height=2.9, sharex=True, sharey=True)
    rows: list[dict[str, Any]] = []
    handles: list[Line2D] = []
    by_joint_law, laws = False, [(method, study.fits.methods[method].power_laws.n_opt) for method in found]
    for axes, (method, law), letter in zip(every, laws, "ab", strict=False):
        look = style.method_style(method, study.methods)
        for row in shown[method]:
            size = row.n_opt if row.interior and row.n_opt else row.best and row.best.n_parameters
            assert size
            ends = row.n_opt_interval
            marks = look | {"linestyle": "none"} if row.interior else style.hollow(look)
            axes.errorbar(row.budget_flop, size, _error(size, ends), linewidth=0.9, **marks)
            rows.append(
                {"method": method, "budget_flop": row.budget_flop, "n_parameters": size, "state": row.state}
                | {"why": row.why, "low": ends and ends[0], "high": ends and ends[1]}
                | {"law": row.law and row.law.n_opt, "akima": row.akima and row.akima.n_opt}
            )
        handles += _handle(study, method, bool(law), shown[method])
        by_law = [(row.budget_flop, row.law.n_opt) for row in shown[method] if row.law]
        joint = size_law(study.fits.methods[method].joint_laws)
        if len(by_law) > 1 and joint and not study.fits.methods[method].joint_laws[joint.law.name].not_fixed:
            axes.plot(*zip(*by_law, strict=True), color=style.GREY, linestyle=":")
            by_joint_law = True
        title = [f"({letter}) {style.label(method)}" if len(found) > 1 else style.label(method)]
        if law:
            _draw_line(axes, law, study, [row.budget_flop for row in shown[method] if row.interior], look)
            exponent, ends_told = measured(law.exponent, law.exponent_interval, 3)
            title.append(f"N* ∝ C^{exponent}" + (f" ({ends_told})" if law.exponent_interval else ""))
        axes.set(xlabel=style.BUDGET, title="\n".join(title))
    low, high = min(study.sizes), max(study.sizes)
    every[0].set_ylim(low / 1.8, high * 2.5)
    every[0].set_xlim(0.7 * min(study.budgets), 1.4 * max(study.budgets))
    style.log_axis(every[0].xaxis)
    style.log_axis(every[0].yaxis, "sizes")
    every[0].set_ylabel("optimal size N* (parameters)")
    named = _apart(study.sizes, math.log(4.5 * high / low) / 18)
    for axes in every:
        axes.grid(False, axis="y")
        for size in study.sizes if len(study.sizes) <= 40 else []:
            axes.axhline(size, color="0.85", linewidth=0.4, zorder=0.4)
    for size in named if "backbone" in study.table else []:
        every[-1].annotate(
            short_name(study.names[size]), (1, size), (2, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=style.SMALLEST, color=style.GREY, va="center",
        )  # fmt: skip
    marked = [row for method in found for row in shown[method]]
    handles += _hollow_handle(marked)
    if by_joint_law:
        handles.append(Line2D([], [], color=style.GREY, linestyle=":", label="optimum by the joint law"))
    style.legend_below(figure, handles, columns=2 if len(found) == 1 else 4)
    lines = " and a power law through interior optima" if any(law for _, law in laws) else ""
    return Drawn(
        figure,
        pd.DataFrame(rows),
        f"Compute-optimal size against the budget, with {study.fits.settings.percent} intervals{lines}; grey lines are "
        f"the sizes that were run.{_through_two(laws)}{_hollow(marked)}",
    )


def _apart(values: Sequence[float], least: float) -> list[float]:
    """Return those of the values that are at least so far apart in their logarithm, the largest first."""
    found: list[float] = []
    for value in sorted(values, reverse=True):
        if not found or math.log(found[-1] / value) >= least:
            found.append(value)
    return found
