"""What goes out, in how many jobs, how many at once, and never twice: on a real SLURM and against false ones."""

import json
import os
import random
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest

from embedscale.errors import UserError
from embedscale.run.config import Resources, RunConfig, Training
from slurm import grid
from slurm.cluster import Cluster, ResourceClass
from slurm.plan import Estimate, plan_sweep
from slurm.scheduler import queue
from slurm.scheduler.queue import Job
from slurm.submit import Array, _held, arrange, reconcile, throttles

SMALL = ResourceClass("small", gpus=1, cpus=4, hours=4)
LARGE = ResourceClass("large", gpus=2, cpus=8, hours=24)


def estimates(count, seconds, shape=SMALL, devices=1):
    runs = [RunConfig(training=Training(seed=i), resources=Resources(devices=devices)) for i in range(count)]
    return [Estimate(run, f"{run.run_id}-{shape.name}", shape, seconds=seconds) for run in runs]


def test_six_hundred_runs_of_a_minute_are_ten_jobs():
    arrays = arrange(estimates(600, 60.0), Cluster(bundle_minutes=60))
    (array,) = arrays
    assert [len(task) for task in array.tasks] == [60] * 10
    assert len({run_id for task in array.tasks for run_id in task}) == 600
    (side_by_side,) = arrange(estimates(600, 60.0), Cluster(bundle_minutes=60, side_by_side=5))
    assert len(side_by_side.tasks) == 2
    brief = ResourceClass("brief", gpus=1, cpus=4, hours=0.5)
    (within_the_limit,) = arrange(estimates(600, 60.0, brief), Cluster(bundle_minutes=60))
    assert [len(task) for task in within_the_limit.tasks] == [24] * 25  # of 30 minutes, a fifth is spared


def test_long_runs_and_runs_of_several_gpus_have_a_job_each():
    together = estimates(3, 7200.0) + estimates(3, 60.0) + estimates(3, 60.0, LARGE, devices=2)
    arrays = arrange(together, Cluster(bundle_minutes=60))
    assert [(array.gpus, [len(task) for task in array.tasks]) for array in arrays] == [
        (1, [1, 1, 1, 3]),
        (2, [1, 1, 1]),
    ]


def test_classes_that_ask_for_the_same_share_an_array():
    alike = ResourceClass("other name", up_to=1e9, gpus=1, cpus=4, hours=4, utilisation=0.2)
    (array,) = arrange(estimates(2, 7200.0) + estimates(2, 7200.0, alike), Cluster())
    assert len(array.tasks) == 4


@pytest.mark.parametrize(("runs", "largest"), [(2500, 1001), (1001, 1001), (1002, 1001), (5, 1)])
def test_arrays_are_split_and_add_up(runs, largest):
    arrays = arrange(estimates(runs, 7200.0), Cluster(), largest)
    assert sum(len(array.tasks) for array in arrays) == runs
    assert max(len(array.tasks) for array in arrays) <= largest
    assert len({run for array in arrays for task in array.tasks for run in task}) == runs


def worst_case(arrays, limits, held, rng):
    """The most GPUs ever held, where arrays hold all that they may until they end, in any order."""
    holding, ended, most = dict(held), set(), 0
    waiting = {
        f"#{i}": (parallel * array.gpus, after)
        for i, (array, (parallel, after)) in enumerate(zip(arrays, limits, strict=True))
    }
    while holding or waiting:
        for name, (gpus, after) in list(waiting.items()):
            if ended >= set(after):
                holding[name] = gpus
                del waiting[name]
        most = max(most, sum(holding.values()))
        assert holding, f"nothing can ever begin of {waiting}"
        ended.add(name := rng.choice(sorted(holding)))
        del holding[name]
    return most


