"""Refits run in as many processes as there are cores: with equal results, and none of them is left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from threading import Thread

import numpy as np
import pandas as pd
import pytest
from psutil import Process

from analysis import runs
from analysis.fitting.fit import fit

pytestmark = pytest.mark.slow

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this process may use one core only")


def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n, c = (each.ravel() for each in np.meshgrid([1e6, 3e6, 1e7, 3e7, 1e8], [1e15, 4e15, 1.6e16, 6.4e16]))
    loss = 1.5 + 480 / n**0.35 + 2080 / (c / 6 / n) ** 0.37
    return pd.DataFrame(
        {
            "n_parameters": n,
            "budget_flop": c,
            "tokens": c / 6 / n,
            "loss": loss * np.exp(0.01 * rng.standard_normal(20)),
        }
    )


@needs_two_cores
def test_a_fit_is_the_same_with_one_core_and_with_several():
    several, before = fit(runs.load(table()), bootstrap=250), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        one = fit(runs.load(table()), bootstrap=250)
    finally:
        os.sched_setaffinity(0, before)
    assert replace(several, made="") == replace(one, made="")


@needs_two_cores
def test_a_killed_process_changes_nothing():
    """The kernel kills a process where memory is short."""
    whole = fit(runs.load(table()), bootstrap=400)
    killed = []

    def kill() -> None:
        while not (children := Process().children()):
            time.sleep(0.01)
        killed.append(children[0])
        children[0].kill()

    killer = Thread(target=kill)
    killer.start()
    again = fit(runs.load(table()), bootstrap=400)
    killer.join()
    assert killed
    assert replace(again, made="") == replace(whole, made="")


@needs_two_cores
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_ends_all_processes_of_a_fit(tmp_path, number):
    table().to_csv(tmp_path / "own.csv", index=False)
    command = [sys.executable, "-m", "embedscale.cli", "fit", "own.csv", "--bootstrap", "20000"]
    fitting = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        started = time.monotonic()
        while not (children := Process(fitting.pid).children()) and time.monotonic() < started + 60:
            time.sleep(0.05)
        time.sleep(0.5)
        children = Process(fitting.pid).children()
        assert len(children) == len(os.sched_getaffinity(0))
        os.killpg(fitting.pid, number) if number == signal.SIGINT else fitting.send_signal(number)
        printed = fitting.communicate(timeout=60)[1]
        assert printed == ("" if number == signal.SIGKILL else "embedscale: interrupted\n")
        deadline = time.monotonic() + 30
        while any(child.is_running() for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(child.is_running() for child in children)
    finally:
        fitting.kill()
