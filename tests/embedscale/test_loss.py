"""The loss against written-out sums, and chunks and processes against the whole."""

import itertools
import math
import shutil
import socket
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, normalize

from embedscale.model.backbone import load_body, shape_of
from embedscale.model.encoder import Encoder, cut_further, pack
from embedscale.model.methods import apply_method
from embedscale.model.parallel import GradientSums
from embedscale.run.config import Backbone, Loss, RunConfig, Training
from embedscale.run.cost import cost_of
from embedscale.run.method import Method
from embedscale.training.held_out import score
from embedscale.training.loss import info_nce, loss_and_gradient
from embedscale.training.module import Batch, Contrastive
from embedscale.training.plan import TrainingPlan

B, K = 6, 2


def vectors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (B, B, B * K)]


def written_out(queries, positives, negatives, form, temperature):
    """The definitions, pair by pair, in Python numbers."""

    def e(a, b):
        return math.exp(float(a.double() @ b.double()) / temperature)

    total = 0.0
    for query, positive in zip(queries, positives, strict=True):
        right = e(query, positive)
        row = sum(e(query, other) for other in [*positives, *negatives])
        column = sum(e(other, positive) for other in queries)
        if form == "one_directional":
            total -= math.log(right / row)
        elif form == "symmetric":
            total -= (math.log(right / row) + math.log(right / column)) / 2
        else:
            others = sum(e(query, q) + e(positive, p) for q, p in zip(queries, positives, strict=True))
            others -= e(query, query) + e(positive, positive)
            total -= math.log(right / (row + column + others))
    return total / len(queries)


@pytest.mark.parametrize("form", ["symmetric", "one_directional", "gte"])
@pytest.mark.parametrize("hard", [False, True])
def test_info_nce_is_its_definition(form, hard):
    queries, positives, negatives = vectors()
    negatives = negatives if hard else negatives[:0]
    loss = Loss(form=form, temperature=0.05)
    expected = written_out(queries, positives, negatives, form, 0.05)
    assert float(info_nce(queries, positives, negatives, loss)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "directions", "partition"),
    [
        ("one_directional", ["query_to_doc"], "joint"),
        ("symmetric", ["query_to_doc", "doc_to_query"], "per_direction"),
        ("gte", ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"], "joint"),
    ],
)
def test_info_nce_is_that_of_sentence_transformers(form, directions, partition):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    queries, positives, _ = vectors()
    theirs = MultipleNegativesRankingLoss(None, scale=20.0, directions=directions, partition_mode=partition)
    expected = float(theirs.compute_loss_from_embeddings([queries, positives], None))
    loss = Loss(form=form, temperature=0.05)
    assert float(info_nce(queries, positives, positives[:0], loss)) == pytest.approx(expected, rel=1e-5)


def test_similarities_are_float32_under_autocast():
    queries, positives, negatives = vectors()
    with torch.autocast("cpu", torch.bfloat16):
        value = info_nce(queries, positives, negatives, Loss())
    assert value.dtype == torch.float32
    assert float(value) == float(info_nce(queries, positives, negatives, Loss()))


def test_equal_texts_are_no_negatives():
    """Two pairs with one positive text: the loss and gradient of a softmax from which the twin is left out."""
    queries, positives, _ = vectors()
    positives[3] = positives[1]
    texts = torch.arange(2 * B)
    texts[B + 3] = texts[B + 1]
    leaf = queries.clone().requires_grad_()
    value = info_nce(leaf, positives, positives[:0], Loss("one_directional", 0.1, mask_equal_texts=True), texts)
    value.backward()
    other = queries.clone().requires_grad_()
    rows = []
    for i in range(B):
        kept = [j for j in range(B) if j == i or {i, j} != {1, 3}]
        scores = other[i] @ positives[kept].T / 0.1
        rows.append(cross_entropy(scores[None], torch.tensor([kept.index(i)])))
    torch.stack(rows).mean().backward()
    torch.testing.assert_close(value, torch.stack(rows).mean())
    torch.testing.assert_close(leaf.grad, other.grad)
    for masked in (True, False):  # as a step asks for it
        loss = Loss("one_directional", 0.1, mask_equal_texts=masked)
        found, gradient = loss_and_gradient(torch.cat([queries, positives]), B, loss, texts)
        assert torch.allclose(found, value.detach()) == torch.allclose(gradient[:B], leaf.grad) == masked


def test_retrieval_counts_ranks_and_lets_ties_lose():
    queries = torch.eye(4)
    assert score(queries, queries, 1.0)[1:] == [1.0, 1.0]
    assert score(queries, queries.roll(1, 0), 1.0)[1:] == [0.0, 1.0]
    assert score(torch.ones(20, 1), torch.ones(20, 1), 1.0)[1:] == [0.0, 0.0]
    assert score(torch.ones(20, 1), torch.ones(20, 1), 1.0)[0] == pytest.approx(math.log(20))