def test_all_arrays_together_stay_within_the_throttle():
    rng = random.Random(0)
    for _ in range(500):
        most = rng.randint(1, 64)
        arrays = [
            Array(SMALL, 1, rng.choice([d for d in (1, 2, 4, 8) if d <= most]), [["run"]] * rng.randint(1, 50))
            for _ in range(rng.randint(1, 12))
        ]
        held = [("41", rng.randint(1, most))] if rng.random() < 0.5 else []
        limits = throttles(arrays, most, held)
        assert worst_case(arrays, limits, held, rng) <= most
        assert all(parallel >= 1 for parallel, _ in limits)
    assert [p for p, _ in throttles([Array(SMALL, 1, 1, [["r"]] * n) for n in (834, 833, 833)], 8, [])] == [2, 3, 3]
    with pytest.raises(UserError, match=r"max_gpus: 4 are fewer than the 8"):
        throttles([Array(LARGE, 1, 8, [["run"]])], 4, [])


def test_what_cannot_be_run_is_not_sent_out(tmp_path, capsys):
    file = tmp_path / "some.yaml"
    file.write_text(f"output: {tmp_path}\naxes: {{budget: [1e15, 1e9]}}\nbackbones: [EleutherAI/pythia-14m]")
    sweep = grid.load(file)
    assert [each.run.budget for each in reconcile(sweep, plan_sweep(sweep), {})] == [1e15]
    assert "some: 2 runs: 1 cannot be run, 1 missing; 1 to submit" in capsys.readouterr().out


