"""Figures of what was run: frontier (1), IsoFLOP profiles (2, 4), fractions and ranks (3, 5), model sizes (6, 13).

The numbers are those of the paper's figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.figures import style
from analysis.figures.style import Drawn, NotDrawn
from analysis.fits import Interval, Optimum, PowerLaw
from analysis.fitting.laws import Array
from analysis.study import Study
from embedscale.run.method import METHODS, Choice

HOLLOW = "Hollow marks are budgets without an interior optimum; they enter no line."
MANY = 12  # budgets above which those with fewer than three sizes are not drawn


def _present(study: Study, methods: Sequence[str]) -> list[str]:
    found = [method for method in methods if method in study.methods]
    if not found:
        raise NotDrawn(f"no run of {' or '.join(map(style.label, methods))}")
    return found


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


def _draw_line(axes: Axes, law: PowerLaw, study: Study, inside: Sequence[float], look: dict[str, Any]) -> None:
    """Draw the law over the optima that it is fitted to, and thinner over the other budgets, with its interval."""
    budgets = np.geomspace(0.8 * min(study.budgets), 1.25 * max(study.budgets), 60)
    value, band = line_band(law, budgets, study.fits.settings.confidence)
    own = (budgets >= min(inside) * 0.999) & (budgets <= max(inside) * 1.001)
    axes.plot(budgets, value, color=look["color"], linestyle=look["linestyle"], linewidth=0.6)
    axes.plot(budgets[own], value[own], color=look["color"], linestyle=look["linestyle"])
    if band is not None:
        axes.fill_between(budgets, *band, color=look["color"], alpha=0.13, linewidth=0)


def frontier(study: Study) -> Drawn:
    """Draw figure 1: the lowest loss of each method against the budget."""
    figure, (axes,) = style.panels(1, height=2.9)
    rows, handles = [], []
    for method in study.methods:
        fit = study.fits.methods[method]
        look = style.method_style(method, study.methods)
        for row in fit.optima:
            loss, ends = row.lowest_loss, row.loss_interval
            rows.append(
                {"method": method, "budget_flop": row.budget_flop, "state": row.state, "why": row.why, "loss": loss}
                | {"low": ends and ends[0], "high": ends and ends[1]}
            )
            if loss is None or (row.state == "too few" and len(study.budgets) > MANY):
                continue
            marks = look | {"linestyle": "none"} if row.interior else style.hollow(look)
            axes.errorbar(row.budget_flop, loss, _error(loss, ends), linewidth=0.8, **marks)
        if fit.power_laws.loss:
            _draw_line(axes, fit.power_laws.loss, study, [row.budget_flop for row in fit.interior], look)
        handles.append(Line2D([], [], label=style.label(method), **look))
    line = study.fits.frontier
    for segment in line.segments:
        law = study.fits.methods[segment.method].power_laws.loss
        budgets = np.array([segment.from_flop, segment.to_flop])
        if law:
            axes.plot(budgets, law.at(budgets), color="black", alpha=0.25, linewidth=5, zorder=0.5)
    if line.segments:
        handles.append(Line2D([], [], color="black", alpha=0.25, linewidth=5, label="optimal frontier"))
    for crossing in line.crossings:
        axes.axvline(crossing.budget_flop, color=style.GREY, linewidth=0.7, linestyle=":")
        if crossing.interval:
            axes.axvspan(*crossing.interval, color="black", alpha=0.06, linewidth=0)
        axes.annotate(
            style.power_of_ten(crossing.budget_flop) + " FLOP", (crossing.budget_flop, 1), (2, -2),
            xycoords=("data", "axes fraction"), textcoords="offset points", va="top", fontsize=6.5,
            color=style.GREY, rotation=90,
        )  # fmt: skip
    if not any(row["loss"] for row in rows):
        raise NotDrawn("no method has a loss at any budget")
    low, high = min(study.budgets), max(study.budgets)
    axes.set_xlim(low * 0.6, high * 1.7)
    style.log_axis(axes.xaxis)
    style.log_axis(axes.yaxis, "plain")
    axes.set(xlabel=style.BUDGET, ylabel="lowest " + style.LOSS)
    style.legend_below(figure, handles, columns=2)
    return Drawn(
        figure,
        pd.DataFrame(rows),
        "Lowest held-out loss of each method, with a power law through its interior optima (95 % bands) and the lower "
        f"envelope of the laws. Vertical: where the best method changes, with its interval. {HOLLOW}",
    )


# --- IsoFLOP profiles ------------------------------------------------------------------------------------------------


def choice_of(method: str) -> Choice | None:
    """Return the hyper-parameter that a sweep of the method compares: rank or share of active blocks, or none."""
    return METHODS[method].choice if method in METHODS else None


def _choice(method: str, row: Mapping[Any, Any]) -> str:
    """Return the text beside a point: the best rank, or the best share of active blocks."""
    choice = choice_of(method)
    value = row.get(choice.column) if choice else None
    return choice.write(value) if choice and value and np.isfinite(value) else ""


def _profile(axes: Axes, study: Study, method: str, optimum: Optimum, rows: list[dict[str, Any]]) -> bool:
    """Draw the points of one budget, their parabola and its optimum. Return False if the budget has no points."""
    budget = optimum.budget_flop
    points = study.points[method]
    points = points[np.isclose(points["budget_flop"], budget, rtol=0.1)].sort_values("n_parameters")
    if points.empty:
        return False
    look = style.budget_style(budget, study)
    size, loss = points["n_parameters"].to_numpy(float), points["loss"].to_numpy(float)
    axes.plot(size, loss, linestyle="none", **look)
    best = int(loss.argmin())
    for number, row in enumerate(points.to_dict("records")):
        choice = _choice(method, row)
        rows.append(
            {
                "method": method,
                "budget_flop": budget,
                "n_parameters": row["n_parameters"],
                "loss": row["loss"],
                "choice": choice,
            }
            | {"seeds": row["seeds"], "state": optimum.state if number == best else "", "run": row.get("run")}
        )
        if choice:
            axes.annotate(
                choice, (row["n_parameters"], row["loss"]), (0, 3), textcoords="offset points",
                ha="center", fontsize=5.5, color="0.2", path_effects=style.HALO,
            )  # fmt: skip
    curve = optimum.curve
    if optimum.interior and curve and optimum.parabola and optimum.n_opt and optimum.loss:
        window = np.log(study.fits.settings.window)
        near = np.abs(np.log(size) - np.log(size[best])) <= window + 1e-9
        near[max(best - 1, 0) : best + 2] = True
        grid = np.geomspace(size[near].min(), size[near].max(), 80)
        bowl = optimum.parabola.loss * np.exp(curve.curvature * (np.log(grid) - curve.log_n) ** 2)
        axes.plot(grid, bowl, color=look["color"])
        axes.plot(size, loss, color=look["color"], linewidth=0.4)
        axes.errorbar(
            optimum.n_opt, optimum.loss, _error(optimum.loss, optimum.loss_interval),
            _error(optimum.n_opt, optimum.n_opt_interval), marker="*", markersize=8, color="black",
            markerfacecolor=look["color"], markeredgewidth=0.6, linewidth=0.8, zorder=4,
        )  # fmt: skip
        rows.append(
            {"method": method, "budget_flop": budget, "n_parameters": optimum.n_opt, "loss": optimum.loss}
            | {"choice": "", "seeds": None, "state": "optimum", "run": None}
        )
    else:
        axes.plot(size, loss, color=look["color"], linewidth=0.8, linestyle=":")
        axes.plot(size[best], loss[best], markersize=8, zorder=4, **style.hollow(look))
    return True


def _worth_drawing(optima: Sequence[Optimum]) -> list[Optimum]:
    """Return the optima, of very many only those with at least three sizes."""
    return [row for row in optima if len(optima) <= MANY or row.state != "too few"]


def isoflop(study: Study, methods: Sequence[str], letters: str = "ab") -> Drawn:
    """Draw figures 2 and 4: loss against size, a curve a budget, with the best fraction or rank beside each point."""
    found = _present(study, methods)
    figure, every = style.panels(len(found), height=3.0)
    rows: list[dict[str, Any]] = []
    shown: set[float] = set()
    for axes, method in zip(every, found, strict=True):
        optima = _worth_drawing(study.fits.methods[method].optima)
        drawn = [row.budget_flop for row in optima if _profile(axes, study, method, row, rows)]
        shown |= set(drawn)
        axes.margins(0.06)
        style.log_axis(axes.xaxis, "sizes")
        style.log_axis(axes.yaxis, "plain")
        letter = letters[methods.index(method)] if len(methods) <= len(letters) else ""
        axes.set(xlabel=style.PARAMETERS, title=(f"({letter}) " if letter else "") + style.label(method))
    every[0].set_ylabel(style.LOSS)
    if not shown:
        raise NotDrawn("no budget has three sizes")
    budgets = [budget for budget in study.budgets if any(np.isclose(budget, each, rtol=0.1) for each in shown)]
    title = "budget (FLOP)" if len(budgets) <= 10 else f"budget (FLOP), {len(budgets)} of them"
    style.legend_below(figure, style.budget_handles(study, budgets), title, 3 if len(found) == 1 else 6)
    lost = pd.concat([study.left_out(method) for method in found])
    told = [f"the best {choice.title}" for choice in map(choice_of, found) if choice]
    return Drawn(
        figure,
        pd.concat([pd.DataFrame(rows), lost], ignore_index=True) if len(lost) else pd.DataFrame(rows),
        "IsoFLOP profiles: the best hyper-parameters of each size, a parabola near the best size, and its minimum "
        "(star, 95 % intervals). "
        + (f"Beside a point: {' or '.join(told)}. " if told else "")
        + "A large hollow mark is a budget without an interior optimum.",
    )


# --- Fractions and ranks ---------------------------------------------------------------------------------------------


def by_choice(study: Study, method: str) -> Drawn:
    """Draw figures 3 and 5: loss against the share of active blocks or the rank, a panel a size, a colour a budget."""
    _present(study, [method])
    drawn = choice_panels(study, study.cells[method], method, "loss")
    return replace(drawn, rows=pd.concat([drawn.rows.assign(state=""), study.left_out(method)], ignore_index=True))


def choice_panels(study: Study, rows: pd.DataFrame, method: str, measure: str) -> Drawn:
    """Draw the panels of figures 3 and 5, with the lowest loss, and of figures 9 and 11, with the highest score."""
    choice = METHODS[method].choice
    assert choice
    column, low = choice.column, measure == "loss"
    if column not in rows or rows[column].nunique() < 2:
        raise NotDrawn(f"{style.label(method)} has no {measure} at two values of {column}")
    cells = rows.dropna(subset=[column]).groupby(["budget_flop", "n_parameters", column])[measure]
    best = (cells.min() if low else cells.max()).reset_index()
    sizes = [size for size in study.sizes if (best["n_parameters"] == size).any()]
    figure, every = style.panels(len(sizes), 4 if len(sizes) > 4 else len(sizes), 1.75, sharex=True, sharey=True)
    for axes, size in zip(every, sizes, strict=True):
        for budget in study.budgets:
            part = best[(best["n_parameters"] == size) & np.isclose(best["budget_flop"], budget, rtol=0.1)]
            if part.empty:
                continue
            look = style.budget_style(budget, study)
            axes.plot(part[column], part[measure], linewidth=0.9, **look | {"markersize": 3})
            chosen = part.iloc[int(part[measure].argmin() if low else part[measure].argmax())]
            at_end = len(part) > 1 and chosen[column] in (part[column].min(), part[column].max())
            ring = {"markerfacecolor": "white" if at_end else look["color"], "markeredgecolor": "black"}
            axes.plot(chosen[column], chosen[measure], markersize=5.5, markeredgewidth=0.7, **look | ring)
        axes.set_title(study.names[size], pad=2)
    values = np.unique(best[column])
    every[0].margins(0.06)
    for axes in every:
        if column == "rank":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(style.FixedLocator(list(values)))
            axes.xaxis.set_minor_locator(style.NullLocator())
            axes.xaxis.set_major_formatter(style.FuncFormatter(lambda value, _: f"{value:.0f}"))
            axes.tick_params(axis="x", labelsize=6)
        else:
            axes.set_xlim(0, 1.05)
    if low:
        style.log_axis(every[0].yaxis, "plain")
    style.outer_labels(every, choice.title, style.LOSS if low else "mean score")
    style.legend_below(figure, style.budget_handles(study, study.budgets), "budget (FLOP)")
    return Drawn(
        figure,
        best,
        f"{'Held-out loss' if low else 'Score'} against the {choice.title}, for each size. The ringed mark is "
        "the best; it is hollow where it is the first or the last value tried.",
    )


# --- Model sizes -----------------------------------------------------------------------------------------------------


def sizes(study: Study, methods: Sequence[str]) -> Drawn:
    """Draw figures 6 and 13: the optimal size against the budget."""
    found = _present(study, methods)
    figure, every = style.panels(len(found), height=2.7, sharex=True, sharey=True)
    rows = []
    for axes, method in zip(every, found, strict=True):
        fit = study.fits.methods[method]
        look = style.method_style(method, study.methods)
        optima = _worth_drawing([row for row in fit.optima if row.best])
        for row in optima:
            size = row.n_opt if row.n_opt else row.best and row.best.n_parameters
            assert size
            ends = row.n_opt_interval
            marks = look | {"linestyle": "none"} if row.n_opt else style.hollow(look)
            axes.errorbar(row.budget_flop, size, _error(size, ends), linewidth=0.9, **marks)
            rows.append(
                {"method": method, "budget_flop": row.budget_flop, "n_parameters": size, "state": row.state}
                | {"why": row.why, "low": ends and ends[0], "high": ends and ends[1]}
                | {"law": row.law and row.law.n_opt, "akima": row.akima and row.akima.n_opt}
            )
        by_law = [(row.budget_flop, row.law.n_opt) for row in optima if row.law]
        if by_law:
            axes.plot(*zip(*by_law, strict=True), color=style.GREY, linestyle=":", label="joint law")
        law = fit.power_laws.n_opt
        if law:
            _draw_line(axes, law, study, [row.budget_flop for row in optima if row.n_opt], look)
            ends = law.exponent_interval
            told = f" ({ends[0]:.2f} … {ends[1]:.2f})" if ends else ""
            axes.text(
                0.03,
                0.97,
                f"$N^* \\propto C^{{{law.exponent:.3f}}}${told}",
                transform=axes.transAxes,
                va="top",
                fontsize=7,
            )
        letter = "ab"[methods.index(method)]
        axes.set(xlabel=style.BUDGET, title=f"({letter}) {style.label(method)}")
    low, high = min(study.sizes), max(study.sizes)
    every[0].set_ylim(low / 1.8, high * 2.5)
    every[0].set_xlim(0.7 * min(study.budgets), 1.4 * max(study.budgets))
    style.log_axis(every[0].xaxis)
    style.log_axis(every[0].yaxis, "sizes")
    every[0].set_ylabel("optimal " + style.PARAMETERS)
    if not rows:
        raise NotDrawn("no budget has a best size")
    for axes in every:
        for size in study.sizes if len(study.sizes) <= 12 else []:
            axes.axhline(size, color="0.8", linewidth=0.4, zorder=0.4)
            axes.annotate(
                study.names[size], (1, size), (1, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=5, color=style.GREY, va="center",
            )  # fmt: skip
    handles = [Line2D([], [], label=style.label(each), **style.method_style(each, study.methods)) for each in found]
    handles += [Line2D([], [], color=style.GREY, linestyle=":", label="optimum by the joint law")]
    style.legend_below(figure, handles, columns=2 if len(found) == 1 else 4)
    return Drawn(
        figure,
        pd.DataFrame(rows),
        "Compute-optimal size against the budget, with 95 % intervals and a power law through interior optima; thin "
        f"grey lines are the sizes that were run. {HOLLOW}",
    )
