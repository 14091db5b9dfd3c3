"""Measure and limit what a run uses of its machine: the speed of a matrix product, and memory."""

import ctypes
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def training_device() -> torch.device:
    """Return the device that this process trains on: the GPU with its number on the machine, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or, on a CPU, of the processor, as Linux knows it; else its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def allow_tf32(precision: str) -> None:
    """Let a GPU round the factors of float32 products to TF32 from now on, if `precision` is tf32. A CPU never does."""
    if precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True


def matrix_product_peak(device: torch.device, precision: str, size: int | None = None) -> float:
    """Return the FLOP per second of a large square matrix product, the best of three measurements."""
    size = size or (4096 if device.type == "cuda" else 768)
    # Random numbers, because equal numbers need less power, and a GPU would run faster than it does in training.
    numbers = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, generator=numbers, device=device, dtype=dtype)
    products = 10 if device.type == "cuda" else 1
    seconds = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return products * 2 * size**3 / min(seconds[1:])


def compile_seconds() -> float:
    """Return the seconds that torch.compile has taken in this process."""
    # torch has no public name for this time.
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0))


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees; call it before the first tensor on a GPU.

    By default glibc returns every large block to the system, and the kernel zeroes its pages when the next step asks
    for them: a quarter of the step of a small model. With another C library this function does nothing.

    oneDNN caches compiled code for 1,024 shapes, a third of a GB. Lengths differ from step to step, so 64 are enough.

    On a GPU, torch keeps freed blocks by itself, but a block serves only requests of about its size. Sizes differ from
    step to step, so blocks would pile up. In expandable segments any free piece serves.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)  # one heap for all threads: what one thread freed, another can use


def give_back_freed_memory(device: torch.device) -> None:
    """Return heap fragments to the system, on a CPU; without this, fragmentation grows with every step."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None and device.type == "cpu":
        trim(0)


def usable_memory(device: torch.device) -> int:
    """Return the bytes that all runs on a device may use together.

    These are nine tenths of the GPU's memory, or of the smallest limit of the machine, its control group and its SLURM
    job: a number that does not depend on what is free now, so that equal machines choose equal chunks.
    """
    if device.type == "cuda":
        return int(0.9 * torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # the two versions of control groups
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path("/sys/fs/cgroup", file).read_text()))
    with suppress(KeyError, ValueError):
        limits.append(int(os.environ["SLURM_MEM_PER_NODE"]) * 2**20 or limits[0])
    return int(0.9 * min(limits))


def memory_in_use(device: torch.device) -> int:
    """Return the bytes allocated on a GPU, or those of this whole process, libraries included, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident set


def peak_memory(device: torch.device) -> int:
    """Return the most bytes taken since the reset; on a GPU with those that torch keeps for later, as others see it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