def test_an_array_in_the_queue_holds_what_may_still_run_of_it(tmp_path):
    queue.note_submission(tmp_path, "wide", [["a", "b"], ["c"], ["d"]], parallel=2, gpus=4)
    queue.note_submission(tmp_path, "narrow", [["e"]], parallel=1, gpus=1)
    tasks = [Job("8", "7", index, "wide", "PENDING", "", None) for index in range(3)]
    other = Job("9", "9", None, "narrow", "RUNNING", "n1", None)
    jobs = {"a": tasks[0], "b": tasks[0], "c": tasks[1], "d": tasks[2], "e": other}
    assert sorted(_held(tmp_path, jobs)) == [("7", 8), ("9", 1)]
    assert _held(tmp_path, {"d": tasks[2]}) == [("7", 4)]


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """A PATH that begins with these shell scripts."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_job_is_asked_for_without_a_trace_of_the_one_that_we_are_in(laptop, tmp_path):
    said = tmp_path / "said"
    path = programs(
        tmp_path / "bin",
        sbatch=f'env > {said}.env; cp "$1" {said}.sh; echo "Submitted batch job 7"',
        squeue="",
        srun="",
        scontrol="echo 'MaxArraySize            = 1001'",
    )
    inherited = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "3", "SBATCH_EXPORT": "NONE", "PMIX_RANK": "0"}
    inherited |= {"SRUN_DEBUG": "3", "SUBMITIT_EXECUTOR": "slurm", "SLURM_CONF": "/etc/slurm.conf", "RANK": "1"}
    sweep = laptop.write(
        "asks",
        base={"resources.devices": 2},
        classes={"gpus": 2, "cpus": 3, "memory_gb": 4, "hours": 1.5, "partition": "long", "constraint": "a100"},
        cluster={"account": "lab", "qos": "low", "warning_seconds": 75, "setup": ["module load cuda"], "max_gpus": 8},
        axes={"budget": [1e9], "training.seed": [0, 1, 2]},
        methods=["full"],
    )
    output = laptop.sweep("submit", sweep, env=path | inherited)
    assert "3 missing; 3 to submit" in output and "submitted 3 runs as 3 jobs" in output
    environment = Path(f"{said}.env").read_text()
    assert not re.search(r"^(SLURM_(?!CONF)|SRUN_|SBATCH_|SUBMITIT_|PMI|RANK=)", environment, re.M)
    assert "SLURM_CONF=/etc/slurm.conf" in environment
    script = Path(f"{said}.sh").read_text()
    wanted = """--array=0-2%3 --cpus-per-task=3 --nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --mem=8000M --time=90
        --partition=long --constraint=a100 --account=lab --qos=low --signal=USR2@75 --requeue"""
    assert {f"#SBATCH {each}" for each in wanted.split()} <= set(script.splitlines())
    assert re.search(r"^srun .*--cpus-per-task=3", script, re.M)
    assert "module load cuda\n" in script and "export HF_HUB_OFFLINE=1\n" in script
    copy = Path(re.search(r"export PYTHONPATH=(\S+)", script)[1])
    assert (copy / "slurm" / "submit.py").read_bytes() == (Path(sys.modules[Array.__module__].__file__)).read_bytes()
    assert json.loads((copy / "code.json").read_text()).keys() == {"digest", "commit", "dirty", "time"}
    assert (copy / "difference.patch").exists()
    pickles = list((laptop.folder / "runs" / "asks" / ".submissions").glob("asks-*/7_*_submitted.pkl"))
    assert len(pickles) == 3 and all(b"RunConfig" not in file.read_bytes() for file in pickles)
    assert not any(each.stat().st_mode & stat.S_IXOTH for each in pickles)


def test_an_array_for_which_nothing_is_left_waits_for_those_before_it(laptop, tmp_path):
    count = f"n=$(ls {tmp_path} | grep -c said)"
    sbatch = f'{count}; cp "$1" {tmp_path}/said.$n; echo "Submitted batch job 4$n"'
    path = programs(tmp_path / "bin", sbatch=sbatch, squeue="", srun="", scontrol="echo 'MaxArraySize = 1'")
    file = {"axes": {"budget": [1e9], "training.seed": [0, 1, 2]}, "methods": ["full"], "cluster": {"max_gpus": 2}}
    assert "3 jobs in 3 arrays: 40, 41, 42" in laptop.sweep("submit", laptop.write("queue", **file), env=path)
    scripts = [(tmp_path / f"said.{number}").read_text() for number in range(3)]
    assert [re.findall(r"--dependency=(\S+)", script) for script in scripts] == [[], [], ["afterany:40"]]


def test_without_a_queue_to_look_at_nothing_is_submitted(laptop, tmp_path):
    path = programs(tmp_path / "bin", sbatch="echo 'Submitted batch job 7'", srun="", squeue="exit 1")
    sweep = laptop.write("blind", axes={"budget": [1e9]}, methods=["full"])
    assert "nothing was submitted" in laptop.sweep("submit", sweep, env=path, code=2)
    path = programs(tmp_path / "full", sbatch="echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1", srun="")
    path = programs(tmp_path / "idle", squeue="") | {"PATH": f"{tmp_path}/idle:{path['PATH']}"}
    output = laptop.sweep("submit", sweep, env=path, code=2)
    assert "QOSMaxSubmitJobPerUserLimit; submitted before: none" in output


def test_a_submit_that_another_has_taken_over_from_sends_nothing_more(laptop, tmp_path):
    """As it may where the first was suspended for minutes: what it has not sent, the other one sends."""
    lease = tmp_path / "runs" / "late" / ".submissions" / "submit.lease"
    other = json.dumps({"host": "elsewhere", "pid": 1, "token": "other"})
    taken_over = f"echo '{other}' > {lease}; echo 'Submitted batch job 7'"
    path = programs(tmp_path / "bin", sbatch=taken_over, squeue="", srun="", scontrol="echo 'MaxArraySize = 1'")
    sweep = laptop.write("late", axes={"budget": [1e9], "training.seed": [0, 1, 2]}, methods=["full"])
    output = laptop.sweep("submit", sweep, env=path, code=2)
    assert "has taken over from this one" in output and "submitted before: 7" in output
    assert json.loads(lease.read_text())["token"] == "other"


def sleepers(lab, name, seeds, **cluster):
    """A sweep whose jobs only wait: for tests of the queue alone."""
    told = f"{lab.folder}/{name}.$SLURM_JOB_ID"
    setup = [f"env > {told}.part", f"mv {told}.part {told}.env", "sleep 600"]  # never half a file
    cluster = {"setup": setup, "max_gpus": 8} | cluster
    axes = {"budget": [1e9], "training.seed": list(range(seeds))}
    return lab.write(name, axes=axes, methods=["full"], cluster=cluster)


def test_nothing_is_submitted_twice_and_cancelled_runs_go_out_again(lab, until):
    sweep = sleepers(lab, "once", 6)
    both = [lab.start("submit", sweep) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 0], [0, 2]), outputs
    assert len(lab.queued("once")) == 6, outputs
    for output in outputs:
        assert "submitted 6 runs" in output or "0 to submit" in output or "another submit" in output
    assert "6 queued; 0 to submit" in lab.sweep("submit", sweep)
    lab.sweep("cancel", sweep, "--yes")
    until(lambda: not lab.queued("once"))
    assert "6 missing; 6 to submit" in lab.sweep("submit", sweep)
    assert len(lab.queued("once")) == 6
    lab.sweep("cancel", sweep, "--yes")


def test_cancel_of_a_part_leaves_the_rest_in_the_queue(lab, until):
    sweep = sleepers(lab, "part", 6, max_gpus=2)
    lab.sweep("submit", sweep)
    until(lambda: len(lab.queued("part", "RUNNING")) == 2)
    output = lab.sweep("cancel", sweep, "axes.training.seed=[4,5]", "--yes")
    assert "2 jobs with 2 runs" in output
    until(lambda: len(lab.queued("part")) == 4)
    assert "2 missing, 4 queued; 2 to submit" in lab.sweep("submit", sweep, "--max-gpu-hours", "0", code=2)


def test_2500_runs_in_arrays_of_1001_at_most_eight_at_once(wide_lab, until):
    lab = wide_lab  # whose 32 cores would let 32 of them run
    sweep = sleepers(lab, "many", 2500, setup=["sleep 1.$((RANDOM % 10))", "exit"])
    output = lab.sweep("submit", sweep)
    assert "submitted 2,500 runs as 2,500 jobs in 3 arrays" in output
    noted = (json.loads(file.read_text()) for file in (lab.folder / "runs/many/.submissions").glob("many-*.json"))
    arrays = {each["job_id"]: len(each["tasks"]) for each in noted}
    assert sum(arrays.values()) == 2500 and len(arrays) == 3 and max(arrays.values()) <= 1001
    most, seen = 0, set()

    def enough():
        nonlocal most, seen
        running = {line.split("|")[0] for line in lab.queued("many", "RUNNING")}
        most, seen = max(most, len(running)), seen | running
        return most >= 8 and len(seen) > 30 and {task.split("_")[0] for task in seen} == set(arrays)

    until(enough, what=lambda: f"{most} at once, {sorted(seen)}")  # each array has a part of the throttle
    assert most == 8


def test_submit_works_from_inside_a_job(lab, until):
    sweep = sleepers(lab, "inner", 2)
    command = f"{sys.executable} -m embedscale.cli sweep submit {sweep}"
    printed = lab.folder / "outer.out"
    printed.touch()
    words = ["--ntasks=2", "--cpus-per-task=2", "--mem=2000M", f"--output={printed}"]
    outer = lab.slurm("sbatch", "--parsable", "--export=ALL,SLURM_CPU_BIND=none", *words, f"--wrap={command}")

    def begun():
        return "submitted 2 runs" in printed.read_text() and sorted(lab.folder.glob("inner.*.env"))

    found = until(begun, 240, printed.read_text)
    inner = dict(line.split("=", 1) for line in found[0].read_text().splitlines() if "=" in line)
    assert inner["SLURM_JOB_ID"] != outer and inner["SLURM_CPUS_PER_TASK"] == "1" and inner["SLURM_NTASKS"] == "1"
    assert "SLURM_CPU_BIND" not in inner


@pytest.mark.slow
def test_a_job_that_sbatch_lost_sight_of_is_found_by_its_name(lab, tmp_path, until):
    error = "sbatch: error: Socket timed out on send/recv operation"
    text = f'{shutil.which("sbatch")} "$@" > /dev/null; echo "{error}" >&2; exit 1'
    sweep = lab.write("lost", axes={"budget": [1e9], "training.seed": [0, 1]}, methods=["full"])
    output = lab.sweep("submit", sweep, env=programs(tmp_path / "bin", sbatch=text))
    assert re.search(r"sbatch failed, but job \d+ is in the queue", output) and "submitted 2 runs" in output
    assert "2 queued; 0 to submit" in output or "0 to submit" in lab.sweep("submit", sweep)
    assert "2 runs" in lab.sweep("watch", sweep, "--every", "1")  # until all is done
    assert "2 done; 0 to submit" in lab.sweep("submit", sweep), lab.log("lost")
    assert [len(directory.read_attempts()) for directory in lab.directories("lost")] == [1, 1]
