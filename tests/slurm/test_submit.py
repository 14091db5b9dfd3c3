"""A submission sends the right runs, each once, and limits jobs at the same time.

The queue is a file, a set of stand-ins for SLURM's programs, or a real SLURM.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from file_queue import FileQueue

from embedscale.cli import main
from embedscale.errors import UserError
from slurm import submit as submit_module
from slurm.plan import plan_sweep
from slurm.submit import Wish, submit


def in_jobs(queue: FileQueue) -> list[list[str]]:
    """The runs of each job in the queue."""
    return [each["runs"] for each in queue.read()["jobs"].values()]


def in_queue(queue: FileQueue) -> list[str]:
    """The runs of all jobs in the queue."""
    return [run_id for job in in_jobs(queue) for run_id in job]


def test_a_run_that_cannot_be_run_is_not_submitted(queued_sweep, capsys):
    sweep, queue = queued_sweep("axes: {budget: [1e15, 1e9]}\nbackbones: [EleutherAI/pythia-14m]", "some")
    assert submit(sweep, plan_sweep(sweep), queue, Wish()) == 1
    assert [sweep.by_id[run_id].budget for run_id in in_queue(queue)] == [1e15]
    assert "some: 2 runs: 1 cannot be run, 1 missing; 1 to submit" in capsys.readouterr().out


def test_no_run_is_submitted_twice_and_a_removed_one_is_submitted_again(queued_sweep, capsys):
    sweep, queue = queued_sweep("axes: {budget: 1e15, training.seed: [0, 1, 2]}", bundle_minutes=0)
    plan = plan_sweep(sweep)
    assert submit(sweep, plan, queue, Wish()) == 3
    assert submit(sweep, plan, queue, Wish()) == 0
    assert sorted(in_queue(queue)) == sorted(sweep.by_id)
    (lost,) = queue.read()["jobs"]["100_1"]["runs"]
    queue.cancel(["100_1"])
    assert submit(sweep, plan, queue, Wish()) == 1
    assert in_jobs(queue)[-1] == [lost]
    assert "1 missing, 2 queued; 1 to submit" in capsys.readouterr().out


def test_gpus_of_queued_jobs_are_not_given_to_a_later_submit(queued_sweep):
    """At most two of three jobs with 4 GPUs may run (8 of 9 GPUs). The next array waits for them or takes one GPU."""
    classes = {"classes": [{"name": "wide", "gpus": 4}], "bundle_minutes": 0, "max_gpus": 9}
    sweep, queue = queued_sweep("axes: {budget: 1e15, training.seed: [0, 1, 2]}", **classes)
    submit(sweep, plan_sweep(sweep), queue, Wish())
    assert {each["parallel"] for each in queue.read()["jobs"].values()} == {2}
    more, _ = queued_sweep("axes: {budget: 1e15, training.seed: [3, 4]}", **classes)
    submit(more, plan_sweep(more), queue, Wish())
    assert [each["after"] for each in queue.read()["jobs"].values()] == [[], [], [], ["100"], ["100"]]
    for handle in ("100_0", "100_1"):
        queue.end(handle)
    queue.cancel(["101_0", "101_1"])
    submit(more, plan_sweep(more), queue, Wish())
    assert [each["after"] for each in queue.read()["jobs"].values()] == [[], [], []], "one job left of 100: 4 GPUs held"


def test_nothing_is_submitted_to_a_silent_or_refusing_queue(queued_sweep, capsys):
    sweep, queue = queued_sweep("axes: {budget: 1e15}")
    queue.write(answers=False)
    with pytest.raises(UserError, match="the queue cannot be asked; nothing was submitted"):
        submit(sweep, plan_sweep(sweep), queue, Wish())
    assert submit(sweep, plan_sweep(sweep), queue, Wish(dry=True)) == 1
    printed = capsys.readouterr().out
    assert "the queue cannot be asked; shown as if no job of yours were in it" in printed
    assert "would submit 1 run as 1 job" in printed
    queue.write(answers=True, refusal="too many jobs")
    with pytest.raises(UserError, match="too many jobs; submitted before: none; submit again for the rest"):
        submit(sweep, plan_sweep(sweep), queue, Wish())
    assert in_jobs(queue) == []


def test_to_names_the_scheduler_or_this_machine(queued_sweep, tmp_path, capsys):
    queued_sweep("axes: {budget: 1e15}")
    assert main(["sweep", "submit", str(tmp_path / "small.yaml"), "--to", "slurm"]) == 2
    assert "--to: 'slurm' is unknown; allowed: file, here" in capsys.readouterr().err
    assert main(["sweep", "submit", str(tmp_path / "small.yaml"), "--to", "file"]) == 0
    assert "submitted 1 run as 1 job in 1 array: 100" in capsys.readouterr().out
    queued_sweep("axes: {budget: 1e15}", scheduler="sge")
    assert main(["sweep", "submit", str(tmp_path / "small.yaml")]) == 2
    assert "scheduler: 'sge' is unknown; allowed: slurm, here, file" in capsys.readouterr().err


def test_a_time_limit_below_the_warning_is_refused(queued_sweep):
    """SLURM counts whole minutes, so 1.2 minutes become two."""
    sweep, queue = queued_sweep("axes: {budget: 1e15}", warning_seconds=120, classes=[{"name": "brief", "hours": 0.02}])
    with pytest.raises(UserError, match="warning_seconds: 120 s before the end of a job of 2 minutes leave no time"):
        submit(sweep, plan_sweep(sweep), queue, Wish())


def test_a_time_limit_below_the_warning_is_found_before_anything_is_sent(queued_sweep):
    classes = [{"name": "small", "up_to": 1e7}, {"name": "brief", "hours": 0.02}]
    backbones = "backbones: [EleutherAI/pythia-14m, EleutherAI/pythia-70m]"
    sweep, queue = queued_sweep(f"axes: {{budget: 1e15}}\n{backbones}", warning_seconds=120, classes=classes)
    for dry in (True, False):
        with pytest.raises(UserError, match=r"warning_seconds: 120 s before .* lower it or raise classes.hours$"):
            submit(sweep, plan_sweep(sweep), queue, Wish(dry=dry))
        assert in_jobs(queue) == []


@pytest.mark.slow
def test_a_sweep_runs_with_a_file_as_scheduler(queued_sweep, tiny_run, capsys):
    base = "{" + ", ".join(word.replace("=", ": ", 1) for word in tiny_run) + "}"
    shape = {"name": "cpu", "gpus": 0, "cpus": 1, "memory_gb": 1, "hours": 1}
    text = f"base: {base}\naxes: {{budget: 1e9, training.seed: [0, 1]}}\nmethods: [full, bias]"
    sweep, queue = queued_sweep(text, classes=[shape], bundle_minutes=1)
    assert submit(sweep, plan_sweep(sweep), queue, Wish()) == 4
    assert len(in_jobs(queue)) == 1, "short runs share a job"
    printed = queue.work_off()
    assert submit(sweep, plan_sweep(sweep), queue, Wish()) == 0
    assert "4 done; 0 to submit" in capsys.readouterr().out, printed
    assert queue.read()["ended"] == {"100.0": "COMPLETED"}
    assert "4 runs on file-node" in printed[0]


TOOK = "Submitted batch job 7"


def path_with(folder: Path, **scripts: str) -> dict[str, str]:
    """Return a PATH that begins with these shell scripts."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_submission_from_a_job_passes_on_nothing_of_that_job(laptop, tmp_path):
    said = tmp_path / "said"
    path = path_with(
        tmp_path / "bin",
        sbatch=f'env > {said}.env; cp "${{@: -1}}" {said}.sh; echo "{TOOK}"',
        squeue="",
        srun="",
        scontrol="echo 'MaxArraySize            = 1001'",
    )
    inherited = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "3", "SBATCH_EXPORT": "NONE", "PMIX_RANK": "0"}
    inherited |= {"SRUN_DEBUG": "3", "SLURM_CONF": "/etc/slurm.conf", "RANK": "1"}
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
    assert not re.search(r"^(SLURM_(?!CONF)|SRUN_|SBATCH_|PMI|RANK=)", environment, re.M)
    assert "SLURM_CONF=/etc/slurm.conf" in environment
    script = Path(f"{said}.sh").read_text()
    wanted = """--array=0-2%3 --cpus-per-task=3 --nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --mem=8000M --time=90
        --partition=long --constraint=a100 --account=lab --qos=low --signal=USR2@75 --requeue"""
    assert {f"#SBATCH {word}" for word in wanted.split()} <= set(script.splitlines())
    assert "ignored: SBATCH_EXPORT; the cluster file says what jobs ask for" in output
    assert re.search(r"^srun .*--cpus-per-task=3", script, re.M)
    assert "module load cuda\n" in script and "export HF_HUB_OFFLINE=1\n" in script
    copy = Path(re.search(r"export PYTHONPATH=(\S+)", script)[1])
    assert (copy / "slurm" / "submit.py").read_bytes() == (Path(submit_module.__file__)).read_bytes()
    assert json.loads((copy / "code.json").read_text()).keys() == {"digest", "commit", "dirty", "time"}
    assert (copy / "difference.patch").exists()


