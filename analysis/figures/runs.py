"""Figures of the files in run directories: loss curves, and MTEB scores (8 to 12, 15, 16)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.figures import style
from analysis.figures.optima import choice_panels
from analysis.figures.style import Drawn, NotDrawn
from analysis.study import Study, by_number


def curves(study: Study) -> Drawn:
    """Draw loss against FLOP spent, of the best run of each method, size and budget."""
    if study.curves.empty:
        raise NotDrawn("the run directories, which hold the curves, are missing")
    methods = [method for method in study.methods if (study.curves["method"] == method).any()]
    figure, every = style.panels(len(methods), height=2.4, sharex=True, sharey=True)
    for axes, method in zip(every, methods, strict=True):
        own = study.curves[study.curves["method"] == method]
        for _, rows in own.groupby("run"):
            look = style.size_style(float(rows["n_parameters"].iloc[0]), study)
            batch, held_out = rows.dropna(subset=["train_loss"]), rows.dropna(subset=["loss"])
            axes.plot(batch["spent_flop"], batch["train_loss"], color=look["color"], linewidth=0.4, alpha=0.6)
            axes.plot(held_out["spent_flop"], held_out["loss"], linewidth=0.9, **look | {"markersize": 3})
        axes.set_title(style.label(method))
    every[0].margins(0.03)
    style.log_axis(every[0].xaxis)
    style.log_axis(every[0].yaxis)
    style.outer_labels(every, "FLOP spent", "contrastive loss (nats)")
    sizes = sorted(study.curves["n_parameters"].unique())
    style.legend_below(figure, style.size_handles(study, sizes), columns=6 if len(methods) > 1 else 3)
    return Drawn(
        figure,
        study.curves,
        "Loss against FLOP spent, of the best run of each size and budget: marks are the held-out loss, thin lines the "
        "loss of the training batches.",
    )


def hours(study: Study) -> Drawn:
    """Draw the held-out loss of the best run of each method and budget against device-hours, a line for each method."""
    if "gpu_hours" not in study.table:  # a table of others
        raise NotDrawn("the table of runs has no device-hours")
    best = study.table.loc[study.table.groupby(["method", "budget_flop"])["loss"].idxmin()].dropna(subset=["gpu_hours"])
    if best.empty:
        raise NotDrawn("no best run of a method and budget states its device-hours")
    best = best.sort_values(["method", "gpu_hours"])  # a slow run must not turn the line back
    figure, (axes,) = style.panels(1, height=2.9)
    for method in study.methods:
        part = best[best["method"] == method]
        if part.empty:
            continue
        look = style.method_style(method, study.methods) | ({"linestyle": "none"} if len(part) == 1 else {})
        axes.plot(part["gpu_hours"], part["loss"], label=style.label(method), **look)
    style.log_axis(axes.xaxis)
    style.log_axis(axes.yaxis)
    axes.set(xlabel="device-hours", ylabel=style.LOSS)
    style.legend_below(figure, axes.get_lines(), columns=2)
    columns = ["method", "budget_flop", "n_parameters", "gpu_hours", "loss", "run"]
    return Drawn(
        figure,
        best[columns],
        "Held-out loss of the best run of each method and budget, against the device-hours of all its attempts.",
    )


def _scored(study: Study) -> pd.DataFrame:
    """Return the scored runs with their mean score over the tasks that all of them have."""
    if study.scores.empty:
        raise NotDrawn("no run has scores; embedscale evaluate RUN writes them")
    wide = study.scores.pivot_table(index="run", columns="task", values="score")
    common = wide.dropna(axis=1)
    if common.empty or not len(common.columns):
        raise NotDrawn("the scored runs have no task in common")
    found = study.table.merge(common.mean(axis=1).rename("score").reset_index(), on="run")
    found.attrs["tasks"] = ", ".join(map(str, common.columns))
    return found


def score_frontier(study: Study) -> Drawn:
    """Draw figure 12: the score of the run with the lowest loss, against the budget."""
    runs = _scored(study)
    best = runs.loc[runs.groupby(["method", "budget_flop"])["loss"].idxmin()].sort_values("budget_flop")
    figure, (axes,) = style.panels(1, height=2.9)
    for method in study.methods:
        part = best[best["method"] == method]
        if part.empty:
            continue
        axes.plot(
            part["budget_flop"], part["score"], label=style.label(method), **style.method_style(method, study.methods)
        )
    style.log_axis(axes.xaxis)
    axes.set(xlabel=style.BUDGET, ylabel="mean score")
    style.legend_below(figure, axes.get_lines(), columns=2)
    return Drawn(
        figure,
        best[["method", "budget_flop", "n_parameters", "loss", "score", "run"]],
        f"Score of the run with the lowest loss, for each method and budget. Mean over {runs.attrs['tasks']}.",
    )


def score_profiles(study: Study, methods: Sequence[str] = ()) -> Drawn:
    """Draw figures 8, 10 and 15: score against size, a panel a method, a curve a budget. No `methods` means all."""
    runs = _scored(study)
    best = runs.loc[runs.groupby(["method", "budget_flop", "n_parameters"])["loss"].idxmin()].sort_values(
        "n_parameters"
    )
    methods = [each for each in methods or study.methods if (best["method"] == each).any()]
    if not methods:
        raise NotDrawn("none of the figure's methods has scores")
    best = best[best["method"].isin(methods)]
    figure, every = style.panels(len(methods), height=2.4, sharex=True, sharey=True)
    for axes, method in zip(every, methods, strict=True):
        for budget, part in by_number(best[best["method"] == method], "budget_flop"):
            axes.plot(part["n_parameters"], part["score"], **style.budget_style(budget, study))
        axes.set_title(style.label(method))
    style.log_axis(every[0].xaxis, "sizes")
    style.outer_labels(every, style.PARAMETERS, "mean score")
    style.legend_below(figure, style.budget_handles(study, sorted(best["budget_flop"].unique())), "budget (FLOP)", 4)
    return Drawn(
        figure,
        best[["method", "budget_flop", "n_parameters", "loss", "score", "run"]],
        f"IsoFLOP profiles of the score of the run with the lowest loss of each size. Mean over {runs.attrs['tasks']}.",
    )


def score_by_choice(study: Study, methods: Sequence[str]) -> Drawn:
    """Draw figures 9 and 11: score against the share of active blocks, or the rank."""
    (method,) = methods
    scored = _scored(study)
    drawn = choice_panels(study, scored[scored["method"] == method], method, "score")
    return replace(drawn, caption=f"{drawn.caption} Mean over {scored.attrs['tasks']}.")


def score_and_loss(study: Study) -> Drawn:
    """Draw figure 16: score against loss, with Spearman's correlation."""
    runs = _scored(study)
    figure, (axes,) = style.panels(1, height=2.9)
    for method in study.methods:
        part = runs[runs["method"] == method]
        if part.empty:
            continue
        look = style.method_style(method, study.methods) | {"linestyle": "none"}
        axes.plot(part["loss"], part["score"], label=style.label(method), alpha=0.8, **look)
    told = "too few runs for a correlation"
    if len(runs) >= 4 and runs["score"].nunique() > 1:
        correlation = float(np.corrcoef(runs["loss"].rank(), runs["score"].rank())[0, 1])
        told = f"Spearman {correlation:.3f}, {len(runs)} runs"
    axes.set_title(told)
    style.log_axis(axes.xaxis)
    axes.set(xlabel=style.LOSS, ylabel="mean score")
    style.legend_below(figure, axes.get_lines(), columns=2)
    return Drawn(
        figure,
        runs[["method", "budget_flop", "n_parameters", "loss", "score", "run"]],
        f"Score against held-out loss. Mean over {runs.attrs['tasks']}.",
    )
