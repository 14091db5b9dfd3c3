"""What computes embeddings and gradients: the encoder as it is, or the faster blocks of `model/cpu` and `model/gpu`.

Only this module knows whether these folders exist, and when to use them (`use_cpu_body`, `speed_up_on_gpu`). Delete
them, and `PlainBody` serves everywhere.

The CPU body merges layers, which costs a pass over the weights before and after each step; what it saves grows with the
step's tokens. Both grow with the parameters, so the tokens of a step decide. Seconds of a step, float32, torch 2.13, on
two idle cores (Zen 4); below 1,000 tokens, CPU time of one thread:

    Pythia  method   pairs  tokens  plain   CPU body
    14M     full         2     155  0.04    0.04
    70M     full         2     155  0.27    0.29
    14M     full         4     311  0.06    0.06
    70M     full         4     311  0.49    0.47
    14M     full        64   4,991  0.386   0.310
    70M     full        64   4,991  3.743   2.997
    70M     lora-r8     16   1,248  0.795   0.599
    160M    full        16   1,248  3.893   3.696
    160M    full        32   2,495  7.262   6.728
    160M    lora-r8     16   1,248  3.085   2.431
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from embedscale.model.backbone import drops
from embedscale.model.encoder import Encoder
from embedscale.model.packing import Packed
from embedscale.run.config import Resources

HAS_CPU_BODY = bool(find_spec("embedscale.model.cpu") and find_spec("embedscale.model.cpu.body"))
HAS_GPU_BLOCKS = find_spec("embedscale.model.gpu") is not None

FROM_TOKENS = 256  # tokens of a step in one process, from which on the CPU body is faster


class PlainBody:
    """The encoder under torch's autograd: one chunk at a time."""

    overlaps = True  # a parameter's gradient is complete as soon as the last backward pass has reached the parameter
    extra_numbers = 0  # float32 numbers in memory beside weights and their gradients

    def __init__(self, encoder: Encoder):
        self.forward = encoder

    def encode(self, chunk: Packed, graph: bool) -> Tensor:
        """Return embeddings [S, width]; keep the graph for `backward` if `graph`."""
        with torch.set_grad_enabled(graph):
            self._embeddings = self.forward(chunk)
        return self._embeddings.detach()

    def backward(self, chunk: Packed, gradient: Tensor) -> None:
        """Add to the parameters' gradients, given the gradient [S, width] of the chunk encoded last."""
        self._embeddings.backward(gradient)
        del self._embeddings


def use_cpu_body(encoder: Encoder, device: torch.device, step_tokens: int) -> bool:
    """Return whether a training run uses the body of `model/cpu`.

    `step_tokens` is the plan's mean number of tokens, so that the answer, and the rounding, is the same for every step
    and for a resumed run. Runs with dropout use the plain body, because random numbers are drawn for a whole chunk, and
    so do runs with shards, because all processes must gather them in the same order.
    """
    fits = device.type == "cpu" and not encoder.sharded and not encoder.drops
    return HAS_CPU_BODY and fits and step_tokens >= FROM_TOKENS


def speed_up_on_gpu(body: nn.Module, precision: str, resources: Resources) -> None:
    """Change a body's blocks for a GPU, where nothing else changes them: torch.compile merges operations by itself.

    Whole blocks change only where each runs once a pass, in bf16 (from the Ampere generation on), without dropout.
    """
    if HAS_GPU_BLOCKS and not resources.compile:
        from embedscale.model.gpu import speed_up

        alone = not (resources.activation_checkpointing or resources.shard or drops(body))
        speed_up(body, alone and precision == "bf16" and torch.cuda.get_device_capability()[0] >= 8)


@contextmanager
def training_body(encoder: Encoder, device: torch.device, step_tokens: int) -> Iterator[Any]:
    """Give the body that computes one step on `device`; at the end of the block, gradients are complete."""
    if use_cpu_body(encoder, device, step_tokens):
        from embedscale.model.cpu import body

        with body.training_body(encoder) as chosen:
            yield chosen
    else:
        yield PlainBody(encoder)


class Inference:
    """Embeds chunks without gradients; make one again when the weights have changed."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.device = encoder, next(encoder.parameters()).device
        self._fast: Any = None
        # Processes with shards must gather the same blocks in the same order.
        if HAS_CPU_BODY and self.device.type == "cpu" and not encoder.sharded:
            from embedscale.model.cpu.body import CpuInference

            self._fast = CpuInference(encoder)

    def expect(self, tokens: int) -> None:
        """Prepare to embed texts with `tokens` tokens in all."""
        if self._fast is not None:
            self._fast.expect(tokens)

    @torch.no_grad()
    def embed(self, chunks: Sequence[Packed]) -> Iterator[Tensor]:
        """Yield embeddings float32 [S, width] of each chunk, in order."""
        if self._fast is not None:
            yield from self._fast.embed(chunks)
            return
        for chunk in chunks:
            yield self.encoder(chunk.to(self.device))
