"""Write files whole or not at all, and read and write JSON.

Each file is written beside its target, synchronised with the disk and renamed. A crash at any moment leaves the old
file or the new one. The price is a wait for the disk with each file.
"""

import json
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from embedscale.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what `write` writes; a reader sees the old content or the new, never a part.

    Raise the system's OSError with the name of the target, for example for a full disk.
    """
    # In the same folder, because a rename to another file system would copy.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
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


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; None if there is no file. Raise UserError if it is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # UnicodeDecodeError is one
        raise UserError(f"{path}: is not valid JSON") from None


def now() -> str:
    """Return the time, UTC, in ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
