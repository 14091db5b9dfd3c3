"""Pre-training of the study's backbones: an interrupted training ends with the same weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "configs" / "study"))
import pretrain

WINDOWS = 16
STEP = pretrain.LENGTH * WINDOWS
LADDER = OmegaConf.create({"windows": WINDOWS, "bytes": 6 * STEP, "bytes_per_parameter": 0, "peak": 1e-2})


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; " * 300, "utf-8")
    return pretrain.read(path)


def test_token_ids_equal_those_of_the_tokenizer(tmp_path):
    text = "naïve: 12 €\n"
    (tmp_path / "text").write_text(text, "utf-8")
    assert pretrain.read(tmp_path / "text").tolist() == pretrain.byte_tokenizer()(text)["input_ids"]


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch, texts):
    pretrain.pretrain(tmp_path / "whole", [8, 1, 1], LADDER, texts, texts)

    monkeypatch.setattr(pretrain, "CHECKPOINT_SECONDS", -1)
    windows = pretrain.windows

    def interrupted(text, count, seed):
        if seed == 4:
            raise KeyboardInterrupt
        return windows(text, count, seed)

    monkeypatch.setattr(pretrain, "windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "again", [8, 1, 1], LADDER, texts, texts)
    monkeypatch.setattr(pretrain, "windows", windows)
    assert (tmp_path / "again/checkpoint.pt").exists()
    pretrain.pretrain(tmp_path / "again", [8, 1, 1], LADDER, texts, texts)

    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}
    assert not (tmp_path / "again/checkpoint.pt").exists()
    first, second = (json.loads((tmp_path / name / "pretraining.json").read_text()) for name in ("whole", "again"))
    assert first["held_out_nats_per_byte"] == second["held_out_nats_per_byte"] < 5.6
    assert first["bytes_read"] == 6 * STEP


def test_a_larger_model_reads_more_bytes_in_proportion(tmp_path, texts):
    ladder = OmegaConf.merge(LADDER, {"bytes_per_parameter": 100})
    pretrain.pretrain(tmp_path / "model", [8, 1, 1], ladder, texts, texts)
    measured = json.loads((tmp_path / "model/pretraining.json").read_text())
    assert measured["non_embedding_parameters"] == 12 * 64 + 13 * 8 + 2 * 8
    assert 0 <= measured["bytes_read"] - 100 * measured["non_embedding_parameters"] < STEP
