"""One damaged file gives one line about that file, and every other run goes on as before."""

import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from damage import CONTENTS, every_way
from file_queue import FileQueue
from records import record

from analysis import runs
from embedscale.cli import main
from embedscale.errors import UserError
from embedscale.run.config import Resources, RunConfig
from embedscale.run.directory import RunDirectory
from embedscale.run.stop import StopRequest
from slurm.plan import plan_sweep
from slurm.scheduler.processes import Place, run_all
from slurm.scheduler.submissions import Submission, Submissions
from slurm.status import ENDED, RunState, survey
from slurm.submit import Wish, submit

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
ATTEMPT = {"number": 1, "start": BEGIN.isoformat(), "end": (BEGIN + HOUR).isoformat(), "ended": "interrupted"}
ATTEMPT |= {"host": "n1", "pid": 7, "from_flop": 0, "from_step": 0, "to_flop": 500, "reason": "SIGTERM"}
LEASE = {"host": "n1", "pid": 7, "born": "1", "token": "t", "start": BEGIN.isoformat(), "time": BEGIN.isoformat()}
LEASE |= {"step": 1, "steps": 10, "spent_flop": 5, "budget_flop": 50.0, "tokens_per_second": 1.0, "seconds_left": 9.0}
FILES = {"record.json": record(attempts=[ATTEMPT]), "attempts/1/attempt.json": ATTEMPT, "lease.json": LEASE}


def write(directory: RunDirectory, name: str, value=None) -> None:
    path = directory.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(FILES[name] if value is None else value))


@pytest.fixture
def sweep(queued_sweep):
    return queued_sweep(f"axes: {{budget: 1e15, training.seed: {list(range(6))}}}")[0]


@pytest.fixture
def file(sweep, tmp_path):
    return str(tmp_path / "small.yaml")


def shown(record_property, what: str, seen: Counter[str]) -> None:
    """Let the test's summary say how many contents were tried."""
    record_property("shown", f"{what}: {seen.total()} contents, {seen['damaged']} damaged, {seen['readable']} readable")


def directories(sweep) -> list[RunDirectory]:
    return [RunDirectory(sweep.folder / run_id) for run_id in sweep.by_id]


@pytest.mark.parametrize("name", FILES)
def test_any_content_of_a_runs_file_gives_one_line_and_hides_no_other_run(sweep, file, capsys, name, record_property):
    seen: Counter[str] = Counter()
    sound, broken, *_ = directories(sweep)
    write(sound, "record.json", record(run_id=sound.path.name))
    write(broken, name)
    for how, content in every_way(broken.path / name, random.Random(0), values=60):
        (broken.path / name).write_bytes(content)
        assert main(["sweep", "status", file]) == 0, how
        printed = capsys.readouterr()
        about = [line for line in printed.out.splitlines() if str(broken.path / name) in line]
        found = {each.run_id: each for each in survey(sweep, {})}
        state = found[broken.path.name].state
        seen["damaged" if state == RunState.DAMAGED else "readable"] += 1
        assert len(about) == (state == RunState.DAMAGED) and "Traceback" not in printed.out + printed.err, how
        assert found[sound.path.name].state == RunState.DONE and len(found) == 6
        if how in CONTENTS and name != "lease.json":
            assert state == RunState.DAMAGED, how
    shown(record_property, name, seen)


def test_damaged_runs_are_named_and_not_sent_out_and_the_others_are(sweep, file, capsys):
    queue = FileQueue(sweep.folder)
    first, second, *_ = directories(sweep)
    write(first, "record.json", {})
    write(second, "attempts/1/attempt.json")
    (second.path / "attempts/1/attempt.json").write_text("")
    assert submit(sweep, plan_sweep(sweep), queue, Wish()) == 4
    printed = capsys.readouterr().out
    assert "2 damaged, 4 missing; 4 to submit" in printed
    assert f"damaged: {first.record}: the key 'format' is missing" in printed
    assert f"damaged: {second.attempt(1).file}: is not valid JSON" in printed
    assert not {first.path.name, second.path.name} & {
        run for job in queue.read()["jobs"].values() for run in job["runs"]
    }
    assert RunState.DAMAGED in ENDED, "watch does not wait for a run that goes on with nothing"


