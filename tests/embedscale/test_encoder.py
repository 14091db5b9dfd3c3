"""The packed encoder against transformers, one sequence at a time."""

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from saved import save_backbone
from torch.nn.functional import normalize
from transformers import CONFIG_MAPPING, AutoModel, GPTNeoXConfig, LlamaConfig

from embedscale.errors import UserError
from embedscale.model.attention import variable_length
from embedscale.model.backbone import blocks_of, digest_of, load_body, shape_of, shape_without_weights
from embedscale.model.body import Inference
from embedscale.model.encoder import Encoder
from embedscale.model.methods import apply_method, merge_adapters
from embedscale.model.packing import pack
from embedscale.run.config import Backbone
from embedscale.run.method import Method


def sequences(count=40, longest=75, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count).astype(np.int32)
    return rng.integers(0, 256, lengths.sum()).astype(np.int32), lengths


def one_by_one(body, tokens, lengths, pooling):
    rows = []
    for row in torch.from_numpy(tokens).long().split(lengths.tolist()):
        hidden = body(input_ids=row[None], use_cache=False).last_hidden_state[0]
        weights = torch.arange(1, len(row) + 1.0)
        vector = {
            "mean": lambda h: h.mean(0),
            "last": lambda h: h[-1],
            "weighted": lambda h, w=weights: (h * (w / w.sum())[:, None]).sum(0),
        }[pooling](hidden)
        rows.append(normalize(vector, dim=0))
    return torch.stack(rows)


def packed(encoder, tokens, lengths, chunk_tokens=None):
    chunks = pack(tokens, lengths, chunk_tokens)
    order = torch.cat([chunk.order for chunk in chunks])
    return torch.cat([encoder(chunk) for chunk in chunks])[order.argsort()]


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
@pytest.mark.parametrize("chunk_tokens", [None, 300, 1])
def test_packed_sequences_embed_as_single_ones(backbone_folder, pooling, chunk_tokens):
    tokens, lengths = sequences()
    reference = AutoModel.from_pretrained(backbone_folder, dtype=torch.float32, attn_implementation="eager")
    encoder = Encoder(load_body(Backbone(name=str(backbone_folder)), 0), pooling)
    expected = one_by_one(reference, tokens, lengths, pooling)
    torch.testing.assert_close(packed(encoder, tokens, lengths, chunk_tokens), expected, atol=1e-6, rtol=0)


def test_chunks_of_a_loader_worker_hold_no_files_open():
    chunks = pack(*sequences(), chunk_tokens=50)
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir()))
    sent = [ForkingPickler.dumps(chunk) for chunk in chunks]
    assert len(chunks) > 10 and len(list(opened.iterdir())) < before + len(chunks)  # each has seven tensors and more
    for chunk, words in zip(chunks, sent, strict=True):
        found, wanted = vars(pickle.loads(words)), vars(chunk)
        for name, value in wanted.items():
            assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


