"""A job with several processes, without scontrol, without accounting, and on a sick node."""

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from embedscale.run.directory import RunDirectory
from slurm.scheduler.node import self_test
from slurm.scheduler.submissions import Submissions

EACH_STEP = {"resources.checkpoint_minutes": 0, "resources.log_every": 1}


def has_progress(directory: RunDirectory, attempts: int = 1) -> bool:
    """Return whether the run makes the attempt of this number and has a checkpoint newer than the attempt's start."""
    begun = directory.read_attempts()
    newest = max((int(path.stem.split("-")[1]) for path in directory.checkpoints.glob("step-*.pt")), default=0)
    return len(begun) == attempts and newest > (newest if begun[-1].from_step is None else begun[-1].from_step)


def preempt(lab, node="n1"):
    words = ["--partition=high", "--exclusive", "--time=1", "--output=/dev/null", f"--nodelist={node}"]
    lab.slurm("sbatch", *words, "--wrap=sleep 1")


@pytest.mark.slow
def test_a_run_of_two_tasks_is_preempted_and_resumes_with_both_ranks(lab, until, same):
    file = {"base": EACH_STEP | {"resources.devices": 2}, "axes": {"budget": [1e10]}, "methods": ["full"]}
    assert "1 done" in lab.sweep("submit", lab.write("together", **file), "--to", "here")
    sweep = lab.write("ranks", **file)
    lab.sweep("submit", sweep)
    (whole,) = lab.directories("together")
    directory = RunDirectory(lab.folder / "runs" / "ranks" / whole.path.name)
    until(lambda: has_progress(directory), 240, lambda: lab.log("ranks"))
    lab.hold(directory)  # until the SIGCONT that SLURM sends with its SIGTERM
    preempt(lab, lab.slurm("squeue", "--noheader", "--states=RUNNING", "--format=%N"))
    until(directory.record.exists, 240, lambda: lab.log("ranks"), between=lab.hurry)
    assert [a.ended for a in directory.read_attempts()] == ["interrupted", "done"]
    assert directory.read_attempts()[0].reason == "SIGTERM"
    assert same(directory) == same(whole)
    assert {f"{n}{rank}.log" for n in (1, 2) for rank in ("", ".rank1")} <= {
        p.name for p in directory.attempts.iterdir()
    }
    assert directory.read_record().device.count == 2
    until(lambda: not lab.queued("ranks"), 240)


def only(folder: Path, *programs: str) -> str:
    """Return a PATH that holds only these programs."""
    folder.mkdir()
    for name in programs:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.mark.slow
def test_without_scontrol_and_accounting_a_job_can_be_resumed(bare_lab, until):
    lab = bare_lab
    nothing = only(lab.folder / "node", "srun", "bash")
    queue_alone = {"PATH": only(lab.folder / "login", "squeue")}
    file = {"base": EACH_STEP, "axes": {"budget": [1e12]}, "methods": ["full"]}
    limits = {"cluster": {"environment": {"PATH": nothing}}}
    sweep = lab.write("bare", **file, **limits)
    lab.sweep("submit", sweep)
    (directory,) = until(lambda: lab.directories("bare"), 240)
    until(lambda: has_progress(directory), 240, lambda: lab.log("bare"))

    preempt(lab)
    until(lambda: "BeginTime" in "".join(lab.queued("bare")), 240, lambda: lab.log("bare"))
    assert "preempted" in lab.sweep("status", sweep, env=queue_alone)
    assert "1 preempted; 0 to submit" in lab.sweep("submit", sweep)
    assert "n1 cannot ask the scheduler" in lab.log("bare")

    until(lambda: has_progress(directory, 2), 240, lambda: lab.log("bare"), between=lab.hurry)
    lab.limit(lab.queued("bare")[0].split("|")[0], 40)
    until(lambda: not lab.queued("bare"), 240, lambda: lab.log("bare"))
    stopped, timed_out = directory.read_attempts()
    assert (stopped.ended, stopped.reason) == ("interrupted", "SIGTERM")
    assert (timed_out.ended, timed_out.reason) == ("interrupted", "SIGUSR2")
    assert timed_out.from_step == stopped.to_step < timed_out.to_step
    for settings in ({}, queue_alone):
        assert "interrupted" in lab.sweep("status", sweep, env=settings)

    sweep = lab.write("bare", **file)
    assert "1 interrupted; 1 to submit" in lab.sweep("submit", sweep)
    until(lambda: has_progress(directory, 3), 240, lambda: lab.log("bare"))
    assert directory.read_attempts()[2].from_step == timed_out.to_step
    lab.sweep("cancel", sweep, "--yes")
    until(lambda: not lab.queued("bare"), 240)
    assert directory.read_attempts()[2].ended == "interrupted", "a cancelled job has saved, and is not requeued"


