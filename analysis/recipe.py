"""`embedscale recipe`: what to train for a budget (the paper's algorithm 1), and what other choices lose.

A budget is FLOP, or device-hours where the runs say how long they took; the number of tokens may be limited (appendix
D). For FLOP, each method's forecast (`advice.forecast`) gives method, size and loss. Where the budget was run and the
grid holds no optimum, the best run there stands before a law, and a method without any law has its best run only.
Device-hours and limited data leave the IsoFLOP lines, so the joint law comes first there. Every answer says what it
rests on and how far it extrapolates. The price is that a method with neither a forecast nor a run near the budget is
not considered.
"""

import csv
import io
import math
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import fits as fits_file
from analysis.advice import forecast
from analysis.advice.choice import PAPER_BATCH, PAPER_PAIR_TOKENS, Choice, Other, compare, configure
from analysis.advice.evidence import Basis, Evidence, Limit, gather, log_distance, parse_limit
from analysis.advice.trends import REACH
from analysis.columns import BACKBONE, FIRST_VERSION, HYPERPARAMETERS
from analysis.fits import Fits, Interval, same_budget
from analysis.fitting.laws import Array
from embedscale.errors import UserError
from embedscale.run.families import hub_name
from embedscale.run.method import METHODS
from embedscale.texts import apart, number, within
from embedscale.values import print_json

if TYPE_CHECKING:
    from analysis.runs import Runs
    from embedscale.run.config import RunConfig

TOLD = ("alpha", "dropout", "targets", "embedding", "blocks", "active_blocks")  # settings printed beside the label
LEAST_SHARE = 0.005  # of a forecast, below which a law is not named
LEAST_CHANCE = 0.01  # of the lowest loss, below which methods are named together
NO_OPTIMUM = f"no law has an optimum within {REACH:,.0f} times the sizes that were run"
ANOTHER = 1.01  # ratio of sizes from which on two are told apart
Row = Mapping[str, str]  # of runs.csv


