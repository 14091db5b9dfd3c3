"""Two processes against one: gradients summed after or during the backward pass, and sharded weights."""

import socket
from dataclasses import replace

import pytest
import torch
from steps import METHODS, assert_same_gradients, batch_of, gradients, module_for
from torch.distributed.tensor import DTensor

import embedscale.model.body
from embedscale.model.packing import cut_further
from embedscale.model.parallel import GradientSums
from embedscale.run.method import Method

LOSSES = [(None, {}), (100, {"hard_negatives": 1}), (100, {"form": "gte", "mask_equal_texts": True})]
LORA = {"method": Method("lora", rank=4)}
UNFOLDED = [{"method": METHODS["full"]}, {"method": METHODS["full"], "checkpointing": True}, LORA]
SHARDED = [{"method": m} for m in (METHODS["full"], METHODS["freeze"], METHODS["bias"], Method("lora", rank=1))]
SHARDED += [{"method": METHODS["full"], **more} for more in ({"checkpointing": True}, {"precision": "bf16"})]
# How two processes work together → (most tokens in a chunk, the module, its loss).
TOGETHER = {
    "summed": [(chunk, LORA, loss) for chunk, loss in LOSSES],
    "overlapped": [(chunk, module, {}) for module in UNFOLDED for chunk in (None, 100)],
    "sharded": [(chunk, module, {}) for module in SHARDED for chunk in (None, 100)]
    + [(300, LORA, {}), (100, LORA, LOSSES[1][1])],
}


def _process(rank, folder, port, out, how):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    GradientSums.BYTES = 8192  # several buckets
    finish, results = GradientSums.finish, []
    early, reduced = [], []  # (buckets sent before the end, all buckets); gradients that were reduce-scattered

    def note(sums):
        early.append((sums.sent, len(sums.buckets)))
        finish(sums)

    GradientSums.finish = note
    if how == "overlapped":
        embedscale.model.body.HAS_CPU_BODY = False  # as on a GPU
    for chunk_tokens, module, loss in TOGETHER[how]:
        module, negatives = module_for(folder, **module, world=2, **loss), loss.get("hard_negatives", 0)
        batches = [batch_of(16, negatives, chunk_tokens, part=slice(n * 8, n * 8 + 8)) for n in (0, 1)]
        chunks, held = batches[rank].chunks, 0
        if how == "sharded":
            module.shard("cpu")
            held = sum(p.to_local().numel() for p in module.parameters())
            for parameter in module.trainable.values():
                parameter.register_post_accumulate_grad_hook(reduced.append)
            most = max(len(batch.chunks) for batch in batches)
            if chunk_tokens:
                assert len(batches[0].chunks) != len(batches[1].chunks)
            chunks = cut_further(chunks, most)
        value = module.backward_through(replace(batches[rank], chunks=chunks))
        found = whole_gradients(module)
        norm = torch.nn.utils.clip_grad_norm_(module.trainable.values(), 0.1)
        norm = norm.full_tensor() if how == "sharded" else norm
        results.append((value, found, norm, whole_gradients(module), early.pop(), len(reduced) / len(chunks), held))
        reduced.clear()
    torch.save(results, f"{out}/{rank}")
    torch.distributed.destroy_process_group()


def whole_gradients(module):
    each = {name: p.grad.clone() for name, p in module.trainable.items()}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in each.items()}


@pytest.mark.parametrize("how", TOGETHER)
def test_two_processes_compute_what_one_does(server, tmp_path, backbone_folder, how):
    """Compare loss, gradients and their norm of two gloo ranks with those of one process.

    Gradients are summed at the end (the batch whole, in chunks, with hard negatives, with every similarity), summed
    during the backward pass, or sharded, with more chunks in one process than in the other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = (backbone_folder, port, str(tmp_path), how)
    processes = [server.Process(target=_process, args=(rank, *args)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    for number, (_, settings, loss) in enumerate(TOGETHER[how]):
        exact = settings.get("precision", "float32") == "float32"
        module = module_for(backbone_folder, settings["method"], **loss)
        value = module.backward_through(batch_of(16, loss.get("hard_negatives", 0)))
        expected = gradients(module)
        norm = torch.nn.utils.clip_grad_norm_(module.trainable.values(), 0.1)
        weights = sum(p.numel() for p in module.parameters())
        for rank in ranks:
            found, gradient, total, clipped, (sent, buckets), reduced, held = rank[number]
            torch.testing.assert_close(found, value, rtol=1e-5 if exact else 0.02, atol=0)
            torch.testing.assert_close(total, norm, rtol=1e-5 if exact else 0.02, atol=0)
            if exact:
                assert_same_gradients(gradient, expected)
                assert_same_gradients(clipped, gradients(module))
            else:
                flat = [torch.cat([g.flatten() for g in each.values()]) for each in (gradient, expected)]
                assert torch.cosine_similarity(*flat, dim=0) > 0.99
            if how == "sharded":
                assert reduced == len(expected), "after each chunk: nobody holds a whole gradient"
                assert held == pytest.approx(weights / 2, rel=0.02)
            else:
                # The CPU body has no gradients before the end.
                assert buckets > 3 and sent == (buckets if how == "overlapped" else 0)
