"""`embedscale recipe`: from fits and a budget to what to train (the paper's algorithm 1), and what other choices lose.

A budget is FLOP, or GPU-hours where the runs say how long they took; the amount of data may be fixed (appendix D).
For FLOP, the power laws through the optima give method, size and loss, as in figures 1 and 6; where a method has none,
its joint law, and where it has no law, its best run at the nearest budget. GPU-hours and fixed data leave the IsoFLOP
lines, so that the joint law comes first there. Every answer says what it stands on and how far it extrapolates.
"""

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis import fits as fits_file
from analysis.evidence import Evidence, Limit, parse_limit, same_budget
from analysis.fits import BACKBONE, HYPERPARAMETERS
from analysis.fitting.laws import Array, interval
from embedscale.errors import UserError
from embedscale.run.cost import METHODS, Method, cost_of, peak_learning_rate
from embedscale.run.families import Pythia, known, short_name

TOLD = ("alpha", "dropout", "targets", "embedding", "blocks", "active_blocks")  # of a method, beside its label
PAPER_PAIR_TOKENS = 14 + 64  # a query and its value, section 4.1


@dataclass(frozen=True)
class Choice:
    """One configuration and its expected loss."""

    method: str
    backbone: str  # its name, or its parameters where it has none
    params: float
    budget: float  # FLOP
    tokens: float
    pairs: float
    steps: int
    batch_size: int
    flop_per_token: float
    learning_rate: float | None
    rank: int | None
    active_fraction: float | None
    settings: dict[str, Any]  # of `method` in a configuration: rank or blocks, and what else its runs had
    run: str | None  # the run whose hyper-parameters these are
    loss: float
    loss_interval: list[float] | None
    gpu_hours: float | None
    basis: str  # "power laws", "joint law" or "best run"

    @property
    def label(self) -> str:
        if self.rank:
            return f"{self.method}, rank {self.rank}"
        if self.active_fraction:
            share = "all" if self.active_fraction == 1 else f"{self.active_fraction:.3g} of the"
            return f"{self.method}, {share} blocks active"
        return self.method


@dataclass(frozen=True)
class Recipe:
    """The best choice, the optimum between sizes, what the next-best choices lose, and how far all that reaches."""

    limit: Limit
    best: Choice
    n_opt: float
    n_opt_interval: list[float] | None
    others: list[dict[str, Any]]  # {what, choice, lost (of the loss), interval, distinguishable}
    extrapolates: list[str]
    notes: list[str] = field(default_factory=list)


# --- One configuration -----------------------------------------------------------------------------------------------


def _settings(method: str, point: Mapping[str, Any], row: Pythia | None) -> dict[str, Any]:
    """What a configuration says of `method` for what the point's runs had, within what the backbone can have."""
    if method == "lora" and point.get("rank"):
        rank = int(point["rank"])
        found: dict[str, Any] = {"rank": min(rank, 4 * row.width) if row else rank}
        rest = {"alpha": point.get("alpha"), "dropout": point.get("dropout")}
        # A table has lists and truth values as texts.
        rest |= {"targets": (point.get("targets") or "").split(), "embedding": str(point.get("embedding")) == "True"}
        return found | {key: value for key, value in rest.items() if value}
    if method == "freeze" and point.get("trainable_fraction"):
        blocks, number = point.get("blocks") or "last", point.get("active_blocks")
        if blocks == "one" and number is not None:
            return {"blocks": blocks, "active_blocks": min(int(number), row.blocks - 1) if row else int(number)}
        share = point["trainable_fraction"]
        if row:
            share = max(1, round(share * row.blocks)) / row.blocks
        return {"active_fraction": share} | ({"blocks": blocks} if blocks == "first" else {})
    return {}


