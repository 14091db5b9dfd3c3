"""A scheduler that does not answer when a job has to ask for its requeue."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from embedscale.run.lease import lease_holder

# A job whose scheduler is away for its first requests; its runs were stopped by the clock.
PROGRAM = """
import sys, time
from pathlib import Path
from slurm.scheduler import node
from slurm.scheduler.choice import SCHEDULERS
from slurm.scheduler.scheduler import Allocation, Requeue
from slurm.scheduler.submissions import Orders, Submissions

sweep, name, seconds, away = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
answers = [Requeue.AWAY] * away + [Requeue.REFUSED]

class Busy:
    def __init__(self, folder): pass
    def allocation(self): return Allocation("7", "n1", time.time() + seconds)
    def requeue(self, job, avoid=()):
        print("asked", flush=True)
        return answers.pop(0) if len(answers) > 1 else answers[0]

SCHEDULERS["file"] = Busy
node.RETRY_SECONDS = 0.2
node.work(sweep, name, 0)
"""


def job(queued_sweep, seconds: float, away: int) -> tuple[int, str, float]:
    """Run a job that has this time until its limit, all of it warning; returns its status, output and duration."""
    from slurm.plan import plan_sweep
    from slurm.scheduler.submissions import Submissions
    from slurm.submit import Wish, submit

    shape = {"gpus": 0, "memory_gb": 0.1}
    sweep, queue = queued_sweep("axes: {budget: 1e15}", classes=[shape])
    submit(sweep, plan_sweep(sweep), queue, Wish())
    (name,) = Submissions(sweep.folder).noted()
    begun = time.monotonic()
    words = [sys.executable, "-c", PROGRAM, str(sweep.folder), name, str(seconds), str(away)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begun


def test_the_time_that_is_left_is_used_to_ask_again(queued_sweep):
    code, output, _ = job(queued_sweep, seconds=110, away=5)
    assert code == 75 and output.splitlines().count("asked") == 6, output
    assert "the scheduler does not answer; asked again until" in output


def test_at_its_limit_a_job_ends_as_interrupted(queued_sweep):
    code, output, seconds = job(queued_sweep, seconds=75, away=10**6)
    assert code == 75 and seconds >= 75 and output.splitlines().count("asked") > 3, output


@pytest.mark.slow
def test_a_controller_that_is_away_at_the_warning_is_asked_until_it_is_back(lab, until):
    """It is away for 35 s, and the job has most of an hour left."""
    base = {"resources.checkpoint_minutes": 0, "resources.log_every": 1}
    sweep = lab.write("away", base=base, axes={"budget": [1e12]}, methods=["full"])
    lab.sweep("submit", sweep)
    (directory,) = until(lambda: lab.directories("away"))
    holder = until(lambda: directory.checkpoint_paths() and lease_holder(directory.lease), 240, lambda: lab.log("away"))
    job = psutil.Process(holder.pid).ppid()
    controller = int((Path(lab.cluster.folder) / "slurmctld.process").read_text().split()[0])
    os.kill(controller, signal.SIGSTOP)
    try:
        os.kill(job, signal.SIGUSR2)  # the warning, which slurmstepd may have on its way
        time.sleep(35)
        assert psutil.pid_exists(job), lab.log("away")
    finally:
        os.kill(controller, signal.SIGCONT)
    until(lambda: "requeued job" in lab.log("away"), 100, lambda: lab.log("away"))
    assert "the scheduler does not answer; asked again until" in lab.log("away")
    until(lambda: len(directory.read_attempts()) == 2, 240, lambda: lab.log("away"), between=lab.hurry)
    first, _ = directory.read_attempts()
    assert first.ended == "interrupted"
    until(lambda: directory.read_attempts()[1].from_step is not None, 240, lambda: lab.log("away"))
    assert directory.read_attempts()[1].from_step == first.to_step
    lab.sweep("cancel", sweep, "--yes")
