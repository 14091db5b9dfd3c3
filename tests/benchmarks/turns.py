"""Contestants in separate processes that take turns, so that none changes the state of another."""

import ctypes.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Contestant:
    """A new process. There `make(*args)` returns the function that a turn calls; this process gets the results."""

    def __init__(self, make: Callable[..., Callable[..., Any]], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self.process.start()

    def turn(self, *args: Any) -> Any:
        self.pipe.send(args)
        found = self.pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found


@contextmanager
def tcmalloc() -> Iterator[str | None]:
    """Let processes that begin here allocate with tcmalloc, if the machine has it; give the library's name."""
    library = ctypes.util.find_library("tcmalloc_minimal")
    before = os.environ.get("LD_PRELOAD")
    if library:
        os.environ["LD_PRELOAD"] = library
    try:
        yield library
    finally:
        if before is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = before


def _serve(pipe: Any, make: Callable[..., Callable[..., Any]], args: tuple) -> None:
    run = None
    for words in _received(pipe):
        try:
            run = run or make(*args)
            pipe.send(run(*words))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _received(pipe: Any) -> Iterator[tuple]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return