def _configure(
    evidence: Evidence,
    backbone: str,
    params: float,
    limit: Limit,
    basis: str,
    comparable: Mapping[str, Any],
    confidence: float,
) -> tuple[Choice, Array | None]:
    """The configuration of a method on a backbone, with draws of its ln L."""
    size = np.array([params])
    budget = float(evidence.budget_of(size, limit)[0])
    near = evidence.nearest(params, budget)
    was_run = math.isclose(near["params"], params, rel_tol=1e-6)
    if was_run:  # of several backbones of one size, the better one
        backbone = near.get("backbone") or backbone
    per_token = float(evidence.cost(size, budget)[0])
    row = known(backbone)
    rate = near.get("learning_rate")
    settings = _settings(evidence.name, near, row)
    share = settings.get("active_fraction", near.get("trainable_fraction")) if evidence.name == "freeze" else None
    if row is not None and evidence.name in METHODS and (settings or evidence.name not in ("lora", "freeze")):
        method = Method(evidence.name, **settings)
        per_token = cost_of(row.shape, method).flop_per_token
        if rate is None or not was_run:
            rate = peak_learning_rate(row.pretraining_learning_rate, method)
    if limit.tokens:
        budget = min(budget, limit.tokens * per_token)
    values, draws = evidence.log_loss(size, np.array([budget]), basis)
    tokens = budget / per_token
    counted = [point["tokens"] / point["pairs"] for point in evidence.points if point.get("pairs")]
    pairs = tokens / (float(np.median(counted)) if counted else PAPER_PAIR_TOKENS)
    batch = int(comparable.get("batch_size") or 1024)
    drawn = draws[:, 0] if draws is not None else None
    speed = evidence.rate(size)
    choice = Choice(
        evidence.name,
        backbone,
        params,
        budget,
        tokens,
        pairs,
        max(1, math.ceil(pairs / batch)),
        batch,
        per_token,
        rate,
        settings.get("rank"),
        share,
        settings,
        near.get("run"),
        float(np.exp(values[0])),
        interval(np.exp(drawn), confidence) if drawn is not None else None,
        budget / float(speed[0]) if speed is not None else None,
        basis,
    )
    return choice, drawn


def _compare(what: str, choice: Choice, drawn: Array | None, best: Choice, best_drawn: Array | None, confidence: float):
    """What another choice loses. Draws of one method move together, those of two methods apart."""
    ends = None
    if drawn is not None and best_drawn is not None:
        count = min(len(drawn), len(best_drawn))
        ends = interval(np.expm1(drawn[:count] - best_drawn[:count]), confidence)
    return {
        "what": what,
        "choice": choice,
        "lost": choice.loss / best.loss - 1,
        "interval": ends,
        "distinguishable": None if ends is None else bool(ends[0] > 0 or ends[1] < 0),
    }


def recipe(fits: Mapping[str, Any], limit: Limit, runs: list[dict[str, str]] | None = None) -> Recipe:
    """What to train within `limit`. `runs` are the rows of runs.csv, for what other ranks and fractions lose.

    Raises UserError where no method has what the limit needs.
    """
    confidence = fits["settings"]["confidence"]
    names = {
        point["params"]: point["backbone"]
        for facts in fits["methods"].values()
        for point in facts["points"]
        if point.get("backbone")
    }
    every = {name: Evidence(name, facts, names) for name, facts in fits["methods"].items() if facts["points"]}
    chosen: dict[str, tuple[Choice, Array | None]] = {}
    bases = {name: evidence.basis(limit, reach=2.0) for name, evidence in every.items()}
    if set(bases.values()) != {"best run"}:  # a law speaks of this very budget, with which no other can be compared
        bases = {name: evidence.basis(limit) for name, evidence in every.items()}
    # Where no law says what a method reaches with so much FLOP, only runs that spent it do; without any law, those that
    # spent what is nearest to it.
    spent = limit.flop or 0.0
    if set(bases.values()) == {"best run"}:
        spent = min((each.nearest_budget(spent) for each in every.values()), key=lambda c: abs(math.log(c / spent)))
    for name, evidence in every.items():
        basis = bases[name]
        if not basis or (basis == "best run" and not same_budget(evidence.nearest_budget(spent), spent)):
            continue
        tried = [
            _configure(evidence, backbone, size, limit, basis, fits["comparable"], confidence)
            for backbone, size in _reasonable(evidence, limit, basis, confidence)
        ]
        chosen[name] = min(tried, key=lambda each: each[0].loss)
    if not chosen:
        need = "a joint law" if limit.tokens else "runs that say how many GPU-hours they took, and a law"
        raise UserError(f"budget: for {limit.text} a recipe needs {need}, which no method of these fits has")
    best, drawn = min(chosen.values(), key=lambda each: each[0].loss)
    if best.pairs < 1:
        raise UserError(f"budget: {limit.text} is less than one pair costs ({best.budget / best.pairs:.3g} FLOP)")
    evidence = every[best.method]
    n_opt, n_ends = evidence.optimum(limit, best.basis, confidence)
    n_ends = None if limit.tokens else n_ends  # where the data end, whatever the law
    others = [_compare(name, *each, best, drawn, confidence) for name, each in chosen.items() if name != best.method]
    others += _other_sizes(evidence, limit, best, drawn, fits["comparable"], confidence)
    others += _other_choices(best, runs or [])
    missing = [name for name in fits["methods"] if name not in chosen]
    notes = [f"{name}: neither a law nor a run at this budget, so not considered" for name in missing]
    if best.basis == "best run":
        budget = evidence.nearest_budget(best.budget)
        notes.append(
            f"this is the best run at {budget:.4g} FLOP, the nearest budget that was run; "
            "no optimum lies inside the grid there"
        )
    if best.basis == "power laws" and evidence.law:
        size, _ = evidence.optimum(limit, "joint law", confidence)
        where = np.array([size])
        loss = math.exp(evidence.log_loss(where, evidence.budget_of(where, limit), "joint law")[0][0])
        notes.append(f"the joint law says {size:.3g} parameters and a loss of {loss:.4g}")
    if best.basis == "joint law" and evidence.law and evidence.law["not_fixed"]:
        notes.append(f"the runs do not fix {', '.join(evidence.law['not_fixed'])} of the joint law")
    if limit.tokens and not limit.flop:
        notes.append("with the data fixed every larger model is better (appendix D): the largest that was run is taken")
    near = evidence.nearest(best.params, best.budget)
    notes += [f"the best {name} there, {near[name]:.4g}, was at the end of its grid" for name in near["at_grid_end"]]
    notes += filter(None, [fits_file.miniature(fits)])
    return Recipe(limit, best, n_opt, n_ends, others, _extrapolates(evidence, best, n_opt), notes)


