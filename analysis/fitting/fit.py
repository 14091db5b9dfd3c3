"""Fit a table of runs: optima, laws with their intervals, hold-outs and the frontier, as the `Fits` of fits.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import BACKBONE, COMPARABLE, HYPERPARAMETERS
from analysis.fits import (
    FORMAT,
    Counts,
    Curve,
    Estimate,
    Exclusion,
    Fits,
    FitSettings,
    Interval,
    JointLaw,
    Line,
    MethodFit,
    Optimum,
    Point,
    PowerLaw,
    PowerLaws,
)
from analysis.fitting import grouping, optima, uncertainty
from analysis.fitting import joint as joint_laws
from analysis.fitting.frontier import frontier
from analysis.fitting.given import fit_optima
from analysis.fitting.joint import KEPT_DRAWS, Fitted
from analysis.fitting.laws import Array, interval, power_law
from analysis.fitting.notes import notes_of
from analysis.fitting.optima import Profile
from analysis.fitting.solver import JointFit
from analysis.fitting.uncertainty import OptimumDraws
from analysis.runs import Runs
from embedscale import __version__
from embedscale.errors import UserError

QUANTITIES = {"n_opt": "log_n", "d_opt": "log_d", "loss": "log_loss"}  # of an optimum, and the draws of its logarithm
FLOOR = 0.33  # of the distance between sizes: no optimum is known better than that (Porian et al. 2024)


def fit(
    runs: Runs,
    *,
    residual: str = "huber",
    delta: float = 1e-3,
    optimum: str = "parabola",
    window: float = 4.0,
    noise: float | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    where: Mapping[str, str] | None = None,
    advance: Callable[[str], object] = lambda what: None,
) -> Fits:
    """Return all that the runs say.

    `residual` (`solver.RESIDUALS`) and `delta` are those of the joint laws. `optimum` is the estimator whose optima
    enter the power laws, and `window` the factor in N within which a parabola is fitted. `noise` is the standard
    deviation of ln L; None takes it from replicates, or else from the residuals of the joint laws. `bootstrap` is the
    number of draws behind each interval. `where` is kept as the setting that selected the runs. `advance` is called
    with the name of each method as its fit begins.

    Raises UserError for a setting out of range, for runs of a single budget, and for runs of fewer than three sizes.
    """
    settings = FitSettings(
        residual, delta, optima.check_estimator(optimum, window), window, bootstrap, confidence, seed, dict(where or {})
    )
    _check(settings, noise)
    if runs.are_optima:
        return fit_optima(runs, settings)
    # Grouped over all methods, so that the methods meet at budgets that are equal to the last bit.
    table = runs.table.assign(profile=grouping.group_budgets(runs.table["budget_flop"].to_numpy(float)))
    budgets, sizes = np.unique(table["profile"]), np.unique(table["n_parameters"])
    if len(budgets) < 2:
        raise UserError(
            f"budget_flop: all {len(table)} runs have {budgets[0]:.4g} FLOP; laws need at least two budgets"
        )
    if len(sizes) < 3:
        told = ", ".join(f"{size:.4g}" for size in sizes)
        raise UserError(f"n_parameters: {len(sizes)} sizes only ({told}); optima and laws need at least three")

    cells = {method: joint_laws.cells_of(table[table["method"] == method]) for method in runs.methods}
    points = {method: grouping.best_points(found) for method, found in cells.items()}
    joint: dict[str, Fitted] = {}
    for method in runs.methods:
        advance(method)
        joint[method] = joint_laws.fit_laws(method, cells[method], points[method], residual, delta)
    known = joint_laws.noise_of(noise, cells, joint)

    rng = np.random.default_rng(seed)
    methods: dict[str, MethodFit] = {}
    draws: dict[str, dict[float, OptimumDraws]] = {}
    for method in runs.methods:
        advance(method)
        excluded = runs.excluded[runs.excluded["method"] == method]
        methods[method], draws[method] = _fit_method(
            cells[method], points[method], excluded, joint[method], settings, known.log_loss or None, rng
        )
    line = frontier(methods, draws, known.log_loss or None, budgets, confidence, bootstrap, rng)
    found = Fits(
        format=FORMAT,
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        source=runs.source,
        settings=settings,
        runs=Counts(len(table), len(runs.excluded), tuple(budgets.tolist()), tuple(sizes.tolist())),
        comparable=_comparable(table),
        noise=known,
        methods=methods,
        frontier=line,
        excluded=tuple(Exclusion(**_plain(row)) for row in runs.excluded.to_dict("records")),
        notes=(*runs.notes, *notes_of(settings, known, methods, line)),
    )
    # What is returned equals what a reader of fits.json gets: JSON's own types, and None for what is not finite.
    return Fits.from_json(_plain(found.to_json()))


def _check(settings: FitSettings, noise: float | None) -> None:
    if settings.seed < 0:
        raise UserError(f"seed: {settings.seed} is out of range; allowed: at least 0")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise UserError(f"noise: {noise} is out of range; allowed: above 0, the standard deviation of ln L")
    if not 0 < settings.confidence < 1:
        raise UserError(f"confidence: {settings.confidence} is out of range; allowed: between 0 and 1")
    if settings.bootstrap < 100:
        raise UserError(f"bootstrap: {settings.bootstrap} is out of range; allowed: at least 100")


def _plain(value: Any) -> Any:
    """Return the value in JSON's types. NaN and infinity, which JSON does not have, become None."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if value is pd.NaT or value is pd.NA else value


