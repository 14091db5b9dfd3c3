"""Requests to stop: signals and deadlines only set a flag, and the training loop reads it between two steps."""

import os
import signal
import threading
import time
from collections.abc import Iterable
from multiprocessing import parent_process

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """A flag that a signal, a deadline or a caller sets, and that stays set."""

    def __init__(self, deadline: float | None = None):
        self.reason: str | None = None
        self.deadline = deadline  # time.time() at which to stop without a signal

    def request(self, reason: str) -> None:
        """Set the flag. The first reason is kept."""
        self.reason = self.reason or reason

    @property
    def requested(self) -> bool:
        """Return whether to stop."""
        if self.reason is None and self.deadline is not None and time.time() >= self.deadline:
            self.request("the time is up")
        return self.reason is not None

    def on_signals(self, signals: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
        """Let each of `signals` set this flag and do nothing else. Only the main thread may call this.

        A child of this process, such as a loader, inherits the handler and ignores the signal that SLURM sends to every
        process of a job; its parent ends it.
        """
        owner = os.getpid()

        def handler(number: int, frame: object) -> None:
            if os.getpid() != owner:
                return
            if number == signal.SIGINT and self.reason == "SIGINT":
                raise KeyboardInterrupt  # the user pressed Ctrl-C again: do not wait for the end of the step
            self.request(signal.Signals(number).name)

        for number in signals:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored by nohup
                signal.signal(number, handler)


def end_with_parent(ignored: Iterable[signal.Signals] = ()) -> None:
    """End this worker process as soon as the process that started it ends, even by SIGKILL.

    The signals of `ignored` may reach both. The parent acts on them.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
