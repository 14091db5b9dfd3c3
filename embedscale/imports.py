"""Import heavy modules late and fast: torch and its friends take seconds, and most commands do not need them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # true for type checkers; importing `typing` would take a fifth of the time of `--help`
if TYPE_CHECKING:
    from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Disable garbage collection during heavy imports, which saves about a third of the start-up time.

    The objects of modules stay until the end, so they are also kept out of all later collections.

    OpenMP reads OMP_WAIT_POLICY when torch loads it. By default, threads that wait for work spin, and take the cores
    that the loader and other programs need. Here they sleep; the results are the same.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without_signal_processing() -> Iterator[None]:
    """Keep scipy.signal out of an import of Lightning: a tenth of the start of `train`.

    Lightning imports torchmetrics, which imports scipy.signal only to give it back the old name `hamming`. Meanwhile, a
    module stands in its place that has this name alone; whoever imports it later gets the real one.
    """
    name = "scipy.signal"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = empty = ModuleType(name)
    empty.hamming = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if sys.modules.get(name) is empty:
            del sys.modules[name]


def load(place: str) -> Any:
    """Import a module and return one of its names; `place` is "package.module:name"."""
    module, name = place.split(":")
    quick = without_signal_processing() if module.startswith("embedscale.training.") else nullcontext()
    with importing(), quick:
        return getattr(import_module(module), name)


def lazy(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose public names are imported when they are used (PEP 562).

    `places` maps each public name to its "package.module:name".
    """

    def getattr_of_package(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return load(places[name])

    return getattr_of_package, lambda: sorted(places)