# --- One method ------------------------------------------------------------------------------------------------------


def _fit_method(
    cells: pd.DataFrame,
    points: pd.DataFrame,
    excluded: pd.DataFrame,
    joint: Fitted,
    settings: FitSettings,
    sigma: float | None,
    rng: np.random.Generator,
) -> tuple[MethodFit, dict[float, OptimumDraws]]:
    """Return a method's fit, and the draws of its interior optima by budget."""
    # One refit of each law, from which all of its intervals are taken.
    refits = {}
    for name, each in joint.items():
        if isinstance(each, JointFit):
            losses = list(joint_laws.points_for(each.law, cells, points)["losses"])
            refits[name] = uncertainty.resampled(each, losses, settings.bootstrap, rng)
    profiled = points
    if not (cells["profile"] == cells["budget_flop"]).all():  # the best of each group of nearly equal budgets
        profiled = grouping.best_points(cells.assign(budget_flop=cells["profile"]))
    rows: list[Optimum] = []
    draws: dict[float, OptimumDraws] = {}
    law = joint_laws.size_fit(joint)
    for profile in optima.profiles(profiled, excluded[excluded["reason"] == "diverged"]):
        row, spread = _optimum(profile, law, refits[law.law.name] if law else None, settings, sigma, rng)
        rows.append(row)
        if spread is not None:
            draws[profile.budget] = spread
    laws: dict[str, JointLaw] = {
        name: joint_laws.summarise(each, refits[name], points, settings.confidence)
        for name, each in joint.items()
        if isinstance(each, JointFit)
    }
    return MethodFit(
        points=tuple(map(_point, points.to_dict("records"))),
        optima=tuple(rows),
        power_laws=_power_laws(rows, draws, profiled, settings.confidence),
        joint_laws=laws,
        refused={name: each for name, each in joint.items() if isinstance(each, str)},
        hold_out=joint_laws.hold_out(cells, points, joint, rows, settings.residual, settings.delta),
    ), draws


def _optimum(
    profile: Profile,
    law: JointFit | None,
    refits: Array | None,
    settings: FitSettings,
    sigma: float | None,
    rng: np.random.Generator,
) -> tuple[Optimum, OptimumDraws | None]:
    """Return the optimum of a profile, with the draws behind its intervals where it is interior."""
    state, why, add_size = profile.state()
    found: dict[str, Estimate | None] = dict.fromkeys(optima.ESTIMATORS)
    curve = None
    if len(profile.points) >= 3:
        log_n, log_loss, curvature = optima.parabola(profile.log_n, profile.log_loss[None], settings.window)
        found["parabola"] = _estimate(log_n, np.log(profile.tokens_at(log_n)), log_loss)
        if found["parabola"]:
            curve = Curve(float(log_n[0]), float(curvature[0]))
        log_n, log_loss = optima.akima(profile.log_n, profile.log_loss[None])
        found["akima"] = _estimate(log_n, np.log(profile.tokens_at(log_n)), log_loss)
        if law is not None:
            found["law"] = _estimate(*optima.law_optimum(law.law, law.values, profile.points, profile.budget))
    chosen = found[settings.optimum]
    if state == "interior" and chosen is None:
        # The best size has neighbours on both sides, and still the minimum of the estimator is at an end.
        state, why = "edge", f"the {settings.optimum} has no minimum within the sizes"
        below = bool(profile.log_loss[0] < profile.log_loss[-1])
        add_size = optima.next_size(profile.points["n_parameters"].to_numpy(float), below)
    spread = None
    if state == "interior" and settings.optimum == "law":
        assert law is not None and refits is not None
        spread = OptimumDraws(*optima.law_optimum(law.law, refits, profile.points, profile.budget))
    elif state == "interior" and sigma is not None:
        spread = uncertainty.optimum_draws(profile, settings.optimum, settings.window, sigma, settings.bootstrap, rng)
    ends: dict[str, Interval | None] = {
        f"{name}_interval": interval(np.exp(getattr(spread, draws)), settings.confidence) if spread else None
        for name, draws in QUANTITIES.items()
    }
    row = Optimum(
        budget_flop=profile.budget,
        state=state,
        **{name: getattr(chosen, name) if state == "interior" else None for name in QUANTITIES},
        **ends,  # type: ignore[arg-type]
        valid_share=spread.valid_share if spread else None,
        **found,  # type: ignore[arg-type]
        curve=curve,
        best=_point(profile.points.iloc[int(profile.log_loss.argmin())].to_dict()) if len(profile.points) else None,
        add_size=add_size,
        why=why,
    )
    return row, spread


