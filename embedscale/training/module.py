"""The LightningModule: one contrastive step over packed pairs, whole or in GradCache chunks, on one GPU or several."""

import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from embedscale.data.store import PairStore
from embedscale.model.backbone import drops, shape_of
from embedscale.model.encoder import Encoder, Packed, a_chunk_a_core, cut_further, cuts, pack
from embedscale.model.hardware import give_back_freed_memory, memory_in_use, training_device, usable_memory
from embedscale.model.methods import apply_method
from embedscale.model.parallel import GradientSums, rank, shard_like, whole, world_size
from embedscale.run.config import RunConfig
from embedscale.run.cost import Cost, cost_of
from embedscale.training.loss import loss_and_gradient
from embedscale.training.plan import TrainingPlan

NEARLY = 0.9  # of the memory that a process may take: from there on, what is freed goes back
PART_TOKENS = 4096  # what a core works on at once: enough for many tokens to occur again in it


@dataclass(frozen=True)
class Batch:
    """This process's part of a step's pairs, and the token counts of all of it."""

    step: int  # from 0
    pairs: int  # this process's
    chunks: list[Packed]
    texts: Tensor  # int64 [S], content hashes: queries, positives, hard negatives
    tokens: int  # over all processes
    squared_lengths: int

    def to(self, device: torch.device) -> "Batch":
        chunks = [chunk.to(device) for chunk in self.chunks]
        return replace(self, chunks=chunks, texts=self.texts.to(device, non_blocking=True))

    def halved(self) -> "Batch":
        """The same pairs in twice as many chunks."""
        return replace(self, chunks=[half for chunk in self.chunks for half in chunk.cut(2)])

    def pin_memory(self) -> "Batch":
        return replace(self, chunks=[chunk.pin_memory() for chunk in self.chunks], texts=self.texts.pin_memory())


class Batches(Dataset[Batch]):
    """Step → batch, a pure function of the store and the plan: resuming needs no loader state.

    With shards, all processes get the same number of chunks: as many as the one that needs the most.
    """

    def __init__(
        self, store: PairStore, plan: TrainingPlan, config: RunConfig, chunk_tokens: int | None = None, rank: int = 0
    ):
        self.store, self.plan, self.chunk_tokens, self.rank = store, plan, chunk_tokens, rank
        self.negatives, self.sharded = config.loss.hard_negatives, config.resources.shard

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> Batch:
        start, stop = self.plan.pairs_of(step)
        stored = self.store.batch(start, stop, self.negatives)
        lengths = stored.lengths.astype(np.int64)
        tokens, texts, own = stored.tokens, stored.texts, lengths
        if self.plan.world_size > 1:
            kept = self._part(stored.pairs, self.rank)
            starts = np.cumsum(lengths) - lengths
            own = lengths[kept]
            places = np.repeat(starts[kept] - (np.cumsum(own) - own), own) + np.arange(own.sum())
            tokens, texts = tokens[places], texts[kept]
        chunks = pack(tokens, own, self.chunk_tokens)
        if self.sharded:
            parts = (np.sort(lengths[self._part(stored.pairs, each)]) for each in range(self.plan.world_size))
            most = max(len(cuts(part, self.chunk_tokens)) for part in parts)
            chunks = cut_further(chunks, most)
        return Batch(
            step=step,
            pairs=stored.pairs // self.plan.world_size,
            chunks=chunks,
            texts=torch.from_numpy(texts.view(np.int64)),
            tokens=int(lengths.sum()),
            squared_lengths=int((lengths**2).sum()),
        )

    def _part(self, pairs: int, rank: int) -> np.ndarray:
        """A process's sequences: of the batch's queries, then positives, then negatives, a part each."""
        share, k = pairs // self.plan.world_size, self.negatives
        first = rank * share
        groups = ((0, first, share), (pairs, first, share), (2 * pairs, first * k, share * k))
        return np.concatenate([np.arange(start + offset, start + offset + n) for start, offset, n in groups])


class _Encoded(NamedTuple):
    embeddings: Tensor  # [S, width] of one part
    rows: Tensor | None  # [U, width], the distinct tokens' rows of a trained embedding, where their gradient is left


