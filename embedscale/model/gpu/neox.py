"""GPT-NeoX's blocks for a GPU: transformers' dense layers, with kernels of ours for everything between them.

transformers writes and reads the residual once for each norm and each sum, in float32, and makes bf16 copies. Here the
sum of one block and the norms of the next are one kernel, and so is the whole attention (kernels.py). The result is
that of transformers up to rounding. Checkpointed, compiled and sharded blocks, dropout, long texts, attention to
later tokens and other decoders stay as they are.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from embedscale.model.gpu import kernels


def fuse(body: Any) -> None:
    """Replace the forward pass of a GPT-NeoX body, where a chunk allows it."""
    whole, blocks = body.forward, body.layers

    def forward(input_ids: Any = None, inputs_embeds: Any = None, position_ids: Any = None, **others: Any) -> Any:
        """Return an object with `last_hidden_state` [1, T, width], as transformers' `forward` does."""
        packing = others["packing"]
        if packing.runs[-1].length > kernels.LONGEST or others.get("later_tokens"):  # the kernel is causal
            return whole(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, **others)
        residual = (body.embed_in(input_ids) if inputs_embeds is None else inputs_embeds).squeeze(0)
        angles = tuple(x.squeeze(0) for x in body.rotary_emb(residual[None], position_ids))
        classes = kernels.classes_of(packing.runs)
        outputs: tuple[Tensor, ...] = ()
        for block in blocks:
            norms = block.input_layernorm, block.post_attention_layernorm
            residual, *inputs = add_norms(residual, outputs, norms)
            outputs = attention(block.attention, inputs[0], angles, packing.ends, classes), block.mlp(inputs[1])
        _, hidden = add_norms(residual, outputs, (body.final_layer_norm,), torch.float32)
        return SimpleNamespace(last_hidden_state=hidden[None])

    body.forward = forward


def fits(body: nn.Module) -> bool:
    """Return whether `fuse` can serve: a GPT-NeoX whose attention and MLP read the same residual."""
    config: Any = body.config
    size = config.hidden_size // config.num_attention_heads
    return config.model_type == "gpt_neox" and config.use_parallel_residual and size <= kernels.WIDEST


def attention(layer: Any, inputs: Tensor, angles: tuple[Tensor, ...], ends: Tensor, classes: list[int]) -> Tensor:
    """Return the attention's output [T, width]; `inputs` is [T, width]."""
    states = layer.query_key_value(inputs)
    return layer.dense(_Attention.apply(states, *angles, ends, classes, layer.head_size, layer.scaling))


def add_norms(
    residual: Tensor, outputs: tuple[Tensor, ...], norms: tuple[nn.LayerNorm, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Return `residual` plus `outputs`, and each norm of the sum: all [T, width].

    `residual` is float32; the norms are of the type in which the dense layers compute, or of `dtype`.
    """
    device = residual.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else residual.dtype
    weights, biases = [x.weight for x in norms], [x.bias for x in norms]
    return _AddNorms.apply(residual, norms[0].eps, dtype or computed, len(norms), *weights, *biases, *outputs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, *others: Any) -> Tensor:
        ctx.save_for_backward(states, cos, sin, ends)
        ctx.others = others
        return kernels.attend(states, cos, sin, ends, *others)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = kernels.attend_backward(*ctx.saved_tensors, gradients[0].contiguous(), *ctx.others)
        return (found, *[None] * (3 + len(ctx.others)))


class _AddNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, eps: float, dtype: torch.dtype, number: int, *tensors: Tensor) -> Any:
        weights, biases, outputs = tensors[:number], tensors[number : 2 * number], tensors[2 * number :]
        total, *norms, means, scales = kernels.add_norms(residual, [*outputs], [*weights], [*biases], eps, dtype)
        if not outputs:
            total = residual
        ctx.number, ctx.added = number, outputs[0].dtype if outputs else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, means, scales, *weights)
        return (total, *norms[:number])

    @staticmethod
    def backward(ctx: Any, of_total: Tensor | None, *of_norms: Tensor) -> tuple[Tensor | None, ...]:
        total, means, scales, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[4 : 4 + 2 * ctx.number]
        half = ctx.added if ctx.added not in (None, total.dtype) else None
        found, halves, sums = kernels.add_norms_backward(
            total, means, scales, of_total, [x.contiguous() for x in of_norms], weights, half, any(needed)
        )
        # Rows of `sums`: weight and bias of the first norm, then of the second. Arguments: weights, then biases.
        rows = [*range(0, 2 * ctx.number, 2), *range(1, 2 * ctx.number, 2)]
        own = [sums[row] if wanted else None for row, wanted in zip(rows, needed, strict=True)]
        added = [] if ctx.added is None else [found if half is None else halves] * 2
        return (found, None, None, None, *own, *added)
