"""The status comes from run directories, then the queue, then accounting; here the queue is a file."""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from file_queue import FileQueue
from records import record
from rich.console import Console

from embedscale.cli import main
from embedscale.errors import UserError
from embedscale.files import now
from embedscale.process import ProcessName
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import leased
from embedscale.run.record import AttemptRecord, RunRecord
from slurm import grid
from slurm.plan import plan_sweep
from slurm.scheduler.scheduler import Job
from slurm.scheduler.submissions import Submission, Submissions
from slurm.status import RunState, explained, render, survey, wasted_hours, watch
from slurm.submit import Wish, submit

HOUR = timedelta(hours=1)
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def sweep(queued_sweep):
    return queued_sweep("axes: {budget: 1e15, training.seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}")[0]


@pytest.fixture
def queue(sweep):
    return FileQueue(sweep.folder)


def attempt(directory: RunDirectory, start: float, hours: float | None, **facts) -> None:
    begun = directory.begin_attempt()
    end = {} if hours is None else {"end": (BEGIN + (start + hours) * HOUR).isoformat()}
    begun.write(start=(BEGIN + start * HOUR).isoformat(), **end, **facts)


def finish(directory: RunDirectory, status: str = "done", **facts) -> None:
    attempts = directory.read_attempts()
    known = {"gpu_hours": 2.0, "spent_flop": 999, "budget_flop": 1000.0} | facts
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.write_record(replace(RunRecord.from_json(record()), status=status, attempts=attempts, **known))


def directories(sweep) -> list[RunDirectory]:
    return [RunDirectory(sweep.folder / run_id) for run_id in sweep.by_id]


def test_each_state_follows_from_directory_and_queue(sweep):
    job = Job("71", "70", 1, "x", reason="Priority")
    done, diverged, failed, retried, stopped, requeued, killed, queued, _, running = directories(sweep)
    finish(done)
    attempt(diverged, 0, 1, ended="diverged", reason="loss is nan")
    finish(diverged, "diverged")
    for each in (failed, retried):
        attempt(each, 0, 1, ended="failed", reason="ValueError: broken")
    for each in (stopped, requeued):
        attempt(each, 0, 1, ended="interrupted", reason="SIGTERM", from_flop=0, to_flop=500)
    attempt(killed, 0, None, from_flop=0)
    attempt(running, 0, 1, ended="interrupted", from_flop=0, to_flop=500)
    running.begin_attempt()
    with leased(running.lease) as lease:
        lease.report(step=7, steps=10, spent_flop=700, budget_flop=1000.0, seconds_left=60.0)
        lease.beat()
        jobs = {each.path.name: job for each in (retried, requeued, queued)}
        found = {each.run_id: each for each in survey(sweep, jobs)}
    states = [found[each.path.name].state for each in directories(sweep)]
    assert states[:5] == ["done", "diverged", "failed", "preempted", "interrupted"]
    assert states[5:] == ["preempted", "interrupted", "queued", "missing", "running"]
    assert set(states) == set(RunState) - {RunState.DAMAGED}
    at_it = found[running.path.name]
    assert (at_it.spent_flop, at_it.seconds_left, at_it.attempts, at_it.host) == (700, 60.0, 2, socket.gethostname())
    assert found[stopped.path.name].spent_flop == 500
    assert found[failed.path.name].reason == "ValueError: broken"
    assert found[killed.path.name].reason == "ended without a message"
    assert found[queued.path.name].reason == "Priority"
    # After the process has ended, its run waits for the next submit.
    assert {each.run_id: each.state for each in survey(sweep, {})}[running.path.name] == "interrupted"


def test_a_record_counts_more_than_the_queue(sweep):
    done = directories(sweep)[0]
    finish(done)
    job = Job("71", "70", 1, "x", running=True, host="n1")
    assert survey(sweep, {done.path.name: job})[0].state == "done"


def test_a_run_has_failed_even_while_its_job_goes_on_with_others(sweep):
    run = directories(sweep)[0]
    attempt(run, 0, 1, ended="failed", reason="ValueError: broken", job_id="71")

    def state(job_id, running):
        return survey(sweep, {run.path.name: Job(job_id, "70", 1, "x", running)})[0].state

    assert state("71", running=True) == "failed"
    assert state("71", running=False) == "preempted", "requeued, the job begins with it again"
    assert state("80", running=False) == state("80", running=True) == "preempted", "--retry-failed sent it out anew"


