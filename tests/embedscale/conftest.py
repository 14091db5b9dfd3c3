"""Tokenizers and finished runs that several test files use."""

import json
from pathlib import Path

import pytest
from saved import WORDS, save_byte_tokenizer, write_pairs

LONG_WORD = "internationalisation"  # one symbol of `bpe_tokenizer`


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")


@pytest.fixture(scope="session")
def bpe_tokenizer(tmp_path_factory) -> Path:
    """Like Pythia's, but smaller, and with settings that a store must ignore: a BOS token, padding, truncation."""
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
    tokenizer.train_from_iterator([f"{WORDS} {LONG_WORD}"] * 50, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    folder = tmp_path_factory.mktemp("tokenizers") / "bpe"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


METHODS = {
    "full": [],
    "freeze": ["method.name=freeze", "method.active_blocks=1"],
    "bias": ["method.name=bias", "training.learning_rate=0.03"],
    "lora": ["method.name=lora", "method.rank=4", "method.embedding=true", "training.learning_rate=0.03"],
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_run) -> dict[str, Path]:
    """Train one run of each method."""
    from embedscale.data.prepare import prepare
    from embedscale.errors import DONE
    from embedscale.run.settings import load
    from embedscale.training.train import train

    folder = tmp_path_factory.mktemp("runs")
    rows = write_pairs(folder / "all.jsonl", 3000).read_text().splitlines()
    once = {json.loads(row)["pos"][0]: row for row in rows}  # equal positives would tie
    (folder / "once.jsonl").write_text("\n".join(once.values()) + "\n")
    data = [f"data.store={folder / 'store'}", f"data.sources=[{{kind: jsonl, path: {folder / 'once.jsonl'}}}]"]
    assert prepare(load(None, [*tiny_run, *data])) == DONE
    found = {}
    for name, words in METHODS.items():
        config = load(None, [*tiny_run, *data, *words, "budget=2e9", f"output={folder}"])
        assert train(config) == DONE
        found[name] = Path(config.folder)
    return found
