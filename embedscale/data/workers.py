"""Run functions on all cores in processes that stop within seconds: at a signal, an error, or their parent's death.

The workers are forked from a small server process, not from this one: a fork of this process would inherit the locks of
its threads. The price is half a second at the start.
"""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.synchronize import Event
from typing import Any

from embedscale.process import usable_cores
from embedscale.progress import Bar
from embedscale.run.stop import StopRequest, end_with_parent

LOOK_SECONDS = 0.2  # between looks at a request to stop


@contextmanager
def worker_pool(module: str) -> Iterator[ProcessPoolExecutor]:
    """Hold a pool of one process per core, forked from a server that has imported `module`.

    When the block is left, `parent_leaves` becomes true in the workers, then the pool waits for them.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    _start_server()
    leaving = context.Event()
    with ProcessPoolExecutor(usable_cores(), context, _begin_worker, (leaving,)) as pool:
        try:
            yield pool
        finally:
            leaving.set()


def in_parallel(
    pool: ProcessPoolExecutor, what: str, work: Callable[[Any], Any], items: list[Any], stop: StopRequest
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, work(item)) in the order of completion, under a progress bar named `what`.

    Only a few items are submitted ahead. Raises KeyboardInterrupt if a stop is requested.
    """
    waiting, running = iter(items), dict[Future[Any], Any]()
    with Bar(what, total=len(items)) as bar:
        try:
            while True:
                if stop.requested:
                    raise KeyboardInterrupt
                for item in islice(waiting, 2 * usable_cores() - len(running)):
                    running[pool.submit(work, item)] = item
                if not running:
                    return
                for done in wait(running, LOOK_SECONDS, FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
                    bar.advance()
        finally:
            for future in running:
                future.cancel()


def _start_server() -> None:
    """Start the fork server with SIGINT blocked, so that Ctrl-C during its imports prints no traceback."""
    resource_tracker.ensure_running()  # otherwise started by the server's start, and not blocking SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_leaving: Event  # in a worker: set when its parent leaves the pool


def _begin_worker(leaving: Event) -> None:
    global _leaving  # an Event cannot be sent with a task
    _leaving = leaving
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many workers as cores
    gc.disable()  # workers make millions of small objects and no reference cycles
    end_with_parent({signal.SIGINT})


def parent_leaves() -> bool:
    """Return, in a worker, whether the result of the current task is no longer needed. Ask this in long loops."""
    return _leaving.is_set()
