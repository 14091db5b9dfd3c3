"""What a run costs: N_F, N_B, N_U of a backbone and a method, FLOP a token, tokens of a budget.

Two conventions stand side by side. The paper's (section 3.5), C = 2 (N_F + N_B + N_U) D, counts
parameters: it decides budgets. The exact one counts the matrix products that run, attention scores,
adapters on the embedding and recomputation included: it is what `FlopCounterMode` counts with eager
attention, to the integer. Everything here is arithmetic on integers, without torch.
"""

from dataclasses import dataclass

from embedscale.run.method import METHODS as METHODS
from embedscale.run.method import Method as Method
from embedscale.run.shape import BackboneShape


@dataclass(frozen=True)
class Cost:
    """What one token of a run costs, in both conventions.

    The paper's counts leave the token embedding out. The exact parts are FLOP of matrix products a
    token, and FLOP a squared sequence length for the attention scores (each sequence attends to
    itself alone; the causal half is not discounted).
    """

    n_forward: int
    n_backward: int
    n_updated: int
    n_parameters: int  # N, non-embedding, adapters not included
    trainable_fraction: float  # S: active blocks / blocks for block freezing, N_U / N for other methods
    forward: int  # exact, FLOP a token
    backward: int
    recompute: int  # forward FLOP run again for activation checkpointing
    forward_attention: int  # exact, FLOP a squared length
    backward_attention: int
    recompute_attention: int

    @property
    def flop_per_token(self) -> int:
        """The paper's 2 (N_F + N_B + N_U), section 3.5."""
        return 2 * (self.n_forward + self.n_backward + self.n_updated)

    def tokens_of(self, budget: float) -> int:
        """The most tokens that `budget` FLOP pay for."""
        return int(budget) // self.flop_per_token

    def exact(self, tokens: int, squared_lengths: int, extra_forwards: int = 0) -> int:
        """FLOP that really run for `tokens` tokens whose sequences' squared lengths sum to `squared_lengths`.

        `extra_forwards` is 1 where GradCache runs the forward pass twice.
        """
        linear = self.forward * (1 + extra_forwards) + self.backward + self.recompute
        attention = self.forward_attention * (1 + extra_forwards) + self.backward_attention + self.recompute_attention
        return linear * tokens + attention * squared_lengths


def cost_of(shape: BackboneShape, method: Method, activation_checkpointing: bool = False) -> Cost:
    """The cost of a token for a backbone and a method.

    Raises UserError where the method does not fit the backbone.
    """
    method.check(shape)
    training = method.training_blocks(shape.blocks)
    adapted = method.adapted(shape)
    rank = method.rank or 0
    n_forward, n_backward, n_updated = method.counts(shape)

    forward = shape.blocks * sum(
        2 * (li.weights + (rank * (li.inputs + li.outputs) if li.name in adapted else 0)) for li in shape.linears
    )
    forward_attention = shape.blocks * 4 * shape.attention_width
    backward = recompute = backward_attention = recompute_attention = 0
    gradient = method.kind.trains_embedding  # whether the block's input carries a gradient
    if method.embedding:
        forward += 2 * rank * shape.width
        backward += 4 * rank * shape.width
        gradient = True
    for block in range(shape.blocks):
        weights_train = block in training
        norms_train = weights_train or (method.kind.trains_biases and shape.norm_biases > 0)
        before = gradient
        outputs: dict[str, bool] = {}  # role → whether its output carries a gradient
        attention_output = False
        block_backward = last = 0
        for number, li in enumerate(shape.linears):
            if li.role == "attention_out":
                carries = any(outputs.get(role, False) for role in ("query", "key", "value", "query_key_value"))
            elif li.role == "mlp_out":
                carries = outputs.get("mlp_in", False)
            elif li.role == "mlp_in":
                carries = before or norms_train or (attention_output and not shape.parallel_residual)
            else:
                carries = before or norms_train
            if carries:
                block_backward += 2 * li.weights
            if weights_train:
                block_backward += 2 * li.weights
            if li.name in adapted:
                block_backward += 2 * rank * (li.inputs + li.outputs) + 2 * rank * li.outputs
                block_backward += 2 * rank * li.inputs if carries else 0
            if carries or weights_train or li.name in adapted:
                last = number
            trains = weights_train or li.name in adapted or (method.kind.trains_biases and li.bias)
            outputs[li.role] = outputs.get(li.role, False) or carries or trains
            if li.role == "attention_out":
                attention_output = outputs[li.role]
        fused = outputs.get("query_key_value", False)
        query, key, value = (outputs.get(role, False) or fused for role in ("query", "key", "value"))
        backward_attention += 2 * shape.attention_width * (query + key + value + (query or key))
        gradient = before or norms_train or any(outputs.values())
        backward += block_backward
        if activation_checkpointing and gradient:
            # torch stops the recomputation when all that the backward pass saved is there again: before the last
            # product with a backward pass of its own, or before the second half of that layer's adapter.
            for li in shape.linears[: last + 1]:
                is_last = li is shape.linears[last]
                recompute += 2 * li.weights if li.name in adapted or not is_last else 0
                recompute += 2 * rank * (li.inputs + (0 if is_last else li.outputs)) if li.name in adapted else 0
            recompute_attention += 4 * shape.attention_width
    return Cost(
        n_forward=n_forward,
        n_backward=n_backward,
        n_updated=n_updated,
        n_parameters=shape.parameters,
        trainable_fraction=method.trainable_fraction(shape),
        forward=forward,
        backward=backward,
        recompute=recompute,
        forward_attention=forward_attention,
        backward_attention=backward_attention,
        recompute_attention=recompute_attention,
    )


def peak_learning_rate(backbone_peak: float | None, method: Method) -> float | None:
    return method.peak_learning_rate(backbone_peak)
