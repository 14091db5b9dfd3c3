"""The LightningModule: an encoder that trains under a contrastive loss, and counts what it has spent.

The step itself is gradcache.py over the body that model/body.py chooses. Here are its surroundings: the learning-rate
schedule, clipping, smaller chunks where memory runs out, the sum over processes, the counters, and the state of a
checkpoint.
"""

import hashlib
from functools import cached_property
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from embedscale.model.backbone import shape_of
from embedscale.model.body import speed_up_on_gpu, training_body
from embedscale.model.encoder import Encoder
from embedscale.model.hardware import give_back_freed_memory, memory_in_use, training_device, usable_memory
from embedscale.model.methods import apply_method
from embedscale.model.parallel import GradientSums, rank, shard_like, whole, world_size
from embedscale.run.config import RunConfig
from embedscale.run.cost import Cost, cost_of
from embedscale.training.batches import Batch
from embedscale.training.gradcache import accumulate_gradient
from embedscale.training.loss import loss_and_gradient
from embedscale.training.plan import TrainingPlan

NEARLY = 0.9  # fraction of the memory limit above which freed memory is returned to the system


class Contrastive(lightning.LightningModule):
    """An encoder under InfoNCE, with counters of steps, tokens and FLOP.

    Lightning's automatic optimisation is off: the gradient does not come from one `backward` call.
    """

    sharing = 1  # number of runs that share this device's memory equally

    def __init__(self, encoder: Encoder, trainable: list[str], config: RunConfig, plan: TrainingPlan, cost: Cost):
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.config, self.plan, self.cost = encoder, config, plan, cost
        parameters = dict(encoder.body.named_parameters())
        self.trainable = {name: parameters[name] for name in trainable}
        self.step = 0  # steps made
        self.tokens = 0
        self.flop_exact = 0
        self.halvings = 0  # how often every chunk is cut in two, because memory ran out in an earlier step
        self.loss = torch.zeros(())  # of the last step
        self.averaged = torch.zeros((), dtype=torch.float64)  # sum of the losses of plan.averaged_steps
        self.first_bad_step = torch.full((), torch.inf, dtype=torch.float64)  # first step without a finite loss

    @property
    def flop(self) -> int:
        """FLOP spent so far, by the paper's convention."""
        return self.tokens * self.plan.flop_per_token

    @cached_property
    def memory(self) -> int:
        """Bytes that this process may use on the device that it trains on."""
        resources, sharing, device = self.config.resources, self.sharing, training_device()
        if resources.memory_gb is not None:
            return int(resources.memory_gb * 1e9)
        # Each process of a run has a GPU of its own, but all of them share the machine's memory.
        return usable_memory(device) // (sharing if device.type == "cuda" else sharing * resources.devices)

    def configure_model(self) -> None:
        """Shard the weights, when processes are connected and the weights not yet on their device."""
        if self.config.resources.shard:
            self.shard(self.trainer.strategy.root_device.type)

    def shard(self, device_type: str) -> None:
        """Leave this process its part of every weight, on its device; call it before there is an optimiser."""
        names = list(self.trainable)
        self.trainable = {}  # otherwise the whole weights would stay in memory
        self.encoder.shard(device_type)
        parameters = dict(self.encoder.body.named_parameters())
        self.trainable = {name: parameters[name] for name in names}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.trainable.values(),
            lr=self.plan.learning_rate,
            weight_decay=self.config.training.weight_decay,
            fused=True,
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        for _ in range(self.halvings):
            batch = batch.halved()
        return batch.to(device)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = self.plan.learning_rate_at(batch.step)
        batch = self.backward_in_memory(batch)
        if batch.step == 0 and torch.isfinite(self.loss):
            self._check_gradients()
        if self.config.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.config.training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.count(batch)

    def backward_in_memory(self, batch: Batch) -> Batch:
        """Run `backward_through`; where memory runs out, start it again with chunks of half the size.

        Returns the batch in the chunks that fitted. Later batches are cut so before they are sent to the device, also
        after a resume.
        """
        while True:
            try:
                self.loss = self.backward_through(batch)
                return batch
            except torch.OutOfMemoryError:
                # With several processes, the others have already exchanged gradients of this step.
                if world_size() > 1 or all(len(chunk.lengths) == 1 for chunk in batch.chunks):
                    raise
            for parameter in self.trainable.values():
                parameter.grad = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            batch = batch.halved()
            self.halvings += 1
            longest = max(len(chunk.tokens) for chunk in batch.chunks)
            print(f"out of memory at step {batch.step + 1}: from now on, chunks of at most {longest:,} tokens")

    def backward_through(self, batch: Batch) -> Tensor:
        """Set the trainable parameters' gradients to that of the global batch's loss; return the loss, a scalar."""
        order = batch.order
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))

        def loss(embeddings: Tensor) -> tuple[Tensor, Tensor]:  # [S, width], in the order of the chunks
            value, gradient = loss_and_gradient(embeddings[place], batch.pairs, self.config.loss, batch.texts)
            return value, gradient[order]

        def before_encoding(chunk: int) -> None:
            self.seed_chunk(batch, chunk)
            if memory_in_use(self.device) > NEARLY * self.memory:
                give_back_freed_memory(self.device)

        # Several processes: each adds its gradients to the others'. Shards do so by themselves, after each chunk.
        sums = GradientSums(() if self.encoder.sharded else self.trainable.values())
        with training_body(self.encoder, self.device, self.plan.step_tokens) as body:
            overlapped = sums.overlapped() if body.overlaps else None
            value = accumulate_gradient(body, batch.chunks, loss, before_encoding, overlapped)
        sums.finish()
        return value

    def seed_chunk(self, batch: Batch, chunk: int) -> None:
        """Seed dropout with the run's seed, the step, the process and the chunk."""
        words = f"{self.config.training.seed} {batch.step} {rank()} {chunk}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7])
        # torch.manual_seed would record a stack trace for every kind of device that is absent, at every step.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _check_gradients(self) -> None:
        for name, parameter in self.encoder.body.named_parameters():
            if name in self.trainable:
                if parameter.grad is None or not torch.isfinite(parameter.grad).all():
                    raise RuntimeError(f"after the first step, the trainable tensor {name} has no finite gradient")
            elif parameter.grad is not None:
                raise RuntimeError(f"after the first step, the frozen tensor {name} has a gradient")

    def count(self, batch: Batch) -> None:
        """Add a finished step to the counters."""
        self.step = batch.step + 1
        self.tokens += batch.tokens
        self.flop_exact += self.cost.exact(batch.tokens, batch.squared_lengths, extra_forwards=len(batch.chunks) > 1)
        # Kept on the loss's device, and read only for a row of the log: the GPU is not waited for at each step.
        value = self.loss.double()
        self.first_bad_step = torch.minimum(
            self.first_bad_step.to(value.device), torch.where(value.isfinite(), torch.inf, float(self.step))
        )
        if batch.step in self.plan.averaged_steps:
            self.averaged = self.averaged.to(value.device) + value

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, beside the store and the frozen weights.

        With shards, all processes must call it, and the first one gets whole tensors: a checkpoint does not depend on
        the number of processes.
        """
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        return {
            "step": self.step,
            "tokens": self.tokens,
            "flop_exact": str(self.flop_exact),
            "halvings": self.halvings,
            "averaged": float(self.averaged),
            "weights": self.weights(),
            "optimizer": whole(optimizer.state_dict()),
        }

    def weights(self) -> dict[str, Tensor]:
        """Return the trainable weights. With shards, all processes must call it; the first one gets whole tensors."""
        found: dict[str, Tensor] = whole({name: parameter.detach() for name, parameter in self.trainable.items()})
        return found

    def restore(self, state: dict[str, Any]) -> None:
        """Set the counters and weights from `state`; the optimiser's state is set in `on_train_start`."""
        self.step, self.tokens, self.flop_exact = state["step"], state["tokens"], int(state["flop_exact"])
        self.halvings = state.get("halvings", 0)
        self.averaged = torch.tensor(state["averaged"], dtype=torch.float64)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["weights"][name])
        self._optimizer_state = state["optimizer"]

    _optimizer_state: dict[str, Any] | None = None

    def on_train_start(self) -> None:
        if self._optimizer_state is not None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            for parameter, moments in zip(
                self.trainable.values(), self._optimizer_state["state"].values(), strict=True
            ):
                moments |= {name: shard_like(value, parameter) for name, value in moments.items()}
            optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        self.encoder.train()

    def on_train_end(self) -> None:
        # Lightning would move the moments to the CPU, where nobody needs them any more.
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.state.clear()


def assemble(body: nn.Module, config: RunConfig, plan: TrainingPlan) -> Contrastive:
    """Return the module that trains `body` by the configured method. Adapters are drawn from the seed.

    Raises RuntimeError if the number of parameters that train is not the cost model's N_U.
    """
    checkpointing = config.resources.activation_checkpointing
    cost = cost_of(shape_of(body, config.backbone.name), config.method, checkpointing)
    torch.manual_seed(config.training.seed)
    trainable = apply_method(body, config.method)
    if training_device().type == "cuda":
        speed_up_on_gpu(body, config.training.precision, config.resources)
    outside = {id(p) for p in body.get_input_embeddings().parameters()}  # type: ignore[operator]
    updated = sum(p.numel() for p in body.parameters() if p.requires_grad and id(p) not in outside)
    if updated != cost.n_updated:
        raise RuntimeError(f"{updated} parameters train, but the cost model says N_U = {cost.n_updated}")
    encoder = Encoder(body, config.backbone.pooling, config.training.precision, config.backbone.attention)
    if checkpointing:
        encoder.checkpoint_activations()
    if config.resources.compile:
        encoder.compile_blocks()
    return Contrastive(encoder, trainable, config, plan, cost)
