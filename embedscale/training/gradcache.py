"""GradCache (Gao et al. 2021, arXiv 2101.06983): train on a batch larger than memory, with the batch's exact gradient.

A contrastive loss needs the embeddings of the whole batch, but its gradient reaches the weights through one embedding
at a time. So the backward pass is cut in two at the embeddings:

1. Encode all chunks without a graph.
2. Compute the loss of the whole batch, and its gradient at the embeddings.
3. Encode each chunk again, now with a graph, and pass its part of the gradient on to the weights.

Only one chunk's graph is in memory at a time. The price is a second forward pass; a batch of one chunk does not pay it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk", contravariant=True)

Loss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Embeddings [S, width] of all chunks, in their order → the loss, and its gradient [S, width]."""


class Body(Protocol[Chunk]):
    """What turns chunks into embeddings. PlainBody (model/body.py) is the simplest one."""

    def encode(self, chunk: Chunk, graph: bool) -> Tensor:
        """Return the chunk's embeddings [S, width], detached. With `graph`, keep what `backward` needs."""

    def backward(self, chunk: Chunk, gradient: Tensor) -> None:
        """Add the weights' gradient, given the embeddings' gradient [S, width] of the chunk encoded last."""


def accumulate_gradient(
    body: Body[Chunk],
    chunks: Sequence[Chunk],
    loss: Loss,
    before_encoding: Callable[[int], None] = lambda number: None,
    during_last_backward: AbstractContextManager[object] | None = None,
) -> Tensor:
    """Add the gradient of the loss of all chunks to the weights' gradients, and return the loss.

    `before_encoding(number)` is called before chunk `number` is encoded, each time: there the caller seeds dropout, so
    that both passes draw the same numbers. `during_last_backward` is entered for the last backward pass, in which
    gradients become complete: there several processes begin to add them up (model/parallel.py).
    """
    last = len(chunks) - 1
    if last == 0:
        before_encoding(0)
        value, gradient = loss(body.encode(chunks[0], graph=True))
        with during_last_backward or nullcontext():
            body.backward(chunks[0], gradient)
        return value

    embeddings = []
    for number, chunk in enumerate(chunks):
        before_encoding(number)
        embeddings.append(body.encode(chunk, graph=False))

    value, gradient = loss(torch.cat(embeddings))
    gradients = gradient.split([len(part) for part in embeddings])

    for number, (chunk, part) in enumerate(zip(chunks, gradients, strict=True)):
        before_encoding(number)
        body.encode(chunk, graph=True)
        with (during_last_backward if number == last else None) or nullcontext():
            body.backward(chunk, part)
    return value
