"""What `manifest.json` says about a store: counts, token statistics, digests, and the settings that decide the content.

The manifest is written last, so a folder without one is not finished. It has digests of the store's files and a
checksum of itself, so that damage is noticed before it is used. Manifests of the first version load; they have neither.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from embedscale.errors import UserError
from embedscale.files import checksum, write_json
from embedscale.run.config import RunConfig
from embedscale.values import CHECKSUM, Count, Positive, Value, sealed

FORMAT = 1
FILE = "manifest.json"

# Why a row of a source did not become a stored pair, in the order in which the reasons are reported.
REASONS = ("empty", "duplicate", "not_utf8", "malformed", "few_negatives", "left_out")


@dataclass(frozen=True)
class AddedTokens:
    """Ids of the tokens that stand before and after each text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.before or self.after)

    def around(self, ids: list[int], context: int) -> list[int]:
        """Return the ids of a text, cut so that it has `context` ids with the added ones; no id for no id."""
        return [*self.before, *ids[: context - len(self.before) - len(self.after)], *self.after] if ids else []


NO_TOKENS = AddedTokens()


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
class ShardDigests:
    """Digests of the files of one part of a store, in order."""

    files: list[str]  # of every byte
    lengths: list[str]  # of the token counts alone, which planning reads without the tokens


@dataclass(frozen=True)
class StoreDigests:
    """Digests of all files of a store."""

    train: ShardDigests
    held_out: ShardDigests


@dataclass(frozen=True)
class Manifest(Value):
    """A finished store, described."""

    digest: str  # of the training and held-out tokens, in stored order
    pairs: Positive  # for training
    held_out: Count  # pairs
    negatives: Count  # every pair has at least this many
    tokens: TokenStatistics
    tokenizer: StoredTokenizer
    vocabulary: Count  # rows that an embedding table needs
    rows_read: int  # over all sources; the file's key is `read`
    counts: dict[str, int]  # rows by what became of them, over all sources
    sources: list[SourceCounts]
    parts: PartSizes
    settings: dict[str, Any]  # all settings that decide the content, by the names of their fields
    seconds: float  # of the last call of `prepare`, which may have finished the work of an earlier call
    digests: StoreDigests | None = None  # None in manifests of version 0.2, whose files cannot be verified

    @property
    def context(self) -> int:
        """Tokens at which texts were cut."""
        return int(self.settings["context"])

    @property
    def added(self) -> AddedTokens:
        """The special tokens around each text; none in stores of earlier versions."""
        before, after = self.settings.get("special_tokens", ([], []))
        return AddedTokens(tuple(before), tuple(after))

    @classmethod
    def read_from(cls, folder: Path) -> "Manifest":
        """Read a store's manifest. Raises UserError for a folder that is not a finished store of this format."""
        path = folder / FILE
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            state = "is not finished" if folder.exists() else "does not exist"
            raise UserError(f"data.store: {folder} {state}; run `embedscale prepare` with this configuration") from None
        except (OSError, ValueError, RecursionError):
            raise UserError(f"data.store: {path} cannot be read; remove the store and prepare it again") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(f"data.store: {folder} is not a store of format {FORMAT}; prepare it again")
        written = data.pop(CHECKSUM, None)
        try:
            # A manifest with digests has a checksum.
            if written != checksum(data) and (written is not None or data.get("digests") is not None):
                raise UserError("it has changed since it was written: its checksum does not fit")
            return cls.from_json(data)
        except UserError as misfit:
            raise UserError(
                f"data.store: {path} is damaged ({misfit}); remove the store and prepare it again"
            ) from None

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the manifest of a parsed file. Raises UserError, naming the key, where it does not fit.

        In the file, the counts of a source are beside its kind and its path.
        """
        if isinstance(data, dict) and isinstance(data.get("sources"), list):
            data = {"rows_read" if key == "read" else key: value for key, value in data.items()}
            data["sources"] = [_nested(source) for source in data["sources"]]
        found = super().from_json(data)
        if not isinstance(found.settings.get("context"), int):
            raise UserError("settings.context: no whole number was found")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the value that the file holds."""
        sources = [{"kind": source.kind, "path": source.path, **source.counts} for source in self.sources]
        facts = {"read" if key == "rows_read" else key: value for key, value in super().to_json().items()}
        return {"format": FORMAT} | facts | {"sources": sources}

    def write_to(self, folder: Path) -> None:
        """Write the manifest, which makes the folder a finished store."""
        write_json(folder / FILE, sealed(self.to_json()))

    def too_few_for(self, config: RunConfig) -> str | None:
        """Return why the held-out pairs do not serve for the evaluation of a run; None if they do."""
        if self.held_out >= config.evaluation.pool:
            return None
        return (
            f"evaluation.pool: {config.evaluation.pool}, but {config.data.store} holds {self.held_out} held-out pairs; "
            "lower evaluation.pool, or prepare a new store with a larger data.held_out"
        )

    def summary(self) -> str:
        """Say in one line how many pairs there are and why rows were dropped."""
        dropped = describe({reason: n for reason, n in self.counts.items() if reason in REASONS})
        said = f"; dropped: {dropped}" if dropped else ""
        return f"{self.pairs:,} training and {self.held_out:,} held-out pairs of {self.rows_read:,} read{said}"


def _nested(source: object) -> object:
    if not isinstance(source, dict):
        return source
    named = {name: source[name] for name in ("kind", "path") if name in source}
    return named | {"counts": {reason: n for reason, n in source.items() if reason not in named}}


def is_finished(folder: str | Path) -> bool:
    """Return whether the folder is a finished store."""
    return (Path(folder) / FILE).exists()


def describe(counts: Counter[str] | dict[str, int]) -> str:
    """Write counts for a reader, such as "7 read, 7 empty"; empty if all are zero."""
    kinds = ("read", *REASONS)
    return ", ".join(f"{counts[kind]:,} {kind.replace('_', ' ')}" for kind in kinds if counts.get(kind))
