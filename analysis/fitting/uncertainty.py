"""Intervals: bootstrap over runs for joint laws, noise on the losses for optima and what follows from them.

Joint laws are fitted again to resampled runs. A profile of five sizes cannot be resampled, because a parabola needs its
points. Optima, power laws and crossings therefore get their spread from noise that is drawn and added to ln L. The
price is that this noise has to be known: from replicates, from the user, or from the residuals of the joint law. All
intervals are percentile intervals.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fits import HoldOut
from analysis.fitting.laws import Array, interval, power_law
from analysis.fitting.optima import Profile, akima, parabola
from analysis.fitting.solver import JointFit

__all__ = ["OptimumDraws", "interval", "optimum_draws", "resampled"]


def resampled(fit: JointFit, losses: list[Array], count: int, rng: np.random.Generator) -> Array:
    """Return coefficients [count, p] of the law fitted to `count` resamples; NaN where a refit did not converge.

    A point is drawn with all its seeds, because they share the law's misfit at that point. `losses` [points] holds the
    replicates of each point, which are then resampled within the point.
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
                # The variance of r draws out of r is too small by the factor (r − 1) / r.
                drawn[:, i] = each.mean() + (means - each.mean()) * np.sqrt(r / (r - 1))
    # A fit of p coefficients leaves a variance that is too small by (points − p) / points, and so do its refits.
    widening = np.sqrt(points / (points - len(fit.theta)))
    theta = fit.law.internal(fit.refit(weights=weights, loss=drawn), fit.data)
    return fit.law.published(fit.theta + widening * (theta - fit.theta), fit.data)


@dataclass(frozen=True)
class OptimumDraws:
    """Draws [draws] of ln N*, ln D* and ln L* at one budget; NaN where a draw has its minimum at an end of the grid."""

    log_n: Array
    log_d: Array
    log_loss: Array

    @property
    def valid_share(self) -> float:
        return float(np.isfinite(self.log_n).mean())


def optimum_draws(
    profile: Profile, estimator: str, window: float, noise: float, count: int, rng: np.random.Generator
) -> OptimumDraws:
    """Return `count` optima of a profile by "parabola" or "akima", with noise of `noise` / √seeds added to ln L."""
    scale = noise / np.sqrt(profile.points["seeds"].to_numpy(float))
    drawn = profile.log_loss + scale * rng.standard_normal((count, len(scale)))
    if estimator == "akima":
        log_n, log_loss = akima(profile.log_n, drawn)
    else:
        log_n, log_loss, _ = parabola(profile.log_n, drawn, window)
    return OptimumDraws(log_n, np.log(profile.tokens_at(log_n)), log_loss)


def floored_spread(draws: Array, floor: Array) -> Array:
    """Return each budget's standard deviation of draws [budgets, draws], at least `floor`, / share of finite draws.

    Porian et al. (2024) weight the points of a power law by its inverse square.
    """
    share = np.isfinite(draws).mean(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = draws - np.nanmean(np.where(share[:, None] > 0, draws, 0.0), 1)[:, None]
        return np.maximum(np.sqrt(np.nanmean(np.where(share[:, None] > 0, centred, 0.0) ** 2, 1)), floor) / share


def power_law_draws(budgets: Array, draws: Array, weights: Array | None = None) -> Array:
    """Return ln coefficient and exponent [draws, 2] of power laws through draws of ln y [budgets, draws]."""
    return np.stack(power_law(budgets, np.exp(draws.T), weights), 1)


def crossing(a: Array, b: Array) -> Array:
    """Return ln C at which two power laws (ln coefficient, exponent), each [..., 2], meet; NaN if they are parallel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a[..., 1] == b[..., 1], np.nan, (b[..., 0] - a[..., 0]) / (a[..., 1] - b[..., 1]))


LARGEST: dict[Literal["largest budget", "largest size"], str] = {
    "largest budget": "budget_flop",
    "largest size": "n_parameters",
}  # what a hold-out leaves out, and its column


def held_out_rows(points: pd.DataFrame, column: str) -> tuple[NDArray[np.bool_], float]:
    """Return which rows have the largest budget or size, and that value."""
    largest = float(points[column].max())
    return np.isclose(points[column], largest, rtol=1e-9), largest


def judged(
    left_out: Literal["largest budget", "largest size"], value: float, law: str, predicted: Array, found: Array
) -> HoldOut:
    """Return the errors of predictions [points] of what was left out."""
    ratio = predicted / found - 1
    return HoldOut(
        left_out=left_out,
        value=value,
        law=law,
        predicted=float(predicted.mean()),
        found=float(found.mean()),
        error=float(np.abs(ratio).mean()),
        bias=float(ratio.mean()),
        points=len(ratio),
    )
