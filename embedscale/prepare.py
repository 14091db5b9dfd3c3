"""Text pairs into a PairStore, in two passes of bounded memory that go on where they were interrupted.

The first pass reads and tokenises unit by unit, on all cores, and spills each unit's pairs into buckets by a hash of
their texts. The second takes a bucket at a time: equal pairs now lie side by side and one stays; the order of the
hash is the shuffle, uniform, and the same on every machine; a hash of the query alone holds pairs out. Neither pass
needs to know how large the corpus is.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from embedscale.config import Data, RunConfig, Source
from embedscale.corpora import Pair, Unit, read, units_of
from embedscale.errors import DONE, UserError
from embedscale.pairs import FORMAT, part_file
from embedscale.record import read_json, write_atomically, write_json

BUCKET_BYTES = 32 * 2**20  # of source text
MOST_BUCKETS = 1024
SPILL_PAIRS = 16384
SPARE_TOKENS = 16  # beyond the context, so that cutting a long text early does not change the tokens that are kept


@lru_cache
def load_tokenizer(name: str) -> tuple[Any, str]:
    """The tokenizer of a hub name or folder, and a digest of all that decides its token ids.

    Raises UserError where there is no `tokenizer.json`.
    """
    from huggingface_hub import hf_hub_download
    from tokenizers import Tokenizer

    file = Path(name) / "tokenizer.json"
    if not Path(name).is_dir():
        try:
            file = Path(hf_hub_download(name, "tokenizer.json"))
        except Exception as error:  # the hub's client has a class of its own for each way of not finding a file
            reason = str(error).splitlines()[0]
            raise UserError(
                f"data.tokenizer: {name!r} is neither a local folder nor a model that the hub or its local cache has "
                f"({reason})"
            ) from None
    if not file.is_file():
        raise UserError(f"data.tokenizer: {name} holds no tokenizer.json; a fast tokenizer is needed")
    text = file.read_text("utf-8")
    values = json.loads(text)
    decisive = {key: values.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return Tokenizer.from_str(text), digest


def tokenizer_digest(name: str) -> str:
    return load_tokenizer(name)[1]


def prepare(config: RunConfig) -> int:
    """Write the store that `config.data` describes, go on with it, or say that it is there.

    Raises UserError for sources that cannot be read or yield no pair, and for a folder of other settings.
    """
    data, folder = config.data, Path(config.data.store)
    name = data.tokenizer or config.backbone.name
    if not data.sources:
        raise UserError("data.sources: nothing is given; name at least one corpus")
    weights = [source.weight for source in data.sources]
    if None in weights and any(weights):
        raise UserError("data.sources.weight: some sources have one and some have none; give all or none")
    tokenizer, digest = load_tokenizer(name)
    settings = {
        "context": data.context,
        "held_out": data.held_out,
        "tokenizer": digest,
        "sources": [asdict(source) for source in data.sources],
    }
    manifest = read_json(folder / "manifest.json")
    if manifest is not None:
        _refuse_other_settings(folder, manifest["settings"], settings)
        print(f"{folder} is there: {_summary(manifest)}")
        return DONE
    units = [unit for number, source in enumerate(data.sources) for unit in units_of(number, source)]
    work, fresh = folder / "work", not folder.exists()
    started = read_json(work / "settings.json")
    if started is not None:
        _refuse_other_settings(folder, started, settings)
    elif not fresh and any(folder.iterdir()):
        raise UserError(f"data.store: {folder} holds other files; name an empty or a new folder")
    begun = time.monotonic()
    try:
        for part in (work, folder / "train", folder / "held_out"):
            part.mkdir(parents=True, exist_ok=True)
        write_json(work / "settings.json", settings)
        size = sum(unit.size for unit in units)
        buckets = 1 << min(max(size // BUCKET_BYTES, 1).bit_length(), MOST_BUCKETS.bit_length() - 1)
        wide = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
        spill = partial(_spill, work=work, data=data, tokenizer=name, buckets=buckets, dtype=wide)
        counts: list[Counter[str]] = [Counter() for _ in data.sources]
        for unit, found in _in_parallel("tokenising", spill, list(enumerate(units))):
            counts[unit[1].source] += found
        shares = _shares(data.sources, counts)
        gather = partial(
            _gather,
            buckets=buckets,
            folder=folder,
            units=len(units),
            shares=shares,
            held_out=data.held_out,
            dtype=wide,
        )
        facts = dict(_in_parallel("shuffling", gather, list(range(buckets))))
        parts = [facts[bucket] for bucket in range(buckets)]
        if not sum(part["train"]["pairs"] for part in parts):
            found_all = sum(counts, Counter())
            raise UserError(f"data.sources: they yield no training pair ({_reasons(found_all)})")
    except UserError:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    manifest = _manifest(settings, name, digest, data, counts, parts)
    manifest["seconds"] = round(time.monotonic() - begun, 1)
    write_json(folder / "manifest.json", manifest)
    shutil.rmtree(work)
    rate = manifest["read"] / max(manifest["seconds"], 0.1)
    print(f"{folder}: {_summary(manifest)}; {manifest['seconds']:.0f} s, {rate:,.0f} pairs a second")
    return DONE


def _refuse_other_settings(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    for key, value in asked.items():
        if there.get(key) != value:
            raise UserError(f"data.{key}: {folder} was made with {there.get(key)!r}, not {value!r}; name another store")


def _reasons(counts: Counter[str]) -> str:
    kinds = ("read", "empty", "duplicate", "not_utf8", "malformed", "left_out")
    return ", ".join(f"{counts[kind]:,} {kind.replace('_', ' ')}" for kind in kinds if counts[kind]) or "nothing read"


def _summary(manifest: dict[str, Any]) -> str:
    dropped = Counter({k: v for k, v in manifest["counts"].items() if k != "read"})
    said = f"; dropped: {_reasons(dropped)}" if dropped.total() else ""
    return (
        f"{manifest['pairs']:,} training and {manifest['held_out']:,} held-out pairs of {manifest['read']:,} read{said}"
    )


def _in_parallel(what: str, work: Callable[[Any], Any], items: list[Any]) -> Iterator[tuple[Any, Any]]:
    """(item, result) in the order of completion, on all cores, with a few items under way at a time."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    cores = min(len(os.sched_getaffinity(0)), max(1, len(items)))
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ProcessPoolExecutor(cores, get_context("forkserver"), _alone) as pool,
    ):
        task = progress.add_task(what, total=len(items))
        waiting, running = iter(items), {}
        try:
            while True:
                for item in waiting:
                    running[pool.submit(work, item)] = item
                    if len(running) >= 2 * cores:
                        break
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
                    progress.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _alone() -> None:
    """A worker is one of as many as there are cores: its libraries need no threads of their own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """uint64, uniform, the same everywhere."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, dtype="<u8")


