"""Pythia's blocks on a CPU with less arithmetic and fewer passes over memory, and a backward pass written for them.

While the weights are constant (for a step, or for a whole evaluation), operations are merged: the scales and shifts of
both layer norms into the layers behind them, so that one normalised input serves both; LoRA's product into the weight
beside it; and the two biases that the parallel residual adds. `leaves` collect the gradients of the merged tensors over
all parts of a batch; `backward` passes them on to the parameters, once a step.

The first block's dense layers depend on the token alone: each distinct token of a part goes through them once, and when
many texts are embedded, each token of the vocabulary.

Attention is float32 for both precisions: torch's backward kernel takes 2 to 20 times as long in bf16 for sequences of 8
to 75 tokens. The price of merging is a pass over the weights before each step and one after it (body.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXModel

from embedscale.model.backbone import drops
from embedscale.model.cpu.attention import attend, attend_backward, beside, rotate, rows_of, states_of
from embedscale.model.cpu.kernels import (
    gelu_backward_in_place,
    gelu_in_place,
    layer_norm,
    layer_norm_backward,
    over_tokens,
    plus_product,
    product,
)
from embedscale.model.packing import Packed, Run

REMEMBERED_TO = 12  # blocks: in deeper bodies the first block is too small a part of the work for its table's memory


def fold(body: nn.Module, precision: str) -> "FoldedPythia | None":
    """Return the folded body if `body` is a Pythia on a CPU with the options that all Pythia sizes share, else None."""
    if not isinstance(body, GPTNeoXModel) or body.device.type != "cpu":
        return None
    config = body.config
    known = config.use_parallel_residual and config.hidden_act == "gelu" and config.attention_bias
    layer: Any = body.layers[0]
    by_pairs = layer.attention.rotary_ndims % 2 == 0  # of dimensions, as `rotate` turns them
    variants = any(getattr(module, "lora_variant", None) for module in body.modules())  # such as DoRA
    if not known or not by_pairs or variants or drops(body):
        return None
    return FoldedPythia(body, torch.bfloat16 if precision == "bf16" else torch.float32)


class _Linear(NamedTuple):
    """y = x weightᵀ + bias. Weight and bias, or LoRA's factors a and b, may train; `weight` already includes b a."""

    weight: Tensor  # [out, in]
    bias: Tensor  # [out]
    a: Tensor | None = None  # [rank, in]
    b: Tensor | None = None  # [out, rank], scaled


class _Block(NamedTuple):
    """The merged layers of a block. The order of their tensors is the order of a block's leaves."""

    attended: _Linear  # from the attention's outputs to the residual
    qkv: _Linear  # to 3 width: the queries of all heads, the keys, the values
    up: _Linear  # to 4 width: the MLP's hidden units
    down: _Linear  # from the hidden units to the residual; holds the bias of `attended` too

    def to(self, dtype: torch.dtype) -> "_Block":
        def cast(linear: _Linear) -> _Linear:
            return _Linear(*(None if x is None else x.detach().to(dtype) for x in linear))  # type: ignore[arg-type]

        return _Block(*map(cast, self))


