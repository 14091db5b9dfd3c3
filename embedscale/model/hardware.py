"""What the machine under a run gives: the speed of a matrix product, and memory."""

import ctypes
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def training_device() -> torch.device:
    """Where this process trains: the GPU of its number on the machine, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def matrix_product_peak(device: torch.device, precision: str, size: int | None = None) -> float:
    """FLOP a second of a large square matrix product here: the best of three."""
    size = size or (4096 if device.type == "cuda" else 768)
    # Of random numbers: on equal ones a GPU draws less power, and runs faster than it ever would in training.
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
    """That torch.compile has taken in this process."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0))


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees; for the commands that train or encode, on a CPU.

    glibc gives every large block back, and the kernel zeroes its pages anew when the next step asks for them: a
    quarter of a small model's step. Elsewhere than under glibc this does nothing.

    oneDNN keeps what it compiled for 1,024 shapes, a third of a GB; a step has other lengths than the one before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)  # what one thread has freed, another may have


def give_back_freed_memory(device: torch.device) -> None:
    """What `keep_freed_memory` kept on a CPU, back to the system: pieces between what is in use, too small for the next
    step's other lengths, and more from step to step.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None and device.type == "cpu":
        trim(0)


def usable_memory(device: torch.device) -> int:
    """Bytes that all who share the device may take together, the same on every machine of a kind: nine tenths of the
    GPU's memory, or of the machine's, its control group's or its SLURM job's.
    """
    if device.type == "cuda":
        return int(0.9 * torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups' two versions
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path("/sys/fs/cgroup", file).read_text()))
    with suppress(KeyError, ValueError):
        limits.append(int(os.environ["SLURM_MEM_PER_NODE"]) * 2**20 or limits[0])
    return int(0.9 * min(limits))


def memory_in_use(device: torch.device) -> int:
    """Bytes: allocated on a GPU; of this whole process, libraries included, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident set's high-water mark


def peak_memory(device: torch.device) -> int:
    """Bytes since the reset, counted as by `memory_in_use`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
