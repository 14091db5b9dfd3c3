"""Attention inside each sequence of a packed chunk, without padding and without a mask: causal or bidirectional.

Sequences are sorted by length, so sequences of equal length form a dense batch, which is a view of the chunk. On a GPU
one variable-length kernel handles all lengths: flash attention in bf16, torch's memory-efficient attention in float32.
Elsewhere each length is one call of torch's attention, which costs a launch for each length and block (the CPU body of
model/cpu has its own, cheaper attention).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from embedscale.errors import UserError
from embedscale.model.float32_attention import MOST_SEQUENCES, attend_float32
from embedscale.model.packing import Run


def attend_packed(body: nn.Module, attention: str = "causal") -> None:
    """Make the blocks of a decoder call `packed_attention`.

    Raises UserError if they only have their own attention, or if they always attend to later tokens and `attention` is
    causal.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("packed", packed_attention)
    body.set_attn_implementation("packed")  # type: ignore[operator]
    config: Any = body.config
    if config._attn_implementation != "packed":
        raise UserError(
            f"backbone.name: {type(body).__name__} attends in a way of its own; expected plain causal attention"
        )
    if attention == "causal" and getattr(config, "is_causal", True) is False:
        raise UserError(
            "backbone.attention: causal, but the model's config.json says is_causal: false; set it to bidirectional"
        )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    packing: Any = None,
    later_tokens: bool = False,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend to the earlier tokens of the same sequence, or to all; transformers calls this function in each block.

    `query` is [1, heads, T, size]; `key` and `value` may have fewer heads. Returns [1, T, heads, size].
    Raises UserError for anything but plain attention. Windows are not applied: the caller must keep sequences
    shorter than a window.
    """
    others = {
        "no packing information": packing is None,
        "a mask": attention_mask is not None,
        "capped scores": softcap is not None,
        "sinks": s_aux is not None,
        "later tokens": not (later_tokens or getattr(module, "is_causal", True)),
    }
    if asked := [name for name, is_asked in others.items() if is_asked]:
        raise UserError(
            f"backbone.name: {type(module).__name__} attends with {', '.join(asked)}; expected plain causal attention"
        )
    # [1, heads, T, size] → [T, heads, size]. Not x[0]: its backward pass fills a buffer with zeros and copies into it.
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(query, key, value, packing, scaling, dropout, not later_tokens)[None], None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Any,
    scaling: float,
    dropout: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Return attention inside each sequence, to earlier tokens or, if not `causal`, to all: [T, heads, size].

    `query`, `key` and `value` are [T, heads, size]; the latter two may have fewer heads.
    """
    # Under autocast the rotated queries and keys are float32 and the values bf16; the kernel needs one dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if _has_kernel(query, packing) and not dropout:
        return variable_length(query, key, value, packing, scaling, causal)
    return _run_by_run(query, key, value, packing.runs, scaling, dropout, causal)


@torch.compiler.disable  # otherwise it would be compiled again for the lengths of every batch
def _run_by_run(
    query: Tensor, key: Tensor, value: Tensor, runs: Sequence[Run], scaling: float, dropout: float, causal: bool
) -> Tensor:
    """Return [T, heads, size]: one call of torch's attention for each length."""
    sizes = [run.stop - run.start for run in runs]
    parts = []
    for run, *states in zip(runs, *(x.split(sizes) for x in (query, key, value)), strict=True):
        # [tokens, heads, size] → [sequences, heads, length, size]
        q, k, v = (x.unflatten(0, (-1, run.length)).transpose(1, 2) for x in states)
        out = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _has_kernel(query: Tensor, packing: Any) -> bool:
    size = query.shape[-1]
    if query.dtype == torch.float32:
        return query.is_cuda and size % 4 == 0 and len(packing.ends) <= MOST_SEQUENCES
    fits = query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256
    return query.is_cuda and fits and _is_ampere(query.device.index)


@torch.compiler.assume_constant_result
def _is_ampere(device: int) -> bool:
    """Return whether a GPU is of the Ampere generation or newer, which the kernel needs."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def variable_length(
    query: Tensor, key: Tensor, value: Tensor, packing: Any, scaling: float, causal: bool = True
) -> Tensor:
    """Return [T, heads, size]: attention of a whole chunk in one kernel. `key` and `value` may have fewer heads."""
    ends, bound = packing.ends, packing.bound
    if key.shape[1] != query.shape[1]:  # varlen_attn takes fewer heads of keys only from torch 2.12 on
        each = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    if query.dtype == torch.float32:
        out, _sums = attend_float32(query, key, value, ends, bound, scaling, causal)
        return out
    found = varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        bound,
        bound,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
    )
    assert isinstance(found, Tensor)  # a pair only if asked for
    return found
