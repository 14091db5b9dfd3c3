"""Operators of torch that the CPU body calls below torch's public functions, each with the reason.

They are not documented, so a release of torch may change them. They are all here, and the tests of the CPU body compare
their results with those of public functions.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_aten, _onednn = torch.ops.aten, torch.ops.mkldnn

# Public attention returns neither the logarithm of the denominators nor a gradient without a graph.
attention_forward = _aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias, by oneDNN if torch has it.

    Public `functional.linear` uses a BLAS for float32. oneDNN takes between half and nine tenths of its time, by the
    processor.
    """
    if not _has_onednn(x.dtype):
        return functional.linear(x, weight, bias)
    found: Tensor = _onednn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def plus_product(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x + a weightᵀ + bias in the dtype of x. oneDNN adds x without another pass over memory."""
    if a.dtype != x.dtype or not _has_onednn(a.dtype):
        return x + product(a, weight, bias)
    found: Tensor = _onednn._linear_pointwise.binary(a, x, weight, bias, "add")
    return found


def over_tokens(above: Tensor, below: Tensor) -> Tensor:
    """Return aboveᵀ below, [out, in] from [T, out] and [T, in]: the sum of outer products over tokens.

    oneDNN is faster with AVX-512 alone: with AVX2 it takes 1.0 to 1.8 times as long as MKL. It copies its first factor,
    so the narrower one comes first. The other order gives the same bits.
    """
    if above.dtype == torch.float32 and _has_onednn(above.dtype) and _has_avx512():
        if below.shape[1] < above.shape[1]:
            return product(below.T, above.T).T
        return product(above.T, below.T)
    return above.T @ below


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Return whether torch has oneDNN, and oneDNN products of `dtype` on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    known: bool = dtype == torch.float32 or _onednn._is_mkldnn_bf16_supported()
    return known


@cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def gelu_in_place(x: Tensor) -> Tensor:
    """Replace x by GELU(x): public `functional.gelu` has no in-place form and would fill another buffer."""
    found: Tensor = _aten.gelu_(x)
    return found


def gelu_backward_in_place(gradient: Tensor, x: Tensor) -> None:
    """Replace the gradient of GELU(x) by that of x: public functions give it through a graph alone."""
    _aten.gelu_backward.grad_input(gradient, x, grad_input=gradient)


def layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return [T, width] normalised, and the means and inverse deviations that public `layer_norm` does not return."""
    found: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
    return found


def layer_norm_backward(gradient: Tensor, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the gradient of x from that of the normalised x, with what `layer_norm` returned."""
    found: Tensor = _aten.native_layer_norm_backward(
        gradient, x, x.shape[1:], mean, deviation, None, None, [True, False, False]
    )[0]
    return found


def embedding_backward(gradient: Tensor, rows: Tensor, vocabulary: int, padding: int | None) -> Tensor:
    """Return [vocabulary, width], the sum of `gradient` [N, width] over `rows` [N]; zero in the padding row.

    Public functions give this gradient through a graph alone.
    """
    found: Tensor = _aten.embedding_dense_backward(
        gradient, rows, vocabulary, -1 if padding is None else padding, False
    )
    return found
