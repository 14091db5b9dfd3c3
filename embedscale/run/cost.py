"""What a run costs: N_F, N_B, N_U of a backbone and a method, FLOP a token, tokens of a budget.

Two conventions stand side by side. The paper's (section 3.5), C = 2 (N_F + N_B + N_U) D, counts
parameters: it decides budgets. The exact one counts the matrix products that run, attention scores,
adapters on the embedding and recomputation included: it is what `FlopCounterMode` counts with eager
attention, to the integer. Everything here is arithmetic on integers, without torch.
"""

from dataclasses import dataclass, field

from embedscale.errors import UserError
from embedscale.run.families import BackboneShape

METHODS = ("full", "freeze", "bias", "lora")
BLOCKS = ("last", "first", "one")


@dataclass(frozen=True)
class Method:
    """Which parameters train (paper, section 4.1; appendix H for LoRA)."""

    name: str = "full"  # full, freeze, bias or lora
    active_blocks: int | None = None  # freeze: blocks that train
    active_fraction: float | None = None  # freeze: the same as a fraction of all blocks
    blocks: str = "last"  # freeze: "last", "first", or "one" (the block numbered active_blocks, from 0)
    rank: int | None = None  # lora
    alpha: float | None = None  # lora: scale × rank; default the rank, so that the scale is 1
    dropout: float = 0.0  # lora: on the adapters' input
    targets: list[str] = field(default_factory=list)  # lora: layers; default every dense layer of the blocks
    embedding: bool = False  # lora: adapt the token embedding too

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UserError(f"method.name: {self.name!r} is unknown; allowed: {', '.join(METHODS)}")
        if self.blocks not in BLOCKS:
            raise UserError(f"method.blocks: {self.blocks!r} is unknown; allowed: {', '.join(BLOCKS)}")
        given = {
            "freeze": self.active_blocks is not None or self.active_fraction is not None or self.blocks != "last",
            "lora": any((self.rank is not None, self.alpha is not None, self.dropout, self.targets, self.embedding)),
        }
        for method, is_given in given.items():
            if is_given and self.name != method:
                raise UserError(f"method: settings of {method!r} are given, but method.name is {self.name!r}")
        if self.name == "freeze":
            if (self.active_blocks is None) == (self.active_fraction is None):
                raise UserError("method: freeze needs one of method.active_blocks and method.active_fraction")
            if self.active_fraction is not None and not 0 < self.active_fraction <= 1:
                raise UserError(
                    f"method.active_fraction: {self.active_fraction} is out of range; allowed: above 0, at most 1"
                )
            if self.blocks == "one" and self.active_blocks is None:
                raise UserError("method.blocks: 'one' needs method.active_blocks, the number of the block, from 0")
        if self.name == "lora":
            if self.rank is None:
                raise UserError("method.rank: lora needs a rank, an integer of at least 1")
            if self.rank < 1:
                raise UserError(f"method.rank: {self.rank} is out of range; allowed: at least 1")
            if self.alpha is not None and not self.alpha > 0:
                raise UserError(f"method.alpha: {self.alpha} is out of range; allowed: above 0")
            if not 0 <= self.dropout < 1:
                raise UserError(f"method.dropout: {self.dropout} is out of range; allowed: from 0 to below 1")

    @property
    def label(self) -> str:
        """A short name, for run ids and figures."""
        if self.name == "lora":
            return f"lora-r{self.rank}" + ("-emb" if self.embedding else "")
        if self.name == "freeze":
            amount = f"{self.active_blocks}" if self.active_blocks is not None else f"{self.active_fraction:.3g}"
            return f"freeze-{'' if self.blocks == 'last' else self.blocks + '-'}{amount}"
        return self.name

    def training_blocks(self, total: int) -> range:
        """The numbers of the blocks whose weights train, of `total`.

        Raises UserError for a number or fraction that this backbone cannot have.
        """
        if self.name == "lora" or self.name == "bias":
            return range(0)
        if self.name == "full":
            return range(total)
        if self.blocks == "one":
            assert self.active_blocks is not None
            if not 0 <= self.active_blocks < total:
                raise UserError(
                    f"method.active_blocks: block {self.active_blocks} does not exist; allowed: 0 to {total - 1}"
                )
            return range(self.active_blocks, self.active_blocks + 1)
        active = self.active_blocks
        if active is None:
            assert self.active_fraction is not None
            active = round(self.active_fraction * total)
            if abs(active - self.active_fraction * total) > 0.01:
                raise UserError(
                    f"method.active_fraction: {self.active_fraction} of {total} blocks is no whole number; "
                    f"allowed: multiples of 1/{total}"
                )
        if not 1 <= active <= total:
            raise UserError(f"method.active_blocks: {active} is out of range; allowed: 1 to {total}")
        return range(total - active, total) if self.blocks == "last" else range(active)

    def adapted(self, shape: BackboneShape) -> set[str]:
        """The names of the dense layers that get an adapter; empty for other methods."""
        if self.name != "lora":
            return set()
        names = [linear.name for linear in shape.linears]
        for target in self.targets:
            if target not in names:
                raise UserError(
                    f"method.targets: {target!r} is no dense layer of {shape.name}; allowed: {', '.join(names)}"
                )
        assert self.rank is not None
        widest = max(max(linear.inputs, linear.outputs) for linear in shape.linears)
        if self.rank > widest:
            raise UserError(f"method.rank: {self.rank} is out of range for {shape.name}; allowed: 1 to {widest}")
        return set(self.targets or names)


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
    training = method.training_blocks(shape.blocks)
    adapted = method.adapted(shape)
    rank = method.rank or 0
    if method.name == "bias" and not shape.biases:
        raise UserError(f"method.name: 'bias' has nothing to train, for {shape.name} has no bias")

    lora = shape.blocks * sum(rank * (li.inputs + li.outputs) for li in shape.linears if li.name in adapted)
    final = shape.final_weights + shape.final_biases
    n = shape.parameters
    if method.name == "full":
        n_forward, n_backward, n_updated = n, n, n
    elif method.name == "bias":
        n_forward, n_backward, n_updated = n, n, shape.biases
    elif method.name == "lora":
        n_forward, n_backward, n_updated = n + lora, n + lora, lora
    else:
        n_forward = n
        n_backward = (shape.blocks - training.start) * shape.parameters_per_block + final
        n_updated = len(training) * shape.parameters_per_block + (final if method.blocks == "last" else 0)

    forward = shape.blocks * sum(
        2 * (li.weights + (rank * (li.inputs + li.outputs) if li.name in adapted else 0)) for li in shape.linears
    )
    forward_attention = shape.blocks * 4 * shape.attention_width
    backward = recompute = backward_attention = recompute_attention = 0
    gradient = method.name == "full"  # whether the block's input carries a gradient
    if method.embedding:
        forward += 2 * rank * shape.width
        backward += 4 * rank * shape.width
        gradient = True
    for block in range(shape.blocks):
        weights_train = block in training
        norms_train = weights_train or (method.name == "bias" and shape.norm_biases > 0)
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
            trains = weights_train or li.name in adapted or (method.name == "bias" and li.bias)
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
        n_parameters=n,
        forward=forward,
        backward=backward,
        recompute=recompute,
        forward_attention=forward_attention,
        backward_attention=backward_attention,
        recompute_attention=recompute_attention,
    )


def peak_learning_rate(backbone_peak: float | None, method: Method) -> float | None:
    """The paper's rule (section 4.1): Pythia's own peak / 10 for full and freezing, 1e-3 for LoRA and bias."""
    if method.name in ("lora", "bias"):
        return 1e-3
    return None if backbone_peak is None else backbone_peak / 10