@dataclass(frozen=True)
class Recipe:
    """The best choice, the best size before it is rounded to a backbone, other choices, and how far it extrapolates.

    `lowest_loss` is the loss at the best size. `chances` are the probabilities that each method has the lowest loss,
    empty where the noise of a run is not known, and `decided` says whether one of them reaches the confidence of the
    fits. `laws` are the shares of the laws in the
    forecast; empty where the recipe rests on something else.
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


# --- The recipe ------------------------------------------------------------------------------------------------------


def recipe(
    fits: Fits, limit: Limit, runs: Sequence[Row] | None = None, every: Mapping[str, Evidence] | None = None
) -> Recipe:
    """Return what to train within `limit`. `runs` are the rows of runs.csv, which have the losses of other ranks.

    `every` is `evidence.gather(fits)`; whoever asks for several recipes makes it once.

    Raises UserError if no method has what the limit needs, and for a budget below the cost of one pair.
    """
    confidence = fits.settings.confidence
    every = gather(fits) if every is None else every
    chosen: dict[str, tuple[Choice, Array]] = {}
    bases = {name: evidence.basis(limit) for name, evidence in every.items()}
    if not any(bases.values()):  # then a run with a little less is all that is known
        bases = {name: evidence.basis(limit, reach=2.0) for name, evidence in every.items()}
    # Best runs are compared at one budget: the one asked for or, without any law, the nearest that was run.
    spent = limit.flop or 0.0
    if set(bases.values()) - {""} == {"best run"}:
        spent = min((each.nearest_budget(spent) for each in every.values()), key=lambda c: log_distance(c, spent))
    for name, evidence in every.items():
        basis = bases[name]
        if not basis or (basis == "best run" and not same_budget(evidence.nearest_budget(spent), spent)):
            continue
        tried = [
            configure(evidence, backbone, size, limit, basis, fits.comparable, confidence)
            for backbone, size in _reasonable(evidence, limit, basis, confidence)
        ]
        chosen[name] = min(tried, key=lambda each: each[0].loss)
    if not every:
        raise UserError(f"budget: a recipe needs runs; {fits.source} holds none")
    if not chosen and limit.flop and not limit.tokens:
        reasons: dict[str, list[str]] = {}
        for name, each in every.items():
            reasons.setdefault(each.outlook.missing or NO_OPTIMUM, []).append(name)
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise UserError(f"budget: nothing is known about {limit.text}; {told}")
    if not chosen:
        need = "a joint law" if limit.tokens else "runs that say how many device-hours they took, and a law"
        raise UserError(f"budget: for {limit.text} a recipe needs {need}, which no method of these fits has")
    best, drawn = min(chosen.values(), key=lambda each: each[0].loss)
    if best.pairs < 1:
        by_tokens = _tokens_bind(limit, best)
        least, unit = (best.tokens, "tokens") if by_tokens else (best.budget_flop, "FLOP")
        raise UserError(
            f"{'--tokens' if by_tokens else 'budget'}: {limit.text} is less than one pair costs; allowed: at least "
            f"{number(least / best.pairs)} {unit}"
        )
    evidence = every[best.method]
    n_opt, n_ends = evidence.optimum(limit, best.basis, confidence)
    n_ends = None if _tokens_bind(limit, best) else n_ends  # then the data end the size, whatever the law
    others = [compare(name, *each, best, drawn, confidence) for name, each in chosen.items() if name != best.method]
    others += _other_sizes(evidence, limit, best, drawn, fits.comparable, confidence)
    others += _other_choices(best, runs or [])
    # Without the noise of a run, draws of measured losses are all alike, and say nothing of the next run.
    known = fits.noise.log_loss is not None or len(chosen) == 1
    chances = forecast.chances({name: draws for name, (_, draws) in chosen.items()}) if known else {}
    absent: dict[str, list[str]] = {}
    for name in fits.methods:
        if name not in chosen:
            missing = every[name].outlook.missing if name in every else ""
            said = "neither a law nor a run at this budget, so not considered"
            absent.setdefault(f"{said}; {missing}" if missing else said, []).append(name)
    notes = [f"{', '.join(names)}: {said}" for said, names in absent.items()]
    notes += _notes(fits, limit, best, evidence)
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
        notes,
    )


def advise(
    fits: Fits, budget: str | float | None = None, tokens: float | None = None, runs: "Runs | None" = None
) -> Recipe:
    """Return what to train for a budget such as 1e17, "100 PFLOP" or "24 device-hours", with at most `tokens` tokens.

    `runs` are those that were fitted; they tell what other ranks lose. The errors are those of `parse_limit` and
    `recipe`.
    """
    limit = parse_limit(None if budget is None else str(budget), None if tokens is None else str(tokens))
    rows = csv.DictReader(io.StringIO(runs.table.to_csv(index=False))) if runs else []
    return recipe(fits, limit, list(rows))


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
            f"the runs do not say their number of pairs: {PAPER_PAIR_TOKENS} tokens a pair are assumed, as in the paper"
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


def _reasonable(evidence: Evidence, limit: Limit, basis: Basis, confidence: float) -> list[tuple[str, float]]:
    """Return the available backbones next to the optimum; with limited data, none larger than those that were run."""
    available = evidence.available(limit, basis)
    if limit.tokens:
        available = [each for each in available if each[1] <= evidence.sizes[-1] * 1.001]
    n_opt, _ = evidence.optimum(limit, basis, confidence)
    below = [each for each in available if each[1] <= n_opt][-2:]
    above = [each for each in available if each[1] > n_opt][:2]
    return below + above


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


# --- Files and the verb ----------------------------------------------------------------------------------------------


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
    print(f"{best.label}, {best.backbone}, {number(best.budget_flop, 4)} FLOP: expected loss {number(best.loss, 4)}")

    def distance(row: Row) -> tuple[bool, bool, float, float]:
        size = log_distance(float(row["n_parameters"]), best.n_parameters)
        spent = log_distance(float(row["budget_flop"]), best.budget_flop)
        return row.get("run") != best.run, row["method"] != best.method, round(size, 6), spent

    runs.sort(key=distance)
    similar = config or _at_hand(runs)
    values = read_yaml(similar) if similar else {}
    name = _folder(best, runs)
    if not name and any(word.startswith("backbone.name=") for word in words):
        name = best.backbone
    if not name:
        raise UserError(f"--recipe: the folder of {best.backbone!r} is not known; give backbone.name=FOLDER")
    values |= {"budget": best.budget_flop, "method": {"name": best.method} | best.settings, "output": "runs"}
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
    for other in found.others:
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
