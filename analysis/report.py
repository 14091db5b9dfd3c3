"""`embedscale report`: one HTML page with the recipe first, every figure, the laws, and what the page rests on.

The page holds its figures as data, so it can be sent alone; they also lie beside it as PNG, PDF and CSV. This module
collects what the page shows; how it looks is in `templates/`, where jinja2 escapes every text. The price of one file is
its size: about 100 kB a figure.
"""

import base64
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import recipe, study
from analysis.advice import evidence
from analysis.advice.evidence import Limit
from analysis.columns import EXCLUDED, HYPERPARAMETERS
from analysis.fits import Fits
from analysis.fitting.laws import LAWS
from analysis.recipe import Recipe, Row
from analysis.study import Study
from analysis.summary import SIGNS
from embedscale.errors import UserError
from embedscale.files import write_atomically
from embedscale.progress import Bar
from embedscale.texts import number, spread

if TYPE_CHECKING:
    from analysis.figures.catalogue import Written

FILE = "report.html"
FOLDER = "figures"
MANY_BUDGETS = 8  # above which recipes are given for SOME_BUDGETS between the smallest and the largest
SOME_BUDGETS = 6
FARTHER = 4  # the last recipe's budget / the largest budget that was run
SHOWN_OPTIMA = 80  # above which budgets with too few sizes are not listed
SHOWN_COMPARISONS = 20  # budgets above which methods are not compared at each
SHOWN_ROWS = 60  # of the runs left out; all of them are in excluded.csv
TWO_COLUMNS = 4.0  # inches of a figure above which it is two columns wide
SHOWN_DPI = 125  # pixels of the page for an inch of the print
CONTENTS = (
    ("figures", "Figures"),
    ("laws", "Laws"),
    ("left-out", "What was left out"),
    ("notes", "Notes"),
    ("settings", "Settings"),
    ("costs", "Costs"),
    ("checklist", "Reproducibility"),
)
Terms = list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table of the page; `more` stands below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    more: str = ""


@dataclass(frozen=True)
class Shown:
    """A figure of the page."""

    name: str
    title: str
    caption: str
    image: str  # PNG, base64
    width: float  # inches

    @property
    def two_columns(self) -> bool:
        return self.width > TWO_COLUMNS

    @property
    def shown_width(self) -> int:
        return round(self.width * SHOWN_DPI)

    @property
    def files(self) -> list[str]:
        return [f"{FOLDER}/{self.name}.{ending}" for ending in ("csv", "pdf", "png")]


# --- Recipes and figures ---------------------------------------------------------------------------------------------


def _recipes(fits: Fits, runs: Sequence[Row], budgets: Sequence[str]) -> tuple[Recipe | None, Table]:
    """Return the recipe that is shown in full, the first of `budgets` or the largest that was run, and all recipes."""
    every = list(fits.runs.budgets)
    if len(every) > MANY_BUDGETS:
        every = np.geomspace(every[0], every[-1], SOME_BUDGETS).tolist()
    asked = [evidence.parse_limit(budget) for budget in budgets]
    limits = asked + [Limit(flop=budget) for budget in [*every, FARTHER * every[-1]]]
    full = asked[0] if asked else limits[-2]
    columns = ["budget (FLOP)", "method", "model", "best size", "tokens", "pairs", "steps", "peak rate"]
    columns += [f"expected loss ({fits.settings.percent})", "next best loses", "extrapolates"]
    rows, first, known = [], None, evidence.gather(fits)
    for limit in limits:
        try:
            found = recipe.recipe(fits, limit, runs, known)
        except UserError as error:
            rows.append([limit.text, str(error), *[""] * (len(columns) - 2)])
            continue
        if limit is full:
            first = found
        best = found.best
        rival = min((each for each in found.others if each.lost > 0), key=lambda each: each.lost, default=None)
        rows.append(
            [
                limit.text.removesuffix(" FLOP"),
                best.label,
                best.backbone,
                f"{found.n_opt:.3g}",
                f"{best.tokens:.3g}",
                f"{best.pairs:,.0f}",
                f"{best.steps:,}",
                number(best.learning_rate, 2),
                f"{best.loss:.4g} ({spread(best.loss_interval, 4)})",
                f"{rival.what}: +{100 * rival.lost:.1f} %" if rival else "–",
                "; ".join(found.extrapolates) or "no",
            ]
        )
    return first, Table("Every budget", columns, rows)


