"""Check whether this machine, the installation and the cluster can run a sweep. Each line says fine, or what to change.

The doctor tries everything: packages and torch, the file system of the runs, what SLURM's programs say and, with
`--on-node`, a probe on a node of the cluster. Apart from the probe, it submits nothing and changes nothing.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from embedscale.errors import DONE, FAILED
from embedscale.process import usable_cores
from embedscale.terminal import console
from embedscale.values import Value, print_json
from slurm import cluster as clusters
from slurm.cluster import Cluster, ResourceClass
from slurm.scheduler.site import PROGRAMS, Node, Partition, Site, ask_site, missing_programs, refusal, run_on_node
from slurm.scheduler.slurm import placement

# Releases of 30 April 2026 that contained malware (GHSA-w37p-236h-pfx3). Mirrors may still have them.
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}


@dataclass(frozen=True)
class Finding(Value):
    """One line of the doctor's report."""

    subject: str
    """What was checked."""
    fine: bool
    """Whether a sweep can run with it."""
    text: str
    """What was found and, if it is not fine, what to change."""


def installation() -> Iterator[Finding]:
    """Check Python and the packages that this project requires, without importing them."""
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
                "contains malware (GHSA-w37p-236h-pfx3): uninstall it, never import it, renew this account's passwords",
            )
        else:
            yield Finding(
                name, True, f"{found or 'not installed'}: not one of the compromised releases ({', '.join(bad)})"
            )


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
    """Check torch and its GPUs in a process of their own: a broken driver must not end this one."""
    output, error = _python(TORCH)
    if output is None:
        yield Finding("torch", False, f"does not work: {error}")
        return
    version, cuda, available, devices = json.loads(output)
    if available:
        yield Finding("GPU", True, f"{len(devices)} × {devices[0]}, torch {version}; each computes a correct product")
    elif cuda and shutil.which("nvidia-smi"):
        yield Finding(
            "GPU",
            False,
            f"torch {version} sees none, although nvidia-smi exists: its CUDA {cuda} is too new for the driver",
        )
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
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception:
        print(name)
