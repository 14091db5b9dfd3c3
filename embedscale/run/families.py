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
FLOATS = {"F64", "F32", "F16", "BF16"}  # what safetensors calls the numbers of weights that are not quantised
MOST_HEADER = 10**8  # bytes, as in the library
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # of GPTQ, AWQ and FP8 checkpoints
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
    refuse_quantised(backbone, config if isinstance(config, dict) else {})
    for family in FAMILIES:
        if family.model_type == kind:
            try:
                return family.shape_of(short_name(backbone), config)
            except UserError as error:
                raise UserError(f"backbone.name: {file}: {error}") from None
    return None


def refuse_quantised(backbone: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a checkpoint whose weights are quantised, by its `config.json` or the files beside it.

    Such weights are rounded to few bits: what would train are other weights than the model's.
    """
    given = config.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else None
    found = method or (given and "see quantization_config in its config.json") or _quantised_file(Path(backbone))
    if found:
        raise UserError(
            f"backbone.name: {backbone!r} has quantised weights ({found}), which cannot be trained; "
            "allowed: the model in float32, float16 or bfloat16"
        )


def _quantised_file(folder: Path) -> str | None:
    """Return which file of a folder says that its weights are quantised, or holds weights of other than floats."""
    for name in QUANTISED:
        if (folder / name).is_file():
            return f"see {name}"
    for file in sorted(folder.glob("*.safetensors")):
        try:  # the header alone: 8 bytes of length, then JSON
            with file.open("rb") as opened:
                header = json.loads(opened.read(min(MOST_HEADER, int.from_bytes(opened.read(8), "little"))))
            kinds = {each["dtype"] for name, each in header.items() if len(each.get("shape", ())) > 1}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # damaged: whoever loads the weights says so
        if other := sorted(kinds - FLOATS):
            return f"{other[0]} in {file.name}"
    return None


def pretraining_learning_rate(backbone: str) -> float | None:
    """Return the published peak learning rate of a backbone's pre-training, or None."""
    size = known(backbone)
    return size.pretraining_learning_rate if size else None
