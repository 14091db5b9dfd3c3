"""How the blocks of each supported decoder are built: from its `config.json` to its shape, without torch.

`LAYOUTS` says for each `model_type` which dense layers and normalisations a block has; the numbers come from
`config.json`. Tests compare every row with the model that transformers builds, and the cost of its shape with torch's
count. So a decoder that is not in the table is refused, with the reason where one is known: its cost would be a guess.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from embedscale.errors import UserError
from embedscale.run.shape import BackboneShape, Linear

Flag = bool | str  # a constant, or the key of config.json that says it
GATED = ("gate_proj", "up_proj", "down_proj")
FUSED_GATE = ("gate_up_proj", "down_proj")
UNGATED = ("up_proj", "down_proj")
NUMBERED = ("fc1", "fc2")


@dataclass(frozen=True)
class Layout:
    """The blocks of one `model_type`. The defaults are Llama's."""

    query_bias: Flag = "attention_bias"  # of queries, keys and values
    out_bias: Flag = "attention_bias"
    mlp_bias: Flag = "mlp_bias"
    fused: str = ""  # name of the layer of queries, keys and values, where it is one
    out: str = "o_proj"
    mlp: tuple[str, ...] = GATED
    norms: int = 2  # normalisations of a block that are as wide as the residual stream
    more_norms: tuple[str, ...] = ()  # others: "attention" or "mlp" wide
    norm_weights: bool = True
    norm_biases: bool = False
    head_norms: str = ""  # of queries and keys: weights of one "head", which all share, or of "all" heads
    head_norms_if: Flag = True
    other_weights: int = 0  # numbers of a block that are neither dense nor a normalisation
    norm_first: bool = True  # the attention reads a normalisation of the block's input, not the input
    norm_last: bool = False  # a normalisation reads the MLP's output
    parallel: Flag = False  # attention and MLP both read the block's input
    window_if: Flag = True  # whether `sliding_window` counts
    needs_first_token: bool = False  # pre-trained with a first token, without which it understands no text
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what config.json may leave out


LLAMA = Layout()
UNBIASED = Layout(query_bias=False, out_bias=False, mlp_bias=False)
MISTRAL = replace(UNBIASED, defaults={"num_key_value_heads": 8, "sliding_window": 4096})
GLM = Layout(
    out_bias=False,
    mlp_bias=False,
    mlp=FUSED_GATE,
    defaults={"attention_bias": True, "num_key_value_heads": 2, "head_dim": 128},
)
OLMO2 = Layout(mlp_bias=False, head_norms="all", norm_first=False, norm_last=True)
NEOX = Layout(
    mlp_bias=True,
    fused="query_key_value",
    out="dense",
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    norm_biases=True,
    parallel="use_parallel_residual",
    defaults={"attention_bias": True, "use_parallel_residual": True},
)

