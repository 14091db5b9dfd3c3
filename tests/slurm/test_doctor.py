"""The doctor finds faults: in packages, on the disk, and in the answers of SLURM's programs (stand-ins)."""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedscale.cli import main
from slurm import doctor
from slurm.cluster import Cluster, ResourceClass
from slurm.scheduler.site import gpus_of, hours_of

CONFIG = """Configuration data as of 2026-01-01T00:00:00
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = trial
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
PreemptMode             = REQUEUE
SLURM_VERSION           = 22.05.8
"""
PARTITIONS = (
    "PartitionName=low AllowGroups=ALL Default=YES GraceTime=60 MaxTime=1-00:00:00 PreemptMode=REQUEUE State=UP\n"
    "PartitionName=high AllowGroups=ALL Default=NO GraceTime=0 MaxTime=UNLIMITED PreemptMode=OFF State=UP"
)
NODES = (
    "NodeName=n1 Arch=x86_64 CPUTot=16 AvailableFeatures=a100,ib Gres=gpu:a100:4(S:0-1) RealMemory=128000 "
    "State=IDLE Partitions=low,high\n"
    "NodeName=n2 Arch=x86_64 CPUTot=4 AvailableFeatures=(null) Gres=(null) RealMemory=8000 State=IDLE Partitions=high"
)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Put stand-ins for SLURM's commands on the PATH; scontrol(config=…) changes the answers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))  # this machine may have a SLURM of its own
    for name in ("sh", "cat", "env", "grep"):
        (folder / name).symlink_to(shutil.which(name, path="/usr/bin:/bin"))

    def write(config: str = CONFIG, partitions: str = PARTITIONS, nodes: str = NODES, **others: str) -> Path:
        for name, text in {"config": config, "partition": partitions, "node": nodes}.items():
            (folder / f"{name}.txt").write_text(text)
        script = f'#!/bin/sh\nfor last; do :; done\ncat "{folder}/$last.txt"\n'
        bodies = dict.fromkeys(("sbatch", "srun", "squeue", "scancel", "sacct", "sacctmgr"), "#!/bin/sh\n")
        for name, body in (bodies | {"scontrol": script} | others).items():
            (folder / name).write_text(body)
            (folder / name).chmod(0o755)
        return folder

    return write


def asked(cluster: Cluster) -> dict[str, doctor.Finding]:
    return {each.subject: each for each in doctor.site(cluster, Path("runs"))}


def one_class(**settings) -> Cluster:
    return Cluster(classes=[ResourceClass("it", **settings)])


def test_a_correct_cluster_passes_every_check(scontrol):
    scontrol()
    found = asked(one_class(gpus=4, cpus=4, memory_gb=32, hours=24, constraint="a100"))
    assert [each.text for each in found.values() if not each.fine] == []
    assert found["controller"].text == "trial, SLURM 22.05.8"
    assert found["class it"].text.startswith("fits partition low")
    assert found["preemption in low"].text == "REQUEUE, 60 s from SIGTERM to SIGKILL"
    assert "preemption in high" not in found


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"hours": 25}, "25 h are more than its limit: set hours to at most 24"),
        ({"gpus": 5, "cpus": 1, "memory_gb": 1}, "no node has 5 GPU"),
        ({"cpus": 17}, "no node has 17 cores"),
        ({"memory_gb": 129}, "no node has 129 GB"),
        ({"constraint": "h100"}, "no node has the feature 'h100'"),
        ({"partition": "hgih"}, "partition 'hgih' is unknown; set `partition` in the cluster file: high, low"),
    ],
)
def test_a_class_that_does_not_fit_gets_advice(scontrol, settings, complaint):
    scontrol()
    finding = asked(one_class(**settings))["class it"]
    assert not finding.fine
    assert complaint in finding.text


@pytest.mark.parametrize(
    "old, new, subject, complaint",
    [
        ("JobRequeue              = 1", "JobRequeue = 0", "requeue", "set `requeue: false`"),
        ("KillWait                = 30 sec", "KillWait = 300 sec", "time limit", "KillWait 300 s"),
        ("= 1001", "= 0", "arrays", "are off"),
    ],
)
def test_settings_of_the_site_are_compared_with_the_cluster_file(scontrol, old, new, subject, complaint):
    scontrol(config=CONFIG.replace(old, new))
    finding = asked(one_class())[subject]
    assert not finding.fine
    assert complaint in finding.text


def test_a_short_grace_time_is_reported(scontrol):
    scontrol(partitions=PARTITIONS.replace("GraceTime=60", "GraceTime=5"))
    finding = asked(one_class())["preemption in low"]
    assert not finding.fine and "5 s from SIGTERM to SIGKILL" in finding.text


def test_a_site_without_requeue_passes_if_the_cluster_file_says_so(scontrol):
    scontrol(config=CONFIG.replace("JobRequeue              = 1", "JobRequeue = 0"))
    assert asked(Cluster(requeue=False, classes=[ResourceClass("it")]))["requeue"].fine


def test_missing_accounting_passes_and_silent_accounting_fails(scontrol):
    scontrol(config=CONFIG.replace("accounting_storage/slurmdbd", "accounting_storage/none"))
    assert asked(one_class())["accounting"].text.startswith("off")
    scontrol(sacct="#!/bin/sh\nexit 1\n")
    assert not asked(one_class())["accounting"].fine


