"""What a site wants of its jobs: options, containers, mail, a command at the end; dry runs; paths of files."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from embedscale.cli import main
from embedscale.errors import UserError
from embedscale.run.directory import RunDirectory
from slurm import cluster as clusters
from slurm import grid
from slurm.cluster import Cluster, ResourceClass
from slurm.scheduler.over import tell_if_over
from slurm.scheduler.submissions import Submissions

EXAMPLE = Path(__file__).parents[2] / "configs" / "cluster" / "example.yaml"
RUN = {"axes": {"budget": [1e9]}, "methods": ["full", "bias"]}


def test_the_example_has_every_setting():
    found = clusters.load(EXAMPLE)
    assert found.classes[0].gpu_type == "a100" and found.sbatch["exclusive"] == ""
    text = EXAMPLE.read_text()
    for kind in (Cluster, ResourceClass):
        assert not [item.name for item in fields(kind) if f"{item.name}:" not in text]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"time": "3"}, "sbatch.time: embedscale sets this option; classes.hours"),
        ({"array": "0-3"}, "sbatch.array: embedscale sets this option; it cannot be changed"),
        ({"--nice": "3"}, "sbatch: '--nice' is not the long name of an option"),
        ({"comment": "a\n#SBATCH --time=1"}, "sbatch.comment: 'a\\n#SBATCH --time=1' is given; expected a text"),
    ],
)
def test_options_that_embedscale_sets_are_refused(given, message):
    with pytest.raises(UserError) as raised:
        Cluster(sbatch=given)
    assert str(raised.value).startswith(message)


SITE = {
    "partition": "one,two",
    "sbatch": {"comment": "two words", "nice": "7", "exclusive": "", "exclude": "n9"},
    "command_prefix": 'container exec --bind "$HOME" image.sif',
    "python": "/opt/python",
}


@pytest.mark.parametrize("options", [{}, {"gres": "gpu:a100:2,nvme:1"}])
def test_a_dry_run_prints_the_script_and_writes_nothing(laptop, programs, capsys, options):
    """The options of the cluster file are directives, and the prefix stands before Python, for the shell to expand."""
    programs(sbatch=1, srun="", squeue="", scontrol="MaxArraySize            = 1001")
    site = SITE | {"sbatch": SITE["sbatch"] | options}
    sweep = laptop.write("dry", classes={"gpus": 2, "gpu_type": "h100"}, cluster=site, **RUN)
    assert main(["sweep", "submit", str(sweep), "name=dry", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = "--partition=one,two --comment='two words' --nice=7 --exclusive --exclude=n9"
    gpus = "--gres=gpu:a100:2,nvme:1" if options else "--gpus-per-node=h100:2"
    for word in [*wanted.replace("'two words'", "X").split(), gpus]:
        assert f"#SBATCH {word}".replace("X", "'two words'") in lines
    assert ("#SBATCH --gpus-per-node=h100:2" in lines) != bool(options)
    (command,) = (line for line in lines if line.startswith("srun "))
    assert ' container exec --bind "$HOME" image.sif /opt/python -u -c ' in command
    assert "# Shortened: in place of '(embedscale/code.py)', the script has the text of this file." in lines
    assert lines[-1] == "would submit 2 runs as 2 jobs in 1 array"
    assert sum(run.run_id in line for line in lines for run in grid.load(sweep).runs) == 2
    assert not (laptop.folder / "runs").exists()
    assert main(["sweep", "submit", str(sweep), "--to", "here", "--dry-run"]) == 0
    assert "would run 2 here, in this order:" in capsys.readouterr().out
    assert not (laptop.folder / "runs").exists()


def test_submit_suggests_the_users_own_words(queued_sweep, tmp_path, capsys):
    queued_sweep("axes: {budget: 1e15}")
    words = [str(tmp_path / "small.yaml"), "axes.budget=[1e15, 2e15]", "name=other"]
    assert main(["sweep", "submit", *words]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"embedscale sweep watch {tmp_path}/small.yaml 'axes.budget=[1e15, 2e15]' name=other"


def test_a_silent_controller_is_answered_with_this_machine(laptop, programs, capsys):
    programs(sbatch="", squeue=1)
    assert main(["sweep", "submit", str(laptop.write("blind", **RUN))]) == 2
    assert "or run the sweep on this machine: --to here" in capsys.readouterr().err


def test_a_file_names_others_from_its_own_folder(tmp_path, monkeypatch):
    """What is not there is looked for in the current folder, as before."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "near.yaml").write_text("max_gpus: 3\ncalibration: speeds.json\n")
    (tmp_path / "sweeps" / "speeds.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "far.yaml").write_text("max_gpus: 5\ncalibration: none.json\n")
    (tmp_path / "near.yaml").write_text("max_gpus: 7\n")
    monkeypatch.chdir(tmp_path)
    sweep = Path("sweeps/s.yaml")
    for name, gpus, words in (("near", 3, []), ("far", 5, []), ("far", 7, ["cluster=near.yaml"])):
        sweep.write_text(f"cluster: {name}.yaml\naxes: {{budget: 1e15}}\n")
        assert grid.load(sweep, words).cluster.max_gpus == gpus
    sweep.write_text("cluster: near.yaml\naxes: {budget: 1e15}\n")
    assert grid.load(sweep).cluster.calibration == "sweeps/speeds.json"
    assert clusters.load("far.yaml").calibration == "none.json"
    sweep.write_text("cluster: nowhere.yaml\naxes: {budget: 1e15}\n")
    with pytest.raises(UserError, match=rf"no such file in {tmp_path / 'sweeps'} and in {tmp_path};"):
        grid.load(sweep)


def test_the_command_at_the_end_is_run_once_and_not_before(tmp_path, capfd):
    told, submissions = tmp_path / "told", Submissions(tmp_path / "trial")
    command = f'cat >> {told}; echo "$EMBEDSCALE_SWEEP $EMBEDSCALE_FOLDER" >> {told}'
    tell_if_over(submissions, command, ["missing"], once=True)
    assert not told.exists()
    for _ in range(2):
        tell_if_over(submissions, command, [], once=True)
    assert told.read_text() == f"trial: \ntrial {tmp_path}/trial\n"
    tell_if_over(submissions, "exit 3", [])
    assert capfd.readouterr().err == "on_done: exit 3: exit status 3\n"
    damaged = RunDirectory(submissions.folder / "run").record
    damaged.parent.mkdir()
    damaged.write_text("{")
    tell_if_over(submissions, "cat", ["run"])
    assert capfd.readouterr().out == "trial: 1 damaged\n", "no submit touches it, so nobody waits for it"


@pytest.mark.slow
def test_a_sweep_here_tells_its_end(laptop):
    """A run that cannot be run is not waited for."""
    told = laptop.folder / "told"
    file = RUN | {"axes": {"budget": [1e9]}, "include": [{"budget": 1e3, "method.name": "full"}]}
    sweep = laptop.write("ends", cluster={"on_done": f"cat >> {told}"}, **file)
    said = laptop.sweep("submit", sweep, "--to", "here")
    assert re.search(r"done after \d+ s, held-out loss \d\.\d+ \(1 of 2, about \d+ s left\)\n", said)
    assert re.search(r"held-out loss \d\.\d+ \(2 of 2\)\n", said)
    assert told.read_text() == "ends: 2 done\n"


@pytest.mark.slow
def test_a_real_slurm_gets_all_that_a_cluster_file_says(lab, until):
    """Account, QOS, reservation, mail, comment, a prefix with a file system of its own, another Python, and the end."""
    lab.slurm("sacctmgr", "-i", "add", "account", "lab")
    lab.slurm("sacctmgr", "-i", "add", "qos", "urgent")
    lab.slurm("sacctmgr", "-i", "add", "user", "root", "account=lab", "qos=normal,urgent")
    lab.slurm(
        "scontrol",
        "create",
        "reservation",
        "ReservationName=school",
        "StartTime=now",
        "Duration=60",
        "Users=root",
        "Nodes=ALL",
    )
    python, told = lab.folder / "python", lab.folder / "told"
    python.write_text(
        f'#!/bin/sh\necho "$BOXED $(cat /mnt/box/name)" >> {lab.folder}/boxes\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    box = lab.folder / "box"
    box.write_text(
        '#!/bin/sh\nmount -t tmpfs none /mnt && mkdir /mnt/box && echo inside > /mnt/box/name && exec "$@"\n'
    )
    box.chmod(0o755)
    site = {
        "partition": "high,low",
        "account": "lab",
        "qos": "urgent",
        "sbatch": {"mail-type": "END", "mail-user": "me", "reservation": "school", "comment": "two words"},
        "command_prefix": f"env BOXED=yes unshare --mount {box}",
        "python": str(python),
        "on_done": f"cat >> {told}",
    }
    sweep = lab.write("site", cluster=site, **RUN)
    try:
        words = ["doctor", "--cluster", str(lab.folder / "site.cluster.yaml"), "--folder", str(lab.folder), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "embedscale.cli", *words], env=lab.environment, capture_output=True, text=True
        )
        found = {row["subject"]: row for row in json.loads(done.stdout)}
        assert found["class cpu"]["text"].startswith("fits partition high, low: ")
        assert found["submission of cpu"]["fine"], found["submission of cpu"]
        wrong = json.loads((lab.folder / "site.cluster.yaml").read_text()) | {"sbatch": {"reservation": "unheard"}}
        (lab.folder / "wrong.yaml").write_text(json.dumps(wrong))
        words[2] = str(lab.folder / "wrong.yaml")
        done = subprocess.run(
            [sys.executable, "-m", "embedscale.cli", *words], env=lab.environment, capture_output=True, text=True
        )
        (row,) = (row for row in json.loads(done.stdout) if row["subject"] == "submission of cpu")
        assert not row["fine"] and "reservation is invalid" in row["text"]
        assert "submitted 2 runs" in lab.sweep("submit", sweep)
        until(told.exists, 240, lambda: lab.log("site"))
        until(lambda: not lab.queued("site"), 120)
        assert told.read_text() == "site: 2 done\n"
        assert (lab.folder / "boxes").read_text() == "yes inside\n" * 2
        asked = ["--format=Account,QOS,Reservation", "--allocations", "--noheader", "--parsable2"]
        rows = until(lambda: [row for row in lab.slurm("sacct", *asked).splitlines() if "school" in row], 60)
        assert set(rows) == {"lab|urgent|school"}
        assert "Comment=two words" in lab.slurm("scontrol", "show", "job")
        mails = until(lambda: [line for line in mailbox(lab) if "site-" in line and "COMPLETED" in line], 60)
        assert mails
    finally:
        lab.slurm("scontrol", "delete", "ReservationName=school")


def mailbox(lab) -> list[str]:
    file = lab.cluster.folder / "mail.log"
    return file.read_text().splitlines() if file.exists() else []
