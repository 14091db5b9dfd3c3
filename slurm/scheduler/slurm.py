"""SLURM: jobs go out through submitit, everything else is asked of SLURM's own programs.

Only this module and `site` run squeue, sacct, scancel, scontrol and srun. Any of them may be missing: then the method
says so with None, an empty result or `Requeue.UNREACHABLE`.
"""

import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from embedscale import code
from embedscale.errors import UserError
from embedscale.process import job_number
from slurm.cluster import Cluster, ResourceClass
from slurm.scheduler.processes import rank_environment
from slurm.scheduler.scheduler import Allocation, Job, Limits, Request, Requeue
from slurm.scheduler.submissions import Submissions

SECONDS = 60.0  # most time that one command of SLURM may take
QUERY_SECONDS = 20.0  # the same for questions of a user who waits: without a slurm.conf, the commands hang for minutes
IDS_AT_ONCE = 500  # most job numbers on one command line
LOOK_SECONDS = 20.0  # for which a job is looked up that sbatch submitted before it lost touch with the controller
LOST_TOUCH = re.compile("time|contact|connect|communicat|transmi|recei", re.IGNORECASE)
_SILENT: set[str] = set()  # commands that have not answered this process
RANKS = tuple(rank_environment(0, 1, 0, 1, 0, "", 0))
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


