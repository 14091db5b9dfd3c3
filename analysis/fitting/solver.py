"""The batched solver behind every joint law, and what is known of a fit.

Every start, bootstrap resample or simulated sweep is a row of the same arrays, so 4,000 refits take seconds. The solver
is Levenberg–Marquardt on iteratively re-weighted least squares with analytic Jacobians. It works in logarithms that are
centred on the data, because a badly scaled L-BFGS stops too soon (Besiroglu et al. 2024). The price is that each law
must supply its derivatives.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.fitting.laws import Array, Data, Law
from embedscale.errors import UserError

RESIDUALS = ("huber", "lad", "log", "raw")
LAD_DELTA = 1e-6  # Huber's δ for least absolute deviations: far below any noise of ln L


class TooFewRuns(UserError):
    """There are too few points for the law."""


@dataclass
class Solution:
    """theta [b, p], objective [b] (sum over points), gradient [b] (largest scaled component), iterations."""

    theta: Array
    objective: Array
    gradient: Array
    iterations: int


def objective(residual: Array, weights: Array, delta: float | None) -> Array:
    """Return Σ w ρ(r) over the last axis: Huber's ρ for `delta`, half squares for None; infinite after an overflow."""
    size = np.abs(residual)
    rho = 0.5 * size**2 if delta is None else np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    with np.errstate(invalid="ignore"):  # a weight of zero times an overflow
        total = (weights * rho).sum(-1)
    return np.where(np.isfinite(total), total, np.inf)


def _residuals(law: Law, theta: Array, data: Data, target: Array, raw: bool) -> tuple[Array, Array]:
    with np.errstate(all="ignore"):
        loss, slopes = law.gradient(theta, data)
        if raw:
            return loss - np.exp(target), slopes * loss[:, None]
        return np.where(loss > 0, np.log(np.where(loss > 0, loss, 1.0)) - target, np.inf), slopes


def minimise(
    law: Law,
    theta: Array,
    data: Data,
    loss: Array,
    weights: Array,
    residual: str = "huber",
    delta: float = 1e-3,
    iterations: int = 300,
    tolerance: float = 1e-10,
) -> Solution:
    """Minimise the objective of the residuals from every row of `theta` [b, p].

    `loss` and `weights` have the shape [b or 1, points]. Each step solves
    (Jᵀ W J + λ Jᵀ W' J + tiny) step = −gradient. W holds the points where Huber's ρ is a parabola, and W' its
    majorising weights elsewhere. λ = 1 is iteratively re-weighted least squares, and λ → 0 is Newton's step.
    """
    huber = {"huber": delta, "lad": LAD_DELTA}.get(residual)
    theta = theta.copy()
    batch = len(theta)
    target = np.broadcast_to(np.log(loss), (batch, loss.shape[-1]))
    weights = np.broadcast_to(weights, target.shape)
    final = Solution(theta, np.full(batch, np.inf), np.full(batch, np.inf), 0)
    # In blocks that fit into the cache; rows that have converged are removed from their block.
    for first in range(0, batch, 128):
        rows = np.arange(first, min(first + 128, batch))
        _minimise_block(law, final, rows, data, target, weights, residual == "raw", huber, iterations, tolerance)
    return final


def _minimise_block(
    law: Law,
    final: Solution,
    rows: NDArray[np.int_],
    data: Data,
    target: Array,
    weights: Array,
    raw: bool,
    delta: float | None,
    iterations: int,
    tolerance: float,
) -> None:
    """Minimise for some `rows` of `final`, and write their results into it."""
    p = final.theta.shape[1]
    theta, target, weights = final.theta[rows], target[rows], weights[rows]
    r, jacobian = _residuals(law, theta, data, target, raw)
    value = objective(r, weights, delta)
    damping = np.full(len(rows), 1.0 if delta is not None else 1e-3)
    stalled = np.zeros(len(rows), int)
    for iteration in range(iterations):
        if delta is None:
            pull, inside, outside = r, weights, np.zeros_like(weights)
        else:
            size = np.abs(r)
            pull = np.clip(r, -delta, delta)
            inside = weights * (size <= delta)
            outside = weights * (size > delta) * delta / np.maximum(size, delta)
        gradient = np.einsum("bpn,bn->bp", jacobian, weights * pull)
        full = inside + outside * damping[:, None]
        curvature = (jacobian * full[:, None]) @ jacobian.transpose(0, 2, 1)
        diagonal = np.einsum("bpp->bp", curvature)
        scale = np.sqrt(np.maximum(diagonal, 1e-300))
        ridge = 1e-9 + (damping if delta is None else np.maximum(damping - 1, 0.0) + 1e-4 * damping)
        matrix = curvature / (scale[:, :, None] * scale[:, None]) + ridge[:, None, None] * np.eye(p)
        step = -np.linalg.solve(matrix, (gradient / scale)[..., None])[..., 0] / scale
        trial = theta + np.clip(step, -law.longest_step, law.longest_step)
        trial_r, trial_jacobian = _residuals(law, trial, data, target, raw)
        trial_value = objective(trial_r, weights, delta)
        better = trial_value < value
        gain = np.where(better, (value - trial_value) / np.maximum(value, 1e-300), 0.0)
        theta[better], value[better] = trial[better], trial_value[better]
        r[better], jacobian[better] = trial_r[better], trial_jacobian[better]
        stalled = np.where(better & (gain > tolerance), 0, stalled + 1)
        damping = np.where(better, np.maximum(damping * 0.25, 1e-7), damping * 4)
        done = (stalled >= 6) | (better & (gain <= tolerance) & (damping < 1e-3)) | (damping > 1e8)
        if iteration == iterations - 1:
            done[:] = True
        if done.any():
            left = rows[done]
            final.theta[left], final.objective[left] = theta[done], value[done]
            # Scaled so that 1 is a slope as large as the objective.
            final.gradient[left] = np.abs(gradient[done] / scale[done]).max(1) / np.sqrt(
                np.maximum(value[done], 1e-300)
            )
            final.iterations = max(final.iterations, iteration + 1)
            keep = ~done
            if not keep.any():
                return
            rows, theta, target, weights = rows[keep], theta[keep], target[keep], weights[keep]
            r, jacobian, value = r[keep], jacobian[keep], value[keep]
            damping, stalled = damping[keep], stalled[keep]


