"""Figures of the joint laws: hold-outs (7, 14, 19), fixed data (17), the trends behind them (18, 20 to 22), steps (23).

The paper names no panels for figures 7, 14 and 19, nor for the trends. Here the hold-outs are those of full
fine-tuning, freezing and LoRA, and each trend is one part of the law, with the other parts taken off the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.figures.optima import choice_of
from analysis.figures.style import Drawn, NotDrawn
from analysis.fitting import joint, uncertainty
from analysis.fitting.laws import LAWS, Array, Law, StatedLaw, fraction_law, size_law
from analysis.fitting.solver import NoFit, fit_joint
from analysis.study import Study, by_number
from embedscale.texts import counted, listed

DRAWS = 100  # refits behind the interval of a prediction
COLUMNS = ["method", "budget_flop", "n_parameters", "tokens", "trainable_fraction", "loss"]


def _columns(rows: pd.DataFrame, *names: str) -> list[Array]:
    return [rows[name].to_numpy(float) for name in names]


# --- Hold-outs -------------------------------------------------------------------------------------------------------


def _best_law(study: Study, method: str) -> StatedLaw:
    """Return the paper's law L(S, N, D) where the method has one, else L(N, D)."""
    if method not in study.methods:
        raise NotDrawn(f"there is no run of {style.label(method)}")
    fit = study.fits.methods[method]
    law = fraction_law(fit.joint_laws) or size_law(fit.joint_laws)
    if law is None:
        raise NotDrawn(next(iter(fit.refused.values())))
    return law


def _fit(law: Law, rows: pd.DataFrame, study: Study, amount: str = "tokens") -> StatedLaw:
    """Fit the law to some of the points, with draws of its coefficients."""
    n, d, loss, s, seeds = _columns(rows, "n_parameters", amount, "loss", "trainable_fraction", "seeds")
    settings, fraction = study.fits.settings, s if law.needs_fraction else None
    try:
        fitted = fit_joint(
            law, n, d, loss, fraction, weights=seeds, residual=settings.residual, delta=settings.delta, starts=8
        )
    except NoFit as error:
        raise NotDrawn(str(error)) from None
    draws = uncertainty.resampled(fitted, list(rows["losses"]), DRAWS, np.random.default_rng(settings.seed))
    return StatedLaw(law, fitted.values, draws[np.isfinite(draws).all(1)])


