"""Packed token sequences through a backbone: no padding anywhere, one embedding a sequence.

All sequences of a chunk lie one after the other on one axis, sorted by length. The dense layers see `[1, T, width]`
of real tokens; attention keeps sequences apart (attention.py).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from embedscale.model.attention import Run, attend_packed
from embedscale.model.backbone import blocks_of
from embedscale.model.cpu.folded import FoldedPythia, fold
from embedscale.model.parallel import shard

BOUND = 64  # tokens that a bound on lengths is a multiple of


@dataclass(frozen=True)
class Packed:
    """One forward pass: S sequences of T tokens in all, sorted by length."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 in each sequence
    segments: Tensor  # int64 [T], the number of the token's sequence
    distinct: Tensor  # int64 [U], the tokens that occur
    which: Tensor  # int64 [T], the token's place among them
    lengths: Tensor  # int64 [S]
    ends: Tensor  # int32 [S + 1]: 0, and where each sequence ends
    order: Tensor  # int64 [S]: the place of each sequence in the batch it was packed from
    runs: tuple[Run, ...]
    bound: int  # on the lengths, one of few numbers: what is compiled for it serves other batches

    def to(self, device: torch.device) -> "Packed":
        return self.mapped(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Packed":
        return self.mapped(lambda x: x.pin_memory())

    def cut(self, number: int) -> "list[Packed]":
        """`number` chunks of about as many tokens, or one a sequence where these are fewer."""
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
        """By value, from a loader's worker: in shared memory, each tensor of each chunk would hold a file open."""
        return _unpickled, ({n: x.numpy() if isinstance(x, Tensor) else x for n, x in vars(self).items()},)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """With every tensor changed."""
        changed: dict[str, Any] = {n: change(x) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **changed)


def _unpickled(values: dict[str, Any]) -> Packed:
    tensors = {name: torch.from_numpy(x) for name, x in values.items() if isinstance(x, np.ndarray)}
    return Packed(**(values | tensors))


def pack(tokens: np.ndarray, lengths: np.ndarray, chunk_tokens: int | None = None) -> list[Packed]:
    """Sort sequences by length and cut them into chunks of at most `chunk_tokens` (default: one chunk).

    `tokens` [T] holds the sequences one after the other, `lengths` [S] their lengths, each at least 1.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order].astype(np.int64)
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[order]
    return [_pack_sorted(tokens, starts[cut], ordered[cut], order[cut]) for cut in cuts(ordered, chunk_tokens)]


def cuts(lengths: np.ndarray, chunk_tokens: int | None) -> list[slice]:
    """Which sequences form a chunk, of sorted `lengths`: as many as `chunk_tokens` takes, but at least one."""
    ends = np.cumsum(lengths)
    found, first = [], 0
    while first < len(lengths):
        before = ends[first] - lengths[first]
        last = len(lengths) if chunk_tokens is None else int(np.searchsorted(ends, before + chunk_tokens, side="right"))
        found.append(slice(first, max(last, first + 1)))
        first = found[-1].stop
    return found


def cut_further(chunks: list[Packed], number: int) -> list[Packed]:
    """The same sequences, at least as many, in at least `number` chunks: the largest is cut in two until it is so."""
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
    distinct, which = np.unique(packed, return_inverse=True)
    return Packed(
        tokens=torch.from_numpy(packed),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        distinct=torch.from_numpy(distinct),
        which=torch.from_numpy(which),
        lengths=torch.from_numpy(lengths),
        ends=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        order=torch.from_numpy(order),
        runs=tuple(Run(*map(int, run)) for run in runs),
        bound=-(-int(lengths[-1]) // BOUND) * BOUND,
    )


class Encoder(nn.Module):
    """A decoder's body that turns packed sequences into unit vectors."""

    def __init__(self, body: nn.Module, pooling: str = "mean", precision: str = "float32"):
        super().__init__()
        attend_packed(body)
        self.body, self.pooling, self.precision = body, pooling, precision
        self.folded: FoldedPythia | None = None
        self.foldable, self.sharded = True, False

    def checkpoint_activations(self) -> None:
        """Keep a block's input instead of its activations; the backward pass computes them again."""
        self.foldable = False
        # transformers called it by another name before 5.20.
        enable: Any = getattr(self.body, "activation_checkpointing_enable", None)
        enable = enable or self.body.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # transformers also makes the embedding's output require a gradient, which would run the backward pass
        # through every frozen block.
        self.body.disable_input_require_grads()  # type: ignore[operator]

    def shard(self, device_type: str) -> None:
        """Keep a part of the weights in each process, on its device.

        The body has other parameters afterwards, and all processes must make the same number of forward and of
        backward passes.
        """
        self.foldable, self.sharded = False, True
        shard(self.body, device_type)

    def compile_blocks(self) -> None:
        """Let torch.compile fuse what lies between a block's products, once for all blocks and lengths."""
        self.foldable = False
        for block in blocks_of(self.body):
            block.compile(dynamic=True)

    @contextmanager
    def folding(self) -> Iterator[FoldedPythia | None]:
        """Compute with the folded body, where there is one, until the weights change."""
        before = self.folded
        try:
            self.folded = before or (fold(self.body, self.precision) if self.foldable else None)
            yield self.folded
        finally:
            self.folded = before

    def forward(self, packed: Packed, rows: Tensor | None = None) -> Tensor:
        """Embeddings [S, width], float32, of unit length, in the order of `packed`.

        `rows` [U, width] may bring the distinct tokens' rows of the embedding matrix.
        """
        if self.folded is not None:
            hidden = self.folded(packed, rows)
        else:
            if rows is None:
                tokens = {"input_ids": packed.tokens[None]}
            else:
                tokens = {"inputs_embeds": functional.embedding(packed.which, rows)[None]}
            # Autocast's cache would keep a copy of each gathered weight until the last block is through.
            bf16, cache = self.precision == "bf16", not self.sharded
            with torch.autocast(packed.tokens.device.type, torch.bfloat16, enabled=bf16, cache_enabled=cache):
                hidden = self.body(
                    **tokens,
                    position_ids=packed.positions[None],
                    # Without these two, transformers would let sequences see each other: no mask, no cache.
                    attention_mask=None,
                    use_cache=False,
                    packing=packed,
                ).last_hidden_state[0]
        return functional.normalize(pool(hidden.float(), packed, self.pooling), dim=-1)


@contextmanager
def a_chunk_a_core(device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, on a CPU for as many chunks at once as torch has threads, results in order.

    What one chunk's operations leave to a second core is less than they wait for each other.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def embeddings_of(encoder: Encoder, chunks: Sequence[Packed]) -> Iterator[Tensor]:
    """Each chunk's embeddings, in order, without a graph."""
    device = next(encoder.parameters()).device

    @torch.no_grad()
    def embed(chunk: Packed) -> Tensor:
        found: Tensor = encoder(chunk.to(device))
        return found

    # Gathering weights, processes must ask for the same blocks in the same order.
    at_once = nullcontext(map) if encoder.sharded else a_chunk_a_core(device)
    with torch.no_grad(), encoder.folding(), at_once as each:
        yield from each(embed, chunks)


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
    sums = hidden.new_zeros(len(lengths), hidden.shape[1])
    return sums.index_add(0, packed.segments, hidden) / totals[:, None]
