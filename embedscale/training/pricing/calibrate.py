"""Measure the speed and the memory of training on this hardware, for each size and method.

The steps are those of the real module under a real Trainer, on synthetic pairs with the paper's lengths (section 4.1).
The weights are random, which costs as much as trained ones. `sweep plan` and the time limits of jobs use the file.
"""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

from embedscale.errors import DONE, UserError
from embedscale.files import now
from embedscale.model.backbone import empty_body, load_body, shape_without_weights
from embedscale.model.hardware import (
    allow_tf32,
    compile_seconds,
    device_name,
    keep_freed_memory,
    matrix_product_peak,
    peak_memory,
    reset_peak_memory,
    training_device,
)
from embedscale.model.packing import pack
from embedscale.run.config import RunConfig
from embedscale.run.cost import PAPER_LENGTHS, PAPER_PAIR, cost_of
from embedscale.run.families import short_name
from embedscale.terminal import console
from embedscale.training.batches import Batch
from embedscale.training.memory import fitting_chunk
from embedscale.training.module import Contrastive, assemble
from embedscale.training.plan import TrainingPlan
from embedscale.training.pricing.calibration import SIZES, CalibratedRow, Calibration, Case, configs_of, settings_of
from embedscale.training.train import bare_trainer, begin_worker, loading_workers, quieten
from embedscale.values import sound

SPREAD = 0.6  # standard deviation of ln(length)
WARM_STEPS = 2  # steps before the measured ones
HOW = (
    "Training steps (forward, loss, backward, AdamW) of embedscale's own module under lightning.Trainer, random "
    "weights, synthetic pairs: query and positive lengths log-normal with means 14 and 64 after the cut at the "
    "context, tokens as frequent as a text's words. After {warm} steps, about {seconds:g} s are measured. FLOP are "
    "those of matrix products and attention, without what GradCache or checkpointing compute again; the peak is the "
    "best of three products of large square matrices beside it."
)


def calibrate(config: RunConfig, out: str, sizes: Sequence[str], methods: Sequence[str], seconds: float) -> int:
    """Measure each size and method that the file does not hold yet; write the file after each of them.

    Raises UserError before the first measurement: for an unknown size or method, for a method that a size cannot have,
    and for a file that was measured with other settings.
    """
    configs = configs_of(config, sizes, methods, seconds)
    device = training_device()
    for each in configs:
        cost_of(shape_without_weights(each.backbone), each.method)
    path, facts = Path(out), _facts(config, device)
    found = sound(Calibration.read(path)) or Calibration(
        rows=[], how=HOW.format(warm=WARM_STEPS, seconds=seconds), **facts
    )
    if differing := found.differs(facts):
        raise UserError(f"{path}: was measured with {differing}; give another --out")
    done = {(each.backbone, each.method) for each in (*found.rows, *found.too_large)}
    path.parent.mkdir(parents=True, exist_ok=True)
    output = console(120)
    quieten()
    keep_freed_memory()
    allow_tf32(config.training.precision)
    for each in configs:
        case = Case(short_name(each.backbone.name), each.method.label)
        if (case.backbone, case.method) in done:
            continue
        output.print(f"{now()} {case.backbone} {case.method} …")
        peak = matrix_product_peak(device, config.training.precision, 8192 if device.type == "cuda" else 2048)
        try:
            row = measure(each, device, seconds, peak)
        except torch.OutOfMemoryError:
            row = None
        gc.collect()  # the module and its Trainer refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
        found = replace(
            found,
            peak_flop_per_second=max(found.peak_flop_per_second, peak),
            rows=[*found.rows, row] if row else found.rows,
            too_large=found.too_large if row else [*found.too_large, case],
        )
        found.write(path)
    output.print(_table(found))
    return DONE


def _facts(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Return what all rows of a file have in common."""
    name = device_name(device)
    told = name if device.type == "cuda" else f"CPU {name}, {torch.get_num_threads()} threads"
    rest = {"workers": loading_workers(config), "torch": version("torch")}
    return {"device": told} | settings_of(config) | rest


def measure(config: RunConfig, device: torch.device, seconds: float, peak: float) -> CalibratedRow | None:
    """Return a row of the file: the speed with the largest chunks that fit in memory; None if no chunk fits.

    A model whose weights and optimizer moments exceed the memory is never built.
    """
    size = config.backbone.name
    with torch.device("meta"):
        shapes = module_of(build(size) if size in SIZES else empty_body(config.backbone), config)
    weights, trained = (sum(x.nbytes for x in found) for found in (shapes.parameters(), shapes.trainable.values()))
    if weights + 3 * trained > shapes.memory:
        return None
    torch.compiler.reset()  # all sizes share the code of their blocks, and torch limits how often a code is compiled
    compiled = compile_seconds()
    if size in SIZES:
        with device:  # draw the weights on the device
            body = build(size)
    else:
        body = load_body(config.backbone, config.training.seed)
    lengths = [paper_lengths(config, seed) for seed in range(4)]
    module = module_of(body, config).to(device)
    chunk = config.resources.chunk_tokens or fitting_chunk(module) or max(int(each.sum()) for each in lengths)
    while True:
        reset_peak_memory(device)
        try:
            steps, took, tokens, flop = _timed(module, config, lengths, chunk, seconds)
        except torch.OutOfMemoryError:
            return None
        if not module.halvings:
            break
        # Each step had to cut its chunks again. Measure once more with chunks that the loader cuts to the right size.
        chunk //= 2**module.halvings
        module.halvings = 0
    return CalibratedRow(
        backbone=short_name(size),
        method=config.method.label,
        tokens_per_second=round(tokens / took, 1),
        pairs_per_second=round(steps * config.training.batch_size / took, 2),
        flop_per_second=round(flop / took),
        share_of_peak=round(flop / took / peak, 4),
        memory_gb=round(peak_memory(device) / 1e9, 2),
        chunk_tokens=chunk,
        steps=steps,
        seconds=round(took, 4),
        compile_seconds=round(compile_seconds() - compiled, 1),
    )


def build(size: str, **changes: Any) -> nn.Module:
    """Return a body of a known size with random float32 weights; its configuration is in the table of its family.

    `changes` replace values of its `config.json`; another `model_type` makes blocks of another kind in the same size.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**(dict(SIZES[size].config) | changes))
    body: nn.Module = AutoModel.from_config(config, dtype=torch.float32)
    return body


