"""The Python interface: public names exist and are imported on first use, and the examples of docs/examples run."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"


PACKAGES = ["embedscale", "embedscale.data", "embedscale.serving", "embedscale.training", "slurm"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_exists_and_is_listed(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(dir(module)) >= {name for name in module.__all__ if name != "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_the_packages_are_imported_without_torch_numpy_or_pandas():
    code = f"import sys, {', '.join(PACKAGES)}\n"
    code += "sys.exit(bool({'torch', 'numpy', 'pandas', 'omegaconf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_is_trained_and_embeds_texts(tmp_path, tiny_run):
    import embedscale

    config = embedscale.load_config(words=[*tiny_run, "budget=1e9", f"output={tmp_path}"])
    assert embedscale.train(config) == 0
    record = embedscale.RunDirectory(config.folder).read_record()
    assert isinstance(record, embedscale.RunRecord) and 0 < record.spent_flop <= 1e9
    found = embedscale.Embedder.load(config.folder).encode(["open a file", "sort a list", "open a file"])
    assert found.shape == (3, record.width) and np.allclose(np.linalg.norm(found, axis=1), 1)
    assert np.array_equal(found[0], found[2])
    with pytest.raises(embedscale.UserError, match="there is no such file"):
        embedscale.load_config("missing.yaml")


def said(example: str, *words: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / example, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_examples_run(tmp_path, tiny_run):
    output = said("train_one_run.py", *tiny_run, "budget=1e9", f"output={tmp_path / 'runs'}")
    assert "held-out loss" in output
    (run,) = (tmp_path / "runs").iterdir()
    ranked = said("embed_texts.py", str(run)).splitlines()
    similarities = [float(line.split()[0]) for line in ranked]
    assert len(ranked) == 2 and similarities == sorted(similarities, reverse=True)


def test_the_citation_names_this_version():
    import yaml

    import embedscale

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == embedscale.__version__
