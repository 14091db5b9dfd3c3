"""Training steps of ours, of sentence-transformers' trainer and of our own padded path, side by side in one run.

    python tests/benchmarks/train.py [--size pythia-14m] [--batch 256] [--bf16] [--steps 6] [--cached] [--methods]

Same random weights, same pairs (lengths as in the paper, cut at 75 tokens), same loss (symmetric, over in-batch
negatives), same optimiser, same precision. The contestants take turns; each one's fastest step counts. Theirs
tokenises as it trains, as theirs does; ours reads a prepared store. `--methods` also measures freezing, bias-only and
LoRA of ours, as FLOP a second.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from embedscale import config as configs
from embedscale.calibrate import _config_of, _module, build, paper_lengths
from embedscale.contrastive import Batch
from embedscale.encoder import pack
from embedscale.loss import info_nce

LEARNING_RATE = 1e-5


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        b = a @ a
        float(b[0, 0])
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def pairs_of(config: Any, vocabulary: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches as (tokens [T], lengths [2 B])."""
    rng = np.random.default_rng(0)
    lengths = [paper_lengths(config, seed) for seed in range(number)]
    return [(rng.integers(2, vocabulary, int(each.sum())).astype(np.int32), each) for each in lengths]


def save_model(body: nn.Module, folder: Path, vocabulary: int) -> None:
    """A sentence-transformers folder whose tokenizer gives word `w7` the token 7."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", unk_token="w0", padding_side="right")
    backbone = folder / "backbone"
    body.save_pretrained(backbone)  # type: ignore[operator]
    fast.save_pretrained(backbone)
    transformer = Transformer(str(backbone), max_seq_length=75)
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")]).save(str(folder))


def ours(config: Any, body: nn.Module, batches: list, device: torch.device) -> Iterator[float]:
    """The loss of each step of the real module, without the Trainer's loop around it."""
    module = _module(body, config).to(device)
    module.encoder.train()
    optimizer = module.configure_optimizers()
    for step in itertools.count():
        tokens, lengths = batches[step % len(batches)]
        chunks = pack(tokens, lengths, config.resources.chunk_tokens)
        batch = Batch(step, len(lengths) // 2, chunks, torch.arange(len(lengths)), int(lengths.sum()), 0)
        loss = module.backward_through(batch.to(device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(loss)


def padded(config: Any, body: nn.Module, batches: list, device: torch.device) -> Iterator[float]:
    """The plain way: queries and positives each padded to the longest, a mask, mean pooling."""
    body = body.to(device).train()
    optimizer = torch.optim.AdamW(body.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    for step in itertools.count():
        tokens, lengths = batches[step % len(batches)]
        rows = torch.from_numpy(tokens).long().split(lengths.tolist())
        size, found = len(rows) // 2, []
        for part in (rows[:size], rows[size:]):
            ids = nn.utils.rnn.pad_sequence(list(part), batch_first=True).to(device)
            mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(r) for r in part])[:, None]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
                hidden = body(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state.float()
            found.append(functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None], dim=-1))
        loss = info_nce(*found, found[1][:0], config.loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(loss.detach())


class Theirs:
    """sentence-transformers' trainer; `seconds` are from the end of a step to the end of the next."""

    def __init__(self, config: Any, folder: Path, batches: list, cached: bool):
        from datasets import Dataset

        self.config, self.folder, self.cached = config, folder, cached
        columns: dict[str, list[str]] = {"anchor": [], "positive": []}
        for tokens, lengths in batches:
            rows = [" ".join(f"w{t}" for t in r) for r in np.split(tokens, np.cumsum(lengths)[:-1])]
            columns["anchor"] += rows[: len(rows) // 2]
            columns["positive"] += rows[len(rows) // 2 :]
        self.data = Dataset.from_dict(columns)

    def run(self, steps: int) -> tuple[list[float], list[float]]:
        """Seconds and losses of so many steps after the first."""
        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
        from sentence_transformers.sentence_transformer import losses
        from transformers import TrainerCallback

        model = SentenceTransformer(str(self.folder), device=None if torch.cuda.is_available() else "cpu")
        scale = 1 / self.config.loss.temperature
        if self.cached:
            chunk = min(64, self.config.training.batch_size)
            loss = losses.CachedMultipleNegativesSymmetricRankingLoss(model, scale=scale, mini_batch_size=chunk)
        else:
            loss = losses.MultipleNegativesSymmetricRankingLoss(model, scale=scale)
        ends, values = [], []

        class Clock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if "loss" in logs:
                    values.append(float(logs["loss"]))

        arguments = Arguments(
            output_dir=str(self.folder / "out"),
            per_device_train_batch_size=self.config.training.batch_size,
            max_steps=steps + 1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            max_grad_norm=0,
            bf16=self.config.training.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            train_sampling_strategy="sequential",
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=self.data, loss=loss, callbacks=[Clock()]
        )
        trainer.train()
        return list(np.diff(ends)), values


def timed(contestant: Iterator[float], steps: int) -> list[float]:
    next(contestant)  # the first after the others' turn warms the caches up
    found = []
    for _ in range(steps):
        begun = time.perf_counter()
        next(contestant)  # a float: the step is over
        found.append(time.perf_counter() - begun)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="pythia-14m")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cached", action="store_true", help="their cached loss too")
    parser.add_argument("--methods", action="store_true")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = [f"training.batch_size={args.batch}", f"training.learning_rate={LEARNING_RATE}"]
    words += ["training.precision=bf16"] if args.bf16 else []
    words += [f"resources.chunk_tokens={args.chunk_tokens}"] if args.chunk_tokens else []
    config = configs.load(None, words)
    labels = ["full", "freeze-0.5", "bias", "lora-r32"] if args.methods else ["full"]
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        body = build(args.size)
        vocabulary = body.get_input_embeddings().num_embeddings  # type: ignore[operator]
        batches = pairs_of(config, vocabulary, 4)
        folder = Path(temporary) / "model"
        save_model(body, folder, vocabulary)
        weights = body.state_dict()

        def fresh() -> nn.Module:
            again = build(args.size)
            again.load_state_dict(weights)
            return again

        def own(label: str) -> Iterator[float]:
            return ours(
                replace(_config_of(config, args.size, label), backbone=config.backbone), fresh(), batches, device
            )

        contestants: dict[str, Callable[[], list[float]]] = {}
        losses: dict[str, float] = {}
        for label in labels:
            losses[f"ours, {label}"] = next(own(label))
            runner = own(label)
            contestants[f"ours, {label}"] = lambda runner=runner: timed(runner, args.steps)  # type: ignore[misc]
        losses["ours, padded"] = next(padded(config, fresh(), batches, device))
        plain = padded(config, fresh(), batches, device)
        contestants["ours, padded"] = lambda: timed(plain, args.steps)
        for cached in (False, True) if args.cached else (False,):
            name = "sentence-transformers" + (", cached" if cached else "")
            theirs = Theirs(config, folder, batches, cached)

            def turn(theirs: Theirs = theirs, name: str = name) -> list[float]:
                seconds, values = theirs.run(args.steps)
                losses.setdefault(name, values[0])
                return seconds

            contestants[name] = turn
        best = dict.fromkeys(contestants, float("inf"))
        peak = 0.0
        for _ in range(args.turns):
            peak = max(peak, matrix_peak(device, torch.bfloat16 if args.bf16 else torch.float32))
            for name, run in contestants.items():
                best[name] = min(best[name], *run())
    show(args, config, batches, best, losses, peak)


def show(args: Any, config: Any, batches: list, best: dict[str, float], losses: dict[str, float], peak: float) -> None:
    tokens = np.mean([lengths.sum() for _, lengths in batches])
    squares = np.mean([(lengths**2).sum() for _, lengths in batches])
    title = (
        f"{args.size}, batches of {args.batch} pairs, {tokens:,.0f} tokens, {config.training.precision}, "
        f"{torch.get_num_threads()} threads; a product of 2048³ reaches {peak:.4g} FLOP/s"
    )
    table = Table("", "pairs/s", "ours is faster by", "FLOP/s", "of the product", "first loss", title=title)
    for name, seconds in best.items():
        label = name.removeprefix("ours, ")
        label = label if label in ("freeze-0.5", "bias", "lora-r32") else "full"
        cost = _module(build(args.size), _config_of(config, args.size, label)).cost
        speed = cost.exact(int(tokens), int(squares)) / seconds
        table.add_row(
            name,
            f"{args.batch / seconds:,.1f}",
            f"{seconds / best['ours, full']:.2f}",
            f"{speed:.4g}",
            f"{speed / peak:.0%}",
            f"{losses[name]:.5f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
