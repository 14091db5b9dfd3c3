"""Read a table as people have it: CSV, TSV, JSON, JSON lines or Parquet, gzipped too, or exported by W&B or MLflow.

The cells of a text file stay texts until `numbers` reads them, so that a name such as 000 keeps its zeros and a wrong
cell can be shown as it was written. The price is that `runs` asks for each column's kind.
"""

import ast
import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import amount
from embedscale.errors import UserError
from embedscale.texts import number

PACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
ENDINGS = ".csv, .tsv, .json, .jsonl, .parquet, and each with .gz"
FEWEST = 15  # losses of which one can be told to be far above the others
BLANK = {"", "-", "–", "n/a", "na", "<na>", "nan", "none", "null", "#n/a"}  # in lower case: a cell without a value


def read(path: Path) -> pd.DataFrame:
    """Return the table of a file, a row for each run. Cells without a value are None or NaN.

    Dictionaries in cells become columns with dotted names: `config` holding {"lr": {"value": 1}} becomes `config.lr`.
    Raises UserError for a file that cannot be read as its ending says.
    """
    content = path.read_bytes()
    for start, unpack in PACKED.items():
        if content.startswith(start):
            content = _tried(path, "a compressed file", unpack, content)
            break
    endings = [ending.lower() for ending in path.suffixes]
    ending = next((each for each in reversed(endings) if each not in (".gz", ".bz2", ".xz")), "")
    readers: dict[str, Callable[[bytes], pd.DataFrame]] = {
        ".csv": _delimited,
        ".tsv": _delimited,
        ".txt": _delimited,
        ".json": _json,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".parquet": lambda found: pd.read_parquet(io.BytesIO(found)),
    }
    if ending not in readers:
        raise UserError(f"{path}: has the ending {ending!r}; allowed: {ENDINGS} (save a spreadsheet as .csv)")
    table = _tried(path, ending[1:], readers[ending], content)
    names = [str(name) for name in table]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two columns are called {twice[0]!r}; rename one of them")
    return flattened(table.set_axis(names, axis="columns"))


