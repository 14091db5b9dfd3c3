"""Files damaged in every way that a disk, a file server or a hand finds, read by the commands that use them.

A command may give the result of the undamaged files, or one line that names the file and, once the file is restored,
that result. Everything else is a broken promise.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from bench import METHODS, Bench, tracebacks
from damage import every_way
from records import record
from runs import BUDGET
from sweeps import miniature
from tally import Hit, Tally
from training_runs import comparable

from embedscale.errors import DONE, INTERRUPTED
from embedscale.run.directory import RunDirectory
from embedscale.run.record import RunRecord
from embedscale.run.settings import load
from slurm import grid
from slurm.scheduler.submissions import Submission, Submissions

BLOCK = 512  # bytes that are lost together
LEASE = {"host": "n1", "pid": 7, "born": "1", "token": "t", "start": "2026-01-01T00:00:00+00:00", "step": 1}


@dataclass
class Subject:
    """Files that one command reads, the command, and its right result."""

    name: str
    folder: Path
    """What is copied before a file in it is damaged."""
    files: list[Path]
    words: list[str]
    result: Callable[[int | None, str], object]
    """Return what must not change; None if the command refused."""
    excluded: Callable[[int | None, str], object] | None = None
    """A second right result, if the command names the file: as if what the file belongs to were not there."""
    values: int = 8
    """Contents of a JSON file with another value in one place."""
    weight: float = 1.0
    """How often a file of this subject is chosen, relative to others."""
    truth: object = None


def disturb(bench: Bench, tally: Tally, rng: random.Random) -> None:
    """Damage files until the time is up."""
    subjects = [_resumed(bench), _encoded(bench), _status(bench), *_swept(bench)]
    plan = [(subject, file) for subject in subjects for file in subject.files]
    weights = [subject.weight for subject, _ in plan]
    while tally.left > 0:
        subject, file = rng.choices(plan, weights)[0]
        if subject.truth is None:
            _restore(subject, keep=not _kept(subject).exists())
            code, said = bench.call(*subject.words)
            subject.truth = subject.result(code, said)
            assert subject.truth is not None, (subject.name, said)
        _restore(subject)
        ways = [*_ways(subject, file, rng)]
        for how, damage in rng.sample(ways, min(8, len(ways))):
            if tally.left > 0:
                tally.show(f"{subject.name}: {file.name}, {how}")
                tally.add([_try(bench, rng, subject, file, how, damage)])


def _kept(subject: Subject) -> Path:
    return subject.folder.with_name(f"{subject.folder.name}.kept")


def _restore(subject: Subject, keep: bool = False) -> None:
    """Put the files back as they were; with `keep`, remember how they are."""
    one, other = (subject.folder, _kept(subject)) if keep else (_kept(subject), subject.folder)
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(one, other)


def _ways(subject: Subject, file: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Name each damage, and how to do it."""
    whole = file.read_bytes()
    values = subject.values if file.suffix == ".json" else 0
    for how, content in every_way(file, rng, values):
        yield how, lambda path, content=content: path.write_bytes(content)
    start = rng.randrange(max(1, len(whole) - BLOCK))
    lost = whole[:start] + bytes(min(BLOCK, len(whole) - start)) + whole[start + BLOCK :]
    yield "a zeroed block", lambda path: path.write_bytes(lost)
    yield "doubled", lambda path: path.write_bytes(whole + whole)
    yield "removed", Path.unlink
    yield "a folder", lambda path: (path.unlink(), path.mkdir())
    yield "unreadable", lambda path: (path.unlink(), path.symlink_to(path))  # root may read whatever has a mode


def _try(bench: Bench, rng: random.Random, subject: Subject, file: Path, how: str, damage) -> Hit:
    """Damage a file, run the command, and judge what it did."""
    _restore(subject)
    before = file.read_bytes()
    damage(file)
    kind = how.rstrip(" 0123456789")
    code, said = bench.call(*subject.words)
    result, problem = subject.result(code, said), tracebacks(said)
    named = any(name in said for name in (str(file), str(file.parent), file.name))
    if problem:
        outcome = "traceback"
    elif code is None or code < 0:
        outcome, problem = "died", f"status {code}: {said[-500:]}"
    elif result == subject.truth:
        outcome = "named, same result" if named and str(file) in said else "same result"
    elif subject.excluded is not None and (named or how == "removed") and code == DONE and result is not None:
        outcome = "named and left out"
        if result != subject.excluded(code, str(file)):
            problem = f"other results changed: {said[-500:]}"
    elif code == DONE:
        outcome, problem = "DIFFERENT", f"another result in silence: {said[-500:]}"
    elif not named:
        outcome, problem = "refused", f"the file is not named: {said[-500:]}"
    elif len([line for line in said.splitlines() if line.startswith("embedscale: ")]) > 3:
        outcome, problem = "refused", f"more than a few lines: {said[-900:]}"
    else:
        outcome = "named and refused"
        if rng.random() < 0.15:  # nothing else may have been lost
            _put(file, before)
            again = subject.result(*bench.call(*subject.words))
            if again != subject.truth:
                problem = f"with the file restored, the result is another one after: {said[-400:]}"
    relative = file.relative_to(subject.folder)
    target = f"{subject.name}: {'checkpoint' if file.suffix == '.pt' else file.name}"
    return Hit("files", target, kind, subject.words[0], outcome, str(relative), problem and f"{how}: {problem}")


