"""The list of all figures, and how they are written: each as a PNG, a PDF and a CSV of what it shows.

A figure is a function from a `Study` to `Drawn`. It raises `NotDrawn` with the reason where the sweep cannot show it.
To add a figure, write such a function and give it a line in `FIGURES`; the report takes it from there.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from analysis.figures import laws, optima, runs
from analysis.figures.style import Drawn, NotDrawn, label, style
from analysis.study import Study
from embedscale.errors import UserError
from embedscale.files import check_folder, write_atomically
from embedscale.texts import listed


@dataclass(frozen=True)
class Figure:
    """A figure of the catalogue. Its name is that of its files. It is about `methods`; none means about all."""

    name: str
    title: str
    function: Callable[..., Drawn]
    methods: tuple[str, ...] = ()

    def draw(self, study: Study) -> Drawn:
        return self.function(study, self.methods) if self.methods else self.function(study)

    def heading(self, drawn: Drawn | None = None) -> str:
        """Return the title with the names of the methods that are drawn; those it is about where nothing is drawn."""
        shown = self.methods
        if drawn and len(shown) > 1:
            shown = tuple(method for method in shown if (drawn.rows["method"] == method).any())
        return self.title + (f": {listed(list(map(label, shown)))}" if shown else "")


PAPER = ("full", "freeze", "bias", "lora")  # the methods that the paper's figures are about
# The numbers are the paper's.
FIGURES = (
    Figure("figure_01_frontier", "1. Lowest loss against budget", optima.frontier),
    Figure("figure_02_isoflop", "2. IsoFLOP profiles", optima.isoflop, ("full", "freeze")),
    Figure("figure_03_fraction", "3. Loss against the share of active blocks", optima.by_choice, ("freeze",)),
    Figure("figure_04_isoflop", "4. IsoFLOP profiles", optima.isoflop, ("bias", "lora")),
    Figure("figure_05_rank", "5. Loss against the rank", optima.by_choice, ("lora",)),
    Figure("figure_06_size", "6. Optimal size", optima.sizes, ("full", "lora")),
    Figure("figure_07_held_out", "7. The largest size predicted", laws.hold_out, ("full",)),
    Figure("figure_08_score", "8. MTEB score against size", runs.score_profiles, ("full", "freeze")),
    Figure("figure_09_score", "9. MTEB score against the share of active blocks", runs.score_by_choice, ("freeze",)),
    Figure("figure_10_score", "10. MTEB score against size", runs.score_profiles, ("bias", "lora")),
    Figure("figure_11_score", "11. MTEB score against the rank", runs.score_by_choice, ("lora",)),
    Figure("figure_12_score", "12. MTEB score against budget", runs.score_frontier),
    Figure("figure_13_size", "13. Optimal size", optima.sizes, ("freeze", "bias")),
    Figure("figure_14_held_out", "14. The largest size predicted", laws.hold_out, ("freeze",)),
    Figure("figure_15_score", "15. MTEB score against size: every method", runs.score_profiles),
    Figure("figure_16_score", "16. MTEB score against loss", runs.score_and_loss),
    Figure("figure_17_fixed_data", "17. Loss against tokens", laws.fixed_data),
    Figure("figure_18_data_term", "18. The data term of the joint law", laws.data_trend),
    Figure("figure_19_held_out", "19. The largest size predicted", laws.hold_out, ("lora",)),
    Figure("figure_20_size_term", "20. The size term of the joint law", laws.size_trend),
    Figure("figure_21_fraction", "21. The data coefficient against the frozen fraction", laws.fraction_trend),
    Figure("figure_22_coefficient", "22. The size coefficient against tokens", laws.coefficient_trend),
    Figure("figure_23_steps", "23. Another batch size and context, predicted from steps", laws.steps),
    Figure("loss_curves", "Loss curves", runs.curves),
    Figure("loss_hours", "Loss against device-hours", runs.hours),
)
# What the paper draws for its methods, for each method of another name.
OF_OTHERS = (
    ("isoflop", "IsoFLOP profiles", optima.isoflop),
    ("size", "Optimal size", optima.sizes),
    ("held_out", "The largest size predicted", laws.hold_out),
)


def figures_of(study: Study) -> list[Figure]:
    """Return the figures of a study: the paper's, and those of each method that the paper does not have."""
    others = [method for method in study.methods if method not in PAPER]
    return [
        *FIGURES,
        *(
            Figure(f"{name}_other_{number}", title, function, (method,))
            for number, method in enumerate(others, 1)
            for name, title, function in OF_OTHERS
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
    """A figure in its files, or the reason why it is missing. `width` is that of the print, inches."""

    name: str
    title: str
    caption: str = ""
    png: Path | None = None
    width: float = 0.0
    missing: str | None = None


def write(study: Study, folder: Path, advance: Callable[[str], object] = lambda what: None) -> list[Written]:
    """Draw every figure that the study can show into `folder`. `advance` is called with each title as it begins."""
    check_folder(folder, "--out")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in figures_of(study):
        advance(figure.heading())
        for ending in ("png", "pdf", "csv"):  # those of another sweep, which this one may not be able to draw
            (folder / f"{figure.name}.{ending}").unlink(missing_ok=True)
        try:
            with style():
                drawn = figure.draw(study)
                save(drawn, folder / figure.name)
        except NotDrawn as reason:
            written.append(Written(figure.name, figure.heading(), missing=str(reason)))
            continue
        width = float(drawn.figure.get_size_inches()[0])
        png = folder / f"{figure.name}.png"
        written.append(Written(figure.name, figure.heading(drawn), drawn.caption, png, width))
    return written


def save(drawn: Drawn, path: Path) -> None:
    """Write a figure as PATH.png, PATH.pdf and PATH.csv. The same runs give the same files: they hold no time."""
    rows = drawn.rows.to_csv(index=False)
    write_atomically(path.with_suffix(".csv"), lambda file: file.write(rows.encode()))

    def png(file: BinaryIO) -> None:
        drawn.figure.savefig(file, format="png", metadata={"Software": None})

    def pdf(file: BinaryIO) -> None:
        drawn.figure.savefig(file, format="pdf", metadata={"CreationDate": None})

    with warnings.catch_warnings():
        # A letter of a name that the font does not have is drawn as a box; the page and the CSV have the letter.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        write_atomically(path.with_suffix(".png"), png)
        write_atomically(path.with_suffix(".pdf"), pdf)
