"""`embedscale prepare` against plain Python: pairs kept, their order, the split, mixtures, resuming, refusals."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from saved import WORDS, save_byte_tokenizer
from scipy import stats

from embedscale import cli
from embedscale.data import corpora, prepare
from embedscale.data.store import PairStore
from embedscale.data.tokens import CHARACTERS, tokenizer_digest
from embedscale.errors import INTERRUPTED, WRONG, UserError
from embedscale.run import lease as leases
from embedscale.run.config import Source
from embedscale.run.lease import Lease

WORDS = WORDS.split()
LONG_WORD = "internationalisation"  # one symbol of the tokenizer below


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")


@pytest.fixture(scope="module")
def bpe_tokenizer(tmp_path_factory) -> Path:
    """As Pythia's, smaller, and with the habits that a store must not take over: a BOS, padding, truncation."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join([*WORDS, LONG_WORD])] * 50, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    folder = tmp_path_factory.mktemp("tokenizers") / "bpe"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(query: str, positive: str, *negatives: str) -> dict:
    return {"query": query, "pos": [positive], "neg": [*negatives]}


def some_rows(n: int, seed: int = 0, name: str = "") -> list[dict]:
    """Queries come back with other positives, pairs come back whole, and some are empty."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        if rows and rng.random() < 0.1:
            rows.append(rng.choice(rows))
            continue
        query = f"{name} {' '.join(rng.sample(WORDS, 2))} {rng.randrange(n // 2)}"
        positive = rng.choice([" ".join(rng.choices(WORDS, k=rng.randint(1, 9))), "", " \n "])
        rows.append(row(query, positive if rng.random() < 0.1 else f"{positive} é {rng.randrange(n)}"))
    return rows


def words_of(store: Path, tokenizer: Path, *sources: dict, context: int = 40, held_out: float = 0.1) -> list[str]:
    listed = json.dumps([{"kind": "jsonl"} | source for source in sources])
    return [
        f"data.store={store}",
        f"data.tokenizer={tokenizer}",
        f"data.sources={listed}",
        f"data.context={context}",
        f"data.held_out={held_out}",
    ]


def made(*args, **settings) -> PairStore:
    words = words_of(*args, **settings)
    assert cli.main(["prepare", *words]) == 0
    return PairStore.open(args[0])


def contents(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(query, positive) ids of each pair."""
    ids = [tuple(part.tolist()) for part in np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])]
    return list(zip(ids[: batch.pairs], ids[batch.pairs :], strict=True))


def training(store: PairStore):
    return contents(store.batch(0, store.pairs))


def held_out(store: PairStore):
    return contents(store.held_out_batch(0, store.held_out))


# What a store should hold, written without NumPy, Arrow or buckets.

MASK = 2**64 - 1


def mixed(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def expected_order(rows: list[dict], share: float) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) pairs of texts, in the store's order."""
    pairs = {(r["query"], r["pos"][0]) for r in rows if r["query"].strip() and r["pos"][0].strip()}
    order = sorted(pairs, key=lambda pair: mixed(text_hash(pair[0]) ^ mixed(text_hash(pair[1]))))
    apart = {query for query, _ in pairs if text_hash(query) / 2**64 < share}
    return [pair for pair in order if pair[0] not in apart], [pair for pair in order if pair[0] in apart]


def byte_ids(text: str, tokenizer, context: int) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, truncation=True, max_length=context)["input_ids"])


