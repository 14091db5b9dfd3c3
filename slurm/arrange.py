"""How runs become jobs: which runs share a job, which jobs share an array, and how many jobs run at the same time.

Runs that ask for the same resources share an array, short runs share a job, and all arrays together never hold more
GPUs than the cluster file allows. The price of a fixed share for each array: an array that ends early leaves its GPUs
to no other one, except to the arrays that waited for it.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from embedscale.errors import UserError
from slurm.cluster import Cluster, ResourceClass
from slurm.plan import Estimate
from slurm.scheduler.scheduler import Array, Limits

SPARED = 0.2  # share of a job's time limit that a bundle of runs leaves free


def arrange(estimates: Sequence[Estimate], cluster: Cluster, limits: Limits, scores: Sequence[str] = ()) -> list[Array]:
    """Group runs into jobs, and jobs of equal shape into arrays of at most `limits.jobs_per_array` jobs."""
    shapes: dict[tuple[ResourceClass, int, int], list[Estimate]] = defaultdict(list)
    for each in estimates:
        resources = each.run.resources
        if limits.foreground:  # nothing but the number of cores matters
            shape = ResourceClass(cpus=each.resource_class.cpus)
        else:  # fields that only the plan reads must not separate runs
            shape = replace(each.resource_class, name="", up_to=math.inf, utilisation=1.0)
        shapes[shape, resources.nodes, resources.devices].append(each)
    arrays = []
    for (shape, nodes, devices), members in shapes.items():
        alone = limits.foreground or nodes * devices > 1
        jobs = [[each] for each in members] if alone else _bundles(members, cluster, shape.hours)
        tasks = [{each.run_id: each.run for each in job} for job in jobs]
        size = math.ceil(len(tasks) / math.ceil(len(tasks) / limits.jobs_per_array))
        arrays += [Array(shape, nodes, devices, tasks[i : i + size], tuple(scores)) for i in range(0, len(tasks), size)]
    return arrays


def _bundles(estimates: Sequence[Estimate], cluster: Cluster, hours: float) -> list[list[Estimate]]:
    """Group runs of one process into jobs of about `bundle_minutes`, the longest runs first."""
    limit = min(60 * cluster.bundle_minutes, (1 - SPARED) * 3600 * hours) * cluster.side_by_side
    bundles: list[list[Estimate]] = []
    room = 0.0
    for each in sorted(estimates, key=lambda each: -each.seconds):
        if not bundles or each.seconds > room:
            bundles.append([])
            room = limit
        bundles[-1].append(each)
        room -= each.seconds
    return bundles


def throttles(arrays: Sequence[Array], max_gpus: int, held: Sequence[tuple[str, int]]) -> list[tuple[int, list[str]]]:
    """Return for each array how many of its jobs may run at once, and the jobs after whose end it may begin.

    All arrays together, with those in the queue that `held` names (job number, GPUs), stay within `max_gpus`. An array
    for which no GPU is left takes over those of earlier arrays. The result names this call's own arrays by index: "#0".
    Raises UserError if one run needs more than `max_gpus`.
    """
    holders = list(held)
    free = max(0, max_gpus - sum(gpus for _, gpus in held))
    result = []
    for index, array in enumerate(arrays):
        if array.gpus > max_gpus:
            raise UserError(f"max_gpus: {max_gpus} are fewer than the {array.gpus} that one run needs")
        wanted = [len(each.tasks) * each.gpus for each in arrays[index:]]
        after: list[str] = []
        if free >= array.gpus:
            parallel = min(len(array.tasks), max(1, int(free * wanted[0] / sum(wanted)) // array.gpus))
            free -= parallel * array.gpus
        else:
            share, free = free, 0
            while share < array.gpus:
                job, gpus = holders.pop(0)
                after.append(job)
                share += gpus
            parallel = min(len(array.tasks), share // array.gpus)
            if share > parallel * array.gpus:  # the last holder has more than this array takes over
                holders.insert(0, (after[-1], share - parallel * array.gpus))
        holders.append((f"#{index}", parallel * array.gpus))
        result.append((parallel, after))
    return result
