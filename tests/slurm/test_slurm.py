"""`Slurm` reads the answers of SLURM's programs; stand-ins print what the programs print."""

import signal
from pathlib import Path

import pytest

from embedscale.errors import UserError
from slurm.scheduler import slurm
from slurm.scheduler.scheduler import Job, Limits, Requeue
from slurm.scheduler.slurm import Slurm

QUEUE = """101|100|0|RUNNING|n1|None|small-1
100|100|1|PENDING||Resources|small-1
102|100|2|COMPLETING|n2|None|small-1
555|555|N/A|RUNNING|n2|None|someone|else"""


def test_the_queue_is_read_job_by_job(tmp_path, programs):
    programs(squeue=QUEUE)
    assert Slurm(tmp_path).jobs() == [
        Job("101", "100", 0, "small-1", running=True, host="n1"),
        Job("100", "100", 1, "small-1", reason="Resources"),
        Job("102", "100", 2, "small-1", running=True, host="n2"),
        Job("555", "555", None, "someone|else", running=True, host="n2"),
    ]
    assert [job.handle for job in Slurm(tmp_path).jobs()] == ["100_0", "100_1", "100_2", "555"]


@pytest.mark.parametrize("squeue", [None, 1, 127])
def test_without_an_answer_the_queue_is_none(tmp_path, programs, squeue):
    if squeue is not None:
        programs(squeue=squeue)
    assert Slurm(tmp_path).jobs() is None


def test_accounting_says_how_jobs_ended(tmp_path, programs):
    assert Slurm(tmp_path).accounting(["77"]) == {}
    calls = programs(sacct="77|NODE_FAIL\n78|CANCELLED by 1000\nno row")
    assert Slurm(tmp_path).accounting(["77", "78"]) == {"77": "NODE_FAIL", "78": "CANCELLED"}
    assert "--jobs=77,78" in calls.read_text()
    programs(sacct=1)
    assert Slurm(tmp_path).accounting(["77"]) == {}


def test_cancel_names_the_jobs_and_says_when_scancel_refuses(tmp_path, programs):
    calls = programs(scancel="")
    Slurm(tmp_path).cancel(["100_0", "7"])
    assert "scancel 100_0 7\n" in calls.read_text()
    programs(scancel=1)
    with pytest.raises(UserError, match="scancel"):
        Slurm(tmp_path).cancel(["7"])


def test_limits_are_those_of_slurm_and_none_without_sbatch(tmp_path, programs):
    assert Slurm(tmp_path).limits() is None
    programs(sbatch="")
    assert Slurm(tmp_path).limits() == Limits(1001)
    programs(scontrol="AccountingStorageType = none\nMaxArraySize            = 300")
    assert Slurm(tmp_path).limits() == Limits(300)


def test_scontrol_survives_the_signal_of_its_own_requeue(tmp_path, programs):
    calls = programs(scontrol="")
    (calls.parent / "scontrol").write_text("#!/bin/sh\nkill -TERM $$\nkill -USR2 $$\necho JobState=RUNNING\n")
    assert Slurm(tmp_path).requeue("7") == Requeue.ACCEPTED
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "a blocked signal would no longer stop the run"


def refuses(folder: Path, shown: str) -> None:
    """A stand-in for scontrol that shows a job, or fails if there is nothing to show, and refuses everything else."""
    (folder / "scontrol").write_text(
        f'#!/bin/sh\n[ "$2" = show ] && [ -n "{shown}" ] && echo "{shown}" && exit 0\nexit 1\n'
    )
    (folder / "scontrol").chmod(0o755)


@pytest.mark.parametrize(
    ("shown", "answer"),
    [
        ("JobState=RUNNING PreemptTime=None", Requeue.REFUSED),
        ("JobState=RUNNING PreemptTime=2026-01-01T00:00:00", Requeue.PREEMPTED),
        ("JobState=CANCELLED", Requeue.OVER),
        (None, Requeue.UNREACHABLE),
        ("", Requeue.AWAY),
    ],
)
def test_a_refused_requeue_gives_the_reason(tmp_path, programs, shown, answer):
    if shown is not None:
        refuses(tmp_path / "bin", shown)
    assert Slurm(tmp_path).requeue("7") == answer


def test_a_requeued_job_and_its_array_avoid_sick_nodes(tmp_path, programs):
    calls = programs(scontrol="JobState=RUNNING")
    assert Slurm(tmp_path).requeue("7_3", ["n1", "n2"]) == Requeue.ACCEPTED
    said = [line.removeprefix("scontrol ") for line in calls.read_text().splitlines()]
    assert said[1:] == ["requeue 7_3", "update JobId=7_3 ExcNodeList=n1,n2", "update JobId=7 ExcNodeList=n1,n2"]


def test_the_allocation_is_read_from_the_variables_of_the_job(tmp_path, programs, monkeypatch):
    """Processes of one job agree on a port, and a requeued job takes another one."""
    variables = {"JOB_ID": 9, "NTASKS": 4, "JOB_NUM_NODES": 2, "PROCID": 3, "LOCALID": 1, "NODEID": 1}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    found = Slurm(tmp_path).allocation()
    assert (found.job, found.node, found.end) == ("9", "n2", None)
    assert (found.rank, found.local_rank, found.node_rank, found.processes, found.nodes) == (3, 1, 1, 4, 2)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert Slurm(tmp_path).allocation().port == found.port
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert Slurm(tmp_path).allocation().port != found.port
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    programs(scontrol="JobId=9 EndTime=2026-01-01T00:00:00+00:00")
    found = Slurm(tmp_path).allocation()
    assert (found.job, found.end) == ("8_5", 1767225600.0)


def test_a_command_that_hangs_is_named_once_and_not_asked_again(tmp_path, programs, monkeypatch, capsys):
    """As squeue does for minutes on a machine without a slurm.conf."""
    calls = programs(squeue="")
    (calls.parent / "squeue").write_text(f"#!/bin/sh\necho squeue >> {calls}\nexec /bin/sleep 60\n")
    monkeypatch.setattr(slurm, "QUERY_SECONDS", 0.5)
    monkeypatch.setattr(slurm, "_SILENT", set())
    assert Slurm(tmp_path).jobs() is None and Slurm(tmp_path).jobs() is None
    assert capsys.readouterr().err.splitlines() == [
        "squeue: no answer within 0.5 s; is SLURM configured on this machine?"
    ]
    assert calls.read_text() == "squeue\n"
