"""Pythia's blocks on a CPU: less arithmetic, fewer passes over memory, and for training one backward pass a block.

What a model must keep apart is folded together for as long as its weights stay, a step or a whole evaluation: both
layer norms' scales and shifts into the layers behind them, so that one normalised input is left; LoRA's product into
the weight beside it; and the two biases that the parallel residual adds up. `leaves` take the gradients of the folded
tensors, over all parts of a batch; `backward` passes them on to the parameters, once.

Attention is float32 whatever the precision of the layers: its backward kernel takes three to twenty times as long in
bf16, for sequences of 16 to 75 tokens. float32 layers go through oneDNN where torch has it, which is up to a third faster
here than the BLAS behind `@`; the gradients of weights, sums over tokens, are not.

For embedding texts, the first block's layers see nothing but the token: where texts are many, each token of the
vocabulary goes through them once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXModel

from embedscale.attention import attend, attend_backward, beside, rotate, rows_of, states_of

REMEMBERED_TO = 12  # blocks: of deeper bodies the first one is too small a part for what its results take in memory


def fold(body: nn.Module, precision: str) -> "FoldedPythia | None":
    """The folded body where `body` is a Pythia on a CPU with the options that all its sizes have, else None."""
    if not isinstance(body, GPTNeoXModel) or body.device.type != "cpu":
        return None
    config = body.config
    known = config.use_parallel_residual and config.hidden_act == "gelu" and config.attention_bias
    if not known or any(isinstance(module, nn.Dropout) and module.p > 0 for module in body.modules()):
        return None
    return FoldedPythia(body, torch.bfloat16 if precision == "bf16" else torch.float32)


class _Linear(NamedTuple):
    """y = x weightᵀ + bias, of which weight, bias, or LoRA's factors have gradients; of the latter, weight holds the
    product already."""

    weight: Tensor  # [out, in]
    bias: Tensor  # [out]
    a: Tensor | None = None  # [rank, in]
    b: Tensor | None = None  # [out, rank], scaled


class _Block(NamedTuple):
    """What a block computes with. `_fold` gives the order of its tensors among the leaves."""

    qkv: _Linear  # to the queries of all heads, the keys, the values: 3 width
    up: _Linear  # to the MLP's hidden units: 4 width
    attended: _Linear  # from the attention's outputs
    down: _Linear  # from the hidden units; its bias is that of both

    def to(self, dtype: torch.dtype) -> "_Block":
        def cast(linear: _Linear) -> _Linear:
            return _Linear(*(None if x is None else x.detach().to(dtype) for x in linear))  # type: ignore[arg-type]

        return _Block(*map(cast, self))


class FoldedPythia:
    """A GPTNeoXModel's last hidden states, to rounding; also their gradients, where it trains."""

    def __init__(self, body: GPTNeoXModel, dtype: torch.dtype):
        self.embed, self.rotary, self.norm = body.embed_in, body.rotary_emb, body.final_layer_norm
        attention: Any = body.layers[0].attention
        self.size, self.turned, self.scaling = attention.head_size, attention.rotary_ndims, attention.scaling
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
        self.first: tuple[Tensor, Tensor] | None = None  # what the first block makes of each token of the vocabulary
        self.remembering = False

    @torch.no_grad()
    def expect(self, tokens: int) -> None:
        """Prepare for texts of so many tokens in all: from a vocabulary's worth on, the first block pays for itself.

        What comes out, to the last bit, depends on these texts alone and not on those of earlier calls.
        """
        vocabulary = self.embed.num_embeddings
        self.remembering = tokens >= vocabulary and len(self.blocks) <= REMEMBERED_TO
        if self.remembering and self.first is None:
            parts = [self._alone(self.blocks[0], self.embed(some)) for some in torch.arange(vocabulary).split(4096)]
            qkv, hidden = map(torch.cat, zip(*parts, strict=True))
            self.first = qkv, hidden

    def _fold(self, layer: GPTNeoXLayer) -> _Block:
        attention, mlp = layer.attention, layer.mlp
        qkv = _behind(attention.query_key_value, layer.input_layernorm)
        order = beside(len(qkv.weight), self.size, self.turned).view(-1, 3, self.size).transpose(0, 1).flatten()
        attended, down = _linear(attention.dense), _linear(mlp.dense_4h_to_h)
        return _Block(
            qkv=_Linear(*(x.index_select(0, order) if x is not None and x is not qkv.a else x for x in qkv)),  # type: ignore[arg-type]
            up=_behind(mlp.dense_h_to_4h, layer.post_attention_layernorm),
            attended=attended._replace(bias=attended.bias.detach()),
            down=down._replace(bias=attended.bias + down.bias),
        )

    def __call__(
        self, position_ids: Tensor, packing: Any, input_ids: Any = None, inputs_embeds: Any = None, **_: Any
    ) -> BaseModelOutput:
        """Hidden states [1, T, width], float32, of packed tokens [1, T] or their rows [1, T, width]."""
        with torch.autocast("cpu", enabled=False):
            cos, sin = (x[0, :, : self.turned // 2] for x in self.rotary(self.norm.weight, position_ids))
            turn = torch.complex(cos.float(), sin.float())[:, None]
            graph, blocks = torch.is_grad_enabled(), list(zip(self.blocks, self._leaves, strict=True))
            if self.remembering and self.first is not None:
                qkv, hidden = (known[input_ids[0]] for known in self.first)
                hidden = self._attend(self.blocks[0], qkv, hidden, turn, packing)
                blocks = blocks[1:]
            else:
                hidden = self.embed(input_ids[0]) if inputs_embeds is None else inputs_embeds[0]
            for block, leaves in blocks:
                if graph and (hidden.requires_grad or any(leaf is not None for leaf in leaves)):
                    fixed = block, turn, packing.runs, self.size, self.scaling, self.norm.eps
                    hidden = _TrainedBlock.apply(hidden, fixed, *leaves)
                else:
                    qkv, hidden = self._alone(block, hidden)
                    hidden = self._attend(block, qkv, hidden, turn, packing)
            return BaseModelOutput(last_hidden_state=self.norm(hidden)[None])

    def backward(self) -> None:
        """Add to the parameters' gradients what the leaves have collected."""
        both = [
            (tensor, leaf.grad)
            for made, leaves in zip(self._made, self._leaves, strict=True)
            for tensor, leaf in zip(made, leaves, strict=True)
            if leaf is not None
        ]
        if both:
            tensors, gradients = zip(*both, strict=True)
            torch.autograd.backward(tensors, gradients)

    def _alone(self, block: _Block, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What a block makes of each token by itself: [T, 3 width] for the attention; the residual with the MLP's."""
        normed = functional.layer_norm(hidden, hidden.shape[1:], eps=self.norm.eps).to(self.dtype)
        units = _product(normed, block.up.weight, block.up.bias)
        hidden = _plus(hidden, torch.ops.aten.gelu_(units), block.down.weight, block.down.bias)
        return _product(normed, block.qkv.weight, block.qkv.bias).float(), hidden

    def _attend(self, block: _Block, qkv: Tensor, hidden: Tensor, turn: Tensor, packing: Any) -> Tensor:
        """The residual with what the attention brings; its outputs take the place of the queries."""
        width = hidden.shape[1]
        rotate(_turned(qkv, turn, self.size), turn)
        for run in packing.runs:
            query, key, value = (states_of(qkv, run, self.size, part * width, width) for part in range(3))
            qkv[run.start : run.stop, :width] = rows_of(attend(query, key, value, self.scaling)[0])
        return _plus(hidden, qkv[:, :width].to(self.dtype), block.attended.weight)


def _linear(module: Any) -> _Linear:
    if type(module) is nn.Linear:
        return _Linear(module.weight, module.bias)
    base = module.get_base_layer()  # of PEFT's LoRA
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight * module.scaling["default"]
    return _Linear(base.weight + (b @ a).detach(), base.bias, a, b)


def _behind(module: Any, norm: nn.LayerNorm) -> _Linear:
    """The layer with the norm before it, which then has neither scale nor shift."""
    weight, bias, a, b = _linear(module)
    if a is None or b is None:
        return _Linear(weight * norm.weight, bias + weight @ norm.bias)
    bias = bias + module.get_base_layer().weight @ norm.bias + b @ (a @ norm.bias)
    return _Linear(weight * norm.weight, bias, a * norm.weight, b)


class _TrainedBlock(torch.autograd.Function):
    """A block's output [T, width] from its input; the leaves are there for their gradients alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, fixed: tuple, *leaves: Tensor | None) -> Tensor:
        block, turn, runs, size, scaling, eps = fixed
        qkv, up, attended, down = block
        width = hidden.shape[1]
        normed, mean, deviation = torch.native_layer_norm(hidden, hidden.shape[1:], None, None, eps)
        normed = normed.to(up.weight.dtype)
        units = _product(normed, up.weight, up.bias)
        active = functional.gelu(units)
        states = _product(normed, qkv.weight, qkv.bias).float()
        rotate(_turned(states, turn, size), turn)
        out, sums = states.new_empty(len(states), width), []
        for run in runs:
            query, key, value = (states_of(states, run, size, part * width, width) for part in range(3))
            found, log_sum = attend(query, key, value, scaling)
            out[run.start : run.stop] = rows_of(found)
            sums.append(log_sum)
        result = _plus(hidden, active, down.weight, down.bias)
        result = _plus(result, out.to(active.dtype), attended.weight)
        ctx.save_for_backward(hidden, mean, deviation, normed, units, active, states, out, turn, *sums)
        ctx.fixed = block, runs, size, scaling
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, mean, deviation, normed, units, active, states, out, turn, *sums = ctx.saved_tensors
        (qkv, up, attended, down), runs, size, scaling = ctx.fixed
        through, _, *needed = ctx.needs_input_grad
        of_qkv, of_up, of_attended, of_down = needed[:4], needed[4:8], needed[8:12], needed[12:]
        width, result = hidden.shape[1], gradients[0]
        above = result.to(normed.dtype)

        found_down = _gradients(of_down, down, above, active, result)
        found_attended = _gradients(of_attended, attended, above, out.to(above.dtype))
        found_up: list[Tensor | None] = [None] * 4
        found_qkv, below = found_up, None
        if through or any(of_up):
            inner = _product(above, down.weight.T)
            torch.ops.aten.gelu_backward.grad_input(inner, units, grad_input=inner)
            found_up = _gradients(of_up, up, inner, normed)
            below = _product(inner, up.weight.T) if through else None
        if through or any(of_qkv):
            outer, inner = _product(above, attended.weight.T).float(), torch.empty_like(states)
            for run, log_sum in zip(runs, sums, strict=True):
                query, key, value = (states_of(states, run, size, part * width, width) for part in range(3))
                gradient, found = (states_of(x, run, size, 0, width) for x in (outer, out))
                parts = attend_backward(query, key, value, gradient, found, log_sum, scaling)
                for number, part in enumerate(parts):
                    states_of(inner, run, size, number * width, width).copy_(part)
            rotate(_turned(inner, turn, size), turn.conj())
            inner = inner.to(above.dtype)
            found_qkv = _gradients(of_qkv, qkv, inner, normed)
            if below is not None:
                below = _plus(below, inner, qkv.weight.T)
        if below is not None:
            below, _, _ = torch.ops.aten.native_layer_norm_backward(
                below.to(hidden.dtype), hidden, hidden.shape[1:], mean, deviation, None, None, [True, False, False]
            )
            below += result
        return below, None, *found_qkv, *found_up, *found_attended, *found_down


def _gradients(
    needed: Sequence[bool], linear: _Linear, above: Tensor, below: Tensor, exact: Tensor | None = None
) -> list[Tensor | None]:
    """Of weight, bias, and LoRA's two factors. `exact` is `above` before it was rounded."""
    weight, bias, a, b = needed
    found: list[Tensor | None] = [None] * 4
    if weight:
        found[0] = above.T @ below
    if bias:
        found[1] = (above if exact is None else exact).sum(0)
    if a and linear.b is not None:
        found[2] = (above @ linear.b).T @ below
    if b and linear.a is not None:
        found[3] = above.T @ (below @ linear.a.T)
    return found


def _turned(qkv: Tensor, turn: Tensor, size: int) -> Tensor:
    """The first numbers of each query and key: a view of [T, 3 width]."""
    width = qkv.shape[1] // 3
    return qkv[:, : 2 * width].unflatten(1, (-1, size))[..., : 2 * turn.shape[-1]]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias."""
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return functional.linear(x, weight, bias)


def _plus(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + a weightᵀ + bias, in the precision of x."""
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(a, x, weight, bias, "add")
        return found
    if bias is not None:
        x = x + bias
    return torch.addmm(x, a, weight.T) if a.dtype == x.dtype else x + functional.linear(a, weight)
