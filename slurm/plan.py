"""Estimate a sweep before it is submitted: steps, tokens, FLOP, disk, GPU-hours, and the runs that cannot be run.

Every figure is computed from the grid, without SLURM, torch or weights. Tokens per pair are the mean of the store, or
the sweep file's assumption while the store does not exist. So steps are estimates; `training.plan` counts the tokens
when a run starts. Time is tokens / measured speed (`embedscale calibrate`), or exact FLOP / assumed share of the
device's peak; the table says which.
"""

import math
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from heapq import nlargest
from pathlib import Path
from typing import Any

from rich.table import Table

from embedscale.data.manifest import Manifest, is_finished
from embedscale.data.store import PairStore
from embedscale.errors import DONE, UserError
from embedscale.run.config import RunConfig
from embedscale.run.cost import PAPER_PAIR, Cost, cost_of
from embedscale.run.directory import RunDirectory
from embedscale.run.families import short_name
from embedscale.run.shape import BackboneShape
from embedscale.terminal import console
from embedscale.texts import counted, number, spread
from embedscale.training.plan import learning_rate_of, refuse_below_batch, refuse_unfit
from embedscale.training.pricing.calibration import Calibration
from embedscale.values import Damaged, print_json
from slurm import grid
from slurm.cluster import ResourceClass, shape_of
from slurm.grid import Sweep
from slurm.tables import Narrowed, duration, hours, size

CHECKPOINT_BYTES = 12  # of a trained parameter in a checkpoint: float32 weight and the two moments of AdamW
WEIGHT_BYTES = 4  # of a trained parameter in the final weights: float32
METRICS_ROW_BYTES = 160  # of a row of metrics
FEW_STEPS = 100  # below them, warm-up and noise decide the loss of a run


@dataclass(frozen=True)
class Pairs:
    """What is known about the data before a run starts."""

    manifest: Manifest | None
    """The store's own; None while the store does not exist."""
    pairs: int | None
    """Training pairs, or what the sweep file expects; if None, no run is refused for lack of data."""
    tokens_per_pair: float
    """Mean tokens of a pair, with the hard negatives that the run reads, or the sweep file's assumption."""


@dataclass(frozen=True)
class Estimate:
    """The cost of one run. If the run cannot be run, `obstacle` says why and the figures are zero."""

    run: RunConfig
    """Configuration of the run."""
    run_id: str
    """Id of the run."""
    resource_class: ResourceClass
    """The class that gives the run's job its memory, cores and time."""
    obstacle: str | None = None
    """Why the run cannot be run; None if it can."""
    learning_rate: float = 0.0
    """Peak of the schedule: stated, or by the paper's rule (section 4.1)."""
    tokens: int = 0
    """Tokens that the budget pays for."""
    pairs: int = 0
    """Number of pairs: `tokens` divided by the mean tokens of a pair."""
    steps: int = 0
    """Number of steps: `pairs` divided by the batch size, rounded up."""
    epochs: float | None = None
    """How often the run reads each pair of its store; None if nobody says how many pairs there are."""
    spent_flop: int = 0
    """FLOP that the budget pays for, by the paper's convention."""
    spent_flop_exact: int = 0
    """FLOP of the matrix products, attention and recomputation included."""
    seconds: float = 0.0
    """Duration of training in seconds, without evaluation and start."""
    measured: bool = False
    """Whether `seconds` follows from a measured speed; else from an assumed share of the device's peak."""
    disk_bytes: int = 0
    """Most disk space that the run directory takes while the run runs."""
    kept_bytes: int = 0
    """Disk space that the finished run takes."""

    @property
    def gpu_hours(self) -> float:
        """Hours of all devices; core-hours without GPUs."""
        return self.seconds / 3600 * self.run.resources.devices * self.run.resources.nodes

    @property
    def requeues(self) -> int:
        """How often the time limit ends the job before the run is done."""
        return max(0, math.ceil(self.seconds / 3600 / self.resource_class.hours) - 1)


@dataclass(frozen=True)
class SweepPlan:
    """The estimates of some runs of a sweep; every total is the sum over these runs."""

    sweep: Sweep
    """The sweep that the runs belong to."""
    estimates: list[Estimate]
    """One estimate for each run."""
    calibration: Calibration | None = None
    """Speeds that were measured on the cluster; None if none were."""

    @cached_property
    def by_id(self) -> dict[str, Estimate]:
        return {each.run_id: each for each in self.estimates}

    @property
    def runnable(self) -> list[Estimate]:
        return [each for each in self.estimates if each.obstacle is None]

    @property
    def blocked(self) -> list[Estimate]:
        return [each for each in self.estimates if each.obstacle is not None]

    @property
    def spent_flop(self) -> int:
        return sum(each.spent_flop for each in self.estimates)

    @property
    def gpu_hours(self) -> float:
        return sum(each.gpu_hours for each in self.estimates)

    @property
    def kept_bytes(self) -> int:
        return sum(each.kept_bytes for each in self.estimates)

    @property
    def disk_bytes(self) -> int:
        """Most disk space at once: what finished runs keep, and the largest checkpoints of runs at the same time."""
        at_once = self.sweep.cluster.max_gpus * self.sweep.cluster.side_by_side
        return self.kept_bytes + sum(nlargest(at_once, (each.disk_bytes - each.kept_bytes for each in self.estimates)))


