"""GPT-NeoX's attention on a GPU: queries and keys are turned in place, in the layer's output.

transformers turns a part of each head, and to do so cuts each head in two, joins the parts again in float32, and undoes
all of it in the backward pass: a fifth of the bytes that a step moves, and a third of its kernels. Here only the part
that turns is read and written, and the attention's kernel reads queries, keys and values where they are. The result
is that of transformers, up to rounding in the backward pass. Other decoders, compiled blocks and CPUs do without.
"""

from typing import Any

import torch
from torch import Tensor, nn

from embedscale.model.attention import attend
from embedscale.model.backbone import blocks_of


def turn_in_place(body: nn.Module) -> None:
    """Let the attention of all GPT-NeoX blocks turn queries and keys in place; other blocks stay as they are."""
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

    attentions: list[Any] = [each for each in blocks_of(body).modules() if type(each) is GPTNeoXAttention]
    for attention in attentions:
        attention.forward = _forward_of(attention)


def _forward_of(attention: Any) -> Any:
    def forward(
        hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], packing: Any, later_tokens: bool, **_: Any
    ) -> Any:
        """Return [1, T, width] and None, as transformers' `forward` does. `hidden` is [1, T, width]."""
        cos, sin = (x.squeeze(0) for x in position_embeddings)  # each [T, numbers of a head that turn]
        # [T, heads x (query, key, value) x size]. Of a batch of one, the layer would return a view, and autograd copies
        # the gradient of a view that was changed in place.
        states = attention.query_key_value(hidden.squeeze(0))
        states = _Turned.apply(states, cos, sin, attention.head_size)
        query, key, value = states.view(len(states), -1, 3, attention.head_size).unbind(2)
        dropout = attention.attention_dropout if attention.training else 0.0
        found = attend(query, key, value, packing, attention.scaling, dropout, not later_tokens)  # [T, heads, size]
        return attention.dense(found.flatten(1)[None]), None

    return forward


class _Turned(torch.autograd.Function):
    """Turn queries and keys of [T, heads x 3 x size] by their positions' angles, in place."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
        ctx.mark_dirty(states)
        ctx.save_for_backward(cos, sin)
        ctx.size = size
        _turn(states, cos, sin, size, 1)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (gradient,) = gradients
        # The gradient comes from `unbind`, which made it for this function alone.
        _turn(gradient, cos, sin, ctx.size, -1)
        return gradient, None, None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, size: int, way: int) -> None:
    """Multiply pairs of numbers, half of the turning part apart, by cos + i sin (`way` 1) or cos - i sin (`way` -1)."""
    half = cos.shape[1] // 2  # both halves of `cos`, and of `sin`, are equal
    parts = states.view(len(states), -1, 3, size)[:, :, :2]  # [T, heads, 2, size]
    first, second = parts[..., :half], parts[..., half : 2 * half]
    real, imaginary = (x[:, None, None, :half] for x in (cos, sin))  # float32, in which all is computed
    found = torch.addcmul(first * real, second, imaginary, value=-way)
    torch.addcmul(second * real, first, imaginary, value=way, out=second)
    first.copy_(found)
