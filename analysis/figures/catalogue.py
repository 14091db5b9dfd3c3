"""The list of all figures, and how they are written: each as a PNG, a PDF and a CSV of what it shows.

A figure is a function from a `Study` to `Drawn`. It raises `NotDrawn` with the reason where the sweep cannot show it.
To add a figure, write such a function and give it a line in `FIGURES`; the report takes it from there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from analysis.figures import laws, optima, runs
from analysis.figures.style import Drawn, NotDrawn, label, style
from analysis.study import Study
from embedscale.errors import UserError
from embedscale.files import write_atomically


@dataclass(frozen=True)
class Figure:
    """A figure of the catalogue. Its name is that of its files."""

    name: str
    title: str
    draw: Callable[[Study], Drawn]


PAPER = ("full", "freeze", "bias", "lora")  # the methods whose profiles are figures 2 and 4
# The numbers are the paper's.
FIGURES = (
    Figure("figure_01_frontier", "1. Lowest loss against budget", optima.frontier),
    Figure(
        "figure_02_isoflop",
        "2. IsoFLOP profiles: full fine-tuning and block freezing",
        lambda study: optima.isoflop(study, ("full", "freeze")),
    ),
    Figure(
        "figure_03_fraction",
        "3. Loss against the share of active blocks",
        lambda study: optima.by_choice(study, "freeze"),
    ),
    Figure(
        "figure_04_isoflop",
        "4. IsoFLOP profiles: bias-only and LoRA",
        lambda study: optima.isoflop(study, ("bias", "lora")),
    ),
    Figure("figure_05_rank", "5. Loss against the LoRA rank", lambda study: optima.by_choice(study, "lora")),
    Figure(
        "figure_06_size",
        "6. Optimal size: full fine-tuning and LoRA",
        lambda study: optima.sizes(study, ("full", "lora")),
    ),
    Figure(
        "figure_07_held_out",
        "7. The largest size predicted: full fine-tuning",
        lambda study: laws.hold_out(study, "full"),
    ),
    Figure(
        "figure_08_score",
        "8. MTEB score against size: full fine-tuning and block freezing",
        lambda study: runs.score_profiles(study, ("full", "freeze")),
    ),
    Figure(
        "figure_09_score",
        "9. MTEB score against the share of active blocks",
        lambda study: runs.score_by_choice(study, "freeze"),
    ),
    Figure(
        "figure_10_score",
        "10. MTEB score against size: bias-only and LoRA",
        lambda study: runs.score_profiles(study, ("bias", "lora")),
    ),
    Figure(
        "figure_11_score",
        "11. MTEB score against the LoRA rank",
        lambda study: runs.score_by_choice(study, "lora"),
    ),
    Figure("figure_12_score", "12. MTEB score against budget", runs.score_frontier),
    Figure(
        "figure_13_size",
        "13. Optimal size: block freezing and bias-only",
        lambda study: optima.sizes(study, ("freeze", "bias")),
    ),
    Figure(
        "figure_14_held_out",
        "14. The largest size predicted: block freezing",
        lambda study: laws.hold_out(study, "freeze"),
    ),
    Figure("figure_15_score", "15. MTEB score against size: every method", runs.score_profiles),
    Figure("figure_16_score", "16. MTEB score against loss", runs.score_and_loss),
    Figure("figure_17_fixed_data", "17. Loss against tokens", laws.fixed_data),
    Figure("figure_18_data_term", "18. The data term of the joint law", laws.data_trend),
    Figure("figure_19_held_out", "19. The largest size predicted: LoRA", lambda study: laws.hold_out(study, "lora")),
    Figure("figure_20_size_term", "20. The size term of the joint law", laws.size_trend),
    Figure("figure_21_fraction", "21. The data coefficient against the frozen fraction", laws.fraction_trend),
    Figure("figure_22_coefficient", "22. The size coefficient against tokens", laws.coefficient_trend),
    Figure("figure_23_steps", "23. Another batch size and context, predicted from steps", laws.steps),
    Figure("loss_curves", "Loss curves", runs.curves),
    Figure("loss_hours", "Loss against device-hours", runs.hours),
)


def figures_of(study: Study) -> list[Figure]:
    """Return the figures of a study: all of the paper's, and the profiles of methods that the paper does not have."""
    others = [method for method in study.methods if method not in PAPER]
    return [
        *FIGURES,
        *(
            Figure(
                f"isoflop_other_{number}",
                f"IsoFLOP profiles: {label(method)}",
                lambda study, method=method: optima.isoflop(study, (method,)),  # type: ignore[misc]
            )
            for number, method in enumerate(others, 1)
        ),
    ]


def draw(study: Study, name: str) -> Drawn:
    """Return one figure of the catalogue, such as "figure_01_frontier". Raise UserError for an unknown name.

    Raises NotDrawn where the study cannot show it.
    """
    found = {figure.name: figure for figure in figures_of(study)}
    if name not in found:
        raise UserError(f"figure: {name!r} is unknown; allowed: {', '.join(found)}")
    with style():
        return found[name].draw(study)


@dataclass(frozen=True)
class Written:
    """A figure in its files, or the reason why it is missing."""

    name: str
    title: str
    caption: str = ""
    png: Path | None = None
    missing: str | None = None


def write(study: Study, folder: Path, advance: Callable[[str], object] = lambda what: None) -> list[Written]:
    """Draw every figure that the study can show into `folder`. `advance` is called with each title as it begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out: {folder} is a file; give a folder") from None
    written = []
    for figure in figures_of(study):
        advance(figure.title)
        for ending in ("png", "pdf", "csv"):  # those of another sweep, which this one may not be able to draw
            (folder / f"{figure.name}.{ending}").unlink(missing_ok=True)
        try:
            with style():
                drawn = figure.draw(study)
                save(drawn, folder / figure.name)
        except NotDrawn as reason:
            written.append(Written(figure.name, figure.title, missing=str(reason)))
            continue
        written.append(Written(figure.name, figure.title, drawn.caption, folder / f"{figure.name}.png"))
    return written


def save(drawn: Drawn, path: Path) -> None:
    """Write a figure as PATH.png, PATH.pdf and PATH.csv. The same runs give the same files: they hold no time."""
    rows = drawn.rows.to_csv(index=False)
    write_atomically(path.with_suffix(".csv"), lambda file: file.write(rows.encode()))

    def png(file: BinaryIO) -> None:
        drawn.figure.savefig(file, format="png", metadata={"Software": None})

    def pdf(file: BinaryIO) -> None:
        drawn.figure.savefig(file, format="pdf", metadata={"CreationDate": None})

    write_atomically(path.with_suffix(".png"), png)
    write_atomically(path.with_suffix(".pdf"), pdf)