@pytest.mark.parametrize("buckets", [2, 16])
def test_a_store_holds_each_distinct_pair_once_in_the_order_of_its_hash(
    tmp_path, monkeypatch, bytes_tokenizer, buckets
):
    from transformers import AutoTokenizer

    rows = some_rows(1500)
    path = write(tmp_path / "pairs.jsonl", rows)
    monkeypatch.setattr(corpora, "UNIT_BYTES", 10_000)
    monkeypatch.setattr(prepare, "BUCKET_BYTES", path.stat().st_size // (buckets - 1))
    store = made(tmp_path / "store", bytes_tokenizer, {"path": str(path)}, context=20)
    assert len(store.manifest["parts"]["train"]) == buckets
    tokenizer = AutoTokenizer.from_pretrained(bytes_tokenizer)
    expected = [
        [tuple(byte_ids(text, tokenizer, 20) for text in pair) for pair in part] for part in expected_order(rows, 0.1)
    ]
    assert [training(store), held_out(store)] == expected
    counts = store.manifest["counts"]
    assert counts["read"] == 1500 and counts["empty"] > 20 and counts["duplicate"] > 50
    assert counts["kept"] == store.pairs + store.held_out == 1500 - counts["empty"] - counts["duplicate"]
    tokens = store.manifest["tokens"]
    queries, positives = ([len(pair[side]) for pair in expected[0]] for side in (0, 1))
    assert tokens["longest_query"] == max(queries) and tokens["longest_positive"] == max(positives) == 20
    assert tokens["mean_query"] == pytest.approx(np.mean(queries), abs=1e-3)
    assert tokens["mean_positive"] == pytest.approx(np.mean(positives), abs=1e-3)


def test_no_query_stands_on_both_sides_and_more_pairs_move_none_across(tmp_path, bytes_tokenizer):
    rows = some_rows(3000)
    few = made(tmp_path / "few", bytes_tokenizer, {"path": str(write(tmp_path / "few.jsonl", rows[:1500]))})
    many = made(tmp_path / "many", bytes_tokenizer, {"path": str(write(tmp_path / "many.jsonl", rows))})
    assert not {query for query, _ in training(many)} & {query for query, _ in held_out(many)}
    assert set(held_out(few)) <= set(held_out(many)) and set(training(few)) <= set(training(many))
    queries = {query for query, _ in training(many)}, {query for query, _ in held_out(many)}
    n, share = len(queries[0] | queries[1]), len(queries[1])
    assert abs(share - 0.1 * n) < 4 * (0.09 * n) ** 0.5


def test_the_shuffle_is_uniform(tmp_path, bytes_tokenizer):
    n = 4000
    path = write(tmp_path / "pairs.jsonl", [row(f"{i}", f"text {i % 10}") for i in range(n)])
    store = made(tmp_path / "store", bytes_tokenizer, {"path": str(path)}, held_out=0.001)
    digits = {ids: byte for byte, ids in enumerate(_digit_ids(bytes_tokenizer))}
    place = np.array([int("".join(str(digits[token]) for token in query)) for query, _ in training(store)])
    assert abs(stats.spearmanr(np.arange(len(place)), place).statistic) < 4 / n**0.5
    counts = np.histogram2d(np.arange(len(place)), place, bins=10)[0]
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    assert np.sum(np.abs(np.diff(place)) == 1) < 12  # neighbours that stay neighbours: two are expected


def _digit_ids(folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(str(digit)).ids[0] for digit in range(10)]


def test_ids_are_those_of_transformers_without_special_tokens(tmp_path, bpe_tokenizer):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bpe_tokenizer)
    texts = ["open read", "Ünicode 北京 🙂", "<|endoftext|> inside", "a\n\n  b", "x", " ".join(WORDS * 9)]
    # Long texts of which a few characters, and of which very many, make a token.
    texts += ["\x07" * 5000, " batch" * 40 * CHARACTERS, "    " * 3000 + "end", f" {LONG_WORD}" * 300]
    assert len(tokenizer.tokenize(f" {LONG_WORD}")) == 1 and len(LONG_WORD) > 2 * CHARACTERS
    rows = [row(f"query {i}", text) for i, text in enumerate(texts)]
    path = write(tmp_path / "pairs.jsonl", rows)
    store = made(tmp_path / "store", bpe_tokenizer, {"path": str(path)}, context=11, held_out=0.0001)
    expected = {tuple(byte_ids(text, tokenizer, 11) for text in (r["query"], r["pos"][0])) for r in rows}
    assert set(training(store)) == expected and store.pairs == len(rows)
    assert store.manifest["vocabulary"] == len(tokenizer)


