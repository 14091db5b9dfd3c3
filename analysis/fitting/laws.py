"""Laws of the loss: power laws of the compute-optimal run, and joint laws of size, data and trainable fraction.

A joint law is a class: `Law` says what a law must answer, and each class below `Law` is one law. `LAWS` lists the laws
that `embedscale fit` tries. To add a law, write its class and add an instance to `LAWS`: `solver` fits it, and the
summary, the recipe, the figures and the report take it from there.

Fits go through internal coordinates, because the published coefficients are correlated and of very different size.
The price is that each law translates between the two. Sources: the paper, section 4.4 and appendix C; Hoffmann et al.
2022, approach 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.fits import JointLaw
from analysis.fitting.starts import EXPONENTS, TURNED, basins

Array = NDArray[np.float64]
TINY = 1e-300  # replaces an E of 0, whose logarithm does not exist
VALID = 0.5  # smallest share of finite draws for which an interval is given
POSITIVE = (0.0, np.inf)
POWERS = (-6.0, 4.0)  # range of ln b_s of the law of S
SHAPES = np.array([0.01, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0])  # b_s of the law of S, where starts are looked for
BOTH = [0, 1, 2, 3, 3]  # the coordinates of `Tied` as those of `Chinchilla`


# --- Intervals and power laws ----------------------------------------------------------------------------------------


def interval(draws: Array, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile interval (low, high) of draws [draws], or None if fewer than half of them are finite."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < max(2, VALID * len(draws)):
        return None
    tail = 50 * (1 - confidence)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def power_law(budgets: Array, values: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Return ln coefficient and exponent of y = coefficient × C^exponent, by least squares of ln y on ln C.

    `values` and `weights` have the shape [..., budgets]. NaN values are left out, row by row. A row with fewer than
    two values gives NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
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


def lowest_point(grid: Array, log_loss: Array) -> tuple[Array, Array]:
    """Return the position and the height [draws] of the minimum of smooth curves [draws, grid].

    The minimum is found between the steps of the uniform grid, by a parabola through the three lowest points. It is
    NaN where the lowest point is the first or the last of the grid.
    """
    log_loss = np.where(np.isfinite(log_loss), log_loss, np.inf)
    best = log_loss.argmin(1)
    middle = np.clip(best, 1, len(grid) - 2)
    rows = np.arange(len(best))
    before, here, after = (log_loss[rows, middle + k] for k in (-1, 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = 0.5 * (before - after) / (before - 2 * here + after)
        lowest = here - 0.25 * (before - after) * shift
    shift = np.where(np.isfinite(shift), shift, 0.0)
    inside = middle == best
    vertex = grid[middle] + shift * (grid[1] - grid[0])
    return np.where(inside, vertex, np.nan), np.where(inside, np.where(np.isfinite(lowest), lowest, here), np.nan)


# --- What a joint law is ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The arguments of a joint law: ln N, ln D and S, each [points]. `centre` was subtracted from the logarithms."""

    log_n: Array
    log_d: Array
    s: Array
    centre: tuple[float, float]

    @staticmethod
    def of(n_parameters: ArrayLike, tokens: ArrayLike, trainable_fraction: ArrayLike | None = None) -> "Data":
        log_n, log_d = np.log(np.asarray(n_parameters, float)), np.log(np.asarray(tokens, float))
        s = np.ones_like(log_n) if trainable_fraction is None else np.asarray(trainable_fraction, float)
        centre = (float(log_n.mean()), float(log_d.mean()))
        return Data(log_n - centre[0], log_d - centre[1], s, centre)


