"""What a design of its own runs reaches: replays of public tables, and simulated sweeps of the paper's grid.

    python tests/benchmarks/adaptive.py tables DATA [repeats]
    python tests/benchmarks/adaptive.py sweeps [count]

`tables` replays `chinchilla_epoch` and each experiment of `porian_isoflop`: the best size at the largest budget, from
15 % of the cost of the other rows. The full grid is all of these rows. Each repeat leaves out a tenth of them.
`sweeps` draws laws of four methods over the paper's grid, two of which cross at a random budget, and asks for method
and size at the largest budget. Neither the laws nor the effects of rank and fraction have the form that the design
fits.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from calibration import Truth, law

from analysis import runs
from analysis.design.choice import Candidate, Design, Pool, crossings
from analysis.design.replay import DESIGN, FULL, by_design, replay, replay_of
from embedscale.errors import UserError
from embedscale.run.cost import cost_of
from embedscale.run.families import PYTHIA
from embedscale.run.method import Method

SHARE = 0.15  # of the cost
GOOD = 0.005  # regret as a share of the loss
NAMES = {"flops": "budget_flop", "C": "budget_flop"}


def tables(data: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the tables whose question is a size."""
    epoch = pd.read_csv(data / "chinchilla_epoch" / "runs.csv").rename(columns=NAMES)
    yield "chinchilla_epoch", epoch[epoch["loss"] < epoch["loss"].nlargest(5).min()]
    points = pd.read_csv(data / "porian_isoflop" / "isoflop_points.csv").rename(columns=NAMES)
    for name, table in points.groupby("experiment"):
        yield str(name), table.drop(columns="experiment")


def show_tables(data: str, repeats: int = 10) -> None:
    print("| table | sizes | rows | runs | regret: mean | worst | below 0.5 % | full grid: mean | below 0.5 % |")
    print("|---|---|---|---|---|---|---|---|---|")
    every = []
    for name, raw in tables(Path(data)):
        given = replay_of(runs.load(raw).table)
        found = pd.DataFrame(replay(given, repeats, (SHARE,), (DESIGN,)))
        every.append(found.assign(table=name))
        _row(name, found, f"{len(given.pool.options)}", f"{len(given.pool.candidates)}")
    _row("all", pd.concat(every), "", "")


def _row(name: str, found: pd.DataFrame, *cells: str) -> None:
    ours, full = (found[found["spender"] == each] for each in (DESIGN, FULL))
    regret, whole = ours["regret"], full["regret"]
    print(
        f"| {name} | {' | '.join(cells)} | {ours['runs'].mean():.0f} | {100 * regret.mean():.2f} % | "
        f"{100 * regret.max():.2f} % | {(regret < GOOD).sum()} of {len(regret)} | {100 * whole.mean():.2f} % | "
        f"{(whole < GOOD).sum()} of {len(whole)} |",
        flush=True,
    )


# --- Simulated sweeps ------------------------------------------------------------------------------------------------

BUDGETS = 1.5e15 * 4.0 ** np.arange(6)
NOISE, WIDTH = 0.01, 16
TOLERATED = 0.01  # regret as a share of the loss
FRACTIONS = np.arange(1, 7) / 6
RANKS = (8, 16, 32, 128, 512, 2048)


def paper_grid() -> list[Candidate]:
    """Return the paper's grid: eight sizes, six budgets, four methods, six fractions and ranks; settings (rank, S)."""
    found = []
    variants = [Method("full"), Method("bias"), *(Method("freeze", active_fraction=float(f)) for f in FRACTIONS)]
    variants += [Method("lora", rank=rank) for rank in RANKS]
    for size in list(PYTHIA.sizes.values())[:8]:
        for method in variants:
            try:
                cost = cost_of(size.shape, method)
            except UserError:  # the fraction is no whole number of blocks
                continue
            rank = float(method.rank) if method.name == "lora" else None
            share = method.active_fraction if method.name == "freeze" else None
            for budget in map(float, BUDGETS):
                run = f"{size.name} {method.label} {budget:.3g}"
                tokens = budget / cost.flop_per_token
                found.append(
                    Candidate(run, method.name, float(cost.n_parameters), tokens, budget, budget, (rank, share))
                )
    return found


