"""A body that uses a CPU better than one chunk after the other on all cores: parts, distinct tokens, merged layers.

Parts: a chunk is cut into parts, and each core works on its own. One chunk on two threads is slower than two parts on
one thread each, because threads wait for each other after every operation. Each core but the first needs gradients of
its own, which are added up in a fixed order, so that the result does not depend on which core is faster.

Distinct tokens: the gradient of the token embedding is collected for the distinct tokens of each part. Otherwise each
part would fill a gradient as large as the vocabulary.

Merged layers: folded.py, for Pythia. Other decoders keep their blocks, with the products of dense.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedscale.model.cpu.dense import by_onednn
from embedscale.model.cpu.folded import FoldedPythia, fold
from embedscale.model.cpu.kernels import embedding_backward
from embedscale.model.encoder import Encoder
from embedscale.model.packing import Packed

PART_TOKENS = 4096  # in a part: enough for many tokens to occur more than once


class _Encoded(NamedTuple):
    """One part with the graph of its forward pass."""

    embeddings: Tensor  # [S, width]
    rows: Tensor | None  # [U, width], embeddings of the distinct tokens, a leaf; None if the token embedding is frozen
    distinct: Tensor | None  # int64 [U]


class CpuBody:
    """Encodes and differentiates a step's chunks; see `training_body` for its lifetime."""

    overlaps = False  # gradients are complete only after the last chunk

    def __init__(self, encoder: Encoder, folded: FoldedPythia | None, each: Callable[..., Iterator[Any]]):
        self.encoder, self.folded, self._each = encoder, folded, each
        self._parts: dict[int, list[Packed]] = {}  # by the identity of their chunk
        self._encoded: list[_Encoded] = []
        embedding: Any = encoder.body.get_input_embeddings()  # type: ignore[operator]
        # Gemma multiplies all rows by one number; other classes of embeddings could do anything.
        self._scale: Tensor | None = getattr(embedding, "embed_scale", None)
        known = type(embedding) is nn.Embedding or (isinstance(embedding, nn.Embedding) and self._scale is not None)
        trains = known and embedding.weight.requires_grad
        self._embedding: nn.Embedding | None = embedding if trains else None
        leaves: list[Tensor] = [parameter for parameter in encoder.body.parameters() if parameter.requires_grad]
        if folded is not None:
            leaves = folded.leaves
        self._leaves = [leaf for leaf in leaves if self._embedding is None or leaf is not self._embedding.weight]
        # A gradient for each core but the first; merged weights and their gradients.
        copies = torch.get_num_threads() - 1 + (0 if folded is None else 2)
        self.extra_numbers = copies * sum(leaf.numel() for leaf in self._leaves)

    def forward(self, packed: Packed) -> Tensor:
        """Return embeddings [S, width] of a chunk in one piece, on this thread, with gradients if they are enabled."""
        return self._embeddings(packed, None, None)

    def encode(self, chunk: Packed, graph: bool) -> Tensor:
        """Return embeddings [S, width]; keep the graph for `backward` if `graph`."""
        if id(chunk) not in self._parts:
            self._parts[id(chunk)] = parts_of(chunk)
        parts = self._parts[id(chunk)]

        def encode(part: Packed) -> _Encoded:
            with torch.set_grad_enabled(graph):
                if not graph or self._embedding is None:
                    return _Encoded(self._embeddings(part, None, None), None, None)
                distinct, which = part.tokens.unique(return_inverse=True)
                rows = functional.embedding(distinct, self._embedding.weight.detach()).requires_grad_()
                return _Encoded(self._embeddings(part, rows, which), rows, distinct)

        encoded = list((self._each if len(parts) > 1 else map)(encode, parts))
        self._encoded = encoded if graph else []
        return torch.cat([part.embeddings.detach() for part in encoded])

    def _embeddings(self, packed: Packed, rows: Tensor | None, which: Tensor | None) -> Tensor:
        if self.folded is not None:
            hidden = self.folded(packed, rows, which)
        else:
            inputs = None if rows is None or which is None else functional.embedding(which, rows)
            if inputs is not None and self._scale is not None:
                inputs = inputs * self._scale.to(inputs.dtype)
            hidden = self.encoder.hidden_states(packed, inputs)
        return self.encoder.embed(hidden, packed)

    def backward(self, chunk: Packed, gradient: Tensor) -> None:
        """Add to the leaves' gradients, given the gradient [S, width] of the chunk encoded last with a graph."""
        parts, self._encoded = self._encoded, []
        gradients = gradient.split([len(part.embeddings) for part in parts])
        cores = min(torch.get_num_threads(), len(parts))

        def backward(core: int) -> list[Tensor]:
            """Process every `cores`-th part. Core 0 adds to the leaves' gradients; the others return their sums."""
            total: list[Tensor] = []
            for part, above in list(zip(parts, gradients, strict=True))[core::cores]:
                if core == 0:
                    part.embeddings.backward(above)
                    continue
                into = self._leaves if part.rows is None else [*self._leaves, part.rows]
                found = list(torch.autograd.grad(part.embeddings, into, above))
                if part.rows is not None:
                    part.rows.grad = found.pop()
                total = [a.add_(b) for a, b in zip(total, found, strict=True)] if total else found
            return total

        for total in list((self._each if cores > 1 else map)(backward, range(cores)))[1:]:
            for leaf, own in zip(self._leaves, total, strict=True):
                leaf.grad.add_(own)  # type: ignore[union-attr]
        if self._embedding is not None:
            self._add_embedding_gradient(self._embedding, parts)

    def _add_embedding_gradient(self, embedding: nn.Embedding, parts: Sequence[_Encoded]) -> None:
        found = embedding_backward(
            torch.cat([part.rows.grad for part in parts]),  # type: ignore[union-attr,misc]
            torch.cat([part.distinct for part in parts]),  # type: ignore[misc]
            embedding.num_embeddings,
            embedding.padding_idx,
        )
        embedding.weight.grad = found if embedding.weight.grad is None else embedding.weight.grad.add_(found)


