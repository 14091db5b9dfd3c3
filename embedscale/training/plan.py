"""Compute a run's plan before its first step: the exact pairs, steps and tokens that the budget buys, without torch."""

import hashlib
import math
from dataclasses import asdict, dataclass, field

import numpy as np

from embedscale.data.manifest import Manifest
from embedscale.data.store import PairStore
from embedscale.errors import UserError
from embedscale.run.config import RunConfig
from embedscale.run.cost import Cost, cost_of
from embedscale.run.directory import RunDirectory
from embedscale.run.families import pretraining_learning_rate, shape_by_name, short_name
from embedscale.run.shape import BackboneShape
from embedscale.values import Count, Value

MOST_TOKENS = 2**53  # a float holds every whole number up to this one


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will do: `budget_flop` − cost of a pair for each process < `spent_flop` ≤ `budget_flop`."""

    budget_flop: float
    spent_flop: int
    flop_per_token: int
    tokens: int
    pairs: int
    steps: int
    batch_size: int  # pairs of a step; the last step may have fewer
    first_pair: int  # place in the store's order at which this seed begins
    world_size: int
    learning_rate: float  # peak
    warmup_steps: int
    final_fraction: float
    data_digest: str
    evaluation_digest: str  # digest of the pool, the negatives and the temperature on this store
    evaluate_after: list[int]  # numbers of steps

    @property
    def step_tokens(self) -> int:
        """Return the mean number of tokens that one process encodes in a full step."""
        return self.tokens * self.batch_size // (self.pairs * self.world_size)

    def pairs_of(self, step: int) -> tuple[int, int]:
        """Return the stored pairs [start, stop) of step 0 ≤ `step` < `steps`; they wrap around at the end."""
        start = step * self.batch_size
        stop = min(start + self.batch_size, self.pairs)
        return self.first_pair + start, self.first_pair + stop

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine to `final_fraction` (section 4.1)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)

    @property
    def averaged_steps(self) -> range:
        """Return the last twentieth of the full batches: the mean of their losses is the paper's training loss."""
        full = self.steps if self.pairs == self.steps * self.batch_size else max(1, self.steps - 1)
        return range(full - max(1, round(0.05 * full)), full)


@dataclass(frozen=True)
class PlanFile(Value):
    """plan.json: what a run will do, and what a resumed run must find unchanged."""

    backbone_digest: str
    """Digest of the backbone's weights before training."""
    n_forward: Count
    """N_F: parameters that the forward pass uses (paper, section 3.5)."""
    n_backward: Count
    """N_B: parameters that the backward pass goes through (paper, section 3.5)."""
    n_updated: Count
    """N_U: parameters that train (paper, section 3.5)."""
    n_parameters: Count
    """N: non-embedding parameters of the backbone, without adapters."""
    blocks: Count
    """Blocks of the backbone."""
    width: Count
    """Width of the backbone."""
    trainable: list[str]
    """Names of the tensors that train, in order."""
    plan: TrainingPlan
    """What the budget buys."""
    tokenizer_digest: str | None = None
    """Digest of the tokenizer; null in files of early code."""
    tokens_before: list[int] = field(default_factory=list)
    """Ids of the special tokens before each text."""
    tokens_after: list[int] = field(default_factory=list)
    """Ids of the special tokens after each text."""
    chunk_tokens: Count | None = None
    """Most tokens in one forward pass; null where the whole batch fits."""
    body: str | None = None
    """What computes the steps, cpu or plain, which round differently (model/body.py); null in files of version 0.1."""
    threads: Count | None = None
    """Threads of each process, whose number changes the rounding on a CPU; null in files of version 0.2."""

    def difference(self, other: "PlanFile") -> str | None:
        """Return the first fact that a resumed run must keep and that differs from `other`, with both values."""
        mine, others = (asdict(each) | asdict(each.plan) for each in (self, other))
        for name, value in mine.items():
            if (
                name not in ("plan", "chunk_tokens", "threads", "evaluate_after")
                and value is not None
                and others[name] != value
            ):
                return f"this run began with {name} {value}; now it is {others[name]}"
        return None


def learning_rate_of(config: RunConfig) -> float | None:
    """Return the configured peak, or else the value of the paper's rule; None if the rule has none."""
    if config.training.learning_rate is not None:
        return config.training.learning_rate
    return config.method.peak_learning_rate(pretraining_learning_rate(config.backbone.name))


def refuse_mismatch(config: RunConfig, shape: BackboneShape, manifest: Manifest | None) -> None:
    """Raise UserError if backbone, store and number of processes do not fit each other.

    Without a manifest, the store is not known yet.
    """
    data, batch = config.data, config.training.batch_size
    world = config.resources.devices * config.resources.nodes
    if data.context > shape.context:
        raise UserError(f"data.context: {data.context} is longer than {shape.name}'s; allowed: at most {shape.context}")
    if batch % world:
        raise UserError(
            f"training.batch_size: {batch} is not divisible by {world} GPUs; set a multiple, "
            f"such as {math.ceil(batch / world) * world}"
        )
    if manifest is None:
        return
    if manifest.context != data.context:
        raise UserError(
            f"data.context: {data.context}, but {data.store} was prepared with {manifest.context}; "
            "prepare another store or set the same context"
        )
    if manifest.vocabulary > shape.vocabulary:
        raise UserError(
            f"data.tokenizer: {data.store} was prepared with a tokenizer of {manifest.vocabulary} tokens, but "
            f"{shape.name} has {shape.vocabulary} embeddings; prepare another store with the backbone's tokenizer"
        )
    if data.special_tokens not in ("auto", "template" if manifest.added else "none"):
        there = "with the template's" if manifest.added else "without any"
        raise UserError(
            f"data.special_tokens: {data.special_tokens}, but {data.store} was prepared {there}; name another store"
        )
    if manifest.negatives < config.loss.hard_negatives:
        raise UserError(
            f"loss.hard_negatives: {config.loss.hard_negatives}, but {data.store} holds {manifest.negatives} per "
            "pair; lower loss.hard_negatives, or prepare a store whose sources have more"
        )


