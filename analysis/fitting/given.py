"""Fit power laws to optima that a table states: budgets with N*, and with D*, losses and spreads where it has them.

There are no profiles, so nothing is said of other sizes than the best one, and there is no joint law. The intervals are
Student's t of the least-squares line, from the distances of the optima to it. The price is that they are wide for three
or four budgets, and missing for two.
"""

import math
from datetime import UTC, datetime
from statistics import NormalDist

import numpy as np
import pandas as pd

from analysis.fits import (
    FORMAT,
    Counts,
    Exclusion,
    Fits,
    FitSettings,
    Frontier,
    Interval,
    Line,
    MethodFit,
    Noise,
    Optimum,
    PowerLaw,
    PowerLaws,
)
from analysis.fitting import joint
from analysis.fitting.joint import KEPT_DRAWS
from analysis.fitting.laws import Array, power_law
from analysis.runs import Runs
from embedscale import __version__
from embedscale.errors import UserError
from embedscale.texts import number


def fit_optima(runs: Runs, settings: FitSettings) -> Fits:
    """Return the power laws of each method in a table of optima (`Runs.are_optima`).

    With `n_opt_spread`, the spread of ln N*, N* and D* are also fitted with optima weighted by its inverse square.
    Raises UserError for a method with fewer than two budgets, and for two optima of one method and budget.
    """
    rng = np.random.default_rng(settings.seed)
    methods = {}
    notes = ["these are optima, not runs: no joint law, no comparison of methods, and no loss of another size"]
    for method, rows in runs.table.groupby("method", sort=False):
        rows = rows.sort_values("budget_flop")
        if rows["budget_flop"].duplicated().any():
            twice = rows.loc[rows["budget_flop"].duplicated(), "budget_flop"].iloc[0]
            raise UserError(f"budget_flop: {method} has two optima at {number(twice, 4)} FLOP; choose one by --where")
        if len(rows) < 2:
            raise UserError(f"budget_flop: {method} has one optimum; a law needs at least two budgets")
        if len(rows) == 2:
            notes.append(f"{method}: a law through two optima has no interval and no test; a third budget gives both")
        methods[str(method)] = _fit_method(rows, settings, rng)
    budgets, sizes = (np.unique(runs.table[name]).tolist() for name in ("budget_flop", "n_parameters"))
    known = runs.excluded.astype(object).where(runs.excluded.notna(), None)
    excluded = tuple(Exclusion(*row) for row in known.itertuples(index=False))
    return Fits(
        format=FORMAT,
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        source=runs.source,
        settings=settings,
        runs=Counts(len(runs.table), len(excluded), tuple(budgets), tuple(sizes)),
        comparable={},
        noise=Noise(None, "none", 0),
        methods=methods,
        frontier=Frontier(),
        excluded=excluded,
        notes=(*runs.notes, *notes),
    )


def _fit_method(rows: pd.DataFrame, settings: FitSettings, rng: np.random.Generator) -> MethodFit:
    nothing = np.full(len(rows), np.nan)
    budgets, sizes, tokens, losses = (
        rows[name].to_numpy(float) for name in ("budget_flop", "n_parameters", "tokens", "loss")
    )
    spreads = rows["n_opt_spread"].to_numpy(float) if "n_opt_spread" in rows else nothing
    optima = tuple(
        Optimum(
            budget_flop=float(budget),
            state="interior",
            n_opt=float(size),
            d_opt=float(data),
            loss=float(loss) if math.isfinite(loss) else None,
            n_opt_interval=_around(float(size), float(spread), settings.confidence),
        )
        for budget, size, data, loss, spread in zip(budgets, sizes, tokens, losses, spreads, strict=True)
    )
    weights = spreads**-2 if (np.isfinite(spreads) & (spreads > 0)).all() else None
    laws = PowerLaws(
        _law(budgets, sizes, weights, settings, rng),
        _law(budgets, tokens, weights, settings, rng),
        _law(budgets, losses, None, settings, rng) if np.isfinite(losses).all() else None,
    )
    return MethodFit((), optima, laws, {}, {}, joint.hold_out_optima(optima))


def _around(value: float, spread: float, confidence: float) -> Interval | None:
    if not math.isfinite(spread):
        return None
    reach = math.exp(NormalDist().inv_cdf((1 + confidence) / 2) * spread)
    return value / reach, value * reach


def _law(
    budgets: Array, values: Array, weights: Array | None, settings: FitSettings, rng: np.random.Generator
) -> PowerLaw:
    line, draws = _line(budgets, values, np.ones(len(budgets)), settings, rng)
    weighted = None if weights is None else _line(budgets, values, weights, settings, rng)[0]
    ends = line.coefficient_interval, line.exponent_interval
    kept = tuple(map(tuple, draws[:KEPT_DRAWS].tolist()))
    return PowerLaw(line.coefficient, line.exponent, len(values), *ends, weighted, kept)


def _line(
    budgets: Array, values: Array, weights: Array, settings: FitSettings, rng: np.random.Generator
) -> tuple[Line, Array]:
    """Return the least-squares line of ln y on ln C, and draws of (ln coefficient, exponent) [draws, 2]."""
    log_coefficient, exponent = (float(each) for each in power_law(budgets, values, weights))
    from scipy.stats import t  # here, because it takes most of a second

    freedom = len(values) - 2
    if not freedom:
        return Line(math.exp(log_coefficient), exponent), np.empty((0, 2))
    x, y = np.log(budgets), np.log(values)
    centre = float(np.average(x, weights=weights))
    scale = math.sqrt((weights * (y - log_coefficient - exponent * x) ** 2).sum() / freedom)
    # Height at the centre and slope are uncorrelated.
    errors = scale / np.sqrt([weights.sum(), (weights * (x - centre) ** 2).sum()])
    reach = t.ppf((1 + settings.confidence) / 2, freedom) * np.array(
        [math.hypot(errors[0], errors[1] * centre), errors[1]]
    )
    low, high = np.array([log_coefficient, exponent]) - reach, np.array([log_coefficient, exponent]) + reach
    drawn = errors * rng.standard_normal((settings.bootstrap, 2))
    drawn /= np.sqrt(rng.chisquare(freedom, (settings.bootstrap, 1)) / freedom)
    draws = np.stack([log_coefficient + drawn[:, 0] - drawn[:, 1] * centre, exponent + drawn[:, 1]], 1)
    ends = (math.exp(low[0]), math.exp(high[0])), (float(low[1]), float(high[1]))
    return Line(math.exp(log_coefficient), exponent, *ends), draws
