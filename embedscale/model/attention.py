"""Causal attention inside each sequence of a packed chunk: nothing is padded, and no mask is ever built.

Sequences are sorted by length, so that those of equal length lie beside each other and are one dense batch as they
stand, a view. On a GPU one variable-length kernel takes them all. The pieces from which folded.py makes a block's
attention on a CPU are here too.
"""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedscale.errors import UserError

BLOCK = 64  # queries that are attended to at once,
BLOCKS_FROM = 192  # in sequences of so many tokens


class Run(NamedTuple):
    """Tokens start..stop of a chunk: sequences of `length` tokens each."""

    start: int
    stop: int
    length: int


def attend_packed(body: nn.Module) -> None:
    """Have the blocks of a decoder call `packed_attention`. Raises UserError where they attend by themselves."""
    from transformers import AttentionInterface

    AttentionInterface.register("packed", packed_attention)
    body.set_attn_implementation("packed")  # type: ignore[operator]
    config: Any = body.config
    if config._attn_implementation != "packed":
        raise UserError(
            f"backbone.name: {type(body).__name__} attends in a way of its own; expected plain causal attention"
        )


def refuse_other_attention(body: nn.Module) -> None:
    """Raises UserError where a decoder on the meta device asks for attention that `packed_attention` does not give.

    A pass without numbers shows it; training would not: sequences that see each other have a loss as well.
    """
    pair = torch.arange(2, device="meta")[None]
    packing = SimpleNamespace(runs=(Run(0, 2, 1),))
    body(input_ids=pair, position_ids=pair, attention_mask=None, use_cache=False, packing=packing)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    packing: Any = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each block of any decoder.

    `query` [1, heads, T, size]; `key` and `value` may have fewer heads. Returns [1, T, heads, size].
    Raises UserError for attention other than plain causal attention; windows are the caller's to respect.
    """
    others = {
        "no word of what is packed": packing is None,
        "a mask": attention_mask is not None,
        "capped scores": softcap is not None,
        "sinks": s_aux is not None,
        "later tokens": not getattr(module, "is_causal", True),
    }
    if asked := [name for name, is_asked in others.items() if is_asked]:
        raise UserError(
            f"backbone.name: {type(module).__name__} attends with {', '.join(asked)}; expected plain causal attention"
        )
    # Under autocast the rotation leaves float32, and the values are bf16; the kernel takes one kind.
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, size]
    if _has_kernel(query) and not dropout:
        return _variable_length(query, key, value, packing, scaling)[None], None
    return _run_by_run(query, key, value, packing.runs, scaling, dropout)[None], None


@torch.compiler.disable  # it would be compiled anew for the lengths of every batch
def _run_by_run(
    query: Tensor, key: Tensor, value: Tensor, runs: Sequence[Run], scaling: float, dropout: float
) -> Tensor:
    """[T, heads, size], each run a dense batch."""
    sizes = [run.stop - run.start for run in runs]
    parts = []
    for run, *states in zip(runs, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(0, (-1, run.length)).transpose(1, 2) for x in states)
        out = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _has_kernel(query: Tensor) -> bool:
    size = query.shape[-1]
    fits = query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256
    return query.is_cuda and fits and _is_ampere(query.device.index)


@torch.compiler.assume_constant_result
def _is_ampere(device: int) -> bool:
    """Or newer."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def _variable_length(query: Tensor, key: Tensor, value: Tensor, packing: Any, scaling: float) -> Tensor:
    """[T, heads, size] of a whole chunk in one kernel; it knows by itself of fewer heads of keys."""
    ends, bound = packing.ends, packing.bound
    # Under the function in torch.nn.attention.varlen, whose arguments change from one release to the next.
    found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        query, key, value, ends, ends, bound, bound, 0.0, True, False, scale=scaling
    )
    return found[0]


@cache
def beside(outputs: int, size: int, turned: int) -> Tensor:
    """The places of [query, key, value] rows, head by head, once the rotation's pairs are neighbours."""
    rows = torch.arange(outputs).view(-1, 3, size)
    pairs = rows[:, :2, :turned].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat([torch.cat([pairs, rows[:, :2, turned:]], -1), rows[:, 2:]], 1).flatten()


def states_of(x: Tensor, run: Run, size: int, first: int, width: int, stride: int | None = None) -> Tensor:
    """A view [sequences, width / size heads, length, size] of a run's rows of [T, columns], from column `first` on.

    Heads lie `stride` columns apart, by default `size`. One call where slices and transpositions were six, for each
    run of each block.
    """
    row = x.stride(0)
    shape = (run.stop - run.start) // run.length, width // size, run.length, size
    return x.as_strided(shape, (run.length * row, stride or size, row, 1), x.storage_offset() + run.start * row + first)


def rows_of(states: Tensor) -> Tensor:
    """[sequences, heads, length, size] → [tokens, heads · size], without a copy where it comes from the kernel."""
    return states.transpose(1, 2).flatten(0, 1).flatten(1)


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention and the logarithm of its denominators, [sequences, heads, length, size] and without `size`.

    The kernel computes the scores of later keys too, and drops them. So the queries of a long sequence come in blocks,
    each with the keys up to its end.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    length = query.shape[2]
    if length < BLOCKS_FROM:
        whole: tuple[Tensor, Tensor] = kernel(query, key, value, 0.0, True, scale=scaling)
        return whole
    before = -(-length // 1024) * 1024  # few different masks
    mask, parts = _mask(before, query.dtype), []
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        q, k, v = query[:, :, first:last], key[:, :, :last], value[:, :, :last]
        seen = mask[: last - first, before - first : before - first + last]
        parts.append(kernel(q, k, v, 0.0, False, attn_mask=seen, scale=scaling))
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(sums, 2)


@cache
def _mask(before: int, dtype: torch.dtype) -> Tensor:
    """[BLOCK, before + BLOCK]: all of the keys before a block, and of its own those that are not later."""
    return torch.cat([torch.zeros(BLOCK, before), torch.full((BLOCK, BLOCK), -torch.inf).triu(1)], 1).to(dtype)


def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, out: Tensor, log_sum: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values from that of `out`, which `attend` gave with `log_sum`."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, out, log_sum, 0.0, True, scale=scaling
    )
    return found


def rotate(turned: Tensor, turn: Tensor) -> None:
    """Turn pairs of neighbouring numbers, float32 [T, …, 2 pairs], in place, by their position's angle.

    `turn` is complex64 [T, 1, pairs].
    """
    torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(turn)
