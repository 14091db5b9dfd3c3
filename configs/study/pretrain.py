"""Pre-train the study's backbones: Pythia-shaped (GPT-NeoX) byte-level decoders, on the texts of the study's corpus.

    python configs/study/pretrain.py [NAME ...] [--ladder configs/study/ladder.yaml] [--out configs/study/backbones]

The ladder names a model's width, blocks and heads. Each model reads `bytes_per_parameter` bytes for each of its
parameters, embeddings not counted, and at least `bytes`. The peak learning rate is `peak`·√(64 / width); a warm-up of
2 % of the steps is followed by a cosine to a tenth. A step reads `windows` random windows of 129 bytes from anywhere in
the texts; step k draws from a generator seeded by k, so an interrupted training continues from its last checkpoint
(beside the model, every five minutes) with the same numbers. The finished model is stored in float16 in the hub's
format, with its measured loss on held-out texts in pretraining.json.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
LENGTH = 128  # bytes that a window predicts
HELD_OUT_WINDOWS = 4096
CHECKPOINT_SECONDS = 300


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 256 symbols, one a byte, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def symbols() -> np.ndarray:
    """Return byte → token id as the tokenizer maps it: byte-level BPE writes a byte as a printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    place = {symbol: i for i, symbol in enumerate(sorted(character.values()))}
    return np.array([place[character[byte]] for byte in range(256)], dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    """Return a text file as token ids, uint8."""
    return symbols()[np.frombuffer(path.read_bytes(), dtype=np.uint8)]


def new_model(width: int, blocks: int, heads: int) -> GPTNeoXForCausalLM:
    """Return a decoder of this shape with random weights from seed 0."""
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=256,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def windows(text: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `count` random windows of LENGTH + 1 ids, [count, LENGTH + 1]."""
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, count)
    return text[starts[:, None] + np.arange(LENGTH + 1)]


def loss_of(model: GPTNeoXForCausalLM, rows: np.ndarray) -> torch.Tensor:
    """Return the loss in nats a byte."""
    ids = torch.from_numpy(rows.astype(np.int64))
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


@torch.no_grad()
def held_out_loss(model: GPTNeoXForCausalLM, text: np.ndarray) -> float:
    """Return the mean loss over fixed windows of the held-out texts, in nats a byte."""
    rows = windows(text, HELD_OUT_WINDOWS, 0)
    return float(np.mean([float(loss_of(model, part)) for part in np.array_split(rows, HELD_OUT_WINDOWS // 128)]))


def body_parameters(model: GPTNeoXForCausalLM) -> int:
    """Return the number of parameters without the two embedding tables."""
    return sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint whole or not at all."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def pretrain(folder: Path, shape: list[int], ladder, train: np.ndarray, held_out: np.ndarray) -> None:
    """Train one model, or continue its training, and save it in `folder`."""
    width, blocks, heads = shape
    model = new_model(width, blocks, heads)
    parameters = body_parameters(model)
    bytes_a_step = LENGTH * ladder.windows
    steps = math.ceil(max(ladder.bytes, ladder.bytes_per_parameter * parameters) / bytes_a_step)
    peak = ladder.peak * math.sqrt(64 / width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    first, seconds, curve = 0, 0.0, []
    checkpoint = folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds, curve = saved["step"], saved["cpu_seconds"], saved["curve"]
    begun, last = time.process_time(), time.monotonic()
    for step in range(first, steps):
        rate = min(1, (step + 1) / (0.02 * steps)) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.param_groups[0]["lr"] = peak * rate
        loss = loss_of(model, windows(train, ladder.windows, step + 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 20) == 0:
            curve.append([(step + 1) * bytes_a_step, round(float(loss.detach()), 3)])
        if time.monotonic() - last > CHECKPOINT_SECONDS:
            last = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_checkpoint(checkpoint, state | {"cpu_seconds": seconds + time.process_time() - begun, "curve": curve})
            print(f"{folder.name}: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
    measured = {
        "non_embedding_parameters": parameters,
        "width": width,
        "blocks": blocks,
        "heads": heads,
        "bytes_read": steps * bytes_a_step,
        "bytes_of_corpus": len(train),
        "steps": steps,
        "peak_learning_rate": round(peak, 6),
        "held_out_nats_per_byte": round(held_out_loss(model, held_out), 4),
        "training_curve": curve,  # bytes read, loss of a step
        "cpu_seconds": round(seconds + time.process_time() - begun),
        "torch": torch.__version__.split("+")[0],
    }
    model.to(torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(measured) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(folder.name, measured, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every model of the ladder")
    parser.add_argument("--ladder", type=Path, default=HERE / "ladder.yaml")
    parser.add_argument("--out", type=Path, default=HERE / "backbones", help="a folder for each model is made here")
    args = parser.parse_args()
    ladder = OmegaConf.load(args.ladder)
    texts = Path(ladder.texts)
    train, held_out = read(texts / "train.txt"), read(texts / "held_out.txt")
    for name in args.names or ladder.shapes:
        if not (args.out / name / "pretraining.json").exists():
            pretrain(args.out / name, list(ladder.shapes[name]), ladder, train, held_out)


if __name__ == "__main__":
    main()
