"""`prepare`: text pairs into a `PairStore`; an interrupted call continues where it stopped.

Everything is checked before the work starts: settings, tokenizer, and the first pair of every source. Then two passes
(`buckets`) run on all cores (`workers`), and the manifest is written last. Unfinished work lies in the store's folder
`work`, which is removed at the end. A lease keeps a second process away.
"""

import hashlib
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embedscale.data import buckets
from embedscale.data.buckets import BUCKET_BYTES, Bucket, PartFacts, Work, buckets_for
from embedscale.data.corpora import UNIT_SIZE, Unit, UnitSize, check_files, read, units_of
from embedscale.data.manifest import FILE as MANIFEST_FILE
from embedscale.data.manifest import (
    AddedTokens,
    Manifest,
    PartSizes,
    ShardDigests,
    SourceCounts,
    StoreDigests,
    StoredTokenizer,
    TokenStatistics,
    describe,
    is_finished,
)
from embedscale.data.store import PairStore
from embedscale.data.tokens import added_tokens_of, load_tokenizer, tokenizer_of, vocabulary
from embedscale.data.workers import in_parallel, worker_pool
from embedscale.errors import DONE, FAILED, UserError
from embedscale.files import read_json, remove_half_written, write_json
from embedscale.run.config import Data, RunConfig, Source
from embedscale.run.directory import LEASE
from embedscale.run.lease import lease_holder, leased
from embedscale.run.stop import StopRequest


def prepare(config: RunConfig, unit_size: UnitSize = UNIT_SIZE, bucket_bytes: int = BUCKET_BYTES) -> int:
    """Make the store that `config.data` describes, continue with it, or report that it is finished.

    `unit_size` and `bucket_bytes` change memory and speed, not the store. Returns DONE, or FAILED if a worker process
    was killed. Raises UserError for sources that cannot be read or yield no pair, for a folder with other settings,
    and if another process is writing the same store; KeyboardInterrupt if SIGINT or SIGTERM came.
    """
    data, folder = config.data, Path(config.data.store)
    _check_sources(data.sources)
    name, revision = tokenizer_of(config)
    tokenizer, digest = load_tokenizer(name, revision)
    added = added_tokens_of(config, tokenizer)
    if data.special_tokens == "auto" and is_finished(folder):  # a store of an earlier version stays as it is
        added = PairStore.open(folder).added
    settings = _settings(data, digest, added)
    if _report_finished(config, settings):
        _remove_work(folder)
        return DONE
    units = [unit for number, source in enumerate(data.sources) for unit in units_of(number, source, unit_size)]
    _check_first_pairs(data.sources, units, unit_size)
    begun = _continued(
        folder,
        {
            "settings": settings,
            "units": hashlib.sha256(repr(units).encode()).hexdigest()[:16],
            "buckets": buckets_for(sum(unit.size for unit in units), bucket_bytes),
        },
    )
    made = _make_folder(folder)
    symbols = vocabulary(tokenizer)
    work = Work(
        folder=folder,
        data=data,
        tokenizer=(name, revision),
        token=np.uint16 if symbols <= 2**16 else np.uint32,
        units=len(units),
        buckets=begun["buckets"],
        unit_size=unit_size,
        added=added,
    )
    try:
        with _only_writer(folder) as stop:
            if _report_finished(config, settings):  # another process finished it while this one listed the files
                return DONE
            write_json(folder / "work" / "settings.json", begun)
            remove_half_written(folder)
            with _undone_by_errors(folder, made):
                start = time.monotonic()
                counts, parts = _both_passes(work, units, stop)
                seconds = round(time.monotonic() - start, 1)
                manifest = manifest_of(settings, StoredTokenizer(name, digest), symbols, data, counts, parts, seconds)
                manifest.write_to(folder)
    except BrokenProcessPool:
        print(
            "embedscale: a worker process was killed, perhaps for lack of memory; run again to continue",
            file=sys.stderr,
        )
        return FAILED
    rate = manifest.rows_read / max(seconds, 0.1)
    print(f"{folder}: {manifest.summary()}; {seconds:.0f} s, {rate:,.0f} pairs a second")
    if any(source.negative for source in data.sources):
        _say_negatives(PairStore.open(folder))
    _say_too_few(manifest, config)
    return DONE


def _say_too_few(manifest: Manifest, config: RunConfig) -> None:
    """Say so if a run of this configuration cannot use the store, because it needs more held-out pairs."""
    if too_few := manifest.too_few_for(config):
        print(f"embedscale: a run will be refused: {too_few}", file=sys.stderr)


def _say_negatives(store: PairStore) -> None:
    """Say how many pairs have how many hard negatives, if not all have equally many."""
    counts = store.negative_counts()
    found = np.flatnonzero(counts)
    if len(found) > 1:
        said = ", ".join(f"{number}: {counts[number]:,}" for number in found)
        print(
            f"Training pairs by their number of hard negatives: {said}. A run can use {found[0]} of each pair; "
            f"data.sources.least_negatives={found[-1]} would leave out the pairs with fewer than {found[-1]}."
        )