def truth_of(grid: list[Candidate], seed: int) -> tuple[dict[str, float], float]:
    """Return the loss of each run by random laws, and the budget at which the two best methods cross."""
    rng = np.random.default_rng([7, seed])
    kind = seed % 3
    first = law(rng, kind)
    log_loss = np.empty(len(grid))
    methods = np.array([each.method for each in grid])
    budgets = np.array([each.budget_flop for each in grid])
    ends = {"lora": np.log([RANKS[0], RANKS[-1]]), "freeze": np.log([FRACTIONS[0], FRACTIONS[-1]])}
    for method in ("full", "freeze", "bias", "lora"):
        e, a, b, alpha, beta = np.exp(rng.normal(0, (0.05, 0.15, 0.15, 0.03, 0.03)))
        own = Truth(kind, e * first.e, a * first.a, b * first.b, alpha * first.alpha, beta * first.beta)
        bend, best, drift = rng.uniform(0.005, 0.05), rng.uniform(-1, 1), rng.normal(0, 0.1)
        for i in np.flatnonzero(methods == method):
            each = grid[i]
            log_loss[i] = math.log(own.loss(each.n_parameters, each.tokens))
            if method in ends:
                low, high = ends[method]
                z = 2 * (math.log(each.settings[0] or each.settings[1]) - low) / (high - low) - 1
                log_loss[i] += bend * (z - best - drift * math.log(each.budget_flop / 1e17)) ** 2
    x = np.log(BUDGETS)

    def lowest(method: str) -> np.ndarray:
        return np.array([log_loss[(methods == method) & (budgets == budget)].min() for budget in BUDGETS])

    one, other = rng.permutation(["full", "lora", "freeze"])[:2]
    at = rng.uniform(math.log(6e15), math.log(4e17))
    log_loss[methods == other] += np.interp(at, x, lowest(one)) - np.interp(at, x, lowest(other))
    for method in {"full", "freeze", "bias", "lora"} - {str(one), str(other)}:  # never the best, by 0 to 5 %
        behind = (lowest(method) - np.minimum(lowest(one), lowest(other))).min()
        log_loss[methods == method] += rng.uniform(0, 0.05) - behind
    every = {method: lowest(method) for method in ("full", "freeze", "bias", "lora")}
    best = every.pop(min(every, key=lambda method: every[method][-1]))
    cross = crossings(x, (best - np.min(list(every.values()), axis=0))[None])[0]
    return dict(zip([each.run for each in grid], np.exp(log_loss), strict=True)), float(np.exp(cross))


def show_sweeps(count: int = 100) -> None:
    grid = paper_grid()
    options = tuple(each for each in grid if each.budget_flop == BUDGETS[-1])
    design = Design(Pool(tuple(grid), options, settings=("rank", "trainable_fraction")))
    regrets, methods, held, widths, made_of = [], [], [], [], []
    began = time.monotonic()
    for seed in range(count):
        truth, cross = truth_of(grid, seed)
        rng = np.random.default_rng([8, seed])
        losses = {run: loss * math.exp(NOISE * rng.standard_normal()) for run, loss in truth.items()}
        made = by_design(design, losses, SHARE * design.pool.cost, rng, WIDTH)
        belief = design.belief({run: losses[run] for run in made})
        answer, found = design.answer(belief), design.crossing(belief)
        true = min(options, key=lambda each: truth[each.run])
        regrets.append(truth[answer.best.run] / truth[true.run] - 1)
        methods.append(answer.best.method == true.method)
        assert found is not None
        held.append(methods[-1] and found.interval[0] <= cross <= found.interval[1])
        widths.append(found.interval[1] / found.interval[0] if found.interval[0] else math.inf)
        made_of.append(len(made))
        print(
            f"{seed + 1} of {count}, {time.monotonic() - began:.0f} s: {len(made)} runs, {true.run} is best, chosen "
            f"{answer.best.run}, regret {100 * regrets[-1]:.2f} % (expected {100 * answer.regret:.2f} %), crossing at "
            f"{cross:.2g}: {found.interval[0]:.2g} to {found.interval[1]:.2g}",
            file=sys.stderr,
            flush=True,
        )
    r = np.array(regrets)
    print(f"grid: {len(grid)} runs of {design.pool.cost:.3g} FLOP; the design made {np.mean(made_of):.0f} of them")
    below = f"{(r < TOLERATED).sum()} of {count}"
    print(f"regret below 1 %: {below}; mean {100 * r.mean():.2f} %, worst {100 * r.max():.2f} %")
    print(f"the best method was chosen: {sum(methods)} of {count}")
    print(f"the 95 % interval of the crossing held the truth: {sum(held)} of {count}")
    closed = [each for each in widths if math.isfinite(each)]
    print(f"it has two ends in {len(closed)}, which differ by a factor of {np.median(closed):.2g} (median)")


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "tables":
        show_tables(words[0], *map(int, words[1:]))
    else:
        show_sweeps(*map(int, words))
