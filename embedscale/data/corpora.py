"""Where text pairs come from: JSON lines, CSV, Parquet, Hugging Face datasets, and the installed Python packages.

A source is divided into units that can be read independently: byte ranges of JSON lines, row groups of Parquet, shards
of a dataset, groups of Python files. Each worker reads its own units, and an interrupted `prepare` repeats only the
units that were not finished. A row that is not a pair is counted by reason and skipped; a source that cannot be read is
a `UserError`. The price: a compressed file and a CSV file are one unit, because they cannot be read from the middle.
"""

import json
import math
import textwrap
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from embedscale.data.installed_python import documented_functions, installed_files
from embedscale.data.pair import Pair
from embedscale.data.rows import (
    array_rows,
    compression,
    field_of,
    files_of,
    holds_array,
    holds_lists,
    opened,
    require,
    table_rows,
    text_column,
    values_of,
)
from embedscale.errors import UserError
from embedscale.run.config import Source

SHARD_BYTES = 256 * 2**20  # assumed size of a shard, if a dataset does not tell its size
READ_ROWS = 1024  # rows of a table read at a time
PYTHON_FILES = 200  # files in a unit of installed Python
ENDINGS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.zst"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.bz2", ".tsv.bz2", ".csv.zst", ".tsv.zst"),
    "parquet": (".parquet",),
}
PYTHON_UNIT_BYTES = 2**20  # text of such a unit: docstrings and code are a small part of the files


@dataclass(frozen=True)
class UnitSize:
    """How large the units of a source are. This changes memory and speed, not the store."""

    least_bytes: int = 8 * 2**20
    most_units: int = 2048  # in one source; a larger source gets larger units

    def bytes_of(self, corpus: int) -> int:
        """Return the bytes of a unit, for a corpus of this many bytes."""
        return max(self.least_bytes, math.ceil(corpus / self.most_units))


UNIT_SIZE = UnitSize()


@dataclass(frozen=True)
class Unit:
    """A part of a source. `start` and `stop` count bytes, row groups, shards or files, by the source's kind."""

    source: int  # index in data.sources
    path: str
    start: int
    stop: int
    size: int  # bytes of text, estimated


class Unreadable(UserError):
    """A file or dataset that could not be read now, but may be readable at the next call, such as on a file server."""


