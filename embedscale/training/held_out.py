"""The held-out loss and recall by which runs are compared: one pool, one number of negatives, one temperature.

They do not depend on the batch size and the loss that a run trained with, so the losses of different runs compare.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embedscale.data.store import PairStore
from embedscale.model.body import Inference
from embedscale.model.encoder import Encoder
from embedscale.model.packing import pack
from embedscale.model.parallel import rank, world_size
from embedscale.run.config import Evaluation, Loss
from embedscale.run.stop import StopRequest
from embedscale.training.loss import info_nce

FORWARD_TOKENS = 16384  # in a forward pass; bounds the memory, whatever the size of the pool


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation found."""

    loss: float
    """Symmetric InfoNCE (nats)."""
    recall_at_1: float
    """Share of the queries whose positive is the most similar text of the group."""
    recall_at_10: float
    """Share of the queries whose positive is among the ten most similar texts."""


def score(queries: Tensor, positives: Tensor, temperature: float) -> list[float]:
    """Return symmetric InfoNCE, recall@1 and recall@10 of one group of pairs.

    `queries` and `positives` are unit vectors [G, width]. In a tie, the positive ranks last.
    """
    loss = info_nce(queries, positives, positives[:0], Loss(temperature=temperature))
    similar = queries.float() @ positives.float().T
    rank = (similar >= similar.diagonal()[:, None]).sum(1)
    return [float(loss), float((rank <= 1).float().mean()), float((rank <= 10).float().mean())]


@torch.no_grad()
def evaluate_held_out(
    encoder: Encoder, store: PairStore, evaluation: Evaluation, stop: StopRequest | None = None
) -> HeldOut | None:
    """Return the mean loss and recalls over the pool's groups of `negatives` + 1 pairs, or None if stopped.

    Several processes share out the groups. With sharded weights each process evaluates all groups, because weights can
    only be gathered if all processes make the same forward passes.
    """
    device = next(encoder.parameters()).device
    size = evaluation.negatives + 1
    groups = evaluation.pool // size
    several = world_size() > 1
    shared = several and not encoder.sharded
    results = torch.zeros(groups, 3, dtype=torch.float64)
    was_training = encoder.training
    encoder.eval()
    inference = Inference(encoder)
    try:
        for group in range(rank(), groups, world_size()) if shared else range(groups):
            # With several processes, one that stopped alone would leave the others waiting for its results.
            if stop is not None and stop.requested and not several:
                return None
            pairs = store.held_out_batch(group * size, (group + 1) * size)
            embeddings = torch.empty(2 * size, 0)
            chunks = pack(pairs.tokens, pairs.lengths, FORWARD_TOKENS)
            for chunk, part in zip(chunks, inference.embed(chunks), strict=True):
                if not embeddings.shape[1]:
                    embeddings = part.new_empty(2 * size, part.shape[1])
                embeddings[chunk.order.to(device)] = part
            results[group] = torch.tensor(score(embeddings[:size], embeddings[size:], evaluation.temperature))
    finally:
        encoder.train(was_training)
    if shared:
        results = results.to(device)
        torch.distributed.all_reduce(results)
    return HeldOut(*results.mean(0).tolist())
