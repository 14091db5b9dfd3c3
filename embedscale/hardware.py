"""What the machine under a run gives: the speed of a matrix product, and memory."""

import ctypes
import sys
import time
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def matrix_product_peak(device: torch.device, precision: str, size: int | None = None) -> float:
    """FLOP a second of a large square matrix product here: the best of three."""
    size = size or (4096 if device.type == "cuda" else 768)
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees; for the commands that train or encode, on a CPU.

    glibc gives every large block back, and the kernel zeroes its pages anew when the next step asks for them: a
    quarter of a small model's step. Elsewhere than under glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, -1)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident set's high-water mark


def peak_memory(device: torch.device) -> int:
    """Bytes since the reset: allocated on a GPU; of this whole process, libraries included, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
