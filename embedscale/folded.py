"""Pythia's body for embedding texts on a CPU: less arithmetic a block, into memory that is there already.

What training must keep apart is folded together, once: both layer norms' scales and shifts into the layers behind
them, so that one normalised input is left, and the two biases that the parallel residual adds up. The first block's
layers see nothing but the token: where texts are many, each token of the vocabulary goes through them once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXModel

from embedscale.attention import attend, beside, rotate, rows_of, states_of

REMEMBERED_TO = 12  # blocks: of deeper bodies the first one is too small a part for what its results take in memory


def fold(body: nn.Module, precision: str) -> nn.Module:
    """The folded body where `body` is a Pythia with the options that all its sizes have, else `body` itself."""
    if not isinstance(body, GPTNeoXModel):
        return body
    known = body.config.use_parallel_residual and body.config.hidden_act == "gelu" and body.config.attention_bias
    return FoldedPythia(body, torch.bfloat16 if precision == "bf16" else torch.float32) if known else body


class _Block(NamedTuple):
    qkv: Tensor  # [3 width, width]: the queries of all heads, the keys, the values
    qkv_bias: Tensor
    up: Tensor  # [4 width, width]: the MLP's hidden units
    up_bias: Tensor
    attended: Tensor  # [width, width]: from the attention's outputs
    down: Tensor  # [4 width, width]: from the hidden units
    bias: Tensor  # [width], float32, of the two together


class FoldedPythia(nn.Module):
    """A GPTNeoXModel's last hidden states, to rounding. The weights of its blocks are copied, the embedding is not."""

    def __init__(self, body: GPTNeoXModel, dtype: torch.dtype):
        super().__init__()
        self.embed, self.rotary, self.norm = body.embed_in, body.rotary_emb, body.final_layer_norm
        attention: Any = body.layers[0].attention
        self.size, self.turned, self.scaling = attention.head_size, attention.rotary_ndims, attention.scaling
        self.dtype = dtype
        with torch.no_grad():
            self.blocks = [self._fold(layer) for layer in body.layers]  # type: ignore[arg-type]
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
        qkv = attention.query_key_value
        order = beside(qkv.out_features, self.size, self.turned).view(-1, 3, self.size).transpose(0, 1).flatten()
        before = ((qkv, layer.input_layernorm), (mlp.dense_h_to_4h, layer.post_attention_layernorm))
        weights = [linear.weight * norm.weight for linear, norm in before]
        biases = [linear.bias + linear.weight @ norm.bias for linear, norm in before]
        return _Block(
            qkv=weights[0][order].to(self.dtype),
            qkv_bias=biases[0][order].to(self.dtype),
            up=weights[1].to(self.dtype),
            up_bias=biases[1].to(self.dtype),
            attended=attention.dense.weight.T.to(self.dtype),
            down=mlp.dense_4h_to_h.weight.T.to(self.dtype),
            bias=attention.dense.bias + mlp.dense_4h_to_h.bias,
        )

    def forward(self, input_ids: Tensor, position_ids: Tensor, packing: Any, **_: Any) -> BaseModelOutput:
        """Hidden states [1, T, width], float32, of packed tokens [1, T]."""
        with torch.autocast("cpu", enabled=False):
            tokens = input_ids[0]
            cos, sin = (x[0, :, : self.turned // 2] for x in self.rotary(self.embed.weight, position_ids))
            turn = torch.complex(cos.float(), sin.float())[:, None]
            if self.remembering and self.first is not None:
                qkv, hidden = (known[tokens] for known in self.first)
            else:
                qkv, hidden = self._alone(self.blocks[0], self.embed(tokens))
            self._attend(self.blocks[0], qkv, hidden, turn, packing)
            for block in self.blocks[1:]:
                qkv, hidden = self._alone(block, hidden)
                self._attend(block, qkv, hidden, turn, packing)
            return BaseModelOutput(last_hidden_state=self.norm(hidden)[None])

    def _alone(self, block: _Block, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What a block makes of each token by itself: [T, 3 width] for the attention; the residual with the MLP's."""
        normed = functional.layer_norm(hidden, hidden.shape[1:], eps=self.norm.eps).to(self.dtype)
        units = functional.linear(normed, block.up, block.up_bias)
        hidden += block.bias
        _add_product(hidden, torch.ops.aten.gelu_(units), block.down)
        return functional.linear(normed, block.qkv, block.qkv_bias), hidden

    def _attend(self, block: _Block, qkv: Tensor, hidden: Tensor, turn: Tensor, packing: Any) -> None:
        """Add to the residual what the attention brings; its outputs take the place of the queries."""
        width = hidden.shape[1]
        rotate(qkv[:, : 2 * width].unflatten(1, (-1, self.size))[..., : self.turned], turn, True)
        for run in packing.runs:
            query, key, value = (states_of(qkv, run, self.size, part * width, width) for part in range(3))
            qkv[run.start : run.stop, :width] = rows_of(attend(query, key, value, self.scaling)[0])
        _add_product(hidden, qkv[:, :width], block.attended)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == x.dtype:
        x.addmm_(a, b)
    else:
        x += a @ b
