"""The batched minimiser behind every joint law.

Every start, bootstrap resample or simulated sweep is a row of the same arrays, so thousands of refits take seconds.
Each row goes through a homotopy: first least squares, then Huber's objective with a δ that falls to the wanted one. At
each stage a trust-region Newton method with the exact Hessian runs from where the last stage ended. Gauss–Newton and
re-weighted least squares are simpler, but on tables under 30 rows they stop in flat valleys far above the minimum. The
price is that each law supplies second derivatives, or pays for differences of its gradient.

Where δ is far below the noise, most points lie on the straight part of Huber's ρ and the Hessian does not know of the
kinks ahead, so Newton's method alone takes hundreds of steps. Far from the minimum such points bend the model as in
re-weighted least squares (`SOFT`), and each step ends at the lowest point of the kinks on its way (`_way`).
"""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from multiprocessing import current_process, get_context
from signal import SIG_DFL, SIGINT, SIGTERM, signal

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.laws import Array, Data, Law
from embedscale.process import usable_cores
from embedscale.run.stop import end_with_parent

LAD_DELTA = 1e-6  # Huber's δ for least absolute deviations: far below any noise of ln L
STAGES = (0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)  # δ of the homotopy
TOLERANCE = 1e-7  # largest scaled gradient of a fit
LIMIT = 1e-7  # of the largest scale: a coordinate below it has run to its limit, where its term is nothing
EXACT = 1e-7  # rms residual below which a fit is as good as exact, so that rounding decides its gradient
ITERATIONS = 500  # of the last stage; a flat valley between kinks of Huber's ρ takes many
ROUND = 40  # steps after which the radius is renewed
CHECK = 10  # steps after which hopeless rows are given up
RADIUS = 0.3  # of the first step, in internal coordinates
SOFT, SOFTEST = 10.0, 0.3  # share by which points outside of δ bend the model: times the scaled gradient, and at most
HALVINGS = 6  # of the way along a step
SHORTEST = 0.02  # of a step
HOPE = 3.0  # times its last fall: how fast a row may fall to the lowest minimum, else it is hopeless
SHAKEN = 24  # starts of a fit at least squares with random weights
SHAKEN_REFIT = 8  # of a refit
AROUND, AROUND_REFIT = 192, 6  # starts around the lowest end, of a fit and of a refit
AROUND_ROUNDS = 5  # most times that a fit looks around: one whose exponent runs to 0 falls for ever
SHARES = (0.02, 0.9)  # of the lowest loss, for a term that is nothing
LOWER = 1e-6  # relative fall of the lowest end for which a fit looks around once more
SAME = 1e-4  # relative difference of objectives up to which two least squares are the same
BLOCK = 128  # rows that are solved together, at least
PART = 100  # rows that are solved in one process
NUMBERS = 30_000  # points of all rows that are solved together, so that their arrays fit into the cache


@dataclass(frozen=True)
class _Task:
    """What the rows of a batch have in common: the law, its arguments and the residual."""

    law: Law
    data: Data
    raw: bool
    delta: float | None  # Huber's δ; None for least squares


@dataclass
class _Rows:
    """A batch of points theta [b, p], with the objective there, its gradient and the Hessian of its model.

    `slope` [b] is the largest scaled gradient. The residuals [b, points] have the `jacobian` [b, p, points].
    """

    theta: Array
    target: Array
    weights: Array
    value: Array
    gradient: Array
    hessian: Array
    slope: Array
    residuals: Array
    jacobian: Array

    def take(self, rows: NDArray[np.bool_]) -> "_Rows":
        return _Rows(**{name: each[rows] for name, each in vars(self).items()})

    def join(self, other: "_Rows") -> "_Rows":
        return _Rows(**{name: np.concatenate([each, getattr(other, name)]) for name, each in vars(self).items()})

    def put(self, rows: NDArray[np.bool_], other: "_Rows") -> "_Rows":
        """Return some rows at the places of another batch with the same points and weights; this one may change."""
        if rows.all():
            return other
        for name in ("theta", "value", "gradient", "hessian", "slope", "residuals", "jacobian"):
            getattr(self, name)[rows] = getattr(other, name)[rows]
        return self


