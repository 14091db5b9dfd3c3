"""Millions of texts through a finished run: streamed in parts, each written whole, so that a stop loses one part."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedscale.errors import DONE, INTERRUPTED, UserError
from embedscale.files import read_json, write_atomically, write_json
from embedscale.model.hardware import keep_freed_memory
from embedscale.run.stop import StopRequest
from embedscale.serving.embedder import Embedder

PART = 16384  # texts; two parts' texts and vectors are what memory holds
FORMATS = ("npy", "arrow")


def encode(run: str, source: str, out: str, column: str = "text", form: str = "npy") -> int:
    """Write the embeddings of a file's texts as OUT/00000.npy (float32 [texts, width]) or .arrow files, in order.

    `source` is a .txt file (a text a line), .jsonl or .parquet (the texts in `column`). Run again, it goes on where
    it was stopped. Raises UserError, before anything is written, for a text that is empty or no UTF-8, a missing
    column, and a folder that holds something else.
    """
    if form not in FORMATS:
        raise UserError(f"--format: {form!r} is unknown; allowed: {', '.join(FORMATS)}")
    path, folder = Path(source), Path(out)
    number, digest = _survey(path, column)
    embedder = Embedder.of_run(run)
    facts = {
        "run_id": embedder.record.run_id,
        "weights_digest": embedder.record.weights_digest,
        "precision": embedder.config.training.precision,
        "texts": number,
        "texts_digest": digest,
        "width": embedder.width,
        "format": form,
        "texts_a_part": PART,
    }
    _claim(folder, facts)
    keep_freed_memory()
    stop = StopRequest()
    stop.on_signals()
    return _encode_parts(embedder, _texts(path, column), folder, facts, stop)


def _encode_parts(
    embedder: Embedder, texts: Iterator[str], folder: Path, facts: dict[str, Any], stop: StopRequest
) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding", total=facts["texts"])
        part = 0
        while some := list(islice(texts, PART)):
            path = folder / f"{part:05d}.{facts['format']}"
            if path.exists():
                progress.advance(task, len(some))
            elif stop.requested:
                print(f"{folder}: interrupted ({stop.reason}) after {part * PART:,} texts; run it again to go on")
                return INTERRUPTED
            else:
                found = embedder.encode(some, lambda n: progress.advance(task, n))
                write_atomically(path, lambda file, found=found: _write(file, found, facts["format"]))  # type: ignore[misc]
            part += 1
    print(f"{folder}: {facts['texts']:,} embeddings of {facts['width']} numbers in {part} files")
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


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Make the folder, or find the one that an earlier call with the same texts and model began."""
    mark = folder / "encoding.json"
    before = read_json(mark)
    if before is not None:
        for name, value in facts.items():
            if before.get(name) != value:
                raise UserError(f"{folder}: holds another encoding: {name} is {before.get(name)} there, now {value}")
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: holds other files; name an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, facts)


def _survey(path: Path, column: str) -> tuple[int, str]:
    """How many texts, and a digest of them. Raises UserError for one that is empty."""
    sha, number = hashlib.sha256(), 0
    for number, text in enumerate(_texts(path, column), 1):
        if not text.strip():
            raise UserError(f"{path}: text {number} is empty; every text needs at least one character")
        sha.update(f"{len(text)} {text}".encode())
    if not number:
        raise UserError(f"{path}: holds no text")
    return number, sha.hexdigest()[:16]


def _texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a file, one after the other. Raises UserError for what is no text."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".parquet":
        yield from _parquet_texts(path, column)
        return
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: {path.suffix or 'no ending'} is not known; allowed: .txt, .jsonl, .parquet")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                # An editor of Windows begins a file with a mark of its bytes' order.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if path.suffix == ".jsonl":
                    text = json.loads(text)[column]
                    str(text).encode()  # JSON can spell half of a character
            except UnicodeError:
                raise UserError(f"{path}: line {number} is not UTF-8") from None
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path}: line {number} is no JSON object with a column {column!r}") from None
            if not isinstance(text, str):
                raise UserError(f"{path}: line {number}: {column!r} is {type(text).__name__}; expected a text")
            yield text


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException):
        raise UserError(f"{path}: is no Parquet file that can be read") from None
    names = file.schema_arrow.names
    if column not in names:
        raise UserError(f"{path}: there is no column {column!r}; it has: {', '.join(names)}")
    kind = file.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}; expected texts")
    number = 0
    try:
        for batch in file.iter_batches(1024, columns=[column]):
            for text in batch.column(0):
                number += 1
                yield text.as_py() or ""
    except UnicodeDecodeError:
        raise UserError(f"{path}: text {number} is not UTF-8") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