def test_the_gpu_kernel_accepts_its_arguments():
    """Without a GPU its results cannot be checked, but its arguments, shapes and backward pass can."""
    (packing,) = pack(*sequences())
    query, key, value = (
        torch.randn(len(packing.tokens), heads, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads in (4, 2, 2)
    )
    out = variable_length(query, key, value, packing.to(torch.device("meta")), 0.1)
    assert out.shape == query.shape
    out.sum().backward()
    assert key.grad.shape == key.shape


def test_the_gpu_kernel_is_compiled_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(variable_length, backend="eager", fullgraph=True, dynamic=True)
    for seed, longest in ((0, 75), (1, 75), (2, 70)):
        (packing,) = pack(*sequences(longest=longest, seed=seed))
        states = [torch.randn(len(packing.tokens), 4, 32, dtype=torch.bfloat16, device="meta") for _ in range(3)]
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            assert compiled(*states, packing.to(torch.device("meta")), 0.1).shape == states[0].shape


def test_packed_gradients_equal_those_of_single_sequences(backbone_folder):
    tokens, lengths = sequences()
    reference = AutoModel.from_pretrained(backbone_folder, dtype=torch.float32)
    encoder = Encoder(load_body(Backbone(name=str(backbone_folder)), 0))
    weights = torch.randn(len(lengths), 32, generator=torch.Generator().manual_seed(1))
    (one_by_one(reference, tokens, lengths, "mean") * weights).sum().backward()
    (packed(encoder, tokens, lengths) * weights).sum().backward()
    for (name, a), b in zip(reference.named_parameters(), encoder.body.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_attention_in_blocks_gives_the_same_gradients(backbone_folder):
    """Sequences of 192 tokens and more are processed in blocks of 64; 1,100 tokens need more than the first mask."""
    lengths = np.array([600, 192, 193, 191, 255, 256, 257, 600, 1100], np.int32)
    tokens = np.random.default_rng(2).integers(0, 256, lengths.sum()).astype(np.int32)
    reference = AutoModel.from_pretrained(backbone_folder, dtype=torch.float32)
    encoder = Encoder(load_body(Backbone(name=str(backbone_folder)), 0))
    weights = torch.randn(len(lengths), 32, generator=torch.Generator().manual_seed(1))
    expected = one_by_one(reference, tokens, lengths, "mean")
    found = packed(encoder, tokens, lengths)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for (name, a), b in zip(reference.named_parameters(), encoder.body.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_bf16_is_as_exact_as_in_transformers(backbone_folder):
    tokens, lengths = sequences()
    reference = AutoModel.from_pretrained(backbone_folder, dtype=torch.float32)
    encoder = Encoder(load_body(Backbone(name=str(backbone_folder)), 0), precision="bf16")
    with torch.no_grad():
        exact = one_by_one(reference, tokens, lengths, "mean")
        with torch.autocast("cpu", torch.bfloat16):
            theirs = one_by_one(reference, tokens, lengths, "mean")
        ours = packed(encoder, tokens, lengths)
    assert 0 < (ours - exact).norm() < 1.2 * (theirs - exact).norm()


def test_chunks_on_two_threads_equal_chunks_in_turn(backbone_folder):
    tokens, lengths = sequences(200)
    encoder = Encoder(load_body(Backbone(name=str(backbone_folder)), 0))
    chunks = pack(tokens, lengths, 500)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = list(Inference(encoder).embed(chunks))
        torch.set_num_threads(3)
        beside = list(Inference(encoder).embed(chunks))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert len(chunks) > 10
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(alone, beside, strict=True))


def test_another_sequence_in_the_chunk_changes_nothing(backbone_folder):
    encoder = Encoder(load_body(Backbone(name=str(backbone_folder)), 0))
    tokens, lengths = sequences(6)
    changed = tokens.copy()
    changed[lengths[:3].sum() :] = 7
    torch.testing.assert_close(packed(encoder, tokens, lengths)[:3], packed(encoder, changed, lengths)[:3])


def test_other_decoders_embed_as_in_transformers(tmp_path):
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    backbone = Backbone(name=str(tmp_path))
    body = load_body(backbone, 0)
    assert shape_of(body, str(tmp_path)) == shape_without_weights(backbone)
    tokens, lengths = sequences(12)
    reference = one_by_one(AutoModel.from_pretrained(tmp_path), tokens, lengths, "mean")
    torch.testing.assert_close(packed(Encoder(body), tokens, lengths), reference, atol=1e-5, rtol=0)


VARIANTS = {
    "no attention bias": {"attention_bias": False},
    "one after the other": {"use_parallel_residual": False},
    "all of a head turned": {"rotary_pct": 1.0},
    "another activation": {"hidden_act": "gelu_new"},
    "stretched positions": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gpt_neox_embeds_as_in_transformers(tmp_path, variant):
    backbone = Backbone(name=str(save_backbone(tmp_path / "neox", **VARIANTS[variant])))
    tokens, lengths = sequences(12)
    reference = one_by_one(AutoModel.from_pretrained(backbone.name), tokens, lengths, "mean")
    encoder = Encoder(load_body(backbone, 0))
    assert shape_of(encoder.body, backbone.name) == shape_without_weights(backbone)
    torch.testing.assert_close(packed(encoder, tokens, lengths), reference, atol=1e-6, rtol=0)
    chunks = pack(tokens, lengths)
    torch.testing.assert_close(
        torch.cat(list(Inference(encoder).embed(chunks)))[chunks[0].order.argsort()], reference, atol=1e-6, rtol=0
    )


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "falcon": ({}, "attends in a way of its own"),
    "bloom": ({}, "by the distance of tokens"),
    "diffllama": ({"num_key_value_heads": 2}, "the difference of two maps"),
    "gemma2": ({"head_dim": 8, "num_key_value_heads": 2}, "caps attention scores"),
    "stablelm": ({"num_key_value_heads": 4}, "ignores which texts are packed"),
    "gemma3_text": ({"head_dim": 8, "use_bidirectional_attention": True}, "attends to later tokens by itself"),
    "mixtral": ({"num_key_value_heads": 4}, "a mixture of experts"),
    "qwen3_moe": ({"num_key_value_heads": 4}, "a mixture of experts"),
    "gpt2": ({}, "its dense layers are not nn.Linear"),
    "opt": ({}, "counts positions by the padding"),
    "xglm": ({}, "its layers, and so its cost, are not known"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_unsupported_decoders_are_refused_before_their_weights_are_read(tmp_path, kind):
    more, expected = OTHERS[kind]
    CONFIG_MAPPING[kind](**SMALL, **more).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"backbone.name: .*{expected}"):
        shape_without_weights(Backbone(name=str(tmp_path)))


def test_the_context_is_at_most_the_attention_window(tmp_path):
    CONFIG_MAPPING["mistral"](**SMALL, num_key_value_heads=2, sliding_window=16).save_pretrained(tmp_path)
    assert shape_without_weights(Backbone(name=str(tmp_path))).context == 16


def test_runs_of_equal_lengths_cover_every_token_once():
    tokens, lengths = sequences(500, seed=3)
    (chunk,) = pack(tokens, lengths)
    assert chunk.runs[0].start == 0 and chunk.runs[-1].stop == lengths.sum() == len(chunk.tokens)
    assert [run.start for run in chunk.runs[1:]] == [run.stop for run in chunk.runs[:-1]]
    sizes = [(run.stop - run.start) // run.length for run in chunk.runs]
    assert np.repeat([run.length for run in chunk.runs], sizes).tolist() == sorted(lengths)
    assert len({run.length for run in chunk.runs}) == len(chunk.runs)


def test_chunks_keep_the_token_limit():
    tokens, lengths = sequences(200, seed=4)
    chunks = pack(tokens, lengths, 256)
    assert all(len(chunk.tokens) <= 256 for chunk in chunks)
    assert sorted(torch.cat([chunk.order for chunk in chunks]).tolist()) == list(range(200))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_master_weights_are_float32_for_any_checkpoint(tmp_path, dtype):
    body = load_body(Backbone(name=str(save_backbone(tmp_path / "half", dtype=dtype))), 0)
    assert {p.dtype for p in body.parameters()} == {torch.float32}


def test_random_weights_depend_on_the_seed_alone(backbone_folder):
    backbone = Backbone(name=str(backbone_folder), weights="random")
    digests = [digest_of(dict(load_body(backbone, seed).named_parameters())) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_an_unknown_backbone_is_named(tmp_path):
    with pytest.raises(UserError, match="backbone.name: 'nobody/nothing' is neither a local folder nor"):
        shape_without_weights(Backbone(name="nobody/nothing"))
    with pytest.raises(UserError, match="holds no model"):
        shape_without_weights(Backbone(name=str(tmp_path)))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_backbone(tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    weights.pop("final_layer_norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights \(final_layer_norm.weight"):
        load_body(Backbone(name=str(folder)), 0)


def test_a_damaged_folder_is_refused_with_the_fault(tmp_path):
    folder = save_backbone(tmp_path / "damaged")
    backbone = Backbone(name=str(folder))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(UserError, match=r"embed_in.weight has the shape \(256, 32\), but config.json says \(256, 64\)"):
        load_body(backbone, 0)
    (folder / "config.json").write_text(config.replace('"intermediate_size"', '"other"'))
    with pytest.raises(UserError, match="config.json: intermediate_size is None; expected a whole number"):
        shape_without_weights(backbone)
    (folder / "config.json").write_text(config[:-9])
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        shape_without_weights(backbone)
    (folder / "config.json").write_text(config)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"damaged': its weights cannot be read \("):
        load_body(backbone, 0)


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        (Method("full"), lambda name: True),
        (Method("bias"), lambda name: name.endswith("bias")),
        (Method("freeze", active_fraction=0.5), lambda name: name.startswith(("layers.2", "layers.3", "final"))),
        (Method("freeze", active_blocks=4), lambda name: "embed_in" not in name),
        (Method("freeze", active_blocks=1, blocks="first"), lambda name: name.startswith("layers.0")),
        (Method("freeze", active_blocks=2, blocks="one"), lambda name: name.startswith("layers.2")),
        (Method("lora", rank=2), lambda name: "lora" in name and "layers" in name),
        (Method("lora", rank=2, embedding=True), lambda name: "lora" in name),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_each_method_trains_its_own_parameters(backbone_folder, method, trains):
    body = load_body(Backbone(name=str(backbone_folder)), 0)
    trainable = apply_method(body, method)
    assert trainable == [name for name, _ in body.named_parameters() if trains(name)] != []
    if method.name == "lora":
        adapters = sum("lora_A" in n or "lora_embedding_A" in n for n in trainable)
        assert adapters == 4 * len(blocks_of(body)) + method.embedding


@pytest.mark.parametrize("alpha, scale", [(None, 1), (12.0, 3), (1.0, 0.25)])
def test_an_adapter_is_scaled_by_alpha_over_rank(backbone_folder, alpha, scale):
    body = load_body(Backbone(name=str(backbone_folder)), 0)
    layer = body.layers[1].mlp.dense_4h_to_h
    before = layer.weight.detach().clone()
    apply_method(body, Method("lora", rank=4, alpha=alpha))
    adapter = body.layers[1].mlp.dense_4h_to_h
    torch.nn.init.normal_(adapter.lora_B["default"].weight)
    product = adapter.lora_B["default"].weight.detach() @ adapter.lora_A["default"].weight.detach()
    merge_adapters(body)
    torch.testing.assert_close(body.layers[1].mlp.dense_4h_to_h.weight.detach(), before + scale * product)


def test_merged_adapters_compute_the_same(backbone_folder):
    tokens, lengths = sequences(10)
    body = load_body(Backbone(name=str(backbone_folder)), 0)
    apply_method(body, Method("lora", rank=4, embedding=True))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in body.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    encoder = Encoder(body.eval())
    with torch.no_grad():
        before = packed(encoder, tokens, lengths)
        merge_adapters(body)
        after = packed(encoder, tokens, lengths)
    plain = GPTNeoXConfig.from_pretrained(backbone_folder)
    assert [n for n, _ in body.named_parameters()] == [n for n, _ in AutoModel.from_config(plain).named_parameters()]
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)
