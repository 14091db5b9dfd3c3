"""Read runs into one table: from run directories, or from a table as people have it (`tables`).

`load` returns `Runs`: a row for each usable run, and a row with the reason for each run that is left out. Runs whose
losses cannot be compared (another held-out pool, other data, another batch size or context) are refused by the name of
the column, never averaged; so are rows that differ in a column that nobody mapped (`replicates`). The price is that a
mixed folder or table needs `where`, which selects runs by a column's value, or `ignore`.
"""

import os
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import replicates, tables
from analysis.columns import (
    COLUMNS,
    COMPARABLE,
    EXCLUDED,
    NO_LAW,
    NOT_ALIKE,
    NUMBERS,
    Source,
    amount,
    canonical,
    missing,
    short_list,
    sources,
)
from embedscale.errors import UserError
from embedscale.progress import Bar
from embedscale.run.directory import RunDirectory
from embedscale.run.families import family_name
from embedscale.run.method import METHODS
from embedscale.run.record import Damaged, RunRecord

LEAST, MOST = 1e-100, 1e100  # of sizes, tokens, FLOP and losses: their squares are numbers too
MANY = 500  # run directories from which on a progress bar is drawn
Row = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """The runs of one experiment.

    `table` has a row for each usable run. The columns `run`, `method`, `n_parameters`, `tokens`, `budget_flop` and
    `loss` are always there, other `columns.COLUMNS` where the source has them. `excluded` has a row for each run that
    is left out: `run`, `reason` ("unfinished", "diverged", "duplicate", "checkpoint", "another COLUMN"), `detail`, and
    `method`, `n_parameters` and `budget_flop` where they are known. `source` names what was read. `notes` say how it
    was read, a line each.

    A table of optima has a row for each budget instead: N* and D* as `n_parameters` and `tokens`, N* also as `n_opt`,
    and a loss only where the source has one.
    """

    table: pd.DataFrame
    excluded: pd.DataFrame
    source: str
    notes: tuple[str, ...] = ()

    @property
    def are_optima(self) -> bool:
        return "n_opt" in self.table

    @property
    def methods(self) -> list[str]:
        """The methods in the paper's order, then the others by name."""
        return in_order(self.table["method"].unique())


def load(
    source: str | Path | pd.DataFrame,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
) -> Runs:
    """Read the runs of a run directory, a folder of them, a file with a table (`tables.read`), or a DataFrame.

    `columns` maps our name of a column (`columns.COLUMNS`) to the table's name, with a unit after a colon where it has
    another one than ours: {"tokens": "D:1e9"}. `where` keeps the runs whose column, ours or any of the table, has the
    value. Columns of the table in `ignore` are not read: rows that differ only in them become replicates.

    Raises UserError for a folder without runs, a missing or non-numeric column, a loss that is not positive, a source
    without a finished run, runs that cannot be compared, and rows that differ in a column that is not known.
    """
    where = dict(where or {})
    if isinstance(source, pd.DataFrame):
        table = source.set_axis([str(name) for name in source], axis="columns").reset_index(drop=True)
        return _from_table("table", tables.flattened(table), columns or {}, where, ignore)
    path = Path(source)
    if path.is_file():
        return _from_table(str(path), tables.read(path), columns or {}, where, ignore)
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; allowed: a folder of runs, or a table ({tables.ENDINGS})")
    if columns or ignore:
        option = "columns" if columns else "ignore"
        raise UserError(f"{option}: {path} is a folder of runs; columns are chosen for a table only")
    table, excluded = _from_directories(path)
    if not table.empty:
        table, excluded = _selected(table, excluded, {canonical(name): value for name, value in where.items()})
        again = table["run"].duplicated()
        excluded += [_exclusion(row, "duplicate", row["path"]) for row in table[again].to_dict("records")]
        table = table[~again]
    return _comparable(str(path), table, excluded)


