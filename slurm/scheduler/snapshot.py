"""The code that jobs run: a copy made at submission, so that later edits do not change queued jobs.

The copy's name is the digest of its files. `embedscale.code` checks it in each job, and restores it from its archive.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from embedscale.code import (
    FACTS,
    PACKAGES,
    ROOT,
    commit_of,
    digest_of,
    files_of,
    git,
    read_archive,
    restore,
    write_archive,
)
from embedscale.files import beside, now, write_json
from embedscale.values import Value


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

    Returns the path of the copy, which belongs on PYTHONPATH, and what is known of it. An existing copy is used again,
    after what is missing or changed in it was restored. An incomplete copy never carries the final name.
    """
    files, (commit, dirty) = files_of(ROOT), commit_of(ROOT)
    facts = CodeCopy(digest_of(files), commit or "", dirty, now())
    target = folder / facts.digest
    if target.exists():
        try:
            read_archive(target, facts.digest)
        except ValueError:
            write_archive(target, files)
        if restored := restore(target, facts.digest):
            print(f"restored in {target}: {', '.join(restored)}")
        return target.absolute(), facts
    staged = beside(target)
    try:
        for name, content in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(content)
        write_archive(staged, files)
        write_json(staged / FACTS, facts.to_json())
        (staged / "difference.patch").write_text(git(ROOT, "diff", "HEAD", "--", *PACKAGES))
        try:
            staged.rename(target)
        except OSError:
            if not target.exists():  # else another submission made the same copy first
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target.absolute(), facts
