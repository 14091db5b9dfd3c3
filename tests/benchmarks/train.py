"""Compare training steps of our module, of sentence-transformers' trainer and of a padded module, in one run.

    python tests/benchmarks/train.py [--size pythia-14m] [--batch 256] [--llama] [--bf16] [--tuned] [--methods]

All have the same random weights, pairs (lengths as in the paper, cut at 75 tokens; tokens as frequent as words of a
text), loss (symmetric, over in-batch negatives), optimizer and precision. Each contestant has its own process, and
they take turns. The median step counts; the first two steps of each turn do not. *Core-s* is processor time: with one
thread it tells the ratio on a busy machine too; more threads that wait for each other count as busy.
sentence-transformers tokenises
during training; our module has its tokens, as from a prepared store. `--methods` also measures our freezing, bias-only
training and LoRA. `--tuned` also measures sentence-transformers at its best: each batch is encoded in four parts of
similar lengths, with four loader processes on a GPU, and with tcmalloc on a CPU, if the machine has it. `--llama`
builds Llama's blocks with the width, number of blocks, heads, MLP width and vocabulary of the size.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from transformers import AutoModel
from turns import Contestant, tcmalloc

from embedscale.model.hardware import keep_freed_memory, matrix_product_peak
from embedscale.model.packing import pack
from embedscale.run.cost import cost_of
from embedscale.run.families import shape_by_name
from embedscale.run.method import Method, method_of_label
from embedscale.run.settings import load
from embedscale.training.batches import Batch
from embedscale.training.loss import info_nce
from embedscale.training.pricing.calibrate import build, module_of, paper_lengths, paper_tokens
from embedscale.training.pricing.calibration import SIZES, config_of

METHODS = ["full", "freeze-0.5", "bias", "lora-r32"]
LEARNING_RATE = 1e-5
PARTS = 4  # of a batch of sentence-transformers, tuned
BATCHES = 16  # different batches, so that few steps profit from an earlier step with the same lengths
WARM = 2  # steps at the beginning of a turn that do not count
Turn = tuple[np.ndarray, float]  # seconds and processor seconds of each step, [steps, 2], and the first loss


def pairs_of(config: Any, vocabulary: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return batches as (tokens [T], lengths [2 B])."""
    lengths = [paper_lengths(config, seed) for seed in range(number)]
    found = enumerate(lengths)
    return [(2 + paper_tokens(int(each.sum()), vocabulary - 2, seed), each) for seed, each in found]


