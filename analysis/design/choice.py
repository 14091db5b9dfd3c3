"""Choose the next runs of a pool: those whose loss would say most about the answer, for their cost.

The question is a recipe (which of the options has the lowest loss) or a forecast (what their losses are). The worth of
a run is how far it would lower the variance of the answer, by `surface`, without a refit. For a recipe that is the
variance of what separates the options, each weighted by its probability to be the best: runs that cannot change the
choice have no worth. Worth is divided by a power of the cost. The same finished runs give the same choices. The price
of looking one run ahead: what a run opens for later ones counts only through this power.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from analysis.design.surface import Belief, Places, Rows, Surface
from analysis.fitting.laws import Array
from embedscale.texts import number

COST_POWER = 0.5  # worth is divided by cost to this power: half way between worth alone and worth per cost
CHECKS = 0.1  # share of a batch's cost for runs that could prove the law wrong
BATCH = 0.05  # runs of a batch, as a share of the finished ones: a larger batch costs less fits and knows less
GROWTH = 8.0  # a run may cost at most this many times all finished runs together
CHEAP = 8  # runs that may begin before that
EVEN = 0.3  # share of the weight that all options have alike, because few runs can be sure of the wrong one
DRAWS = 400
NORMAL = 1.96  # standard deviations on each side of a 95 % interval


@dataclass(frozen=True)
class Candidate:
    """A run that could be made. `cost` has the unit of the money; `settings` are those that `Pool.settings` names."""

    run: str
    method: str
    n_parameters: float
    tokens: float
    budget_flop: float
    cost: float
    settings: tuple[float | None, ...] = ()

    @property
    def label(self) -> str:
        """What sets the run apart, in words."""
        return f"{self.method}, {number(self.n_parameters)} parameters, {number(self.budget_flop)} FLOP"


@dataclass(frozen=True)
class Pool:
    """The runs that may be chosen, and the options of the answer: runs, of the pool or not, at the target."""

    candidates: tuple[Candidate, ...]
    options: tuple[Candidate, ...]
    question: Literal["recipe", "forecast"] = "recipe"
    settings: tuple[str, ...] = ()
    noise: float | None = None
    """Standard deviation of ln L of one run; None where nobody knows it."""

    @property
    def cost(self) -> float:
        """The cost of all candidates."""
        return sum(each.cost for each in self.candidates)


@dataclass(frozen=True)
class NextRun:
    """A run to make next, and why, in one line."""

    run: str
    why: str
    is_check: bool = False


@dataclass(frozen=True)
class Answer:
    """What finished runs say about the options."""

    best: Candidate
    """The option with the lowest expected loss."""
    loss: float
    """Its loss (nats)."""
    interval: tuple[float, float]
    """95 %."""
    regret: float
    """How much more than the lowest loss of all options it is expected to reach, as a share of the loss."""
    chances: dict[str, float]
    """The probability that each method has the best option; the most likely first."""


@dataclass(frozen=True)
class Crossing:
    """The budget from which on another method is the best."""

    below: str
    above: str
    budget_flop: float
    interval: tuple[float, float]
    """95 %. It ends at 0 where the method above may be the best at every budget, at infinity where at none."""


def crossings(x: Array, difference: Array) -> Array:
    """Return the last place where each row of differences [draws, budgets] at x [budgets] falls below 0.

    A row that ends above 0 crosses at infinity; one that is never above 0 at minus infinity.
    """
    found = np.full(len(difference), np.inf)
    for i, row in enumerate(difference):
        above = np.flatnonzero(row > 0)
        if not len(above):
            found[i] = -np.inf
        elif above[-1] < len(x) - 1:
            k = above[-1]
            found[i] = x[k] + (x[k + 1] - x[k]) * row[k] / (row[k] - row[k + 1])
    return found


class Design:
    """A pool, and the model of its losses. `options` are the rows of the options, `cost` is that of each candidate."""

    def __init__(self, pool: Pool):
        self.pool = pool
        every = self._every
        settings = np.array([[np.nan if v is None else v for v in each.settings] for each in every], float)
        places = Places.of(
            [each.method for each in every],
            [each.n_parameters for each in every],
            [each.tokens for each in every],
            settings.reshape(len(every), -1),
        )
        self._surface = Surface(places, pool.noise)
        self._row = {each.run: i for i, each in enumerate(every)}
        self.options: Rows = np.array([self._row[each.run] for each in pool.options])
        self.cost = np.array([each.cost for each in pool.candidates])

    @cached_property
    def _every(self) -> list[Candidate]:
        """The candidates, then the options that are no candidates."""
        own = {each.run for each in self.pool.candidates}
        return [*self.pool.candidates, *(each for each in self.pool.options if each.run not in own)]

    def belief(self, finished: Mapping[str, float]) -> Belief:
        """Return what finished runs (run → loss in nats) say of every run of the pool."""
        known = sorted((self._row[run], math.log(loss)) for run, loss in finished.items())
        rows = np.array([row for row, _ in known], dtype=np.intp)
        return self._surface.belief(rows, np.array([value for _, value in known]))

    def answer(self, belief: Belief) -> Answer:
        """Return what a belief says about the options."""
        drawn = belief.draws(self.options, DRAWS)
        place = int(belief.mean[self.options].argmin())
        best, row = self.pool.options[place], self.options[place]
        half = NORMAL * math.sqrt(belief.covariance[row, row])
        shares: dict[str, float] = dict.fromkeys((each.method for each in self.pool.options), 0.0)
        for i in drawn.argmin(1):
            shares[self.pool.options[i].method] += 1 / len(drawn)
        middle = float(belief.mean[row])
        return Answer(
            best,
            math.exp(middle),
            (math.exp(middle - half), math.exp(middle + half)),
            float((drawn[:, place] - drawn.min(1)).mean()),
            dict(sorted(shares.items(), key=lambda each: -each[1])),
        )

    def crossing(self, belief: Belief) -> "Crossing | None":
        """Return the budget from which on the method that is best at the target is the best; None for one method.

        Budgets are those of the pool, up to the target; between them the difference of ln L is interpolated in ln C.
        """
        target = max(each.budget_flop for each in self.pool.options)
        every = [*self.pool.candidates, *self.pool.options]
        budgets = sorted({each.budget_flop for each in every if each.budget_flop <= target})
        drawn = np.vstack([belief.mean, belief.draws(np.arange(len(self._every)), DRAWS)])
        lowest: dict[str, Array] = {}  # method → lowest ln L of each budget [1 + draws, budgets]; the first is the mean
        for method in dict.fromkeys(each.method for each in self.pool.options):
            lowest[method] = np.full((len(drawn), len(budgets)), np.inf)
            for k, budget in enumerate(budgets):
                rows = [self._row[c.run] for c in every if c.method == method and c.budget_flop == budget]
                if rows:
                    lowest[method][:, k] = drawn[:, rows].min(1)
        if len(lowest) == 1:
            return None
        above = str(self.answer(belief).best.method)
        own = lowest.pop(above)
        difference = own - np.min(list(lowest.values()), axis=0)
        found = crossings(np.log(budgets), difference)
        k = max(int(np.searchsorted(np.log(budgets), found[0])) - 1, 0)  # the budget before the crossing
        rivals = [float(each[0, k]) for each in lowest.values()]
        low, high = np.percentile(found[1:], [2.5, 97.5], method="nearest")
        ends = (float(np.exp(low)), float(np.exp(high)))
        return Crossing(list(lowest)[int(np.argmin(rivals))], above, float(np.exp(found[0])), ends)

    def next_batch(
        self,
        finished: Mapping[str, float],
        money: float,
        width: int = 1,
        lost: Collection[str] = (),
    ) -> list[NextRun]:
        """Return the next runs to make, the most valuable first; none where no run that the money pays has a worth.

        `money` is what may still be spent, in the unit of `Candidate.cost`. A batch has at least `width` runs, as many
        as can run at the same time. Runs in `lost` failed or diverged: they were paid and have no loss.
        """
        belief = self.belief(finished)
        gone = {self._row[run] for run in (*finished, *lost)}
        left = np.array([i for i in range(len(self.pool.candidates)) if i not in gone], dtype=np.intp)
        spent = float(sum(self.cost[i] for i in gone if i < len(self.cost)))
        limit = max(GROWTH * spent, float(np.sort(self.cost)[: CHEAP + 1][-1]))
        count = max(width, math.ceil(BATCH * len(gone)))
        worth = self._worth(belief)
        chosen: list[NextRun] = []
        paid = 0.0
        while len(chosen) < count:
            rows = left[self.cost[left] <= min(money - paid, limit)]
            if not len(rows):
                break
            lowered, of = worth(belief, rows)
            best = int((lowered / self.cost[rows] ** COST_POWER).argmax())
            if not lowered[best] > 0:
                break
            row = int(rows[best])
            chosen.append(NextRun(self._every[row].run, self._why(lowered[best] / of)))
            belief, left, paid = belief.after(row), left[left != row], paid + float(self.cost[row])
        check = self._check(belief, left[self.cost[left] <= min(money - paid, CHECKS / (1 - CHECKS) * paid)])
        return [*chosen, check] if check else chosen

    def _worth(self, belief: Belief) -> Callable[[Belief, Rows], tuple[Array, float]]:
        """Return a function that gives how far each run would lower the variance of the answer, and this variance."""
        options = self.options
        if self.pool.question == "forecast":
            shares = np.full(len(options), 1 / len(options))
        else:
            best = belief.draws(options, DRAWS).argmin(1)
            shares = (1 - EVEN) * np.bincount(best, minlength=len(options)) / DRAWS + EVEN / len(options)

        def worth(belief: Belief, rows: Rows) -> tuple[Array, float]:
            moved = belief.covariance[np.ix_(rows, options)]
            own = belief.covariance[rows, rows] + belief.noise**2
            inner = belief.covariance[np.ix_(options, options)]
            lowered, of = np.square(moved) @ shares, float(np.diag(inner) @ shares)
            if self.pool.question == "recipe":  # what moves all options alike moves no choice
                lowered, of = lowered - np.square(moved @ shares), of - float(shares @ inner @ shares)
            return lowered / own, max(of, 1e-300)

        return worth

    def _why(self, share: float) -> str:
        what = "of the forecast" if self.pool.question == "forecast" else "between the best options"
        return f"lowers the variance {what} by {100 * share:.2g} %"

    def _check(self, belief: Belief, rows: Rows) -> NextRun | None:
        """Return the run that tells most, for its cost, of what the law is wrong by at the options."""
        if not len(rows):
            return None
        told = np.square(belief.bent[np.ix_(rows, self.options)]).mean(1) / (belief.bent[rows, rows] + belief.noise**2)
        row = int(rows[(told / self.cost[rows] ** COST_POWER).argmax()])
        half = NORMAL * math.sqrt(belief.covariance[row, row] + belief.noise**2)
        ends = (number(math.exp(belief.mean[row] + sign * half), 4) for sign in (-1, 1))
        return NextRun(self._every[row].run, f"check of the law, which says {' to '.join(ends)}", is_check=True)