@contextmanager
def _only_writer(folder: Path) -> Iterator[StopRequest]:
    """Hold the store's lease, and turn SIGINT, SIGTERM and SIGHUP into the request to stop that this yields.

    An error while a stop is requested becomes a KeyboardInterrupt: the signal reaches the workers too, and breaks the
    pool. If the store is finished at the end, the work folder is removed.
    """
    # A flag instead of an exception: an exception may be lost in a destructor, and a second Ctrl-C, raised while the
    # pool waits for its workers, would leave this process waiting for ever.
    stop = StopRequest()

    def interrupt(number: int, frame: object) -> None:
        stop.request(signal.Signals(number).name)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored by nohup
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        with leased(_lease(folder), lambda: stop.request("another process has taken over the store")):
            yield stop
    except UserError:
        raise
    except Exception:
        if stop.requested:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if is_finished(folder):
            _remove_work(folder)


def _report_finished(config: RunConfig, settings: dict[str, Any]) -> bool:
    """Return whether the store is finished, and report it. Raises UserError if it was made with other settings."""
    folder = Path(config.data.store)
    if not is_finished(folder):
        return False
    manifest = Manifest.read_from(folder)
    _require_equal(folder, manifest.settings, settings)
    if manifest.digests is None:
        with suppress(PermissionError):  # a store that can only be read stays as it is
            buckets.with_digests(folder, manifest).write_to(folder)
    print(f"{folder} is there: {manifest.summary()}")
    _say_too_few(manifest, config)
    return True


def _lease(folder: Path) -> Path:
    """Return the path of the store's lease."""
    return folder / "work" / LEASE


def _remove_work(folder: Path) -> None:
    """Remove the temporary files of a finished store, unless another process holds the lease."""
    if lease_holder(_lease(folder)) is None:
        shutil.rmtree(folder / "work", ignore_errors=True)


def _check_sources(sources: list[Source]) -> None:
    if not sources:
        raise UserError("data.sources: nothing is given; list one corpus or more")
    weights = [source.weight for source in sources]
    if None in weights and any(weights):
        raise UserError("data.sources.weight: some sources have a weight and some do not; give all or none")


def _check_first_pairs(sources: list[Source], units: list[Unit], unit_size: UnitSize) -> None:
    """Read the first row of each file and the first pair of each source.

    So a wrong file is reported now, and not after hours of work. Files without rows are counted.
    """
    for number, source in enumerate(sources):
        counts: Counter[str] = Counter()
        own = [unit for unit in units if unit.source == number]
        files, empty = check_files(own, source, unit_size)
        if 0 < empty < files:
            print(f"data.sources[{number}]: {empty} of {files} files hold no row", file=sys.stderr)
        if not any(True for unit in own for _ in read(unit, source, counts, unit_size)):
            name = source.path or source.kind
            raise UserError(f"data.sources[{number}]: {name} yields no pair ({describe(counts) or 'nothing read'})")


def _settings(data: Data, tokenizer: str, added: AddedTokens) -> dict[str, Any]:
    """Return all settings that decide the store's content, by the names of their fields."""
    settings: dict[str, Any] = {"context": data.context, "held_out": data.held_out, "tokenizer": tokenizer}
    if added:
        settings["special_tokens"] = [list(added.before), list(added.after)]
    for number, source in enumerate(data.sources):
        settings |= {f"sources[{number}].{name}": value for name, value in asdict(source).items()}
    return settings


