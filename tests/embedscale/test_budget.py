"""The plan against plain counting: what a budget buys, the schedule, evaluations and averaged steps."""

import math

import numpy as np
import pytest

from embedscale.data.store import PairStore
from embedscale.errors import UserError
from embedscale.run.cost import cost_of
from embedscale.run.families import shape_by_name
from embedscale.run.settings import load
from embedscale.training.plan import TrainingPlan, plan_run


def planned(tiny_run, *words) -> TrainingPlan:
    config = load(None, [*tiny_run, "budget=5e9", *words])
    return plan_run(config, shape_by_name(config.backbone.name), PairStore.open(config.data.store))


@pytest.mark.parametrize("method", [["method.name=full"], ["method.name=lora", "method.rank=3"]])
@pytest.mark.parametrize("seed, devices", [(0, 1), (1, 1), (2, 4)])
def test_a_budget_buys_whole_pairs_up_to_its_last_flop(tiny_run, method, seed, devices):
    words = [*method, f"training.seed={seed}", f"resources.devices={devices}", "data.repeat=true"]
    config = load(None, [*tiny_run, "budget=1", *words])
    store = PairStore.open(config.data.store)
    price = cost_of(shape_by_name(config.backbone.name), config.method).flop_per_token
    first = planned(tiny_run, *words).first_pair
    spent, pairs = [0], store.token_counts().tolist()
    for number in range(len(pairs) + 8):  # after the last pair, the first comes again
        spent.append(spent[-1] + price * pairs[(first + number) % len(pairs)])
    for bought in (1, 2, 15, 16, 17, 18, 31, 100, len(pairs) - 1, len(pairs), len(pairs) + 8):
        whole = bought - bought % devices
        for budget in (
            spent[bought],
            spent[bought] + 1,
            spent[bought] + price * pairs[(first + bought) % len(pairs)] - 1,
        ):
            if whole < 16:
                least = "less than one batch of 16 pairs" if whole else "too small; one pair for each of 4 GPUs costs"
                with pytest.raises(UserError, match=least):
                    planned(tiny_run, *words, f"budget={budget}")
                continue
            plan = planned(tiny_run, *words, f"budget={budget}")
            assert (plan.pairs, plan.spent_flop) == (whole, spent[whole]), (bought, budget)
            assert plan.steps == math.ceil(whole / 16) and plan.tokens * price == plan.spent_flop
            stops = [plan.pairs_of(step) for step in range(plan.steps)]
            assert [start for start, _ in stops] == [first + 16 * step for step in range(plan.steps)]
            assert [stop for _, stop in stops] == [start for start, _ in stops[1:]] + [first + whole]


def test_seeds_begin_at_different_pairs_of_one_order(tiny_run):
    assert len({planned(tiny_run, f"training.seed={seed}").first_pair for seed in range(8)}) == 8


def plan_of(steps: int, pairs: int | None = None, warmup: int = 0, final: float = 0.0) -> TrainingPlan:
    pairs = 10 * steps if pairs is None else pairs
    return TrainingPlan(1e9, 0, 1, 0, pairs, steps, 10, 0, 1, 2e-3, warmup, final, "", "", [])


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_learning_rate_warms_up_and_falls_by_a_cosine_until_the_budget_ends(final):
    plan = plan_of(steps=110, warmup=10, final=final)
    rates = np.array([plan.learning_rate_at(step) for step in range(110)])
    assert rates[:10] == pytest.approx(2e-3 * np.arange(1, 11) / 10)
    assert rates[10] == 2e-3
    low = final * 2e-3
    half, quarter = rates[60] - low, rates[35] - low  # halfway and a quarter of the way down
    assert half == pytest.approx((2e-3 - low) / 2) and quarter == pytest.approx((2e-3 - low) * (1 + 0.5**0.5) / 2)
    assert plan.learning_rate_at(110) == pytest.approx(low)  # of the step after the last
    assert (np.diff(rates[10:]) < 0).all()


@pytest.mark.parametrize(
    "steps, pairs, averaged",
    [
        (100, 1000, range(95, 100)),
        (101, 1005, range(95, 100)),  # the last batch is cut and has fewer negatives
        (20, 200, range(19, 20)),
        (1, 3, range(1)),
    ],
)
def test_the_training_loss_averages_the_last_twentieth_of_the_full_batches(steps, pairs, averaged):
    assert plan_of(steps, pairs).averaged_steps == averaged


def test_warm_up_and_evaluations_are_fractions_of_the_steps(tiny_run):
    plan = planned(tiny_run, "training.warmup_fraction=0.25", "evaluation.at=[0.001,0.5,1]")
    assert plan.warmup_steps == math.ceil(plan.steps / 4)
    assert plan.evaluate_after == [1, math.ceil(plan.steps / 2), plan.steps]


@pytest.mark.parametrize("word", ["evaluation.pool=32", "evaluation.negatives=15", "evaluation.temperature=0.3"])
def test_settings_that_make_losses_incomparable_change_the_evaluation_digest(tiny_run, word):
    assert planned(tiny_run, word).evaluation_digest != planned(tiny_run).evaluation_digest
    assert planned(tiny_run, "training.seed=3").evaluation_digest == planned(tiny_run).evaluation_digest
