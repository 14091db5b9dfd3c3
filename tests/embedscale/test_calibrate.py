"""The figures of `calibrate` add up, are kept in a file, and are used by a sweep's plan."""

import json

import numpy as np
import pytest
import torch

from embedscale import cli
from embedscale.errors import UserError
from embedscale.model.backbone import load_body
from embedscale.model.hardware import device_name, keep_freed_memory, memory_in_use, peak_memory
from embedscale.model.packing import pack
from embedscale.run.cost import cost_of
from embedscale.run.families import PYTHIA, shape_by_name
from embedscale.run.method import Method
from embedscale.run.settings import load
from embedscale.training import module as contrastive
from embedscale.training.batches import Batch
from embedscale.training.memory import fitting_chunk
from embedscale.training.pricing.calibrate import build, module_of, paper_lengths, paper_tokens
from embedscale.training.pricing.calibration import config_of

LIMIT = 1.5e9  # bytes


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
    assert found["device"] == f"CPU {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
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


def test_a_model_too_large_for_memory_is_named_and_not_built(backbone_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("embedscale.training.pricing.calibrate.load_body", None)
    out = tmp_path / "calibration.json"
    assert measured(backbone_folder, out, "resources.memory_gb=1e-4") == 0
    assert [row["method"] for row in json.loads(out.read_text())["too_large"]] == ["full", "lora-r2"]
    assert "does not fit" in capsys.readouterr().out


def test_other_settings_and_unknown_names_are_refused(backbone_folder, tmp_path, capsys):
    out = tmp_path / "calibration.json"
    out.write_text(json.dumps({"device": "another", "rows": [], "too_large": []}))
    assert measured(backbone_folder, out) == 2
    assert "calibration.json: was measured with device another, not CPU" in capsys.readouterr().err
    assert cli.main(["calibrate", "--sizes", "pythia-15m", "--out", str(out)]) == 2
    assert "--sizes: 'pythia-15m' is neither a known size (pythia-14m," in capsys.readouterr().err
    assert cli.main(["calibrate", "--methods", "lora", "--out", str(out)]) == 2
    assert "--methods: 'lora' is not a method; such as: full, freeze-0.5, bias, lora-r32" in capsys.readouterr().err
    out = tmp_path / "another.json"
    for words, message in (
        (["--methods", "full", "freeze-0.3"], "method.active_fraction: 0.3 of 6 blocks is not a whole number"),
        (["--seconds", "1e7"], "--seconds: 10000000.0 is out of range"),
        (["--out", "/proc/folder/file"], "/proc/folder: "),
    ):
        assert cli.main(["calibrate", "--out", str(out), *words]) == 2
        assert message in capsys.readouterr().err and not out.exists()


def test_lengths_have_the_means_of_the_paper():
    lengths = paper_lengths(load(None, ["training.batch_size=4096"]), 0)
    queries, positives = lengths[:4096], lengths[4096:]
    assert queries.mean() == pytest.approx(14, abs=0.3) and positives.mean() == pytest.approx(64, abs=0.3)
    assert lengths.min() >= 1 and lengths.max() == 75


def test_bodies_have_the_published_sizes():
    body = build("pythia-14m")
    inside = sum(p.numel() for name, p in body.named_parameters() if "embed_in" not in name)
    assert inside == PYTHIA.sizes["pythia-14m"].parameters
    assert body.get_input_embeddings().weight.shape == (50304, 128)


def _peak(longest, out):
    """Train in a process whose largest step has 512 pairs, of the paper's lengths or all as long as the context."""
    torch.set_num_threads(2)
    keep_freed_memory()
    words = [f"resources.memory_gb={LIMIT / 1e9}", "training.batch_size=512"]
    config = config_of(load(None, words), "pythia-14m", "full")
    module = module_of(build("pythia-14m", vocab_size=8192), config)
    chunk = fitting_chunk(module)
    pairs, context = config.training.batch_size, config.data.context
    lengths = np.full(2 * pairs, context) if longest else paper_lengths(config, 0)
    chunks = pack(paper_tokens(int(lengths.sum()), 8192, 0), lengths, chunk)
    module.backward_through(Batch(0, pairs, chunks, torch.arange(len(lengths)), int(lengths.sum()), 0))
    out.put((pairs, len(chunks), peak_memory(torch.device("cpu"))))


@pytest.mark.slow
@pytest.mark.parametrize("longest", [False, True])
def test_a_step_stays_within_its_memory_limit(server, longest):
    """The whole batch in one chunk would take 2 to 4 GB."""
    out = server.Queue()
    process = server.Process(target=_peak, args=(longest, out))
    process.start()
    pairs, chunks, peak = out.get(timeout=240)
    process.join(60)
    assert pairs == 512 and chunks > 1
    assert peak < LIMIT


@pytest.mark.parametrize("method", [[], ["method.name=lora", "method.rank=2", "method.embedding=true"]])
def test_chunks_are_cut_only_if_memory_is_short(backbone_folder, method):
    words = [f"backbone.name={backbone_folder}", "training.batch_size=64", "data.context=40", *method]
    body = load_body(load(None, words).backbone, 0)
    assert fitting_chunk(module_of(body, load(None, words))) is None
    with pytest.raises(UserError, match=r"resources.memory_gb: is 0.01; this run needs at least [0-9.]+$"):
        fitting_chunk(
            module_of(load_body(load(None, words).backbone, 0), load(None, [*words, "resources.memory_gb=0.01"]))
        )


@pytest.mark.parametrize(("sharing", "devices"), [(1, 1), (2, 1), (1, 2)])
def test_runs_and_processes_share_the_memory_of_a_machine(backbone_folder, monkeypatch, sharing, devices):
    words = [f"backbone.name={backbone_folder}", "training.batch_size=64", "data.context=40"]
    config = load(None, [*words, f"resources.devices={devices}"])
    module = module_of(load_body(config.backbone, 0), config)
    there = 2 * memory_in_use(module.device)  # measured before fitting_chunk, whose trials take memory
    monkeypatch.setattr(contrastive, "usable_memory", lambda device: there)
    module.sharing = sharing
    assert fitting_chunk(module) == (None if sharing * devices == 1 else 40)
