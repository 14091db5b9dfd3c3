"""Files that are written whole or not at all."""

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
    """Write a file so that, whatever happens, it holds all of the old content or all of the new.

    The temporary file lies beside its target: a rename across file systems would be a copy. Where the system refuses,
    raises its OSError with the target's name, whatever `write` made of it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _write_to_disk(temporary, write)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # whoever refuses to unlink has refused to write, and that is the error to hear of
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
            # torch, NumPy and safetensors have errors of their own for a full disk: it is asked again.
            file.write(bytes(2**20))
            file.flush()
            raise
    # safetensors puts a file of its own in this one's place, which its owner alone may read.
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
            path.chmod(mode)
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> Any:
    """The file's value, or None where it is missing. Raises UserError where it is no JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path}: is no valid JSON") from None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
