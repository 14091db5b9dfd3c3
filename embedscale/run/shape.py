"""The shape of a decoder: everything that its cost depends on, without torch.

Every block has the same layers. Models that differ from block to block are refused where a shape is taken from a built
model (`embedscale.model.backbone.shape_of`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedscale.errors import UserError


@dataclass(frozen=True)
class Linear:
    """One dense layer of a block."""

    name: str  # the module's last name, as LoRA targets spell it
    inputs: int
    outputs: int
    bias: bool
    role: str  # "query", "key", "value", "query_key_value", "attention_out", "mlp_in" or "mlp_out"

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class BackboneShape:
    """All of a decoder that its cost depends on. Every block has the same layers."""

    name: str
    blocks: int
    width: int  # of the residual stream and of the embedding
    attention_width: int  # heads × head size of the queries
    vocabulary: int
    context: int  # longest sequence, tokens
    linears: tuple[Linear, ...]  # of one block, in the order of the forward pass
    norm_weights: int  # normalisation weights of one block
    norm_biases: int  # normalisation biases of one block
    final_weights: int  # the normalisation after the last block
    final_biases: int
    parallel_residual: bool  # attention and MLP both read the block's input

    @property
    def biases_per_block(self) -> int:
        return self.norm_biases + sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def parameters_per_block(self) -> int:
        return sum(linear.weights for linear in self.linears) + self.norm_weights + self.biases_per_block

    @property
    def parameters(self) -> int:
        """Non-embedding parameters, N."""
        return self.blocks * self.parameters_per_block + self.final_weights + self.final_biases

    @property
    def widest(self) -> int:
        """The largest number of inputs or outputs of a dense layer."""
        return max(max(linear.inputs, linear.outputs) for linear in self.linears)

    @property
    def biases(self) -> int:
        return self.blocks * self.biases_per_block + self.final_biases


def gpt_neox_shape(name: str, config: Mapping[str, Any]) -> BackboneShape:
    """Return the shape of a GPT-NeoX decoder, such as Pythia, from its `config.json`.

    Raise UserError for a number that is missing.
    """
    blocks, width, mlp_width, vocabulary, context = (
        _whole(config, key)
        for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
    )
    bias = config.get("attention_bias", True)
    return BackboneShape(
        name=name,
        blocks=blocks,
        width=width,
        attention_width=width,
        vocabulary=vocabulary,
        context=context,
        linears=(
            Linear("query_key_value", width, 3 * width, bias, "query_key_value"),
            Linear("dense", width, width, bias, "attention_out"),
            Linear("dense_h_to_4h", width, mlp_width, True, "mlp_in"),
            Linear("dense_4h_to_h", mlp_width, width, True, "mlp_out"),
        ),
        norm_weights=2 * width,
        norm_biases=2 * width,
        final_weights=width,
        final_biases=width,
        parallel_residual=config.get("use_parallel_residual", True),
    )


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise UserError(f"{key} is {value!r}; expected a whole number")
    return value
