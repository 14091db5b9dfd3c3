"""Helpers for tests of a training step: a module with a tiny backbone, a random batch, and its gradients."""

import numpy as np
import torch

from embedscale.model.backbone import load_body, shape_of
from embedscale.model.body import PlainBody
from embedscale.model.encoder import Encoder
from embedscale.model.methods import apply_method
from embedscale.model.packing import pack
from embedscale.run.config import Backbone, Loss, RunConfig, Training
from embedscale.run.cost import cost_of
from embedscale.run.method import Method
from embedscale.training.batches import Batch
from embedscale.training.module import Contrastive
from embedscale.training.plan import TrainingPlan

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
        if "lora_B" in name:  # PEFT initialises this matrix with zeros, and then half of the gradients are zero
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    encoder = Encoder(body, precision=precision)
    if checkpointing:
        encoder.checkpoint_activations()
    plan = TrainingPlan(1e9, 0, 1, 1600, 16, 1, 16, 0, world, 1e-3, 1, 0.0, "", "", [])
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


def chunk_step(folder, method, *changes, chunk=None, **settings):
    """Return embeddings and gradients of one chunk by the plain body, after `changes` to the decoder.

    The embeddings have the same bits with and without a graph.
    """
    module = module_for(folder, method, **settings)
    for change in changes:
        change(module.encoder.body)
    body, chunk = PlainBody(module.encoder), chunk or batch_of().chunks[0]
    torch.manual_seed(3)
    without = body.encode(chunk, graph=False)
    torch.manual_seed(3)
    embeddings = body.encode(chunk, graph=True)
    assert torch.equal(without, embeddings)
    body.backward(chunk, torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings))
    return embeddings, gradients(module)


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.trainable.items()}


def assert_same_gradients(found, expected):
    """Assert that each tensor differs by at most 1e-4 of its norm plus 1e-6 of the norm of the whole gradient."""
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, key
