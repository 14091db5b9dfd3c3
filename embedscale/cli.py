"""The command line: which function each verb calls. What a verb takes is in `options`.

Only this module and `adaptive.sweep` may import from all three packages. A verb's function is imported when the verb is
used, so that `--help` loads nothing. A `UserError` becomes one line and an exit status, never a traceback.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from embedscale.errors import DONE, FAILED, INTERRUPTED, WRONG, UserError, short_of_memory
from embedscale.imports import load
from embedscale.options import parse, parser
from embedscale.terminal import outlive_readers

TYPE_CHECKING = False  # as in `imports`
if TYPE_CHECKING:
    from typing import Any

# Errors of the system that no other command would have avoided: disk full, quota, disk failure, reader gone.
BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE)

# The dataclass with the settings of each kind of configuration file.
SCHEMAS = {
    "run": "embedscale.run.config:RunConfig",
    "sweep": "slurm.grid:SweepFile",
    "cluster": "slurm.cluster:Cluster",
}


def prepare(args: argparse.Namespace) -> int:
    return load("embedscale.data.prepare:prepare")(_config(args))


def flops(args: argparse.Namespace) -> int:
    return load("embedscale.training.pricing.flops:print_flops")(_config(args), args.budgets, args.json)


def train(args: argparse.Namespace) -> int:
    if args.recipe is None:
        if args.fits is not None:
            raise UserError("--fits: tells --recipe where to look; give --recipe BUDGET too")
        config = _config(args)
    else:
        file, words = _file_and_words(args)
        config = load("analysis.recipe:configuration")(args.fits or ".", args.recipe, file, words)
    load("embedscale.training.plan:refuse_early")(config)
    return load("embedscale.training.train:train")(config)


def calibrate(args: argparse.Namespace) -> int:
    config, what = _config(args), (args.sizes, args.methods, args.seconds)
    load("embedscale.training.pricing.calibration:configs_of")(
        config, *what
    )  # tells what is wrong before torch is imported
    if Path(args.out).is_dir():
        raise UserError(f"--out: {args.out} is a folder; name a file, such as {args.out}/calibration.json")
    load("embedscale.files:check_folder")(Path(args.out).parent, "--out")
    return load("embedscale.training.pricing.calibrate:calibrate")(config, args.out, *what)


def evaluate(args: argparse.Namespace) -> int:
    return load("embedscale.serving.evaluate:evaluate")(args.run_folder, args.tasks)


def export(args: argparse.Namespace) -> int:
    return load("embedscale.serving.export:export")(args.run_folder, args.folder)


def encode(args: argparse.Namespace) -> int:
    run = load("embedscale.serving.encode:encode")
    return run(args.run_folder, args.texts, args.out, args.column, args.format, blank=args.blank)


def complete() -> None:
    """Print what could follow the command that a shell has so far, and exit: argcomplete asks by a variable."""
    import argcomplete

    def words(prefix: str, action: argparse.Action, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
        if action.dest != "words":
            return argcomplete.FilesCompleter()(prefix)
        from embedscale.run.settings import known_keys

        kind = "sweep" if hasattr(parsed_args, "sweep") else getattr(parsed_args, "of", "run")
        return [*argcomplete.FilesCompleter()(prefix), *(f"{key}=" for key in known_keys(load(SCHEMAS[kind])))]

    argcomplete.autocomplete(parser(), default_completer=words)


def submit(args: argparse.Namespace) -> int:
    if args.adaptive:
        return load("embedscale.adaptive.sweep:command")(args)
    if args.spend or args.budget:
        raise UserError("--spend and --for: say what an adaptive sweep may choose; give --adaptive too")
    return load("slurm.submit:command")(args)


def config(args: argparse.Namespace) -> int:
    from embedscale.run.settings import commented, read

    print(commented(read(load(SCHEMAS[args.of]), *_file_and_words(args))))
    return DONE


def fit(args: argparse.Namespace) -> int:
    if args.replay is not None and args.simulate is None:
        return load("analysis.summary:replayed")(args)
    if args.simulate is None:
        return load("analysis.summary:command")(args)
    grid = _grid(args.runs) if args.runs.endswith((".yaml", ".yml")) else None
    return load("analysis.summary:simulation")(args, grid)


def _file_and_words(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Split a verb's words into the configuration file, if there is one, and the settings."""
    words = list(args.words)
    return (words.pop(0), words) if words and "=" not in words[0] else (None, words)


