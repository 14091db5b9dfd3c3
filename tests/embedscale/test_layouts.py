"""Every supported layout: its shape against the model that transformers builds, its cost against torch's count."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel

from embedscale.errors import UserError
from embedscale.model.backbone import shape_of, shape_without_weights
from embedscale.model.body import Inference, PlainBody
from embedscale.model.cpu.body import training_body
from embedscale.model.encoder import Encoder, checkpoint_blocks
from embedscale.model.methods import apply_method
from embedscale.model.packing import pack
from embedscale.run.config import Backbone
from embedscale.run.cost import cost_of
from embedscale.run.families import FAMILIES
from embedscale.run.layouts import LAYOUTS, shape_from
from embedscale.run.method import Method

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0}  # written where the type has the setting
WHOLE = {"gpt_neox", "persimmon"}  # as many heads of keys as of queries
VARIANTS = {
    "as it is": {},
    "with biases": {"attention_bias": True, "mlp_bias": True, "use_bias": True, "attention_out_bias": True},
    "with normalised heads": {"qk_layernorm": True, "use_qk_norm": True},
    "with a window": {"sliding_window": 16, "use_sliding_window": True},
    "sequential": {"use_parallel_residual": False},
}
METHODS = {
    "full": Method("full"),
    "freeze": Method("freeze", active_blocks=1),
    "freeze first": Method("freeze", active_blocks=1, blocks="first"),
    "bias": Method("bias"),
    "lora": Method("lora", rank=3),
    "lora on one layer": Method("lora", rank=3, targets=["{out}"]),
    "lora on the embedding": Method("lora", rank=3, embedding=True),
}


def small(kind, **more):
    """Return the configuration of a small decoder, or skip where the installed transformers lacks the type."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    known = set(CONFIG_MAPPING[kind]().to_dict())
    wanted = SMALL | MORE | ({"partial_rotary_factor": 0.5} if kind in ("phi", "persimmon") else {}) | more
    if kind in WHOLE:
        wanted.pop("num_key_value_heads")
    config = CONFIG_MAPPING[kind](**{key: value for key, value in wanted.items() if key in known})
    config._attn_implementation = "eager"
    return config


def on_meta(config):
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_shape_of_a_config_is_that_of_the_built_model(kind):
    seen = []
    for more in VARIANTS.values():
        config = small(kind, **more)
        if config.to_dict() in seen:
            continue
        seen.append(config.to_dict())
        assert shape_from("own", config.to_dict()) == shape_of(on_meta(config), "own"), more
        # What is saved may leave out what equals the class's default.
        assert shape_from("own", config.to_diff_dict()) == shape_from("own", config.to_dict()), more


