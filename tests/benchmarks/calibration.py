"""Whether forecasts hold what they state: the coverage of their intervals, and their width against the real error.

    python tests/benchmarks/calibration.py DATA [sweeps]

DATA holds the public tables (`chinchilla_epoch`, `farseer`, `olmo_ladder`, `porian_isoflop`). Of each table, and of
parts of it, the largest budget and the two largest are left out, and the lowest loss and N* there are forecast. The
truth of a table is the optimum that its whole fit finds. Simulated sweeps have laws that the forecast knows and laws
that it does not know; their truth is that of the law. The rules were tuned with other simulated sweeps (`TUNING`).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import runs
from analysis.advice.evidence import gather
from analysis.advice.forecast import chances
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
    size: float | None = None
    """Of a run, whose loss is the truth; None where the truth is the optimum."""


def fitted(table: pd.DataFrame) -> Fits | None:
    try:
        return fit(runs.load(table), bootstrap=100)
    except UserError:
        return None


# --- Public tables ---------------------------------------------------------------------------------------------------


def tables(data: Path) -> Iterator[tuple[str, pd.DataFrame, Fits]]:
    """Yield tables with profiles, whole and with every second budget, with the fit of the whole."""
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
        yield name, table, whole
        budgets = [row.budget_flop for row in whole.methods["full"].interior]
        near = np.abs(np.log(table["budget_flop"].to_numpy()[:, None] / np.array(budgets[1::2]))).min(1) < 0.1
        yield name, table[near], whole


def cases_of_tables(data: Path) -> Iterator[Case]:
    for name, table, whole in tables(data):
        budgets = table["budget_flop"].to_numpy()
        interior = [
            row for row in whole.methods["full"].interior if np.abs(np.log(budgets / row.budget_flop)).min() < 0.1
        ]
        for left_out in (1, 2):
            if len(interior) < left_out + 3:
                continue
            found = fitted(table[budgets < interior[-left_out].budget_flop * 0.9])
            if found:
                last = interior[-1]
                size = np.array([last.n_opt])
                yield Case(name, left_out, found, "full", last.budget_flop, np.log(last.loss), np.log(size[0]))


def cases_of_runs(data: Path) -> Iterator[Case]:
    """Yield the tables without profiles: the loss of their largest runs, from the others."""
    ladder = pd.read_csv(data / "olmo_ladder" / "runs.csv")
    farseer = pd.read_csv(data / "farseer" / "runs.csv").assign(role=lambda rows: rows["part"])
    for name, table, columns, fit_part in (
        ("olmo_ladder", ladder, [each for each in ladder if each.endswith("_mean5")], "fit"),
        ("farseer", farseer, ["loss"], "candidate"),
    ):
        for column in columns:
            rows = pd.DataFrame({"n_parameters": table["N"], "tokens": table["D"], "loss": table[column]}, dtype=float)
            rows = rows.dropna()
            rows = rows.assign(budget_flop=6 * rows["n_parameters"] * rows["tokens"])
            inside = table.loc[rows.index, "role"] == fit_part
            found = fitted(rows[inside])
            for row in rows[~inside].itertuples() if found else ():
                yield Case(name, 1, found, "full", row.budget_flop, np.log(row.loss), np.nan, row.n_parameters)


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
        budgets, ratio, noise = grid(rng)
        found = fitted(sweep(rng, truth, budgets, noise))
        if found is None:
            continue
        for left_out in (1, 2):
            budget = float(budgets[-1] * ratio**left_out)
            group = "simulated, a law that is known" if truth.kind == 0 else "simulated, other laws"
            yield Case(group, left_out, found, "full", budget, *truth.optimum(budget))


def grid(rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Return budgets, the ratio between them, and the noise of a random sweep."""
    kept, ratio = int(rng.integers(3, 7)), rng.uniform(2, 6)
    noise = float(np.exp(rng.uniform(np.log(0.0005), np.log(0.02))))
    return 1e17 * ratio ** (np.arange(kept) - kept + 1.0), ratio, noise


