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
from typing import Any

# This folder has a folder `embedscale` too, which Python would take for the package.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(sys.prefix) / "triton"))  # where `make test` installs it

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


def counting() -> Any:
    """Return a mode that counts operations, the kernels among them, and the bytes that these read and write.

    A kernel is an operation that neither makes a view nor only reserves memory. Some operations launch several kernels,
    and a cache saves some of the reads: the counts compare versions, and bound a step from below and from above.
    """
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.clear()

        def clear(self) -> None:
            self.operations, self.kernels, self.bytes = Counter(), 0, Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if func.namespace == "prim":  # a question about a tensor
                return found
            self.operations[name] += 1
            if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "lift_fresh")):
                self.kernels += 1
                given = [*zip(func._schema.arguments, args, strict=False)]
                given += [(each, (kwargs or {}).get(each.name)) for each in func._schema.arguments[len(args) :]]
                for argument, value in given:
                    written = argument.alias_info is not None and argument.alias_info.is_write
                    self.bytes[name] += (1 + written) * sum(map(size_of, tree_leaves(value)))
                if not any(each.alias_info is not None for each in func._schema.returns):
                    self.bytes[name] += sum(map(size_of, tree_leaves(found)))
                if name in ("attend", "attend_backward"):  # a kernel for each class of lengths
                    self.kernels += len(args[-3]) // 3 - 1
                if name == "add_norms_backward" and args[-1]:  # the sum over its programs
                    self.kernels += 1
                if name == "_varlen_attn_backward":
                    # It also fills a float32 buffer [T + 128 S, heads, size] with zeros, adds to the T rows, and reads
                    # them for the queries' gradients; and it adds up gradients times outputs before.
                    tokens, heads, size = args[1].shape
                    rows = 4 * heads * (-(-size // 32) * 32)
                    self.bytes[name] += rows * (tokens + 128 * (len(args[6]) - 1)) + 3 * rows * tokens
                    self.kernels += 3
            return found

    def size_of(x: Any) -> int:
        return min(x.nbytes, x.untyped_storage().nbytes()) if isinstance(x, Tensor) and x.device.type == "cuda" else 0

    return Counts()


def step(
    method: str, *words: str, chunk: int | None = None, fit: int = 0, size: str = "pythia-14m", batch: int = 256
) -> dict:
    """One optimiser's step. With `fit`, in chunks as large as the memory allows, of sequences of so many tokens."""
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from embedscale.model.packing import pack
    from embedscale.run.settings import load
    from embedscale.training.batches import Batch
    from embedscale.training.memory import _Live, fitting_chunk
    from embedscale.training.pricing.calibrate import build, module_of, paper_lengths, paper_tokens
    from embedscale.training.pricing.calibration import config_of

    gpu = torch.device("cuda", 0)
    settings = [f"training.batch_size={batch}", "training.learning_rate=1e-5", *words]
    config = config_of(load(None, settings), size, method)
    lengths = paper_lengths(config, 0)
    if fit:
        chunk = fitting_chunk(module_of(build(size), config))
        lengths = np.full(len(lengths), fit)
    row = {"size": size, "method": method, "words": words, "chunk": chunk, "limited": fit}
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.nn.Module._apply = lambda module, *_: module  # PEFT moves adapters that need no move
        with gpu:
            module = module_of(build(size), config)
        module._device = gpu
        row["memory"] = module.memory
        with _Live() as live, counting() as counts:
            optimizer = module.configure_optimizers()
            for parameter in module.trainable.values():
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()  # makes the moments, as the first step of a run does
            optimizer.zero_grad(set_to_none=True)
            tokens = paper_tokens(int(lengths.sum()), 50304, 0)
            chunks = [
                each.mapped(lambda x: torch.empty(x.shape, dtype=x.dtype, device=gpu))
                for each in pack(tokens, lengths, chunk)
            ]
            texts = torch.empty(len(lengths), dtype=torch.int64, device=gpu)
            counts.clear()
            live.peak = live.now
            module.loss = module.backward_through(Batch(0, len(lengths) // 2, chunks, texts, len(tokens), 0))
            row["peak"] = live.peak
            row["chunks"] = len(chunks)
            row["calls"] = {name: n for name, n in counts.operations.items() if "attn" in name or "attend" in name}
            row["devices"] = sorted({str(p.grad.device) for p in module.trainable.values()})
            optimizer.step()
            module.count(Batch(0, len(lengths) // 2, chunks, texts, len(tokens), 0))
            row["kernels"], row["bytes"] = counts.kernels, sum(counts.bytes.values())
            row["operations"] = {name: [n, counts.bytes[name]] for name, n in counts.operations.most_common()}
            row["flop"] = module.cost.exact(len(tokens), int((lengths**2).sum()), extra_forwards=len(chunks) > 1)
            row["loss"] = [str(module.loss.device), str(module.loss.dtype)]
    return row


def main(workspace: Path) -> None:
    load(workspace)
    pretend()
    bf16, checkpointed = "training.precision=bf16", "resources.activation_checkpointing=true"
    rows = [step(method, bf16) for method in ("full", "freeze-0.5", "bias", "lora-r32")]
    rows += [step("full", bf16, chunk=8000), step("full"), step("lora-r32", bf16, checkpointed, chunk=8000)]
    limit = f"resources.memory_gb={MEMORY / 1e9}"
    rows += [step(method, bf16, limit, fit=75) for method in ("full", "freeze-0.5", "bias", "lora-r32")]
    rows += [step("full", bf16, limit, checkpointed, fit=75), step("full", limit, fit=75)]
    rows += [step("full", bf16, limit, fit=8, batch=1280)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
