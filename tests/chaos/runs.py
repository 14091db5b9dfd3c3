"""Runs of all four methods, hit at random moments until they end; each must end with the bits of a run left alone."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from bench import METHODS, SECONDS, Bench, phase_of, suspend, tracebacks
from command import Command
from damage import cut, flipped
from tally import Hit, Tally
from training_runs import comparable

from embedscale.errors import DONE, FAILED, INTERRUPTED, WRONG
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import Holder
from embedscale.run.settings import load
from embedscale.training.plan import PlanFile

BUDGET = "budget=2e9"
# How often each phase is looked for, and each fault is chosen.
PHASES = {"start-up": 45, "imports": 3, "step": 12, "checkpoint": 25, "evaluation": 8, "record": 18}
FAULTS = {"SIGKILL": 40, "SIGTERM": 12, "SIGINT": 12, "SIGHUP": 12, "SIGSTOP": 6, "a second process": 2}
FAULTS |= {"few files": 3, "little memory": 3, "small files": 2, "clock jump": 2, "folder moved away": 2}
ON_MOUNT = {"full disk": 8, "read-only": 8}  # chosen too where the run lies on a file system of its own
MOUNT_BYTES = 24_000_000


def disturb(bench: Bench, tally: Tally, rng: random.Random) -> None:
    """Disturb runs until the time is up."""
    whole = {}
    for method in METHODS:
        case = Case(bench, tally, rng, method, 0, bench.folder / "whole")
        begun = time.monotonic()
        code, said = bench.end(case.start(fresh=not whole))
        assert code == DONE, said
        case.seconds = time.monotonic() - begun
        whole[method] = case
    imports = whole["full"].seconds
    number = 0
    while tally.left > 0:
        method, workers = list(METHODS)[number % 4], 2 * (number // 4 % 2)
        with _place(bench.folder / f"runs-{number}", number % 6 == 5) as (folder, mounted):
            case = Case(bench, tally, rng, method, workers, folder, mounted)
            case.imports, case.seconds = imports, whole["lora"].seconds
            case.disturb(comparable(whole[method].directory), PlanFile.read(whole[method].directory.plan))
        number += 1


@contextmanager
def _place(folder: Path, own: bool) -> Iterator[tuple[Path, bool]]:
    """A folder for a run; with `own`, on a small file system of its own, if this user may mount one."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={MOUNT_BYTES}", "tmpfs", str(folder)]
    mounted = own and subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