def test_a_node_with_too_little_memory_is_avoided_for_a_day(tmp_path):
    fault = self_test(gpus=0, memory_gb=1e6)
    assert fault.endswith("GB of memory are free, but 1e+06 GB were promised")
    submissions = Submissions(tmp_path)
    for name, hours in {"n1": 1, "n2": 23, "n3": 25}.items():
        submissions.note_sick(name, fault)
        path = tmp_path / ".submissions" / "sick" / f"{name}.json"
        noted = json.loads(path.read_text())
        noted["time"] = (datetime.fromisoformat(noted["time"]) - timedelta(hours=hours)).isoformat()
        path.write_text(json.dumps(noted))
    assert submissions.sick_nodes() == {"n1": fault, "n2": fault}


@pytest.mark.slow
def test_a_sick_node_is_named_and_excluded_and_costs_no_attempt(lab, until):
    gate = lab.folder / "go"
    settings = {"setup": [f"until [ -e {gate} ]; do sleep 0.2; done"]}
    sweep = lab.write("sick", axes={"budget": [1e9]}, methods=["full"], cluster=settings)
    lab.sweep("submit", sweep)
    (orders,) = (lab.folder / "runs" / "sick" / ".submissions").glob("sick-*/orders.json")
    promised = json.loads(orders.read_text())
    orders.write_text(json.dumps(promised | {"gpus": 1}))  # no node here has a GPU
    gate.touch()
    sick = until(lambda: list(orders.parent.parent.glob("sick/*.json")), 240, lambda: lab.log("sick"))
    bad = sick[0].stem
    assert json.loads(sick[0].read_text())["fault"] == "0 GPUs are visible, but 1 were promised"
    job = until(lambda: lab.queued("sick", "PENDING"), 240)[0].split("|")[0]
    until(lambda: f"ExcNodeList={bad}" in lab.slurm("scontrol", "show", "job", job), 240, lambda: lab.log("sick"))
    assert not any(directory.read_attempts() for directory in lab.directories("sick"))

    orders.write_text(json.dumps(promised))
    (directory,) = until(lambda: lab.directories("sick"), 240, lambda: lab.log("sick"), between=lab.hurry)
    until(directory.record.exists, 240, lambda: lab.log("sick"))
    other = {"n1": "n2", "n2": "n1"}[bad]
    assert f"1 run on {other}" in lab.log("sick")
    assert [a.ended for a in directory.read_attempts()] == ["done"]
    until(lambda: not lab.queued("sick"))
    gate.unlink()
    more = lab.write("sick", axes={"budget": [1e9], "training.seed": [0, 1]}, methods=["full"], cluster=settings)
    assert f"avoided nodes: {bad} (0 GPUs are visible, but 1 were promised)" in lab.sweep("submit", more)
    job = lab.queued("sick")[0].split("|")[0]
    assert f"ExcNodeList={bad}" in lab.slurm("scontrol", "show", "job", job)
    lab.sweep("cancel", more, "--yes")
    until(lambda: not lab.queued("sick"))