def _require_equal(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    for key in asked | there:
        if there.get(key) != asked.get(key):
            raise UserError(
                f"data.{key}: {folder} was made with {there.get(key)!r}, not {asked.get(key)!r}; name another store"
            )


def _continued(folder: Path, begun: dict[str, Any]) -> dict[str, Any]:
    """Return what an unfinished store in the folder was begun with, or `begun` if there is none.

    Raises UserError if its settings or files differ from those of `begun`. Its number of buckets may differ.
    """
    before = read_json(folder / "work" / "settings.json")
    if before is None:
        return begun
    _require_equal(folder, before["settings"], begun["settings"])
    if before["units"] != begun["units"]:
        raise UserError(f"data.sources: the files have changed since {folder} was begun; remove it to start again")
    return begun | before


def _make_folder(folder: Path) -> list[Path]:
    """Make the folder and its parts, or accept those of an unfinished store. Returns the folders made."""
    parts = {"work", "train", "held_out"}
    # A manifest too: another process may have begun, or even finished, this store since the first look.
    if folder.exists() and not (folder.is_dir() and _names(folder) <= parts | {MANIFEST_FILE}):
        raise UserError(f"data.store: {folder} holds other files; name an empty or a new folder")
    made = [path for path in (*reversed(folder.parents), folder) if not path.exists()]
    try:
        for name in parts:
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.store: {folder} cannot be made ({error.strerror})") from None
    return made


def _names(folder: Path) -> set[str]:
    """Return the names in a folder, without files that are being written."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".partial")}


@contextmanager
def _undone_by_errors(folder: Path, made: list[Path]) -> Iterator[None]:
    """Remove the folders in `made` after a UserError that came before any unit was finished, and after `NoPairs`.

    Finished units are kept: what was wrong with another file may be mended. Parent folders are removed only if they are
    empty.
    """
    try:
        yield
    except UserError as error:
        worthless = isinstance(error, NoPairs) or not any((folder / "work").glob("unit-*.json"))
        if made and worthless and not is_finished(folder):
            shutil.rmtree(made[-1], ignore_errors=True)
            with suppress(OSError):
                for path in reversed(made[:-1]):
                    path.rmdir()
        raise


class NoPairs(UserError):
    """All sources were read, and no store can be made of them."""


def _both_passes(work: Work, units: list[Unit], stop: StopRequest) -> tuple[list[Counter[str]], list[Bucket]]:
    """Run both passes. Returns the counted rows of each source, and the buckets in order."""
    counts: list[Counter[str]] = [Counter() for _ in work.data.sources]
    shares = [1.0] * len(work.data.sources)
    numbers = list(range(work.buckets))
    with worker_pool(buckets.__name__) as pool:
        spill = partial(buckets.spill, work=work)
        for (_, unit), found in in_parallel(pool, "tokenising", spill, list(enumerate(units)), stop):
            counts[unit.source] += found
        if work.data.sources[0].weight is not None:
            counted = in_parallel(pool, "counting", partial(buckets.distinct, work=work), numbers, stop)
            distinct = np.sum([found for _, found in counted], axis=0)
            shares = _shares([source.weight or 1.0 for source in work.data.sources], distinct)
        gather = partial(buckets.gather, work=work, shares=shares)
        gathered = dict(in_parallel(pool, "shuffling", gather, numbers, stop))
    parts = [gathered[number] for number in numbers]
    if not sum(part.train.pairs for part in parts):
        read = describe(sum(counts, Counter())) or "nothing read"
        raise NoPairs(f"data.sources: they yield no training pair ({read})")
    return counts, parts


def _shares(weights: list[float], distinct: np.ndarray) -> list[float]:
    """Return the part of each source's distinct pairs to keep: the mixture follows `weights` and is as large as it can.

    The source that is smallest for its weight is kept whole.
    """
    if not distinct.all():
        raise NoPairs(
            f"data.sources[{distinct.argmin()}].weight: no pair of this source is left for the mixture; its pairs are "
            "empty or repeat those of earlier sources"
        )
    supply = distinct / np.array(weights)
    return (supply.min() / supply).tolist()


def manifest_of(
    settings: dict[str, Any],
    tokenizer: StoredTokenizer,
    symbols: int,
    data: Data,
    counts: list[Counter[str]],
    parts: list[Bucket],
    seconds: float,
) -> Manifest:
    """Describe a finished store. `counts` are the rows of each source as the first pass counted them."""
    for number, found in enumerate(counts):
        found["duplicate"] += sum(part.duplicate[number] for part in parts)
        found["left_out"] += sum(part.left_out[number] for part in parts)
        found["kept"] = found["read"] - sum(n for reason, n in found.items() if reason != "read")
    total = sum(counts, Counter())
    train, held_out = [part.train for part in parts], [part.held_out for part in parts]
    pairs = sum(part.pairs for part in train)
    queries, positives = sum(part.query_tokens for part in train), sum(part.positive_tokens for part in train)
    content = "".join(part.digest for part in (*train, *held_out))
    return Manifest(
        digest=buckets.digest_of_store(content),
        pairs=pairs,
        held_out=sum(part.pairs for part in held_out),
        negatives=min((part.negatives for part in (*train, *held_out) if part.negatives is not None), default=0),
        tokens=TokenStatistics(
            training=queries + positives,
            mean_query=round(queries / pairs, 3),
            mean_positive=round(positives / pairs, 3),
            longest_query=max(part.longest_query for part in train),
            longest_positive=max(part.longest_positive for part in train),
        ),
        tokenizer=tokenizer,
        vocabulary=symbols,
        rows_read=total["read"],
        counts=dict(total),
        sources=[
            SourceCounts(source.kind, source.path, dict(found))
            for source, found in zip(data.sources, counts, strict=True)
        ],
        parts=PartSizes([part.pairs for part in train], [part.pairs for part in held_out]),
        settings=settings,
        seconds=seconds,
        digests=StoreDigests(*(_digests(part) for part in (train, held_out))),
    )


def _digests(parts: list[PartFacts]) -> ShardDigests:
    return ShardDigests([part.file_digest for part in parts], [part.lengths_digest for part in parts])
