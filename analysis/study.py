"""A folder that `embedscale fit` wrote: its fits, its table of runs, and what figures need of the run directories."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import fits as fits_file
from analysis import runs
from analysis.columns import COLUMNS, EXCLUDED, FIRST_VERSION
from analysis.fits import Fits
from analysis.fitting import grouping, joint, optima
from analysis.runs import Runs
from embedscale.adaptive.choices import Choices
from embedscale.errors import UserError
from embedscale.files import check_folder, write_atomically, write_digested
from embedscale.run.directory import RunDirectory
from embedscale.run.record import Damaged, RunRecord
from embedscale.texts import short_number
from embedscale.values import Value

TABLE, LEFT_OUT = "runs.csv", "excluded.csv"


@dataclass(frozen=True)
class Study:
    """An experiment after `embedscale fit`.

    `table` has a row a run (`runs.Runs`). `curves` has a row a logged step of the best runs: `run`, `method`,
    `n_parameters`, `budget_flop`, `spent_flop`, `train_loss`, `loss` (held out). `scores` has a row a run and task:
    `run`, `task`, `score`. Both are empty where the run directories are not there. `code` are the commits that the
    runs name, `directories` those of the runs, where they are there. `other` is a second sweep whose runs cannot be
    compared with these but can be predicted (figure 23). `choices` are those of an adaptive sweep.
    """

    fits: Fits
    table: pd.DataFrame
    excluded: pd.DataFrame
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    code: tuple[str, ...] = ()
    other: "Study | None" = None
    directories: Mapping[str, Path] = field(default_factory=dict)
    choices: Choices | None = None

    @cached_property
    def methods(self) -> list[str]:
        return runs.in_order(self.table["method"].unique())

    @cached_property
    def budgets(self) -> list[float]:
        return list(self.fits.runs.budgets)

    @cached_property
    def sizes(self) -> list[float]:
        return list(self.fits.runs.sizes)

    @cached_property
    def names(self) -> dict[float, str]:
        """The name of each size: its backbone if exactly one has that size, else the number of its parameters."""
        found = {size: short_number(size) for size in self.sizes}
        if "backbone" in self.table:
            for size, rows in by_number(self.table.dropna(subset=["backbone"]), "n_parameters"):
                if rows["backbone"].nunique() == 1:
                    found[size] = str(rows["backbone"].iloc[0])
        return found

    @cached_property
    def cells(self) -> dict[str, pd.DataFrame]:
        """Method → a row a setting, replicates averaged (`joint.cells_of`)."""
        budgets = self.table["budget_flop"].to_numpy(float)
        table = self.table.assign(profile=grouping.profiles_of(budgets, self.fits.settings.bins))
        return {method: joint.cells_of(table[table["method"] == method]) for method in self.methods}

    @cached_property
    def points(self) -> dict[str, pd.DataFrame]:
        """Method → the best setting of each budget and size."""
        return {method: grouping.best_points(cells) for method, cells in self.cells.items()}

    def profile(self, method: str, budget_flop: float) -> pd.DataFrame:
        """Return the best setting of each size of a method at a budget, by ascending size."""
        points = self.points[method]
        return points[np.isclose(points["budget_flop"], budget_flop, rtol=0.1)].sort_values("n_parameters")

    def window(self, profile: pd.DataFrame) -> NDArray[np.bool_]:
        """Return which points of a profile its parabola is fitted to, as in `optima.parabola`."""
        log_n, best = np.log(profile["n_parameters"].to_numpy(float)), int(profile["loss"].argmin())
        return optima.near_best(log_n, best, self.fits.settings.window)

    def left_out(self, method: str | None = None) -> pd.DataFrame:
        """Return the excluded runs of a method, or of all, as rows for the table of a figure."""
        rows = self.excluded if method is None else self.excluded[self.excluded["method"] == method]
        return rows.rename(columns={"reason": "state"})[["method", "budget_flop", "n_parameters", "state", "run"]]


def by_number(rows: pd.DataFrame, column: str) -> Iterator[tuple[float, pd.DataFrame]]:
    """Yield each value of a numeric column with its rows, in ascending order."""
    for value in np.unique(rows[column].dropna().to_numpy(float)):
        yield float(value), rows[rows[column] == value]


def check_out(folder: str | Path) -> None:
    """Raise UserError where `write` cannot write, or would replace a table that is not its own: the one it fits."""
    check_folder(folder, "--out")
    for name, own in ((TABLE, set(COLUMNS)), (LEFT_OUT, set(EXCLUDED))):
        path = Path(folder) / name
        if path.is_file():
            with path.open("rb") as file:
                names = file.readline().decode(errors="replace").strip().split(",")
            header = {FIRST_VERSION.get(each, each) for each in names}
            if not set(EXCLUDED) - {"reason", "detail"} <= header <= own:
                raise UserError(f"--out: {path} would be replaced; give another folder")


def write(fits: Fits, runs: Runs, folder: str | Path) -> Path:
    """Write fits.json into a folder, with the runs.csv and excluded.csv it was made from; return its path."""
    folder = Path(folder)
    check_out(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = write_digested(folder / TABLE, lambda file: file.write(runs.table.to_csv(index=False).encode()))
    write_atomically(folder / LEFT_OUT, lambda file: file.write(runs.excluded.to_csv(index=False).encode()))
    replace(fits, table_digest=digest).write(folder / fits_file.FILE)
    return folder / fits_file.FILE


def load(folder: str | Path) -> Study:
    """Return the study of a folder that `embedscale fit` wrote. Raise UserError where it holds none."""
    folder = Path(folder)
    fits = fits_file.read(folder)
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / TABLE).exists():
        raise UserError(f"{folder / TABLE}: does not exist; embedscale fit writes it beside its fits.json")
    fits_file.check_table(fits, folder / TABLE)
    loaded = runs.load(folder / TABLE)
    if loaded.are_optima:
        raise UserError(f"{folder}: holds the fits of a table of optima; figures and the report need runs")
    table = loaded.table
    directories = _directories(folder, table)
    left_out = {row.run: folder / row.run for row in fits.excluded if row.run and (folder / row.run).is_dir()}
    best = {point.run for method in fits.methods.values() for point in method.points}
    return Study(
        fits,
        table,
        pd.DataFrame([row.to_json() for row in fits.excluded], columns=list(EXCLUDED)),
        _curves(table, {run: each for run, each in directories.items() if run in best}),
        _scores(directories),
        _code(directories),
        directories={run: each.path for run, each in directories.items()} | left_out,
        choices=Choices.of(folder),
    )


def of(fits: Fits, runs: Runs) -> Study:
    """Return the study of fits that are not in a folder. It has no curves and no scores."""
    return Study(fits, runs.table, runs.excluded)


def _directories(folder: Path, table: pd.DataFrame) -> dict[str, RunDirectory]:
    """Return the run directories by run: at the path in the table or, if the folder was moved, inside the folder."""
    found: dict[str, RunDirectory] = {}
    for run, path in zip(table["run"], table.get("path", pd.Series(dtype=object)), strict=False):
        if isinstance(path, str):
            places = (Path(path), folder / Path(path).name)
            found |= {str(run): RunDirectory(each) for each in places if each.is_dir()}
    return found


def _curves(table: pd.DataFrame, directories: Mapping[str, RunDirectory]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    facts = table.set_index("run")[["method", "n_parameters", "budget_flop"]]
    for run, directory in directories.items():
        own = {str(name): facts.at[run, name] for name in facts}
        metrics = directory.read_metrics()
        last = max((row.step for row in metrics), default=0)
        for row in metrics:
            # The last batch is cut to the budget: with fewer negatives, its loss is not comparable.
            train_loss = row.train_loss if row.step < last else None
            if train_loss is not None or row.loss is not None:
                values = {"spent_flop": row.spent_flop, "step": row.step, "train_loss": train_loss, "loss": row.loss}
                rows.append(own | {"run": run} | values)
    found = pd.DataFrame(rows)
    return found.astype({"train_loss": float, "loss": float, "spent_flop": float}) if rows else found


@dataclass(frozen=True)
class _MainScore(Value):
    """What the figures need of a score's file."""

    score: float


def _scores(directories: Mapping[str, RunDirectory]) -> pd.DataFrame:
    rows = []
    for run, directory in directories.items():
        for path in directory.score_paths():
            found = _MainScore.read(path)
            if isinstance(found, Damaged):
                print(f"left out: {found}", file=sys.stderr)
            elif found is not None:
                rows.append({"run": run, "task": path.stem, "score": found.score})
    return pd.DataFrame(rows)


def _code(directories: Mapping[str, RunDirectory]) -> tuple[str, ...]:
    commits = set()
    for directory in directories.values():
        record = directory.read_record()
        if isinstance(record, RunRecord):
            commits.add(json.dumps(asdict(record.code)))
    return tuple(sorted(commits))
