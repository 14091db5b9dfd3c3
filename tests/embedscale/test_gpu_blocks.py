"""Whole blocks for a GPU, their kernels run by Triton's interpreter, compute what transformers' blocks do.

Triton also compiles the kernels for real GPUs, without one.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import METHODS, assert_same_gradients, chunk_step, module_for

from embedscale.model.body import PlainBody
from embedscale.model.packing import pack
from embedscale.run.method import Method

TRITON = Path(sys.prefix) / "triton"  # installed by `make test`, if torch did not bring it
LENGTHS = [1, 3, 16, 17, 33, 65, 2]
LONG = [1, 129, 4]


@pytest.fixture
def fuse(monkeypatch):
    """Return the function that replaces a body's blocks. Kernels that are imported here are interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if TRITON.is_dir():
        monkeypatch.syspath_prepend(str(TRITON))
    triton = pytest.importorskip("triton", reason="`make test` installs triton")
    if isinstance(triton.language.sum, triton.JITFunction):
        pytest.skip("torch's builds for GPUs import Triton by themselves: set TRITON_INTERPRET=1 before pytest")
    from embedscale.model.gpu.neox import fits, fuse

    def checked(body):
        assert fits(body)
        fuse(body)

    return checked


@pytest.fixture(scope="module")
def shallow(tmp_path_factory, save_decoder):
    """A saved backbone of two blocks, because the interpreter takes a second for each block."""
    return save_decoder(tmp_path_factory.mktemp("hub") / "shallow", blocks=2)


def chunk_of(lengths):
    """Return texts of these lengths in one chunk."""
    (chunk,) = pack(np.random.default_rng(0).integers(0, 256, sum(lengths)).astype(np.int32), np.array(lengths))
    return chunk


def step(folder, method, *changes, lengths=LENGTHS, **settings):
    return chunk_step(folder, method, *changes, chunk=chunk_of(lengths), **settings)


@pytest.mark.parametrize(
    ("method", "blocks"),
    [(METHODS["full"], 3), (METHODS["freeze"], 2), (METHODS["bias"], 2), (Method("lora", rank=4), 2)],
)
def test_embeddings_and_gradients_are_those_of_transformers(tmp_path, save_decoder, fuse, method, blocks):
    folder = save_decoder(tmp_path / "saved", blocks=blocks)
    embeddings, expected = step(folder, method)
    found, own = step(folder, method, fuse)
    torch.testing.assert_close(found, embeddings, atol=1e-6, rtol=0)
    assert_same_gradients(own, expected)


def test_heads_of_80_numbers_and_all_of_a_head_may_turn(tmp_path, save_decoder, fuse):
    folder = save_decoder(tmp_path / "wide", width=160, blocks=2, rotary_pct=1.0)
    embeddings, expected = step(folder, Method("full"))
    found, own = step(folder, Method("full"), fuse)
    torch.testing.assert_close(found, embeddings, atol=1e-6, rtol=0)
    assert_same_gradients(own, expected)


def test_in_bf16_they_are_as_near_to_float32(shallow, fuse):
    truth, expected = step(shallow, Method("full"))
    theirs, other = step(shallow, Method("full"), precision="bf16")
    ours, found = step(shallow, Method("full"), fuse, precision="bf16")
    assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm()

    def error(gradient):
        return torch.cat([(gradient[key] - expected[key]).flatten() for key in expected]).norm()

    assert error(found) <= 1.1 * error(other)


def test_a_text_does_not_depend_on_the_others(shallow, fuse):
    whole, _ = step(shallow, Method("full"), fuse)
    module = module_for(shallow, Method("full"))
    fuse(module.encoder.body)
    tokens = np.random.default_rng(0).integers(0, 256, sum(LENGTHS)).astype(np.int32)
    begin = sum(LENGTHS[:3])
    (alone,) = pack(tokens[begin : begin + LENGTHS[3]], np.array(LENGTHS[3:4]))
    place = int(np.flatnonzero(np.argsort(LENGTHS, kind="stable") == 3)[0])
    torch.testing.assert_close(PlainBody(module.encoder).encode(alone, graph=False)[0], whole[place], atol=1e-6, rtol=0)


def test_a_chunk_with_a_long_text_runs_as_transformers_wrote_it(tmp_path, save_decoder, fuse):
    folder = save_decoder(tmp_path / "long", max_position_embeddings=256)
    embeddings, expected = step(folder, Method("full"), lengths=LONG)
    found, own = step(folder, Method("full"), fuse, lengths=LONG)
    assert torch.equal(found, embeddings)
    assert all(torch.equal(own[key], expected[key]) for key in expected)


COMPILED = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from embedscale.model.gpu import kernels

KINDS = {"ends": "*i32", "scaling": "fp32", "eps": "fp32"} | dict.fromkeys(("begin", "heads", "rows", "width"), "i32")

def shared(function, bf16, constants, warps, generation):
    names = function.arg_names
    given = {n: KINDS.get(n, "*bf16" if n in bf16 else "*fp32") for n in names if n not in constants}
    source = ASTSource(function, given | {n: "constexpr" for n in constants},
                       {(names.index(n),): value for n, value in constants.items()})
    return triton.compile(source, GPUTarget("cuda", generation, 32), {"num_warps": warps}).metadata.shared

norms = kernels._add_norms
found = []
for generation, size, tile in ((90, 64, 64), (90, 128, 128), (80, 80, 32)):
    width = triton.next_power_of_2(size)
    constants = {"SIZE": size, "TURNS": size // 4, "TILE": tile, "WIDTH": width}
    for function in (kernels._attend, kernels._attend_backward):
        bf16 = ("states", "out", "gradient", "found")
        found.append([generation, shared(function, bf16, constants, kernels.warps_of(tile, width), generation)])
constants = {"ADDS": True, "TWO": True, "WIDTH": 1024}
found.append([90, shared(norms, ("first", "second", "norm1", "norm2"), constants, 4, 90)])
constants = {"UPPER": True, "TWO": True, "HALF": True, "SUMS": True, "WIDTH": 1024, "PROGRAMS": 512}
found.append([90, shared(kernels._add_norms_backward, ("upper1", "upper2", "half"), constants, 4, 90)])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path):
    path = {"PYTHONPATH": str(TRITON)} if TRITON.is_dir() else {}
    if not path:
        pytest.importorskip("triton", reason="`make test` installs triton")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)} | path
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 8
    for generation, shared in rows:
        assert shared <= {80: 163, 90: 227}[generation] * 1024