LAYOUTS: dict[str, Layout] = {
    "apertus": Layout(mlp_bias=False, mlp=UNGATED, head_norms="head", other_weights=2),
    "arcee": Layout(mlp=UNGATED),
    "bitnet": Layout(mlp_bias=False, more_norms=("attention", "mlp"), defaults={"num_key_value_heads": 5}),
    "cohere": Layout(mlp_bias=False, norms=1, head_norms="all", head_norms_if="use_qk_norm", parallel=True),
    "cohere2": Layout(mlp_bias=False, norms=1, parallel=True, defaults={"sliding_window": 4096}),
    "cwm": replace(
        UNBIASED, mlp_bias="mlp_bias", defaults={"num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192}
    ),
    "ernie4_5": Layout("use_bias", "use_bias", "use_bias", defaults={"num_key_value_heads": 2, "head_dim": 128}),
    "exaone4": replace(
        UNBIASED,
        head_norms="head",
        norm_first=False,
        norm_last=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "gemma": Layout(mlp_bias=False, needs_first_token=True, defaults={"num_key_value_heads": 16, "head_dim": 256}),
    "gemma3_text": Layout(
        mlp_bias=False,
        norms=4,
        head_norms="head",
        norm_last=True,
        needs_first_token=True,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    ),
    "glm": GLM,
    "glm4": replace(GLM, norms=4, norm_last=True),
    "gpt_neox": NEOX,
    "granite": LLAMA,
    "helium": Layout(out_bias=False, defaults={"num_key_value_heads": 20, "head_dim": 128}),
    "hunyuan_v1_dense": Layout(mlp_bias=False, head_norms="head"),
    "jais2": Layout(mlp=UNGATED, norm_biases=True, defaults={"attention_bias": True, "mlp_bias": True}),
    "llama": LLAMA,
    "ministral": MISTRAL,
    "ministral3": replace(UNBIASED, defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "mistral": MISTRAL,
    "nanochat": Layout(mlp_bias=False, mlp=NUMBERED, norm_weights=False, norm_first=False),
    "olmo": Layout(mlp_bias=False, norm_weights=False, norm_first=False),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, defaults={"sliding_window": 4096}),
    "persimmon": replace(
        NEOX,
        query_bias=True,
        out_bias=True,
        parallel=False,
        head_norms="head",
        head_norms_if="qk_layernorm",
        defaults={"qk_layernorm": True},
    ),
    "phi": Layout(
        query_bias=True,
        out_bias=True,
        mlp_bias=True,
        out="dense",
        mlp=NUMBERED,
        norms=1,
        norm_biases=True,
        head_norms="head",
        head_norms_if="qk_layernorm",
        parallel=True,
    ),
    "phi3": replace(UNBIASED, fused="qkv_proj", mlp=FUSED_GATE),
    "qwen2": Layout(query_bias=True, out_bias=False, mlp_bias=False, window_if="use_sliding_window"),
    "qwen3": Layout(mlp_bias=False, head_norms="head", window_if="use_sliding_window", defaults={"head_dim": 128}),
    "seed_oss": Layout(
        out_bias="attention_out_bias", defaults={"attention_bias": True, "num_key_value_heads": 8, "head_dim": 128}
    ),
    "smollm3": Layout(window_if="use_sliding_window", defaults={"num_key_value_heads": 4}),
}

REFUSED = {
    "diffllama": "its attention is the difference of two maps, whose cost is another one",
    "falcon": "it attends in a way of its own",
    "bloom": "it attends in a way of its own, by the distance of tokens (ALiBi)",
    "mpt": "it attends in a way of its own, by the distance of tokens (ALiBi)",
    "gptj": "it attends in a way of its own",
    "codegen": "it attends in a way of its own",
    "gemma2": "it caps attention scores",
    "vaultgemma": "it caps attention scores",
    "stablelm": "its attention ignores which texts are packed together",
    "nemotron": "its attention ignores which texts are packed together",
    "opt": "it counts positions by the padding, and there is none",
    "gpt2": "its dense layers are not nn.Linear, and its positions are a table",
    "gpt_bigcode": "its dense layers have other names, and its positions are a table",
    "starcoder2": "its dense layers have other names, so their cost is not known",
    "gpt_oss": "it is a mixture of experts, and it attends with sinks",
    "mixtral": "it is a mixture of experts, whose cost depends on the text",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "gemma3": "it reads images too; allowed: a Gemma 3 for text alone, such as google/gemma-3-1b-pt",
    "bert": "it is an encoder, not a decoder",
    "roberta": "it is an encoder, not a decoder",
    "modernbert": "it is an encoder, not a decoder",
    "t5": "it has an encoder and a decoder",
    "bart": "it has an encoder and a decoder",
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")  # keys of a config.json
GROWING = ("dynamic", "longrope", "su")  # rotary angles that depend on the longest text of a batch


def shape_from(name: str, config: Mapping[str, Any]) -> BackboneShape:
    """Return the shape of a decoder, called `name`, from its `config.json`.

    Raise UserError for a decoder that is not supported, and for a number that is missing or wrong.
    """
    layout, blocks = layout_of(config), _whole(config, "num_hidden_layers")
    config = {**layout.defaults, **config}
    width, mlp_width = _whole(config, "hidden_size"), _whole(config, "intermediate_size")
    heads = _whole(config, "num_attention_heads")
    key_heads = _whole(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    size = _whole(config, "head_dim") if config.get("head_dim") is not None else width // heads
    attention, keys = heads * size, key_heads * size

    def given(flag: Flag) -> bool:
        return bool(config.get(flag, False)) if isinstance(flag, str) else flag

    bias = given(layout.query_bias)
    if layout.fused:
        whole = attention + 2 * (attention if layout.fused == "query_key_value" else keys)
        linears = [Linear(layout.fused, width, whole, bias, "query_key_value")]
    else:
        linears = [
            Linear(f"{letter}_proj", width, outputs, bias, role)
            for letter, outputs, role in (("q", attention, "query"), ("k", keys, "key"), ("v", keys, "value"))
        ]
    linears.append(Linear(layout.out, attention, width, given(layout.out_bias), "attention_out"))
    *inputs, last = layout.mlp
    mlp_bias = given(layout.mlp_bias)
    for each in inputs:
        outputs = 2 * mlp_width if each == "gate_up_proj" else mlp_width
        linears.append(Linear(each, width, outputs, mlp_bias, "mlp_in"))
    linears.append(Linear(last, mlp_width, width, mlp_bias, "mlp_out"))

    normed = layout.norms * width + sum({"attention": attention, "mlp": mlp_width}[each] for each in layout.more_norms)
    if layout.head_norms and given(layout.head_norms_if):
        normed += 2 * size if layout.head_norms == "head" else attention + keys
    return BackboneShape(
        name=name,
        blocks=blocks,
        width=width,
        attention_width=attention,
        vocabulary=_whole(config, "vocab_size"),
        context=context_of(config),
        linears=tuple(linears),
        norm_weights=normed * layout.norm_weights + layout.other_weights,
        norm_biases=normed * layout.norm_biases,
        final_weights=width * layout.norm_weights,
        final_biases=width * layout.norm_biases,
        parallel_residual=given(layout.parallel),
        trained_norm_first=layout.norm_first,
        norm_last=layout.norm_last,
    )


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Return the layout of a decoder's `config.json`. Raise UserError, which says why, if it is not supported."""
    kind = config.get("model_type")
    found = LAYOUTS.get(kind) if isinstance(kind, str) else None
    if config.get("use_bidirectional_attention"):
        raise UserError(
            "use_bidirectional_attention is true, so the model attends to later tokens by itself; set it to false, and "
            "backbone.attention=bidirectional"
        )
    if found:
        return found
    if not isinstance(kind, str) and not config.get("auto_map"):
        raise UserError(f"model_type is {kind!r}; expected the name of a decoder, such as llama")
    if config.get("auto_map"):
        why = "it needs code of its own (auto_map), which is never run"
    elif any(config.get(key) for key in EXPERTS):
        why = "it is a mixture of experts, whose cost depends on the text"
    else:
        why = "its layers, and so its cost, are not known; docs/guides/backbone.md lists what is supported"
    raise UserError(f"model_type {kind!r} is not supported: {REFUSED.get(str(kind), why)}")


def context_of(config: Mapping[str, Any]) -> int:
    """Return the longest text that a decoder embeds by itself alone, in tokens, from its `config.json`.

    Up to the length of its window, a layer with a window attends like one without. Where rotary angles grow with the
    longest text of a batch, they stay the same up to the length of pre-training.
    """
    layout = layout_of(config)
    config = {**layout.defaults, **config}
    lengths = [_whole(config, "max_position_embeddings")]
    counts = config.get(layout.window_if) if isinstance(layout.window_if, str) else layout.window_if
    if counts and config.get("sliding_window") is not None:
        lengths.append(_whole(config, "sliding_window"))
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for each in (rotary, *rotary.values()) if isinstance(rotary, Mapping) else ():
        if isinstance(each, Mapping) and each.get("rope_type", each.get("type")) in GROWING:
            given = {"original_max_position_embeddings": None, **config, **each}
            if given["original_max_position_embeddings"] is not None:
                lengths.append(_whole(given, "original_max_position_embeddings"))
    return min(lengths)


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} is {value!r}; expected a whole number of at least 1")
    return value
