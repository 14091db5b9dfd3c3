"""Figures of the joint laws: hold-outs (7, 14, 19), fixed data (17), the trends behind them (18, 20 to 22), steps (23).

The reference names no panels for 7, 14 and 19, nor for the trends; here the hold-outs are those of full fine-tuning,
freezing and LoRA, and the trends are the law's four parts, each with the others taken off the loss.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.figures import style
from analysis.figures.style import Drawn, NotDrawn
from analysis.fitting import joint, uncertainty
from analysis.fitting.laws import CHINCHILLA, LAWS, TRAINABLE_FRACTION, Law
from analysis.fitting.solver import JointFit, TooFewRuns, fit_joint
from analysis.study import Study, by_number

Array = NDArray[np.float64]
DRAWS = 100


def _columns(rows: pd.DataFrame, *names: str) -> list[Array]:
    return [rows[name].to_numpy(float) for name in names]


def _points(study: Study, method: str, law: Law) -> pd.DataFrame:
    if method not in study.methods:
        raise NotDrawn(f"no run of {style.label(method)}")
    return joint.by_fraction(study.cells[method]) if law is TRAINABLE_FRACTION else study.points[method]


def _law_of(study: Study, method: str) -> Law:
    """The paper's law L(S, N, D) where the method has one, else L(N, D)."""
    if method not in study.methods:
        raise NotDrawn(f"no run of {style.label(method)}")
    laws = study.fits["methods"][method]["joint_laws"]
    for law in (TRAINABLE_FRACTION, CHINCHILLA):
        if "E" in laws.get(law.name, {}):
            return law
    raise NotDrawn(laws[CHINCHILLA.name]["refused"])


def _fit(law: Law, rows: pd.DataFrame, study: Study, amount: str = "tokens") -> tuple[JointFit, Array]:
    """The law on some of the points, and draws of its coefficients."""
    n, d, loss, s, seeds = _columns(rows, "params", amount, "loss", "trainable_fraction", "seeds")
    settings = study.fits["settings"]
    options = {"residual": settings["residual"], "delta": settings["delta"], "weights": seeds}
    try:
        fitted = fit_joint(law, n, d, loss, s if law is TRAINABLE_FRACTION else None, starts=8, **options)
    except TooFewRuns as error:
        raise NotDrawn(str(error)) from None
    draws = uncertainty.resampled(fitted, list(rows["losses"]), DRAWS, np.random.default_rng(settings["seed"]))
    return fitted, draws


