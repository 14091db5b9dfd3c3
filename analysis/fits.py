"""fits.json as it is read, without pandas: `fit` writes it and says what stands in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.files import read_json

FORMAT = 1
FILE = "fits.json"
# What is chosen for each size and budget before sizes are compared (paper, section 4.2): runs equal in all of it are
# replicates. Two backbones may have one size, and a block that trains alone is known by its number.
BACKBONE = ("backbone", "backbone_revision")
HYPERPARAMETERS = (
    *("learning_rate", "rank", "trainable_fraction", "alpha", "dropout", "targets", "embedding"),
    *("blocks", "active_blocks", "weight_decay", "clip", "warmup_fraction", "final_fraction", "temperature"),
    *("precision", "pooling", "hard_negatives", "loss_function", "mask_equal_texts"),
)
MINIATURE = 1e6  # parameters: a sweep that stays below says little of the sizes that people use


def read(path: str | Path) -> dict[str, Any]:
    """The fits of a folder or of a fits.json. Raises UserError where there are none, or another version's."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    fits = read_json(path)
    if fits is None:
        raise UserError(f"{path}: does not exist; write it by embedscale fit RUNS")
    if not isinstance(fits, dict) or not {"methods", "settings", "runs"} <= fits.keys():
        raise UserError(f"{path}: holds no fits; write them by embedscale fit RUNS")
    if fits.get("format") != FORMAT:
        raise UserError(
            f"{path}: was made by version {fits.get('version', 'unknown')} in format {fits.get('format')}; "
            f"this version reads format {FORMAT}: run embedscale fit again"
        )
    return fits


def miniature(fits: Mapping[str, Any]) -> str:
    """The warning that belongs wherever results of tiny models are shown; empty for others."""
    sizes = fits["runs"]["sizes"]
    if max(sizes) >= MINIATURE:
        return ""
    return (
        f"a miniature: models of {min(sizes):,.0f} to {max(sizes):,.0f} parameters, so take the pattern, "
        "not the digits, and no advice for real models"
    )
