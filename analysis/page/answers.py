"""The recipes of the page: one for each budget of a grid, so that the page can answer a reader who types a budget.

Every answer comes from the function that `embedscale recipe` calls, as the texts that it prints, so the two cannot
contradict each other. For a budget between two of the grid the page shows the answer for the nearest one, and says so.
The price: such an answer is for up to 12 % more or less FLOP, and the report takes a fifth longer.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.advice import evidence
from analysis.advice.evidence import MOST, Evidence, Limit
from analysis.advice.recipe import Recipe, Row, recipe
from analysis.columns import FLOP
from analysis.fits import Fits
from analysis.page.table import Link, Table, Terms
from analysis.recipe import lines
from embedscale.errors import UserError
from embedscale.texts import measured, number

STEPS = (1, 1.2, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)  # budgets of each decade of FLOP
FEW_STEPS = (1, 1.5, 2, 3, 5, 7)  # of device-hours, whose recipes take ten times as long
BELOW, ABOVE = 10.0, 1000.0  # the grid's ends, as factors of the smallest and the largest budget that was run
ABOVE_HOURS = 100.0  # the same of device-hours
MANY_BUDGETS = 8  # above which the table and the grid have an even selection of the budgets that were run
SOME_BUDGETS = 6
FARTHER = 4  # the last budget of the table / the largest budget that was run


@dataclass(frozen=True)
class Answer:
    """A recipe, or the words in which there is none."""

    limit: Limit
    recipe: Recipe | None
    refused: str = ""


@dataclass(frozen=True)
class Answers:
    """What the page knows: answers by limit. `first` is shown at the beginning, `table` are those of the table."""

    fits: Fits
    first: Answer
    table: Sequence[Answer]
    every: Mapping[Limit, Answer]


def answers(fits: Fits, runs: Sequence[Row], budgets: Sequence[str]) -> Answers:
    """Return the recipes for `budgets`, for those that were run, and for the grid between and around them.

    The first of `budgets`, or the largest that was run, is shown at the beginning. Raises UserError for a budget that
    is no amount.
    """
    known = evidence.gather(fits)
    own = _some(fits.runs.budgets)
    asked = [evidence.parse_limit(budget) for budget in budgets]
    table = [*asked, *(Limit(flop=budget) for budget in [*own, FARTHER * own[-1]])]
    flop = _grid(own[0] / BELOW, min(own[-1] * ABOVE, MOST), STEPS)
    hours = _hours(known.values(), own)
    limits = [*table, *(Limit(flop=each) for each in flop), *(Limit(gpu_hours=each) for each in hours)]
    every = {limit: _answer(fits, limit, runs, known) for limit in dict.fromkeys(limits)}
    shown = [every[limit] for limit in table]
    return Answers(fits, shown[0] if asked else shown[-2], shown, every)


def _answer(fits: Fits, limit: Limit, runs: Sequence[Row], known: Mapping[str, Evidence]) -> Answer:
    try:
        return Answer(limit, recipe(fits, limit, runs, known))
    except UserError as error:
        return Answer(limit, None, str(error))


def _some(budgets: Sequence[float]) -> list[float]:
    """Return the budgets; of many, an even selection from the smallest to the largest."""
    if len(budgets) <= MANY_BUDGETS:
        return list(budgets)
    return [float(each) for each in np.geomspace(budgets[0], budgets[-1], SOME_BUDGETS)]


def _grid(low: float, high: float, steps: Sequence[float]) -> list[float]:
    """Return the round numbers from `low` to `high`, as many a decade as there are steps."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [value for decade in decades for step in steps if low <= (value := float(f"{step}e{decade}")) <= high]


def _hours(known: Iterable[Evidence], budgets: Sequence[float]) -> list[float]:
    """Return the grid of device-hours; empty where no run says how many it took."""
    rates = [rates for each in known if (rates := each.rate(each.sizes)) is not None]
    if not rates:
        return []
    fastest, slowest = (float(end(np.concatenate(rates))) for end in (np.max, np.min))
    return _grid(budgets[0] / fastest, ABOVE_HOURS * budgets[-1] / slowest, FEW_STEPS)


# --- As the page shows them ------------------------------------------------------------------------------------------


def overview(found: Answers) -> Table:
    """Return the table of one recipe a row."""
    columns = ["budget (FLOP)", "method", "model", "best size", "tokens", "pairs", "steps", "peak rate"]
    columns += [f"expected loss ({found.fits.settings.percent})", "next best loses", "extrapolates"]
    rows = []
    for answer in found.table:
        if answer.recipe is None:
            rows.append([answer.limit.text, answer.refused, *[""] * (len(columns) - 2)])
            continue
        best = answer.recipe.best
        others = [each for each in answer.recipe.others if each.lost > 0]
        rival = min(others, key=lambda each: each.lost, default=None)
        rows.append(
            [
                answer.limit.text.removesuffix(" FLOP"),
                best.label,
                best.backbone,
                number(answer.recipe.n_opt),
                number(best.tokens),
                f"{best.pairs:,.0f}",
                f"{best.steps:,}",
                number(best.learning_rate, 2),
                "{} ({})".format(*measured(best.loss, best.loss_interval)),
                f"{rival.what}: +{100 * rival.lost:.1f} %" if rival else "–",
                "; ".join(answer.recipe.extrapolates) or "no",
            ]
        )
    return Table("Every budget", columns, rows)


def terms(answer: Answer, confidence: float, rests_on: Callable[[Recipe], Terms]) -> Terms:
    """Return an answer as names and texts; `rests_on` says what a recipe rests on."""
    if answer.recipe is None:
        return [("no recipe", answer.refused)]
    return [*lines(answer.recipe, confidence), *rests_on(answer.recipe)]


def as_data(found: Answers, command: str, rests_on: Callable[[Recipe], Terms]) -> dict[str, Any]:
    """Return what the page's script needs: the answers by kind of budget, the units, and the command for others."""
    confidence = found.fits.settings.confidence

    def row(answer: Answer) -> dict[str, Any]:
        told = [
            [name, text.text, text.address] if isinstance(text, Link) else [name, str(text)]
            for name, text in terms(answer, confidence, rests_on)
        ]
        limit, best = answer.limit, answer.recipe and answer.recipe.best
        choice = f"{best.label}, {best.backbone}" if best else "no recipe"
        return {"at": limit.flop or limit.gpu_hours, "text": limit.text, "choice": choice, "terms": told}

    every = sorted(found.every.values(), key=lambda answer: answer.limit.flop or answer.limit.gpu_hours or 0.0)
    flop, hours = [each for each in every if each.limit.flop], [each for each in every if each.limit.gpu_hours]
    return {
        "units": FLOP,
        "hours": evidence.HOURS,
        "command": command,
        "answers": {"FLOP": list(map(row, flop)), "device-hours": list(map(row, hours))},
    }


def told(found: Answers) -> str:
    """Return what a reader may type."""

    def ends(kind: str) -> list[str]:
        values = sorted(value for limit in found.every if (value := getattr(limit, kind)))
        return [number(value) for value in (values[:1] + values[-1:])]

    flop, hours = ends("flop"), ends("gpu_hours")
    said = f"{flop[0]} to {flop[1]} FLOP, as 1e12 or 100 PFLOP"
    if not hours:
        return f"{said}; these runs do not say how many device-hours they took"
    if not any(answer.recipe for answer in found.every.values() if answer.limit.gpu_hours):
        return f"{said}; device-hours need a law, which no method of these fits has"
    return f"{said}; or {hours[0]} to {hours[1]} device-hours, as 24 gpu-hours"
