"""One sweep over decoders of several families: planned by shape alone, run here or by SLURM, fitted within a family."""

import json

import pytest
import torch
from command import Command
from saved import save_backbone, save_byte_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from embedscale.run.cost import cost_of
from embedscale.run.families import shape_by_name
from embedscale.run.method import Method

SMALL = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
}
KINDS = {"llama": {}, "qwen3": {}, "gemma3_text": {"sliding_window": 64}}


def folders(tmp_path):
    """Save a small decoder of each kind, over bytes, and three wider Llamas; return the first of each `model_type`."""
    found = {"gpt_neox": save_backbone(tmp_path / "models" / "gpt_neox-16", width=16, blocks=2)}
    for kind, width in [*((kind, 16) for kind in KINDS), ("llama", 8), ("llama", 24), ("llama", 32)]:
        torch.manual_seed(0)
        folder = tmp_path / "models" / f"{kind}-{width}"
        config = AutoConfig.for_model(kind, **{**SMALL, "hidden_size": width}, **KINDS[kind])
        AutoModel.from_config(config).save_pretrained(folder)
        found.setdefault(kind, save_byte_tokenizer(folder))
    return found


def counted(folder, texts):
    """Return torch's count for a pass forward and back over `texts` texts of as many tokens."""
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    body = AutoModel.from_config(config)
    with FlopCounterMode(display=False) as counter:
        body(input_ids=torch.zeros(texts, texts, dtype=torch.long), use_cache=False).last_hidden_state.sum().backward()
    angles = sum(sum(found.values()) for name, found in counter.get_flop_counts().items() if "rotary_emb" in name)
    return counter.get_total_flops() - angles


@pytest.fixture(params=["here", pytest.param("slurm", marks=pytest.mark.slurm)])
def place(request):
    """A folder to run sweeps in, and the words by which `submit` runs them there."""
    if request.param == "here":
        return request.getfixturevalue("laptop"), ["--to", "here"]
    return request.getfixturevalue("lab"), []


def test_one_sweep_of_three_families_beside_a_pythia_shaped_one_from_plan_to_recipe(place, until):
    lab, words = place
    kinds = folders(lab.folder)
    backbones = [f"models/{folder.name}" for folder in sorted((lab.folder / "models").iterdir())]  # relative
    grid = {"axes": {"budget": [4e8, 1.2e9]}, "backbones": backbones, "methods": ["full"]}
    file = lab.write(
        "families", base={"training.learning_rate": 1e-3}, cluster={"bundle_minutes": 1, "max_gpus": 2}, **grid
    )
    plan = lab.sweep("plan", file, "--each")
    assert "14 runs" in plan and "cannot be run" not in plan, plan
    lab.sweep("submit", file, *words)
    until(lambda: len(records(lab)) == 14, 600, lambda: lab.log("families"))

    found = {}
    for record in records(lab):
        found.setdefault(record.family, {})[record.backbone.rsplit("/")[-1]] = record
    assert found.keys() == kinds.keys() and len(found["llama"]) == 4
    for kind, folder in kinds.items():
        texts, record = 8, found[kind][folder.name]
        assert counted(folder, texts) == cost_of(shape_by_name(str(folder)), Method()).exact(texts**2, texts**3)
        body = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        embedding = body.get_input_embeddings().weight.numel()
        assert record.n_parameters == sum(p.numel() for p in body.parameters()) - embedding
        assert record.flop_per_token == 6 * record.n_parameters

    runs = lab.folder / "runs" / "families"
    mixed = verb(lab, "fit", runs, code=2)
    assert "runs differ in family" in mixed and "the tokens of one tokenizer" in mixed and "--where family=" in mixed
    verb(lab, "fit", runs, "--where", "family=llama", "--law", "tied", "--bootstrap", 100, "--out", "llama")
    verb(lab, "report", "llama", "--budget", 2e9)
    page = (lab.folder / "llama" / "report.html").read_text()
    assert "llama-24" in page and page.count("left out, another family: qwen3") == 2
    best = json.loads(verb(lab, "recipe", "llama", 2e9, "--json"))["best"]
    assert best["flop_per_token"] == found["llama"][best["backbone"]].flop_per_token


def records(lab):
    return [record for each in lab.directories("families") if (record := each.read_record())]


def verb(lab, *words, code=0):
    """Return what `embedscale WORDS` prints in the lab's folder."""
    process = Command(lab.server, [str(word) for word in words], lab.environment, lab.folder)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output