def load_grid(path: str | Path, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read the runs of a file that have no loss yet, for a simulation: `load`'s table without the loss."""
    raw = tables.read(Path(path))
    found = _chosen(str(path), raw, columns or {}, ())
    found.pop("loss", None)
    table, wrong = _ours(raw.assign(loss=1.0), found | {"loss": Source("loss")})
    _check_cells(str(path), found, raw, wrong)
    table, _ = _completed(str(path), _named(str(path), table, found), found)
    return table.drop(columns="loss")


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
    try:
        if directory.begun():
            yield directory
            return
        with os.scandir(folder) as entries:
            inner = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except PermissionError:  # its record cannot be read either, and says why
        yield directory
        return
    if depth:
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
            if row["status"] == "done" and not (isinstance(loss, int | float) and LEAST < loss < MOST):
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
        "family": record.family or family_name(record.backbone),
        "device": record.device.name,
        "targets": " ".join(record.hyperparameters.targets),
    }
    if record.status == "diverged":
        row["detail"] = f"at step {record.diverged_at_step or 'unknown'}"
    return {key: value for key, value in row.items() if key in COLUMNS or key == "detail"}


def _exclusion(row: Mapping[Any, Any], reason: str, detail: str = "") -> Row:
    return {"run": row["run"], "reason": reason, "detail": detail} | {key: row.get(key) for key in EXCLUDED[3:]}


# --- Tables ----------------------------------------------------------------------------------------------------------

# What trackers and people write for a run that is done, and for one that is not. Other words are reasons of their own.
DONE = {"done", "finished", "complete", "completed", "success", "succeeded", "ok"}
UNFINISHED = {"running", "crashed", "failed", "killed", "cancelled", "canceled", "preempted", "pending", "scheduled"}
Wrong = dict[str, pd.Series]  # our name of a column → the reason for each cell that is not a number, by its row


def _from_table(
    origin: str, raw: pd.DataFrame, columns: Mapping[str, str], where: Mapping[str, str], ignore: Collection[str]
) -> Runs:
    if raw.empty:
        raise UserError(f"{origin}: holds no run")
    raw = raw[~raw.map(tables.blank).all(axis="columns")]
    found = _chosen(origin, raw, columns, ignore)
    if not {"loss", "n_opt"} & found.keys():
        raise UserError(f"{origin}: column 'loss' is missing; {missing(raw, ['loss'])}")
    unknown = [name for name in ("n_parameters", "tokens", "budget_flop") if name not in found]
    if len(unknown) > (2 if "n_opt" in found else 1):
        raise UserError(
            f"{origin}: of n_parameters, tokens and budget_flop two are needed, and {', '.join(unknown)} are missing; "
            f"{missing(raw, unknown)}"
        )
    notes = _notes_of_names(found, ignore)
    table, wrong = _ours(raw, found)
    excluded: list[Row] = []
    late: dict[str, str] = {}  # of columns that are computed from others
    for name, value in where.items():
        ours = canonical(name)
        if name not in raw and ours not in table:
            if ours not in ("n_parameters", "tokens", "budget_flop"):
                raise UserError(f"where: {origin} has no column {name!r}; allowed: {short_list(raw)}")
            late[ours] = value
            continue
        cells = raw.loc[table.index, name] if name in raw else table[ours]
        table, excluded = _kept(table, excluded, _equal(name, cells, value), name, cells)
    _check_cells(origin, found, raw, {name: cells[cells.index.isin(table.index)] for name, cells in wrong.items()})
    table = _named(origin, table, found)
    table, more = _completed(origin, table, found)
    table, excluded = _selected(table, excluded + more, late)
    if not table.empty:
        notes += tables.notes_of_units(origin, table)
        reasons = replicates.repeated(origin, table)
        if (reasons == "checkpoint").any():
            notes.append(
                f"names in the column run recur: {(reasons == 'checkpoint').sum()} rows are earlier checkpoints, and "
                "the last row of each run, by tokens, is used; --ignore run takes each row for a run of its own"
            )
        gone = table[reasons != ""].to_dict("records")
        excluded += [_exclusion(row, why) for row, why in zip(gone, reasons[reasons != ""], strict=True)]
        table = table[reasons == ""]
        # Without its digest, the name of the data is all that says whether two runs had the same.
        known = {source.name for ours, source in found.items() if ours != "data" or "data_digest" in found}
        others = raw.loc[table.index].drop(columns=list(known | set(ignore)))
        if "n_opt" in table and not table.duplicated(["method", "budget_flop"]).any():
            others = others[[name for name in others if len(tables.numbers(others[name])[1])]]  # no row can be averaged
        replicates.refuse(origin, others, table)
    return _comparable(origin, table, excluded, notes)