def _tried(path: Path, kind: str, action: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return action(content)
    except (ValueError, OSError, EOFError, csv.Error, lzma.LZMAError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as {kind}: {reason}") from None


def _text(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # as Excel saves "Unicode text"
        return content.decode("utf-16")
    return content.decode("utf-8-sig")


def _delimited(content: bytes) -> pd.DataFrame:
    """Read CSV, or a table with tabs or semicolons: what the header has most of separates the columns."""
    text = _text(content)
    header = next((line for line in text.splitlines() if line.strip()), "")
    separator = max("\t,;", key=re.sub(r'"[^"]*"', "", header).count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True) if any(row)]
    if not rows:
        raise ValueError("it is empty")
    names = [name.strip() or f"column {place}" for place, name in enumerate(rows[0], 1)]
    if all(re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", name) for name in names):
        raise ValueError("its first row holds numbers, and must name the columns")
    for place, row in enumerate(rows[1:], 1):
        if len(row) > len(names) and any(row[len(names) :]):
            raise ValueError(f"row {place} has {len(row)} cells, and the header names {len(names)} columns")
    cells = [[cell if cell.strip() else None for cell in row[: len(names)]] for row in rows[1:]]
    table = pd.DataFrame([row + [None] * (len(names) - len(row)) for row in cells], columns=names, dtype=object)
    if separator == ";":
        table = table.apply(_with_points)
    return table


def _with_points(column: pd.Series) -> pd.Series:
    """Write decimal points for the decimal commas of a table with semicolons.

    Raises ValueError where a comma may as well separate thousands.
    """
    commas = column[column.str.fullmatch(r"\s*[-+]?\d+,\d+(e[-+]?\d+)?\s*", case=False, na=False)]
    if commas.empty:
        return column
    if commas.str.fullmatch(r"\s*[-+]?[1-9]\d{0,2},\d{3}\s*").all():
        raise ValueError(
            f"column {column.name!r} has {commas.iloc[0]!r}, whose comma may separate thousands or decimals; "
            "write decimal points and no commas"
        )
    return column.where(~column.index.isin(commas.index), column.str.replace(",", "."))


def _json(content: bytes) -> pd.DataFrame:
    """Read a list of records, a dictionary of columns, or one record a line under the ending .json."""
    try:
        found = json.loads(_text(content))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _json_lines(content)
    if isinstance(found, dict) and {"columns", "data"} <= found.keys():  # as W&B writes a table, and pandas "split"
        return pd.DataFrame(found["data"], columns=found["columns"], dtype=object)
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1:  # such as {"runs": [...]}
            found = lists[0]
        elif not all(isinstance(value, dict | list) for value in found.values()):
            found = [found]
    if isinstance(found, list) and not all(isinstance(row, dict) for row in found):
        raise ValueError("it is a list of other things than records")
    if not isinstance(found, dict | list):
        raise ValueError("it holds neither records nor columns")
    return pd.DataFrame(found, dtype=object).reset_index(drop=True)


def _json_lines(content: bytes) -> pd.DataFrame:
    rows = []
    for place, line in enumerate(_text(content).splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {place}: {error.msg}") from None
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {place} holds no record")
    if not rows:
        raise ValueError("it is empty")
    return pd.DataFrame(rows, dtype=object)


# --- Dictionaries in cells -------------------------------------------------------------------------------------------


def flattened(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a column of its own for each key of the dictionaries in its cells."""
    for name in [name for name in table if _holds_dictionaries(table[name])]:
        rows = [_flat(_dictionary(cell)) for cell in table[name]]
        inner = pd.DataFrame(rows, index=table.index, dtype=object).add_prefix(f"{name}.")
        table = table.drop(columns=name).join(inner.drop(columns=[each for each in inner if each in table]))
    return table


def _holds_dictionaries(column: pd.Series) -> bool:
    if column.dtype != object and not isinstance(column.dtype, pd.StringDtype):
        return False
    cells = column.dropna()
    return len(cells) > 0 and all(isinstance(cell, dict) or _looks_so(cell) for cell in cells)


def _looks_so(cell: object) -> bool:
    return isinstance(cell, str) and cell.strip().startswith("{") and cell.strip().endswith("}")


def _dictionary(cell: Any) -> Mapping[str, Any]:
    """Return a dictionary, or one that was written as JSON or, as by pandas, as Python does; empty for other texts."""
    if isinstance(cell, dict):
        return cell
    if not isinstance(cell, str):
        return {}
    try:
        found = json.loads(cell)
    except json.JSONDecodeError:
        try:
            found = ast.literal_eval(re.sub(r"(?<=[:,\[])(\s*)-?(?:nan|inf)(?=\s*[,}\]])", r"\1None", cell.strip()))
        except (ValueError, SyntaxError):
            return {}
    return found if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "value" in value and value.keys() <= {"value", "desc"}:  # as W&B writes settings
            value = value["value"]
        if isinstance(value, dict):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = json.dumps(value) if isinstance(value, list) else value
    return found


# --- Cells -----------------------------------------------------------------------------------------------------------


def blank(cell: object) -> bool:
    """Return whether a cell holds no value."""
    if isinstance(cell, str):
        return cell.strip().lower() in BLANK
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and np.isnan(cell))


def numbers(column: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Return a column as numbers, NaN for blank cells, and the reason for each cell that is no number, by its row."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return column.astype(float), pd.Series(dtype=object)
    values, wrong = np.full(len(column), np.nan), {}
    for place, (row, cell) in enumerate(column.items()):
        if blank(cell):
            continue
        try:
            values[place] = amount(cell) if isinstance(cell, str) else _plain_number(cell)
        except ValueError as error:
            wrong[row] = str(error)
    return pd.Series(values, column.index), pd.Series(wrong, dtype=object)


def _plain_number(cell: Any) -> float:
    if isinstance(cell, bool | np.bool_):
        raise ValueError("write a number")
    try:
        return float(cell)
    except TypeError:
        raise ValueError("write a number") from None


def names(column: pd.Series) -> pd.Series:
    """Return a column as texts without spaces around them, None for empty cells: "none" is a name like any other."""
    texts = ["" if not isinstance(cell, str) and blank(cell) else str(cell).strip() for cell in column]
    return pd.Series([text or None for text in texts], column.index)


def texts(column: pd.Series) -> pd.Series:
    """Return a column as texts without spaces around them, None for blank cells."""
    return pd.Series([None if blank(cell) else str(cell).strip() for cell in column], column.index)


# --- Units -----------------------------------------------------------------------------------------------------------

SLIP, USUAL = 100.0, 30.0  # factors between C / (N D) of two rows, and of a table, from which on a unit is doubted


def far_above(losses: pd.Series) -> pd.Series:
    """Return which losses, at most a tenth of 15 or more, lie above the others by more than those differ, and twofold.

    Such a run collapsed, or its row has a slip. A joint law has a term to spare for it, and would bend through it.
    """
    log = np.log(losses.dropna().sort_values().to_numpy(float))
    for place in range(len(log) - len(log) // 10, len(log)) if len(log) >= FEWEST else ():
        if log[place] - log[place - 1] > max(log[place - 1] - log[0], math.log(2)):
            return losses >= math.exp(log[place]) * (1 - 1e-9)
    return losses.isin(())


def notes_of_units(origin: str, table: pd.DataFrame) -> list[str]:
    """Return a note where sizes or tokens look as if they were in millions or billions, or C is far from 6 N D.

    Raises UserError where N, D and C cannot be in one unit: C is 2 to 12 N D for every method of the paper, and more
    where an embedding that N does not count costs most of a small model.
    """
    ratios = table["budget_flop"] / table["n_parameters"] / table["tokens"]
    ratio = float(ratios.median())
    if not 1e-2 < ratio < 1e4:
        raise UserError(
            f"{origin}: budget_flop is {ratio:.2g} × n_parameters × tokens, and 6 is usual: one of the three is in "
            "another unit; name the unit, such as --columns budget_flop=NAME:1e18 or tokens=NAME:1e9, or leave the "
            "column out by --ignore NAME"
        )
    impossible = (ratios < 1) & (ratio >= 2)  # a token costs at least 2 FLOP a parameter
    far = ratios.index[(np.abs(np.log(ratios / ratio)) > math.log(SLIP)) | impossible]
    if len(far):
        told = f"budget_flop is {ratios[far[0]]:.2g} × n_parameters × tokens, and in most rows {ratio:.2g} ×"
        raise UserError(
            f"{origin}: row {far[0] + 1}: {told}: one of the three is wrong or in another unit there; mend the row, or "
            "take it out of the table"
        )
    notes = []
    if not 1 < ratio < USUAL:
        told = f"budget_flop is {number(ratio)} × n_parameters × tokens (median), and 6 is usual"
        notes.append(f"{told}: check their units, and what each of them counts")
    return notes + [
        f"{name}: the median is {table[name].median():.4g}, which is very few; name the unit if it is not 1, such as "
        f"--columns {name}=NAME:1e9"
        for name in ("n_parameters", "tokens")
        if table[name].median() < 1000
    ]
