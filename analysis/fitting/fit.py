"""Fit a table of runs: optima, laws with their intervals, hold-outs and the frontier, as the `Fits` of fits.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    Line,
    MethodFit,
    Optimum,
    Point,
    PowerLaw,
    PowerLaws,
    State,
)
from analysis.fitting import grouping, optima, uncertainty
from analysis.fitting import joint as joint_laws
from analysis.fitting.frontier import frontier
from analysis.fitting.given import fit_optima
from analysis.fitting.joint import KEPT_DRAWS, Fitted
from analysis.fitting.laws import LAWS, Array, interval, power_law
from analysis.fitting.notes import notes_of
from analysis.fitting.optima import Profile
from analysis.fitting.solver import JointFit
from analysis.fitting.uncertainty import OptimumDraws
from analysis.noise import Noise
from analysis.runs import Runs
from embedscale import __version__
from embedscale.errors import UserError
from embedscale.texts import number

QUANTITIES = {"n_opt": "log_n", "d_opt": "log_d", "loss": "log_loss"}  # of an optimum, and the draws of its logarithm
FLOOR = 0.33  # of the distance between sizes: no optimum is known better than that (Porian et al. 2024)


def fit(
    runs: Runs,
    *,
    law: str = "chinchilla",
    residual: str = "huber",
    delta: float = 1e-3,
    optimum: str = "parabola",
    window: float = 4.0,
    bins: float | None = None,
    noise: float | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    where: Mapping[str, str] | None = None,
    advance: Callable[[str], object] = lambda what: None,
) -> Fits:
    """Return all that the runs say.

    `law` is the joint law of N and D that is fitted: "chinchilla", or "tied" with one exponent for both. `residual`
    (`solver.RESIDUALS`) and `delta` are those of the joint laws. `optimum` is the estimator whose optima enter the
    power laws, and `window` the factor in N within which a parabola is fitted. `bins` replaces profiles of nearly equal
    budgets by that many bins a decade of compute. `noise` is the standard deviation of ln L; None takes it from
    replicates and residuals (`uncertainty.noise_of`). `bootstrap` is the number of draws behind each interval. `where`
    is kept as the setting that selected the runs. `advance` is called with the name of each method as its fit begins.

    Raises UserError for a setting out of range, for runs of a single budget, and for runs of fewer than three sizes.
    """
    estimator = optima.check_estimator(optimum, window)
    settings = FitSettings(
        residual, delta, estimator, window, bootstrap, confidence, seed, dict(where or {}), bins=bins, law=law
    )
    _check(settings, noise)
    if runs.are_optima:
        return fit_optima(runs, settings)
    # Grouped over all methods, so that the methods meet at budgets that are equal to the last bit.
    table = runs.table.assign(profile=grouping.profiles_of(runs.table["budget_flop"].to_numpy(float), bins))
    budgets, sizes = _budgets_and_sizes(table)
    prepared = {}
    for method in runs.methods:
        advance(method)
        prepared[method] = _prepared(method, table[table["method"] == method], runs.excluded, settings)
    known, noises = uncertainty.noise_of(noise, {name: each.measured for name, each in prepared.items()}, window)

    rng = np.random.default_rng(seed)
    shared = known.draws(bootstrap, rng)
    spread = {
        method: shared if each is known else each.draws(bootstrap, rng.spawn(1)[0]) for method, each in noises.items()
    }
    methods: dict[str, MethodFit] = {}
    draws: dict[str, dict[float, OptimumDraws]] = {}
    for method, each in prepared.items():
        advance(method)
        found, draws[method] = _fit_method(each, settings, noises[method], spread[method], rng)
        methods[method] = found if noises[method] is known else replace(found, noise=noises[method])
    line = frontier(methods, draws, spread, confidence, rng)
    fits = Fits(
        format=FORMAT,
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        source=runs.source,
        settings=settings,
        runs=Counts(len(table), len(runs.excluded), budgets, sizes),
        comparable=_comparable(table),
        noise=known,
        methods=methods,
        frontier=line,
        excluded=tuple(Exclusion(**_plain(row)) for row in runs.excluded.to_dict("records")),
        notes=(*runs.notes, *notes_of(settings, known, methods, line)),
    )
    # What is returned equals what a reader of fits.json gets: JSON's own types, and None for what is not finite.
    return Fits.from_json(_plain(fits.to_json()))


def _budgets_and_sizes(table: pd.DataFrame) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the budgets and the sizes of all runs. Raises UserError if they are too few for any law."""
    budgets, sizes = np.unique(table["profile"]), np.unique(table["n_parameters"])
    if len(budgets) < 2:
        raise UserError(
            f"budget_flop: all {len(table)} runs have {number(budgets[0], 4)} FLOP; laws need at least two budgets"
        )
    if len(sizes) < 3:
        told = ", ".join(f"{number(size, 4)}" for size in sizes)
        raise UserError(f"n_parameters: {len(sizes)} sizes only ({told}); optima and laws need at least three")
    return tuple(budgets.tolist()), tuple(sizes.tolist())