def _estimate(log_n: Array, log_d: Array, log_loss: Array) -> Estimate | None:
    values = [float(np.exp(each[0])) for each in (log_n, log_d, log_loss)]
    return Estimate(*values) if all(map(math.isfinite, values)) else None


def _power_laws(
    rows: Sequence[Optimum], draws: Mapping[float, OptimumDraws], points: pd.DataFrame, confidence: float
) -> PowerLaws:
    """Return the power laws through the interior optima; no law below two of them, or out of a float's range."""
    interior = [row for row in rows if row.interior]
    if len(interior) < 2:
        return PowerLaws()
    budgets = np.array([row.budget_flop for row in interior])
    spreads = [draws[budget] for budget in budgets if budget in draws]
    floors = np.array([FLOOR * np.diff(_log_sizes(points, budget)).mean() for budget in budgets])
    laws: dict[str, PowerLaw | None] = {}
    for name, values in QUANTITIES.items():
        y = np.array([getattr(row, name) for row in interior])
        line = _line(*power_law(budgets, y))
        weighted, kept = None, []
        if len(spreads) == len(interior):
            drawn = np.array([getattr(spread, values) for spread in spreads])  # [budgets, draws]
            unweighted = uncertainty.power_law_draws(budgets, drawn)
            least = floors if name != "loss" else np.full(len(floors), 1e-9)
            weights = uncertainty.floored_spread(drawn, least) ** -2
            line = _line(*power_law(budgets, y), unweighted, confidence)
            weighted = _line(
                *power_law(budgets, y, weights), uncertainty.power_law_draws(budgets, drawn, weights), confidence
            )
            kept = unweighted[:KEPT_DRAWS].tolist()
        exists = line.coefficient > 0 and math.isfinite(line.coefficient) and math.isfinite(line.exponent)
        laws[name] = (
            PowerLaw(
                line.coefficient,
                line.exponent,
                len(interior),
                line.coefficient_interval,
                line.exponent_interval,
                weighted,
                tuple(map(tuple, kept)),
            )
            if exists
            else None
        )
    return PowerLaws(**laws)


def _log_sizes(points: pd.DataFrame, budget: float) -> Array:
    return np.log(np.sort(points[np.isclose(points["budget_flop"], budget)]["n_parameters"].to_numpy(float)))


def _line(log_coefficient: Array, exponent: Array, draws: Array | None = None, confidence: float = 0.95) -> Line:
    ends = (None, None)
    if draws is not None:
        ends = interval(np.exp(draws[:, 0]), confidence), interval(draws[:, 1], confidence)  # type: ignore[assignment]
    return Line(float(np.exp(log_coefficient)), float(exponent), *ends)


def _point(row: Mapping[Any, Any]) -> Point:
    """Return a row of `grouping.best_points` as a value."""
    own = ("budget_flop", "n_parameters", "tokens", "loss", "flop_per_token", "seeds", "tried", "at_grid_end")
    more = (*BACKBONE, "pairs", "steps", "batch_size", "gpu_hours", "train_loss", "run")
    plain = _plain({name: row[name] for name in (*own, *more) if name in row})
    plain["at_grid_end"] = tuple(plain["at_grid_end"])
    return Point(**plain, hyperparameters=_plain({name: row[name] for name in HYPERPARAMETERS if name in row}))


def _comparable(table: pd.DataFrame) -> dict[str, Any]:
    found = {field: table[field].dropna() for field in COMPARABLE if field in table}
    return {field: values.iloc[0] for field, values in found.items() if len(values)}
