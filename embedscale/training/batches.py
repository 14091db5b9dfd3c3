"""A step's batch: which pairs it has, and how this process packs its part of them into chunks.

A batch is a function of the store, the plan and the step alone. A resumed run therefore needs no state of a loader: it
asks for the next step's batch.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from embedscale.data.store import PairStore
from embedscale.model.packing import Packed, cut_further, cuts, pack
from embedscale.run.config import RunConfig
from embedscale.training.plan import TrainingPlan


@dataclass(frozen=True)
class Batch:
    """This process's part of a step's pairs, and the token counts of the whole batch."""

    step: int  # counted from 0
    pairs: int  # of this process
    chunks: list[Packed]
    texts: Tensor  # int64 [S], content hashes of this process's queries, positives and hard negatives, in this order
    tokens: int  # over all processes
    squared_lengths: int  # sum over the sequences of all processes

    def to(self, device: torch.device) -> "Batch":
        chunks = [chunk.to(device) for chunk in self.chunks]
        return replace(self, chunks=chunks, texts=self.texts.to(device, non_blocking=True))

    def halved(self) -> "Batch":
        """Return the same pairs in twice as many chunks."""
        return replace(self, chunks=[half for chunk in self.chunks for half in chunk.cut(2)])

    def pin_memory(self) -> "Batch":
        return replace(self, chunks=[chunk.pin_memory() for chunk in self.chunks], texts=self.texts.pin_memory())

    @property
    def order(self) -> Tensor:
        """int64 [S]: the place in `texts` of each sequence, in the order of the chunks."""
        return torch.cat([chunk.order for chunk in self.chunks])


class Batches(Dataset[Batch]):
    """The batch of each step of a plan, for process number `rank`.

    With sharded weights, all processes get equally many chunks: as many as the process that needs most.
    """

    def __init__(
        self, store: PairStore, plan: TrainingPlan, config: RunConfig, chunk_tokens: int | None = None, rank: int = 0
    ):
        self.store, self.plan, self.chunk_tokens, self.rank = store, plan, chunk_tokens, rank
        self.negatives, self.sharded = config.loss.hard_negatives, config.resources.shard

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> Batch:
        start, stop = self.plan.pairs_of(step)
        stored = self.store.batch(start, stop, self.negatives)
        lengths = stored.lengths.astype(np.int64)
        tokens, texts, own = stored.tokens, stored.texts, lengths
        if self.plan.world_size > 1:
            kept = self._part(stored.pairs, self.rank)
            starts = np.cumsum(lengths) - lengths
            own = lengths[kept]
            places = np.repeat(starts[kept] - (np.cumsum(own) - own), own) + np.arange(own.sum())
            tokens, texts = tokens[places], texts[kept]
        chunks = pack(tokens, own, self.chunk_tokens)
        if self.sharded:
            parts = (np.sort(lengths[self._part(stored.pairs, each)]) for each in range(self.plan.world_size))
            most = max(len(cuts(part, self.chunk_tokens)) for part in parts)
            chunks = cut_further(chunks, most)
        return Batch(
            step=step,
            pairs=stored.pairs // self.plan.world_size,
            chunks=chunks,
            texts=torch.from_numpy(texts.view(np.int64)),
            tokens=int(lengths.sum()),
            squared_lengths=int((lengths**2).sum()),
        )

    def _part(self, pairs: int, rank: int) -> np.ndarray:
        """Return a process's sequences: equal parts of the batch's queries, of its positives and of its negatives."""
        share, k = pairs // self.plan.world_size, self.negatives
        first = rank * share
        groups = ((0, first, share), (pairs, first, share), (2 * pairs, first * k, share * k))
        return np.concatenate([np.arange(start + offset, start + offset + n) for start, offset, n in groups])