class Law(ABC):
    """A joint law of the form L = E + a(D) / N^alpha + b(S) / D^beta. A law of another form overrides `parts`.

    `values` are published coefficients [..., p], in the order of `coefficients`. `theta` are internal coordinates
    [b, p], in the same order, in which the fit runs.
    """

    name: ClassVar[str]  # in fits.json and in messages
    symbol: ClassVar[str]  # left side of the formula
    formula: ClassVar[str]  # right side, as a reader sees it
    coefficients: ClassVar[tuple[str, ...]]
    exponents: ClassVar[tuple[str, ...]] = ("alpha", "beta")  # not fixed by the data from a standard error of 0.5 on
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {"E": POSITIVE, "alpha": POSITIVE, "beta": POSITIVE}  # open
    needs_fraction: ClassVar[bool] = False  # whether the law depends on the trainable fraction S
    logarithms: ClassVar[tuple[str, ...]] = ("E",)  # coefficients whose internal coordinate is a logarithm

    @cached_property
    def is_logarithm(self) -> NDArray[np.bool_]:
        """Whether each internal coordinate [p] is a logarithm."""
        return np.isin(self.coefficients, self.logarithms)

    @abstractmethod
    def size_coefficient(self, values: ArrayLike, tokens: ArrayLike) -> Array:
        """Return a(D), the numerator of the size term."""

    @abstractmethod
    def data_coefficient(self, values: ArrayLike, trainable_fraction: ArrayLike) -> Array:
        """Return b(S), the numerator of the data term."""

    @abstractmethod
    def gradient(self, theta: Array, data: Data) -> tuple[Array, Array]:
        """Return the loss [b, points] and d ln L / d theta [b, p, points]."""

    @abstractmethod
    def starts(self, loss: Array, data: Data) -> Array:
        """Return starting points theta [starts, p] for the loss [points], the most promising first."""

    @abstractmethod
    def published(self, theta: Array, data: Data) -> Array:
        """Return the published coefficients [b, p] of internal coordinates."""

    @abstractmethod
    def internal(self, values: Array, data: Data) -> Array:
        """Return the internal coordinates [b, p] of published coefficients."""

    def curvature(self, theta: Array, data: Data, slopes: Array, weights: Array) -> Array:
        """Return Σ weights × (d² L / d theta²) / L over the points [b, p, p].

        `slopes` is what `gradient` returned at theta, and `weights` has the shape [b, points]. The default takes
        differences of `gradient`. A closed form is faster and reuses `slopes`.
        """
        step, p = 1e-5, theta.shape[1]
        total = (slopes * weights[:, None]) @ slopes.transpose(0, 2, 1)  # d² L / L = d² ln L + slopes slopesᵀ
        for i in range(p):
            shift = step * np.eye(p)[i]
            change = self.gradient(theta + shift, data)[1] - self.gradient(theta - shift, data)[1]
            total[:, i] += (change * weights[:, None]).sum(-1) / (2 * step)
        return 0.5 * (total + total.transpose(0, 2, 1))

    def named(self, values: ArrayLike) -> dict[str, Array]:
        """Return each coefficient by its name, [..., 1], so that it broadcasts against points."""
        return dict(zip(self.coefficients, np.moveaxis(np.asarray(values, float), -1, 0)[..., None], strict=True))

    def parts(
        self, values: ArrayLike, n_parameters: ArrayLike, tokens: ArrayLike, trainable_fraction: ArrayLike = 1.0
    ) -> tuple[Array, Array, Array]:
        """Return the floor E, the size term and the data term of the loss (nats), [..., points]."""
        c = self.named(values)
        with np.errstate(over="ignore", invalid="ignore"):  # far off its data a law can leave a float's range
            size = self.size_coefficient(values, tokens) * np.exp(-c["alpha"] * np.log(n_parameters))
            data = self.data_coefficient(values, trainable_fraction) * np.exp(-c["beta"] * np.log(tokens))
        return c["E"], size, data

    def predict(
        self, values: ArrayLike, n_parameters: ArrayLike, tokens: ArrayLike, trainable_fraction: ArrayLike = 1.0
    ) -> Array:
        """Return the loss (nats) [..., points] of coefficients [..., p]."""
        floor, size, data = self.parts(values, n_parameters, tokens, trainable_fraction)
        with np.errstate(over="ignore", invalid="ignore"):
            return floor + size + data

    def size_exponent(self, values: ArrayLike) -> Array | None:
        """Return the exponent of N* ∝ C^exponent where a token's cost is proportional to N; None without such a form.

        Hoffmann et al. 2022, equation 4: beta / (alpha + beta).
        """
        if self.needs_fraction:
            return None
        c = self.named(values)
        return (c["beta"] / (c["alpha"] + c["beta"]))[..., 0]

    def optimum(
        self, values: ArrayLike, budget_flop: float, log_n: Array, log_cost: Array, trainable_fraction: ArrayLike = 1.0
    ) -> tuple[Array, Array, Array]:
        """Return ln N*, ln D* and ln L* [draws] of coefficients [draws, p] or [p] at a budget.

        The minimum is solved for on a uniform grid of sizes ln N [grid], with ln (FLOP a token) and S of each size.
        It is NaN where it lies at an end of the grid.
        """
        with np.errstate(invalid="ignore"):
            loss = self.predict(values, np.exp(log_n), budget_flop / np.exp(log_cost), trainable_fraction)
            log_loss = np.log(np.atleast_2d(loss))
        vertex, lowest = lowest_point(log_n, log_loss)
        return vertex, np.log(budget_flop) - np.interp(vertex, log_n, log_cost), lowest


