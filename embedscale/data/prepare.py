"""Text pairs into a PairStore, in two passes of bounded memory that go on where they were interrupted.

The first pass reads and tokenises unit by unit, on all cores, and spills each unit's pairs into buckets by a hash of
their texts. The second takes a bucket at a time: equal pairs now lie side by side and one stays; the order of the
hash is the shuffle, uniform, and the same on every machine; a hash of the query alone holds pairs out. Neither pass
needs to know how large the corpus is. The price is disk: while it is made, a store takes twice its room.
"""

import gc
import hashlib
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from embedscale.data.corpora import Pair, Unit, Unreadable, read, units_of
from embedscale.data.store import FORMAT, PairStore, as_numpy, part_file
from embedscale.data.tokens import load_tokenizer, mixed, pair_hashes, schema, tokenised, vocabulary
from embedscale.data.tokens import tokenizer_digest as tokenizer_digest
from embedscale.errors import DONE, FAILED, UserError
from embedscale.files import read_json, write_atomically, write_json
from embedscale.run.config import Data, RunConfig, Source
from embedscale.run.lease import Lease, lease_holder
from embedscale.run.stop import StopRequest, end_with_parent

BUCKET_BYTES = 16 * 2**20  # of source text
MOST_BUCKETS = 1024
SPILL_PAIRS = 16384
SPILL_CHARACTERS = 16 * 2**20
LOOK_SECONDS = 0.2  # for a request to stop


@dataclass(frozen=True)
class Work:
    """What a worker needs to know of the store that is made."""

    folder: Path
    data: Data
    tokenizer: tuple[str, str | None]  # name and revision
    token: Any  # NumPy type of an id
    units: int
    buckets: int  # a power of two

    def unit(self, number: int, ending: str) -> Path:
        return self.folder / "work" / f"unit-{number:06d}.{ending}"

    def bucket(self, number: int) -> Path:
        return self.folder / "work" / f"bucket-{number:05d}.json"


