"""InfoNCE over in-batch negatives (paper, section 3.3) and its variants, always in float32.

The gradient is computed in two halves that meet at the embeddings. `loss_and_gradient` needs only the embeddings of the
whole batch, gathered from every GPU and every chunk. The backward pass of the backbone then starts from the gradient of
each embedding (gradcache.py). So chunks and several GPUs give the exact gradient, without rules for scaling.
"""

import torch
from torch import Tensor
from torch.nn import functional

from embedscale.model.parallel import rank, world_size
from embedscale.run.config import Loss


def info_nce(queries: Tensor, positives: Tensor, negatives: Tensor, loss: Loss, texts: Tensor | None = None) -> Tensor:
    """Return the mean loss of B pairs, in nats.

    `queries` [B, width], `positives` [B, width] and hard `negatives` [B·k, width] are unit vectors. `texts` [B·(2+k)]
    holds their content hashes in this order. If `texts` is given, a text equal to the positive (or to the query, in the
    direction from positives to queries) does not count as a negative.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, positives, negatives = queries.float(), positives.float(), negatives.float()
        pairs = len(queries)
        candidates = torch.cat([positives, negatives]) if len(negatives) else positives
        scores = queries @ candidates.T / loss.temperature
        same_query, same_candidate = _equal_others(texts, pairs, scores)
        labels = torch.arange(pairs, device=scores.device)
        rows = scores.masked_fill(same_candidate, -torch.inf)
        if loss.form == "one_directional":
            return functional.cross_entropy(rows, labels)
        columns = scores[:, :pairs].T.masked_fill(same_query, -torch.inf)
        if loss.form == "symmetric":
            return (functional.cross_entropy(rows, labels) + functional.cross_entropy(columns, labels)) / 2
        if loss.form != "gte":
            raise ValueError(f"loss.form: {loss.form!r} has no formula in training/loss.py")
        # All similarities in one denominator, the pair's own in both its row and its column (GTE, arXiv 2308.03281,
        # section 3.3).
        itself = torch.eye(pairs, dtype=torch.bool, device=scores.device)
        between = [
            (queries @ queries.T / loss.temperature).masked_fill(same_query | itself, -torch.inf),
            columns,
            (positives @ positives.T / loss.temperature).masked_fill(same_candidate[:, :pairs] | itself, -torch.inf),
        ]
        return functional.cross_entropy(torch.cat([rows, *between], dim=1), labels)


def _equal_others(texts: Tensor | None, pairs: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks of other queries equal to the query, [B, B], and of other equal candidates, [B, B·(1+k)]."""
    if texts is None:
        return torch.zeros_like(scores[:, :pairs], dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    queries, candidates = texts[:pairs], texts[pairs:]
    same_query = queries[:, None] == queries[None, :]
    same_candidate = candidates[:pairs, None] == candidates[None, :]
    return same_query.fill_diagonal_(False), same_candidate.fill_diagonal_(False)


def loss_and_gradient(embeddings: Tensor, pairs: int, loss: Loss, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the global batch, and its gradient [B·(2+k), width] at this process's embeddings.

    `embeddings` [B·(2+k), width] and `texts` [B·(2+k)] belong to this process: queries, positives, hard negatives.
    Every process computes the loss of all pairs and keeps the gradient of its own part. The sum of the parameters'
    gradients over processes is then the gradient of the one loss.
    """
    local = embeddings.detach().requires_grad_()
    sizes = [pairs, pairs, len(local) - 2 * pairs]
    everyone, everyone_texts = [local], [texts]
    if world_size() > 1:
        everyone, everyone_texts = _all_gather(local.detach()), _all_gather(texts)
        everyone[rank()] = local  # only this part carries a gradient
    queries, positives, negatives = map(torch.cat, zip(*(x.split(sizes) for x in everyone), strict=True))
    hashes = torch.cat([torch.cat(part) for part in zip(*(x.split(sizes) for x in everyone_texts), strict=True)])
    with torch.enable_grad():
        value = info_nce(queries, positives, negatives, loss, hashes if loss.mask_equal_texts else None)
        (gradient,) = torch.autograd.grad(value, local)
    return value.detach(), gradient


def _all_gather(x: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(x) for _ in range(world_size())]
    torch.distributed.all_gather(gathered, x.contiguous())
    return gathered
