"""What `calibrate` measures: sizes and methods, checked before torch is imported."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from embedscale.errors import UserError, bounded
from embedscale.run.config import RunConfig
from embedscale.run.families import FAMILIES
from embedscale.run.method import method_of_label

SIZES = {name: size for family in FAMILIES for name, size in family.sizes.items()}  # by short name


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
