"""Families of decoders as tables: sizes, published learning rates, hub names. No torch, no network.

A sweep over a known family can be costed on a laptop before anything is downloaded. The tables repeat what the hub's
configurations say; tests compare every row with the built model. A new family is one `Family` here; a layout that is
new needs a row in `embedscale.run.layouts` too. A folder of any model with a known layout needs no table.

Peak learning rates of pre-training, and where they are published:
Pythia: Biderman et al. 2023 (arXiv 2304.01373), table 6; models/ in github.com/EleutherAI/pythia says the same, but
2.5e-4 for 1b. Llama 3.1: Dubey et al. 2024 (arXiv 2407.21783), table 3; the 3.2 models were pruned and distilled, no
peak is published. SmolLM2 and SmolLM3: text/pretraining in github.com/huggingface/smollm. OLMo 2: in
github.com/allenai/OLMo, configs/official-0425 (1B) and official-1124 (7B); in github.com/allenai/OLMo-core,
src/scripts/official/OLMo2 (32B); for 13B they and the paper (arXiv 2501.00656) say different numbers, so the table has
none. The reports on Qwen 2.5 (arXiv 2412.15115), Qwen 3 (arXiv 2505.09388) and Gemma 3 (arXiv 2503.19786) name none.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.run.layouts import LAYOUTS, shape_from
from embedscale.run.shape import BackboneShape


@dataclass(frozen=True)
class Size:
    """One decoder of a family."""

    name: str  # short name, in lower case: pythia-14m
    hub_name: str  # EleutherAI/pythia-14m
    config: Mapping[str, Any]  # its config.json, as far as the layers depend on it
    shape: BackboneShape
    pretraining_learning_rate: float | None  # peak, as published; None where none is
    parameters: int  # non-embedding, as published or counted once; tests recount it


@dataclass(frozen=True)
class Family:
    """A suite of decoders that were pre-trained alike and share a tokenizer."""

    name: str
    model_type: str  # of config.json
    sizes: Mapping[str, Size]  # by short name, ascending
    variants: tuple[str, ...] = ()  # endings of hub names whose models have the same sizes

    def size(self, backbone: str) -> Size | None:
        """Return the size that a hub name or a folder's name stands for, or None."""
        name = short_name(backbone).lower()
        for ending in self.variants:
            name = name.removesuffix(ending.lower())
        return self.sizes.get(name)

    def hub_name(self, backbone: str) -> str | None:
        """Return the name under which the hub has a size or a variant of it, or None."""
        size, name = self.size(backbone), short_name(backbone).lower()
        if size is None:
            return None
        endings = [ending for ending in self.variants if name.endswith(ending.lower())]
        return size.hub_name + "".join(endings[:1])


Row = tuple[str, int, int, int, int, int, float | None, int]
"""Hub name, blocks, width, width of the MLP, heads, heads of the keys, peak learning rate, parameters."""


def _family(
    name: str, model_type: str, same: Mapping[str, Any], rows: Iterable[Row], variants: tuple[str, ...] = ()
) -> Family:
    """Return a family from its rows, and from what all of its `config.json` say the same."""
    sizes = {}
    for hub_name, blocks, width, mlp_width, heads, key_heads, rate, parameters in rows:
        config = {
            "model_type": model_type,
            "hidden_size": width,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "intermediate_size": mlp_width,
            **same,
        }
        short = short_name(hub_name).lower()
        sizes[short] = Size(short, hub_name, config, shape_from(short, config), rate, parameters)
    return Family(name, model_type, sizes, variants)


def _pythia(name: str, blocks: int, width: int, heads: int, vocabulary: int, rate: float, parameters: int) -> Size:
    config = {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 2048,
    }
    return Size(name, f"EleutherAI/{name}", config, shape_from(name, config), rate, parameters)


def short_name(backbone: str) -> str:
    """Return the last component of a hub name or of a folder: the name that run ids use."""
    return backbone.rstrip("/").rsplit("/", 1)[-1]


