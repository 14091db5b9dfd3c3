"""Parts that compare numbers: the attention with float64, methods with a CPU, every setting for speed with none.

The truth is plain: softmax written out in float64, and the plain body in float32 on the CPU.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from parts import Row, Setting

from embedscale.model.attention import packed_attention
from embedscale.model.body import PlainBody
from embedscale.model.packing import pack
from embedscale.run.settings import load
from embedscale.training.batches import Batch
from embedscale.training.gradcache import accumulate_gradient
from embedscale.training.loss import loss_and_gradient
from embedscale.training.module import Contrastive
from embedscale.training.pricing.calibrate import build, module_of, paper_lengths, paper_tokens
from embedscale.training.pricing.calibration import config_of

METHODS = ("full", "freeze-0.5", "bias", "lora-r32")
# Largest relative errors of a right result. float32 sums in another order; bf16 has 8 bits.
FLOAT32, BF16 = 1e-3, 6e-2
HEADS = 4


def device_of(setting: Setting) -> torch.device:
    return torch.device("cpu") if setting.cpu else torch.device("cuda", 0)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(act: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Return the median of `times`, after two that do not count."""
    taken = []
    for number in range(times + 2):
        wait(device)
        begun = time.perf_counter()
        act()
        wait(device)
        if number > 1:
            taken.append(time.perf_counter() - begun)
    return 1000 * float(np.median(taken))


def differs(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ‖found − truth‖ / ‖truth‖."""
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((found - truth).norm() / truth.norm())


@contextmanager
def deterministic() -> Iterator[None]:
    """As a run trains."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attention(setting: Setting) -> Iterator[Row]:
    """The attention of packed sequences, forward and backward, against softmax in float64; and its time."""
    device = device_of(setting)
    config = load(None, ["training.batch_size=64"])
    few, many = paper_lengths(config, 0), np.tile(paper_lengths(config, 1), setting.pick(16, 1))
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        for size in (32, 64, 80, 128, 256):
            numbers = torch.Generator().manual_seed(size)
            (packed,) = pack(np.zeros(int(few.sum()), np.int32), few)
            inputs = [torch.randn(len(packed.tokens), HEADS, size, generator=numbers).to(dtype) for _ in range(4)]
            truth = _attention_in_float64([x.double() for x in inputs], packed.lengths.tolist(), size**-0.5)
            here = packed.to(device)
            with deterministic():
                first, second = (_attention([x.to(device) for x in inputs], here, size**-0.5) for _ in range(2))
            errors = [differs(a, b) for a, b in zip(first, truth, strict=True)]
            equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            (longer,) = pack(np.zeros(int(many.sum()), np.int32), many)
            longer = longer.to(device)
            large = [torch.randn(len(longer.tokens), HEADS, size, device=device, dtype=dtype) for _ in range(4)]
            with deterministic():
                both = milliseconds(lambda: _attention(large, longer, size**-0.5), device, setting.pick(10, 1))  # noqa: B023
            yield {
                "name": f"{dtype}, head size {size}".removeprefix("torch."),
                "ok": max(errors) < limit and equal,
                "out": errors[0], "dq": errors[1], "dk": errors[2], "dv": errors[3],
                "equal_bits_twice": equal, "tokens": len(longer.tokens), "ms": both,
            }  # fmt: skip


def _attention(inputs: list[torch.Tensor], packed: Any, scaling: float) -> list[torch.Tensor]:
    """Return output and gradients, each [T, heads, size]."""
    query, key, value, above = inputs
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    module = SimpleNamespace(is_causal=True)
    out, _ = packed_attention(module, *(x.transpose(0, 1)[None] for x in leaves), None, scaling, packing=packed)  # type: ignore[arg-type]
    return [out[0].detach(), *torch.autograd.grad(out[0], leaves, above)]


def _attention_in_float64(inputs: list[torch.Tensor], lengths: list[int], scaling: float) -> list[torch.Tensor]:
    query, key, value, above = inputs
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in leaves), strict=True):
        scores = torch.einsum("qhs,khs->hqk", q, k) * scaling
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        parts.append(torch.einsum("hqk,khs->qhs", scores.masked_fill(later, -torch.inf).softmax(-1), v))
    out = torch.cat(parts)
    return [out.detach(), *torch.autograd.grad(out, leaves, above)]


def a_module(size: str, method: str, *words: str) -> Contrastive:
    """Return a module with the same weights each time, on the CPU; adapters are not zero."""
    gc.collect()  # the module before, whose layers hold themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    config = config_of(load(None, ["training.learning_rate=1e-4", *words]), size, method)
    module = module_of(build(size), config)
    numbers = torch.Generator().manual_seed(1)
    for name, parameter in module.encoder.body.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=numbers)
    module.encoder.train()
    return module