# --- The laws --------------------------------------------------------------------------------------------------------


class Chinchilla(Law):
    """Hoffmann et al. 2022. Internal coordinates: ln E, the logarithms of A and B at the centre, alpha, beta."""

    name = "chinchilla"
    symbol = "L(N, D)"
    formula = "E + A/N^α + B/D^β"
    coefficients: ClassVar[tuple[str, ...]] = ("E", "A", "B", "alpha", "beta")
    logarithms = ("E", "A", "B")

    def size_coefficient(self, values: ArrayLike, tokens: ArrayLike) -> Array:
        return self.named(values)["A"]

    def data_coefficient(self, values: ArrayLike, trainable_fraction: ArrayLike) -> Array:
        return self.named(values)["B"]

    def gradient(self, theta: Array, data: Data) -> tuple[Array, Array]:
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

    def curvature(self, theta: Array, data: Data, slopes: Array, weights: Array) -> Array:
        if type(self).gradient is not Chinchilla.gradient:  # a law built on this one, of another form
            return super().curvature(theta, data, slopes, weights)
        by_n, by_d = -data.log_n, -data.log_d
        w = slopes * weights[:, None]
        total = np.zeros((len(theta), 5, 5))
        total[:, 0, 0], total[:, 1, 1], total[:, 2, 2] = w[:, :3].sum(-1).T
        total[:, 1, 3] = total[:, 3, 1] = w[:, 3].sum(-1)
        total[:, 2, 4] = total[:, 4, 2] = w[:, 4].sum(-1)
        total[:, 3, 3], total[:, 4, 4] = w[:, 3] @ by_n, w[:, 4] @ by_d
        return total

    def starts(self, loss: Array, data: Data) -> Array:
        def terms(*exponents: Array) -> Array:
            by_n, by_d = np.exp(-np.outer(exponents[0], data.log_n)), np.exp(-np.outer(exponents[-1], data.log_d))
            return np.stack([np.ones_like(by_n), by_n, by_d], 2)

        exponents, linear = basins(terms, [EXPONENTS] * len(self.exponents), loss, positive=(0, 1, 2))
        # A coefficient that least squares drives to zero starts small instead.
        return np.column_stack([np.log(np.maximum(linear, 0.02 * loss.min())), *exponents])

    def published(self, theta: Array, data: Data) -> Array:
        e, a, b, alpha, beta = theta.T
        n, d = data.centre
        with np.errstate(over="ignore"):  # a bootstrap resample that cannot hold the law
            return np.stack([np.exp(e), np.exp(a + alpha * n), np.exp(b + beta * d), alpha, beta], 1)

    def internal(self, values: Array, data: Data) -> Array:
        e, a, b, alpha, beta = values.T
        n, d = data.centre
        return np.stack([np.log(np.maximum(e, TINY)), np.log(a) - alpha * n, np.log(b) - beta * d, alpha, beta], 1)


class Tied(Chinchilla):
    """Both terms fall with one exponent, so that N* grows as the root of C (Gadre et al. 2024; Cherti et al. 2023)."""

    name = "tied"
    formula = "E + A/N^α + B/D^α"
    coefficients = ("E", "A", "B", "alpha")
    exponents = ("alpha",)
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {"E": POSITIVE, "alpha": POSITIVE}

    def named(self, values: ArrayLike) -> dict[str, Array]:
        return (found := super().named(values)) | {"beta": found["alpha"]}

    def gradient(self, theta: Array, data: Data) -> tuple[Array, Array]:
        loss, slopes = super().gradient(theta[:, BOTH], data)
        return loss, np.concatenate([slopes[:, :3], slopes[:, 3:].sum(1, keepdims=True)], 1)

    def published(self, theta: Array, data: Data) -> Array:
        return super().published(theta[:, BOTH], data)[:, :4]

    def internal(self, values: Array, data: Data) -> Array:
        return super().internal(values[:, BOTH], data)[:, :4]


