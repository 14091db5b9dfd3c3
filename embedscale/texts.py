"""Write numbers and names as texts: one way for the terminal, the figures, the notes and the page.

A large or small number is written as 6.4e12, which is also what the command line reads. A value and its interval end at
the same digit. A name from a table is text: nothing in it is markup, and a long name is shortened in its middle.
"""

import math
import re
from collections.abc import Sequence

LONGEST_NAME = 36  # characters of a name in a figure
MOST_DIGITS = 6  # of a value with an interval


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, as 0.25 or 6.4e12; a dash for None."""
    return "–" if value is None else _plain(f"{value:.{digits}g}")


def spread(ends: Sequence[float] | None, digits: int = 3) -> str:
    """Return an interval with so many significant digits, or a dash for None."""
    return "–" if ends is None else f"{number(ends[0], digits)} … {number(ends[1], digits)}"


def measured(value: float | None, ends: Sequence[float] | None, digits: int = 4) -> tuple[str, str]:
    """Return a value and its interval as texts that end at the same digit.

    This digit is the second of the interval's width. Without an interval, the value has so many significant `digits`.
    """
    if value is None or ends is None or not (math.isfinite(ends[1] - ends[0]) and ends[1] > ends[0]):
        return number(value, digits), spread(ends, digits)
    last = math.floor(math.log10(ends[1] - ends[0])) - 1

    def written(each: float) -> str:
        first = math.floor(math.log10(abs(each))) if each else last
        # With "#", zeros at the end stay: 0.50 is known better than 0.5.
        return _plain(f"{each:#.{min(max(first - last + 1, 2), MOST_DIGITS)}g}")

    return written(value), f"{written(ends[0])} … {written(ends[1])}"


def _plain(text: str) -> str:
    """Return a number without the plus, the zeros and the bare point that Python writes: 6.4e12 for 6.4e+12."""
    return re.sub(r"\.(?=e|$)", "", re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), text))


def short_number(value: float) -> str:
    """Return a number as 1.2M, 85k or 1.2B."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{letter}"
    return number(value)


def short_name(name: str) -> str:
    """Return a name that fits into a figure: on one line, its middle left out where it is long."""
    name = "".join(each if each.isprintable() else " " for each in name).strip() or "(no name)"
    half = (LONGEST_NAME - 1) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def listed(words: Sequence[str]) -> str:
    """Return words as "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
