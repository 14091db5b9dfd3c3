"""A request to stop: signals and the clock only raise a flag, which the training loop reads between steps."""

import os
import signal
import threading
import time
from collections.abc import Iterable
from multiprocessing import parent_process

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Raised by a signal, by the clock, or by hand; never lowered."""

    def __init__(self, deadline: float | None = None):
        self.reason: str | None = None
        self.deadline = deadline  # time.time() at which to stop though no signal came

    def request(self, reason: str) -> None:
        self.reason = self.reason or reason

    @property
    def requested(self) -> bool:
        if self.reason is None and self.deadline is not None and time.time() >= self.deadline:
            self.request("the time is up")
        return self.reason is not None

    def on_signals(self, signals: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
        """Let each of `signals` raise this flag and do nothing else.

        A child of this process (a loader worker) inherits the handler, and so ignores the signal that SLURM sends
        to every process of a job; its parent ends it. Only the main thread may call this.
        """
        owner = os.getpid()

        def handler(number: int, frame: object) -> None:
            if os.getpid() != owner:
                return
            if number == signal.SIGINT and self.reason == "SIGINT":
                raise KeyboardInterrupt  # asked a second time: the user will not wait for the step's end
            self.request(signal.Signals(number).name)

        for number in signals:
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Let this worker process end with the one that started it, whatever kills that."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