def _against(rows: pd.DataFrame, study: Study, predicted_kind: str) -> Figure:
    """Predicted against found loss, and the error below; the points of `predicted_kind` are ringed."""
    figure = Figure(figsize=(style.ONE, 4.6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    for kind in ("fitted", predicted_kind):
        for size, each in by_number(rows[rows["kind"] == kind], "params"):
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
    style.log_axis(upper.xaxis, "plain")
    style.log_axis(upper.yaxis, "plain")
    lower.axhline(0, color=style.GREY, linewidth=0.7, zorder=0.5)
    lower.set(xlabel="found: " + style.LOSS, ylabel="error (%)")
    told = []
    for kind in ("fitted", predicted_kind):
        part = rows[rows["kind"] == kind]
        error = np.abs(part["predicted"] / part["loss"] - 1).mean()
        told.append(f"{kind}: {len(part)} points, mean error {100 * error:.2f} %")
    upper.text(0.03, 0.97, "\n".join(told), va="top", fontsize=7, transform=upper.transAxes)
    upper.set_title(style.label(rows["method"].iloc[0]))
    sizes = [size for size in study.sizes if (rows["params"] == size).any()]
    style.legend_below(figure, style.size_handles(study, sizes, "none"), columns=3)
    return figure


def _predicted(rows: pd.DataFrame, law: Law, fitted: JointFit, draws: Array, study: Study, amount: str) -> pd.DataFrame:
    n, d, s = _columns(rows, "params", amount, "trainable_fraction")
    tail = 50 * (1 - study.fits["settings"]["confidence"])
    low, high = np.percentile(law.predict(draws, n, d, s), [tail, 100 - tail], axis=0)
    found = rows[["method", "budget", "params", amount, "trainable_fraction", "loss"]]
    return found.assign(predicted=np.ravel(fitted.predict(n, d, s)), low=low, high=high)


def hold_out(study: Study, method: str) -> Drawn:
    """Figures 7, 14, 19: the law without the largest size predicts the largest size."""
    law = _law_of(study, method)
    points = _points(study, method, law)
    out, largest = uncertainty.held_out_rows(points, "params")
    fitted, draws = _fit(law, points[~out], study)
    rows = _predicted(points, law, fitted, draws, study, "tokens").assign(kind=np.where(out, "held out", "fitted"))
    figure = _against(rows, study, "held out")
    name = "L(S, N, D)" if law is TRAINABLE_FRACTION else "L(N, D)"
    return Drawn(
        figure,
        rows,
        f"The joint law {name} fitted to every size below {study.names[largest]} (small marks), against the largest "
        "size (ringed, 95 % intervals of the law).",
    )


def fixed_data(study: Study) -> Drawn:
    """Figure 17: loss against tokens, a line a size."""
    method = "full" if "full" in study.methods else study.methods[0]
    points = study.points[method]
    figure, (axes,) = style.panels(1, height=3.2)
    law = study.fits["methods"][method]["joint_laws"].get(CHINCHILLA.name, {})
    known = np.array([law[name] for name in CHINCHILLA.names]) if "E" in law else None
    for size, part in by_number(points, "params"):
        part, look = part.sort_values("tokens"), style.size_style(size, study)
        line = {"linewidth": 0.6, "linestyle": ":"} if known is not None else {}
        axes.plot(part["tokens"], part["loss"], **look | line)
        if known is not None:
            grid = np.geomspace(part["tokens"].min(), part["tokens"].max(), 40)
            axes.plot(grid, CHINCHILLA.predict(known, np.full(40, size), grid), color=look["color"])
    style.log_axis(axes.xaxis)
    style.log_axis(axes.yaxis, "plain")
    axes.set(xlabel=style.TOKENS, ylabel=style.LOSS, title=style.label(method))
    style.legend_below(figure, style.size_handles(study, study.sizes), columns=3)
    rows = points[["method", "budget", "params", "tokens", "loss"]]
    told = " Solid: the joint law." if known is not None else ""
    return Drawn(figure, rows, f"Loss against tokens for each size: with data fixed, the largest model is best.{told}")


# --- The trends behind the law ---------------------------------------------------------------------------------------


def _trend_law(study: Study, needs_fraction: bool) -> tuple[str, Law, Array, pd.DataFrame]:
    """The method whose law the trends are shown for, the law, its coefficients, and its points."""
    reasons: list[str] = []
    order = ["freeze", "lora", *study.methods]
    for method in sorted(study.methods, key=order.index):
        facts = study.fits["methods"][method]["joint_laws"]
        for name in (TRAINABLE_FRACTION.name,) if needs_fraction else (TRAINABLE_FRACTION.name, CHINCHILLA.name):
            law = facts.get(name)
            if law and "E" in law:
                values = np.array([law[each] for each in LAWS[name].names])
                return method, LAWS[name], values, _points(study, method, LAWS[name])
            reasons += [f"{style.label(method)}: {law['refused']}"] if law else []
    raise NotDrawn("; ".join(reasons) or "no method trains a varying fraction, which the law L(S, N, D) needs")


def _parts(law: Law, values: Array, rows: pd.DataFrame) -> tuple[Array, Array]:
    """The law's size term and data term at each point."""
    n, d, s = _columns(rows, "params", "tokens", "trainable_fraction")
    if law is CHINCHILLA:
        return values[1] * n ** -values[3], values[2] * d ** -values[4]
    _, a_d, b_d, a_s, b_s, c_s, alpha, beta = values
    return (a_d * np.log(d) + b_d) * n**-alpha, (a_s * np.clip(1 - s, 0, 1) ** b_s + c_s) * d**-beta


def _trend(study: Study, rows: pd.DataFrame, x: str, y: Array, law_y: Array, labels: tuple[str, str, str]) -> Drawn:
    """Points and the law's values against a column, a line a size."""
    figure, (axes,) = style.panels(1, height=3.2)
    rows = rows[["method", "budget", "params", "tokens", "trainable_fraction", "loss"]].assign(
        part=y, part_by_law=law_y
    )
    for size, part in by_number(rows, "params"):
        part, look = part.sort_values(x), style.size_style(size, study)
        axes.plot(part[x], part["part"], linestyle="none", alpha=0.8, **look)
        axes.plot(part[x], part["part_by_law"], color=look["color"])
    axes.set(xlabel=labels[0], ylabel=labels[1])
    style.legend_below(figure, style.size_handles(study, sorted(rows["params"].unique()), "none"), columns=3)
    return Drawn(figure, rows, labels[2])


def _positive(axes: Axes, values: Array) -> None:
    """A logarithmic ordinate where all values allow it."""
    if (values > 0).all():
        style.log_axis(axes.yaxis, "plain")


def _outside(axes: Axes, values: Array) -> str:
    """What a caption says of points beyond the ordinate's ends."""
    low, high = axes.get_ylim()
    count = int(((values < low) | (values > high)).sum())
    return f" {count} of the {len(values)} points lie outside." if count else ""


def data_trend(study: Study) -> Drawn:
    """Figure 18: what data takes off the loss, against tokens."""
    method, law, values, rows = _trend_law(study, needs_fraction=False)
    if law is TRAINABLE_FRACTION:  # one fraction, the one with most points
        rows = rows[np.isclose(rows["trainable_fraction"], rows["trainable_fraction"].mode().iloc[-1])]
    size_term, data_term = _parts(law, values, rows)
    drawn = _trend(
        study, rows, "tokens", rows["loss"].to_numpy(float) - values[0] - size_term, data_term,
        (style.TOKENS, "loss − E − size term (nats)",
         f"{style.label(method)}: what is left of the loss without the floor E and the size term falls with the tokens "
         "as a power law. Marks: runs; lines: the law."),
    )  # fmt: skip
    axes = drawn.figure.axes[0]
    style.log_axis(axes.xaxis)
    _positive(axes, drawn.rows["part"].to_numpy())
    return drawn


def size_trend(study: Study) -> Drawn:
    """Figure 20: what size takes off the loss, against parameters."""
    method, law, values, rows = _trend_law(study, needs_fraction=False)
    size_term, data_term = _parts(law, values, rows)
    figure, (axes,) = style.panels(1, height=3.2)
    left = rows["loss"].to_numpy(float) - values[0] - data_term
    rows = rows[["method", "budget", "params", "tokens", "trainable_fraction", "loss"]]
    rows = rows.assign(part=left, part_by_law=size_term)
    shown = [budget for budget in study.budgets if np.isclose(rows["budget"], budget, rtol=0.1).any()]
    for budget in shown:
        look = style.budget_style(budget, study)
        part = rows[np.isclose(rows["budget"], budget, rtol=0.1)]
        axes.plot(part["params"], part["part"], linestyle="none", alpha=0.7, **look | {"markersize": 3})
        line = part.groupby("params")["part_by_law"].median()
        axes.plot(line.index, line, color=look["color"])
    style.log_axis(axes.xaxis, "sizes")
    _positive(axes, left)
    axes.set(xlabel=style.PARAMETERS, ylabel="loss − E − data term (nats)")
    style.legend_below(figure, style.budget_handles(study, shown), "budget (FLOP)", columns=3)
    return Drawn(
        figure, rows, f"{style.label(method)}: what is left of the loss without the floor E and the data term falls "
        "with the parameters as a power law. Marks: runs; lines: the law.",
    )  # fmt: skip


def fraction_trend(study: Study) -> Drawn:
    """Figure 21: the data coefficient against the frozen fraction."""
    method, law, values, rows = _trend_law(study, needs_fraction=True)
    size_term, _ = _parts(law, values, rows)
    scale = rows["tokens"].to_numpy(float) ** values[7]
    left = (rows["loss"].to_numpy(float) - values[0] - size_term) * scale
    rows = rows.assign(frozen=np.clip(1 - rows["trainable_fraction"], 0, 1).round(4))
    figure, (axes,) = style.panels(1, height=3.2)
    rows = rows[["method", "budget", "params", "tokens", "frozen", "loss"]].assign(part=left)
    for size, part in by_number(rows, "params"):
        look = style.size_style(size, study)
        axes.plot(part["frozen"], part["part"], linestyle="none", alpha=0.6, **look | {"markersize": 3})
    grid = np.linspace(0, rows["frozen"].max(), 80)
    drawn = np.asarray(study.fits["methods"][method]["joint_laws"][law.name]["draws"], float)
    tail = 50 * (1 - study.fits["settings"]["confidence"])
    # Each draw's coefficients at the points' own scale, for β moves with them.
    middle = np.exp(np.log(rows["tokens"]).mean())
    terms = (drawn[:, 3:4] * grid ** drawn[:, 4:5] + drawn[:, 5:6]) * middle ** (values[7] - drawn[:, 7:8])
    axes.fill_between(grid, *np.percentile(terms, [tail, 100 - tail], axis=0), color="black", alpha=0.13, linewidth=0)
    axes.plot(grid, values[3] * grid ** values[4] + values[5], color="black")
    medians, bars = rows.groupby("frozen")["part"].median(), ""
    if len(medians) <= 12:  # more would be points of few runs: of LoRA, every size has its own fractions
        axes.plot(medians.index, medians, "_", color="black", markersize=11)
        bars = "; bars: medians"
    axes.set(xlabel="frozen fraction 1 − S", ylabel="(loss − E − size term) · D^β")
    low, high = np.percentile(left, [1, 99])
    axes.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))
    style.legend_below(figure, style.size_handles(study, sorted(rows["params"].unique()), "none"), columns=3)
    return Drawn(
        figure, rows, f"{style.label(method)}: the data coefficient against the frozen fraction. Line: a_s (1 − S)^b_s "
        f"+ c_s of the law with its 95 % band{bars}.{_outside(axes, left)}",
    )  # fmt: skip


