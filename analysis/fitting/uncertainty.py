"""Intervals: bootstrap over runs for joint laws, noise on the losses for optima and what follows from them.

Joint laws are fitted again to resampled runs. A profile of five sizes cannot be resampled, because a parabola needs its
points. Optima, power laws and crossings therefore get their spread from noise that is drawn and added to ln L.

The noise is what moves a run's loss off the curve of its profile (`noise_of`). Replicates tell only a part: they differ
in the seed alone, while sizes also differ in how well they were tuned. Residuals of the profiles tell all, and a little
more, because no curve fits exactly. So both are pooled, unless the residuals are larger than the replicates allow; then
the residuals stand alone. Each draw has a noise of its own, so that few degrees of freedom widen the intervals, as in
Student's t. An estimator is biased where the grid is wide or off-centre. The joint law's own curve at the same sizes
tells how much, and the intervals allow for it (`with_bias`). All intervals are percentile intervals.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fits import HoldOut
from analysis.fitting.grouping import Losses
from analysis.fitting.laws import Array, power_law
from analysis.fitting.optima import Profile, estimate, law_optimum, near_best
from analysis.fitting.solver import JointFit
from analysis.noise import Noise


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
    # Runs that fix nothing can send a coefficient of a draw out of a float's range: to infinity, or to 0.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        theta = fit.law.internal(fit.refit(weights=weights, loss=drawn), fit.data)
        return fit.law.published(fit.theta + widening * (theta - fit.theta), fit.data)


# --- Noise -----------------------------------------------------------------------------------------------------------

FREEDOM = 8  # fewest degrees of freedom for which the residuals of parabolas are taken
CLIP = 20.0  # times the median of all profiles: the largest mean square of a profile that counts
PROFILES = 4  # fewest profiles for which a wild one is clipped
DIFFER = 0.01  # probability of noises so far apart, if they are one, below which each method has its own
ALONE = 0.05  # probability of such large residuals, given the replicates, below which they are not pooled


@dataclass(frozen=True)
class Measured:
    """The runs of a method as the noise is told from them: settings with the `losses` of their replicates, profiles."""

    cells: pd.DataFrame
    profiles: Sequence[Profile]
    law: Losses | None


def noise_of(given: float | None, methods: Mapping[str, Measured], window: float) -> tuple[Noise, dict[str, Noise]]:
    """Return the standard deviation of ln L of one run about its profile's curve: of all runs, and of each method.

    Residuals are those of the parabolas near the best size, or of the joint law's curves, each shifted and tilted to
    fit its profile: those with the smaller mean square. Parabolas with fewer than `FREEDOM` degrees of freedom are not
    asked. Each method has the noise of all runs unless an F test says that the two methods farthest apart differ (at
    `DIFFER`, divided by the number of pairs); then each has its own, as far as residuals tell it.
    """
    from scipy.special import fdtrc  # here, so that `embedscale report` starts without scipy

    if given is not None:
        known = Noise(given, "given", 0)
        return known, dict.fromkeys(methods, known)
    bends, tilts = (_pooled(_residuals_of(methods.values(), bent, window)) for bent in (True, False))
    bent = bends[1] >= FREEDOM and bends[0] / bends[1] <= tilts[0] / max(tilts[1], 1)
    known = _noise(methods.values(), bent, window)
    own = {name: _noise([each], bent, window) for name, each in methods.items()}
    told = [each for each in own.values() if each.residuals_freedom and each.log_loss]
    low, high = (pick(told, key=lambda each: each.log_loss or 0.0, default=known) for pick in (min, max))
    shared = dict.fromkeys(methods, known)
    if len(told) < 2 or not low.log_loss or not high.log_loss:
        return known, shared
    chance = float(fdtrc(high.degrees_of_freedom, low.degrees_of_freedom, (high.log_loss / low.log_loss) ** 2))
    if chance > DIFFER / math.comb(len(told), 2):
        return known, shared
    return known, shared | {name: each for name, each in own.items() if each in told}


def _noise(methods: Iterable[Measured], bent: bool, window: float) -> Noise:
    """Return the noise by replicates and residuals, which are pooled unless the residuals are too large for that."""
    from scipy.special import fdtrc

    methods = list(methods)
    groups = [np.log(losses) for each in methods for losses in each.cells["losses"] if len(losses) > 1]
    repeated, free = _pooled([(group - group.mean(), len(group) - 1) for group in groups])
    left, rest = _pooled(_residuals_of(methods, bent, window))
    parts = {
        "replicates": math.sqrt(repeated / free) if free else None,
        "replicates_freedom": free,
        "residuals": math.sqrt(left / rest) if rest else None,
        "residuals_freedom": rest,
    }
    if not free and not rest:
        return Noise(None, "none", 0)
    if not rest:
        return Noise(parts["replicates"], "replicates", free, **parts)  # type: ignore[arg-type]
    if not free or float(fdtrc(rest, free, left / rest / max(repeated / free, 1e-300))) < ALONE:
        return Noise(parts["residuals"], "residuals", rest, **parts)  # type: ignore[arg-type]
    return Noise(math.sqrt((repeated + left) / (free + rest)), "pooled", free + rest, **parts)  # type: ignore[arg-type]


def _residuals_of(methods: Iterable[Measured], bent: bool, window: float) -> list[tuple[Array, int]]:
    return [_residuals(each, None if bent else runs.law, window) for runs in methods for each in runs.profiles]


def _residuals(profile: Profile, law: Losses | None, window: float) -> tuple[Array, int]:
    """Return the residuals of ln L near a profile's best size, × √seeds, and their degrees of freedom."""
    if len(profile.points) < 3 or profile.near_off(int(profile.log_loss.argmin()), window):
        return np.array([]), 0
    inner = int(np.clip(profile.log_loss.argmin(), 1, len(profile.points) - 2))
    near = near_best(profile.log_n, inner, window)
    x, y = profile.log_n[near] - profile.log_n[inner], profile.log_loss[near]
    terms = [np.ones_like(x), x]
    if law is None:
        terms.append(x**2)
    else:
        y = y - np.log(law(np.exp(profile.log_n), profile.tokens_at(profile.log_n)))[near]
    weight = np.sqrt(profile.points["seeds"].to_numpy(float)[near])
    if not np.isfinite(y).all() or len(y) <= len(terms):
        return np.array([]), 0
    design = np.stack(terms, 1) * weight[:, None]
    left = y * weight - design @ np.linalg.lstsq(design, y * weight, rcond=None)[0]
    return left, len(y) - len(terms)