def a_batch(module: Contrastive, chunk: int | None = None, seed: int = 0) -> Batch:
    """Return a batch with the paper's lengths, on the CPU."""
    lengths = paper_lengths(module.config, seed)
    embedding: Any = module.encoder.body.get_input_embeddings()  # type: ignore[operator]
    tokens = paper_tokens(int(lengths.sum()), embedding.num_embeddings, seed)
    chunks, squares = pack(tokens, lengths, chunk), int((lengths**2).sum())
    return Batch(0, len(lengths) // 2, chunks, torch.arange(len(lengths)), int(lengths.sum()), squares)


def gradients(module: Contrastive, batch: Batch, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one batch on a device, as a run computes them."""
    module = module.to(device)
    with deterministic():
        loss = float(module.backward_through(batch.to(device)))
    return loss, {name: parameter.grad.cpu() for name, parameter in module.trainable.items()}  # type: ignore[union-attr]


def on_the_cpu(module: Contrastive, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of the plain body in float32 on the CPU, with the layers of transformers and PEFT."""
    for layer in module.encoder.body.modules():
        vars(layer).pop("forward", None)  # what a GPU has in their place
    order = batch.order
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))

    def loss(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, gradient = loss_and_gradient(embeddings[place], batch.pairs, module.config.loss, batch.texts)
        return value, gradient[order]

    found = accumulate_gradient(PlainBody(module.encoder), batch.chunks, loss)
    return float(found), {name: parameter.grad for name, parameter in module.trainable.items()}  # type: ignore[misc]


def compared(
    name: str, found: tuple[float, dict[str, torch.Tensor]], truth: tuple[float, dict[str, torch.Tensor]], limit: float
) -> Row:
    """Return a row: the difference of the losses and of the gradients, in all and of the worst large tensor."""
    whole = torch.cat([x.flatten() for x in truth[1].values()])
    error = differs(torch.cat([x.flatten() for x in found[1].values()]), whole)
    large = {key: x for key, x in truth[1].items() if x.norm() > 1e-2 * whole.norm()}
    worst = max(large, key=lambda key: differs(found[1][key], truth[1][key]))
    return {
        "name": name, "ok": error < limit and abs(found[0] - truth[0]) < limit * abs(truth[0]),
        "loss": found[0], "loss_differs": abs(found[0] - truth[0]), "gradient_differs": error,
        "worst_tensor": worst, "of_it": differs(found[1][worst], truth[1][worst]),
    }  # fmt: skip


def methods(setting: Setting) -> Iterator[Row]:
    """Loss and gradients of the four methods at 70M, in both precisions, against the CPU."""
    device, size = device_of(setting), setting.pick("pythia-70m", "pythia-14m")
    batch = [f"training.batch_size={setting.pick(32, 8)}"]
    for method in METHODS:
        module = a_module(size, method, *batch)
        truth = on_the_cpu(module, a_batch(module))
        for precision, limit in (("float32", FLOAT32), ("bf16", BF16)):
            other = a_module(size, method, *batch, f"training.precision={precision}")
            yield compared(f"{method}, {precision}", gradients(other, a_batch(other), device), truth, limit)


def variants(setting: Setting) -> Iterator[Row]:
    """Settings that must not change the result beyond rounding: chunks, checkpointing, compiled blocks; equal bits."""
    device, size = device_of(setting), setting.pick("pythia-70m", "pythia-14m")
    batch = f"training.batch_size={setting.pick(128, 8)}"
    checkpointed, compiled = "resources.activation_checkpointing=true", "resources.compile=true"
    for precision, limit in (("float32", FLOAT32), ("bf16", BF16)):
        words = (batch, f"training.precision={precision}")
        first, second = (gradients(a_module(size, "full", *words), a_batch(a_module(size, "full", *words)), device)
                         for _ in range(2))  # fmt: skip
        equal = first[0] == second[0] and all(torch.equal(first[1][key], second[1][key]) for key in first[1])
        yield {"name": f"twice, {precision}", "ok": equal, "equal_bits": equal, "loss": first[0]}
        module = a_module(size, "full", *words)
        cut = a_batch(module, int(a_batch(module).tokens) // 3 + 80)
        yield compared(f"{len(cut.chunks)} chunks, {precision}", gradients(module, cut, device), first, limit)
        module = a_module(size, "full", *words, checkpointed)
        yield compared(f"checkpointed, {precision}", gradients(module, a_batch(module), device), first, limit)
        module = a_module(size, "full", *words)
        if vars(module.encoder.body).pop("forward", None):
            yield compared(
                f"blocks of transformers, {precision}", gradients(module, a_batch(module), device), first, limit
            )
    if not setting.cpu:  # a compiler for the CPU is not everywhere
        module = a_module(size, "full", batch, "training.precision=bf16", compiled)
        yield compared("compiled, bf16", gradients(module, a_batch(module), device), first, limit)