PYTHIA = Family(
    name="Pythia",
    model_type="gpt_neox",
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

LLAMA3 = _family(
    "Llama 3",
    "llama",
    {"vocab_size": 128256, "max_position_embeddings": 131072},
    (
        ("meta-llama/Llama-3.2-1B", 16, 2048, 8192, 32, 8, None, 973_146_112),
        ("meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, 8, None, 2_818_747_392),
        ("meta-llama/Llama-3.1-8B", 32, 4096, 14336, 32, 8, 3e-4, 6_979_588_096),
        ("meta-llama/Llama-3.1-70B", 80, 8192, 28672, 64, 8, 1.5e-4, 68_452_360_192),
    ),
    variants=("-Instruct",),
)
QWEN25 = _family(
    "Qwen 2.5",
    "qwen2",
    {"vocab_size": 151936, "max_position_embeddings": 32768},  # the larger models have a larger table and context
    (
        ("Qwen/Qwen2.5-0.5B", 24, 896, 4864, 14, 2, None, 357_898_112),
        ("Qwen/Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, None, 1_310_340_608),
        ("Qwen/Qwen2.5-3B", 36, 2048, 11008, 16, 2, None, 2_774_773_760),
        ("Qwen/Qwen2.5-7B", 28, 3584, 18944, 28, 4, None, 6_525_621_760),
        ("Qwen/Qwen2.5-14B", 48, 5120, 13824, 40, 8, None, 13_212_898_304),
        ("Qwen/Qwen2.5-32B", 64, 5120, 27648, 40, 8, None, 31_206_740_992),
        ("Qwen/Qwen2.5-72B", 80, 8192, 29568, 64, 8, None, 70_214_787_072),
    ),
    variants=("-Instruct",),
)
QWEN3 = _family(
    "Qwen 3",
    "qwen3",
    {"vocab_size": 151936, "max_position_embeddings": 32768, "head_dim": 128},
    (
        ("Qwen/Qwen3-0.6B", 28, 1024, 3072, 16, 8, None, 440_467_456),
        ("Qwen/Qwen3-1.7B", 28, 2048, 6144, 16, 8, None, 1_409_410_048),
        ("Qwen/Qwen3-4B", 36, 2560, 9728, 32, 8, None, 3_633_511_936),
        ("Qwen/Qwen3-8B", 36, 4096, 12288, 32, 8, None, 6_946_075_648),
        ("Qwen/Qwen3-14B", 40, 5120, 17408, 40, 8, None, 13_212_482_560),
        ("Qwen/Qwen3-32B", 64, 5120, 25600, 64, 8, None, 31_206_298_624),
    ),
    variants=("-Base",),
)
GEMMA3 = _family(  # larger ones read images too
    "Gemma 3",
    "gemma3_text",
    {"vocab_size": 262144, "max_position_embeddings": 32768, "head_dim": 256, "sliding_window": 512},
    (
        ("google/gemma-3-270m", 18, 640, 2048, 4, 1, None, 100_326_016),
        ("google/gemma-3-1b-pt", 26, 1152, 6912, 4, 1, None, 697_896_064),
    ),
    variants=("-it",),
)
SMOLLM2 = _family(
    "SmolLM2",
    "llama",
    {"vocab_size": 49152, "max_position_embeddings": 8192},
    (
        ("HuggingFaceTB/SmolLM2-135M", 30, 576, 1536, 9, 3, 3e-3, 106_203_456),
        ("HuggingFaceTB/SmolLM2-360M", 32, 960, 2560, 15, 5, 3e-3, 314_635_200),
        ("HuggingFaceTB/SmolLM2-1.7B", 24, 2048, 8192, 32, 32, 5e-4, 1_610_713_088),
    ),
    variants=("-Instruct",),
)
SMOLLM3 = _family(
    "SmolLM3",
    "smollm3",
    {"vocab_size": 128256, "max_position_embeddings": 65536},
    (("HuggingFaceTB/SmolLM3-3B", 36, 2048, 11008, 16, 4, 2e-4, 2_812_430_336),),
    variants=("-Base",),
)
OLMO2 = _family(
    "OLMo 2",
    "olmo2",
    {"vocab_size": 100352, "max_position_embeddings": 4096},
    (
        ("allenai/OLMo-2-0425-1B", 16, 2048, 8192, 16, 16, 4e-4, 1_073_874_944),
        ("allenai/OLMo-2-1124-7B", 32, 4096, 11008, 32, 32, 3e-4, 6_476_533_760),
        ("allenai/OLMo-2-1124-13B", 40, 5120, 13824, 40, 40, None, 12_688_593_920),
        ("allenai/OLMo-2-0325-32B", 64, 5120, 27648, 40, 8, 6e-4, 31_206_675_456),
    ),
    variants=("-Instruct",),
)

FAMILIES = (PYTHIA, LLAMA3, QWEN25, QWEN3, GEMMA3, SMOLLM2, SMOLLM3, OLMO2)
FLOATS = {"F64", "F32", "F16", "BF16"}  # what safetensors calls the numbers of weights that are not quantised
MOST_HEADER = 10**8  # bytes, as in the library
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # of GPTQ, AWQ and FP8 checkpoints
SUITES = ", ".join(family.name for family in FAMILIES)
"""The families' names, for messages."""


def family_of(backbone: str) -> Family | None:
    """Return the family of a hub name or of a folder's name, or None."""
    return next((family for family in FAMILIES if family.size(backbone)), None)


def family_name(backbone: str, model_type: str | None = None) -> str | None:
    """Return what the table of runs calls a backbone's family: a known family's name, or else its `model_type`.

    A folder that is only named like a known size is not of its family.
    """
    family = family_of(backbone)
    return family.name if family and model_type in (None, family.model_type) else model_type


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
    return family.hub_name(backbone) if family else None


def shape_by_name(backbone: str, revision: str | None = None) -> BackboneShape | None:
    """Return the shape of a backbone by its `config.json`, or by its name if that is known; None for other names.

    The `config.json` is that of a local folder, or of a hub model in the local cache.

    Raise UserError for a `config.json` that cannot be read, of a model that is not supported, or without a number that
    the shape follows from; and for a name that can only be a folder's where there is no such folder.
    """
    file = _config_file(backbone, revision)
    if file is None:
        size = known(backbone)
        return size.shape if size else None
    config = _read(file)
    refuse_quantised(backbone, config)
    try:
        return shape_from(short_name(backbone), config)
    except UserError as error:
        raise UserError(f"backbone.name: {file}: {error}") from None


def needs_first_token(backbone: str, revision: str | None = None) -> bool:
    """Return whether a backbone was pre-trained with a first token that it cannot do without, as Gemma was.

    Raise UserError as `shape_by_name` does. A hub model that is neither known nor in the local cache needs none.
    """
    file, size = _config_file(backbone, revision), known(backbone)
    config = _read(file) if file else size.config if size else {}
    layout = LAYOUTS.get(str(config.get("model_type")))
    return layout is not None and layout.needs_first_token


def _config_file(backbone: str, revision: str | None) -> Path | None:
    """Return the `config.json` of a local folder, or of a hub model that is not known by name, from the local cache."""
    file = Path(backbone) / "config.json"
    if file.is_file():
        return file
    if known(backbone):
        return None
    refuse_missing_folder("backbone.name", backbone)
    return _cached_config(backbone, revision)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"backbone.name: {file} is not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"backbone.name: {file} is not a mapping; expected the config.json of a model")
    return config


def refuse_missing_folder(setting: str, name: str) -> None:
    """Raise UserError for a name that can only be a local folder's, where there is no such folder.

    Without this the hub would be asked, again and again for half a minute where there is no network.
    """
    path = Path(name)
    if path.is_dir():
        return
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.parent.is_dir():
        raise UserError(
            f"{setting}: the folder {name!r} does not exist; give a folder, or a name of the hub, OWNER/NAME"
        )


def _cached_config(backbone: str, revision: str | None) -> Path | None:
    """Return the `config.json` of a hub model in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(backbone, "config.json", revision=revision)
    except ValueError:  # no name of the hub's
        return None
    return Path(found) if isinstance(found, str) else None


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
