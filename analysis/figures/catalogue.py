"""All figures of the paper, and loss curves, from any sweep: each a PNG, a PDF and a CSV of what it shows.

A figure is a function from a `Study` to what it draws; what a sweep cannot show is left out, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from analysis.figures import laws as figures_laws
from analysis.figures import optima as figures_optima
from analysis.figures import runs as figures_runs
from analysis.figures.style import Drawn, NotDrawn, style
from analysis.study import Study
from embedscale.errors import UserError
from embedscale.files import write_atomically

Draw = Callable[[Study], Drawn]


def _isoflop(*methods: str) -> Draw:
    return partial(figures_optima.isoflop, methods=methods)


def _sizes(*methods: str) -> Draw:
    return partial(figures_optima.sizes, methods=methods)


def _choice(method: str, column: str) -> Draw:
    return partial(figures_optima.by_choice, method=method, column=column)


def _scores(*methods: str) -> Draw:
    return partial(figures_runs.score_profiles, methods=methods)


def _score_by(method: str, column: str) -> Draw:
    return partial(figures_runs.score_by_choice, method=method, column=column)


def _hold_out(method: str) -> Draw:
    return partial(figures_laws.hold_out, method=method)


# File name, title, and what draws it; the numbers are the paper's.
FIGURES: tuple[tuple[str, str, Draw], ...] = (
    ("figure_01_frontier", "1. Lowest loss against budget", figures_optima.frontier),
    ("figure_02_isoflop", "2. IsoFLOP profiles: full fine-tuning and block freezing", _isoflop("full", "freeze")),
    ("figure_03_fraction", "3. Loss against the share of active blocks", _choice("freeze", "trainable_fraction")),
    ("figure_04_isoflop", "4. IsoFLOP profiles: bias-only and LoRA", _isoflop("bias", "lora")),
    ("figure_05_rank", "5. Loss against the LoRA rank", _choice("lora", "rank")),
    ("figure_06_size", "6. Optimal size: full fine-tuning and LoRA", _sizes("full", "lora")),
    ("figure_07_held_out", "7. The largest size predicted: full fine-tuning", _hold_out("full")),
    ("figure_08_score", "8. MTEB score against size: full fine-tuning and block freezing", _scores("full", "freeze")),
    (
        "figure_09_score",
        "9. MTEB score against the share of active blocks",
        _score_by("freeze", "trainable_fraction"),
    ),
    ("figure_10_score", "10. MTEB score against size: bias-only and LoRA", _scores("bias", "lora")),
    ("figure_11_score", "11. MTEB score against the LoRA rank", _score_by("lora", "rank")),
    ("figure_12_score", "12. MTEB score against budget", figures_runs.score_frontier),
    ("figure_13_size", "13. Optimal size: block freezing and bias-only", _sizes("freeze", "bias")),
    ("figure_14_held_out", "14. The largest size predicted: block freezing", _hold_out("freeze")),
    ("figure_15_score", "15. MTEB score against size: every method", figures_runs.score_profiles),
    ("figure_16_score", "16. MTEB score against loss", figures_runs.score_and_loss),
    ("figure_17_fixed_data", "17. Loss against tokens", figures_laws.fixed_data),
    ("figure_18_data_term", "18. The data term of the joint law", figures_laws.data_trend),
    ("figure_19_held_out", "19. The largest size predicted: LoRA", _hold_out("lora")),
    ("figure_20_size_term", "20. The size term of the joint law", figures_laws.size_trend),
    ("figure_21_fraction", "21. The data coefficient against the frozen fraction", figures_laws.fraction_trend),
    ("figure_22_coefficient", "22. The size coefficient against tokens", figures_laws.coefficient_trend),
    ("figure_23_steps", "23. Another batch size and context, predicted from steps", figures_laws.steps),
    ("loss_curves", "Loss curves", figures_runs.curves),
)


@dataclass(frozen=True)
class Written:
    """A figure in its files, or the reason why there is none."""

    name: str
    title: str
    caption: str = ""
    png: Path | None = None
    missing: str | None = None


def write(study: Study, folder: Path, advance: Callable[[str], object] = lambda what: None) -> list[Written]:
    """Draw every figure that the study can show into `folder`. `advance` is told each title as it begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out: {folder} is no folder") from None
    written = []
    for name, title, draw in (*FIGURES, *_others(study)):
        advance(title)
        for ending in ("png", "pdf", "csv"):  # none of another sweep's stays behind
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
        try:
            with style():
                drawn = draw(study)
                _save(drawn, folder / name)
        except NotDrawn as reason:
            written.append(Written(name, title, missing=str(reason)))
            continue
        written.append(Written(name, title, drawn.caption, folder / f"{name}.png"))
    return written


def _others(study: Study) -> list[tuple[str, str, Draw]]:
    """Profiles of methods that the paper does not have."""
    names = [method for method in study.methods if method not in ("full", "freeze", "bias", "lora")]
    return [(f"isoflop_other_{i + 1}", f"IsoFLOP profiles: {name}", _isoflop(name)) for i, name in enumerate(names)]


def _save(drawn: Drawn, path: Path) -> None:
    rows = drawn.rows.to_csv(index=False)
    write_atomically(path.with_suffix(".csv"), lambda file: file.write(rows.encode()))
    for kind in ("png", "pdf"):
        # No time of making: the same runs give the same file.
        facts = {"Software": None} if kind == "png" else {"CreationDate": None}
        write_atomically(
            path.with_suffix(f".{kind}"),
            lambda file, kind=kind, facts=facts: drawn.figure.savefig(file, format=kind, metadata=facts),  # type: ignore[misc]
        )
