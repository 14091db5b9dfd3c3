"""Costs against torch's FLOP counter, and parameter counts against models that transformers builds."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, GPTNeoXConfig, GPTNeoXModel

from embedscale.errors import UserError
from embedscale.model.backbone import shape_of
from embedscale.model.encoder import checkpoint_blocks
from embedscale.model.methods import apply_method
from embedscale.run.cost import cost_of
from embedscale.run.families import FAMILIES, PYTHIA, hub_name, known
from embedscale.run.layouts import shape_from
from embedscale.run.method import Method

METHODS = {
    "full": Method("full"),
    "freeze 1/4": Method("freeze", active_fraction=0.25),
    "freeze 4/4": Method("freeze", active_blocks=4),
    "freeze first": Method("freeze", active_blocks=2, blocks="first"),
    "freeze one": Method("freeze", active_blocks=1, blocks="one"),
    "bias": Method("bias"),
    "lora 8": Method("lora", rank=8),
    "lora 40": Method("lora", rank=40),
    "lora on one layer": Method("lora", rank=4, targets=["dense_4h_to_h"]),
    "lora on the attention": Method("lora", rank=4, targets=["dense", "query_key_value"]),
    "lora on the MLP": Method("lora", rank=4, targets=["dense_h_to_4h"]),
    "lora on queries": Method("lora", rank=4, targets=["query_key_value"]),
    "lora on the embedding": Method("lora", rank=4, embedding=True),
}


def counted(method, checkpointing, parallel, sequences=3, length=16):
    """Return the forward and backward FLOP with eager attention: in all, and of the attention scores alone."""
    config = GPTNeoXConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=96,
        use_parallel_residual=parallel,
    )
    config._attn_implementation = "eager"
    body = GPTNeoXModel(config)
    apply_method(body, method)
    if checkpointing:
        checkpoint_blocks(body)
    body.train()
    ids = torch.randint(0, 256, (sequences, length))
    with FlopCounterMode(display=False) as forward:
        out = body(input_ids=ids, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    with FlopCounterMode(display=False) as angles:  # older transformers compute the rotary angles by a product
        body.rotary_emb(out, torch.arange(length)[None])
    shape = shape_from("tiny", config.to_dict())
    return forward.get_total_flops() - angles.get_total_flops(), backward.get_total_flops(), shape, body


@pytest.mark.parametrize("name", METHODS)
def test_the_exact_cost_equals_torchs_count(name):
    method = METHODS[name]
    for checkpointing, parallel in itertools.product((False, True), (True, False)):
        forward, backward, shape, body = counted(method, checkpointing, parallel)
        cost = cost_of(shape, method, checkpointing)
        tokens, squares = 3 * 16, 3 * 16 * 16
        assert forward == cost.forward * tokens + cost.forward_attention * squares
        expected = (cost.backward + cost.recompute) * tokens
        expected += (cost.backward_attention + cost.recompute_attention) * squares
        assert backward == expected, (checkpointing, parallel)
        assert cost.exact(tokens, squares) == forward + backward
        trained = [p.numel() for n, p in body.named_parameters() if p.requires_grad and "embed_in" not in n]
        assert sum(trained) == cost.n_updated


def test_frozen_blocks_cost_nothing_in_the_backward_pass_even_with_checkpointing():
    _, whole, *_ = counted(Method("freeze", active_blocks=4), True, True)
    _, quarter, *_ = counted(Method("freeze", active_blocks=1), True, True)
    assert quarter < 0.27 * whole


@pytest.mark.parametrize(
    ("method", "within"),
    [
        (Method("full"), 0.003),
        (Method("bias"), 0.004),
        (Method("freeze", active_fraction=0.5), 0.003),
        (Method("lora", rank=32, embedding=True), 0.01),
        (Method("lora", rank=2048, embedding=True), 0.012),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_the_papers_formula_agrees_with_the_dense_products_on_pythia_70m(method, within):
    cost = cost_of(PYTHIA.sizes["pythia-70m"].shape, method)
    assert cost.forward + cost.backward == pytest.approx(cost.flop_per_token, rel=within)


def test_without_an_adapter_on_the_embedding_lora_saves_the_first_input_gradients():
    """The paper's formula counts a backward pass through all of N, but the first block's input needs no gradient."""
    shape = PYTHIA.sizes["pythia-70m"].shape
    with_it = cost_of(shape, Method("lora", rank=32, embedding=True))
    without = cost_of(shape, Method("lora", rank=32))
    adapter = 32 * shape.width
    first = {li.name: 2 * (li.weights + 32 * li.inputs) for li in shape.linears}
    saved = first["query_key_value"] + first["dense_h_to_4h"]
    assert with_it.backward - without.backward == saved + 4 * adapter


@pytest.mark.parametrize(
    "row",
    [row for family in FAMILIES for row in family.sizes.values()],
    ids=[name for family in FAMILIES for name in family.sizes],
)
def test_parameter_counts_equal_those_of_the_built_model(row):
    config = AutoConfig.for_model(**row.config)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    built = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    assert built == row.parameters == row.shape.parameters
    assert shape_of(model, row.name) == row.shape
    assert sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias")) == row.shape.biases


def test_full_fine_tuning_costs_6n_and_bias_about_4n():
    for row in PYTHIA.sizes.values():
        assert cost_of(row.shape, Method("full")).flop_per_token == 6 * row.parameters
        bias = cost_of(row.shape, Method("bias"))
        assert bias.flop_per_token == 4 * row.parameters + 2 * row.shape.biases


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adapters"}, "method.name: 'adapters' is unknown"),
        ({"name": "lora"}, "method.rank: lora needs a rank"),
        ({"name": "lora", "rank": 0}, "method.rank: 0 is out of range"),
        ({"name": "lora", "rank": 4000}, "method.rank: 4000 is out of range"),
        ({"name": "lora", "rank": 8, "targets": ["nothing"]}, "method.targets: 'nothing' is not a dense layer"),
        ({"name": "lora", "rank": 8, "alpha": 0.0}, "method.alpha: 0.0 is out of range; allowed: above 0"),
        ({"name": "lora", "rank": 8, "dropout": 1.0}, "method.dropout: 1.0 is out of range"),
        ({"name": "freeze"}, "freeze needs one of"),
        ({"name": "freeze", "active_fraction": 0.3}, "method.active_fraction: 0.3 of 6 blocks is not a whole number"),
        ({"name": "freeze", "active_fraction": 1.5}, "method.active_fraction: 1.5 is out of range"),
        ({"name": "freeze", "active_blocks": 7}, "method.active_blocks: 7 is out of range"),
        ({"name": "freeze", "active_blocks": 6, "blocks": "one"}, "method.active_blocks: block 6 does not exist"),
        ({"name": "full", "rank": 8}, "settings of 'lora' are given"),
    ],
)
def test_a_method_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        cost_of(PYTHIA.sizes["pythia-70m"].shape, Method(**settings))


def test_a_hub_name_is_spelt_as_the_hub_spells_it():
    assert hub_name("models/qwen3-0.6b-base") == "Qwen/Qwen3-0.6B-Base"
    assert hub_name("pythia-1.4B-deduped") == "EleutherAI/pythia-1.4b-deduped"
    assert hub_name("llama-3.2-1b") == "meta-llama/Llama-3.2-1B"
    assert hub_name("models/own") is None


def test_learning_rates_are_those_of_the_paper():
    pythia = known("EleutherAI/pythia-160m-deduped").pretraining_learning_rate
    assert Method().peak_learning_rate(pythia) == pytest.approx(6e-5)
    assert Method("lora", rank=8).peak_learning_rate(None) == Method("bias").peak_learning_rate(1e-4) == 1e-3
    assert Method().peak_learning_rate(None) is None
    assert Method().peak_learning_rate(known("allenai/OLMo-2-1124-7B").pretraining_learning_rate) == pytest.approx(3e-5)
    assert known("Qwen/Qwen3-8B-Base").pretraining_learning_rate is None  # Qwen published none
