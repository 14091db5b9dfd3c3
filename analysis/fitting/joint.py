"""The joint laws of each method: the points that they are fitted to, the fits, their facts and their hold-outs.

The law L(N, D) is fitted to the best point of each budget and size; the paper's L(S, N, D) to the best of each budget,
size and trainable fraction, where a method has at least three fractions.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fitting import optima, uncertainty
from analysis.fitting.laws import CHINCHILLA, TRAINABLE_FRACTION, Law, power_law
from analysis.fitting.solver import JointFit, TooFewRuns, fit_joint
from analysis.fitting.uncertainty import interval

KEPT_DRAWS = 200  # of each law, for the intervals of predictions
Array = NDArray[np.float64]


def cells_of(table: pd.DataFrame) -> pd.DataFrame:
    """The settings of one method (`optima.settings`), with FLOP a token and S in every row."""
    cells = optima.settings(table)
    cost = cells["budget"] / cells["tokens"]
    cells["flop_per_token"] = cells["flop_per_token"].fillna(cost) if "flop_per_token" in cells else cost
    if "trainable_fraction" not in cells:
        cells["trainable_fraction"] = np.nan
    return cells


def by_fraction(cells: pd.DataFrame) -> pd.DataFrame:
    """The best point of each budget, size and trainable fraction: what the paper's law L(S, N, D) is fitted to."""
    return optima.best_points(cells.dropna(subset=["trainable_fraction"]), ("budget", "params", "trainable_fraction"))


def replicates(cells: pd.DataFrame, points: pd.DataFrame, law: str) -> list[Array]:
    return list((by_fraction(cells) if law == TRAINABLE_FRACTION.name else points)["losses"])


def _fit_law(law: Law, points: pd.DataFrame, residual: str, delta: float, starts: int) -> JointFit:
    columns = [points[name].to_numpy(float) for name in ("params", "tokens", "loss", "trainable_fraction", "seeds")]
    params, tokens, loss, s, seeds = columns
    fraction = s if law is TRAINABLE_FRACTION else None
    return fit_joint(law, params, tokens, loss, fraction, weights=seeds, residual=residual, delta=delta, starts=starts)


def fit_laws(
    method: str, cells: pd.DataFrame, points: pd.DataFrame, residual: str, delta: float
) -> dict[str, JointFit | str]:
    """Each joint law's fit, or why there is none."""
    found: dict[str, JointFit | str] = {}
    found[CHINCHILLA.name] = _try_law(CHINCHILLA, points, residual, delta)
    if method in ("freeze", "lora") or cells["trainable_fraction"].nunique() > 1:
        known = cells["trainable_fraction"].nunique()
        reason = f"the trainable_fraction law needs at least 3 trainable fractions; found {known}"
        found[TRAINABLE_FRACTION.name] = (
            _try_law(TRAINABLE_FRACTION, by_fraction(cells), residual, delta) if known >= 3 else reason
        )
    return found


def _try_law(law: Law, points: pd.DataFrame, residual: str, delta: float, starts: int = 24) -> JointFit | str:
    if points["budget"].nunique() < 2:
        return f"the {law.name} law needs at least 2 budgets; found {points['budget'].nunique()}"
    try:
        return _fit_law(law, points, residual, delta, starts)
    except TooFewRuns as error:
        return str(error)


def noise_of(
    given: float | None, cells: dict[str, pd.DataFrame], joint: dict[str, dict[str, JointFit | str]]
) -> tuple[float | None, dict[str, Any]]:
    """The standard deviation of ln L of one run, and where it is from."""
    if given is not None:
        return given, {"log_loss": given, "source": "given", "degrees_of_freedom": 0}
    sigma, freedom = optima.noise_of(pd.concat(cells.values()))
    if sigma:
        return sigma, {"log_loss": sigma, "source": "replicates", "degrees_of_freedom": freedom}
    found = [each["chinchilla"] for each in joint.values() if isinstance(each["chinchilla"], JointFit)]
    # Huber's and LAD's fits leave outliers outside; the median deviation does too (1.4826 makes it a Gaussian's).
    spreads = [
        1.4826 * np.median(np.abs(np.log(law.loss / law.predict(*_where(law))))) * _inflation(law) for law in found
    ]
    if spreads:
        sigma = float(np.sqrt(np.mean(np.square(spreads))))
        freedom = sum(len(law.loss) - len(law.theta) for law in found)
        return sigma or None, {"log_loss": sigma, "source": "residuals", "degrees_of_freedom": freedom}
    return None, {"log_loss": None, "source": "none", "degrees_of_freedom": 0}


