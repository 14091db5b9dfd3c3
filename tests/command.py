"""The command line in real processes, without the seconds of imports that each would pay."""

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace


class Command:
    """`embedscale WORDS` in a process forked from `server`; what the tests use of `subprocess.Popen`."""

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
        assert self.wait(timeout) is not None, f"still at it after {timeout} s: {self.stdout.read()}"
        return self.stdout.read(), None


def _run(words: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with Path(output).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from embedscale.cli import main

    sys.exit(main(words))
