"""Causal attention of packed sequences on a CPU, forward and backward, on views of the query-key-value states.

Torch's public attention would copy queries, keys and values out of their common tensor, and computes the scores of
later keys too. Here both are avoided: `states_of` makes a view in one call, and `attend` cuts long sequences into query
blocks. The price is a backward pass written by hand, on operators without a public form (kernels.py).
"""

from functools import cache

import torch
from torch import Tensor

from embedscale.model.cpu.kernels import attention_backward, attention_forward
from embedscale.model.packing import Run

BLOCK = 64  # queries in a block,
BLOCKS_FROM = 192  # in sequences of at least this many tokens


@cache
def beside(outputs: int, size: int, turned: int) -> Tensor:
    """Return the permutation of the [query, key, value] rows that puts each rotary pair side by side, head by head."""
    rows = torch.arange(outputs).view(-1, 3, size)
    pairs = rows[:, :2, :turned].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat([torch.cat([pairs, rows[:, :2, turned:]], -1), rows[:, 2:]], 1).flatten()


def states_of(x: Tensor, run: Run, size: int, first: int, width: int) -> Tensor:
    """Return a view [sequences, width / size heads, length, size] of a run's rows of [T, columns].

    The view starts at column `first`; heads lie side by side. One call replaces six slices and transpositions for each
    run of each block.
    """
    row = x.stride(0)
    shape = (run.stop - run.start) // run.length, width // size, run.length, size
    return x.as_strided(shape, (run.length * row, size, row, 1), x.storage_offset() + run.start * row + first)


def rows_of(states: Tensor) -> Tensor:
    """Return [tokens, heads · size] from [sequences, heads, length, size]; a view for the kernel's own output."""
    return states.transpose(1, 2).flatten(0, 1).flatten(1)


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return causal attention [sequences, heads, length, size] and the logarithm of its denominators, without `size`.

    The kernel also computes the scores of later keys and drops them. Therefore the queries of a long sequence come in
    blocks, each with the keys up to its end.
    """
    length = query.shape[2]
    if length < BLOCKS_FROM:
        whole: tuple[Tensor, Tensor] = attention_forward(query, key, value, 0.0, True, scale=scaling)
        return whole
    before = -(-length // 1024) * 1024  # rounded up, so that few different masks are kept
    mask, parts = _mask(before, query.dtype), []
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        q, k, v = query[:, :, first:last], key[:, :, :last], value[:, :, :last]
        seen = mask[: last - first, before - first : before - first + last]
        parts.append(attention_forward(q, k, v, 0.0, False, attn_mask=seen, scale=scaling))
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(sums, 2)


@cache
def _mask(before: int, dtype: torch.dtype) -> Tensor:
    """Return [BLOCK, before + BLOCK]: zero for all keys before a block and for the block's keys that are not later."""
    return torch.cat([torch.zeros(BLOCK, before), torch.full((BLOCK, BLOCK), -torch.inf).triu(1)], 1).to(dtype)


def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, out: Tensor, log_sum: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values from that of `out`; `attend` returned `out` and `log_sum`."""
    found: tuple[Tensor, Tensor, Tensor] = attention_backward(
        gradient, query, key, value, out, log_sum, 0.0, True, scale=scaling
    )
    return found


def rotate(turned: Tensor, turn: Tensor) -> None:
    """Turn neighbouring pairs of numbers by the angle of their position, in place.

    `turned` is float32 [T, …, 2 pairs] and `turn` complex64 [T, 1, pairs].
    """
    torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(turn)
