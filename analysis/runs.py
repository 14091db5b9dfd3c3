"""Read runs into one table: from run directories, or from a CSV, Parquet or JSON-lines file.

`load` returns `Runs`: a row for each usable run, and a row with the reason for each run that is left out. Runs whose
losses cannot be compared (another held-out pool, other data, another batch size or context) are refused by the name of
the column, never averaged. The price is that a mixed folder needs `where`, which selects runs by a column's value.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import COLUMNS, COMPARABLE, EXCLUDED, NUMBERS, TEXTS, present_names, renames
from embedscale.errors import UserError
from embedscale.progress import Bar
from embedscale.run.directory import RunDirectory
from embedscale.run.method import METHODS
from embedscale.run.record import Damaged, RunRecord

MANY = 500  # run directories from which on a progress bar is drawn
Row = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """The runs of one experiment.

    `table` has a row for each usable run. The columns `run`, `method`, `n_parameters`, `tokens`, `budget_flop` and
    `loss` are always there, other `columns.COLUMNS` where the source has them. `excluded` has a row for each run that
    is left out: `run`, `reason` ("unfinished", "diverged", "duplicate", "another COLUMN"), `detail`, and `method`,
    `n_parameters` and `budget_flop` where they are known. `source` names what was read.
    """

    table: pd.DataFrame
    excluded: pd.DataFrame
    source: str

    @property
    def methods(self) -> list[str]:
        """The methods in the paper's order, then the others by name."""
        return in_order(self.table["method"].unique())


def load(
    source: str | Path | pd.DataFrame,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
) -> Runs:
    """Read the runs of a run directory, a folder of them, a .csv, .parquet or .jsonl file, or a DataFrame.

    `columns` maps our name of a column (`columns.COLUMNS`) to the table's name. `where` keeps the runs whose column has
    the value.

    Raises UserError for a folder without runs, a missing or non-numeric column, a loss that is not positive and
    finite, a source without a finished run, and runs that cannot be compared.
    """
    columns = present_names(columns or {})
    if isinstance(source, pd.DataFrame):
        name = "table"
        table, excluded = _tidy(name, _mapped(name, source, columns).copy())
        return _usable(name, table, excluded, present_names(where or {}))
    path = Path(source)
    if path.is_dir():
        if columns:
            raise UserError(f"columns: {path} is a folder of runs; columns are mapped for a file only")
        table, excluded = _from_directories(path)
    elif path.is_file():
        table, excluded = _tidy(str(path), _renamed(path, columns))
    else:
        raise UserError(f"{path}: does not exist; allowed: a folder of runs, or a .csv, .parquet or .jsonl file")
    return _usable(str(path), table, excluded, present_names(where or {}))


