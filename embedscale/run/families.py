"""The Pythia suite as a table, and the shape of any GPT-NeoX decoder, without torch.

The paper's sizes (section 4.1) are known here well enough to cost a whole sweep on a laptop. The
table repeats what the hub's configurations say; the tests check every row against the built model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from embedscale.errors import UserError
from embedscale.run.shape import BackboneShape, neox_shape


@dataclass(frozen=True)
class Pythia:
    """A row of the suite."""

    name: str
    blocks: int
    width: int
    heads: int
    vocabulary: int
    pretraining_learning_rate: float  # peak
    parameters: int  # non-embedding, as published; tests recount it

    @property
    def shape(self) -> BackboneShape:
        return neox_shape(self.name, self.blocks, self.width, 4 * self.width, self.vocabulary, context=2048)


SUITE = {
    row.name: row
    for row in (
        Pythia("pythia-14m", 6, 128, 4, 50304, 1e-3, 1_189_888),
        Pythia("pythia-31m", 6, 256, 8, 50304, 1e-3, 4_739_072),
        Pythia("pythia-70m", 6, 512, 8, 50304, 1e-3, 18_915_328),
        Pythia("pythia-160m", 12, 768, 12, 50304, 6e-4, 85_056_000),
        Pythia("pythia-410m", 24, 1024, 16, 50304, 3e-4, 302_311_424),
        Pythia("pythia-1b", 16, 2048, 8, 50304, 3e-4, 805_736_448),
        Pythia("pythia-1.4b", 24, 2048, 16, 50304, 2e-4, 1_208_602_624),
        Pythia("pythia-2.8b", 32, 2560, 32, 50304, 1.6e-4, 2_517_652_480),
        Pythia("pythia-6.9b", 32, 4096, 32, 50432, 1.2e-4, 6_444_163_072),
        Pythia("pythia-12b", 36, 5120, 40, 50688, 1.2e-4, 11_327_027_200),
    )
}


def short_name(backbone: str) -> str:
    """The backbone's own name, whether it is given as a hub name or as a folder: its last component."""
    return backbone.rstrip("/").rsplit("/", 1)[-1]


def known(backbone: str) -> Pythia | None:
    """The table's row for a hub name or folder (deduplicated variants are the same size), or None."""
    return SUITE.get(short_name(backbone).lower().removesuffix("-deduped"))


def shape_by_name(backbone: str) -> BackboneShape | None:
    """The shape of a Pythia by its hub name, or of a local folder with a GPT-NeoX `config.json`; None for others.

    Raises UserError for a `config.json` that cannot be read or lacks what the shape follows from.
    """
    file = Path(backbone) / "config.json"
    if not file.is_file():
        row = known(backbone)
        return row.shape if row else None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"backbone.name: {file} is no valid JSON") from None
    if not isinstance(config, dict) or config.get("model_type") != "gpt_neox":
        return None
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"):
        if not isinstance(config.get(key), int):
            raise UserError(f"backbone.name: {file}: {key} is {config.get(key)!r}; expected a whole number")
    return neox_shape(
        short_name(backbone),
        blocks=config["num_hidden_layers"],
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        parallel_residual=config.get("use_parallel_residual", True),
        attention_bias=config.get("attention_bias", True),
    )
