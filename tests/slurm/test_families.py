"""One sweep over decoders of several families: planned by shape alone, run here, and compared within each family."""

import pytest
import torch
from saved import save_backbone, save_byte_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from analysis import runs
from embedscale.errors import UserError
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
    """Save a small decoder of each kind, over bytes; return their folders by `model_type`."""
    found = {"gpt_neox": save_backbone(tmp_path / "models" / "gpt_neox-tiny", width=16, blocks=2)}
    for kind, more in KINDS.items():
        torch.manual_seed(0)
        folder = tmp_path / "models" / f"{kind}-tiny"
        AutoModel.from_config(AutoConfig.for_model(kind, **SMALL, **more)).save_pretrained(folder)
        found[kind] = save_byte_tokenizer(folder)
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


def test_one_sweep_runs_three_families_beside_a_pythia_shaped_one(laptop):
    kinds = folders(laptop.folder)
    backbones = [f"models/{folder.name}" for folder in kinds.values()]  # relative to where the command runs
    file = laptop.write(
        "families", axes={"budget": [2e8]}, backbones=backbones, methods=["full"], base={"training.learning_rate": 1e-3}
    )
    plan = laptop.sweep("plan", file, "--each")
    assert "4 runs" in plan and "cannot be run" not in plan, plan
    assert "4 done" in laptop.sweep("submit", file, "--to", "here")
    records = {each.read_record().family: each.read_record() for each in laptop.directories("families")}
    assert records.keys() == kinds.keys()
    for kind, folder in kinds.items():
        texts = 8
        assert counted(folder, texts) == cost_of(shape_by_name(str(folder)), Method()).exact(texts**2, texts**3)
        body = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        embedding = body.get_input_embeddings().weight.numel()
        assert records[kind].n_parameters == sum(p.numel() for p in body.parameters()) - embedding
        assert records[kind].flop_per_token == 6 * records[kind].n_parameters
    with pytest.raises(UserError, match="runs differ in family .*the tokens of one tokenizer.*--where family="):
        runs.load(laptop.folder / "runs" / "families")
    table = runs.load(laptop.folder / "runs" / "families", where={"family": "qwen3"}).table
    assert list(table["backbone"]) == ["qwen3-tiny"]
