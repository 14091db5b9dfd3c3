"""Rows of files of texts: JSON lines, JSON arrays, CSV and TSV, and columns of Arrow tables; compressed or not.

What a file is compressed with is told by its first bytes, not by its name. The price: a file that is compressed, an
array or a CSV file can only be read from its beginning.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from embedscale.errors import UserError

MAGIC = {"gzip": b"\x1f\x8b", "bz2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}  # the first bytes of a compressed file
CHARACTERS = 2**20  # of an array that are read at a time
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "null")
LONGEST_CELL = 2**31 - 1  # characters of a CSV cell


def files_of(source: str, endings: tuple[str, ...]) -> list[Path]:
    """Return the files that a path stands for, sorted: a file, the files below a folder that have one of the endings,
    or what matches a glob. Raises UserError if there is none."""
    path = Path(source)
    # Not Path.glob, which refuses absolute patterns.
    named = [path] if path.exists() else map(Path, glob.glob(source, recursive=True))  # noqa: PTH207
    found = {file for each in named for file in (_below(each, endings) if each.is_dir() else [each])}
    if not found and path.is_dir():
        raise UserError(f"{path} holds no file named *{' or *'.join(endings)}")
    if not found:
        raise UserError(f"there is no file {path}")
    return sorted(found)


def _below(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """List the files below a folder. Unlike Path.rglob, this follows links to folders."""
    names = glob.glob(f"{glob.escape(str(folder))}/**", recursive=True)  # noqa: PTH207
    return [path for path in map(Path, names) if path.name.endswith(endings) and not path.is_dir()]


def compression(path: Path) -> str | None:
    """Return what a file is compressed with: gzip, bz2 or zstd; None if it is plain."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file of text, which may be compressed, to read bytes."""
    kind = compression(path)
    if kind == "gzip":
        with gzip.open(path) as file:
            yield cast(BinaryIO, file)
    elif kind == "bz2":
        with bz2.open(path) as file:
            yield cast(BinaryIO, file)
    elif kind == "zstd":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as file:
            yield file
    else:
        with path.open("rb") as file:
            yield file


def holds_lists(path: Path) -> bool:
    """Return whether a JSON file begins with a list: its rows are lists of texts, or it is an array of rows."""
    with opened(path) as file:
        return file.read(4096).decode("utf-8-sig", "replace").lstrip()[:1] == "["


def holds_array(path: Path) -> bool:
    """Return whether a JSON file is one array of rows; else it holds a row a line."""
    if not holds_lists(path):
        return False
    with opened(path) as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        row = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return True  # the array begins on this line and ends on another
    return not all(isinstance(text, str) for text in row)


def array_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a JSON array, one at a time. Raises UserError where it is not valid JSON."""
    decoder, between, number = json.JSONDecoder(), re.compile(r"[\s,]*"), 0
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape") as text:
        read = text.read(CHARACTERS)
        place = read.index("[") + 1
        while True:
            place = between.match(read, place).end()  # type: ignore[union-attr]  # it matches anything
            try:
                row, place = decoder.raw_decode(read, place)
            except (ValueError, RecursionError) as error:
                if read.startswith("]", place):
                    return
                more = "" if isinstance(error, RecursionError) else text.read(CHARACTERS)
                if not more:
                    what = "is an array that is cut off or not valid JSON"
                    raise UserError(f"{path}: {what} behind row {number}") from None
                read, place = read[place:] + more, 0
            else:
                number += 1
                yield row


def table_rows(path: Path, columns: list[str]) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a CSV or TSV file with a header. Every cell is a text, also `NA`, `null` and `1900`.

    A row that is shorter than the header lacks its last columns. Raises UserError for a missing column.
    """
    csv.field_size_limit(LONGEST_CELL)
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        tabs = ".tsv" in path.suffixes
        try:
            rows = csv.DictReader(text, delimiter="\t" if tabs else ",")
            require(columns, list(rows.fieldnames or []), path)
            yield from rows
        except csv.Error as error:
            raise UserError(f"{path}: is not a readable CSV file ({error})") from None


def require(wanted: list[str], present: list[str], path: str | Path) -> None:
    """Raise UserError if a column is missing, or if there are two of its name. `a.b` is the field b of column a."""
    for name in wanted:
        found = max(present.count(name), present.count(name.partition(".")[0]))
        if not found:
            raise UserError(f"{path}: there is no column {name!r}; it has: {', '.join(present)}")
        if found > 1:
            raise UserError(f"{path}: there are {found} columns {name!r}; rename all but one")


def field_of(row: dict[str, Any], name: str) -> Any:
    """Return the value of a column; with dots, that of a field of a field. None where it is missing."""
    if name in row:
        return row[name]
    head, dot, rest = name.partition(".")
    inner = row.get(head)
    return field_of(inner, rest) if dot and isinstance(inner, dict) else None


def text_column(table: Any, name: str, path: str | Path) -> Any:
    """Return a column of texts, or of lists of texts, of an Arrow table or record batch.

    Raises UserError for a column of another type, and names the fields of a `struct`.
    """
    import pyarrow
    from pyarrow import compute

    head, dot, rest = (name, "", "") if name in table.schema.names else name.partition(".")
    column = table.column(head)
    kind = column.type
    if dot and pyarrow.types.is_struct(kind):
        fields = rest.split(".")
        try:
            column = compute.struct_field(column, fields)
        except (pyarrow.ArrowException, KeyError):
            raise UserError(f"{path}: there is no field {rest!r} in {head!r}; it has: {_fields(kind)}") from None
        kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    inner = kind
    while pyarrow.types.is_list(inner) or pyarrow.types.is_large_list(inner):
        inner = inner.value_type
    if str(inner) not in TEXT_TYPES:
        struct = pyarrow.types.is_struct(inner)
        hint = f"; name one of its fields: {_fields(inner, f'{name}.')}" if struct else ""
        raise UserError(f"{path}: column {name!r} holds {inner}; expected texts{hint}")
    return column


def _fields(kind: Any, before: str = "") -> str:
    return ", ".join(f"{before}{kind.field(number).name}" for number in range(kind.num_fields))


def values_of(column: Any) -> list[Any]:
    """Convert an Arrow column to Python values; text that is not UTF-8 becomes bytes."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        is_list = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
        raw = pyarrow.large_binary()
        return column.cast(pyarrow.large_list(raw) if is_list else raw).to_pylist()
