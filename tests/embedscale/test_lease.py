"""The lease of a run: which process holds it, and when a process loses it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedscale.errors import UserError
from embedscale.files import write_atomically
from embedscale.process import ProcessName
from embedscale.run.lease import STALE_SECONDS, Lease, lease_holder


def left_behind(path: Path, age: float = 0.0, **facts) -> None:
    """Write a lease of this host and container whose last heartbeat is this many seconds old."""
    here = ProcessName.of_this_process()
    place = {"host": here.host, "boot": here.boot, "namespace": here.namespace}
    path.write_text(json.dumps(place | {"token": "another's"} | facts))
    then = time.time() - age
    os.utime(path, (then, then))


@pytest.mark.parametrize("pid", [1, os.getpid()], ids=["another process", "this process"])
def test_a_reused_process_number_holds_no_lease(tmp_path, pid):
    """After a reboot or a restart of the container, another process may have the number; even this process may."""
    path = tmp_path / "lease.json"
    left_behind(path, pid=pid, born="-1", time="2026-01-01T00:00:00+00:00")
    assert lease_holder(path) is None
    lease = Lease(path)
    lease.take()
    assert lease.left_behind == "2026-01-01T00:00:00+00:00"
    assert lease_holder(path).token == lease.holder.token
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        Lease(path).take()
    lease.release()


@pytest.mark.parametrize(
    "unseen",
    [
        {"boot": None, "namespace": None},
        {"boot": "of another machine with this one's name"},
        {"namespace": "pid:[1]"},
        {"host": "elsewhere"},
        {"born": None},
    ],
    ids=["version 0.2", "another boot", "another container", "another host", "version 0.1"],
)
@pytest.mark.parametrize("pid", [1, 2**22 + 1])  # the second is larger than any process number
def test_the_heartbeat_decides_where_the_process_cannot_be_seen(tmp_path, unseen, pid):
    path = tmp_path / "lease.json"
    left_behind(path, **{"pid": pid, "born": "77"} | unseen)
    assert lease_holder(path).token == "another's"
    with pytest.raises(UserError, match="already at work"):
        Lease(path).take()
    left_behind(path, age=2 * STALE_SECONDS, **{"pid": pid, "born": "77"} | unseen)
    assert lease_holder(path) is None


NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
separate = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="this machine does not let us make a namespace of process numbers",
)
IMPORT = "import sys; from embedscale.run.lease import *; path = Path(sys.argv[1]); "
HOLD = IMPORT + "Lease(path).take(); print('held', flush=True); input()"
LOOK = IMPORT + "print(lease_holder(path) is not None)"


@separate
def test_containers_take_no_live_lease_from_each_other(tmp_path):
    """Each has its own numbers: the holder is process 1 or 2 there, and nothing of that kind here."""
    path = tmp_path / "lease.json"
    for holder, other in (([], NAMESPACE), (NAMESPACE, []), (NAMESPACE, NAMESPACE)):
        words = [*holder, sys.executable, "-c", HOLD, str(path)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            look = [*other, sys.executable, "-c", LOOK, str(path)]
            assert subprocess.run(look, capture_output=True, text=True, check=True).stdout == "True\n"
            process.kill()
        then = time.time() - 2 * STALE_SECONDS
        os.utime(path, (then, then))
        assert subprocess.run(look, capture_output=True, text=True, check=True).stdout == "False\n"
        path.unlink()


def test_a_living_process_of_this_host_keeps_its_lease_without_heartbeats(tmp_path):
    path = tmp_path / "lease.json"
    program = (
        "import sys; from embedscale.run.lease import Lease, Path; Lease(Path(sys.argv[1])).take(); input(print())"
    )
    with subprocess.Popen([sys.executable, "-c", program, path], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        then = time.time() - 2 * STALE_SECONDS
        os.utime(path, (then, then))
        assert lease_holder(path).pid == process.pid
        process.kill()
    assert lease_holder(path) is None


@pytest.mark.parametrize("ahead", [-1000, 1000])
def test_the_age_of_a_lease_follows_the_clock_of_the_file_system(tmp_path, monkeypatch, ahead):
    """A reader whose clock differs by minutes takes over no fresh lease, and does not wait for a stale one."""
    path = tmp_path / "lease.json"
    stale = tmp_path / "stale.json"
    left_behind(path, host="elsewhere", pid=1)
    left_behind(stale, host="elsewhere", pid=1, age=STALE_SECONDS + 20)
    here = time.time
    monkeypatch.setattr(time, "time", lambda: here() + ahead)
    assert lease_holder(path) is not None and lease_holder(stale) is None
    assert sorted(tmp_path.iterdir()) == [path, stale], "the look leaves nothing behind"


def test_a_process_that_lost_its_lease_neither_renews_nor_releases_it(tmp_path):
    said = []
    first, second = Lease(tmp_path / "lease.json", lambda: said.append("lost")), Lease(tmp_path / "lease.json")
    first.holder = replace(first.holder, host="elsewhere")
    first.take()
    assert first.held()
    then = time.time() - 2 * STALE_SECONDS  # as after a suspension
    os.utime(first.path, (then, then))
    second.take()
    before = second.path.read_text()
    first.beat()
    assert not first.held() and said == ["lost"]
    first.release()
    assert second.path.read_text() == before and second.held()
    second.release()
    assert not second.path.exists()


def test_an_impossible_folder_is_not_blamed_on_another_process(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "scratch that was unmounted")
    with pytest.raises(FileExistsError, match="runs"):
        Lease(tmp_path / "runs" / "run" / "lease.json").take()


def test_a_removed_lease_is_not_written_again(tmp_path):
    """Another process may have taken the lease, finished the run and released the lease."""
    lease = Lease(tmp_path / "lease.json")
    lease.take()
    lease.path.unlink()
    lease.beat()
    assert not lease.path.exists() and not lease.held()
    lease.release()


def test_the_file_that_stays_is_synchronised(tmp_path, monkeypatch):
    """safetensors replaces the file that it is given by another one."""
    synchronised, fsync = [], os.fsync

    def noted(descriptor):
        synchronised.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    path = tmp_path / "weights.safetensors"
    write_atomically(path, lambda file: save_file({"x": torch.ones(3)}, file.name))
    assert path.stat().st_ino in synchronised
    assert torch.equal(load_file(path)["x"], torch.ones(3))