class FoldedPythia:
    """Computes a GPTNeoXModel's last hidden states and gradients, equal to transformers' up to rounding."""

    def __init__(self, body: GPTNeoXModel, dtype: torch.dtype):
        self.embed, self.rotary, self.norm = body.embed_in, body.rotary_emb, body.final_layer_norm
        attention: Any = body.layers[0].attention
        self.size, self.turned = attention.head_size, attention.rotary_ndims
        self.dtype = dtype
        made = [self._fold(layer) for layer in body.layers]  # type: ignore[arg-type]
        self.blocks = [block.to(dtype) for block in made]
        self._made: list[list[Tensor | None]] = [[x for linear in block for x in linear] for block in made]
        self._leaves = [
            [x.detach().requires_grad_() if x is not None and x.requires_grad else None for x in block]
            for block in self._made
        ]
        outside = (p for name, p in body.named_parameters() if p.requires_grad and not name.startswith("layers."))
        self.leaves = [leaf for block in self._leaves for leaf in block if leaf is not None] + list(outside)
        self.first: tuple[Tensor, Tensor] | None = None  # of the first block, for each token of the vocabulary
        self.remembering = False

    @torch.no_grad()
    def expect(self, tokens: int) -> None:
        """Prepare to embed texts with `tokens` tokens in all, without gradients.

        From as many tokens as the vocabulary has on, the first block's layers are computed once for the vocabulary.
        Embeddings, to the last bit, depend on this call's `tokens`, not on earlier calls.
        """
        vocabulary = self.embed.num_embeddings
        self.remembering = tokens >= vocabulary and len(self.blocks) <= REMEMBERED_TO
        if self.remembering and self.first is None:
            some = torch.arange(vocabulary).split(4096)
            parts = [_layers(self.embed(tokens), self.blocks[0], self.norm.eps) for tokens in some]
            states, hidden = map(torch.cat, zip(*parts, strict=True))
            self.first = states, hidden

    def _fold(self, layer: GPTNeoXLayer) -> _Block:
        attention, mlp = layer.attention, layer.mlp
        qkv = _behind(attention.query_key_value, layer.input_layernorm)
        order = beside(len(qkv.weight), self.size, self.turned).view(-1, 3, self.size).transpose(0, 1).flatten()
        attended, down = _linear(attention.dense), _linear(mlp.dense_4h_to_h)
        return _Block(
            attended=attended._replace(bias=attended.bias.detach()),
            qkv=_Linear(*(x.index_select(0, order) if x is not None and x is not qkv.a else x for x in qkv)),  # type: ignore[arg-type]
            up=_behind(mlp.dense_h_to_4h, layer.post_attention_layernorm),
            down=down._replace(bias=attended.bias + down.bias),
        )

    def __call__(self, packed: Packed, rows: Tensor | None = None, which: Tensor | None = None) -> Tensor:
        """Return hidden states float32 [T, width].

        `rows` [U, width] are the embeddings of the chunk's distinct tokens, and `which` [T] is the index of each token
        among them; by default they are looked up here.
        """
        with torch.autocast("cpu", enabled=False):
            cos, sin = (x[0, :, : self.turned // 2] for x in self.rotary(self.norm.weight, packed.positions[None]))
            turn = torch.complex(cos.float(), sin.float())[:, None]
            remembered = self.first if self.remembering else None
            hidden, index = rows, which
            if rows is None and remembered is None:
                distinct, index = packed.tokens.unique(return_inverse=True)
                hidden = self.embed(distinct)
            for number, (block, leaves) in enumerate(zip(self.blocks, self._leaves, strict=True)):
                needed = any(leaf is not None for leaf in leaves) or (hidden is not None and hidden.requires_grad)
                trains = needed and torch.is_grad_enabled()
                if number == 0 and remembered is not None:
                    states, hidden = (known[packed.tokens] for known in remembered)
                else:
                    layers: Any = _Layers.apply if trains else _layers
                    states, hidden = layers(hidden, block, self.norm.eps, *leaves[4:])
                    if number == 0 and index is not None:
                        states, hidden = (functional.embedding(index, x) for x in (states, hidden))
                attention: Any = _Attention.apply if trains else _attention
                hidden = attention(states, hidden, block, turn, packed.runs, self.size, *leaves[:4])
            found: Tensor = self.norm(hidden)
            return found

    def backward(self) -> None:
        """Add the gradients that the leaves collected to the gradients of the parameters."""
        both = [
            (tensor, leaf.grad)
            for made, leaves in zip(self._made, self._leaves, strict=True)
            for tensor, leaf in zip(made, leaves, strict=True)
            if leaf is not None and leaf.grad is not None
        ]
        if both:
            tensors, gradients = zip(*both, strict=True)
            torch.autograd.backward(tensors, gradients)


def _linear(module: Any) -> _Linear:
    if type(module) is nn.Linear:
        return _Linear(module.weight, module.bias)
    base = module.get_base_layer()  # PEFT's name for the layer beside LoRA's factors
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight * module.scaling["default"]
    return _Linear(base.weight + (b @ a).detach(), base.bias, a, b)


def _behind(module: Any, norm: nn.LayerNorm) -> _Linear:
    """Return the layer merged with the scale and shift of the norm before it."""
    weight, bias, a, b = _linear(module)
    if a is None or b is None:
        return _Linear(weight * norm.weight, bias + weight @ norm.bias)
    bias = bias + module.get_base_layer().weight @ norm.bias + b @ (a @ norm.bias)
    return _Linear(weight * norm.weight, bias, a * norm.weight, b)


def _layers(hidden: Tensor, block: _Block, eps: float, *_: Any) -> tuple[Tensor, Tensor]:
    """Return what a block computes for each token alone: states [T, 3 width], and the residual plus the MLP's part."""
    normed = functional.layer_norm(hidden, hidden.shape[1:], eps=eps).to(block.up.weight.dtype)
    units = product(normed, block.up.weight, block.up.bias)
    hidden = plus_product(hidden, gelu_in_place(units), block.down.weight, block.down.bias)
    return product(normed, block.qkv.weight, block.qkv.bias).float(), hidden


def _attention(
    states: Tensor, hidden: Tensor, block: _Block, turn: Tensor, runs: Sequence[Run], size: int, *_: Any
) -> Tensor:
    """Return the residual plus the attention's output. The attention's outputs overwrite the queries in `states`."""
    width = hidden.shape[1]
    rotate(_turned(states, turn, size), turn)
    for run in runs:
        found, _sums = attend(*_states(states, run, size), size**-0.5)
        states[run.start : run.stop, :width] = rows_of(found)
    return plus_product(hidden, states[:, :width].to(block.attended.weight.dtype), block.attended.weight)


class _Layers(torch.autograd.Function):
    """`_layers` with a backward pass; the leaves are arguments because their gradients are returned for them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, block: _Block, eps: float, *leaves: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, mean, deviation = layer_norm(hidden, eps)
        normed = normed.to(block.up.weight.dtype)
        units = product(normed, block.up.weight, block.up.bias)
        active = functional.gelu(units)
        result = plus_product(hidden, active, block.down.weight, block.down.bias)
        states = product(normed, block.qkv.weight, block.qkv.bias).float()
        through, _, _, *needed = ctx.needs_input_grad
        if not through and not any(needed[:4]):
            ctx.mark_non_differentiable(states)
        # What only the gradients of weights need is kept only if weights train.
        ctx.save_for_backward(
            hidden if through else None, mean, deviation, normed if any(needed[:8]) else None,
            units, active if any(needed[8:]) else None,
        )  # fmt: skip
        ctx.block = block
        return states, result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden, mean, deviation, normed, units, active = ctx.saved_tensors
        _, qkv, up, down = ctx.block
        through, _, _, *needed = ctx.needs_input_grad
        of_qkv, of_up, of_down = needed[:4], needed[4:8], needed[8:]
        states, result = gradients
        above = result.to(units.dtype)
        found_down = _gradients(of_down, down, above, active, result)
        found_qkv: list[Tensor | None] = [None] * 4
        found_up, below = found_qkv, None
        if through or any(of_up):
            inner = product(above, down.weight.T)
            gelu_backward_in_place(inner, units)
            found_up = _gradients(of_up, up, inner, normed)
            below = product(inner, up.weight.T) if through else None
        if through or any(of_qkv):
            inner = states.to(units.dtype)
            found_qkv = _gradients(of_qkv, qkv, inner, normed)
            below = None if below is None else plus_product(below, inner, qkv.weight.T)
        if below is not None:
            below = layer_norm_backward(below.to(hidden.dtype), hidden, mean, deviation)
            below += result
        return below, None, None, *found_qkv, *found_up, *found_down


class _Attention(torch.autograd.Function):
    """`_attention` with a backward pass. It rotates `states` in place; no other operation reads `states`."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, hidden: Tensor, block: _Block, turn: Tensor, runs: Sequence[Run], size: int,
        *leaves: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rotate(_turned(states, turn, size), turn)
        out, sums = torch.empty_like(hidden), []
        for run in runs:
            found, log_sum = attend(*_states(states, run, size), size**-0.5)
            out[run.start : run.stop] = rows_of(found)
            sums.append(log_sum)
        ctx.save_for_backward(states, out, turn, *sums)
        ctx.fixed = block.attended, runs, size
        return plus_product(hidden, out.to(block.attended.weight.dtype), block.attended.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, out, turn, *sums = ctx.saved_tensors
        attended, runs, size = ctx.fixed
        through, _, _, _, _, _, *needed = ctx.needs_input_grad
        above = gradients[0].to(attended.weight.dtype)
        found = _gradients(needed, attended, above, out.to(above.dtype)) if any(needed) else [None] * 4
        below = None
        if through:
            outer, below = product(above, attended.weight.T).float(), torch.empty_like(states)
            for run, log_sum in zip(runs, sums, strict=True):
                gradient, whole = (states_of(x, run, size, 0, out.shape[1]) for x in (outer, out))
                parts = attend_backward(*_states(states, run, size), gradient, whole, log_sum, size**-0.5)
                for into, part in zip(_states(below, run, size), parts, strict=True):
                    into.copy_(part)
            rotate(_turned(below, turn, size), turn.conj())
        return below, gradients[0], None, None, None, None, *found


def _states(qkv: Tensor, run: Run, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a run's queries, keys and values, each [sequences, heads, length, size], as views of [T, 3 width]."""
    width = qkv.shape[1] // 3
    query, key, value = (states_of(qkv, run, size, part * width, width) for part in range(3))
    return query, key, value


def _gradients(
    needed: Sequence[bool], linear: _Linear, above: Tensor, below: Tensor, exact: Tensor | None = None
) -> list[Tensor | None]:
    """Return the gradients of weight, bias and LoRA's two factors. `exact` is `above` before rounding to bf16."""
    weight, bias, a, b = needed
    found: list[Tensor | None] = [None] * 4
    if weight:
        found[0] = over_tokens(above, below)
    if bias:
        found[1] = (above if exact is None else exact).sum(0)
    if a and linear.b is not None:
        found[2] = over_tokens(product(above, linear.b.T), below)
    if b and linear.a is not None:
        found[3] = over_tokens(product(below, linear.a), above).T  # the other way around is slower
    return found


def _turned(qkv: Tensor, turn: Tensor, size: int) -> Tensor:
    """Return a view of [T, 3 width]: the numbers of each query and key that are rotated, [T, heads, 2 pairs]."""
    width = qkv.shape[1] // 3
    return qkv[:, : 2 * width].unflatten(1, (-1, size))[..., : 2 * turn.shape[-1]]