# --- A fit and what is known of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointFit:
    """A joint law fitted to `loss` [points].

    `agreeing` of the `starts` ended within 1e-6 of the best objective. `gradient` is scaled so that 1 is a slope as
    large as the objective. `condition` is that of the scaled normal matrix. `not_fixed` names the coefficients that the
    data do not fix. `log_residual` is the standard deviation of ln L about the law, corrected for the degrees of
    freedom.
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
        """Return coefficients [b, p] for other weights or losses [b, points]; each fit starts at this one."""
        weights = self.weights[None] if weights is None else weights
        loss = self.loss[None] if loss is None else loss
        theta = np.tile(self.theta, (max(len(weights), len(loss)), 1))
        # Accurate to a hundredth of a standard error. Directions that the data leave flat are not followed to the end.
        found = minimise(self.law, theta, self.data, loss, weights, self.residual, self.delta, 60, 1e-8)
        return self.law.published(found.theta, self.data)


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
    points than coefficients, or fewer than three sizes.
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

    def solve(theta: Array, kind: str, step: float = delta, iterations: int = 300) -> Solution:
        return minimise(law, theta, data, loss[None], weights[None], kind, step, iterations)

    # A smooth objective first: far from the minimum, nearly all points lie on the straight part of Huber's ρ.
    found = solve(law.starts(loss, data, starts), "raw" if residual == "raw" else "log")
    rough = found.theta[np.isfinite(found.objective)]
    if residual in ("huber", "lad"):
        last = delta if residual == "huber" else LAD_DELTA
        for step in (each for each in (0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5) if each > last):
            found = solve(found.theta, "huber", step, iterations=40)
        found = solve(found.theta, "huber", last)
        # The same starts once more, from the least-squares fits to the last δ in one step.
        again = solve(rough, "huber", last)
        found = Solution(
            np.concatenate([found.theta, again.theta]),
            np.concatenate([found.objective, again.objective]),
            np.concatenate([found.gradient, again.gradient]),
            max(found.iterations, again.iterations),
        )
    best = int(np.argmin(found.objective))
    theta, lowest = found.theta[best], float(found.objective[best])
    if residual == "lad":
        theta, lowest = _least_absolute(law, theta, data, loss, weights)
    agreeing = int((found.objective <= found.objective[best] * (1 + 1e-6) + 1e-18).sum())
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
        len(found.theta),
        agreeing,
        float(found.gradient[best]),
        found.iterations,
        condition,
        not_fixed,
        spread,
    )


def _least_absolute(law: Law, theta: Array, data: Data, loss: Array, weights: Array) -> tuple[Array, float]:
    """Return the exact minimum of Σ w |ln L − ln law| near `theta`, by linear programmes in a shrinking box around it.

    At a minimum of absolute deviations the law goes through as many points as it has coefficients. A smoothed objective
    does not reach it.
    """
    from scipy.optimize import linprog  # imported here, because it takes a third of a second

    target, (n, p) = np.log(loss)[None], (len(loss), len(theta))
    r, jacobian = _residuals(law, theta[None], data, target, False)
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
        trial_r, trial_jacobian = _residuals(law, trial[None], data, target, False)
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
    return theta, value


def _identifiability(
    law: Law, theta: Array, data: Data, loss: Array, weights: Array
) -> tuple[float, tuple[str, ...], float]:
    """Return the condition of the scaled normal matrix, the coefficients that are not fixed, and the spread of ln L.

    The data do not fix a coefficient if the law does not change along a direction in which it takes part, or if its
    standard error (Gauss–Newton) is larger than half of it (exponents) or than all of it (other coefficients).
    """
    p = len(theta)
    r, jacobian = _residuals(law, theta[None], data, np.log(loss)[None], False)
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
