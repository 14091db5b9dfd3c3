"""What is known of the loss of every run of a pool, finished or not: Chinchilla's law with a smooth deviation.

ln L of a method is that of E + A/N^α + B/D^β, where β and B may change with N, plus a Gaussian process in ln N and
ln D, plus one in each further setting (rank, trainable fraction, learning rate). The deviation lets the runs say that
the law is wrong, so the distance of a forecast from its runs costs certainty. Methods have coefficients of their own;
exponents and deviation they mostly share, by a hierarchical prior. All is Gaussian after the law is linearised at its
best coefficients, so what a further run would teach is known in closed form, without a refit. Size and length of the
deviation and the noise have a few values each, weighted by their evidence (Laplace). The price is a prior: it is stated
here, and it matters while there are fewer runs than coefficients.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.laws import Array

Rows = NDArray[np.intp]
# The coefficients of a method: ln E, ln A and ln B at the centre of the pool, ln α, ln β, and the changes of ln β and
# ln B with ln N. Standard deviations of what methods share, and of what is their own.
SHARED = np.array([1.0, 1.5, 1.5, 0.4, 0.4, 0.1, 0.1])
OWN = np.array([0.1, 0.3, 0.3, 0.1, 0.1, 0.02, 0.02])
# Before any run: E and the two terms as shares of the loss, the exponents 0.35, and no change with N.
START = np.array([*np.log([0.5, 0.25, 0.25, 0.35, 0.35]), 0.0, 0.0])
SCALED = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # coefficients that the scale of the loss moves
SIZES = (0.003, 0.01, 0.03)  # standard deviation of ln L about the law
LENGTHS = (2.0, 4.0)  # in ln N and ln D: how far a deviation reaches
NOISES = (0.001, 0.003, 0.01)  # standard deviation of ln L of one run, where nobody states it
SETTING = 0.1  # standard deviation of ln L over a setting such as the rank, from one end of its values to the other
COMMON = 0.5  # share of the deviation's variance that methods have in common
FEWEST = 6  # runs below which the runs do not choose among deviations and noises
ITERATIONS = 50  # of the fit, at most
ENOUGH, STUCK = 1e-6, 1e6  # gain of the log density, and damping, at which a fit ends
LIKELY = 0.02  # smallest weight of what is kept


@dataclass(frozen=True)
class Places:
    """Where a loss is or could be measured: method [n], ln N and ln D [n, 2], further settings [n, k].

    A setting runs from −1 to 1 over the pool; it is NaN for a method that does not have it.
    """

    method: NDArray[np.intp]
    where: Array
    settings: Array

    @staticmethod
    def of(
        methods: Sequence[str], n_parameters: Sequence[float], tokens: Sequence[float], settings: Array | None = None
    ) -> "Places":
        """Return places by their values; of settings [n, k] such as the rank the logarithm counts."""
        where = np.log(np.column_stack([n_parameters, tokens]))
        names, method = np.unique(np.asarray(methods, dtype=str), return_inverse=True)
        found = np.full((len(where), 0 if settings is None else settings.shape[1]), np.nan)
        for k in range(found.shape[1]):
            assert settings is not None
            with np.errstate(invalid="ignore", divide="ignore"):
                values = np.log(settings[:, k])
            for i in range(len(names)):  # a method's own range: its middle is where its law is
                own = np.flatnonzero((method == i) & np.isfinite(values))
                if len(own) and np.ptp(values[own]) > 0:
                    low, high = values[own].min(), values[own].max()
                    found[own, k] = 2 * (values[own] - low) / (high - low) - 1
        return Places(method, where - where.mean(0), found)

    def __len__(self) -> int:
        return len(self.method)


@dataclass(frozen=True)
class Prior:
    """Size and length of the deviation, and noise of one run: what the evidence chooses among."""

    size: float
    length: float
    noise: float


@dataclass(frozen=True)
class Belief:
    """ln L of every place as a Gaussian: mean [n], covariance [n, n], and the noise of one run.

    `bent` is the part of the covariance that is the deviation's: what the law would be wrong by.
    """

    mean: Array
    covariance: Array
    bent: Array
    noise: float

    def after(self, row: int) -> "Belief":
        """Return the belief after a run at a place, of which only the loss is not known yet."""
        column, own = self.covariance[:, row], self.covariance[row, row] + self.noise**2
        bent = self.bent[:, row]
        return replace(
            self,
            covariance=self.covariance - np.outer(column, column) / own,
            bent=self.bent - np.outer(bent, bent) / (self.bent[row, row] + self.noise**2),
        )

    def draws(self, rows: Rows, count: int) -> Array:
        """Return draws [count, rows] of ln L."""
        values, vectors = np.linalg.eigh(self.covariance[np.ix_(rows, rows)])
        drawn = np.random.default_rng(0).standard_normal((count, len(rows)))
        return self.mean[rows] + (drawn * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


@dataclass(frozen=True)
class _Fits:
    """The law's coefficients θ [priors, 7 a method] at their most likely values, given each prior."""

    theta: Array
    evidence: Array  # [priors]
    inverse: Array  # of the covariance of the finished runs about the law [priors, m, m]
    spread: Array  # covariance of θ


