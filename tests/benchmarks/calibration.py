"""Whether forecasts hold what they state: the coverage of their intervals, and their width against the real error.

    python tests/benchmarks/calibration.py DATA [sweeps]

DATA holds the public tables (`chinchilla_epoch`, `farseer`, `olmo_ladder`, `porian_isoflop`). Of each table, and of
parts of it, the largest budget and the two largest are left out, and the lowest loss and N* there are forecast. The
truth of a table is the optimum that its whole fit finds. Simulated sweeps have laws that the forecast knows and laws
that it does not know; their truth is that of the law. The rules were tuned with other simulated sweeps (`TUNING`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import runs
from analysis.fits import Fits
from analysis.fitting.fit import fit
from embedscale.errors import UserError

CONFIDENCE = 0.95
TUNING, VERDICT = 1, 2  # seeds of the simulated sweeps
GRID = np.linspace(np.log(1e3), np.log(1e13), 4001)  # ln N on which a true optimum is looked for


@dataclass(frozen=True)
class Case:
    """A fit without the largest budgets, and the truth at a budget that was left out."""

    group: str
    left_out: int
    fits: Fits
    method: str
    budget: float
    log_loss: float
    log_n: float


def fitted(table: pd.DataFrame) -> Fits | None:
    try:
        return fit(runs.load(table), bootstrap=200)
    except UserError:
        return None


# --- Public tables ---------------------------------------------------------------------------------------------------


def tables(data: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the tables with profiles, whole and in parts: without the largest budgets, and every second budget."""
    names = {"N": "n_parameters", "D": "tokens", "C": "budget_flop", "flops": "budget_flop"}
    epoch = pd.read_csv(data / "chinchilla_epoch" / "runs.csv").rename(columns=names)
    epoch = epoch[epoch["loss"] < epoch["loss"].nlargest(5).min()]
    points = pd.read_csv(data / "porian_isoflop" / "isoflop_points.csv").rename(columns=names)
    every = [("chinchilla_epoch", epoch)] + [("porian_isoflop", part) for _, part in points.groupby("experiment")]
    for name, table in every:
        table = table[["n_parameters", "tokens", "budget_flop", "loss"]]
        whole = fitted(table)
        if whole is None:
            continue
        budgets = [row.budget_flop for row in whole.methods["full"].interior]
        for last in range(len(budgets), 3, -2):
            yield name, at_most(table, budgets[last - 1])
        for first in (0, 1):
            kept = np.array(budgets[first::2])
            near = np.abs(np.log(table["budget_flop"].to_numpy()[:, None] / kept)).min(1) < 0.1
            yield name, table[near]


def at_most(table: pd.DataFrame, budget: float) -> pd.DataFrame:
    return table[table["budget_flop"] <= budget * 1.1]


def cases_of_tables(data: Path) -> Iterator[Case]:
    for name, table in tables(data):
        whole = fitted(table)
        interior = whole.methods["full"].interior if whole else ()
        for left_out in (1, 2):
            if len(interior) < left_out + 3:
                continue
            found = fitted(table[table["budget_flop"] < interior[-left_out].budget_flop * 0.9])
            if found:
                last = interior[-1]
                truth = np.log(last.loss), np.log(last.n_opt)
                yield Case(name, left_out, found, "full", last.budget_flop, *truth)


# --- Simulated sweeps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """A law of the loss in N and D: `kind` 0 is Chinchilla's, 1 is Kaplan's with a floor, 2 has a term of both."""

    kind: int
    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        size, data = self.a / n**self.alpha, self.b / d**self.beta
        if self.kind == 1:
            return self.e + (size ** (1 / self.beta) + data ** (1 / self.beta)) ** self.beta
        if self.kind == 2:
            return self.e + size + data + 0.5 * np.sqrt(size * data)
        return self.e + size + data

    def optimum(self, budget: float) -> tuple[float, float]:
        """Return ln L* and ln N*."""
        values = np.log(self.loss(np.exp(GRID), budget / (6 * np.exp(GRID))))
        best = int(values.argmin())
        return float(values[best]), float(GRID[best])


def law(rng: np.random.Generator, kind: int) -> Truth:
    """Return a random law whose two terms are of like size at 1e17 FLOP."""
    alpha, beta = rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.5)
    n = 10 ** rng.uniform(7, 8.5)
    d = 1e17 / (6 * n)
    terms = rng.uniform(0.3, 2)
    return Truth(kind, rng.uniform(0.1, 2), terms * n**alpha, terms * alpha / beta * d**beta, alpha, beta)


def sweep(rng: np.random.Generator, truth: Truth, budgets: np.ndarray, noise: float) -> pd.DataFrame:
    """Return the runs of a grid: the same sizes at every budget, or sizes about a guess of each budget's optimum."""
    factor, count = rng.uniform(1.5, 2.6), int(rng.integers(4, 8))
    common = rng.random() < 0.5
    rows = []
    for budget in budgets:
        middle = truth.optimum(float(np.sqrt(budgets[0] * budgets[-1])) if common else float(budget))[1]
        count_here = count + (2 if common else 0)
        shift = 0.0 if common else rng.normal(0, 0.3)
        sizes = np.exp(middle + shift + np.log(factor) * (np.arange(count_here) - (count_here - 1) / 2))
        rows += [(n, budget / (6 * n), budget) for n in sizes]
    table = pd.DataFrame(rows, columns=["n_parameters", "tokens", "budget_flop"])
    loss = truth.loss(table["n_parameters"].to_numpy(), table["tokens"].to_numpy())
    return table.assign(loss=loss * np.exp(noise * rng.standard_normal(len(table))))


def cases_of_sweeps(count: int, seed: int) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    for i in range(count):
        truth = law(rng, i % 3)
        kept, ratio = int(rng.integers(3, 7)), rng.uniform(2, 6)
        noise = float(np.exp(rng.uniform(np.log(0.0005), np.log(0.02))))
        budgets = 1e17 * ratio ** (np.arange(kept) - kept + 1.0)
        found = fitted(sweep(rng, truth, budgets, noise))
        if found is None:
            continue
        for left_out in (1, 2):
            budget = float(budgets[-1] * ratio**left_out)
            group = "simulated, a law that is known" if truth.kind == 0 else "simulated, other laws"
            yield Case(group, left_out, found, "full", budget, *truth.optimum(budget))