def _figures(written: Iterable["Written"]) -> list[Shown]:
    found = []
    for each in written:
        if each.png is not None:
            image = base64.b64encode(each.png.read_bytes()).decode()
            found.append(Shown(each.name, each.title, each.caption, image, each.width))
    return found


# --- Laws ------------------------------------------------------------------------------------------------------------


def _laws(fits: Fits) -> list[Table]:
    percent = fits.settings.percent
    return [
        Table(
            "Power laws of the optima",
            ["method", "law", "a", percent, "k", percent, "a, weighted", "optima"],
            _power_laws(fits),
        ),
        Table("Joint laws", ["method", "law", "coefficient", "value", percent, "fit"], _joint_laws(fits)),
        Table("Held out", ["method", "without", "law", "predicted", "found", "error", "bias"], _held_out(fits)),
        Table(
            "Where the best method changes",
            ["up to", "from", "budget (FLOP)", percent],
            [
                [each.below, each.above, number(each.budget_flop), spread(each.interval)]
                for each in fits.frontier.crossings
            ],
        ),
        Table("Methods compared", ["budget", "a", "b", "loss of a over b", "distinguishable"], _compared(fits)),
        Table(
            "Optima",
            ["method", "budget", "state", "N*", percent, "D*", "loss", percent, "N*, Akima", "N*, law", "why"],
            _optima(fits),
        ),
    ]


def _power_laws(fits: Fits) -> Sequence[Sequence[object]]:
    rows = []
    for name, method in fits.methods.items():
        for quantity, sign in SIGNS.items():
            law = getattr(method.power_laws, quantity)
            if law:
                exponent = number(law.exponent, 4), spread(law.exponent_interval)
                coefficient = number(law.coefficient, 4), spread(law.coefficient_interval)
                weighted = number(law.weighted.exponent if law.weighted else None, 4)
                rows.append([name, f"{sign} = k C^a", *exponent, *coefficient, weighted, law.points])
    return rows


def _joint_laws(fits: Fits) -> Sequence[Sequence[object]]:
    rows = []
    for name, method in fits.methods.items():
        for law in LAWS:
            if law in method.refused:
                rows.append([name, law, "none", method.refused[law], "", ""])
            if law not in method.joint_laws:
                continue
            fitted = method.joint_laws[law]
            done = fitted.convergence
            told = f"{done.agreeing} of {done.starts} starts agree, spread of ln L {number(fitted.log_residual, 2)}"
            for coefficient, ends in fitted.intervals.items():
                value, within = number(fitted.coefficients[coefficient], 4), spread(ends)
                if coefficient in fitted.not_fixed:
                    value, within = "not fixed by the data", ""
                rows.append([name, law, coefficient, value, within, told])
                told = ""
    return rows


def _held_out(fits: Fits) -> Sequence[Sequence[object]]:
    return [
        [
            name,
            f"{row.left_out} {number(row.value)}",
            row.law,
            number(row.predicted, 4),
            number(row.found, 4),
            f"{100 * row.error:.2f} %",
            f"{100 * row.bias:+.2f} %",
        ]
        for name, method in fits.methods.items()
        for row in method.hold_out
    ]


def _compared(fits: Fits) -> Sequence[Sequence[object]]:
    if len(fits.runs.budgets) > SHOWN_COMPARISONS:
        return []
    words = {True: "yes", False: "no", None: "unknown"}
    return [
        [
            number(each.budget_flop),
            each.a,
            each.b,
            f"{100 * np.expm1(each.difference):+.2f} %",
            words[each.distinguishable],
        ]
        for each in fits.frontier.comparisons
    ]


