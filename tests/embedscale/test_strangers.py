"""A backbone from a stranger: its code never runs, and quantised weights are refused before anything is computed."""

import json
import shutil
import struct
import subprocess
import sys

import pytest

from embedscale.cli import main

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import GPTNeoXConfig
class OwnConfig(GPTNeoXConfig):
    model_type = "own"
"""


def changed(folder, copy, **settings):
    """A copy of a saved backbone with other settings in its config.json; None removes one."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(kept))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "answer"), [("own", "y\n"), (None, "")])
def test_code_of_a_backbone_never_runs(backbone_folder, tmp_path, tiny_run, kind, answer):
    """Neither after a question nor without a terminal."""
    mark = tmp_path / "ran"
    own = changed(backbone_folder, tmp_path / "own", model_type=kind, auto_map={"AutoConfig": "code.OwnConfig"})
    (own / "code.py").write_text(CODE.format(mark=str(mark)))
    words = [sys.executable, "-m", "embedscale.cli", "flops", *tiny_run, f"backbone.name={own}"]
    done = subprocess.run(words, input=answer, capture_output=True, text=True, timeout=120)
    assert not mark.exists()
    assert done.returncode == 2 and "[y/N]" not in done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("embedscale: backbone.name: ") and "auto_map" in line


METHODS = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "fp8"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda each: each["quant_method"])
def test_quantised_weights_are_refused_by_flops_train_and_plan(backbone_folder, tmp_path, tiny_run, capsys, method):
    folder = changed(backbone_folder, tmp_path / "quantised", quantization_config=method)
    wanted = f"backbone.name: {str(folder)!r} has quantised weights ({method['quant_method']})"
    for verb in ("flops", "train"):
        assert main([verb, *tiny_run, "budget=1e9", f"backbone.name={folder}", f"output={tmp_path / 'r'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"embedscale: {wanted}")
    assert not (tmp_path / "r").exists()
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"axes: {{budget: 1e15}}\nbackbones: [{folder}]\noutput: {tmp_path}")
    assert main(["sweep", "plan", str(sweep)]) == 2  # none of its runs can be run
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 run cannot be run" in printed and "quantised" in printed


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_so_are_weights_that_only_a_file_beside_them_calls_quantised(backbone_folder, tmp_path, tiny_run, capsys, name):
    folder = changed(backbone_folder, tmp_path / "quantised")
    (folder / name).write_text("{}")
    assert main(["flops", *tiny_run, "budget=1e9", f"backbone.name={folder}"]) == 2
    assert f"see {name}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["F8_E4M3", "I8", "U8", "I32"])
def test_so_are_weights_of_a_few_bits_that_nothing_names(backbone_folder, tmp_path, tiny_run, capsys, kind):
    folder = changed(backbone_folder, tmp_path / "quantised")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(key for key, value in header.items() if len(value.get("shape", ())) == 2)
    size = {"F8_E4M3": 4, "I8": 4, "U8": 4, "I32": 1}[kind]
    header[name] |= {"dtype": kind, "shape": [size * header[name]["shape"][0], header[name]["shape"][1]]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    assert main(["flops", *tiny_run, "budget=1e9", f"backbone.name={folder}"]) == 2
    assert f"has quantised weights ({kind} in model.safetensors)" in capsys.readouterr().err
