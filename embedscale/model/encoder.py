"""A decoder as an encoder of texts: packed sequences in, one embedding a sequence out.

The dense layers see all T tokens of a chunk on one axis, `[1, T, width]`; the attention keeps sequences apart
(attention.py). No token is padding, so the cost is that of the real tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from embedscale.model.attention import attend_packed
from embedscale.model.backbone import blocks_of, drops
from embedscale.model.packing import Packed
from embedscale.model.parallel import shard


class Encoder(nn.Module):
    """A decoder's body that turns packed sequences into unit vectors.

    `pooling` is mean, last or weighted. `precision` is float32, tf32 (see hardware.py) or bf16; weights and embeddings
    are float32 in all. `attention` is causal, or bidirectional: then each token sees its whole text. Raises UserError
    for a body that always attends to later tokens where `attention` is causal.
    """

    def __init__(self, body: nn.Module, pooling: str = "mean", precision: str = "float32", attention: str = "causal"):
        super().__init__()
        attend_packed(body, attention)
        self.body, self.pooling, self.precision = body, pooling, precision
        self.causal = attention == "causal"
        self.sharded = False
        self.drops = drops(body)
        self.plain_blocks = True  # False if blocks are checkpointed, compiled or sharded: nobody may replace these

    def checkpoint_activations(self) -> None:
        """Keep only each block's input for the backward pass, which computes the block's activations again."""
        self.plain_blocks = False
        checkpoint_blocks(self.body)

    def shard(self, device_type: str) -> None:
        """Leave a part of each weight in each process, on its device.

        The body has new parameters afterwards. All processes must make the same number of forward passes, and of
        backward passes.
        """
        self.plain_blocks, self.sharded = False, True
        shard(self.body, device_type)

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile: one compiled block serves all blocks and all lengths."""
        self.plain_blocks = False
        for block in blocks_of(self.body):
            block.compile(dynamic=True)

    def forward(self, packed: Packed) -> Tensor:
        """Return embeddings float32 [S, width], of unit length, in the order of `packed`."""
        return self.embed(self.hidden_states(packed), packed)

    def hidden_states(self, packed: Packed, inputs: Tensor | None = None) -> Tensor:
        """Return the last hidden states [T, width]. `inputs` [T, width] may replace the token embeddings."""
        # [T, …] → [1, T, …]: transformers' batch axis
        states = {"input_ids": packed.tokens[None]} if inputs is None else {"inputs_embeds": inputs[None]}
        # With shards, autocast's cache would keep a bf16 copy of each gathered weight until the last block's end.
        bf16, cache = self.precision == "bf16", not self.sharded
        with torch.autocast(packed.tokens.device.type, torch.bfloat16, enabled=bf16, cache_enabled=cache):
            found: Tensor = self.body(
                **states,
                position_ids=packed.positions[None],
                # Without these two arguments, transformers would let sequences attend to each other.
                attention_mask=None,
                use_cache=False,
                packing=packed,
                later_tokens=not self.causal,
            ).last_hidden_state.squeeze(0)
        return found

    def embed(self, hidden: Tensor, packed: Packed) -> Tensor:
        """Return unit vectors, float32 [S, width], from hidden states [T, width].

        A text whose states are all zero, such as one of padding tokens alone, has the zero vector, without a gradient.
        """
        vectors = pool(hidden.float(), packed, self.pooling)
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)
        return vectors / lengths.masked_fill(vectors.detach().abs().amax(-1, keepdim=True) == 0, torch.inf)


def checkpoint_blocks(body: Any) -> None:
    """Let transformers keep only each block's input for the backward pass."""
    # transformers before 5.20 has only the second name.
    enable: Any = getattr(body, "activation_checkpointing_enable", None)
    enable = enable or body.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers also makes the embedding's output require a gradient, which would run the backward pass
    # through every frozen block.
    body.disable_input_require_grads()


def pool(hidden: Tensor, packed: Packed, pooling: str) -> Tensor:
    """Return one vector a sequence, [S, width], from [T, width]: the mean of its tokens, the last, or a weighted mean.

    In the weighted mean, a token's weight is proportional to its position, counted from 1.
    """
    if pooling == "last":
        return hidden[packed.lengths.cumsum(0) - 1]
    lengths = packed.lengths.to(hidden.dtype)
    if pooling == "weighted":
        weights = (packed.positions + 1).to(hidden.dtype)
        hidden, totals = hidden * weights[:, None], lengths * (lengths + 1) / 2
    else:
        totals = lengths
    sums = hidden.new_zeros(len(lengths), hidden.shape[1])
    return sums.index_add(0, packed.segments, hidden) / totals[:, None]  # [T, width] → [S, width]
