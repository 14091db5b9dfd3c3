"""Tokenizers that several files of tests use."""

from pathlib import Path

import pytest
from saved import WORDS, save_byte_tokenizer

LONG_WORD = "internationalisation"  # one symbol of `bpe_tokenizer`


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")


@pytest.fixture(scope="session")
def bpe_tokenizer(tmp_path_factory) -> Path:
    """Like Pythia's but smaller, and with habits that a store must not take over: a BOS, padding, truncation."""
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
