"""The folded body against transformers: its embeddings, and each method's gradients."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_encoder import one_by_one, sequences
from transformers import AutoModel

from embedscale.model.backbone import load_body
from embedscale.model.body import FROM_TOKENS, Inference, PlainBody, training_body
from embedscale.model.cpu.folded import fold
from embedscale.model.encoder import Encoder
from embedscale.model.methods import apply_method
from embedscale.model.packing import pack
from embedscale.run.config import Backbone
from embedscale.run.method import Method

METHODS = [
    Method("full"),
    Method("freeze", active_fraction=0.5),
    Method("freeze", active_blocks=1, blocks="first"),
    Method("bias"),
    Method("lora", rank=3),
    Method("lora", rank=3, embedding=True),
]


def shaken(body):
    """Change scales, shifts, biases and LoRA's products, which are ones and zeros in a fresh body."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return body


def with_long_ones():
    """From 192 tokens on, queries are processed in blocks of 64; 1,100 tokens need more than the first mask."""
    tokens, lengths = sequences(30)
    longer = np.array([191, 192, 700, 257, 1100], np.int32)
    more = np.random.default_rng(2).integers(0, 256, longer.sum()).astype(np.int32)
    return np.append(tokens, more), np.append(lengths, longer)


@pytest.mark.parametrize("tokens_to_come", [0, 10**6])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_embeds_as_transformers_does(backbone_folder, tokens_to_come, precision):
    tokens, lengths = with_long_ones()
    body = shaken(AutoModel.from_pretrained(backbone_folder, dtype=torch.float32).requires_grad_(False))
    expected = one_by_one(body, tokens, lengths, "mean")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = one_by_one(body, tokens, lengths, "mean")
    encoder = Encoder(body, precision=precision)
    assert fold(body, precision) is not None
    inference, chunks = Inference(encoder), pack(tokens, lengths, 300)
    inference.expect(tokens_to_come)
    order = torch.cat([chunk.order for chunk in chunks])
    found = torch.cat(list(inference.embed(chunks)))[order.argsort()]
    if precision == "float32":
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    else:
        assert 0 < (found - expected).norm() < 1.2 * (rounded - expected).norm()


def gradients(encoder, chunks, folded):
    weights = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    encoder.zero_grad()
    with (
        training_body(encoder, torch.device("cpu"), FROM_TOKENS) if folded else nullcontext(PlainBody(encoder)) as body
    ):
        for chunk in chunks:
            (body.forward(chunk) * weights[chunk.order]).sum().backward()
    return {name: p.grad.clone() for name, p in encoder.body.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.label}-{method.blocks}")
def test_gradients_equal_those_of_the_plain_blocks(backbone_folder, method):
    body = load_body(Backbone(name=str(backbone_folder)), 0)
    trainable = apply_method(body, method)
    encoder, chunks = Encoder(shaken(body)), pack(*with_long_ones(), 600)
    plain, ours = gradients(encoder, chunks, False), gradients(encoder, chunks, True)
    assert list(ours) == list(plain) == trainable and len(chunks) > 2
    for name in trainable:
        torch.testing.assert_close(ours[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.label}-{method.blocks}")
def test_bf16_gradients_are_as_exact_as_those_of_the_plain_blocks(backbone_folder, method):
    body = load_body(Backbone(name=str(backbone_folder)), 0)
    apply_method(body, method)
    encoder, chunks = Encoder(shaken(body)), pack(*with_long_ones(), 600)
    exact = gradients(encoder, chunks, False)
    encoder.precision = "bf16"
    plain, ours = gradients(encoder, chunks, False), gradients(encoder, chunks, True)

    def distance(found):
        return sum((found[name] - exact[name]).square().sum() for name in exact).sqrt()

    assert 0 < distance(ours) < 1.2 * distance(plain)


def test_unsupported_bodies_are_not_folded(backbone_folder):
    body = load_body(Backbone(name=str(backbone_folder)), 0)
    assert fold(body, "float32") is not None
    body.config.attention_dropout = 0.1
    assert fold(body, "float32") is None
    body.config.attention_dropout, body.config.use_parallel_residual = 0.0, False
    assert fold(body, "float32") is None


def test_heads_too_narrow_to_turn_by_pairs_embed_as_in_transformers(tmp_path, save_decoder):
    """A quarter of a head of four dimensions turns: one dimension, which transformers pairs with itself."""
    body = load_body(Backbone(name=str(save_decoder(tmp_path / "narrow", width=8, blocks=2))), 0).requires_grad_(False)
    tokens, lengths = sequences(12)
    expected = one_by_one(body, tokens, lengths, "mean")
    (chunk,) = pack(tokens, lengths)
    (found,) = Inference(Encoder(body)).embed([chunk])
    torch.testing.assert_close(found[chunk.order.argsort()], expected, atol=1e-6, rtol=0)
