"""The cluster of the other tests starts, answers, survives the loss of a node, and leaves no process behind."""

import subprocess
import sys
import tempfile
import time

from embedscale.process import process_alive
from slurm.scheduler.devcluster import DevCluster


def test_nodes_partitions_and_accounting_answer(cluster, until):
    assert cluster.ask("sinfo", "--noheader", "--format=%P %a %D").split("\n")[:2] == ["low* up 2", "high up 2"]
    job = cluster.ask("sbatch", "--parsable", "--output=/dev/null", "--wrap=true").strip()
    ended = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State"]
    assert until(lambda: "COMPLETED" in cluster.ask(*ended))


def test_a_power_cut_requeues_the_jobs_of_a_node_and_no_others(cluster, until):
    words = ["--parsable", "--output=/dev/null", "--nodelist=n2", "--requeue", "--wrap=srun sleep 100"]
    job = cluster.ask("sbatch", *words).strip()
    until(lambda: cluster.ask("squeue", "--noheader", "--states=RUNNING", f"--jobs={job}", "--format=%N").strip())
    until(lambda: len(cluster.processes_on("n2")) >= 3)
    cluster.kill_node("n2")
    assert cluster.alive() == {**dict.fromkeys(cluster.alive(), True), "n2": False}
    assert not cluster.processes_on("n2")
    time.sleep(12)  # then SLURM counts the node's jobs as lost when it comes back
    cluster.start("n2")
    until(lambda: "Restarts=1" in cluster.ask("scontrol", "show", "job", job))
    cluster.ask("scancel", job)


def test_down_ends_only_processes_that_up_started(cluster):
    with tempfile.TemporaryDirectory(prefix="dc-") as folder:
        other = DevCluster(folder, nodes=1, accounting=False)
        other.up()
        pids = [int(file.read_text().split()[0]) for file in other.folder.glob("*.process")]
        assert len(pids) == 3 and all(process_alive(pid) for pid in pids)
        module = [sys.executable, "-m", "slurm.scheduler.devcluster"]
        again = subprocess.run([*module, "up", folder], capture_output=True, text=True)
        assert again.returncode == 2 and "a cluster runs there" in again.stderr
        assert subprocess.run([*module, "status", folder], capture_output=True).returncode == 0
        assert subprocess.run([*module, "down", folder], capture_output=True).returncode == 0
        assert not any(process_alive(pid) for pid in pids)
        assert subprocess.run([*module, "status", folder], capture_output=True).returncode == 1
    assert all(cluster.alive().values())


def test_the_doctor_asks_a_real_cluster_and_its_nodes(lab):
    lab.write("asks", axes={"budget": [1e9]}, methods=["full"])
    words = ["doctor", "--cluster", str(lab.folder / "asks.cluster.yaml"), "--folder", str(lab.folder), "--on-node"]
    command = [sys.executable, "-m", "embedscale.cli", *words]
    done = subprocess.run(command, env=lab.environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("change") and "GB free" not in line], done.stderr
    for subject in ("controller: dev, SLURM", "class cpu: fits partition low", "arrays: MaxArraySize 1001"):
        assert any(subject in line for line in lines), lines
    for subject in ("preemption in low: REQUEUE, 30 s", "requeue: by SLURM itself", "accounting: accounting_storage"):
        assert any(subject in line for line in lines), lines
    for subject in ("shared file system: ", "affinity: ", "offline loading: ", "scontrol: here"):
        assert any(f"a node of cpu: {subject}" in line for line in lines), lines