def test_a_lease_without_a_heartbeat_is_not_a_running_run(sweep):
    run = directories(sweep)[0]
    run.begin_attempt()
    run.lease.write_text(json.dumps({"host": "another-node", "pid": 1, "start": now()}))
    assert survey(sweep, {})[0].state == "running"
    past = time.time() - 3600
    os.utime(run.lease, (past, past))
    assert survey(sweep, {})[0].state == "interrupted"


@pytest.mark.parametrize(
    "attempts, wasted",
    [
        ([(2.0, 0, 100, "done")], 0.0),
        ([(1.0, 0, 50, "interrupted"), (1.0, 50, 100, "done")], 0.0),  # everything was saved
        ([(2.0, 0, 50, "interrupted"), (3.0, 25, 100, "done")], 1.0),  # half was saved
        ([(1.0, 0, 10, "failed"), (5.0, 0, 100, "done")], 1.0),  # nothing was saved
        ([(1.5, 0, None, "killed"), (4.0, 20, 100, "done")], 0.5),  # 20 of 100 were saved, at 20 per hour
        ([(1.5, 0, None, "killed"), (5.0, 0, 100, "done")], 1.5),
        ([(1.0, 0, 40, "failed")], 1.0),
        ([(0.25, None, None, "killed"), (1.0, 0, 10, "done")], 0.25),
        ([], 0.0),
    ],
)
def test_wasted_hours_are_hours_of_repeated_work(attempts, wasted):
    rows = []
    for number, (hours, began, reached, ended) in enumerate(attempts):
        start = BEGIN + number * 10 * HOUR
        row = {"start": start.isoformat(), "end": (start + hours * HOUR).isoformat(), "ended": ended}
        rows.append(AttemptRecord(number, **row, from_flop=began, to_flop=reached))
    assert wasted_hours(rows) == pytest.approx(wasted)


def test_hours_count_every_device(tmp_path):
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("classes: [{gpus: 4}]")
    file = tmp_path / "wide.yaml"
    file.write_text(f"output: {tmp_path / 'runs'}\ncluster: {cluster}\naxes: {{budget: 1e15}}")
    wide = grid.load(file)
    run = directories(wide)[0]
    attempt(run, 0, 2, ended="interrupted", from_flop=0, to_flop=100)
    attempt(run, 3, 1, ended="interrupted", from_flop=50, to_flop=150)
    (found,) = survey(wide, {})
    assert (found.device_hours, found.wasted_hours) == (12.0, 4.0)


def test_shared_device_hours_are_counted_once(sweep):
    run = directories(sweep)[0]
    attempt(run, 0, 2, ended="interrupted", from_flop=0, to_flop=100, sharing=4)
    attempt(run, 3, 1, ended="interrupted", from_flop=50, to_flop=150)
    assert (survey(sweep, {})[0].device_hours, survey(sweep, {})[0].wasted_hours) == (1.5, 0.25)


def test_an_attempt_without_an_end_gains_no_hours(sweep):
    run = directories(sweep)[0]
    attempt(run, 0, None)
    run.begin_attempt()
    with leased(run.lease):
        assert survey(sweep, {})[0].device_hours < 1


def note(sweep, name: str, *tasks: list[str]) -> list[dict]:
    """Note a submission whose jobs wait in the queue, and return the jobs."""
    Submissions(sweep.folder).note(Submission(name, list(tasks)))
    return [{"id": "100", "array": "100", "task": task, "name": name} for task in range(len(tasks))]


def test_the_queue_is_read_by_submission_and_task(sweep, queue):
    first, second, third, *_ = sweep.by_id
    jobs = note(sweep, "small-1", [first], [second, third])
    note(sweep, "small-2", ["gone"])
    jobs += [jobs[1] | {"name": "of someone else"}, jobs[1] | {"task": 7}]
    queue.write(jobs={str(number): {"job": job} for number, job in enumerate(jobs)})
    queue.start("0")
    found = Submissions(sweep.folder).jobs_by_run(queue.jobs())
    assert {run_id: job.id for run_id, job in found.items()} == {first: "100.0", second: "100", third: "100"}
    assert found[first].running and not found[second].running
    assert [each.state for each in survey(sweep, found)[:4]] == ["queued", "queued", "queued", "missing"]


def test_without_a_queue_the_directories_give_the_status(sweep, queue, capsys, tmp_path):
    queue.write(answers=False)
    finish(directories(sweep)[0])
    assert main(["sweep", "status", str(tmp_path / "small.yaml")]) == 0
    assert "cannot be asked" not in capsys.readouterr().out, "nothing was submitted, so nothing waits there"
    note(sweep, "small-1", list(sweep.by_id))
    assert Submissions(sweep.folder).jobs_by_run(queue.jobs()) is None
    assert main(["sweep", "status", str(tmp_path / "small.yaml")]) == 0
    text = capsys.readouterr().out
    assert "The queue of file cannot be asked from this machine" in text
    assert "done" in text and "missing" in text