def _optima(fits: Fits) -> Sequence[Sequence[object]]:
    every = [(name, row) for name, method in fits.methods.items() for row in method.optima]
    return [
        [name, number(row.budget_flop), row.state, number(row.n_opt), spread(row.n_opt_interval)]
        + [number(row.d_opt), number(row.loss, 4), spread(row.loss_interval, 4)]
        + [number(each.n_opt if each else None) for each in (row.akima, row.law)]
        + [row.why]
        for name, row in every
        if len(every) <= SHOWN_OPTIMA or row.state != "too few"
    ]


# --- What the page rests on ------------------------------------------------------------------------------------------


def _reasons(found: Study) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in found.excluded["reason"].value_counts().items())


def _left_out(found: Study) -> Table:
    rows = found.excluded.head(SHOWN_ROWS).fillna("").to_numpy().tolist()
    more = len(found.excluded) - len(rows)
    return Table("", EXCLUDED, rows, f"and {more} more, in excluded.csv" if more > 0 else "")


def _missing(written: Iterable["Written"]) -> Table:
    rows = [[each.title, each.missing] for each in written if each.missing]
    return Table("Figures that could not be drawn", ["figure", "why"], rows)


def _distinct(table: pd.DataFrame, name: str, most: int = 8) -> str:
    """Return the distinct values of a column as a text; empty where there are none."""
    if name not in table or table[name].isna().all():
        return ""
    values = sorted(table[name].dropna().unique())
    told = ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values[:most])
    return told + (f", … ({len(values)} values)" if len(values) > most else "")


def _settings(found: Study) -> Terms:
    fits = found.fits
    rows = [(f"fit: {name}", str(value)) for name, value in fits.settings.to_json().items()]
    rows += [(f"same for all: {name}", f"{value}") for name, value in fits.comparable.items()]
    rows += [(f"varied or fixed: {name}", _distinct(found.table, name)) for name in HYPERPARAMETERS]
    return [(name, value) for name, value in rows if value]


def _costs(found: Study) -> Table:
    table, rows = found.table, []
    for method in [*found.methods, None]:
        part = table if method is None else table[table["method"] == method]
        row: list[object] = [method or "all", len(part)]
        for name in ("budget_flop", "spent_flop", "spent_flop_exact", "tokens", "gpu_hours"):
            known = name in part and part[name].notna().any()
            row.append(f"{part[name].sum():.4g}" if known else "not recorded")
        rows.append(row)
    columns = ["method", "runs", "budgets (FLOP)", "spent (FLOP, paper)", "spent (FLOP, exact)", "tokens", "GPU-hours"]
    return Table("", columns, rows, "Of the used runs only; runs that were left out are not counted.")


