"""What the figures in the browser show: the best size, the profiles, the frontier and the loss curves, as numbers.

The page draws them with plotly.js, which goes into the page, so that nothing comes from a network. They show what the
figures for print show that they stand for, and each run besides. Rows of the table of runs say what a run is, so the
page holds that once. The price: 1.2 MB a page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from analysis.columns import HYPERPARAMETERS
from analysis.figures import style
from analysis.figures.optima import bowl, line_band, line_budgets
from analysis.fits import Interval, Optimum, PowerLaw
from analysis.fitting.laws import Array
from analysis.study import Study
from embedscale.texts import number, within

if TYPE_CHECKING:
    from analysis.figures.catalogue import Written

DIGITS = 5  # significant digits of a number
MOST_RUNS = 4000  # above which only the best run of each method, size and budget is shown
SYMBOLS = {"o": "circle", "^": "triangle-up", "D": "diamond", "s": "square", "v": "triangle-down", "P": "cross"}
SYMBOLS |= {"X": "x", "*": "star", "<": "triangle-left", ">": "triangle-right", "h": "hexagon", "p": "pentagon"}
SYMBOLS |= {"d": "diamond-tall", "8": "octagon", "H": "hexagon2"}
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


@dataclass(frozen=True)
class Live:
    """A figure in the browser. `prints` are the figures for print that it stands for."""

    name: str
    title: str
    caption: str
    prints: tuple[str, ...]  # beginnings of their names


FIGURES = (
    Live(
        "size",
        "Best size against budget",
        "The compute-optimal size N* of each budget, with its interval, and the power law through the optima between "
        "sizes. Hollow marks are no optima. Small marks are runs. Drag to zoom; a double click zooms out.",
        ("figure_06_size", "figure_13_size", "size_other"),
    ),
    Live(
        "profiles",
        "Loss against size",
        "IsoFLOP profiles: a colour for each budget, a mark for each method. Full marks are the best run of a size; "
        "lines are the parabolas, and stars their minima.",
        ("figure_02_isoflop", "figure_04_isoflop", "isoflop_other"),
    ),
    Live(
        "frontier",
        "Lowest loss against budget",
        "The lowest loss of each method at each budget, with its interval, and the power law through the optima "
        "between sizes. Hollow marks are no optima. Small marks are runs.",
        ("figure_01_frontier",),
    ),
    Live(
        "curves",
        "Loss during training",
        "The held-out loss of the best run of each size and budget against the FLOP it had spent.",
        ("loss_curves",),
    ),
)


def figures(written: Sequence["Written"]) -> list[tuple[Live, list[str]]]:
    """Return the figures that the browser can draw, with the names of the figures for print that each stands for."""
    drawn = [each.name for each in written if each.png is not None]
    found = [(live, [name for name in drawn if name.startswith(live.prints)]) for live in FIGURES]
    return [(live, names) for live, names in found if names]


def library() -> str:
    """Return the code of plotly.js."""
    return (resources.files("analysis") / "vendor" / "plotly" / "plotly-basic.min.js").read_text("utf-8")


# --- Numbers ---------------------------------------------------------------------------------------------------------


def _short(values: Sequence[float] | Array) -> list[float | None]:
    """Return numbers with few digits; none where one is not finite."""
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values]


def as_data(study: Study) -> dict[str, Any]:
    """Return everything that the figures show. Methods and budgets are named by their places in their lists."""
    confidence, fits = study.fits.settings.percent, study.fits.methods
    rows = _runs(study)
    runs = {name: place for place, name in enumerate(study.table["run"])} if "run" in study.table else {}
    return {
        "methods": [_method(study, name) for name in study.methods],
        "budgets": [
            {"text": number(budget), "color": to_hex(style.budget_style(budget, study)["color"])}
            for budget in study.budgets
        ],
        "runs": rows,
        "optima": [
            _optimum(study, i, row, confidence)
            for i, name in enumerate(study.methods)
            for row in fits[name].optima
            if row.best
        ],
        "bowls": [each for i, name in enumerate(study.methods) for each in _bowls(study, i, name)],
        "lines": {
            what: [
                _line(study, i, law, [row.budget_flop for row in fits[name].interior])
                for i, name in enumerate(study.methods)
                if (law := getattr(fits[name].power_laws, quantity))
            ]
            for what, quantity in (("size", "n_opt"), ("frontier", "loss"))
        },
        "curves": _curves(study, runs),
        "same": _same(study),
    }


def _method(study: Study, name: str) -> dict[str, str]:
    look = style.method_style(name, study.methods)
    marks = {"color": to_hex(look["color"]), "symbol": SYMBOLS[look["marker"]], "dash": DASHES[look["linestyle"]]}
    return {"name": style.label(name)} | marks


def _budget(study: Study, budget: float) -> int:
    """Return the place of the budget that a run belongs to."""
    return int(np.abs(np.log(np.asarray(study.budgets) / budget)).argmin())


def _runs(study: Study) -> dict[str, list[Any]]:
    """Return the columns of the runs: place in the table, method, budget, size, loss, and whether it is the best."""
    table = study.table.reset_index(drop=True)
    place = {name: i for i, name in enumerate(study.methods)}
    budgets = [_budget(study, budget) for budget in table["budget_flop"]]
    found = table.assign(row=table.index, place=table["method"].map(place), budget=budgets)
    lowest = found.groupby(["place", "budget", "n_parameters"])["loss"].transform("min")
    found = found.assign(best=found["loss"] == lowest)
    if len(found) > MOST_RUNS:
        found = found[found["best"]]
    return {
        "row": found["row"].tolist(),
        "method": found["place"].tolist(),
        "budget": found["budget"].tolist(),
        "flop": _short(found["budget_flop"].to_numpy(float)),
        "size": _short(found["n_parameters"].to_numpy(float)),
        "loss": _short(found["loss"].to_numpy(float)),
        "best": found["best"].astype(int).tolist(),
    }


def _ends(ends: Interval | None) -> list[float | None] | None:
    return _short(ends) if ends else None


def _optimum(study: Study, method: int, row: Optimum, percent: str) -> dict[str, Any]:
    assert row.best
    own = row.interior and row.n_opt
    size, loss = (row.n_opt, row.loss) if own else (row.best.n_parameters, row.lowest_loss)
    assert size is not None and loss is not None
    told = [f"{number(row.budget_flop)} FLOP: {row.state}", f"N* {within(size, row.n_opt_interval, percent, 3)}"]
    told.append(f"loss {within(loss, row.loss_interval, percent)}")
    return {
        "method": method,
        "budget": _budget(study, row.budget_flop),
        "flop": _short([row.budget_flop])[0],
        "size": _short([size])[0],
        "size_ends": _ends(row.n_opt_interval),
        "loss": _short([loss])[0],
        "loss_ends": _ends(row.loss_interval),
        "interior": bool(own),
        "told": told if own else [told[0], f"best run: {number(size)} parameters, loss {number(loss, 4)}"],
    }


def _bowls(study: Study, method: int, name: str) -> list[dict[str, Any]]:
    found = []
    for row in study.fits.methods[name].optima:
        points = study.profile(name, row.budget_flop)
        if row.interior and row.curve and row.parabola and not points.empty:
            size, loss = bowl(study, points, row)
            place = {"method": method, "budget": _budget(study, row.budget_flop)}
            found.append(place | {"size": _short(size[::3]), "loss": _short(loss[::3])})
    return found


def _line(study: Study, method: int, law: PowerLaw, inside: Sequence[float]) -> dict[str, Any]:
    budgets = line_budgets(law, study, inside)
    value, band = line_band(law, budgets, study.fits.settings.confidence)
    low, high = (None, None) if band is None else (_short(each) for each in band)
    return {"method": method, "flop": _short(budgets), "value": _short(value), "low": low, "high": high}


def _curves(study: Study, runs: Mapping[str, int]) -> list[dict[str, Any]]:
    if study.curves.empty:
        return []
    held_out = study.curves.dropna(subset=["loss"])
    place = {name: i for i, name in enumerate(study.methods)}
    return [
        {"row": runs[str(run)], "method": place[str(rows["method"].iloc[0])]}
        | {"budget": _budget(study, float(rows["budget_flop"].iloc[0]))}
        | {"flop": _short(rows["spent_flop"].to_numpy(float)), "loss": _short(rows["loss"].to_numpy(float))}
        for run, rows in held_out.groupby("run", sort=False)
        if str(run) in runs
    ]


def _same(study: Study) -> str:
    """Return the settings that all runs share, as a text."""
    table, found = study.table, []
    for name in HYPERPARAMETERS:
        if name in table and table[name].notna().all() and table[name].nunique() == 1:
            value: Any = table[name].iloc[0]
            told = number(float(value), 4) if isinstance(value, float) and not pd.isna(value) else str(value)
            found.append(f"{name.replace('_', ' ')} {told}")
    return ", ".join(found)