"""


def offline(backbones: Sequence[str] = ()) -> Iterator[Finding]:
    """Check that models, and the given backbones, load while every connection is refused."""
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
    """Return what a new interpreter prints for this code, or None and the last line of its error."""
    try:
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return None, "took more than five minutes"
    return (done.stdout if done.returncode == 0 else None), (done.stderr.strip().split("\n") or [""])[-1]


def file_system(folder: Path) -> Iterator[Finding]:
    """Check what a run directory needs from its file system: renames over a file, hard links, free space."""
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
        yield Finding(
            subject, False, f"refuses files, links or renames ({error.strerror}); put the runs on another file system"
        )
        return
    finally:
        for each in (token, other):
            with suppress(OSError):
                each.unlink()
    free = shutil.disk_usage(nearest).free
    enough = free > 10e9
    text = f"writes, links and renames; {free / 1e9:,.0f} GB free"
    yield Finding(
        subject,
        enough,
        text + ("" if enough else ": free some space; `embedscale sweep plan` says how much is needed"),
    )


def affinity(needed: int = 1) -> Iterator[Finding]:
    """Check how many cores this process may use; `needed` were asked for."""
    usable, cores = usable_cores(), os.cpu_count() or 1
    bound = {name: os.environ[name] for name in ("SLURM_CPU_BIND", "GOMP_CPU_AFFINITY") if os.environ.get(name)}
    text = f"{usable} of {cores} cores" + (f", bound by {', '.join(bound)}" if bound else "")
    if usable < needed:
        text += f"; {needed} were asked for: srun needs --cpus-per-task of its own"
    yield Finding("affinity", usable >= needed, text)


def site(cluster: Cluster, folder: Path) -> Iterator[Finding]:
    """Compare what SLURM says about itself with the cluster file; `folder` is where the runs are to lie."""
    missing = missing_programs()
    if "sbatch" in missing:
        yield Finding("SLURM", True, "no sbatch here: sweeps run on this machine alone")
        return
    for program in missing:
        yield Finding(program, False, f"is missing on this machine: {PROGRAMS[program]}")
    found = ask_site()
    if found is None:
        yield Finding("controller", False, "does not answer `scontrol show config`: ask where to log in, or wait")
        return
    yield Finding("controller", True, f"{found.name}, SLURM {found.version}")
    for each in cluster.classes:
        yield _class(each, cluster, found)
    if "srun" not in missing:
        yield from accepted(cluster, folder)
    yield from _limits(found)
    yield from _signals(found, cluster)
    yield _accounting(found)


def _class(shape: ResourceClass, cluster: Cluster, found: Site) -> Finding:
    subject = f"class {shape.name}"
    default = next((each.name for each in found.partitions.values() if each.default), None)
    name = placement(cluster, shape)["partition"] or default
    names = name.split(",") if name else []
    if not names or not found.partitions.keys() >= set(names):
        allowed = ", ".join(sorted(found.partitions)) or "none is visible"
        what = f"partition {name!r} is unknown" if name else "no partition is the default"
        return Finding(subject, False, f"{what}; set `partition` in the cluster file: {allowed}")
    wrong = {
        each: list(_unfit(shape, found.partitions[each], [node for node in found.nodes if each in node.partitions]))
        for each in names
    }
    if all(wrong.values()):  # SLURM starts a job in the first of its partitions that has room for it
        told = "; ".join(f"in partition {each}: {'; '.join(reasons)}" for each, reasons in wrong.items())
        return Finding(subject, False, told)
    text = f"{shape.gpus} GPU, {shape.cpus} cores, {shape.memory_gb:g} GB, {shape.hours:g} h"
    fits = ", ".join(each for each, reasons in wrong.items() if not reasons)
    return Finding(subject, True, f"fits partition {fits}: {text}")


def accepted(cluster: Cluster, folder: Path) -> Iterator[Finding]:
    """Ask sbatch whether it would take a job of each class: account, partition, QOS and further options together."""
    for each in cluster.classes:
        why = refusal(cluster, each, folder)
        said = f"refuses a job of it: {why}; change the cluster file" if why else "would take a job of it"
        yield Finding(f"submission of {each.name}", why is None, f"sbatch --test-only {said}")


def _unfit(shape: ResourceClass, partition: Partition, nodes: Sequence[Node]) -> Iterator[str]:
    """Yield every reason why a class does not fit into a partition with these nodes."""
    if partition.state != "UP":
        yield f"it is {partition.state}"
    if shape.hours > partition.hours:
        yield f"{shape.hours:g} h are more than its limit: set hours to at most {partition.hours:g}"
    if not nodes:
        return
    tasks = max(1, shape.gpus)
    if not any(node.cpus >= tasks * shape.cpus for node in nodes):
        yield f"no node has {tasks * shape.cpus} cores"
    if not any(node.memory_gb >= tasks * shape.memory_gb for node in nodes):
        yield f"no node has {tasks * shape.memory_gb:g} GB"
    if shape.gpus and not any(node.gpus >= shape.gpus for node in nodes):
        yield f"no node has {shape.gpus} GPU: set gpus to 0, or another partition"
    if shape.constraint and not any(shape.constraint in node.features for node in nodes):
        yield f"no node has the feature {shape.constraint!r}"


def _limits(found: Site) -> Iterator[Finding]:
    largest = found.jobs_per_array
    text = f"MaxArraySize {largest}: larger sweeps are split" if largest else "are off (MaxArraySize 0)"
    yield Finding("arrays", largest > 1, text)
    if found.jobs_per_user is not None:
        text = f"at most {found.jobs_per_user:,} submitted jobs a user: submit what fits, then submit again"
        yield Finding("jobs a user", True, text)


def _signals(found: Site, cluster: Cluster) -> Iterator[Finding]:
    wait, warning = found.kill_seconds, cluster.warning_seconds
    text = f"KillWait {wait} s after SIGTERM; a run stops {warning} s before its time limit"
    text += "" if warning > wait else f": set warning_seconds above {wait}"
    yield Finding("time limit", warning > wait, text)
    for each in found.partitions.values():
        if "REQUEUE" not in each.preempt_mode and "CANCEL" not in each.preempt_mode:
            continue
        subject, grace = f"preemption in {each.name}", f"{each.grace_seconds} s from SIGTERM to SIGKILL"
        if each.grace_seconds < 30:
            text = f"{each.preempt_mode} with only {grace}: set resources.checkpoint_minutes to the work you can lose"
            yield Finding(subject, False, text)
        else:
            yield Finding(subject, True, f"{each.preempt_mode}, {grace}")
    if cluster.requeue and not found.requeues:
        text = "the site does not requeue (JobRequeue 0): set `requeue: false`; the next submit goes on"
        yield Finding("requeue", False, text)
    else:
        yield Finding("requeue", True, "by SLURM itself" if found.requeues else "off, as the cluster file says")


def _accounting(found: Site) -> Finding:
    if found.accounting is None:
        return Finding("accounting", True, "off: status cannot say what ended a job without a message")
    if not found.accounting_answers:
        return Finding("accounting", False, f"{found.accounting}, but sacct does not answer: ask the site's support")
    return Finding("accounting", True, found.accounting)


def on_node(cluster: Cluster, folder: Path) -> Iterator[Finding]:
    """Run the doctor's probe on a node of each class; `folder` is where the runs are to lie."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in cluster.classes:
        token = folder / f".doctor.{uuid.uuid4().hex[:8]}"
        token.write_text(socket.gethostname())
        words = [
            cluster.python or sys.executable,
            "-m",
            "slurm.doctor",
            str(token.absolute()),
            str(each.cpus),
            str(int(each.gpus > 0)),
        ]
        try:
            output, why = run_on_node(cluster, each, words)
            found = [Finding.from_json(row) for row in json.loads(output.splitlines()[-1])] if output else []
        except ValueError:
            found, why = [], "the node printed no findings"
        finally:
            token.unlink(missing_ok=True)
        if not found:
            yield Finding(f"a node of {each.name}", False, f"cannot be asked: {why}")
        for finding in found:
            yield replace(finding, subject=f"a node of {each.name}: {finding.subject}")