def test_watch_names_damaged_files_and_ends(sweep, file, capsys):
    first, second, *_ = directories(sweep)
    write(first, "record.json", {})
    write(second, "attempts/1/attempt.json", [])
    assert main(["sweep", "watch", file]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # without the folds of the terminal
    assert f"damaged: {first.record}: " in printed and f"damaged: {second.attempt(1).file}: " in printed


@pytest.mark.parametrize("reason", ["[/usr/lib/x]", "[bold]wide[/bold]", ":smiley: [link=x]"])
def test_every_letter_of_a_reason_is_printed(sweep, file, capsys, reason):
    write(directories(sweep)[0], "attempts/1/attempt.json", ATTEMPT | {"ended": "failed", "reason": reason})
    assert main(["sweep", "status", file]) == 0
    assert reason in capsys.readouterr().out


def test_damaged_files_of_submissions_are_named_and_left_out(sweep, file, capsys, record_property):
    seen: Counter[str] = Counter()
    submissions = Submissions(sweep.folder)
    submissions.note(Submission("small-1", [[next(iter(sweep.by_id))]]))
    submissions.note_sick("n1", "too little memory")
    (submissions.path / "n9-7.process").write_text(json.dumps({"host": "n9", "pid": 7, "born": "1"}))
    good = {path: path.read_bytes() for path in submissions.path.rglob("*") if path.is_file()}
    assert len(good) == 3
    for path in good:
        for how, content in every_way(path, random.Random(0), values=30):
            path.write_bytes(content)
            assert main(["sweep", "status", file]) == 0, how
            about = [line for line in capsys.readouterr().out.splitlines() if str(path) in line]
            assert len(about) == len(submissions.damaged()) <= 1
            assert about or how not in CONTENTS, how
            seen["damaged" if about else "readable"] += 1
            path.write_bytes(good[path])
    shown(record_property, "notes of submissions, sick nodes and processes", seen)


def test_runs_of_a_queued_job_whose_note_is_damaged_do_not_go_out_again(sweep):
    queue = FileQueue(sweep.folder)
    submit(sweep, plan_sweep(sweep), queue, Wish())
    (name,) = Submissions(sweep.folder).noted()
    (Submissions(sweep.folder).path / f"{name}.json").write_text("{")
    with pytest.raises(UserError, match="its job 100 is queued: cancel it, or wait for its end"):
        submit(sweep, plan_sweep(sweep), queue, Wish())
    for handle in queue.read()["jobs"]:
        queue.end(handle)
    assert submit(sweep, plan_sweep(sweep), queue, Wish()) == 6


def test_a_job_goes_on_with_its_other_runs(tmp_path, capsys):
    """Both runs fail, the first by its file and the second by its store: each for a reason of its own."""
    config = [RunConfig(output=str(tmp_path), budget=budget, resources=Resources()) for budget in (1e9, 2e9)]
    write(RunDirectory(config[0].folder), "record.json", [])
    assert run_all(config, [Place()], StopRequest()) == dict.fromkeys((run.run_id for run in config), "failed")
    assert f"{config[0].folder / 'record.json'}: [] was found; expected an object" in capsys.readouterr().out
    assert "data.store" in RunDirectory(config[1].folder).read_attempts()[0].reason


def test_fit_leaves_damaged_runs_out_and_names_their_files(tmp_path, record_property):
    seen: Counter[str] = Counter()
    for number in range(3):
        directory = RunDirectory(tmp_path / f"run-{number}")
        write(directory, "record.json", record(run_id=directory.path.name, loss=2.0 + number))
    whole = runs.load(tmp_path)
    broken = RunDirectory(tmp_path / "run-9")
    write(broken, "record.json")
    for how, content in every_way(broken.record, random.Random(1), values=60):
        broken.record.write_bytes(content)
        found = runs.load(tmp_path, where={"budget_flop": "1.5e15", "data": "pairs"} if "value" in how else None)
        assert {"run-0", "run-1", "run-2"} <= set(found.table["run"]), how
        if how in CONTENTS:
            assert found.table.equals(whole.table), how
            (left,) = found.excluded.to_dict("records")
            assert left["reason"] == "unreadable" and left["detail"].startswith("record.json: "), how
        seen["damaged" if len(found.excluded) else "readable"] += 1
    shown(record_property, "record.json, read by fit", seen)


@pytest.mark.parametrize("which", ["sweep", "cluster"])
def test_any_content_of_a_sweeps_files_is_one_line_that_names_it(sweep, file, tmp_path, capsys, which):
    path = tmp_path / {"sweep": "small.yaml", "cluster": "small.cluster.yaml"}[which]
    odd = {"tabs": b"\tname: x", "anchors": b"a: &a [*a]\n", "tag": b"name: !!python/object:os.system x\n"}
    odd |= {"a number of another kind": b"output: !!int x\n", "time": b"name: !!timestamp 2026-13-99\n"}
    lists = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 9))]
    odd |= {"null key": b"~: 1", "endless": "\n".join(lists).encode()}
    odd |= {"interpolation": b"name: ${x}\n", "bad interpolation": b"name: ${\n", "missing": b"name: ???\n"}
    for how, content in (CONTENTS | odd).items():
        path.write_bytes(content)
        code = main(["sweep", "status", file])
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == (code != 0) and all(line.startswith("embedscale: ") for line in printed), (how, printed)
        assert code == 0 or str(path) in printed[0], (how, printed)