def coefficient_trend(study: Study) -> Drawn:
    """Figure 22: the size coefficient against tokens."""
    method, law, values, rows = _trend_law(study, needs_fraction=True)
    _, data_term = _parts(law, values, rows)
    scale = rows["params"].to_numpy(float) ** values[6]
    left = (rows["loss"].to_numpy(float) - values[0] - data_term) * scale
    by_law = values[1] * np.log(rows["tokens"].to_numpy(float)) + values[2]
    drawn = _trend(
        study, rows, "tokens", left, by_law,
        (style.TOKENS, "(loss − E − data term) · N^α",
         f"{style.label(method)}: the size coefficient against the tokens. Line: a_d ln D + b_d of the law; bars: "
         "weighted means of eighths of the range, with two standard errors."),
    )  # fmt: skip
    axes = drawn.figure.axes[0]
    # Noise of ln L moves a point by L N^α; bins of equal width in ln D are weighed by its inverse square.
    weight = (rows["loss"].to_numpy(float) * scale) ** -2.0
    log_d = np.log(rows["tokens"].to_numpy(float))
    place = np.digitize(log_d, np.linspace(log_d.min(), log_d.max(), 9)[1:-1])
    for number in np.unique(place):
        here = place == number
        mean = np.average(left[here], weights=weight[here])
        spread = np.sqrt(np.average((left[here] - mean) ** 2, weights=weight[here]) / max(here.sum() - 1, 1))
        axes.errorbar(np.exp(np.average(log_d[here])), mean, 2 * spread, marker="_", markersize=11, color="black")
    low, high = np.percentile(left, [5, 95])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    style.log_axis(axes.xaxis)
    return replace(drawn, caption=drawn.caption + _outside(axes, left))


def steps(study: Study) -> Drawn:
    """Figure 23: a law of size and training steps predicts another batch size and context."""
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
    fitted, draws = _fit(CHINCHILLA, pair[0], study, "steps")
    told = []
    for each in (study, study.other):
        same = each.fits["comparable"]
        told.append(f"batch {same.get('batch_size', 0):.0f}, context {same.get('context', 0):.0f}")
    rows = pd.concat(
        _predicted(each, CHINCHILLA, fitted, draws, study, "steps").assign(kind=kind)
        for each, kind in zip(pair, ("fitted", "predicted"), strict=True)
    )
    figure = _against(rows, study, "predicted")
    return Drawn(
        figure, rows, f"The law of size and training steps fitted at {told[0]} (small marks) against the runs at "
        f"{told[1]} (ringed, 95 % intervals of the law).",
    )  # fmt: skip
