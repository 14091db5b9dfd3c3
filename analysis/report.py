"""`embedscale report`: one HTML page with the recipe first, every figure, the laws, and what the page rests on.

The page holds its figures as data, so it can be sent alone; they also lie beside it as PNG, PDF and CSV. This module
makes the recipes and puts the page together; its tables are in `page/`, and its look is in `templates/`, where jinja2
escapes every text. The price of one file is its size: about 100 kB a figure.
"""

import base64
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis import recipe, study
from analysis.advice import evidence
from analysis.advice.evidence import Limit
from analysis.fits import Fits
from analysis.page import basis, laws
from analysis.page.table import Table, Terms
from analysis.recipe import Recipe, Row
from analysis.study import Study
from embedscale.errors import UserError
from embedscale.files import write_atomically
from embedscale.progress import Bar
from embedscale.texts import measured, number

if TYPE_CHECKING:
    from analysis.figures.catalogue import Written

FILE = "report.html"
FOLDER = "figures"
RECALLS = {"recall_at_1": "recall@1", "recall_at_10": "recall@10"}
MANY_BUDGETS = 8  # above which recipes are given for SOME_BUDGETS between the smallest and the largest
SOME_BUDGETS = 6
FARTHER = 4  # the last recipe's budget / the largest budget that was run
TWO_COLUMNS = 4.0  # inches of a figure above which it is two columns wide
SHOWN_DPI = 125  # pixels of the page for an inch of the print
CONTENTS = (
    ("figures", "Figures"),
    ("laws", "Laws"),
    ("runs", "Runs"),
    ("left-out", "What was left out"),
    ("notes", "Notes"),
    ("settings", "Settings"),
    ("costs", "Costs"),
    ("checklist", "Reproducibility"),
    ("glossary", "Glossary"),
)


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
                number(found.n_opt),
                number(best.tokens),
                f"{best.pairs:,.0f}",
                f"{best.steps:,}",
                number(best.learning_rate, 2),
                "{} ({})".format(*measured(best.loss, best.loss_interval)),
                f"{rival.what}: +{100 * rival.lost:.1f} %" if rival else "–",
                "; ".join(found.extrapolates) or "no",
            ]
        )
    return first, Table("Every budget", columns, rows)


def _rests_on(found: Study, asked: Recipe, folder: Path | None) -> Terms:
    """Return how many optima and seeds a recipe rests on, the chance level, and the run that it is nearest to."""
    best, method = asked.best, found.fits.methods[asked.best.method]
    seeds = sorted({point.seeds for point in method.points})
    told = {1: "one seed"}.get(seeds[-1], f"{seeds[-1]} seeds")
    count = len(method.interior)
    of = f"{count} {'optimum' if count == 1 else 'optima'} between sizes, at {len(method.optima)} budgets"
    rows: Terms = [("rests on", f"{of}; {told if len(seeds) == 1 else f'{seeds[0]} to {told}'} a setting")]
    if basis.chance(found.fits):
        rows.append(("chance level", basis.chance(found.fits)))
    near = found.table[found.table["run"] == best.run].to_dict("records")
    for run in near[:1]:
        recalls = [
            f"{name} {number(run[key])}" for key, name in RECALLS.items() if run.get(key, np.nan) == run.get(key)
        ]
        rows.append(("nearest run", basis.link(found, str(run["run"]), folder)))
        rows.append(("measured there", ", ".join([f"loss {number(run['loss'], 4)}", *recalls])))
    return rows


def _figures(written: Iterable["Written"]) -> list[Shown]:
    found = []
    for each in written:
        if each.png is not None:
            image = base64.b64encode(each.png.read_bytes()).decode()
            found.append(Shown(each.name, each.title, each.caption, image, each.width))
    return found


# --- The page and the verb -------------------------------------------------------------------------------------------


def page(
    found: Study,
    written: Sequence["Written"],
    runs: Sequence[Row],
    budgets: Sequence[str] = (),
    folder: Path | None = None,
) -> str:
    """Return the page as HTML. `written` are the figures, `runs` the rows of runs.csv, `budgets` asked for first.

    Runs are linked to their directories from `folder`, where the page will lie; without one they are not linked.
    """
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
        rests_on=_rests_on(found, asked, folder) if asked else [],
        recipes=recipes,
        contents=CONTENTS,
        figures=_figures(written),
        laws=laws.laws(found),
        runs=basis.runs(found, folder),
        chosen=basis.chosen(found),
        reasons=basis.reasons(found),
        left_out=basis.left_out(found),
        missing=basis.missing(written),
        settings=basis.settings(found),
        costs=basis.costs(found),
        checklist=basis.checklist(found),
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
    text = page(found, written, runs, args.budget or [], folder)
    write_atomically(folder / FILE, lambda file: file.write(text.encode()))
    missing = sum(each.png is None for each in written)
    print(f"{len(written) - missing} figures as PNG, PDF and CSV: {folder / FOLDER}")
    if missing:
        print(f"not drawn, because the runs do not have what they show: {missing} figures; {FILE} says what each needs")
    if found.fits.miniature:
        print(f"note: {found.fits.miniature}")
    print(f"written: {folder / FILE}")
    return 0
