"""The terminal: texts are printed as they are, and a reader who has left ends no command.

rich reads markup in every text, so that a path or an error with "[/…]" loses letters or raises. Markup, emoji codes and
highlighting are therefore off here, and every rich console of this project is made here. Text that is to have a style
gets it as an argument.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys

TYPE_CHECKING = False  # as in `imports`
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from rich.console import Console


def console(width: int | None = None, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a rich console that prints texts as they are.

    `width` is the number of columns where the output is no terminal; a terminal has its own.
    """
    from rich.console import Console  # a tenth of a second, which `--help` does not need

    def made(width: int | None) -> Console:
        return Console(width=width, stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)

    found = made(None)
    return found if width is None or found.is_terminal else made(width)


def shortened(lines: Sequence[str], most: int) -> list[str]:
    """Return the first `most` lines, and a last one that counts the others."""
    return [*lines[:most], f"and {len(lines) - most:,} more"] if len(lines) > most else list(lines)


class _Output(io.FileIO):
    """Standard output or error; after its reader has left (`| head`, a closed terminal), what is written is dropped."""

    reader_left = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.reader_left = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def outlive_readers() -> None:
    """Let this process go on when the reader of its output leaves, and replace characters that the output lacks.

    A command that has begun to train or to submit must come to its end, whoever reads its messages. SIGPIPE stays
    ignored, as Python sets it: otherwise a logger's closed socket would end a run.
    """
    sys.stdout, sys.stderr = _reopened(sys.stdout), _reopened(sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character


def _reopened(stream: Any) -> Any:
    """Return a stream to the same file that outlives its reader; a stream to something else stays."""
    raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO) or isinstance(raw, _Output):
        return stream
    stream.flush()
    file: Any = _Output(raw.fileno(), "w", closefd=False)
    if raw is not stream.buffer:  # not with PYTHONUNBUFFERED
        file = io.BufferedWriter(file)
    lines, through = stream.line_buffering, stream.write_through
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=lines, write_through=through)


def reader_left() -> bool:
    """Return whether the reader of standard output has left: then a command that only shows something may end."""
    buffer = getattr(sys.stdout, "buffer", None)
    if getattr(getattr(buffer, "raw", buffer), "reader_left", False):
        return True
    try:
        looked = select.poll()
        looked.register(sys.stdout.fileno(), 0)  # errors and hang-ups are told without being asked for
        return bool(looked.poll(0))
    except (OSError, ValueError):  # a test's output has no file
        return False
