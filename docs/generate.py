"""Pages that follow from the code: written before each build, never by hand, and not kept in the repository."""

from pathlib import Path


def write_all(folder: Path) -> None:
    """Write every generated page into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.md").write_text(settings(), encoding="utf-8")


def settings() -> str:
    """All settings of a run, a table a section."""
    return "…\n"
