"""Replay a design on a table that exists, as if each of its rows had yet to be run and cost what it cost.

The question is asked of rows that the design never sees: those of the largest budget (which size is best there?), or
those that a column names (what are their losses?). The design spends shares of the cost of all other rows. Beside it
stand the usual ways to spend the same money. All of them fit the same model, so they differ by their choices alone.
Each repeat leaves out a tenth of the rows at random. The price: a table has only the runs that somebody chose.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.design.choice import BATCH, COST_POWER, Candidate, Design, Pool
from analysis.design.surface import Belief, Rows
from analysis.fitting import grouping
from analysis.fitting.laws import Array
from embedscale.errors import UserError
from embedscale.run.method import METHODS

SHARES = (0.01, 0.02, 0.05, 0.1, 0.15)  # of the cost of all rows
REPEATS = 10
LEFT_OUT = 0.1  # share of the rows that each repeat leaves out
FEWEST = 5  # sizes of a budget that can be asked for the best
SETTINGS = ("rank", "trainable_fraction", "learning_rate")
FULL = "full grid"
DESIGN = "design"


@dataclass(frozen=True)
class Replay:
    """The rows that may be chosen, with their losses, and the rows that are asked for."""

    pool: Pool
    losses: dict[str, float]


def replay_of(table: pd.DataFrame, asked: Sequence[str] | None = None) -> Replay:
    """Return the replay of a table of runs (`runs.Runs.table`). `asked` are the runs whose losses are to be forecast.

    None asks for the best size at the largest budget that has enough sizes; rows of larger budgets are not used.
    """
    table = table.sort_values("run").reset_index(drop=True)
    if asked is None:
        profile = pd.Series(grouping.group_budgets(table["budget_flop"].to_numpy(float)))
        sizes = table.groupby(profile)["n_parameters"].nunique()
        enough = sizes[sizes >= FEWEST].index
        if not len(enough) or not (profile < enough.max()).any():
            raise UserError(f"--replay largest: no budget has {FEWEST} sizes and smaller budgets beside it")
        options, others = table[profile == enough.max()], table[profile < enough.max()]
    else:
        chosen = table["run"].isin(list(asked))
        options, others = table[chosen], table[~chosen]
        if options.empty or others.empty:
            raise UserError("--replay: selects no row, or all rows; some are asked for, and the others are run")
    settings = tuple(name for name in SETTINGS if name in table and table[name].nunique() > 1)
    pool = Pool(
        candidates_of(others, settings),
        candidates_of(options, settings),
        "recipe" if asked is None else "forecast",
        settings,
    )
    return Replay(pool, dict(zip(table["run"], table["loss"].astype(float), strict=True)))


def candidates_of(rows: pd.DataFrame, settings: Sequence[str]) -> tuple[Candidate, ...]:
    """Return the rows of a table of runs as candidates that cost their budget."""
    return tuple(
        Candidate(
            str(row["run"]),
            str(row["method"]),
            float(row["n_parameters"]),
            float(row["tokens"]),
            float(row["budget_flop"]),
            float(row["budget_flop"]),
            tuple(_setting(row, name) for name in settings),
        )
        for row in rows.to_dict("records")
    )


def _setting(row: Mapping[Hashable, Any], name: str) -> float | None:
    """Return a setting of a run; a method's trainable fraction counts only where the method chooses it."""
    kind = METHODS.get(str(row["method"]))
    follows = name == "trainable_fraction" and kind and not (kind.choice and kind.choice.column == name)
    return None if follows or pd.isna(row[name]) else float(row[name])


# --- Ways to spend ---------------------------------------------------------------------------------------------------

Spender = Callable[[Design, dict[str, float], float, np.random.Generator], list[str]]
"""Design, losses, money and random numbers → the runs that are made."""
Gain = Callable[[Belief, Rows, Rows], Array]
"""Belief, rows that could be run and rows of the options → what each row is worth."""


def by_design(
    design: Design, losses: dict[str, float], money: float, rng: np.random.Generator, width: int = 1
) -> list[str]:
    """Spend as `sweep submit --adaptive` does, with at least `width` runs at a time."""
    made: dict[str, float] = {}
    cost = {each.run: each.cost for each in design.pool.candidates}
    while batch := design.next_batch(made, money, width):
        made |= {each.run: losses[each.run] for each in batch}
        money -= sum(cost[each.run] for each in batch)
    return list(made)


def _in_order(key: Callable[[Array, np.random.Generator], Array]) -> Spender:
    """Return a spender that takes runs by ascending key of their costs, and passes over what it cannot pay."""

    def spend(design: Design, losses: dict[str, float], money: float, rng: np.random.Generator) -> list[str]:
        found = []
        for i in np.argsort(key(design.cost, rng), kind="stable"):
            if design.cost[i] <= money:
                found.append(design.pool.candidates[i].run)
                money -= design.cost[i]
        return found

    return spend


