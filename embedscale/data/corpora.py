"""Where text pairs come from: JSON lines, Parquet, Hugging Face datasets, and the Python installed on any machine.

A source is cut into units that can be read apart: byte ranges of JSON lines, row groups of Parquet, shards of a
dataset, groups of Python files. Each worker reads its own units, and an interrupted `prepare` repeats only some.
A row that is no pair is counted by reason, never an error; what cannot be read at all is a `UserError`.
"""

import ast
import glob
import gzip
import json
import math
import sysconfig
import textwrap
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.run.config import Source

UNIT_BYTES = 8 * 2**20
MOST_UNITS = 2048  # of what of a source can be cut anywhere: a larger corpus has larger units
SHARD_BYTES = 256 * 2**20  # of a dataset that does not say how large it is
READ_ROWS = 1024  # at a time, of a table
PYTHON_FILES = 200  # a unit


@dataclass(frozen=True)
class Pair:
    query: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """A part of a source. What `start` and `stop` count depends on the source's kind."""

    source: int  # its number in data.sources
    path: str
    start: int
    stop: int
    size: int  # bytes, about


class Unreadable(UserError):
    """A file or a dataset that may be whole, or within reach, when it is read again."""


def units_of(number: int, source: Source) -> list[Unit]:
    """All units of a source, in a fixed order. Raises UserError where there is nothing to read."""
    if source.kind == "installed-python":
        files = len(installed_files())
        # Docstring and code are a small part of what is read.
        return [
            Unit(number, "", first, min(first + PYTHON_FILES, files), 2**20) for first in range(0, files, PYTHON_FILES)
        ]
    if source.kind == "dataset":
        rows, size = _dataset(source)
        shards = rows.num_shards
        return [Unit(number, source.path, shard, shard + 1, size // shards) for shard in range(shards)]
    files_of_source = [(path, path.stat().st_size) for path in _files(source)]
    step = _unit_bytes(sum(size for _, size in files_of_source))
    units = []
    for path, size in files_of_source:
        if source.kind == "parquet":
            groups = _parquet(path).num_row_groups
            each = math.ceil(groups * step / size)  # some writers make a group of every thousand rows
            units += [
                Unit(number, str(path), first, min(first + each, groups), size * min(each, groups - first) // groups)
                for first in range(0, groups, each)
            ]
        elif path.suffix == ".gz":
            units.append(Unit(number, str(path), 0, 0, 4 * size))
        else:
            units += [
                Unit(number, str(path), first, min(first + step, size), min(step, size - first))
                for first in range(0, size, step)
            ]
    return units


def _unit_bytes(corpus: int) -> int:
    return max(UNIT_BYTES, math.ceil(corpus / MOST_UNITS))


def read(unit: Unit, source: Source, counts: Counter[str]) -> Iterator[Pair]:
    """The pairs of a unit; `counts` learns how many rows were read, and of those that are no pair, by reason.

    Raises UserError for a missing column and Unreadable for a file that is cut off, forbidden or of another format.
    """
    import pyarrow

    if source.kind == "installed-python":
        for path in installed_files()[unit.start : unit.stop]:
            yield from _functions(path, counts)
        return
    broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, pyarrow.ArrowException)
    if source.kind == "dataset":  # a class for each reader, and for each failure of a network
        broken = (Exception,)
    try:
        for row in _rows(unit, source, counts):
            pair = _pair(row, source, counts)
            if pair is not None:
                yield pair
    except UserError:
        raise
    except broken as error:
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise Unreadable(f"{unit.path}: cannot be read ({reason})") from None


def _files(source: Source) -> list[Path]:
    path = Path(source.path)
    endings = {"jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}[source.kind]
    named = [path] if path.exists() else map(Path, glob.glob(source.path, recursive=True))  # noqa: PTH207, absolute too
    found = {file for each in named for file in (_below(each, endings) if each.is_dir() else [each])}
    if not found:
        holds = f"{path} holds no file named *{' or *'.join(endings)}"
        raise UserError(f"data.sources.path: {holds if path.is_dir() else f'there is no file {path}'}")
    return sorted(found)


def _below(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Unlike Path.rglob, this looks into folders that are links."""
    names = glob.glob(f"{glob.escape(str(folder))}/**", recursive=True)  # noqa: PTH207
    return [path for path in map(Path, names) if path.name.endswith(endings) and not path.is_dir()]


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException):
        raise Unreadable(f"{path}: is no Parquet file that can be read") from None


@cache
def _dataset(source: Source) -> tuple[Any, int]:
    """A streamed dataset and its bytes, about: a folder by `save_to_disk`, a folder of data files, or a hub name.

    Streaming neither copies the corpus into a cache nor waits for all of it; its shards are what workers share.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(source.path)
    try:
        if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            loaded = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
            return loaded, loaded.info.dataset_size or SHARD_BYTES * loaded.num_shards
        loaded = datasets.load_from_disk(source.path)
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                raise UserError(
                    f"data.sources.split: {source.split!r} is not in {source.path}; allowed: {', '.join(loaded)}"
                )
            loaded = loaded[source.split]
        size = loaded.data.nbytes
        return loaded.to_iterable_dataset(num_shards=max(1, min(size // _unit_bytes(size), len(loaded)))), size
    except UserError:
        raise
    except Exception as error:  # as above; IndexError where there is no row
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise Unreadable(f"data.sources.path: the dataset {source.path!r} cannot be loaded ({reason})") from None


def _rows(unit: Unit, source: Source, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    columns = [name for name in (source.query, source.positive, source.negative) if name]
    if source.kind == "jsonl":
        yield from _json_rows(unit, columns, counts)
        return
    tables: Iterable[Any]
    if source.kind == "parquet":
        file = _parquet(Path(unit.path))
        _refuse_missing(columns, file.schema_arrow.names, unit.path)
        tables = file.iter_batches(READ_ROWS, row_groups=range(unit.start, unit.stop), columns=columns)
    else:
        rows, _ = _dataset(source)
        shard = rows.shard(num_shards=rows.num_shards, index=unit.start)
        tables = shard.with_format("arrow").iter(batch_size=READ_ROWS)
    for table in tables:
        _refuse_missing(columns, table.schema.names, unit.path)
        values = [_values(table.column(name)) for name in columns]
        for row in zip(*values, strict=True):
            counts["read"] += 1
            yield dict(zip(columns, row, strict=True))


def _json_rows(unit: Unit, columns: list[str], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    first = unit.start == 0
    for line in _lines(unit):
        counts["read"] += 1
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            counts["not_utf8"] += 1
        except (ValueError, RecursionError):
            counts["malformed"] += 1
        else:
            if not isinstance(row, dict):
                counts["malformed"] += 1
                continue
            if first:  # the file's first row stands for its columns; a later row without one is an empty pair
                _refuse_missing(columns, list(row), unit.path)
                first = False
            yield row


def _lines(unit: Unit) -> Iterator[bytes]:
    """The lines that begin inside the unit's byte range."""
    if unit.path.endswith(".gz"):
        with gzip.open(unit.path) as compressed:
            yield from (line for line in compressed if line.strip())
        return
    with Path(unit.path).open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # the rest of a line that the unit before reads whole
        while file.tell() < unit.stop:
            line = file.readline()
            if line.strip():
                yield line


def _values(column: Any) -> list[Any]:
    """Python values of an Arrow column; text that is no UTF-8 stays bytes."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        is_list = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
        raw = pyarrow.large_binary()
        return column.cast(pyarrow.large_list(raw) if is_list else raw).to_pylist()


def _refuse_missing(wanted: list[str], present: list[str], path: str) -> None:
    for name in wanted:
        if name not in present:
            raise UserError(f"{path}: there is no column {name!r}; it has: {', '.join(present)}")


def _pair(row: dict[str, Any], source: Source, counts: Counter[str]) -> Pair | None:
    query, positive = _texts(row.get(source.query)), _texts(row.get(source.positive))
    negatives = _texts(row.get(source.negative)) if source.negative else []
    if not query or not positive:
        counts["empty"] += 1
        return None
    texts = [query[0], positive[0], *negatives]
    if len(query) > 1 or not all(isinstance(text, str | bytes) for text in texts):
        counts["malformed"] += 1
        return None
    try:
        decoded = [text.decode() if isinstance(text, bytes) else text for text in texts]
        for text in decoded:
            text.encode()  # a lone surrogate, which JSON can spell, is no text either
    except (UnicodeDecodeError, UnicodeEncodeError):
        counts["not_utf8"] += 1
        return None
    return Pair(decoded[0], decoded[1], tuple(decoded[2:]))


def _texts(value: Any) -> list[Any]:
    if value is None:
        return []
    return [item for item in value if item is not None] if isinstance(value, list) else [value]


@cache
def installed_files() -> list[Path]:
    """Python source of the standard library and the installed packages, in the order of their names.

    Without tests: a third of what lies there, and next to no documented function.
    """
    files = []
    for folder in ("stdlib", "purelib", "platlib"):
        root = Path(sysconfig.get_path(folder))
        inside = (path.relative_to(root) for path in root.rglob("*.py"))
        apart = {"tests", "test"} | ({"site-packages"} if folder == "stdlib" else set())
        found = [path for path in inside if not apart & set(path.parts)]
        files += [root / path for path in sorted(found, key=str)]
    return list(dict.fromkeys(files))


def _functions(path: Path, counts: Counter[str]) -> Iterator[Pair]:
    """(first paragraph of the docstring, the function without it), for each documented function of a file."""
    try:
        text = path.read_text("utf-8")
        if '"""' not in text and "'''" not in text:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except UnicodeDecodeError:
        counts.update(read=1, not_utf8=1)
        return
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        counts.update(read=1, malformed=1)
        return
    lines = text.split("\n")
    for node in _statements(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        counts["read"] += 1
        first = node.body[0]
        code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno or 0 : node.end_lineno]
        yield Pair(" ".join(docstring.split("\n\n")[0].split()), textwrap.dedent("\n".join(code)).strip())


def _statements(node: Any) -> Iterator[Any]:
    """Every statement below a node, in the order of the text. `ast.walk` would visit every expression as well."""
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield child
            yield from _statements(child)