def save_model(size: str, llama: bool, folder: Path) -> None:
    """Save a sentence-transformers model with random weights, whose tokenizer gives the word `w7` the token 7.

    The body and its tokenizer are in `folder / "backbone"`.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    body = build(size, **({"model_type": "llama"} if llama else {}))
    words = {"[UNK]": 0, "[PAD]": 1} | {f"w{i}": i for i in range(2, body.config.vocab_size)}  # type: ignore[union-attr]
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", padding_side="right"
    )
    backbone = folder / "backbone"
    body.save_pretrained(backbone)  # type: ignore[operator]
    fast.save_pretrained(backbone)
    transformer = Transformer(str(backbone), max_seq_length=75)
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")]).save(str(folder))


def setting(words: list[str], label: str, folder: Path) -> tuple[Any, nn.Module, list, torch.device]:
    """Return the configuration, body, batches and device of our contestants."""
    config = config_of(load(None, words), str(folder / "backbone"), label)
    body = AutoModel.from_pretrained(config.backbone.name, dtype=torch.float32)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return config, body, pairs_of(config, body.get_input_embeddings().num_embeddings, BATCHES), device


def ours(words: list[str], label: str, folder: Path) -> Callable[[int], Turn]:
    """Make steps of the real module, without the Trainer's loop."""
    config, body, batches, device = setting(words, label, folder)
    module = module_of(body, config).to(device)
    module.encoder.train()
    optimizer = module.configure_optimizers()

    def step(number: int) -> float:
        tokens, lengths = batches[number % BATCHES]
        chunks = pack(tokens, lengths, config.resources.chunk_tokens)
        batch = Batch(number, len(lengths) // 2, chunks, torch.arange(len(lengths)), int(lengths.sum()), 0)
        loss = module.backward_through(batch.to(device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return timed(step)


def padded(words: list[str], folder: Path) -> Callable[[int], Turn]:
    """Make steps of the usual way: queries and positives padded to the longest, a mask, mean pooling."""
    config, body, batches, device = setting(words, "full", folder)
    body = body.to(device).train()
    optimizer = torch.optim.AdamW(body.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)

    def step(number: int) -> float:
        tokens, lengths = batches[number % BATCHES]
        rows = torch.from_numpy(tokens).long().split(lengths.tolist())
        half, found = len(rows) // 2, []
        for part in (rows[:half], rows[half:]):
            ids = nn.utils.rnn.pad_sequence(list(part), batch_first=True).to(device)
            mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(r) for r in part])[:, None]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
                hidden = body(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state.float()
            found.append(functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None], dim=-1))
        loss = info_nce(*found, found[1][:0], config.loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return timed(step)


def timed(step: Callable[[int], float]) -> Callable[[int], Turn]:
    """Time a turn of this many steps, after `WARM` steps that do not count."""
    numbers = itertools.count()

    def turn(steps: int) -> Turn:
        ends, losses = [now()], []
        for _ in range(WARM + steps):
            losses.append(step(next(numbers)))  # `step` returns a number, so the step is finished
            ends.append(now())
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the other contestants
        return np.diff(ends, axis=0)[WARM:], losses[0]

    return turn


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def theirs(words: list[str], folder: Path, cached: bool = False, tuned: bool = False) -> Callable[[int], Turn]:
    """Time turns of sentence-transformers' trainer, from the end of one step to the end of the next."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer import losses
    from transformers import TrainerCallback

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    config = load(None, words)
    model = SentenceTransformer(str(folder), device=None if torch.cuda.is_available() else "cpu")
    columns: dict[str, list[str]] = {"anchor": [], "positive": []}
    for tokens, lengths in pairs_of(config, model[0].auto_model.config.vocab_size, BATCHES):
        rows = [" ".join(f"w{t}" for t in row) for row in np.split(tokens, np.cumsum(lengths)[:-1])]
        columns["anchor"] += rows[: len(rows) // 2]
        columns["positive"] += rows[len(rows) // 2 :]
    found = model.tokenizer(columns["positive"])["input_ids"]
    expected = np.split(tokens, np.cumsum(lengths)[:-1])[config.training.batch_size :]
    assert all(row == list(other) for row, other in zip(found[-len(expected) :], expected, strict=True)), "other tokens"
    scale = 1 / config.loss.temperature
    if cached:
        chunk = min(64, config.training.batch_size)
        loss = losses.CachedMultipleNegativesSymmetricRankingLoss(model, scale=scale, mini_batch_size=chunk)
    else:
        loss = losses.MultipleNegativesSymmetricRankingLoss(model, scale=scale)

    with (
        torch.no_grad(),
        torch.autocast(model.device.type, torch.bfloat16, enabled=config.training.precision == "bf16"),
    ):
        rows = [columns[name][: config.training.batch_size] for name in ("anchor", "positive")]
        batch = [
            {key: x.to(model.device) for key, x in model.tokenizer(part, padding=True, return_tensors="pt").items()}
            for part in rows
        ]
        first = float(loss(batch, None))  # of the batch that the others begin with; the Trainer shuffles
    if tuned:
        in_sorted_parts(model)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(now())

    def turn(steps: int) -> Turn:
        clock = Clock()
        arguments = Arguments(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=config.training.batch_size,
            max_steps=WARM + steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            max_grad_norm=0,
            bf16=config.training.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=4 if tuned and torch.cuda.is_available() else 0,
            save_strategy="no",
            report_to="none",
        )
        data = Dataset.from_dict(columns)
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[clock]
        ).train()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return np.diff(clock.ends, axis=0)[WARM - 1 :], first

    return turn


def in_sorted_parts(model: Any) -> None:
    """Make a SentenceTransformer encode a batch in parts of similar lengths, each padded to its own longest text."""
    whole = model.forward

    def forward(features: dict[str, Any], **more: Any) -> dict[str, Any]:
        mask = features["attention_mask"]
        lengths = mask.sum(1)
        order, found = lengths.argsort(), []
        for part in order.chunk(PARTS):
            longest = int(lengths[part].max())
            found.append(
                whole(
                    {k: x[part, :longest] if getattr(x, "shape", 0) == mask.shape else x for k, x in features.items()},
                    **more,
                )
            )
        embeddings = torch.cat([each["sentence_embedding"] for each in found])
        return features | {"sentence_embedding": embeddings[order.argsort()]}

    model.forward = forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="pythia-14m", choices=SIZES, metavar="SIZE")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--llama", action="store_true", help="Llama's blocks in this size")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cached", action="store_true", help="their cached loss too")
    parser.add_argument("--tuned", action="store_true", help="theirs with sorted parts and loader processes too")
    parser.add_argument("--methods", action="store_true")
    args = parser.parse_args()
    words = [f"training.batch_size={args.batch}", f"training.learning_rate={LEARNING_RATE}"]
    words += ["training.precision=bf16"] if args.bf16 else []
    words += [f"resources.chunk_tokens={args.chunk_tokens}"] if args.chunk_tokens else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(args.size, args.llama, folder)
        labels = METHODS if args.methods else METHODS[:1]
        contestants = {f"ours, {label}": Contestant(ours, words, label, folder) for label in labels}
        contestants["ours, padded"] = Contestant(padded, words, folder)
        contestants["sentence-transformers"] = Contestant(theirs, words, folder)
        if args.cached:
            contestants["sentence-transformers, cached"] = Contestant(theirs, words, folder, True)
        if args.tuned:
            with nullcontext() if torch.cuda.is_available() else tcmalloc() as library:
                name = f"sentence-transformers, tuned{f', {library}' if library else ''}"
                contestants[name] = Contestant(theirs, words, folder, False, True)
        taken, losses, peak = {name: list[np.ndarray]() for name in contestants}, dict[str, float](), 0.0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for _ in range(args.turns):
            for name, contestant in contestants.items():
                product = 8192 if device.type == "cuda" else 2048
                peak = max(peak, matrix_product_peak(device, "bf16" if args.bf16 else "float32", product))
                seconds, loss = contestant.turn(args.steps)
                taken[name].append(seconds)
                losses.setdefault(name, loss)
        typical = {name: np.median(np.concatenate(turns), axis=0) for name, turns in taken.items()}
        show(args, load(None, words), folder, typical, losses, peak)


def show(
    args: Any, config: Any, folder: Path, typical: dict[str, np.ndarray], losses: dict[str, float], peak: float
) -> None:
    shape = shape_by_name(str(folder / "backbone"))
    assert shape is not None
    batches = [lengths for _, lengths in pairs_of(config, shape.vocabulary, BATCHES)]
    tokens, squares = np.mean([each.sum() for each in batches]), np.mean([(each**2).sum() for each in batches])
    title = (
        f"{args.size}{' as Llama' * args.llama}, batches of {args.batch} pairs, {tokens:,.0f} tokens, "
        f"{config.training.precision}, {torch.get_num_threads()} threads; a large product reaches {peak:.4g} FLOP/s"
    )
    columns = ("pairs/s", "ours/it", "pairs/core-s", "ours/it", "FLOP/s", "of the product", "first loss")
    table = Table("", *columns, title=title)
    for name, (seconds, busy) in typical.items():
        label = name.removeprefix("ours, ")
        cost = cost_of(shape, method_of_label(label) if label in METHODS else Method())
        speed = cost.exact(int(tokens), int(squares)) / seconds
        table.add_row(
            name,
            f"{args.batch / seconds:,.1f}",
            f"{seconds / typical['ours, full'][0]:.2f}",
            f"{args.batch / busy:,.1f}",
            f"{busy / typical['ours, full'][1]:.2f}",
            f"{speed:.4g}",
            f"{speed / peak:.0%}",
            f"{losses[name]:.5f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