METHODS = {
    "full": Method("full"),
    "freeze": Method("freeze", active_fraction=0.5),
    "bias": Method("bias"),
    "lora": Method("lora", rank=4, dropout=0.3),
}


def module_for(folder, method, precision="float32", world=1, checkpointing=False, **loss):
    config = RunConfig(
        backbone=Backbone(name=str(folder)), method=method, loss=Loss(**loss), training=Training(precision=precision)
    )
    body = load_body(config.backbone, 0)
    shape = shape_of(body, "tiny")
    torch.manual_seed(0)
    trainable = apply_method(body, method)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in body.named_parameters():
        if "lora_B" in name:  # PEFT starts at zero, where half of the gradients vanish
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    encoder = Encoder(body, precision=precision)
    if checkpointing:
        encoder.checkpoint_activations()
    plan = TrainingPlan(1e9, 0, 1, 0, 16, 1, 16, 0, world, 1e-3, 1, 0.0, "", "", [])
    module = Contrastive(encoder, trainable, config, plan, cost_of(shape, method))
    encoder.train()
    return module


def batch_of(pairs=16, negatives=0, chunk_tokens=None, seed=0, part=slice(None)):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, pairs * (2 + negatives)).astype(np.int64)
    rows = [rng.integers(0, 256, n).astype(np.int32) for n in lengths]
    groups = [range(pairs), range(pairs, 2 * pairs)]
    kept = [i for group in groups for i in list(group)[part]]
    first = range(pairs)[part]
    kept += [2 * pairs + i * negatives + k for i in first for k in range(negatives)]
    tokens = np.concatenate([rows[i] for i in kept])
    chunks = pack(tokens, lengths[kept], chunk_tokens)
    texts = torch.from_numpy(np.asarray(kept))
    return Batch(0, len(first), chunks, texts, int(lengths.sum()), int((lengths**2).sum()))


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.trainable.items()}


def assert_same_gradients(found, expected):
    """Equal within rounding: 1e-5 of the gradient's norm, tensor by tensor and in all."""
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, key


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_cached_chunks_give_the_gradient_of_one_graph(backbone_folder, name, precision):
    """With dropout and in bf16: the same chunks in one autograd graph, through the plain loss.

    In bf16, both with folded blocks, which round elsewhere than plain ones.
    """
    batch = batch_of(chunk_tokens=150)
    assert len(batch.chunks) > 3
    module = module_for(backbone_folder, METHODS[name], precision)
    value = module.backward_through(batch)
    cached = gradients(module)

    module.zero_grad(set_to_none=True)
    parts = []
    with module.encoder.folding() if precision == "bf16" else nullcontext() as folded:
        for number, chunk in enumerate(batch.chunks):
            module._seed(batch, number)
            parts.append(module.encoder(chunk))
        order = torch.cat([chunk.order for chunk in batch.chunks])
        embeddings = torch.cat(parts)[order.argsort()]
        whole = info_nce(embeddings[:16], embeddings[16:], embeddings[:0], module.config.loss)
        whole.backward()
        if folded is not None:
            folded.backward()
    torch.testing.assert_close(value, whole.detach())
    assert_same_gradients(cached, gradients(module))


def test_dropout_draws_anew_at_each_step_and_the_same_when_a_step_is_repeated(backbone_folder, monkeypatch):
    """On any number of cores, of which each would draw its part's at its own time."""
    batch, module = batch_of(chunk_tokens=150), module_for(backbone_folder, METHODS["lora"])

    def loss(step):
        return float(module.backward_through(replace(batch, step=step)))

    assert loss(0) == loss(0) and len({loss(step) for step in range(4)}) == 4
    first, threads = loss(0), torch.get_num_threads()
    monkeypatch.setattr("embedscale.training.module.PART_TOKENS", 40)
    torch.set_num_threads(3)
    try:
        assert loss(0) == first
    finally:
        torch.set_num_threads(threads)
    module.config = replace(module.config, training=Training(seed=1))
    assert loss(0) != first


@pytest.mark.parametrize("name", METHODS)
def test_chunking_and_checkpointing_change_nothing(backbone_folder, name):
    method = METHODS[name] if name != "lora" else Method("lora", rank=4)
    results, spent = [], []
    for chunk_tokens, checkpointing in itertools.product((None, 100), (False, True)):
        module, batch = (
            module_for(backbone_folder, method, checkpointing=checkpointing),
            batch_of(chunk_tokens=chunk_tokens),
        )
        results.append((module.backward_through(batch), gradients(module)))
        module._account(batch)
        spent.append(module.flop_exact)
    for value, found in results[1:]:
        torch.testing.assert_close(value, results[0][0])
        assert_same_gradients(found, results[0][1])
    again = module.cost.forward * batch.tokens + module.cost.forward_attention * batch.squared_lengths
    assert spent[2] - spent[0] == spent[3] - spent[1] == again, "GradCache's second forward pass is counted"


