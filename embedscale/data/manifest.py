"""What `manifest.json` says about a store: counts, token statistics, digests, and the settings that decide the content.

The manifest is written last, so a folder without one is not finished. Its keys are those of the first version, and
manifests of the first version load.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedscale.errors import UserError
from embedscale.files import write_json

FORMAT = 1
FILE = "manifest.json"

# Why a row of a source did not become a stored pair, in the order in which the reasons are reported.
REASONS = ("empty", "duplicate", "not_utf8", "malformed", "left_out")


@dataclass(frozen=True)
class TokenStatistics:
    """Tokens of the training pairs, negatives apart."""

    training: int  # all of them
    mean_query: float
    mean_positive: float
    longest_query: int
    longest_positive: int


@dataclass(frozen=True)
class StoredTokenizer:
    """The tokenizer that a store was made with: its name, and a digest of its behaviour."""

    name: str
    digest: str


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source's rows: `read` of them, `kept` of those, and the dropped ones by reason."""

    kind: str
    path: str
    counts: dict[str, int]


@dataclass(frozen=True)
class PartSizes:
    """Pairs in each file of a store, in order."""

    train: list[int]
    held_out: list[int]


@dataclass(frozen=True)
class Manifest:
    """A finished store, described."""

    digest: str  # of the training and held-out tokens, in stored order
    pairs: int  # for training
    held_out: int  # pairs
    negatives: int  # every pair has at least this many
    tokens: TokenStatistics
    tokenizer: StoredTokenizer
    vocabulary: int  # rows that an embedding table needs
    read: int  # rows, over all sources
    counts: dict[str, int]  # rows by what became of them, over all sources
    sources: list[SourceCounts]
    parts: PartSizes
    settings: dict[str, Any]  # all settings that decide the content, by the names of their fields
    seconds: float  # of the last call of `prepare`, which may have finished the work of an earlier call

    @property
    def context(self) -> int:
        """Tokens at which texts were cut."""
        return int(self.settings["context"])

    @classmethod
    def read_from(cls, folder: Path) -> "Manifest":
        """Read a store's manifest. Raises UserError for a folder that is not a finished store of this format."""
        path = folder / FILE
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            state = "is not finished" if folder.exists() else "does not exist"
            raise UserError(f"data.store: {folder} {state}; run `embedscale prepare` with this configuration") from None
        except (OSError, ValueError):
            raise UserError(f"data.store: {path} cannot be read; remove the store and prepare it again") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError(f"data.store: {folder} is not a store of format {FORMAT}; prepare it again")
        try:
            return cls.from_json(value)
        except (KeyError, TypeError) as error:
            raise UserError(f"data.store: {path} is damaged ({error}); remove the store and prepare it again") from None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Manifest":
        """Build the manifest from the value of its file. Raises KeyError or TypeError if a key is missing or wrong."""
        sources = [
            SourceCounts(source["kind"], source["path"], {k: n for k, n in source.items() if k not in ("kind", "path")})
            for source in value["sources"]
        ]
        return cls(
            digest=value["digest"],
            pairs=value["pairs"],
            held_out=value["held_out"],
            negatives=value["negatives"],
            tokens=TokenStatistics(**value["tokens"]),
            tokenizer=StoredTokenizer(**value["tokenizer"]),
            vocabulary=value["vocabulary"],
            read=value["read"],
            counts=value["counts"],
            sources=sources,
            parts=PartSizes(**value["parts"]),
            settings=value["settings"],
            seconds=value["seconds"],
        )

    def to_json(self) -> dict[str, Any]:
        """Return the value that the file holds."""
        sources = [{"kind": source.kind, "path": source.path, **source.counts} for source in self.sources]
        return {"format": FORMAT} | asdict(self) | {"sources": sources}

    def write_to(self, folder: Path) -> None:
        """Write the manifest, which makes the folder a finished store."""
        write_json(folder / FILE, self.to_json())

    def summary(self) -> str:
        """Say in one line how many pairs there are and why rows were dropped."""
        dropped = describe({reason: n for reason, n in self.counts.items() if reason in REASONS})
        said = f"; dropped: {dropped}" if dropped else ""
        return f"{self.pairs:,} training and {self.held_out:,} held-out pairs of {self.read:,} read{said}"


def is_finished(folder: str | Path) -> bool:
    """Return whether the folder is a finished store."""
    return (Path(folder) / FILE).exists()


def describe(counts: Counter[str] | dict[str, int]) -> str:
    """Write counts for a reader, such as "7 read, 7 empty"; empty if all are zero."""
    kinds = ("read", *REASONS)
    return ", ".join(f"{counts[kind]:,} {kind.replace('_', ' ')}" for kind in kinds if counts.get(kind))
