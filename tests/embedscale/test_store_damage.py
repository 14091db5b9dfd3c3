"""Stores that were damaged on the disk: a flipped bit anywhere is noticed before the first step, and named."""

import json
import random
import re
import shutil

import pytest
from stores import made, some_rows, words_of, write
from training_runs import run_of

from embedscale import cli
from embedscale.data.store import PairStore
from embedscale.errors import DONE, INTERRUPTED, WRONG, UserError
from embedscale.training.train import train


@pytest.fixture
def prepared(tmp_path, tiny_run):
    """A copy of the store of `tiny_run`, and the settings of a run on it."""
    where = next(word for word in tiny_run if word.startswith("data.store="))
    store = shutil.copytree(where.partition("=")[2], tmp_path / "store")
    return store, [*tiny_run, f"data.store={store}"]


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def read_all(folder, negatives=1):
    """What a run reads of a store: the token counts, the training pairs, the held-out pairs."""
    store = PairStore.open(folder)
    counts = store.token_counts(negatives)
    batches = (store.batch(0, store.pairs, negatives), store.held_out_batch(0, store.held_out))
    return [counts.tolist(), *([b.tokens.tolist(), b.lengths.tolist(), b.texts.tolist()] for b in batches)]


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_every_flipped_bit_of_a_shard_is_noticed_and_the_shard_is_named(prepared, record_property, part):
    store, _ = prepared
    rng = random.Random(f"store {part}")
    shards = sorted((store / part).iterdir())
    for _ in range(100):
        shard = rng.choice(shards)
        content = shard.read_bytes()
        flip(shard, rng)
        with pytest.raises(UserError, match=re.escape(f"{shard} is missing or damaged; remove the store and prepare")):
            read_all(store)
        shard.write_bytes(content)
    record_property("shown", f"store, {part}, flipped: 100 of 100 noticed")


def test_a_flipped_offset_is_noticed_by_who_reads_only_the_token_counts(prepared, record_property):
    store, _ = prepared
    shard, rng = next((store / "train").iterdir()), random.Random(23)
    before, content = PairStore.open(store).token_counts(1).tolist(), shard.read_bytes()
    noticed = 0
    for _ in range(200):
        flip(shard, rng)
        try:
            assert PairStore.open(store).token_counts(1).tolist() == before
        except UserError as error:
            noticed += 1
            assert str(shard) in str(error)
        shard.write_bytes(content)
    assert noticed > 5
    record_property("shown", f"token counts, flipped shard: {noticed} of 200 noticed, the others changed no count")


def test_a_flipped_bit_of_the_manifest_is_noticed_or_changes_nothing(prepared, record_property):
    store, _ = prepared
    manifest, rng = store / "manifest.json", random.Random(29)
    before, content = PairStore.open(store), manifest.read_bytes()
    noticed = 0
    for _ in range(200):
        flip(manifest, rng)
        try:
            assert PairStore.open(store).manifest == before.manifest
        except UserError as error:
            noticed += 1
            assert str(store) in str(error) and "\n" not in str(error)
        manifest.write_bytes(content)
    assert noticed > 180
    record_property("shown", f"manifest.json, flipped: {noticed} of 200 noticed, the others changed no value")


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_run_on_a_damaged_store_stops_before_its_first_step(prepared, tmp_path, capsys, part):
    store, words = prepared
    _, directory = run_of(tmp_path, words)
    shards = sorted((store / part).iterdir())
    for shard in shards:
        flip(shard, random.Random(31))
    assert cli.main(["train", *words, f"output={tmp_path / 'runs'}", "budget=5e9"]) == WRONG
    said = capsys.readouterr().err
    assert re.search(rf"data.store: {store}/{part}/\d+.arrow is missing or damaged; remove the store", said)
    assert not directory.path.exists()


def without_digests(store):
    """Make a store look as version 0.2 wrote it."""
    data = json.loads((store / "manifest.json").read_text())
    del data["digests"], data["checksum"]
    (store / "manifest.json").write_text(json.dumps(data))


def test_a_store_of_early_code_works_says_that_it_cannot_be_verified_and_prepare_adds_its_digests(
    prepared, tmp_path, capsys
):
    store, words = prepared
    content = (store / "manifest.json").read_text()
    config, directory = run_of(tmp_path / "a", words)
    assert train(config) == DONE
    without_digests(store)
    config, early = run_of(tmp_path / "b", words)
    capsys.readouterr()
    assert train(config) == DONE
    assert capsys.readouterr().err.count("has no digests of its files (earlier version): damage cannot be noticed") == 1
    assert early.weights.read_bytes() == directory.weights.read_bytes()
    assert cli.main(["prepare", *words]) == DONE
    assert json.loads((store / "manifest.json").read_text()) == json.loads(content)
    assert train(run_of(tmp_path / "c", words)[0]) == DONE
    assert "digests" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_prepare_gives_no_digests_to_a_damaged_store_of_early_code(prepared, capsys, part):
    store, words = prepared
    before = PairStore.open(store)
    batch = before.batch(0, 20) if part == "train" else before.held_out_batch(0, 20)
    without_digests(store)
    shard = next(path for path in sorted((store / part).iterdir()) if path.stat().st_size > 2000)
    content = bytearray(shard.read_bytes())
    place = bytes(content).index(batch.tokens[:20].astype("uint16").tobytes())
    content[place] ^= 1
    shard.write_bytes(content)
    assert cli.main(["prepare", *words]) == WRONG
    assert f"data.store: {store} is damaged" in capsys.readouterr().err
    assert "digests" not in json.loads((store / "manifest.json").read_text())


@pytest.mark.parametrize("what", ["work/unit-*.arrow", "work/unit-*.json", "work/bucket-*.json", "train/*.arrow"])
def test_what_was_damaged_while_prepare_was_interrupted_is_made_again(tmp_path, monkeypatch, bytes_tokenizer, what):
    from embedscale.data import prepare

    source = {"path": str(write(tmp_path / "pairs.jsonl", some_rows(400)))}
    digest = made(tmp_path / "whole", bytes_tokenizer, source).digest
    words = words_of(tmp_path / "store", bytes_tokenizer, source)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "manifest_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["prepare", *words]) == INTERRUPTED
    if "unit" in what:  # or no unit would be read again
        for path in (tmp_path / "store" / "work").glob("bucket-*.json"):
            path.unlink()
    rng = random.Random(what)
    for path in (tmp_path / "store").glob(what):
        flip(path, rng)
    assert cli.main(["prepare", *words]) == DONE
    store = PairStore.open(tmp_path / "store")
    assert store.digest == digest
    assert read_all(store.folder, 0) == read_all(tmp_path / "whole", 0)
