"""A sweep checked before it is paid for: draw its losses from a stated law, fit them, compare with the truth.

`simulate` says how well a grid would recover the law, how far each estimator's optima are off (a parabola is off
without any noise where the grid is wide or off-centre, trap A16), and what a recipe made from such fits would lose.
`draw` gives one such sweep's runs, for figures and reports.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fitting import fit as fits_file
from analysis.fitting import optima, solver
from analysis.fitting.laws import CHINCHILLA, LAWS, Law, power_law
from analysis.fitting.uncertainty import interval
from analysis.runs import COLUMNS, flop_per_token, load_grid, parse_assignments
from embedscale.errors import UserError
from embedscale.files import write_json

Array = NDArray[np.float64]
NEEDED = ("method", "params", "budget")


@dataclass(frozen=True)
class StatedLaw:
    """A joint law with its coefficients, in the order of `law.names`."""

    law: Law
    values: Array

    def loss(self, rows: pd.DataFrame) -> Array:
        n, d, s = (rows[name].to_numpy(float) for name in ("params", "tokens", "trainable_fraction"))
        return np.ravel(self.law.predict(self.values, n, d, s))


def stated_laws(text: str) -> dict[str, StatedLaw]:
    """METHOD → law; the method "*" stands for all.

    `text` is `E=1.8,A=480,B=2080,alpha=0.35,beta=0.37`, the eight coefficients of the trainable-fraction law likewise,
    several such for methods apart (`full: …; lora: …`), or a fits.json or its folder. Raises UserError for others.
    """
    if "=" not in text:
        return _laws_of_fits(text)
    laws = {}
    for part in text.split(";"):
        method, colon, coefficients = part.rpartition(":")
        laws[method.strip() if colon else "*"] = _parse(coefficients)
    return laws


def _parse(text: str) -> StatedLaw:
    values = {}
    for word in text.split(","):
        name, _, number = word.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError:
            raise UserError(f"simulate: {word.strip()!r} is no COEFFICIENT=NUMBER") from None
    for law in LAWS.values():
        if set(values) == set(law.names):
            found = np.array([values[name] for name in law.names])
            if not np.isfinite(found).all() or min(values["E"], values["alpha"], values["beta"]) <= 0:
                raise UserError("simulate: E, alpha and beta must be above 0, and all coefficients finite")
            return StatedLaw(law, found)
    allowed = " or ".join(", ".join(law.names) for law in LAWS.values())
    raise UserError(f"simulate: {', '.join(values)} are no law's coefficients; allowed: {allowed}")


def _laws_of_fits(path: str) -> dict[str, StatedLaw]:
    if not Path(path).exists():
        raise UserError(
            f"simulate: {path!r} is neither a law such as E=1.8,A=480,B=2080,alpha=0.35,beta=0.37 nor a file"
        )
    laws = {}
    for method, facts in fits_file.read(path)["methods"].items():
        for name in ("trainable_fraction", "chinchilla"):
            law = facts["joint_laws"].get(name) or {}
            if method not in laws and "E" in law:
                laws[method] = StatedLaw(LAWS[name], np.array([law[each] for each in LAWS[name].names]))
    if not laws:
        raise UserError(f"simulate: {path} holds no joint law")
    return laws


def grid(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of a sweep as `method`, `params`, `budget`, `tokens`, `flop_per_token`, `trainable_fraction`.

    Cost and tokens follow from the paper's formula where the rows lack them. Raises UserError for a missing column.
    """
    for name in NEEDED:
        if name not in rows:
            raise UserError(f"simulate: column {name!r} is missing; a grid has {', '.join(NEEDED)}")
    rows = rows.reset_index(drop=True).copy()
    if "trainable_fraction" not in rows:
        rows["trainable_fraction"] = 1.0
    cost = [
        flop_per_token(m, n, s)
        for m, n, s in zip(rows["method"], rows["params"], rows["trainable_fraction"], strict=True)
    ]
    rows["flop_per_token"] = rows["flop_per_token"].fillna(pd.Series(cost)) if "flop_per_token" in rows else cost
    tokens = rows["budget"] / rows["flop_per_token"]
    rows["tokens"] = rows["tokens"].fillna(tokens) if "tokens" in rows else tokens
    return rows


