"""Runs as one tidy table: from run directories, or from anybody's CSV, Parquet or JSON lines.

`load` gives `Runs`: a row for each usable run, and a row for each that was left out with the reason. What makes
losses incomparable (another held-out pool, other data, another batch size or context) is refused by the name of the
field rather than averaged over. `where` selects among such runs, and what it leaves out is listed like the rest.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.progress import track

from embedscale.errors import UserError
from embedscale.run.directory import RunDirectory
from embedscale.run.record import Damaged, RunRecord

NUMBERS = {
    "params": "N, non-embedding parameters of the backbone",
    "tokens": "D, tokens processed",
    "budget": "C, FLOP paid for (nominal: runs of one IsoFLOP profile share it)",
    "loss": "held-out contrastive loss, nats",
    "trainable_fraction": "S, active blocks / blocks for freezing, updated / all parameters else",
    "flop_per_token": "the paper's 2 (N_F + N_B + N_U)",
    "learning_rate": "peak",
    "rank": "of LoRA",
    "alpha": "of LoRA",
    "dropout": "of LoRA",
    "active_fraction": "of freezing, where it was given so",
    "active_blocks": "of freezing, where it was given so",
    "weight_decay": "of AdamW",
    "clip": "of the gradient's norm",
    "warmup_fraction": "of steps",
    "final_fraction": "of the peak learning rate, at the end",
    "batch_size": "pairs",
    "context": "tokens",
    "temperature": "of the training loss",
    "hard_negatives": "of a pair",
    "seed": "replicates differ in it alone",
    "pairs": "pairs processed",
    "steps": "optimiser steps",
    "train_loss": "mean of the last steps, nats",
    "recall_at_1": "held out",
    "recall_at_10": "held out",
    "gpu_hours": "device-hours",
    "wall_seconds": "over all attempts",
    "spent_flop": "paper's convention",
    "spent_flop_exact": "exact convention",
    "evaluation.pool": "held-out pairs",
    "evaluation.negatives": "negatives a query",
    "evaluation.temperature": "of the held-out loss",
}
TEXTS = {
    "run": "id; default the row's number",
    "method": "full, freeze, bias, lora or any other name; default full",
    "status": "done or diverged; default done",
    "backbone": "short name",
    "backbone_weights": "pretrained or random",
    "backbone_revision": "of the hub's model, where one was asked for",
    "targets": "of LoRA",
    "embedding": "LoRA on the embedding",
    "blocks": "freezing: last, first or one",
    "precision": "of training",
    "pooling": "of the encoder",
    "loss_function": "of training",
    "mask_equal_texts": "a text equal to the positive is no negative",
    "data": "store",
    "data_digest": "of the store",
    "evaluation.digest": "of the held-out pool",
    "device": "name",
    "path": "run directory",
}
COLUMNS = NUMBERS | TEXTS

# Losses of runs that differ in one of these say nothing about each other (trap A15).
COMPARABLE = (
    *("evaluation.pool", "evaluation.negatives", "evaluation.temperature", "evaluation.digest"),
    *("data_digest", "batch_size", "context", "backbone_weights"),
)
EXCLUDED = ["run", "reason", "detail", "method", "params", "budget"]


@dataclass(frozen=True)
class Runs:
    """The runs of one experiment.

    `table` has a row for each usable run: `run`, `method`, `params`, `tokens`, `budget` and `loss` always, other
    `COLUMNS` where the source has them. `excluded` has a row for each run left out: `run`, `reason` ("unfinished",
    "diverged", "duplicate", "another FIELD"), `detail`, and `method`, `params`, `budget` where they are known.
    `source` is what was read.
    """

    table: pd.DataFrame
    excluded: pd.DataFrame
    source: str

    @property
    def methods(self) -> list[str]:
        """In the paper's order, then by name."""
        order = ["full", "freeze", "bias", "lora"]
        return sorted(self.table["method"].unique(), key=lambda name: (order.index(name) if name in order else 9, name))


def load(source: str | Path, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None) -> Runs:
    """The runs of a run directory, of a folder of them, or of a .csv, .parquet or .jsonl file.

    `columns` maps our name of a column (`COLUMNS`) to the file's. `where` keeps the runs whose column has a value.

    Raises UserError for a folder without runs, a missing or non-numeric column, a loss that is not positive and
    finite, no finished run, and runs that cannot be compared.
    """
    path = Path(source)
    if path.is_dir():
        if columns:
            raise UserError(f"columns: {path} is a folder of runs, whose columns have their names; allowed: for a file")
        table, excluded = _from_directories(path)
    elif path.is_file():
        table, excluded = _from_file(path, dict(columns or {}))
    else:
        raise UserError(f"{path}: does not exist; allowed: a folder of runs, or a .csv, .parquet or .jsonl file")
    return _usable(str(path), table, excluded, dict(where or {}))


