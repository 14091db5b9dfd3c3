"""LoRA's layers on a GPU compute what PEFT's do, forward and backward."""

import copy

import pytest
import torch
from steps import METHODS, assert_same_gradients, batch_of, gradients, module_for

from embedscale.model.adapters import add_in_place
from embedscale.model.body import PlainBody
from embedscale.run.method import Method


def step(module):
    body, (chunk,) = PlainBody(module.encoder), batch_of().chunks
    embeddings = body.encode(chunk, graph=True)
    body.backward(chunk, torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings))
    return embeddings, gradients(module)


@pytest.mark.parametrize("method", [Method("lora", rank=4, alpha=8), Method("lora", rank=4, embedding=True)])
def test_in_place_is_peft(backbone_folder, method):
    module = module_for(backbone_folder, method)
    other = copy.deepcopy(module)
    add_in_place(other.encoder.body)
    (embeddings, expected), (found, own) = step(module), step(other)
    torch.testing.assert_close(found, embeddings, atol=1e-6, rtol=0)
    assert_same_gradients(own, expected)


def test_in_bf16_the_sum_is_rounded_once(backbone_folder):
    method = Method("lora", rank=4)
    truth, expected = step(module_for(backbone_folder, method))
    layers, in_place = (module_for(backbone_folder, method, precision="bf16") for _ in range(2))
    add_in_place(in_place.encoder.body)
    (theirs, _), (ours, found) = step(layers), step(in_place)
    assert (ours - truth).norm() <= 1.05 * (theirs - truth).norm()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 0.1 * gradient.norm()


def test_layers_with_dropout_stay(backbone_folder):
    found = []
    for change in (lambda body: None, add_in_place):
        module = module_for(backbone_folder, METHODS["lora"])
        change(module.encoder.body)
        torch.manual_seed(3)
        found.append(step(module)[1])
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())
