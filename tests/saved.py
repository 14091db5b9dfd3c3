"""Small, seeded models, tokenizers and pairs, saved in the formats of the hub and of users."""

import json
import random
from pathlib import Path


def save_byte_tokenizer(folder: Path) -> Path:
    """Save a tokenizer whose 256 symbols are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def save_backbone(folder: Path, width: int = 32, blocks: int = 4, heads: int = 2, seed: int = 0, dtype=None, **more):
    """Save a GPT-NeoX decoder over bytes, with seeded random weights, and its tokenizer."""
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


WORDS = (
    "open read write parse token batch model train loss file path sort merge split count index graph queue stack tree"
)


def write_pairs(path: Path, pairs: int, seed: int = 0) -> Path:
    """Write JSON lines in the form of BAAI-MTP: a query of three words, a positive that contains them, a negative."""
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