def _reasonable(evidence: Evidence, limit: Limit, basis: str, confidence: float) -> list[tuple[str, float]]:
    """The available backbones on both sides of the optimum; with data fixed, the largest that was run too."""
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
    drawn: Array | None,
    comparable: Mapping[str, Any],
    confidence: float,
) -> list[dict[str, Any]]:
    available = evidence.available(limit, best.basis)
    place = [size for _, size in available].index(best.params)
    found = []
    for number, word in ((place - 1, "smaller"), (place + 1, "larger")):
        if 0 <= number < len(available):
            backbone, size = available[number]
            choice, other = _configure(evidence, backbone, size, limit, best.basis, comparable, confidence)
            found.append(_compare(f"the next {word}: {choice.backbone}", choice, other, best, drawn, confidence))
    return found


def _other_choices(best: Choice, runs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Other ranks or fractions, each with its best other settings, as measured at the nearest budget of this size."""
    column = "rank" if best.rank else "trainable_fraction" if best.active_fraction else ""
    rows = [
        row
        for row in runs
        if column and row.get("method") == best.method and row.get(column)
        and math.isclose(float(row["params"]), best.params, rel_tol=1e-6)
    ]  # fmt: skip
    if not rows:
        return []
    budget = min((float(row["budget"]) for row in rows), key=lambda each: abs(math.log(each / best.budget)))
    # Replicates are averaged, as in the fits; the fraction that follows from a rank tells none apart.
    keys = [name for name in (*BACKBONE, *HYPERPARAMETERS) if name != "trainable_fraction"]
    replicates: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if same_budget(float(row["budget"]), budget):
            key = float(row[column]), *(row.get(name) for name in keys)
            replicates.setdefault(key, []).append(float(row["loss"]))
    lowest: dict[float, float] = {}
    for (value, *_), losses in replicates.items():
        lowest[value] = min(lowest.get(value, math.inf), sum(losses) / len(losses))
    own = min(lowest, key=lambda value: abs(value - (best.rank or best.active_fraction or 0)))
    name = "rank" if best.rank else "active share"
    return [
        {
            "what": f"{name} {value:.4g}, measured at {budget:.3g} FLOP",
            "choice": None,
            "lost": loss / lowest[own] - 1,
            "interval": None,
            "distinguishable": None,
        }
        for value, loss in sorted(lowest.items())
        if value != own
    ]


def _extrapolates(evidence: Evidence, best: Choice, n_opt: float) -> list[str]:
    """How far budget, sizes and tokens lie outside what the law was fitted to."""
    rows = evidence.interior if best.basis == "power laws" else evidence.optima
    spans = {
        "budget": ([row["budget"] for row in rows], best.budget, "FLOP"),
        "best size": (list(evidence.sizes), n_opt, "parameters"),
        "size": (list(evidence.sizes), best.params, "parameters"),
        "data": ([point["tokens"] for point in evidence.points], best.tokens, "tokens"),
    }
    told = []
    for name, (values, value, unit) in spans.items():
        low, high = min(values), max(values)
        if value > high * 1.001:
            told.append(f"{name}: {value / high:.3g} times the largest ({high:.3g} {unit})")
        elif value < low / 1.001:
            told.append(f"{name}: {low / value:.3g} times below the smallest ({low:.3g} {unit})")
    return told


# --- Files and the verb ----------------------------------------------------------------------------------------------


def read(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """A folder's fits, and the rows of the runs.csv beside them (none where it is missing)."""
    fits = fits_file.read(folder)
    path = Path(folder)
    path = (path if path.is_dir() else path.parent) / "runs.csv"
    if not path.exists():
        return fits, []
    with path.open(newline="") as file:
        return fits, list(csv.DictReader(file))


def configuration(folder: str, budget: str, config: str | None, words: Sequence[str]) -> Any:
    """The `RunConfig` of a recipe, for `embedscale train --recipe`.

    What the recipe does not say comes from CONFIG, or else from the run whose hyper-parameters it has, or where that is
    not at hand from the most similar one; `words` come last. Raises UserError where the backbone's folder is unknown.
    """
    from embedscale.run.config import RunConfig, read_yaml, structured
    from embedscale.run.directory import RunDirectory

    fits, runs = read(folder)
    best = recipe(fits, parse_limit(budget), runs).best
    print(f"{best.label}, {best.backbone}, {best.budget:.4g} FLOP: expected loss {best.loss:.4g}")

    def distance(row: Mapping[str, str]) -> tuple[bool, bool, float, float]:
        size, spent = (abs(math.log(float(row[key]) / getattr(best, key))) for key in ("params", "budget"))
        return row.get("run") != best.run, row["method"] != best.method, round(size, 6), spent

    def at_hand(rows: list[dict[str, str]]) -> Path | None:
        paths = (RunDirectory(row["path"]).config for row in rows if row.get("path"))
        return next((path for path in paths if path.exists()), None)

    runs.sort(key=distance)
    similar = config or at_hand(runs)
    own = at_hand([row for row in runs if row.get("backbone") in (None, best.backbone) and distance(row)[2] == 0])
    values = read_yaml(similar) if similar else {}
    if own:
        name = read_yaml(own)["backbone"]["name"]
    elif known(best.backbone) is not None:
        name = f"EleutherAI/{short_name(best.backbone).lower()}"
    elif any(word.startswith("backbone.name=") for word in words):
        name = best.backbone
    else:
        raise UserError(f"--recipe: where {best.backbone!r} lies is not known here; give backbone.name=FOLDER")
    values |= {"budget": best.budget, "method": {"name": best.method} | best.settings, "output": "runs"}
    values["backbone"] = dict(values.get("backbone") or {}) | {"name": name}
    if runs and runs[0].get("backbone_revision"):
        values["backbone"]["revision"] = runs[0]["backbone_revision"]
    values["training"] = dict(values.get("training") or {}) | {"learning_rate": best.learning_rate}
    return structured(RunConfig, values, words, origin=f"{folder}, {budget}")


def lines(found: Recipe, confidence: float) -> list[tuple[str, str]]:
    """The recipe as names and texts, for the terminal and for the report."""
    best, percent = found.best, f"{100 * confidence:.0f} %"

    def within(ends: Sequence[float] | None, digits: int = 3) -> str:
        return f" ({percent}: {ends[0]:.{digits}g} … {ends[1]:.{digits}g})" if ends else " (no interval)"

    rate = "not known: neither the runs nor the paper's rule say" if best.learning_rate is None else None
    told = [
        ("method", ", ".join([best.label, *(f"{key} {best.settings[key]}" for key in TOLD if key in best.settings)])),
        ("model", f"{best.backbone}, {best.params:,.0f} parameters"),
        ("best size", f"{found.n_opt:.3g} parameters{within(found.n_opt_interval)}"),
        ("budget", f"{best.budget:.4g} FLOP" + (f", {best.gpu_hours:.3g} GPU-hours" if best.gpu_hours else "")),
        ("data", f"{best.tokens:.3g} tokens, about {best.pairs:,.0f} pairs"),
        ("steps", f"{best.steps:,} of {best.batch_size:,} pairs"),
        ("peak learning rate", rate or f"{best.learning_rate:.3g}"),
        ("expected loss", f"{best.loss:.4g}{within(best.loss_interval, 4)}, by the {best.basis}"),
        ("extrapolates", "; ".join(found.extrapolates) or "no"),
    ]
    for other in found.others:
        more = "" if other["distinguishable"] is not False else ", not distinguishable"
        ends = other["interval"]
        spread = f" ({100 * ends[0]:+.1f} … {100 * ends[1]:+.1f} %)" if ends else ""
        choice = other["choice"]
        on = f", {choice.backbone}" if choice and choice.backbone not in other["what"] else ""
        name = choice.label if choice and other["what"] == choice.method else other["what"]
        told.append(("instead", f"{name}{on}: {100 * other['lost']:+.1f} % loss{spread}{more}"))
    return told + [("note", note) for note in found.notes]


def command(args: Any) -> int:
    """`embedscale recipe FITS BUDGET`: print what to train."""
    limit = parse_limit(" ".join(args.budget) or None, args.tokens)
    fits, runs = read(args.fits)
    found = recipe(fits, limit, runs)
    if args.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    print(f"recipe for {limit.text}")
    for name, text in lines(found, fits["settings"]["confidence"]):
        print(f"  {name + ':':20}{text}")
    if limit.flop and not limit.tokens:
        budget, fits_given = (shlex.quote(text) for text in (" ".join(args.budget), args.fits))
        print(f"\ntrain it: embedscale train --fits {fits_given} --recipe {budget}")
    return 0
