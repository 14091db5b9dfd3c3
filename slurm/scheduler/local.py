"""This machine as a scheduler: `submit` runs the jobs itself, on the machine's GPUs or, without GPUs, on its cores.

Run directories, retries and the rules for stopping are the same as on a cluster. There is no queue: a second submit of
the sweep also starts the runs that wait here, and skips only runs that another process has begun.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from embedscale.errors import UserError
from embedscale.process import ProcessName, usable_cores
from embedscale.run.stop import StopRequest
from slurm.scheduler.processes import Place, rank_environment, work_through
from slurm.scheduler.scheduler import Allocation, Job, Limits, Request, Requeue
from slurm.scheduler.submissions import Submissions


class Local:
    """This machine, for the sweep in `folder`."""

    def __init__(self, folder: Path):
        self.submissions = Submissions(folder)
        self.host = socket.gethostname()
        self.stop = StopRequest()  # one for all arrays: what is not begun when it is raised stays for the next submit
        self.outcomes: dict[str, str] = {}  # of all arrays so far, by run id

    def limits(self) -> Limits:
        """Return no limit: each run is a job, and `submit` waits for it."""
        return Limits(jobs_per_array=sys.maxsize, foreground=True)

    def jobs(self) -> list[Job]:
        """Return the processes that work at this sweep, as jobs; those of other hosts may have ended."""
        found = [(each, each.lives()) for each in self.submissions.processes()]
        return [
            Job(str(each.pid), str(each.pid), None, "", running=True, host=self._place(each, lives))
            for each, lives in found
            if lives is not False
        ]

    def _place(self, process: ProcessName, lives: bool | None) -> str:
        """Return the host of a process, in other words where it is this host's name but cannot be seen from here."""
        unseen = process.host == self.host and lives is None
        return f"another container or machine called {process.host}" if unseen else process.host

    def submit(self, request: Request) -> str:
        """Run an array's jobs to their end or until `stop` is requested; returns this process's id.

        Raises UserError if a run needs more GPUs than the machine has.
        """
        array = request.array
        runs = [run for task in array.tasks for run in task.values()]
        gpus = [] if array.scores else visible_gpus()
        cores, most = usable_cores(), min(request.parallel, len(runs))
        available = places(gpus, cores, array.nodes, array.devices, array.shape.cpus, most)
        self.outcomes |= work_through(runs, array.scores, available, self.stop)
        return str(os.getpid())

    def script(self, request: Request) -> str:
        """Return the runs that `submit` would start here, in order."""
        return "\n".join(run_id for task in request.array.tasks for run_id in task)

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Let signals raise `stop`, and let `sweep cancel` find this process, while it works at the sweep."""
        self.stop.on_signals()
        note = self.submissions.announce(ProcessName.of_this_process())
        try:
            yield
        finally:
            note.unlink(missing_ok=True)

    def cancel(self, handles: Sequence[str]) -> None:
        """Ask processes of this machine to save and stop; a process that has ended is left out."""
        for handle in handles:
            with suppress(ProcessLookupError):
                os.kill(int(handle), signal.SIGTERM)

    def accounting(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return nothing: a run directory says how a process of this machine ended."""
        return {}

    def allocation(self) -> Allocation:
        """Return this process, on its own and without a time limit."""
        return Allocation(str(os.getpid()), self.host)

    def requeue(self, job: str, avoid: Sequence[str] = ()) -> Requeue:
        """Refuse: the next submit goes on."""
        return Requeue.REFUSED


@cache
def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use. Another process asks for them: CUDA does not survive a fork."""
    if shutil.which("nvidia-smi") is None:
        return []
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    count = int(done.stdout) if done.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[:count] if visible != [""] else [str(number) for number in range(count)]


def places(gpus: Sequence[str], cores: int, nodes: int, devices: int, threads: int, most: int) -> list[Place]:
    """Return at least one place, and at most `most`, for runs of nodes × devices processes.

    Each process has a GPU of its own or, without GPUs, `threads` of the machine's `cores`. Raises UserError if the
    machine has GPUs, but fewer than one run needs.
    """
    size = nodes * devices
    if 0 < len(gpus) < size:
        raise UserError(f"resources: a run needs {size} GPUs, but this machine has {len(gpus)}; lower devices or nodes")
    room = len(gpus) // size if gpus else cores // (size * threads)
    count = max(1, min(room, most))
    beside = 1 if gpus else count * nodes
    found = []
    for number in range(count):
        port = _free_port()
        processes = []
        for rank in range(size):
            node, local = divmod(rank, devices)
            first = number * size + node * devices
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + devices])} if gpus else {}
            if size > 1:
                environment |= rank_environment(rank, size, local, devices, node, "127.0.0.1", port)
            processes.append(environment)
        found.append(Place(processes, threads, beside=beside))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
