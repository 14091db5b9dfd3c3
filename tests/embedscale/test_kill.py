"""A run that is killed at random moments, by SIGKILL or SIGTERM, ends with the bits of an undisturbed run."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_runs import METHODS, comparable

from embedscale.errors import DONE, INTERRUPTED
from embedscale.run.directory import RunDirectory
from embedscale.run.settings import load

KILLS = 6


def _train(words, tmpdir):
    os.environ["TMPDIR"] = tmpdir
    from embedscale.training.train import train

    os._exit(train(load(None, words)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("name", METHODS)
def test_kills_do_not_change_the_result(server, tmp_path, tiny_run, name, number):
    words = [*tiny_run, *METHODS[name], "budget=4e9", "resources.checkpoint_minutes=0"]
    # TMPDIR is on another file system: checkpoints must not pass through it.
    other = "/dev/shm" if Path("/dev/shm").is_dir() else str(tmp_path)

    def start(folder, workers):
        run = [*words, f"output={tmp_path / folder}", f"resources.workers={workers}"]
        process = server.Process(target=_train, args=(run, other))
        process.start()
        return process, RunDirectory(load(None, run).folder)

    def wait_for_steps(process, directory, steps):
        """Wait until the run has made this many steps. A fixed time would not do: speed varies on a busy machine."""
        attempts, made = len(directory.read_attempts()), -1
        while process.is_alive() and made < steps:
            time.sleep(0.002)
            found = directory.read_attempts()
            if len(found) > attempts:
                newest = max((int(path.stem[5:]) for path in directory.checkpoints.glob("step-*.pt")), default=0)
                made = newest - (newest if found[-1].from_step is None else found[-1].from_step)

    begun = time.monotonic()
    process, whole = start("whole", 0)
    wait_for_steps(process, whole, 0)
    starting = time.monotonic() - begun
    process.join()
    assert process.exitcode == DONE

    rng, kills, resumed = random.Random(f"{name} {number}"), 0, 0
    for again in range(KILLS):  # if a run ends before it was killed often enough, another one follows
        code = None
        while code != DONE:
            process, directory = start(f"killed-{again}", 2 * (kills % 2))
            if kills < KILLS:
                if kills % 4:
                    wait_for_steps(process, directory, rng.randrange(4))
                    process.join(rng.uniform(0, 0.02))
                else:
                    process.join(rng.uniform(0.03, 0.5) * starting)
                if process.is_alive():
                    os.kill(process.pid, number)
                    kills += 1
            process.join(300)  # much longer than any run here: a process that hangs fails the test
            code = process.exitcode
            assert code in (DONE, INTERRUPTED, -number)
        assert comparable(directory) == comparable(whole)
        resumed += sum((attempt.from_step or 0) > 0 for attempt in directory.read_attempts())
        if kills == KILLS:
            break
    assert kills == KILLS and resumed > 0


def test_no_loader_outlives_a_run_that_is_killed(server, tmp_path, tiny_run):
    words = [*tiny_run, f"output={tmp_path / 'runs'}", "budget=1e12", "data.repeat=true", "resources.log_every=1"]
    words += ["resources.workers=2"]
    process = server.Process(target=_train, args=(words, str(tmp_path)))
    process.start()
    directory = RunDirectory(load(None, words).folder)
    while not directory.read_metrics():
        assert process.is_alive()
        time.sleep(0.05)
    loaders = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    assert len(loaders) == 2 and not psutil.wait_procs(loaders, timeout=60)[1]


def _error_of_a_loader(error, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    from embedscale.training.train import begin_worker

    begin_worker(0)
    sys.excepthook(type(error), error, None)


@pytest.mark.parametrize(("error", "printed"), [(EOFError(), 0), (ConnectionResetError(), 0), (ValueError("x"), 1)])
def test_a_loader_prints_no_traceback_when_its_run_is_killed(server, tmp_path, error, printed):
    """As the thread that passes batches on does, when the run ends in the middle of a batch."""
    process = server.Process(target=_error_of_a_loader, args=(error, str(tmp_path / "output")))
    process.start()
    process.join()
    assert len((tmp_path / "output").read_text().splitlines()) == printed