def mixed(x: np.ndarray) -> np.ndarray:
    """A second, independent hash of 64-bit hashes (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _spill(item: tuple[int, Unit], work: Path, data: Data, tokenizer: str, buckets: int, dtype: Any) -> Counter[str]:
    """Tokenise a unit's pairs into work/unit-N.arrow: one record batch a bucket, again for every SPILL_PAIRS."""
    import pyarrow

    number, unit = item
    path, tally = work / f"unit-{number:06d}.arrow", work / f"unit-{number:06d}.json"
    done = read_json(tally)
    if done is not None:
        return Counter(done)
    counts: Counter[str] = Counter()
    encoder, _ = load_tokenizer(tokenizer)
    encoder.enable_truncation(data.context)
    schema = _schema(dtype, pair=pyarrow.uint64(), source=pyarrow.uint8())

    def write(file: Any) -> None:
        with pyarrow.ipc.new_file(file, schema) as writer:
            for pairs in _portions(read(unit, data.sources[unit.source], counts)):
                for batch in _bucketed(_tokenised(pairs, encoder, data.context, counts, unit.source, dtype), buckets):
                    writer.write_batch(batch.select(schema.names))

    write_atomically(path, write)
    write_json(tally, dict(counts))
    return counts


def _portions(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    portion: list[Pair] = []
    for pair in pairs:
        portion.append(pair)
        if len(portion) == SPILL_PAIRS:
            yield portion
            portion = []
    if portion:
        yield portion


def _schema(dtype: Any, **more: Any) -> Any:
    import pyarrow

    token, text = pyarrow.from_numpy_dtype(dtype), pyarrow.uint64()
    columns = {
        "query": pyarrow.list_(token),
        "positive": pyarrow.list_(token),
        "negatives": pyarrow.list_(pyarrow.list_(token)),
        "query_text": text,
        "positive_text": text,
        "negative_text": pyarrow.list_(text),
    }
    return pyarrow.schema(list((columns | more).items()))


def _tokenised(
    pairs: list[Pair], encoder: Any, context: int, counts: Counter[str], source: int, dtype: Any
) -> dict[str, Any]:
    """Arrow columns of the pairs whose texts all have tokens."""
    import pyarrow

    owners = [i for i, pair in enumerate(pairs) for _ in pair.negatives]
    texts = [pair.query for pair in pairs] + [pair.positive for pair in pairs]
    texts += [negative for pair in pairs for negative in pair.negatives]
    longest = (context + SPARE_TOKENS) * max(map(len, encoder.get_vocab()))
    cut = [text[:longest] if text.strip() else "" for text in texts]
    ids = [encoding.ids for encoding in encoder.encode_batch_fast(cut, add_special_tokens=False)]
    hashes = text_hashes(texts)
    n = len(pairs)
    kept = np.array([bool(ids[i]) and bool(ids[n + i]) for i in range(n)])
    counts["empty"] += int(n - kept.sum())
    negatives: list[list[int]] = [[] for _ in pairs]
    for place, owner in enumerate(owners):
        if ids[2 * n + place]:
            negatives[owner].append(2 * n + place)
    which = np.flatnonzero(kept)

    def lists(rows: list[list[int]]) -> Any:
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int32)
        flat = np.fromiter((token for row in rows for token in row), dtype=dtype, count=int(offsets[-1]))
        return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))

    chosen = [negatives[i] for i in which]
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in chosen], dtype=np.int64)]).astype(np.int32)
    flat = [place for row in chosen for place in row]
    return {
        "query": lists([ids[i] for i in which]),
        "positive": lists([ids[n + i] for i in which]),
        "negatives": pyarrow.ListArray.from_arrays(pyarrow.array(bounds), lists([ids[place] for place in flat])),
        "query_text": hashes[which],
        "positive_text": hashes[n + which],
        "negative_text": pyarrow.ListArray.from_arrays(pyarrow.array(bounds), pyarrow.array(hashes[flat])),
        "pair": mixed(hashes[which] ^ mixed(hashes[n + which])),
        "source": np.full(len(which), source, np.uint8),
    }


