"""The code that jobs run: a copy made at submission, so that later edits do not change queued jobs."""

import hashlib
import shutil
import subprocess
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from embedscale.files import now, write_json
from embedscale.values import Value

PACKAGES = ("embedscale", "slurm")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class CodeCopy(Value):
    """What is known of a copy of the code, in its file code.json."""

    digest: str
    """Start of the SHA-256 of all files; also the name of the copy's folder."""
    commit: str
    """Commit of the checkout; empty without git."""
    dirty: bool
    """Whether the checkout had changes that were not committed."""
    time: str
    """Time of the submission, ISO 8601."""


def snapshot(folder: Path) -> tuple[Path, CodeCopy]:
    """Copy the packages into folder/DIGEST, together with the git commit and the uncommitted difference.

    Returns the path of the copy, which belongs on PYTHONPATH, and what is known of it. An existing copy is used again.
    An incomplete copy never carries the final name.
    """
    files = sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    target = folder / digest.hexdigest()[:12]
    commit, difference = _git("rev-parse", "HEAD"), _git("diff", "HEAD", "--", *PACKAGES)
    facts = CodeCopy(target.name, commit.strip(), bool(difference), now())
    if target.exists():
        return target.absolute(), facts
    staged = folder / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        for file in files:
            copy = staged / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        write_json(staged / "code.json", facts.to_json())
        (staged / "difference.patch").write_text(difference)
        with suppress(OSError):  # another submission made the same copy first
            staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target.absolute(), facts


def _git(*words: str) -> str:
    """Return what git prints about the checkout that this code runs from; empty without git or a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