def _against(rows: pd.DataFrame, study: Study, predicted_kind: str) -> Figure:
    """Draw predicted against found loss, and the error below it; the points of `predicted_kind` are ringed."""
    figure = Figure(figsize=(style.ONE, 4.6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    for kind in ("fitted", predicted_kind):
        for size, each in by_number(rows[rows["kind"] == kind], "n_parameters"):
            look = style.size_style(size, study) | {"linestyle": "none"}
            found, predicted, low, high = _columns(each, "loss", "predicted", "low", "high")
            if kind == "fitted":
                look |= {"markersize": 2.5, "alpha": 0.7}
            else:
                look |= {"markersize": 5, "markeredgecolor": "black", "markeredgewidth": 0.5}
            upper.plot(found, predicted, **look)
            error = None if kind == "fitted" else 100 * np.maximum([predicted - low, high - predicted], 0) / found
            lower.errorbar(found, 100 * (predicted / found - 1), error, linewidth=0.5, **look)
    ends = np.array([rows[["loss", "predicted"]].min().min() / 1.05, rows[["loss", "predicted"]].max().max() * 1.05])
    upper.plot(ends, ends, color=style.GREY, linewidth=0.7, zorder=0.5)
    upper.set(xlim=ends, ylim=ends, ylabel="predicted loss (nats)")
    style.log_axis(upper.xaxis)
    style.log_axis(upper.yaxis)
    lower.axhline(0, color=style.GREY, linewidth=0.7, zorder=0.5)
    lower.set(xlabel="found: " + style.LOSS, ylabel="error (%)")
    told = []
    for kind in ("fitted", predicted_kind):
        part = rows[rows["kind"] == kind]
        mean = np.abs(part["predicted"] / part["loss"] - 1).mean()
        told.append(f"{kind}: {counted(len(part), 'point')}, mean error {100 * mean:.2f} %")
    upper.set_title("\n".join([style.label(rows["method"].iloc[0]), *told]), fontsize=style.SMALLEST + 0.5)
    sizes = [size for size in study.sizes if (rows["n_parameters"] == size).any()]
    style.legend_below(figure, style.size_handles(study, sizes, "none"), columns=3)
    return figure


def _predicted(rows: pd.DataFrame, law: StatedLaw, study: Study, amount: str) -> pd.DataFrame:
    """Return the points with the law's prediction and its interval."""
    n, d, s = _columns(rows, "n_parameters", amount, "trainable_fraction")
    tail = 50 * (1 - study.fits.settings.confidence)
    low, high = np.percentile(law.drawn(n, d, s), [tail, 100 - tail], axis=0)
    found = rows[["method", "budget_flop", "n_parameters", amount, "trainable_fraction", "loss"]]
    return found.assign(predicted=law.loss(n, d, s), low=low, high=high)


def hold_out(study: Study, methods: Sequence[str]) -> Drawn:
    """Draw figures 7, 14, 19: the law fitted without the largest size predicts the largest size."""
    (method,) = methods
    law = _best_law(study, method).law
    points = joint.points_for(law, study.cells[method], study.points[method])
    out, largest = uncertainty.held_out_rows(points, "n_parameters")
    fitted = _fit(law, points[~out], study)
    rows = _predicted(points, fitted, study, "tokens").assign(kind=np.where(out, "held out", "fitted"))
    return Drawn(
        _against(rows, study, "held out"),
        rows,
        f"The joint law {law.symbol} fitted to every size below {study.names[largest]} (small marks), against the "
        f"largest size (ringed, {study.fits.settings.percent} intervals of the law).",
    )


def steps(study: Study) -> Drawn:
    """Draw figure 23: a law of size and training steps predicts another batch size and context."""
    if study.other is None:
        raise NotDrawn("it needs a second sweep, of another batch size or context: embedscale report --compare FOLDER")
    shared = [method for method in study.methods if method in study.other.methods]
    if not shared:
        raise NotDrawn("the two sweeps share no method")
    method = shared[0]
    pair = study.points[method], study.other.points[method]
    for rows in pair:
        if "steps" not in rows or rows["steps"].isna().any():
            raise NotDrawn("the runs do not say how many steps they took")
    law = size_law(study.fits.methods[method].joint_laws)
    if law is None:
        raise NotDrawn(next(iter(study.fits.methods[method].refused.values())))
    fitted = _fit(law.law, pair[0], study, "steps")
    told = []
    for each in (study, study.other):
        same = each.fits.comparable
        told.append(f"batch {same.get('batch_size', 0):.0f}, context {same.get('context', 0):.0f}")
    rows = pd.concat(
        _predicted(each, fitted, study, "steps").assign(kind=kind)
        for each, kind in zip(pair, ("fitted", "predicted"), strict=True)
    )
    return Drawn(
        _against(rows, study, "predicted"),
        rows,
        f"The law of size and training steps fitted at {told[0]} (small marks) against the runs at {told[1]} (ringed, "
        f"{study.fits.settings.percent} intervals of the law).",
    )


def fixed_data(study: Study) -> Drawn:
    """Draw figure 17: loss against tokens, a line a size."""
    method = study.methods[0]
    points = study.points[method]
    figure, (axes,) = style.panels(1, height=3.2)
    law = size_law(study.fits.methods[method].joint_laws)
    if law and _not_fixed(study, method, law):
        law = None
    for size, part in by_number(points, "n_parameters"):
        part, look = part.sort_values("tokens"), style.size_style(size, study)
        line = {"linewidth": 0.6, "linestyle": ":"} if law else {}
        axes.plot(part["tokens"], part["loss"], **look | line)
        if law:
            grid = np.geomspace(part["tokens"].min(), part["tokens"].max(), 40)
            axes.plot(grid, law.loss(np.full(40, size), grid), color=look["color"])
    style.log_axis(axes.xaxis)
    style.log_axis(axes.yaxis)
    axes.set(xlabel=style.TOKENS, ylabel=style.LOSS, title=style.label(method))
    style.legend_below(figure, style.size_handles(study, sorted(points["n_parameters"].unique())), columns=3)
    rows = points[["method", "budget_flop", "n_parameters", "tokens", "loss"]]
    told = " Solid: the joint law; dotted: the runs." if law else ""
    return Drawn(figure, rows, f"Loss against tokens for each size: with data fixed, the largest model is best.{told}")


def _not_fixed(study: Study, method: str, law: StatedLaw) -> str:
    """Return the coefficients of a method's law that the data do not fix, as a text; empty if they fix all."""
    return listed(study.fits.methods[method].joint_laws[law.law.name].not_fixed)


# --- The trends behind the law ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trend:
    """A law with its points, and the law's three parts at each of them."""

    method: str
    law: StatedLaw
    rows: pd.DataFrame
    floor: Array
    size_term: Array
    data_term: Array

    @property
    def loss(self) -> Array:
        return self.rows["loss"].to_numpy(float)

    def coefficient(self, name: str) -> float:
        return float(self.law.law.named(self.law.values)[name][0])


def _trend_of(study: Study, needs_fraction: bool, one_fraction: bool = False) -> _Trend:
    """Return the trend of the first method whose law can show it; methods of a varying fraction come first.

    `one_fraction` keeps the points of the fraction that has the most of them.
    """
    reasons: list[str] = []
    for method in sorted(study.methods, key=lambda method: choice_of(method) is None):
        fit = study.fits.methods[method]
        law = fraction_law(fit.joint_laws) or (None if needs_fraction else size_law(fit.joint_laws))
        if law is None:
            reasons += [
                f"{style.label(method)}: {reason}"
                for name, reason in fit.refused.items()
                if LAWS[name].needs_fraction or not needs_fraction
            ]
            continue
        if free := _not_fixed(study, method, law):
            reasons.append(f"{style.label(method)}: the data do not fix {free} of the law {law.law.symbol}")
            continue
        rows = joint.points_for(law.law, study.cells[method], study.points[method])
        if one_fraction and law.law.needs_fraction:
            rows = rows[np.isclose(rows["trainable_fraction"], rows["trainable_fraction"].mode().iloc[-1])]
        parts = law.law.parts(law.values, *_columns(rows, "n_parameters", "tokens", "trainable_fraction"))
        return _Trend(method, law, rows, *parts)
    raise NotDrawn("; ".join(reasons) or "no method trains a varying fraction, which the law L(S, N, D) needs")


def _against_tokens(study: Study, rows: pd.DataFrame, y: Array, y_by_law: Array, label: str, caption: str) -> Drawn:
    """Draw points and the law's values against the tokens, a line a size."""
    figure, (axes,) = style.panels(1, height=3.2)
    rows = rows[COLUMNS].assign(part=y, part_by_law=y_by_law)
    for size, part in by_number(rows, "n_parameters"):
        part, look = part.sort_values("tokens"), style.size_style(size, study)
        axes.plot(part["tokens"], part["part"], linestyle="none", alpha=0.8, **look)
        axes.plot(part["tokens"], part["part_by_law"], color=look["color"])
    axes.set(xlabel=style.TOKENS, ylabel=label)
    style.legend_below(figure, style.size_handles(study, sorted(rows["n_parameters"].unique()), "none"), columns=3)
    return Drawn(figure, rows, caption)


def _positive(axes: Axes, values: Array) -> None:
    """Make the ordinate logarithmic where all values allow it."""
    if (values > 0).all():
        style.log_axis(axes.yaxis)


def _outside(axes: Axes, values: Array) -> str:
    """Return the caption's words about points outside the ordinate."""
    low, high = axes.get_ylim()
    count = int(((values < low) | (values > high)).sum())
    return f" {count} of the {len(values)} points lie outside." if count else ""


def _zoom(axes: Axes, values: Array, percentiles: Sequence[float], margin: float) -> None:
    """Set the ordinate's ends to two percentiles of the values, with a margin."""
    low, high = np.percentile(values, percentiles)
    axes.set_ylim(low - margin * (high - low), high + margin * (high - low))


def data_trend(study: Study) -> Drawn:
    """Draw figure 18: what data takes off the loss, against tokens."""
    trend = _trend_of(study, needs_fraction=False, one_fraction=True)
    left = trend.loss - trend.floor - trend.size_term
    drawn = _against_tokens(
        study, trend.rows, left, trend.data_term, "loss − E − size term (nats)",
        f"{style.label(trend.method)}: the loss without the floor E and the size term falls with the tokens as a power "
        "law. Marks: runs; lines: the law.",
    )  # fmt: skip
    axes = drawn.figure.axes[0]
    style.log_axis(axes.xaxis)
    _positive(axes, left)
    return drawn


def size_trend(study: Study) -> Drawn:
    """Draw figure 20: what size takes off the loss, against parameters."""
    trend = _trend_of(study, needs_fraction=False)
    left = trend.loss - trend.floor - trend.data_term
    figure, (axes,) = style.panels(1, height=3.2)
    rows = trend.rows[COLUMNS].assign(part=left, part_by_law=trend.size_term)
    shown = [budget for budget in study.budgets if np.isclose(rows["budget_flop"], budget, rtol=0.1).any()]
    for budget in shown:
        look = style.budget_style(budget, study)
        part = rows[np.isclose(rows["budget_flop"], budget, rtol=0.1)]
        axes.plot(part["n_parameters"], part["part"], linestyle="none", alpha=0.7, **look | {"markersize": 3})
        line = part.groupby("n_parameters")["part_by_law"].median()
        axes.plot(line.index, line, color=look["color"])
    style.log_axis(axes.xaxis, "sizes")
    _positive(axes, left)
    axes.set(xlabel=style.PARAMETERS, ylabel="loss − E − data term (nats)")
    style.legend_below(figure, style.budget_handles(study, shown), "budget (FLOP)", columns=3)
    return Drawn(
        figure, rows, f"{style.label(trend.method)}: the loss without the floor E and the data term falls with the "
        "parameters as a power law. Marks: runs; lines: the law.",
    )  # fmt: skip


def fraction_trend(study: Study) -> Drawn:
    """Draw figure 21: the data coefficient against the frozen fraction."""
    trend = _trend_of(study, needs_fraction=True)
    law, rows = trend.law.law, trend.rows
    left = (trend.loss - trend.floor - trend.size_term) * rows["tokens"].to_numpy(float) ** trend.coefficient("beta")
    rows = rows.assign(frozen=np.clip(1 - rows["trainable_fraction"], 0, 1).round(4))
    figure, (axes,) = style.panels(1, height=3.2)
    rows = rows[["method", "budget_flop", "n_parameters", "tokens", "frozen", "loss"]].assign(part=left)
    for size, part in by_number(rows, "n_parameters"):
        look = style.size_style(size, study)
        axes.plot(part["frozen"], part["part"], linestyle="none", alpha=0.6, **look | {"markersize": 3})
    grid = np.linspace(0, rows["frozen"].max(), 80)
    tail = 50 * (1 - study.fits.settings.confidence)
    # The coefficients of each draw at the scale of the points, because β differs between draws.
    middle = np.exp(np.log(rows["tokens"]).mean())
    scale = middle ** (trend.coefficient("beta") - law.named(trend.law.draws)["beta"])
    terms = law.data_coefficient(trend.law.draws, 1 - grid) * scale
    axes.fill_between(grid, *np.percentile(terms, [tail, 100 - tail], axis=0), color="black", alpha=0.13, linewidth=0)
    axes.plot(grid, law.data_coefficient(trend.law.values, 1 - grid), color="black")
    medians, bars = rows.groupby("frozen")["part"].median(), ""
    if len(medians) <= 12:  # LoRA's fractions differ with the size: medians would be those of a few runs
        axes.plot(medians.index, medians, "_", color="black", markersize=11)
        bars = "; bars: medians"
    axes.set(xlabel="frozen fraction 1 − S", ylabel="(loss − E − size term) · D^β")
    _zoom(axes, left, (1, 99), 0.15)
    style.legend_below(figure, style.size_handles(study, sorted(rows["n_parameters"].unique()), "none"), columns=3)
    return Drawn(
        figure, rows, f"{style.label(trend.method)}: the data coefficient against the frozen fraction. Line: "
        f"a_s (1 − S)^b_s + c_s of the law with its {study.fits.settings.percent} band{bars}.{_outside(axes, left)}",
    )  # fmt: skip


def coefficient_trend(study: Study) -> Drawn:
    """Draw figure 22: the size coefficient against tokens."""
    trend = _trend_of(study, needs_fraction=True)
    rows = trend.rows
    scale = rows["n_parameters"].to_numpy(float) ** trend.coefficient("alpha")
    left = (trend.loss - trend.floor - trend.data_term) * scale
    by_law = trend.law.law.size_coefficient(trend.law.values, rows["tokens"].to_numpy(float))
    drawn = _against_tokens(
        study, rows, left, by_law, "(loss − E − data term) · N^α",
        f"{style.label(trend.method)}: the size coefficient against the tokens. Line: a_d ln D + b_d of the law; bars: "
        "weighted means of eighths of the range, with two standard errors.",
    )  # fmt: skip
    axes = drawn.figure.axes[0]
    # Noise of ln L moves a point by L N^α; bins of equal width in ln D are weighted by its inverse square.
    weight = (trend.loss * scale) ** -2.0
    log_d = np.log(rows["tokens"].to_numpy(float))
    place = np.digitize(log_d, np.linspace(log_d.min(), log_d.max(), 9)[1:-1])
    for number in np.unique(place):
        here = place == number
        mean = np.average(left[here], weights=weight[here])
        spread = np.sqrt(np.average((left[here] - mean) ** 2, weights=weight[here]) / max(here.sum() - 1, 1))
        axes.errorbar(np.exp(np.average(log_d[here])), mean, 2 * spread, marker="_", markersize=11, color="black")
    _zoom(axes, left, (5, 95), 0.1)
    style.log_axis(axes.xaxis)
    return replace(drawn, caption=drawn.caption + _outside(axes, left))
