"""What to train for a budget (the paper's algorithm 1), and what other choices lose.

For FLOP, each method's forecast (`advice.forecast`) gives method, size and loss. Where the budget was run and the grid
holds no optimum, the best run there stands before a law, and a method without any law has its best run only.
Device-hours and limited data leave the IsoFLOP lines, so the joint law comes first there. Every answer says what it
rests on and how far it extrapolates. The price is that a method with neither a forecast nor a run near the budget is
not considered.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.advice import forecast
from analysis.advice.choice import PAPER_BATCH, Choice, Other, compare, configure
from analysis.advice.evidence import Basis, Evidence, Limit, gather, log_distance
from analysis.advice.trends import REACH
from analysis.columns import BACKBONE, HYPERPARAMETERS
from analysis.fits import Fits, Interval, same_budget
from analysis.fitting.laws import Array
from embedscale.errors import UserError
from embedscale.run.cost import PAPER_PAIR
from embedscale.run.method import METHODS
from embedscale.texts import apart, number

NO_OPTIMUM = f"no law has an optimum within {REACH:,.0f} times the sizes that were run"
ANOTHER = 1.01  # ratio of sizes from which on two are told apart
Row = Mapping[str, Any]  # of runs.csv


@dataclass(frozen=True)
class Recipe:
    """The best choice, the best size before it is rounded to a backbone, other choices, and how far it extrapolates.

    `lowest_loss` is the loss at the best size. `chances` are the probabilities that each method has the lowest loss,
    empty where the noise of a run is not known, and `decided` says whether one of them reaches the confidence of the
    fits. `laws` are the shares of the laws in the forecast; empty where the recipe rests on something else.
    """

    limit: Limit
    best: Choice
    n_opt: float
    n_opt_interval: Interval | None
    lowest_loss: float
    lowest_loss_interval: Interval | None
    chances: dict[str, float]
    decided: bool
    laws: dict[str, float]
    others: list[Other]
    extrapolates: list[str]
    notes: list[str]


def recipe(
    fits: Fits, limit: Limit, runs: Sequence[Row] | None = None, every: Mapping[str, Evidence] | None = None
) -> Recipe:
    """Return what to train within `limit`. `runs` are the rows of runs.csv, which have the losses of other ranks.

    `every` is `evidence.gather(fits)`; pass it when you ask for several recipes.

    Raises UserError if no method has what the limit needs, and for a budget below the cost of one pair.
    """
    confidence = fits.settings.confidence
    every = gather(fits) if every is None else every
    chosen = _choices(fits, limit, every)
    if not chosen:
        raise UserError(f"budget: {_nothing_known(fits, limit, every)}")
    best, drawn = min(chosen.values(), key=lambda each: each[0].loss)
    _refuse_less_than_a_pair(limit, best)
    evidence = every[best.method]
    n_opt, n_ends = evidence.optimum(limit, best.basis, confidence)
    n_ends = None if _tokens_bind(limit, best) else n_ends  # then the data end the size, whatever the law
    others = [compare(name, *each, best, drawn, confidence) for name, each in chosen.items() if name != best.method]
    others += _other_sizes(evidence, limit, best, drawn, fits.comparable, confidence)
    others += _other_choices(best, runs or [])
    # Without the noise of a run, draws of measured losses are all alike, and say nothing of the next run.
    known = fits.noise.log_loss is not None or len(chosen) == 1
    chances = forecast.chances({name: draws for name, (_, draws) in chosen.items()}) if known else {}
    return Recipe(
        limit,
        best,
        n_opt,
        n_ends,
        *evidence.lowest(limit, best.basis, confidence),
        chances,
        max(chances.values(), default=0.0) >= confidence,
        dict(evidence.outlook.laws) if best.basis == "forecast" else {},
        others,
        _extrapolates(evidence, best, n_opt),
        _not_considered(fits, limit, every, set(chosen)) + _notes(fits, limit, best, evidence),
    )


def _choices(fits: Fits, limit: Limit, every: Mapping[str, Evidence]) -> dict[str, tuple[Choice, Array]]:
    """Return the best choice of each method and draws of its ln L, of the methods that know anything of this limit."""
    bases = {name: evidence.basis(limit) for name, evidence in every.items()}
    if not any(bases.values()):  # then a run with a little less is all that is known
        bases = {name: evidence.basis(limit, reach=2.0) for name, evidence in every.items()}
    # Best runs are compared at one budget: the one asked for or, without any law, the nearest that was run.
    spent = limit.flop or 0.0
    if set(bases.values()) - {""} == {"best run"}:
        spent = min((each.nearest_budget(spent) for each in every.values()), key=lambda c: log_distance(c, spent))
    chosen = {}
    for name, evidence in every.items():
        basis = bases[name]
        if not basis or (basis == "best run" and not same_budget(evidence.nearest_budget(spent), spent)):
            continue
        chosen[name] = _best_size(fits, limit, evidence, basis)
    return chosen


def _best_size(fits: Fits, limit: Limit, evidence: Evidence, basis: Basis) -> tuple[Choice, Array]:
    """Return the best choice of one method: of the backbones next to N*, and farther ones as long as the loss falls.

    With limited data none is larger than those that were run.
    """
    confidence = fits.settings.confidence
    available = evidence.available(limit, basis)
    if limit.tokens:
        available = [each for each in available if each[1] <= evidence.sizes[-1] * 1.001]
    n_opt, _ = evidence.optimum(limit, basis, confidence)
    smaller = sum(size <= n_opt for _, size in available)
    first, last = max(0, smaller - 2), min(len(available), smaller + 2) - 1
    tried: dict[int, tuple[Choice, Array]] = {}
    while True:
        for i in range(first, last + 1):
            if i not in tried:
                tried[i] = configure(evidence, *available[i], limit, basis, fits.comparable, confidence)
        best = min(tried, key=lambda i: tried[i][0].loss)
        if best == first > 0:
            first -= 1
        elif best == last < len(available) - 1:
            last += 1
        else:
            return tried[best]


def _nothing_known(fits: Fits, limit: Limit, every: Mapping[str, Evidence]) -> str:
    """Return why no method has a recipe for this limit, and what to add."""
    if not every:
        return f"a recipe needs runs; {fits.source} holds none"
    if limit.flop and not limit.tokens:
        reasons: dict[str, list[str]] = {}
        for name, each in every.items():
            reasons.setdefault(each.missing(limit.flop) or NO_OPTIMUM, []).append(name)
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        return f"nothing is known about {limit.text}; {told}"
    need = "a joint law"
    if limit.gpu_hours:
        timed = any(point.gpu_hours for each in every.values() for point in each.points)
        need = "a law" if timed else "runs that say how many device-hours they took, and a law"
    return f"for {limit.text} a recipe needs {need}, which no method of these fits has"


def _refuse_less_than_a_pair(limit: Limit, best: Choice) -> None:
    if best.pairs < 1:
        by_tokens = _tokens_bind(limit, best)
        least, unit = (best.tokens, "tokens") if by_tokens else (best.budget_flop, "FLOP")
        raise UserError(
            f"{'--tokens' if by_tokens else 'budget'}: {limit.text} is less than one pair costs; allowed: at least "
            f"{number(least / best.pairs)} {unit}"
        )


def _not_considered(fits: Fits, limit: Limit, every: Mapping[str, Evidence], chosen: set[str]) -> list[str]:
    """Return which methods are not among those chosen, and why, a line for each reason."""
    absent: dict[str, list[str]] = {}
    for name in fits.methods:
        if name not in chosen:
            missing = every[name].missing(limit.flop) if name in every else ""
            said = "neither a law nor a run at this budget, so not considered"
            absent.setdefault(f"{said}; {missing}" if missing else said, []).append(name)
    return [f"{', '.join(names)}: {said}" for said, names in absent.items()]


def _tokens_bind(limit: Limit, best: Choice) -> bool:
    """Return whether the number of tokens, and not the FLOP or the hours, ends a choice."""
    return limit.tokens is not None and best.tokens >= limit.tokens * 0.999


def _notes(fits: Fits, limit: Limit, best: Choice, evidence: Evidence) -> list[str]:
    """Return what a reader should know of the best choice, a line each."""
    notes = []
    if best.basis == "best run":
        budget = evidence.nearest_budget(best.budget_flop)
        notes.append(
            f"this is the best run at {number(budget, 4)} FLOP, the nearest budget that was run; "
            "no optimum lies inside the grid there"
        )
    if best.basis == "joint law" and evidence.not_fixed:
        notes.append(f"the runs do not fix {', '.join(evidence.not_fixed)} of the joint law")
    if limit.tokens and not limit.flop and not limit.gpu_hours:
        notes.append("with the data fixed every larger model is better (appendix D): the largest that was run is taken")
    if not any(point.pairs for point in evidence.points):
        notes.append(
            f"the runs do not say their number of pairs: {PAPER_PAIR} tokens a pair are assumed, as in the paper"
        )
    if not fits.comparable.get("batch_size"):
        notes.append(f"the runs do not say their batch size: {PAPER_BATCH:,} pairs a step are assumed, as in the paper")
    near = evidence.nearest(best.n_parameters, best.budget_flop)
    if near.off is not None and same_budget(near.budget_flop, best.budget_flop):
        told = apart(near.off, "the joint law of the others")
        notes.append(f"the run of this size at this budget lies {told}: look at it first")
    lucky = [point for point in evidence.points if (point.off or 0) < 0 and point.loss < best.loss]
    if lucky := [point for point in lucky if point.budget_flop < best.budget_flop and point != near]:
        point = min(lucky, key=lambda each: each.loss)
        told = f"a run at {number(point.budget_flop)} FLOP reached {number(point.loss, 4)}"
        notes.append(f"{told}, far below the joint law of the others, and is not counted: look at it")
    notes += [
        f"the best {name} there, {number(near.setting(name), 4)}, was at the end of its grid"
        for name in near.at_grid_end
    ]
    return notes + [note for note in [fits.miniature] if note]


def _other_sizes(
    evidence: Evidence,
    limit: Limit,
    best: Choice,
    drawn: Array,
    comparable: Mapping[str, Any],
    confidence: float,
) -> list[Other]:
    available = evidence.available(limit, best.basis)
    smaller = [each for each in available if each[1] < best.n_parameters / ANOTHER]
    larger = [each for each in available if each[1] > best.n_parameters * ANOTHER]
    found = []
    for word, next_one in (("smaller", smaller[-1:]), ("larger", larger[:1])):
        for backbone, size in next_one:
            choice, other = configure(evidence, backbone, size, limit, best.basis, comparable, confidence)
            found.append(compare(f"the next {word}: {choice.backbone}", choice, other, best, drawn, confidence))
    return found


def _other_choices(best: Choice, runs: Sequence[Row]) -> list[Other]:
    """Return other ranks or fractions as measured at the nearest budget of this size, each with its best settings."""
    choice = METHODS[best.method].choice if best.method in METHODS else None
    column = choice.column if choice else ""
    rows = [
        row
        for row in runs
        if row.get("method") == best.method and row.get(column)
        and math.isclose(float(row["n_parameters"]), best.n_parameters, rel_tol=1e-6)
    ]  # fmt: skip
    if not choice or not rows:
        return []
    budget = min((float(row["budget_flop"]) for row in rows), key=lambda each: log_distance(each, best.budget_flop))
    # Replicates are averaged, as in the fits. The fraction follows from the rank, so it does not tell settings apart.
    keys = [name for name in (*BACKBONE, *HYPERPARAMETERS) if name != "trainable_fraction"]
    replicates: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if same_budget(float(row["budget_flop"]), budget):
            key = float(row[column]), *(row.get(name) for name in keys)
            replicates.setdefault(key, []).append(float(row["loss"]))
    lowest: dict[float, float] = {}
    for (value, *_), losses in replicates.items():
        lowest[value] = min(lowest.get(value, math.inf), sum(losses) / len(losses))
    own = min(lowest, key=lambda value: abs(value - (best.rank or best.active_fraction or 0)))
    return [
        Other(
            f"{choice.name} {number(value, 4)}, measured at {number(budget)} FLOP",
            None,
            loss / lowest[own] - 1,
            None,
            None,
        )
        for value, loss in sorted(lowest.items())
        if value != own
    ]


def _extrapolates(evidence: Evidence, best: Choice, n_opt: float) -> list[str]:
    """Return how far budget, sizes and tokens lie outside what the law was fitted to, a line each."""
    budgets = [point.budget_flop for point in evidence.points]
    optima = [row.budget_flop for row in evidence.fit.interior] if best.basis == "forecast" else budgets
    spans = {
        "budget": (budgets, best.budget_flop, "FLOP"),
        "budget with an optimum": (optima, best.budget_flop, "FLOP"),
        "best size": (list(evidence.sizes), n_opt, "parameters"),
        "size": (list(evidence.sizes), best.n_parameters, "parameters"),
        "data": ([point.tokens for point in evidence.points], best.tokens, "tokens"),
    }
    told: dict[str, str] = {}  # what is said → of what; said once
    for name, (values, value, unit) in spans.items():
        low, high = min(values), max(values)
        if value > high * 1.001:
            told.setdefault(f"{number(value / high)} times the largest ({number(high)} {unit})", name)
        elif value < low / 1.001:
            told.setdefault(f"{number(low / value)} times below the smallest ({number(low)} {unit})", name)
    return [f"{name}: {said}" for said, name in told.items()]