def _where(law: JointFit) -> tuple[Array, Array]:
    return np.exp(law.data.log_n + law.data.centre[0]), np.exp(law.data.log_d + law.data.centre[1])


def _inflation(law: JointFit) -> float:
    return math.sqrt(len(law.loss) / (len(law.loss) - len(law.theta)))


def facts(fitted: JointFit | str, refits: Array | None, points: pd.DataFrame, confidence: float) -> dict[str, Any]:
    if isinstance(fitted, str):
        return {"refused": fitted}
    assert refits is not None
    names = fitted.law.names
    params, tokens = _where(fitted)
    facts: dict[str, Any] = fitted.coefficients | {
        "intervals": {name: interval(refits[:, i], confidence) for i, name in enumerate(names)},
        "not_fixed": list(fitted.not_fixed),
        "residual": fitted.residual,
        "delta": fitted.delta if fitted.residual == "huber" else None,
        "objective": fitted.objective,
        "runs": len(fitted.loss),
        "log_residual": fitted.log_residual,
        "convergence": {
            "starts": fitted.starts,
            "agreeing": fitted.agreeing,
            "gradient": fitted.gradient,
            "iterations": fitted.iterations,
            "condition": fitted.condition,
        },
        "span": {
            "params": [params.min(), params.max()],
            "tokens": [tokens.min(), tokens.max()],
            "trainable_fraction": [fitted.data.s.min(), fitted.data.s.max()],
        },
        "draws": refits[:KEPT_DRAWS].tolist(),
    }
    if fitted.law is CHINCHILLA:
        cost = points["flop_per_token"] / points["params"]
        # Adapters and frozen blocks cost small models more for their size: D = C / cost(N), and N* is no power of C.
        in_proportion = cost.max() < 1.01 * cost.min()
        exponents = refits[:, 4] / (refits[:, 3] + refits[:, 4])
        facts["n_exponent"] = facts["beta"] / (facts["alpha"] + facts["beta"]) if in_proportion else None
        facts["n_exponent_interval"] = interval(exponents, confidence) if in_proportion else None
    return facts


# --- Hold-out --------------------------------------------------------------------------------------------------------


def hold_out(
    cells: pd.DataFrame,
    points: pd.DataFrame,
    joint: dict[str, JointFit | str],
    rows: list[dict[str, Any]],
    residual: str,
    delta: float,
) -> list[dict[str, Any]]:
    """Fits without the largest budget, or the largest size (the paper's test, section 4.4), against what was found."""
    result = []
    for law in (CHINCHILLA, TRAINABLE_FRACTION):
        if not isinstance(joint.get(law.name), JointFit):
            continue
        data = points if law is CHINCHILLA else by_fraction(cells)
        for what, column in (("largest budget", "budget"), ("largest size", "params")):
            out, value = uncertainty.held_out_rows(data, column)
            fitted = _try_law(law, data[~out], residual, delta, starts=6)
            if isinstance(fitted, str):
                continue
            left = data[out]
            predicted = fitted.predict(
                left["params"].to_numpy(float),
                left["tokens"].to_numpy(float),
                left["trainable_fraction"].to_numpy(float),
            )
            found = left["loss"].to_numpy(float)
            result.append(
                {"left_out": what, "value": value, "law": law.name}
                | {"predicted": float(predicted.mean()), "found": float(found.mean())}
                | uncertainty.prediction_errors(predicted, found)
            )
    interior = [row for row in rows if row["state"] == "interior"]
    if len(interior) >= 3:
        budgets, last = np.array([row["budget"] for row in interior]), interior[-1]
        for name in ("n_opt", "loss"):
            log_coefficient, exponent = power_law(budgets[:-1], np.array([row[name] for row in interior[:-1]]))
            predicted = np.exp(log_coefficient + exponent * np.log(last["budget"]))
            result.append(
                {"left_out": "largest budget", "value": last["budget"], "law": name}
                | {"predicted": float(predicted), "found": last[name]}
                | uncertainty.prediction_errors(np.array([predicted]), np.array([last[name]]))
            )
    return result
