"""Laws of the loss: power laws of the compute-optimal run, and joint laws of size, data and trainable fraction.

Both joint laws (paper, section 4.4 and appendix C; Hoffmann et al. 2022, approach 3) are fitted by one batched
solver: every start, resample or simulated sweep is a row of the same arrays, so 4,000 refits cost seconds. It is
Levenberg–Marquardt on iteratively re-weighted least squares with analytic Jacobians, in logarithms centred on the data
(scaled objectives: what stopped earlier fits too soon is a badly scaled L-BFGS, trap D1). Starts come from variable
projection: for given exponents the other coefficients are linear. Losses are fitted as ln L (squares, Huber or least
absolute deviations) or raw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from embedscale.errors import UserError

Array = NDArray[np.float64]
RESIDUALS = ("huber", "lad", "log", "raw")
LAD_DELTA = 1e-6  # Huber's δ where least absolute deviations are meant: far below any noise


# --- Power laws ------------------------------------------------------------------------------------------------------


def power_law(budgets: Array, values: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """ln coefficient and exponent of y = coefficient × C^exponent by (weighted) least squares of ln y on ln C.

    `values` and `weights` are [..., budgets]; NaN values are left out, row by row. Rows with fewer than two are NaN.
    """
    y = np.log(values)
    w = np.isfinite(y) * (1.0 if weights is None else weights)
    w = np.where(np.isfinite(w), w, 0.0)
    y = np.where(w > 0, y, 0.0)
    x = np.broadcast_to(np.log(budgets), y.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = w.sum(-1)
        x_mean, y_mean = (w * x).sum(-1) / total, (w * y).sum(-1) / total
        dx = x - x_mean[..., None]
        spread = (w * dx**2).sum(-1)
        enough = ((w > 0).sum(-1) >= 2) & (spread > 0)
        slope = np.where(enough, (w * dx * (y - y_mean[..., None])).sum(-1) / spread, np.nan)
    return y_mean - slope * x_mean, slope


# --- Joint laws ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What a joint law is a function of: ln N, ln D and S, each [points], logarithms centred by `centre`."""

    log_n: Array
    log_d: Array
    s: Array
    centre: tuple[float, float]

    @staticmethod
    def of(params: Array, tokens: Array, trainable_fraction: Array | None = None) -> "Data":
        log_n, log_d = np.log(np.asarray(params, float)), np.log(np.asarray(tokens, float))
        s = np.ones_like(log_n) if trainable_fraction is None else np.asarray(trainable_fraction, float)
        centre = (float(log_n.mean()), float(log_d.mean()))
        return Data(log_n - centre[0], log_d - centre[1], s, centre)


@dataclass(frozen=True)
class Law:
    """A joint law.

    `evaluate(theta [b, p], data)` gives the loss [b, points] and d ln L / d theta [b, p, points]. `starts(data, loss,
    count)` gives starting points [count, p]. `theta` are internal coordinates; `coefficients` and `internal` translate
    them to and from the published ones, both [b, p]. `positive` marks coefficients whose uncertainty is a factor.
    """

    name: str
    names: tuple[str, ...]
    positive: tuple[bool, ...]
    evaluate: Callable[[Array, Data], tuple[Array, Array]]
    starts: Callable[[Array, Data, Array, int], Array]
    coefficients: Callable[[Array, Data], Array]
    internal: Callable[[Array, Data], Array]
    predict: Callable[[Array, Array, Array, Array], Array]


def predict_chinchilla(c: Array, params: Array, tokens: Array, s: Array | float = 1.0) -> Array:
    """E + A / N^α + B / D^β; coefficients [..., 5] against points, or broadcast with a trailing axis of 1."""
    e, a, b, alpha, beta = np.moveaxis(np.asarray(c, float), -1, 0)[..., None]
    return e + a * np.exp(-alpha * np.log(params)) + b * np.exp(-beta * np.log(tokens))


def predict_trainable_fraction(c: Array, params: Array, tokens: Array, s: Array | float = 1.0) -> Array:
    """E + (a_d ln D + b_d) / N^α + (a_s (1−S)^b_s + c_s) / D^β; S above 1 (a large rank) counts as 1."""
    e, a_d, b_d, a_s, b_s, c_s, alpha, beta = np.moveaxis(np.asarray(c, float), -1, 0)[..., None]
    frozen = np.clip(1 - np.asarray(s, float), 0, 1)
    log_d = np.log(tokens)
    by_size = (a_d * log_d + b_d) * np.exp(-alpha * np.log(params))
    return e + by_size + (a_s * frozen**b_s + c_s) * np.exp(-beta * log_d)


