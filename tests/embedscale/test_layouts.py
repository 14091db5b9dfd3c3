"""Every supported layout: its shape against the model that transformers builds, its cost against torch's count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel

from embedscale.errors import UserError
from embedscale.model.backbone import shape_of, shape_without_weights
from embedscale.model.methods import apply_method
from embedscale.run.config import Backbone
from embedscale.run.cost import cost_of
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
        enable = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        body.disable_input_require_grads()
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
        for checkpointing in (False, True):
            expected = cost_of(shape, method, checkpointing).exact(3 * 8, 3 * 8 * 8)
            assert counted(config, method, checkpointing) == expected, (name, checkpointing)


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