def plan_sweep(sweep: Sweep) -> SweepPlan:
    """Estimate every run of a sweep. Raises UserError if the calibration file is missing or malformed."""
    estimator = _Estimator(sweep)
    estimates = [estimator.estimate(run_id, run) for run_id, run in sweep.by_id.items()]
    return SweepPlan(sweep, estimates, estimator.calibration)


@dataclass(frozen=True)
class PlanTable:
    """What `sweep plan --json` prints: totals, and a row for each run."""

    name: str
    folder: Path
    spent_flop: int
    device_hours: float
    disk_bytes: int
    kept_bytes: int
    runs: list[dict[str, Any]]


def as_table(plan: SweepPlan) -> PlanTable:
    """Return the plan for other programs: the figures of each run, beside the settings that tell it from the others."""
    rows = []
    for each in plan.estimates:
        run = each.run
        row = {"run_id": each.run_id, "backbone": run.backbone.name, "method": run.method.label, "budget": run.budget}
        row |= {"seed": run.training.seed, "resource_class": each.resource_class.name, "device_hours": each.gpu_hours}
        rows.append(row | {name: value for name, value in vars(each).items() if name not in (*row, "run")})
    totals = (plan.spent_flop, plan.gpu_hours, plan.disk_bytes, plan.kept_bytes)
    return PlanTable(plan.sweep.name, plan.sweep.folder, *totals, rows)


def refuse_above(plan: SweepPlan, max_gpu_hours: float | None) -> None:
    """Raise UserError if the plan is estimated to need more GPU-hours; None allows any number."""
    if max_gpu_hours is not None and not plan.gpu_hours <= max_gpu_hours:
        raise UserError(
            f"--max-gpu-hours: {plan.sweep.name} needs an estimated {hours(plan.gpu_hours)} {_unit(plan)}; "
            f"allowed: {max_gpu_hours:,g}"
        )


def _pairs_of(sweep: Sweep, folder: str, hard_negatives: int) -> Pairs:
    if not is_finished(folder):
        return Pairs(None, sweep.expected_pairs, sweep.expected_tokens_per_pair)
    store = PairStore.open(folder)
    read = min(hard_negatives, store.negatives)  # a run that wants more is refused
    mean = store.token_counts(read).mean() if read else store.manifest.tokens.training / store.pairs
    return Pairs(store.manifest, store.pairs, float(mean))


def _calibration(path: str | None) -> Calibration | None:
    """Return what was measured on the cluster; None if the cluster file names no measurement."""
    if path is None:
        return None
    found = Calibration.read(Path(path))
    if found is None:
        raise UserError(f"calibration: {path}: the file does not exist; run `embedscale calibrate` on a node")
    if isinstance(found, Damaged):
        raise UserError(f"calibration: {path}: is not a file of `embedscale calibrate` ({found.why}); measure again")
    return found


MORE = "add sources, lower the budget, or set data.repeat=true"


