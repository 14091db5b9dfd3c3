"""Batches without padding: sequences laid one after the other, sorted by length, in chunks of a bounded size.

Padding would cost half of all tokens at the paper's lengths. Sorting puts sequences of equal length beside each other,
so that they form dense batches for the attention without a copy (attention.py). The price is a permutation: `order`
says where each sequence stood before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BOUND = 64  # tokens: `Packed.bound` is a multiple of this


class Run(NamedTuple):
    """Tokens start..stop of a chunk, which belong to sequences of `length` tokens each."""

    start: int
    stop: int
    length: int


@dataclass(frozen=True)
class Packed:
    """One chunk, the input of one forward pass: S sequences with T tokens in all, sorted by length."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], counted from 0 in each sequence
    segments: Tensor  # int64 [T], the number of the token's sequence
    lengths: Tensor  # int64 [S]
    ends: Tensor  # int32 [S + 1]: 0, then the end of each sequence
    order: Tensor  # int64 [S]: the index of each sequence in the batch before packing
    runs: tuple[Run, ...]  # one for each different length
    bound: int  # at least the longest length; takes few values, so that compiled code serves many chunks

    def to(self, device: torch.device) -> "Packed":
        return self.mapped(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Packed":
        return self.mapped(lambda x: x.pin_memory())

    def cut(self, number: int) -> "list[Packed]":
        """Return `number` chunks of about equally many tokens, or one chunk a sequence if there are fewer sequences."""
        number = min(number, len(self.lengths))
        here = self.mapped(lambda x: x.cpu())
        tokens, lengths, order = here.tokens.numpy(), here.lengths.numpy(), here.order.numpy()
        ends = here.ends.numpy()
        cuts = [0]
        for part in range(1, number):
            nearest = int(np.abs(ends - ends[-1] * part / number).argmin())
            cuts.append(min(max(nearest, cuts[-1] + 1), len(lengths) - number + part))
        parts = [slice(*each) for each in pairwise([*cuts, len(lengths)])]
        chunks = (_pack_sorted(tokens, ends[part], lengths[part], order[part]) for part in parts)
        return [chunk.to(self.tokens.device) for chunk in chunks]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the values: in shared memory, each tensor of each chunk from a loader's worker keeps a file open."""
        return _unpickled, ({n: x.numpy() if isinstance(x, Tensor) else x for n, x in vars(self).items()},)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """Return a copy with `change` applied to every tensor."""
        changed: dict[str, Any] = {n: change(x) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **changed)


def _unpickled(values: dict[str, Any]) -> Packed:
    tensors = {name: torch.from_numpy(x) for name, x in values.items() if isinstance(x, np.ndarray)}
    return Packed(**(values | tensors))


def pack(tokens: np.ndarray, lengths: np.ndarray, chunk_tokens: int | None = None) -> list[Packed]:
    """Sort sequences by length and cut them into chunks of at most `chunk_tokens` tokens (default: one chunk).

    `tokens` [T] holds the sequences one after the other. `lengths` [S] holds their lengths, each at least 1. A sequence
    longer than `chunk_tokens` is a chunk of its own.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order].astype(np.int64)
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[order]
    return [_pack_sorted(tokens, starts[cut], ordered[cut], order[cut]) for cut in cuts(ordered, chunk_tokens)]


def cuts(lengths: np.ndarray, chunk_tokens: int | None) -> list[slice]:
    """Return the sequences of each chunk, given sorted `lengths`: as many as `chunk_tokens` allows, at least one."""
    ends = np.cumsum(lengths)
    found, first = [], 0
    while first < len(lengths):
        before = ends[first] - lengths[first]
        last = len(lengths) if chunk_tokens is None else int(np.searchsorted(ends, before + chunk_tokens, side="right"))
        found.append(slice(first, max(last, first + 1)))
        first = found[-1].stop
    return found


def cut_further(chunks: list[Packed], number: int) -> list[Packed]:
    """Return the same sequences in at least `number` chunks, by cutting the largest chunk in two again and again.

    There must be at least `number` sequences.
    """
    chunks = list(chunks)
    while len(chunks) < number:
        largest = max(range(len(chunks)), key=lambda n: (len(chunks[n].lengths) > 1, len(chunks[n].tokens)))
        chunks[largest : largest + 1] = chunks[largest].cut(2)
    return chunks


def _pack_sorted(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> Packed:
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    firsts = np.flatnonzero(np.diff(lengths, prepend=0))
    stops = ends[np.append(firsts[1:], len(lengths)) - 1]
    runs = zip(ends[firsts] - lengths[firsts], stops, lengths[firsts], strict=True)
    packed = tokens[np.repeat(starts, lengths) + positions].astype(np.int64)
    return Packed(
        tokens=torch.from_numpy(packed),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        lengths=torch.from_numpy(lengths),
        ends=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        order=torch.from_numpy(order),
        runs=tuple(Run(*map(int, run)) for run in runs),
        bound=-(-int(lengths[-1]) // BOUND) * BOUND,
    )
