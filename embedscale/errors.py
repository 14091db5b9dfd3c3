"""Exit statuses of the commands, the exception for mistakes of the user, and checks of settings that raise it."""

import math
from collections.abc import Sequence

DONE = 0
FAILED = 1
WRONG = 2
INTERRUPTED = 75  # the command can be run again to continue


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line: the setting or file, what was found, and what is allowed. The command line prints it
    without a traceback and exits with `WRONG`.
    """


# How the system, torch, oneDNN and pyarrow say that there is too little memory. Only some of them raise MemoryError.
_SHORT_OF_MEMORY = ("allocate memory", "not enough memory", "map segment", "bad_alloc", "create a primitive")


def short_of_memory(error: BaseException) -> bool:
    """Return whether an error says that this process found too little memory."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _SHORT_OF_MEMORY)


def allowed(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError if a setting is not one of the choices."""
    if value not in choices:
        raise UserError(f"{name}: {value!r} is unknown; allowed: {', '.join(choices)}")


def bounded(name: str, value: float | None, low: float, high: float = float("inf"), above: bool = False) -> None:
    """Raise UserError if a number is outside [low, high], or outside (low, high] with `above`.

    None passes; NaN and infinity do not.
    """
    if value is None:
        return
    if not math.isfinite(value) or not (low < value if above else low <= value) or value > high:
        limit = f"above {low:g}" if above else f"at least {low:g}"
        raise UserError(
            f"{name}: {value} is out of range; allowed: {limit}"
            + (f", at most {high:g}" if high < float("inf") else "")
        )
