"""A design chooses its own runs: cheap ones first, the same ones each time, and enough of them to find the answer."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.design.choice import CHECKS, Candidate, Design, Pool
from analysis.design.replay import DESIGN, FULL, replay, replay_of
from analysis.design.surface import Places, Surface
from embedscale.cli import main
from embedscale.errors import UserError

SIZES = 1e7 * 2.5 ** np.arange(7)
BUDGETS = 1e16 * 4.0 ** np.arange(5)
DATA = Path(__file__).parents[2].parent / "shared" / "data"


def loss(method: str, n: float, d: float) -> float:
    """Chinchilla's law; `lora` has the lower floor and learns more slowly, so that it wins at large budgets."""
    a, floor = {"full": (400.0, 1.75), "lora": (520.0, 1.4)}[method]
    return floor + a / n**0.34 + 410.0 / d**0.28


def pool(noise: float = 0.003, target: float = BUDGETS[-1]) -> tuple[Pool, dict[str, float]]:
    """Return two methods on a grid, with the options at one of its budgets, and a loss for each run."""
    rng = np.random.default_rng(0)
    candidates, losses = [], {}
    for method in ("full", "lora"):
        for n in SIZES:
            for c in BUDGETS:
                run = f"{method} {n:.3g} {c:.3g}"
                candidates.append(Candidate(run, method, n, c / (6 * n), c, c))
                losses[run] = loss(method, n, c / (6 * n)) * math.exp(noise * rng.standard_normal())
    options = tuple(each for each in candidates if each.budget_flop == target)
    return Pool(tuple(candidates), options), losses


def spent(design: Design, losses: dict[str, float], money: float) -> tuple[list[str], float, float]:
    """Return the runs of a design, what they cost, and the share of that for checks."""
    cost = {each.run: each.cost for each in design.pool.candidates}
    made, checks, left = {}, 0.0, money
    while batch := design.next_batch(made, left):
        assert not {each.run for each in batch} & set(made), "no run is made twice"
        for each in batch:
            made[each.run] = losses[each.run]
            left -= cost[each.run]
            checks += cost[each.run] * each.is_check
            assert each.why and "\n" not in each.why
    assert left >= -1e-6 * money, "a design never spends more than it has"
    return list(made), money - left, checks / (money - left)


def test_a_tenth_of_the_grid_finds_the_method_and_the_size():
    question, losses = pool()
    design = Design(question)
    made, cost, checks = spent(design, losses, 0.1 * question.cost)
    found = design.answer(design.belief({run: losses[run] for run in made}))
    truth = {each.run: loss(each.method, each.n_parameters, each.tokens) for each in question.options}
    assert truth[found.best.run] / min(truth.values()) - 1 < 0.005
    assert found.best.method == "lora" and next(iter(found.chances)) == "lora"
    assert found.interval[0] < min(truth.values()) < found.interval[1]
    assert found.regret < 0.02 and cost <= 0.1 * question.cost
    assert 0 < checks <= CHECKS


def test_the_first_runs_are_cheap_and_every_method_is_tried():
    question, losses = pool()
    cost = {each.run: each.cost for each in question.candidates}
    made, _, _ = spent(Design(question), losses, 0.2 * question.cost)
    assert max(cost[run] for run in made[:3]) == BUDGETS[0]
    assert {run.split()[0] for run in made[:8]} == {"full", "lora"}


def test_the_same_finished_runs_give_the_same_choices():
    question, losses = pool()
    made, _, _ = spent(Design(question), losses, 0.05 * question.cost)
    finished = {run: losses[run] for run in made}
    backwards = dict(reversed(finished.items()))
    rest = 0.05 * question.cost
    first = Design(question).next_batch(finished, rest)
    other = Design(question)
    other.next_batch({}, rest)  # what was asked before does not matter
    assert first == other.next_batch(backwards, rest) != []


def test_failed_runs_are_not_chosen_again_and_a_batch_fills_the_nodes():
    question, _ = pool()
    design = Design(question)
    first = [each.run for each in design.next_batch({}, question.cost, width=4)]
    again = [each.run for each in design.next_batch({}, question.cost, width=4, lost=first)]
    assert len(first) >= 4 and not set(first) & set(again)
    assert design.next_batch({}, 0.0) == []


def test_a_belief_is_the_conditional_gaussian_of_its_prior():
    """With exponents and deviation fixed the model is linear: the textbook formula, in another order, is the truth."""
    rng = np.random.default_rng(1)
    places = Places.of(["full"] * 8, np.exp(rng.uniform(16, 20, 8)), np.exp(rng.uniform(20, 24, 8)))
    surface = Surface(places, noise=0.01)
    seen, rest = np.arange(7), 7
    values = 1 + 0.1 * rng.standard_normal(7)
    before = surface.belief(seen[:6], values[:6])
    told = before.after(6)
    own = before.covariance[6, 6] + 0.01**2
    expected = before.covariance[rest, rest] - before.covariance[rest, 6] ** 2 / own
    assert told.covariance[rest, rest] == pytest.approx(expected)
    assert np.linalg.eigvalsh(surface.belief(seen, values).covariance).min() > -1e-9
    assert told.noise == before.noise == pytest.approx(0.01)