def test_a_missing_command_is_reported_with_its_consequence(scontrol):
    folder = scontrol()
    (folder / "sacct").unlink()
    assert "why a job ended without a message stays unknown" in asked(one_class())["sacct"].text
    (folder / "scontrol").unlink()
    found = asked(one_class())
    assert not found["scontrol"].fine
    assert not found["controller"].fine


def test_without_slurm_one_line_says_so_and_passes(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = doctor.site(Cluster(), Path("runs"))
    assert finding.fine and "this machine alone" in finding.text


@pytest.mark.parametrize(
    "limit, hours", [("UNLIMITED", float("inf")), ("02:30:00", 2.5), ("3-12:00:00", 84), ("00:00:36", 0.01)]
)
def test_time_limits_are_read(limit, hours):
    assert hours_of(limit) == pytest.approx(hours)


@pytest.mark.parametrize(
    "gres, count", [("(null)", 0), ("gpu:4", 4), ("gpu:a100:8(S:0-1)", 8), ("gpu:a:2,gpu:b:1,nvme:1", 3), ("gpu", 1)]
)
def test_gpus_of_a_node_are_counted(gres, count):
    assert gpus_of(gres) == count


def test_this_installation_passes():
    found = list(doctor.installation())
    assert all(each.fine for each in found), found
    assert any(f"lightning {metadata.version('lightning')}" in each.text for each in found)


def install(folder: Path, name: str, version: str, *requirements: str) -> None:
    """Install a package as pip does; its modules note when they are imported."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (about / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requirements)]) + "\n")
    (folder / f"{name}.py").write_text(f"open({str(folder / 'imported')!r}, 'w')\n")


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_compromised_lightning_is_refused_without_importing_it(tmp_path, monkeypatch, capsys, version):
    install(tmp_path, "lightning", version)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the processes that import torch and transformers
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert f"lightning {version}" in text and "malware" in text
    assert "GPU" not in text and "offline loading" not in text, "a later check could have imported it"
    assert main(["doctor", "--json"]) == 1
    found = {row["subject"]: row["fine"] for row in json.loads(capsys.readouterr().out)}
    assert found["python"] and not found[f"lightning {version}"]
    assert not (tmp_path / "imported").exists()


def test_an_old_or_missing_package_is_named(tmp_path, monkeypatch):
    install(tmp_path, "embedscale", "0.0", "not-installed-here", "scipy>=1000")
    monkeypatch.syspath_prepend(tmp_path)
    packages = next(each for each in doctor.installation() if each.subject == "packages")
    assert not packages.fine
    assert "not-installed-here is missing" in packages.text
    assert f"scipy {metadata.version('scipy')} is not >=1000" in packages.text


@pytest.mark.slow
def test_backbones_load_without_a_network_and_a_missing_one_is_named(backbone_folder):
    found = {each.subject: each for each in doctor.offline([str(backbone_folder), "EleutherAI/pythia-14m"])}
    assert found["offline loading"].fine
    assert found["offline loading"].text == "a saved model and 1 backbones load with every connection refused"
    assert not found["backbones"].fine
    assert "not on this disk: EleutherAI/pythia-14m; run `embedscale sweep prefetch`" in found["backbones"].text


@pytest.mark.parametrize(
    ("free", "text"),
    [
        (25e9, "writes, links and renames; 25 GB free"),
        (9e9, "writes, links and renames; 9 GB free: free some space; `embedscale sweep plan` says how much is needed"),
    ],
)
def test_the_file_system_check_counts_the_space_and_leaves_no_files(tmp_path, monkeypatch, free, text):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    (finding,) = doctor.file_system(tmp_path / "runs" / "not" / "yet")
    assert (finding.fine, finding.text) == (free > 1e10, text)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    (finding,) = doctor.file_system(tmp_path)
    assert not finding.fine and "Operation not supported" in finding.text
    assert list(tmp_path.iterdir()) == []


def test_the_allowed_cores_are_counted(monkeypatch):
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        (one,) = doctor.affinity(1)
        (two,) = doctor.affinity(2)
    finally:
        os.sched_setaffinity(0, before)
    assert one.fine and one.text.startswith("1 of ")
    assert not two.fine and "srun needs --cpus-per-task" in two.text


@pytest.mark.slow
def test_a_node_is_checked_through_srun(scontrol, tmp_path, monkeypatch):
    """The stand-in for srun runs the check on this machine."""
    log = tmp_path / "srun.log"
    folder = scontrol(
        srun=f'#!/bin/sh\necho "$*" > {log}\nenv | grep -c ^SLURM_ >> {log}\n'
        'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
    )
    monkeypatch.setenv("SLURM_CPU_BIND", "mask_cpu:0x1")
    cluster = Cluster(partition="low", classes=[ResourceClass("it", gpus=0, cpus=1, memory_gb=2)])
    found = {each.subject: each for each in doctor.on_node(cluster, tmp_path / "runs")}
    assert found["a node of it: shared file system"].fine
    assert found["a node of it: affinity"].fine
    assert found["a node of it: offline loading"].fine
    assert found["a node of it: scontrol"].fine
    words, leaked = log.read_text().splitlines()
    assert "--cpus-per-task=1 --mem=2000M --partition=low" in words
    assert leaked == "0"
    assert list((tmp_path / "runs").iterdir()) == []
    (folder / "srun").write_text("#!/bin/sh\necho 'srun: error: Unable to allocate resources' >&2\nexit 1\n")
    (finding,) = doctor.on_node(cluster, tmp_path / "runs")
    assert not finding.fine and "Unable to allocate resources" in finding.text
