"""`embedscale recipe`: what to train for a budget. `advice.recipe` chooses; here are its files, its words and the verb.

A budget is FLOP, or device-hours where the runs say how long they took; the number of tokens may be limited (appendix
D).
"""

import csv
import math
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import fits as fits_file
from analysis.advice.choice import Choice
from analysis.advice.evidence import log_distance, parse_limit
from analysis.advice.recipe import Recipe, Row, recipe
from analysis.columns import FIRST_VERSION
from analysis.fits import Fits
from embedscale.errors import UserError
from embedscale.run.families import hub_name
from embedscale.texts import counted, number, within
from embedscale.values import print_json

if TYPE_CHECKING:
    from analysis.runs import Runs
    from embedscale.run.config import RunConfig

TOLD = ("alpha", "dropout", "targets", "embedding", "blocks", "active_blocks")  # settings printed beside the label
LEAST_SHARE = 0.005  # of a forecast, below which a law is not named
LEAST_CHANCE = 0.01  # of the lowest loss, below which methods are named together


def advise(
    fits: Fits, budget: str | float | None = None, tokens: float | None = None, runs: "Runs | None" = None
) -> Recipe:
    """Return what to train for a budget such as 1e17, "100 PFLOP" or "24 device-hours", with at most `tokens` tokens.

    `runs` are those that were fitted; they tell what other ranks lose. The errors are those of `parse_limit` and
    `recipe`.
    """
    limit = parse_limit(None if budget is None else str(budget), None if tokens is None else str(tokens))
    table = runs.table.astype(object).where(runs.table.notna(), None) if runs else None
    return recipe(fits, limit, [] if table is None else [dict(row) for _, row in table.iterrows()])


def read(folder: str | Path) -> tuple[Fits, list[Row]]:
    """Return a folder's fits, and the rows of the runs.csv beside them (none where it is missing)."""
    fits = fits_file.read(folder)
    path = Path(folder)
    path = (path if path.is_dir() else path.parent) / "runs.csv"
    if not path.exists():
        return fits, []
    fits_file.check_table(fits, path)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = [FIRST_VERSION.get(name, name) for name in reader.fieldnames or ()]
        return fits, list(reader)


def newer_runs(folder: str | Path, runs: Sequence[Row]) -> list[str]:
    """Return a note if runs in a folder ended after its fits were made; `runs` are the rows of the fits' runs.csv."""
    from embedscale.run.directory import RunDirectory

    path = Path(folder)
    fits = path / fits_file.FILE
    if not fits.exists():  # the path of a file of fits
        return []
    made, fitted = fits.stat().st_mtime, {row.get("run") for row in runs}
    records = (RunDirectory(each).record for each in path.iterdir() if each.name not in fitted and each.is_dir())
    newer = sum(record.exists() and record.stat().st_mtime > made for record in records)
    if not newer:
        return []
    return [f"{counted(newer, 'run')} of {folder} ended after these fits were made; run `embedscale fit` again"]


def configuration(folder: str, budget: str, config: str | None, words: Sequence[str]) -> "RunConfig":
    """Return the configuration of a recipe, for `embedscale train --recipe`.

    What the recipe does not say comes from the file CONFIG or, without one, from the configuration of the run whose
    hyper-parameters the recipe has or, where that is missing, of the most similar run. The settings in `words` come
    last. Raises UserError where the folder of the backbone is unknown.
    """
    from embedscale.run.config import RunConfig
    from embedscale.run.settings import read_yaml, structured

    fits, runs = read(folder)
    best = recipe(fits, parse_limit(budget), runs).best
    for note in newer_runs(folder, runs):
        print(f"note: {note}")
    print(f"{best.label}, {best.backbone}, {number(best.budget_flop, 4)} FLOP: expected loss {number(best.loss, 4)}")

    def distance(row: Row) -> tuple[bool, bool, float, float]:
        size = log_distance(float(row["n_parameters"]), best.n_parameters)
        spent = log_distance(float(row["budget_flop"]), best.budget_flop)
        return row.get("run") != best.run, row["method"] != best.method, round(size, 6), spent

    runs.sort(key=distance)
    similar = Path(config) if config else _at_hand(runs)
    values = read_yaml(similar) if similar else {}
    name = _folder(best, runs)
    if not name and any(word.startswith("backbone.name=") for word in words):
        name = best.backbone
    if not name:
        raise UserError(f"--recipe: the folder of {best.backbone!r} is not known; give backbone.name=FOLDER")
    values |= {"budget": best.budget_flop, "method": {"name": best.method} | best.settings}
    if similar and not config:
        values["output"] = str(similar.parent.parent)  # so that the next fit finds this run beside the others
    values["backbone"] = dict(values.get("backbone") or {}) | {"name": name}
    if runs and runs[0].get("backbone_revision"):
        values["backbone"]["revision"] = runs[0]["backbone_revision"]
    values["training"] = dict(values.get("training") or {}) | {"learning_rate": best.learning_rate}
    return structured(RunConfig, values, words, origin=f"{folder}, {budget}")


