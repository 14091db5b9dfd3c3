"""Write numbers and names as texts: one way for the terminal, the figures, the notes and the page.

A large or small number is written as 6.4e12, which is also what the command line reads. A value and its interval end at
the same digit. A name from a table is text: nothing in it is markup, and a long name is shortened in its middle.
"""

import math
import re
from collections.abc import Sequence

LONGEST_NAME = 36  # characters of a name in a figure
WIDE = 2.0  # ratio of an interval's ends above which each number gets two significant digits
SUPPORTED = 2  # significant digits of the width of an interval
MOST = 5  # significant digits of a value, however narrow its interval
PLAIN = (1e-3, 1e5)  # sizes of numbers that are written without an exponent


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, as 0.25 or 6.4e12; a dash for None."""
    return "–" if value is None else _plain(f"{value:.{digits}g}")


def spread(ends: Sequence[float] | None, digits: int = 3) -> str:
    """Return an interval with `digits` significant digits, or a dash for None."""
    return "–" if ends is None else f"{number(ends[0], digits)} … {number(ends[1], digits)}"


def measured(value: float | None, ends: Sequence[float] | None, digits: int = 4) -> tuple[str, str]:
    """Return a value and its interval "LOW … HIGH", rounded to the same decimal place.

    The place keeps two significant digits of the interval's width, and at most five of the value. Where the ends differ
    by more than a factor of two, each number has two significant digits instead. Without an interval the value has
    `digits` significant digits, and the second text is a dash.
    """
    if value is None or ends is None or not 0 < ends[1] - ends[0] < math.inf:
        return number(value, digits), spread(ends, digits)
    low, high = ends
    width = high - low
    if low > 0 and high / low > WIDE:
        texts = [_plain(f"{each:#.2g}") for each in (value, low, high)]
    else:
        largest = max(abs(low), abs(high))
        place = max(math.floor(math.log10(width)) - SUPPORTED, math.floor(math.log10(largest)) - MOST) + 1
        texts = [_rounded(each, place, largest) for each in (value, low, high)]
    return texts[0], f"{texts[1]} … {texts[2]}"


def within(value: float, ends: Sequence[float] | None, percent: str, digits: int = 4, unit: str = "") -> str:
    """Return "VALUE UNIT (95 %: LOW … HIGH)", with the digits of `measured`."""
    text, between = measured(value, ends, digits)
    return f"{text}{unit and f' {unit}'} ({f'{percent}: {between}' if ends else 'no interval'})"


def _rounded(value: float, place: int, largest: float) -> str:
    """Return a number rounded to a power of ten; with an exponent where the largest of its row needs one."""
    if PLAIN[0] <= largest < PLAIN[1]:
        return f"{value:,.{max(0, -place)}f}" if place <= 0 else f"{round(value, -place):,.0f}"
    value = round(value, -place)
    if value == 0:
        return "0"
    return _plain(f"{value:.{max(0, math.floor(math.log10(abs(value))) - place)}e}")


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


def counted(count: int, noun: str) -> str:
    """Return "1 job", "2,500 jobs" or "2 processes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural * (count != 1)}"


def apart(difference: float, other: str) -> str:
    """Return a difference of logarithms as "12 % above the law", where `other` is "the law"."""
    return f"{number(100 * abs(math.expm1(difference)))} % {'above' if difference > 0 else 'below'} {other}"


def listed(words: Sequence[str]) -> str:
    """Return words as "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