def load_grid(path: str | Path, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read the runs of a file that have no loss yet, for a simulation: `load`'s table without the loss."""
    table = _renamed(Path(path), present_names(columns or {})).drop(columns="loss", errors="ignore")
    return _tidy(str(path), table.assign(loss=1.0))[0].drop(columns="loss")


def flop_per_token(method: str, n_parameters: Any, trainable_fraction: Any) -> Any:
    """Return the paper's 2 (N_F + N_B + N_U) (section 3.5) from N and S alone; NaN for a method of unknown cost."""
    kind = METHODS.get(method)
    return (kind.flop_per_parameter(trainable_fraction) if kind else np.nan) * n_parameters


def in_order(methods: Any) -> list[str]:
    """Return names of methods in the paper's order, then the others by name."""
    order = list(METHODS)
    return sorted(methods, key=lambda name: (order.index(name) if name in order else len(order), name))


# --- Run directories -------------------------------------------------------------------------------------------------


def _directories(folder: Path, depth: int = 3) -> Iterator[RunDirectory]:
    """Yield the run directories in `folder`, itself included, in order of their paths; a run holds no further runs."""
    directory = RunDirectory(folder)
    if directory.begun():
        yield directory
    elif depth:
        with os.scandir(folder) as entries:
            inner = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        for name in inner:
            yield from _directories(folder / name, depth - 1)


def _from_directories(folder: Path) -> tuple[pd.DataFrame, list[Row]]:
    directories = list(_directories(folder))
    if not directories:
        raise UserError(f"{folder}: holds no run; expected run directories, each with a record.json when it is done")

    def read(directory: RunDirectory) -> Row:
        record = directory.read_record()
        if isinstance(record, Damaged):
            return {"status": "unreadable", "detail": f"{record.path.name}: {record.why}"}
        return {"status": "unfinished"} if record is None else _from_record(record)

    rows, excluded = [], []
    # Threads, because reading thousands of small files from a shared file system is mostly waiting.
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(read, directories)
        bar = Bar("runs", len(directories)) if len(directories) >= MANY else None
        if bar:
            bar.start()
        for directory, row in zip(directories, found, strict=True):
            row = {"run": directory.path.name} | row | {"path": str(directory.path)}
            loss = row.get("loss")
            if row["status"] == "done" and not (isinstance(loss, int | float) and np.isfinite(loss) and loss > 0):
                row |= {"status": "diverged", "detail": f"loss is {loss}"}
            if row["status"] == "done":
                rows.append(row)
            else:
                excluded.append(_exclusion(row, row["status"], row.get("detail", "")))
            if bar:
                bar.advance()
        if bar:
            bar.stop()
    return pd.DataFrame(rows, columns=None if rows else ["run"]), excluded


def _from_record(record: RunRecord) -> Row:
    hyperparameters = asdict(record.hyperparameters)
    hyperparameters["loss_function"] = hyperparameters.pop("loss")
    row = {
        **{key: value for key, value in hyperparameters.items() if key in COLUMNS},
        **{key: value for key, value in vars(record).items() if key in COLUMNS and key not in ("blocks", "device")},
        **{f"evaluation.{key}": value for key, value in asdict(record.evaluation).items()},
        "run": record.run_id,
        "device": record.device.name,
        "targets": " ".join(record.hyperparameters.targets),
    }
    if record.status == "diverged":
        row["detail"] = f"at step {record.diverged_at_step or 'unknown'}"
    return {key: value for key, value in row.items() if key in COLUMNS or key == "detail"}


def _exclusion(row: Mapping[Any, Any], reason: str, detail: str = "") -> Row:
    return {"run": row["run"], "reason": reason, "detail": detail} | {key: row.get(key) for key in EXCLUDED[3:]}


# --- Files -----------------------------------------------------------------------------------------------------------


def _renamed(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Read a file's table and give its columns our names."""
    # A text may look like a number: a run called 000, a digest of 12e4567890123456.
    texts = {columns.get(name, name): str for name in TEXTS}
    readers: dict[str, Any] = {
        ".csv": lambda file: pd.read_csv(file, dtype=texts, float_precision="round_trip"),
        ".parquet": pd.read_parquet,
        ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False),
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: has the ending {path.suffix!r}; allowed: {', '.join(readers)} or a folder of runs")
    try:
        table = readers[path.suffix](path)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {reason}") from None
    return _mapped(str(path), table, columns)


def _mapped(origin: str, table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    try:
        ours = renames(list(table.columns), columns)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    # A mapped column replaces a column that happens to have our name.
    table = table.drop(columns=[name for name in table if name in ours.values() and name not in ours])
    return table.rename(columns=ours)


def _tidy(origin: str, table: pd.DataFrame) -> tuple[pd.DataFrame, list[Row]]:
    """Keep the known columns and check their types; compute N, D or C where one of the three is missing."""
    table = table[[name for name in table if name in COLUMNS]].reset_index(drop=True)
    if table.empty:
        raise UserError(f"{origin}: holds no run")
    if "loss" not in table:
        raise UserError(f"{origin}: column 'loss' is missing; name it by --columns loss=NAME")
    for name in table.columns.intersection(list(NUMBERS)):
        values = pd.to_numeric(table[name], errors="coerce")
        wrong = values.isna() & table[name].notna()
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(f"{origin}: {name}: row {row + 1} has {table[name][row]!r}; allowed: numbers")
        table[name] = values.astype(float)
    if "run" not in table:
        table["run"] = [f"row {i + 1}" for i in range(len(table))]
    table["run"] = table["run"].astype(str)
    table["method"] = table["method"].fillna("full").astype(str) if "method" in table else "full"
    excluded = []
    if "status" in table:
        done = table["status"].fillna("done") == "done"
        excluded = [_exclusion(row, str(row["status"])) for row in table[~done].to_dict("records")]
        table = table[done].reset_index(drop=True)
    if "trainable_fraction" in table or (table["method"] == "full").any():
        fraction = table.get("trainable_fraction", pd.Series(np.nan, table.index))
        table["trainable_fraction"] = fraction.where(fraction.notna() | (table["method"] != "full"), 1.0)
    _complete(origin, table)
    for name in ("n_parameters", "tokens", "budget_flop", "loss"):
        wrong = ~(np.isfinite(table[name]) & (table[name] > 0))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(f"{origin}: {name}: row {row + 1} has {table[name][row]}; allowed: finite and above 0")
    return table, excluded


def _complete(origin: str, table: pd.DataFrame) -> None:
    """Fill in N, D or C where it follows from the other two: C = D × FLOP a token."""
    for name in ("n_parameters", "tokens", "budget_flop"):
        if name not in table:
            table[name] = np.nan
    fraction = table.get("trainable_fraction", pd.Series(np.nan, table.index))
    # FLOP a token for each parameter, from S alone
    factor = np.array([flop_per_token(m, 1.0, s) for m, s in zip(table["method"], fraction, strict=True)], float)
    per_token = table.get("flop_per_token", pd.Series(np.nan, table.index)).fillna(factor * table["n_parameters"])
    table["tokens"] = table["tokens"].fillna(table["budget_flop"] / per_token)
    table["budget_flop"] = table["budget_flop"].fillna(table["tokens"] * per_token)
    table["n_parameters"] = table["n_parameters"].fillna(table["budget_flop"] / table["tokens"] / factor)
    for name in ("n_parameters", "tokens", "budget_flop"):
        missing = table[name].isna()
        if missing.any():
            raise UserError(
                f"{origin}: {name}: row {int(np.argmax(missing)) + 1} has none, and the other columns do not tell it; "
                f"name the column by --columns {name}=NAME"
            )


# --- What can be compared --------------------------------------------------------------------------------------------


def _usable(source: str, table: pd.DataFrame, excluded: list[Row], where: dict[str, str]) -> Runs:
    if not table.empty:
        for name in table.columns.intersection(list(NUMBERS)):
            table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
        table, excluded = _selected(table, excluded, where)
        table, excluded = _without_duplicates(table, excluded)
    if table.empty:
        reasons = pd.Series([row["reason"] for row in excluded]).value_counts()
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "it holds no run"
        raise UserError(f"{source}: no finished run ({told})")
    for field in COMPARABLE:
        values: Any = table[field].dropna().unique() if field in table else []
        if len(values) > 1:
            told = ", ".join(map(str, values[:4])) + (", …" if len(values) > 4 else "")
            raise UserError(
                f"{source}: runs differ in {field} ({told}), so their losses cannot be compared; "
                f"allowed: one value, such as --where {field}={values[0]}"
            )
    return Runs(table.reset_index(drop=True), pd.DataFrame(excluded, columns=list(EXCLUDED)), source)


def _selected(table: pd.DataFrame, excluded: list[Row], where: Mapping[str, str]) -> tuple[pd.DataFrame, list[Row]]:
    for name, value in where.items():
        if name not in table:
            raise UserError(f"where: no run has {name!r}; allowed: {', '.join(map(str, table))}")
        if name in NUMBERS:
            try:
                keep = np.isclose(table[name], float(value), rtol=1e-9)
            except ValueError:
                raise UserError(f"where: {name}={value}: {value!r} is not a number; write a number") from None
        else:
            keep = table[name].astype(str) == value
        excluded = excluded + [
            _exclusion(row, f"another {name}", str(row[name])) for row in table[~keep].to_dict("records")
        ]
        table = table[keep]
    return table, excluded


def _without_duplicates(table: pd.DataFrame, excluded: list[Row]) -> tuple[pd.DataFrame, list[Row]]:
    """Keep the first of the rows that have one id or, where rows have no ids, of the rows that are equal."""
    content = table.drop(columns=["run", "path"], errors="ignore").astype(str)
    repeated = content.duplicated() if table["run"].str.startswith("row ").all() else table["run"].duplicated()
    rows = [_exclusion(row, "duplicate", row.get("path", "")) for row in table[repeated].to_dict("records")]
    return table[~repeated], excluded + rows
