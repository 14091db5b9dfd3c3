"""The other verbs, killed at random moments and called again until they are done; their files must be the same."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from bench import METHODS, Bench, tracebacks
from tally import KILLS, Hit, Tally
from training_runs import comparable

from embedscale.errors import DONE, FAILED, INTERRUPTED, WRONG
from embedscale.run.directory import RunDirectory
from embedscale.run.settings import load

TIMES = {"time", "seconds", "wall_seconds"}  # keys of JSON that differ from call to call
CALLS = 40  # after which a verb that is killed no more must be done


@dataclass
class Verb:
    """A command that writes into a folder."""

    words: Callable[[Path], list[str]]
    """Return the command line that writes into this folder."""
    weight: int
    result: Callable[[Path], object]
    """Return what must be the same each time."""
    seconds: float = 0.0
    """Of an undisturbed call."""
    truth: object = None


def disturb(bench: Bench, tally: Tally, rng: random.Random) -> None:
    """Kill commands until the time is up."""
    verbs = _verbs(bench)
    for name, verb in verbs.items():
        verb.seconds, verb.truth = 1.0, _finish(bench, verb, bench.folder / "verbs" / name)
    number = 0
    while tally.left > 0:
        name = rng.choices(list(verbs), [verb.weight for verb in verbs.values()])[0]
        tally.add(_disturbed(bench, tally, rng, name, verbs[name], bench.folder / "verbs" / f"{name}-{number}"))
        number += 1


def _finish(bench: Bench, verb: Verb, folder: Path) -> object:
    folder.mkdir(parents=True)
    begun = time.monotonic()
    code, said = bench.call(*verb.words(folder))
    assert code == DONE, said
    verb.seconds = time.monotonic() - begun
    return verb.result(folder)


def _disturbed(bench: Bench, tally: Tally, rng: random.Random, name: str, verb: Verb, folder: Path) -> list[Hit]:
    """Call a verb until it is done, and kill it some times on the way."""
    folder.mkdir(parents=True)
    hits: list[Hit] = []
    wanted = rng.randrange(2, 7)

    def note(fault: str, outcome: str, problem: str | None = None) -> None:
        hits.append(Hit("verbs", name, fault, "any", outcome, folder.name, problem))

    for _ in range(CALLS):
        process = bench.start(*verb.words(folder))
        fault = "nothing"
        if len(hits) < wanted and tally.left > 0:
            tally.show(f"{name}: {len(hits)} of {wanted} kills")
            process.wait(rng.uniform(0, verb.seconds))
            if process.returncode is None:
                fault = rng.choice(KILLS)
                _kill(process.pid, signal.Signals[fault], children=rng.random() < 0.3)
        code, said = bench.end(process)
        allowed = {DONE, INTERRUPTED} | ({-signal.Signals[fault]} if fault in KILLS else set())
        wrong = tracebacks(said)
        if code not in allowed:
            elsewhere = code in (FAILED, WRONG) and any(t in said for t in ("another", "elsewhere", "running"))
            wrong = None if elsewhere else f"status {code}: {said[-600:]}"
        if fault != "nothing" or wrong:
            note(fault, {DONE: "done", INTERRUPTED: "interrupted"}.get(code or 0, "killed"), wrong)
        if wrong:
            return hits
        if code == DONE and (found := verb.result(folder)) is not None:
            if found != verb.truth:
                note("all of these", "compared", f"other files than those of an undisturbed call: {folder}")
            else:
                shutil.rmtree(folder)
            return hits
        if code != DONE and fault == "nothing":
            time.sleep(0.5)  # a process of the killed call may still be at its end
    note("all of these", "compared", f"not done after {CALLS} calls: {said[-600:]}")
    return hits


def _kill(pid: int, number: signal.Signals, children: bool) -> None:
    """Send a signal to a command, or first to one of the processes that it has started."""
    with suppress(psutil.Error, ProcessLookupError):
        process = psutil.Process(pid)
        if children:
            for child in process.children(recursive=True)[:1]:
                child.send_signal(signal.SIGKILL)
        process.send_signal(number)


def _tree(folder: Path) -> object:
    """Return the content of every file of a folder; of JSON, what does not tell the time."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content: object = path.read_bytes()
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            if isinstance(values, dict):
                content = json.dumps({key: value for key, value in values.items() if key not in TIMES | {"checksum"}})
        found[str(path.relative_to(folder))] = content
    return found


def _verbs(bench: Bench) -> dict[str, Verb]:
    words = [*bench.words, *METHODS["lora"], "budget=1e9", f"output={bench.folder / 'finished'}"]
    assert bench.call("train", *words)[0] == DONE
    run = load(None, words).folder
    texts = bench.folder / "many.txt"
    texts.write_text("".join(f"text number {number} of many\n" for number in range(20_000)))

    def copied(folder: Path) -> Path:
        if not (folder / "run").exists():
            shutil.copytree(run, folder / "run")
        return folder / "run"

    def swept(folder: Path) -> list[str]:
        settings = {key: value for key, _, value in (word.partition("=") for word in bench.words)}
        file = folder / "few.yaml"
        lines = [f"output: {folder / 'runs'}", "methods: [full, bias]", "axes: {budget: [1e9], training.seed: [0, 1]}"]
        lines += ["base:", *(f"  {key}: {value}" for key, value in settings.items()), "  data.repeat: true"]
        file.write_text("\n".join([*lines, "  resources.checkpoint_minutes: 0", ""]))
        return ["sweep", "submit", str(file), "--to", "here", "--retry-failed"]

    def runs(folder: Path) -> object:
        found = [RunDirectory(path) for path in sorted((folder / "runs" / "few").glob("[!.]*"))]
        done = [comparable(each) for each in found if each.record.exists()]
        return done if len(done) == 4 else None

    return {
        "prepare": Verb(lambda at: ["prepare", *bench.data, f"data.store={at / 'store'}"], 5, _tree),
        "encode": Verb(lambda at: ["encode", str(run), str(texts), str(at / "out")], 5, _tree),
        "evaluate": Verb(lambda at: ["evaluate", str(copied(at))], 3, lambda at: _tree(at / "run" / "scores")),
        "export": Verb(lambda at: ["export", str(run), str(at / "model")], 1, lambda at: _tree(at / "model")),
        "sweep submit": Verb(swept, 5, runs),
    }
