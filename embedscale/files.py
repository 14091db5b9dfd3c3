"""Write files whole or not at all, notice files that were damaged since, and read and write JSON.

Each file is written beside its target, synchronised with the disk and renamed. A crash at any moment leaves the old
file or the new one. The price is a wait for the disk with each file. Large files are digested by XXH3 while they are
written: it runs at the speed of the memory, and finds damage, but no forgery.
"""

import io
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_64

from embedscale.errors import UserError

BLOCK = 2**20  # bytes of a file that are read and digested at a time
SEAL = re.compile(rb"\nXXH3-64 ([0-9a-f]{16})\n")
SEAL_BYTES = 26  # of what SEAL matches


def check_folder(folder: str | Path, name: str) -> None:
    """Raise UserError unless files can be written into a folder, which need not exist yet: before the work, not after.

    `name` is that of the option or setting that gives the folder.
    """
    folder = Path(folder)
    there = next((each for each in (folder, *folder.parents) if each.exists()), Path())
    if not there.is_dir():
        raise UserError(f"{name}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{name}: nothing can be written into {there}; give another folder")


def beside(path: Path) -> Path:
    """Return a new name in the folder of `path`, for what is to be renamed to `path` once it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def half_written(folder: Path) -> Iterator[Path]:
    """Yield what killed processes left half-written in a folder and below it, and what is being written now."""
    yield from folder.rglob(".*.partial")


def remove_half_written(folder: Path) -> None:
    """Remove the half-written files of a folder and below it. Only for the one process that may write there."""
    for path in half_written(folder):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what `write` writes; a reader sees the old content or the new, never a part.

    Raise the system's OSError with the name of the target, for example for a full disk.
    """
    # In the same folder, because a rename to another file system would copy.
    temporary = beside(path)
    try:
        _write_to_disk(temporary, write)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # a failed unlink follows a failed write; keep the first error
            temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_to_disk(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        try:
            write(file)
        except Exception:
            # torch, NumPy and safetensors raise errors of their own for a full disk. Writing once more raises OSError.
            file.write(bytes(2**20))
            file.flush()
            raise
    # safetensors replaces the file by one of its own, which only its owner may read.
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
            path.chmod(mode)
        os.fsync(file.fileno())


class _Digested(io.BufferedIOBase):
    """A file that is digested as it is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, xxh3_64()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _digested(file: BinaryIO, write: Callable[[BinaryIO], object]) -> str:
    """Let `write` write into a file, and return the digest of what it wrote."""
    wrapped = _Digested(file)
    write(wrapped)  # type: ignore[arg-type]  # it has what writers call
    return str(wrapped.digest.hexdigest())


def write_digested(path: Path, write: Callable[[BinaryIO], object]) -> str:
    """Write a file as `write_atomically` does, and return the digest of its bytes, as `digest_file` finds it."""
    digest = ""

    def digested(file: BinaryIO) -> None:
        nonlocal digest
        digest = _digested(file, write)

    write_atomically(path, digested)
    return digest


def digest_file(path: Path, size: int | None = None) -> str:
    """Return the digest of a file's first `size` bytes, by default of all. Raise OSError if it cannot be read."""
    digest, block = xxh3_64(), bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while left and (count := file.readinto(memoryview(block)[: min(left, BLOCK)])):
            digest.update(memoryview(block)[:count])
            left -= count
    return digest.hexdigest()


def write_sealed(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file as `write_atomically` does, with its digest behind its content: the seal.

    The content must be of a format whose readers ignore bytes behind its end, such as a zip archive.
    """

    def sealed(file: BinaryIO) -> None:
        file.write(b"\nXXH3-64 %s\n" % _digested(file, write).encode())

    write_atomically(path, sealed)


def seal_fits(path: Path) -> bool | None:
    """Return whether a file is as `write_sealed` wrote it, to the last bit; None if it has no seal.

    Raise OSError if it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SEAL_BYTES))
        seal = SEAL.fullmatch(file.read())
    return None if seal is None else digest_file(path, size - SEAL_BYTES) == seal[1].decode()


def checksum(value: Any) -> str:
    """Return a digest of a JSON value that depends neither on white space nor on the order of keys."""
    return str(xxh3_64(json.dumps(value, sort_keys=True).encode()).hexdigest())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; None if there is no file. Raise UserError if it is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: is not valid JSON") from None


def now() -> str:
    """Return the time, UTC, in ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
