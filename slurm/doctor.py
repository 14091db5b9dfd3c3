"""Is this machine, installation and cluster fit to run a sweep? Each line says fine, or what to change.

Everything is asked, nothing is assumed: packages and torch here, the file system under the runs, what SLURM's own
commands tell, and with `--on-node` a probe that runs on a node of the cluster. Nothing is changed or submitted
otherwise.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from embedscale.errors import DONE, FAILED
from slurm import cluster as clusters
from slurm.cluster import Cluster, ResourceClass

# Releases that carried malware, of 30 April 2026 (GHSA-w37p-236h-pfx3). Mirrors may keep them.
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}
COMMANDS = {
    "sbatch": "sweeps run on this machine alone",
    "squeue": "submit cannot see what is queued",
    "scancel": "sweep cancel does not work",
    "scontrol": "limits are guessed, and jobs cannot requeue themselves",
    "sacct": "what ended a silent job stays unknown",
}


@dataclass(frozen=True)
class Finding:
    subject: str
    fine: bool
    text: str  # what was found; where it is not fine, what to change


def installation() -> Iterator[Finding]:
    """Python and the packages that this project names, without importing them."""
    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", sys.version_info >= (3, 11), f"{python}; 3.11 or later is needed")
    wanted = [Requirement(text) for text in metadata.requires("embedscale") or []]
    wrong = []
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(each.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{each.name} is missing")
            continue
        if not each.specifier.contains(found, prereleases=True):
            wrong.append(f"{each.name} {found} is not {each.specifier}")
    versions = [
        f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "transformers") if _installed(name)
    ]
    yield Finding("packages", not wrong, f"{'; '.join(wrong)}: install again" if wrong else ", ".join(versions))
    for name, bad in MALICIOUS.items():
        found = metadata.version(name) if _installed(name) else ""
        if found in bad:
            yield Finding(
                f"{name} {found}",
                False,
                "is malware (GHSA-w37p-236h-pfx3): uninstall it unimported, renew every credential of this account",
            )
        else:
            yield Finding(f"{name}, tampered", True, f"{found or 'not installed'}, none of {', '.join(bad)}")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


TORCH = """
import json, torch
print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.is_available(),
                  [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]]))
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        x = torch.ones(256, 256, device=f"cuda:{i}")
        assert float((x @ x).sum()) == 256.0**3