class Slurm:
    """The SLURM cluster that this machine belongs to."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.submissions = Submissions(folder)

    def limits(self) -> Limits | None:
        """Return SLURM's MaxArraySize, or its default where scontrol does not answer; None without sbatch."""
        if shutil.which("sbatch") is None:
            return None
        largest = settings(ask("scontrol", "show", "config", seconds=QUERY_SECONDS) or "").get("MaxArraySize", "")
        return Limits(max(1, int(largest))) if largest.isdigit() else Limits()

    def jobs(self) -> list[Job] | None:
        """Return this user's jobs, array tasks one by one, or None if squeue is missing or fails."""
        words = ("--noheader", "--array", "--me", "--format=%A|%F|%K|%T|%N|%r|%j")
        text = ask("squeue", *words, seconds=QUERY_SECONDS)
        if text is None:
            return None
        found = []
        for line in filter(None, text.splitlines()):
            number, array, task, state, host, reason, name = line.split("|", 6)
            index = int(task) if task.isdigit() else None
            running = state in ("RUNNING", "COMPLETING")
            found.append(Job(number, array, index, name, running, host, None if reason in ("", "None") else reason))
        return found

    def accounting(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return how jobs ended, as sacct spells it, by job id; empty if accounting is off."""
        states: dict[str, str] = {}
        for start in range(0, len(job_ids), IDS_AT_ONCE):
            jobs = f"--jobs={','.join(job_ids[start : start + IDS_AT_ONCE])}"
            text = ask("sacct", "--noheader", "--parsable2", "--allocations", jobs, "--format=JobIDRaw,State")
            for line in (text or "").splitlines():
                with suppress(ValueError):
                    number, state = line.split("|")
                    states[number] = state.split(" by ")[0]
        return states

    def cancel(self, handles: Sequence[str]) -> None:
        """Cancel jobs. Raises UserError if scancel is missing or refuses."""
        for start in range(0, len(handles), IDS_AT_ONCE):
            if ask("scancel", *handles[start : start + IDS_AT_ONCE]) is None:
                raise UserError("scancel: is missing or refused; look at squeue before you try again")

    def submit(self, request: Request) -> str:
        """Submit one array and return its job number. Raises UserError if sbatch refuses it."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = self._executor(request)  # while the variables of sbatch are there
        try:
            with _clean_environment():
                # The public `submit` names a call's file by the job's number, which a killed submit never learns.
                job = executor._submit_command(self._command(request))
                return str(job.job_id).split("_")[0]
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            lines = str(error).splitlines()
        why = ([line for line in lines if "error" in line.lower()] or lines)[-1].strip()
        found = self._look_for(request.name, LOOK_SECONDS if LOST_TOUCH.search(why) else 0)
        if found is None:
            raise UserError(f"sbatch: {why}")
        print(f"sbatch failed, but job {found} is in the queue under its name")
        return found

    def script(self, request: Request) -> str:
        """Return the batch script of an array, with a word in place of the text that checks the copy of the code."""
        text: str = self._executor(request)._make_submission_file_text(self._command(request), "")
        short = "'(embedscale/code.py)'"
        note = f"# Shortened: in place of {short}, the script has the text of this file.\n"
        return text.replace(shlex.quote(Path(code.__file__).read_text()), short) + note

    def _executor(self, request: Request) -> Any:
        """Return submitit's executor with the options of sbatch for an array."""
        import submitit

        array, cluster, shape = request.array, request.cluster, request.array.shape
        files = self.submissions.files(request.name)
        # A "%" in a path would begin a pattern of SLURM.
        output = str(files).replace("%", "%%") + ("/%A_%a" if len(array.tasks) > 1 else "/%j")
        given = placement(cluster, shape) | {
            "gpus_per_node": gpus_asked(cluster, shape, array.devices),
            "exclude": ",".join(filter(None, [cluster.sbatch.get("exclude"), *request.avoid])) or None,
            "dependency": f"afterany:{':'.join(request.after)}" if request.after else None,
        }
        executor = submitit.SlurmExecutor(files)
        executor.update_parameters(
            job_name=request.name,
            time=shape.minutes,
            nodes=array.nodes,
            ntasks_per_node=array.devices,
            cpus_per_task=shape.cpus,
            mem=f"{math.ceil(1000 * shape.memory_gb * array.devices)}M",
            array_parallelism=request.parallel,
            signal_delay_s=cluster.warning_seconds,
            stderr_to_stdout=True,
            setup=_setup(cluster, request.code),
            # Since 22.05 srun does not take --cpus-per-task over from sbatch.
            srun_args=[f"--output={output}_%t.out", f"--cpus-per-task={shape.cpus}", "--kill-on-bad-exit=1"],
            additional_parameters={name: value or True for name, value in cluster.sbatch.items() if name != "exclude"}
            | {
                "requeue" if cluster.requeue else "no-requeue": True,
                "output": f"{output}_0.out",
            },
            **{key: value for key, value in given.items() if value is not None},
        )
        if len(array.tasks) > 1:
            executor.parameters["map_count"] = len(array.tasks)
        return executor

    def _command(self, request: Request) -> str:
        """Return the shell command of each process of a job."""
        python = shlex.join([request.cluster.python or sys.executable, "-u", *self._program(request)])
        return f'{request.cluster.command_prefix} {python} "${{SLURM_ARRAY_TASK_ID:-0}}"'.strip()

    def _program(self, request: Request) -> list[str]:
        """Return the words with which Python runs a job's work, all but the index of the job."""
        module, own = request.work.__module__, [str(self.folder), request.name]
        if request.code is None:
            return ["-m", module, *own]
        return ["-c", Path(code.__file__).read_text(), str(request.code), request.code.name, module, *own]

    def _look_for(self, name: str, seconds: float) -> str | None:
        """Return the number of the job with this name: sbatch may time out after the controller took the job."""
        deadline = time.monotonic() + seconds
        while True:
            found = [job.array for job in self.jobs() or [] if job.name == name]
            if found or time.monotonic() > deadline:
                return found[0] if found else None
            time.sleep(2)

    def allocation(self) -> Allocation:
        """Return the job and the task as SLURM's variables describe them."""
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        processes, nodes = int(os.environ.get("SLURM_NTASKS", 1)), int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        # Another port after a requeue, and for every job that may share the node.
        port = 12000 + (7 * int(job_number() or 0) + int(os.environ.get("SLURM_RESTART_COUNT", 0))) % 20000
        return Allocation(
            job=_own_handle(),
            node=node,
            end=_end_of_job(),
            rank=int(os.environ.get("SLURM_PROCID", 0)),
            local_rank=int(os.environ.get("SLURM_LOCALID", 0)),
            node_rank=int(os.environ.get("SLURM_NODEID", 0)),
            processes=processes,
            nodes=nodes,
            # The job's script, and with it srun, runs on the first node.
            address=os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
            port=port,
        )

    def requeue(self, job: str, avoid: Sequence[str] = ()) -> Requeue:
        """Requeue the job of this process, and keep it and its array's waiting jobs away from the nodes `avoid`."""
        if shutil.which("scontrol") is None:
            return Requeue.UNREACHABLE
        shown = _scontrol("--oneliner", "show", "job", job)
        if shown is None:
            return Requeue.AWAY
        if shown.get("JobState") != "RUNNING":
            return Requeue.OVER
        if _scontrol("requeue", job) is None:
            if _scontrol("--oneliner", "show", "job", job) is None:
                return Requeue.AWAY
            return Requeue.PREEMPTED if shown.get("PreemptTime", "None") != "None" else Requeue.REFUSED
        if avoid:
            nodes = f"ExcNodeList={','.join(avoid)}"
            # SLURM refuses this while a job runs, so it follows the requeue; this process has KillWait seconds for it.
            for _ in range(5):
                if _scontrol("update", f"JobId={job}", nodes) is not None:
                    break
                time.sleep(1)
            if "_" in job:
                _scontrol("update", f"JobId={job.split('_')[0]}", nodes)  # refused for those of its tasks that run
        return Requeue.ACCEPTED


def ask(*words: str, seconds: float = SECONDS) -> str | None:
    """Return what a command prints, or None if it is missing, fails or hangs. A hanging command is not asked again."""
    if words[0] in _SILENT:
        return None
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        _SILENT.add(words[0])
        why = "is SLURM configured on this machine?"
        print(f"{words[0]}: no answer within {seconds:g} s; {why}", file=sys.stderr, flush=True)
        return None
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def settings(text: str) -> dict[str, str]:
    """Return the `key = value` lines of `scontrol show config`."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def clean_variables() -> dict[str, str]:
    """Return this process's environment without the variables of a job or of a distributed run that it may be in."""
    ours = ("SLURM_", "SRUN_", "SBATCH_", "PMI")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in RANKS}
    return kept | ({"SLURM_CONF": os.environ["SLURM_CONF"]} if "SLURM_CONF" in os.environ else {})