def test_text_behind_much_that_a_normaliser_drops_is_kept(tmp_path, bpe_tokenizer):
    file = json.loads((bpe_tokenizer / "tokenizer.json").read_text())
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tmp_path / "strips").mkdir()
    (tmp_path / "strips" / "tokenizer.json").write_text(json.dumps(file | {"normalizer": strip}))
    rows = [row("open", text) for text in ("read write", " " * 100_000 + "read write")]
    path = write(tmp_path / "pairs.jsonl", rows)
    store = made(tmp_path / "store", tmp_path / "strips", {"path": str(path)}, context=11, held_out=0.0001)
    first, second = training(store)
    assert first == second and len(first[1]) > 1


def test_a_vocabulary_beyond_sixteen_bits_is_stored_in_thirty_two(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [f"w{i}" for i in range(70_000)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    path = write(tmp_path / "pairs.jsonl", [row("w69999 w1", "w65536")])
    store = made(tmp_path / "store", tmp_path / "words", {"path": str(path)}, held_out=0.0001)
    assert training(store) == [((69999, 1), (65536,))]


def test_a_tokenizers_digest_is_of_what_it_does_not_of_its_file(tmp_path, bytes_tokenizer, bpe_tokenizer):
    text = json.loads((bpe_tokenizer / "tokenizer.json").read_text())
    for name, change in [
        ("same", {"padding": None, "truncation": None}),
        ("other", {"normalizer": {"type": "Lowercase"}}),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(text | change, indent=4))
    assert tokenizer_digest(str(tmp_path / "same")) == tokenizer_digest(str(bpe_tokenizer))
    assert len({tokenizer_digest(str(f)) for f in (tmp_path / "other", bpe_tokenizer, bytes_tokenizer)}) == 3


def test_the_same_pairs_make_the_same_store_whatever_the_format_and_the_cores(tmp_path, monkeypatch, bytes_tokenizer):
    import pandas as pd

    rows = some_rows(400)
    path = write(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    pd.DataFrame(rows).to_parquet(tmp_path / "pairs.parquet", row_group_size=100)
    stores = [
        made(tmp_path / "plain", bytes_tokenizer, {"path": str(path)}),
        made(tmp_path / "gz", bytes_tokenizer, {"path": f"{path}.gz"}),
        made(tmp_path / "parquet", bytes_tokenizer, {"path": str(tmp_path / "pairs.parquet"), "kind": "parquet"}),
    ]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(corpora, "UNIT_BYTES", 5000)
    # A compressed file's text is guessed: it may have as many buckets as it would of another size.
    monkeypatch.setattr(prepare, "BUCKET_BYTES", 3000)
    stores.append(made(tmp_path / "alone", bytes_tokenizer, {"path": str(path)}))
    assert len({len(store.manifest["parts"]["train"]) for store in stores}) == 2
    assert len({store.digest for store in stores}) == 1
    other = made(
        tmp_path / "other", bytes_tokenizer, {"path": str(write(tmp_path / "more.jsonl", [*rows, row("a", "b")]))}
    )
    assert other.digest != stores[0].digest


def test_a_mixture_has_the_shares_asked_for_and_ends_with_the_source_that_runs_out(tmp_path, capsys, bytes_tokenizer):
    few = [row(f"few {i}", f"text {i}") for i in range(600)]
    many = [row(f"many {i}", f"text {i}") for i in range(3000)] * 2  # half of what is read are repetitions
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("few", few), ("many", many))]
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    store = made(tmp_path / "store", bytes_tokenizer, *sources)
    found = store.manifest["sources"]
    assert found[0]["kept"] == 600
    assert abs(found[1]["kept"] - 1800) < 4 * (3000 * 0.6 * 0.4) ** 0.5
    assert found[1]["duplicate"] == 3000 and found[1]["left_out"] == 3000 - found[1]["kept"]
    assert "left out" in capsys.readouterr().out
    all_kept = made(tmp_path / "all", bytes_tokenizer, *({"path": str(path)} for path in paths))
    assert all_kept.pairs + all_kept.held_out == 3600


def test_hard_negatives_are_counted_by_the_pair_that_has_fewest(tmp_path, bytes_tokenizer):
    rows = [row(f"q{i}", f"p{i}", *(f"n{i}{k}" for k in range(2 + i % 3)), " ") for i in range(200)]
    path = write(tmp_path / "pairs.jsonl", rows)
    assert made(tmp_path / "with", bytes_tokenizer, {"path": str(path), "negative": "neg"}).negatives == 2
    assert made(tmp_path / "without", bytes_tokenizer, {"path": str(path)}).negatives == 0


def test_text_that_is_not_utf8_is_counted_and_reported(tmp_path, capsys, bytes_tokenizer):
    path = write(tmp_path / "pairs.jsonl", some_rows(300))
    with path.open("ab") as file:
        file.write(b'{"query": "\xff", "pos": ["p"]}\n' * 3)
    store = made(tmp_path / "store", bytes_tokenizer, {"path": str(path)})
    assert store.manifest["counts"]["not_utf8"] == store.manifest["sources"][0]["not_utf8"] == 3
    assert "3 not utf8" in capsys.readouterr().out


def test_installed_python_becomes_a_store(tmp_path, monkeypatch, bytes_tokenizer):
    """The installed packages are far more; a worker reads the units it is given, so a few of them stand for all."""
    chosen = [replace(corpora.units_of(0, Source(kind="installed-python"))[0], stop=80)]
    assert len(corpora.installed_files()) > 1000
    monkeypatch.setattr(prepare, "units_of", lambda number, source: chosen)
    store = made(tmp_path / "store", bytes_tokenizer, {"kind": "installed-python"})
    assert store.pairs > 300


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
    }