def _pooled(found: Sequence[tuple[Array, int]]) -> tuple[float, int]:
    """Return the sum of squares of residuals and their degrees of freedom; those of wild profiles are clipped."""
    squares = np.array([float((left**2).sum()) / count for left, count in found if count])
    freedom = np.array([count for _, count in found if count])
    if len(squares) >= PROFILES and np.median(squares) > 0:
        squares = np.minimum(squares, CLIP * np.median(squares))
    return float(squares @ freedom), int(freedom.sum())


# --- Optima and what follows from them -------------------------------------------------------------------------------


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
    profile: Profile, estimator: str, window: float, noise: float | Array, count: int, rng: np.random.Generator
) -> OptimumDraws:
    """Return `count` optima of a profile by an estimator, with noise of `noise` [draws] / √seeds added to ln L."""
    scale = np.broadcast_to(noise, count)[:, None] / np.sqrt(profile.points["seeds"].to_numpy(float))
    drawn = profile.log_loss + scale * rng.standard_normal(scale.shape)
    log_n, log_loss = estimate(estimator, profile.log_n, drawn, window)
    return OptimumDraws(log_n, np.log(profile.tokens_at(log_n)), log_loss)


def with_bias(
    draws: OptimumDraws, profile: Profile, law: JointFit, estimator: str, window: float, doubt: Array
) -> OptimumDraws:
    """Return draws that allow for the bias of an estimator, × `doubt` [draws] of a standard normal distribution.

    The bias is how far the estimator lies from the optimum of the joint law's own losses at the profile's sizes.
    """
    curve = np.log(law.predict(np.exp(profile.log_n), profile.tokens_at(profile.log_n))).reshape(1, -1)
    found = estimate(estimator, profile.log_n, curve, window)
    true = law_optimum(law.law, law.values, profile.points, profile.budget)
    by_size, by_loss = float(found[0][0] - true[0][0]), float(found[1][0] - true[2][0])
    if not (math.isfinite(by_size) and math.isfinite(by_loss)):
        return draws
    log_n = draws.log_n + by_size * doubt
    return OptimumDraws(log_n, np.log(profile.tokens_at(log_n)), draws.log_loss + by_loss * doubt)


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
    with np.errstate(over="ignore", under="ignore"):  # a draw whose curve is nearly a line
        return np.stack(power_law(budgets, np.exp(draws.T), weights), 1)


def with_misfit(budgets: Array, log_y: Array, draws: Array, rng: np.random.Generator) -> Array:
    """Return draws of ln y [budgets, draws] that spread also by what the optima [budgets] miss their power law by.

    The optima of a law with a floor E lie on a curve, and a line through them is wrong by more than their noise. What
    their residuals exceed that noise by is added. Below three optima nothing is left over.
    """
    if len(budgets) < 3:
        return draws
    line = np.stack([np.ones(len(budgets)), np.log(budgets)], 1)
    rest = np.eye(len(budgets)) - line @ np.linalg.pinv(line)
    valid = draws[:, np.isfinite(draws).all(0)]
    by_noise = (rest @ valid).var(1).sum() if valid.shape[1] else 0.0
    excess = (float(np.square(rest @ log_y).sum()) - by_noise) / (len(budgets) - 2)
    if not excess > 0:
        return draws
    own = rng.spawn(1)[0]  # so that what is drawn after stays the same
    return draws + math.sqrt(excess) * own.standard_normal(draws.shape)


def crossing(a: Array, b: Array) -> Array:
    """Return ln C at which two power laws (ln coefficient, exponent), each [..., 2], meet; NaN if they are parallel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a[..., 1] == b[..., 1], np.nan, (b[..., 0] - a[..., 0]) / (a[..., 1] - b[..., 1]))


LARGEST: dict[Literal["largest budget", "largest size"], str] = {
    "largest budget": "budget_flop",
    "largest size": "n_parameters",
}  # what a hold-out leaves out, and its column


def held_out_rows(points: pd.DataFrame, column: str) -> tuple[NDArray[np.bool_], float]:
    """Return which rows have the largest budget (their profile's) or size, and that value."""
    values = points["profile"] if column == "budget_flop" and "profile" in points else points[column]
    largest = float(values.max())
    return np.isclose(values, largest, rtol=1e-9), largest


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
