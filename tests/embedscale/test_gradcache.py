"""Chunks, several cores, merged layers, checkpointing and compiled blocks give the gradient of one graph."""

import itertools
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from steps import METHODS, assert_same_gradients, batch_of, gradients, module_for

from embedscale.model.body import FROM_TOKENS, PlainBody, training_body, use_cpu_body
from embedscale.model.cpu.body import PART_TOKENS, parts_of
from embedscale.run.config import Training
from embedscale.training.gradcache import accumulate_gradient
from embedscale.training.loss import info_nce, loss_and_gradient


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_cached_chunks_give_the_gradient_of_one_graph(backbone_folder, name, precision):
    """The reference is one autograd graph over the same chunks, with the plain loss, with dropout and in bf16.

    In bf16 both sides use the merged layers of the CPU body, because plain layers round differently.
    """
    batch = batch_of(chunk_tokens=150)
    assert len(batch.chunks) > 3
    module = module_for(backbone_folder, METHODS[name], precision)
    value = module.backward_through(batch)
    cached = gradients(module)

    module.zero_grad(set_to_none=True)
    parts, plain = [], nullcontext(PlainBody(module.encoder))
    with training_body(module.encoder, module.device, FROM_TOKENS) if precision == "bf16" else plain as body:
        for number, chunk in enumerate(batch.chunks):
            module.seed_chunk(batch, number)
            parts.append(body.forward(chunk))
        embeddings = torch.cat(parts)[batch.order.argsort()]
        whole = info_nce(embeddings[:16], embeddings[16:], embeddings[:0], module.config.loss)
        whole.backward()
    torch.testing.assert_close(value, whole.detach())
    assert_same_gradients(cached, gradients(module))


def test_dropout_depends_on_the_step_alone(backbone_folder):
    """A repeated step draws the same numbers, on any number of cores, whatever the order of the cores."""
    batch, module = batch_of(128, chunk_tokens=4500), module_for(backbone_folder, METHODS["lora"])
    assert len(batch.chunks) == 2 and len(batch.chunks[0].tokens) > PART_TOKENS

    def loss(step):
        return float(module.backward_through(replace(batch, step=step)))

    assert loss(0) == loss(0) and len({loss(step) for step in range(4)}) == 4
    first, threads = loss(0), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert loss(0) == first
    finally:
        torch.set_num_threads(threads)
    module.config = replace(module.config, training=Training(seed=1))
    assert loss(0) != first


@pytest.mark.parametrize("name", METHODS)
def test_chunking_and_checkpointing_change_nothing(backbone_folder, name):
    method = replace(METHODS[name], dropout=0.0)
    results, spent = [], []
    for chunk_tokens, checkpointing in itertools.product((None, 100), (False, True)):
        module, batch = (
            module_for(backbone_folder, method, checkpointing=checkpointing),
            batch_of(chunk_tokens=chunk_tokens),
        )
        results.append((module.backward_through(batch), gradients(module)))
        module.count(batch)
        spent.append(module.flop_exact)
    for value, found in results[1:]:
        torch.testing.assert_close(value, results[0][0])
        assert_same_gradients(found, results[0][1])
    again = module.cost.forward * batch.tokens + module.cost.forward_attention * batch.squared_lengths
    assert spent[2] - spent[0] == spent[3] - spent[1] == again, "GradCache's second forward pass is counted"


@pytest.mark.parametrize("chunk_tokens", [None, 4500])
@pytest.mark.parametrize("name", METHODS)
def test_several_cores_give_the_gradient_of_the_plain_body(backbone_folder, name, chunk_tokens):
    """The bits are the same each time, in whatever order the cores finish."""
    method = replace(METHODS[name], dropout=0.0)
    batch, cores = batch_of(128, chunk_tokens=chunk_tokens), torch.get_num_threads()
    module, results = module_for(backbone_folder, method), []

    def loss(embeddings):
        value, gradient = loss_and_gradient(embeddings[batch.order.argsort()], 128, module.config.loss, batch.texts)
        return value, gradient[batch.order]

    expected = accumulate_gradient(PlainBody(module.encoder), batch.chunks, loss)
    plain = gradients(module)
    try:
        for threads in (3, 3, 1):
            torch.set_num_threads(threads)
            assert len(parts_of(batch.chunks[0])) == (3 if threads == 3 else 2)
            module.zero_grad(set_to_none=True)
            with training_body(module.encoder, module.device, FROM_TOKENS) as body:
                assert not isinstance(body, PlainBody)
                value = accumulate_gradient(body, batch.chunks, loss)
            results.append(gradients(module))
            torch.testing.assert_close(value, expected)
            assert_same_gradients(results[-1], plain)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(cores)
    assert all(torch.equal(results[0][key], results[1][key]) for key in plain)


@pytest.mark.parametrize("name", METHODS)
def test_out_of_memory_halves_the_chunks_and_loses_no_step(backbone_folder, name):
    method = replace(METHODS[name], dropout=0.0)
    module, batch = module_for(backbone_folder, method), batch_of()
    expected, whole = module.backward_through(batch), gradients(module)
    module = module_for(backbone_folder, method)
    embed, most, seen = module.encoder.embed, 150, []

    def small(hidden, packed):
        seen.append(len(packed.tokens))
        if len(packed.tokens) > most:
            raise torch.OutOfMemoryError("a GPU's words")
        return embed(hidden, packed)

    module.encoder.embed = small
    cut = module.backward_in_memory(batch)
    torch.testing.assert_close(module.loss, expected)
    assert_same_gradients(gradients(module), whole)
    assert sorted(torch.cat([chunk.order for chunk in cut.chunks]).tolist()) == list(range(32))
    assert module.halvings > 1 and max(seen) > most
    seen.clear()
    module.zero_grad(set_to_none=True)
    module.backward_in_memory(module.transfer_batch_to_device(batch, module.device, 0))
    assert max(seen) <= most, "what was learnt about the memory is remembered"
    assert_same_gradients(gradients(module), whole)
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        module.backward_in_memory(batch)


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


def test_small_steps_dropout_and_gpus_use_the_plain_body(backbone_folder):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    encoder = module_for(backbone_folder, METHODS["full"]).encoder
    assert use_cpu_body(encoder, cpu, FROM_TOKENS)
    assert not use_cpu_body(encoder, cpu, FROM_TOKENS - 1)
    assert not use_cpu_body(encoder, gpu, 10 * FROM_TOKENS)
    assert not use_cpu_body(module_for(backbone_folder, METHODS["lora"]).encoder, cpu, FROM_TOKENS)
