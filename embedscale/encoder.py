"""Packed token sequences through a backbone: no padding in the dense layers, one embedding a sequence.

All sequences of a chunk lie one after the other on one axis. The dense layers see `[1, T, width]` of real tokens.
Attention alone needs sequences apart: they are sorted by length into a few buckets, each padded on the right to its
own longest sequence, where a causal mask already keeps real tokens from seeing padding.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

BUCKETS = 8
CANDIDATES = 128  # bucket ends that are tried


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar lengths: tokens start..stop of the chunk, as rows of `longest` places."""

    start: int
    stop: int
    sequences: int
    longest: int
    places: Tensor  # int64 [stop − start]: where each token stands among sequences × longest; empty if no padding


@dataclass(frozen=True)
class Packed:
    """One forward pass: S sequences of T tokens in all, sorted by length."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 in each sequence
    segments: Tensor  # int64 [T], the number of the token's sequence
    lengths: Tensor  # int64 [S]
    order: Tensor  # int64 [S]: the place of each sequence in the batch it was packed from
    buckets: tuple[Bucket, ...]

    def to(self, device: torch.device) -> "Packed":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        buckets = tuple(replace(b, places=b.places.to(device, non_blocking=True)) for b in self.buckets)
        return replace(self, buckets=buckets, **moved)

    def pin_memory(self) -> "Packed":
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        return replace(self, buckets=tuple(replace(b, places=b.places.pin_memory()) for b in self.buckets), **pinned)


_TENSORS = ("tokens", "positions", "segments", "lengths", "order")


def pack(tokens: np.ndarray, lengths: np.ndarray, chunk_tokens: int | None = None) -> list[Packed]:
    """Sort sequences by length and cut them into chunks of at most `chunk_tokens` (default: one chunk).

    `tokens` [T] holds the sequences one after the other, `lengths` [S] their lengths, each at least 1.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order].astype(np.int64)
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[order]
    ends = np.cumsum(ordered)
    chunks, first = [], 0
    while first < len(order):
        before = ends[first] - ordered[first]
        last = len(order) if chunk_tokens is None else int(np.searchsorted(ends, before + chunk_tokens, side="right"))
        last = max(last, first + 1)
        chunks.append(_pack_sorted(tokens, starts[first:last], ordered[first:last], order[first:last]))
        first = last
    return chunks


def _pack_sorted(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> Packed:
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    buckets = []
    for first, last in _bucket_bounds(lengths):
        longest, size = int(lengths[last - 1]), lengths[first:last]
        start, stop = int(ends[first] - lengths[first]), int(ends[last - 1])
        rows = np.repeat(np.arange(last - first), size)
        places = rows * longest + positions[start:stop] if (last - first) * longest > stop - start else np.empty(0, int)
        buckets.append(Bucket(start, stop, last - first, longest, torch.from_numpy(places)))
    return Packed(
        tokens=torch.from_numpy(tokens[np.repeat(starts, lengths) + positions].astype(np.int64)),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        lengths=torch.from_numpy(lengths),
        order=torch.from_numpy(order),
        buckets=tuple(buckets),
    )


def _bucket_bounds(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut sorted lengths into at most BUCKETS runs with the least padded area (a shortest path over bucket ends)."""
    ends = np.unique(lengths)
    if len(ends) > CANDIDATES:
        ends = np.unique(ends[np.linspace(0, len(ends) - 1, CANDIDATES).astype(int)])
    counts = np.concatenate([[0], np.searchsorted(lengths, ends, side="right")])
    # area[i, j]: one bucket from end i to end j
    area = (counts[None, 1:] - counts[:-1, None]) * ends[None, :].astype(np.float64)
    area[np.tril_indices(len(ends), -1)] = np.inf
    best, choices = area[0], []
    for _ in range(min(BUCKETS, len(ends)) - 1):
        through = best[:-1, None] + area[1:]
        choice = through.argmin(axis=0)
        better = through[choice, np.arange(len(ends))]
        choices.append(np.where(better < best, choice, -1))
        best = np.minimum(best, better)
    bounds, end = [], len(ends) - 1
    for choice in reversed(choices):
        if choice[end] >= 0:
            bounds.append((int(counts[choice[end] + 1]), int(counts[end + 1])))
            end = int(choice[end])
    bounds.append((0, int(counts[end + 1])))
    return bounds[::-1]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    packing: Packed | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence; the function that transformers calls in each block.

    `query` [1, heads, T, size]; `key` and `value` may have fewer heads. Returns [1, T, heads, size].
    """
    assert packing is not None and attention_mask is None and softcap is None
    grouped = key.shape[1] != query.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, size]
    parts = []
    for bucket in packing.buckets:
        q, k, v = (_apart(x[bucket.start : bucket.stop], bucket) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        out = out.transpose(1, 2).reshape(bucket.sequences * bucket.longest, *query.shape[1:])
        parts.append(_Gather.apply(out, bucket.places) if len(bucket.places) else out)
    return torch.cat(parts)[None], None


def _apart(x: Tensor, bucket: Bucket) -> Tensor:
    """[tokens, heads, size] → [sequences, heads, longest, size]."""
    if len(bucket.places):
        x = _Scatter.apply(x, bucket.places, bucket.sequences * bucket.longest)
    return x.reshape(bucket.sequences, bucket.longest, *x.shape[1:]).transpose(1, 2)


class _Scatter(torch.autograd.Function):
    """Rows to distinct places of a larger zero tensor. Distinct places need no accumulation, forward or backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """The inverse of `_Scatter`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        full = gradients[0].new_zeros(ctx.size, *gradients[0].shape[1:])
        return full.index_copy_(0, places, gradients[0]), None


class Encoder(nn.Module):
    """A decoder's body that turns packed sequences into unit vectors."""

    def __init__(self, body: nn.Module, pooling: str = "mean", precision: str = "float32"):
        super().__init__()
        from transformers import AttentionInterface

        AttentionInterface.register("packed", packed_attention)
        body.set_attn_implementation("packed")  # type: ignore[operator]
        self.body, self.pooling, self.precision = body, pooling, precision

    def checkpoint_activations(self) -> None:
        """Keep a block's input instead of its activations; the backward pass computes them again."""
        self.body.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        # transformers also makes the embedding's output require a gradient, which would run the backward pass
        # through every frozen block.
        self.body.disable_input_require_grads()  # type: ignore[operator]

    def forward(self, packed: Packed) -> Tensor:
        """Embeddings [S, width], float32, of unit length, in the order of `packed`."""
        with torch.autocast(packed.tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            hidden = self.body(
                input_ids=packed.tokens[None],
                position_ids=packed.positions[None],
                # Without these two, transformers would let sequences see each other: no mask, no cache.
                attention_mask=None,
                use_cache=False,
                packing=packed,
            ).last_hidden_state[0]
        return functional.normalize(pool(hidden.float(), packed, self.pooling), dim=-1)


def pool(hidden: Tensor, packed: Packed, pooling: str) -> Tensor:
    """One vector a sequence from its tokens' [T, width]: their mean, the last one, or a mean weighted by position."""
    if pooling == "last":
        return hidden[packed.lengths.cumsum(0) - 1]
    lengths = packed.lengths.to(hidden.dtype)
    if pooling == "weighted":
        weights = (packed.positions + 1).to(hidden.dtype)
        hidden, totals = hidden * weights[:, None], lengths * (lengths + 1) / 2
    else:
        totals = lengths
    sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, packed.segments, hidden)
    return sums / totals[:, None]
