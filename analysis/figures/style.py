"""The look of all figures: print sizes, colours, axes with units, labels and legends.

A method has a colour, a marker and a line style. Budgets and sizes have two palettes that darken in order, with
markers, so that readers who do not see colours and grey printers can tell them apart. A budget has the same colour in
all figures of a sweep. A point that is not an interior optimum is drawn hollow. A legend names only what is drawn.
Names are text: no name is read as a formula.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from analysis.study import Study
from embedscale.run.method import METHODS
from embedscale.texts import number, short_name, short_number

ONE, TWO = 3.3, 6.9  # width of one column and of a page, inches
T = TypeVar("T")
LEGEND = 0.45  # inches of a figure's height that a legend may take
SMALLEST = 6.5  # points; the smallest text that is read at printed size
# Okabe and Ito's palette
_LOOKS = {
    "full": ("#0072B2", "o", "-"),
    "freeze": ("#009E73", "^", "-."),
    "bias": ("#CC79A7", "D", ":"),
    "lora": ("#D55E00", "s", "--"),
}
# Methods of other names: the periods have no common factor, so that many methods look different.
_OTHERS = ("#56B4E9", "#E69F00", "#000000", "#999999", "#0072B2", "#D55E00", "#009E73"), "vPX*<>hpd8H", ("-", "--", ":")
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
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.7,
    "legend.columnspacing": 1.3,
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
    "savefig.dpi": 300,
    "text.parse_math": False,
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
    return METHODS[method].title if method in METHODS else short_name(method)


def method_style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Return colour, marker and line style of one of the study's methods."""
    own: Sequence[str] = _LOOKS.get(method, ())
    if not own:
        place = [name for name in methods if name not in _LOOKS].index(method)
        own = [each[place % len(each)] for each in _OTHERS]
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


class _LogTicks(Locator):
    """As many round ticks on a logarithmic axis as its length has room for, and at least two."""

    def __call__(self) -> Any:
        return self.tick_values(*sorted(self.axis.get_view_interval()))  # type: ignore[union-attr]

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        if not 0 < vmin < vmax:
            return []
        axes: Any = self.axis.axes  # type: ignore[union-attr]
        along = axes.bbox.width / 0.5 if self.axis.axis_name == "x" else axes.bbox.height / 0.25  # type: ignore[union-attr]
        most = int(np.clip(along / axes.figure.dpi, 2, 7))
        decades = 10.0 ** np.arange(np.floor(np.log10(vmin)), np.ceil(np.log10(vmax)) + 1)
        choices: list[Any] = (
            [MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(vmin, vmax)] if vmax / vmin < 4 else []
        )
        choices += [np.outer(decades, subs) for subs in ((1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))]
        choices += [decades[::step] for step in range(2, len(decades))]
        for ticks in choices:
            shown = [float(tick) for tick in np.ravel(ticks) if vmin <= tick <= vmax]
            if len(shown) <= most:
                break
        return shown


# How a tick of each kind of axis is written.
_TICKS = {"power": lambda value, _: number(value, 4), "sizes": lambda value, _: short_number(value)}


def log_axis(axis: Any, kind: str = "power") -> None:
    """Make an axis logarithmic, with ticks as 1e12 ("power") or as 1M and 1B ("sizes")."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(_LogTicks())
    axis.set_major_formatter(FuncFormatter(_TICKS[kind]))
    low, high = axis.get_view_interval()
    axis.set_minor_locator(LogLocator(subs=range(2, 10)) if high / low > 12 else NullLocator())
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


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


HALO = [withStroke(linewidth=1.6, foreground="white")]


def hollow(look: dict[str, Any]) -> dict[str, Any]:
    """Return the look with a hollow mark and no line."""
    return {"color": look["color"], "marker": look["marker"], "markerfacecolor": "white", "linestyle": "none"}


def legend_below(figure: Figure, handles: Sequence[Any], title: str | None = None, columns: int = 6) -> None:
    """Draw one legend for all panels, below them, in as many columns as fit into the figure's width.

    A legend of many lines makes the figure higher instead of its panels lower.
    """
    if not handles:
        return
    renderer = FigureCanvasAgg(figure).get_renderer()
    for shown in range(min(columns, len(handles)), 0, -1):
        found = figure.legend(handles=list(handles), loc="outside lower center", ncols=shown, title=title)
        box = found.get_window_extent(renderer)
        if shown == 1 or box.width < 0.95 * figure.bbox.width:
            break
        found.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + max(box.height / figure.dpi - LEGEND, 0))


def even(values: Sequence[T], most: int) -> list[T]:
    """Return the values; of more than `most`, an even selection from the first to the last."""
    count = min(len(values), most)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def budget_handles(study: Study, budgets: Sequence[float]) -> list[Line2D]:
    """Return legend entries of budgets; of more than ten, an even selection."""
    return [
        Line2D([], [], linestyle="-", label=number(budget), **budget_style(budget, study))
        for budget in even(budgets, 10)
    ]


def size_handles(study: Study, sizes: Sequence[float], linestyle: Any = "-") -> list[Line2D]:
    """Return legend entries of model sizes; of more than twelve, an even selection."""
    return [
        Line2D([], [], linestyle=linestyle, label=short_name(study.names[size]), **size_style(size, study))
        for size in even(sizes, 12)
    ]


def place_labels(axes: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Write each (x, y, text) beside its point, where it covers no mark and no other label; else leave it out.

    Call this when everything else is drawn: places are found in the final layout, which is kept from then on.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    if figure.get_layout_engine() is not None and labels:
        FigureCanvasAgg(figure)
        for _ in range(2):  # the ticks depend on the size of the panels, and the other way round
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
    point, inside = figure.dpi / 72, axes.get_window_extent()
    marks, curves = [], []  # boxes (left, bottom, right, top), and points of lines, in pixels
    for line in axes.get_lines():
        places = axes.transData.transform(line.get_xydata())
        if line.get_marker() in ("None", "none", "", None):
            curves.append(places)
        else:
            radius = (line.get_markersize() / 2 + 0.5) * point
            marks += [np.r_[place - radius, place + radius] for place in places]
    curve, taken = np.concatenate(curves) if curves else np.empty((0, 2)), list(marks)
    high = 1.05 * SMALLEST * point
    for x, y, text in labels:
        place, wide = axes.transData.transform((x, y)), 0.66 * SMALLEST * point * len(text)
        best: tuple[float, Any, Any] | None = None
        for far, (right, up) in itertools.product((4.5, 7.0), ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1))):
            shift = np.array([right * (wide / 2 + (far - 2) * point), up * (high / 2 + far * point)])
            box = np.r_[place + shift - (wide / 2, high / 2), place + shift + (wide / 2, high / 2)]
            off = box[0] < inside.x0 or box[1] < inside.y0 or box[2] > inside.x1 or box[3] > inside.y1
            if off or any((box[:2] < each[2:]).all() and (each[:2] < box[2:]).all() for each in taken):
                continue
            crossed = float(((curve > box[:2]) & (curve < box[2:])).all(1).sum())
            if best is None or crossed < best[0]:
                best = crossed, shift, box
        if best:
            taken.append(best[2])
            axes.annotate(
                text, (x, y), tuple(best[1] / point), textcoords="offset points", ha="center", va="center",
                fontsize=SMALLEST, color="0.2", path_effects=HALO, zorder=6,
            )  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A figure, the table of what it shows, and its caption."""

    figure: Figure
    rows: pd.DataFrame
    caption: str


class NotDrawn(Exception):
    """The runs do not have what the figure shows; the message says what is missing."""