def _check(settings: FitSettings, noise: float | None) -> None:
    if settings.law not in (allowed := [name for name, law in LAWS.items() if not law.needs_fraction]):
        raise UserError(f"law: {settings.law!r} is unknown; allowed: {', '.join(allowed)}")
    if settings.seed < 0:
        raise UserError(f"seed: {settings.seed} is out of range; allowed: at least 0")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise UserError(f"noise: {noise} is out of range; allowed: above 0, the standard deviation of ln L")
    if not 0 < settings.confidence < 1:
        raise UserError(f"confidence: {settings.confidence} is out of range; allowed: between 0 and 1")
    if settings.bins is not None and not (math.isfinite(settings.bins) and settings.bins > 0):
        raise UserError(f"bins: {settings.bins} is out of range; allowed: above 0, the bins of a decade of compute")
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


@dataclass(frozen=True)
class _Prepared:
    """The runs of one method: averaged over seeds, the best of each size, joint laws, and profiles at equal budgets."""

    cells: pd.DataFrame
    """A row a setting (`joint.cells_of`)."""
    points: pd.DataFrame
    """The best setting of each size and budget."""
    joint: Fitted
    measured: uncertainty.Measured
    """Profiles and their cells, each loss moved to its profile's budget."""


def _prepared(method: str, rows: pd.DataFrame, excluded: pd.DataFrame, settings: FitSettings) -> _Prepared:
    """Return the runs of a method, ready for its optima; `excluded` are the runs of all methods that are left out."""
    cells = joint_laws.cells_of(rows)
    points = grouping.best_points(cells)
    joint = joint_laws.fit_laws(method, cells, points, settings.law, settings.residual, settings.delta)
    predict = joint_laws.predictor(joint_laws.size_fit(joint))
    points = points.assign(off=joint_laws.far_off(points, predict))
    wild = points.dropna(subset=["off"])
    moved = joint_laws.cells_of(grouping.at_profile(rows, predict))
    diverged = excluded[(excluded["method"] == method) & (excluded["reason"] == "diverged")]
    profiles = []
    for each in optima.profiles(grouping.best_points(moved), diverged):
        off = wild.loc[wild["profile"] == each.budget, ["n_parameters", "off"]]
        profiles.append(replace(each, off=dict(off.to_numpy().tolist())))
    return _Prepared(cells, points, joint, uncertainty.Measured(moved, profiles, predict))


def _fit_method(
    of: _Prepared, settings: FitSettings, known: Noise, spread: Array | None, rng: np.random.Generator
) -> tuple[MethodFit, dict[float, OptimumDraws]]:
    """Return a method's fit, and the draws of its interior optima by budget; `spread` are draws of the noise."""
    fitted = {name: each for name, each in of.joint.items() if isinstance(each, JointFit)}
    # One refit of each law, from which all of its intervals are taken.
    refits = {}
    for name, each in fitted.items():
        losses = list(joint_laws.points_for(each.law, of.cells, of.points)["losses"])
        refits[name] = uncertainty.resampled(each, losses, settings.bootstrap, rng)
    rows: list[Optimum] = []
    draws: dict[float, OptimumDraws] = {}
    law = joint_laws.size_fit(of.joint)
    own = refits[law.law.name] if law else None
    doubt = rng.standard_normal(settings.bootstrap)  # one for all budgets, whose biases are alike
    for profile in of.measured.profiles:
        estimates, curve = _estimates(profile, law, settings.window)
        state, why, add_size = _state(profile, estimates[settings.optimum], settings, known.log_loss)
        drawn = _drawn(profile, law, own, settings, spread, doubt, rng) if state == "interior" else None
        if drawn is not None:
            draws[profile.budget] = drawn
        rows.append(_optimum(profile, estimates, curve, state, why, add_size, drawn, settings))
    return MethodFit(
        points=tuple(map(_point, of.points.to_dict("records"))),
        optima=tuple(rows),
        power_laws=_power_laws(rows, draws, of.measured.profiles, settings.confidence, rng),
        joint_laws={
            name: joint_laws.summarise(each, refits[name], of.points, settings.confidence)
            for name, each in fitted.items()
        },
        refused={name: each for name, each in of.joint.items() if isinstance(each, str)},
        hold_out=joint_laws.hold_out(of.cells, of.points, of.joint, rows, settings.residual, settings.delta),
    ), draws


