"""Check a sweep before it is paid for: draw its losses from a stated law, fit them, and compare with the truth.

`simulate` tells how well a grid would recover the law, how far off the optima of each estimator are, and what a recipe
made from such fits would lose. (A parabola is biased, even without noise, where the grid is wide or off-centre.)
`draw` returns the runs of one such sweep, for figures and reports. The price is that the law has to be guessed: from a
similar sweep, or from published coefficients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import fits as fits_file
from analysis.columns import sources
from analysis.fits import Interval
from analysis.fitting import grouping, optima, solver
from analysis.fitting.laws import LAWS, Array, Law, StatedLaw, fraction_law, interval, lowest_point, power_law, size_law
from analysis.runs import flop_per_token
from embedscale.errors import UserError
from embedscale.values import Value

NEEDED = ("method", "n_parameters", "budget_flop")
CONFIDENCE = 0.95  # of the intervals over sweeps
TRIED = 5  # sweeps of which one must be fitted; the refits of all begin there
NOISE = 0.005  # standard deviation of ln L of one run, where the user states none
EXAMPLE = "E=1.8,A=480,B=2080,alpha=0.35,beta=0.37"


@dataclass(frozen=True)
class Spread(Value):
    """What the simulated sweeps give for one quantity."""

    median: float
    interval: Interval | None


@dataclass(frozen=True)
class Recovered(Value):
    """A coefficient of the law as the simulated sweeps recover it."""

    truth: float
    mean: float
    interval: Interval | None
    bias: float | None
    """mean / truth − 1."""


@dataclass(frozen=True)
class RecoveredOptimum(Value):
    """The best size at one budget; `parabola` and `law` are estimate / truth."""

    budget_flop: float
    truth: float | None = None
    """N*; None where it lies outside the sizes of the grid."""
    missing: float = 1.0
    """Share of the sweeps whose parabola has no minimum."""
    bias_without_noise: float | None = None
    """Estimate / truth − 1 of a parabola through losses without noise."""
    parabola: Spread | None = None
    law: Spread | None = None


@dataclass(frozen=True)
class RecoveredExponent(Value):
    """The exponent of N* ∝ C^exponent."""

    truth: float | None = None
    parabola: Spread | None = None
    law: Spread | None = None


@dataclass(frozen=True)
class Lost(Value):
    """Loss of the advised size over the lowest loss, less 1."""

    mean: float
    high: float
    """Upper percentile."""


@dataclass(frozen=True)
class Advice(Value):
    """What the advised size loses at one budget, by the joint law and by the power law through the parabolas."""

    budget_flop: float
    law: Lost | None = None
    parabola: Lost | None = None


@dataclass(frozen=True)
class Simulated(Value):
    """What simulated sweeps of one method show."""

    law: str
    noise: float
    """Standard deviation of ln L."""
    repeats: int
    runs: int
    refused: str = ""
    """Why the law cannot be fitted to the grid; empty where it can."""
    not_fixed: tuple[str, ...] = ()
    coefficients: dict[str, Recovered] = field(default_factory=dict)
    n_exponent: RecoveredExponent = RecoveredExponent()
    optima: tuple[RecoveredOptimum, ...] = ()
    recipe: tuple[Advice, ...] = ()
    """At each budget, and at four times the largest."""


# --- The law and the grid --------------------------------------------------------------------------------------------


def stated_laws(text: str) -> dict[str, StatedLaw]:
    """Return {method: law}; the method "*" stands for all methods.

    `text` is `E=1.8,A=480,B=2080,alpha=0.35,beta=0.37`, or the coefficients of another law of `laws.LAWS`, or a law
    for each of several methods (`full: …; lora: …`), or a fits.json or its folder. Raises UserError for other texts.
    """
    if "=" not in text:
        return _laws_of_fits(text)
    laws = {}
    for part in text.split(";"):
        method, colon, coefficients = part.rpartition(":")
        laws[method.strip() if colon else "*"] = _parse(coefficients)
    return laws


def stated_noise(text: str) -> float:
    """Return the standard deviation of ln L that comes with `stated_laws(text)`: that of the fits, if it is known."""
    found = None if "=" in text else fits_file.read(text).noise.log_loss
    return NOISE if found is None else found


def _parse(text: str) -> StatedLaw:
    values = {}
    for word in text.split(","):
        name, _, number = word.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError:
            raise UserError(f"simulate: {word.strip()!r} was found; write COEFFICIENT=NUMBER") from None
    for law in LAWS.values():
        if set(values) == set(law.coefficients):
            bounds = {name: ends for name, ends in law.bounds.items() if name in values}
            outside = [name for name, (low, high) in bounds.items() if not low < values[name] < high]
            if outside or not np.isfinite(list(values.values())).all():
                *some, last = bounds
                raise UserError(f"simulate: {', '.join(some)} and {last} must be above 0, and all coefficients finite")
            return StatedLaw.of(law, values)
    allowed = " or ".join(", ".join(law.coefficients) for law in LAWS.values())
    raise UserError(f"simulate: {', '.join(values)} are not the coefficients of a law; allowed: {allowed}")


def _laws_of_fits(path: str) -> dict[str, StatedLaw]:
    if not Path(path).exists():
        raise UserError(f"simulate: {path!r} is neither a law such as {EXAMPLE} nor a file")
    fits = fits_file.read(path)
    found = {name: fraction_law(fit.joint_laws) or size_law(fit.joint_laws) for name, fit in fits.methods.items()}
    laws = {name: law for name, law in found.items() if law}
    if not laws:
        raise UserError(f"simulate: {path} holds no joint law; give a law such as {EXAMPLE}")
    return laws


def grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of a sweep with `tokens`, `flop_per_token` and `trainable_fraction` in every row.

    Cost and tokens follow from the paper's formula where the rows lack them. Raises UserError for a missing column.
    """
    rows = rows.rename(columns={source.name: ours for ours, source in sources(list(rows.columns)).items()})
    for name in NEEDED:
        if name not in rows:
            raise UserError(f"simulate: column {name!r} is missing; a grid has {', '.join(NEEDED)}")
    rows = rows.reset_index(drop=True)
    if "trainable_fraction" not in rows:
        rows["trainable_fraction"] = 1.0
    cost = [
        flop_per_token(m, n, s)
        for m, n, s in zip(rows["method"], rows["n_parameters"], rows["trainable_fraction"], strict=True)
    ]
    rows["flop_per_token"] = rows["flop_per_token"].fillna(pd.Series(cost)) if "flop_per_token" in rows else cost
    tokens = rows["budget_flop"] / rows["flop_per_token"]
    rows["tokens"] = rows["tokens"].fillna(tokens) if "tokens" in rows else tokens
    return rows