def _checklist(found: Study) -> Table:
    """Return what a reader needs to repeat the work, each with its answer or "not recorded"."""
    fits, table = found.fits, found.table
    settings, same, noise = fits.settings, fits.comparable, fits.noise
    seeds = table["seed"].nunique() if "seed" in table and table["seed"].notna().any() else 0
    starts = {law.convergence.starts for method in fits.methods.values() for law in method.joint_laws.values()}
    evaluation = [f"{name.split('.')[1]} {value}" for name, value in same.items() if name.startswith("evaluation.")]
    varied = [name for name in HYPERPARAMETERS if name in table and table[name].nunique() > 1]
    schedule = [f"{name} {_distinct(table, name)}" for name in ("warmup_fraction", "final_fraction") if name in table]
    answers = [
        ("Form of the laws", "; ".join(["N*, D*, L* = k C^a", *(f"{law.symbol} = {law.formula}" for law in
         LAWS.values() if law.needs_fraction or law.name == settings.law)])),
        ("N", "parameters of the backbone without the token embedding"),
        ("D", "tokens of queries and positives that were processed, without padding"),
        ("C", "2 (N_F + N_B + N_U) D, the paper's convention; budgets group the runs"),
        ("Loss", "contrastive, held out, in nats; " + ", ".join(evaluation) if evaluation else ""),
        ("Data", _distinct(table, "data_digest") or _distinct(table, "data")),
        ("Batch size and context", ", ".join(f"{same[name]:g}" for name in ("batch_size", "context") if name in same)),
        ("Which checkpoints", "the end of a finished schedule only; unfinished runs are left out"),
        ("Learning rates", _distinct(table, "learning_rate")),
        ("Schedule", "; ".join(schedule)),
        ("Hyper-parameters compared", ", ".join(varied) or "none: one value each"),
        ("Seeds", f"{seeds}" if seeds else ""),
        ("Noise of ln L", f"{number(noise.log_loss)}, from {noise.told}" if noise.log_loss else ""),
        ("Fit", f"residual {settings.residual}, δ {settings.delta:g}, "
         f"{', '.join(map(str, sorted(starts))) or 'no'} starts; "
         f"optima by {settings.optimum}, window {settings.window:g}"),
        ("Intervals", f"{settings.percent} percentile, {settings.bootstrap} draws, seed {settings.seed}"),
        ("Left out", _reasons(found) or "nothing"),
        ("Hardware", _distinct(table, "device")),
        ("Precision", _distinct(table, "precision")),
        ("Code of the runs", "; ".join(found.code)),
        ("Code of the fits", f"embedscale {fits.version}, {fits.made}"),
        ("Every run", "runs.csv and excluded.csv beside this page; the values of each figure are in its own CSV"),
    ]  # fmt: skip
    rows = [("✓" if answer else "✗", question, answer or "not recorded by these runs") for question, answer in answers]
    return Table("", ["", "what", "here"], rows)


# --- The page and the verb -------------------------------------------------------------------------------------------


def page(found: Study, written: Sequence["Written"], runs: Sequence[Row], budgets: Sequence[str] = ()) -> str:
    """Return the page as HTML. `written` are the figures, `runs` the rows of runs.csv, `budgets` asked for first."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    fits = found.fits
    asked, recipes = _recipes(fits, runs, budgets)
    return templates.get_template("report.html").render(
        name=Path(fits.source).name,
        fits=fits,
        asked=asked,
        asked_lines=recipe.lines(asked, fits.settings.confidence) if asked else [],
        recipes=recipes,
        contents=CONTENTS,
        figures=_figures(written),
        laws=_laws(fits),
        reasons=_reasons(found),
        left_out=_left_out(found),
        missing=_missing(written),
        settings=_settings(found),
        costs=_costs(found),
        checklist=_checklist(found),
    )


def command(args: Namespace) -> int:
    """Run `embedscale report FITS`: write report.html and the figures."""
    for budget in args.budget or []:
        evidence.parse_limit(budget)
    found = study.load(args.fits)
    if args.compare:
        found = replace(found, other=study.load(args.compare))
    from analysis.figures import catalogue  # imports matplotlib, so only once there is something to draw

    _, runs = recipe.read(args.fits)
    folder = Path(args.out) if args.out else Path(args.fits) if Path(args.fits).is_dir() else Path(args.fits).parent
    with Bar("figures") as bar:
        written = catalogue.write(found, folder / FOLDER, bar.say)
    text = page(found, written, runs, args.budget or [])
    write_atomically(folder / FILE, lambda file: file.write(text.encode()))
    missing = sum(each.png is None for each in written)
    print(f"{len(written) - missing} figures as PNG, PDF and CSV: {folder / FOLDER}")
    if missing:
        print(f"not drawn, because the runs do not have what they show: {missing} figures; {FILE} says what each needs")
    if found.fits.miniature:
        print(f"note: {found.fits.miniature}")
    print(f"written: {folder / FILE}")
    return 0
