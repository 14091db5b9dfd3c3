"""Families of decoders as tables: sizes, published learning rates, hub names. No torch, no network.

A sweep over a known family can be costed on a laptop before anything is downloaded. The tables repeat what the hub's
configurations say; tests compare every row with the built model. A new family is one `Family` here and one function in
`embedscale.run.shape` that reads its `config.json`. Folders of any model with such a `config.json` are known too.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.run.shape import BackboneShape, gpt_neox_shape


@dataclass(frozen=True)
class Size:
    """One decoder of a family."""

    name: str  # short name, in lower case: pythia-14m
    config: Mapping[str, Any]  # its config.json, as far as the layers depend on it
    shape: BackboneShape
    pretraining_learning_rate: float | None  # peak, as published; None where none is
    parameters: int  # non-embedding, as published; tests recount it


@dataclass(frozen=True)
class Family:
    """A suite of decoders that differ in size alone."""

    name: str
    organisation: str  # on the hub
    model_type: str  # of config.json
    shape_of: Callable[[str, Mapping[str, Any]], BackboneShape]  # from a name and a config.json
    sizes: Mapping[str, Size]  # by short name, ascending
    variants: tuple[str, ...] = ()  # endings of hub names whose models have the same sizes

    def size(self, backbone: str) -> Size | None:
        """Return the size that a hub name or a folder's name stands for, or None."""
        name = short_name(backbone).lower()
        for ending in self.variants:
            name = name.removesuffix(ending)
        return self.sizes.get(name)


def _pythia(name: str, blocks: int, width: int, heads: int, vocabulary: int, rate: float, parameters: int) -> Size:
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 2048,
    }
    return Size(name, config, gpt_neox_shape(name, config), rate, parameters)


PYTHIA = Family(
    name="Pythia",
    organisation="EleutherAI",
    model_type="gpt_neox",
    shape_of=gpt_neox_shape,
    sizes={
        size.name: size
        for size in (
            _pythia("pythia-14m", 6, 128, 4, 50304, 1e-3, 1_189_888),
            _pythia("pythia-31m", 6, 256, 8, 50304, 1e-3, 4_739_072),
            _pythia("pythia-70m", 6, 512, 8, 50304, 1e-3, 18_915_328),
            _pythia("pythia-160m", 12, 768, 12, 50304, 6e-4, 85_056_000),
            _pythia("pythia-410m", 24, 1024, 16, 50304, 3e-4, 302_311_424),
            _pythia("pythia-1b", 16, 2048, 8, 50304, 3e-4, 805_736_448),
            _pythia("pythia-1.4b", 24, 2048, 16, 50304, 2e-4, 1_208_602_624),
            _pythia("pythia-2.8b", 32, 2560, 32, 50304, 1.6e-4, 2_517_652_480),
            _pythia("pythia-6.9b", 32, 4096, 32, 50432, 1.2e-4, 6_444_163_072),
            _pythia("pythia-12b", 36, 5120, 40, 50688, 1.2e-4, 11_327_027_200),
        )
    },
    variants=("-deduped",),
)

FAMILIES = (PYTHIA,)
SUITES = " or ".join(family.name for family in FAMILIES)
"""The families' names, for messages."""


def short_name(backbone: str) -> str:
    """Return the last component of a hub name or of a folder: the name that run ids use."""
    return backbone.rstrip("/").rsplit("/", 1)[-1]


def family_of(backbone: str) -> Family | None:
    """Return the family of a hub name or of a folder's name, or None."""
    return next((family for family in FAMILIES if family.size(backbone)), None)


def family_with(parameters: Iterable[float]) -> Family | None:
    """Return the family that has a size of each of these numbers of non-embedding parameters, or None."""
    wanted = set(map(float, parameters))
    return next((f for f in FAMILIES if wanted <= {float(size.parameters) for size in f.sizes.values()}), None)


def known(backbone: str) -> Size | None:
    """Return the size that a hub name or a folder's name stands for, or None. Variants have the size of their base."""
    family = family_of(backbone)
    return family.size(backbone) if family else None


def hub_name(backbone: str) -> str | None:
    """Return the name under which the hub has a known backbone, or None."""
    family = family_of(backbone)
    return f"{family.organisation}/{short_name(backbone).lower()}" if family else None


def shape_by_name(backbone: str) -> BackboneShape | None:
    """Return the shape of a known backbone, or of a local folder with the `config.json` of a known family; else None.

    Raise UserError for a `config.json` that cannot be read or lacks a number that the shape follows from.
    """
    file = Path(backbone) / "config.json"
    if not file.is_file():
        size = known(backbone)
        return size.shape if size else None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"backbone.name: {file} is not valid JSON") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    for family in FAMILIES:
        if family.model_type == kind:
            try:
                return family.shape_of(short_name(backbone), config)
            except UserError as error:
                raise UserError(f"backbone.name: {file}: {error}") from None
    return None


def pretraining_learning_rate(backbone: str) -> float | None:
    """Return the published peak learning rate of a backbone's pre-training, or None."""
    size = known(backbone)
    return size.pretraining_learning_rate if size else None
