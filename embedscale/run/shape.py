"""The shape of a decoder: everything that its cost depends on, without torch.

Every block has the same layers. `embedscale.run.layouts` reads a shape from a `config.json`, and
`embedscale.model.backbone.shape_of` measures it in a built model, where models that differ from block to block are
refused.
"""

from dataclasses import dataclass


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
    trained_norm_first: bool = True  # the attention reads the block's input through a normalisation with weights
    norm_last: bool = False  # a normalisation reads the MLP's output

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
