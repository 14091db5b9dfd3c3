"""A sweep on a real SLURM with two nodes, whose jobs, nodes and daemons are hit at random moments.

A fault that stops several runs, such as the loss of a node, counts once for each of them.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from bench import Bench, phase_of, tracebacks
from lab import Lab
from tally import Hit, Tally
from training_runs import comparable

from embedscale.errors import DONE, INTERRUPTED
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import lease_holder
from slurm.scheduler.devcluster import DevCluster, missing

METHODS = ["full", "bias", {"name": "freeze", "active_fraction": 0.5}, {"name": "lora", "rank": 4}]
BUDGET = 1.5e10
SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2", "KILL", "CONT")
# How often each fault is chosen.
FAULTS = {"preempt": 8, "requeue": 10, "requeuehold": 4, "hold": 4, "suspend": 10, "cancel": 8, "time limit": 4}
FAULTS |= {f"signal {name}": 2 for name in SIGNALS} | {"node lost": 4, "slurmd killed": 4, "slurmctld killed": 4}
FAULTS |= {"slurmctld stopped": 4, "slurmdbd killed": 4, "run killed": 6, "all daemons": 1, "two submits": 6}
DAEMONS = {"slurmd killed": ("n1",), "slurmctld killed": ("slurmctld",), "slurmdbd killed": ("slurmdbd",)}
DAEMONS |= {"all daemons": ("slurmctld", "slurmdbd", "n1", "n2")}


def disturb(bench: Bench, tally: Tally, rng: random.Random) -> None:
    """Disturb sweeps until the time is up."""
    if missing():
        tally.say(f"no SLURM here, so nothing of it was disturbed: {', '.join(missing())} missing")
        return
    folder = Path(tempfile.mkdtemp(prefix="dc-"))  # short: a Unix socket's path has at most 107 characters
    devcluster = DevCluster(folder, cpus=4, grace=5)
    try:
        devcluster.up()
        lab = Lab(bench.folder, bench.words, devcluster, bench.server)
        number, whole = 0, _alone(lab)
        while tally.left > 0:
            Script(bench, tally, rng, lab, f"sweep-{number}", whole).disturb()
            number += 1
    finally:
        devcluster.down()
        shutil.rmtree(folder, ignore_errors=True)


def _write(lab: Lab, name: str) -> Path:
    base = {"resources.log_every": 1, "resources.checkpoint_minutes": 0.002}
    axes = {"budget": [BUDGET], "training.seed": [0, 1, 2]}
    return lab.write(name, base=base, axes=axes, methods=METHODS, cluster={"max_gpus": 8, "warning_seconds": 20})


def _alone(lab: Lab) -> dict[str, object]:
    """Return what each run is when nothing disturbs it."""
    lab.sweep("submit", _write(lab, "alone"), "--to", "here")
    return {directory.path.name: comparable(directory) for directory in lab.directories("alone")}


@dataclass(frozen=True)
class Work:
    """A run that has a process in a job."""

    directory: RunDirectory
    job: str
    node: str
    process: int
    phase: str
    """starting or at work."""


class Script:
    """One sweep, disturbed until it is done."""

    def __init__(self, bench: Bench, tally: Tally, rng: random.Random, lab: Lab, name: str, whole: dict[str, object]):
        self.bench, self.tally, self.rng, self.lab, self.name, self.whole = bench, tally, rng, lab, name, whole
        self.file = _write(lab, name)
        self.hits: list[Hit] = []

    def disturb(self) -> None:
        self.command("submit", "submit")
        while True:
            self.lab.hurry()
            self.release()
            if not self.lab.queued(self.name):
                if self.done() == len(self.whole):
                    break
                self.command("submit", "submit", "--retry-failed")
            if self.tally.left > 0 and self.at_work():
                self.strike(self.rng.choices(list(FAULTS), list(FAULTS.values()))[0])
            if self.rng.random() < 0.3:
                self.command("status", "status")
            time.sleep(self.rng.uniform(0, 2))
            self.tally.show(f"{self.name}: {len(self.hits)} faults, {self.done()} of {len(self.whole)} done")
            if self.tally.left < -900:
                self.note("all of these", "end", "", f"not done: {self.lab.queued()} {self.lab.log(self.name)[-3000:]}")
                break
        for directory in self.runs():
            if directory.record.exists() and comparable(directory) != self.whole[directory.path.name]:
                self.note("all of these", "end", directory.path.name, "differs from the run left alone")
        if wrong := tracebacks(self.lab.log(self.name)):
            self.note("all of these", "end", "", wrong)
        self.tally.add(self.hits)

    def note(self, fault: str, phase: str, run: str, problem: str | None = None) -> None:
        method = run.split("_")[1] if "_" in run else "sweep"
        self.hits.append(Hit("slurm", method, fault, phase, "went on", run, problem))

    def done(self) -> int:
        return sum(directory.record.exists() for directory in self.runs())

    def runs(self) -> list[RunDirectory]:
        return [directory for directory in self.lab.directories(self.name) if directory.begun()]

    def at_work(self) -> list[Work]:
        """Return the runs that have a process."""
        found, jobs = [], self.jobs()
        for directory in self.runs():
            holder = lease_holder(directory.lease)
            if holder is not None and holder.job_id in jobs and not directory.record.exists():
                phase = "starting" if phase_of(directory, holder.pid, []) == "start-up" else "at work"
                found.append(Work(directory, *jobs[holder.job_id], holder.pid, phase))
        return found

    def jobs(self) -> dict[str, tuple[str, str]]:
        """Return (name, node) of each running job of an array, by its own number.

        The name has the array's number: the own number of an array's last job is that of the whole array.
        """
        lines = self.lab.slurm("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%A|%F_%K|%N")
        found = (line.split("|") for line in lines.splitlines())
        return {own: (own if "N/A" in name else name, node) for own, name, node in found}

    def command(self, fault: str, action: str, *words: str) -> None:
        """Call a verb of `sweep`; it may say that the queue cannot be asked, but no traceback."""
        process = self.lab.start(action, self.file, *words)
        self.judge(fault, *self.bench.end(process))

    def judge(self, fault: str, code: int | None, said: str) -> None:
        refused = ("another process is", "cannot be asked", "sbatch", "queued", "no answer")
        wrong = tracebacks(said)
        if code not in (DONE, INTERRUPTED) and not any(text in said for text in refused):
            wrong = f"status {code}: {said[-600:]}"
        if wrong:
            self.note(fault, "command", "", wrong)

    def release(self) -> None:
        """Release held jobs."""
        for line in self.lab.queued(states="PENDING"):
            job, _, reason = line.split("|")
            if "held" in reason.lower():
                self.lab.slurm("scontrol", "release", job)

    def strike(self, fault: str) -> None:
        """Do it to a run at work, or to all that it touches."""
        working = self.at_work()
        if not working:
            return
        one = self.rng.choice([each for each in working if each.phase == "at work"] or working)
        hit, cluster, slurm, job, node = [one], self.lab.cluster, self.lab.slurm, one.job, one.node
        if fault == "preempt":
            hit = [each for each in working if each.node == node]
            words = ["--partition=high", f"--nodelist={node}", "--exclusive", "--time=1", "--output=/dev/null"]
            slurm("sbatch", *words, "--wrap=sleep 1")
        elif fault in ("requeue", "requeuehold"):
            slurm("scontrol", fault, job)
        elif fault == "hold":
            slurm("scontrol", "hold", job)
            slurm("scontrol", "requeue", job)
        elif fault == "suspend":
            slurm("scontrol", "suspend", job)
            time.sleep(self.rng.uniform(0.2, 3))
            slurm("scontrol", "resume", job)
        elif fault == "cancel":
            slurm("scancel", job)
        elif fault == "time limit":
            self.lab.limit(job, self.rng.uniform(5, 40))
        elif fault.startswith("signal"):
            slurm("scancel", f"--signal={fault.split()[1]}", self.rng.choice(["--full", "--batch"]), job)
        elif fault == "run killed":
            with suppress(ProcessLookupError):
                os.kill(one.process, signal.SIGKILL)
        elif fault == "node lost":
            hit = [each for each in working if each.node == node]
            cluster.kill_node(node)
            time.sleep(self.rng.uniform(0, 13))
            cluster.start(node)
        elif fault == "slurmctld stopped":
            cluster.send("slurmctld", signal.SIGSTOP)
            with suppress(psutil.Error):  # the warning before the time limit, while the job cannot ask for its requeue
                psutil.Process(one.process).parent().send_signal(signal.SIGUSR2)  # type: ignore[union-attr]
            time.sleep(self.rng.uniform(1, 35))
            cluster.send("slurmctld", signal.SIGCONT)
        elif fault in DAEMONS:
            names = [node if name == "n1" and len(DAEMONS[fault]) == 1 else name for name in DAEMONS[fault]]
            hit = [each for each in working if each.node == node] if names == [node] else working
            self.restart(names)
        elif fault == "two submits":
            hit = [Work(one.directory, job, node, one.process, "in the queue")]
            both = [self.lab.start("submit", self.file, "--retry-failed") for _ in range(2)]
            for process in both:
                self.judge(fault, *self.bench.end(process))
            self.refuse_twice()
        for each in hit:
            self.note(fault, each.phase, each.directory.path.name)

    def restart(self, names: list[str]) -> None:
        """Kill daemons with SIGKILL, and start them again after some seconds."""
        for name in names:
            self.lab.cluster.send(name, signal.SIGKILL)
        time.sleep(self.rng.uniform(0.5, 8))
        for name in names:
            self.lab.cluster.start(name)

    def refuse_twice(self) -> None:
        """No run may be in two jobs that live."""
        from slurm.scheduler.submissions import Submissions

        noted = Submissions(self.lab.folder / "runs" / self.name).noted()
        lines = self.lab.slurm("squeue", "--noheader", "--array", "--format=%j|%K").splitlines()
        seen: list[str] = []
        for name, index in (line.split("|") for line in lines):
            if name in noted:
                seen += noted[name].tasks[0 if "N/A" in index else int(index)]
        for run in {run for run in seen if seen.count(run) > 1}:
            self.note("two submits", "queue", run, "is in two jobs")