def draw(rows: pd.DataFrame, laws: Mapping[str, StatedLaw], noise: float, seed: int = 0) -> pd.DataFrame:
    """Return the grid with a `loss`: that of the law times exp(noise × a standard normal number)."""
    rows = grid(rows)
    rng = np.random.default_rng(seed)
    rows["loss"] = np.nan
    for method, part in rows.groupby("method"):
        rows.loc[part.index, "loss"] = _loss(_law_of(laws, str(method)), part)
    if not (rows["loss"] > 0).all():
        row = rows[~(rows["loss"] > 0)].iloc[0]
        raise UserError(
            f"simulate: the law gives {row['loss']:.4g} at {row['n_parameters']:.4g} parameters, no loss above 0; "
            "change its coefficients"
        )
    rows["loss"] *= np.exp(noise * rng.standard_normal(len(rows)))
    return rows


def _law_of(laws: Mapping[str, StatedLaw], method: str) -> StatedLaw:
    if method not in laws and "*" not in laws:
        raise UserError(f"simulate: no law for the method {method!r}; allowed: {', '.join(laws)}, or one law for all")
    return laws[method] if method in laws else laws["*"]


def _loss(law: StatedLaw, rows: pd.DataFrame) -> Array:
    n, d, s = (rows[name].to_numpy(float) for name in ("n_parameters", "tokens", "trainable_fraction"))
    return law.loss(n, d, s)


# --- The simulation --------------------------------------------------------------------------------------------------


def simulate(
    rows: pd.DataFrame,
    laws: str | Mapping[str, StatedLaw],
    noise: float = NOISE,
    repeats: int = 200,
    window: float = 4.0,
    seed: int = 0,
) -> dict[str, Simulated]:
    """Return {method: how well the grid recovers the law}, over `repeats` sweeps.

    `rows` are the runs of the grid (`NEEDED`), and `laws` are laws or their text (`stated_laws`). `noise` is the
    standard deviation of ln L, `window` that of `fit`. Raises UserError for a noise that is not positive, and for rows
    that are not a grid.
    """
    optima.check_estimator("parabola", window)
    if seed < 0:
        raise UserError(f"seed: {seed} is out of range; allowed: at least 0")
    if not 0 < noise <= 1:
        raise UserError(f"noise: {noise} is out of range; allowed: above 0, at most 1, the standard deviation of ln L")
    laws = stated_laws(laws) if isinstance(laws, str) else laws
    rows, rng = grid(rows), np.random.default_rng(seed)
    draw(rows, laws, noise)  # checks that the law gives a loss everywhere on the grid
    return {
        str(method): _simulate_method(
            part.reset_index(drop=True), _law_of(laws, str(method)), noise, repeats, window, rng
        )
        for method, part in rows.groupby("method", sort=False)
    }