def _chinchilla_evaluate(theta: Array, data: Data) -> tuple[Array, Array]:
    e, a, b, alpha, beta = theta.T[:, :, None]
    size, amount = np.exp(a - alpha * data.log_n), np.exp(b - beta * data.log_d)
    floor = np.exp(e)
    loss = floor + size + amount
    slopes = np.empty((len(theta), 5, len(data.log_n)))
    np.divide(floor, loss, out=slopes[:, 0])
    np.divide(size, loss, out=slopes[:, 1])
    np.divide(amount, loss, out=slopes[:, 2])
    np.multiply(slopes[:, 1], -data.log_n, out=slopes[:, 3])
    np.multiply(slopes[:, 2], -data.log_d, out=slopes[:, 4])
    return loss, slopes


def _chinchilla_coefficients(theta: Array, data: Data) -> Array:
    e, a, b, alpha, beta = theta.T
    n, d = data.centre
    return np.stack([np.exp(e), np.exp(a + alpha * n), np.exp(b + beta * d), alpha, beta], 1)


def _chinchilla_internal(coefficients: Array, data: Data) -> Array:
    e, a, b, alpha, beta = coefficients.T
    n, d = data.centre
    return np.stack([np.log(e), np.log(a) - alpha * n, np.log(b) - beta * d, alpha, beta], 1)


def _projected(design: Array, loss: Array) -> tuple[Array, Array]:
    """Least squares of relative residuals for many designs [m, points, k]: coefficients [m, k], squares [m]."""
    scaled = design / loss[:, None]
    gram = scaled.transpose(0, 2, 1) @ scaled
    ridge = 1e-12 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(design.shape[2])
    solution = np.linalg.solve(gram + ridge, scaled.sum(1)[..., None])[..., 0]
    return solution, np.square((scaled @ solution[..., None])[..., 0] - 1).sum(1)


def _chinchilla_starts(loss: Array, data: Data, count: int) -> Array:
    grid = np.geomspace(0.03, 1.5, 14)
    alpha, beta = (axis.ravel() for axis in np.meshgrid(grid, grid))
    design = np.stack(
        [np.ones((len(alpha), len(loss))), np.exp(-np.outer(alpha, data.log_n)), np.exp(-np.outer(beta, data.log_d))], 2
    )
    linear, squares = _projected(design, loss)
    # What a positive coefficient would have to be below zero for begins small instead.
    linear = np.maximum(linear, 0.02 * loss.min())
    best = np.argsort(squares)[:count]
    return np.column_stack([np.log(linear[best]), alpha[best], beta[best]])


def _fraction_evaluate(theta: Array, data: Data) -> tuple[Array, Array]:
    e, slope, level, gain, log_power, rest, alpha, beta = theta.T[:, :, None]
    power = np.exp(np.clip(log_power, -6, 4))
    frozen = np.clip(1 - data.s, 0, 1)
    log_frozen = np.log(np.where(frozen > 0, frozen, 1.0))
    share = np.where(frozen > 0, np.exp(power * log_frozen), 0.0)  # (1−S)^b_s
    by_n, by_d = np.exp(-alpha * data.log_n), np.exp(-beta * data.log_d)
    size, amount = (slope * data.log_d + level) * by_n, (gain * share + rest) * by_d
    loss = np.exp(e) + size + amount
    slopes = np.empty((len(theta), 8, len(data.log_n)))
    slopes[:, 0] = np.exp(e)
    slopes[:, 1] = data.log_d * by_n
    slopes[:, 2] = by_n
    slopes[:, 3] = share * by_d
    slopes[:, 4] = gain * share * by_d * log_frozen * power
    slopes[:, 5] = by_d
    slopes[:, 6] = -size * data.log_n
    slopes[:, 7] = -amount * data.log_d
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes /= loss[:, None]
    return loss, slopes


def _fraction_coefficients(theta: Array, data: Data) -> Array:
    e, slope, level, gain, log_power, rest, alpha, beta = theta.T
    n, d = data.centre
    by_n, by_d = np.exp(alpha * n), np.exp(beta * d)
    power = np.exp(np.clip(log_power, -6, 4))
    columns = [np.exp(e), slope * by_n, (level - slope * d) * by_n, gain * by_d, power, rest * by_d, alpha, beta]
    return np.stack(columns, 1)


def _fraction_internal(coefficients: Array, data: Data) -> Array:
    e, a_d, b_d, a_s, b_s, c_s, alpha, beta = coefficients.T
    n, d = data.centre
    by_n, by_d = np.exp(-alpha * n), np.exp(-beta * d)
    columns = [np.log(e), a_d * by_n, (b_d + a_d * d) * by_n, a_s * by_d, np.log(b_s), c_s * by_d, alpha, beta]
    return np.stack(columns, 1)


