"""Whatever the cluster does, every run of a sweep ends with the same bits as an undisturbed run.

A sweep of twelve runs begins on this machine and goes to a real SLURM with two nodes. There it is preempted, requeued,
stopped by its time limit, killed with its node, cancelled and submitted again. The test's summary shows what was done
to each run.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections import defaultdict

import pytest

from embedscale.run.directory import RunDirectory
from embedscale.run.lease import lease_holder
from slurm.scheduler.processes import POLL_SECONDS
from slurm.scheduler.submissions import Submissions

LONG_SECONDS = 5  # undisturbed, at the full speed
METHODS = ["full", "bias", {"name": "freeze", "active_fraction": 0.5}, {"name": "lora", "rank": 4}]


class Script:
    """Disturbs the jobs of a sweep, each as soon as its run has steps that it can lose.

    A long run with such steps is suspended until it is disturbed, so that it cannot end before.
    """

    def __init__(self, lab, name, long, until):
        self.lab, self.name, self.long, self.until = lab, name, long, until
        self.deeds, self.nodes = defaultdict(list), defaultdict(set)  # by run id
        self.limited = {}  # run id → the attempt that was running
        self.still = {}  # run id → its process, which is suspended
        self.begun = time.monotonic()

    def running(self):
        """Yield (job, its node, the directory of its current run) for each running job."""
        noted = Submissions(self.lab.folder / "runs" / self.name).noted()
        lines = self.lab.slurm("squeue", "--noheader", "--states=RUNNING", "--format=%j|%F_%K|%N").splitlines()
        for job_name, job, node in (line.split("|") for line in lines):
            index = int(job.split("_")[1]) if "N/A" not in job else 0
            for directory in self.lab.directories(self.name):
                run = directory.path.name
                if job_name in noted and run in noted[job_name].tasks[index] and lease_holder(directory.lease):
                    self.nodes[run].add(node)
                    yield job.removesuffix("_N/A"), node, directory

    def find(self, wanted, patience=10):
        """Return a job, its node and its run, such that `wanted(run, node, held)` is true and the run has a checkpoint
        newer than the beginning of its attempt.

        `held` are the nodes on which a run waits for its time limit. For `patience` seconds, a run to which nothing was
        done yet is preferred.
        """
        deadline = time.monotonic() + patience

        def ready():
            held = {node for _, node, directory in self.running() if directory.path.name in self.waiting()}
            for job, node, run in self.look():
                if wanted(run, node, held) and (run not in self.deeds or time.monotonic() > deadline):
                    return job, node, run
            return None

        return self.until(ready, 240, self.tell)

    def look(self):
        """Return (job, its node, its run) for runs with steps to lose; suspend long runs until `let_go`."""
        found = []
        for job, node, directory in self.running():
            run, attempts, holder = directory.path.name, directory.read_attempts(), lease_holder(directory.lease)
            newest = max((int(p.stem[5:]) for p in directory.checkpoints.glob("step-*.pt")), default=0)
            if holder and attempts and newest > (newest if attempts[-1].from_step is None else attempts[-1].from_step):
                found.append((job, node, run))
                if run in self.long and run not in self.limited and self.still.get(run) != holder.pid:
                    os.kill(holder.pid, signal.SIGSTOP)
                    self.still[run] = holder.pid
        self.lab.hurry()
        return found

    def let_go(self):
        for process in self.still.values():
            go_on(process)

    def tell(self):
        return f"{dict(self.deeds)} {self.lab.queued()} {self.lab.log(self.name)[-3000:]}"

    def waiting(self):
        """Return the runs with a new time limit that has not stopped them yet."""
        return [run for run, number in self.limited.items() if number == self.running_attempt(run)]

    def running_attempt(self, run):
        directory = RunDirectory(self.lab.folder / "runs" / self.name / run)
        attempts = directory.read_attempts()
        return attempts[-1].number if attempts and lease_holder(directory.lease) else None

    def note(self, run, deed):
        self.deeds[run].append(f"{deed} ({time.monotonic() - self.begun:.0f} s)")

    def note_all(self, node, deed):
        for _, at, directory in self.running():
            if at == node:
                self.note(directory.path.name, deed)

    def limit(self):
        job, _, run = self.find(lambda run, node, held: run in self.long and run not in self.limited, patience=0)
        self.note(run, "time limit")
        self.limited[run] = self.running_attempt(run)
        process = lease_holder(RunDirectory(self.lab.folder / "runs" / self.name / run).lease).pid
        # SLURM checks every 30 s and warns 20 s ahead. With a later limit it might kill the job without a warning.
        self.lab.limit(job, 40)
        # Suspended, the run cannot end before the warning; it finds the warning when it continues.
        os.kill(process, signal.SIGSTOP)
        threading.Timer(25, go_on, (process,)).start()

    def preempt(self):
        _, node, _ = self.find(lambda run, node, held: node not in held)
        self.note_all(node, "preempted")
        words = ["--partition=high", f"--nodelist={node}", "--exclusive", "--time=1", "--output=/dev/null"]
        self.lab.slurm("sbatch", *words, "--wrap=sleep 1")

    def requeue(self):
        job, _, run = self.find(lambda run, node, held: run not in self.limited)
        self.note(run, "requeued")
        self.lab.slurm("scontrol", "requeue", job)

    def cut_power(self):
        _, node, _ = self.find(lambda run, node, held: node not in held)
        self.note_all(node, "node killed")
        self.lab.cluster.kill_node(node)
        time.sleep(12)  # then SLURM counts the node's jobs as lost when it comes back
        self.lab.cluster.start(node)

    def cancel(self):
        job, _, run = self.find(lambda run, node, held: run not in self.limited)
        self.note(run, "cancelled")
        self.lab.slurm("scancel", job)


@pytest.mark.slow
def test_every_run_ends_with_the_bits_of_an_undisturbed_one(lab, until, same, record_property):
    axes = {"budget": [1e10], "training.seed": [0, 1]}
    file = {"methods": METHODS, "base": {"resources.log_every": 1}}
    assert "8 done" in lab.sweep("submit", lab.write("alone", axes=axes, **file), "--to", "here")
    # Four more runs are long enough on this machine for every disturbance.
    longer = longer_budget(lab)
    file["include"] = [{"budget": longer, "training.seed": seed, "method.name": "full"} for seed in range(4)]
    short = {directory.path.name for directory in lab.directories("alone")}
    alone = lab.write("alone", axes=axes, **file)
    assert "alone: 4 done" in lab.sweep("submit", alone, "--to", "here")
    long = {directory.path.name for directory in lab.directories("alone")} - short

    # Two short runs share a job; each long run has its own. A checkpoint every half second leaves steps to lose.
    file["base"] = file["base"] | {"resources.checkpoint_minutes": 0.01}
    sweep = lab.write("sweep", axes=axes, cluster={"bundle_minutes": 0.05, "max_gpus": 4}, **file)
    script = Script(lab, "sweep", long, until)
    laptop = lab.start("submit", sweep, "base.resources.checkpoint_minutes=0", "--to", "here")
    begun = until(lambda: [d for d in lab.directories("sweep") if any(d.checkpoints.glob("step-*.pt"))])
    held = [lab.hold(directory) for directory in begun]
    laptop.send_signal(signal.SIGINT)
    time.sleep(2 * POLL_SECONDS)  # until the parent has passed the signal on
    for process in held:
        go_on(process)
    assert laptop.wait(240) == 75, laptop.stdout.read()
    for directory in begun:
        script.note(directory.path.name, "Ctrl-C on a laptop")

    assert re.search(r"submitted (9|1[0-2]) runs", lab.sweep("submit", sweep))
    for deed in (script.limit, script.limit, script.preempt, script.requeue, script.cut_power, script.cancel):
        deed()
    until(lambda: not script.waiting(), 120, script.tell, between=script.look)
    assert "to submit" in lab.sweep("submit", sweep)  # the cancelled runs
    for deed in (script.preempt, script.requeue, script.cancel):
        deed()
    script.let_go()

    def over():
        lab.hurry()
        time.sleep(2)
        # A submit costs a process: call it only if it may find something to do.
        return not lab.queued("sweep") and "12 done; 0 to submit" in lab.sweep("submit", sweep)

    until(over, 300, lambda: f"{lab.queued()} {lab.sweep('status', sweep)} {lab.log('sweep')[-3000:]}")
    record_property("shown", table_of_deeds(lab, script))
    whole = {directory.path.name: same(directory) for directory in lab.directories("alone")}
    assert len(whole) == 12
    for directory in lab.directories("sweep"):
        metrics, record = same(directory)
        assert (metrics, record) == whole[directory.path.name]
        steps = [row["step"] for row in metrics if "train_loss" in row]
        assert steps == list(range(1, record["steps"] + 1)), "a step is missing or counted twice"
        assert metrics[-1]["spent_flop"] == record["spent_flop"]
    attempts = [attempt for directory in lab.directories("sweep") for attempt in directory.read_record().attempts]
    assert {"SIGINT", "SIGTERM", "SIGUSR2"} <= {attempt.reason for attempt in attempts}
    assert {"interrupted", "killed", "done"} == {attempt.ended for attempt in attempts}
    assert set.union(*script.nodes.values()) == {"n1", "n2"}


def go_on(process):
    """Continue a suspended process, if it still exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


def longer_budget(lab):
    """Return the FLOP that a full run spends in LONG_SECONDS, rounded to one digit; at least twice the short budget."""
    speeds = []
    for directory in lab.directories("alone"):
        record = directory.read_record()
        if record.method == "full":
            tokens = [row.tokens_per_second for row in directory.read_metrics() if row.tokens_per_second is not None]
            speeds.append(max(tokens) * record.flop_per_token)
    return max(2e10, float(f"{LONG_SECONDS * max(speeds):.0e}"))


def table_of_deeds(lab, script):
    lines = [f"\n{'run':40} {'nodes':7} {'attempts and how they ended':64} done to it"]
    for directory in lab.directories("sweep"):
        run, attempts = directory.path.name, directory.read_attempts()
        ended = [f"{each.ended} ({each.reason})" if each.reason else each.ended for each in attempts]
        deeds, nodes = ", ".join(script.deeds[run]) or "–", ", ".join(sorted(script.nodes[run]))
        lines.append(f"{run:40} {nodes:7} {f'{len(ended)}: ' + ', '.join(ended):64} {deeds}")
    return "\n".join([*lines, f"{time.monotonic() - script.begun:.0f} s in all"])