def _simulate_method(
    rows: pd.DataFrame,
    stated: StatedLaw,
    noise: float,
    repeats: int,
    window: float,
    rng: np.random.Generator,
) -> Simulated:
    truth = _loss(stated, rows)
    n, d, s = (rows[name].to_numpy(float) for name in ("n_parameters", "tokens", "trainable_fraction"))
    drawn = truth * np.exp(noise * rng.standard_normal((repeats, len(rows))))
    refused = ""
    for losses in drawn[:TRIED]:
        try:
            first = solver.fit_joint(stated.law, n, d, losses, s, residual="log")
            break
        except solver.NoFit as error:
            refused = str(error)
    else:
        return Simulated(stated.law.name, noise, repeats, len(rows), refused=refused)
    fitted = first.refit(loss=drawn)  # [repeats, coefficients]
    converged = ~np.isnan(fitted).any(1)
    fitted, drawn = fitted[converged], drawn[converged]
    if not len(fitted):
        return Simulated(stated.law.name, noise, repeats, len(rows), refused="no simulated fit converged")
    found, parabolas = _optima(rows, stated, truth, drawn, fitted, window)
    return Simulated(
        law=stated.law.name,
        noise=noise,
        repeats=repeats,
        runs=len(rows),
        not_fixed=first.not_fixed,
        coefficients={
            name: Recovered(
                truth=float(true),
                mean=float(column.mean()),
                interval=interval(column, CONFIDENCE),
                bias=float(column.mean() / true - 1) if true else None,
            )
            for name, true, column in zip(stated.law.coefficients, stated.values, fitted.T, strict=True)
        },
        n_exponent=_exponents(rows, stated, fitted, found, parabolas),
        optima=tuple(found),
        recipe=tuple(_regret(rows, stated, fitted, found, parabolas)),
    )


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a grid as a continuum, with a branch for each trainable fraction or rank of the grid."""

    log_n: Array  # [optima.LAW_STEPS], ascending
    branches: list[tuple[Array, Array, Array]]  # ln (FLOP a token), S, and whether the branch exists, at each ln N

    @staticmethod
    def of(rows: pd.DataFrame) -> "_Sizes":
        smallest, largest = np.log(rows["n_parameters"].min()), np.log(rows["n_parameters"].max())
        log_n = np.linspace(smallest, largest, optima.LAW_STEPS)
        # Along a rank, S falls with the size; a fraction of the blocks is the same at every size.
        parts = [rows]
        for key in ("rank", "trainable_fraction"):
            if key in rows and (rows.groupby("n_parameters")[key].nunique() > 1).any():
                parts = [part for _, part in rows.groupby(key)]
                break
        branches = []
        for part in parts:
            part = part.drop_duplicates("n_parameters").sort_values("n_parameters")
            known, cost, s = (
                part[name].to_numpy(float) for name in ("n_parameters", "flop_per_token", "trainable_fraction")
            )
            known = np.log(known)
            there = (log_n >= known[0] - 1e-9) & (log_n <= known[-1] + 1e-9)
            branches.append((np.interp(log_n, known, np.log(cost)), np.interp(log_n, known, s), there))
        return _Sizes(log_n, branches)

    def losses(self, law: Law, values: Array, budget: float) -> Array:
        """Return the lowest loss of any branch [draws, sizes] for coefficients [draws, p]."""
        n = np.exp(self.log_n)
        return np.minimum.reduce(
            [
                np.where(there, np.atleast_2d(law.predict(values, n, budget / np.exp(cost), s)), np.inf)
                for cost, s, there in self.branches
            ]
        )


def _best_of_sizes(rows: pd.DataFrame, losses: Array) -> tuple[Array, Array]:
    """Return ln N, ascending, and the lowest ln L of each size [draws, sizes] over fractions and ranks."""
    sizes = np.unique(rows["n_parameters"].to_numpy(float))
    best = np.stack([losses[:, (rows["n_parameters"] == size).to_numpy()].min(1) for size in sizes], 1)
    return np.log(sizes), np.log(best)


def _optima(
    rows: pd.DataFrame, stated: StatedLaw, truth: Array, drawn: Array, fitted: Array, window: float
) -> tuple[list[RecoveredOptimum], dict[float, Array]]:
    """Return the optimum of each budget, and ln N* of the parabolas [repeats] at each budget with three sizes."""
    found, parabolas = [], {}
    for budget in map(float, np.unique(rows["budget_flop"].to_numpy(float))):
        here = (rows["budget_flop"] == budget).to_numpy()
        part = rows[here]
        if part["n_parameters"].nunique() < 3:
            found.append(RecoveredOptimum(budget))
            continue
        log_n, clean = _best_of_sizes(part, truth[None, here])
        drawn_best = optima.parabola(log_n, _best_of_sizes(part, drawn[:, here])[1], window)[0]
        parabolas[budget] = drawn_best
        missing = float(np.isnan(drawn_best).mean())
        sizes = _Sizes.of(part)
        best = float(lowest_point(sizes.log_n, np.log(sizes.losses(stated.law, stated.values, budget)))[0][0])
        if not np.isfinite(best):
            found.append(RecoveredOptimum(budget, missing=missing))
            continue
        by_law = lowest_point(sizes.log_n, np.log(sizes.losses(stated.law, fitted, budget)))[0]
        unbiased = optima.parabola(log_n, clean, window)[0][0]
        found.append(
            RecoveredOptimum(
                budget_flop=budget,
                truth=float(np.exp(best)),
                missing=missing,
                bias_without_noise=float(np.exp(unbiased - best) - 1) if np.isfinite(unbiased) else None,
                parabola=_ratios(drawn_best - best),
                law=_ratios(by_law - best),
            )
        )
    return found, parabolas


def _ratios(log_ratio: Array) -> Spread | None:
    finite = log_ratio[np.isfinite(log_ratio)]
    return Spread(float(np.exp(np.median(finite))), interval(np.exp(log_ratio), CONFIDENCE)) if len(finite) else None


def _spread(draws: Array) -> Spread | None:
    finite = draws[np.isfinite(draws)]
    return Spread(float(np.median(finite)), interval(draws, CONFIDENCE)) if len(finite) else None


def _exponents(
    rows: pd.DataFrame,
    stated: StatedLaw,
    fitted: Array,
    found: Sequence[RecoveredOptimum],
    parabolas: Mapping[float, Array],
) -> RecoveredExponent:
    """Return the exponents of N*(C): by the law's closed form where it has one, else by the slope of the optima."""
    known = [(row.budget_flop, row.truth) for row in found if row.truth]
    truth, by_law, by_parabola = None, None, None
    # The closed form holds where a token's cost is proportional to N.
    proportional = grouping.costs_in_proportion(rows)
    closed = stated.law.size_exponent(stated.values) if proportional else None
    drawn = stated.law.size_exponent(fitted)
    if closed is not None and drawn is not None:
        truth, by_law = float(closed), _spread(drawn)
    elif len(known) >= 2:
        truth = float(power_law(*np.array(known).T)[1])
    if len(parabolas) >= 2:
        sizes = np.exp(np.stack(list(parabolas.values()), 1))
        by_parabola = _spread(power_law(np.array(list(parabolas)), sizes)[1])
    return RecoveredExponent(truth, by_parabola, by_law)


