"""How sweeps are printed: tables that fit the terminal, durations, hours and sizes."""

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from embedscale.texts import number


class Narrowed:
    """A table that leaves out the columns `least`, in this order, until it fits the terminal."""

    def __init__(self, table: Table, *least: str):
        self.table, self.least = table, least
        for column in table.columns:
            if column.no_wrap:  # rich does not count such a column in the width that a table needs
                column.min_width = max(map(cell_len, (str(column.header), *map(str, column.cells))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        endless = options.update(max_width=10**4)  # larger than any measured width
        for name in self.least:
            if console.measure(self.table, options=endless).minimum <= options.max_width:
                break
            self.table.columns = [column for column in self.table.columns if column.header != name]
        yield self.table


def duration(seconds: float) -> str:
    """Return a duration with one or two units: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def hours(count: float) -> str:
    """Return a number of hours with two decimals, or with two significant digits where it is below 0.1."""
    return f"{count:,.2f}" if count >= 0.1 else number(count, 2)


def size(count: float) -> str:
    """Return a number of bytes with a unit (powers of 1000) and three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
