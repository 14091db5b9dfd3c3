"""What every test may use: saved models and tokenizers in the hub's own format, small and seeded."""

import json
import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest


def save_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer of the 256 bytes, each its own symbol, in the hub's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def save_backbone(folder: Path, width: int = 32, blocks: int = 4, heads: int = 2, seed: int = 0, dtype=None, **more):
    """A GPT-NeoX decoder over bytes with seeded random weights, saved with its tokenizer."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 256,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 256,
    } | more
    model = GPTNeoXModel(GPTNeoXConfig(**settings))
    model.to(dtype or torch.float32).save_pretrained(folder)
    return save_byte_tokenizer(folder)


@pytest.fixture(scope="session")
def save_decoder():
    """`save_backbone`, for a test that needs a shape of its own."""
    return save_backbone


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """Four blocks of width 32."""
    return save_backbone(tmp_path_factory.mktemp("hub") / "pythia-tiny")


WORDS = (
    "open read write parse token batch model train loss file path sort merge split count index graph queue stack tree"
)


def write_pairs(path: Path, pairs: int, seed: int = 0) -> Path:
    """JSON lines in BAAI-MTP's form: a query of three words, a positive that holds them among others, a negative."""
    rng = random.Random(seed)
    words = WORDS.split()
    with path.open("w") as file:
        for number in range(pairs):
            query = rng.sample(words, 3)
            positive = [*query, *rng.sample(words, rng.randint(0, 4))]
            rng.shuffle(positive)
            row = {
                "query": f"{' '.join(query)} {number}",
                "pos": [" ".join(positive)],
                "neg": [" ".join(rng.sample(words, 3))],
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, backbone_folder) -> list[str]:
    """The settings of a run of seconds: a prepared store of 3,000 pairs, and everything small. Add a budget."""
    from embedscale.config import load
    from embedscale.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    source = write_pairs(folder / "pairs.jsonl", 3000)
    words = [
        f"backbone.name={backbone_folder}",
        f"data.store={folder / 'store'}",
        f"data.sources=[{{kind: jsonl, path: {source}, negative: neg}}]",
        "data.context=40",
        "data.held_out=0.1",
        "training.batch_size=16",
        "training.learning_rate=0.003",
        "evaluation.pool=64",
        "evaluation.negatives=31",
    ]
    assert prepare(load(None, words)) == 0
    return words
