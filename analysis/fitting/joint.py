"""The joint laws of each method: the points they are fitted to, the fits, what is reported of them, and hold-outs.

A law of N and D is fitted to the best point of each budget and size. A law that also depends on S is fitted to the
best point of each budget, size and trainable fraction, if a method has at least three fractions, and two at one size:
else S follows from N, as for bias-only training, and no law can tell the two apart.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.fits import Convergence, HoldOut, JointLaw, Optimum, Span
from analysis.fitting import grouping, uncertainty
from analysis.fitting.laws import LAWS, Array, Law, interval, power_law
from analysis.fitting.solver import DidNotConverge, JointFit, NoFit, fit_joint
from embedscale.run.method import METHODS

KEPT_DRAWS = 200  # of each law, for the intervals of predictions
FRACTIONS = 3  # fewest trainable fractions for a law of S
Fitted = dict[str, JointFit | str]  # law → its fit, or why there is none


def cells_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the settings of one method (`grouping.settings`), with FLOP a token and S in every row."""
    cells = grouping.settings(table)
    cost = cells["budget_flop"] / cells["tokens"]
    cells["flop_per_token"] = cells["flop_per_token"].fillna(cost) if "flop_per_token" in cells else cost
    if "trainable_fraction" not in cells:
        cells["trainable_fraction"] = np.nan
    return cells


