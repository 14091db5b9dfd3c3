"""What a design of its own runs reaches: replays of tables, and simulated sweeps of the paper's grid.

    python tests/benchmarks/adaptive.py tables DATA [repeats]
    python tests/benchmarks/adaptive.py sweeps [count]
    python tests/benchmarks/adaptive.py study

`tables` replays `chinchilla_epoch` and each experiment of `porian_isoflop`: the best size at the largest budget, from
15 % of the cost of the other rows. The full grid is all of these rows. Each repeat leaves out a tenth of them.
`sweeps` draws laws of four methods over the paper's grid, two of which cross at a random budget, and asks for method
and size at the largest budget. Neither the laws nor the effects of rank and fraction have the form that the design
fits.

`study` is an adaptive sweep over the study's grid (`configs/study/sweep.yaml`) whose runs are not trained but looked up
in `docs/study/runs.csv`. Training is exact, so a sweep that trains them makes the same choices.
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from calibration import Truth, law
from records import record

from analysis import runs
from analysis.design.choice import Candidate, Design, Pool, crossings
from analysis.design.replay import DESIGN, FULL, by_design, replay, replay_of
from embedscale.adaptive.choices import Choices
from embedscale.adaptive.sweep import Money, describe, go_on, pool_of
from embedscale.errors import DONE, UserError
from embedscale.run.cost import cost_of
from embedscale.run.directory import RunDirectory
from embedscale.run.families import PYTHIA
from embedscale.run.method import Method
from embedscale.run.record import RunRecord
from slurm import grid as grids
from slurm.grid import Sweep
from slurm.plan import plan_sweep

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


# --- The study -------------------------------------------------------------------------------------------------------

STUDY = Path("configs/study/sweep.yaml"), Path("docs/study/runs.csv")
SPENDING = {2.56e13: ("3%", "5%", "10%", "15%", "25%"), 6.4e12: ("3%", "5%", "10%", "15%")}


def show_study() -> None:
    file, table = STUDY
    known = pd.read_csv(table).set_index("run")
    finished = RunRecord.from_json(record())

    def look_up(part: Sweep) -> int:
        for run_id in part.by_id:
            directory = RunDirectory(part.folder / run_id)
            directory.path.mkdir(parents=True)
            directory.write_record(replace(finished, run_id=run_id, loss=float(known.loss[run_id])))
        return DONE

    print("| for, FLOP | spent | runs | core-hours | recipe | its loss, expected | measured | above the lowest |")
    print("|---|---|---|---|---|---|---|---|")
    for budget, shares in SPENDING.items():
        for share in shares:
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
                sweep = grids.load(file, [f"output={folder}"])
                plan = plan_sweep(sweep)
                money = Money.of(share, plan)
                go_on(sweep, plan, budget, money, look_up)
                choices = Choices.of(sweep.folder)
            assert choices is not None
            made = [each.run for each in choices.runs]
            design = Design(pool_of(plan, budget, money))
            answer = design.answer(design.belief({run: float(known.loss[run]) for run in made}))
            there = known.loss[[each.run for each in design.pool.options]]
            low, high = answer.interval
            expected = "made" if answer.best.run in made else f"{answer.loss:.3f} ({low:.3f} … {high:.3f})"
            found, hours = float(there[answer.best.run]), known.wall_seconds[made].sum() / 3600
            spent = f"{100 * choices.spent / plan.spent_flop:.1f} % | {len(made)} | {hours:.2f}"
            regret = f"{100 * (found / there.min() - 1):.1f} %"
            recipe = describe(answer.best)
            print(f"| {budget:.3g} | {spent} | {recipe} | {expected} | {found:.3f} | {regret} |", flush=True)
    hours = known.wall_seconds.sum() / 3600
    print(f"the grid: {len(known)} runs, {plan.spent_flop:.3g} FLOP, {hours:.1f} core-hours")


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "tables":
        show_tables(words[0], *map(int, words[1:]))
    elif what == "study":
        show_study()
    else:
        show_sweeps(*map(int, words))