def _regret(
    rows: pd.DataFrame,
    stated: StatedLaw,
    fitted: Array,
    found: Sequence[RecoveredOptimum],
    parabolas: Mapping[float, Array],
) -> list[Advice]:
    """Return what the advised size loses against the best size between the smallest and the largest of the grid."""
    sizes = _Sizes.of(rows)
    log_n = sizes.log_n
    line = None
    if len(parabolas) >= 2:
        line = power_law(np.array(list(parabolas)), np.exp(np.stack(list(parabolas.values()), 1)))
    budgets = [row.budget_flop for row in found]
    result = []
    for budget in [*budgets, 4 * max(budgets)]:
        loss = sizes.losses(stated.law, stated.values, budget)[0]

        def lost(chosen: Array, loss: Array = loss) -> Lost | None:
            if not len(chosen):
                return None
            over = loss[chosen] / loss.min() - 1
            return Lost(float(over.mean()), float(np.percentile(over, 50 + 50 * CONFIDENCE)))

        by_law, by_parabola = lost(sizes.losses(stated.law, fitted, budget).argmin(1)), None
        if line is not None:
            sized = line[0] + line[1] * np.log(budget)
            sized = sized[np.isfinite(sized)]
            by_parabola = lost(np.clip(np.searchsorted(log_n, sized), 0, len(log_n) - 1))
        result.append(Advice(budget, by_law, by_parabola))
    return result