def draw(rows: pd.DataFrame, laws: Mapping[str, StatedLaw], noise: float, seed: int = 0) -> pd.DataFrame:
    """The grid with a `loss`: the law's, times exp(noise × a standard normal)."""
    rows = grid(rows)
    rng = np.random.default_rng(seed)
    rows["loss"] = np.nan
    for method, part in rows.groupby("method"):
        rows.loc[part.index, "loss"] = _law_of(laws, str(method)).loss(part)
    if not (rows["loss"] > 0).all():
        row = rows[~(rows["loss"] > 0)].iloc[0]
        raise UserError(f"simulate: the law gives {row['loss']:.4g} at {row['params']:.4g} parameters, no loss above 0")
    rows["loss"] *= np.exp(noise * rng.standard_normal(len(rows)))
    return rows


def _law_of(laws: Mapping[str, StatedLaw], method: str) -> StatedLaw:
    if method not in laws and "*" not in laws:
        raise UserError(f"simulate: no law for the method {method!r}; allowed: {', '.join(laws)}, or one law for all")
    return laws[method] if method in laws else laws["*"]


def simulate(
    rows: pd.DataFrame,
    laws: Mapping[str, StatedLaw],
    noise: float,
    repeats: int = 200,
    window: float = 4.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """How well the grid recovers the law, over `repeats` sweeps drawn with `noise` (standard deviation of ln L).

    METHOD → {law, noise, repeats, runs, or refused: why;
    coefficients: {name: {truth, mean, interval, bias (mean / truth − 1)}}; n_exponent: {truth, law, parabola};
    optima: a row a budget {budget, truth, bias_without_noise, parabola, law, missing (share of sweeps whose parabola
    has no minimum)}, the estimates as {median, interval} of estimate / truth;
    recipe: a row a budget, and four times the largest, {budget, law, parabola}: the loss of the size that the law or
    the line through the optima advises, over the lowest, less 1, as {mean, high} with the upper percentile}.

    Raises UserError for a noise that is not positive, and for rows that are no grid.
    """
    optima.check_estimator("parabola", window)
    if seed < 0:
        raise UserError(f"seed: {seed} is out of range; allowed: at least 0")
    if not 0 < noise <= 1:
        raise UserError(f"noise: {noise} is out of range; allowed: above 0, at most 1, the standard deviation of ln L")
    rows, rng = grid(rows), np.random.default_rng(seed)
    draw(rows, laws, noise)  # the law is a loss everywhere on the grid
    result: dict[str, Any] = {}
    for method, part in rows.groupby("method", sort=False):
        stated = _law_of(laws, str(method))
        result[str(method)] = _simulate_method(
            part.reset_index(drop=True), stated, noise, repeats, window, confidence, rng
        )
    return result


def _simulate_method(
    rows: pd.DataFrame,
    stated: StatedLaw,
    noise: float,
    repeats: int,
    window: float,
    confidence: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    truth = stated.loss(rows)
    n, d, s = (rows[name].to_numpy(float) for name in ("params", "tokens", "trainable_fraction"))
    drawn = truth * np.exp(noise * rng.standard_normal((repeats, len(rows))))
    facts: dict[str, Any] = {"law": stated.law.name, "noise": noise, "repeats": repeats, "runs": len(rows)}
    try:
        first = solver.fit_joint(stated.law, n, d, drawn[0], s, residual="log")
    except solver.TooFewRuns as error:
        return facts | {"refused": str(error)}
    fitted = first.refit(loss=drawn)  # [repeats, coefficients]
    facts["not_fixed"] = list(first.not_fixed)
    facts["coefficients"] = {
        name: {
            "truth": stated.values[i],
            "mean": fitted[:, i].mean(),
            "interval": interval(fitted[:, i], confidence),
            "bias": fitted[:, i].mean() / stated.values[i] - 1 if stated.values[i] else None,
        }
        for i, name in enumerate(stated.law.names)
    }
    optima_rows, parabolas = _optima(rows, stated, truth, drawn, fitted, window, confidence)
    facts["optima"] = optima_rows
    facts["n_exponent"] = _exponents(rows, stated, fitted, optima_rows, parabolas, confidence)
    facts["recipe"] = _regret(rows, stated, fitted, optima_rows, parabolas, confidence)
    return fits_file.plain(facts)


@dataclass(frozen=True)
class _Sizes:
    """A grid's sizes as a continuum, with every trainable fraction or rank that it tries as a branch of its own."""

    log_n: Array  # [801], ascending
    branches: list[tuple[Array, Array, Array]]  # ln (FLOP a token), S, and whether the branch is there; each [801]

    @staticmethod
    def of(rows: pd.DataFrame) -> "_Sizes":
        log_n = np.linspace(np.log(rows["params"].min()), np.log(rows["params"].max()), 801)
        # A rank is a branch along which S falls with the size; a fraction of blocks is the same for all sizes.
        parts = [rows]
        for key in ("rank", "trainable_fraction"):
            if key in rows and (rows.groupby("params")[key].nunique() > 1).any():
                parts = [part for _, part in rows.groupby(key)]
                break
        branches = []
        for part in parts:
            part = part.drop_duplicates("params").sort_values("params")
            known, cost, s = (part[name].to_numpy(float) for name in ("params", "flop_per_token", "trainable_fraction"))
            known = np.log(known)
            there = (log_n >= known[0] - 1e-9) & (log_n <= known[-1] + 1e-9)
            branches.append((np.interp(log_n, known, np.log(cost)), np.interp(log_n, known, s), there))
        return _Sizes(log_n, branches)

    def losses(self, law: Law, values: Array, budget: float) -> Array:
        """The lowest loss of any branch [draws, 801] for coefficients [draws, p]."""
        n = np.exp(self.log_n)
        return np.minimum.reduce(
            [
                np.where(there, np.atleast_2d(law.predict(values, n, budget / np.exp(cost), s)), np.inf)
                for cost, s, there in self.branches
            ]
        )


def _best_of_sizes(rows: pd.DataFrame, losses: Array) -> tuple[Array, Array]:
    """ln N ascending and the lowest ln L of each size [draws, sizes], over fractions and ranks."""
    sizes = np.unique(rows["params"].to_numpy(float))
    best = np.stack([losses[:, (rows["params"] == size).to_numpy()].min(1) for size in sizes], 1)
    return np.log(sizes), np.log(best)


def _optima(
    rows: pd.DataFrame, stated: StatedLaw, truth: Array, drawn: Array, fitted: Array, window: float, confidence: float
) -> tuple[list[dict[str, Any]], dict[float, Array]]:
    found, parabolas = [], {}
    for budget in np.unique(rows["budget"].to_numpy(float)):
        here = (rows["budget"] == budget).to_numpy()
        part = rows[here]
        row: dict[str, Any] = {"budget": float(budget), "truth": None, "missing": 1.0}
        row |= dict.fromkeys(("parabola", "law", "bias_without_noise"))
        found.append(row)
        if part["params"].nunique() < 3:
            continue
        log_n, clean = _best_of_sizes(part, truth[None, here])
        drawn_best = optima.parabola(log_n, _best_of_sizes(part, drawn[:, here])[1], window)[0]
        parabolas[float(budget)] = drawn_best
        row["missing"] = float(np.isnan(drawn_best).mean())
        sizes = _Sizes.of(part)
        best = float(optima.lowest_point(sizes.log_n, np.log(sizes.losses(stated.law, stated.values, budget)))[0][0])
        if not np.isfinite(best):
            continue
        by_law = optima.lowest_point(sizes.log_n, np.log(sizes.losses(stated.law, fitted, budget)))[0]
        unbiased = optima.parabola(log_n, clean, window)[0][0]
        row["truth"] = float(np.exp(best))
        row["parabola"], row["law"] = _ratios(drawn_best - best, confidence), _ratios(by_law - best, confidence)
        row["bias_without_noise"] = float(np.exp(unbiased - best) - 1) if np.isfinite(unbiased) else None
    return found, parabolas


def _ratios(log_ratio: Array, confidence: float) -> dict[str, Any] | None:
    finite = log_ratio[np.isfinite(log_ratio)]
    if not len(finite):
        return None
    return {"median": float(np.exp(np.median(finite))), "interval": interval(np.exp(log_ratio), confidence)}


def _exponents(rows, stated, fitted, optima_rows, parabolas, confidence) -> dict[str, Any]:
    """Exponents of N*(C): the law's own where it has a closed form, else the slope of its optima."""
    known = [row for row in optima_rows if row["truth"]]
    budgets = np.array([row["budget"] for row in known])
    result: dict[str, Any] = {"truth": None, "law": None, "parabola": None}
    if stated.law is CHINCHILLA and (rows["method"] == "full").all():
        alpha, beta = fitted[:, 3], fitted[:, 4]
        result["truth"] = float(stated.values[4] / (stated.values[3] + stated.values[4]))
        result["law"] = _spread(beta / (alpha + beta), confidence)
    elif len(known) >= 2:
        result["truth"] = float(power_law(budgets, np.array([row["truth"] for row in known]))[1])
    if len(parabolas) >= 2:
        drawn = np.exp(np.stack(list(parabolas.values()), 1))
        result["parabola"] = _spread(power_law(np.array(list(parabolas)), drawn)[1], confidence)
    return result


def _spread(draws: Array, confidence: float) -> dict[str, Any] | None:
    finite = draws[np.isfinite(draws)]
    return {"median": float(np.median(finite)), "interval": interval(draws, confidence)} if len(finite) else None


def _regret(rows, stated, fitted, optima_rows, parabolas, confidence) -> list[dict[str, Any]]:
    """What the advised size loses against the best one, over the sizes of the grid, taken as continuous."""
    sizes = _Sizes.of(rows)
    log_n = sizes.log_n
    line = None
    if len(parabolas) >= 2:
        line = power_law(np.array(list(parabolas)), np.exp(np.stack(list(parabolas.values()), 1)))
    budgets = [float(row["budget"]) for row in optima_rows]
    result = []
    for budget in [*budgets, 4 * max(budgets)]:
        loss = sizes.losses(stated.law, stated.values, budget)[0]
        advised: dict[str, Any] = {"law": sizes.losses(stated.law, fitted, budget).argmin(1), "parabola": None}
        if line is not None:
            sized = line[0] + line[1] * np.log(budget)
            sized = sized[np.isfinite(sized)]
            advised["parabola"] = np.clip(np.searchsorted(log_n, sized), 0, len(log_n) - 1)
        row: dict[str, Any] = {"budget": budget}
        for name, chosen in advised.items():
            row[name] = None
            if chosen is not None and len(chosen):
                lost = loss[chosen] / loss.min() - 1
                row[name] = {"mean": float(lost.mean()), "high": float(np.percentile(lost, 50 + 50 * confidence))}
        result.append(row)
    return result


def command(args: Any, rows: pd.DataFrame | None) -> int:
    """`embedscale fit SWEEP --simulate LAW`: print what the sweep would find; `rows` are a sweep file's runs."""
    from analysis import summary

    if args.where:
        raise UserError("--where: is for runs; a sweep is narrowed by its own file")
    laws = stated_laws(args.simulate)
    if rows is None:
        rows = load_grid(args.runs, parse_assignments("columns", args.columns, COLUMNS))
    result = simulate(rows, laws, 0.005 if args.noise is None else args.noise, window=args.window, seed=args.seed)
    summary.show_simulation(result, summary.console())
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out) / "simulation.json", result)
        print(f"\nwritten: {Path(args.out) / 'simulation.json'}")
    return 0
