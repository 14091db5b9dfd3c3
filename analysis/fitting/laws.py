"""Laws of the loss: power laws of the compute-optimal run, and joint laws of size, data and trainable fraction.

The joint laws (paper, section 4.4 and appendix C; Hoffmann et al. 2022, approach 3) come with analytic slopes and with
starting points by variable projection: for given exponents the other coefficients are linear. `solver` fits them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TINY = 1e-300  # stands for an E that a fit has driven to nothing
VALID = 0.5  # of draws must give a value, or there is no interval


def interval(draws: Array, confidence: float = 0.95) -> list[float] | None:
    """[low, high] percentiles of finite draws [draws]; None where fewer than half are finite."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < max(2, VALID * len(draws)):
        return None
    tail = 50 * (1 - confidence)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return [float(low), float(high)]


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

    `evaluate(theta [b, p], data)` gives the loss [b, points] and d ln L / d theta [b, p, points]. `starts(loss, data,
    count)` gives starting points [count, p]. `theta` are internal coordinates; `coefficients` and `internal` translate
    them to and from the published ones, both [b, p]. `positive` marks coefficients whose uncertainty is a factor.
    """

    name: str
    names: tuple[str, ...]
    positive: tuple[bool, ...]
    evaluate: Callable[[Array, Data], tuple[Array, Array]]
    starts: Callable[[Array, Data, int], Array]
    coefficients: Callable[[Array, Data], Array]
    internal: Callable[[Array, Data], Array]
    predict: Callable[..., Array]


def predict_chinchilla(c: Array, params: Array, tokens: Array, s: Any = 1.0) -> Array:
    """E + A / N^α + B / D^β; coefficients [..., 5] against points, or broadcast with a trailing axis of 1."""
    e, a, b, alpha, beta = np.moveaxis(np.asarray(c, float), -1, 0)[..., None]
    return e + a * np.exp(-alpha * np.log(params)) + b * np.exp(-beta * np.log(tokens))


def predict_trainable_fraction(c: Array, params: Array, tokens: Array, s: Any = 1.0) -> Array:
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
    return np.stack([np.log(np.maximum(e, TINY)), np.log(a) - alpha * n, np.log(b) - beta * d, alpha, beta], 1)


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
    with np.errstate(over="ignore"):  # a resample that cannot hold the law
        columns = [np.exp(e), slope * by_n, (level - slope * d) * by_n, gain * by_d, power, rest * by_d, alpha, beta]
    return np.stack(columns, 1)


def _fraction_internal(coefficients: Array, data: Data) -> Array:
    e, a_d, b_d, a_s, b_s, c_s, alpha, beta = coefficients.T
    n, d = data.centre
    by_n, by_d = np.exp(-alpha * n), np.exp(-beta * d)
    floor = np.log(np.maximum(e, TINY))
    columns = [floor, a_d * by_n, (b_d + a_d * d) * by_n, a_s * by_d, np.log(b_s), c_s * by_d, alpha, beta]
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