class TrainableFraction(Law):
    """The paper's law of N, D and S (appendix C). An S above 1, which a large LoRA rank gives, counts as 1.

    Internal coordinates: ln E, a_d and b_d at the centre of N, a_s and c_s at the centre of D, ln b_s, alpha, beta.
    """

    name = "trainable_fraction"
    symbol = "L(S, N, D)"
    formula = "E + (a_d ln D + b_d)/N^α + (a_s (1−S)^b_s + c_s)/D^β"
    coefficients = ("E", "a_d", "b_d", "a_s", "b_s", "c_s", "alpha", "beta")
    needs_fraction = True

    def size_coefficient(self, values: ArrayLike, tokens: ArrayLike) -> Array:
        c = self.named(values)
        return c["a_d"] * np.log(tokens) + c["b_d"]

    def data_coefficient(self, values: ArrayLike, trainable_fraction: ArrayLike) -> Array:
        c = self.named(values)
        frozen = np.clip(1 - np.asarray(trainable_fraction, float), 0, 1)
        return c["a_s"] * frozen ** c["b_s"] + c["c_s"]

    def gradient(self, theta: Array, data: Data) -> tuple[Array, Array]:
        e, slope, level, gain, log_power, rest, alpha, beta = theta.T[:, :, None]
        frozen = np.clip(1 - data.s, 0, 1)
        power, log_frozen = _power(log_power), np.log(np.where(frozen > 0, frozen, 1.0))
        share = np.where(frozen > 0, np.exp(power * log_frozen), 0.0)  # (1−S)^b_s
        by_n, by_d = np.exp(-alpha * data.log_n), np.exp(-beta * data.log_d)
        size, amount = (slope * data.log_d + level) * by_n, (gain * share + rest) * by_d
        loss = np.exp(e) + size + amount
        slopes = np.empty((len(theta), 8, len(data.log_n)))
        slopes[:, 0] = np.exp(e)
        slopes[:, 1] = data.log_d * by_n
        slopes[:, 2] = by_n
        slopes[:, 3] = share * by_d
        slopes[:, 4] = gain * share * by_d * log_frozen * power * _free(log_power)
        slopes[:, 5] = by_d
        slopes[:, 6] = -size * data.log_n
        slopes[:, 7] = -amount * data.log_d
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes /= loss[:, None]
        return loss, slopes

    def curvature(self, theta: Array, data: Data, slopes: Array, weights: Array) -> Array:
        by_n, by_d = -data.log_n, -data.log_d
        frozen = np.clip(1 - data.s, 0, 1)
        log_power = theta[:, 4, None]
        # d share / d ln b_s = share × bend
        bend = np.log(np.where(frozen > 0, frozen, 1.0)) * _power(log_power) * _free(log_power)
        w = slopes * weights[:, None]
        total = np.zeros((len(theta), 8, 8))
        total[:, 0, 0] = w[:, 0].sum(-1)
        total[:, 3, 4] = total[:, 4, 3] = (w[:, 3] * bend).sum(-1)
        total[:, 4, 4] = (w[:, 4] * (bend + 1)).sum(-1)
        for i in (1, 2, 6):
            total[:, i, 6] = total[:, 6, i] = w[:, i] @ by_n
        for i in (3, 4, 5, 7):
            total[:, i, 7] = total[:, 7, i] = w[:, i] @ by_d
        return total

    def starts(self, loss: Array, data: Data) -> Array:
        frozen = np.clip(1 - data.s, 0, 1)

        def terms(alpha: Array, beta: Array, power: Array) -> Array:
            by_n, by_d = np.exp(-np.outer(alpha, data.log_n)), np.exp(-np.outer(beta, data.log_d))
            share = np.where(frozen > 0, frozen ** power[:, None], 0.0)
            return np.stack([np.ones_like(by_n), data.log_d * by_n, by_n, share * by_d, by_d], 2)

        (alpha, beta, power), linear = basins(terms, (TURNED, TURNED, SHAPES), loss, positive=(0,))
        e, slope, level, gain, rest = linear.T
        e = np.log(np.maximum(e, 0.02 * loss.min()))
        return np.stack([e, slope, level, gain, np.log(power), rest, alpha, beta], 1)

    def published(self, theta: Array, data: Data) -> Array:
        e, slope, level, gain, log_power, rest, alpha, beta = theta.T
        n, d = data.centre
        power = _power(log_power)
        with np.errstate(over="ignore", invalid="ignore"):  # a bootstrap resample that cannot hold the law
            by_n, by_d = np.exp(alpha * n), np.exp(beta * d)
            columns = [np.exp(e), slope * by_n, (level - slope * d) * by_n, gain * by_d, power, rest * by_d]
        return np.stack([*columns, alpha, beta], 1)

    def internal(self, values: Array, data: Data) -> Array:
        e, a_d, b_d, a_s, b_s, c_s, alpha, beta = values.T
        n, d = data.centre
        by_n, by_d = np.exp(-alpha * n), np.exp(-beta * d)
        columns = [a_d * by_n, (b_d + a_d * d) * by_n, a_s * by_d, np.log(b_s), c_s * by_d, alpha, beta]
        return np.stack([np.log(np.maximum(e, TINY)), *columns], 1)


