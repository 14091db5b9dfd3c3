"""What several processes do together: sum gradients while the backward pass runs, or keep the model in shards.

Each process holds the gradient of the one global loss at its own embeddings (loss.py), so gradients are added, never
averaged.
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


class GradientSums:
    """One step's gradients, summed over all processes, in part while the backward pass still runs.

    Parameters lie in buckets of about 25 MB, from the last registered to the first, as the backward pass comes to
    them. Every process sends the buckets in this order, whatever order its gradients come in. A parameter without a
    gradient is left out: the graph decides which have one, the same on all processes, and a gradient of zeros would
    hide from `Contrastive` that a parameter does not train. A bucket's buffer becomes its parameters' gradients.
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
        """Send a bucket as soon as it and those before it are complete; for the one backward pass that ends them."""
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
        """Send what is left, and wait for the sums."""
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
    """FSDP2: leave each process a part of every weight on its device, a block gathered when it computes.

    Weights move to the device block by block. Gradients come as parts of the sum over processes.
    """
    mesh = init_device_mesh(device_type, (world_size(),))
    for module in (*blocks_of(body), body):
        sharded: Any = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows none of NCCL's other reductions


def whole(value: Any) -> Any:
    """Tensors, or dicts of them, with every shard made whole, one after the other, in process 0's main memory.

    All processes must call it; on the others, shards stay what they are.
    """
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if not isinstance(value, DTensor):
        return value
    # Lightning may have left the shard in main memory, where NCCL does not reach.
    reached: Any = value.detach().to(value.device_mesh.device_type)
    full = reached.full_tensor()
    return full.cpu() if rank() == 0 else value


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of `value`, where `parameter` of the same shape is in shards; else `value` itself."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
