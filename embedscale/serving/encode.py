"""Embed millions of texts with a finished run, in parts of 16,384 texts.

Texts are read twice: first to check and count them, then to embed them. Each part is a file, written whole and then
noted with its digest, so an interrupted call loses at most one part, and memory holds two parts whatever the number of
texts. A lease keeps a second process away.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedscale.data.rows import (
    array_rows,
    field_of,
    files_of,
    holds_array,
    opened,
    require,
    table_rows,
    text_column,
    values_of,
)
from embedscale.errors import DONE, INTERRUPTED, UserError, allowed
from embedscale.files import digest_file, remove_half_written, write_digested
from embedscale.progress import Bar
from embedscale.run.directory import LEASE, RunDirectory, finished
from embedscale.run.lease import leased
from embedscale.run.stop import StopRequest
from embedscale.texts import counted
from embedscale.values import Count, Value, sound

if TYPE_CHECKING:
    from embedscale.serving.embedder import Embedder

PART = 16384  # texts
FORMATS = ("npy", "arrow")
BLANK = ("zero", "drop")  # what a blank text becomes: a row of zeros, or no row
INDEX = "encoding.json"
PACKED = ("", ".gz", ".bz2", ".zst")  # endings of compressed files, behind that of their form


@dataclass(frozen=True)
class Encoding(Value):
    """What a folder of embeddings was made from: OUT/encoding.json."""

    run_id: str
    """Name of the run."""
    weights_digest: str
    """Digest of the run's trained weights."""
    precision: str
    """Number format of the matrix products: float32, tf32 or bf16."""
    texts: Count
    """Number of texts."""
    texts_digest: str
    """Digest of the texts, in order."""
    width: Count
    """Numbers in an embedding."""
    format: str
    """npy or arrow."""
    texts_a_part: Count
    """Texts in each file but the last."""
    parts: list[str] = field(default_factory=list)
    """Digests of the files that are finished, in order; missing in version 0.2."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a call must have in common with the one that it continues."""
        return replace(self, parts=[]).to_json()


def encode(
    run: str,
    source: str,
    out: str,
    column: str = "text",
    form: str = "npy",
    texts_a_part: int = PART,
    blank: str = "zero",
) -> int:
    """Write the embeddings of texts as OUT/00000.npy (float32 [texts, width]) or .arrow files, in order.

    `source` is a .txt file (one text per line), or a .jsonl, .json, .csv, .tsv or .parquet file with the texts in
    `column`; a folder or a glob of such files, which are read in the order of their names; or "-": standard input, one
    text per line. Files of text may be compressed. A blank text gets a row of zeros, or with `blank="drop"` no row. A
    second call continues where the first was stopped. Returns DONE, or INTERRUPTED after a signal. Raises UserError,
    before anything is written, for a text that is not UTF-8, a missing column, or a folder with other files.
    """
    allowed("--format", form, FORMATS)
    allowed("--blank", blank, BLANK)
    finished(RunDirectory(run))
    _refuse_other_files(Path(out))
    with _given(source) as files:
        return _encode(run, files, Path(out), column, form, texts_a_part, blank)


@contextmanager
def _given(source: str) -> Iterator[list[Path]]:
    """Yield the files of a source. Standard input becomes a temporary file, because texts are read twice."""
    if source != "-":
        try:
            files = files_of(source, tuple(f"{ending}{packed}" for ending in READERS for packed in PACKED))
        except UserError as error:
            raise UserError(f"TEXTS: {error}") from None
        yield files
        return
    with tempfile.NamedTemporaryFile(prefix="standard input ", suffix=".txt") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield [Path(file.name)]


def _encode(run: str, files: list[Path], folder: Path, column: str, form: str, texts_a_part: int, blank: str) -> int:
    number, digest, blanks = _survey(files, column, blank)
    what = str(files[0]) if len(files) == 1 else f"{len(files)} files"
    if not number:
        raise UserError(f"{what}: no text")
    if blanks:
        print(f"{what}: {counted(blanks, 'blank text')}; each gets {'a row of zeros' if blank == 'zero' else 'no row'}")
    from embedscale.model.hardware import keep_freed_memory  # with torch, after all that can be wrong without it
    from embedscale.serving.embedder import Embedder

    embedder = Embedder.load(run)
    encoding = Encoding(
        run_id=embedder.record.run_id,
        weights_digest=embedder.record.weights_digest,
        precision=embedder.config.training.precision,
        texts=number,
        texts_digest=digest,
        width=embedder.width,
        format=form,
        texts_a_part=texts_a_part,
    )
    _begun(folder, encoding)
    keep_freed_memory()
    stop = StopRequest()
    stop.on_signals()
    with leased(folder / LEASE, lambda: stop.request("another process has taken the folder over")):
        remove_half_written(folder)
        encoding = _begun(folder, encoding)
        encoding.write(folder / INDEX)
        return _encode_parts(embedder, _kept(files, column, blank), folder, encoding, stop)


def _encode_parts(
    embedder: "Embedder", texts: Iterator[str], folder: Path, encoding: Encoding, stop: StopRequest
) -> int:
    part = 0
    with Bar("encoding", total=encoding.texts) as bar:
        while some := list(islice(texts, encoding.texts_a_part)):
            path = folder / f"{part:05d}.{encoding.format}"
            known = encoding.parts[part] if part < len(encoding.parts) else None
            if known is not None and path.exists() and digest_file(path) == known:
                bar.advance(len(some))
            elif stop.requested:
                done = part * encoding.texts_a_part
                print(f"{folder}: interrupted ({stop.reason}) after {done:,} texts; run it again to continue")
                return INTERRUPTED
            else:
                if known is not None:
                    print(f"{path}: is missing or damaged; its texts are embedded again", file=sys.stderr)
                found = embedder.encode(some, bar.advance)
                digest = write_digested(path, partial(_write, embeddings=found, form=encoding.format))
                encoding = replace(encoding, parts=[*encoding.parts[:part], digest, *encoding.parts[part + 1 :]])
                encoding.write(folder / INDEX)
            part += 1
    made = f"{counted(encoding.texts, 'embedding')} of {encoding.width} numbers"
    print(f"{folder}: {made} in {counted(part, 'file')}")
    return DONE