@pytest.mark.parametrize("chunk_tokens", [None, 300])
@pytest.mark.parametrize("name", METHODS)
def test_parts_on_several_cores_give_the_gradient_of_the_whole(backbone_folder, monkeypatch, name, chunk_tokens):
    """And the same bits each time, in whatever order the cores come to their ends."""
    method = METHODS[name] if name != "lora" else Method("lora", rank=4)
    batch, results, cores = batch_of(chunk_tokens=chunk_tokens), [], torch.get_num_threads()
    try:
        for threads, part_tokens in ((1, 10**6), (3, 40), (3, 40), (1, 40)):
            torch.set_num_threads(threads)
            monkeypatch.setattr("embedscale.training.module.PART_TOKENS", part_tokens)
            module = module_for(backbone_folder, method)
            assert (len(module._parts(batch.chunks[0])) > 2) == (part_tokens == 40)
            results.append((module.backward_through(batch), gradients(module)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(cores)
    for value, found in results[1:]:
        torch.testing.assert_close(value, results[0][0])
        assert_same_gradients(found, results[0][1])
    assert all(torch.equal(results[1][1][key], results[2][1][key]) for key in results[1][1])


@pytest.mark.parametrize("name", METHODS)
def test_out_of_memory_halves_the_chunks_and_loses_no_step(backbone_folder, monkeypatch, name):
    method = METHODS[name] if name != "lora" else Method("lora", rank=4)
    module, batch = module_for(backbone_folder, method), batch_of()
    expected, whole = module.backward_through(batch), gradients(module)
    module, forward = module_for(backbone_folder, method), Encoder.forward
    most, seen = 150, []

    def small(self, packed, rows=None):
        seen.append(len(packed.tokens))
        if len(packed.tokens) > most:
            raise torch.OutOfMemoryError("a GPU's words")
        return forward(self, packed, rows)

    monkeypatch.setattr(Encoder, "forward", small)
    cut = module._backward_in_memory(batch)
    torch.testing.assert_close(module.loss, expected)
    assert_same_gradients(gradients(module), whole)
    assert sorted(torch.cat([chunk.order for chunk in cut.chunks]).tolist()) == list(range(32))
    assert module.halvings > 1 and max(seen) > most
    seen.clear()
    module.zero_grad(set_to_none=True)
    module._backward_in_memory(module.transfer_batch_to_device(batch, module.device, 0))
    assert max(seen) <= most, "what was learnt about the memory is remembered"
    assert_same_gradients(gradients(module), whole)
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        module._backward_in_memory(batch)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_change_nothing_and_are_compiled_once(backbone_folder):
    plain, compiled = (module_for(backbone_folder, METHODS["full"]) for _ in range(2))
    compiled.encoder.compile_blocks()
    for number in range(3):
        batch = batch_of(16 + 4 * number, 0, chunk_tokens=300)
        assert len(batch.chunks) > 1
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            torch.testing.assert_close(
                compiled.backward_through(batch), plain.backward_through(batch), rtol=1e-5, atol=0
            )
        assert_same_gradients(gradients(compiled), gradients(plain))
        for module in (compiled, plain):
            module.zero_grad(set_to_none=True)


LOSSES = [(None, {}), (100, {"hard_negatives": 1}), (100, {"form": "gte", "mask_equal_texts": True})]
LORA = {"method": Method("lora", rank=4)}
UNFOLDED = [{"method": METHODS["full"]}, {"method": METHODS["full"], "checkpointing": True}, LORA]
SHARDED = [{"method": m} for m in (METHODS["full"], METHODS["freeze"], METHODS["bias"], Method("lora", rank=1))]
SHARDED += [{"method": METHODS["full"], **more} for more in ({"checkpointing": True}, {"precision": "bf16"})]
# How two processes work together → (most tokens of a chunk, the module, its loss).
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
    early, reduced = [], []  # buckets sent before the end, of how many; gradients that were reduce-scattered

    def note(sums):
        early.append((sums.sent, len(sums.buckets)))
        finish(sums)

    GradientSums.finish = note
    if how == "overlapped":
        Encoder.folding = nullcontext
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
def test_two_processes_are_one(server, tmp_path, backbone_folder, how):
    """Two gloo ranks against one process: loss, gradients, their norm. Summed at the end, whole, in chunks, with hard
    negatives, with every similarity; summed while the backward pass runs; as shards, with more chunks in one than in
    the other.
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
                # All but what is set by hand, the embedding's; a folded body has no gradients before the end.
                by_hand = settings["method"].name == "full"
                assert buckets > 3 and sent == (buckets - by_hand if how == "overlapped" else 0)
