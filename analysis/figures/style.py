"""The look of all figures: print sizes, colours, axes with units, and legends.

A method has a colour, a marker and a line style. Budgets and sizes have two palettes that darken in order, with
markers, so that readers who do not see colours and grey printers can tell them apart. A budget has the same colour in
all figures of a sweep. A point that is not an interior optimum is drawn hollow.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from analysis.study import Study, short_number
from embedscale.run.method import METHODS

ONE, TWO = 3.5, 7.0  # width of one column and of two, inches
# Okabe and Ito's palette
_LOOKS = {
    "full": ("#0072B2", "o", "-"),
    "freeze": ("#009E73", "^", "-."),
    "bias": ("#CC79A7", "D", ":"),
    "lora": ("#D55E00", "s", "--"),
}
_OTHERS = [("#56B4E9", "v", "-"), ("#E69F00", "P", "--"), ("#000000", "X", "-."), ("#999999", "*", ":")]
MARKERS = "osD^vPX*<>hp"
GREY = "0.45"
BUDGET, PARAMETERS, TOKENS, LOSS = (
    *("compute budget C (FLOP)", "parameters N (non-embedding)", "tokens D", "held-out loss (nats)"),
)

SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.8,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "errorbar.capsize": 1.5,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "embedscale",
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the look while a figure is drawn and saved."""
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        yield


def label(method: str) -> str:
    """Return the name of a method as a reader sees it."""
    return METHODS[method].title if method in METHODS else method


def method_style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Return colour, marker and line style of one of the study's methods."""
    own = _LOOKS.get(method)
    if own is None:
        own = _OTHERS[[name for name in methods if name not in _LOOKS].index(method) % len(_OTHERS)]
    return dict(zip(("color", "marker", "linestyle"), own, strict=True))


def _ordered(value: float, values: Sequence[float], palette: str, low: float, high: float) -> dict[str, Any]:
    nearest = int(np.abs(np.log(np.asarray(values) / value)).argmin())
    place = nearest / max(len(values) - 1, 1)
    color = matplotlib.colormaps[palette](low + (high - low) * place)
    return {"color": color, "marker": MARKERS[nearest % len(MARKERS)]}


def budget_style(budget: float, study: Study) -> dict[str, Any]:
    """Return colour and marker of a budget."""
    return _ordered(budget, study.budgets, "viridis_r", 0.2, 1.0)


def size_style(size: float, study: Study) -> dict[str, Any]:
    """Return colour and marker of a model size."""
    return _ordered(size, study.sizes, "plasma_r", 0.2, 1.0)


def panels(count: int, columns: int = 2, height: float = 2.5, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure and its `count` panels, in rows of `columns`; a single panel is one column wide."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(ONE if columns == 1 else TWO, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat[count:]:
        axes.remove()
    found = list(grid.flat[:count])
    if options.get("sharex"):  # a panel above an empty place shows its own tick labels
        for axes in found[-columns:]:
            axes.tick_params(labelbottom=True)
    return figure, found


def log_axis(axis: Any, kind: str = "power") -> None:
    """Make an axis logarithmic.

    `kind` says how its ticks look: "power" as powers of ten, "sizes" as 1M and 1B, "plain" as plain numbers, for less
    than two decades.
    """
    axes, name = axis.axes, axis.axis_name
    getattr(axes, f"set_{name}scale")("log")
    low, high = getattr(axes, f"get_{name}lim")()
    if kind == "plain":
        ticks = _round_ticks(low, high)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    elif kind == "sizes":
        many = np.log10(high / low) < 1.5
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if many else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    elif high / low < 50:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    else:
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _round_ticks(low: float, high: float) -> list[float]:
    if high / low < 4:
        ticks = list(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    elif high / low < 12:
        ticks = [0.1 * 10**k * each for k in range(-3, 6) for each in (1, 1.5, 2, 3, 4, 5, 7)]
    else:
        decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        ticks = list(np.ravel(10.0 ** decades[:, None] * np.array([1, 2, 5])))
    return [float(tick) for tick in ticks if low <= tick <= high]


def outer_labels(axes: Sequence[Axes], x: str, y: str) -> None:
    """Label the axes at the left and the lower edge of a grid of panels only."""
    for each in axes:
        place = each.get_subplotspec()
        assert place is not None
        below = [other.get_subplotspec() for other in axes if other is not each]
        if not any(b and b.colspan == place.colspan and b.rowspan.start > place.rowspan.start for b in below):
            each.set_xlabel(x)
        if place.colspan.start == 0:
            each.set_ylabel(y)


def power_of_ten(value: float) -> str:
    """Return a number as 7.8e17."""
    return f"{value:.2g}".replace("e+", "e")


HALO = [withStroke(linewidth=1.6, foreground="white")]


def hollow(style: dict[str, Any]) -> dict[str, Any]:
    """Return the style with a hollow mark and no line."""
    return {"color": style["color"], "marker": style["marker"], "markerfacecolor": "white", "linestyle": "none"}


def legend_below(figure: Figure, handles: Sequence[Any], title: str | None = None, columns: int = 6) -> None:
    """Draw one legend for all panels, below them, where it hides no point."""
    if handles:
        shown = min(columns, len(handles))
        figure.legend(handles=list(handles), loc="outside lower center", ncols=shown, title=title)


def budget_handles(study: Study, budgets: Sequence[float], most: int = 10) -> list[Line2D]:
    """Return legend entries of budgets; of more than `most`, an even selection."""
    chosen = budgets
    if len(budgets) > most:
        chosen = [budgets[i] for i in np.unique(np.linspace(0, len(budgets) - 1, most).round().astype(int))]
    return [
        Line2D([], [], linestyle="-", label=f"{budget:.3g}".replace("e+", "e"), **budget_style(budget, study))
        for budget in chosen
    ]


def size_handles(study: Study, sizes: Sequence[float], linestyle: Any = "-") -> list[Line2D]:
    """Return legend entries of model sizes; of more than twelve, an even selection."""
    chosen = [sizes[i] for i in np.unique(np.linspace(0, len(sizes) - 1, 12).round().astype(int))]
    return [Line2D([], [], linestyle=linestyle, label=study.names[size], **size_style(size, study)) for size in chosen]


@dataclass(frozen=True)
class Drawn:
    """A figure, the table of what it shows, and its caption."""

    figure: Figure
    rows: pd.DataFrame
    caption: str


class NotDrawn(Exception):
    """The runs do not have what the figure shows; the message says what is missing."""
