"""The tables of the page about what the results rest on: every run, what was left out, settings, costs, checklist."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd

from analysis.columns import EXCLUDED, HYPERPARAMETERS
from analysis.fitting.laws import LAWS
from analysis.page.table import Link, Table, Terms
from analysis.study import Study
from embedscale.texts import number

if TYPE_CHECKING:
    from analysis.figures.catalogue import Written

VALUES = 8  # of a setting, that are listed
SHOWN_ROWS = 60  # of the runs left out; all of them are in excluded.csv
# Columns of the table of runs, where the runs have them, with the digits of a number.
OF_A_RUN = {
    "method": ("method", 0),
    "backbone": ("backbone", 0),
    "n_parameters": ("N", 7),
    "budget_flop": ("budget (FLOP)", 4),
    "tokens": ("D (tokens)", 4),
    "loss": ("loss (nats)", 5),
    "recall_at_1": ("recall@1", 3),
    "recall_at_10": ("recall@10", 3),
    "seed": ("seed", 6),
    "gpu_hours": ("device-hours", 3),
}


def runs(found: Study, folder: Path | None) -> Table:
    """Return every run, with links from `folder`, where the page lies, to the directories of the runs."""
    table = found.table
    varied = [name for name in HYPERPARAMETERS if name in table and table[name].nunique() > 1]
    shown = {name: told for name, told in OF_A_RUN.items() if name in table and table[name].notna().any()}
    shown |= {name: (name.replace("_", " "), 4) for name in varied}

    def cell(value: Any, digits: int) -> str:
        if pd.isna(value):
            return "–"
        return number(value, digits) if digits and isinstance(value, int | float) else str(value)

    def row(values: dict[Any, Any], state: str) -> list[object]:
        cells = [cell(values.get(name), digits) for name, (_, digits) in shown.items()]
        return [link(found, str(values["run"]), folder), *cells, state]

    rows = [row(each, "used") for each in table.to_dict("records")]
    for each in found.excluded.to_dict("records"):
        detail = each["detail"] if isinstance(each["detail"], str) and each["detail"] else ""
        rows.append(row(each, f"left out, {each['reason']}" + (f": {detail}" if detail else "")))
    columns = ["run", *(title for title, _ in shown.values()), "state"]
    return Table("", columns, rows, "A click on a column's head sorts by it.", sortable=True)


def link(found: Study, run: str, folder: Path | None) -> Link:
    """Return the name of a run, as a link from `folder` to the run's directory where both are known."""
    path = found.directories.get(run)
    return Link(run, "./" + quote(os.path.relpath(path, folder)) + "/" if path and folder else "")


def reasons(found: Study) -> str:
    """Return how many runs are left out for which reason."""
    return ", ".join(f"{count} {reason}" for reason, count in found.excluded["reason"].value_counts().items())


def left_out(found: Study) -> Table:
    """Return the first runs that are left out, with the reason."""
    rows = found.excluded.head(SHOWN_ROWS).fillna("").to_numpy().tolist()
    more = len(found.excluded) - len(rows)
    return Table("", EXCLUDED, rows, f"and {more} more, in excluded.csv" if more > 0 else "")


def chosen(found: Study) -> Table:
    """Return the runs that an adaptive sweep chose, with the reason of each; no rows for another sweep."""
    if found.choices is None:
        return Table("", [], [])
    rows = [
        [number, run.run, run.why, f"{run.cost:.3g}"]
        for number, each in enumerate(found.choices.rounds, 1)
        for run in each.runs
    ]
    told = found.choices.end or "the sweep goes on"
    return Table("", ["round", "run", "why", f"cost ({found.choices.unit})"], rows, told, sortable=True)


def missing(written: Iterable["Written"]) -> Table:
    """Return the figures that are not drawn, a row a reason."""
    why: dict[str, list[str]] = {}
    for each in written:
        if each.missing:
            why.setdefault(each.missing, []).append(each.title)
    rows = [["; ".join(titles), f"because {reason}"] for reason, titles in why.items()]
    return Table("Figures that are not drawn", ["figures", "why"], rows)


def _distinct(table: pd.DataFrame, name: str) -> str:
    """Return the distinct values of a column as a text; empty where there are none."""
    if name not in table or table[name].isna().all():
        return ""
    values = sorted(table[name].dropna().unique())
    told = ", ".join(number(value, 4) if isinstance(value, float) else str(value) for value in values[:VALUES])
    return told + (f", … ({len(values)} values)" if len(values) > VALUES else "")


