"""What a sweep will cost, before anything is submitted: steps, tokens, FLOP, disk, GPU-hours, and what cannot be run.

Every figure is arithmetic on the grid: no SLURM, no torch, no weights. Tokens a pair are the store's mean, or the
sweep file's assumption until the store is there; `training.plan` counts them exactly when a run starts. Time is the
exact FLOP over a measured speed (`calibrate`) or over an assumed share of the device's peak, which the table states.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from embedscale.data.manifest import is_finished
from embedscale.data.store import PairStore
from embedscale.errors import DONE, UserError
from embedscale.files import read_json
from embedscale.run.config import RunConfig, bounded
from embedscale.run.cost import Cost, cost_of
from embedscale.run.directory import RunDirectory
from embedscale.run.families import known, short_name
from embedscale.run.shape import BackboneShape
from slurm import grid
from slurm.cluster import ResourceClass, shape_of
from slurm.grid import Sweep

CHECKPOINT_BYTES = 12  # a trained parameter: float32 weight and AdamW's two moments
WEIGHT_BYTES = 4
METRICS_ROW_BYTES = 160


@dataclass(frozen=True)
class Pairs:
    """What is known of the data before a run starts."""

    pairs: int | None  # None: unknown, no run is refused for want of data
    tokens_per_pair: float
    counted: bool  # in the store, not assumed
    context: int | None = None
    held_out: int | None = None
    negatives: int | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Estimate:
    """One run's cost, or why it cannot be run; then the figures are zero."""

    run: RunConfig
    run_id: str
    resource_class: ResourceClass
    obstacle: str | None = None
    learning_rate: float = 0.0
    tokens: int = 0
    pairs: int = 0
    steps: int = 0
    flop: int = 0  # the paper's convention, what the budget pays for
    exact_flop: int = 0  # that really run
    seconds: float = 0.0  # of wall clock
    measured: bool = False  # the speed was
    disk_bytes: int = 0  # at most, while it runs

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.run.resources.devices * self.run.resources.nodes

    @property
    def requeues(self) -> int:
        """How often the time limit will end the job before the run is done."""
        return max(0, math.ceil(self.seconds / 3600 / self.resource_class.hours) - 1)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep's estimates; every total is the sum of its runs."""

    sweep: Sweep
    estimates: list[Estimate]

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
    def flop(self) -> int:
        return sum(each.flop for each in self.estimates)

    @property
    def gpu_hours(self) -> float:
        return sum(each.gpu_hours for each in self.estimates)

    @property
    def disk_bytes(self) -> int:
        return sum(each.disk_bytes for each in self.estimates)


def plan_sweep(sweep: Sweep) -> SweepPlan:
    """Estimate every run of a sweep. Raises UserError for a calibration file that is missing or malformed."""
    estimator = _Estimator(sweep)
    return SweepPlan(sweep, [estimator.estimate(run_id, run) for run_id, run in sweep.by_id.items()])


def refuse_above(plan: SweepPlan, max_gpu_hours: float | None) -> None:
    """Raises UserError where the sweep is estimated to need more."""
    if max_gpu_hours is not None and not plan.gpu_hours <= max_gpu_hours:
        raise UserError(
            f"--max-gpu-hours: {plan.sweep.name} needs an estimated {plan.gpu_hours:,.2f} GPU-hours; "
            f"allowed: {max_gpu_hours:,g}"
        )


def _pairs_of(sweep: Sweep, folder: str, hard_negatives: int) -> Pairs:
    try:
        store = PairStore.open(folder)
    except UserError:
        return Pairs(sweep.expected_pairs, sweep.expected_tokens_per_pair, counted=False)
    if not hard_negatives:
        mean = store.manifest.tokens.training / store.pairs
    elif hard_negatives <= store.negatives:
        mean = float(store.token_counts(hard_negatives).mean())
    else:
        mean = 1.0  # refused below, by _check_data
    return Pairs(store.pairs, mean, True, store.context, store.held_out, store.negatives, store.vocabulary)