class Surface:
    """The model of a pool's places; `noise` is the standard deviation of ln L of one run, if it is known."""

    def __init__(self, places: Places, noise: float | None = None):
        self.places = places
        methods = int(places.method.max()) + 1
        self._square = np.square(places.where[:, None] - places.where[None]).sum(-1)
        same = places.method[:, None] == places.method[None]
        self._mix = COMMON + (1 - COMMON) * same
        self._setting = np.zeros_like(self._square)
        for values in places.settings.T:
            apart = values[:, None] - values[None]
            self._setting += np.where(np.isfinite(apart) & same, np.exp(-0.5 * np.nan_to_num(apart) ** 2), 0.0)
        self._setting *= SETTING**2
        shared = np.kron(np.ones((methods, methods)), np.diag(SHARED**2))
        self._prior = shared + np.kron(np.eye(methods), np.diag(OWN**2))
        self._precision = np.linalg.inv(self._prior)
        noises = NOISES if noise is None else (noise,)
        self._priors = [Prior(*each) for each in itertools.product(SIZES, LENGTHS, noises)]

    def belief(self, rows: Rows, log_loss: Array) -> Belief:
        """Return what finished runs say: `rows` are their places [m], `log_loss` their ln L [m]."""
        middle = float(np.median(log_loss)) if len(rows) else 0.0
        priors = self._priors
        if len(rows) < FEWEST:  # the middle of what is allowed
            noise = sorted(each.noise for each in priors)[len(priors) // 2]
            priors = [each for each in priors if each.noise == noise]
        fits = self._fit(priors, rows, log_loss, middle)
        weights = np.exp(fits.evidence - fits.evidence.max())
        weights /= weights.sum()
        kept = np.flatnonzero(weights > LIKELY)
        weights = weights[kept] / weights[kept].sum()
        parts = [
            (w, priors[i].noise, *self._conditioned(priors[i], fits, i, rows, log_loss))
            for i, w in zip(kept.tolist(), weights, strict=True)
        ]
        mean = np.sum([w * m for w, _, m, _, _ in parts], 0)
        covariance = np.sum([w * (c + np.outer(m - mean, m - mean)) for w, _, m, c, _ in parts], 0)
        bent = np.sum([w * b for w, *_, b in parts], 0)
        return Belief(mean, covariance, bent, math.sqrt(sum(w * noise**2 for w, noise, *_ in parts)))

    def _law(self, theta: Array, rows: Rows | slice) -> tuple[Array, Array]:
        """Return ln L of the law [b, n] for coefficients [b, θ], and its slopes [b, n, θ]."""
        method, (x, y) = self.places.method[rows], self.places.where[rows].T
        each = theta.reshape(len(theta), -1, len(START))[:, method]  # [b, n, 7]
        e, a, b, log_alpha, log_beta, g, c = np.moveaxis(each, -1, 0)
        alpha, beta = np.exp(log_alpha), np.exp(log_beta + g * x)
        floor, size, data = np.exp(e), np.exp(a - alpha * x), np.exp(b + c * x - beta * y)
        loss = floor + size + data
        bend = -data * beta * y  # by ln β
        own = np.stack([floor, size, data, -size * alpha * x, bend, bend * x, data * x], -1) / loss[..., None]
        slopes = np.zeros((*loss.shape, theta.shape[1]))
        np.put_along_axis(slopes, (len(START) * method[:, None] + np.arange(len(START)))[None], own, 2)
        return np.log(loss), slopes

    def _deviation(self, prior: Prior, rows: Rows | slice, columns: Rows | slice) -> Array:
        """Return the covariance of the deviation between places."""
        square = self._square[rows][:, columns]
        smooth = prior.size**2 * self._mix[rows][:, columns] * np.exp(-0.5 * square / prior.length**2)
        if not self.places.settings.shape[1]:
            return smooth
        # What a setting does carries further in size and data than the deviation: cheap runs tell it.
        return smooth + self._setting[rows][:, columns] * np.exp(-0.125 * square / prior.length**2)

    def _fit(self, priors: Sequence[Prior], rows: Rows, log_loss: Array, middle: float) -> _Fits:
        """Return the most likely coefficients given each prior, by damped Gauss–Newton of all priors together."""
        start = np.tile(START + middle * SCALED, len(self._prior) // len(START))
        own = np.eye(len(rows))
        covariance = np.stack([self._deviation(each, rows, rows) + each.noise**2 * own for each in priors])
        inverse = np.asarray(np.linalg.inv(covariance), np.float64)

        def at(theta: Array) -> tuple[Array, Array, Array]:
            """Return the height [b], its gradient [b, θ] and its curvature [b, θ, θ]."""
            with np.errstate(over="ignore", invalid="ignore"):  # a step too far, which is not taken
                law, slopes = self._law(theta, rows)
                miss, away = (log_loss - law)[..., None], (theta - start)[..., None]
                pulled = slopes.transpose(0, 2, 1) @ inverse
                value = miss.transpose(0, 2, 1) @ inverse @ miss + away.transpose(0, 2, 1) @ self._precision @ away
                gradient = pulled @ miss - self._precision @ away
                return 0.5 * value[:, 0, 0], gradient[..., 0], pulled @ slopes + self._precision

        theta, damping = np.tile(start, (len(priors), 1)), np.full(len(priors), 1e-3)
        value, gradient, hessian = at(theta)
        for _ in range(ITERATIONS):
            diagonal = np.einsum("bii->bi", hessian)
            step = np.linalg.solve(
                hessian + (damping[:, None] * diagonal)[..., None] * np.eye(theta.shape[1]), gradient[..., None]
            )
            trial = theta + step[..., 0]
            lower, *others = at(trial)
            better = lower < value
            gain = np.where(better, value - lower, 0.0)
            theta[better], value[better] = trial[better], lower[better]
            gradient[better], hessian[better] = others[0][better], others[1][better]
            damping = np.where(better, damping / 5, damping * 5)
            if ((gain < ENOUGH) & better | (damping > STUCK)).all():
                break
        determinants = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(hessian @ self._prior)[1]
        return _Fits(theta, -value - 0.5 * determinants, inverse, np.asarray(np.linalg.inv(hessian), np.float64))

    def _conditioned(
        self, prior: Prior, fits: _Fits, i: int, rows: Rows, log_loss: Array
    ) -> tuple[Array, Array, Array]:
        """Return mean, covariance, and the deviation's part of it, at all places, given finished runs and a prior."""
        law, slopes = (each[0] for each in self._law(fits.theta[i][None], slice(None)))
        across = self._deviation(prior, slice(None), rows)
        gain = across @ fits.inverse[i]
        bent = self._deviation(prior, slice(None), slice(None)) - gain @ across.T
        free = slopes - gain @ slopes[rows]
        return law + gain @ (log_loss - law[rows]), bent + free @ fits.spread[i] @ free.T, bent
