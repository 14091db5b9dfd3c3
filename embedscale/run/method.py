"""Fine-tuning methods: which parameters train, how a method is written, counted and configured (paper, section 4.1).

`Method` holds the settings that a configuration gives, and answers every question about a method. Each method is one
small class below, and `METHODS` names them; how a method changes a torch module is in `embedscale.model.methods`. A new
method is a class here, a function there, and a colour in the figures; the settings of all methods share one dataclass,
because OmegaConf needs a fixed schema. Nothing here imports torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedscale.errors import UserError, allowed, bounded
from embedscale.run.shape import BackboneShape

BLOCKS = ("last", "first", "one")


@dataclass(frozen=True)
class Method:
    """Which parameters train (paper, section 4.1; appendix H for LoRA)."""

    name: str = "full"
    """full, freeze, bias or lora."""
    active_blocks: int | None = None
    """freeze: number of blocks that train."""
    active_fraction: float | None = None
    """freeze: the same as a fraction of all blocks."""
    blocks: str = "last"
    """freeze: which blocks train: last, first, or one (the block numbered active_blocks, counted from 0)."""
    rank: int | None = None
    """lora: rank of the adapters."""
    alpha: float | None = None
    """lora: scale of the adapters times the rank; default: the rank, so that the scale is 1."""
    dropout: float = 0.0
    """lora: dropout on the adapters' input."""
    targets: list[str] = field(default_factory=list)
    """lora: names of the layers that get an adapter; default: every dense layer of the blocks."""
    embedding: bool = False
    """lora: put an adapter on the token embedding too."""

    def __post_init__(self) -> None:
        allowed("method.name", self.name, list(METHODS))
        allowed("method.blocks", self.blocks, BLOCKS)
        for kind in METHODS.values():
            if any(self._given(name) for name in kind.settings if name not in self.kind.settings):
                raise UserError(f"method: settings of {kind.name!r} are given, but method.name is {self.name!r}")
        self.kind.check_settings(self)

    def _given(self, setting: str) -> bool:
        default = [] if setting == "targets" else getattr(Method, setting)
        return bool(getattr(self, setting) != default)

    @property
    def kind(self) -> "Kind":
        """The method itself, apart from its settings."""
        return METHODS[self.name]

    @property
    def label(self) -> str:
        """A short name with the main settings, for run ids and figures: lora-r32."""
        return self.kind.label(self)

    def check(self, shape: BackboneShape) -> None:
        """Raise UserError if this backbone cannot be trained so."""
        self.kind.check(self, shape)

    def training_blocks(self, total: int) -> range:
        """Return the numbers of the blocks whose weights train, of `total` blocks.

        Raise UserError for a number or fraction that this backbone cannot have.
        """
        return self.kind.training_blocks(self, total)

    def adapted(self, shape: BackboneShape) -> set[str]:
        """Return the names of the dense layers that get an adapter."""
        return self.kind.adapted(self, shape)

    def counts(self, shape: BackboneShape) -> tuple[int, int, int]:
        """Return N_F, N_B and N_U (paper, section 3.5)."""
        return self.kind.counts(self, shape)

    def trainable_fraction(self, shape: BackboneShape) -> float:
        """Return S: active blocks / blocks for block freezing, updated / all parameters for other methods."""
        return self.kind.trainable_fraction(self, shape)

    def embedding_parameters(self, shape: BackboneShape) -> int:
        """Return the trained parameters in or on the token embedding, which N_U does not count."""
        return self.kind.embedding_parameters(self, shape)

    def peak_learning_rate(self, pretraining_peak: float | None) -> float | None:
        """Return the peak of the paper's rule (section 4.1); None where it needs a pre-training peak not known."""
        return self.kind.peak_learning_rate(pretraining_peak)


@dataclass(frozen=True)
class Choice:
    """The hyper-parameter of a method that a sweep compares, as a column of the table of runs."""

    column: str
    name: str  # before a value: "rank 8"
    title: str  # in a sentence: "the best LoRA rank"
    digits: str  # format of a value

    def write(self, value: float) -> str:
        return format(value, self.digits)