def test_rank_is_explored_where_it_is_cheap():
    ranks, rng = (8.0, 32.0, 128.0, 512.0), np.random.default_rng(3)
    rows = [(n, c, r) for n in SIZES for c in BUDGETS for r in ranks]
    candidates = tuple(Candidate(f"{n:.3g} {c:.3g} {r:g}", "lora", n, c / (6 * n), c, c, (r,)) for n, c, r in rows)
    true = {
        f"{n:.3g} {c:.3g} {r:g}": loss("lora", n, c / (6 * n)) * (1 + 0.01 * math.log(r / 128) ** 2) for n, c, r in rows
    }
    losses = {run: value * math.exp(0.003 * rng.standard_normal()) for run, value in true.items()}
    options = tuple(each for each in candidates if each.budget_flop == BUDGETS[-1])
    design = Design(Pool(candidates, options, settings=("rank",)))
    made, _, _ = spent(design, losses, 0.05 * design.pool.cost)
    best = design.answer(design.belief({run: losses[run] for run in made})).best
    assert best.settings == (128.0,)
    assert true[best.run] / min(true[each.run] for each in options) - 1 < 0.005


def test_a_replay_judges_by_the_rows_that_nobody_saw():
    question, losses = pool(noise=0.0)
    table = pd.DataFrame(
        [
            {"run": each.run, "method": each.method, "n_parameters": each.n_parameters, "tokens": each.tokens}
            | {"budget_flop": each.budget_flop, "loss": losses[each.run]}
            for each in question.candidates
        ]
    )
    given = replay_of(table)
    assert {each.budget_flop for each in given.pool.options} == {BUDGETS[-1]}
    assert not {each.run for each in given.pool.options} & {each.run for each in given.pool.candidates}
    found = pd.DataFrame(replay(given, repeats=1, shares=(0.15,)))
    assert (found["spent"] <= found["share"]).all() and (found["regret"] >= 0).all()
    by = found.set_index("spender")
    assert by.loc[DESIGN, "regret"] < 0.005 and by.loc[FULL, "error"] < 0.01
    assert by.loc[DESIGN, "error"] < by.loc["cheapest", "error"]
    largest = list(table["run"][table["budget_flop"] == BUDGETS[-1]])
    assert replay_of(table, largest).pool.question == "forecast"
    with pytest.raises(UserError, match="no budget has 5 sizes"):
        replay_of(table[table["budget_flop"] == BUDGETS[0]])
    with pytest.raises(UserError, match="selects no row"):
        replay_of(table, [])


@pytest.mark.slow
def test_the_command_writes_a_figure_and_a_csv(tmp_path, capsys):
    question, losses = pool()
    rows = [
        {"N": each.n_parameters, "D": each.tokens, "loss": losses[each.run], "part": "ab"[each in question.options]}
        for each in question.candidates
        if each.method == "full"
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    command = ["fit", str(tmp_path / "table.csv"), "--out", str(tmp_path / "out")]
    assert main([*command, "--replay", "part=b"]) == 0
    printed = capsys.readouterr().out
    assert "asked: the losses of 7 rows" in printed and "28 rows" in printed and "full grid" in printed
    found = pd.read_csv(tmp_path / "out" / "replay.csv")
    assert set(found["spender"]) >= {DESIGN, FULL, "random", "V-optimal"} and found["r2"].notna().all()
    assert (tmp_path / "out" / "replay.png").stat().st_size and (tmp_path / "out" / "replay.pdf").stat().st_size
    assert main([*command, "--replay", "part"]) == 2


@pytest.mark.slow
def test_a_simulated_sweep_says_what_an_adaptive_one_would_miss(tmp_path, capsys):
    rows = pd.DataFrame([("full", n, c) for n in SIZES for c in BUDGETS], columns=["method", "N", "C"])
    rows.to_csv(tmp_path / "grid.csv", index=False)
    command = [
        "fit",
        str(tmp_path / "grid.csv"),
        "--simulate",
        "E=1.7,A=400,B=410,alpha=0.34,beta=0.28",
        "--out",
        str(tmp_path),
    ]
    assert main([*command, "--replay", "largest", "--noise", "0.003"]) == 0
    printed = capsys.readouterr().out
    assert "best size of 7 rows" in printed and "35 rows" in printed
    (whole,) = [line for line in printed.splitlines() if line.startswith("full grid")]
    assert float(whole.split()[-2]) < 0.5, "the whole grid, whose runs know the answer, loses next to nothing"
    assert main([*command, "--replay", "part=a"]) == 2
    assert "with --simulate, allowed: largest" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.exists(), reason="the public tables are not there")
def test_a_tenth_of_farseer_forecasts_its_largest_runs():
    from analysis import runs

    rows = pd.read_csv(DATA / "farseer" / "runs.csv")
    targets = [f"row {i + 1}" for i in rows.index[rows["part"] == "target"]]
    given = replay_of(runs.load(rows, ignore=["part"]).table, targets)
    found = pd.DataFrame(replay(given, repeats=1, shares=(0.1,), spenders=(DESIGN,))).set_index("spender")
    assert found.loc[DESIGN, "r2"] > 0.93  # the best that was published at this cost