def placement(cluster: Cluster, shape: ResourceClass) -> dict[str, str | None]:
    """Return where jobs of a class go: options of sbatch and srun, by the cluster file or else by SBATCH_ variables."""
    variables = {name: os.environ.get(f"SBATCH_{name.upper()}") for name in ("partition", "account", "qos")}
    given = {"partition": shape.partition or cluster.partition, "account": cluster.account, "qos": cluster.qos}
    return {name: value or variables[name] or None for name, value in given.items()} | {"constraint": shape.constraint}


def gpus_asked(cluster: Cluster, shape: ResourceClass, count: int) -> str | None:
    """Return the value of --gpus-per-node, or None without GPUs and where the cluster file has an option for them."""
    if not shape.gpus or {"gres", "gpus", "gpus-per-node"} & cluster.sbatch.keys():
        return None
    return f"{shape.gpu_type}:{count}" if shape.gpu_type else str(count)


def ignored_variables() -> list[str]:
    """Return the SBATCH_ variables of this process that submitted jobs do not follow."""
    kept = {"SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS"}
    return sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in kept)


def _scontrol(*words: str) -> dict[str, str] | None:
    """Return the key=value words that scontrol prints, or None if it is missing, fails or hangs."""
    # A requeue signals all processes of the job, so it would also end the scontrol that asks for it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if done.returncode:
        print(f"scontrol {' '.join(words)}: {done.stderr.strip()}", file=sys.stderr, flush=True)
        return None
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def _own_handle() -> str:
    """Return the handle of this process's job. An array's task goes by its index: one of them has the array's number
    as its own, and that number stands for the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return job_number() or ""


def _end_of_job() -> float | None:
    """Return the time at which SLURM will end this job, in seconds since 1970."""
    if "SLURM_JOB_END_TIME" in os.environ:  # since SLURM 23.02
        return float(os.environ["SLURM_JOB_END_TIME"])
    end = (_scontrol("--oneliner", "show", "job", _own_handle()) or {}).get("EndTime", "")
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:
        return None


def _setup(cluster: Cluster, code: Path | None) -> list[str]:
    """Return the shell lines before srun. Without PYTHONSAFEPATH the folder of submission would come before the copied
    code."""
    variables = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    if cluster.offline:
        variables |= dict.fromkeys(OFFLINE, "1")
    lines = [f"export {key}={shlex.quote(str(value))}" for key, value in (variables | cluster.environment).items()]
    return [*cluster.setup, *lines]


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Remove the variables of a job that this process may be in; keep the path of SLURM's configuration."""
    from submitit.helpers import clean_env

    kept = clean_variables()
    with clean_env([name for name in os.environ if name not in kept]):
        if "SLURM_CONF" in kept:
            os.environ["SLURM_CONF"] = kept["SLURM_CONF"]
        yield
