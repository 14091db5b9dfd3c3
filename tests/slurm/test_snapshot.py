"""A job runs the code that was submitted, finds its orders whatever happened to its submitter, and says what ran.

Stand-ins for SLURM's programs keep the job; a test runs the job's script itself, as a node would.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from embedscale.code import ROOT, digest_of, files_of
from slurm.scheduler.snapshot import snapshot

SRUN = 'while [[ "$1" == --* ]]; do [[ "$1" == --output ]] && shift; shift; done; exec "$@"'


class Cluster:
    """sbatch takes jobs into a folder; squeue shows those that wait there."""

    def __init__(self, lab, sbatch: str = ""):
        self.lab, self.queue, self.programs = lab, lab.folder / "queue", lab.folder / "programs"
        self.queue.mkdir()
        self.programs.mkdir()
        name = """sed -n "s/^#SBATCH --job-name=//p" "${@: -1}" | tr -d "'" """
        self.take = f'cp "${{@: -1}}" "{self.queue}/$({name})"'
        shown = f'for file in "{self.queue}"/*; do echo "7|7|N/A|PENDING||None|${{file##*/}}"; done'
        self.set("squeue", f'[ -z "$(ls {self.queue})" ] || {shown}')
        self.set("srun", SRUN)
        self.set("scontrol", "echo 'MaxArraySize = 1001'")
        self.set("sbatch", f'{self.take}; echo "Submitted batch job 7"')

    def set(self, program: str, text: str) -> None:
        (self.programs / program).write_text(f"#!/bin/bash\n{text}\n")
        (self.programs / program).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.programs}:{os.environ['PATH']}"}

    def submit(self, sweep: Path, code: int | None = 0) -> str:
        return self.lab.sweep("submit", sweep, "--to", "slurm", env=self.environment, code=code)

    def run(self) -> subprocess.CompletedProcess:
        """Run the job that waits, and take it out of the queue."""
        (script,) = self.queue.iterdir()
        environment = self.lab.environment | self.environment | {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
        done = subprocess.run(
            ["bash", script], env=environment, cwd=self.lab.folder, capture_output=True, text=True, timeout=280
        )
        script.unlink()
        return done


def test_a_copy_that_cannot_get_its_name_is_an_error_unless_another_submission_made_it(tmp_path, monkeypatch):
    def refused(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))

    def too_late(path: Path, target: Path) -> None:
        shutil.copytree(path, target)
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        snapshot(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "rename", too_late)
    copy, facts = snapshot(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [copy.name] == [facts.digest]


def test_a_copy_has_the_name_of_its_own_files_though_an_editor_saves_meanwhile(tmp_path, monkeypatch):
    looks = []

    def edited(root: Path) -> dict[str, bytes]:
        looks.append(root)
        return files_of(root) | {"slurm/edited.py": b"#" * len(looks)}

    monkeypatch.setattr("embedscale.code.files_of", edited)
    monkeypatch.setattr("slurm.scheduler.snapshot.files_of", edited)
    copy, facts = snapshot(tmp_path)
    assert copy.name == facts.digest == digest_of(files_of(copy))


def one_run(lab, name: str) -> Path:
    shape = {"memory_gb": 0.1}
    return lab.write(name, axes={"budget": [1e9]}, methods=["full"], classes=shape, cluster={"offline": True})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("taken", [False, True], ids=["before sbatch has the job", "after"])
def test_a_submit_that_is_killed_leaves_a_job_that_works_or_none(laptop, number, taken):
    cluster = Cluster(laptop)
    whole = (cluster.programs / "sbatch").read_text().removeprefix("#!/bin/bash\n")
    cluster.set("sbatch", f"{cluster.take if taken else ''}\nkill -{int(number)} $PPID; exec sleep 3")
    sweep = one_run(laptop, "100%x sure")  # SLURM reads a % in a path as a pattern
    cluster.submit(sweep, code=None)
    assert len(list(cluster.queue.iterdir())) == taken
    cluster.set("sbatch", whole)
    output = cluster.submit(sweep)
    assert ("1 queued; 0 to submit" if taken else "1 missing; 1 to submit") in output
    (script,) = cluster.queue.iterdir()
    assert "100%%x sure" in script.read_text()
    if number == signal.SIGKILL:
        done = cluster.run()
        (directory,) = laptop.directories("100%x sure")
        assert done.returncode == 0 and directory.read_record().status == "done", done.stdout + done.stderr


def test_a_damaged_copy_of_the_code_is_restored_and_the_record_names_what_ran(laptop):
    cluster = Cluster(laptop)
    cluster.submit(one_run(laptop, "copied"))
    (copy,) = (laptop.folder / "runs" / "copied" / ".submissions" / "code").iterdir()
    assert copy.name == digest_of(files_of(copy)) == digest_of(files_of(ROOT))
    (copy / "embedscale" / "__init__.py").unlink()  # then Python would import the checkout's package
    (copy / "slurm" / "scheduler" / "node.py").write_text("raise SystemExit('an edited file ran')")
    (copy / "embedscale" / "extra.py").write_text("")
    shutil.rmtree(copy / "embedscale" / "training")
    facts = json.loads((copy / "code.json").read_text())
    (copy / "code.json").write_text(json.dumps(facts | {"commit": "of the submission", "dirty": True}))
    done = cluster.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"restored in {copy}: " in done.stdout and "slurm/scheduler/node.py" in done.stdout
    (directory,) = laptop.directories("copied")
    code = directory.read_record().code
    assert (code.digest, code.commit, code.dirty) == (copy.name, "of the submission", True)
    assert digest_of(files_of(copy)) == copy.name


def test_a_copy_that_cannot_be_restored_runs_nothing_until_the_next_submit_restores_it(laptop):
    cluster = Cluster(laptop)
    sweep = one_run(laptop, "lost")
    cluster.submit(sweep)
    (copy,) = (laptop.folder / "runs" / "lost" / ".submissions" / "code").iterdir()
    (copy / "slurm" / "__init__.py").unlink()
    (copy / "files.zip").write_bytes(b"PK")
    done = cluster.run()
    assert done.returncode != 0 and not laptop.directories("lost")
    assert done.stderr.count("\n") == 1 and f"damaged: {copy / 'files.zip'}: cannot be read" in done.stderr
    assert "restored in" in cluster.submit(sweep)
    assert digest_of(files_of(copy)) == copy.name
