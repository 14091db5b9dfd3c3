"""Numbers as a reader sees them: a value and its interval with as many digits as the interval supports."""

import math
from collections.abc import Sequence

WIDE = 2.0  # ratio of an interval's ends above which each number gets two significant digits
SUPPORTED = 2  # significant digits of the width of an interval
MOST = 5  # significant digits of a value, however narrow its interval
PLAIN = (1e-3, 1e5)  # sizes of numbers that are written without an exponent


def matched(value: float, ends: Sequence[float] | None, digits: int = 4) -> tuple[str, str]:
    """Return a value and its interval "LOW … HIGH", rounded to the same decimal place.

    The place keeps two significant digits of the interval's width, and at most five of the value. Where the ends differ
    by more than a factor of two, each number has two significant digits instead. Without an interval the value has
    `digits` significant digits, and the second text is a dash.
    """
    if ends is None:
        return f"{value:.{digits}g}", "–"
    low, high = ends
    width = high - low
    if not width > 0:
        return f"{value:.{digits}g}", f"{low:.{digits}g} … {high:.{digits}g}"
    if low > 0 and high / low > WIDE:
        texts = [f"{each:#.2g}".rstrip(".") for each in (value, low, high)]
    else:
        largest = max(abs(low), abs(high))
        place = max(math.floor(math.log10(width)) - SUPPORTED, math.floor(math.log10(largest)) - MOST) + 1
        texts = [_rounded(each, place, largest) for each in (value, low, high)]
    return texts[0], f"{texts[1]} … {texts[2]}"


def within(value: float, ends: Sequence[float] | None, percent: str, digits: int = 4, unit: str = "") -> str:
    """Return "VALUE UNIT (95 %: LOW … HIGH)", with the digits of `matched`."""
    text, between = matched(value, ends, digits)
    return f"{text}{unit and f' {unit}'} ({f'{percent}: {between}' if ends else 'no interval'})"


def _rounded(value: float, place: int, largest: float) -> str:
    """Return a number rounded to a power of ten; with an exponent where the largest of its row needs one."""
    if PLAIN[0] <= largest < PLAIN[1]:
        return f"{value:,.{max(0, -place)}f}" if place <= 0 else f"{round(value, -place):,.0f}"
    value = round(value, -place)
    if value == 0:
        return "0"
    return f"{value:.{max(0, math.floor(math.log10(abs(value))) - place)}e}"
