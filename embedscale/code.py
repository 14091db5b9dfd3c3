"""The code that runs: its digest and commit, and the check of a job's copy before anything of it is imported.

Only the standard library is imported: the text of this file goes into the script of each job, where it verifies the
copy of the code and then runs a module of it (words: the copy, its digest, the module, and the module's own words).
The scheduler keeps the script, so what checks the copy does not change with it. A file that is missing or changed is
restored from the copy's archive.
"""

import hashlib
import json
import runpy
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path()  # not in a job's script
PACKAGES = ("embedscale", "slurm")  # what a job imports of this project
ARCHIVE = "files.zip"  # of a copy: all of its files again
FACTS = "code.json"  # of a copy: the commit that it was made from


def files_of(root: Path) -> dict[str, bytes]:
    """Return the content of each Python file of the packages in a folder, by its path there."""
    paths = sorted(path for name in PACKAGES for path in (root / name).rglob("*.py"))
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def digest_of(files: Mapping[str, bytes]) -> str:
    """Return the start of the SHA-256 of files by their paths: the name of their copy."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items(), key=lambda item: Path(item[0])):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Source:
    """Where code comes from."""

    digest: str
    """`digest_of` its files."""
    commit: str | None
    """Commit of the checkout; None for an installed package."""
    dirty: bool
    """Whether the checkout had changes that were not committed."""


def source_of(root: Path) -> Source:
    """Return the source of the code in a folder: a checkout, a job's copy of one, or an installed package."""
    return Source(digest_of(files_of(root)), *commit_of(root))


def commit_of(root: Path) -> tuple[str | None, bool]:
    """Return the commit of the code in a folder, None for an installed package, and whether it was changed since."""
    if (root / FACTS).exists():  # a copy may lie in a checkout, whose commit says nothing about it
        try:
            facts = json.loads((root / FACTS).read_text())
            return facts["commit"] or None, bool(facts["dirty"])
        except (OSError, ValueError, TypeError, KeyError):
            return None, False
    if Path(git(root, "rev-parse", "--show-toplevel").strip() or "/") != root.resolve():
        return None, False
    changes = git(root, "status", "--porcelain", "--", *PACKAGES)
    return git(root, "rev-parse", "HEAD").strip() or None, bool(changes)


def git(root: Path, *words: str) -> str:
    """Return what git prints about a folder; empty without git or a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def write_archive(root: Path, files: Mapping[str, bytes]) -> None:
    """Write the archive of a copy."""
    temporary = root / f".{ARCHIVE}.{uuid.uuid4().hex[:8]}.partial"
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    temporary.replace(root / ARCHIVE)


def read_archive(root: Path, digest: str) -> dict[str, bytes]:
    """Return the files in the archive of a copy. Raise ValueError if they are not those of `digest`."""
    try:
        with zipfile.ZipFile(root / ARCHIVE) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    except Exception as error:  # zipfile and zlib raise many classes for a damaged archive
        raise ValueError(f"{root / ARCHIVE}: cannot be read ({error})") from None
    if digest_of(files) != digest:
        raise ValueError(f"{root / ARCHIVE}: holds other files than those of {digest}")
    return files


def restore(root: Path, digest: str) -> list[str]:
    """Write what is missing or changed in a copy again, and remove what does not belong to it.

    Return the names. Raise ValueError if the copy's archive does not hold the files of `digest`.
    """
    found = files_of(root)
    if digest_of(found) == digest:
        return []
    files = read_archive(root, digest)
    wrong = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    for name in wrong:
        path = root / name
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)  # of the changed file
        if name not in files:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # other jobs may read the old one
        temporary.write_bytes(files[name])
        temporary.replace(path)
    return wrong


if __name__ == "__main__":
    _, _copy, _digest, _module, *_words = sys.argv
    try:
        if _restored := restore(Path(_copy), _digest):
            print(f"restored in {_copy}: {', '.join(_restored)}", flush=True)
    except (OSError, ValueError) as _error:
        sys.exit(f"embedscale: the copy of the code is damaged: {_error}; submit again")
    sys.path.insert(0, _copy)
    sys.argv = [_module, *_words]
    runpy.run_module(_module, run_name="__main__", alter_sys=True)