def counted(config, method, checkpointing, sequences=3, length=8):
    """Return torch's count of the forward and backward pass, without the product that makes rotary angles.

    Not on the meta device, where transformers cannot look for packed sequences.
    """
    body = AutoModel.from_config(config, dtype=torch.float32)
    apply_method(body, method)
    if checkpointing:
        checkpoint_blocks(body)
    body.train()
    ids = torch.zeros(sequences, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        hidden.sum().backward()
    angles = sum(
        sum(found.values()) for name, found in counter.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_exact_cost_equals_torchs_count(kind):
    config = small(kind, **VARIANTS["with biases"])
    shape = shape_from("own", config.to_dict())
    for name, method in METHODS.items():
        if name == "bias" and not shape.biases:
            continue
        if method.targets:
            out = next(linear.name for linear in shape.linears if linear.role == "attention_out")
            method = Method("lora", rank=3, targets=[out])
        for checkpointing in (False, True) if name in ("full", "freeze", "lora") else (False,):
            expected = cost_of(shape, method, checkpointing).exact(3 * 8, 3 * 8 * 8)
            assert counted(config, method, checkpointing) == expected, (name, checkpointing)


def shrunk(family):
    """Return a family's configuration with narrow blocks: six, so that each kind of block is among them."""
    given = next(iter(family.sizes.values())).config
    narrow = {key: value for key, value in SMALL.items() if key in given}
    config = CONFIG_MAPPING[given["model_type"]](**{**given, **narrow, "num_hidden_layers": 6, "pad_token_id": 0})
    config._attn_implementation = "eager"
    return config


CONFIGS = {kind: (small, kind, VARIANTS["with biases"]) for kind in LAYOUTS}
CONFIGS |= {family.name: (shrunk, family, {}) for family in FAMILIES}


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_texts_embed_as_in_transformers(name, attention):
    """One text at a time, with transformers' own eager attention, is the truth."""
    torch.manual_seed(0)
    make, what, more = CONFIGS[name]
    config = make(what, **more)
    reference = AutoModel.from_config(config, dtype=torch.float32).eval()
    for parameter in reference.parameters():  # zeros and ones would hide a bias or a scale
        parameter.data += 0.05 * torch.randn_like(parameter)
    body = copy.deepcopy(reference)
    reference.config.is_causal = attention == "causal"
    lengths = np.array([5, 1, 3, 20, 3])
    tokens = np.random.default_rng(1).integers(3, 64, lengths.sum())
    rows = torch.from_numpy(tokens).split(lengths.tolist())
    with torch.no_grad():
        states = [reference(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
        expected = torch.stack([normalize(each.mean(0), dim=0) for each in states])
        (chunk,) = pack(tokens, lengths)
        encoder = Encoder(body, attention=attention)
        for found in (encoder(chunk), *Inference(encoder).embed([chunk])):
            torch.testing.assert_close(found[chunk.order.argsort()], expected, atol=1e-5, rtol=0)


def test_a_model_that_attends_to_later_tokens_is_not_taken_for_a_causal_one():
    body = AutoModel.from_config(small("llama", is_causal=False))
    body.config.is_causal = False
    with pytest.raises(UserError, match="backbone.attention: causal, but the model's config.json"):
        Encoder(body)
    Encoder(body, attention="bidirectional")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_text_of_padding_tokens_alone_has_no_gradient(kind):
    """Its states are zero: the row of the padding token is, and there are no biases."""
    encoder = Encoder(AutoModel.from_config(small(kind), dtype=torch.float32))
    (chunk,) = pack(np.array([0, 0, 5, 7]), np.array([2, 2]))
    embeddings = encoder(chunk)
    assert torch.equal(embeddings[0], torch.zeros(32))
    embeddings.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in encoder.parameters())
    assert encoder.body.get_input_embeddings().weight.grad.norm() < 100


def test_a_scaled_embedding_makes_one_gradient_as_large_as_the_vocabulary():
    """Gemma multiplies its token embeddings. A step of several parts must not fill such a gradient for each."""
    sizes = []

    class Filled(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.embedding_dense_backward.default:
                sizes.append(args[2])
            return function(*args, **(kwargs or {}))

    body = AutoModel.from_config(small("gemma3_text", vocab_size=512), dtype=torch.float32)
    chunks = pack(np.random.default_rng(0).integers(1, 512, 12000), np.full(600, 20))
    gradients = []
    for chosen in (training_body, lambda encoder: nullcontext(PlainBody(encoder))):
        encoder = Encoder(copy.deepcopy(body))
        with chosen(encoder) as each, Filled():
            embeddings = each.encode(chunks[0], graph=True)
            each.backward(chunks[0], torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings))
            if not gradients:
                assert sizes.count(512) <= 1, sizes
        gradients.append({name: parameter.grad for name, parameter in encoder.body.named_parameters()})
    for name, expected in gradients[1].items():
        rounding = max(1e-4, 1e-6 * float(expected.norm()))  # of sums over 12,000 tokens
        torch.testing.assert_close(gradients[0][name], expected, atol=rounding, rtol=1e-4, msg=name)


def test_rotary_angles_that_grow_with_the_longest_text_limit_the_context(tmp_path):
    """Beyond the length of pre-training, a text's embedding would depend on the other texts of its batch."""
    long = {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for rope, context in ((long | {"original_max_position_embeddings": 16}, 16), ({"rope_type": "dynamic"}, 128)):
        rope |= {"rope_theta": 10000.0, "factor": 8.0}
        config = small("llama", rope_parameters=rope)
        assert shape_from("own", config.to_dict()).context == context
        old = {"model_type": "llama"} | SMALL | {"rope_scaling": rope}  # as releases before 5 write it
        assert shape_from("own", old).context == context
        config.save_pretrained(tmp_path)
        assert shape_without_weights(Backbone(name=str(tmp_path))).context == context


@pytest.mark.parametrize("name", ["models/sub/none", "./none", "../none", "none", "/models/none"])
def test_a_folder_that_is_not_there_is_refused_without_asking_the_hub(name):
    with pytest.raises(UserError, match=f"backbone.name: the folder '{name}' does not exist"):
        shape_without_weights(Backbone(name=name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'; expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number of at least 1"),
        ({"model_type": None}, "model_type is None; expected the name of a decoder"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; expected a whole number"),
    ],
)
def test_a_wrong_number_is_named(change, message):
    with pytest.raises(UserError, match=message):
        shape_from("own", {"model_type": "llama"} | SMALL | change)
