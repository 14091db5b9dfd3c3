"""Special tokens around texts, and attention to later tokens: from the store to the export, as transformers does it."""

import numpy as np
import pytest
import torch
from saved import save_byte_tokenizer
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from embedscale.data.prepare import prepare
from embedscale.data.store import PairStore
from embedscale.errors import UserError
from embedscale.run.config import Backbone, Data, RunConfig
from embedscale.run.directory import RunDirectory
from embedscale.run.settings import load
from embedscale.serving.embedder import Embedder
from embedscale.serving.evaluate import held_out_texts
from embedscale.serving.export import export
from embedscale.training.train import train

BOS = 256


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A small Gemma 3 over bytes, whose tokenizer begins each text with a token of its own."""
    folder = save_byte_tokenizer(tmp_path_factory.mktemp("hub") / "gemma-tiny")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(folder)
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=256,
        sliding_window=64,
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory, gemma, tiny_run):
    folder = tmp_path_factory.mktemp("gemma")
    return [*tiny_run, f"backbone.name={gemma}", f"data.store={folder / 'store'}", f"output={folder / 'runs'}"]


def texts_of(store):
    pairs = store.held_out_batch(0, 64)
    return np.split(pairs.tokens, np.cumsum(pairs.lengths)[:-1])


def test_a_gemma_gets_its_first_token_from_the_store_to_the_export(tmp_path, words, gemma):
    run = load(None, [*words, "budget=2e8", "backbone.attention=bidirectional"])
    assert prepare(run) == 0
    store = PairStore.open(run.data.store)
    sequences = texts_of(store)
    texts = held_out_texts(run, store.held_out_batch(0, 64), store.added)
    theirs = AutoTokenizer.from_pretrained(gemma)
    for text, ids in zip(texts, sequences, strict=True):
        assert ids[0] == BOS and list(ids).count(BOS) == 1 and len(ids) <= run.data.context
        if len(ids) < run.data.context:  # others are cut
            assert theirs(text)["input_ids"] == ids.tolist()
    plain = load(None, [*words, "data.special_tokens=none", f"data.store={tmp_path / 'plain'}"])
    assert prepare(plain) == 0
    without = PairStore.open(plain.data.store)
    short = [len(ids) for ids in texts_of(without) if len(ids) < run.data.context]
    assert [len(ids) - 1 for ids in sequences if len(ids) <= run.data.context and len(ids) - 1 in short]
    assert store.manifest.tokens.training > without.manifest.tokens.training  # counted, and paid for

    assert train(run) == 0
    record = RunDirectory(run.folder).read_record()
    assert (record.tokens_before, record.tokens_after) == ([BOS], [])
    assert (record.hyperparameters.attention, record.family) == ("bidirectional", "gemma3_text")
    assert export(str(run.folder), str(tmp_path / "model")) == 0  # compares embeddings in a fresh process
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("ab")["input_ids"] == theirs("ab")["input_ids"]

    # Encoding is transformers' own: each text alone, its tokenizer's ids, no mask of later tokens.
    embedder = Embedder.load(run.folder)
    reference = AutoModel.from_pretrained(tmp_path / "model", attn_implementation="eager")
    with torch.no_grad():
        ids = theirs("a query", return_tensors="pt")["input_ids"]
        expected = torch.nn.functional.normalize(reference(ids, use_cache=False).last_hidden_state[0].mean(0), dim=0)
    np.testing.assert_allclose(embedder.encode(["a query"])[0], expected, atol=1e-5)
    assert not embedder.encode([""]).any()


def test_a_store_of_an_earlier_version_stays_and_is_used(tmp_path, words, gemma, capsys):
    """Such a store has no special tokens, and nothing was asked."""
    old = load(None, [*words, "data.special_tokens=none", f"data.store={tmp_path / 'store'}"])
    assert prepare(old) == 0
    assert "special_tokens" not in PairStore.open(tmp_path / "store").manifest.settings
    same = load(None, [*words, f"data.store={tmp_path / 'store'}", f"output={tmp_path / 'runs'}", "budget=1e8"])
    assert prepare(same) == 0
    assert train(same) == 0
    assert RunDirectory(same.folder).read_record().tokens_before == []
    asked = load(None, [*words, "data.special_tokens=template", f"data.store={tmp_path / 'store'}"])
    with pytest.raises(UserError, match="data.special_tokens: .* was made with None"):
        prepare(asked)
    with pytest.raises(
        UserError, match=r"data.special_tokens: template, but .* was prepared without any; name another"
    ):
        train(asked)


def test_new_settings_at_their_defaults_do_not_rename_runs():
    plain = RunConfig()
    assert RunConfig(backbone=Backbone(attention="causal"), data=Data(special_tokens="auto")).run_id == plain.run_id
    assert RunConfig(backbone=Backbone(attention="bidirectional")).run_id != plain.run_id
    assert RunConfig(data=Data(special_tokens="none")).run_id != plain.run_id
    assert plain.run_id == "pythia-14m_full_1.5e15_s0_44136fa3"


def test_a_template_that_no_context_can_hold_is_refused(words, tmp_path):
    with pytest.raises(UserError, match="data.context: 1 tokens have no room beside the 1 special tokens"):
        prepare(load(None, [*words, "data.context=1", f"data.store={tmp_path / 'store'}"]))
