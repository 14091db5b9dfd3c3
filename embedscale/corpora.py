"""Where text pairs come from: JSON lines, Parquet, Hugging Face datasets, and the Python installed on any machine.

A source is cut into units that can be read apart: byte ranges of JSON lines, row groups of Parquet, index ranges of a
dataset, groups of Python files. Each worker reads its own units, and an interrupted `prepare` repeats only some.
"""

import ast
import glob
import gzip
import json
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedscale.config import Source
from embedscale.errors import UserError

UNIT_BYTES = 16 * 2**20
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


def units_of(number: int, source: Source) -> list[Unit]:
    """All units of a source, in a fixed order. Raises UserError where there is nothing to read."""
    if source.kind == "installed-python":
        files = installed_files()
        starts = range(0, len(files), PYTHON_FILES)
        # Docstring and code are a small part of what is read.
        return [Unit(number, "", first, min(first + PYTHON_FILES, len(files)), 2**20) for first in starts]
    if source.kind == "dataset":
        rows = _dataset(source)
        size = max(1, rows.data.nbytes // max(1, len(rows)))
        step = max(1, UNIT_BYTES // size)
        return [
            Unit(number, source.path, first, min(first + step, len(rows)), size * step)
            for first in range(0, len(rows), step)
        ]
    units = []
    for path in _files(source):
        size = path.stat().st_size
        if source.kind == "parquet":
            units += [Unit(number, str(path), group, group + 1, size) for group in range(_parquet(path).num_row_groups)]
        elif path.suffix == ".gz":
            units.append(Unit(number, str(path), 0, 0, 4 * size))
        else:
            units += [
                Unit(number, str(path), first, min(first + UNIT_BYTES, size), min(UNIT_BYTES, size - first))
                for first in range(0, size, UNIT_BYTES)
            ]
    return units


def read(unit: Unit, source: Source, counts: Counter[str]) -> Iterator[Pair]:
    """The pairs of a unit; `counts` learns of rows that are no pair, by reason.

    Raises UserError for a missing column.
    """
    if source.kind == "installed-python":
        for path in installed_files()[unit.start : unit.stop]:
            yield from _functions(path, counts)
        return
    for row in _rows(unit, source, counts):
        pair = _pair(row, source, unit.path, counts)
        if pair is not None:
            yield pair


def _files(source: Source) -> list[Path]:
    path = Path(source.path)
    endings = {"jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz"), "parquet": (".parquet",)}[source.kind]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(endings))
        if not found:
            raise UserError(f"data.sources.path: {source.path} holds no file named *{' or *'.join(endings)}")
        return found
    found = sorted(Path(name) for name in glob.glob(source.path, recursive=True))  # noqa: PTH207, absolute globs too
    if not found:
        raise UserError(f"data.sources.path: there is no file {source.path}")
    return found


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid:
        raise UserError(f"{path}: is no Parquet file") from None


def _dataset(source: Source) -> Any:
    """A memory-mapped dataset: a folder written by `save_to_disk`, a folder of data files, or a hub name."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(source.path)
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(source.path)
            if isinstance(loaded, datasets.DatasetDict):
                if source.split not in loaded:
                    raise UserError(f"data.sources.split: {source.split!r} is not in {source.path}; it has {[*loaded]}")
                loaded = loaded[source.split]
            return loaded
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.sources.path: the dataset {source.path!r} cannot be loaded ({reason})") from None


def _rows(unit: Unit, source: Source, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    if source.kind == "jsonl":
        for line in _lines(unit):
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError:
                counts["read"] += 1
                counts["not_utf8"] += 1
                continue
            except ValueError:
                counts["read"] += 1
                counts["malformed"] += 1
                continue
            if isinstance(row, dict):
                yield row
            else:
                counts["read"] += 1
                counts["malformed"] += 1
        return
    columns = [name for name in (source.query, source.positive, source.negative) if name]
    if source.kind == "parquet":
        file = _parquet(Path(unit.path))
        _refuse_missing(columns, file.schema_arrow.names, unit.path)
        batches = file.iter_batches(4096, row_groups=[unit.start], columns=columns)
        tables = ({name: batch.column(name) for name in columns} for batch in batches)
    else:
        rows = _dataset(source)
        _refuse_missing(columns, rows.column_names, unit.path)
        chosen = rows.with_format("arrow")
        slices = (chosen[i : min(i + 4096, unit.stop)] for i in range(unit.start, unit.stop, 4096))
        tables = ({name: part.column(name) for name in columns} for part in slices)
    for table in tables:
        values = {name: _values(column) for name, column in table.items()}
        for index in range(len(values[columns[0]])):
            yield {name: column[index] for name, column in values.items()}


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
        kind = column.type
        return column.cast(pyarrow.list_(pyarrow.binary()) if pyarrow.types.is_list(kind) else "binary").to_pylist()


def _refuse_missing(wanted: list[str], present: list[str], path: str) -> None:
    for name in wanted:
        if name not in present:
            raise UserError(f"{path}: there is no column {name!r}; it has: {', '.join(present)}")


def _pair(row: dict[str, Any], source: Source, path: str, counts: Counter[str]) -> Pair | None:
    _refuse_missing([source.query, source.positive], list(row), path)
    counts["read"] += 1
    query, positive = _texts(row[source.query]), _texts(row[source.positive])
    negatives = _texts(row.get(source.negative)) if source.negative else []
    if not query or not positive:
        counts["empty"] += 1
        return None
    texts = [query[0], positive[0], *negatives]
    try:
        decoded = [text.decode() if isinstance(text, bytes) else text for text in texts]
        for text in decoded:
            text.encode()  # a lone surrogate, which JSON can spell, is no text either
    except (UnicodeDecodeError, UnicodeEncodeError):
        counts["not_utf8"] += 1
        return None
    return Pair(decoded[0], decoded[1], tuple(text for text in decoded[2:] if text.strip()))


def _texts(value: Any) -> list[Any]:
    if value is None:
        return []
    return [item for item in value if item is not None] if isinstance(value, list) else [value]


_installed: list[Path] = []


def installed_files() -> list[Path]:
    """Python source of the standard library and the installed packages, in the order of their names."""
    if not _installed:
        for name in ("stdlib", "purelib"):
            root = Path(sysconfig.get_path(name))
            inside = (p.relative_to(root) for p in root.rglob("*.py"))
            found = [p for p in inside if name == "purelib" or "site-packages" not in p.parts]
            _installed.extend(root / p for p in sorted(found, key=str))
    return _installed


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
        counts["not_utf8"] += 1
        return
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        counts["malformed"] += 1
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
