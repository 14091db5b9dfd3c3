"""Causal attention inside each sequence of a packed chunk: nothing is padded, and no mask is ever built.

Sequences are sorted by length, so that those of equal length lie beside each other and are one dense batch as they
stand, a view. On a GPU one variable-length kernel takes them all. For Pythia's blocks, the rotation of queries and
keys and the attention are one step with a backward pass of its own, which writes into one buffer what autograd would
assemble from some twenty copies.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

BLOCK = 64  # queries that are attended to at once,
BLOCKS_FROM = 192  # in sequences of so many tokens


class Run(NamedTuple):
    """Tokens start..stop of a chunk: sequences of `length` tokens each."""

    start: int
    stop: int
    length: int


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
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each block of any decoder.

    `query` [1, heads, T, size]; `key` and `value` may have fewer heads. Returns [1, T, heads, size].
    """
    assert packing is not None and attention_mask is None and softcap is None
    grouped = key.shape[1] != query.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, size]
    if _has_kernel(query) and not dropout:
        return _variable_length(query, key, value, packing, scaling, grouped)[None], None
    sizes = [run.stop - run.start for run in packing.runs]
    parts = []
    for run, *states in zip(packing.runs, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(0, (-1, run.length)).transpose(1, 2) for x in states)
        out = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def _has_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, packing: Any, scaling: float, grouped: bool = False
) -> Tensor:
    """[T, heads, size] of a whole chunk in one kernel."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = packing.ends, packing.runs[-1].length
    more: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    found: Any = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), **more
    )
    return found


class PackedNeoXAttention(GPTNeoXAttention):
    """Pythia's attention over packed sequences, on a CPU; its parameters and results are GPTNeoXAttention's."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: None,
        position_embeddings: Any = None,
        packing: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if hidden_states.device.type != "cpu":
            plain: Any = super().forward
            found: tuple[Tensor, None] = plain(
                hidden_states, attention_mask, position_embeddings=position_embeddings, packing=packing
            )
            return found
        assert packing is not None and attention_mask is None
        dense, hidden = self.query_key_value, hidden_states[0]
        # The numbers that turn together stand half of the turned ones apart. Beside each other they are complex
        # numbers, which turn in one pass: so the layer's rows change places, which a batch's tokens far outweigh.
        neighbours = type(dense) is nn.Linear and not torch.is_autocast_enabled("cpu")
        if neighbours:
            order = beside(dense.out_features, self.head_size, self.rotary_ndims)
            bias = None if dense.bias is None else dense.bias[order]
            qkv = functional.linear(hidden, dense.weight[order], bias)
        else:
            qkv = dense(hidden)
        cos, sin = (x[0, :, : self.rotary_ndims // 2].float() for x in position_embeddings)
        out = _RotateAndAttend.apply(
            qkv, torch.complex(cos, sin)[:, None, None], neighbours, self.head_size, packing.runs, self.scaling
        )
        return self.dense(out)[None], None


@cache
def beside(outputs: int, size: int, turned: int) -> Tensor:
    """The places of [query, key, value] rows, head by head, once the rotation's pairs are neighbours."""
    rows = torch.arange(outputs).view(-1, 3, size)
    pairs = rows[:, :2, :turned].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat([torch.cat([pairs, rows[:, :2, turned:]], -1), rows[:, 2:]], 1).flatten()


class _RotateAndAttend(torch.autograd.Function):
    """[T, 3 heads size] → [T, heads size], the rotation in place: the layer before it does not need its output.

    The kernels are those of scaled_dot_product_attention; called through it, each run's gradient would cost a tensor
    of the whole chunk's size.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, turn: Tensor, neighbours: bool, size: int, runs: Sequence[Run], scaling: float
    ) -> Tensor:
        rotate(_turned(qkv, turn, size), turn, neighbours)
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        kept = []
        for run in runs:
            q, k, v = (_states(qkv, run, size, 3, part) for part in range(3))
            found, log_sum = attend(q, k, v, scaling)
            out[run.start : run.stop] = rows_of(found)
            kept.append(log_sum)
        ctx.save_for_backward(qkv, turn, out, *kept)
        ctx.neighbours, ctx.size, ctx.runs, ctx.scaling = neighbours, size, runs, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv, turn, out, *kept = ctx.saved_tensors
        outer, gradient = gradients[0].contiguous(), torch.empty_like(qkv)
        for run, log_sum in zip(ctx.runs, kept, strict=True):
            q, k, v = (_states(qkv, run, ctx.size, 3, part) for part in range(3))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _states(outer, run, ctx.size), q, k, v, _states(out, run, ctx.size), log_sum, 0.0, True,
                scale=ctx.scaling,
            )  # fmt: skip
            for number, part in enumerate(parts):
                _states(gradient, run, ctx.size, 3, number).copy_(part)
        rotate(_turned(gradient, turn, ctx.size), turn.conj(), ctx.neighbours)
        return gradient, None, None, None, None, None


def _states(x: Tensor, run: Run, size: int, parts: int = 1, part: int = 0) -> Tensor:
    """A view [sequences, heads, length, size] of one of the parts of a run's rows in [T, heads · parts · size]."""
    return states_of(x, run, size, part * size, x.shape[1] // parts, parts * size)


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


def _turned(qkv: Tensor, turn: Tensor, size: int) -> Tensor:
    """The first numbers of each query and key: a view of [T, 3 heads size]."""
    return qkv.unflatten(-1, (-1, 3, size))[:, :, :2, : 2 * turn.shape[-1]]


def rotate(turned: Tensor, turn: Tensor, neighbours: bool) -> None:
    """Turn pairs of numbers [T, …, 2 pairs], in place, by their position's angle, `turn`: complex64 [T, 1 …, pairs].

    The two of a pair are neighbours, or else half of the numbers apart.
    """
    if neighbours and turned.dtype == torch.float32:
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(turn)
        return
    real, imaginary = turned.unflatten(-1, (-1, 2) if neighbours else (2, -1)).unbind(-1 if neighbours else -2)
    numbers = torch.complex(real.float(), imaginary.float()).mul_(turn)
    real.copy_(numbers.real)
    imaginary.copy_(numbers.imag)


def use_packed_blocks(body: nn.Module) -> None:
    """Give Pythia's blocks the attention above."""
    for module in body.modules():
        if type(module) is GPTNeoXAttention and not module.attention_dropout:
            module.__class__ = PackedNeoXAttention
