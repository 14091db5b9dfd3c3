"""A real SLURM for the tests of this folder, and a folder for sweeps. Without SLURM, these tests are skipped."""

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from command import Command
from file_queue import FileQueue

from embedscale.run.directory import RunDirectory
from embedscale.run.lease import lease_holder
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


class Lab:
    """A folder with a prepared store and a backbone, in which sweeps are written, submitted and watched."""

    def __init__(self, folder: Path, settings: list[str], cluster: DevCluster | None, server):
        self.folder, self.cluster, self.server = folder, cluster, server
        self.base = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in settings)}
        self.environment = {**(cluster.environment if cluster else os.environ), "OMP_NUM_THREADS": "1"}

    def write(
        self, name: str, base: dict | None = None, classes: dict | None = None, cluster: dict | None = None, **file
    ):
        """A sweep file and its cluster file."""
        shape = {"name": "cpu", "gpus": 0, "cpus": 1, "memory_gb": 1, "hours": 1, "utilisation": 0.3} | (classes or {})
        settings = {"max_gpus": 4, "warning_seconds": 20, "bundle_minutes": 0, "peak_flop_per_second": 3e10}
        settings |= {"environment": {"OMP_NUM_THREADS": "1"}, "classes": [shape]} | (cluster or {})
        (self.folder / f"{name}.cluster.yaml").write_text(json.dumps(settings))
        grid = {"output": str(self.folder / "runs"), "cluster": str(self.folder / f"{name}.cluster.yaml")}
        grid |= {"base": self.base | {"data.repeat": True} | (base or {})} | file
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(grid))
        return path

    def start(
        self, action: str, sweep: Path, *words: str, env: dict[str, str] | None = None
    ) -> Command | subprocess.Popen:
        """Start a command of a sweep. With `env`, start it in a new interpreter, which imports everything again."""
        line = ["sweep", action, str(sweep), *words]
        if env is None:
            return Command(self.server, line, self.environment, self.folder)
        command, more = [sys.executable, "-m", "embedscale.cli", *line], {"stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment | env, stdout=subprocess.PIPE, cwd=self.folder, **more)

    def sweep(self, action: str, sweep: Path, *words: str, code: int | None = 0, **settings) -> str:
        process = self.start(action, sweep, *words, **settings)
        output = process.communicate(timeout=300)[0]
        assert code is None or process.returncode == code, output
        return output

    def slurm(self, *words: str) -> str:
        return self.cluster.ask(*words).strip()

    def queued(self, name: str = "", states: str = "all") -> list[str]:
        """Return array_task|state|reason for each job whose name begins with `name`."""
        lines = self.slurm("squeue", "--noheader", "--array", f"--states={states}", "--format=%j|%i|%T|%r").splitlines()
        over = ("COMPLETED", "CANCEL", "FAIL", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
        live = [line.split("|", 1) for line in lines if not line.split("|")[2].startswith(over)]
        return [rest for job, rest in live if job.startswith(name)]

    def hurry(self) -> None:
        """Start requeued jobs now: SLURM would wait two minutes."""
        for line in self.queued(states="PENDING"):
            job, _, reason = line.split("|")
            if reason in ("BeginTime", "None"):
                self.slurm("scontrol", "update", f"JobId={job}", "StartTime=now")

    def limit(self, job: str, seconds: float) -> None:
        """Let a running job reach its time limit in `seconds`. A limit in minutes would hold for later attempts too."""
        end = datetime.now() + timedelta(seconds=seconds)
        self.slurm("scontrol", "update", f"JobId={job}", f"EndTime={end:%Y-%m-%dT%H:%M:%S}")

    def hold(self, directory: RunDirectory) -> int:
        """Suspend the process of a run, so that the run cannot end before the test does something to it."""
        process = lease_holder(directory.lease).pid
        os.kill(process, signal.SIGSTOP)
        return process

    def directories(self, name: str) -> list[RunDirectory]:
        return [RunDirectory(path) for path in sorted((self.folder / "runs" / name).glob("[!.]*"))]

    def log(self, name: str) -> str:
        """Return what the jobs of a sweep have printed."""
        return "\n".join(p.read_text() for p in sorted((self.folder / "runs" / name / ".submissions").glob("*/*.out")))


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
