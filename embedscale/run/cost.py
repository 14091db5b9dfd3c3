"""What a token of a run costs: N_F, N_B and N_U, the paper's FLOP, and the FLOP that really run.

Two conventions stand side by side. The paper's, C = 2 (N_F + N_B + N_U) D (section 3.5), counts parameters; budgets
are in it. The exact one counts the matrix products that run, with attention scores, adapters on the embedding and
recomputation: it equals what torch's `FlopCounterMode` counts with eager attention, to the integer. Everything here is
arithmetic on integers, without torch.
"""

from dataclasses import dataclass

from embedscale.run.method import Method
from embedscale.run.shape import BackboneShape

PAPER_LENGTHS = (14, 64)  # mean tokens of a query and of a positive (section 4.1)
PAPER_PAIR = sum(PAPER_LENGTHS)  # where no store says it


@dataclass(frozen=True)
class Cost:
    """What one token of a run costs, in both conventions.

    The paper's counts leave the token embedding out. The exact costs are FLOP a token, and for the attention scores
    FLOP a squared sequence length: a sequence attends only to itself, and the causal half is not subtracted.
    """

    n_forward: int
    """N_F: parameters that the forward pass uses, adapters included."""
    n_backward: int
    """N_B: parameters that the backward pass goes through."""
    n_updated: int
    """N_U: parameters that train."""
    n_parameters: int
    """N: non-embedding parameters of the backbone, without adapters."""
    trainable_fraction: float
    """S: active blocks / blocks for block freezing, N_U / N for other methods."""
    forward: int
    """Exact FLOP a token of the forward pass."""
    backward: int
    """Exact FLOP a token of the backward pass."""
    recompute: int
    """Exact FLOP a token that activation checkpointing runs again."""
    forward_attention: int
    """Exact FLOP a squared length of the forward pass."""
    backward_attention: int
    """Exact FLOP a squared length of the backward pass."""
    recompute_attention: int
    """Exact FLOP a squared length that activation checkpointing runs again."""

    @property
    def flop_per_token(self) -> int:
        """The paper's 2 (N_F + N_B + N_U), section 3.5."""
        return 2 * (self.n_forward + self.n_backward + self.n_updated)

    def tokens_of(self, budget: float) -> int:
        """Return the most tokens that `budget` FLOP pay for."""
        return int(budget) // self.flop_per_token

    def exact(self, tokens: int, squared_lengths: int, extra_forwards: int = 0) -> int:
        """Return the FLOP that really run for a number of tokens.

        `squared_lengths` is the sum of the squared lengths of their sequences. `extra_forwards` is 1 where GradCache
        runs the forward pass twice.
        """
        linear = self.forward * (1 + extra_forwards) + self.backward + self.recompute
        attention = self.forward_attention * (1 + extra_forwards) + self.backward_attention + self.recompute_attention
        return linear * tokens + attention * squared_lengths


def cost_of(shape: BackboneShape, method: Method, activation_checkpointing: bool = False) -> Cost:
    """Return the cost of a token for a backbone and a method. Raise UserError if the two do not fit."""
    method.check(shape)
    training = method.training_blocks(shape.blocks)
    adapted = method.adapted(shape)
    rank = method.rank or 0
    n_forward, n_backward, n_updated = method.counts(shape)
    forward = shape.blocks * sum(
        2 * (li.weights + (rank * (li.inputs + li.outputs) if li.name in adapted else 0)) for li in shape.linears
    )
    backward = recompute = backward_attention = recompute_attention = 0
    gradient = method.kind.trains_embedding  # whether the next block's input has a gradient
    if method.embedding:
        forward += 2 * rank * shape.width
        backward += 4 * rank * shape.width
        gradient = True
    for number in range(shape.blocks):
        block = _backward_of(shape, method, adapted, number in training, gradient)
        backward += block.flop
        backward_attention += block.attention
        gradient = block.gradient
        if activation_checkpointing and gradient:
            recompute += _recomputed(shape, adapted, rank, block.last)
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
        forward_attention=shape.blocks * 4 * shape.attention_width,
        backward_attention=backward_attention,
        recompute_attention=recompute_attention,
    )


@dataclass(frozen=True)
class _Backward:
    """The backward pass of one block."""

    flop: int  # a token
    attention: int  # FLOP a squared length
    gradient: bool  # whether the block's output has a gradient
    last: int  # number of the dense layer at which recomputation may stop


def _backward_of(
    shape: BackboneShape, method: Method, adapted: set[str], weights_train: bool, gradient: bool
) -> _Backward:
    """Follow the gradient through a block. `gradient` says whether the block's input has one."""
    biases_train, rank = method.kind.trains_biases, method.rank or 0
    # Whether the input of the first layers has a gradient: of the block's input, or of a normalisation before it.
    entering = gradient or (shape.trained_norm_first and (weights_train or (biases_train and shape.norm_biases > 0)))
    flows: dict[str, bool] = {}  # role → whether the output of its layer has a gradient
    flop = last = 0
    for number, li in enumerate(shape.linears):
        if li.role == "attention_out":
            carries = any(flows.get(role, False) for role in ("query", "key", "value", "query_key_value"))
        elif li.role == "mlp_out":
            carries = flows.get("mlp_in", False)
        elif li.role == "mlp_in":
            carries = entering or (flows.get("attention_out", False) and not shape.parallel_residual)
        else:
            carries = entering
        has_adapter = li.name in adapted
        flop += 2 * li.weights * (carries + weights_train)  # gradients of the input and of the weight
        if has_adapter:
            flop += 2 * rank * (li.inputs + 2 * li.outputs) + (2 * rank * li.inputs if carries else 0)
        if carries or weights_train or has_adapter:
            last = number
        flows[li.role] = (
            flows.get(li.role, False) or carries or weights_train or has_adapter or (biases_train and li.bias)
        )
    fused = flows.get("query_key_value", False)
    query, key, value = (flows.get(role, False) or fused for role in ("query", "key", "value"))
    attention = 2 * shape.attention_width * (query + key + value + (query or key))
    if shape.norm_last:  # its backward pass needs the output of the last layer
        last = len(shape.linears)
    return _Backward(flop, attention, entering or any(flows.values()), last)


def _recomputed(shape: BackboneShape, adapted: set[str], rank: int, last: int) -> int:
    """Return the FLOP a token that activation checkpointing runs again in a block.

    torch stops when everything that the backward pass saved exists again: before the last product with a backward pass,
    or before the second half of that layer's adapter.
    """
    flop = 0
    for number, li in enumerate(shape.linears[: last + 1]):
        has_adapter = li.name in adapted
        flop += 2 * li.weights if has_adapter or number < last else 0
        flop += 2 * rank * (li.inputs + (li.outputs if number < last else 0)) if has_adapter else 0
    return flop
