"""What changes tensors in place on a GPU computes what PEFT and transformers do, forward and backward."""

import pytest
import torch
from steps import METHODS, assert_same_gradients, chunk_step

from embedscale.model.gpu.adapters import add_in_place
from embedscale.model.gpu.rotation import turn_in_place
from embedscale.run.method import Method

LORA = Method("lora", rank=4, alpha=8)


@pytest.mark.parametrize("changes", [(add_in_place,), (turn_in_place,), (add_in_place, turn_in_place)])
@pytest.mark.parametrize(
    "method", [LORA, Method("lora", rank=4, embedding=True), Method("full"), Method("freeze", active_fraction=0.5)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_embeddings_and_gradients_are_those_of_the_libraries(backbone_folder, method, changes, checkpointing):
    embeddings, expected = chunk_step(backbone_folder, method)
    found, own = chunk_step(backbone_folder, method, *changes, checkpointing=checkpointing)
    torch.testing.assert_close(found, embeddings, atol=1e-6, rtol=0)
    assert_same_gradients(own, expected)


@pytest.mark.parametrize("method", [LORA, Method("full")])
def test_in_bf16_they_are_as_near_to_float32(backbone_folder, method):
    truth, expected = chunk_step(backbone_folder, method)
    theirs, _ = chunk_step(backbone_folder, method, precision="bf16")
    ours, found = chunk_step(backbone_folder, method, add_in_place, turn_in_place, precision="bf16")
    assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 0.1 * gradient.norm() + 1e-3 * whole, key


def test_adapters_with_dropout_stay(backbone_folder):
    _, expected = chunk_step(backbone_folder, METHODS["lora"])
    _, found = chunk_step(backbone_folder, METHODS["lora"], add_in_place)
    assert all(torch.equal(gradient, found[key]) for key, gradient in expected.items())
