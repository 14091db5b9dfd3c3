"""A copy of the package without model/cpu trains to the same losses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import embedscale
from embedscale.errors import DONE
from embedscale.run.directory import RunDirectory
from embedscale.run.settings import load
from embedscale.training.train import train

PACKAGE = Path(embedscale.__file__).parent
TRAIN = """
import sys
import embedscale.model.body
from embedscale.run.settings import load
from embedscale.training.train import train
assert embedscale.__file__.startswith(sys.argv[1]) and not embedscale.model.body.HAS_CPU_BODY
sys.exit(train(load(None, sys.argv[2:])))
"""


def test_a_package_without_the_cpu_body_trains_to_the_same_losses(tmp_path, tiny_run):
    copy = tmp_path / "embedscale"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "cpu"))
    assert (PACKAGE / "model" / "cpu").exists() and not (copy / "model" / "cpu").exists()
    words = [*tiny_run, "budget=5e9", "resources.log_every=1"]
    command = [sys.executable, "-c", TRAIN, str(tmp_path), *words, f"output={tmp_path / 'without'}"]
    place = {"env": os.environ | {"PYTHONPATH": str(tmp_path)}, "cwd": tmp_path}
    done = subprocess.run(command, **place, capture_output=True, text=True)
    assert done.returncode == DONE, done.stderr
    with_it = load(None, [*words, f"output={tmp_path / 'with'}"])
    assert train(with_it) == DONE
    plain, ours = (
        RunDirectory(load(None, [*words, f"output={tmp_path / each}"]).folder).read_metrics()
        for each in ("without", "with")
    )
    assert [row.step for row in plain] == [row.step for row in ours] and len(ours) > 10
    for one, other in zip(plain, ours, strict=True):
        found, expected = ([row.train_loss or 0, row.loss or 0] for row in (one, other))  # a row has one of the two
        assert found == pytest.approx(expected, rel=1e-3)