def prepare(config: RunConfig) -> int:
    """Write the store that `config.data` describes, go on with it, or say that it is there.

    Raises UserError for sources that cannot be read or yield no pair, for a folder of other settings, and where
    another process is writing the same store.
    """
    data, folder = config.data, Path(config.data.store)
    _check_sources(data.sources)
    name, revision = (data.tokenizer, None) if data.tokenizer else (config.backbone.name, config.backbone.revision)
    tokenizer, digest = load_tokenizer(name, revision)
    settings = _settings(data, digest)
    if _is_there(folder, settings):
        _clear(folder)
        return DONE
    units = [unit for number, source in enumerate(data.sources) for unit in units_of(number, source)]
    _refuse_barren(data.sources, units)
    begun = {"settings": settings, "units": hashlib.sha256(repr(units).encode()).hexdigest()[:16]}
    made = _make_folder(folder, begun)
    size = sum(unit.size for unit in units)
    buckets = 1 << min(max(size // BUCKET_BYTES, 1).bit_length(), MOST_BUCKETS.bit_length() - 1)
    token = np.uint16 if vocabulary(tokenizer) <= 2**16 else np.uint32
    work = Work(folder, data, (name, revision), token, len(units), buckets)
    # A flag that the wait for the workers looks at: an exception may be lost in a destructor, and a second Ctrl-C,
    # raised while the pool waits for its workers, would leave it waiting for ever.
    stop = StopRequest()

    def interrupt(number: int, frame: object) -> None:
        stop.request(signal.Signals(number).name)

    # Where another process has taken the store over, this one ends as if it were asked to.
    lease = Lease(_lease(folder), lambda: stop.request("another process has taken the store over"))
    lease.take()
    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if _is_there(folder, settings):  # another process has ended it while this one listed the files
            return DONE
        write_json(folder / "work" / "settings.json", begun)
        for torn in folder.glob("*/.*.arrow.*.partial"):  # of a process that was killed
            torn.unlink()
        start = time.monotonic()
        counts, parts = _build(work, units, stop)
        seconds = round(time.monotonic() - start, 1)
        manifest = _manifest(settings, name, digest, vocabulary(tokenizer), data, counts, parts)
        write_json(folder / "manifest.json", manifest | {"seconds": seconds})
    except Unreadable:
        raise  # and what was done until then is kept: on a file server, the next try may find it whole
    except UserError:
        if not (folder / "manifest.json").exists():
            _unmake(made)
        raise
    except Exception as error:
        if stop.requested:  # by a signal that the pool's processes got too, which broke it
            raise KeyboardInterrupt from None
        if not isinstance(error, BrokenProcessPool):
            raise
        print(
            "embedscale: a worker process was killed, perhaps for lack of memory; run again to go on", file=sys.stderr
        )
        return FAILED
    finally:
        lease.release()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if (folder / "manifest.json").exists():
            _clear(folder)
    rate = manifest["read"] / max(seconds, 0.1)
    print(f"{folder}: {_summary(manifest)}; {seconds:.0f} s, {rate:,.0f} pairs a second")
    return DONE


def _is_there(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the store is finished; then say so. Raises UserError where it is another one."""
    if not (folder / "manifest.json").exists():
        return False
    manifest = PairStore.open(folder).manifest
    _refuse_other_settings(folder, manifest["settings"], settings)
    print(f"{folder} is there: {_summary(manifest)}")
    return True


def _lease(folder: Path) -> Path:
    return folder / "work" / "lease.json"


def _clear(folder: Path) -> None:
    """Remove what a finished store was made from, but under no other process, which may just look whether it is."""
    if lease_holder(_lease(folder)) is None:
        shutil.rmtree(folder / "work", ignore_errors=True)


def _check_sources(sources: list[Source]) -> None:
    if not sources:
        raise UserError("data.sources: nothing is given; name at least one corpus")
    weights = [source.weight for source in sources]
    if None in weights and any(weights):
        raise UserError("data.sources.weight: some sources have one and some have none; give all or none")


def _refuse_barren(sources: list[Source], units: list[Unit]) -> None:
    """Read the first pair of each source: what is wrong with one is told now, not after hours with those before it."""
    for number, source in enumerate(sources):
        counts: Counter[str] = Counter()
        own = (unit for unit in units if unit.source == number)
        if not any(True for unit in own for _ in read(unit, source, counts)):
            name = source.path or source.kind
            raise UserError(f"data.sources[{number}]: {name} yields no pair ({_reasons(counts)})")


def _settings(data: Data, tokenizer: str) -> dict[str, Any]:
    """All that decides the store's content, by the names of the fields."""
    settings = {"context": data.context, "held_out": data.held_out, "tokenizer": tokenizer}
    for number, source in enumerate(data.sources):
        settings |= {f"sources[{number}].{name}": value for name, value in asdict(source).items()}
    return settings


def _refuse_other_settings(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    for key in asked | there:
        if there.get(key) != asked.get(key):
            raise UserError(
                f"data.{key}: {folder} was made with {there.get(key)!r}, not {asked.get(key)!r}; name another store"
            )


def _make_folder(folder: Path, begun: dict[str, Any]) -> list[Path]:
    """Make the folder, or find the unfinished one of the same settings and files. Returns what was newly made."""
    before = read_json(folder / "work" / "settings.json")
    if before is not None:
        _refuse_other_settings(folder, before["settings"], begun["settings"])
        if before["units"] != begun["units"]:
            raise UserError(f"data.sources: the files have changed since {folder} was begun; remove it to start again")
    parts = {"work", "train", "held_out"}
    # Another process may have begun, or even ended, this store since the first look at it.
    ours = parts | {"manifest.json"}
    if folder.exists() and not (folder.is_dir() and _names(folder) <= ours):
        raise UserError(f"data.store: {folder} holds other files; name an empty or a new folder")
    made = [path for path in (*reversed(folder.parents), folder) if not path.exists()]
    try:
        for name in parts:
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.store: {folder} cannot be made ({error.strerror})") from None
    return made


def _names(folder: Path) -> set[str]:
    """What lies in the folder, but files that are being written."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".partial")}


def _unmake(made: list[Path]) -> None:
    """A wrong command leaves nothing behind, and nothing of others is taken: parents go only where they are empty."""
    if made:
        shutil.rmtree(made[-1], ignore_errors=True)
        with suppress(OSError):
            for path in reversed(made[:-1]):
                path.rmdir()


def _build(work: Work, units: list[Unit], stop: StopRequest) -> tuple[list[Counter[str]], list[dict[str, Any]]]:
    """Both passes. Returns what was read of each source, and what each bucket became."""
    counts: list[Counter[str]] = [Counter() for _ in work.data.sources]
    shares = [1.0] * len(work.data.sources)
    buckets = list(range(work.buckets))
    workers = get_context("forkserver")  # a fork of this process would inherit the locks of its threads
    workers.set_forkserver_preload([__name__])
    _start_server()
    ended = workers.Event()
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, workers, _begin_worker, (ended,)) as pool, ExitStack() as leaving:
        leaving.callback(ended.set)  # before the pool waits for its workers
        for unit, found in _in_parallel(pool, "tokenising", partial(_spill, work=work), list(enumerate(units)), stop):
            counts[unit[1].source] += found
        if work.data.sources[0].weight is not None:
            counted = _in_parallel(pool, "counting", partial(_distinct, work=work), buckets, stop)
            distinct = [found for _, found in counted]
            shares = _shares([source.weight or 1.0 for source in work.data.sources], np.sum(distinct, axis=0))
        facts = dict(_in_parallel(pool, "shuffling", partial(_gather, work=work, shares=shares), buckets, stop))
    parts = [facts[bucket] for bucket in buckets]
    if not sum(part["train"]["pairs"] for part in parts):
        raise UserError(f"data.sources: they yield no training pair ({_reasons(sum(counts, Counter()))})")
    return counts, parts


def _shares(weights: list[float], distinct: np.ndarray) -> list[float]:
    """The part of each source's pairs to keep, so that the kept ones are as `weights` and one source is kept whole."""
    if not distinct.all():
        raise UserError(
            f"data.sources[{distinct.argmin()}].weight: no pair of this source is left for the mixture; they are empty "
            "or stand in the sources before it"
        )
    supply = distinct / np.array(weights)
    return (supply.min() / supply).tolist()


def _reasons(counts: Counter[str]) -> str:
    kinds = ("read", "empty", "duplicate", "not_utf8", "malformed", "left_out")
    return ", ".join(f"{counts[kind]:,} {kind.replace('_', ' ')}" for kind in kinds if counts[kind]) or "nothing read"


def _summary(manifest: dict[str, Any]) -> str:
    dropped = Counter({k: v for k, v in manifest["counts"].items() if k not in ("read", "kept")})
    said = f"; dropped: {_reasons(dropped)}" if dropped.total() else ""
    return (
        f"{manifest['pairs']:,} training and {manifest['held_out']:,} held-out pairs of {manifest['read']:,} read{said}"
    )


def _in_parallel(
    pool: ProcessPoolExecutor, what: str, work: Callable[[Any], Any], items: list[Any], stop: StopRequest
) -> Iterator[tuple[Any, Any]]:
    """(item, result) in the order of completion, with a few items under way at a time.

    Raises KeyboardInterrupt where a stop is requested meanwhile.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    waiting, running = iter(items), dict[Future[Any], Any]()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=len(items))
        try:
            while True:
                if stop.requested:
                    raise KeyboardInterrupt
                for item in islice(waiting, 2 * len(os.sched_getaffinity(0)) - len(running)):
                    running[pool.submit(work, item)] = item
                if not running:
                    return
                for done in wait(running, LOOK_SECONDS, FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
                    progress.advance(task)
        finally:
            for future in running:
                future.cancel()


def _start_server() -> None:
    """Start what forks the workers, deaf to Ctrl-C: it would end its imports with a traceback."""
    resource_tracker.ensure_running()  # which else is started below, and lets SIGINT through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_ended: Event  # of a worker's parent, set where it leaves the pool


def _begin_worker(ended: Event) -> None:
    """A worker is one of as many as there are cores, leaves Ctrl-C to its parent, and does not outlive it."""
    global _ended  # a task cannot be sent with it
    _ended = ended
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.disable()  # millions of small objects come and go, and none refer to each other in circles
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _spill(item: tuple[int, Unit], work: Work) -> Counter[str]:
    """Tokenise a unit's pairs into one file: a record batch for each bucket, and again for every SPILL_PAIRS."""
    import pyarrow

    number, unit = item
    done = read_json(work.unit(number, "json"))
    if done is not None:
        return Counter(done)
    counts: Counter[str] = Counter()
    tokenizer, _ = load_tokenizer(*work.tokenizer)
    whole = _spilled_schema(work)

    def write(file: Any) -> None:
        with pyarrow.ipc.new_file(file, whole) as writer:
            for pairs in _portions(read(unit, work.data.sources[unit.source], counts)):
                if _ended.is_set():  # a compressed file, one unit, may take hours more
                    raise KeyboardInterrupt
                columns = tokenised(pairs, tokenizer, work.data.context, work.token)
                hashes = pair_hashes(columns["query_text"], columns["positive_text"])
                counts["empty"] += len(pairs) - len(hashes)
                columns |= {"pair": hashes, "source": np.full(len(hashes), unit.source, np.uint16)}
                for batch in _bucketed(pyarrow.record_batch(columns, schema=whole), hashes, work.buckets):
                    writer.write_batch(batch)

    write_atomically(work.unit(number, "arrow"), write)
    write_json(work.unit(number, "json"), dict(counts))
    return counts


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


def _bucketed(batch: Any, hashes: np.ndarray, buckets: int) -> Iterator[Any]:
    """The rows of each bucket, which is the first bits of the pair's hash."""
    import pyarrow

    order = np.argsort(hashes, kind="stable")
    bounds = np.arange(1, buckets, dtype=np.uint64) << np.uint64(64 - (buckets.bit_length() - 1))
    ends = [0, *np.searchsorted(hashes[order], bounds).tolist(), len(hashes)]
    batch = batch.take(pyarrow.array(order))
    for start, end in pairwise(ends):
        yield batch.slice(start, end - start)


def _spilled(bucket: int, work: Work, columns: list[str]) -> tuple[Any, np.ndarray, np.ndarray]:
    """A bucket's table, the rows of its distinct pairs in the order of the hash, and those of their repetitions.

    Of equal pairs the first in the order of the sources counts.
    """
    import pyarrow

    batches = []
    for number in range(work.units):
        # Not mapped: a system maps 65,530 files a process, and a corpus may have more units.
        with pyarrow.OSFile(str(work.unit(number, "arrow"))) as file:
            reader = pyarrow.ipc.open_file(file)
            batches += [reader.get_batch(i) for i in range(bucket, reader.num_record_batches, work.buckets)]
    table = pyarrow.Table.from_batches(batches, schema=_spilled_schema(work)).select(columns)
    pair = as_numpy(table.column("pair"))
    order = np.argsort(pair, kind="stable")
    repeated = np.zeros(len(order), bool)
    repeated[1:] = pair[order][1:] == pair[order][:-1]
    return table, order[~repeated], order[repeated]


def _distinct(bucket: int, work: Work) -> list[int]:
    """The distinct pairs of each source."""
    table, rows, _ = _spilled(bucket, work, ["pair", "source"])
    return np.bincount(as_numpy(table.column("source"))[rows], minlength=len(work.data.sources)).tolist()


def _gather(bucket: int, work: Work, shares: list[float]) -> dict[str, Any]:
    """One bucket of all units: without duplicates, in the order of the hash, training and held-out pairs apart."""
    import pyarrow

    done = read_json(work.bucket(bucket))
    if done is not None:
        return dict(done)
    columns = schema(work.token)
    table, rows, repeated = _spilled(bucket, work, [*columns.names, "pair", "source"])
    pair, source = as_numpy(table.column("pair")), as_numpy(table.column("source"))
    # A second hash chooses, so that the chosen ones lie anywhere in the order of the first.
    chosen = _below(mixed(pair[rows]), np.array(shares)[source[rows]])
    facts: dict[str, Any] = {
        reason: np.bincount(source[dropped], minlength=len(shares)).tolist()
        for reason, dropped in (("duplicate", repeated), ("left_out", rows[~chosen]))
    }
    rows = rows[chosen]
    apart = _below(as_numpy(table.column("query_text"))[rows], work.data.held_out)
    for name, part in (("train", rows[~apart]), ("held_out", rows[apart])):
        batches = table.select(columns.names).take(pyarrow.array(part)).combine_chunks().to_batches()
        batch = batches[0] if batches else pyarrow.RecordBatch.from_pylist([], schema=columns)
        write_atomically(part_file(work.folder / name, bucket), partial(_write_batch, batch=batch))
        facts[name] = _statistics(batch, pair[part])
    write_json(work.bucket(bucket), facts)
    return facts


def _below(hashes: np.ndarray, share: Any) -> np.ndarray:
    """True for this share of uniform 64-bit hashes; for all where it is 1."""
    return (hashes >> np.uint64(11)) / 2.0**53 < share


def _write_batch(file: Any, batch: Any) -> None:
    import pyarrow

    with pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _statistics(batch: Any, hashes: np.ndarray) -> dict[str, Any]:
    # Digests of the smallest buckets that there could be: how many there are must not change the store's.
    smallest = hashes >> np.uint64(64 - (MOST_BUCKETS.bit_length() - 1))
    bounds = [0, *(np.flatnonzero(np.diff(smallest)) + 1).tolist(), len(batch)]
    digests = [_digest(batch.slice(start, end - start)) for start, end in pairwise(bounds) if start < end]
    lengths = {name: np.diff(as_numpy(batch.column(name).offsets)) for name in ("query", "positive", "negatives")}
    n = len(batch)
    return {
        "pairs": n,
        "digest": "".join(digests),
        "query_tokens": int(lengths["query"].sum()),
        "positive_tokens": int(lengths["positive"].sum()),
        "longest_query": int(lengths["query"].max()) if n else 0,
        "longest_positive": int(lengths["positive"].max()) if n else 0,
        "negatives": int(lengths["negatives"].min()) if n else None,
    }


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


def _manifest(
    settings: dict[str, Any],
    name: str,
    digest: str,
    symbols: int,
    data: Data,
    counts: list[Counter[str]],
    parts: list[dict[str, Any]],
) -> dict[str, Any]:
    for number, found in enumerate(counts):
        for reason in ("duplicate", "left_out"):
            found[reason] += sum(part[reason][number] for part in parts)
        found["kept"] = found["read"] - sum(n for reason, n in found.items() if reason != "read")
    total = sum(counts, Counter())
    train, apart = [part["train"] for part in parts], [part["held_out"] for part in parts]
    pairs = sum(part["pairs"] for part in train)
    queries, positives = (sum(part[f"{side}_tokens"] for part in train) for side in ("query", "positive"))
    content = "".join(part["digest"] for part in (*train, *apart))
    return {
        "format": FORMAT,
        "digest": hashlib.sha256(content.encode()).hexdigest()[:16],
        "pairs": pairs,
        "held_out": sum(part["pairs"] for part in apart),
        "negatives": min((p["negatives"] for p in (*train, *apart) if p["negatives"] is not None), default=0),
        "tokens": {
            "training": queries + positives,
            "mean_query": round(queries / pairs, 3),
            "mean_positive": round(positives / pairs, 3),
            "longest_query": max(part["longest_query"] for part in train),
            "longest_positive": max(part["longest_positive"] for part in train),
        },
        "tokenizer": {"name": name, "digest": digest},
        "vocabulary": symbols,
        "read": total["read"],
        "counts": dict(total),
        "sources": [
            {"kind": source.kind, "path": source.path, **found}
            for source, found in zip(data.sources, counts, strict=True)
        ],
        "parts": {"train": [part["pairs"] for part in train], "held_out": [part["pairs"] for part in apart]},
        "settings": settings,
    }
