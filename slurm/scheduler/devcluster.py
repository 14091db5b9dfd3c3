"""A real SLURM on this machine, for tests and for trying things.

    python -m slurm.scheduler.devcluster up|down|status [FOLDER]

It starts munge, accounting, a controller, several nodes and two partitions; jobs of `high` preempt jobs of `low`. Mail
becomes a line of `mail.log`. All files lie in one folder, which `down` keeps. Daemons listen on 127.0.0.1 and on free
ports. `down` ends them by the process ids noted in the folder. Nodes may claim more cores than the machine has, so
timings mean nothing.
"""

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from embedscale.errors import DONE, FAILED, WRONG, UserError
from embedscale.files import write_atomically
from embedscale.process import start_time

PACKAGES = "munge slurmctld slurmd slurm-client slurmdbd mariadb-server"
INSTALL = f"apt-get install -y --no-install-recommends {PACKAGES}"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd", "mariadb-install-db")
SECONDS = 60.0  # most time that a daemon may take to answer

SLURM_CONF = """\
ClusterName=dev
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
# Without usable cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
# Together with MessageTimeout (10 s): the age at which a job that its node does not know counts as lost.
BatchStartTimeout=1
# Count the cores that a node claims, not those of the machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
KillWait=5
MailProg={folder}/mail
MaxArraySize={max_array}
MaxJobCount=20000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{accounting}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherFrequency=5"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""

DATABASE_INIT = """\
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';
"""


def missing() -> list[str]:
    """Return the programs that a cluster needs and this machine lacks."""
    return [name for name in DAEMONS if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class DevCluster:
    """A cluster whose whole state is one folder. Another process can control the cluster through the same folder.

    Args:
        folder: folder of configuration, logs, spool and process ids; its path must be short enough for a Unix socket.
        nodes: number of nodes; their names are n1, n2, …
        cpus: cores that each node claims.
        accounting: whether to start slurmdbd and a database, so that sacct answers.
        max_array: MaxArraySize, the most tasks of an array.
        grace: time between SIGTERM and SIGKILL for a preempted job, seconds.
    """

    def __init__(
        self,
        folder: str | Path,
        nodes: int = 2,
        cpus: int = 4,
        accounting: bool = True,
        max_array: int = 1001,
        grace: int = 30,
    ):
        self.folder = Path(folder).absolute()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus, self.accounting, self.max_array, self.grace = cpus, accounting, max_array, grace
        self.conf = self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with the variable by which SLURM's programs find the cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def up(self) -> None:
        """Start the cluster, and return when every node is idle.

        Raises UserError if programs are missing, if the folder holds a running cluster, or if a daemon does not start.
        """
        if lacking := missing():
            raise UserError(f"SLURM is not installed ({', '.join(lacking)} missing); on Debian: {INSTALL}")
        if any(self.alive().values()):
            raise UserError(
                f"{self.folder}: a cluster runs there; end it with `python -m slurm.scheduler.devcluster down`"
            )
        self._configure()
        try:
            self._start_daemons()
        except BaseException:
            self.down()
            raise

    def _start_daemons(self) -> None:
        key, socket_path = self.folder / "munge.key", self.folder / "munge.socket"
        if len(str(socket_path)) > 100:
            raise UserError(f"{self.folder}: the path is too long for a Unix socket; allowed: about 85 characters")
        words = [f"--{name}={self.folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}", *words)
        self._wait("munged", socket_path.exists)
        if self.accounting:
            self._start_accounting()
        self.start("slurmctld")
        self._wait("slurmctld", lambda: "UP" in self.ask("scontrol", "ping"))
        for node in self.nodes:
            self.start(node)
        idle = f"{len(self.nodes)} idle"
        self._wait(self.nodes[0], lambda: idle in self.ask("sinfo", "--noheader", "--partition=low", "--format=%D %t"))

    def _start_accounting(self) -> None:
        data, user = self.folder / "database", f"--user={getpass.getuser()}"
        install = [str(_program("mariadb-install-db")), "--no-defaults", f"--datadir={data}", user]
        install += [
            "--skip-test-db",
            "--skip-name-resolve",
            "--force",
        ]  # in case that the host's own name cannot be resolved
        if not (data / "mysql").exists():
            log = self.folder / "mariadb-install-db.log"
            with log.open("ab") as output:
                if subprocess.run(install, stdout=output, stderr=output).returncode:
                    raise UserError(f"mariadb-install-db failed; see {log}")
        words = ["--no-defaults", f"--datadir={data}", user, f"--socket={self.folder}/database.socket"]
        words += ["--bind-address=127.0.0.1", f"--port={self._port('database_port')}"]
        words += ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync"]
        self._start("mariadbd", *words, f"--init-file={self.folder}/database.sql")
        self._wait("mariadbd", lambda: _listens(self._port("database_port")))
        self.start("slurmdbd")
        self._wait("slurmdbd", lambda: _listens(self._port("accounting_port")))
        self.ask("sacctmgr", "--immediate", "add", "cluster", "dev")

    def start(self, name: str) -> None:
        """Start slurmctld, slurmdbd or the slurmd of a node, for the first time or after it was killed."""
        words = {"slurmctld": ["slurmctld", "-D", "-f", str(self.conf)], "slurmdbd": ["slurmdbd", "-D"]}
        self._start(*words.get(name, ["slurmd", "-D", "-f", str(self.conf), "-N", name]), name=name)

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a daemon; jobs are not touched."""
        for pid in self._noted(name):
            os.kill(pid, number)

    def kill_node(self, node: str) -> None:
        """Kill the slurmd of a node and its jobs with SIGKILL, as a power cut would."""
        _end([*self.processes_on(node), *self._noted(node)], [signal.SIGKILL])

    def down(self) -> None:
        """Cancel the jobs, then end every daemon that `up` started, and wait until it has ended."""
        alive = self.alive()
        if alive.get("slurmctld"):
            self.ask("scancel", f"--user={getpass.getuser()}")
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.ask("squeue", "--noheader").strip():
                time.sleep(0.3)
        steps = [process for node in self.nodes for process in self.processes_on(node)]
        for group in (steps, *([*self._noted(name)] for name in reversed(alive))):
            _end(group)
        for file in self.folder.glob("*.process"):
            file.unlink()

    def alive(self) -> dict[str, bool]:
        """Return the daemons that `up` started, in its order, and whether each of them still runs."""
        names = ["munged", "mariadbd", "slurmdbd", "slurmctld", *(file.stem for file in self._node_files())]
        return {name: bool(list(self._noted(name))) for name in names if self._file(name).exists()}

    def ask(self, *words: str) -> str:
        """Return what a program of SLURM prints about this cluster; empty if it fails."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        with ExitStack() as stack:  # all at the same time, so that no port is given twice
            ports = [stack.enter_context(_free_port()) for _ in range(3 + len(self.nodes))]
            values = dict(zip(("controller_port", "accounting_port", "database_port"), ports, strict=False))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs={self.cpus} RealMemory={memory}"
            for name, port in zip(self.nodes, ports[3:], strict=True)
        )
        common = {"folder": self.folder, "user": getpass.getuser(), "host": host, **values}
        accounting = ACCOUNTING.format(**common) if self.accounting else "AccountingStorageType=accounting_storage/none"
        more = {"nodes": nodes, "accounting": accounting, "max_array": self.max_array, "grace": self.grace}
        self._write("slurm.conf", SLURM_CONF.format(**common, **more))
        self._write("slurmdbd.conf", SLURMDBD_CONF.format(**common), 0o600)
        self._write("database.sql", DATABASE_INIT)
        if not (self.folder / "munge.key").exists():
            (self.folder / "munge.key").write_bytes(os.urandom(128))
            (self.folder / "munge.key").chmod(0o600)
        # Debian's slurmd requires the file. No cgroup plugin is in use, so its content does not matter.
        self._write("cgroup.conf", "CgroupAutomount=no\n")
        self._write("mail", f'#!/bin/sh\necho "$*" >> {self.folder}/mail.log\n', 0o755)  # instead of sending it

    def _write(self, name: str, text: str, mode: int = 0o644) -> None:
        write_atomically(self.folder / name, lambda file: file.write(text.encode()))
        (self.folder / name).chmod(mode)

    def _port(self, name: str) -> int:
        """Return a port from the configuration, so that another process can control the cluster."""
        key = {"database_port": "StoragePort=", "accounting_port": "DbdPort="}[name]
        lines = (self.folder / "slurmdbd.conf").read_text().splitlines()
        return next(int(line.removeprefix(key)) for line in lines if line.startswith(key))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.process"

    def _node_files(self) -> list[Path]:
        return sorted(self.folder.glob("n[0-9]*.process"))

    def _start(self, program: str, *words: str, name: str | None = None) -> None:
        """Start a daemon in a session of its own, and note its process id and start time."""
        name = name or program
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [str(_program(program)), *words],
                env=self.environment | {"SLURMD_NODENAME": ""},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.folder,
            )
        self._file(name).write_text(f"{process.pid} {start_time(process.pid)}")

    def _noted(self, name: str) -> Iterator[int]:
        """Yield a daemon's process id while it runs. The start time tells it from a later process with the same id."""
        with suppress(FileNotFoundError, ValueError):
            pid, start = self._file(name).read_text().split()
            if start_time(int(pid)) == start:
                yield int(pid)

    def processes_on(self, node: str) -> list[int]:
        """Return the processes of jobs on a node: all whose environment names the node and this cluster.

        Their slurmstepds come first: they would tell the controller that the other processes ended.
        """
        marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.conf}".encode()}
        parents, found = [], []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                        found.append(int(entry.name))
                        parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                        if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                            parents.append(parent)
        return [*dict.fromkeys(parents), *found]

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not ready():
            if time.monotonic() > deadline or (self._file(name).exists() and not list(self._noted(name))):
                raise UserError(f"{name} does not start; see {self.folder}/{name}.out and {name}.log")
            time.sleep(0.2)


