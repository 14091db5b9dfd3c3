"""Intervals: bootstrap over runs for joint laws, noise on losses for optima and what follows from them.

A profile of five sizes cannot be resampled (a parabola needs its points), so optima, power laws and crossings get
their spread from draws of the losses' noise, known from replicates, given, or taken from the residuals of the joint
law. Joint laws are fitted again to resampled runs. All intervals are percentile intervals.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fitting.laws import interval, power_law
from analysis.fitting.optima import Profile, akima, parabola
from analysis.fitting.solver import JointFit

Array = NDArray[np.float64]
__all__ = ["OptimumDraws", "interval", "optimum_draws", "resampled"]


def resampled(fit: JointFit, losses: list[Array], count: int, rng: np.random.Generator) -> Array:
    """Coefficients [count, p] of the law fitted to resampled points.

    A point is a setting, drawn with all its seeds, for they share the law's misfit there; `losses` [points] holds each
    point's replicates, which are drawn anew within it.
    """
    points = len(losses)
    weights = rng.multinomial(points, np.full(points, 1 / points), count) * fit.weights
    drawn = None
    if any(len(each) > 1 for each in losses):
        drawn = np.tile(fit.loss, (count, 1))
        for i, each in enumerate(losses):
            r = len(each)
            if r > 1:
                means = each[rng.integers(r, size=(count, r))].mean(1)
                # r draws out of r spread by (r − 1) / r too little.
                drawn[:, i] = each.mean() + (means - each.mean()) * np.sqrt(r / (r - 1))
    # A law with p coefficients leaves residuals too small by (points − p) / points, and so do its refits.
    widening = np.sqrt(points / (points - len(fit.theta)))
    theta = fit.law.internal(fit.refit(weights=weights, loss=drawn), fit.data)
    return fit.law.coefficients(fit.theta + widening * (theta - fit.theta), fit.data)


@dataclass(frozen=True)
class OptimumDraws:
    """Draws [draws] of ln N*, ln D*, ln L* at one budget; NaN where a draw had its minimum at an end."""

    log_n: Array
    log_d: Array
    log_loss: Array

    @property
    def valid_share(self) -> float:
        return float(np.isfinite(self.log_n).mean())


def optimum_draws(
    profile: Profile, estimator: str, window: float, noise: float, count: int, rng: np.random.Generator
) -> OptimumDraws:
    """Optima of a profile whose ln L get noise of standard deviation `noise` / √seeds, by "parabola" or "akima"."""
    scale = noise / np.sqrt(profile.points["seeds"].to_numpy(float))
    drawn = profile.log_loss + scale * rng.standard_normal((count, len(scale)))
    if estimator == "akima":
        log_n, log_loss = akima(profile.log_n, drawn)
    else:
        log_n, log_loss, _ = parabola(profile.log_n, drawn, window)
    return OptimumDraws(log_n, np.log(profile.tokens_at(log_n)), log_loss)


def floored_spread(draws: Array, floor: Array) -> Array:
    """Standard deviation of each budget's draws [budgets, draws], not below `floor`, over the share of valid draws.

    Porian et al. (2024) weigh a power law's points by its inverse square.
    """
    share = np.isfinite(draws).mean(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = draws - np.nanmean(np.where(share[:, None] > 0, draws, 0.0), 1)[:, None]
        return np.maximum(np.sqrt(np.nanmean(np.where(share[:, None] > 0, centred, 0.0) ** 2, 1)), floor) / share


def power_law_draws(budgets: Array, draws: Array, weights: Array | None = None) -> Array:
    """ln coefficient and exponent [draws, 2] of power laws through draws of ln y [budgets, draws]."""
    return np.stack(power_law(budgets, np.exp(draws.T), weights), 1)


def crossing(a: Array, b: Array) -> Array:
    """ln C at which two power laws (ln coefficient, exponent), each [..., 2], meet; NaN where they are parallel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a[..., 1] == b[..., 1], np.nan, (b[..., 0] - a[..., 0]) / (a[..., 1] - b[..., 1]))


def held_out_rows(points: pd.DataFrame, column: str) -> tuple[NDArray[np.bool_], float]:
    """The rows of the largest budget or size, and that value."""
    largest = float(points[column].max())
    return np.isclose(points[column], largest, rtol=1e-9), largest


def prediction_errors(predicted: Array, found: Array) -> dict[str, float | int]:
    """Mean absolute and mean signed relative error of predictions."""
    ratio = predicted / found - 1
    return {"error": float(np.abs(ratio).mean()), "bias": float(ratio.mean()), "points": len(ratio)}
