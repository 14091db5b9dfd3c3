"""A training step on a simulated GPU: devices, kernels, synchronisation and memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FAKE = Path(__file__).parents[1] / "fake_gpu.py"
BLOCKS = 6  # of Pythia-14M


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the stand-in for a GPU")
    if torch.version.cuda is not None:
        pytest.skip("this build of torch has CUDA's own: the stand-in takes its place in a build for CPUs alone")
    if not (Path(sys.prefix) / "triton").is_dir():
        pytest.skip("`make test` installs triton")
    words = [sys.executable, str(FAKE), str(tmp_path_factory.mktemp("gpu"))]
    done = subprocess.run(words, capture_output=True, text=True)
    # It fails if a step waits for a number, mixes devices, or gives a kernel wrong arguments.
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def row(rows, method, *words, chunk=None, limited=False):
    (found,) = [
        each
        for each in rows
        if each["method"] == method
        and bool(each["limited"]) == limited
        and [word for word in each["words"] if "memory_gb" not in word] == list(words)
        and (limited or each["chunk"] == chunk)
    ]
    return found


BF16, CHECKPOINTED = "training.precision=bf16", "resources.activation_checkpointing=true"


def test_all_results_of_a_step_are_on_the_gpu(rows):
    assert all(each["devices"] == ["cuda:0"] and each["loss"] == ["cuda:0", "torch.float32"] for each in rows)


@pytest.mark.parametrize("method, backward", [("full", 6), ("freeze-0.5", 3), ("bias", 6), ("lora-r32", 6)])
def test_in_bf16_each_block_uses_one_attention_kernel(rows, method, backward):
    found = row(rows, method, BF16)
    assert found["chunks"] == 1
    assert found["calls"] == {"attend": BLOCKS, "attend_backward": backward}


def test_in_float32_too(rows):
    found = row(rows, "full")
    assert found["calls"] == {"attend_float32": BLOCKS, "attend_float32_backward": BLOCKS}


def test_views_of_a_batch_of_one_cost_no_buffer_of_zeros(rows):
    assert not any("select_backward" in each["operations"] for each in rows)


def test_lora_copies_no_layers_input_to_float32(rows):
    full, lora = (row(rows, method, BF16)["operations"]["_to_copy"] for method in ("full", "lora-r32"))
    adapters = 4 * 2 * BLOCKS  # each weight is cast once a pass, as autocast does
    assert lora[0] <= full[0] + 2 * adapters


def test_a_step_of_14m_launches_fewer_than_400_kernels(rows):
    assert row(rows, "full", BF16)["kernels"] < 400


def test_chunks_are_encoded_twice_and_checkpointed_ones_three_times(rows):
    for found, name, forwards in (
        (row(rows, "full", BF16, chunk=8000), "attend", 2),
        (row(rows, "lora-r32", BF16, CHECKPOINTED, chunk=8000), "_varlen_attn", 3),
    ):
        chunks = found["chunks"]
        assert chunks > 1
        assert found["calls"] == {name: forwards * BLOCKS * chunks, f"{name}_backward": BLOCKS * chunks}


def test_a_step_in_fitting_chunks_uses_most_of_its_memory_and_no_more(rows):
    limited = [each for each in rows if each["limited"]]
    assert len(limited) == 7  # one of them with short sequences, for which the attention's backward pass needs more
    for each in limited:
        assert each["chunks"] > 1
        assert 0.5 * each["memory"] < each["peak"] <= each["memory"], each