def _put(file: Path, content: bytes) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _resumed(bench: Bench) -> Subject:
    """A run with two checkpoints, its store and its backbone; `train` goes on with it."""
    folder = bench.folder / "resumed"
    shutil.copytree(bench.folder / "store", folder / "store")
    backbone = shutil.copytree(bench.backbone, folder / "pythia-tiny")
    words = ["train", *bench.words, *METHODS["full"], BUDGET, f"data.store={folder / 'store'}"]
    words += [f"backbone.name={backbone}", "resources.checkpoint_minutes=0", "resources.log_every=1"]
    directory = RunDirectory(load(None, [*words[1:], f"output={folder / 'runs'}"]).folder)
    process = bench.start(*words, f"output={folder / 'runs'}")
    while (directory.newest_step or 0) < 4 and process.returncode is None:
        pass
    process.send_signal(15)
    assert bench.end(process)[0] == INTERRUPTED and len(directory.checkpoint_paths()) == 2

    def result(code: int | None, said: str) -> object:
        return comparable(directory) if code == DONE and directory.record.exists() else None

    return Subject("resumed", folder, _files(folder), [*words, f"output={folder / 'runs'}"], result)


def _encoded(bench: Bench) -> Subject:
    """A finished run and half of its embeddings; `encode` goes on with them."""
    folder = bench.folder / "encoded"
    backbone = shutil.copytree(bench.backbone, folder / "pythia-tiny")
    words = ["train", *bench.words, *METHODS["lora"], "budget=1e9", f"backbone.name={backbone}"]
    words += [f"output={folder / 'runs'}"]
    assert bench.call(*words)[0] == DONE
    run = load(None, words[1:]).folder
    texts = bench.folder / "texts.txt"
    texts.write_text("".join(f"text number {number}\n" for number in range(300)))
    out = folder / "out"

    def result(code: int | None, said: str) -> object:
        with suppress(OSError, ValueError):
            if code == DONE:
                return [np.load(path).tobytes() for path in sorted(out.glob("*.npy"))]
        return None

    words = ["encode", str(run), str(texts), str(out)]
    assert bench.call(*words)[0] == DONE
    read = [path for path in _files(folder) if path.name not in ("attempt.json", "metrics.jsonl", "plan.json")]
    return Subject("encoded", folder, read, words, result)


def _swept(bench: Bench) -> Iterator[Subject]:
    """Finished runs of a sweep, read by `fit`; its fits, read by `recipe` and `report`."""
    folder = miniature(bench.folder / "swept" / "runs")
    for path in folder.iterdir():
        found = RunRecord.read(path / "record.json")
        assert isinstance(found, RunRecord)
        found.write(path / "record.json")  # with a checksum
    out = bench.folder / "fitted"

    def fits(code: int | None, said: str) -> object:
        if code != DONE:
            return None
        found = json.loads((out / "fits.json").read_text())
        return json.dumps({key: found[key] for key in ("methods",)})

    words = ["fit", str(folder), "--out", str(out), "--bootstrap", "100"]

    @cache
    def left(run: str) -> object:
        """Fit what is left when a run is away."""
        shutil.rmtree(run)
        return fits(*bench.call(*words))

    def without(code: int | None, file: str) -> object:
        return left(str(Path(file).parent))

    some = [folder / path.name / name for path in sorted(folder.iterdir())[:6] for name in ("record.json",)]
    yield Subject("fit", folder.parent, some, words, fits, without, weight=0.1)
    assert bench.call(*words)[0] == DONE
    yield Subject("recipe", out, [out / "fits.json"], ["recipe", str(out), "2e11"], _said, values=40, weight=4)
    yield Subject(
        "report", out, [out / "fits.json", out / "runs.csv"], ["report", str(out)], _said, values=8, weight=0.2
    )


def _said(code: int | None, said: str) -> object:
    return said if code == DONE else None


def _status(bench: Bench) -> Subject:
    """Four finished runs, one interrupted one and one that was never begun, read by `sweep status`."""
    folder = bench.folder / "status"
    folder.mkdir()
    file = folder / "few.yaml"
    file.write_text(f"output: {folder / 'runs'}\naxes: {{budget: 1e15, training.seed: [0, 1, 2, 3, 4, 5]}}\n")
    sweep = grid.load(file)
    directories = [RunDirectory(sweep.folder / run_id) for run_id in sweep.by_id][:5]
    for directory in directories:
        directory.begin_attempt().end("interrupted", reason="SIGTERM", from_step=0, from_flop=0, to_flop=5)
        directory.lease.write_text(json.dumps(LEASE))
        directory.record.write_text(json.dumps(record(run_id=directory.path.name)))
        RunRecord.read(directory.record).write(directory.record)  # type: ignore[union-attr]  # with a checksum
    directories[-1].record.unlink()
    Submissions(sweep.folder).note(Submission("few-1", [[directories[-1].path.name]], job_id="7"))
    words = ["sweep", "status", str(file)]

    def done(code: int | None, said: str) -> object:
        """The row of the finished runs."""
        rows = [[cell.strip() for cell in line.split("│")[1:7]] for line in said.splitlines() if "│ done " in line]
        return rows if code == DONE else None

    def without(code: int | None, path: str) -> object:
        """The row without the run of the damaged file."""
        shutil.rmtree(next(each.path for each in directories if str(each.path) in path))
        return done(*bench.call(*words))

    return Subject("status", folder, _files(folder / "runs"), words, done, without)