def _power(log_power: Array) -> Array:
    """Return b_s of ln b_s, within the range that runs can tell apart."""
    return np.exp(np.clip(log_power, *POWERS))


def _free(log_power: Array) -> NDArray[np.bool_]:
    """Return whether ln b_s is inside its range; at an end the loss no longer changes with ln b_s."""
    return (log_power > POWERS[0]) & (log_power < POWERS[1])


CHINCHILLA, TIED, TRAINABLE_FRACTION = Chinchilla(), Tied(), TrainableFraction()
# In order of preference: the recipe uses the first law without S that was fitted.
LAWS: dict[str, Law] = {law.name: law for law in (CHINCHILLA, TIED, TRAINABLE_FRACTION)}


@dataclass(frozen=True)
class StatedLaw:
    """A joint law with published coefficients: one set [p] in `values`, and perhaps draws of them [draws, p]."""

    law: Law
    values: Array
    draws: Array

    @staticmethod
    def of(law: Law, coefficients: Mapping[str, float | None], draws: ArrayLike = ()) -> "StatedLaw":
        """Return the law with coefficients by their names."""
        values = np.array([coefficients[name] for name in law.coefficients], float)
        return StatedLaw(law, values, np.asarray(draws, float).reshape(-1, len(values)))

    @staticmethod
    def fitted(found: JointLaw) -> "StatedLaw":
        """Return a law of fits.json."""
        return StatedLaw.of(LAWS[found.law], found.coefficients, np.asarray(found.draws, float))

    def loss(self, n_parameters: ArrayLike, tokens: ArrayLike, trainable_fraction: ArrayLike = 1.0) -> Array:
        """Return the loss (nats) [points]."""
        return np.ravel(self.law.predict(self.values, n_parameters, tokens, trainable_fraction))

    def drawn(self, n_parameters: ArrayLike, tokens: ArrayLike, trainable_fraction: ArrayLike = 1.0) -> Array:
        """Return the loss (nats) [draws, points] of each draw of the coefficients."""
        return self.law.predict(self.draws, n_parameters, tokens, trainable_fraction)


def size_law(found: Mapping[str, JointLaw]) -> StatedLaw | None:
    """Return the first of a method's fitted laws that depends on N and D alone; None if it has none."""
    return next(
        (StatedLaw.fitted(found[name]) for name in LAWS if name in found and not LAWS[name].needs_fraction), None
    )


def fraction_law(found: Mapping[str, JointLaw]) -> StatedLaw | None:
    """Return the first of a method's fitted laws that depends on S too; None if it has none."""
    return next((StatedLaw.fitted(found[name]) for name in LAWS if name in found and LAWS[name].needs_fraction), None)
