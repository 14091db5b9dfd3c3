"""The loss and the retrieval scores, against their definitions in plain Python and against sentence-transformers."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from embedscale.run.config import Loss
from embedscale.training.held_out import score
from embedscale.training.loss import info_nce, loss_and_gradient

B, K = 6, 2


def vectors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (B, B, B * K)]


def written_out(queries, positives, negatives, form, temperature):
    """Compute the definitions pair by pair, with Python numbers."""

    def e(a, b):
        return math.exp(float(a.double() @ b.double()) / temperature)

    total = 0.0
    for query, positive in zip(queries, positives, strict=True):
        right = e(query, positive)
        row = sum(e(query, other) for other in [*positives, *negatives])
        column = sum(e(other, positive) for other in queries)
        if form == "one_directional":
            total -= math.log(right / row)
        elif form == "symmetric":
            total -= (math.log(right / row) + math.log(right / column)) / 2
        else:
            others = sum(e(query, q) + e(positive, p) for q, p in zip(queries, positives, strict=True))
            others -= e(query, query) + e(positive, positive)
            total -= math.log(right / (row + column + others))
    return total / len(queries)


@pytest.mark.parametrize("form", ["symmetric", "one_directional", "gte"])
@pytest.mark.parametrize("hard", [False, True])
def test_info_nce_is_its_definition(form, hard):
    queries, positives, negatives = vectors()
    negatives = negatives if hard else negatives[:0]
    loss = Loss(form=form, temperature=0.05)
    expected = written_out(queries, positives, negatives, form, 0.05)
    assert float(info_nce(queries, positives, negatives, loss)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "directions", "partition"),
    [
        ("one_directional", ["query_to_doc"], "joint"),
        ("symmetric", ["query_to_doc", "doc_to_query"], "per_direction"),
        ("gte", ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"], "joint"),
    ],
)
def test_info_nce_equals_that_of_sentence_transformers(form, directions, partition):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    queries, positives, _ = vectors()
    theirs = MultipleNegativesRankingLoss(None, scale=20.0, directions=directions, partition_mode=partition)
    expected = float(theirs.compute_loss_from_embeddings([queries, positives], None))
    loss = Loss(form=form, temperature=0.05)
    assert float(info_nce(queries, positives, positives[:0], loss)) == pytest.approx(expected, rel=1e-5)


def test_similarities_are_float32_under_autocast():
    queries, positives, negatives = vectors()
    with torch.autocast("cpu", torch.bfloat16):
        value = info_nce(queries, positives, negatives, Loss())
    assert value.dtype == torch.float32
    assert float(value) == float(info_nce(queries, positives, negatives, Loss()))


def test_equal_texts_are_not_negatives():
    """If two pairs have the same positive, loss and gradient are those of a softmax without the second one."""
    queries, positives, _ = vectors()
    positives[3] = positives[1]
    texts = torch.arange(2 * B)
    texts[B + 3] = texts[B + 1]
    leaf = queries.clone().requires_grad_()
    value = info_nce(leaf, positives, positives[:0], Loss("one_directional", 0.1, mask_equal_texts=True), texts)
    value.backward()
    other = queries.clone().requires_grad_()
    rows = []
    for i in range(B):
        kept = [j for j in range(B) if j == i or {i, j} != {1, 3}]
        scores = other[i] @ positives[kept].T / 0.1
        rows.append(cross_entropy(scores[None], torch.tensor([kept.index(i)])))
    torch.stack(rows).mean().backward()
    torch.testing.assert_close(value, torch.stack(rows).mean())
    torch.testing.assert_close(leaf.grad, other.grad)
    for masked in (True, False):  # a training step uses both
        loss = Loss("one_directional", 0.1, mask_equal_texts=masked)
        found, gradient = loss_and_gradient(torch.cat([queries, positives]), B, loss, texts)
        assert torch.allclose(found, value.detach()) == torch.allclose(gradient[:B], leaf.grad) == masked


def test_retrieval_counts_ranks_and_ties_count_as_wrong():
    queries = torch.eye(4)
    assert score(queries, queries, 1.0)[1:] == [1.0, 1.0]
    assert score(queries, queries.roll(1, 0), 1.0)[1:] == [0.0, 1.0]
    assert score(torch.ones(20, 1), torch.ones(20, 1), 1.0)[1:] == [0.0, 0.0]
    assert score(torch.ones(20, 1), torch.ones(20, 1), 1.0)[0] == pytest.approx(math.log(20))
