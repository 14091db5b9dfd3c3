"""Heavy imports, and no search for garbage among the modules that they bring."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around imports: modules stay, and to search them for garbage, again and again and at the exit, takes seconds."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