def _estimates(
    profile: Profile, law: JointFit | None, window: float
) -> tuple[dict[str, Estimate | None], Curve | None]:
    """Return the optimum of a profile by each estimator, None where it finds none, and the curve of the parabola."""
    found: dict[str, Estimate | None] = dict.fromkeys(optima.ESTIMATORS)
    curve = None
    if len(profile.points) >= 3:
        log_n, log_loss, curvature = optima.parabola(profile.log_n, profile.log_loss[None], window)
        found["parabola"] = _estimate(log_n, np.log(profile.tokens_at(log_n)), log_loss)
        if found["parabola"]:
            curve = Curve(float(log_n[0]), float(curvature[0]))
        for name in ("akima", "best-run"):
            log_n, log_loss = optima.estimate(name, profile.log_n, profile.log_loss[None], window)
            found[name] = _estimate(log_n, np.log(profile.tokens_at(log_n)), log_loss)
        if law is not None:
            found["law"] = _estimate(*optima.law_optimum(law.law, law.values, profile.points, profile.budget))
    return found, curve


def _state(
    profile: Profile, chosen: Estimate | None, settings: FitSettings, noise: float | None
) -> tuple[State, str, float | None]:
    """Return the state of a budget whose optimum is `chosen`, the reason in words, and the size to add."""
    state, why, add_size = profile.state(noise, settings.window)
    if state == "interior" and chosen is None:
        # The best size has neighbours on both sides, and still the minimum of the estimator is at an end.
        below = bool(profile.log_loss[0] < profile.log_loss[-1])
        add_size = optima.next_size(profile.points["n_parameters"].to_numpy(float), below)
        add = f"add one of about {number(add_size, 2)} parameters"
        return "edge", f"the {settings.optimum} has no minimum within the sizes: {add}", add_size
    if state == "interior" and chosen and profile.too_deep(math.log(chosen.loss), noise, settings.window):
        lost = 1 - chosen.loss / profile.points["loss"].min()
        why = (
            f"the {settings.optimum} falls to {chosen.loss:.4g}, {100 * lost:.3g} % below the best run, more than "
            f"noise and the depth of the valley explain: add a size near {number(chosen.n_opt, 4)} parameters"
        )
        return "below all runs", why, chosen.n_opt
    return state, why, add_size


def _drawn(
    profile: Profile,
    law: JointFit | None,
    refits: Array | None,
    settings: FitSettings,
    spread: Array | None,
    doubt: Array,
    rng: np.random.Generator,
) -> OptimumDraws | None:
    """Return draws of an interior optimum; None where the noise is not known. `refits` are those of `law`."""
    if settings.optimum == "law":
        assert law is not None and refits is not None
        return OptimumDraws(*optima.law_optimum(law.law, refits, profile.points, profile.budget))
    if spread is None:
        return None
    drawn = uncertainty.optimum_draws(profile, settings.optimum, settings.window, spread, settings.bootstrap, rng)
    if law is None:
        return drawn
    return uncertainty.with_bias(drawn, profile, law, settings.optimum, settings.window, doubt)