def from_table(table: pd.DataFrame, source: str = "table", where: Mapping[str, str] | None = None) -> Runs:
    """`load` for a DataFrame whose columns go by our names."""
    tidy, excluded = _tidy(source, table.copy())
    return _usable(source, tidy, excluded, dict(where or {}))


def flop_per_token(method: str, params: Any, trainable_fraction: Any) -> Any:
    """The paper's 2 (N_F + N_B + N_U) (section 3.5) from N and S alone; NaN for a method of unknown cost.

    For freezing N_B = N_U = S N; for LoRA the adapters have S N parameters.
    """
    s = trainable_fraction
    rules = {"full": 6.0, "bias": 4.0, "freeze": 2 + 4 * s, "lora": 4 * (1 + s) + 2 * s}
    return rules.get(method, np.nan) * params


def parse_assignments(option: str, text: str | None, allowed: Mapping[str, str] | None = None) -> dict[str, str]:
    """`a=x,b=y` as a mapping. Raises UserError for a word without "=" or a name that is not allowed."""
    result = {}
    for word in (text or "").split(","):
        name, equals, value = word.partition("=")
        if not word.strip():
            continue
        if not equals or not value.strip():
            raise UserError(f"{option}: {word!r} is no NAME=VALUE")
        if allowed is not None and name.strip() not in allowed:
            raise UserError(f"{option}: {name.strip()!r} is unknown; allowed: {', '.join(allowed)}")
        if name.strip() in result:
            raise UserError(f"{option}: {name.strip()!r} is given twice")
        result[name.strip()] = value.strip()
    return result


# --- Run directories -------------------------------------------------------------------------------------------------


def _directories(folder: Path, depth: int = 3) -> Iterator[RunDirectory]:
    """Run directories in `folder`, itself included, in order of their paths; a run holds no further runs."""
    directory = RunDirectory(folder)
    if directory.begun():
        yield directory
    elif depth:
        with os.scandir(folder) as entries:
            inner = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        for name in inner:
            yield from _directories(folder / name, depth - 1)


def _from_directories(folder: Path) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    directories = list(_directories(folder))
    if not directories:
        raise UserError(f"{folder}: holds no run; expected run directories, each with a record.json when it is done")

    def read(directory: RunDirectory) -> dict[str, Any]:
        record = directory.read_record()
        if isinstance(record, Damaged):
            return {"status": "unreadable", "detail": f"{record.path.name}: {record.why}"}
        return {"status": "unfinished"} if record is None else _from_record(record)

    rows, excluded = [], []
    # Threads, for thousands of small files on a shared file system are a matter of waiting.
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(read, directories)
        quiet = len(directories) < 500
        for directory, row in track(zip(directories, found, strict=True), "runs", len(directories), disable=quiet):
            row = {"run": directory.path.name} | row | {"path": str(directory.path)}
            loss = row.get("loss")
            if row["status"] == "done" and not (isinstance(loss, int | float) and np.isfinite(loss) and loss > 0):
                row |= {"status": "diverged", "detail": f"loss is {loss}"}
            if row["status"] == "done":
                rows.append(row)
            else:
                excluded.append(_exclusion(row, row["status"], row.get("detail", "")))
    return pd.DataFrame(rows, columns=None if rows else ["run"]), excluded


def _from_record(record: RunRecord) -> dict[str, Any]:
    hyperparameters = asdict(record.hyperparameters)
    hyperparameters["loss_function"] = hyperparameters.pop("loss")
    row = {
        **{key: value for key, value in hyperparameters.items() if key in COLUMNS},
        **{key: value for key, value in vars(record).items() if key in COLUMNS and key not in ("blocks", "device")},
        **{f"evaluation.{key}": value for key, value in asdict(record.evaluation).items()},
        "run": record.run_id,
        "params": record.n_parameters,
        "budget": record.budget_flop,
        "device": record.device.name,
        "targets": " ".join(record.hyperparameters.targets),
    }
    if record.status == "diverged":
        row["detail"] = f"at step {record.diverged_at_step or 'unknown'}"
    return {key: value for key, value in row.items() if key in COLUMNS or key == "detail"}


def _exclusion(row: Mapping[Any, Any], reason: str, detail: str = "") -> dict[str, Any]:
    return {"run": row["run"], "reason": reason, "detail": detail} | {key: row.get(key) for key in EXCLUDED[3:]}


# --- Files -----------------------------------------------------------------------------------------------------------