class Case:
    """One run, disturbed until it ends."""

    imports = seconds = 1.0

    def __init__(
        self, bench: Bench, tally: Tally, rng: random.Random, method: str, workers: int, folder: Path, mounted=False
    ):
        self.bench, self.tally, self.rng, self.folder, self.mounted = bench, tally, rng, folder, mounted
        self.method, self.workers = method, workers
        self.words = ["train", *bench.words, *METHODS[method], BUDGET, f"output={folder / 'out'}"]
        self.words += ["resources.checkpoint_minutes=0", "resources.log_every=1", f"resources.workers={workers}"]
        self.directory = RunDirectory(load(None, self.words[1:]).folder)
        self.hits: list[Hit] = []
        self.undo: list[Callable[[], object]] = []
        self.elsewhere = False  # whether the last attempt wrote into another folder, which is gone

    @property
    def name(self) -> str:
        return f"{self.method}, {self.workers} workers"

    def start(self, fresh: bool = False) -> Command:
        return self.bench.start(*self.words, fresh=fresh)

    def disturb(self, whole, plan) -> None:
        """Hit the run until it is done, then compare it. Where the time is up, let it end first."""
        self.evaluated_after = plan.plan.evaluate_after
        wanted = 10 + self.rng.randrange(12)
        code = None
        while code != DONE or self.elsewhere:
            self.elsewhere = False
            code = self.attempt(fault=len(self.hits) < wanted and self.tally.left > 0)
            if any(hit.problem for hit in self.hits):
                break
        problem = next((hit.problem for hit in self.hits if hit.problem), None)
        if problem is None:
            found = comparable(self.directory)
            for what, one, other in zip(("metrics", "record", "weights"), found, whole, strict=True):
                if one != other:
                    problem = f"the {what} differ from those of the run left alone"
                    self.note("all of these", "end", "compared", problem)
            left = {p.name for p in self.directory.path.rglob("*") if p.is_file()}
            extra = {n for n in left if n.endswith((".partial", ".pt", ".stale")) or n == "lease.json"}
            if extra:
                self.note("all of these", "end", "compared", f"left behind: {', '.join(sorted(extra))}")
        if any(hit.problem for hit in self.hits):
            kept = self.bench.folder / f"broken-{self.folder.name}"
            shutil.copytree(self.folder, kept, dirs_exist_ok=True)
            self.tally.say(f"kept in {kept}")
            self.hits = [hit for hit in self.hits if hit.problem]  # the others were not compared
        self.tally.add(self.hits)

    def note(self, fault: str, phase: str, outcome: str, problem: str | None = None) -> None:
        self.hits.append(Hit("local", self.name, fault, phase, outcome, f"{self.folder.name}", problem))

    def attempt(self, fault: bool) -> int | None:
        """Start the run, hit it once if it comes to the phase that was drawn, and wait for its end."""
        if not fault:
            code, said = self.bench.end(self.start())
            if code != DONE or "Traceback" in said:
                self.note("nothing", "last attempt", "ended", f"status {code}: {said[-600:]}")
            return code
        phase = self.rng.choices(list(PHASES), list(PHASES.values()))[0]
        faults = FAULTS | (ON_MOUNT if self.mounted else {})
        what = self.rng.choices(list(faults), list(faults.values()))[0]
        if phase == "imports" and what not in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"):
            phase = "start-up"
        process = self.start(fresh=phase == "imports")
        try:
            moment = self.reach(process, phase)
            if moment is None:
                return self.ended(process, "nothing", phase, False)
            return self.hit(process, what, moment)
        finally:
            for undo in self.undo:
                undo()
            self.undo.clear()

    def reach(self, process: Command, phase: str) -> str | None:
        """Suspend the process when it is in a phase; return the phase, or None if the process ended before."""
        if phase in ("start-up", "imports"):
            process.wait(self.rng.uniform(0, self.imports if phase == "imports" else 0.6 * self.seconds))
            if not suspend(process.pid):
                return None
            found = phase_of(self.directory, process.pid, self.evaluated_after)
            return phase if found == "start-up" else found
        steps = self.rng.randrange(6) if phase in ("step", "checkpoint") else 0
        begun = None
        while process.returncode is None:
            self.tally.show(f"{self.name}: waiting for {phase}")
            time.sleep(self.rng.uniform(0.0002, 0.002))
            if (found := phase_of(self.directory, process.pid, self.evaluated_after)) == "start-up":
                continue
            newest = self.directory.newest_step or 0
            begun = newest if begun is None else begun
            if found == phase and newest >= begun + steps:
                time.sleep(self.rng.uniform(0, 0.002))
                if not suspend(process.pid):
                    return None
                if phase_of(self.directory, process.pid, self.evaluated_after) == phase:
                    return phase
                os.kill(process.pid, signal.SIGCONT)
        return None

    def hit(self, process: Command, what: str, phase: str) -> int | None:
        """Do it to the suspended process, and say how that ended."""
        pid = process.pid
        self.tally.show(f"{self.name}: {what} in {phase}")
        if what.startswith("SIG") and what != "SIGSTOP":
            process.send_signal(signal.Signals[what])
        elif what == "SIGSTOP":
            time.sleep(self.rng.uniform(0.01, 0.5))
        elif what == "few files":
            opened = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened + self.rng.randrange(4),) * 2)
        elif what == "little memory":
            used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (used + self.rng.randrange(2**23),) * 2)
        elif what == "small files":
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (self.rng.randrange(60_000),) * 2)
        elif what == "clock jump":
            when = time.time() + self.rng.choice([-1, 1]) * 10 * 365 * 86400
            for path in self.directory.path.rglob("*"):
                with suppress(FileNotFoundError):
                    os.utime(path, (when, when))
        elif what == "full disk":
            self.fill()
        elif what == "read-only":
            self.remount("ro")
        elif what == "folder moved away":
            aside = self.folder / "aside"
            with suppress(FileNotFoundError):
                self.directory.path.rename(aside)
                holder = Holder.read(aside / self.directory.lease.name)
                at_work = isinstance(holder, Holder) and holder.pid == pid
                self.undo.append(partial(self.back, aside, at_work))
        elif what == "a second process":
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.second(phase)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return self.ended(process, what, phase, True)

    def fill(self) -> None:
        filler = self.folder / "filler"
        self.undo.append(lambda: filler.unlink(missing_ok=True))
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(2**12))
                file.flush()

    def remount(self, how: str) -> None:
        """Remount read-only, for which no file may be open for writing: at the first such moment."""
        words = ["mount", "-o", f"remount,{how}", str(self.folder)]
        if subprocess.run(words, capture_output=True).returncode == 0 and how == "ro":
            self.undo.append(lambda: self.remount("rw"))

    def back(self, aside: Path, at_work: bool) -> None:
        """Move the run's folder back; what the process has made at its place meanwhile is nothing that counts.

        A process that was not `at_work` in the folder found none, and may have made the whole run anew.
        """
        if self.directory.path.exists():
            if at_work and self.directory.record.exists():
                self.note("folder moved away", "end", "compared", "a record was written into another folder")
            shutil.rmtree(self.directory.path)
            self.elsewhere = True
        aside.rename(self.directory.path)

    def second(self, phase: str) -> None:
        """A second process of the run refuses, or finds the run finished."""
        code, said = self.bench.end(self.start())
        wrong = tracebacks(said)
        if code == WRONG and "another process" not in said:
            wrong = said
        elif code not in (WRONG, DONE):
            wrong = f"status {code}: {said[-600:]}"
        self.note("a second process", phase, "refused" if code == WRONG else "done", wrong)

    def ended(self, process: Command, what: str, phase: str, hit: bool) -> int | None:
        """Wait for the end and judge it: the status, the output, and the files that the next attempt will need."""
        code, said = self.bench.end(process)
        allowed = {DONE, INTERRUPTED}
        if what.startswith("SIG") and what != "SIGSTOP":
            # A signal before the command line has set its handlers ends Python as any program.
            allowed |= {-signal.Signals[what]} if what == "SIGKILL" or phase in ("imports", "start-up") else set()
        elif what not in ("nothing", "SIGSTOP", "a second process", "clock jump"):
            allowed |= {WRONG, FAILED}
        if what == "little memory":  # native code of a library may not survive it
            allowed |= {-signal.SIGSEGV, -signal.SIGABRT}
        wrong = tracebacks(said)
        if code is None:
            wrong = f"did not end within {SECONDS:.0f} s: {said[-600:]}"
        elif code not in allowed:
            wrong = f"status {code}: {said[-600:]}"
        ends = {DONE: "done", INTERRUPTED: "interrupted", WRONG: "refused", FAILED: "failed"}
        if hit and what != "a second process":
            self.note(what, phase, ends.get(code or 0, "killed"), wrong)
        elif wrong:
            self.note(what, phase, "ended", wrong)
        if code != DONE and self.rng.random() < 0.06:
            self.damage()
        return code

    def damage(self) -> None:
        """Damage the newest of two checkpoints; the one before must serve."""
        paths = self.directory.checkpoint_paths()
        if len(paths) > 1:
            whole = paths[-1].read_bytes()
            way = self.rng.choice(["cut", "flipped"])
            paths[-1].write_bytes(cut(whole) if way == "cut" else flipped(whole, self.rng))
            self.note(f"checkpoint {way}", "between attempts", "older one served")