def _chosen(origin: str, raw: pd.DataFrame, columns: Mapping[str, str], ignore: Collection[str]) -> dict[str, Source]:
    """Return where each of our columns comes from."""
    for name in ignore:
        if name not in raw:
            raise UserError(f"ignore: {origin} has no column {name!r}; allowed: {short_list(raw)}")
    try:
        found = sources([str(name) for name in raw if name not in ignore], columns)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    run = found.get("run")
    if run and not run.named and raw[run.name].duplicated().any():  # a name that recurs may be that of a model
        del found["run"]
    if "n_opt" in found and (found["n_opt"].named or "n_parameters" not in found):  # a table of optima
        of_runs = {"n_parameters": found["n_opt"]} | ({"tokens": found["d_opt"]} if "d_opt" in found else {})
        return found | of_runs
    return {ours: source for ours, source in found.items() if ours not in ("n_opt", "d_opt", "n_opt_spread")}


def _notes_of_names(found: Mapping[str, Source], ignore: Collection[str]) -> list[str]:
    guessed = [
        f"{ours} from {source.name!r}" + (f" × {source.factor:g}" if source.factor != 1 else "")
        for ours, source in found.items()
        if not source.named and not (ours in ("n_parameters", "tokens") and "n_opt" in found)
    ]
    notes = [f"columns were recognised by their names: {', '.join(guessed)}"] if guessed else []
    if ignore:
        notes.append(f"ignored, as asked: {', '.join(ignore)}; rows that differ only there are replicates")
    return notes


def _ours(raw: pd.DataFrame, found: Mapping[str, Source]) -> tuple[pd.DataFrame, Wrong]:
    """Return the table in our columns and units, and the cells that are no numbers."""
    table, wrong = pd.DataFrame(index=raw.index), {}
    for ours, source in found.items():
        if ours in NUMBERS:
            values, wrong[ours] = tables.numbers(raw[source.name])
            table[ours] = values * source.factor
        else:
            table[ours] = tables.names(raw[source.name]) if ours == "method" else tables.texts(raw[source.name])
    if "run" not in table:
        table["run"] = [f"row {i + 1}" for i in table.index]
    table["run"] = table["run"].fillna(pd.Series([f"row {i + 1}" for i in table.index], table.index))
    return table, wrong


def _named(origin: str, table: pd.DataFrame, found: Mapping[str, Source]) -> pd.DataFrame:
    """Return the table with a method in each row: full fine-tuning where no row names one.

    Raises UserError where some rows name a method and others do not: they are not full fine-tuning by themselves.
    """
    methods = table["method"] if "method" in table else pd.Series(None, table.index, object)
    if methods.isna().all():
        return table.assign(method="full")
    if methods.isna().any():
        row = methods.index[methods.isna()][0]
        raise UserError(
            f"{_place(origin, 'method', found['method'].name, row)} is empty, and other rows name a method; write one, "
            "such as full, or take the row out of the table"
        )
    return table.assign(method=methods.where(~methods.str.lower().isin(METHODS), methods.str.lower()))  # LoRA is lora


def _check_cells(origin: str, found: Mapping[str, Source], raw: pd.DataFrame, wrong: Wrong) -> None:
    """Raise UserError for the first cell that is no number."""
    for ours, reasons in wrong.items():
        if len(reasons):
            row, theirs = reasons.index[0], found[ours].name
            more = "; leave the cell empty if the run diverged" if ours == "loss" else ""
            raise UserError(f"{_place(origin, ours, theirs, row)} has {raw[theirs][row]!r}; {reasons[row]}{more}")


def _place(origin: str, ours: str, theirs: str, row: int) -> str:
    column = ours if ours == theirs else f"{theirs} ({ours})"
    return f"{origin}: {column}: row {row + 1}"


