"""The held-out loss and retrieval that runs are compared by: a fixed pool, fixed negatives, a fixed temperature."""

from typing import Any

import torch
from torch import Tensor

from embedscale.data.store import PairStore
from embedscale.model.encoder import Encoder, embeddings_of, pack
from embedscale.model.parallel import rank, world_size
from embedscale.run.config import Evaluation, Loss
from embedscale.run.stop import StopRequest
from embedscale.training.loss import info_nce

FORWARD_TOKENS = 16384  # a forward pass, so that memory does not depend on the pool


def score(queries: Tensor, positives: Tensor, temperature: float) -> list[float]:
    """Symmetric InfoNCE, recall@1 and recall@10 of one group of pairs, [G, width] each, unit vectors.

    A tie counts against the query: its positive ranks behind every candidate that is as similar.
    """
    loss = info_nce(queries, positives, positives[:0], Loss(temperature=temperature))
    similar = queries.float() @ positives.float().T
    rank = (similar >= similar.diagonal()[:, None]).sum(1)
    return [float(loss), float((rank <= 1).float().mean()), float((rank <= 10).float().mean())]


@torch.no_grad()
def evaluate_held_out(
    encoder: Encoder, store: PairStore, evaluation: Evaluation, stop: StopRequest | None = None
) -> dict[str, Any] | None:
    """Mean loss and recall over the pool's groups of `negatives` + 1 pairs, shared out among the processes.

    With shards, each process goes through all of them: gathering weights takes the same forward passes of all.
    Returns None where a stop was requested meanwhile.
    """
    device = next(encoder.parameters()).device
    size = evaluation.negatives + 1
    groups = evaluation.pool // size
    several = world_size() > 1
    shared = several and not encoder.sharded
    results = torch.zeros(groups, 3, dtype=torch.float64)
    was_training = encoder.training
    encoder.eval()
    try:
        for group in range(rank(), groups, world_size()) if shared else range(groups):
            # Processes that stop alone would leave the others waiting for their part.
            if stop is not None and stop.requested and not several:
                return None
            pairs = store.held_out_batch(group * size, (group + 1) * size)
            embeddings = torch.empty(2 * size, 0)
            chunks = pack(pairs.tokens, pairs.lengths, FORWARD_TOKENS)
            for chunk, part in zip(chunks, embeddings_of(encoder, chunks), strict=True):
                if not embeddings.shape[1]:
                    embeddings = part.new_empty(2 * size, part.shape[1])
                embeddings[chunk.order.to(device)] = part
            results[group] = torch.tensor(score(embeddings[:size], embeddings[size:], evaluation.temperature))
    finally:
        encoder.train(was_training)
    if shared:
        results = results.to(device)
        torch.distributed.all_reduce(results)
    loss, first, tenth = results.mean(0).tolist()
    return {"loss": loss, "recall_at_1": first, "recall_at_10": tenth}