def _folded(encoder: Encoder) -> FoldedPythia | None:
    """Return the merged layers, which attend causally, or None if the blocks must stay as they are."""
    return fold(encoder.body, encoder.precision) if encoder.plain_blocks and encoder.causal else None


@contextmanager
def training_body(encoder: Encoder) -> Iterator[CpuBody]:
    """Give a body for one step, and complete the parameters' gradients at the end of the block."""
    folded = _folded(encoder)
    with on_each_core() as each, by_onednn(encoder) if folded is None else nullcontext():
        yield CpuBody(encoder, folded, each)
        if folded is not None:
            folded.backward()


class CpuInference:
    """Embeds chunks while the weights are constant, a chunk on each core."""

    def __init__(self, encoder: Encoder):
        self._folded = _folded(encoder)
        self._body = CpuBody(encoder, self._folded, map)

    def expect(self, tokens: int) -> None:
        """Prepare to embed texts with `tokens` tokens in all."""
        if self._folded is not None:
            self._folded.expect(tokens)

    def embed(self, chunks: Sequence[Packed]) -> Iterator[Tensor]:
        """Yield embeddings [S, width] of each chunk, in order."""
        with torch.no_grad(), on_each_core() as each:
            yield from each(torch.no_grad()(self._body.forward), chunks)


def parts_of(chunk: Packed) -> list[Packed]:
    """Return equally many parts for each core, of about PART_TOKENS tokens, or the chunk itself if it is small."""
    cores, tokens = torch.get_num_threads(), len(chunk.tokens)
    if tokens < PART_TOKENS:
        return [chunk]
    return chunk.cut(cores * math.ceil(tokens / PART_TOKENS / cores))


@contextmanager
def on_each_core() -> Iterator[Callable[..., Iterator[Any]]]:
    """Give a function like `map` that works on as many items at once as torch has threads; results come in order."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)