def _bucketed(columns: dict[str, Any], buckets: int) -> Iterator[Any]:
    """A record batch for each bucket, the bucket being the first bits of the pair's hash."""
    import pyarrow

    batch = pyarrow.record_batch({name: pyarrow.array(column) for name, column in columns.items()})
    bits = buckets.bit_length() - 1
    bucket = columns["pair"] >> np.uint64(64 - bits) if bits else np.zeros(len(columns["pair"]), np.uint64)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(buckets), side="right")
    batch = batch.take(pyarrow.array(order))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield batch.slice(start, end - start)


def _shares(sources: list[Source], counts: list[Counter[str]]) -> list[float]:
    """The share of each source's pairs to keep, so that the mixture has the given weights."""
    if all(source.weight is None for source in sources):
        return [1.0] * len(sources)
    usable = [found["read"] - found["empty"] - found["not_utf8"] - found["malformed"] for found in counts]
    supply = [n / (source.weight or 1.0) for n, source in zip(usable, sources, strict=True)]
    return [min(supply) / own if own else 0.0 for own in supply]


def _gather(
    bucket: int, buckets: int, folder: Path, units: int, shares: list[float], held_out: float, dtype: Any
) -> dict[str, dict[str, Any]]:
    """One bucket of all units: without duplicates, in the order of the hash, training and held-out pairs apart."""
    import pyarrow

    work = folder / "work"
    done = read_json(work / f"bucket-{bucket:05d}.json")
    if done is not None:
        return dict(done)
    spilled = []
    for number in range(units):
        with pyarrow.memory_map(str(work / f"unit-{number:06d}.arrow")) as file:
            reader = pyarrow.ipc.open_file(file)
            spilled += [reader.get_batch(i) for i in range(bucket, reader.num_record_batches, buckets)]
    schema = _schema(dtype)
    full = _schema(dtype, pair=pyarrow.uint64(), source=pyarrow.uint8())
    table = pyarrow.Table.from_batches(spilled, schema=full)
    pair, source = table.column("pair").to_numpy(), table.column("source").to_numpy()
    order = np.argsort(pair, kind="stable")
    first = np.concatenate([[True], pair[order][1:] != pair[order][:-1]]) if len(order) else np.empty(0, bool)
    duplicates = np.bincount(source[order[~first]], minlength=len(shares))
    order = order[first]
    limit = np.array([min(share, 1.0) for share in shares])[source[order]]
    chosen = mixed(pair[order]) / 2.0**64 < limit
    left_out = np.bincount(source[order[~chosen]], minlength=len(shares))
    order = order[chosen]
    table = table.select(schema.names).take(pyarrow.array(order))
    apart = table.column("query_text").to_numpy() / 2.0**64 < held_out
    facts: dict[str, dict[str, Any]] = {
        "dropped": {"duplicate": duplicates.tolist(), "left_out": left_out.tolist()},
    }
    for name, mask in (("train", ~apart), ("held_out", apart)):
        chosen_rows = table.filter(pyarrow.array(mask)).combine_chunks()
        batches = chosen_rows.to_batches()
        batch = batches[0] if batches else pyarrow.RecordBatch.from_pylist([], schema=schema)
        write_atomically(part_file(folder / name, bucket), partial(_write_batch, batch=batch))
        facts[name] = _statistics(batch)
    write_json(work / f"bucket-{bucket:05d}.json", facts)
    return facts