def _end(processes: list[int], signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGKILL)) -> None:
    """Send the first signal and wait; send the next signal to processes that still run."""
    started = {pid: start_time(pid) for pid in processes}
    for number in signals:
        for pid in processes:
            with suppress(ProcessLookupError):
                if started[pid] and start_time(pid) == started[pid]:
                    os.kill(pid, number)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(started[p] and start_time(p) == started[p] for p in processes):
            time.sleep(0.05)


class _free_port:
    """A free TCP port, reserved until the block ends."""

    def __enter__(self) -> int:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", 0))
        return int(self.socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m slurm.scheduler.devcluster", description=__doc__.splitlines()[0])
    top.add_argument("action", choices=["up", "down", "status"])
    top.add_argument("folder", nargs="?", default="build/devcluster")
    top.add_argument("--nodes", type=int, default=2, help="number of nodes")
    top.add_argument("--cpus", type=int, default=4, help="cores that each node claims")
    top.add_argument("--no-accounting", action="store_true", help="do not start slurmdbd and its database")
    args = top.parse_args()
    cluster = DevCluster(args.folder, args.nodes, args.cpus, not args.no_accounting)
    try:
        if args.action == "up":
            cluster.up()
            print(f"up. SLURM's programs find the cluster after\n  export SLURM_CONF={cluster.conf}")
        elif args.action == "down":
            cluster.down()
            print("down")
        else:
            alive = cluster.alive()
            print("\n".join(f"{name}: {'runs' if runs else 'died'}" for name, runs in alive.items()) or "no cluster")
            print(cluster.ask("sinfo"), end="")
            return DONE if alive and all(alive.values()) else FAILED
    except UserError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return WRONG
    return DONE


if __name__ == "__main__":
    sys.exit(main())