def test_variables_of_sbatch_say_where_jobs_go_unless_the_cluster_file_does(laptop, tmp_path):
    script = tmp_path / "script"
    path = path_with(tmp_path / "bin", sbatch=f'cp "${{@: -1}}" {script}; echo "{TOOK}"', squeue="", srun="")
    variables = {"SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "short", "SBATCH_QOS": "high", "SBATCH_TIMELIMIT": "1"}
    sweep = laptop.write("places", cluster={"qos": "low"}, axes={"budget": [1e9]}, methods=["full"])
    output = laptop.sweep("submit", sweep, env=path | variables)
    assert "ignored: SBATCH_TIMELIMIT;" in output
    asked = script.read_text().splitlines()
    wanted = ("--account=mine", "--partition=short", "--qos=low", "--time=60")
    assert {f"#SBATCH {word}" for word in wanted} <= set(asked)


@pytest.mark.parametrize("setting", ["partition", "account", "qos", "classes.partition", "classes.constraint"])
def test_no_text_of_a_cluster_file_becomes_a_directive(laptop, capsys, setting):
    *section, name = setting.split(".")
    given = {name: "a100\n#SBATCH --exclusive"}
    more = {"classes": given} if section else {"cluster": given}
    sweep = laptop.write("odd", axes={"budget": [1e9]}, methods=["full"], **more)
    assert main(["sweep", "submit", str(sweep), "--to", "slurm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{setting}: 'a100\\n#SBATCH --exclusive' is not one word" in line


def test_an_array_without_free_gpus_waits_for_earlier_ones(laptop, tmp_path):
    count = f"n=$(ls {tmp_path} | grep -c said)"
    sbatch = f'{count}; cp "${{@: -1}}" {tmp_path}/said.$n; echo "Submitted batch job 4$n"'
    path = path_with(tmp_path / "bin", sbatch=sbatch, squeue="", srun="", scontrol="echo 'MaxArraySize = 1'")
    file = {"axes": {"budget": [1e9], "training.seed": [0, 1, 2]}, "methods": ["full"], "cluster": {"max_gpus": 2}}
    assert "3 jobs in 3 arrays: 40, 41, 42" in laptop.sweep("submit", laptop.write("queue", **file), env=path)
    scripts = [(tmp_path / f"said.{number}").read_text() for number in range(3)]
    assert [re.findall(r"--dependency=(\S+)", script) for script in scripts] == [[], [], ["afterany:40"]]


def test_without_squeue_nothing_is_submitted(laptop, tmp_path):
    path = path_with(tmp_path / "bin", sbatch="echo 'Submitted batch job 7'", srun="", squeue="exit 1")
    sweep = laptop.write("blind", axes={"budget": [1e9]}, methods=["full"])
    assert "the queue cannot be asked; nothing was submitted" in laptop.sweep("submit", sweep, env=path, code=2)
    path = path_with(tmp_path / "full", sbatch="echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1", srun="")
    path = path_with(tmp_path / "idle", squeue="") | {"PATH": f"{tmp_path}/idle:{path['PATH']}"}
    output = laptop.sweep("submit", sweep, env=path, code=2)
    assert "QOSMaxSubmitJobPerUserLimit; submitted before: none" in output


def test_a_submit_that_lost_its_lease_sends_nothing_more(laptop, tmp_path):
    """A submit that was suspended for minutes loses its lease; the other submit sends the rest."""
    lease = tmp_path / "runs" / "late" / ".submissions" / "submit.lease"
    other = json.dumps({"host": "elsewhere", "pid": 1, "token": "other"})
    taken_over = f"echo '{other}' > {lease}; echo 'Submitted batch job 7'"
    path = path_with(tmp_path / "bin", sbatch=taken_over, squeue="", srun="", scontrol="echo 'MaxArraySize = 1'")
    sweep = laptop.write("late", axes={"budget": [1e9], "training.seed": [0, 1, 2]}, methods=["full"])
    output = laptop.sweep("submit", sweep, env=path, code=2)
    assert "another one has taken over" in output and "submitted before: 7" in output
    assert json.loads(lease.read_text())["token"] == "other"


def sleepers(lab, name, seeds, **cluster):
    """Write a sweep whose jobs only wait, for tests of the queue."""
    told = f"{lab.folder}/{name}.$SLURM_JOB_ID"
    setup = [f"env > {told}.part", f"mv {told}.part {told}.env", "sleep 600"]  # a reader never finds half a file
    cluster = {"setup": setup, "max_gpus": 8} | cluster
    axes = {"budget": [1e9], "training.seed": list(range(seeds))}
    return lab.write(name, axes=axes, methods=["full"], cluster=cluster)


def test_nothing_is_submitted_twice_and_cancelled_runs_are_submitted_again(lab, until):
    sweep = sleepers(lab, "once", 6)
    both = [lab.start("submit", sweep) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 0], [0, 2]), outputs
    assert len(lab.queued("once")) == 6, outputs
    for output in outputs:
        assert "submitted 6 runs" in output or "0 to submit" in output or "another process is" in output
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
    lab = wide_lab  # its 32 cores would allow 32 jobs at once
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


def test_submit_works_inside_a_job(lab, until):
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
def test_a_job_whose_number_sbatch_did_not_return_is_found_by_name(lab, tmp_path, until):
    error = "sbatch: error: Socket timed out on send/recv operation"
    text = f'{shutil.which("sbatch")} "$@" > /dev/null; echo "{error}" >&2; exit 1'
    sweep = lab.write("lost", axes={"budget": [1e9], "training.seed": [0, 1]}, methods=["full"])
    output = lab.sweep("submit", sweep, env=path_with(tmp_path / "bin", sbatch=text))
    assert re.search(r"sbatch failed, but job \d+ is in the queue", output) and "submitted 2 runs" in output
    assert "2 queued; 0 to submit" in output or "0 to submit" in lab.sweep("submit", sweep)
    assert "2 runs" in lab.sweep("watch", sweep, "--every", "1")  # until all runs are done
    assert "2 done; 0 to submit" in lab.sweep("submit", sweep), lab.log("lost")
    assert [len(directory.read_attempts()) for directory in lab.directories("lost")] == [1, 1]
