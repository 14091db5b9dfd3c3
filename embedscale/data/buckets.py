"""The two passes of `prepare` over the pairs, in bounded memory, as functions that workers run.

`spill` tokenises one unit and writes its pairs into buckets by the first bits of a hash of their texts. `gather` reads
one bucket of all units: equal pairs are now side by side and one of them stays; the order of the hash is the shuffled
order, uniform and equal on every machine; a hash of the query alone selects the held-out pairs. Each function writes
its result to disk, and returns that result if it is there already and undamaged. The price: while a store is made, it
takes twice its final disk space.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from embedscale.data.corpora import Unit, UnitSize, read
from embedscale.data.manifest import NO_TOKENS, AddedTokens, Manifest, ShardDigests, StoreDigests
from embedscale.data.pair import Pair
from embedscale.data.store import Part, as_numpy, part_file
from embedscale.data.tokens import load_tokenizer, mixed, pair_hashes, schema, tokenised
from embedscale.data.workers import parent_leaves
from embedscale.errors import UserError
from embedscale.files import digest_file, write_digested
from embedscale.run.config import Data
from embedscale.values import Value

BUCKET_BYTES = 16 * 2**20  # source text in a bucket, about
MOST_BUCKETS = 1024
SPILL_PAIRS = 16384  # pairs tokenised together
SPILL_CHARACTERS = 16 * 2**20  # and their most characters


@dataclass(frozen=True)
class Work:
    """What a worker needs to know about the store being made."""

    folder: Path
    data: Data
    tokenizer: tuple[str, str | None]  # name and revision
    token: Any  # NumPy type of a token id
    units: int
    buckets: int  # a power of two
    unit_size: UnitSize
    added: AddedTokens = NO_TOKENS

    def unit_file(self, number: int, ending: str) -> Path:
        """Return the path of a unit's tokenised pairs ("arrow") or its counts ("json")."""
        return self.folder / "work" / f"unit-{number:06d}.{ending}"

    def bucket_file(self, number: int) -> Path:
        """Return the path of a finished bucket's `Bucket`."""
        return self.folder / "work" / f"bucket-{number:05d}.json"


@dataclass(frozen=True)
class Spilled(Value):
    """What became of the rows of one unit, and the digest of the file that holds its pairs."""

    counts: dict[str, int]
    digest: str


@dataclass(frozen=True)
class PartFacts:
    """What one file of the store holds. Lengths and sums are in tokens."""

    pairs: int
    digest: str
    query_tokens: int
    positive_tokens: int
    longest_query: int
    longest_positive: int
    negatives: int | None  # every pair has at least this many; None without pairs
    file_digest: str
    lengths_digest: str


@dataclass(frozen=True)
class Bucket(Value):
    """What became of one bucket: its two files, and the pairs of each source that were dropped."""

    duplicate: list[int]  # repeated pairs, by source
    left_out: list[int]  # pairs beyond a source's share in the mixture, by source
    train: PartFacts
    held_out: PartFacts


