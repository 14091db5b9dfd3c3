"""`embedscale fit`: runs → optima, laws, intervals, frontier, in one file, fits.json.

Layout of fits.json. Every interval is [low, high], the percentile interval of `settings.confidence`; null stands where
something cannot be said. Loss is in nats, budgets in FLOP of the paper's convention, sizes in non-embedding parameters.

    format         1; `read` refuses others
    version, made  of the package that wrote it; UTC
    source         what was fitted
    settings       {residual, delta, bootstrap, confidence, optimum, window, seed, where}
    runs           {used, excluded, budgets: [...], sizes: [...]}
    comparable     {field: value} of all that had to be the same (evaluation, data, batch size, context)
    noise          {log_loss: standard deviation of ln L, source: "replicates" | "given" | "residuals" | "none",
                    degrees_of_freedom}
    methods        METHOD → {
      points         a row a (budget, size): {budget, params, tokens, loss, flop_per_token, seeds, tried, backbone,
                     backbone_revision, and the chosen value of each hyper-parameter that the runs state (learning_rate,
                     rank, trainable_fraction, …), at_grid_end: [hyper-parameters whose best value is the grid's first
                     or last of several]}
      optima         a row a budget: {budget, state: "interior" | "edge" | "too few" | "diverged",
                     n_opt, d_opt, loss (of the estimator in settings.optimum; null unless interior),
                     n_opt_interval, d_opt_interval, loss_interval, valid_share (of bootstrap draws that were interior),
                     parabola, akima, law: {n_opt, d_opt, loss} of each estimator or null,
                     curve: {log_n, curvature} of the parabola ln L = loss + curvature (ln N − log_n)² or null,
                     best: the best point, add_size: parameters of the size to add or null, why: one line}
      power_laws     {n_opt, d_opt, loss} → null (under two interior optima), or y = coefficient × C^exponent:
                     {coefficient, exponent, coefficient_interval, exponent_interval, weighted: {coefficient, exponent,
                     and their intervals}, points, draws: [[ln coefficient, exponent], …]}
      joint_laws     {chinchilla, trainable_fraction} → null, or {E, A, B, alpha, beta} or {E, a_d, b_d, a_s, b_s, c_s,
                     alpha, beta}, and {intervals: {name: interval}, not_fixed: [names that the data do not fix],
                     residual, delta, objective, runs, n_exponent (chinchilla: β/(α+β), N* ∝ C^…; null where a token's
                     cost is not in proportion to N), n_exponent_interval,
                     log_residual: standard deviation of ln L about the law,
                     convergence: {starts, agreeing, gradient, iterations, condition},
                     span: {params, tokens, trainable_fraction: [smallest, largest]}, draws: [[coefficients], …]}
                     or {refused: why there is none}
      hold_out       rows {left_out: "largest budget" | "largest size", value, law: "chinchilla" |
                     "trainable_fraction" | "loss" | "n_opt", predicted, found, error (mean of |predicted/found − 1|),
                     bias (mean of predicted/found − 1), points} }
    frontier       {segments: [{method, from, to}] over the budgets that were run, by the laws of the loss,
                    crossings: [{budget, interval, share (of draws that cross), below, above: methods}],
                    comparisons: [{budget, a, b, difference (of ln L, a − b), interval, distinguishable}]}
    excluded       rows {run, reason, detail, method, params, budget}
    notes          lines that a reader should see
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fits import BACKBONE, FILE, FORMAT, HYPERPARAMETERS, read
from analysis.fitting import joint as joint_laws
from analysis.fitting import optima, uncertainty
from analysis.fitting.frontier import frontier
from analysis.fitting.joint import KEPT_DRAWS
from analysis.fitting.laws import CHINCHILLA, power_law
from analysis.fitting.optima import Profile
from analysis.fitting.solver import JointFit
from analysis.fitting.uncertainty import OptimumDraws, interval
from analysis.runs import COMPARABLE, Runs
from embedscale import __version__
from embedscale.errors import UserError
from embedscale.files import write_atomically, write_json

Array = NDArray[np.float64]
__all__ = ["fit", "plain", "read", "write"]


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
    advance: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Everything that the runs say, in the layout above.

    `residual` and `delta` are the joint laws' (`solver.RESIDUALS`); `optimum` is the estimator whose optima enter the
    power laws, `window` the parabola's factor in N; `noise` the standard deviation of ln L, taken from replicates or
    else from the joint laws' residuals where it is None. `advance` is told the name of each method as it begins.

    Raises UserError for a setting out of range, runs of one budget only, and runs of under three sizes.
    """
    optima.check_estimator(optimum, window)
    if seed < 0:
        raise UserError(f"seed: {seed} is out of range; allowed: at least 0")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise UserError(f"noise: {noise} is out of range; allowed: above 0, the standard deviation of ln L")
    if not 0 < confidence < 1:
        raise UserError(f"confidence: {confidence} is out of range; allowed: between 0 and 1")
    if bootstrap < 100:
        raise UserError(f"bootstrap: {bootstrap} is out of range; allowed: at least 100")
    # Grouped over all methods, so that these meet at budgets that are equal to the last bit.
    table = runs.table.assign(profile=optima.group_budgets(runs.table["budget"].to_numpy(float)))
    budgets, sizes = np.unique(table["profile"]), np.unique(table["params"])
    if len(budgets) < 2:
        raise UserError(f"budget: all {len(table)} runs have {budgets[0]:.4g} FLOP; laws need at least two budgets")
    if len(sizes) < 3:
        found = ", ".join(f"{size:.4g}" for size in sizes)
        raise UserError(f"params: {len(sizes)} sizes only ({found}); optima and laws need at least three")

    rng = np.random.default_rng(seed)
    settings = {"residual": residual, "delta": delta, "optimum": optimum, "window": window}
    cells = {method: joint_laws.cells_of(table[table["method"] == method]) for method in runs.methods}
    points = {method: optima.best_points(found) for method, found in cells.items()}
    profiled = {method: _profiled(cells[method], points[method]) for method in runs.methods}
    joint: dict[str, dict[str, JointFit | str]] = {}
    for method in runs.methods:
        advance(method)
        joint[method] = joint_laws.fit_laws(method, cells[method], points[method], residual, delta)
    sigma, noise_facts = joint_laws.noise_of(noise, cells, joint)

    methods: dict[str, Any] = {}
    draws: dict[str, dict[float, OptimumDraws]] = {}
    for method in runs.methods:
        advance(method)
        lost = runs.excluded[(runs.excluded["method"] == method) & (runs.excluded["reason"] == "diverged")]
        chinchilla = joint[method]["chinchilla"]
        # One refit of each law, from which every interval of it is taken.
        refits = {
            name: uncertainty.resampled(
                each, joint_laws.replicates(cells[method], points[method], name), bootstrap, rng
            )
            for name, each in joint[method].items()
            if isinstance(each, JointFit)
        }
        rows, draws[method] = _optima(
            optima.profiles(profiled[method], lost), chinchilla, refits, settings, sigma, bootstrap, confidence, rng
        )
        methods[method] = {
            "points": _points(points[method]),
            "optima": rows,
            "power_laws": _power_laws(rows, draws[method], profiled[method], confidence),
            "joint_laws": {
                name: joint_laws.facts(each, refits.get(name), points[method], confidence)
                for name, each in joint[method].items()
            },
            "hold_out": joint_laws.hold_out(cells[method], points[method], joint[method], rows, residual, delta),
        }
    fits = {
        "format": FORMAT,
        "version": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": runs.source,
        "settings": settings | {"bootstrap": bootstrap, "confidence": confidence, "seed": seed},
        "runs": {
            "used": len(table),
            "excluded": len(runs.excluded),
            "budgets": budgets.tolist(),
            "sizes": sizes.tolist(),
        },
        "comparable": _comparable(table),
        "noise": noise_facts,
        "methods": methods,
        "frontier": frontier(methods, draws, sigma, budgets, confidence, bootstrap, rng),
        "excluded": runs.excluded.to_dict("records"),
    }
    fits["notes"] = _notes(fits)
    return plain(fits)