def units_of(number: int, source: Source, size: UnitSize = UNIT_SIZE) -> list[Unit]:
    """Divide a source into units, in a fixed order. `number` is its index in data.sources.

    Raises UserError if there is nothing to read.
    """
    if source.kind == "installed-python":
        files = len(installed_files())
        starts = range(0, files, PYTHON_FILES)
        return [Unit(number, "", first, min(first + PYTHON_FILES, files), PYTHON_UNIT_BYTES) for first in starts]
    if source.kind == "dataset":
        rows, total = _dataset(source, size)
        shards = rows.num_shards
        return [Unit(number, source.path, shard, shard + 1, total // shards) for shard in range(shards)]
    if source.kind == "jsonl" and source.path.endswith(ENDINGS["csv"]):
        raise UserError(f"data.sources.kind: jsonl, but {source.path} has the ending of a CSV file; use kind csv")
    files_of_source = [(path, path.stat().st_size) for path in _files(source)]
    step = size.bytes_of(sum(bytes_of_file for _, bytes_of_file in files_of_source))
    units = []
    for path, length in files_of_source:
        if source.kind == "parquet":
            groups = _parquet(path).num_row_groups
            each = math.ceil(groups * step / length) or 1  # some writers make a group of every thousand rows, or none
            units += [
                Unit(number, str(path), first, min(first + each, groups), length * min(each, groups - first) // groups)
                for first in range(0, groups, each)
            ]
        elif (packed := compression(path)) or source.kind == "csv" or holds_array(path):
            units.append(Unit(number, str(path), 0, 0, 4 * length if packed else length))
        else:
            units += [
                Unit(number, str(path), first, min(first + step, length), min(step, length - first))
                for first in range(0, length, step)
            ]
    return units


def read(unit: Unit, source: Source, counts: Counter[str], size: UnitSize = UNIT_SIZE) -> Iterator[Pair]:
    """Yield the pairs of a unit. `size` must be the value that `units_of` was called with.

    `counts` is updated: "read" for each row, and "empty", "malformed" or "not_utf8" for each row that is not a pair.
    Raises UserError for a missing column, and Unreadable for a file that is truncated, forbidden or of another format.
    """
    import pyarrow

    if source.kind == "installed-python":
        for path in installed_files()[unit.start : unit.stop]:
            yield from documented_functions(path, counts)
        return
    broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, pyarrow.ArrowException)
    if source.kind == "dataset":  # each reader of `datasets`, and each network failure, has a class of its own
        broken = (Exception,)
    try:
        for row in _rows(unit, source, counts, size):
            pair = _pair(row, source, counts)
            if pair is not None:
                yield pair
    except UserError:
        raise
    except broken as error:
        raise Unreadable(f"{unit.path}: cannot be read ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return textwrap.shorten(str(error), 300) or type(error).__name__


def _files(source: Source) -> list[Path]:
    try:
        return files_of(source.path, ENDINGS[source.kind])
    except UserError as error:
        raise UserError(f"data.sources.path: {error}") from None


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException):
        raise Unreadable(f"{path}: not a readable Parquet file") from None


@cache
def _dataset(source: Source, size: UnitSize) -> tuple[Any, int]:
    """Open a dataset for streaming. Returns it and its estimated bytes.

    The path is a folder by `save_to_disk`, a folder of data files, or a hub name. Streaming starts at once and copies
    nothing into a cache; the workers divide the shards among themselves.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(source.path)
    try:
        if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            words = {"split": source.split, "streaming": True}
            loaded = datasets.load_dataset(source.path, source.subset, **words)
            if loaded.info.builder_name == "csv":  # or `NA` and `null` would be taken for missing texts
                loaded = datasets.load_dataset(source.path, source.subset, keep_default_na=False, **words)
            return loaded, loaded.info.dataset_size or SHARD_BYTES * loaded.num_shards
        loaded = datasets.load_from_disk(source.path)
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                raise UserError(
                    f"data.sources.split: {source.split!r} is not in {source.path}; allowed: {', '.join(loaded)}"
                )
            loaded = loaded[source.split]
        total = loaded.data.nbytes
        shards = max(1, min(total // size.bytes_of(total), len(loaded)))
        return loaded.to_iterable_dataset(num_shards=shards), total
    except UserError:
        raise
    except Exception as error:  # many classes, as in `read`; IndexError if there is no row
        reason = _reason(error)
        raise Unreadable(f"data.sources.path: the dataset {source.path!r} cannot be loaded ({reason})") from None


def check_files(units: list[Unit], source: Source, size: UnitSize) -> tuple[int, int]:
    """Look at the first row of each file of a source. Return the number of files, and of those without a row.

    Raises UserError for a file without one of the columns.
    """
    if source.kind not in ENDINGS:
        return 0, 0
    full = set()
    for unit in units:
        if unit.start == 0:
            rows = _rows(unit, source, Counter(), size)
            if next(rows, None) is not None:
                full.add(unit.path)
            rows.close()
    files = len(_files(source))
    return files, files - len(full)


def _rows(unit: Unit, source: Source, counts: Counter[str], size: UnitSize) -> Generator[dict[str, Any], None, None]:
    columns = [name for name in (source.query, source.positive, source.negative) if name]
    path = Path(unit.path)
    if source.kind == "jsonl":
        yield from _json_rows(unit, source, columns, counts)
        return
    if source.kind == "csv":
        for line in table_rows(path, columns):
            counts["read"] += 1
            yield {name: line.get(name) for name in columns}
        return
    tables: Iterable[Any]
    if source.kind == "parquet":
        file = _parquet(path)
        require(columns, file.schema_arrow.names, path)
        tables = file.iter_batches(READ_ROWS, row_groups=range(unit.start, unit.stop), columns=columns)
    else:
        rows, _ = _dataset(source, size)
        shard = rows.shard(num_shards=rows.num_shards, index=unit.start)
        tables = shard.with_format("arrow").iter(batch_size=READ_ROWS)
    for table in tables:
        require(columns, table.schema.names, path)
        values = [values_of(text_column(table, name, path)) for name in columns]
        for row in zip(*values, strict=True):
            counts["read"] += 1
            yield dict(zip(columns, row, strict=True))


def _json_rows(unit: Unit, source: Source, columns: list[str], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    first, lists = unit.start == 0, holds_lists(Path(unit.path))
    for row in _json_values(unit, counts):
        if lists and isinstance(row, list) and len(row) >= 2:
            query, positive, *negatives = row
            row = {source.query: query, source.positive: positive}
            if source.negative:
                row[source.negative] = negatives
        if not isinstance(row, dict):
            counts["malformed"] += 1
            continue
        if first:  # only the first row of a file must have all columns; later rows without one count as empty
            require(columns, list(row), unit.path)
            first = False
        yield {name: field_of(row, name) for name in columns}


def _json_values(unit: Unit, counts: Counter[str]) -> Iterator[Any]:
    """Yield the value of each row, and count the rows that are not JSON."""
    if not unit.stop and holds_array(Path(unit.path)):
        for row in array_rows(Path(unit.path)):
            counts["read"] += 1
            yield row
        return
    for line in _lines(unit):
        counts["read"] += 1
        try:
            yield json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            counts["not_utf8"] += 1
        except (ValueError, RecursionError):
            counts["malformed"] += 1


def _lines(unit: Unit) -> Iterator[bytes]:
    """Yield the non-empty lines that begin inside the unit's byte range."""
    if not unit.stop:
        with opened(Path(unit.path)) as whole:
            yield from (line for line in whole if line.strip())
        return
    with Path(unit.path).open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # the end of a line that belongs to the previous unit
        while file.tell() < unit.stop:
            line = file.readline()
            if line.strip():
                yield line


def _pair(row: dict[str, Any], source: Source, counts: Counter[str]) -> Pair | None:
    query, positive = _texts(row.get(source.query)), _texts(row.get(source.positive))
    negatives = _texts(row.get(source.negative)) if source.negative else []
    if not query or not positive:
        counts["empty"] += 1
        return None
    if source.least_negatives is not None and len(negatives) < source.least_negatives:
        counts["few_negatives"] += 1
        return None
    texts = [query[0], positive[0], *negatives]
    if len(query) > 1 or not all(isinstance(text, str | bytes) for text in texts):
        counts["malformed"] += 1
        return None
    try:
        decoded = [text.decode() if isinstance(text, bytes) else text for text in texts]
        for text in decoded:
            text.encode()  # fails for a lone surrogate, which JSON can contain
    except (UnicodeDecodeError, UnicodeEncodeError):
        counts["not_utf8"] += 1
        return None
    return Pair(decoded[0], decoded[1], tuple(decoded[2:]))


def _texts(value: Any) -> list[Any]:
    if value is None:
        return []
    return [item for item in value if item is not None] if isinstance(value, list) else [value]