def _optimum(
    profile: Profile,
    estimates: Mapping[str, Estimate | None],
    curve: Curve | None,
    state: State,
    why: str,
    add_size: float | None,
    drawn: OptimumDraws | None,
    settings: FitSettings,
) -> Optimum:
    """Return what fits.json says of one budget."""
    chosen = estimates[settings.optimum] if state == "interior" else None
    ends: dict[str, Interval | None] = {
        f"{name}_interval": interval(np.exp(getattr(drawn, draws)), settings.confidence) if drawn else None
        for name, draws in QUANTITIES.items()
    }
    return Optimum(
        budget_flop=profile.budget,
        state=state,
        **{name: getattr(chosen, name) if chosen else None for name in QUANTITIES},
        **ends,  # type: ignore[arg-type]
        valid_share=drawn.valid_share if drawn else None,
        parabola=estimates["parabola"],
        akima=estimates["akima"],
        law=estimates["law"],
        curve=curve,
        best=_as_run(profile.points.iloc[int(profile.log_loss.argmin())].to_dict()) if len(profile.points) else None,
        add_size=add_size,
        why=why,
    )


def _as_run(row: Mapping[Any, Any]) -> Point:
    """Return a point of a profile as it was run, at its own budget."""
    return _point({**row, "budget_flop": row["own_budget"], "loss": row["own_loss"]})


def _estimate(log_n: Array, log_d: Array, log_loss: Array) -> Estimate | None:
    values = [float(np.exp(each[0])) for each in (log_n, log_d, log_loss)]
    return Estimate(*values) if all(map(math.isfinite, values)) else None


def _power_laws(
    rows: Sequence[Optimum],
    draws: Mapping[float, OptimumDraws],
    profiles: Sequence[Profile],
    confidence: float,
    rng: np.random.Generator,
) -> PowerLaws:
    """Return the power laws through the interior optima; no law below two of them, or out of a float's range."""
    interior = [row for row in rows if row.interior]
    if len(interior) < 2:
        return PowerLaws()
    budgets = np.array([row.budget_flop for row in interior])
    spreads = [draws[budget] for budget in budgets if budget in draws]
    steps = {profile.budget: np.diff(profile.log_n).mean() for profile in profiles if len(profile.points) > 1}
    floors = np.array([FLOOR * steps[budget] for budget in budgets])
    laws: dict[str, PowerLaw | None] = {}
    for name, values in QUANTITIES.items():
        y = np.array([getattr(row, name) for row in interior])
        line = _line(*power_law(budgets, y))
        weighted, kept = None, []
        if len(spreads) == len(interior):
            drawn = np.array([getattr(spread, values) for spread in spreads])  # [budgets, draws]
            least = floors if name != "loss" else np.full(len(floors), 1e-9)
            weights = uncertainty.floored_spread(drawn, least) ** -2
            drawn = uncertainty.with_misfit(budgets, np.log(y), drawn, rng)
            unweighted = uncertainty.power_law_draws(budgets, drawn)
            line = _line(*power_law(budgets, y), unweighted, confidence)
            with_weights = uncertainty.power_law_draws(budgets, drawn, weights)
            weighted = _line(*power_law(budgets, y, weights), with_weights, confidence)
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


def _line(log_coefficient: Array, exponent: Array, draws: Array | None = None, confidence: float = 0.95) -> Line:
    ends = (None, None)
    if draws is not None:
        ends = interval(np.exp(draws[:, 0]), confidence), interval(draws[:, 1], confidence)  # type: ignore[assignment]
    return Line(float(np.exp(log_coefficient)), float(exponent), *ends)


def _point(row: Mapping[Any, Any]) -> Point:
    """Return a row of `grouping.best_points` as a value."""
    own = ("budget_flop", "n_parameters", "tokens", "loss", "flop_per_token", "seeds", "tried", "at_grid_end")
    more = (*BACKBONE, "pairs", "steps", "batch_size", "gpu_hours", "train_loss", "run", "off")
    plain = _plain({name: row[name] for name in (*own, *more) if name in row})
    plain["at_grid_end"] = tuple(plain["at_grid_end"])
    return Point(**plain, hyperparameters=_plain({name: row[name] for name in HYPERPARAMETERS if name in row}))


def _comparable(table: pd.DataFrame) -> dict[str, Any]:
    found = {field: table[field].dropna() for field in COMPARABLE if field in table}
    return {field: values.iloc[0] for field, values in found.items() if len(values)}