def test_accounting_explains_an_end_without_a_message(sweep, queue):
    run = directories(sweep)[0]
    attempt(run, 0, None, job_id="77")
    assert explained(survey(sweep, {}), queue)[0].reason == "ended without a message"
    queue.write(ended={"77": "NODE_FAIL", "78": "COMPLETED"})
    assert explained(survey(sweep, {}), queue)[0].reason == "ended without a message; accounting says NODE_FAIL"


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_explains_states_in_a_narrow_terminal(sweep, width):
    attempt(directories(sweep)[0], 0, 1, ended="failed", reason="ValueError: broken")
    with leased(directories(sweep)[0].lease) as lease:
        lease.beat()
        statuses = survey(sweep, {})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(sweep, plan_sweep(sweep), statuses, {}))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any("running" in line and "a process works on it" in line for line in lines)
    assert any(statuses[0].run_id in line for line in lines)


def test_only_run_directories_count_as_other_runs(sweep, tmp_path, capsys):
    for name in ("fits.json", "runs.csv", "figures/loss.png"):
        (sweep.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (sweep.folder / name).touch()
    assert main(["sweep", "status", str(tmp_path / "small.yaml")]) == 0
    assert "other run" not in capsys.readouterr().out
    attempt(RunDirectory(sweep.folder / "of_another_file"), 0, 1, ended="failed")
    assert main(["sweep", "status", str(tmp_path / "small.yaml")]) == 0
    assert "1 other run in" in capsys.readouterr().out


def test_failures_are_grouped_by_reason(sweep, capsys):
    for number, run in enumerate(directories(sweep)[:5]):
        attempt(run, 0, 1, ended="failed", reason="RuntimeError: out of memory" if number < 4 else "OSError: disk full")
    console = Console(width=150, record=True)
    console.print(render(sweep, plan_sweep(sweep), survey(sweep, {}), {}))
    lines = [line for line in console.export_text().splitlines() if "Error" in line]
    assert [line.split()[1] for line in lines] == ["4", "1"]
    assert "out of memory" in lines[0] and f"{socket.gethostname()} (4)" in lines[0]


def test_the_estimate_is_shown_beside_the_used_hours(sweep, capsys, tmp_path):
    finish(directories(sweep)[0], gpu_hours=7.25)
    assert main(["sweep", "status", str(tmp_path / "small.yaml")]) == 0
    estimated = plan_sweep(sweep).estimates[0].gpu_hours
    text = capsys.readouterr().out
    assert f"Estimate: {estimated:,.2f} device-hours for the 1 run done; 7.25 were used." in text


def test_watch_ends_when_all_runs_have_ended(sweep, tmp_path, capsys):
    for run in directories(sweep):
        finish(run)
    args = argparse.Namespace(sweep=tmp_path / "small.yaml", words=[], every=0.01)
    assert watch(args) == 0
    assert "go on with" not in capsys.readouterr().out
    args.every = 0.0
    with pytest.raises(UserError, match="--every: 0"):
        watch(args)


def looks_of_watch(file: Path, monkeypatch, most: int = 2) -> int:
    """Return how often `watch` looked again; it is stopped at `most`, as by Ctrl-C."""
    looks = []

    def between(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == most:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", between)
    assert main(["sweep", "watch", str(file)]) == 0
    return len(looks)


def test_watch_waits_for_processes_of_this_machine_and_for_no_note_of_another(sweep, tmp_path, monkeypatch, capsys):
    file, submissions = tmp_path / "small.yaml", Submissions(sweep.folder)
    own = submissions.announce(ProcessName.of_this_process())
    assert looks_of_watch(file, monkeypatch) == 2, "it has not begun its first run"
    own.unlink()
    submissions.announce(replace(ProcessName.of_this_process(), boot="of a container that is gone"))
    assert looks_of_watch(file, monkeypatch) == 0
    for run in directories(sweep):
        finish(run)
    submissions.announce(ProcessName.of_this_process())
    assert looks_of_watch(file, monkeypatch) == 0, "all runs have ended"


def test_watch_of_a_silent_queue_waits_only_for_runs_that_it_may_hold(queued_sweep, tmp_path, monkeypatch, capsys):
    sweep, queue = queued_sweep("axes: {budget: [1e15, 1e9]}")
    queue.write(answers=False)
    assert looks_of_watch(tmp_path / "small.yaml", monkeypatch) == 0, "nothing was submitted"
    possible, _ = sweep.by_id
    note(sweep, "small-1", [possible])
    assert looks_of_watch(tmp_path / "small.yaml", monkeypatch) == 2
    finish(RunDirectory(sweep.folder / possible))
    assert looks_of_watch(tmp_path / "small.yaml", monkeypatch) == 0, "the other run cannot be run"


def test_watch_into_a_file_prints_a_line_when_a_state_changes_and_ends_when_nothing_waits(
    sweep, queue, tmp_path, monkeypatch, capsys
):
    submit(sweep, plan_sweep(sweep), queue, Wish())
    capsys.readouterr()
    looks = []

    def between(seconds: float) -> None:  # a look without a change, then one job begins, then all leave the queue
        looks.append(seconds)
        if len(looks) == 2:
            finish(directories(sweep)[0])
        if len(looks) == 4:
            for handle in list(queue.read()["jobs"]):
                queue.end(handle)

    monkeypatch.setattr(time, "sleep", between)
    assert main(["sweep", "watch", str(tmp_path / "small.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second, *rest = lines
    assert first.endswith(" small: 10 queued") and second.endswith(" small: 9 queued, 1 done")
    assert rest[0].startswith("small: 10 runs in") and len(looks) == 4
    assert lines[-1] == "nothing runs or waits; `embedscale sweep submit` goes on with the rest"


def test_the_paths_of_a_failed_runs_messages_are_shown_whole(sweep, tmp_path, capsys):
    failed, diverged, _, *_ = directories(sweep)
    attempt(failed, 0, 1, ended="failed", reason="RuntimeError: broken")
    attempt(diverged, 0, 1, ended="diverged", reason="the loss was nan")
    finish(diverged, "diverged")
    for directory in (failed, diverged):
        directory.attempt(1).traceback.write_text("Traceback")
        directory.log(1).touch()
    assert main(["sweep", "status", str(tmp_path / "small.yaml")]) == 0
    printed = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert main(["sweep", "status", str(tmp_path / "small.yaml"), "--json"]) == 0
    runs = {row["run_id"]: row for row in json.loads(capsys.readouterr().out)["runs"]}
    for directory in (failed, diverged):
        paths = [str(directory.attempt(1).traceback), str(directory.log(1))]
        assert set(paths) <= printed and runs[directory.path.name]["messages"] == paths
    assert runs[failed.path.name]["state"] == "failed" and len(runs) == 10


def test_ten_thousand_directories_take_under_five_seconds(queued_sweep, tmp_path, capsys):
    seeds, budgets = list(range(100)), [1e15 + 1e12 * i for i in range(100)]
    large, _ = queued_sweep(f"axes: {{budget: {budgets}, training.seed: {seeds}}}", "large")
    file = tmp_path / "large.yaml"
    interrupted = {"number": 1, "start": BEGIN.isoformat(), "end": (BEGIN + HOUR).isoformat(), "ended": "interrupted"}
    interrupted |= {"host": "n1", "from_flop": 0, "to_flop": 500, "reason": "SIGTERM"}
    done = record(attempts=[interrupted] * 3, versions={str(n): "1.2.3" for n in range(100)})
    for number, run_id in enumerate(large.by_id):
        folder = large.folder / run_id
        (folder / "attempts" / "1").mkdir(parents=True)
        (folder / "attempts" / "1" / "attempt.json").write_text(json.dumps(interrupted))
        if number % 2:
            (folder / "record.json").write_text(json.dumps(done))
    # Processor time of the whole command, because a busy machine may take longer by the clock. It is compared with
    # the time in which plain Python reads the files, because other machines are slower.
    before = time.process_time()
    for name in ("attempts/1/attempt.json", "record.json"):
        for path in large.folder.glob(f"*/{name}"):
            json.loads(path.read_text())
    plain = time.process_time() - before
    before = time.process_time()
    assert main(["sweep", "status", str(file)]) == 0
    assert time.process_time() - before < max(5, 6 * plain)
    counts = [line.split() for line in capsys.readouterr().out.splitlines() if "5,000" in line]
    assert [row[1] for row in counts[:2]] == ["interrupted", "done"]


def test_watch_ends_when_its_reader_leaves(queued_sweep, tmp_path):
    queued_sweep("axes: {budget: 1e15}", scheduler="here")
    words = [sys.executable, "-m", "embedscale.cli", "sweep", "watch", str(tmp_path / "small.yaml"), "--every", "0.2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        try:
            assert process.wait(120) == 0 and process.stderr.read() == ""
        finally:
            process.kill()
