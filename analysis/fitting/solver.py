"""The batched solver behind every joint law, and a fit with what can be said of it.

Every start, bootstrap resample or simulated sweep is a row of the same arrays, so that 4,000 refits cost seconds. The
solver is Levenberg–Marquardt on iteratively re-weighted least squares with analytic Jacobians, in logarithms centred
on the data (a badly scaled L-BFGS stopped earlier replications too soon, trap D1).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.fitting.laws import CHINCHILLA, Array, Data, Law
from embedscale.errors import UserError

RESIDUALS = ("huber", "lad", "log", "raw")
LAD_DELTA = 1e-6  # Huber's δ where least absolute deviations are meant: far below any noise


class TooFewRuns(UserError):
    """The points cannot hold the law."""


@dataclass
class Solution:
    """theta [b, p], objective [b] (sum over points), gradient [b] (largest scaled component), iterations taken."""

    theta: Array
    objective: Array
    gradient: Array
    iterations: int


def objective(residual: Array, weights: Array, delta: float | None) -> Array:
    """Σ w ρ(r) over the last axis: Huber's ρ for `delta`, half squares for None. Overflowed rows are infinite."""
    size = np.abs(residual)
    rho = 0.5 * size**2 if delta is None else np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    with np.errstate(invalid="ignore"):  # no weight times an overflow
        total = (weights * rho).sum(-1)
    return np.where(np.isfinite(total), total, np.inf)


def _residuals(law: Law, theta: Array, data: Data, target: Array, raw: bool) -> tuple[Array, Array]:
    with np.errstate(all="ignore"):
        loss, slopes = law.evaluate(theta, data)
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
    """Minimise the residuals' objective from every row of `theta` [b, p]; `loss` and `weights` are [b or 1, points].

    Each step solves (Jᵀ W J + λ Jᵀ W' J + tiny) step = −gradient. W holds the points where Huber's ρ is a parabola and
    W' its majorising weights elsewhere: λ = 1 is iteratively re-weighted least squares, λ → 0 is Newton's step.
    """
    huber = {"huber": delta, "lad": LAD_DELTA}.get(residual)
    theta = theta.copy()
    batch = len(theta)
    target = np.broadcast_to(np.log(loss), (batch, loss.shape[-1]))
    weights = np.broadcast_to(weights, target.shape)
    final = Solution(theta, np.full(batch, np.inf), np.full(batch, np.inf), 0)
    # Blocks that fit into the cache, whose converged rows drop out.
    for first in range(0, batch, 128):
        rows = np.arange(first, min(first + 128, batch))
        _minimise_block(law, final, rows, data, target, weights, residual == "raw", huber, iterations, tolerance)
    return final


def _minimise_block(law, final, rows, data, target, weights, raw, delta, iterations, tolerance) -> None:
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
        trial = theta + np.clip(step, -2.0, 2.0) if law is CHINCHILLA else theta + step
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
            # Scaled so that 1 means: a coefficient moves the objective by as much as it weighs.
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


# --- A fit and what can be said of it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointFit:
    """A joint law fitted to `loss` [points].

    `coefficients` are named as the law's; `not_fixed` are those of them that the data leave open; `condition` is that
    of the scaled normal matrix; `agreeing` of `starts` ended within 1e-6 of the best objective; `gradient` is scaled
    so that 1 would be a slope as large as the objective; `log_residual` is the standard deviation of ln L about the
    law, with its degrees of freedom taken off.
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
        return self.law.coefficients(self.theta[None], self.data)[0]

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(self.law.names, map(float, self.values), strict=True))

    def predict(self, params: Array, tokens: Array, s: Any = 1.0) -> Array:
        return self.law.predict(self.values, params, tokens, s)

    def refit(self, weights: Array | None = None, loss: Array | None = None) -> Array:
        """Coefficients [b, p] for other weights or losses [b, points], each fit begun at this one's."""
        weights = self.weights[None] if weights is None else weights
        loss = self.loss[None] if loss is None else loss
        theta = np.tile(self.theta, (max(len(weights), len(loss)), 1))
        # To a hundredth of a standard error; valleys that the data leave flat are not walked to their end.
        found = minimise(self.law, theta, self.data, loss, weights, self.residual, self.delta, 60, 1e-8)
        return self.law.coefficients(found.theta, self.data)


def fit_joint(
    law: Law,
    params: Array,
    tokens: Array,
    loss: Array,
    trainable_fraction: Array | None = None,
    weights: Array | None = None,
    residual: str = "huber",
    delta: float = 1e-3,
    starts: int = 24,
) -> JointFit:
    """Fit a joint law to points [points]; `residual` is one of `RESIDUALS`, `delta` that of Huber on ln L.

    Raises UserError for an unknown residual and a δ that is not positive, TooFewRuns for data that cannot hold the
    law: no more points than coefficients, or under three sizes.
    """
    if residual not in RESIDUALS:
        raise UserError(f"residual: {residual!r} is unknown; allowed: {', '.join(RESIDUALS)}")
    if not 0 < delta < math.inf:
        raise UserError(f"delta: {delta} is out of range; allowed: above 0, and finite")
    loss = np.asarray(loss, float)
    p, sizes = len(law.names), len(np.unique(params))
    if len(loss) <= p:
        raise TooFewRuns(f"the {law.name} law has {p} coefficients and needs more runs than that; found {len(loss)}")
    if sizes < 3:
        raise TooFewRuns(f"the {law.name} law needs at least 3 sizes; found {sizes}")
    weights = np.ones_like(loss) if weights is None else np.asarray(weights, float)
    data = Data.of(params, tokens, trainable_fraction)

    def solve(theta: Array, kind: str, step: float = delta, iterations: int = 300) -> Solution:
        return minimise(law, theta, data, loss[None], weights[None], kind, step, iterations)

    # A smooth objective first: from afar, nearly every point lies on the straight part of a small Huber δ.
    found = solve(law.starts(loss, data, starts), "raw" if residual == "raw" else "log")
    rough = found.theta[np.isfinite(found.objective)]
    if residual in ("huber", "lad"):
        last = delta if residual == "huber" else LAD_DELTA
        for step in (each for each in (0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5) if each > last):
            found = solve(found.theta, "huber", step, iterations=40)
        found = solve(found.theta, "huber", last)
        # Others go straight from the least-squares fits to the last δ.
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
    """The exact minimum of Σ w |ln L − ln law| near `theta`: linear programmes within a shrinking box around it.

    At a minimum of absolute deviations the law goes through as many points as it has coefficients, which no
    smoothed objective reaches.
    """
    from scipy.optimize import linprog  # here, for it takes a third of a second to import

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
    """Condition of the scaled normal matrix, the coefficients that the data do not fix, the spread of ln L.

    A coefficient is not fixed where it takes part in a direction along which the law does not change, or where its
    standard error (Gauss–Newton) is a factor e of a positive one, half of an exponent, or all of another.
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
    moved = law.coefficients(theta + step * np.eye(p), data) - law.coefficients(theta - step * np.eye(p), data)
    chain = moved.T / (2 * step)  # d coefficient / d theta, [p, p]
    error = spread * np.sqrt(np.maximum(np.diag(chain @ inverse @ chain.T), 0))
    ratio = error / np.maximum(np.abs(law.coefficients(theta[None], data)[0]), 1e-300)
    limit = np.array([0.5 if name in ("alpha", "beta") else 1.0 for name in law.names])
    # Internal coordinates stand in the same order as the published coefficients.
    open_ = (ratio > limit) | dead | flat.any(1)
    return condition, tuple(name for name, is_open in zip(law.names, open_, strict=True) if is_open), spread
