"""Parts that measure the machine and one step: rates, kernels, waits, milliseconds of GPU and host, memory."""

import os
import subprocess
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from equality import a_batch, a_module, deterministic, device_of, milliseconds, wait
from parts import Row, Setting

from embedscale.model.hardware import memory_in_use, peak_memory, reset_peak_memory
from embedscale.model.packing import pack
from embedscale.training.batches import Batch
from embedscale.training.memory import fitting_chunk

PACKAGES = ("torch", "triton", "lightning", "transformers", "peft", "sentence-transformers", "datasets", "omegaconf")


def machine(setting: Setting) -> Iterator[Row]:
    """What the machine is, and its rates: copy, products, the launch of a kernel."""
    device = device_of(setting)
    yield {"name": "packages"} | {name: _version(name) for name in PACKAGES}
    if not setting.cpu:
        asked = "--query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem,power.limit"
        found = subprocess.run(["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True)
        facts = torch.cuda.get_device_properties(device)
        yield {
            "name": "GPU", "smi": found.stdout.strip(), "multiprocessors": facts.multi_processor_count,
            "capability": torch.cuda.get_device_capability(device), "bytes": facts.total_memory,
            "cuda": torch.version.cuda, "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        }  # fmt: skip
    yield {"name": "CPU", "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    yield from _passes_over_memory(device, setting.pick(2**30, 2**22))
    for dtype, side, way in (
        (torch.bfloat16, setting.pick(8192, 512), "highest"),
        (torch.float32, setting.pick(4096, 512), "highest"),
        (torch.float32, setting.pick(4096, 512), "high"),
    ):
        torch.set_float32_matmul_precision(way)
        a = torch.randn(side, side, device=device).to(dtype)
        ms = milliseconds(lambda: a @ a, device)  # noqa: B023
        name = f"product, {dtype}".replace("torch.", "") + (", TF32" if way == "high" else "")
        yield {"name": name, "side": side, "TFLOP_per_second": 2 * side**3 / ms / 1e9}
    torch.set_float32_matmul_precision("highest")
    small = torch.zeros(1, device=device)
    begun = time.perf_counter()
    for _ in range(2000):
        small.add_(1)
    host = time.perf_counter() - begun
    wait(device)
    yield {"name": "launch", "host_us": 1e6 * host / 2000, "with_gpu_us": 1e6 * (time.perf_counter() - begun) / 2000}


def _passes_over_memory(device: torch.device, numbers: int) -> Iterator[Row]:
    large = torch.randn(numbers, device=device).bfloat16()
    other = torch.empty_like(large)
    for name, act in (("copy", lambda: other.copy_(large)), ("GELU", lambda: torch.nn.functional.gelu(large))):
        yield {"name": name, "GB_per_second": 2 * large.nbytes / milliseconds(act, device) / 1e6}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def step(setting: Setting) -> Iterator[Row]:
    """One step of a paper batch: milliseconds, host milliseconds, waits, kernels and which of them take the time."""
    for size in setting.pick(("pythia-14m", "pythia-160m"), ("pythia-14m",)):
        for method in ("full", "lora-r32"):
            yield from _step(setting, size, method)


def _step(setting: Setting, size: str, method: str) -> Iterator[Row]:
    device = device_of(setting)
    module = a_module(size, method, f"training.batch_size={setting.pick(1024, 8)}", "training.precision=bf16")
    module = module.to(device)
    batch, optimizer, name = a_batch(module).to(device), module.configure_optimizers(), f"{size}, {method}"

    def act() -> None:
        module.loss = module.backward_through(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        module.count(batch)

    with deterministic():
        reset_peak_memory(device)
        ms = milliseconds(act, device, setting.pick(8, 2))
        begun = time.perf_counter()
        act()
        host = 1000 * (time.perf_counter() - begun)
        peak, waits = peak_memory(device), _waits(act, device)
        yield {
            "name": name, "ok": not waits, "tokens": batch.tokens, "ms": ms, "host_ms": host, "waits": waits,
            "peak_gb": peak / 1e9, "pairs_per_second": 1e3 * batch.pairs / ms,
            "TFLOP_per_second": module.cost.exact(batch.tokens, batch.squared_lengths) / ms / 1e9,
        }  # fmt: skip
        yield from _kernels(name, act, setting)
        if vars(module.encoder.body).pop("forward", None):  # the same weights, batch and minute
            ms = milliseconds(act, device, setting.pick(8, 2))
            yield {"name": f"{name}, blocks of transformers", "ms": ms}


def _waits(act, device: torch.device) -> list[str]:
    """Return where a step waits for the GPU."""
    if device.type != "cuda":
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in found if "synchronizing" in str(each.message)]


def _kernels(name: str, act, setting: Setting) -> Iterator[Row]:
    """Rows of the profiler: how many kernels a step has, their time in all, and the dozen that take most of it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU if setting.cpu else ProfilerActivity.CUDA]) as seen:
        act()
        wait(device_of(setting))
    taken: dict[str, list[float]] = {}
    for event in seen.events():
        us = event.self_cpu_time_total if setting.cpu else event.self_device_time_total
        if us > 0:
            taken.setdefault(event.name, []).append(us)
    number, total = sum(map(len, taken.values())), sum(map(sum, taken.values()))
    yield {"name": f"{name}: kernels", "number": number, "ms": total / 1000}
    for kernel in sorted(taken, key=lambda key: -sum(taken[key]))[:12]:
        times = taken[kernel]
        yield {"name": f"{name}: kernel", "number": len(times), "ms": sum(times) / 1000, "what": kernel[:90]}


def memory(setting: Setting) -> Iterator[Row]:
    """Chunks that should fit a limit, of the longest and of the paper's lengths: peak against limit; then halving."""
    pairs = f"training.batch_size={setting.pick(1024, 8)}"
    limits = setting.pick((("pythia-14m", 4.0), ("pythia-160m", 16.0)), (("pythia-14m", 6.0),))
    for size, limit in limits:
        for method in ("full", "lora-r32"):
            yield _peak(setting, size, method, limit, pairs)
            if not setting.cpu:
                torch.cuda.empty_cache()
    yield from _halving(setting)


def _peak(setting: Setting, size: str, method: str, limit: float, pairs: str) -> Row:
    device = device_of(setting)
    module = a_module(size, method, pairs, "training.precision=bf16", f"resources.memory_gb={limit}").to(device)
    chunk, optimizer = fitting_chunk(module), module.configure_optimizers()
    lengths = np.full(2 * module.config.training.batch_size, module.config.data.context)
    chunks = pack(np.arange(lengths.sum()) % 50000, lengths, chunk)
    longest = Batch(0, len(lengths) // 2, chunks, torch.arange(len(lengths)), int(lengths.sum()), 0)
    reset_peak_memory(device)
    with deterministic():
        for batch in (longest, a_batch(module, chunk), a_batch(module, chunk, 1)):
            module.backward_through(batch.to(device))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    peak = peak_memory(device) / 1e9
    row = {"name": f"{size}, {method}", "chunk": chunk, "limit_gb": limit, "peak_gb": peak}
    if not setting.cpu:
        row |= {"allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9, "ok": 0.6 * limit < peak <= limit}
    return row


def _halving(setting: Setting) -> Iterator[Row]:
    """A GPU too small for the batch: the step cuts its chunks until they fit, and the loss stays."""
    if setting.cpu:
        yield {"name": "halving", "skipped": "needs a GPU"}
        return
    device = device_of(setting)
    words = ("training.batch_size=1024", "training.precision=bf16")
    module = a_module("pythia-70m", "full", *words).to(device)
    batch = a_batch(module).to(device)
    with deterministic():
        loss = float(module.backward_through(batch))
        module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((memory_in_use(device) + 3e9) / total)
        try:
            module.backward_in_memory(batch)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    differs = abs(float(module.loss) - loss)
    yield {"name": "halving", "ok": module.halvings > 0 and differs < 1e-3 * loss, "halvings": module.halvings,
           "loss": loss, "loss_differs": differs}  # fmt: skip