def _fraction_starts(loss: Array, data: Data, count: int) -> Array:
    grid = np.geomspace(0.04, 1.2, 9)
    alpha, beta, power = (axis.ravel() for axis in np.meshgrid(grid, grid, [0.5, 1.0, 2.0, 4.0]))
    frozen = np.clip(1 - data.s, 0, 1)
    by_n, by_d = np.exp(-np.outer(alpha, data.log_n)), np.exp(-np.outer(beta, data.log_d))
    share = np.where(frozen > 0, frozen ** power[:, None], 0.0)
    design = np.stack([np.ones_like(by_n), data.log_d * by_n, by_n, share * by_d, by_d], 2)
    linear, squares = _projected(design, loss)
    best = np.argsort(squares)[:count]
    e, slope, level, gain, rest = linear[best].T
    e = np.log(np.maximum(e, 0.02 * loss.min()))
    return np.stack([e, slope, level, gain, np.log(power[best]), rest, alpha[best], beta[best]], 1)


CHINCHILLA = Law(
    "chinchilla",
    ("E", "A", "B", "alpha", "beta"),
    (True, True, True, False, False),
    _chinchilla_evaluate,
    _chinchilla_starts,
    _chinchilla_coefficients,
    _chinchilla_internal,
    predict_chinchilla,
)
TRAINABLE_FRACTION = Law(
    "trainable_fraction",
    ("E", "a_d", "b_d", "a_s", "b_s", "c_s", "alpha", "beta"),
    (True, False, False, False, True, False, False, False),
    _fraction_evaluate,
    _fraction_starts,
    _fraction_coefficients,
    _fraction_internal,
    predict_trainable_fraction,
)
LAWS = {law.name: law for law in (CHINCHILLA, TRAINABLE_FRACTION)}


# --- The solver ------------------------------------------------------------------------------------------------------


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
    batch, p = theta.shape
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

    def predict(self, params: Array, tokens: Array, s: Array | float = 1.0) -> Array:
        return self.law.predict(self.values, params, tokens, s)

    def refit(self, weights: Array | None = None, loss: Array | None = None) -> Array:
        """Coefficients [b, p] for other weights or losses [b, points], each fit begun at this one's."""
        weights = self.weights[None] if weights is None else weights
        loss = self.loss[None] if loss is None else loss
        theta = np.tile(self.theta, (max(len(weights), len(loss)), 1))
        found = minimise(self.law, theta, self.data, loss, weights, self.residual, self.delta)
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

    Raises UserError for an unknown residual, a δ that is not positive, and data that cannot hold the law: no more
    points than coefficients, under three sizes, under two amounts of data a size on average.
    """
    if residual not in RESIDUALS:
        raise UserError(f"residual: {residual!r} is unknown; allowed: {', '.join(RESIDUALS)}")
    if not delta > 0:
        raise UserError(f"delta: {delta} is out of range; allowed: above 0")
    loss = np.asarray(loss, float)
    p, sizes = len(law.names), len(np.unique(params))
    if len(loss) <= p:
        raise UserError(f"the {law.name} law has {p} coefficients and needs more runs than that; found {len(loss)}")
    if sizes < 3:
        raise UserError(f"the {law.name} law needs at least 3 sizes; found {sizes}")
    weights = np.ones_like(loss) if weights is None else np.asarray(weights, float)
    data = Data.of(params, tokens, trainable_fraction)
    solve = partial(minimise, law, data=data, loss=loss[None], weights=weights[None])
    # A smooth objective first: from afar, nearly every point lies on the straight part of a small Huber δ.
    found = solve(law.starts(loss, data, starts), residual="raw" if residual == "raw" else "log")
    rough = found.theta[np.isfinite(found.objective)]
    if residual in ("huber", "lad"):
        last = delta if residual == "huber" else LAD_DELTA
        for step in [d for d in (0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5) if d > last] + [last]:
            found = solve(found.theta, residual="huber", delta=step)
        # Some starts go on from the least-squares fits, which a small δ would not have left.
        again = solve(rough, residual="huber", delta=last)
        theta = np.concatenate([found.theta, again.theta])
        value, slope = (
            np.concatenate(pair) for pair in ((found.objective, again.objective), (found.gradient, again.gradient))
        )
        found = Solution(theta, value, slope, max(found.iterations, again.iterations))
    best = int(np.argmin(found.objective))
    theta, value = found.theta[best], float(found.objective[best])
    if residual == "lad":
        theta, value = _least_absolute(law, theta, data, loss, weights)
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
        value,
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