def buckets_for(text_bytes: int, bucket_bytes: int = BUCKET_BYTES) -> int:
    """Return the number of buckets for a corpus of this many bytes: a power of two, at least 2."""
    return 1 << min(max(text_bytes // bucket_bytes, 1).bit_length(), MOST_BUCKETS.bit_length() - 1)


def spill(item: tuple[int, Unit], work: Work) -> Counter[str]:
    """Tokenise the pairs of a unit into one file, and count its rows.

    The file is a series of record batches: one for each bucket, and again for every SPILL_PAIRS pairs.
    """
    import pyarrow

    number, unit = item
    path = work.unit_file(number, "arrow")
    done = Spilled.read(work.unit_file(number, "json"))
    if isinstance(done, Spilled) and _is(path, done.digest):
        return Counter(done.counts)
    counts: Counter[str] = Counter()
    tokenizer, _ = load_tokenizer(*work.tokenizer)
    columns_of_file = _spilled_schema(work)

    def write(file: Any) -> None:
        pairs_of_unit = read(unit, work.data.sources[unit.source], counts, work.unit_size)
        with pyarrow.ipc.new_file(file, columns_of_file) as writer:
            for pairs in _portions(pairs_of_unit):
                if parent_leaves():  # a compressed file is one unit, which may take hours more
                    raise KeyboardInterrupt
                columns = tokenised(pairs, tokenizer, work.data.context, work.token, work.added)
                hashes = pair_hashes(columns["query_text"], columns["positive_text"])
                counts["empty"] += len(pairs) - len(hashes)
                columns |= {"pair": hashes, "source": np.full(len(hashes), unit.source, np.uint16)}
                for batch in _divided(pyarrow.record_batch(columns, schema=columns_of_file), hashes, work.buckets):
                    writer.write_batch(batch)

    digest = write_digested(path, write)
    Spilled(dict(counts), digest).write(work.unit_file(number, "json"))
    return counts


def _is(path: Path, digest: str) -> bool:
    """Whether a file is there and has this digest."""
    try:
        return digest_file(path) == digest
    except OSError:
        return False


def distinct(bucket: int, work: Work) -> list[int]:
    """Count the distinct pairs of a bucket by source."""
    table, rows, _ = _spilled(bucket, work, ["pair", "source"])
    return np.bincount(as_numpy(table.column("source"))[rows], minlength=len(work.data.sources)).tolist()


def gather(bucket: int, work: Work, shares: list[float]) -> Bucket:
    """Write one bucket of all units as the store's files: distinct pairs in the order of their hash.

    `shares` is the part of each source's distinct pairs to keep.
    """
    import pyarrow

    done = Bucket.read(work.bucket_file(bucket))
    paths = [part_file(work.folder / name, bucket) for name in ("train", "held_out")]
    if isinstance(done, Bucket):  # else it is damaged, or of early code without digests
        parts = (done.train, done.held_out)
        if all(_is(path, part.file_digest) for path, part in zip(paths, parts, strict=True)):
            return done
    columns = schema(work.token)
    table, rows, repeated = _spilled(bucket, work, [*columns.names, "pair", "source"])
    pair, source = as_numpy(table.column("pair")), as_numpy(table.column("source"))
    # A second hash chooses, so that the chosen pairs are spread evenly over the order of the first hash.
    chosen = _below(mixed(pair[rows]), np.array(shares)[source[rows]])
    dropped = [np.bincount(source[some], minlength=len(shares)).tolist() for some in (repeated, rows[~chosen])]
    rows = rows[chosen]
    held_out = _below(as_numpy(table.column("query_text"))[rows], work.data.held_out)
    facts = []
    for path, part in zip(paths, (rows[~held_out], rows[held_out]), strict=True):
        batches = table.select(columns.names).take(pyarrow.array(part)).combine_chunks().to_batches()
        batch = batches[0] if batches else pyarrow.RecordBatch.from_pylist([], schema=columns)
        digest = write_digested(path, partial(_write_batch, batch=batch))
        facts.append(_facts(batch, pair[part], digest, Part.open(path, len(batch)).lengths_digest()))
    found = Bucket(*dropped, *facts)
    found.write(work.bucket_file(bucket))
    return found


def _spilled_schema(work: Work) -> Any:
    import pyarrow

    return schema(work.token, pair=pyarrow.uint64(), source=pyarrow.uint16())


def _portions(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    portion: list[Pair] = []
    characters = 0
    for pair in pairs:
        portion.append(pair)
        characters += len(pair.query) + len(pair.positive) + sum(map(len, pair.negatives))
        if len(portion) == SPILL_PAIRS or characters >= SPILL_CHARACTERS:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion


def _divided(batch: Any, hashes: np.ndarray, buckets: int) -> Iterator[Any]:
    """Yield the rows of each bucket in turn. A pair's bucket is the first bits of its hash."""
    import pyarrow

    order = np.argsort(hashes, kind="stable")
    bounds = np.arange(1, buckets, dtype=np.uint64) << np.uint64(64 - (buckets.bit_length() - 1))
    ends = [0, *np.searchsorted(hashes[order], bounds).tolist(), len(hashes)]
    batch = batch.take(pyarrow.array(order))
    for start, end in pairwise(ends):
        yield batch.slice(start, end - start)


def _spilled(bucket: int, work: Work, columns: list[str]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Read a bucket. Returns its table, the rows of its distinct pairs in hash order, and the repeated rows.

    Of equal pairs, the first in the order of the sources counts as the distinct one.
    """
    import pyarrow

    batches = []
    for number in range(work.units):
        # Not mapped: a process may map 65,530 files, and a corpus may have more units.
        with pyarrow.OSFile(str(work.unit_file(number, "arrow"))) as file:
            reader = pyarrow.ipc.open_file(file)
            batches += [reader.get_batch(i) for i in range(bucket, reader.num_record_batches, work.buckets)]
    table = pyarrow.Table.from_batches(batches, schema=_spilled_schema(work)).select(columns)
    pair = as_numpy(table.column("pair"))
    order = np.argsort(pair, kind="stable")
    repeated = np.zeros(len(order), bool)
    repeated[1:] = pair[order][1:] == pair[order][:-1]
    return table, order[~repeated], order[repeated]


def _below(hashes: np.ndarray, share: Any) -> np.ndarray:
    """Select this share of uniform 64-bit hashes: True for them, and for all hashes if the share is 1."""
    return (hashes >> np.uint64(11)) / 2.0**53 < share


def _write_batch(file: Any, batch: Any) -> None:
    import pyarrow

    with pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def content_digest(batch: Any, hashes: np.ndarray) -> str:
    """Return a digest of the tokens of a store's file; `hashes` are those of its pairs."""
    # The digest joins digests of the smallest possible buckets, so that it does not depend on the number of buckets.
    smallest = hashes >> np.uint64(64 - (MOST_BUCKETS.bit_length() - 1))
    bounds = [0, *(np.flatnonzero(np.diff(smallest)) + 1).tolist(), len(batch)]
    return "".join(_digest(batch.slice(start, end - start)) for start, end in pairwise(bounds) if start < end)


def _facts(batch: Any, hashes: np.ndarray, file_digest: str, lengths_digest: str) -> PartFacts:
    lengths = {name: np.diff(as_numpy(batch.column(name).offsets)) for name in ("query", "positive", "negatives")}
    n = len(batch)
    return PartFacts(
        pairs=n,
        digest=content_digest(batch, hashes),
        query_tokens=int(lengths["query"].sum()),
        positive_tokens=int(lengths["positive"].sum()),
        longest_query=int(lengths["query"].max()) if n else 0,
        longest_positive=int(lengths["positive"].max()) if n else 0,
        negatives=int(lengths["negatives"].min()) if n else None,
        file_digest=file_digest,
        lengths_digest=lengths_digest,
    )


def with_digests(folder: Path, manifest: Manifest) -> Manifest:
    """Return the manifest of a store of early code with digests of its files, whose content is checked by its digest.

    Raises UserError if the store is damaged.
    """
    import pyarrow

    content, found = "", []
    for name, sizes in (("train", manifest.parts.train), ("held_out", manifest.parts.held_out)):
        files, lengths = [], []
        for number, size in enumerate(sizes):
            path = part_file(folder / name, number)
            lengths.append(Part.open(path, size).lengths_digest())
            files.append(digest_file(path))
            with pyarrow.memory_map(str(path)) as file:
                batch = pyarrow.ipc.open_file(file).get_batch(0)
            texts = (as_numpy(batch.column(f"{text}_text")) for text in ("query", "positive"))
            content += content_digest(batch, pair_hashes(*texts))
        found.append(ShardDigests(files, lengths))
    if digest_of_store(content) != manifest.digest:
        raise UserError(f"data.store: {folder} is damaged: its content is not {manifest.digest}; prepare it again")
    return replace(manifest, digests=StoreDigests(*found))


def digest_of_store(content: str) -> str:
    """Return a store's digest, given those of its files' tokens one after the other."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _digest(batch: Any) -> str:
    sha = hashlib.sha256()
    for name in ("query", "positive", "negatives"):
        column = batch.column(name)
        sha.update(np.diff(as_numpy(column.offsets)).tobytes())
        if name == "negatives":
            column = column.flatten()
            sha.update(np.diff(as_numpy(column.offsets)).tobytes())
        sha.update(as_numpy(column.flatten()).tobytes())
    return sha.hexdigest()