def refuse_unfit(config: RunConfig, shape: BackboneShape, manifest: Manifest | None) -> None:
    """Raise UserError for a run that cannot be trained, as far as no token counts are needed; see `refuse_mismatch`."""
    refuse_mismatch(config, shape, manifest)
    if manifest is not None and (too_few := manifest.too_few_for(config)):
        raise UserError(too_few)


def refuse_below_batch(config: RunConfig, pairs: int) -> None:
    """Raise UserError for a budget that buys less than one batch: its only step would have fewer negatives."""
    if pairs < config.training.batch_size:
        raise UserError(
            f"budget: buys less than one batch of {config.training.batch_size} pairs; raise it, or lower "
            "training.batch_size"
        )


def plan_run(config: RunConfig, shape: BackboneShape, store: PairStore) -> TrainingPlan:
    """Return the plan of a run: what its budget buys, by the token counts of the store.

    Raises UserError for a run that `refuse_unfit` refuses, for a budget below one batch or above one epoch, and where
    the paper's rule has no learning rate.
    """
    refuse_unfit(config, shape, store.manifest)
    rate = learning_rate_of(config)
    if rate is None:
        raise UserError(
            f"training.learning_rate: the paper's rule has no value for {short_name(config.backbone.name)}; set one"
        )
    cost = cost_of(shape, config.method)
    first, pairs, tokens = bought(config, cost, store)
    refuse_below_batch(config, pairs)
    steps = math.ceil(pairs / config.training.batch_size)
    evaluation = config.evaluation
    fixed = f"{store.digest} {evaluation.pool} {evaluation.negatives} {evaluation.temperature!r}"
    return TrainingPlan(
        budget_flop=config.budget,
        spent_flop=tokens * cost.flop_per_token,
        flop_per_token=cost.flop_per_token,
        tokens=tokens,
        pairs=pairs,
        steps=steps,
        batch_size=config.training.batch_size,
        first_pair=first,
        world_size=config.resources.devices * config.resources.nodes,
        learning_rate=rate,
        warmup_steps=math.ceil(config.training.warmup_fraction * steps),
        final_fraction=config.training.final_fraction,
        data_digest=store.digest,
        evaluation_digest=hashlib.sha256(fixed.encode()).hexdigest()[:16],
        evaluate_after=sorted({math.ceil(f * steps) for f in evaluation.at if 0 < f < 1} | {steps}),
    )


def refuse_early(config: RunConfig) -> None:
    """Raise UserError for a run that cannot begin, as far as that can be told before torch is imported.

    A run that has its record passes: it needs no data any more.
    """
    shape = shape_by_name(config.backbone.name, config.backbone.revision)
    if shape is not None and not RunDirectory(config.folder).record.exists():
        plan_run(config, shape, PairStore.open(config.data.store))


def bought(config: RunConfig, cost: Cost, store: PairStore) -> tuple[int, int, int]:
    """Return the place in the store's order at which this seed begins, and the pairs and tokens that the budget buys.

    Raises UserError for a budget below one pair for each process or above one epoch.
    """
    counts, world = store.token_counts(config.loss.hard_negatives), config.resources.devices * config.resources.nodes
    first = int.from_bytes(hashlib.sha256(f"{store.digest} {config.training.seed}".encode()).digest()[:8]) % store.pairs
    affordable = cost.tokens_of(config.budget)
    running = np.cumsum(np.roll(counts, -first), dtype=np.int64)
    epoch = int(running[-1])
    if affordable > epoch and not config.data.repeat:
        most = float(epoch * cost.flop_per_token)
        raise UserError(
            f"budget: {config.budget:g} FLOP buy {affordable:,} tokens, more than one epoch of {config.data.store} "
            f"({epoch:,} tokens, {most:.4g} FLOP); lower the budget, or set data.repeat=true"
        )
    if affordable > MOST_TOKENS:
        raise UserError(f"budget: {config.budget:g} FLOP buy {affordable:.3g} tokens; allowed: up to {MOST_TOKENS:.3g}")
    epochs, rest = divmod(affordable, epoch)
    partial = int(np.searchsorted(running, rest, side="right"))
    pairs = epochs * len(counts) + partial
    tokens = epochs * epoch + (int(running[partial - 1]) if partial else 0)
    while pairs % world:
        pairs -= 1
        tokens -= int(counts[(first + pairs) % len(counts)])
    if pairs < 1:
        refuse_too_small(config.budget, int(running[world - 1]) * cost.flop_per_token, world)
    return first, pairs, tokens


def refuse_too_small(budget: float, least: int, world: int) -> None:
    what = "one pair costs" if world == 1 else f"one pair for each of {world} GPUs costs"
    raise UserError(f"budget: {budget:g} FLOP is too small; {what} {least:,} FLOP here")