def _measured_speeds(path: str | None) -> dict[tuple[str, str], float]:
    """Tokens a second of one device, by backbone and method (its label, lora-r32, or its name alone)."""
    if path is None:
        return {}
    found = read_json(Path(path))
    if found is None:
        raise UserError(f"calibration: {path}: there is no such file; run `embedscale calibrate` on a node")
    try:
        speeds = {(each["backbone"], each["method"]): float(each["tokens_per_second"]) for each in found["rows"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"calibration: {path}: does not hold what `embedscale calibrate` writes") from None
    for pair, speed in speeds.items():
        bounded(f"calibration: {path}: tokens_per_second of {' '.join(pair)}", speed, 0, above=True)
    return speeds


class _Estimator:
    """Estimates runs of one sweep; what many runs share is looked up once."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.speeds = _measured_speeds(sweep.cluster.calibration)
        self.shape_of = cache(shape_of)
        self.pairs_of = cache(partial(_pairs_of, sweep))
        self.costs: dict[str, Cost] = {}

    def cost_of(self, run: RunConfig, shape: BackboneShape) -> Cost:
        checkpointing = run.resources.activation_checkpointing
        key = f"{shape.name} {run.method!r} {checkpointing}"
        if key not in self.costs:
            self.costs[key] = cost_of(shape, run.method, checkpointing)
        return self.costs[key]

    def estimate(self, run_id: str, run: RunConfig) -> Estimate:
        cluster, resource_class = self.sweep.cluster, self.sweep.cluster.class_of(None)
        try:
            shape = self.shape_of(run.backbone.name)
            resource_class = cluster.class_of(shape.parameters)
            cost = self.cost_of(run, shape)
            rate = _learning_rate(run)
            data = self.pairs_of(run.data.store, run.loss.hard_negatives)
            _check_data(run, shape, data)
            tokens = cost.tokens_of(run.budget)
            pairs = int(tokens / data.tokens_per_pair)
            batch = run.training.batch_size
            if pairs < batch:
                raise UserError(f"the budget is below one batch of {batch} pairs")
            if data.pairs is not None and pairs > data.pairs and not run.data.repeat:
                what = "holds" if data.counted else "is expected to hold"
                raise UserError(f"the data are too small: {run.data.store} {what} {data.pairs:,} pairs")
        except UserError as error:
            return Estimate(run, run_id, resource_class, str(error))
        steps = math.ceil(pairs / batch)
        chunk = run.resources.chunk_tokens
        chunked = chunk is not None and chunk < batch * data.tokens_per_pair
        # A pair's two texts are taken as equally long: the attention's share is small at these lengths.
        exact = cost.exact(tokens, int(tokens * data.tokens_per_pair / 2), extra_forwards=int(chunked))
        backbone = short_name(run.backbone.name)
        speed = self.speeds.get((backbone, run.method.label)) or self.speeds.get((backbone, run.method.name))
        assumed = cluster.peak_flop_per_second * resource_class.utilisation
        devices = run.resources.devices * run.resources.nodes
        return Estimate(
            run,
            run_id,
            resource_class,
            learning_rate=rate,
            tokens=tokens,
            pairs=pairs,
            steps=steps,
            flop=tokens * cost.flop_per_token,
            exact_flop=exact,
            seconds=(tokens / speed if speed else exact / assumed) / devices,
            measured=speed is not None,
            disk_bytes=_disk(run, shape, cost, steps),
        )


def _learning_rate(run: RunConfig) -> float:
    if run.training.learning_rate is not None:
        return run.training.learning_rate
    row = known(run.backbone.name)
    rate = run.method.peak_learning_rate(row.pretraining_learning_rate if row else None)
    if rate is None:
        raise UserError(
            f"training.learning_rate: the paper's rule knows none for {short_name(run.backbone.name)}; state it"
        )
    return rate


def _check_data(run: RunConfig, shape: BackboneShape, data: Pairs) -> None:
    """The refusals of `embedscale.training.plan` that need no counts."""
    context, pool, devices = run.data.context, run.evaluation.pool, run.resources.devices * run.resources.nodes
    if context > shape.context:
        raise UserError(f"data.context: {context} tokens are longer than {shape.name}'s {shape.context}")
    if data.context is not None and data.context != context:
        raise UserError(f"data.context: {context}, but {run.data.store} was prepared with {data.context}")
    if data.held_out is not None and data.held_out < pool:
        raise UserError(f"evaluation.pool: {pool}, but {run.data.store} holds {data.held_out} held-out pairs")
    if data.vocabulary is not None and data.vocabulary > shape.vocabulary:
        raise UserError(f"data.tokenizer: {data.vocabulary} tokens, but {shape.name} has {shape.vocabulary} embeddings")
    if data.negatives is not None and data.negatives < run.loss.hard_negatives:
        raise UserError(f"loss.hard_negatives: {run.loss.hard_negatives}, but {run.data.store} holds {data.negatives}")
    if run.training.batch_size % devices:
        raise UserError(f"training.batch_size: {run.training.batch_size} does not divide by {devices} GPUs")


def _disk(run: RunConfig, shape: BackboneShape, cost: Cost, steps: int) -> int:
    """Two checkpoints at most (the newest is complete before the one before goes), the final weights, the metrics."""
    trained = cost.n_updated + run.method.embedding_parameters(shape)
    metrics = METRICS_ROW_BYTES * (steps // run.resources.log_every + 1)
    return trained * (2 * CHECKPOINT_BYTES + WEIGHT_BYTES) + metrics


def analysis_rows(path: str | Path) -> Any:
    """The sweep's runnable runs as the DataFrame that `analysis.simulate` draws losses for, a row a run."""
    import pandas as pd

    rows = []
    for each in plan_sweep(grid.load(path)).runnable:
        run, shape = each.run, shape_of(each.run.backbone.name)
        cost = cost_of(shape, run.method)
        rows.append(
            {
                "run": each.run_id,
                "method": run.method.name,
                "backbone": short_name(run.backbone.name),
                "params": cost.n_parameters,
                "budget": run.budget,
                "tokens": each.tokens,
                "flop_per_token": cost.flop_per_token,
                "trainable_fraction": cost.trainable_fraction,
                "rank": run.method.rank,
                "learning_rate": each.learning_rate,
                "batch_size": run.training.batch_size,
                "seed": run.training.seed,
            }
        )
    return pd.DataFrame(rows)


def print_plan(plan: SweepPlan, each: bool = False) -> None:
    """Print the plan, a row for each backbone and method, or for each run."""
    sweep, terminal = plan.sweep, Console()
    console = terminal if terminal.is_terminal else Console(width=160)
    on_gpus = any(estimate.resource_class.gpus for estimate in plan.estimates)
    unit = "GPU-hours" if on_gpus else "core-hours"
    table = Table(title=f"{sweep.name}: {len(plan.runnable):,} runs under {sweep.folder}", title_justify="left")
    table.add_column("run" if each else "backbone", overflow="fold")
    names = ["runs", "steps", "tokens", "FLOP", unit, "longest", "requeues", "disk"]
    for name in ["learning rate", *names[1:]] if each else ["method", *names]:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    groups: dict[tuple[str, ...], list[Estimate]] = defaultdict(list)
    for estimate in plan.runnable:
        run = estimate.run
        key = (estimate.run_id, f"{estimate.learning_rate:.3g}")
        groups[key if each else (short_name(run.backbone.name), run.method.name)].append(estimate)
    for cells, members in groups.items():
        table.add_row(*cells, *_figures(members)[1 if each else 0 :])
    table.add_section()
    table.add_row("in all", "", *_figures(plan.runnable)[1 if each else 0 :], style="bold")
    console.print(Narrowed(table, "requeues", "disk", "longest", "tokens", "FLOP"))
    _print_blocked(console, plan.blocked)
    for line in _footnotes(plan, unit):
        console.print(line, highlight=False, soft_wrap=True)


class Narrowed:
    """A table that leaves out its least important columns, in the order named, where the terminal is too narrow."""

    def __init__(self, table: Table, *least: str):
        self.table, self.least = table, least
        for column in table.columns:
            if column.no_wrap:  # which rich leaves out of what it says that a table needs
                column.min_width = max(map(cell_len, (str(column.header), *map(str, column.cells))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        endless = options.update(max_width=10**4)  # a measure is never above it
        for name in self.least:
            if console.measure(self.table, options=endless).minimum <= options.max_width:
                break
            self.table.columns = [column for column in self.table.columns if column.header != name]
        yield self.table


def _figures(members: list[Estimate]) -> list[str]:
    steps = [each.steps for each in members] or [0]
    return [
        f"{len(members):,}",
        f"{min(steps):,}" + (f" … {max(steps):,}" if max(steps) > min(steps) else ""),
        f"{sum(each.tokens for each in members):.3g}",
        f"{sum(each.flop for each in members):.3g}",
        f"{sum(each.gpu_hours for each in members):,.2f}",
        duration(max((each.seconds for each in members), default=0)),
        f"{sum(each.requeues for each in members):,}",
        size(sum(each.disk_bytes for each in members)),
    ]


def _print_blocked(console: Console, blocked: list[Estimate]) -> None:
    if not blocked:
        return
    table = Table(title=f"{len(blocked):,} runs cannot be run", title_justify="left")
    for name in ("why", "backbone", "methods", "budgets, FLOP", "runs"):
        table.add_column(name, justify="right" if name == "runs" else "left")
    budgets: dict[tuple[str, str, str], dict[float, int]] = defaultdict(lambda: defaultdict(int))
    for each in blocked:
        key = (each.obstacle or "", short_name(each.run.backbone.name), each.run.method.label)
        budgets[key][each.run.budget] += 1
    alike: dict[tuple[str, str, tuple[float, ...]], list[tuple[str, int]]] = defaultdict(list)
    for (why, backbone, label), counts in budgets.items():
        alike[why, backbone, tuple(counts)].append((label, sum(counts.values())))
    for (why, backbone, at), labels in sorted(alike.items(), key=lambda item: item[0][0]):
        methods = ", ".join(label for label, _ in labels)
        runs = sum(count for _, count in labels)
        table.add_row(why, backbone, methods, ", ".join(f"{b:g}" for b in at), f"{runs:,}")
    console.print(table)


def _footnotes(plan: SweepPlan, unit: str) -> Iterable[str]:
    sweep, cluster = plan.sweep, plan.sweep.cluster
    done = sum(RunDirectory(each.run.folder).record.exists() for each in plan.runnable)
    if done:
        yield f"{done:,} of these runs are done already."
    if sweep.excluded:
        yield f"{sweep.excluded:,} runs of the grid are left out by the file's exclude rows."
    for name in sweep.idle:
        yield f"{name} matches no run of the grid."
    measured = sum(each.measured for each in plan.runnable)
    if measured:
        yield f"{unit}: {measured:,} runs at the speed measured in {cluster.calibration}."
    if measured < len(plan.runnable):
        shares = {each.resource_class.name: each.resource_class.utilisation for each in plan.runnable}
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        yield (
            f"{unit}: an assumed share of {cluster.device}'s {cluster.peak_flop_per_second:.3g} FLOP/s ({listed}), "
            "evaluation and start-up not counted; `embedscale calibrate` measures it."
        )
    stores = {each.run.data.store for each in plan.estimates}
    missing = sorted(store for store in stores if not is_finished(store))
    if missing:
        yield (
            f"Steps: {sweep.expected_tokens_per_pair:g} tokens a pair are assumed, for there is no store yet at "
            f"{', '.join(missing)}."
        )
    requeues = sum(each.requeues for each in plan.runnable)
    limits = ", ".join(sorted({f"{each.resource_class.hours:g} h" for each in plan.runnable if each.requeues}))
    if requeues:
        yield f"Requeues: {requeues:,} by the time limits ({limits}), preemption not counted."


def duration(seconds: float) -> str:
    """Two figures a person can read: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(count: float) -> str:
    """Bytes in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def command(args: Any) -> int:
    """`embedscale sweep plan SWEEP.yaml [key=value …] [--max-gpu-hours H] [--each]`."""
    plan = plan_sweep(grid.load(args.sweep, args.words))
    print_plan(plan, each=args.each)
    refuse_above(plan, args.max_gpu_hours)
    return DONE
