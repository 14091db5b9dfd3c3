"""What `calibrate` may measure, and its file as a value, which gives the plan of a sweep its speeds; without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from embedscale.errors import UserError, bounded
from embedscale.run.config import RunConfig
from embedscale.run.families import FAMILIES, short_name
from embedscale.run.method import Method, method_of_label
from embedscale.values import Amount, AtLeast, Count, Value

SIZES = {name: size for family in FAMILIES for name, size in family.sizes.items()}  # by short name


@dataclass(frozen=True)
class Case(Value):
    """A size and a method."""

    backbone: str
    """Short name of the backbone."""
    method: str
    """Label of the method, such as lora-r32."""


@dataclass(frozen=True)
class CalibratedRow(Case):
    """The speed of one device, and the memory that it took, for a size and a method."""

    tokens_per_second: Annotated[float, AtLeast(0.1)]
    pairs_per_second: Amount
    flop_per_second: Count
    """FLOP of matrix products and attention, without what GradCache or checkpointing compute again."""
    share_of_peak: Amount
    """`flop_per_second` / the best matrix product's."""
    memory_gb: Amount
    chunk_tokens: Count
    """Most tokens in one forward pass."""
    steps: Count
    seconds: Amount
    compile_seconds: Amount


@dataclass(frozen=True)
class Calibration(Value):
    """The file of `calibrate`: with which settings it measured, and a row for each size and method.

    A setting that the file does not state is None.
    """

    rows: list[CalibratedRow]
    device: str | None = None
    precision: str | None = None
    batch_size: Count | None = None
    context: Count | None = None
    activation_checkpointing: bool | None = None
    compile: bool | None = None
    workers: Count = 0
    """Processes that loaded batches; early files do not state that there were none."""
    torch: str | None = None
    how: str = ""
    """What was measured, in words."""
    peak_flop_per_second: Amount = 0.0
    """Of the best matrix product."""
    too_large: list[Case] = field(default_factory=list)
    """What the memory did not hold."""

    def differs(self, settings: Mapping[str, Any]) -> str | None:
        """Return the first setting that the file states otherwise, as "precision float32, not bf16"; None if none."""
        for name, value in settings.items():
            stated = getattr(self, name)
            if stated is not None and stated != value:
                return f"{name} {stated}, not {value}"
        return None

    def speed_of(self, run: RunConfig) -> float | None:
        """Return the tokens per second of one device in such a run; None if the file does not say them."""
        if self.differs(settings_of(run)):
            return None
        case = (short_name(run.backbone.name), _unambiguous(run.method))
        return next((row.tokens_per_second for row in self.rows if (row.backbone, row.method) == case), None)

    def gap(self, run: RunConfig) -> str:
        """Return why `speed_of` says nothing, as the end of a sentence about the file."""
        differing = self.differs(settings_of(run))
        return f"was measured with {differing}" if differing else "has no row of the backbone and the method"


def settings_of(run: RunConfig) -> dict[str, Any]:
    """Return the settings of a run, beside its size and method, that decide its speed and that a calibration states."""
    return {
        "precision": run.training.precision,
        "batch_size": run.training.batch_size,
        "context": run.data.context,
        "activation_checkpointing": run.resources.activation_checkpointing,
        "compile": run.resources.compile,
    }


def _unambiguous(method: Method) -> str | None:
    """Return the label by which `calibrate` knows a method; None for a method that only shares its label.

    freeze-1 is measured with all blocks (`active_fraction`), not with one (`active_blocks`), and LoRA on every layer.
    """
    return None if method.active_blocks is not None or method.targets else method.label


def configs_of(config: RunConfig, sizes: Sequence[str], methods: Sequence[str], seconds: float) -> list[RunConfig]:
    """Return what `calibrate` measures: each size with each method. Raise UserError for what is unknown, and for
    `seconds` out of range; torch is not needed to tell."""
    bounded("--seconds", seconds, 0, 1e6)
    return [config_of(config, size, method) for size in sizes for method in methods]


def config_of(config: RunConfig, size: str, label: str) -> RunConfig:
    """Return the configuration of a size and a method. Raise UserError if one of them is unknown."""
    try:
        method = method_of_label(label)
    except UserError as error:
        raise UserError(f"--methods: {error}") from None
    if size not in SIZES and not (Path(size) / "config.json").is_file():
        raise UserError(f"--sizes: {size!r} is neither a known size ({', '.join(SIZES)}) nor a folder with a model")
    backbone = replace(config.backbone, name=size, weights="random")
    return replace(config, backbone=backbone, method=method)
