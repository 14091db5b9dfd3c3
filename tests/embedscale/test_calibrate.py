"""What `calibrate` measures adds up, is kept, and is what a sweep's plan goes by."""

import json

import numpy as np
import pytest

from embedscale import cli
from embedscale.calibrate import build, paper_lengths
from embedscale.config import load
from embedscale.cost import Method, cost_of
from embedscale.pythia import SUITE, shape_by_name


def measured(backbone_folder, out, *words):
    settings = ["training.batch_size=8", "data.context=30", *words]
    sizes = ["--sizes", str(backbone_folder), "--methods", "full", "lora-r2", "--seconds", "0.1", "--out", str(out)]
    return cli.main(["calibrate", *settings, *sizes])


def test_rows_add_up_and_are_measured_once(backbone_folder, tmp_path, capsys):
    out = tmp_path / "calibration.json"
    assert measured(backbone_folder, out) == 0
    assert "pythia-tiny" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [row["method"] for row in found["rows"]] == ["full", "lora-r2"]
    for row in found["rows"]:
        pairs = row["pairs_per_second"] * row["seconds"]
        assert pairs == pytest.approx(8 * row["steps"], rel=0.05)
        config = load(None, ["training.batch_size=8", "data.context=30"])
        tokens = np.mean([paper_lengths(config, seed).sum() for seed in range(4)])
        assert row["tokens_per_second"] / row["pairs_per_second"] == pytest.approx(tokens / 8, rel=0.1)
        method = Method("full") if row["method"] == "full" else Method("lora", rank=2)
        cost = cost_of(shape_by_name(str(backbone_folder)), method)
        assert row["flop_per_second"] / row["tokens_per_second"] == pytest.approx(cost.forward + cost.backward, rel=0.3)
        assert 0.1 < row["memory_gb"] < 24
    assert measured(backbone_folder, out) == 0
    assert json.loads(out.read_text()) == found


def test_other_settings_and_unknown_names_are_refused(backbone_folder, tmp_path, capsys):
    out = tmp_path / "calibration.json"
    out.write_text(json.dumps({"device": "another", "rows": [], "too_large": []}))
    assert measured(backbone_folder, out) == 2
    assert "calibration.json: was measured with device another, not CPU" in capsys.readouterr().err
    assert cli.main(["calibrate", "--sizes", "pythia-15m", "--out", str(out)]) == 2
    assert "--sizes: 'pythia-15m' is neither of the suite (pythia-14m," in capsys.readouterr().err
    assert cli.main(["calibrate", "--methods", "lora", "--out", str(out)]) == 2
    assert "--methods: 'lora' is unknown; such as: full, freeze-0.5, bias, lora-r32" in capsys.readouterr().err


def test_lengths_are_the_papers():
    lengths = paper_lengths(load(None, ["training.batch_size=4096"]), 0)
    queries, positives = lengths[:4096], lengths[4096:]
    assert queries.mean() == pytest.approx(14, abs=0.3) and positives.mean() == pytest.approx(64, abs=0.3)
    assert lengths.min() >= 1 and lengths.max() == 75


def test_bodies_are_the_suites():
    body = build("pythia-14m")
    inside = sum(p.numel() for name, p in body.named_parameters() if "embed_in" not in name)
    assert inside == SUITE["pythia-14m"].parameters
    assert body.get_input_embeddings().weight.shape == (50304, 128)
