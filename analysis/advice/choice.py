"""One choice of a recipe: a method on a backbone at a budget, with its hyper-parameters, its cost and its loss.

The hyper-parameters are those of the nearest run. A backbone that was not run gets the learning rate of the paper's
rule.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.advice.evidence import Basis, Evidence, Limit
from analysis.advice.forecast import summary
from analysis.fits import Interval
from analysis.fitting.laws import Array, interval
from embedscale.run.cost import PAPER_PAIR, cost_of
from embedscale.run.families import known
from embedscale.run.method import METHODS, Method

PAPER_BATCH = 1024  # pairs


@dataclass(frozen=True)
class Choice:
    """One configuration and its expected loss."""

    method: str
    backbone: str  # its name, or its number of parameters where it has no name
    n_parameters: float
    budget_flop: float
    tokens: float
    pairs: float
    steps: int
    batch_size: int
    flop_per_token: float
    learning_rate: float | None  # peak
    rank: int | None
    active_fraction: float | None
    settings: dict[str, Any]  # of `method` in a configuration: rank or blocks, and what else its runs had
    run: str | None  # the run whose hyper-parameters these are
    loss: float  # nats
    loss_interval: Interval | None
    gpu_hours: float | None
    basis: Basis
    measured: bool  # whether a run of this size at this budget stands before the law

    @property
    def label(self) -> str:
        if self.rank:
            return f"{self.method}, rank {self.rank}"
        if self.active_fraction:
            share = "all" if self.active_fraction == 1 else f"{self.active_fraction:.3g} of the"
            return f"{self.method}, {share} blocks active"
        return self.method


@dataclass(frozen=True)
class Other:
    """Another choice than the best, and what it loses."""

    what: str
    choice: Choice | None  # None for what was measured rather than predicted
    lost: float  # fraction of the best choice's loss
    interval: Interval | None
    distinguishable: bool | None


def configure(
    evidence: Evidence,
    backbone: str,
    size: float,
    limit: Limit,
    basis: Basis,
    comparable: Mapping[str, Any],
    confidence: float,
) -> tuple[Choice, Array]:
    """Return the configuration of a method on a backbone, with draws of its ln L."""
    sizes = np.array([size])
    budget = float(evidence.budget_of(sizes, limit)[0])
    near = evidence.nearest(size, budget)
    was_run = math.isclose(near.n_parameters, size, rel_tol=1e-6)
    if was_run:  # of several backbones of one size, the better one
        backbone = near.backbone or backbone
    per_token = float(evidence.cost(sizes, budget)[0])
    row = known(backbone)
    rate = near.setting("learning_rate")
    kind = METHODS.get(evidence.name)
    found = kind.settings_like(near.hyperparameters, row.shape if row else None) if kind else None
    settings = found or {}
    share = None
    if kind and kind.choice and kind.choice.column == "trainable_fraction":
        share = settings.get("active_fraction", near.setting("trainable_fraction"))
    if row is not None and found is not None:
        method = Method(evidence.name, **settings)
        per_token = cost_of(row.shape, method).flop_per_token
        if rate is None or not was_run:
            rate = method.peak_learning_rate(row.pretraining_learning_rate)
    if limit.tokens:
        budget = min(budget, limit.tokens * per_token)
    drawn = evidence.expected(size, budget, basis, per_token)
    loss, ends = summary(drawn, confidence)
    tokens = budget / per_token
    counted = [point.tokens / point.pairs for point in evidence.points if point.pairs]
    pairs = tokens / (float(np.median(counted)) if counted else PAPER_PAIR)
    batch = int(comparable.get("batch_size") or PAPER_BATCH)
    speed = evidence.rate(sizes)
    choice = Choice(
        method=evidence.name,
        backbone=backbone,
        n_parameters=size,
        budget_flop=budget,
        tokens=tokens,
        pairs=pairs,
        steps=max(1, math.ceil(pairs / batch)),
        batch_size=batch,
        flop_per_token=per_token,
        learning_rate=rate,
        rank=settings.get("rank"),
        active_fraction=share,
        settings=settings,
        run=near.run,
        loss=loss,
        loss_interval=ends,
        gpu_hours=budget / float(speed[0]) if speed is not None else None,
        basis=basis,
        measured=evidence.run_of(size, budget) is not None,
    )
    return choice, drawn


def compare(what: str, choice: Choice, drawn: Array, best: Choice, best_drawn: Array, confidence: float) -> Other:
    """Return what another choice loses. Draws of one method move together, those of two methods do not."""
    ends = interval(np.expm1(drawn - best_drawn), confidence)
    ends = ends if ends and ends[1] > ends[0] else None
    told = None if ends is None else bool(ends[0] > 0 or ends[1] < 0)
    return Other(what, choice, choice.loss / best.loss - 1, ends, told)