def _write_batch(file: Any, batch: Any) -> None:
    import pyarrow

    with pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _statistics(batch: Any) -> dict[str, Any]:
    sha = hashlib.sha256()
    lengths = {}
    for name in ("query", "positive", "negatives"):
        column = batch.column(name)
        lengths[name] = np.diff(column.offsets.to_numpy())
        sha.update(lengths[name].tobytes())
        if name == "negatives":
            sha.update(np.diff(column.flatten().offsets.to_numpy()).tobytes())
            column = column.flatten()
        sha.update(column.flatten().to_numpy().tobytes())
    n = len(batch)
    return {
        "pairs": n,
        "digest": sha.hexdigest(),
        "query_tokens": int(lengths["query"].sum()),
        "positive_tokens": int(lengths["positive"].sum()),
        "longest_query": int(lengths["query"].max()) if n else 0,
        "longest_positive": int(lengths["positive"].max()) if n else 0,
        "negatives": int(lengths["negatives"].min()) if n else None,
    }


def _manifest(
    settings: dict[str, Any],
    name: str,
    digest: str,
    data: Data,
    counts: list[Counter[str]],
    parts: list[dict[str, Any]],
) -> dict[str, Any]:
    for number, found in enumerate(counts):
        for kind in ("duplicate", "left_out"):
            found[kind] += sum(part["dropped"][kind][number] for part in parts)
    train, apart = [part["train"] for part in parts], [part["held_out"] for part in parts]
    pairs, tokens = (
        sum(p["pairs"] for p in train),
        {k: sum(p[k] for p in train) for k in ("query_tokens", "positive_tokens")},
    )
    total = sum(counts, Counter())
    sha = hashlib.sha256("".join(p["digest"] for p in (*train, *apart)).encode())
    return {
        "format": FORMAT,
        "digest": sha.hexdigest()[:16],
        "pairs": pairs,
        "held_out": sum(p["pairs"] for p in apart),
        "negatives": min((p["negatives"] for p in (*train, *apart) if p["negatives"] is not None), default=0),
        "tokens": {
            "training": sum(tokens.values()),
            "mean_query": round(tokens["query_tokens"] / pairs, 3),
            "mean_positive": round(tokens["positive_tokens"] / pairs, 3),
            "longest_query": max(p["longest_query"] for p in train),
            "longest_positive": max(p["longest_positive"] for p in train),
        },
        "tokenizer": {"name": name, "digest": digest},
        "read": total["read"],
        "counts": dict(total),
        "sources": [
            {"kind": source.kind, "path": source.path, **found}
            for source, found in zip(data.sources, counts, strict=True)
        ],
        "parts": {"train": [p["pairs"] for p in train], "held_out": [p["pairs"] for p in apart]},
        "settings": settings,
    }