def chances_of_methods(count: int, seed: int) -> Iterator[tuple[float, bool]]:
    """Yield the largest stated probability of a method, and whether it is the best, for sweeps of three methods."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        first = law(rng, i % 3)
        truths = {"full": first}
        for name in ("lora", "bias"):
            e, a, b, alpha, beta = (rng.normal(1, spread) for spread in (0.02, 0.1, 0.1, 0.02, 0.02))
            truths[name] = Truth(
                first.kind, e * first.e, a * first.a, b * first.b, alpha * first.alpha, beta * first.beta
            )
        budgets, ratio, noise = grid(rng)
        found = fitted(
            pd.concat([sweep(rng, truth, budgets, noise).assign(method=name) for name, truth in truths.items()])
        )
        for left_out in (1, 2) if found else ():
            budget = float(budgets[-1] * ratio**left_out)
            known = {name: each.outlook for name, each in gather(found).items() if each.outlook.covers(budget)}
            likely, chance = next(
                iter(chances({name: each.at(budget).log_loss for name, each in known.items()}).items())
            )
            best = min(truths, key=lambda name: truths[name].optimum(budget)[0])
            yield chance, likely == best


# --- The tables ------------------------------------------------------------------------------------------------------


def judged(case: Case) -> list[float] | None:
    """Return whether the interval holds the truth, its half width and the error: of ln L, then of ln N*."""
    evidence = gather(case.fits)[case.method]
    if case.size:
        basis = "joint law" if evidence.law else ""
        if not basis:
            return None
        drawn = [evidence.log_loss(np.array([case.size]), np.array([case.budget]), basis)[:, 0]]
    elif not evidence.outlook.covers(case.budget):
        return None
    else:
        forecast = evidence.outlook.at(case.budget)
        drawn = [forecast.log_loss, forecast.log_n]
    found: list[float] = []
    for draws, true in zip(drawn, (case.log_loss, case.log_n), strict=False):
        low, middle, high = np.nanquantile(draws, [0.5 - CONFIDENCE / 2, 0.5, 0.5 + CONFIDENCE / 2])
        found += [float(low <= true <= high), (high - low) / 2, abs(middle - true)]
    return found


def show(cases: Iterator[Case]) -> None:
    rows: dict[tuple[str, int], list[list[float] | None]] = {}
    for case in cases:
        rows.setdefault((case.group, case.left_out), []).append(judged(case))
    print("| table | left out | forecasts | L\\*: held | half width | error | N\\*: held | half width | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    every = {("all", count): [row for key, row in rows.items() if key[1] == count for row in row] for count in (1, 2)}
    for (group, left_out), found in (rows | every).items():
        known = [row for row in found if row]
        cells = [group, f"{left_out}", f"{len(known)} of {len(found)}"]
        for first, unit in ((0, "{:.2f} %"), (3, "{:.0f} %")):
            values = np.array([row[first : first + 3] for row in known if len(row) > first])
            if len(values):
                held, (half, error) = values[:, 0].mean(), 100 * np.median(values[:, 1:], 0)
                cells += [f"{100 * held:.0f} %", unit.format(half), unit.format(error)]
            else:
                cells += ["–"] * 3
        print("|", " | ".join(cells), "|")


def show_methods(found: list[tuple[float, bool]]) -> None:
    print("\n| stated probability of the likeliest method | forecasts | stated, mean | it was the best |")
    print("|---|---|---|---|")
    for low, high in ((0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.01)):
        part = np.array([each for each in found if low <= each[0] < high], float)
        if len(part):
            stated, right = 100 * part.mean(0)
            print(f"| {100 * low:.0f} to {min(100 * high, 100):.0f} % | {len(part)} | {stated:.0f} % | {right:.0f} % |")


def main(data: str, sweeps: int = 60) -> None:
    show(chain(cases_of_tables(Path(data)), cases_of_runs(Path(data))))
    show(cases_of_sweeps(sweeps, VERDICT))
    show_methods(list(chances_of_methods(sweeps // 4, VERDICT)))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:]))