def _from_file(path: Path, columns: dict[str, str]) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    return _tidy(str(path), _renamed(path, columns))


def load_grid(path: str | Path, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The runs of a file that have no loss yet, for a simulation: `load`'s table without the loss."""
    table = _renamed(Path(path), dict(columns or {})).drop(columns="loss", errors="ignore")
    return _tidy(str(path), table.assign(loss=1.0))[0].drop(columns="loss")


def _renamed(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """The file's table by our names of its columns."""
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
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise UserError(f"columns: {ours!r} is unknown; allowed: {', '.join(COLUMNS)}")
        if theirs not in table.columns:
            raise UserError(f"{path}: column {theirs!r} ({ours}) is missing; it has {', '.join(map(str, table))}")
    mapped = {theirs: ours for ours, theirs in columns.items()}
    # A mapped column takes the place of one that happens to have our name.
    table = table.drop(columns=[name for name in table if name in columns and name not in mapped])
    return table.rename(columns=mapped)


def _tidy(origin: str, table: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Known columns with checked types; budget, parameters or tokens computed where one of the three is missing."""
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
    for name in ("params", "tokens", "budget", "loss"):
        wrong = ~(np.isfinite(table[name]) & (table[name] > 0))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(f"{origin}: {name}: row {row + 1} has {table[name][row]}; allowed: finite and above 0")
    return table, excluded


def _complete(origin: str, table: pd.DataFrame) -> None:
    """Fill in what of params, tokens and budget follows from the others: C = D × FLOP a token."""
    for name in ("params", "tokens", "budget"):
        if name not in table:
            table[name] = np.nan
    fraction = table.get("trainable_fraction", pd.Series(np.nan, table.index))
    # FLOP a token and parameter, from S alone
    factor = np.array([flop_per_token(m, 1.0, s) for m, s in zip(table["method"], fraction, strict=True)], float)
    per_token = table.get("flop_per_token", pd.Series(np.nan, table.index)).fillna(factor * table["params"])
    table["tokens"] = table["tokens"].fillna(table["budget"] / per_token)
    table["budget"] = table["budget"].fillna(table["tokens"] * per_token)
    table["params"] = table["params"].fillna(table["budget"] / table["tokens"] / factor)
    for name in ("params", "tokens", "budget"):
        missing = table[name].isna()
        if missing.any():
            raise UserError(
                f"{origin}: {name}: row {int(np.argmax(missing)) + 1} has none, nor do the others give it; "
                f"name the column by --columns {name}=NAME"
            )


# --- What can be compared --------------------------------------------------------------------------------------------


def _usable(source: str, table: pd.DataFrame, excluded: list[dict[str, Any]], where: dict[str, str]) -> Runs:
    if not table.empty:
        for name in table.columns.intersection(list(NUMBERS)):
            table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
        table, excluded = _selected(table, excluded, where)
        table, excluded = _without_duplicates(table, excluded)
    if table.empty:
        reasons = pd.Series([row["reason"] for row in excluded]).value_counts()
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no run at all"
        raise UserError(f"{source}: no finished run ({told})")
    for field in COMPARABLE:
        values: Any = table[field].dropna().unique() if field in table else []
        if len(values) > 1:
            told = ", ".join(map(str, values[:4])) + (", …" if len(values) > 4 else "")
            raise UserError(
                f"{source}: runs differ in {field} ({told}), so their losses cannot be compared; "
                f"allowed: one value, such as --where {field}={values[0]}"
            )
    return Runs(table.reset_index(drop=True), pd.DataFrame(excluded, columns=EXCLUDED), source)


def _selected(table, excluded, where):
    for name, value in where.items():
        if name not in table:
            raise UserError(f"where: no run has {name!r}; allowed: {', '.join(table)}")
        if name in NUMBERS:
            try:
                keep = np.isclose(table[name], float(value), rtol=1e-9)
            except ValueError:
                raise UserError(f"where: {name}={value}: is no number") from None
        else:
            keep = table[name].astype(str) == value
        excluded = excluded + [
            _exclusion(row, f"another {name}", str(row[name])) for row in table[~keep].to_dict("records")
        ]
        table = table[keep]
    return table, excluded


def _without_duplicates(table, excluded):
    """One row for each run: the first of those with one id, or of those equal in all that is known of them."""
    content = table.drop(columns=["run", "path"], errors="ignore").astype(str)
    repeated = content.duplicated() if table["run"].str.startswith("row ").all() else table["run"].duplicated()
    rows = [_exclusion(row, "duplicate", row.get("path", "")) for row in table[repeated].to_dict("records")]
    return table[~repeated], excluded + rows
