"""A real SLURM for the tests of this folder, and a folder for sweeps. Without SLURM, these tests are skipped."""

import getpass
import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from file_queue import FileQueue
from lab import Lab

from embedscale.run.directory import RunDirectory
from slurm import grid
from slurm.grid import Sweep
from slurm.scheduler.choice import SCHEDULERS
from slurm.scheduler.devcluster import INSTALL, DevCluster, missing


def pytest_collection_modifyitems(items):
    """Mark the tests that start a SLURM of their own; `-m "not slurm"` leaves them out."""
    for item in items:
        if {"cluster", "bare_cluster", "wide_cluster"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slurm")


def _cluster(**settings):
    if missing():
        pytest.skip(f"no SLURM here; on Debian: {INSTALL}")
    folder = tempfile.mkdtemp(prefix="dc-")  # short: a Unix socket's path has at most 107 characters
    cluster = DevCluster(folder, **settings)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two cores, accounting, 30 s of grace."""
    yield from _cluster(cpus=2)


@pytest.fixture(scope="module")
def bare_cluster():
    """One node, no accounting, five seconds of grace."""
    yield from _cluster(nodes=1, accounting=False, grace=5)


@pytest.fixture(scope="module")
def wide_cluster():
    """Two nodes of sixteen cores, no accounting. A sweep may use fewer cores than that (`max_gpus`)."""
    yield from _cluster(cpus=16, accounting=False)


def wait_until(happened, seconds: float = 240, what=lambda: "", between=lambda: None):
    """Return the first true value of `happened()`; fail after `seconds` with the text of `what()`."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, f"did not happen within {seconds} s: {what()}"
        between()
        time.sleep(0.3)
    return found


def comparable(directory: RunDirectory):
    """Return what two runs of one configuration must have in common: all but times, attempts and the code version."""
    times = {"attempt", "tokens_per_second", "seconds"}
    metrics = [{k: v for k, v in row.to_json().items() if k not in times} for row in directory.read_metrics()]
    record = directory.read_record().to_json()
    for key in ("attempts", "wall_seconds", "gpu_hours", "code"):
        record.pop(key)
    return metrics, record


def _lab(folder: Path, settings: list[str], cluster: DevCluster, server):
    """Yield a lab, and empty the queue afterwards."""
    yield Lab(folder, settings, cluster, server)
    cluster.ask("scancel", f"--user={getpass.getuser()}")
    wait_until(lambda: not cluster.ask("squeue", "--noheader"))


@pytest.fixture
def lab(tmp_path, tiny_run, cluster, server):
    yield from _lab(tmp_path, tiny_run, cluster, server)


@pytest.fixture
def bare_lab(tmp_path, tiny_run, bare_cluster, server):
    yield from _lab(tmp_path, tiny_run, bare_cluster, server)


@pytest.fixture
def wide_lab(tmp_path, tiny_run, wide_cluster, server):
    yield from _lab(tmp_path, tiny_run, wide_cluster, server)


@pytest.fixture
def laptop(tmp_path, tiny_run, server) -> Lab:
    return Lab(tmp_path, tiny_run, None, server)


@pytest.fixture
def file_scheduler(monkeypatch):
    """Allow `scheduler: file` in a cluster file."""
    monkeypatch.setitem(SCHEDULERS, "file", FileQueue)


@pytest.fixture
def queued_sweep(tmp_path, file_scheduler):
    """Call with the text of a sweep file and settings of its cluster; returns the sweep and its `FileQueue`."""

    def write(text: str, name: str = "small", **cluster) -> tuple[Sweep, FileQueue]:
        settings = tmp_path / f"{name}.cluster.yaml"
        settings.write_text(json.dumps({"scheduler": "file"} | cluster))
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"output: {tmp_path / 'runs'}\ncluster: {settings}\n{text}")
        sweep = grid.load(file)
        return sweep, FileQueue(sweep.folder)

    return write


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Put stand-ins for SLURM's programs alone on the PATH: programs(squeue="text", scancel=1) prints or exits with 1.

    Returns the file in which every call is noted.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))  # this machine may have a SLURM of its own

    def write(**texts: str | int) -> Path:
        for name, text in texts.items():
            body = f"exit {text}" if isinstance(text, int) else f"/bin/cat <<'END'\n{text}\nEND"
            (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{body}\n')
            (folder / name).chmod(0o755)
        return folder / "calls"

    return write


@pytest.fixture
def until():
    return wait_until


@pytest.fixture
def same():
    return comparable