@dataclass
class Solution:
    """theta [b, p], objective [b] (sum over points), scaled gradient [b] and iterations [b] of each row."""

    theta: Array
    objective: Array
    gradient: Array
    iterations: NDArray[np.int_]

    def take(self, rows: NDArray[np.int_] | NDArray[np.bool_]) -> "Solution":
        return Solution(self.theta[rows], self.objective[rows], self.gradient[rows], self.iterations[rows])

    def join(self, other: "Solution") -> "Solution":
        return Solution(*(np.concatenate([each, getattr(other, name)]) for name, each in vars(self).items()))

    @property
    def converged(self) -> NDArray[np.bool_]:
        return self.gradient <= TOLERANCE


def _evaluate(task: _Task, theta: Array, target: Array, weights: Array) -> _Rows:
    """Return the objective, its gradient and its Hessian; the objective is infinite where the law is not positive.

    A point outside of δ adds a share of δ / |r| to the Hessian: the curvature of the parabola that touches ρ from
    above. The share falls to 0 with the gradient, so that the last steps are Newton's.
    """
    delta = task.delta
    with np.errstate(all="ignore"):
        loss, slopes = task.law.gradient(theta, task.data)
        if task.raw:
            r, jacobian = loss - np.exp(target), slopes * loss[:, None]
        else:
            r, jacobian = np.log(loss) - target, slopes
        clipped = r if delta is None else _clip(r, delta)
        pull = weights * clipped
        value = (pull * (r - 0.5 * clipped)).sum(-1)
        gradient = (jacobian @ pull[..., None])[..., 0]
        transposed = jacobian.transpose(0, 2, 1)
        scale = np.sqrt((weights[:, None] @ np.square(transposed))[:, 0])
        fine = (loss > 0).all(-1) & np.isfinite(gradient).all(1) & np.isfinite(value)
        slope = _scaled(task.law, np.where(fine, value, np.inf), gradient, scale, weights)
        bends = weights
        if delta is not None:
            share = np.minimum(SOFT * slope, SOFTEST)[:, None]
            bends = np.where(clipped == r, weights, share * np.abs(pull / r))
        if task.raw:
            hessian = (jacobian * bends[:, None]) @ transposed
            hessian += task.law.curvature(theta, task.data, slopes, pull * loss)
        else:
            hessian = (jacobian * (bends - pull)[:, None]) @ transposed
            hessian += task.law.curvature(theta, task.data, slopes, pull)
        fine &= np.isfinite(hessian).all((1, 2))
        value, slope = np.where(fine, value, np.inf), np.where(fine, slope, np.inf)
    return _Rows(theta, target, weights, value, gradient, hessian, slope, r, jacobian)


def _scaled(law: Law, value: Array, gradient: Array, scale: Array, weights: Array) -> Array:
    """Return the largest scaled gradient [b]; 1 is a slope as large as the objective.

    A coordinate at its limit, such as ln E for E near 0, does not count, because its term is 0 in every row. It counts
    again if the objective would fall with a larger term.
    """
    gone = (scale < LIMIT * scale.max(1, keepdims=True)) & ((gradient >= 0) | ~law.is_logarithm)
    relative = np.where(gone, 0.0, np.abs(gradient) / np.maximum(scale, 1e-300)).max(1)
    least = EXACT**2 * weights.sum(-1)
    return np.where(np.isfinite(value), relative / np.sqrt(np.maximum(value, least)), np.inf)


def _step(values: Array, gradient: Array, radius: Array) -> Array:
    """Return the step [b, p] that minimises the quadratic model within a radius [b] (Moré and Sorensen 1983).

    `values` are the eigenvalues of the Hessian in ascending order, and all is in the basis of its eigenvectors. A step
    that is cut to the radius may be a tenth longer, as in MINPACK.
    """
    with np.errstate(all="ignore"):
        # The step's length falls with the shift. The longest of its components is as long as the radius at `shift`, so
        # the whole step is longer: from there Newton on 1 / length rises to the shift that is wanted.
        least = np.maximum(0, -values[:, 0]) + 1e-14 * np.abs(values).max(1)
        shift = np.maximum(least, (np.abs(gradient) / radius[:, None] - values).max(1))
        for _ in range(4):
            shifted = values + shift[:, None]
            square = np.square(gradient / shifted)
            length = square.sum(1)
            more = (np.sqrt(length) / radius - 1) * length / (square / shifted).sum(1)
            longer = more > 0
            if not longer.any():
                break
            shift += np.where(longer, more, 0)
        return -gradient / (values + shift[:, None])


