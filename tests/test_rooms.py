"""The rooms of the code: which room may import which, how long a file may be, and who knows a run's file names.

`ROOMS` is the picture of the architecture. Its order is bottom to top: a room may import from the rooms that its line
names, and from no other. Imports inside functions count, and so do texts that name a module for a late import:
"package.module:name" and the argument of `import_module`. Nothing is run: the arrows are read from the syntax tree.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room: its modules or folders (the longest matching name decides), and the rooms that it may import.
ROOMS: dict[str, tuple[list[str], list[str]]] = {
    "ground": (
        [
            "embedscale.code",
            "embedscale.errors",
            "embedscale.files",
            "embedscale.imports",
            "embedscale.options",
            "embedscale.process",
            "embedscale.progress",
            "embedscale.terminal",
            "embedscale.texts",
            "embedscale.values",
        ],
        [],
    ),
    "run": (["embedscale.run", "embedscale.adaptive.choices"], ["ground"]),
    "data": (["embedscale.data"], ["ground", "run"]),
    "model": (["embedscale.model"], ["ground", "run"]),  # tokens come as arrays: no store and no tokenizer here
    "training": (["embedscale.training"], ["ground", "run", "data", "model"]),
    "serving": (["embedscale.serving"], ["ground", "run", "data", "model", "training"]),
    "sweep": (["slurm"], ["ground", "run", "data", "model", "training", "serving"]),
    # Figures and laws need no torch: the analysis may import what a run is, and nothing else of `embedscale`.
    "table": (
        [
            *("analysis.runs", "analysis.columns", "analysis.tables", "analysis.replicates"),
            *("analysis.fits", "analysis.noise", "analysis.first_version"),
        ],
        ["ground", "run"],
    ),
    "fitting": (["analysis.fitting"], ["ground", "run", "table"]),
    "design": (["analysis.design"], ["ground", "run", "table", "fitting"]),
    "study": (["analysis.study", "analysis.advice"], ["ground", "run", "table", "fitting"]),
    "figures": (["analysis.figures"], ["ground", "run", "table", "fitting", "design", "study"]),
    "analysis": (["analysis"], ["ground", "run", "table", "fitting", "design", "study", "figures"]),
}
# Above all rooms: the command line, the adaptive sweep, which chooses by the analysis and runs by the sweep, and the
# package itself, which imports a public name on its first use.
TOP = ["embedscale.cli", "embedscale.adaptive", "embedscale.adaptive.sweep", "embedscale"]

LONGEST_FILE = 450  # lines
LARGEST_FOLDER = 12  # modules beside __init__.py

RUN_FILES = {
    "attempt.json",
    "lease.json",
    "metrics.jsonl",
    "plan.json",
    "record.json",
    "traceback.txt",
    "trainable.safetensors",
}
RUN_DIRECTORY = "embedscale.run.directory"


def modules() -> dict[str, Path]:
    """Return the path of every module of the three packages, by dotted name."""
    found = {}
    for package in ("embedscale", "slurm", "analysis"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports_in(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of this repository that a module imports, at the top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}; write the whole name"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    yield submodule
                elif node.module in MODULES and (node.module, alias.name) != ("embedscale", "__version__"):
                    yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if (place := re.fullmatch(r"([\w.]+):\w+", node.value)) and place[1] in MODULES:
                yield place[1]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (each.value for each in node.args if isinstance(each, ast.Constant) and each.value in MODULES)


def room_of(module: str) -> str | None:
    """Return the room of a module, or None if it is above all rooms."""
    if module in TOP:
        return None
    names = {part: room for room, (parts, _) in ROOMS.items() for part in parts}
    while module not in names:
        module, _, _ = module.rpartition(".")
        assert module, "a module outside of all rooms"
    return names[module]


def test_late_imports_count():
    tree = ast.parse(
        'import torch\ndef f():\n from slurm import plan\n load("slurm.grid:load")\n import_module("analysis.runs")'
    )
    assert set(imports_in(tree)) == {"slurm.plan", "slurm.grid", "analysis.runs"}


def test_every_import_goes_down():
    upward = set()
    for module in MODULES:
        room = room_of(module)
        if room is None:
            continue
        for imported in imports_in(TREES[module]):
            there = room_of(imported)
            if there != room and there not in ROOMS[room][1]:
                upward.add(f"{module} -> {imported}")
    assert upward == set()


def test_the_picture_of_the_rooms_has_no_circle():
    order = list(ROOMS)
    for room, (_, below) in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in below), room


def test_no_modules_import_each_other_in_a_circle():
    arrows = {module: set(imports_in(TREES[module])) - {module} for module in MODULES if module != "embedscale"}
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")


def test_every_module_of_a_room_is_in_the_picture():
    parts = {part for parts, _ in ROOMS.values() for part in parts}
    assert parts <= MODULES.keys()


def test_no_file_is_long():
    files = [path for folder in ("embedscale", "slurm", "analysis", "tests") for path in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)) for p in files if len(p.read_text().splitlines()) > LONGEST_FILE}
    assert long == set()


def test_no_folder_is_full():
    folders = {path.parent for path in MODULES.values()}
    modules = {folder: [path for path in folder.glob("*.py") if path.name != "__init__.py"] for folder in folders}
    assert {folder for folder, paths in modules.items() if len(paths) > LARGEST_FOLDER} == set()


def test_one_module_knows_the_names_of_a_runs_files():
    spelled = {
        f"{module}: {name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (name := node.value.rsplit("/", 1)[-1]) in RUN_FILES and module != RUN_DIRECTORY
    }
    assert spelled == set()