def test_prepared_again_does_nothing_and_another_configuration_is_refused(
    tmp_path, capsys, bytes_tokenizer, bpe_tokenizer
):
    path, store = write(tmp_path / "pairs.jsonl", some_rows(300)), tmp_path / "store"
    made(store, bytes_tokenizer, {"path": str(path)})
    path.unlink()  # nor is it read
    before = snapshot(tmp_path)
    capsys.readouterr()
    made(store, bytes_tokenizer, {"path": str(path)})
    assert "is there" in capsys.readouterr().out
    others = [
        ("data.context", words_of(store, bytes_tokenizer, {"path": str(path)}, context=41)),
        ("data.held_out", words_of(store, bytes_tokenizer, {"path": str(path)}, held_out=0.2)),
        ("data.tokenizer", words_of(store, bpe_tokenizer, {"path": str(path)})),
        ("data.sources[0].path", words_of(store, bytes_tokenizer, {"path": "other.jsonl"})),
        ("data.sources[1].kind", words_of(store, bytes_tokenizer, *[{"path": str(path)}] * 2)),
    ]
    for field, words in others:
        assert cli.main(["prepare", *words]) == WRONG
        assert f"{field}: {store} was made with" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, bytes_tokenizer) -> tuple[Path, str]:
    """Sources of many units whose preparation takes seconds, and the digest of a store that nothing disturbed."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "source").mkdir()
    for part in range(40):
        write(folder / "source" / f"{part:02d}.jsonl", some_rows(1000, part, f"part {part}"))
    return folder / "source", made(folder / "store", bytes_tokenizer, {"path": str(folder / "source")}).digest


@pytest.fixture
def large(tmp_path, bytes_tokenizer, undisturbed) -> tuple[list[str], Path, str]:
    """Settings, the store they would make, and the digest it should have."""
    source, digest = undisturbed
    return words_of(tmp_path / "store", bytes_tokenizer, {"path": str(source)}), tmp_path / "store", digest


def started(words: list[str], store: Path, units: int) -> subprocess.Popen:
    """`prepare` in a process of its own, with so many units done."""
    command = [sys.executable, "-m", "embedscale.cli", "prepare", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    while len(list((store / "work").glob("unit-*.json"))) < units:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    return process


def test_killed_and_started_again_it_goes_on_to_the_same_store(large):
    words, store, digest = large
    for units in (1, 15, 30):
        process = started(words, store, units)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(children, timeout=20)
        assert not any(child.is_running() for child in children), "workers outlive their parent"
        with pytest.raises(UserError, match="not finished"):
            PairStore.open(store)
    done = snapshot(store / "work")
    finished = {name: done[name] for name in done if name.endswith(".json") and name.startswith("unit")}
    (store / "train" / ".00000.arrow.0123abcd.partial").write_text("torn")
    seen = {}

    def in_parallel(*args):  # the work folder goes at the end: look before
        yield from original(*args)
        seen.update(snapshot(store / "work"))

    original, prepare._in_parallel = prepare._in_parallel, in_parallel
    try:
        assert cli.main(["prepare", *words]) == 0
    finally:
        prepare._in_parallel = original
    assert len(finished) >= 30 and finished.items() <= seen.items()
    assert PairStore.open(store).digest == digest
    assert {path.name for path in store.iterdir()} == {"train", "held_out", "manifest.json"}
    assert not list(store.rglob("*.partial"))


@pytest.mark.parametrize(
    ("send", "sent"),
    [(os.kill, [signal.SIGTERM]), (os.killpg, [signal.SIGTERM]), (os.killpg, [signal.SIGINT] * 4)],
    ids=["SIGTERM", "SIGTERM to its workers too", "impatient Ctrl-C"],
)
def test_a_signal_ends_it_in_a_way_that_can_be_resumed(large, send, sent):
    words, store, digest = large
    process = started(words, store, 5)
    for number in sent:
        send(process.pid, number)
        time.sleep(0.02)  # or the system takes several for one
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert errors.decode() == "embedscale: interrupted\n"
    assert not (store / "work" / "lease.json").exists()
    assert cli.main(["prepare", *words]) == 0
    assert PairStore.open(store).digest == digest


def test_interrupted_it_does_not_wait_for_the_end_of_a_compressed_file(tmp_path, bytes_tokenizer):
    """Which is one unit, and may take hours: here as many texts as no machine tokenises in a minute."""
    text = "".join(json.dumps(row(f"query {i}", "positive")) + "\n" for i in range(20_000))
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(text.encode(), 1) * 1000)
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(tmp_path / "pairs.jsonl.gz")})
    process = started(words, tmp_path / "store", 0)
    while not list((tmp_path / "store" / "work").glob(".unit-*.partial")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and errors.decode() == "embedscale: interrupted\n"
    assert not list((tmp_path / "store" / "work").glob("*unit*"))


def test_ctrl_c_while_the_workers_are_started_is_one_line(large):
    words, store, _ = large
    process = started(words, store, 0)
    while not any("forkserver" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    for _ in range(10):  # in the imports of the process that forks them
        time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode()) == (INTERRUPTED, "embedscale: interrupted\n")


@pytest.mark.parametrize("stage", ["shuffling", "manifest"])
def test_interrupted_late_it_leaves_no_store_and_goes_on(tmp_path, monkeypatch, bytes_tokenizer, stage):
    source = {"path": str(write(tmp_path / "pairs.jsonl", some_rows(500)))}
    digest = made(tmp_path / "whole", bytes_tokenizer, source).digest
    words = words_of(tmp_path / "store", bytes_tokenizer, source)
    with monkeypatch.context() as patch:
        in_parallel = prepare._in_parallel

        def stops(pool, what, *more):
            for number, found in enumerate(in_parallel(pool, what, *more)):
                if what == "shuffling" and number == 1:
                    raise KeyboardInterrupt
                yield found

        if stage == "shuffling":
            patch.setattr(prepare, "_in_parallel", stops)
        else:
            patch.setattr(prepare, "_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["prepare", *words]) == INTERRUPTED
    with pytest.raises(UserError, match="not finished"):
        PairStore.open(tmp_path / "store")
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(row("new", "row")) + "\n")
    assert cli.main(["prepare", *words]) == WRONG  # half of one corpus and half of another would be neither
    write(tmp_path / "pairs.jsonl", some_rows(500))
    assert cli.main(["prepare", *words]) == 0
    assert PairStore.open(tmp_path / "store").digest == digest


def test_a_second_process_touches_nothing(tmp_path, capsys, bytes_tokenizer):
    source = {"path": str(write(tmp_path / "pairs.jsonl", some_rows(300)))}
    (tmp_path / "store" / "work").mkdir(parents=True)
    lease = Lease(tmp_path / "store" / "work" / "lease.json")
    lease.take()
    before = snapshot(tmp_path)
    assert cli.main(["prepare", *words_of(tmp_path / "store", bytes_tokenizer, source)]) == WRONG
    assert "another process" in capsys.readouterr().err
    after = snapshot(tmp_path)
    assert {name for name in after if "." in Path(name).name} == {name for name in before if "." in Path(name).name}
    lease.release()


def test_a_store_that_another_process_ends_while_the_files_are_listed_is_there(
    tmp_path, monkeypatch, capsys, bytes_tokenizer
):
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(write(tmp_path / "p.jsonl", some_rows(300)))})
    units_of = prepare.units_of

    def slowly(number, source):
        monkeypatch.setattr(prepare, "units_of", units_of)
        assert cli.main(["prepare", *words]) == 0
        return units_of(number, source)

    monkeypatch.setattr(prepare, "units_of", slowly)
    assert cli.main(["prepare", *words]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "pairs a second" in first and f"{tmp_path / 'store'} is there" in second
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["held_out", "manifest.json", "train"]


def test_nothing_is_removed_under_a_process_that_has_just_come(tmp_path, monkeypatch, bytes_tokenizer):
    release, next_one = Lease.release, Lease(tmp_path / "store" / "work" / "lease.json")

    def then_the_next_comes(lease):
        release(lease)
        if lease is not next_one:
            next_one.take()

    monkeypatch.setattr(Lease, "release", then_the_next_comes)
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(write(tmp_path / "p.jsonl", some_rows(300)))})
    for _ in range(2):  # it makes the store, it finds the store
        assert cli.main(["prepare", *words]) == 0
        assert next_one.held()
    next_one.release()
    assert cli.main(["prepare", *words]) == 0
    assert not (tmp_path / "store" / "work").exists()


def test_a_process_whose_store_is_taken_over_ends(tmp_path, monkeypatch, bytes_tokenizer):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    lease = tmp_path / "store" / "work" / "lease.json"

    def taken_over(work, units, stop):
        lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "other"}))
        while not stop.requested:
            time.sleep(0.01)
        raise KeyboardInterrupt  # as it does between two units

    monkeypatch.setattr(prepare, "_build", taken_over)
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(write(tmp_path / "p.jsonl", some_rows(300)))})
    assert cli.main(["prepare", *words]) == INTERRUPTED
    assert json.loads(lease.read_text())["token"] == "other"


BAD = [
    ({"path": "nowhere.jsonl"}, {}, "data.sources.path: there is no file nowhere.jsonl"),
    ({"path": "good.jsonl", "query": "question"}, {}, "no column 'question'; it has: query, pos, neg"),
    ({"path": "good.jsonl", "kind": "json"}, {}, "data.sources.kind: 'json' is unknown; allowed: jsonl"),
    ({"path": "good.jsonl", "weight": 0}, {}, "data.sources.weight: 0.0 is out of range"),
    ({"path": "good.jsonl", "pth": "x"}, {}, "pth"),
    ({"kind": "parquet"}, {}, "data.sources.path: nothing is given"),
    ({"path": "empty.jsonl"}, {}, "data.sources[0]: empty.jsonl yields no pair (nothing read)"),
    ({"path": "nulls.jsonl"}, {}, "data.sources[0]: nulls.jsonl yields no pair (7 read, 7 empty)"),
    ({"path": "blank.jsonl"}, {}, "yield no training pair (4 read, 4 empty)"),
    ({"path": "good.jsonl", "kind": "parquet"}, {}, "good.jsonl: is no Parquet file"),
    ({"path": "nobody/nothing", "kind": "dataset"}, {}, "the dataset 'nobody/nothing' cannot be loaded"),
    ({"path": "good.jsonl"}, {"context": 0}, "data.context: 0 is out of range"),
    ({"path": "good.jsonl"}, {"held_out": 0.6}, "data.held_out: 0.6 is out of range"),
    ({"path": "good.jsonl"}, {"tokenizer": "nobody/nothing"}, "data.tokenizer: 'nobody/nothing' is neither a local"),
    ({"path": "good.jsonl"}, {"tokenizer": "folder"}, "data.tokenizer: folder holds no tokenizer.json"),
    ({"path": "good.jsonl"}, {"tokenizer": "broken"}, "broken/tokenizer.json is no tokenizer that can be read"),
    ({"path": "good.jsonl"}, {"store": "folder"}, "data.store: folder holds other files"),
    ({"path": "good.jsonl"}, {"store": "good.jsonl"}, "data.store: good.jsonl holds other files"),
    ({"path": "good.jsonl"}, {"store": "good.jsonl/below"}, "data.store: good.jsonl/below cannot be made"),
]


@pytest.mark.parametrize(("source", "settings", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, bytes_tokenizer, source, settings, message
):
    monkeypatch.chdir(tmp_path)
    write(Path("good.jsonl"), some_rows(20))
    write(Path("blank.jsonl"), [row(" ", "text")] * 4)
    write(Path("nulls.jsonl"), [{"query": "q", "pos": None}] * 7)
    Path("empty.jsonl").touch()
    Path("folder").mkdir()
    (Path("folder") / "notes.txt").write_text("mine")
    Path("broken").mkdir()
    (Path("broken") / "tokenizer.json").write_text("{")
    before = snapshot(tmp_path)
    settings = {"store": "new/below/store", "tokenizer": bytes_tokenizer} | settings
    words = words_of(settings.pop("store"), settings.pop("tokenizer"), source, **settings)
    assert cli.main(["prepare", *words]) == WRONG
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert snapshot(tmp_path) == before


def test_a_source_that_is_wrong_is_found_before_those_before_it_are_tokenised(
    tmp_path, monkeypatch, capsys, bytes_tokenizer
):
    monkeypatch.setattr(prepare, "_build", lambda *_: pytest.fail("begun"))
    good = {"path": str(write(tmp_path / "good.jsonl", some_rows(20)))}
    nulls = {"path": str(write(tmp_path / "nulls.jsonl", [{"query": "q", "pos": None}] * 7))}
    for wrong, said in ((good | {"positive": "answer"}, "no column 'answer'"), (nulls, "data.sources[1]:")):
        assert cli.main(["prepare", *words_of(tmp_path / "s", bytes_tokenizer, good, wrong)]) == WRONG
        assert said in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_what_was_done_before_a_file_could_not_be_read_is_kept(tmp_path, monkeypatch, capsys, bytes_tokenizer):
    """A file server may fail for a minute; a file that is cut off is found after hours of others."""
    (tmp_path / "source").mkdir()
    text = write(tmp_path / "source" / "0.jsonl", some_rows(300)).read_bytes()
    for number in range(1, 8):
        (tmp_path / "source" / f"{number}.jsonl.gz").write_bytes(gzip.compress(text.replace(b"read", b"%d" % number)))
    last, whole = tmp_path / "source" / "7.jsonl.gz", (tmp_path / "source" / "7.jsonl.gz").read_bytes()
    words = words_of(tmp_path / "store", bytes_tokenizer, {"path": str(tmp_path / "source")})
    last.write_bytes(whole[:-9] + bytes(9))  # as a file server may show it for a while
    assert cli.main(["prepare", *words]) == WRONG
    assert "7.jsonl.gz: cannot be read" in capsys.readouterr().err
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "work").glob("unit-*.json")}
    assert len(done) == 7
    last.write_bytes(whole)
    monkeypatch.setattr(prepare, "_clear", lambda folder: None)
    assert cli.main(["prepare", *words]) == 0
    assert done.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "work").iterdir()}.items()
    assert (
        PairStore.open(tmp_path / "store").digest
        == made(tmp_path / "other", bytes_tokenizer, {"path": str(tmp_path / "source")}).digest
    )


def test_mixtures_need_all_weights_and_at_least_one_source(tmp_path, capsys, bytes_tokenizer):
    path = str(write(tmp_path / "pairs.jsonl", some_rows(20)))
    assert cli.main(
        ["prepare", *words_of(tmp_path / "s", bytes_tokenizer, {"path": path, "weight": 1}, {"path": path})]
    )
    assert "data.sources.weight: some sources have one" in capsys.readouterr().err
    assert cli.main(["prepare", *words_of(tmp_path / "s", bytes_tokenizer)]) == WRONG
    assert "data.sources: nothing is given" in capsys.readouterr().err
    again = [{"path": path, "weight": 1}] * 2  # of equal pairs the first source's count
    assert cli.main(["prepare", *words_of(tmp_path / "s", bytes_tokenizer, *again)]) == WRONG
    assert "data.sources[1].weight: no pair of this source is left" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
