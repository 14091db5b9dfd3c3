"""Pages that follow from the code: written before each build, never by hand, and not kept in the repository."""

import inspect
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from embedscale.run.config import RunConfig, Source
from slurm.cluster import Cluster, ResourceClass
from slurm.grid import SweepFile

ROW = re.compile(r"^    (\w+): [^#\n]*#\s*(.*)$", re.MULTILINE)
BELOW = re.compile(r'^    (\w+): .*\n    """(.*?)"""$', re.MULTILINE)


def write_all(folder: Path) -> None:
    """Write every generated page into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "run.md": run_settings(),
        "sweep.md": table(SweepFile),
        "cluster.md": table(Cluster),
        "class.md": table(ResourceClass),
    }
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


def schemas() -> list[type]:
    """Every dataclass whose fields a user may set."""
    sections = [hint for hint in get_type_hints(RunConfig).values() if is_dataclass(hint)]
    return [RunConfig, *sections, Source, SweepFile, Cluster, ResourceClass]


def run_settings() -> str:
    """All settings of a run: the top level, then a table a section."""
    hints = get_type_hints(RunConfig)
    parts = ["### budget, output\n", table(RunConfig)]
    for each in fields(RunConfig):
        if is_dataclass(hints[each.name]):
            section = hints[each.name]
            parts += [f"### {each.name}\n", f"{inspect.getdoc(section)}\n", table(section, f"{each.name}.")]
            if each.name == "data":
                parts += ["Each entry of `data.sources`:\n", table(Source)]
    return "\n".join(parts)


def table(schema: type, prefix: str = "") -> str:
    """A Markdown table of the plain fields of a dataclass: name, default, the line that describes it."""
    source = inspect.getsource(schema)
    notes = dict(ROW.findall(source)) | dict(BELOW.findall(source))
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for each in fields(schema):
        if is_dataclass(get_type_hints(schema)[each.name]):
            continue
        rows.append(f"| `{prefix}{each.name}` | {_default(each)} | {notes.get(each.name, '')} |")
    return "\n".join(rows) + "\n"


def _default(item: Field) -> str:
    value: Any = item.default if item.default_factory is MISSING else item.default_factory()
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return f"{len(value)} of them"
    return "–" if value is None or value == "" else f"`{value}`"