def points_for(law: Law, cells: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Return the points that a law is fitted to; `points` are the best of each budget and size."""
    if not law.needs_fraction:
        return points
    cells = cells.dropna(subset=["trainable_fraction"])
    return grouping.best_points(cells, ("n_parameters", "trainable_fraction"))


def fit_laws(
    method: str, cells: pd.DataFrame, points: pd.DataFrame, chosen: str, residual: str, delta: float
) -> Fitted:
    """Return the fit of the `chosen` law of N and D and of each law of S, or why there is none."""
    found: Fitted = {}
    by_fraction = _fractions_suffice(cells)
    for name, law in LAWS.items():
        if name == chosen or (law.needs_fraction and by_fraction):
            found[name] = try_law(law, points_for(law, cells, points), residual, delta)
        elif law.needs_fraction and (missing := _fractions_missing(method, cells)):
            found[name] = f"the {name} law needs {missing}"
    return found


def _fractions_suffice(cells: pd.DataFrame) -> bool:
    """Return whether a law of S can be fitted to the cells of a method: S must not follow from N."""
    at_a_size = cells.groupby("n_parameters")["trainable_fraction"].nunique()
    return bool(cells["trainable_fraction"].nunique() >= FRACTIONS and at_a_size.max() > 1)


def _fractions_missing(method: str, cells: pd.DataFrame) -> str:
    """Return what a law of S misses in the cells of a method; empty where nobody expects such a law."""
    fractions = cells["trainable_fraction"].nunique()
    if method in METHODS and not METHODS[method].choice:
        return ""
    if fractions >= FRACTIONS:  # S follows from N
        return "two trainable fractions at one size at least; each size has one"
    if fractions > 1 or method in METHODS:  # a rank sets the fraction too
        return f"at least {FRACTIONS} trainable fractions; found {fractions}"
    return ""


def try_law(law: Law, points: pd.DataFrame, residual: str, delta: float, starts: int = 24) -> JointFit | str:
    """Return the law's fit to points, weighted by their seeds, or why there is none."""
    budgets = points["profile" if "profile" in points else "budget_flop"].nunique()
    if budgets < 2:
        return f"the {law.name} law needs at least 2 budgets; found {budgets}"
    n, d, loss, s, seeds = (
        points[name].to_numpy(float) for name in ("n_parameters", "tokens", "loss", "trainable_fraction", "seeds")
    )
    fraction = s if law.needs_fraction else None
    try:
        return fit_joint(law, n, d, loss, fraction, weights=seeds, residual=residual, delta=delta, starts=starts)
    except DidNotConverge as error:
        return f"{error}; the law is used nowhere"
    except NoFit as error:
        return str(error)


def size_fit(found: Mapping[str, JointFit | str]) -> JointFit | None:
    """Return the first fit of a law of N and D alone; None if there is none."""
    fits = (found.get(name) for name, law in LAWS.items() if not law.needs_fraction)
    return next((fit for fit in fits if isinstance(fit, JointFit)), None)


def predictor(fit: JointFit | None) -> grouping.Losses | None:
    """Return the loss of N and D by a fit, or None without one."""
    return None if fit is None else lambda n, d: np.ravel(fit.predict(n, d))


OFF, LEAST_OFF = 10.0, 0.03  # robust standard deviations of ln L, and ln L itself, from which on a run is far off
FEWEST_OFF = 15  # points of which this can be told


def far_off(points: pd.DataFrame, law: grouping.Losses | None) -> Array:
    """Return ln L of each point less that of the joint law where the point lies far off it; else NaN.

    Such a run collapsed, had a poor setting, or is a slip of the table; or the law is wrong there. The residual that
    limits outliers keeps the law with the other points.
    """
    n, d, loss = (points[name].to_numpy(float) for name in ("n_parameters", "tokens", "loss"))
    left = np.full(len(points), np.nan) if law is None else np.log(loss / law(n, d))
    if len(points) < FEWEST_OFF or not np.isfinite(left).all():
        return np.full(len(points), np.nan)
    usual = 1.4826 * np.median(np.abs(left))  # the standard deviation, if the errors are normal
    return np.where(np.abs(left) > max(OFF * usual, LEAST_OFF), left, np.nan)


def _where(fit: JointFit) -> tuple[Array, Array]:
    """Return N and D of the points of a fit."""
    return np.exp(fit.data.log_n + fit.data.centre[0]), np.exp(fit.data.log_d + fit.data.centre[1])


def summarise(fit: JointFit, refits: Array, points: pd.DataFrame, confidence: float) -> JointLaw:
    """Return a fit as it stands in fits.json; `refits` are bootstrap draws of its coefficients [draws, p].

    Rows of NaN are refits that did not converge.
    """
    missed = int(np.isnan(refits).any(1).sum())
    refits = refits[~np.isnan(refits).any(1)]
    n, d = _where(fit)
    proportional = grouping.costs_in_proportion(points)
    exponent = fit.law.size_exponent(fit.values) if proportional else None
    exponents = fit.law.size_exponent(refits) if proportional else None
    names = fit.law.coefficients
    return JointLaw(
        law=fit.law.name,
        coefficients={**fit.coefficients},
        intervals={name: interval(refits[:, i], confidence) for i, name in enumerate(names)},
        not_fixed=fit.not_fixed,
        residual=fit.residual,
        delta=fit.delta if fit.residual == "huber" else None,
        objective=fit.objective,
        runs=len(fit.loss),
        log_residual=fit.log_residual,
        convergence=Convergence(fit.starts, fit.agreeing, fit.gradient, fit.iterations, fit.condition, missed),
        span=Span(_ends(n), _ends(d), _ends(fit.data.s)),
        draws=tuple(tuple(row) for row in refits[:KEPT_DRAWS].tolist()),
        n_exponent=None if exponent is None else float(exponent),
        n_exponent_interval=None if exponents is None else interval(exponents, confidence),
    )


def _ends(values: Array) -> tuple[float, float]:
    return float(values.min()), float(values.max())


# --- Hold-out --------------------------------------------------------------------------------------------------------


def hold_out(
    cells: pd.DataFrame,
    points: pd.DataFrame,
    joint: Fitted,
    rows: Sequence[Optimum],
    residual: str,
    delta: float,
) -> tuple[HoldOut, ...]:
    """Predict the largest budget, and the largest size, by fits without it (the paper's test, section 4.4)."""
    result = []
    for law in (LAWS[name] for name, fit in joint.items() if isinstance(fit, JointFit)):
        data = points_for(law, cells, points)
        for what, column in uncertainty.LARGEST.items():
            out, value = uncertainty.held_out_rows(data, column)
            fitted = try_law(law, data[~out], residual, delta, starts=6)
            if isinstance(fitted, str):
                continue
            left = data[out]
            n, d, s, loss = (
                left[name].to_numpy(float) for name in ("n_parameters", "tokens", "trainable_fraction", "loss")
            )
            predicted = np.ravel(fitted.predict(n, d, s))
            if np.isfinite(predicted).all():  # a law far off its data can leave a float's range
                result.append(uncertainty.judged(what, value, law.name, predicted, loss))
    return (*result, *hold_out_optima(rows))


def hold_out_optima(rows: Sequence[Optimum]) -> tuple[HoldOut, ...]:
    """Predict N* and L* of the largest budget by power laws through the other optima, where there are at least two."""
    result = []
    interior = [row for row in rows if row.interior]
    if len(interior) >= 3:
        budgets, last = np.array([row.budget_flop for row in interior]), interior[-1]
        known = [name for name in ("n_opt", "loss") if all(getattr(row, name) for row in interior)]
        for name in known:
            values = np.array([getattr(row, name) for row in interior])
            log_coefficient, exponent = power_law(budgets[:-1], values[:-1])
            predicted = np.exp(log_coefficient + exponent * np.log([last.budget_flop]))
            result.append(uncertainty.judged("largest budget", last.budget_flop, name, predicted, values[-1:]))
    return tuple(result)
