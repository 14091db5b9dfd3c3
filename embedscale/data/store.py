"""`PairStore`: tokenised pairs on disk, shuffled once, read in order.

A store is a folder of Arrow files and a manifest. Each file holds a part of the pairs, in the order of a content hash.
A batch is a few slices of memory-mapped arrays: consecutive pairs, so a shared file system sees sequential reads.
Each file is digested once a process, before its first pair is used. Reading a store needs neither torch nor a
tokenizer. The price: every epoch sees the pairs in the same order, and each file is read whole before it is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64

from embedscale.data.manifest import Manifest, ShardDigests
from embedscale.errors import UserError
from embedscale.files import digest_file


@dataclass
class PairBatch:
    """B pairs with k hard negatives each: S = B·(2 + k) sequences, T tokens in all.

    The order of the sequences: all queries, all positives, then the negatives of the first pair, of the second, …
    """

    tokens: np.ndarray  # int32 [T]
    lengths: np.ndarray  # int32 [S]
    texts: np.ndarray  # uint64 [S], content hashes
    pairs: int


def as_numpy(column: Any) -> np.ndarray:
    """Return the memory of an Arrow column without nulls, not copied.

    pyarrow's own `to_numpy` imports pandas, which would double the start-up time of a run.
    """
    return np.from_dlpack(column.combine_chunks() if hasattr(column, "combine_chunks") else column)


@dataclass
class Part:
    """The columns of one Arrow file, as views of the mapped memory. n is the number of pairs."""

    query: tuple[np.ndarray, np.ndarray]  # offsets [n + 1], tokens
    positive: tuple[np.ndarray, np.ndarray]
    negatives: tuple[np.ndarray, np.ndarray, np.ndarray]  # offsets [n + 1] of sequences, offsets of tokens, tokens
    query_text: np.ndarray  # uint64 [n], content hashes
    positive_text: np.ndarray  # uint64 [n]
    negative_text: np.ndarray  # uint64, one for each negative

    @classmethod
    def open(cls, path: Path, pairs: int) -> "Part":
        """Map a file of `pairs` pairs. Raises UserError if it is damaged or holds another number of pairs.

        The number is checked because a store may have been copied in part.
        """
        import pyarrow

        try:
            with pyarrow.memory_map(str(path)) as file:
                table = pyarrow.ipc.open_file(file).get_batch(0)
            table.validate()
            if len(table) != pairs:
                raise pyarrow.ArrowInvalid
        except (OSError, pyarrow.ArrowException):
            raise _damaged(path) from None

        def lists(name: str) -> tuple[np.ndarray, Any]:
            column = table.column(name)
            return as_numpy(column.offsets), column.values

        def tokens(name: str) -> tuple[np.ndarray, np.ndarray]:
            offsets, values = lists(name)
            return offsets, as_numpy(values)

        outer, inner = lists("negatives")
        return cls(
            query=tokens("query"),
            positive=tokens("positive"),
            negatives=(outer, as_numpy(inner.offsets), as_numpy(inner.values)),
            query_text=as_numpy(table.column("query_text")),
            positive_text=as_numpy(table.column("positive_text")),
            negative_text=as_numpy(lists("negative_text")[1]),
        )

    def counts(self, hard_negatives: int) -> np.ndarray:
        """Return the tokens of each pair with its first `hard_negatives` negatives, int32 [n]."""
        total = np.diff(self.query[0]) + np.diff(self.positive[0])
        if hard_negatives:
            outer, inner, _ = self.negatives
            total = total + inner[outer[:-1] + hard_negatives] - inner[outer[:-1]]
        return total.astype(np.int32)

    def lengths_digest(self) -> str:
        """Return a digest of all that `counts` uses."""
        digest = xxh3_64()
        for offsets in (self.query[0], self.positive[0], *self.negatives[:2]):
            digest.update(np.ascontiguousarray(offsets).data)
        return str(digest.hexdigest())

    def read(self, start: int, stop: int, hard_negatives: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return (tokens, lengths, text hashes) of the queries, of the positives and of the negatives.

        The pairs are start..stop of this file; without hard negatives, there is no third item.
        """
        found = []
        for (offsets, tokens), text in ((self.query, self.query_text), (self.positive, self.positive_text)):
            bounds = offsets[start : stop + 1]
            found.append((tokens[bounds[0] : bounds[-1]], np.diff(bounds), text[start:stop]))
        if hard_negatives:
            outer, inner, tokens = self.negatives
            kept = (outer[start:stop, None] + np.arange(hard_negatives)).reshape(-1)
            lengths = inner[kept + 1] - inner[kept]
            places = np.repeat(inner[kept] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
            found.append((tokens[places], lengths, self.negative_text[kept]))
        return found


def _damaged(path: Path) -> UserError:
    return UserError(f"data.store: {path} is missing or damaged; remove the store and prepare it again")


class PairStore:
    """A prepared corpus: `pairs` pairs for training in shuffled order, `held_out` pairs in an order of their own."""

    def __init__(self, folder: str | Path, manifest: Manifest):
        self.folder, self.manifest = Path(folder), manifest
        self.digest = manifest.digest
        self.context = manifest.context
        self.tokenizer_digest = manifest.tokenizer.digest
        self.added = manifest.added
        self.vocabulary = manifest.vocabulary  # rows that an embedding table needs
        self.negatives = manifest.negatives  # every pair has at least this many
        self.pairs = manifest.pairs
        self.held_out = manifest.held_out

    @classmethod
    def open(cls, folder: str | Path) -> "PairStore":
        """Open a finished store. Raises UserError for any other folder.

        Each of its files is verified later, when it is first read or asked for by `verify`: that raises UserError too.
        """
        return cls(folder, Manifest.read_from(Path(folder)))

    def __getstate__(self) -> dict[str, Any]:
        """Send only the manifest to a loader worker, which maps the files itself."""
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["manifest"])  # type: ignore[misc]

    @cached_property
    def _training(self) -> "_Parts":
        digests = self.manifest.digests
        return _Parts(self.folder / "train", self.manifest.parts.train, None if digests is None else digests.train)

    @cached_property
    def _held_out(self) -> "_Parts":
        digests = self.manifest.digests
        known = None if digests is None else digests.held_out
        return _Parts(self.folder / "held_out", self.manifest.parts.held_out, known)

    def verify(self, start: int, stop: int) -> None:
        """Read every file that holds one of the training pairs start..stop, as in `batch`, at the disk's speed.

        Raises UserError, naming the file, if one has changed since it was prepared.
        """
        for first, last in self._ranges(start, stop):
            self._training.verify(first, last)

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        while start < stop:
            first = start % self.pairs
            last = min(first + stop - start, self.pairs)
            yield first, last
            start += last - first

    def token_counts(self, hard_negatives: int = 0) -> np.ndarray:
        """Return the number of tokens of every training pair in stored order, int32 [pairs]."""
        parts = [part.counts(hard_negatives) for part in self._training.counted()]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def negative_counts(self) -> np.ndarray:
        """Return how many training pairs have 0, 1, 2, … hard negatives."""
        return np.bincount(np.concatenate([np.diff(part.negatives[0]) for part in self._training.counted()]))

    def batch(self, start: int, stop: int, hard_negatives: int = 0) -> PairBatch:
        """Return the training pairs start..stop in stored order; after the last pair comes the first again."""
        found = []
        for first, last in self._ranges(start, stop):
            found += self._training.read(first, last, hard_negatives)
        return _batch(found)

    def held_out_batch(self, start: int, stop: int) -> PairBatch:
        """Return the held-out pairs start..stop, with 0 <= start < stop <= held_out."""
        return _batch(self._held_out.read(start, stop, 0))


