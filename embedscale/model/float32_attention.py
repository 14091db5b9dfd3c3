"""Attention of packed sequences on a GPU in float32: one kernel for all lengths.

Flash attention takes no float32, so this is torch's memory-efficient attention, which nested tensors use in the same
way. Torch has no public name for it, and its own description of the backward pass for tensors without memory lacks an
argument, so both passes are operators of ours. The price: a few private names of torch, in this file alone.
"""

from typing import Any

import torch
from torch import Tensor

# The kernel's number for a mask is 1 if it hides later tokens of the same sequence, and 0 without a mask.
MOST_SEQUENCES = 2**16 - 1  # blocks along one axis of a kernel's grid


@torch.library.custom_op("embedscale::attend_float32", mutates_args=())
def attend_float32(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, bound: int, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return attention [T, heads, size] and the logarithms of its denominators.

    `query`, `key` and `value` are float32 [T, heads, size]. `ends` is int32 [S + 1]: 0, then the end of each sequence.
    No sequence is longer than `bound`.
    """
    longest = min(bound, len(query))  # the kernel refuses more
    states = (x[None] for x in (query, key, value))
    out, sums, *_ = torch.ops.aten._efficient_attention_forward(
        *states, None, ends, ends, longest, longest, 0.0, int(causal), True, scale=scaling
    )
    return out.squeeze(0), sums


@torch.library.custom_op("embedscale::attend_float32_backward", mutates_args=())
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, ends: Tensor,
    bound: int, scaling: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries, keys and values, each [T, heads, size]."""
    longest = min(bound, len(query))
    above, *states, whole = (x[None] for x in (gradient, query, key, value, out))
    unused = torch.empty((), dtype=torch.int64)  # the seed of dropout
    found = torch.ops.aten._efficient_attention_backward(
        above, *states, None, whole, ends, ends, longest, longest, sums, 0.0, unused, unused, int(causal), False,
        scale=scaling,
    )  # fmt: skip
    of_query, of_key, of_value = (x.squeeze(0) for x in found[:3])
    return of_query, of_key, of_value


@attend_float32.register_fake
def _shapes(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, bound: int, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    longest = -(-min(bound, len(query)) // 32) * 32
    return query.new_empty(query.shape), query.new_empty(len(ends) - 1, query.shape[1], longest)


@_backward.register_fake
def _backward_shapes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, ends: Tensor,
    bound: int, scaling: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    of_query, of_key, of_value = (x.new_empty(x.shape) for x in (query, key, value))
    return of_query, of_key, of_value


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, ends, ctx.bound, ctx.scaling, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, *output, ends)


def _through(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    return (*_backward(gradient, *ctx.saved_tensors, ctx.bound, ctx.scaling, ctx.causal), None, None, None, None)


attend_float32.register_autograd(_through, setup_context=_keep)