class Kind(ABC):
    """One fine-tuning method, without settings: the defaults are those of full fine-tuning."""

    name: str
    title: str  # for a reader
    settings: tuple[str, ...] = ()  # fields of `Method` that belong to it
    choice: Choice | None = None
    rate_of_backbone = True  # the learning rate follows the backbone's pre-training peak
    trains_embedding = False  # the token embedding trains too; N does not count it
    trains_biases = False  # the biases train and no weight

    def check_settings(self, method: Method) -> None:  # noqa: B027  # most methods have nothing to check
        """Raise UserError for settings that are missing or out of range."""

    def check(self, method: Method, shape: BackboneShape) -> None:
        self.training_blocks(method, shape.blocks)
        self.adapted(method, shape)

    def label(self, method: Method) -> str:
        return self.name

    def settings_of_label(self, amount: str) -> dict[str, Any]:
        """Return the settings whose label is NAME-`amount`. Raise ValueError if there are none."""
        if amount:
            raise ValueError(amount)
        return {}

    def settings_like(self, point: Mapping[str, Any], shape: BackboneShape | None) -> dict[str, Any] | None:
        """Return the settings of a row of the table of runs, limited to what a backbone of `shape` can have.

        Return None if the row does not say what the method needs.
        """
        return {}

    def training_blocks(self, method: Method, total: int) -> range:
        return range(0)

    def adapted(self, method: Method, shape: BackboneShape) -> set[str]:
        return set()

    @abstractmethod
    def counts(self, method: Method, shape: BackboneShape) -> tuple[int, int, int]:
        """Return N_F, N_B and N_U (paper, section 3.5)."""

    def trainable_fraction(self, method: Method, shape: BackboneShape) -> float:
        return self.counts(method, shape)[2] / shape.parameters

    def embedding_parameters(self, method: Method, shape: BackboneShape) -> int:
        return shape.vocabulary * shape.width if self.trains_embedding else 0

    @abstractmethod
    def flop_per_parameter(self, trainable_fraction: Any) -> Any:
        """Return FLOP a token and parameter of N, 2 (N_F + N_B + N_U) / N, from S alone."""

    def peak_learning_rate(self, pretraining_peak: float | None) -> float | None:
        if not self.rate_of_backbone:
            return 1e-3
        return None if pretraining_peak is None else pretraining_peak / 10


class Full(Kind):
    """Full fine-tuning: every parameter trains."""

    name = "full"
    title = "full fine-tuning"
    trains_embedding = True

    def training_blocks(self, method: Method, total: int) -> range:
        return range(total)

    def counts(self, method: Method, shape: BackboneShape) -> tuple[int, int, int]:
        return shape.parameters, shape.parameters, shape.parameters

    def flop_per_parameter(self, trainable_fraction: Any) -> Any:
        return 6.0


class Freeze(Kind):
    """Block freezing: some blocks train, by default the last ones, with the normalisation behind them."""

    name = "freeze"
    title = "block freezing"
    settings = ("active_blocks", "active_fraction", "blocks")
    choice = Choice("trainable_fraction", "active share", "share of active blocks", ".2g")

    def check_settings(self, method: Method) -> None:
        fraction = method.active_fraction
        if (method.active_blocks is None) == (fraction is None):
            raise UserError("method: freeze needs one of method.active_blocks and method.active_fraction")
        bounded("method.active_fraction", fraction, 0, 1, above=True)
        if method.blocks == "one" and method.active_blocks is None:
            raise UserError("method.blocks: 'one' needs method.active_blocks, the number of the block, from 0")

    def label(self, method: Method) -> str:
        amount = f"{method.active_blocks}" if method.active_blocks is not None else f"{method.active_fraction:.3g}"
        return f"{self.name}-{'' if method.blocks == 'last' else method.blocks + '-'}{amount}"

    def settings_of_label(self, amount: str) -> dict[str, Any]:
        return {"active_fraction": float(amount)}

    def settings_like(self, point: Mapping[str, Any], shape: BackboneShape | None) -> dict[str, Any] | None:
        share, number = point.get("trainable_fraction"), point.get("active_blocks")
        if not share:
            return None
        if point.get("blocks") == "one" and number is not None:
            return {"blocks": "one", "active_blocks": min(int(number), shape.blocks - 1) if shape else int(number)}
        if shape:
            share = max(1, round(share * shape.blocks)) / shape.blocks
        return {"active_fraction": share} | ({"blocks": "first"} if point.get("blocks") == "first" else {})

    def training_blocks(self, method: Method, total: int) -> range:
        active = method.active_blocks
        if method.blocks == "one":
            assert active is not None
            if not 0 <= active < total:
                raise UserError(f"method.active_blocks: block {active} does not exist; allowed: 0 to {total - 1}")
            return range(active, active + 1)
        if active is None:
            assert method.active_fraction is not None
            active = round(method.active_fraction * total)
            if abs(active - method.active_fraction * total) > 0.01:
                raise UserError(
                    f"method.active_fraction: {method.active_fraction} of {total} blocks is not a whole number of "
                    f"blocks; allowed: multiples of 1/{total}"
                )
        if not 1 <= active <= total:
            raise UserError(f"method.active_blocks: {active} is out of range; allowed: 1 to {total}")
        return range(total - active, total) if method.blocks == "last" else range(active)

    def counts(self, method: Method, shape: BackboneShape) -> tuple[int, int, int]:
        training = self.training_blocks(method, shape.blocks)
        final = shape.final_weights + shape.final_biases
        # The backward pass goes down to the first block that trains. The last normalisation trains with the last block.
        backward = (shape.blocks - training.start) * shape.parameters_per_block + final
        updated = len(training) * shape.parameters_per_block + (final if method.blocks == "last" else 0)
        return shape.parameters, backward, updated

    def trainable_fraction(self, method: Method, shape: BackboneShape) -> float:
        return len(self.training_blocks(method, shape.blocks)) / shape.blocks

    def flop_per_parameter(self, trainable_fraction: Any) -> Any:
        return 2 + 4 * trainable_fraction


