"""Pages and JSON Schemas that follow from the code: `python docs/generate.py` writes them all.

The pages are written before each build of the site and are not kept in the repository. The schemas in docs/schemas are
kept, because other programs may read them; a test compares them with the code.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def pages() -> dict[str, str]:
    """Return the generated pages by file name."""
    from embedscale.run.config import RunConfig
    from embedscale.run.settings import markdown
    from slurm.cluster import Cluster, ResourceClass
    from slurm.grid import SweepFile

    return {
        "run.md": markdown(RunConfig),
        "sweep.md": markdown(SweepFile),
        "cluster.md": markdown(Cluster, nested=False),
        "class.md": markdown(ResourceClass),
        "api.md": api(),
        "modules.md": modules(),
    }


def api() -> str:
    """Return the public names of each package with their docstrings, for autodoc."""
    from importlib import import_module

    parts = []
    for name in ("embedscale", "slurm", "analysis"):
        package = import_module(name)
        parts += [f"## {name}\n", (package.__doc__ or "").partition("\n\n")[0] + "\n"]
        for public in (each for each in package.__all__ if not each.startswith("_")):
            kind = "class" if isinstance(getattr(package, public), type) else "function"
            parts.append(f"```{{eval-rst}}\n.. auto{kind}:: {name}.{public}\n```\n")
    return "\n".join(parts)


ROOMS = (
    *("embedscale", "embedscale/adaptive", "embedscale/run", "embedscale/data"),
    *("embedscale/model", "embedscale/model/cpu", "embedscale/model/gpu"),
    *("embedscale/training", "embedscale/training/pricing", "embedscale/serving", "slurm", "slurm/scheduler"),
    *("analysis", "analysis/fitting", "analysis/design", "analysis/figures"),
)


def modules() -> str:
    """Return the modules of each room with the first sentence of their docstrings."""
    import ast

    parts = []
    for room in ROOMS:
        folder = HERE.parent / room
        rows = [f"### {room}\n", "| module | what it holds |", "|---|---|"]
        for file in sorted(folder.glob("*.py"), key=lambda file: (file.name != "__init__.py", file.name)):
            text = " ".join((ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n\n")[0].split())
            rows.append(f"| `{'(the package)' if file.name == '__init__.py' else file.stem}` | {text} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each file that a run or a fit writes, by file name."""
    from analysis.fits import Fits
    from embedscale.run.record import Metric, RunRecord
    from embedscale.training.plan import PlanFile
    from embedscale.values import CHECKSUM, schema_file

    kinds = {"record.json": RunRecord, "metrics.jsonl": Metric, "plan.json": PlanFile, "fits.json": Fits}
    found = {f"{name.split('.')[0]}.schema.json": schema_file(kind, name) for name, kind in kinds.items()}
    for name in ("record", "plan", "fits"):
        text = "Digest of all other keys; a file that has changed is refused. Absent in files of version 0.2."
        found[f"{name}.schema.json"]["properties"][CHECKSUM] = {"type": "string", "description": text}
    return found


def write_all(folder: Path) -> None:
    """Write every generated page into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def write_schemas(folder: Path) -> None:
    """Write every JSON Schema into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        (folder / name).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    write_all(HERE / "reference" / "generated")
    write_schemas(HERE / "schemas")
