"""What the page is made of: tables, and cells that lead somewhere."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A cell that leads to an address: a part of the page, or a file or folder beside it. Without one, it is text."""

    text: str
    address: str = ""


Rows = Sequence[Sequence[object]]
Terms = list[tuple[str, object]]


@dataclass(frozen=True)
class Table:
    """A table of the page; `more` stands below it. A reader can sort the rows of a `sortable` one."""

    title: str
    columns: Sequence[str]
    rows: Rows
    more: str = ""
    sortable: bool = False
