"""A text pair as it is read from a corpus."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A query, the text that answers it, and any number of texts that do not (hard negatives)."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