def _completed(origin: str, table: pd.DataFrame, found: Mapping[str, Source]) -> tuple[pd.DataFrame, list[Row]]:
    """Compute N, D or C where one of the three is missing; leave out runs that are not done or have no finite loss."""
    if "trainable_fraction" in table or (table["method"] == "full").any():
        fraction = table.get("trainable_fraction", pd.Series(np.nan, table.index))
        table["trainable_fraction"] = fraction.where(fraction.notna() | (table["method"] != "full"), 1.0)
    _complete(table)
    words = table["status"].fillna("done") if "status" in table else pd.Series("done", table.index)
    lower = words.str.lower()
    reasons = lower.where(~lower.isin(UNFINISHED), "unfinished").where(~lower.isin(DONE), "")
    details = words.where(lower.isin(UNFINISHED), "")
    needed, why = ("n_opt", "no optimum") if "n_opt" in table else ("loss", "diverged")
    lost = (reasons == "") & ~np.isfinite(table[needed])
    reasons = reasons.where(~lost, why)
    details = details.where(~lost, f"{needed} is " + table[needed].astype(str))
    table["loss"] = table.get("loss", pd.Series(np.nan, table.index))
    gone = reasons != ""
    excluded = [
        _exclusion(row, reason, detail)
        for row, reason, detail in zip(table[gone].to_dict("records"), reasons[gone], details[gone], strict=True)
    ]
    table = table[~gone].copy()
    if "status" in table:
        table["status"] = "done"
    for name in ("n_parameters", "tokens", "budget_flop", "loss"):
        unknown = table[name].isna() if name == "loss" else False
        for row in table.index[~(table[name].between(LEAST, MOST) | unknown)][:1]:
            place = _place(origin, name, found[name].name if name in found else name, row)
            if np.isnan(table[name][row]):
                raise UserError(
                    f"{place} has none, and it does not follow from the other columns; "
                    f"name the column by --columns {name}=NAME, or take the row out of the table"
                )
            ends = "finite and above 0" if not 0 < table[name][row] < np.inf else f"{LEAST:g} to {MOST:g}"
            raise UserError(f"{place} has {table[name][row]}; allowed: {ends}")
    return table, excluded


def _complete(table: pd.DataFrame) -> None:
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


# --- What can be compared --------------------------------------------------------------------------------------------


def _comparable(source: str, table: pd.DataFrame, excluded: list[Row], notes: Collection[str] = ()) -> Runs:
    if table.empty:
        reasons = Counter(row["reason"] for row in excluded)
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "it holds no run"
        raise UserError(f"{source}: no finished run ({told})")
    for name in table.columns.intersection(list(NUMBERS)):
        table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
    far = tables.far_above(table["loss"])
    for row in table[far].to_dict("records"):
        excluded = [*excluded, _exclusion(row, "diverged", f"loss is {row['loss']:.4g}")]
        notes = [*notes, f"{row['run']}: loss {row['loss']:.4g} is far above all others, so it is taken as diverged"]
    table = table[~far]
    for field in COMPARABLE:
        values: Any = table[field].dropna().unique() if field in table else []
        if len(values) > 1:
            told = ", ".join(map(str, values[:4])) + (", …" if len(values) > 4 else "")
            value = shlex.quote(f"{field}={values[0]}")
            raise UserError(
                f"{source}: runs differ in {field} ({told}), so {NO_LAW.get(field, NOT_ALIKE)}; "
                f"allowed: one value, such as --where {value}"
            )
    return Runs(table.reset_index(drop=True), pd.DataFrame(excluded, columns=list(EXCLUDED)), source, tuple(notes))


def _selected(table: pd.DataFrame, excluded: list[Row], where: Mapping[str, str]) -> tuple[pd.DataFrame, list[Row]]:
    """Keep the runs whose columns, which are ours, have the values."""
    for name, value in where.items():
        if name not in table:
            raise UserError(f"where: no run has {name!r}; allowed: {short_list(table)}")
        table, excluded = _kept(table, excluded, _equal(name, table[name], value), name, table[name])
    return table, excluded


def _kept(
    table: pd.DataFrame, excluded: list[Row], keep: pd.Series, name: str, cells: pd.Series
) -> tuple[pd.DataFrame, list[Row]]:
    rows = zip(table[~keep].to_dict("records"), cells[~keep], strict=True)
    return table[keep], excluded + [_exclusion(row, f"another {name}", str(cell)) for row, cell in rows]


def _equal(name: str, cells: pd.Series, value: str) -> pd.Series:
    """Return for each cell whether it has the value, as a text or as a number."""
    same = cells.astype(str).str.strip() == value
    try:
        number = amount(value)
    except ValueError:
        if name in NUMBERS:
            raise UserError(f"where: {name}={value}: {value!r} is not a number; write a number") from None
        return same
    return same | np.isclose(tables.numbers(cells)[0], number, rtol=1e-9)