def _way(delta: float, here: _Rows, move: Array) -> Array:
    """Return how far along a step [b, p] Huber's objective of the linear model is lowest, from `SHORTEST` to 1 [b]."""
    change = (move[:, None] @ here.jacobian)[:, 0]
    pull = here.weights * change
    way = np.ones(len(move))
    part = np.flatnonzero(~((_clip(here.residuals + change, delta) * pull).sum(1) <= 0))
    if len(part):
        residuals, change, pull = here.residuals[part], change[part], pull[part]
        low, high = np.zeros(len(part)), np.ones(len(part))
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            rises = (_clip(residuals + middle[:, None] * change, delta) * pull).sum(1) > 0
            low, high = np.where(rises, low, middle), np.where(rises, middle, high)
        way[part] = np.maximum(0.5 * (low + high), SHORTEST)
    return way


def _clip(r: Array, delta: float) -> Array:
    """Return what numpy.clip(r, −δ, δ) returns, in half of its time for few rows."""
    return np.minimum(np.maximum(r, -delta), delta)


def _newton(
    task: _Task,
    start: Solution,
    target: Array,
    weights: Array,
    iterations: int,
    tolerance: float,
    owner: NDArray[np.int_] | None = None,
) -> Solution:
    """Return where a trust-region Newton method ends from every row of `start`.

    Rows that have ended make room for rows that wait, so that a few slow ones do not hold up a nearly empty block. Rows
    with one `owner` [b] look for one minimum: a row ends where, as fast as it falls, it does not reach the lowest of
    them.
    """
    batch, block = len(start.theta), max(BLOCK, NUMBERS // target.shape[1])
    owner = np.arange(batch) if owner is None else owner
    reached, before = np.full(int(owner.max(initial=0)) + 1, np.inf), np.full(batch, np.inf)
    end = Solution(start.theta.copy(), np.full(batch, np.inf), np.full(batch, np.inf), start.iterations.copy())
    rows, made, radius, entered = np.empty(0, int), np.empty(0, int), np.empty(0), 0
    hopeless = np.empty(0, bool)
    here = _evaluate(task, start.theta[:0], target[:0], weights[:0])
    while entered < batch or len(rows):
        if entered < batch and len(rows) <= block // 2:
            new = np.arange(entered, min(entered + block - len(rows), batch))
            here = here.join(_evaluate(task, start.theta[new], target[new], weights[new]))
            rows, entered = np.append(rows, new), entered + len(new)
            made = np.append(made, np.zeros(len(new), int))
            radius = np.append(radius, np.full(len(new), RADIUS))
            hopeless = np.append(hopeless, np.zeros(len(new), bool))
        converged = here.slope <= tolerance
        done = converged | hopeless | (radius < 1e-13) | ~np.isfinite(here.value) | (made == iterations)
        if done.any():
            np.minimum.at(reached, owner[rows[converged]], here.value[converged])
            left = rows[done]
            end.theta[left], end.objective[left], end.gradient[left] = (
                here.theta[done],
                here.value[done],
                here.slope[done],
            )
            end.iterations[left] += made[done]
            rows, made, radius, here = rows[~done], made[~done], radius[~done], here.take(~done)
            hopeless = hopeless[~done]
            continue
        radius = np.where(made % ROUND == ROUND - 1, np.maximum(radius, RADIUS), radius)
        made += 1
        values, vectors = np.linalg.eigh(here.hessian)
        gradient = (here.gradient[:, None] @ vectors)[:, 0]
        step = _step(values, gradient, radius)
        if task.delta is not None:
            step *= _way(task.delta, here, (vectors @ step[..., None])[..., 0])[:, None]
        expected = -(gradient * step + 0.5 * values * step * step).sum(1)
        length = np.sqrt(np.square(step).sum(1))
        theta = here.theta + (vectors @ step[..., None])[..., 0]
        there = _evaluate(task, theta, here.target, here.weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            gain = here.value - there.value
            # Close to the minimum rounding hides the gain; the gradient still shows it.
            level = (gain > -1e-13 * here.value) & (there.slope < here.slope)
            ratio = np.where(level, np.maximum(gain / expected, 0.5), gain / np.maximum(expected, 1e-300))
        ratio = np.where(np.isfinite(ratio), ratio, -1.0)
        wider = np.where((ratio > 0.7) & (length > 0.9 * radius), 2.5 * radius, radius)
        radius = np.minimum(np.where(ratio < 0.25, 0.3 * length, wider), 3.0)
        here = here.put((gain > 0) | level, there)
        ends = made % CHECK == 0
        if ends.any():
            again, value = rows[ends], here.value[ends]
            np.minimum.at(reached, owner[again], value)
            with np.errstate(invalid="ignore"):
                still = HOPE * (before[again] - value) * (iterations - made[ends]) / CHECK
                hopeless[ends] = value - still > reached[owner[again]]
            before[again] = value
    return end


class Problem:
    """The minimum of a law for losses and weights [b, points], by the homotopy."""

    def __init__(self, law: Law, data: Data, loss: Array, weights: Array, residual: str, delta: float):
        self.target, self.weights = np.broadcast_arrays(np.log(loss), np.asarray(weights, float))
        self.last = {"huber": delta, "lad": LAD_DELTA}.get(residual)
        self.stages = [each for each in STAGES if self.last and each > 1.5 * self.last]  # no stages for squares
        self.task = _Task(law, data, residual == "raw", None)

    def directly(self, found: Solution, rows: NDArray[np.int_]) -> Solution:
        """Minimise from every start of `found`, without a homotopy; start i is of the losses and weights `rows[i]`."""
        task = replace(self.task, delta=self.last)
        return _newton(task, found, self.target[rows], self.weights[rows], ITERATIONS, TOLERANCE, rows)

    def squares(self, found: Solution, rows: NDArray[np.int_]) -> Solution:
        """Minimise the squares: far from the minimum, nearly all points lie on the straight part of Huber's ρ."""
        return _newton(self.task, found, self.target[rows], self.weights[rows], 60, 1e-4)

    def staged(self, delta: float, found: Solution, rows: NDArray[np.int_]) -> Solution:
        """Minimise one of the `stages` of the homotopy from where the last one ended."""
        return _newton(replace(self.task, delta=delta), found, self.target[rows], self.weights[rows], 60, 1e-3)

    def shaken(self, theta: Array, rows: NDArray[np.int_]) -> Solution:
        """Return the least squares of each row with random weights: starts in other basins of Huber's ρ."""
        shares = np.random.default_rng(0).exponential(size=(len(rows), self.target.shape[1]))
        weights = self.weights[rows] * shares
        return began(_newton(self.task, began(theta), self.target[rows], weights, 60, 1e-4).theta)

    def around(self, theta: Array, rows: NDArray[np.int_]) -> Solution:
        """Minimise from a random point near each theta [b, p]: kinks of Huber's ρ make basins beside each other.

        A term that is nothing, such as E where it has run to 0, never returns by itself: every second start gives each
        such term a random share of the lowest loss.
        """
        law, rng = self.task.law, np.random.default_rng(1)
        spread = np.where(
            np.isin(law.coefficients, law.exponents), 0.1, np.where(np.arange(theta.shape[1]) > 0, 0.4, 1)
        )
        near = theta + spread * rng.standard_normal(theta.shape)
        least = self.target[rows].min(1, keepdims=True) + np.log(rng.uniform(*SHARES, near.shape))
        returns = law.is_logarithm & (np.arange(len(near)) % 2 == 1)[:, None]
        return self.directly(began(np.where(returns, np.maximum(near, least), near)), rows)


def began(theta: Array) -> Solution:
    """Return starts theta [b, p] as a solution that nothing is known of yet."""
    batch = len(theta)
    return Solution(theta, np.full(batch, np.inf), np.full(batch, np.inf), np.zeros(batch, int))


def minimise(
    law: Law,
    theta: Array,
    data: Data,
    loss: Array,
    weights: Array,
    residual: str = "huber",
    delta: float = 1e-3,
    most: int | None = None,
) -> tuple[Solution, NDArray[np.int_]]:
    """Minimise the objective of the residuals at `loss` [points] from the rows of `theta` [b, p].

    Rows with the same least squares go on as one, and only the `most` lowest of these. Not every basin begins at one of
    them, and Huber's ρ has more basins than the squares, so `SHAKEN` further rows begin at least squares with random
    weights. Return where all of these end, and how many rows each of them stands for: none, if it began near another's
    end.
    """
    problem, rows = Problem(law, data, loss[None], weights[None], residual, delta), np.zeros(len(theta), int)
    found = problem.squares(began(theta), rows)
    order = np.argsort(found.objective)
    value = found.objective[order]
    first = np.flatnonzero(np.append(True, ~(value[1:] <= value[:-1] * (1 + SAME))))
    count = np.diff(np.append(first, len(order)))
    found, count = found.take(order[first[:most]]), count[:most]
    shaken = problem.shaken(np.tile(found.theta[0], (SHAKEN, 1)), np.zeros(SHAKEN, int))
    found, count = found.join(shaken), np.append(count, np.ones(SHAKEN, int))
    for width in problem.stages:
        found = problem.staged(width, found, np.zeros(len(count), int))
    found = problem.directly(found, np.zeros(len(count), int))
    if problem.last is None:
        return found, count
    found = found.join(problem.directly(shaken, np.zeros(SHAKEN, int)))  # a homotopy would leave some of Huber's basins
    for _ in range(AROUND_ROUNDS):
        place = np.argmin(found.objective)
        near = problem.around(np.tile(found.theta[place], (AROUND, 1)), np.zeros(AROUND, int))
        found, best = found.join(near), found.objective[place]
        if not near.objective.min() < best * (1 - LOWER):
            break
    return found, np.append(count, np.zeros(len(found.theta) - len(count), int))


def lowest_of_many(problem: Problem, theta: Array, rows: NDArray[np.int_]) -> Solution:
    """Return the lowest end for each of `rows` of a problem, in ascending order, from every start `theta` [starts, p].

    Each `PART` of the rows is solved by itself, in as many processes as there are cores. So the result does not depend
    on the number of cores.
    """
    parts = np.array_split(rows, max(1, -(-len(rows) // PART)))
    solve = partial(_lowest_of_part, problem, theta)
    processes = 1 if current_process().daemon else min(len(parts), usable_cores())
    if processes > 1:
        # Threads gain little, because most of numpy's calls here are too short. Forked processes need no import.
        with suppress(BrokenProcessPool), ProcessPoolExecutor(processes, get_context("fork"), _begin_process) as pool:
            return reduce(Solution.join, pool.map(solve, parts))
    return reduce(Solution.join, map(solve, parts))  # also where a process was killed, perhaps for lack of memory


def _begin_process() -> None:
    signal(SIGTERM, SIG_DFL)  # not the parent's handler
    end_with_parent({SIGINT})


def _lowest_of_part(problem: Problem, theta: Array, rows: NDArray[np.int_]) -> Solution:
    """Return the lowest end for each of `rows` of a problem.

    The first start is the fit of the same points with other weights or losses. With Huber's ρ each is also a start
    without a homotopy, and weights are shaken from each in turn. Starts that reach one objective go on as one.
    """
    starts, owners = began(np.tile(theta, (len(rows), 1))), np.repeat(rows, len(theta))
    found, many = _distinct(problem.squares(starts, owners), owners)
    if problem.last is None:
        return _lowest(problem.directly(found, many), many)
    more = np.repeat(rows, SHAKEN_REFIT)
    shaken = problem.shaken(np.tile(np.resize(theta, (SHAKEN_REFIT, theta.shape[1])), (len(rows), 1)), more)
    found, many = found.join(shaken), np.append(many, more)
    for delta in problem.stages:
        found, many = _distinct(problem.staged(delta, found, many), many)
    many = np.concatenate([many, owners, more])
    found = problem.directly(found.join(starts).join(shaken), many)
    near = np.repeat(rows, AROUND_REFIT)
    beside = problem.around(np.repeat(_lowest(found, many).theta, AROUND_REFIT, axis=0), near)
    return _lowest(found.join(beside), np.append(many, near))


def _distinct(found: Solution, rows: NDArray[np.int_]) -> tuple[Solution, NDArray[np.int_]]:
    """Return one end for each objective that a row reached, and the row of each."""
    order = np.lexsort((found.objective, rows))
    found, rows, value = found.take(order), rows[order], found.objective[order]
    same = np.append(False, (rows[1:] == rows[:-1]) & (value[1:] <= value[:-1] * (1 + SAME)))
    return found.take(~same), rows[~same]


def _lowest(found: Solution, rows: NDArray[np.int_]) -> Solution:
    """Return the lowest end of each row."""
    order = np.lexsort((found.objective, rows))
    return found.take(order[np.unique(rows[order], return_index=True)[1]])
