"""Check whether every fit and every bootstrap refit ends in the lowest minimum that scipy finds from many starts.

    python tests/benchmarks/minima.py DATA [subsets] [refits]

DATA holds the public tables (`olmo_ladder`, `chinchilla_epoch`, `farseer`, `porian_isoflop`). Each subset is 12 to 40
random rows of a random table, fitted by every law and three residuals. The refits are of resampled rows, twenty of each
further subset. scipy runs BFGS from the law's own starts and from points near our minimum, and Nelder–Mead from our
minimum. A fit that is refused, because it did not converge or because a coefficient has a sign that the law does not
allow, is counted separately. Each subset has a random seed of its own, so `subsets` and `refits` may be a number or a
range: `137-140` repeats the subsets 137, 138 and 139.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from analysis.fitting import solver
from analysis.fitting.laws import CHINCHILLA, LAWS, Data, Law
from analysis.fitting.solver import JointFit, NoFit, fit_joint

Table = tuple[np.ndarray, np.ndarray, np.ndarray]  # N, D, loss
KINDS = ("huber", "log", "raw")
MORE = 1e-6  # relative excess of the objective above which a fit has missed the minimum
DELTA = 1e-3
RESAMPLES = 20  # refits of each subset


def tables(data: Path) -> dict[str, Table]:
    """Return N, D and loss of every table of at least 12 rows, by name."""
    found = {}
    ladder = pd.read_csv(data / "olmo_ladder" / "runs.csv").query("role == 'fit'")
    for column in ladder.filter(like="mean5"):
        found[f"olmo {column}"] = ladder.rename(columns={column: "loss"})
    for name in ("chinchilla_epoch", "farseer"):
        found[name] = pd.read_csv(data / name / "runs.csv")
    points = pd.read_csv(data / "porian_isoflop" / "isoflop_points.csv")
    found |= {f"porian {name}": part for name, part in points.groupby("experiment")}
    found = {name: part.dropna(subset=["N", "D", "loss"]) for name, part in found.items()}
    return {
        name: tuple(part[column].to_numpy(float) for column in ("N", "D", "loss"))
        for name, part in found.items()
        if len(part) >= 12
    }


def objective(law: Law, data: Data, loss: np.ndarray, weights: np.ndarray, kind: str):
    """Return a function of theta: the objective, scaled by 1e4, and its gradient."""

    def at(theta: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(all="ignore"):
            (model,), (slopes,) = law.gradient(theta[None], data)
            r = model - loss if kind == "raw" else np.log(model) - np.log(loss)
            slopes = slopes * model if kind == "raw" else slopes
        if not (np.isfinite(slopes).all() and np.isfinite(r).all()):
            return 1e9, np.zeros(len(theta))
        if kind == "huber":
            size = np.abs(r)
            rho = np.where(size <= DELTA, r**2 / 2, DELTA * (size - DELTA / 2))
            return 1e4 * float(weights @ rho), 1e4 * slopes @ (weights * np.clip(r, -DELTA, DELTA))
        return 1e4 * float(weights @ r**2) / 2, 1e4 * slopes @ (weights * r)

    return at


def lowest(law: Law, at, starts: np.ndarray, near: np.ndarray, rng: np.random.Generator) -> float:
    """Return the lowest minimum that scipy reaches from four starts, three points near `near`, and `near` itself.

    An end whose exponent has run to infinity is no minimum. The result is infinite where scipy finds no other.
    """
    exponents = np.isin(law.coefficients, law.exponents)
    spread = np.array([1, *[0.4] * (len(near) - 3), 0.1, 0.1])
    drawn = spread * rng.standard_normal((7, len(near)))
    starts = [*starts[:4], *(starts[0] + 2 * drawn[: max(0, 4 - len(starts))]), *(near + drawn[4:])]
    ends = [minimize(at, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 300}) for start in starts]
    best = min(ends, key=lambda end: end.fun)
    options = {"maxiter": 1500, "xatol": 1e-9, "fatol": 1e-12}
    for start in (best.x, near):
        end = minimize(lambda theta: at(theta)[0], start, method="Nelder-Mead", options=options)
        ends.append(end)
    minima = [end.fun for end in ends if (np.abs(end.x[exponents]) < solver.STEEPEST).all()]
    return min(minima, default=np.inf) / 1e4


def subset(found: dict[str, Table], rng: np.random.Generator) -> tuple[str, Table, np.ndarray]:
    """Return random rows of a random table, with trainable fractions on which the loss depends for the law of S."""
    name = str(rng.choice(list(found)))
    count = len(found[name][0])
    rows = rng.choice(count, min(count, int(rng.integers(12, 41))), replace=False)
    n, d, loss = (column[rows] for column in found[name])
    return name, (n, d, loss), rng.choice([0.25, 0.5, 0.75, 1.0], len(rows))


def fits(found: dict[str, Table], indices: range) -> None:
    excess: dict[tuple[str, str], list[float]] = defaultdict(list)
    refused: dict[tuple[str, str], int] = defaultdict(int)
    ours, began = 0.0, time.process_time()
    for index in indices:
        rng = np.random.default_rng([0, index])
        name, (n, d, loss), fraction = subset(found, rng)
        if len(np.unique(n)) < 3:
            continue
        for law in LAWS.values():
            s = fraction if law.needs_fraction else np.ones_like(n)
            tried = loss * (1 + 0.1 * (1 - s) ** 1.5)
            for kind in KINDS:
                what = f"  {index}: {name}, {len(n)} rows, {law.name}, {kind}"
                turn = time.process_time()
                try:
                    fit = fit_joint(law, n, d, tried, s, residual=kind, delta=DELTA)
                except NoFit as error:
                    refused[law.name, kind] += 1
                    print(f"{what}: {error}", flush=True)
                    continue
                finally:
                    ours += time.process_time() - turn
                at = objective(law, fit.data, tried, fit.weights, kind)
                low = lowest(law, at, law.starts(tried, fit.data), fit.theta, rng)
                excess[law.name, kind].append(fit.objective / low - 1)
                if fit.objective > low * (1 + MORE):
                    print(f"{what}: MISSED, {fit.objective:.6e}, scipy {low:.6e}", flush=True)
        if index % 10 == 9:
            print(f"  {index + 1} subsets: {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    spent = time.process_time() - began
    print(f"{len(indices)} subsets in {spent:.0f} s of processor time, of which our fits took {ours:.1f} s")
    print("law, residual: fits, refused, above scipy by more than 1e-6, largest excess")
    for (law, kind), values in excess.items():
        missed = int((np.array(values) > MORE).sum())
        print(f"{law}, {kind}: {len(values)}, {refused[law, kind]}, {missed}, {max(values):.1e}")


def refits(found: dict[str, Table], indices: range) -> None:
    """Compare refits of resampled rows with scipy's multi-start on the same resamples."""
    missed, lost, total, worst = 0, 0, 0, 0.0
    for index in indices:
        rng = np.random.default_rng([1, index])
        name, fit = _fitted(found, rng)
        count = len(fit.loss)
        weights = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)
        for w, values in zip(weights, fit.refit(weights=weights), strict=True):
            total += 1
            if not np.isfinite(values).all():
                lost += 1
                continue
            excess = _excess(fit, w, values, rng)
            worst = max(worst, excess)
            if excess > MORE:
                missed += 1
                print(f"  {index * RESAMPLES}: {name}, {count} rows: a refit is {excess:.1e} above scipy", flush=True)
        if index % 5 == 4:
            print(f"  {(index + 1) * RESAMPLES} refits", file=sys.stderr, flush=True)
    print(f"{total} refits: {lost} did not converge, {missed} above scipy by more than 1e-6, largest {worst:.1e}")


def _fitted(found: dict[str, Table], rng: np.random.Generator) -> tuple[str, JointFit]:
    """Return the first random subset that the law fits."""
    while True:
        name, (n, d, loss), _ = subset(found, rng)
        try:
            return name, fit_joint(CHINCHILLA, n, d, loss, delta=DELTA)
        except NoFit:
            continue


def _excess(fit: JointFit, weights: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> float:
    at = objective(fit.law, fit.data, fit.loss, weights, "huber")
    theta = fit.law.internal(values[None], fit.data)[0]
    low = lowest(fit.law, at, fit.law.starts(fit.loss, fit.data), theta, rng)
    return at(theta)[0] / 1e4 / low - 1


def span(word: str, step: int = 1) -> range:
    """Return the numbers of a word such as `500` or `137-140`, in steps."""
    first, _, last = word.rpartition("-")
    return range(int(first or 0) // step, -(-int(last) // step))


def main(data: str, subsets: str = "500", resamples: str = "2000") -> None:
    found = tables(Path(data))
    print(f"{len(found)} tables, scipy beside {solver.__name__}")
    fits(found, span(subsets))
    refits(found, span(resamples, RESAMPLES))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
