"""Whatever the cluster does, every run of a sweep ends with the bits of the run that was left alone.

A sweep of twelve runs begins on this machine, goes to a real SLURM of two nodes, and there is preempted, requeued, hit
by its time limit, killed with its node, cancelled and submitted again. The test prints what was done to each run.
"""

import json
import re
import signal
import time
from collections import defaultdict

import pytest

METHODS = ["full", "bias", {"name": "freeze", "active_fraction": 0.5}, {"name": "lora", "rank": 4}]


class Cluster:
    """What a script does to the jobs of a sweep, one deed a run or more, as soon as the run has checkpoints to lose."""

    def __init__(self, lab, name):
        self.lab, self.name = lab, name
        self.deeds = defaultdict(list)  # run id → what was done

    def running(self):
        """(job, its node, the run it is at) of each running job."""
        noted = {}
        for file in (self.lab.folder / "runs" / self.name / ".submissions").glob("*.json"):
            noted |= {json.loads(file.read_text())["name"]: json.loads(file.read_text())["tasks"]}
        lines = self.lab.slurm("squeue", "--noheader", "--states=RUNNING", "--format=%j|%F_%K|%N").splitlines()
        for job_name, job, node in (line.split("|") for line in lines):
            tasks = noted.get(job_name)
            if tasks is None:
                continue
            index = int(job.split("_")[1]) if "N/A" not in job else 0
            for directory in self.lab.directories(self.name):
                if directory.path.name in tasks[index] and directory.lease.exists():
                    yield job.removesuffix("_N/A"), node, directory

    def wait_for(self, wanted, until, but_not=()):
        """A job whose run is to be `wanted` and has a checkpoint newer than its attempt's beginning."""

        def ready():
            for job, node, directory in self.running():
                attempts = directory.read_attempts()
                newest = max((int(p.stem[5:]) for p in directory.checkpoints.glob("step-*.pt")), default=0)
                fresh = attempts and newest > attempts[-1].get("from_step", newest)
                if fresh and directory.path.name not in but_not and wanted(directory.path.name):
                    return job, node, directory.path.name
            self.lab.hurry()
            return None

        return until(ready, 240, lambda: f"{self.deeds} {self.lab.queued()} {self.lab.log(self.name)[-3000:]}")

    def note(self, deed, node):
        for _, at, directory in self.running():
            if at == node:
                self.deeds[directory.path.name].append(deed)

    def preempt(self, job, node, run):
        self.note("preempted", node)
        words = ["--partition=high", f"--nodelist={node}", "--exclusive", "--time=1", "--output=/dev/null"]
        self.lab.slurm("sbatch", *words, "--wrap=sleep 1")

    def requeue(self, job, node, run):
        self.deeds[run].append("requeued")
        self.lab.slurm("scontrol", "requeue", job)

    def limit(self, job, node, run):
        self.deeds[run].append("time limit")
        self.lab.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")

    def cut_power(self, job, node, run):
        self.note("node killed", node)
        self.lab.cluster.kill_node(node)
        time.sleep(12)  # then SLURM counts the node's jobs as lost when it comes back
        self.lab.cluster.start_node(node)

    def cancel(self, job, node, run):
        self.deeds[run].append("cancelled")
        self.lab.slurm("scancel", job)


@pytest.mark.slow
def test_every_run_ends_with_the_bits_of_the_undisturbed_one(lab, until, same, capsys):
    axes = {"budget": [1e10], "training.seed": [0, 1]}
    file = {"methods": METHODS, "base": {"resources.checkpoint_minutes": 0, "resources.log_every": 1}}
    file["include"] = [{"budget": 3e10, "training.seed": seed, "method.name": "full"} for seed in range(4)]
    alone = lab.write("alone", axes=axes, **file)
    assert "12 done" in lab.sweep("submit", alone, "--to", "here")

    # Two short runs share a job; the long ones have one each.
    sweep = lab.write("sweep", axes=axes, cluster={"bundle_minutes": 0.05, "max_gpus": 4}, **file)
    script = Cluster(lab, "sweep")
    laptop = lab.start("submit", sweep, "--to", "here")
    begun = until(lambda: [d for d in lab.directories("sweep") if any(d.checkpoints.glob("step-*.pt"))], 60)
    laptop.send_signal(signal.SIGINT)
    assert laptop.wait(60) == 75, laptop.stdout.read()
    for directory in begun:
        script.deeds[directory.path.name].append("Ctrl-C on a laptop")

    assert re.search(r"submitted (9|1[0-2]) runs", lab.sweep("submit", sweep))
    short, long = (lambda run: "1e10" in run), (lambda run: "3e10" in run)
    done, limited = set(), ""
    for deed, wanted in [
        (script.limit, long),
        (script.preempt, lambda run: True),
        (script.requeue, short),
        (script.cut_power, lambda run: True),
        (script.cancel, short),
        (script.preempt, short),
        (script.requeue, lambda run: True),
    ]:
        job, node, run = script.wait_for(wanted, until, but_not=done)
        done.add(run)
        deed(job, node, run)
        limited = job if deed == script.limit else limited

    def over():
        lab.hurry()
        lab.slurm("scontrol", "update", f"JobId={limited}", "TimeLimit=60")
        time.sleep(3)
        return "12 done; 0 to submit" in lab.sweep("submit", sweep)

    until(over, 400, lambda: f"{lab.queued()} {lab.sweep('status', sweep)} {lab.log('sweep')[-3000:]}")
    print_deeds(lab, script, capsys)
    whole = {directory.path.name: same(directory) for directory in lab.directories("alone")}
    assert len(whole) == 12
    for directory in lab.directories("sweep"):
        metrics, record = same(directory)
        assert (metrics, record) == whole[directory.path.name]
        steps = [row["step"] for row in metrics if "loss" in row]
        assert steps == list(range(1, record["steps"] + 1)), "a step is missing or counted twice"
        assert metrics[-1]["flops"] == record["spent_flop"]
    reasons = {a.get("reason") for d in lab.directories("sweep") for a in d.read_record()["attempts"]}
    assert {"SIGINT", "SIGTERM", "SIGUSR2"} <= reasons
    assert {a["ended"] for d in lab.directories("sweep") for a in d.read_record()["attempts"]} >= {"killed", "done"}


def print_deeds(lab, script, capsys):
    with capsys.disabled():
        print(f"\n{'run':44} {'attempts':>8}  {'how they ended':48} done to it")
        for directory in lab.directories("sweep"):
            attempts = directory.read_attempts()
            ended = ", ".join(f"{a.get('ended')} ({a['reason']})" if a.get("reason") else a["ended"] for a in attempts)
            deeds = ", ".join(script.deeds[directory.path.name]) or "–"
            print(f"{directory.path.name:44} {len(attempts):8}  {ended:48} {deeds}")