def _config(args: argparse.Namespace) -> Any:
    return load("embedscale.run.settings:load")(*_file_and_words(args))


def _grid(file: str) -> Any:
    """Return the runs of a sweep file that can be run, as a table for the analysis, which knows no sweeps.

    Raise UserError if none of them can be run.
    """
    import pandas as pd

    from embedscale.run.cost import cost_of
    from embedscale.texts import counted
    from slurm import grid
    from slurm.cluster import shape_of
    from slurm.plan import plan_sweep

    plan, rows = plan_sweep(grid.load(file)), []
    for run in (each.run for each in plan.runnable):
        cost = cost_of(shape_of(run.backbone.name, run.backbone.revision), run.method)
        rows.append(
            {"run": run.run_id, "method": run.method.name, "n_parameters": cost.n_parameters, "budget_flop": run.budget}
            | {"flop_per_token": cost.flop_per_token, "trainable_fraction": cost.trainable_fraction}
            | {"rank": run.method.rank, "learning_rate": run.training.learning_rate, "seed": run.training.seed}
        )
    left_out = counted(len(plan.blocked), "run")
    if not rows:
        raise UserError(f"{file}: none of its {left_out} can be run; `embedscale sweep plan` says why")
    if plan.blocked:
        print(f"left out: {left_out} that cannot be run; `embedscale sweep plan` says why")
    return pd.DataFrame(rows).astype({"rank": float, "learning_rate": float})


# Each verb, and the function that it calls with the parsed arguments; a text is imported when the verb is used.
VERBS: dict[str, Callable[[argparse.Namespace], int] | str] = {
    "prepare": prepare,
    "config": config,
    "flops": flops,
    "train": train,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "export": export,
    "encode": encode,
    "sweep plan": "slurm.plan:command",
    "sweep prefetch": "slurm.prefetch:command",
    "sweep submit": submit,
    "sweep status": "slurm.status:command",
    "sweep watch": "slurm.status:watch",
    "sweep cancel": "slurm.cancel:command",
    "fit": fit,
    "recipe": "analysis.recipe:command",
    "report": "analysis.report:command",
    "doctor": "slurm.doctor:command",
}


class _Interrupted(KeyboardInterrupt):
    """Raised by a signal.

    Not KeyboardInterrupt itself: if one passes through `exec`, as in the definition of a dataclass, Python changes the
    exit status of `python -m`.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit status: 0 done, 1 failed, 2 wrong command, 75 interrupted and resumable."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    outlive_readers()
    signals: list[int] = []
    hang_up = set() if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else {signal.SIGHUP}  # ignored by nohup

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        raise _Interrupted

    for number in {signal.SIGINT, signal.SIGTERM} | hang_up:
        signal.signal(number, interrupt)  # until a verb installs its own handlers
        # At its end Python removes handlers, and a late signal would then change the exit status.
        atexit.register(signal.signal, number, signal.SIG_IGN)
    try:
        args = parse(argv)
        run = VERBS[args.verb]
        code = int((load(run) if isinstance(run, str) else run)(args))
        print(end="", flush=True)  # a full disk is an error
        return code
    except (KeyboardInterrupt, Exception) as error:
        # Any error may follow a signal: OmegaConf, for one, raises an error of its own when it is interrupted.
        if signals or isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, lambda number, frame: None)  # the user may press Ctrl-C again
            message, code = "interrupted", INTERRUPTED
        elif isinstance(error, UserError):
            message, code = str(error), WRONG
        elif isinstance(error, ModuleNotFoundError):
            message, code = f"the package {error.name!r} is missing", FAILED
        elif isinstance(error, OSError) and error.errno is not None:  # without a number, a library raised it
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
            code = FAILED if error.errno in BROKEN else WRONG
        elif short_of_memory(error):
            message, code = f"too little memory: {error}".strip().splitlines()[0], FAILED
        else:
            raise
        print(f"embedscale: {message}", file=sys.stderr)
        return code
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # already reported; without this, Python would report it again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