def probe(token: Path, cpus: int, gpu: bool) -> list[Finding]:
    """Return the findings of the probe that `on_node` runs on a node.

    `token` is a file in the folder of the runs, `cpus` the cores and `gpu` whether a GPU was asked for.
    """
    visible, host = token.exists(), socket.gethostname()
    text = f"{host} {'sees' if visible else 'does not see'} {token.parent}"
    text += "" if visible else ": put the runs on a shared file system"
    found = [Finding("shared file system", visible, text)]
    found += affinity(cpus)
    found += accelerator()
    found += offline()
    if gpu and any(each.subject == "GPU" and each.text.startswith("none") for each in found):
        found.append(
            Finding("GPU", False, "a GPU was requested, but none is visible; check partition and gpus of the class")
        )
    has = shutil.which("scontrol") is not None
    text = "here: a job can requeue itself" if has else "is missing: a stopped job waits for the next submit"
    found.append(Finding("scontrol", True, text))
    return found


def print_findings(findings: Iterable[Finding]) -> int:
    """Print each finding as it comes. Returns DONE if all are fine, else FAILED."""
    from rich.text import Text

    output, changes = console(soft_wrap=True), 0
    for each in findings:
        changes += not each.fine
        verdict = Text("fine  ", "green") if each.fine else Text("change", "bold red")
        output.print(verdict, Text(f"{each.subject}: ", "bold") + Text(each.text), sep="  ")
    output.print(f"{changes} to change" if changes else "all fine", style="bold")
    return FAILED if changes else DONE


def command(args: Namespace) -> int:
    """`embedscale doctor [--cluster FILE] [--sweep FILE] [--folder FOLDER] [--on-node]`."""
    from slurm import grid

    sweep = grid.load(args.sweep) if args.sweep else None
    cluster = clusters.load(args.cluster) if args.cluster or not sweep else sweep.cluster
    folder = sweep.folder if sweep else Path(args.folder)
    local = sorted({run.backbone.name for run in sweep.runs}) if sweep and cluster.offline else []

    def findings() -> Iterator[Finding]:
        yield from installation()
        if any(metadata.version(name) in bad for name, bad in MALICIOUS.items() if _installed(name)):
            return  # the other checks could import it
        yield from accelerator()
        yield from offline(local)
        yield from file_system(folder)
        yield from affinity()
        yield from site(cluster, folder)
        if args.on_node and shutil.which("srun"):
            yield from on_node(cluster, folder)

    if args.json:
        found = list(findings())
        print_json(found)
        return DONE if all(each.fine for each in found) else FAILED
    return print_findings(findings())


if __name__ == "__main__":
    print(json.dumps([each.to_json() for each in probe(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")]))