def settings(found: Study) -> Terms:
    """Return the settings of the fit and of the runs."""
    fits = found.fits
    rows = [(f"fit: {name}", str(value)) for name, value in fits.settings.to_json().items()]
    rows += [(f"same for all: {name}", str(value)) for name, value in fits.comparable.items()]
    rows += [(f"varied or fixed: {name}", _distinct(found.table, name)) for name in HYPERPARAMETERS]
    return [(name, value) for name, value in rows if value]


def costs(found: Study) -> Table:
    """Return what the used runs of each method cost."""
    table, rows = found.table, []
    for method in [*found.methods, None]:
        part = table if method is None else table[table["method"] == method]
        row: list[object] = [method or "all", len(part)]
        for name in ("budget_flop", "spent_flop", "spent_flop_exact", "tokens", "gpu_hours"):
            known = name in part and part[name].notna().any()
            row.append(number(part[name].sum(), 4) if known else "not recorded")
        rows.append(row)
    columns = [
        "method",
        "runs",
        "budgets (FLOP)",
        "spent (FLOP, paper)",
        "spent (FLOP, exact)",
        "tokens",
        "device-hours",
    ]
    return Table("", columns, rows, "Of the used runs only; runs that were left out are not counted.")


def checklist(found: Study) -> Table:
    """Return what a reader needs to repeat the work, each with its answer or "not recorded"."""
    fits, table = found.fits, found.table
    chosen, same, noise = fits.settings, fits.comparable, fits.noise
    seeds = table["seed"].nunique() if "seed" in table and table["seed"].notna().any() else 0
    starts = {law.convergence.starts for method in fits.methods.values() for law in method.joint_laws.values()}
    evaluation = [f"{name.split('.')[1]} {value}" for name, value in same.items() if name.startswith("evaluation.")]
    varied = [name for name in HYPERPARAMETERS if name in table and table[name].nunique() > 1]
    schedule = [f"{name} {_distinct(table, name)}" for name in ("warmup_fraction", "final_fraction") if name in table]
    answers = [
        ("Form of the laws", "; ".join(["N*, D*, L* = k C^a", *(f"{law.symbol} = {law.formula}" for law in
         LAWS.values() if law.needs_fraction or law.name == chosen.law)])),
        ("N", "parameters of the backbone without the token embedding"),
        ("D", "tokens of queries and positives that were processed, without padding"),
        ("C", "2 (N_F + N_B + N_U) D, the paper's convention; budgets group the runs"),
        ("Loss", "contrastive, held out, in nats; " + ", ".join(evaluation) if evaluation else ""),
        ("Chance level", fits.chance),
        ("Data", _distinct(table, "data_digest") or _distinct(table, "data")),
        ("Batch size and context", ", ".join(f"{same[name]:g}" for name in ("batch_size", "context") if name in same)),
        ("Which checkpoints", "the end of a finished schedule only; unfinished runs are left out"),
        ("Learning rates", _distinct(table, "learning_rate")),
        ("Schedule", "; ".join(schedule)),
        ("Hyper-parameters compared", ", ".join(varied) or "none: one value each"),
        ("Seeds", f"{seeds}" if seeds else ""),
        ("Noise of ln L", f"{number(noise.log_loss)}, from {noise.told}" if noise.log_loss else ""),
        ("Fit", f"residual {chosen.residual}, δ {chosen.delta:g}, "
         f"{', '.join(map(str, sorted(starts))) or 'no'} starts; "
         f"optima by {chosen.optimum}, window {chosen.window:g}"),
        ("Intervals", f"{chosen.percent} percentile, {chosen.bootstrap} draws, seed {chosen.seed}"),
        ("Left out", reasons(found) or "nothing"),
        ("Hardware", _distinct(table, "device")),
        ("Precision", _distinct(table, "precision")),
        ("Code of the runs", "; ".join(found.code)),
        ("Code of the fits", f"embedscale {fits.version}, {fits.made}"),
        ("Every run", "runs.csv and excluded.csv beside this page; the values of each figure are in its own CSV"),
    ]  # fmt: skip
    rows = [("✓" if answer else "✗", question, answer or "not recorded by these runs") for question, answer in answers]
    return Table("", ["", "what", "here"], rows)
