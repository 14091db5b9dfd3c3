"""`sweep cancel` asks first and cancels only the jobs of this sweep file; the queue is a file."""

import subprocess
import sys

import pytest
from file_queue import FileQueue

from embedscale.cli import main
from slurm.scheduler.submissions import Submission, Submissions


@pytest.fixture
def sweep(queued_sweep):
    return queued_sweep("axes: {budget: 1e15, training.seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}")[0]


def in_queue(sweep, **submissions: list[list[str]]) -> FileQueue:
    """Return a queue with the waiting jobs of these submissions: small_1=[[run, …], …] is array number 1."""
    jobs = {}
    for name, tasks in submissions.items():
        number = name.split("_")[1]
        Submissions(sweep.folder).note(Submission(name, tasks))
        for task in range(len(tasks)):
            job = {"id": number, "array": number, "task": task, "name": name}
            jobs[f"{number}_{task}"] = {"job": job}
    queue = FileQueue(sweep.folder)
    queue.write(jobs=jobs)
    return queue


def test_cancel_ends_only_jobs_of_this_sweep_and_reports_a_refusal(sweep, tmp_path, capsys):
    file = str(tmp_path / "small.yaml")
    assert main(["sweep", "cancel", file]) == 0
    assert "nothing to cancel" in capsys.readouterr().out
    first, second, *_ = sweep.by_id
    queue = in_queue(sweep, small_1=[[first], [second]], other_2=[["of another sweep"]])
    queue.start("1_0")
    assert main(["sweep", "cancel", file, "--yes"]) == 0
    said = capsys.readouterr().out
    assert "2 jobs with 2 runs, 1 of them in jobs that run now" in said and "cancelled 2 jobs" in said
    assert list(queue.read()["jobs"]) == ["2_0"]
    queue = in_queue(sweep, small_1=[[first]])
    queue.write(refusal="not today")
    assert main(["sweep", "cancel", file, "--yes"]) == 2
    assert "not today" in capsys.readouterr().err
    queue.write(answers=False)
    assert main(["sweep", "cancel", file, "--yes"]) == 2
    assert "the queue cannot be asked from this machine; nothing was cancelled" in capsys.readouterr().err


def test_cancel_of_some_runs_ends_their_jobs_and_names_other_runs_in_them(sweep, tmp_path, capsys):
    runs = list(sweep.by_id)

    def cancelled(*seeds):
        queue = in_queue(sweep, small_1=[[runs[0]], [runs[1]], runs[2:5]], small_2=[[runs[5]]])
        words = [str(tmp_path / "small.yaml"), f"axes.training.seed=[{','.join(map(str, seeds))}]"]
        assert main(["sweep", "cancel", *words, "--yes"]) == 0
        return {"1_0", "1_1", "1_2", "2_0"} - set(queue.read()["jobs"]), capsys.readouterr().out

    assert cancelled(1)[0] == {"1_1"}
    handles, said = cancelled(0, 2, 5)
    assert handles == {"1_0", "1_2", "2_0"}
    assert "3 jobs with 5 runs, 0 of them in jobs that run now; 2 of these runs are not in this command" in said
    assert "not asked for" not in cancelled(0, 1)[1]


def test_cancel_asks_first(queued_sweep, tmp_path, programs):
    """The command runs in another process and reads the answer from a pipe."""
    sweep, _ = queued_sweep("axes: {budget: 1e15}", scheduler="slurm")
    Submissions(sweep.folder).note(Submission("small-1", [list(sweep.by_id)]))
    calls = programs(squeue="100|100|N/A|PENDING||None|small-1", scancel="")
    words = [sys.executable, "-m", "embedscale.cli", "sweep", "cancel", str(tmp_path / "small.yaml")]

    def answered(answer: str) -> subprocess.CompletedProcess:
        return subprocess.run(words, input=answer, capture_output=True, text=True)

    for answer in ("\n", "n\n", "no\n"):
        done = answered(answer)
        assert done.returncode == 0 and "nothing was cancelled" in done.stdout, done.stderr
    done = answered("")
    assert done.returncode == 2 and "add --yes" in done.stderr
    assert "scancel" not in calls.read_text()
    assert answered("y\n").returncode == 0
    assert "scancel 100\n" in calls.read_text()
