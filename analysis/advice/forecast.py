"""Forecast the lowest loss of a method, and the size and data that reach it, at any budget, as draws.

A forecast is a mixture of laws: a power law, a power law with an offset (L = E + a C^-b), and each joint law of size
and data. Hold-outs, in which each law predicts the largest budgets from those below, give the weight of a law and how
far its draws spread. A law goes wrong by its distance from the data, in ln C, times a rate. Before any hold-out the
logarithm of the rate is uniform over `RATES`. The likelihood of the errors in the hold-outs, given their noise, gives
law and rate of each draw; a hold-out counts once, so that few leave the laws nearly equal. Between the optima of the
table the forecast goes through them. No forecast lies above what a run with at most this budget reached, apart from
its noise. The price is that a line through two optima gives no forecast beyond them: nothing says how it bends.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from analysis.advice.trends import Coefficients, Optima, Trends, cost, line, trends_of
from analysis.fits import Interval, MethodFit, Optimum, Point, same_budget
from analysis.fitting.laws import LAWS, TINY, VALID, Array, Law, StatedLaw, interval
from analysis.fitting.solver import NoFit, fit_joint
from analysis.noise import Noise
from embedscale.texts import listed, number

DRAWS = 1000
ORIGINS = 4  # hold-outs: the largest one, two, … budgets are left out, at most so many
GROUPS = 8  # of budgets, where there are no optima to hold out
RATES = np.geomspace(0.01, 0.3, 20)  # rates at which a law may go wrong, as shares of the slope
FEWEST = 3  # optima of a power law that extrapolates; one more with an offset
FADE = 1.0  # steps between budgets in which the difference from the last optimum falls by a factor e
MOST_DEVIATION = 1.0  # of ln L* and ln N* of an optimum
SAME = 1e-3  # budgets that differ by less are one
UNBOUND = 5  # of so many draws, one is not bound by runs at a budget that has an optimum of its own


# --- Hold-outs -------------------------------------------------------------------------------------------------------


def _refitted(fit: MethodFit, points: Sequence[Point], names: Iterable[str]) -> Coefficients:
    """Return joint laws fitted to some of the points, without those that do not converge."""
    n, d, loss, seeds = np.array([(p.n_parameters, p.tokens, p.loss, p.seeds) for p in points], float).T
    found = {}
    for name in names if len({point.budget_flop for point in points}) > 1 else ():
        old = fit.joint_laws[name]
        with suppress(NoFit):
            new = fit_joint(LAWS[name], n, d, loss, None, seeds, old.residual, old.delta or 1e-3, starts=6)
            found[name] = new.values[None]
    return found


@dataclass(frozen=True)
class _HoldOut:
    """What a law predicted of what was held out [m]: error, variance of the error by noise, and distance in ln C."""

    error: Array
    variance: Array
    distance: Array

    def log_likelihood(self, rates: Array) -> Array:
        """Return the mean log density of the errors [rates] if the law goes wrong at these rates."""
        variance = self.variance + np.square(np.outer(rates, self.distance)) + TINY
        return -0.5 * (np.square(self.error) / variance + np.log(variance)).mean(1)


HoldOuts = list[dict[str, _HoldOut]]
"""Of each hold-out, law → what it predicted."""


def _hold_outs(
    fit: MethodFit, optima: Optima, middle: Optima, laws: tuple[Trends, Trends], names: Sequence[str]
) -> tuple[HoldOuts, HoldOuts]:
    """Return what the laws of ln L* and of ln N* predict of the largest budgets; `laws` are those of all budgets."""
    found: tuple[HoldOuts, HoldOuts] = ([], [])
    x, count = optima.x, len(optima.x)
    for kept in range(count - 1, max(FEWEST - 1, count - ORIGINS) - 1, -1):
        cut = math.exp((x[kept - 1] + x[kept]) / 2)
        points = [point for point in fit.points if point.budget_flop <= cut]
        trends = trends_of(optima.first(kept), _refitted(fit, points, names), points, FEWEST - 1)
        for i, (drawn, true) in enumerate(((optima.log_loss, middle.log_loss), (optima.log_n, middle.log_n))):
            matrix, _ = _bridge(x[:kept], (x[0], x[kept - 1]), x[kept:])
            predicted = {}
            for name, trend in trends[i].items():
                values = trend(x)
                values = values[:, kept:] + (drawn[:, :kept] - values[:, :kept]) @ matrix
                variance = values.var(0) + drawn[:, kept:].var(0)
                if len(trend(x)) == 1:  # refitted joint law: the spread of its coefficients is that of the whole fit
                    variance = variance + laws[i][name](x[kept:]).var(0)
                error = np.median(values, 0) - true[0, kept:]
                predicted[name] = _HoldOut(error, variance, x[kept:] - x[kept - 1])
            found[i].append(predicted)
    return found


def _hold_outs_of_runs(fit: MethodFit, names: Sequence[str]) -> HoldOuts:
    """Return what joint laws predict of ln L of the runs of the largest budgets, where there are too few optima."""
    found: HoldOuts = []
    budgets = np.unique([point.budget_flop for point in fit.points])
    groups = np.array_split(budgets, min(GROUPS, len(budgets)))
    for kept in range(len(groups) - 1, max(0, len(groups) - 1 - ORIGINS), -1):
        cut = groups[kept - 1][-1]
        inside = [point for point in fit.points if point.budget_flop <= cut]
        outside = [point for point in fit.points if point.budget_flop > cut]
        n, d, loss, flop = np.array([(p.n_parameters, p.tokens, p.loss, p.budget_flop) for p in outside]).T
        predicted = {}
        for name, values in _refitted(fit, inside, names).items():
            with np.errstate(over="ignore"):
                error = np.log(np.ravel(LAWS[name].predict(values, n, d)) / loss)
            if np.isfinite(error).all():
                variance = np.full(len(n), (fit.joint_laws[name].log_residual or 0.0) ** 2)
                predicted[f"{name} law"] = _HoldOut(error, variance, np.log(flop / cut))
        found.append(predicted)
    return found


# --- The mixture of laws ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mixture:
    """A quantity of the optimum against ln C, as draws of a mixture of laws."""

    x: Array  # ln C of the optima [n]
    y: Array  # draws of the quantity there [draws, n]
    ends: tuple[float, float]  # ln C of the data
    trends: Trends
    weights: Mapping[str, float]
    chosen: NDArray[np.intp]  # number of the law of each draw [draws]
    wrong: Array  # what each draw goes wrong by in one unit of ln C, for each law [laws, draws]

    @staticmethod
    def of(
        x: Array, y: Array, ends: tuple[float, float], trends: Trends, held: HoldOuts, slope: float,
        rng: np.random.Generator,
    ) -> "_Mixture":  # fmt: skip
        rates = abs(slope) * RATES
        score = np.zeros((len(trends), len(rates)))
        for each in held:
            known = {name: each[name].log_likelihood(rates) for name in trends if name in each}
            if known:
                # A law that could not be fitted in a hold-out counts as neither better nor worse there than the others.
                neutral = np.mean(list(known.values()), 0)
                score += np.array([known.get(name, neutral) for name in trends])
        table = np.exp(score - score.max())
        weights = table.sum(1) / table.sum()
        chosen = rng.permutation(_spread_over(weights))
        rows = np.exp(score - score.max(1, keepdims=True))  # `table` holds zeros only for a law that hold-outs rule out
        drawn = [rates[rng.permutation(_spread_over(row / row.sum()))] for row in rows]
        wrong = np.array(drawn) * rng.standard_normal(DRAWS)
        return _Mixture(x, y, ends, trends, dict(zip(trends, weights.tolist(), strict=True)), chosen, wrong)

    def at(self, at: Array) -> Array:
        """Return draws [draws, k] at ln C [k]."""
        matrix, gap = _bridge(self.x, self.ends, at)
        result = np.empty((DRAWS, len(at)))
        for i, trend in enumerate(self.trends.values()):
            rows = np.flatnonzero(self.chosen == i)
            if len(rows):
                drawn = np.resize(trend(np.append(self.x, at)), (DRAWS, len(self.x) + len(at)))[rows]
                there, here = drawn[:, : len(self.x)], drawn[:, len(self.x) :]
                result[rows] = here + (self.y[rows] - there) @ matrix + self.wrong[i, rows, None] * gap
        return result


def _spread_over(shares: Array) -> NDArray[np.intp]:
    """Return a number for each draw [draws], so that each number has its share of the draws."""
    found = np.searchsorted(np.cumsum(shares), (np.arange(DRAWS) + 0.5) / DRAWS)
    return np.minimum(found, len(shares) - 1)


def _bridge(x: Array, ends: tuple[float, float], at: Array) -> tuple[Array, Array]:
    """Return how much each optimum at x [n] adds at ln C [k], as a matrix [n, k], and the distance to the data [k]."""
    matrix = np.zeros((len(x), len(at)))
    gap = np.maximum(np.maximum(ends[0] - at, at - ends[1]), 0.0)
    step = float(np.diff(x).mean()) if len(x) > 1 else 1.0
    right = np.searchsorted(x, at)
    inside = (right > 0) & (right < len(x))
    k, i = np.flatnonzero(inside), right[inside]
    share, width = (at[k] - x[i - 1]) / (x[i] - x[i - 1]), x[i] - x[i - 1]
    matrix[i - 1, k], matrix[i, k] = 1 - share, share
    gap[k] = share * (1 - share) * width
    if len(x):
        k = np.flatnonzero(~inside)
        end = np.minimum(right[k], len(x) - 1)
        matrix[end, k] = [math.exp(-away / (FADE * step)) for away in np.abs(at[k] - x[end])]
    return matrix, gap


# --- The forecast of a method ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """The lowest loss of a method at one budget, and the size and data that reach it, as draws [draws].

    Draw i of one method is the same law with the same coefficients at every budget.
    """

    budget_flop: float
    log_loss: Array
    log_n: Array
    log_d: Array

    def loss(self, confidence: float) -> tuple[float, Interval | None]:
        """Return the loss (nats) and its interval."""
        return summary(self.log_loss, confidence)

    def n_opt(self, confidence: float) -> tuple[float, Interval | None]:
        """Return the size N* and its interval."""
        return summary(self.log_n, confidence)

    def d_opt(self, confidence: float) -> tuple[float, Interval | None]:
        """Return the tokens D* and their interval."""
        return summary(self.log_d, confidence)


def summary(log_draws: Array, confidence: float) -> tuple[float, Interval | None]:
    """Return the median and the interval of draws that are given as logarithms; no interval where they are equal."""
    ends = interval(np.exp(log_draws), confidence)
    return float(np.exp(np.nanmedian(log_draws))), ends if ends and ends[1] > ends[0] else None


class Outlook:
    """All that can be forecast of one method.

    `laws` names each law with its share of the draws of the loss. `reach` is the range of budgets (FLOP) for which
    there is a forecast. `missing` says what to add where the reach ends at the data; else it is empty.
    """

    def __init__(
        self, fit: MethodFit, noise: Noise | None = None, confidence: float = 0.95, seed: Sequence[int] = (0,)
    ):
        """`noise` is that of one run; `confidence` is that of the intervals in `fit`.

        Methods that share a noise and the first number of `seed` share the draws of that noise.
        """
        rng = np.random.default_rng(seed)
        drawn = noise.draws(DRAWS, np.random.default_rng(seed[0])) if noise else None
        self.fit, self._noise, self._seed = fit, np.zeros(DRAWS) if drawn is None else drawn, tuple(seed)
        self._luck = _centred(rng)[:, 0]
        interior = fit.interior
        x = np.log([row.budget_flop for row in interior])
        found = np.array([(row.loss, row.n_opt) for row in interior], float).reshape(-1, 2)
        middle = Optima(x, np.log(found[None, :, 0]), np.log(found[None, :, 1]))
        normal = NormalDist().inv_cdf(0.5 + confidence / 2)
        loss, size = (_deviations(interior, name, normal) for name in ("loss", "n_opt"))
        drawn_loss, drawn_size = loss * _centred(rng, len(x)), size * _centred(rng, len(x))
        optima = Optima(x, middle.log_loss + drawn_loss, middle.log_n + drawn_size)
        budgets = np.log([point.budget_flop for point in fit.points])
        ends = (float(budgets.min()), float(budgets.max()))
        joint = {
            name: np.asarray(law.draws, float) if law.draws else StatedLaw.fitted(law).values[None]
            for name, law in fit.joint_laws.items()
            if name in LAWS and not LAWS[name].needs_fraction
        }
        losses, sizes = trends_of(optima, joint, fit.points, FEWEST)
        for name in [f"{each} law" for each in joint if not np.isfinite(losses[f"{each} law"](np.array(ends))).all()]:
            losses.pop(name), sizes.pop(name), joint.pop(name.removesuffix(" law"))
        self.reach, self.missing = (0.0, math.inf), ""
        self.laws: Mapping[str, float] = {}
        if not losses:
            self.missing = self._what_is_missing()
            self.reach = (math.exp(x[0]) * (1 - SAME), math.exp(x[-1]) * (1 + SAME)) if len(x) else (0.0, 0.0)
            if not len(x):
                return
            losses, sizes = {"optima": line(x, optima.log_loss)}, {"optima": line(x, optima.log_n)}
        if len(x) >= FEWEST:
            held = _hold_outs(fit, optima, middle, (losses, sizes), list(joint))
            ends = (x[0], x[-1])
        else:
            held = _hold_outs_of_runs(fit, list(joint)), []
        self._loss, self._size = (
            _Mixture.of(x, drawn, ends, trends, found, _slope(trends, ends[1]), rng)
            for drawn, trends, found in ((optima.log_loss, losses, held[0]), (optima.log_n, sizes, held[1]))
        )
        self.laws = self._loss.weights

    def covers(self, budget_flop: float) -> bool:
        """Return whether there is a forecast for a budget."""
        inside = self.reach[0] <= budget_flop <= self.reach[1]
        # A joint law has no optimum where the best size would be far beyond all sizes that were run.
        at = np.array([math.log(budget_flop)])
        return inside and all(np.isfinite(each.at(at)).mean() >= VALID for each in (self._loss, self._size))

    def has_optimum(self, budget_flop: float) -> bool:
        """Return whether the runs of this very budget show an optimum; then runs with less say nothing more about it.

        So a lucky run, or losses that rise with the budget, contradict no optimum that was measured.
        """
        x = self._loss.x
        return len(x) > 0 and float(np.abs(x - math.log(budget_flop)).min()) < SAME

    def at(self, budget_flop: float) -> Forecast:
        """Return the forecast for a budget that `covers` allows."""
        at = np.array([math.log(budget_flop)])
        log_n = self.log_size(at)[:, 0]
        log_d = at - np.log(cost(self.fit.points, np.exp(log_n), budget_flop))
        return Forecast(budget_flop, self.log_loss(at)[:, 0], log_n, log_d)

    def log_size(self, at: Array) -> Array:
        """Return draws of ln N* [draws, k] at ln C [k]."""
        return self._size.at(at)

    def log_loss(self, at: Array) -> Array:
        """Return draws of ln L* [draws, k] at ln C [k]."""
        found = self._loss.at(at)
        for k, here in enumerate(at):
            own = self.has_optimum(math.exp(here))
            points = [p for p in self.fit.points if not own or same_budget(p.budget_flop, math.exp(here))]
            self.bind(found[:, k], points, here, own)
        return found

    def _what_is_missing(self) -> str:
        """Return which runs would let the optima extrapolate."""
        count = {0: "no optimum", 1: "one optimum", 2: "two optima"}[len(self.fit.interior)]
        said = f"{count} and no joint law, from which nothing follows for other budgets"
        lacking = FEWEST - len(self.fit.interior)
        open_ = [row for row in self.fit.optima if row.add_size][-lacking:]
        wishes = [f"{number(row.add_size)} parameters at {number(row.budget_flop)} FLOP" for row in open_]
        budgets = [row.budget_flop for row in self.fit.optima]
        step = budgets[-1] / budgets[-2] if len(budgets) > 1 else 4.0
        more = [number(budgets[-1] * step**k) for k in range(1, lacking - len(open_) + 1)]
        wishes += [f"at least three sizes at {listed(more)} FLOP"] if more else []
        return f"{said}; add runs of {', and of '.join(wishes)}"

    def drift(self, law: Law, at: Array) -> Array:
        """Return draws [draws, k] of how far a joint law goes wrong at ln C [k]: its lack of fit, more beyond the data.

        A draw is wrong by the same amount at every size.
        """
        names = list(self._loss.trends)
        name = f"{law.name} law"
        gap = _bridge(self._loss.x, self._loss.ends, at)[1]
        misfit = (self.fit.joint_laws[law.name].log_residual or 0.0) * self._luck[:, None]
        return misfit + self._loss.wrong[names.index(name) if name in names else 0, :, None] * gap

    def measured(self, point: Point) -> Array:
        """Return draws [draws] of ln L of a run: its loss and its noise."""
        rng = np.random.default_rng([*self._seed, int(point.n_parameters), int(point.budget_flop)])
        return math.log(point.loss) + self._noise / math.sqrt(point.seeds) * _centred(rng)[:, 0]

    def bind(self, log_loss: Array, points: Sequence[Point], at: float, own: bool = False) -> None:
        """Lower draws [draws] to what the best of these runs with at most this budget reached, apart from its noise.

        Runs far off the joint law do not count: a slip of a table would bind every budget above it.
        Where the budget has an optimum of its own, some draws stay, so that the interval holds the optimum too.
        """
        before = [point for point in points if math.log(point.budget_flop) <= at + SAME and point.off is None]
        if before:
            best = min(before, key=lambda point: point.loss)
            bound = math.log(best.loss) + self._noise / math.sqrt(best.seeds) * (1 + self._luck)
            bound[::UNBOUND] = np.where(own, np.inf, bound[::UNBOUND])
            np.minimum(log_loss, bound, out=log_loss)


def _centred(rng: np.random.Generator, columns: int = 1) -> Array:
    """Return standard normal draws [draws, columns] with medians of 0: a median of draws is then what was found."""
    drawn = rng.standard_normal((DRAWS, columns))
    return drawn - np.median(drawn, 0)


def _deviations(interior: Sequence[Optimum], name: str, normal: float) -> Array:
    """Return the standard deviation [n] of the logarithm of each optimum, by its interval and by other estimators.

    An optimum is known no better than the nearest of the other estimators says. Without an interval it has the largest
    deviation of the others.
    """
    found = []
    for row in interior:
        ends, value = getattr(row, f"{name}_interval"), getattr(row, name)
        others = [getattr(each, name) for each in (row.parabola, row.akima, row.law) if each]
        apart = [abs(math.log(each / value)) for each in others if each != value]
        noise = math.log(ends[1] / ends[0]) / (2 * normal) if ends else math.nan
        found.append(min(math.hypot(noise, min(apart, default=0.0)), MOST_DEVIATION))
    return np.where(np.isfinite(found), found, np.nanmax(found) if np.isfinite(found).any() else 0.0)


def _slope(trends: Trends, end: float) -> float:
    """Return the slope of a quantity in ln C at the largest budget, as the median of its laws."""
    found = [np.nanmedian(trend(np.array([end - 1, end])), 0) for trend in trends.values()]
    return float(np.median([values[1] - values[0] for values in found]))


def chances(drawn: Mapping[str, Array]) -> dict[str, float]:
    """Return the probability that each method has the lowest loss, by draws [draws] of each; the most likely first."""
    lowest = np.argmin(np.nan_to_num(np.array(list(drawn.values())), nan=np.inf), 0)
    shares = np.bincount(lowest, minlength=len(drawn)) / len(lowest)
    return dict(sorted(zip(drawn, shares.tolist(), strict=True), key=lambda each: -each[1]))
