"""LoRA's layers on a GPU: the adapter's product is added in place, in one pass over the layer's output.

PEFT writes the product of an adapter, scales it and adds it to the layer's output, and its backward pass does the same
with gradients: eight passes over memory where two do, and on a GPU these passes bound a step. The sum is rounded once
in place of three times. On a CPU runs keep PEFT's own layers, or the merged ones of model/cpu, and their bits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def add_in_place(body: nn.Module) -> None:
    """Let all plain LoRA layers without dropout add in place; others keep PEFT's `forward`."""
    from peft.tuners.lora import Linear

    for module in body.modules():
        if isinstance(module, Linear) and _is_plain(module):
            module.forward = _forward_of(module)


def _is_plain(module: Any) -> bool:
    (name,) = module.active_adapters
    drops = any(isinstance(each, nn.Dropout) and each.p > 0 for each in module.lora_dropout.modules())
    return name not in module.lora_variant and not drops and not module.merged


def _forward_of(module: Any) -> Any:
    (name,) = module.active_adapters
    a, b, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]

    def forward(x: Tensor) -> Tensor:
        base, kind = module.get_base_layer(), x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            bias = None if base.bias is None else base.bias.to(dtype)
            weights = (each.weight.to(dtype) for each in (base, a, b))
            found: Tensor = _Adapted.apply(x.flatten(0, -2).to(dtype), bias, *weights, scaling)
        return found if x.dim() == 2 else found.unflatten(0, x.shape[:-1])

    return forward


class _Adapted(torch.autograd.Function):
    """x Wᵀ + bias + scaling (x Aᵀ) Bᵀ, for x [T, inputs], W [outputs, inputs], A [rank, inputs] and B [outputs, rank].

    W and its bias are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        inner = x @ a.T  # [T, rank]
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return functional.linear(x, weight, bias).addmm_(inner, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        (above,) = gradients  # [T, outputs]
        of_inner = (above @ b).mul_(ctx.scaling)  # [T, rank]
        below = (above @ weight).addmm_(of_inner, a) if ctx.needs_input_grad[0] else None
        return below, None, None, of_inner.T @ x, (above.T @ inner).mul_(ctx.scaling), None
