"""Several processes: sum gradients while the backward pass runs, or keep the model in shards.

Each process computes the gradient of the one global loss at its own embeddings (training/loss.py). Therefore gradients
are added, never averaged.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from embedscale.model.backbone import blocks_of


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def wait_for_all() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        torch.distributed.barrier()


class GradientSums:
    """The sum over all processes of one step's gradients, sent in part while the backward pass still runs.

    Parameters are in buckets of about 25 MB, from the last registered to the first, because the backward pass reaches
    them in this order. Every process sends the buckets in this order too. A parameter without a gradient is left out:
    it has none on any process, and a gradient of zeros would hide from `Contrastive` that a parameter does not train.
    The buffer of a bucket becomes the gradients of its parameters.
    """

    BYTES = 25 * 2**20

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.buckets: list[list[nn.Parameter]] = []
        self.sent = 0  # of the buckets
        self._messages: list[Any] = []
        held = self.BYTES
        for parameter in reversed(list(parameters)) if world_size() > 1 else ():
            if held + parameter.nbytes > self.BYTES:
                self.buckets.append([])
                held = 0
            self.buckets[-1].append(parameter)
            held += parameter.nbytes

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Send each bucket when it and those before it are complete; only for the last backward pass of a step."""
        missing = [len(bucket) for bucket in self.buckets]

        def complete(number: int, parameter: Tensor) -> None:
            missing[number] -= 1
            while self.sent < len(self.buckets) and not missing[self.sent]:
                self._send()

        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(complete, number))
            for number, bucket in enumerate(self.buckets)
            for parameter in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Send the remaining buckets, and wait for all sums."""
        while self.sent < len(self.buckets):
            self._send()
        for message in self._messages:
            message.wait()

    def _send(self) -> None:
        having = [parameter for parameter in self.buckets[self.sent] if parameter.grad is not None]
        self.sent += 1
        if not having:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in having])  # type: ignore[union-attr]
        for parameter, part in zip(having, flat.split([p.numel() for p in having]), strict=True):
            parameter.grad = part.view_as(parameter)
        self._messages.append(torch.distributed.all_reduce(flat, async_op=True))


def shard(body: nn.Module, device_type: str) -> None:
    """Shard with FSDP2: each process keeps a part of every weight, and a block is gathered when it computes.

    Weights move to their device block by block. Gradients are parts of the sum over processes.
    """
    mesh = init_device_mesh(device_type, (world_size(),))
    for module in (*blocks_of(body), body):
        sharded: Any = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has only this reduction


def whole(value: Any) -> Any:
    """Return tensors, or dicts of them, with every shard gathered, one after the other, into process 0's main memory.

    All processes must call it. The other processes get their shards back.
    """
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if not isinstance(value, DTensor):
        return value
    # Lightning may have left the shard in main memory, which NCCL does not reach.
    reached: Any = value.detach().to(value.device_mesh.device_type)
    full = reached.full_tensor()
    return full.cpu() if rank() == 0 else value


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of `value` if `parameter`, of the same shape, is in shards; else `value` itself."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