# --- Optima and power laws of one method -----------------------------------------------------------------------------


def _profiled(cells: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """The points of IsoFLOP profiles: the best of each group of nearly equal budgets."""
    if (cells["profile"] == cells["budget"]).all():
        return points
    return optima.best_points(cells.assign(budget=cells["profile"]))


def _optima(
    profiles: list[Profile],
    law: JointFit | str,
    refits: dict[str, Array],
    settings: dict[str, Any],
    sigma: float | None,
    bootstrap: int,
    confidence: float,
    rng: np.random.Generator,
) -> tuple[list[dict[str, Any]], dict[float, OptimumDraws]]:
    rows, draws = [], {}
    for profile in profiles:
        state, why, add_size = profile.state()
        found: dict[str, Any] = dict.fromkeys(optima.ESTIMATORS)
        curve = None
        if len(profile.points) >= 3:
            log_n, log_loss, curvature = optima.parabola(profile.log_n, profile.log_loss[None], settings["window"])
            found["parabola"] = _triple(log_n, np.log(profile.tokens_at(log_n)), log_loss)
            if found["parabola"]:
                curve = {"log_n": float(log_n[0]), "curvature": float(curvature[0])}
            log_n, log_loss = optima.akima(profile.log_n, profile.log_loss[None])
            found["akima"] = _triple(log_n, np.log(profile.tokens_at(log_n)), log_loss)
            if isinstance(law, JointFit):
                found["law"] = _triple(*optima.law_optimum(law.predict, profile.points, profile.budget))
        chosen = found[settings["optimum"]]
        if state == "interior" and chosen is None:
            # The best size has neighbours on both sides, and yet the estimator's minimum is at an end.
            state, why = "edge", f"the {settings['optimum']} has no minimum within the sizes"
            add_size = optima.next_size(
                profile.points["params"].to_numpy(float), below=bool(profile.log_loss[0] < profile.log_loss[-1])
            )
        row: dict[str, Any] = {"budget": profile.budget, "state": state}
        row |= chosen if state == "interior" else dict.fromkeys(("n_opt", "d_opt", "loss"))
        spread = None
        if state == "interior":
            if settings["optimum"] == "law":
                spread = OptimumDraws(
                    *optima.law_optimum(
                        lambda n, d, s: CHINCHILLA.predict(refits["chinchilla"], n, d), profile.points, profile.budget
                    )
                )
            elif sigma is not None:
                spread = uncertainty.optimum_draws(
                    profile, settings["optimum"], settings["window"], sigma, bootstrap, rng
                )
        if spread is not None:
            draws[profile.budget] = spread
        for name, values in (("n_opt", "log_n"), ("d_opt", "log_d"), ("loss", "log_loss")):
            row[f"{name}_interval"] = interval(np.exp(getattr(spread, values)), confidence) if spread else None
        row["valid_share"] = spread.valid_share if spread else None
        best = profile.points.iloc[int(profile.log_loss.argmin())] if len(profile.points) else None
        row |= found | {
            "curve": curve,
            "best": _points(best.to_frame().T)[0] if best is not None else None,
            "add_size": add_size,
            "why": why,
        }
        rows.append(row)
    return rows, draws


def _triple(log_n: Array, log_d: Array, log_loss: Array) -> dict[str, float] | None:
    values = [float(np.exp(each[0])) for each in (log_n, log_d, log_loss)]
    return dict(zip(("n_opt", "d_opt", "loss"), values, strict=True)) if all(map(math.isfinite, values)) else None


def _power_laws(
    rows: list[dict[str, Any]], draws: dict[float, OptimumDraws], points: pd.DataFrame, confidence: float
) -> dict[str, Any]:
    interior = [row for row in rows if row["state"] == "interior"]
    if len(interior) < 2:
        return dict.fromkeys(("n_opt", "d_opt", "loss"))
    budgets = np.array([row["budget"] for row in interior])
    spreads = [draws.get(budget) for budget in budgets]
    # Porian et al.: an optimum is not known better than a third of the distance between sizes.
    floors = np.array([0.33 * np.diff(_log_sizes(points, budget)).mean() for budget in budgets])
    laws: dict[str, Any] = {}
    for name, values in (("n_opt", "log_n"), ("d_opt", "log_d"), ("loss", "log_loss")):
        y = np.array([row[name] for row in interior])
        law = _line(*power_law(budgets, y)) | {"coefficient_interval": None, "exponent_interval": None}
        law |= {"weighted": None, "points": len(interior), "draws": []}
        if all(spread is not None for spread in spreads):
            drawn = np.array([getattr(spread, values) for spread in spreads])  # [budgets, draws]
            plain = uncertainty.power_law_draws(budgets, drawn)
            weights = uncertainty.floored_spread(drawn, floors if name != "loss" else np.full(len(floors), 1e-9)) ** -2
            law |= _line_intervals(plain, confidence)
            law["weighted"] = _line(*power_law(budgets, y, weights)) | _line_intervals(
                uncertainty.power_law_draws(budgets, drawn, weights), confidence
            )
            law["draws"] = plain[:KEPT_DRAWS].tolist()
        laws[name] = law
    return laws


def _log_sizes(points: pd.DataFrame, budget: float) -> Array:
    return np.log(np.sort(points[np.isclose(points["budget"], budget)]["params"].to_numpy(float)))


def _line(log_coefficient: Array, exponent: Array) -> dict[str, Any]:
    return {"coefficient": float(np.exp(log_coefficient)), "exponent": float(exponent)}


def _line_intervals(draws: Array, confidence: float) -> dict[str, Any]:
    return {
        "coefficient_interval": interval(np.exp(draws[:, 0]), confidence),
        "exponent_interval": interval(draws[:, 1], confidence),
    }


# --- Facts and notes -------------------------------------------------------------------------------------------------


def _points(points: pd.DataFrame) -> list[dict[str, Any]]:
    own = ["budget", "params", "tokens", "loss", "flop_per_token", "seeds", "tried", "at_grid_end"]
    own += [*BACKBONE, *HYPERPARAMETERS, "pairs", "steps", "batch_size", "gpu_hours", "train_loss", "run"]
    return points[[name for name in own if name in points]].to_dict("records")  # type: ignore[return-value]


def _comparable(table: pd.DataFrame) -> dict[str, Any]:
    found = {field: table[field].dropna() for field in COMPARABLE if field in table}
    return {field: values.iloc[0] for field, values in found.items() if len(values)}


def _notes(fits: dict[str, Any]) -> list[str]:
    notes = []
    for name, method in fits["methods"].items():
        few = [row for row in method["optima"] if row["state"] == "too few"]
        if len(few) > 3:
            notes.append(f"{name}: {len(few)} budgets have under three sizes, too few for an optimum")
        for row in method["optima"]:
            if row["state"] == "too few" and len(few) > 3:
                continue
            if row["state"] != "interior":
                notes.append(f"{name}, {row['budget']:.3g} FLOP: no optimum ({row['state']}): {row['why']}")
            elif row["valid_share"] is not None and row["valid_share"] < 0.9:
                share = f"{100 * row['valid_share']:.0f} %"
                notes.append(
                    f"{name}, {row['budget']:.3g} FLOP: within the noise only {share} of draws have an optimum"
                )
            ends = row["best"]["at_grid_end"] if row["best"] else []
            for end in ends:
                value = row["best"][end]
                notes.append(
                    f"{name}, {row['budget']:.3g} FLOP: the best {end}, {value:.4g}, is at the end of its grid"
                )
        for law, facts in method["joint_laws"].items():
            if "refused" in facts:
                notes.append(f"{name}: {facts['refused']}")
                continue
            if facts["not_fixed"]:
                notes.append(f"{name}, {law} law: the data do not fix {', '.join(facts['not_fixed'])}")
            convergence = facts["convergence"]
            if convergence["agreeing"] < 0.25 * convergence["starts"]:
                agreeing = f"{convergence['agreeing']} of {convergence['starts']}"
                notes.append(f"{name}, {law} law: only {agreeing} starts agree on the minimum")
        if method["power_laws"]["loss"] is None:
            notes.append(f"{name}: under two interior optima, so no power law and no place on the frontier")
        notes += _parabola_bias(name, method)
    if fits["noise"]["source"] == "none":
        notes.append(
            "noise: neither replicates nor a joint law tell it, so optima have no intervals; give it by --noise"
        )
    elif fits["settings"]["optimum"] == "akima":
        notes.append(
            "akima: its curve goes through every point, so that its lowest loss is a lucky one; the denser the grid, "
            "the less often the loss's interval holds the true one (of 95 %, half at fifteen sizes within the noise)"
        )
    notes += _selection(fits)
    same = [each for each in fits["frontier"]["comparisons"] if each["distinguishable"] is False]
    notes += [f"{each['budget']:.3g} FLOP: {each['a']} and {each['b']} are not distinguishable" for each in same]
    return notes


def _selection(fits: dict[str, Any]) -> list[str]:
    """The best of many settings is a lucky one too, and methods that tried more have more of that luck.

    Drawing the noise of every setting anew would not take it off but add as much again.
    """
    tried = {name: max(point["tried"] for point in method["points"]) for name, method in fits["methods"].items()}
    most, noise = max(tried.values()), fits["noise"]["log_loss"]
    if min(tried.values()) == most or not noise:
        return []
    luck = -noise * NormalDist().inv_cdf((1 - 0.375) / (most + 0.25))  # the least of so many normal draws, by Blom
    return [
        f"methods are the best of {', '.join(f'{count} ({name})' for name, count in tried.items())} settings a size: "
        f"of {most} equal ones the best run lies {100 * luck:.2g} % low by its noise alone, for which no interval and "
        'no "distinguishable" allows'
    ]


def _parabola_bias(name: str, method: dict[str, Any]) -> list[str]:
    """Where the exponent of the joint law's own optima lies outside the power law's interval (trap A16)."""
    line = method["power_laws"]["n_opt"]
    ends = line and line["exponent_interval"]
    interior = [row for row in method["optima"] if row["state"] == "interior"]
    if not ends or not all(row["law"] for row in interior):
        return []
    by_law = power_law(*np.array([(row["budget"], row["law"]["n_opt"]) for row in interior]).T)[1]
    if ends[0] <= by_law <= ends[1]:
        return []
    return [
        f"{name}: N* grows as C^{line['exponent']:.3f} by the optima, as C^{by_law:.3f} by the joint law, "
        "outside the interval: a wide or off-centre grid biases parabolas"
    ]


def plain(value: Any) -> Any:
    """The value in JSON's own types; NaN and infinity, which JSON has not, become null."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if value is pd.NaT or value is pd.NA else value


# --- Files -----------------------------------------------------------------------------------------------------------


def write(fits: dict[str, Any], runs: Runs, folder: str | Path) -> Path:
    """Write FOLDER/fits.json, with the tidy runs.csv and excluded.csv that it was made from beside it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out: {folder} is no folder") from None
    write_atomically(folder / "runs.csv", lambda file: file.write(runs.table.to_csv(index=False).encode()))
    write_atomically(folder / "excluded.csv", lambda file: file.write(runs.excluded.to_csv(index=False).encode()))
    write_json(folder / FILE, fits)
    return folder / FILE


# --- The verb --------------------------------------------------------------------------------------------------------


def command(args: Any) -> int:
    """`embedscale fit`: load, fit, write fits.json, and print what it says."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from analysis import runs as loading
    from analysis import summary

    console = summary.console()
    columns = loading.parse_assignments("columns", args.columns, loading.COLUMNS)
    where: dict[str, str] = {}
    for word in args.where or []:
        where |= loading.parse_assignments("where", word, loading.COLUMNS)
    runs = loading.load(args.runs, columns, where)
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True)
    with bar:
        task = bar.add_task("fit")
        fits = fit(
            runs,
            residual=args.residual,
            delta=args.delta,
            optimum=args.optimum,
            window=args.window,
            noise=args.noise,
            bootstrap=args.bootstrap,
            seed=args.seed,
            advance=lambda what: bar.update(task, description=f"fit {what}"),
        )
    fits["settings"]["where"] = where
    folder = args.out or (args.runs if Path(args.runs).is_dir() else ".")
    path = write(fits, runs, folder)
    summary.show_fits(fits, console)
    console.print(f"\nwritten: {path}", soft_wrap=True)
    return 0
