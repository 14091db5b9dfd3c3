"""`embedscale report`: one HTML page with the recipe first, every figure, the laws, and what the page rests on.

The page holds its figures as data, so it can be sent alone; they also lie beside it as PNG, PDF and CSV. This module
makes the recipes and puts the page together; its tables are in `page/`, and its look is in `templates/`, where jinja2
escapes every text. The price of one file is its size: about 100 kB a figure.
"""

import base64
import shlex
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis import recipe, study
from analysis.advice import evidence
from analysis.page import answers, basis, laws
from analysis.page.table import Terms
from analysis.recipe import Recipe, Row
from analysis.study import Study
from embedscale.files import check_folder, write_atomically
from embedscale.progress import Bar
from embedscale.texts import number

if TYPE_CHECKING:
    from analysis.figures.catalogue import Written

FILE = "report.html"
FOLDER = "figures"
RECALLS = {"recall_at_1": "recall@1", "recall_at_10": "recall@10"}
TWO_COLUMNS = 4.0  # inches of a figure above which it is two columns wide
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
    replaced: bool  # by one that the browser draws, where it can

    @property
    def two_columns(self) -> bool:
        return self.width > TWO_COLUMNS

    @property
    def files(self) -> list[str]:
        return _files(self.name)


def _files(name: str) -> list[str]:
    return [f"{FOLDER}/{name}.{ending}" for ending in ("csv", "pdf", "png")]


# --- What stands beside a recipe, and figures ------------------------------------------------------------------------


def _rests_on(found: Study, asked: Recipe, folder: Path | None) -> Terms:
    """Return how many optima and seeds a recipe rests on, the chance level, and the run that it is nearest to."""
    best, method = asked.best, found.fits.methods[asked.best.method]
    seeds = sorted({point.seeds for point in method.points})
    told = {1: "one seed"}.get(seeds[-1], f"{seeds[-1]} seeds")
    count = len(method.interior)
    of = f"{count} {'optimum' if count == 1 else 'optima'} between sizes, at {len(method.optima)} budgets"
    rows: Terms = [("rests on", f"{of}; {told if len(seeds) == 1 else f'{seeds[0]} to {told}'} a setting")]
    if found.fits.chance:
        rows.append(("chance level", found.fits.chance))
    near = found.table[found.table["run"] == best.run].to_dict("records")
    for run in near[:1]:
        recalls = [
            f"{name} {number(run[key])}" for key, name in RECALLS.items() if run.get(key, np.nan) == run.get(key)
        ]
        rows.append(("nearest run", basis.link(found, str(run["run"]), folder)))
        rows.append(("measured there", ", ".join([f"loss {number(run['loss'], 4)}", *recalls])))
    return rows


def _figures(written: Iterable["Written"], replaced: Sequence[str]) -> list[Shown]:
    """Return the figures for print, first the `replaced` ones, which the browser draws, in their order."""
    found = []
    for each in written:
        if each.png is not None:
            image = base64.b64encode(each.png.read_bytes()).decode()
            found.append(Shown(each.name, each.title, each.caption, image, each.width, each.name in replaced))
    places = {name: place for place, name in enumerate(replaced)}
    return sorted(found, key=lambda each: places.get(each.name, len(places)))


# --- The page and the verb -------------------------------------------------------------------------------------------


def page(
    found: Study,
    written: Sequence["Written"],
    runs: Sequence[Row],
    budgets: Sequence[str] = (),
    folder: Path | None = None,
    given: str = "FITS",
) -> str:
    """Return the page as HTML. `written` are the figures, `runs` the rows of runs.csv, `budgets` asked for first.

    Runs are linked to their directories from `folder`, where the page will lie; without one they are not linked.
    `given` is how the user names the fits, for the commands that the page suggests.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from analysis.page import live  # imports matplotlib

    templates = Environment(
        loader=PackageLoader("analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    fits = found.fits
    drawn = live.figures(written)
    known = answers.answers(fits, runs, budgets)

    def rests_on(found_recipe: Recipe) -> Terms:
        return _rests_on(found, found_recipe, folder)

    return templates.get_template("report.html").render(
        name=Path(fits.source).name,
        fits=fits,
        asked=known.first.limit.text,
        answer=answers.terms(known.first, fits.settings.confidence, rests_on),
        recipes=answers.overview(known),
        may_be_asked=answers.told(known),
        answers=answers.as_data(known, f"embedscale recipe {shlex.quote(given)}", rests_on),
        contents=CONTENTS,
        figures=_figures(written, [name for _, names in drawn for name in names]),
        live=[(each, [(name, _files(name)) for name in names]) for each, names in drawn],
        live_data=live.as_data(found) if drawn else {},
        library=Markup(live.library()) if drawn else "",
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
    folder = Path(args.out) if args.out else Path(args.fits) if Path(args.fits).is_dir() else Path(args.fits).parent
    check_folder(folder, "--out")
    found = study.load(args.fits)
    if args.compare:
        found = replace(found, other=study.load(args.compare))
    from analysis.figures import catalogue  # imports matplotlib, so only once there is something to draw

    _, runs = recipe.read(args.fits)
    with Bar("figures") as bar:
        written = catalogue.write(found, folder / FOLDER, bar.say)
    text = page(found, written, runs, args.budget or [], folder, args.fits)
    write_atomically(folder / FILE, lambda file: file.write(text.encode()))
    missing = sum(each.png is None for each in written)
    print(f"{len(written) - missing} figures as PNG, PDF and CSV: {folder / FOLDER}")
    if missing:
        print(f"not drawn, because the runs do not have what they show: {missing} figures; {FILE} says what each needs")
    for note in recipe.newer_runs(args.fits, runs):
        print(f"note: {note}")
    print(f"written: {folder / FILE}; open it in a browser and type a budget")
    return 0
