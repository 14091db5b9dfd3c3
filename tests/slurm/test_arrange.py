"""How runs become jobs and arrays, and how many jobs run at once."""

import random

import pytest

from embedscale.errors import UserError
from embedscale.run.config import Resources, RunConfig, Training
from slurm.arrange import arrange, throttles
from slurm.cluster import Cluster, ResourceClass
from slurm.plan import Estimate
from slurm.scheduler.scheduler import Array, Limits

SMALL = ResourceClass("small", gpus=1, cpus=4, hours=4)
LARGE = ResourceClass("large", gpus=2, cpus=8, hours=24)


def estimates(count, seconds, shape=SMALL, devices=1):
    runs = [RunConfig(training=Training(seed=i), resources=Resources(devices=devices)) for i in range(count)]
    return [Estimate(run, f"{run.run_id}-{shape.name}", shape, seconds=seconds) for run in runs]


def test_six_hundred_runs_of_a_minute_are_ten_jobs():
    arrays = arrange(estimates(600, 60.0), Cluster(bundle_minutes=60), Limits())
    (array,) = arrays
    assert [len(task) for task in array.tasks] == [60] * 10
    assert len({run_id for task in array.tasks for run_id in task}) == 600
    (side_by_side,) = arrange(estimates(600, 60.0), Cluster(bundle_minutes=60, side_by_side=5), Limits())
    assert len(side_by_side.tasks) == 2
    brief = ResourceClass("brief", gpus=1, cpus=4, hours=0.5)
    (within_the_limit,) = arrange(estimates(600, 60.0, brief), Cluster(bundle_minutes=60), Limits())
    assert [len(task) for task in within_the_limit.tasks] == [24] * 25  # jobs of 30 minutes keep a fifth in reserve


def test_long_runs_and_runs_of_several_gpus_have_a_job_each():
    together = estimates(3, 7200.0) + estimates(3, 60.0) + estimates(3, 60.0, LARGE, devices=2)
    arrays = arrange(together, Cluster(bundle_minutes=60), Limits())
    assert [(array.gpus, [len(task) for task in array.tasks]) for array in arrays] == [
        (1, [1, 1, 1, 3]),
        (2, [1, 1, 1]),
    ]


def test_classes_that_ask_for_the_same_share_an_array():
    alike = ResourceClass("other name", up_to=1e9, gpus=1, cpus=4, hours=4, utilisation=0.2)
    (array,) = arrange(estimates(2, 7200.0) + estimates(2, 7200.0, alike), Cluster(), Limits())
    assert len(array.tasks) == 4


@pytest.mark.parametrize(("runs", "largest"), [(2500, 1001), (1001, 1001), (1002, 1001), (5, 1)])
def test_arrays_are_split_and_add_up(runs, largest):
    arrays = arrange(estimates(runs, 7200.0), Cluster(), Limits(largest))
    assert sum(len(array.tasks) for array in arrays) == runs
    assert max(len(array.tasks) for array in arrays) <= largest
    assert len({run for array in arrays for task in array.tasks for run in task}) == runs


def worst_case(arrays, limits, held, rng):
    """Return the most GPUs held at once, if each array holds its maximum until it ends, in any order."""
    holding, ended, most = dict(held), set(), 0
    waiting = {
        f"#{i}": (parallel * array.gpus, after)
        for i, (array, (parallel, after)) in enumerate(zip(arrays, limits, strict=True))
    }
    while holding or waiting:
        for name, (gpus, after) in list(waiting.items()):
            if ended >= set(after):
                holding[name] = gpus
                del waiting[name]
        most = max(most, sum(holding.values()))
        assert holding, f"nothing can ever begin of {waiting}"
        ended.add(name := rng.choice(sorted(holding)))
        del holding[name]
    return most


def test_all_arrays_together_stay_within_the_throttle():
    rng = random.Random(0)
    for _ in range(500):
        most = rng.randint(1, 64)
        arrays = [
            Array(SMALL, 1, rng.choice([d for d in (1, 2, 4, 8) if d <= most]), [{}] * rng.randint(1, 50))
            for _ in range(rng.randint(1, 12))
        ]
        held = [("41", rng.randint(1, most))] if rng.random() < 0.5 else []
        limits = throttles(arrays, most, held)
        assert worst_case(arrays, limits, held, rng) <= most
        assert all(parallel >= 1 for parallel, _ in limits)
    assert [p for p, _ in throttles([Array(SMALL, 1, 1, [{}] * n) for n in (834, 833, 833)], 8, [])] == [2, 3, 3]
    with pytest.raises(UserError, match=r"max_gpus: 4 are fewer than the 8"):
        throttles([Array(LARGE, 1, 8, [{}])], 4, [])


def test_on_this_machine_each_run_is_a_job():
    other = ResourceClass("other", gpus=1, cpus=4, hours=24, memory_gb=99, partition="long")
    arrays = arrange(estimates(3, 60.0) + estimates(2, 60.0, other), Cluster(), Limits(foreground=True))
    assert [[len(task) for task in array.tasks] for array in arrays] == [[1] * 5]
    arrays = arrange(estimates(2, 60.0) + estimates(1, 60.0, LARGE), Cluster(), Limits(foreground=True))
    assert [len(array.tasks) for array in arrays] == [2, 1]
