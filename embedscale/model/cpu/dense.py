"""Dense layers of blocks that stay as transformers wrote them, such as Llama's: float32 products by oneDNN.

torch's own layers use a BLAS for float32. Of a step of Llama's blocks in Pythia-14M's size, this saves a twentieth on a
Zen 4. Under autocast, torch uses oneDNN by itself, so layers in bf16 stay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from embedscale.model.backbone import blocks_of
from embedscale.model.cpu.kernels import over_tokens, product
from embedscale.model.encoder import Encoder


@contextmanager
def by_onednn(encoder: Encoder) -> Iterator[None]:
    """Let the dense layers of an encoder's blocks multiply by oneDNN until the end of the block."""
    found: list[Any] = []
    if encoder.precision != "bf16" and encoder.plain_blocks:
        found = [each for each in blocks_of(encoder.body).modules() if type(each) is nn.Linear]
    layers = [layer for layer in found if "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, x: Tensor) -> Tensor:
    found: Tensor = _Dense.apply(x, layer.weight, layer.bias)
    return found


class _Dense(torch.autograd.Function):
    """x weightᵀ + bias, for x [..., inputs] and weight [outputs, inputs]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        below, trains, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if trains else None, weight if below else None)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (above,) = gradients
        rows = above.flatten(0, -2)  # [T, outputs]
        return (
            None if weight is None else product(above, weight.T),
            None if x is None else over_tokens(rows, x.flatten(0, -2)),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )
