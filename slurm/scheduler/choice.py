"""The schedulers by name. A cluster file names one in `scheduler`; `sweep submit --to here` chooses this machine."""

from collections.abc import Callable
from pathlib import Path

from embedscale.errors import UserError
from slurm.scheduler.local import Local
from slurm.scheduler.scheduler import Scheduler
from slurm.scheduler.slurm import Slurm

SCHEDULERS: dict[str, Callable[[Path], Scheduler]] = {"slurm": Slurm, "here": Local}


def scheduler_of(name: str, folder: Path) -> Scheduler:
    """Return the scheduler `name`, for the sweep in `folder`. Raises UserError for an unknown name."""
    if name not in SCHEDULERS:
        raise UserError(f"scheduler: {name!r} is unknown; allowed: {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name](folder)