class _Estimator:
    """Estimates the runs of one sweep; shapes, stores and costs that runs share are looked up once."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.calibration = _calibration(sweep.cluster.calibration)
        self.shape_of = cache(shape_of)
        self.pairs_of = cache(partial(_pairs_of, sweep))
        self.costs: dict[str, Cost] = {}

    def cost_of(self, run: RunConfig, shape: BackboneShape) -> Cost:
        checkpointing = run.resources.activation_checkpointing
        key = f"{run.backbone.name} {run.backbone.revision} {run.method!r} {checkpointing}"
        if key not in self.costs:
            self.costs[key] = cost_of(shape, run.method, checkpointing)
        return self.costs[key]

    def estimate(self, run_id: str, run: RunConfig) -> Estimate:
        cluster, resource_class = self.sweep.cluster, self.sweep.cluster.class_of(None)
        try:
            shape = self.shape_of(run.backbone.name, run.backbone.revision)
            resource_class = cluster.class_of(shape.parameters)
            if shape.parameters > resource_class.up_to:
                raise UserError(
                    f"classes.up_to: {shape.parameters:,} parameters are more than every class of "
                    f"{self.sweep.cluster_file} takes; add a class"
                )
            cost = self.cost_of(run, shape)
            rate = learning_rate_of(run)
            if rate is None:
                raise UserError(_no_rate(run))
            data = self.pairs_of(run.data.store, run.loss.hard_negatives)
            refuse_unfit(run, shape, data.manifest)
            tokens = cost.tokens_of(run.budget)
            pairs = int(tokens / data.tokens_per_pair)
            refuse_below_batch(run, pairs)
            if data.pairs is not None and pairs > data.pairs and not run.data.repeat:
                what = "holds" if data.manifest else "is expected to hold"
                raise UserError(f"the data are too small: {run.data.store} {what} {data.pairs:,} pairs; {MORE}")
        except UserError as error:
            return Estimate(run, run_id, resource_class, str(error))
        batch = run.training.batch_size
        steps = math.ceil(pairs / batch)
        chunk = run.resources.chunk_tokens
        chunked = chunk is not None and chunk < batch * data.tokens_per_pair
        # Both texts of a pair count as equally long; attention has a small share of the FLOP at these lengths.
        exact = cost.exact(tokens, int(tokens * data.tokens_per_pair / 2), extra_forwards=int(chunked))
        speed = self.calibration.speed_of(run) if self.calibration else None
        assumed = cluster.peak_flop_per_second * resource_class.utilisation
        devices = run.resources.devices * run.resources.nodes
        trained = cost.n_updated + run.method.embedding_parameters(shape)
        kept = trained * WEIGHT_BYTES + METRICS_ROW_BYTES * (steps // run.resources.log_every + 1)
        return Estimate(
            run,
            run_id,
            resource_class,
            learning_rate=rate,
            tokens=tokens,
            pairs=pairs,
            steps=steps,
            epochs=pairs / data.pairs if data.pairs else None,
            spent_flop=tokens * cost.flop_per_token,
            spent_flop_exact=exact,
            seconds=(tokens / speed if speed else exact / assumed) / devices,
            measured=speed is not None,
            disk_bytes=kept + trained * 2 * CHECKPOINT_BYTES,  # the older one goes when the newer one is complete
            kept_bytes=kept,
        )


def _no_rate(run: RunConfig) -> str:
    """Say where the learning rate belongs: in `base` or `axes`, it would replace the rates of all methods."""
    return (
        f"backbones[].learning_rate: the paper's rule has no value for {short_name(run.backbone.name)}; give this "
        f"backbone's entry a learning_rate: {{name: {run.backbone.name}, learning_rate: …}}"
    )


def _unit(plan: SweepPlan) -> str:
    return "GPU-hours" if any(each.resource_class.gpus for each in plan.estimates) else "device-hours"


def print_plan(plan: SweepPlan, each: bool = False) -> None:
    """Print the plan, with a row for each backbone and method or, with `each`, for each run."""
    output, unit = console(160), _unit(plan)
    if plan.runnable:
        output.print(_table(plan, unit, each))
    if plan.blocked:
        output.print(_blocked_table(plan.blocked))
    for line in _footnotes(plan, unit):
        output.print(line, soft_wrap=True)


def _table(plan: SweepPlan, unit: str, each: bool) -> Narrowed:
    title = f"{plan.sweep.name}: {counted(len(plan.runnable), 'run')} under {plan.sweep.folder}"
    table = Table(title=title, title_justify="left")
    table.add_column("run" if each else "backbone", overflow="fold")
    if not each:
        table.add_column("method", no_wrap=True)
    labels = len(table.columns)
    total = _figures(plan.runnable, unit) | {"rate": ""}
    names = [name for name in total if not (each and name == "runs")]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[Estimate]] = defaultdict(list)
    for estimate in plan.runnable:
        run = estimate.run
        groups[(estimate.run_id,) if each else (short_name(run.backbone.name), run.method.name)].append(estimate)
    for cells, members in groups.items():
        figures = _figures(members, unit)
        table.add_row(*cells, *(figures[name] for name in names))
    table.add_section()
    table.add_row("total", *[""] * (labels - 1), *(total[name] for name in names), style="bold")
    return Narrowed(table, "requeues", "kept", "longest", "tokens", "FLOP", "rate")


def _figures(members: list[Estimate], unit: str) -> dict[str, str]:
    """Return the cells of a row by the names of their columns."""
    rates, steps = ([getattr(each, name) for each in members] for name in ("learning_rate", "steps"))
    return {
        "rate": number(rates[0]) if min(rates) == max(rates) else spread((min(rates), max(rates))),
        "runs": f"{len(members):,}",
        "steps": f"{min(steps):,}" + (f" … {max(steps):,}" if max(steps) > min(steps) else ""),
        "tokens": f"{sum(each.tokens for each in members):.3g}",
        "FLOP": f"{sum(each.spent_flop for each in members):.3g}",
        unit: hours(sum(each.gpu_hours for each in members)),
        "longest": duration(max(each.seconds for each in members)),
        "requeues": f"{sum(each.requeues for each in members):,}",
        "kept": size(sum(each.kept_bytes for each in members)),
    }


def _blocked_table(blocked: list[Estimate]) -> Table:
    """Return a table with a row for each reason."""
    table = Table(title=f"{counted(len(blocked), 'run')} cannot be run", title_justify="left")
    for name in ("why", "backbones", "methods", "budgets, FLOP", "runs"):
        table.add_column(name, justify="right" if name == "runs" else "left")
    reasons: dict[str, list[RunConfig]] = defaultdict(list)
    for each in blocked:
        reasons[each.obstacle or ""].append(each.run)
    for why, runs in sorted(reasons.items()):
        columns = (
            [short_name(run.backbone.name) for run in runs],
            [run.method.label for run in runs],
            [f"{run.budget:g}" for run in sorted(runs, key=lambda run: run.budget)],
        )
        table.add_row(why, *(", ".join(dict.fromkeys(column)) for column in columns), f"{len(runs):,}")
    return table


def _footnotes(plan: SweepPlan, unit: str) -> Iterable[str]:
    sweep, cluster, runs = plan.sweep, plan.sweep.cluster, plan.runnable
    done = sum(RunDirectory(each.run.folder).record.exists() for each in runs)
    if done:
        yield f"Done already: {done:,} of these runs."
    if sweep.excluded:
        yield f"Left out by the file's exclude rows: {counted(sweep.excluded, 'run')} of the grid."
    for name in sweep.idle:
        yield f"{name} matches no run of the grid."
    few = sum(each.steps < FEW_STEPS for each in runs)
    if few:
        of = counted(len(runs), "run")
        yield f"{few:,} of {of} have fewer than {FEW_STEPS} steps: their losses say little about the law."
    repeating = [each.epochs for each in runs if each.epochs is not None and each.epochs > 1]
    if repeating:
        yield (
            f"{len(repeating):,} of {counted(len(runs), 'run')} have more than one epoch, up to "
            f"{number(max(repeating))}: the laws are for pairs that no run reads twice."
        )
    yield from _about_speed(plan, unit)
    missing = sorted({each.run.data.store for each in plan.estimates if not is_finished(each.run.data.store)})
    if missing:
        paper = sweep.expected_tokens_per_pair == PAPER_PAIR
        mean = "the paper's mean for texts of context 75; for others, set expected_tokens_per_pair"
        yield (
            f"Steps: {sweep.expected_tokens_per_pair:g} tokens per pair are assumed "
            f"({mean if paper else 'expected_tokens_per_pair'}); these stores do not exist yet: {', '.join(missing)}."
        )
    if sweep.cluster_file is None:
        yield (
            f"No cluster file is named (cluster): up to {cluster.max_gpus} {cluster.device}s under SLURM are assumed, "
            "as `embedscale config --of cluster` lists."
        )
    requeues = sum(each.requeues for each in runs)
    limits = ", ".join(sorted({f"{each.resource_class.hours:g} h" for each in runs if each.requeues}))
    if requeues:
        yield f"Requeues: {requeues:,} by the time limits ({limits}); preemptions come in addition."
    if runs:
        yield (
            f"Disk: {size(plan.kept_bytes)} stay, weights and metrics; at most {size(plan.disk_bytes)} at once, with "
            f"checkpoints of {counted(min(len(runs), cluster.max_gpus * cluster.side_by_side), 'run')}."
        )


def _about_speed(plan: SweepPlan, unit: str) -> Iterable[str]:
    cluster, assumed = plan.sweep.cluster, [each for each in plan.runnable if not each.measured]
    measured = len(plan.runnable) - len(assumed)
    if measured:
        yield f"{unit}: {counted(measured, 'run')} at the speed measured in {cluster.calibration}."
    if plan.calibration:
        for gap, runs in Counter(plan.calibration.gap(each.run) for each in assumed).items():
            yield f"{cluster.calibration} {gap}: the speed of {counted(runs, 'run')} is assumed."
    if assumed:
        shares = {each.resource_class.name: each.resource_class.utilisation for each in assumed}
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        yield (
            f"{unit}: an assumed share of {cluster.device}'s {cluster.peak_flop_per_second:.3g} FLOP/s ({listed}), "
            "without evaluation and start-up; `embedscale calibrate` measures the speed."
        )


def command(args: Namespace) -> int:
    """`embedscale sweep plan SWEEP.yaml [key=value …] [--max-gpu-hours H] [--each]`."""
    plan = plan_sweep(grid.load(args.sweep, args.words))
    if args.json:
        print_json(as_table(plan))
    else:
        print_plan(plan, each=args.each)
    if not plan.runnable:
        raise UserError(f"{args.sweep}: none of its {counted(len(plan.blocked), 'run')} can be run, as said above")
    refuse_above(plan, args.max_gpu_hours)
    return DONE