def _classical(gain: Gain) -> Spender:
    """Return a spender by a gain under the law alone, which is taken to be right."""

    def spend(design: Design, losses: dict[str, float], money: float, rng: np.random.Generator) -> list[str]:
        made: list[int] = []
        runs = [each.run for each in design.pool.candidates]
        left = np.arange(len(runs))
        while True:
            belief = design.belief({runs[i]: losses[runs[i]] for i in made})
            belief = replace(belief, covariance=belief.covariance - belief.bent, bent=np.zeros_like(belief.bent))
            for _ in range(max(1, math.ceil(BATCH * len(made)))):
                rows = left[design.cost[left] <= money]
                if not len(rows):
                    return [runs[i] for i in made]
                row = int(rows[(gain(belief, rows, design.options) / design.cost[rows] ** COST_POWER).argmax()])
                belief, left, money = belief.after(row), left[left != row], money - float(design.cost[row])
                made.append(row)

    return spend


def _information(belief: Belief, rows: Rows, options: Rows) -> Array:
    """Return how far each row would raise ln det of the information about the coefficients (D-optimal)."""
    return np.log1p(np.maximum(belief.covariance[rows, rows], 0.0) / belief.noise**2)


def _precision(belief: Belief, rows: Rows, options: Rows) -> Array:
    """Return how far each row would lower the mean variance at the options (V-optimal)."""
    moved = belief.covariance[np.ix_(rows, options)]
    return np.square(moved).mean(1) / (belief.covariance[rows, rows] + belief.noise**2)


SPENDERS: dict[str, Spender] = {
    DESIGN: by_design,
    "V-optimal": _classical(_precision),
    "D-optimal": _classical(_information),
    "inverse cost": _in_order(lambda cost, rng: rng.exponential(size=len(cost)) * cost),
    "cheapest": _in_order(lambda cost, rng: cost),
    "random": _in_order(lambda cost, rng: rng.random(len(cost))),
}


# --- What comes of it ------------------------------------------------------------------------------------------------


def replay(
    given: Replay, repeats: int = REPEATS, shares: Sequence[float] = SHARES, spenders: Sequence[str] = tuple(SPENDERS)
) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to spend, repeat and share of the cost: what was spent, and what was found.

    `r2` is the R² of the losses asked for, `error` the root mean square error of their ln L. For a recipe, `regret` is
    the loss of the chosen option over the lowest one, less 1.
    """
    every = given.pool.candidates
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        kept = np.sort(rng.choice(len(every), len(every) - round(LEFT_OUT * len(every)), replace=False))
        design = Design(replace(given.pool, candidates=tuple(every[i] for i in kept)))
        for name in spenders:
            for share in shares:
                own = np.random.default_rng([repeat, len(name)])
                runs = SPENDERS[name](design, given.losses, share * design.pool.cost, own)
                yield {"spender": name, "repeat": repeat, "share": share} | _judged(design, given.losses, runs)
        runs = [each.run for each in design.pool.candidates]
        yield {"spender": FULL, "repeat": repeat, "share": 1.0} | _judged(design, given.losses, runs)


def trial(pool: Pool, truth: Mapping[str, float], noise: float) -> Iterator[dict[str, Any]]:
    """Yield rows as `replay` does, of designs on runs that are drawn: the loss of `truth` times exp(noise × normal).

    The runs of the options may be made too. `regret` and `error` are those of the true losses.
    """
    design, every = Design(pool), {**truth}
    for repeat in range(REPEATS):
        rng = np.random.default_rng(repeat)
        drawn = {run: loss * math.exp(noise * rng.standard_normal()) for run, loss in every.items()}
        for share in SHARES:
            runs = by_design(design, drawn, share * pool.cost, rng)
            found = _judged(design, every, runs, drawn)
            yield {"spender": DESIGN, "repeat": repeat, "share": share} | found
        runs = [each.run for each in pool.candidates]
        yield {"spender": FULL, "repeat": repeat, "share": 1.0} | _judged(design, every, runs, drawn)


def steps() -> int:
    """Return the number of rows that `replay` yields."""
    return REPEATS * (len(SPENDERS) * len(SHARES) + 1)


def _judged(
    design: Design, losses: Mapping[str, float], runs: Sequence[str], seen: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return what these runs find; they have the losses `seen`, the options have `losses`."""
    belief = design.belief({run: (seen or losses)[run] for run in runs})
    truth = np.array([losses[each.run] for each in design.pool.options])
    mean = belief.mean[design.options]
    cost = {each.run: each.cost for each in design.pool.candidates}
    spread = float(np.square(truth - truth.mean()).sum())
    found: dict[str, Any] = {
        "runs": len(runs),
        "spent": sum(cost[run] for run in runs) / design.pool.cost,
        "r2": 1 - float(np.square(np.exp(mean) - truth).sum()) / spread if spread else math.nan,
        "error": float(np.sqrt(np.square(mean - np.log(truth)).mean())),
    }
    if design.pool.question == "recipe":
        found["regret"] = losses[design.answer(belief).best.run] / float(truth.min()) - 1
    return found
