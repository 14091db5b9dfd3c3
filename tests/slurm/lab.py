"""A folder in which sweeps are written, submitted and watched, on a real SLURM or on this machine."""

import json
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import yaml
from command import Command

from embedscale.run.directory import RunDirectory
from embedscale.run.lease import lease_holder
from slurm.scheduler.devcluster import DevCluster


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