class _Parts:
    """Consecutive Arrow files of the given sizes (pairs), each mapped and verified when it is first read."""

    def __init__(self, folder: Path, sizes: list[int], digests: ShardDigests | None):
        self.folder, self.sizes, self.digests = folder, sizes, digests
        self.ends = np.cumsum(sizes, dtype=np.int64)
        self.open: dict[int, Part] = {}
        self.whole: set[int] = set()  # numbers of the files whose every byte was verified

    def part(self, number: int) -> Part:
        """Return a file of which every byte was verified."""
        if self.digests is not None and number not in self.whole:
            path = part_file(self.folder, number)
            try:
                found = digest_file(path)
            except OSError:
                raise _damaged(path) from None
            if found != self.digests.files[number]:
                raise _damaged(path)
            self.whole.add(number)
        return self._opened(number)

    def _opened(self, number: int) -> Part:
        """Return a file whose token counts were verified."""
        if number not in self.open:
            path = part_file(self.folder, number)
            part = Part.open(path, self.sizes[number])
            if self.digests is not None and part.lengths_digest() != self.digests.lengths[number]:
                raise _damaged(path)
            self.open[number] = part
        return self.open[number]

    def counted(self) -> list[Part]:
        """Return the files that hold pairs, of which the token counts may be used."""
        return [self._opened(number) for number, size in enumerate(self.sizes) if size]

    def verify(self, start: int, stop: int) -> None:
        for number, begin, end in zip(range(len(self.sizes)), self.ends - self.sizes, self.ends, strict=True):
            if max(start, begin) < min(stop, end):
                self.part(number)

    def read(self, start: int, stop: int, hard_negatives: int) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        found = []
        number = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[number]) - self.sizes[number]
            last = min(stop, int(self.ends[number]))
            if last > start:
                found.append(self.part(number).read(start - begin, last - begin, hard_negatives))
            start, number = last, number + 1
        return found


def part_file(folder: Path, number: int) -> Path:
    """Return the path of a store's file by its number."""
    return folder / f"{number:05d}.arrow"


def _batch(parts: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]) -> PairBatch:
    pieces = [piece for kind in zip(*parts, strict=True) for piece in kind]
    tokens, lengths, texts = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return PairBatch(tokens.astype(np.int32), lengths.astype(np.int32), texts, sum(len(part[0][1]) for part in parts))
