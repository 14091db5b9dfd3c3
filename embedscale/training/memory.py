"""Find how many tokens a chunk may have so that a step stays within its memory limit, before a GPU is used.

On a CPU the bytes that autograd keeps are measured with two small chunks; on a GPU the peak is simulated with tensors
that have no memory. Both cost a fraction of a second, and safety factors cover what they do not see.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # has no public name, as the two modes below
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedscale.errors import UserError
from embedscale.model.backbone import blocks_of
from embedscale.model.body import PlainBody, training_body
from embedscale.model.encoder import Encoder
from embedscale.model.hardware import memory_in_use, training_device
from embedscale.model.packing import Packed, pack
from embedscale.training.module import Contrastive

# Safety factors: estimated peak = factor x memory kept for the backward pass (CPU) or x simulated peak (GPU). They
# cover temporary buffers, fragments that chunks of other lengths leave in the heap, and the kernels' own memory.
MARGIN = {"cpu": 2.5, "cuda": 1.15}
# Tokens of a sequence in a second chunk that is simulated for a GPU, whose attention needs a buffer for each sequence.
# A batch's shortest sequences share a chunk; at the paper's lengths they have about 8 tokens.
SHORT = 8
GRANULE = 512  # bytes: a GPU's allocator rounds up to a multiple of this


def fitting_chunk(module: Contrastive) -> int | None:
    """Return the most tokens of a chunk with which a step of any lengths stays within its memory limit.

    Returns None if the largest possible batch fits in one chunk. Call it before the first step; it does not use a GPU.
    Raises UserError if `resources.memory_gb` is too small for the longest sequence.
    """
    config, device = module.config, training_device()
    given = config.resources.memory_gb
    pairs, context = config.training.batch_size, config.data.context
    trained, world = sum(p.numel() for p in module.trainable.values()), module.plan.world_size
    weights = sum(p.numel() for p in module.parameters())
    numbers = 6 * pairs**2  # the loss's matrices
    if module.device.type != device.type:
        numbers += weights
    if not config.resources.shard:
        numbers += 3 * trained  # gradients and AdamW's two moments
    else:
        # A part of weights, gradients and moments. Gathered: two blocks, one of them in advance, and the weights
        # outside of the blocks. In transfer: the gradients of a block and of the weights outside. In bf16, also the
        # copies of weights that are kept from a forward pass to its backward pass.
        blocks = blocks_of(module.encoder.body)
        inside = sum(p.numel() for p in blocks.parameters())
        copied = config.training.precision == "bf16" and not config.resources.activation_checkpointing
        numbers += (weights + 3 * trained) // world
        numbers += 3 * inside // len(blocks) + 2 * (weights - inside) + copied * weights // 2
        numbers -= weights  # in_use counts whole weights, which will not be on the device
    in_use = memory_in_use(device)
    module.encoder.train()  # checkpointing and dropout work only in this mode
    few = 8 if device.type == "cpu" else 64
    lengths = (context,) if device.type == "cpu" else (context, min(SHORT, context))
    # Weights are not in shards yet, so the body for shards is named here.
    plain, tokens = nullcontext(PlainBody(module.encoder)), module.plan.step_tokens
    with plain if config.resources.shard else training_body(module.encoder, device, tokens) as body:
        numbers += body.extra_numbers
        taken = [[_taken(body, module.encoder, n, context, each, device) for n in (few, 2 * few)] for each in lengths]
    a_token = max(large - small for small, large in taken) / (few * context)
    fixed = in_use + 4 * numbers
    if not config.resources.shard:
        # Independent of the tokens, such as copies of weights in bf16.
        fixed += max(0, *(2 * small - large for small, large in taken))
    a_token *= MARGIN[device.type]
    most = int((module.memory - fixed) / a_token)
    if most >= pairs * (2 + config.loss.hard_negatives) * context // world:
        return None
    if most < context and given is not None:
        least = (fixed + context * a_token) / 1e9
        raise UserError(f"resources.memory_gb: is {given:g}; this run needs at least {least:.2f}")
    return max(most, context)


def _taken(body: Any, encoder: Encoder, sequences: int, context: int, length: int, device: torch.device) -> int:
    """Return the bytes of a chunk of `sequences` x `context` tokens: kept by its graph (CPU), or its peak (GPU).

    The tokens are in sequences of `length`.
    """
    vocabulary = len(encoder.body.get_input_embeddings().weight)  # type: ignore[operator]
    tokens = sequences * context
    lengths = np.full(-(-tokens // length), length)
    lengths[-1] -= lengths.sum() - tokens
    (chunk,) = pack(np.arange(tokens) % vocabulary, lengths)
    if device.type != "cpu":
        return peak_bytes(encoder, chunk, device)
    return kept_bytes(encoder, body.forward, chunk)


def kept_bytes(encoder: Encoder, forward: Callable[[Packed], Tensor], chunk: Packed) -> int:
    """Return the bytes that autograd keeps of one forward pass, parameters not included."""
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        forward(chunk)
    return sum(size for place, size in kept.items() if place not in own)


def peak_bytes(encoder: Encoder, chunk: Packed, device: torch.device) -> int:
    """Return the peak of bytes of one forward and backward pass on `device`, beside parameters and gradients.

    Tensors are fake: they have shapes and lifetimes, but no memory, and no kernel runs.
    """
    with FakeTensorMode(), _Live() as live, torch.compiler.set_stance("force_eager"):

        def fake(x: Tensor) -> Tensor:
            made = torch.empty(x.shape, dtype=x.dtype, device=device, requires_grad=x.requires_grad)
            if x.requires_grad:
                made.grad = torch.empty_like(made)  # the backward pass adds to existing gradients
            return made

        both = _ForwardAndBackward(encoder)
        states = {name: fake(x) for name, x in (*both.named_parameters(), *both.named_buffers())}
        packed = chunk.mapped(fake)
        before = live.peak = live.now
        torch.func.functional_call(both, states, (packed,))
    return live.peak - before


class _ForwardAndBackward(nn.Module):
    """Both passes in one call, so that checkpointed blocks see the same parameters in both."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, packed: Packed) -> None:
        output = self.encoder(packed)
        output.backward(torch.empty_like(output))


def _sums_of_queries(func: Any, args: Any, kwargs: Any) -> int:
    """Return the bytes in which flash attention's backward pass adds up the queries' gradients, which no tensor shows.

    It is float32 [T + 128 S, heads, size], the size rounded up to a multiple of 32: large for many short sequences.
    """
    given = {each.name: value for each, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    tokens, heads, size = given["query"].shape
    return int(4 * (tokens + 128 * (len(given["cu_seq_q"]) - 1)) * heads * (-(-size // 32) * 32))


class _Live(TorchDispatchMode):
    """Counts the bytes of all live tensors, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        if func.overloadpacket.__name__ == "_varlen_attn_backward":
            self.peak = max(self.peak, self.now + _sums_of_queries(func, args, kwargs or {}))
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, -(-storage.nbytes() // GRANULE) * GRANULE
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size
