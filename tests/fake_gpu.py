"""Training steps on a simulated GPU, in a separate process; prints a JSON row for each step.

    python tests/fake_gpu.py WORKSPACE

The simulated tensors have shapes, types and lifetimes, but no numbers. An operation that mixes devices, gives a kernel
wrong arguments or waits for a number fails here as on a real GPU.
"""

import ctypes
import json
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

MEMORY = 0.4e9  # bytes: memory limit of the rows that ask for the largest chunk


def load(workspace: Path) -> None:
    """Load the fake CUDA runtime. Call this before torch is imported, because torch looks for GPUs once."""
    torch = Path(sysconfig.get_paths()["purelib"], "torch")
    source, library = Path(__file__).with_suffix(".cpp"), workspace / "fake_gpu.so"
    words = ["-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", str(source), "-o", str(library)]
    subprocess.run(["g++", *words], check=True)
    for path in (*sorted((torch / "lib").glob("libgomp*")), torch / "lib/libc10.so", torch / "lib/libtorch_cpu.so"):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library)).register_guard()


def pretend() -> None:
    """Make torch answer as a build with CUDA does."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_available = lambda: True
    FakeTensorMode.avoid_device_init = True  # torch sets this itself if it finds no GPU
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(total_memory=80 * 10**9)
    torch.cuda.memory_allocated = lambda *_: 0
    torch.cuda.manual_seed = lambda _: None


def step(method: str, *words: str, chunk: int | None = None, fit: bool = False) -> dict:
    """Make one optimizer step. With `fit`, use the largest chunks that fit in memory, of the longest sequences."""
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from embedscale.model.packing import pack
    from embedscale.run.settings import load
    from embedscale.training.batches import Batch
    from embedscale.training.calibrate import build, config_of, module_of, paper_lengths, paper_tokens
    from embedscale.training.memory import _Live, fitting_chunk

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    gpu = torch.device("cuda", 0)
    settings = ["training.batch_size=256", "training.learning_rate=1e-5", *words]
    config = config_of(load(None, settings), "pythia-14m", method)
    lengths = paper_lengths(config, 0)
    if fit:
        chunk = fitting_chunk(module_of(build("pythia-14m"), config))
        lengths = np.full(len(lengths), config.data.context)
    row = {"method": method, "words": words, "chunk": chunk, "limited": fit}
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.nn.Module._apply = lambda module, *_: module  # PEFT moves adapters that need no move
        with gpu:
            module = module_of(build("pythia-14m"), config)
        module._device = gpu
        row["memory"] = module.memory
        with _Live() as live, Calls() as calls:
            moments = 2 * sum(parameter.nbytes for parameter in module.trainable.values())
            optimizer = module.configure_optimizers()
            tokens = paper_tokens(int(lengths.sum()), 50304, 0)
            chunks = [
                each.mapped(lambda x: torch.empty(x.shape, dtype=x.dtype, device=gpu))
                for each in pack(tokens, lengths, chunk)
            ]
            texts = torch.empty(len(lengths), dtype=torch.int64, device=gpu)
            calls.found.clear()
            live.peak = live.now
            module.loss = module.backward_through(Batch(0, len(lengths) // 2, chunks, texts, len(tokens), 0))
            row["peak"] = live.peak + moments
            row["chunks"] = len(chunks)
            row["calls"] = {name: n for name, n in calls.found.items() if "varlen" in name}
            row["devices"] = sorted({str(p.grad.device) for p in module.trainable.values()})
            optimizer.step()
            module.count(Batch(0, len(lengths) // 2, chunks, texts, len(tokens), 0))
            row["loss"] = [str(module.loss.device), str(module.loss.dtype)]
    return row


def main(workspace: Path) -> None:
    load(workspace)
    pretend()
    bf16, checkpointed = "training.precision=bf16", "resources.activation_checkpointing=true"
    rows = [step(method, bf16) for method in ("full", "freeze-0.5", "bias", "lora-r32")]
    rows += [step("full", bf16, chunk=4000), step("full"), step("lora-r32", bf16, checkpointed, chunk=4000)]
    limit = f"resources.memory_gb={MEMORY / 1e9}"
    rows += [step(method, bf16, limit, fit=True) for method in ("full", "freeze-0.5", "bias", "lora-r32")]
    rows += [step("full", bf16, limit, checkpointed, fit=True), step("full", limit, fit=True)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
