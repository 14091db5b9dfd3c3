"""Decoders whose blocks stay as they are: on a CPU, their float32 products go through oneDNN, with equal gradients."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_layouts import small
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from embedscale.model.body import FROM_TOKENS, PlainBody, training_body
from embedscale.model.encoder import Encoder
from embedscale.model.methods import apply_method
from embedscale.model.packing import pack
from embedscale.run.method import Method

METHODS = [Method("full"), Method("freeze", active_fraction=0.5), Method("bias"), Method("lora", rank=3)]


class Products(TorchDispatchMode):
    """Counts the products of dense layers by the library that makes them."""

    def __init__(self):
        super().__init__()
        self.onednn = self.blas = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.onednn += function.namespace == "mkldnn"
        self.blas += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def gradients(encoder, chunk, body):
    weights = torch.randn(len(chunk.lengths), 32, generator=torch.Generator().manual_seed(1))
    encoder.zero_grad()
    with body as each, Products() as products:
        each.encode(chunk, graph=True)
        each.backward(chunk, weights)
    return {name: p.grad.clone() for name, p in encoder.body.named_parameters() if p.grad is not None}, products


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_gradients_equal_those_of_torchs_own_layers(kind, method):
    if method.name == "bias" and kind != "qwen2":
        pytest.skip("it has no biases")
    torch.manual_seed(0)
    body = AutoModel.from_config(small(kind), dtype=torch.float32)
    trainable = apply_method(body, method)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    encoder, before = Encoder(body), copy.deepcopy(body.state_dict())
    (chunk,) = pack(np.random.default_rng(0).integers(1, 64, 200), np.array([3, 40, 40, 7, 1, 60, 49]))
    plain, blas = gradients(encoder, chunk, nullcontext(PlainBody(encoder)))
    ours, onednn = gradients(encoder, chunk, training_body(encoder, torch.device("cpu"), FROM_TOKENS))
    assert blas.onednn == 0 < onednn.onednn and blas.blas > 0 == onednn.blas
    assert list(ours) == list(plain) == trainable
    for name in trainable:
        torch.testing.assert_close(ours[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)
    assert not any("forward" in vars(module) for module in body.modules())
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