def _at_hand(rows: Sequence[Row]) -> Path | None:
    """Return the configuration of the first of these runs whose directory is here."""
    from embedscale.run.directory import RunDirectory

    paths = (RunDirectory(row["path"]).config for row in rows if row.get("path"))
    return next((path for path in paths if path.exists()), None)


def _folder(best: Choice, runs: Sequence[Row]) -> str | None:
    """Return where the backbone of a choice lies: as a run of it names it, or on the hub; None if that is unknown."""
    same = [row for row in runs if math.isclose(float(row["n_parameters"]), best.n_parameters, rel_tol=1e-6)]
    own = _at_hand([row for row in same if row.get("backbone") in (None, best.backbone)])
    if own:
        from embedscale.run.settings import load

        return load(own).backbone.name
    return hub_name(best.backbone)


def lines(found: Recipe, confidence: float) -> list[tuple[str, str]]:
    """Return the recipe as names and texts, for the terminal and for the report."""
    best, percent = found.best, f"{100 * confidence:.0f} %"
    size = f"{best.n_parameters:,.0f} parameters"
    rate = "not known: neither from the runs nor from the paper's rule"
    by_law = f", {_rests_on(found)}" if best.measured and best.basis != "best run" else ""
    hours = f", {number(best.gpu_hours)} device-hours" if best.gpu_hours else ""
    told = [
        ("method", ", ".join([best.label, *(f"{key} {best.settings[key]}" for key in TOLD if key in best.settings)])),
        ("model", size if best.backbone.endswith(" parameters") else f"{best.backbone}, {size}"),
        ("best size", within(found.n_opt, found.n_opt_interval, percent, 3, "parameters")),
        ("budget", f"{number(best.budget_flop, 4)} FLOP{hours}"),
        ("data", f"{number(best.tokens)} tokens, about {best.pairs:,.0f} pairs"),
        ("steps", f"{best.steps:,} of {best.batch_size:,} pairs"),
        ("peak learning rate", rate if best.learning_rate is None else number(best.learning_rate)),
        ("expected loss", f"{within(best.loss, best.loss_interval, percent)}, {_rests_on(found, best.measured)}"),
        ("at the best size", within(found.lowest_loss, found.lowest_loss_interval, percent) + by_law),
        ("extrapolates", "; ".join(found.extrapolates) or "no"),
    ]
    if not found.chances:
        told.insert(1, ("lowest loss", "not decided: the noise of a run is not known; give it to fit by --noise"))
    if len(found.chances) > 1:
        told.insert(1, ("lowest loss", _chances(found.chances) + ("" if found.decided else "; not decided")))
    alike = []
    for other in sorted(found.others, key=lambda each: each.lost):
        ends, choice = other.interval, other.choice
        spread = f" ({_percent(ends[0])} … {_percent(ends[1])} %)" if ends else ""
        on = f", {choice.backbone}" if choice and choice.backbone not in other.what else ""
        name = choice.label if choice and other.what == choice.method else other.what
        text = f"{name}{on}: {_percent(other.lost)} % loss{spread}"
        if other.distinguishable is False:
            alike.append(text)
        else:
            told.append(("instead", text))
    if alike:
        told.append(("instead", "not distinguishable: " + "; ".join(alike)))
    return told + [("note", note) for note in found.notes]


def _percent(share: float) -> str:
    """Return a share in percent with its sign; what rounds to zero has none of its own."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def _chances(chances: Mapping[str, float]) -> str:
    """Return the probabilities of the methods; those below 1 % are one phrase."""
    told = [f"{name} {100 * share:.0f} %" for name, share in chances.items() if share >= LEAST_CHANCE]
    rest = [name for name, share in chances.items() if share < LEAST_CHANCE]
    if len(rest) > 1:
        return ", ".join([*told, f"{len(rest)} others below 1 % each"])
    return ", ".join([*told, *(f"{name} below 1 %" for name in rest)])


def _rests_on(found: Recipe, measured: bool = False) -> str:
    """Return in words what a loss rests on."""
    if measured and found.best.basis != "best run":
        return "as measured"
    if not found.laws:
        return f"by the {found.best.basis}"
    shares = [each for each in sorted(found.laws.items(), key=lambda each: -each[1]) if each[1] >= LEAST_SHARE]
    if len(shares) == 1:
        return f"by the {shares[0][0]}"
    return "by " + ", ".join(f"{100 * share:.0f} % {name}" for name, share in shares)


def command(args: Namespace) -> int:
    """Run `embedscale recipe FITS BUDGET`: print what to train."""
    limit = parse_limit(" ".join(args.budget) or None, args.tokens)
    fits, runs = read(args.fits)
    found = recipe(fits, limit, runs)
    found = replace(found, notes=newer_runs(args.fits, runs) + found.notes)
    if args.json:
        print_json(found)
        return 0
    print(f"recipe for {limit.text}")
    for name, text in lines(found, fits.settings.confidence):
        print(f"  {name + ':':20}{text}")
    if limit.flop and not limit.tokens and _folder(found.best, runs):
        budget, fits_given = (shlex.quote(text) for text in (" ".join(args.budget), args.fits))
        print(f"\ntrain it: embedscale train --fits {fits_given} --recipe {budget}")
    return 0