def _write(file: Any, embeddings: np.ndarray, form: str) -> None:
    if form == "npy":
        np.save(file, embeddings)
        return
    import pyarrow

    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings.reshape(-1)), embeddings.shape[1])
    table = pyarrow.table({"embedding": vectors})
    with pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _begun(folder: Path, encoding: Encoding) -> Encoding:
    """Return what an earlier call with the same texts and model has done in a folder, or `encoding` in an empty one.

    Raises UserError for a folder with another encoding, or with other files.
    """
    before = sound(Encoding.read(folder / INDEX))
    if before is not None:
        for name, there in before.identity.items():
            now = encoding.identity[name]
            if now != there:
                raise UserError(f"{folder}: holds another encoding: {name} is {there} there, now {now}")
        return before
    _refuse_other_files(folder)
    return encoding


def _refuse_other_files(folder: Path) -> None:
    """Raise UserError for a folder with files that no encoding has written, or with a damaged encoding.json."""
    if sound(Encoding.read(folder / INDEX)) is not None:
        return
    # The lease and hidden files: a call was killed before it had written anything else.
    if folder.exists() and not (
        folder.is_dir() and all(path.name == LEASE or _hidden(path) for path in folder.iterdir())
    ):
        raise UserError(f"{folder}: holds other files; name an empty or a new folder")


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in (".partial", ".stale")


def _survey(files: list[Path], column: str, blank: str) -> tuple[int, str, int]:
    """Return the number of texts that get a row, a digest of them, and the number of blank texts."""
    sha, number, blanks = hashlib.sha256(), 0, 0
    for text in _texts(files, column):
        empty = not text.strip()
        blanks += empty
        if not empty or blank == "zero":
            number += 1
            sha.update(f"{len(text)} {text}".encode())
    return number, sha.hexdigest()[:16], blanks


def _kept(files: list[Path], column: str, blank: str) -> Iterator[str]:
    return (text for text in _texts(files, column) if blank == "zero" or text.strip())


def _texts(files: list[Path], column: str) -> Iterator[str]:
    return chain.from_iterable(texts_of(file, column) for file in files)


def texts_of(path: Path, column: str = "text") -> Iterator[str]:
    """Yield the texts of a file; a missing value is a blank text. Raises UserError for anything that is not a text."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    kind = next((ending for ending in path.suffixes[::-1] if ending in READERS), None)
    if kind is None:
        raise UserError(f"{path}: {path.suffix or 'no ending'} is not known; allowed: {', '.join(READERS)}")
    try:
        yield from READERS[kind](path, column)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({str(error) or type(error).__name__})") from None


def _lines(path: Path, column: str) -> Iterator[str]:
    for number, line in _numbered(path):
        yield _decoded(line, path, number).rstrip("\r\n")


def _json_texts(path: Path, column: str) -> Iterator[str]:
    if holds_array(path):
        rows: Iterator[tuple[int, Any]] = enumerate(array_rows(path), 1)
    else:
        rows = ((number, _row(line, path, number)) for number, line in _numbered(path) if line.strip())
    for number, row in rows:
        if not isinstance(row, dict) or (column.partition(".")[0] not in row and column not in row):
            raise UserError(f"{path}: line {number} is not a JSON object with a column {column!r}")
        yield _text(field_of(row, column), path, number, column)


def _table_texts(path: Path, column: str) -> Iterator[str]:
    for number, row in enumerate(table_rows(path, [column]), 2):
        yield _text(row[column], path, number, column)


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    with opened(path) as file:
        yield from enumerate(file, 1)


def _row(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(_decoded(line, path, number))
    except (ValueError, RecursionError):
        return None


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        # Editors on Windows begin a file with a byte-order mark.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeError:
        raise UserError(f"{path}: line {number} is not UTF-8") from None


def _text(value: Any, path: Path, number: int, column: str) -> str:
    if not isinstance(value, str | None):
        raise UserError(f"{path}: line {number}: {column!r} is {type(value).__name__}; expected a text")
    try:
        (value or "").encode()  # fails for a lone surrogate, which JSON can contain
    except UnicodeError:
        raise UserError(f"{path}: line {number} is not UTF-8") from None
    return value or ""


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException):
        raise UserError(f"{path}: not a readable Parquet file") from None
    require([column], file.schema_arrow.names, path)
    number = 0
    try:
        for batch in file.iter_batches(1024, columns=[column]):
            texts = text_column(batch, column, path)
            if pyarrow.types.is_list(texts.type) or pyarrow.types.is_large_list(texts.type):
                raise UserError(f"{path}: column {column!r} holds {texts.type}; expected texts")
            for text in values_of(texts):
                number += 1
                if isinstance(text, bytes):
                    text = text.decode()
                yield text or ""
    except UnicodeDecodeError:
        raise UserError(f"{path}: text {number} is not UTF-8") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _lines,
    ".jsonl": _json_texts,
    ".json": _json_texts,
    ".csv": _table_texts,
    ".tsv": _table_texts,
    ".parquet": _parquet_texts,
}