class Bias(Kind):
    """Bias-only: the biases train."""

    name = "bias"
    title = "bias-only"
    rate_of_backbone = False
    trains_biases = True

    def check(self, method: Method, shape: BackboneShape) -> None:
        if not shape.biases:
            raise UserError(f"method.name: 'bias' trains biases, but {shape.name} has none; use another method")

    def counts(self, method: Method, shape: BackboneShape) -> tuple[int, int, int]:
        return shape.parameters, shape.parameters, shape.biases

    def flop_per_parameter(self, trainable_fraction: Any) -> Any:
        return 4.0


class LowRank(Kind):
    """LoRA: a low-rank adapter beside each dense layer of the blocks trains (paper, appendix H)."""

    name = "lora"
    title = "LoRA"
    settings = ("rank", "alpha", "dropout", "targets", "embedding")
    choice = Choice("rank", "rank", "LoRA rank", ".0f")
    rate_of_backbone = False

    def check_settings(self, method: Method) -> None:
        if method.rank is None:
            raise UserError(f"method.rank: {self.name} needs a rank, an integer of at least 1")
        bounded("method.rank", method.rank, 1)
        bounded("method.alpha", method.alpha, 0, above=True)
        if not 0 <= method.dropout < 1:
            raise UserError(f"method.dropout: {method.dropout} is out of range; allowed: from 0 to below 1")

    def label(self, method: Method) -> str:
        return f"{self.name}-r{method.rank}" + ("-emb" if method.embedding else "")

    def settings_of_label(self, amount: str) -> dict[str, Any]:
        return {"rank": int(amount.removeprefix("r"))}

    def settings_like(self, point: Mapping[str, Any], shape: BackboneShape | None) -> dict[str, Any] | None:
        if not point.get("rank"):
            return None
        rank = int(point["rank"])
        found: dict[str, Any] = {"rank": min(rank, shape.widest) if shape else rank}
        # A table has lists and truth values as texts.
        targets, embedding = (point.get("targets") or "").split(), str(point.get("embedding")) == "True"
        rest = {"alpha": point.get("alpha"), "dropout": point.get("dropout"), "targets": targets}
        return found | {key: value for key, value in (rest | {"embedding": embedding}).items() if value}

    def adapted(self, method: Method, shape: BackboneShape) -> set[str]:
        names = [linear.name for linear in shape.linears]
        for target in method.targets:
            if target not in names:
                raise UserError(
                    f"method.targets: {target!r} is not a dense layer of {shape.name}; allowed: {', '.join(names)}"
                )
        assert method.rank is not None
        if method.rank > shape.widest:
            raise UserError(
                f"method.rank: {method.rank} is out of range for {shape.name}; allowed: 1 to {shape.widest}"
            )
        return set(method.targets or names)

    def counts(self, method: Method, shape: BackboneShape) -> tuple[int, int, int]:
        adapted, rank = self.adapted(method, shape), method.rank or 0
        adapters = shape.blocks * sum(rank * (li.inputs + li.outputs) for li in shape.linears if li.name in adapted)
        return shape.parameters + adapters, shape.parameters + adapters, adapters

    def embedding_parameters(self, method: Method, shape: BackboneShape) -> int:
        return (method.rank or 0) * (shape.vocabulary + shape.width) if method.embedding else 0

    def flop_per_parameter(self, trainable_fraction: Any) -> Any:
        return 4 * (1 + trainable_fraction) + 2 * trainable_fraction


METHODS: dict[str, Kind] = {kind.name: kind for kind in (Full(), Freeze(), Bias(), LowRank())}


def method_of_label(label: str) -> Method:
    """Return the method that a label such as lora-r32 or freeze-0.5 stands for. Raise UserError for another text."""
    name, _, amount = label.partition("-")
    try:
        return Method(name, **METHODS[name].settings_of_label(amount))
    except (KeyError, ValueError):
        raise UserError(f"{label!r} is not a method; such as: full, freeze-0.5, bias, lora-r32") from None
