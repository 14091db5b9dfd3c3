"""The figure of a replay: what each way to spend finds, against what it spent."""

from typing import Any

import pandas as pd
from matplotlib.ticker import FuncFormatter

from analysis.design.replay import DESIGN, FULL
from analysis.figures import style
from analysis.figures.style import Drawn

MEASURES = {"regret": "loss above the best option", "error": "rms error of ln L at the options"}
LOOKS: dict[str, dict[str, Any]] = {
    DESIGN: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "V-optimal": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "D-optimal": {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    "inverse cost": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "cheapest": {"color": "#E69F00", "marker": "v", "linestyle": ":"},
    "random": {"color": "0.45", "marker": "x", "linestyle": "--"},
}
ZERO = 1e-5  # drawn for a share of 0, which a logarithmic axis does not have


def replayed(rows: pd.DataFrame) -> Drawn:
    """Draw the mean over repeats of each measure in `rows` (of `design.replay.replay`), a panel each."""
    measures = [name for name in MEASURES if name in rows]
    figure, every = style.panels(len(measures), height=2.7)
    for axes, measure in zip(every, measures, strict=True):
        for name, look in LOOKS.items():
            part = rows[rows["spender"] == name].groupby("share")[measure]
            mean = part.mean().clip(lower=ZERO)
            axes.plot(mean.index, mean, label=name, zorder=3 if name == DESIGN else 2, **look)
            if name == DESIGN:
                low, high = part.min().clip(lower=ZERO), part.max().clip(lower=ZERO)
                axes.fill_between(mean.index, low, high, color=look["color"], alpha=0.15, linewidth=0)
        full = max(float(rows.loc[rows["spender"] == FULL, measure].mean()), ZERO)
        axes.axhline(full, color="black", linewidth=0.8, label=FULL)
        style.log_axis(axes.xaxis)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.set(xlabel="share of the cost of all rows", ylabel=MEASURES[measure])
    handles, _ = every[0].get_legend_handles_labels()
    style.legend_below(figure, handles, columns=4 if len(measures) > 1 else 3)
    caption = (
        f"What each way to spend finds, as the mean of {rows['repeat'].nunique()} repeats that leave out a tenth of "
        f"the rows at random; the band is the range of the {DESIGN}. All fit the same model. Below {100 * ZERO:g} % a "
        f"mean is drawn at {100 * ZERO:g} %."
    )
    return Drawn(figure, rows, caption)
