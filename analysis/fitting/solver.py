"""Fits of joint laws, and what is known of a fit.

A fit is a verified minimum or no fit: its scaled gradient is at most `TOLERANCE`, or the fit raises DidNotConverge.
A bootstrap refit that does not get there is NaN.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.fitting.laws import Array, Data, Law
from analysis.fitting.newton import TOLERANCE, Problem, Solution, began, lowest_of_many, minimise
from embedscale.errors import UserError

RESIDUALS = ("huber", "lad", "log", "raw")
STEEPEST = 20.0  # a larger exponent runs to infinity: its term is a step at one size, and there is no minimum
MANY = 100  # points from which a refit has one basin, so that it starts at the last δ


class NoFit(UserError):
    """The law cannot be fitted to the points."""


class TooFewRuns(NoFit):
    """There are too few points for the law."""


class DidNotConverge(NoFit):
    """No start reached a minimum."""


# --- A fit and what is known of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointFit:
    """A joint law fitted to `loss` [points]: a verified minimum.

    `agreeing` of the `starts` ended within 1e-6 of the best objective. `gradient` is scaled so that 1 is a slope as
    large as the objective; it is at most `TOLERANCE`. `condition` is that of the scaled normal matrix. `not_fixed`
    names the coefficients that the data do not fix. `log_residual` is the standard deviation of ln L about the law,
    corrected for the degrees of freedom.
    """

    law: Law
    data: Data
    theta: Array
    loss: Array
    weights: Array
    residual: str
    delta: float
    objective: float
    starts: int
    agreeing: int
    gradient: float
    iterations: int
    condition: float
    not_fixed: tuple[str, ...]
    log_residual: float

    @property
    def values(self) -> Array:
        """The published coefficients [p]."""
        return self.law.published(self.theta[None], self.data)[0]

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(self.law.coefficients, map(float, self.values), strict=True))

    def predict(self, n_parameters: Array, tokens: Array, trainable_fraction: ArrayLike = 1.0) -> Array:
        """Return the loss (nats) [points]."""
        return self.law.predict(self.values, n_parameters, tokens, trainable_fraction)

    def refit(self, weights: Array | None = None, loss: Array | None = None) -> Array:
        """Return coefficients [b, p] for other weights or losses [b, points]; NaN where a fit did not converge.

        A fit whose exponent runs to infinity has no minimum, so it is NaN too.
        Each fit starts at this one for a smooth residual or many points. Else, or where that fails, it goes through the
        homotopy from this one and from other starts: a resample of few points can have a second basin in Huber's ρ.
        """
        weights = self.weights[None] if weights is None else weights
        loss = self.loss[None] if loss is None else loss
        problem = Problem(self.law, self.data, loss, weights, self.residual, self.delta)
        rows = np.arange(len(problem.target))
        found = began(np.tile(self.theta, (len(rows), 1)))
        if len(self.loss) >= MANY or self.residual in ("log", "raw"):
            found = problem.directly(found, rows)
        left = rows[~found.converged]
        if len(left):
            starts = np.vstack([self.theta, self.law.starts(self.loss, self.data)])
            again = lowest_of_many(problem, starts, left)
            found.theta[left], found.gradient[left] = again.theta, again.gradient
        exponents = found.theta[:, np.isin(self.law.coefficients, self.law.exponents)]
        held = found.converged & (np.abs(exponents) < STEEPEST).all(1)
        return np.where(held[:, None], self.law.published(found.theta, self.data), np.nan)


def fit_joint(
    law: Law,
    n_parameters: Array,
    tokens: Array,
    loss: Array,
    trainable_fraction: Array | None = None,
    weights: Array | None = None,
    residual: str = "huber",
    delta: float = 1e-3,
    starts: int = 24,
) -> JointFit:
    """Fit a joint law to points [points]; `residual` is one of `RESIDUALS`, `delta` is Huber's δ on ln L.

    Raises UserError for an unknown residual and a δ that is not positive. Raises TooFewRuns where there are no more
    points than coefficients, or fewer than three sizes, DidNotConverge where no start reaches a minimum, and NoFit
    where the minimum has a coefficient that the law does not allow.
    """
    if residual not in RESIDUALS:
        raise UserError(f"residual: {residual!r} is unknown; allowed: {', '.join(RESIDUALS)}")
    if not 0 < delta < math.inf:
        raise UserError(f"delta: {delta} is out of range; allowed: above 0, and finite")
    loss = np.asarray(loss, float)
    p, sizes = len(law.coefficients), len(np.unique(n_parameters))
    if len(loss) <= p:
        raise TooFewRuns(f"the {law.name} law has {p} coefficients and needs more runs than that; found {len(loss)}")
    if sizes < 3:
        raise TooFewRuns(f"the {law.name} law needs at least 3 sizes; found {sizes}")
    weights = np.ones_like(loss) if weights is None else np.asarray(weights, float)
    data = Data.of(n_parameters, tokens, trainable_fraction)

    found, count = minimise(law, law.starts(loss, data), data, loss, weights, residual, delta, most=starts)
    # The lowest end of all, converged or not: a minimum above the end of another start is not the minimum.
    lowest = float(found.objective.min())
    agreeing = found.objective <= lowest * (1 + 1e-6) + 1e-18
    best = _best_of(law, data, found, agreeing)
    theta, gradient = found.theta[best], float(found.gradient[best])
    if residual == "lad":
        theta, lowest, gradient = _least_absolute(law, theta, data, loss, weights)
    if not gradient <= TOLERANCE:
        raise DidNotConverge(
            f"the {law.name} law did not converge: the scaled gradient is {gradient:.1e} where a minimum has at most "
            f"{TOLERANCE:.0e}"
        )
    values = dict(zip(law.coefficients, law.published(theta[None], data)[0], strict=True))
    for name, (low, high) in law.bounds.items():
        if not low < values[name] < high:
            raise NoFit(
                f"the {law.name} law does not fit: its {name} would be {values[name]:.3g}, where it has to be between "
                f"{low:g} and {high:g}"
            )
    steep = [name for name in law.exponents if values[name] > STEEPEST]
    if steep:
        raise DidNotConverge(f"the {law.name} law has no minimum: its {steep[0]} runs to infinity")
    condition, not_fixed, spread = _identifiability(law, theta, data, loss, weights)
    return JointFit(
        law,
        data,
        theta,
        loss,
        weights,
        residual,
        delta,
        lowest,
        int(count.sum()),
        int(count[agreeing].sum()),
        gradient,
        int(found.iterations[best]),
        condition,
        not_fixed,
        spread,
    )


def _best_of(law: Law, data: Data, found: Solution, agreeing: NDArray[np.bool_]) -> int:
    """Return which of the `agreeing` ends has the smallest gradient.

    Where the data leave coefficients free, many minima are equally low: one that the law allows comes first.
    """
    gradient = np.where(agreeing, found.gradient, np.inf)
    values = dict(zip(law.coefficients, law.published(found.theta, data).T, strict=True))
    allowed = np.all([(low < values[name]) & (values[name] < high) for name, (low, high) in law.bounds.items()], axis=0)
    fine = np.where(allowed, gradient, np.inf)
    return int(np.argmin(fine if fine.min() <= TOLERANCE else gradient))


def _residuals(law: Law, theta: Array, data: Data, target: Array) -> tuple[Array, Array]:
    """Return the residuals of ln L [b, points] and their Jacobian [b, p, points]."""
    with np.errstate(all="ignore"):
        loss, slopes = law.gradient(theta, data)
        return np.log(loss) - target, slopes


def _least_absolute(law: Law, theta: Array, data: Data, loss: Array, weights: Array) -> tuple[Array, float, float]:
    """Return the exact minimum of Σ w |ln L − ln law| near `theta`, by linear programmes in a shrinking box around it.

    Also return its value and its scaled gradient: the smallest that the sign of a residual of 0, which is free
    between −1 and 1, leaves.

    At a minimum of absolute deviations the law goes through as many points as it has coefficients. A smoothed objective
    does not reach it.
    """
    from scipy.optimize import linprog, lsq_linear  # imported here, because it takes a third of a second

    target, (n, p) = np.log(loss)[None], (len(loss), len(theta))
    r, jacobian = _residuals(law, theta[None], data, target)
    value, box = float((weights * np.abs(r[0])).sum()), 1e-2
    for _ in range(60):
        # r + J step = over − under, both non-negative
        equal = np.hstack([jacobian[0].T, -np.eye(n), np.eye(n)])
        cost = np.concatenate([np.zeros(p), weights, weights])
        bounds = [(-box, box)] * p + [(0, None)] * (2 * n)
        answer = linprog(cost, A_eq=equal, b_eq=-r[0], bounds=bounds, method="highs")
        if not answer.success:
            break
        trial = theta + answer.x[:p]
        trial_r, trial_jacobian = _residuals(law, trial[None], data, target)
        trial_value = float((weights * np.abs(trial_r[0])).sum())
        if trial_value < value:
            gain = (value - trial_value) / value
            theta, r, jacobian, value = trial, trial_r, trial_jacobian, trial_value
            if gain < 1e-14:
                break
        else:
            box *= 0.25
            if box < 1e-12:
                break
    scale = np.maximum(np.sqrt(jacobian[0] ** 2 @ weights), 1e-300)
    slopes = jacobian[0] * weights / scale[:, None] / np.sqrt(weights.sum())
    through = np.abs(r[0]) <= 1e-9
    rest = slopes[:, ~through] @ np.sign(r[0][~through])
    if through.any():
        rest = rest + slopes[:, through] @ lsq_linear(slopes[:, through], -rest, (-1, 1), tol=1e-14).x
    return theta, value, float(np.abs(rest).max())


def _identifiability(
    law: Law, theta: Array, data: Data, loss: Array, weights: Array
) -> tuple[float, tuple[str, ...], float]:
    """Return the condition of the scaled normal matrix, the coefficients that are not fixed, and the spread of ln L.

    The data do not fix a coefficient if the law does not change along a direction in which it takes part, or if its
    standard error (Gauss–Newton) is larger than half of it (exponents) or than all of it (other coefficients).
    """
    p = len(theta)
    r, jacobian = _residuals(law, theta[None], data, np.log(loss)[None])
    freedom = max((weights > 0).sum() - p, 1)
    spread = float(np.sqrt((weights * r[0] ** 2).sum() / weights.sum() * len(loss) / freedom))
    normal = (jacobian[0] * weights) @ jacobian[0].T
    scale = np.sqrt(np.diag(normal))
    dead = scale < 1e-9 * scale.max()
    scale = np.where(dead, 1.0, scale)
    values, vectors = np.linalg.eigh(normal / np.outer(scale, scale))
    condition = float(values[-1] / max(values[0], 1e-300))
    flat = (values < 1e-11 * values[-1])[None] & (np.abs(vectors) > 0.05)
    inverse = (vectors / np.maximum(values, 1e-14 * values[-1])) @ vectors.T / np.outer(scale, scale)
    step = 1e-6
    moved = law.published(theta + step * np.eye(p), data) - law.published(theta - step * np.eye(p), data)
    chain = moved.T / (2 * step)  # d coefficient / d theta, [p, p]
    error = spread * np.sqrt(np.maximum(np.diag(chain @ inverse @ chain.T), 0))
    ratio = error / np.maximum(np.abs(law.published(theta[None], data)[0]), 1e-300)
    limit = np.array([0.5 if name in law.exponents else 1.0 for name in law.coefficients])
    # Internal coordinates have the order of the published coefficients.
    open_ = (ratio > limit) | dead | flat.any(1)
    return condition, tuple(name for name, is_open in zip(law.coefficients, open_, strict=True) if is_open), spread