def paper_lengths(config: RunConfig, seed: int) -> np.ndarray:
    """Return the token counts of a batch's queries, then of its positives, with the paper's means: int64 [2 B]."""
    rng = np.random.default_rng(seed)
    context, found = config.data.context, []
    for mean in PAPER_LENGTHS:
        noise = np.exp(SPREAD * rng.standard_normal(config.training.batch_size))
        low, high = 0.0, 100.0 * context
        for _ in range(60):  # bisect for the scale at which the cut lengths have the mean
            scale = (low + high) / 2
            cut = np.clip(np.rint(scale * noise), 1, context)
            low, high = (scale, high) if cut.mean() < min(mean, context) else (low, scale)
        found.append(cut.astype(np.int64))
    return np.concatenate(found)


def paper_tokens(number: int, vocabulary: int, seed: int) -> np.ndarray:
    """Return tokens as frequent as words of a text (Zipf–Mandelbrot), rare ones with high ids: int32 [number]."""
    frequencies = 1 / (np.arange(vocabulary) + 2.7)
    drawn = np.random.default_rng(seed).choice(vocabulary, number, p=frequencies / frequencies.sum())
    return drawn.astype(np.int32)


def module_of(body: nn.Module, config: RunConfig) -> Contrastive:
    """Return the module of a run with an endless budget, for steps that are measured."""
    size = config.training.batch_size
    tokens = 2 * size * PAPER_PAIR
    return assemble(body, config, TrainingPlan(1e30, 0, 0, tokens, 2 * size, 2, size, 0, 1, 1e-5, 1, 1.0, "", "", []))


class _Synthetic(Dataset[Batch]):
    """A few batches that repeat, packed anew each time, as a run packs its batches.

    Their tokens are drawn once: drawing them takes longer than a step of a small model, and a run draws none.
    """

    def __init__(self, config: RunConfig, lengths: Sequence[np.ndarray], vocabulary: int, chunk: int):
        self.config, self.lengths, self.chunk = config, lengths, chunk
        self.tokens = [paper_tokens(int(each.sum()), vocabulary, seed) for seed, each in enumerate(lengths)]

    def __getitem__(self, step: int) -> Batch:
        number = step % len(self.lengths)
        lengths = self.lengths[number]
        return Batch(
            step=step,
            pairs=self.config.training.batch_size,
            chunks=pack(self.tokens[number], lengths, self.chunk),
            texts=torch.arange(len(lengths)),
            tokens=int(lengths.sum()),
            squared_lengths=int((lengths**2).sum()),
        )

    def __len__(self) -> int:
        return 10**6


class _Clock(lightning.Callback):
    """Stops the run about `seconds` after the first steps. One step sets the number of steps; others read no clock."""

    def __init__(self, seconds: float):
        self.seconds, self.steps = seconds, 10**6

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.step == WARM_STEPS - 1:
            self.warm = self._now(module)
        elif module.step == WARM_STEPS:
            self.begun = self._now(module)
            self.steps = max(3, min(1000, math.ceil(self.seconds / (self.begun - self.warm))))
        elif module.step == WARM_STEPS + self.steps:
            self.took = self._now(module) - self.begun
            trainer.should_stop = True

    def _now(self, module: Any) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()


def _timed(
    module: Contrastive, config: RunConfig, lengths: Sequence[np.ndarray], chunk: int, seconds: float
) -> tuple[int, float, int, int]:
    """Return the number of measured steps, their seconds, tokens and FLOP."""
    clock = _Clock(seconds)
    trainer = bare_trainer(devices=1, callbacks=[clock], logger=False)
    module.step = module.tokens = module.flop_exact = 0
    module.encoder.train()
    vocabulary = module.encoder.body.get_input_embeddings().num_embeddings  # type: ignore[operator]
    batches = _Synthetic(config, lengths, vocabulary, chunk)
    workers = loading_workers(config)
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=begin_worker,
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    trainer.fit(module, loader)
    measured = [lengths[step % len(lengths)] for step in range(WARM_STEPS, WARM_STEPS + clock.steps)]
    tokens, squares = sum(int(each.sum()) for each in measured), sum(int((each**2).sum()) for each in measured)
    once = replace(module.cost, recompute=0, recompute_attention=0)
    return clock.steps, clock.took, tokens, once.exact(tokens, squares)


def _table(found: Calibration) -> Table:
    table = Table(
        "backbone", "method", "tokens/s", "pairs/s", "FLOP/s", "of peak", "memory, GB", "chunk, tokens",
        title=f"{found.device}, {found.precision}, batches of {found.batch_size} pairs; a matrix product "
        f"reaches {found.peak_flop_per_second:.3g} FLOP/s",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for row in found.rows:
        table.add_row(
            row.backbone,
            row.method,
            f"{row.tokens_per_second:,.0f}",
            f"{row.pairs_per_second:,.1f}",
            f"{row.flop_per_second:.3g}",
            f"{row.share_of_peak:.0%}",
            f"{row.memory_gb:.2f}",
            f"{row.chunk_tokens:,}",
        )
    for case in found.too_large:
        table.add_row(case.backbone, case.method, "does not fit")
    return table