"""


def accelerator() -> Iterator[Finding]:
    """torch and its GPUs, in a process of their own: a broken driver must not end this one."""
    output, error = _python(TORCH)
    if output is None:
        yield Finding("torch", False, f"does not work: {error}")
        return
    version, cuda, available, devices = json.loads(output)
    if available:
        yield Finding("GPU", True, f"{len(devices)} × {devices[0]}, torch {version}, a product on each is right")
    elif cuda and shutil.which("nvidia-smi"):
        yield Finding("GPU", False, f"torch {version} sees none though nvidia-smi is here: its CUDA {cuda} is too new")
    else:
        yield Finding("GPU", True, f"none; torch {version} runs on the CPU")


OFFLINE = """
import os, socket, sys, tempfile
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
def refuse(*a, **k): raise OSError("the network was used")
socket.socket.connect = refuse; socket.getaddrinfo = refuse
from transformers import AutoConfig, AutoModel, GPTNeoXConfig
with tempfile.TemporaryDirectory() as folder:
    shape = dict(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    AutoModel.from_config(GPTNeoXConfig(**shape)).save_pretrained(folder)
    AutoModel.from_pretrained(folder)
for name in sys.argv[1:]:
    try:
        AutoConfig.from_pretrained(name)
    except Exception:
        print(name)
"""


def offline(backbones: Sequence[str] = ()) -> Iterator[Finding]:
    """Whether models load while every connection is refused, the sweep's backbones among them."""
    output, error = _python(OFFLINE, *backbones)
    if output is None:
        yield Finding("offline loading", False, f"fails: {error}")
        return
    absent = [name for name in output.split("\n") if name in backbones]
    here = len(backbones) - len(absent)
    count = f"a saved model and {here} backbones load" if here else "a saved model loads"
    yield Finding("offline loading", True, f"{count} with every connection refused")
    if absent:
        text = f"not on this disk: {', '.join(absent)}; run `embedscale sweep prefetch` where there is a network"
        yield Finding("backbones", False, text)


def _python(code: str, *words: str) -> tuple[str | None, str]:
    """What a fresh interpreter prints, or None and the last line of its error."""
    try:
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return None, "took more than five minutes"
    return (done.stdout if done.returncode == 0 else None), (done.stderr.strip().split("\n") or [""])[-1]


def file_system(folder: Path) -> Iterator[Finding]:
    """What the run directory needs of its file system: rename over a file, hard links, room."""
    subject = f"file system of {folder}"
    nearest = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    token = nearest / f".doctor.{uuid.uuid4().hex[:8]}"
    other = token.with_suffix(".other")
    try:
        token.write_text("a")
        os.link(token, other)
        other.replace(token)
        with suppress(FileNotFoundError):
            other.unlink()
    except OSError as error:
        yield Finding(subject, False, f"refuses files, links or renames ({error.strerror}); keep the runs elsewhere")
        return
    finally:
        for each in (token, other):
            with suppress(OSError):
                each.unlink()
    free = shutil.disk_usage(nearest).free
    enough = free > 10e9
    text = f"writes, links and renames; {free / 1e9:,.0f} GB free"
    yield Finding(subject, enough, text + ("" if enough else ": make room, a sweep's plan says how much it needs"))


def affinity(needed: int = 1) -> Iterator[Finding]:
    """The cores that this process may really use."""
    usable, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    bound = {name: os.environ[name] for name in ("SLURM_CPU_BIND", "GOMP_CPU_AFFINITY") if os.environ.get(name)}
    text = f"{usable} of {cores} cores" + (f", bound by {', '.join(bound)}" if bound else "")
    if usable < needed:
        text += f"; {needed} were asked for: srun needs --cpus-per-task of its own"
    yield Finding("affinity", usable >= needed, text)


def slurm(cluster: Cluster) -> Iterator[Finding]:
    """What SLURM says of itself, held against the cluster file."""
    if shutil.which("sbatch") is None:
        yield Finding("SLURM", True, "no sbatch here: sweeps run on this machine alone")
        return
    for command, without in COMMANDS.items():
        if shutil.which(command) is None:
            yield Finding(command, False, f"is missing on this machine: {without}")
    config = _settings(_ask("scontrol", "show", "config"))
    if not config:
        yield Finding("controller", False, "does not answer `scontrol show config`: ask where to log in, or wait")
        return
    yield Finding(
        "controller", True, f"{config.get('ClusterName', 'cluster')}, SLURM {config.get('SLURM_VERSION', '?')}"
    )
    yield from _partitions(cluster)
    yield from _limits(config)
    yield from _signals(config, cluster)
    yield from _accounting(config)


def _ask(*words: str) -> str:
    """A command's output; empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _settings(text: str) -> dict[str, str]:
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _rows(text: str) -> list[dict[str, str]]:
    """`scontrol --oneliner`: a line of key=value words for each thing."""
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines() if line]


def _partitions(cluster: Cluster) -> Iterator[Finding]:
    partitions = {
        row.get("PartitionName", ""): row for row in _rows(_ask("scontrol", "--oneliner", "show", "partition"))
    }
    nodes = _rows(_ask("scontrol", "--oneliner", "show", "node"))
    default = next((name for name, row in partitions.items() if row.get("Default") == "YES"), None)
    for each in cluster.classes:
        subject = f"class {each.name}"
        name = each.partition or cluster.partition or default
        if name is None or name not in partitions:
            allowed = ", ".join(sorted(partitions)) or "none is visible"
            what = f"partition {name!r} is unknown" if name else "no partition is the default"
            yield Finding(subject, False, f"{what}; set `partition` in the cluster file: {allowed}")
            continue
        wrong = list(_unfit(each, partitions[name], [node for node in nodes if name in _listed(node, "Partitions")]))
        text = f"fits partition {name}: {each.gpus} GPU, {each.cpus} cores, {each.memory_gb:g} GB, {each.hours:g} h"
        yield Finding(subject, not wrong, f"in partition {name}: {'; '.join(wrong)}" if wrong else text)


def _listed(node: dict[str, str], key: str) -> list[str]:
    return node.get(key, "").split(",")


def _unfit(each: ResourceClass, partition: dict[str, str], nodes: Sequence[dict[str, str]]) -> Iterator[str]:
    if partition.get("State", "UP") != "UP":
        yield f"it is {partition['State']}"
    limit = _hours(partition.get("MaxTime", "UNLIMITED"))
    if each.hours > limit:
        yield f"{each.hours:g} h are more than its limit: set hours to at most {limit:g}"
    tasks = max(1, each.gpus)
    if nodes and not any(int(node.get("CPUTot", 0)) >= tasks * each.cpus for node in nodes):
        yield f"no node has {tasks * each.cpus} cores"
    if nodes and not any(int(node.get("RealMemory", 0)) >= tasks * each.memory_gb * 1000 for node in nodes):
        yield f"no node has {tasks * each.memory_gb:g} GB"
    if nodes and each.gpus and not any(_gpus(node) >= each.gpus for node in nodes):
        yield f"no node has {each.gpus} GPU: set gpus to 0, or another partition"
    if nodes and each.constraint and not any(each.constraint in _listed(node, "AvailableFeatures") for node in nodes):
        yield f"no node has the feature {each.constraint!r}"


def _gpus(node: dict[str, str]) -> int:
    """`Gres=gpu:a100:4(S:0-1)` has four."""
    counts = [entry.split("(")[0].split(":") for entry in _listed(node, "Gres") if entry.startswith("gpu")]
    return sum(int(parts[-1]) if parts[-1].isdigit() else 1 for parts in counts)


def _hours(limit: str) -> float:
    """SLURM's days-hours:minutes:seconds."""
    if limit in ("UNLIMITED", "INFINITE", "NONE"):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return 24 * int(days or 0) + hours + minutes / 60 + seconds / 3600


def _limits(config: dict[str, str]) -> Iterator[Finding]:
    largest = config.get("MaxArraySize", "0")
    yield Finding(
        "arrays",
        largest.isdigit() and int(largest) > 1,
        f"MaxArraySize {largest}: larger sweeps are split" if largest != "0" else "are off (MaxArraySize 0)",
    )
    user = os.environ.get("USER") or str(os.getuid())
    rows = _ask(
        "sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", "format=MaxSubmitJobs,MaxJobs"
    )
    limits = [line.split("|") for line in rows.splitlines()]
    submit = [int(row[0]) for row in limits if row[0].isdigit()]
    if submit:
        text = f"at most {min(submit):,} submitted jobs a user: submit what fits, then submit again"
        yield Finding("jobs a user", True, text)


def _signals(config: dict[str, str], cluster: Cluster) -> Iterator[Finding]:
    wait = int(config.get("KillWait", "30 sec").split()[0])
    text = f"KillWait {wait} s after SIGTERM; the clock stops a run {cluster.warning_seconds} s ahead of its time limit"
    yield Finding("time limit", cluster.warning_seconds > wait, text)
    preempt = config.get("PreemptMode", "OFF")
    partitions = _rows(_ask("scontrol", "--oneliner", "show", "partition"))
    for row in partitions:
        mode = row.get("PreemptMode", preempt)
        if "REQUEUE" not in mode and "CANCEL" not in mode:
            continue
        grace = int(row.get("GraceTime", "0"))
        name = f"preemption in {row.get('PartitionName')}"
        if grace < 30:
            yield Finding(
                name,
                False,
                f"{mode} with only {grace} s from SIGTERM to SIGKILL: set resources.checkpoint_minutes to what you can "
                "afford to lose",
            )
        else:
            yield Finding(name, True, f"{mode}, {grace} s from SIGTERM to SIGKILL")
    requeues = config.get("JobRequeue", "1") == "1"
    if cluster.requeue and not requeues:
        yield Finding(
            "requeue", False, "the site does not requeue (JobRequeue 0): set `requeue: false`; submit goes on"
        )
    else:
        yield Finding("requeue", True, "by SLURM itself" if requeues else "off, as the cluster file says")


def _accounting(config: dict[str, str]) -> Iterator[Finding]:
    kind = config.get("AccountingStorageType", "(null)")
    if kind in ("(null)", "accounting_storage/none", ""):
        yield Finding("accounting", True, "none; status does without it, but cannot say what ended a silent job")
        return
    answers = shutil.which("sacct") is not None and subprocess.run(["sacct", "-n"], capture_output=True).returncode == 0
    yield Finding("accounting", answers, kind if answers else f"{kind}, but sacct does not answer: status does without")


def on_node(cluster: Cluster, folder: Path) -> Iterator[Finding]:
    """The same questions, asked on a node of each class through a short srun."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in cluster.classes:
        token = folder / f".doctor.{uuid.uuid4().hex[:8]}"
        token.write_text(socket.gethostname())
        words = ["srun", "--immediate=120", "--time=5", "--ntasks=1", "--nodes=1", "--job-name=embedscale-doctor"]
        words += [f"--cpus-per-task={each.cpus}", f"--mem={int(each.memory_gb * 1000)}M"]
        words += [f"--gpus={each.gpus}"] if each.gpus else []
        for option, value in (
            ("partition", each.partition or cluster.partition),
            ("constraint", each.constraint),
            ("account", cluster.account),
            ("qos", cluster.qos),
        ):
            words += [f"--{option}={value}"] if value else []
        words += [sys.executable, "-m", "slurm.doctor", str(token.absolute()), str(each.cpus), str(int(each.gpus > 0))]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SRUN_", "SBATCH_", "PMI"))}
        if "SLURM_CONF" in os.environ:
            environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)
            rows = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else []
            why = (done.stderr.strip().split("\n") or [""])[-1]
        except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
            rows, why = [], type(error).__name__
        finally:
            token.unlink(missing_ok=True)
        if not rows:
            yield Finding(f"a node of {each.name}", False, f"could not be asked: {why}")
        for row in rows:
            yield Finding(f"a node of {each.name}: {row['subject']}", row["fine"], row["text"])


def probe(token: Path, cpus: int, gpu: bool) -> list[dict[str, Any]]:
    """What `on_node` runs over there."""
    visible = token.exists()
    text = f"{socket.gethostname()} sees {token.parent}"
    found = [Finding("shared file system", visible, text if visible else f"{text} NOT: keep the runs on a shared one")]
    found += affinity(cpus)
    found += accelerator()
    found += offline()
    if gpu and any(each.subject == "GPU" and each.text.startswith("none") for each in found):
        found.append(Finding("GPU", False, "one was asked for, none is visible"))
    has = shutil.which("scontrol") is not None
    text = "here: a job may requeue itself" if has else "is missing: a stopped job waits for the next submit"
    found.append(Finding("scontrol", True, text))
    return [vars(each) for each in found]


def print_findings(findings: Iterable[Finding]) -> int:
    """Print each finding as it comes; DONE where all are fine."""
    from rich.console import Console
    from rich.text import Text

    console, changes = Console(soft_wrap=True), 0
    for each in findings:
        changes += not each.fine
        verdict = Text("fine  ", "green") if each.fine else Text("change", "bold red")
        console.print(verdict, Text(f"{each.subject}: ", "bold") + Text(each.text), sep="  ")
    console.print(f"{changes} to change" if changes else "all fine", style="bold")
    return FAILED if changes else DONE


def command(args: Any) -> int:
    """`embedscale doctor [--cluster FILE] [--sweep FILE] [--folder FOLDER] [--on-node]`."""
    from slurm import grid

    sweep = grid.load(args.sweep) if args.sweep else None
    cluster = clusters.load(args.cluster) if args.cluster or not sweep else sweep.cluster
    folder = sweep.folder if sweep else Path(args.folder)
    local = sorted({run.backbone.name for run in sweep.runs}) if sweep and cluster.offline else []

    def findings() -> Iterator[Finding]:
        yield from installation()
        if any(metadata.version(name) in bad for name, bad in MALICIOUS.items() if _installed(name)):
            return  # nothing that could import it
        yield from accelerator()
        yield from offline(local)
        yield from file_system(folder)
        yield from affinity()
        yield from slurm(cluster)
        if args.on_node and shutil.which("srun"):
            yield from on_node(cluster, folder)

    return print_findings(findings())


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")))