class Contrastive(lightning.LightningModule):
    """An encoder under InfoNCE, with the ledger of what it has spent."""

    sharing = 1  # runs in the memory of this device or machine, of which they take equal parts

    def __init__(self, encoder: Encoder, trainable: list[str], config: RunConfig, plan: TrainingPlan, cost: Cost):
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.config, self.plan, self.cost = encoder, config, plan, cost
        parameters = dict(encoder.body.named_parameters())
        self.trainable = {name: parameters[name] for name in trainable}
        self._drops = drops(encoder.body)
        self.step = 0  # steps done
        self.tokens = 0
        self.flop_exact = 0
        self.halvings = 0  # of every chunk, since memory ran out
        self.loss = torch.zeros(())  # of the last step
        self.averaged = torch.zeros((), dtype=torch.float64)  # sum over plan.averaged_steps
        self.first_bad_step = torch.full((), torch.inf, dtype=torch.float64)  # first step without a finite loss

    @property
    def _embedding(self) -> nn.Embedding | None:
        """The token embedding, where it trains, is a plain one and not in shards."""
        embedding: Any = self.encoder.body.get_input_embeddings()  # type: ignore[operator]
        plain = type(embedding) is nn.Embedding and not self.encoder.sharded
        return embedding if plain and embedding.weight.requires_grad else None

    @property
    def flop(self) -> int:
        """Spent so far, by the paper's convention."""
        return self.tokens * self.plan.flop_per_token

    @cached_property
    def memory(self) -> int:
        """Bytes that this process may take on the device that it trains on."""
        resources, sharing, device = self.config.resources, self.sharing, training_device()
        if resources.memory_gb is not None:
            return int(resources.memory_gb * 1e9)
        # A GPU is one process's of a run; a machine's memory is all of theirs.
        return usable_memory(device) // (sharing if device.type == "cuda" else sharing * resources.devices)

    def configure_model(self) -> None:
        """Lightning's moment: the processes know each other, and the weights are not on their device yet."""
        if self.config.resources.shard:
            self.shard(self.trainer.strategy.root_device.type)

    def shard(self, device_type: str) -> None:
        """Leave this process its part of everything, on its device; before there is an optimiser."""
        names = list(self.trainable)
        self.trainable = {}  # it would keep the whole weights
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
        batch = self._backward_in_memory(batch)
        if batch.step == 0 and torch.isfinite(self.loss):
            self._check_gradients()
        if self.config.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.config.training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._account(batch)

    def _backward_in_memory(self, batch: Batch) -> Batch:
        """The backward pass, begun again in chunks of half the size where the memory does not suffice.

        Returns the batch as it was cut; later ones are cut so before they come to the device, also after a resume.
        """
        while True:
            try:
                self.loss = self.backward_through(batch)
                return batch
            except torch.OutOfMemoryError:
                # Among several processes the others are already past this step's first exchange.
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
        """Leave the gradient of the global batch's loss in the trainable parameters; return the loss.

        Copies of the model exchange gradients once a step; shards after each chunk: whole gradients are what they
        are there to spare.

        One chunk keeps its graph. Several are GradCache (arXiv 2101.06983): each is encoded without a graph, and
        again, with the same random numbers, when its embeddings' gradient is known.
        """
        cached = len(batch.chunks) > 1
        sums = GradientSums(() if self.encoder.sharded else self.trainable.values())
        with self.encoder.folding() as folded, a_chunk_a_core(self.device) as each:
            chunks = [self._parts(chunk) for chunk in batch.chunks]
            encoded = [self._encode(batch, number, parts, each, not cached) for number, parts in enumerate(chunks)]
            order = torch.cat([chunk.order for chunk in batch.chunks])
            found = torch.cat([part.embeddings.detach() for parts in encoded for part in parts])
            inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
            loss, gradient = loss_and_gradient(found[inverse], batch.pairs, self.config.loss, batch.texts)
            sizes = [len(chunk.order) for chunk in batch.chunks]
            for number, part in enumerate(gradient[order].split(sizes)):
                if cached:
                    encoded[number] = self._encode(batch, number, chunks[number], each, True)
                # Where one backward pass is the last to add to a gradient, and not a sum over several.
                overlap = number == len(chunks) - 1 and folded is None and len(chunks[number]) == 1
                with sums.overlapped() if overlap else nullcontext():
                    self._backward(chunks[number], encoded[number], part, each)
                encoded[number] = []
                if memory_in_use(self.device) > NEARLY * self.memory:
                    give_back_freed_memory(self.device)
            if folded is not None:
                folded.backward()
        sums.finish()
        return loss

    def _parts(self, chunk: Packed) -> list[Packed]:
        """On a CPU, parts for each core; not with dropout, whose numbers are the chunk's, nor with shards, which all
        processes gather in the same order."""
        cores, tokens = torch.get_num_threads(), len(chunk.tokens)
        if self.device.type != "cpu" or self._drops or self.encoder.sharded or tokens < PART_TOKENS:
            return [chunk]
        return chunk.cut(cores * math.ceil(tokens / PART_TOKENS / cores))

    def _encode(self, batch: Batch, chunk: int, parts: list[Packed], each: Callable, graph: bool) -> list["_Encoded"]:
        self._seed(batch, chunk)
        embedding = self._embedding

        def encode(part: Packed) -> _Encoded:
            with torch.set_grad_enabled(graph):
                if not graph or embedding is None:
                    return _Encoded(self.encoder(part), None)
                rows = functional.embedding(part.distinct, embedding.weight.detach()).requires_grad_()
                return _Encoded(self.encoder(part, rows), rows)

        return list((each if len(parts) > 1 else map)(encode, parts))

    def _seed(self, batch: Batch, chunk: int) -> None:
        """The same random numbers whenever a chunk is encoded."""
        words = f"{self.config.training.seed} {batch.step} {rank()} {chunk}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7])
        # torch.manual_seed would note a stack trace for every kind of device that is not there, at every step.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _backward(self, parts: list[Packed], encoded: list["_Encoded"], gradient: Tensor, each: Callable) -> None:
        """Add a chunk's gradient to the parameters'. Its sum over parts has the same order at every call."""
        gradients = gradient.split([len(part.order) for part in parts])
        embedding = self._embedding
        folded = self.encoder.folded
        leaves = list(self.trainable.values()) if folded is None else folded.leaves
        others = [leaf for leaf in leaves if embedding is None or leaf is not embedding.weight]
        lanes = min(torch.get_num_threads(), len(parts))

        def backward(lane: int) -> list[Tensor] | None:
            """Through every `lanes`-th part: the first lane straight into the parameters, others beside them."""
            total: list[Tensor] | None = None
            for number in range(lane, len(parts), lanes):
                output, rows = encoded[number]
                if lane == 0:
                    output.backward(gradients[number])
                    continue
                into = others if rows is None else [*others, rows]
                found = list(torch.autograd.grad(output, into, gradients[number]))
                if rows is not None:
                    rows.grad = found.pop()
                if total is None:
                    total = found
                else:
                    torch._foreach_add_(total, found)
            return total

        for beside in list((each if lanes > 1 else map)(backward, range(lanes)))[1:]:
            torch._foreach_add_([leaf.grad for leaf in others], beside)  # type: ignore[misc]
        if embedding is not None:
            # Once for all tokens of the chunk: each part's own would be as large as the whole vocabulary.
            weight, padding = embedding.weight, embedding.padding_idx
            found = torch.ops.aten.embedding_dense_backward(
                torch.cat([part.rows.grad for part in encoded]),  # type: ignore[union-attr,misc]
                torch.cat([part.distinct for part in parts]),
                len(weight), -1 if padding is None else padding, False,
            )  # fmt: skip
            weight.grad = found if weight.grad is None else weight.grad.add_(found)

    def _check_gradients(self) -> None:
        for name, parameter in self.encoder.body.named_parameters():
            if name in self.trainable:
                if parameter.grad is None or not torch.isfinite(parameter.grad).all():
                    raise RuntimeError(f"after the first step, the trainable tensor {name} has no finite gradient")
            elif parameter.grad is not None:
                raise RuntimeError(f"after the first step, the frozen tensor {name} has a gradient")

    def _account(self, batch: Batch) -> None:
        self.step = batch.step + 1
        self.tokens += batch.tokens
        self.flop_exact += self.cost.exact(batch.tokens, batch.squared_lengths, extra_forwards=len(batch.chunks) > 1)
        # On the loss's device, and read there only where a row is logged: no synchronisation a step.
        value = self.loss.double()
        self.first_bad_step = torch.minimum(
            self.first_bad_step.to(value.device), torch.where(value.isfinite(), torch.inf, float(self.step))
        )
        if batch.step in self.plan.averaged_steps:
            self.averaged = self.averaged.to(value.device) + value

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, beside the store and the frozen weights.

        With shards, all processes must call it, and the first one gets it whole: a checkpoint does not tell how many
        processes wrote it.
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
        """What has trained. With shards, all processes must call it, and the first one gets it whole."""
        found: dict[str, Tensor] = whole({name: parameter.detach() for name, parameter in self.trainable.items()})
        return found

    def restore(self, state: dict[str, Any]) -> None:
        """Take the counters and weights of `state`; the optimiser follows in `on_train_start`."""
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


def assemble(body: nn.Module, config: RunConfig, plan: TrainingPlan) -> Contrastive:
    """The module that trains `body` by the configured method, its adapters drawn from the seed.

    Raises RuntimeError where what trains is not what the cost model counts.
    """
    checkpointing = config.resources.activation_checkpointing
    cost = cost_of(shape_of(body, config.backbone.name), config.method, checkpointing)
    torch.manual_seed(config.training.seed)
    trainable = apply_method(body, config.method)
    outside = {id(p) for p in body.get_input_embeddings().parameters()}  # type: ignore[operator]
    updated = sum(p.numel() for p in body.parameters() if p.requires_grad and id(p) not in outside)
    if updated != cost.n_updated:
        raise RuntimeError(f"{updated} parameters train, but the cost model says N_U = {cost.n_updated}")
    encoder = Encoder(body, config.backbone.pooling, config.training.precision)
    if checkpointing:
        encoder.checkpoint_activations()
    if config.resources.compile:
        encoder.compile_blocks()
    return Contrastive(encoder, trainable, config, plan, cost)
