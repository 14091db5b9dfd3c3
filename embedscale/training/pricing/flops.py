"""`flops`: the cost of a token by both conventions, and what budgets buy, without loading weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from embedscale.data.manifest import is_finished
from embedscale.data.store import PairStore
from embedscale.errors import DONE, UserError, bounded
from embedscale.run.config import RunConfig
from embedscale.run.cost import PAPER_LENGTHS, PAPER_PAIR, Cost, cost_of
from embedscale.run.families import shape_by_name
from embedscale.terminal import console
from embedscale.training.plan import bought, refuse_mismatch, refuse_too_small
from embedscale.values import print_json

# The sum of both squared lengths, as a share of the squared length of the pair.
PAPER_SQUARES = sum(length**2 for length in PAPER_LENGTHS) / PAPER_PAIR**2


def parse_budget(text: str) -> float:
    """Return a number of FLOP above 0. Raise UserError for another text."""
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--budgets: {text!r} is not a number; give FLOP, such as 1e15") from None
    bounded("--budgets", value, 0, above=True)
    return value


@dataclass(frozen=True)
class Bought:
    """What a budget buys."""

    budget_flop: float
    tokens: int
    pairs: int
    steps: int
    exact_flop: int
    """FLOP of the matrix products and of attention, about: the squares of the lengths are those of the paper."""


@dataclass(frozen=True)
class Price:
    """What `flops` prints: FLOP of a token by both conventions, and what budgets buy."""

    backbone: str
    method: str
    n_parameters: int
    """N: non-embedding parameters."""
    n_forward: int
    n_backward: int
    n_updated: int
    forward: int
    """FLOP of a token's matrix products in the forward pass."""
    backward: int
    forward_attention: int
    """FLOP of a token's attention in the forward pass, for each token of its sequence."""
    backward_attention: int
    recompute: int
    """FLOP of a token that activation checkpointing adds."""
    batch_size: int
    context: int
    counted_in: str | None
    """Store whose tokens were counted; None if there is no store: pairs and steps are estimates then."""
    budgets: list[Bought]


def price_of(config: RunConfig, budgets: Sequence[float]) -> Price:
    """Return what a token costs and what budgets buy, without loading weights.

    Raises UserError for a backbone and a store that do not fit, for a damaged store, and for a budget below one pair or
    above one epoch. Counting needs neither a held-out pool nor a learning rate.
    """
    shape = shape_by_name(config.backbone.name, config.backbone.revision)
    if shape is None:
        from embedscale.model.backbone import shape_without_weights  # imports torch

        shape = shape_without_weights(config.backbone)
    store = PairStore.open(config.data.store) if is_finished(config.data.store) else None
    refuse_mismatch(config, shape, store.manifest if store else None)
    cost = cost_of(shape, config.method)
    return Price(
        backbone=shape.name,
        method=config.method.label,
        n_parameters=cost.n_parameters,
        n_forward=cost.n_forward,
        n_backward=cost.n_backward,
        n_updated=cost.n_updated,
        forward=cost.forward,
        backward=cost.backward,
        forward_attention=cost.forward_attention,
        backward_attention=cost.backward_attention,
        recompute=cost_of(shape, config.method, activation_checkpointing=True).recompute,
        batch_size=config.training.batch_size,
        context=config.data.context,
        counted_in=config.data.store if store else None,
        budgets=[_what_it_buys(replace(config, budget=budget), cost, store) for budget in budgets],
    )


def _what_it_buys(config: RunConfig, cost: Cost, store: PairStore | None) -> Bought:
    if store:
        _, pairs, tokens = bought(config, cost, store)
        mean = float(np.mean(store.token_counts(config.loss.hard_negatives)))
    else:
        mean = float(PAPER_PAIR)
        tokens = cost.tokens_of(config.budget)
        pairs = int(tokens / mean)
        if pairs < 1:
            refuse_too_small(config.budget, round(mean) * cost.flop_per_token, 1)
    steps = math.ceil(pairs / config.training.batch_size)
    return Bought(config.budget, tokens, pairs, steps, cost.exact(tokens, int(tokens * mean * PAPER_SQUARES)))


def print_flops(config: RunConfig, budgets: Sequence[str] | None, as_json: bool = False) -> int:
    """Print the cost of a token by both conventions, and what each budget buys, without loading weights."""
    price = price_of(config, [parse_budget(each) for each in budgets] if budgets else [config.budget])
    if as_json:
        print_json(price)
        return DONE
    from rich.table import Table

    output = console(120)
    table = Table(title=f"{price.backbone}, {price.method}: the cost of a token", show_header=True)
    table.add_column("convention")
    for name in ("forward", "backward", "updates", "sum"):
        table.add_column(f"{name}, FLOP", justify="right")
    paper = [2 * price.n_forward, 2 * price.n_backward, 2 * price.n_updated]
    table.add_row("paper: 2 (N_F + N_B + N_U)", *(f"{x:,}" for x in (*paper, sum(paper))))
    both = f"{price.forward + price.backward:,}"
    table.add_row("exact: matrix products", f"{price.forward:,}", f"{price.backward:,}", "", both)
    attention = [price.forward_attention * price.context, price.backward_attention * price.context]
    shown = [f"{x:,}" for x in (*attention, sum(attention))]
    table.add_row(f"  attention, sequences of {price.context}", *shown[:2], "", shown[2])
    table.add_row("  activation checkpointing adds", f"{price.recompute:,}", "", "", f"{price.recompute:,}")
    output.print(table)
    output.print(
        f"N = {price.n_parameters:,} non-embedding parameters; N_F = {price.n_forward:,}, N_B = {price.n_backward:,}, "
        f"N_U = {price.n_updated:,}"
    )
    buys = Table(title="what a budget buys")
    for name in ("budget, FLOP", "tokens", "pairs", "steps", "exact FLOP, about"):
        buys.add_column(name, justify="right")
    for each in price.budgets:
        counts = (f"{count:,}" for count in (each.tokens, each.pairs, each.steps))
        buys.add_row(f"{each.budget_flop:.4g}", *counts, f"{each.exact_flop:.4g}")
    output.print(buys)
    known = f"counted in {price.counted_in}" if price.counted_in else ""
    source = known or f"estimated at {PAPER_PAIR} tokens a pair (no store yet)"
    output.print(f"Pairs and steps are {source}; batches of {price.batch_size} pairs.")
    return DONE
