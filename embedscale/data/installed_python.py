"""Text pairs that every machine has: documented functions of the installed Python packages.

A pair is (first paragraph of the docstring, the function without its docstring). There is nothing to download, so the
quickstart and the tests use this corpus. The price: it depends on the installed packages, so its digest does too.
"""

import ast
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from embedscale.data.pair import Pair


@cache
def installed_files() -> list[Path]:
    """List the Python files of the standard library and of the installed packages, sorted by name in each folder.

    Folders of tests are left out: they hold a third of the files and almost no documented functions.
    """
    files = []
    for folder in ("stdlib", "purelib", "platlib"):
        root = Path(sysconfig.get_path(folder))
        inside = (path.relative_to(root) for path in root.rglob("*.py"))
        excluded = {"tests", "test"} | ({"site-packages"} if folder == "stdlib" else set())
        found = [path for path in inside if not excluded & set(path.parts)]
        files += [root / path for path in sorted(found, key=str)]
    return list(dict.fromkeys(files))


def documented_functions(path: Path, counts: Counter[str]) -> Iterator[Pair]:
    """Yield a pair for each documented function of a file.

    `counts` is updated: "read" for each such function, and for an unreadable file "read" and its reason, "not_utf8"
    or "malformed".
    """
    try:
        text = path.read_text("utf-8")
        if '"""' not in text and "'''" not in text:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except UnicodeDecodeError:
        counts.update(read=1, not_utf8=1)
        return
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        counts.update(read=1, malformed=1)
        return
    lines = text.split("\n")
    for node in _statements(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        counts["read"] += 1
        first = node.body[0]
        code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno or 0 : node.end_lineno]
        yield Pair(" ".join(docstring.split("\n\n")[0].split()), textwrap.dedent("\n".join(code)).strip())


def _statements(node: Any) -> Iterator[Any]:
    """Yield every statement below a node in the order of the text. `ast.walk` is slower: it visits expressions too."""
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield child
            yield from _statements(child)
