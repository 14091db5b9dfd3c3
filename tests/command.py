"""The command line and Python code in real processes."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace


class Command:
    """`embedscale WORDS` in a process forked from the fixture `server`, with the methods of `subprocess.Popen`."""

    def __init__(self, server, words: list[str], environment: dict[str, str], folder: Path):
        handle, self.output = tempfile.mkstemp(suffix=".out", dir=folder)
        os.close(handle)
        self.process = server.Process(target=_run, args=(words, environment, str(folder), self.output))
        self.process.start()
        self.pid = self.process.pid
        self.stdout = SimpleNamespace(read=Path(self.output).read_text)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        assert self.wait(timeout) is not None, f"still running after {timeout} s: {self.stdout.read()}"
        return self.stdout.read(), None


def _run(words: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line begins: no error of this function is its own
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with Path(output).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from embedscale.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(words))


def in_fresh_process(code: str, *words: str, path: Path | None = None) -> str:
    """Run Python code in a new process that is offline, and return its output. `path` shadows installed packages."""
    environment = {"PYTHONPATH": str(path)} if path else {}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        capture_output=True,
        text=True,
        env=os.environ | environment | offline,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
