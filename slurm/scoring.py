"""MTEB scores of a sweep's finished runs, apart from training: one run after another, one task at a time."""

import traceback
from collections.abc import Sequence

from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.run.config import RunConfig
from embedscale.run.stop import StopRequest
from embedscale.serving.tasks import HELD_OUT, names_of, task_of


def checked(words: Sequence[str]) -> list[str]:
    """Return the tasks of `--evaluate`, with suites expanded. Raises UserError for a task that mteb does not know."""
    names = names_of(words)
    for name in names:
        if name != HELD_OUT:
            try:
                task_of(name)
            except UserError as error:  # it names the option of `embedscale evaluate`
                raise UserError(str(error).replace("--tasks:", "--evaluate:", 1)) from None
    return names


def score_all(runs: Sequence[RunConfig], names: Sequence[str], stop: StopRequest) -> dict[str, str]:
    """Score runs on these tasks until `stop` is requested; tasks that have a score are left out.

    Returns the outcome by run id: done, failed or interrupted.
    """
    from embedscale.serving.evaluate import evaluate

    outcomes = dict.fromkeys((run.run_id for run in runs), "interrupted")
    for run in runs:
        if stop.requested:
            break
        try:
            code = evaluate(str(run.folder), names, stop=stop)
        except UserError as error:
            print(f"{run.run_id}: {error}", flush=True)
            code = FAILED
        except Exception:  # mteb's tasks raise many classes; the other runs must still be scored
            traceback.print_exc()
            code = FAILED
        outcomes[run.run_id] = {DONE: "done", INTERRUPTED: "interrupted"}.get(code, "failed")
    return outcomes
