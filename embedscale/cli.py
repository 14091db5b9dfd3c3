"""The command line: what each verb takes, and which function it calls.

This is the only module that may import from all three packages. A verb's function is imported when the verb is used, so
that `--help` loads nothing. A `UserError` becomes one line and an exit status, never a traceback.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from embedscale.errors import DONE, FAILED, INTERRUPTED, WRONG, UserError
from embedscale.imports import load
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

Verb = Callable[[argparse.Namespace], int]


def number(text: str) -> float:
    """Return the finite number of an option; argparse says what is wrong with any other text."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def verb_at(place: str) -> Verb:
    """Return a verb that imports "package.module:function" when it is used, and calls it with the arguments."""
    return lambda args: load(place)(args)


def prepare(args: argparse.Namespace) -> int:
    return load("embedscale.data.prepare:prepare")(_config(args))


def flops(args: argparse.Namespace) -> int:
    return load("embedscale.training.plan:print_flops")(_config(args), args.budgets)


def train(args: argparse.Namespace) -> int:
    if args.recipe is None:
        if args.fits is not None:
            raise UserError("--fits: tells --recipe where to look; give --recipe BUDGET too")
        config = _config(args)
    else:
        file, words = _file_and_words(args)
        config = load("analysis.recipe:configuration")(args.fits or ".", args.recipe, file, words)
    return load("embedscale.training.train:train")(config)


def calibrate(args: argparse.Namespace) -> int:
    run = load("embedscale.training.calibrate:calibrate")
    return run(_config(args), args.out, args.sizes, args.methods, args.seconds)


def evaluate(args: argparse.Namespace) -> int:
    return load("embedscale.serving.evaluate:evaluate")(args.run_folder, args.tasks)


def export(args: argparse.Namespace) -> int:
    return load("embedscale.serving.export:export")(args.run_folder, args.folder)


def encode(args: argparse.Namespace) -> int:
    run = load("embedscale.serving.encode:encode")
    return run(args.run_folder, args.texts, args.out, args.column, args.format, blank=args.blank)


def config(args: argparse.Namespace) -> int:
    from embedscale.run.settings import commented, read

    print(commented(read(load(SCHEMAS[args.of]), *_file_and_words(args))))
    return DONE


def fit(args: argparse.Namespace) -> int:
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
    """Return the runs of a sweep file as a table for the analysis, which knows neither settings nor sweeps."""
    import pandas as pd

    from embedscale.run.cost import cost_of
    from slurm import grid
    from slurm.cluster import shape_of

    rows, refused = [], 0
    for run in grid.load(file).runs:
        shape = shape_of(run.backbone.name)
        try:
            cost = cost_of(shape, run.method)
        except UserError:
            refused += 1
            continue
        rows.append(
            {"run": run.run_id, "method": run.method.name, "n_parameters": cost.n_parameters, "budget_flop": run.budget}
            | {"flop_per_token": cost.flop_per_token, "trainable_fraction": cost.trainable_fraction}
            | {"rank": run.method.rank, "learning_rate": run.training.learning_rate, "seed": run.training.seed}
        )
    if refused:
        print(f"left out: {refused} runs whose method does not fit their backbone; `embedscale sweep plan` lists them")
    return pd.DataFrame(rows).astype({"rank": float, "learning_rate": float})


def _with_config(verbs: Any, name: str, run: Verb, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text)
    verb.add_argument(
        "words", nargs="*", metavar="[CONFIG] key=value", help="a YAML file, then settings that override it"
    )
    verb.set_defaults(run=run)
    return verb


def _run_verbs(verbs: Any) -> None:
    _with_config(verbs, "prepare", prepare, "tokenise text pairs into a store; run it again to continue")
    shown = _with_config(verbs, "config", config, "print every setting with its value, default and meaning, as YAML")
    shown.add_argument("--of", choices=list(SCHEMAS), default="run", help="what the file configures (default: run)")
    costs = _with_config(verbs, "flops", flops, "show what a run costs, without loading a model")
    costs.add_argument("--budgets", nargs="+", metavar="FLOP", help="budgets to show (default: that of the settings)")
    trained = _with_config(verbs, "train", train, "train one run; run it again to resume it")
    trained.add_argument(
        "--recipe", metavar="BUDGET", help="train what the fits recommend for this budget: 1e17, '24 device-hours'"
    )
    trained.add_argument(
        "--fits",
        metavar="FITS",
        help="folder written by `embedscale fit`; used with --recipe (default: current folder)",
    )
    measured = _with_config(verbs, "calibrate", calibrate, "measure how fast this hardware trains each size and method")
    measured.add_argument(
        "--sizes",
        nargs="+",
        default=["pythia-14m"],
        metavar="SIZE",
        help="names of known models, or folders of models (default: pythia-14m)",
    )
    usual = ["full", "freeze-0.5", "bias", "lora-r32"]
    measured.add_argument(
        "--methods", nargs="+", default=usual, metavar="METHOD", help=f"methods to measure (default: {' '.join(usual)})"
    )
    measured.add_argument(
        "--seconds", type=number, default=10.0, metavar="S", help="time to measure each of them (default: 10)"
    )
    measured.add_argument(
        "--out",
        default="calibration.json",
        metavar="FILE",
        help="file to write; an existing one is continued (default: calibration.json)",
    )


def _model_verbs(verbs: Any) -> None:
    def action(name: str, run: Verb, text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("run_folder", metavar="RUN", help="directory of a finished run")
        verb.set_defaults(run=run)
        return verb

    scored = action("evaluate", evaluate, "score a finished run with MTEB: one file per task in RUN/scores")
    suites = "MTEB tasks, or the suites held-out, paper, published-code (default: held-out)"
    scored.add_argument("--tasks", nargs="+", default=["held-out"], metavar="NAME", help=suites)
    exported = action("export", export, "export a finished run as a sentence-transformers model")
    exported.add_argument("folder", metavar="FOLDER", help="folder to write; it must be new or empty")
    encoded = action("encode", encode, "embed the texts of a file; run it again to continue")
    encoded.add_argument(
        "texts", metavar="TEXTS", help="a .txt file (one text per line), a .jsonl, .csv or .parquet file"
    )
    encoded.add_argument("out", metavar="OUT", help="folder to write: 00000.npy, 00001.npy, …")
    encoded.add_argument(
        "--column", default="text", metavar="NAME", help="column of a .jsonl, .csv or .parquet file (default: text)"
    )
    encoded.add_argument(
        "--blank", default="zero", metavar="KIND", help="what a blank text gets: zero (a row of zeros) or drop (no row)"
    )
    encoded.add_argument("--format", default="npy", metavar="KIND", help="npy or arrow (default: npy)")


def _sweep_verbs(verbs: Any) -> None:
    text = "plan, run and watch many runs from one YAML file"
    actions = verbs.add_parser("sweep", help=text, description=text).add_subparsers(metavar="ACTION", required=True)

    def action(name: str, place: str, text: str) -> argparse.ArgumentParser:
        verb = actions.add_parser(name, help=text, description=text)
        verb.add_argument("sweep", metavar="SWEEP", help="a YAML file, such as configs/sweep/paper.yaml")
        verb.add_argument(
            "words", nargs="*", metavar="key=value", help="settings that override the file: axes.budget=[1e15]"
        )
        verb.set_defaults(run=verb_at(place))
        return verb

    plan = action("plan", "slurm.plan:command", "show what the sweep costs, and which runs are impossible")
    plan.add_argument("--each", action="store_true", help="show a row for each run")
    plan.add_argument(
        "--max-gpu-hours", type=number, metavar="H", help="refuse a sweep that needs more by the estimate"
    )
    fetch = action(
        "prefetch", "slurm.prefetch:command", "download models, tokenizers and pairs, for nodes without a network"
    )
    fetch.add_argument("--evaluate", nargs="+", metavar="TASK", help="also the data of these MTEB tasks or suites")
    submit = action("submit", "slurm.submit:command", "start the runs that are missing or interrupted, and return")
    submit.add_argument(
        "--to",
        metavar="WHERE",
        help="where to run: slurm, or here on this machine (default: slurm, or here without it)",
    )
    submit.add_argument("--retry-failed", action="store_true", help="also start failed runs again")
    submit.add_argument("--max-gpu-hours", type=number, metavar="H", help="refuse if the started runs need more")
    submit.add_argument(
        "--evaluate", nargs="+", metavar="TASK", help="score finished runs: MTEB tasks, or held-out, paper, …"
    )
    action("status", "slurm.status:command", "show the state of every run")
    watch = action("watch", "slurm.status:watch", "show the status repeatedly until all runs are done or Ctrl-C")
    watch.add_argument("--every", type=number, default=10.0, metavar="SECONDS", help="time between looks (default: 10)")
    cancel = action("cancel", "slurm.cancel:command", "end the sweep's jobs and its processes on this machine")
    cancel.add_argument("--yes", action="store_true", help="do not ask first")


def _fit_verb(verbs: Any) -> None:
    text = "fit optima, scaling laws and intervals to finished runs; writes fits.json"
    verb = verbs.add_parser("fit", help=text, description=text)
    verb.add_argument(
        "runs",
        metavar="RUNS",
        help="folder of runs, or a table (.csv, .tsv, .json, .jsonl, .parquet, .gz); with --simulate a sweep file",
    )
    verb.add_argument(
        "--columns",
        action="append",
        metavar="OURS=THEIRS[:UNIT],…",
        help="names of columns that are not recognised, with a unit where it is another: loss=bpb,tokens=D:1e9",
    )
    text = "use only the rows that have this value in a column, ours or any of the table; may be repeated"
    verb.add_argument("--where", action="append", metavar="NAME=VALUE", help=text)
    text = "do not read these columns of a table: rows that differ only in them are replicates"
    verb.add_argument("--ignore", action="append", metavar="NAME,…", help=text)
    verb.add_argument(
        "--out", metavar="FOLDER", help="folder for fits.json (default: RUNS, or the current folder for a table)"
    )
    text = "joint law of N and D: chinchilla, or tied (one exponent for both) (default: chinchilla)"
    verb.add_argument("--law", default="chinchilla", metavar="KIND", help=text)
    verb.add_argument(
        "--residual",
        default="huber",
        metavar="KIND",
        help="loss function for fitting joint laws: huber, lad, log or raw (default: huber)",
    )
    verb.add_argument("--delta", type=number, default=1e-3, help="Huber's delta, in ln L (default: 1e-3)")
    text = "parabola, law, best-run, or akima (on dense grids it underestimates the loss) (default: parabola)"
    verb.add_argument("--optimum", default="parabola", metavar="KIND", help=text)
    verb.add_argument(
        "--window", type=number, default=4.0, metavar="FACTOR", help="range of N around the optimum (default: 4)"
    )
    text = "compare runs within N bins a decade of compute (default: within nearly equal budgets)"
    verb.add_argument("--bins", type=number, metavar="N", help=text)
    text = "standard deviation of ln L (default: from repeated runs and residuals)"
    verb.add_argument("--noise", type=number, metavar="SD", help=text)
    verb.add_argument("--bootstrap", type=int, default=1000, metavar="DRAWS", help="bootstrap draws (default: 1000)")
    verb.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    verb.add_argument(
        "--simulate",
        metavar="LAW",
        help="test a grid on a known law: E=…,A=…,B=…,alpha=…,beta=… or a fits.json",
    )
    verb.set_defaults(run=fit)


def _report_verbs(verbs: Any) -> None:
    text = "recommend what to train for a budget, using the fitted laws"
    verb = verbs.add_parser("recipe", help=text, description=text)
    verb.add_argument("fits", metavar="FITS", help="folder written by `embedscale fit`, or its fits.json")
    # argparse would take a budget such as -1e17 for an option; this lets our own range check refuse it.
    verb._negative_number_matcher = re.compile(r"-\d")
    verb.add_argument(
        "budget", metavar="BUDGET", nargs="*", help="such as 1e17, 100 PFLOP, 2 PFLOP-days or 24 device-hours"
    )
    verb.add_argument("--tokens", metavar="D", help="limit of the data; without a budget, the data to be used")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=verb_at("analysis.recipe:command"))
    text = "write one page with the recipe, all figures, the laws and the runs left out: report.html"
    verb = verbs.add_parser("report", help=text, description=text)
    verb.add_argument("fits", metavar="FITS", help="folder written by `embedscale fit`")
    verb.add_argument("--out", metavar="FOLDER", help="folder for report.html and the figures (default: FITS)")
    verb.add_argument("--budget", action="append", metavar="BUDGET", help="begin with its recipe; may be repeated")
    verb.add_argument("--compare", metavar="FITS", help="fits of another batch size or context, for figure 23")
    verb.set_defaults(run=verb_at("analysis.report:command"))


def _doctor_verb(verbs: Any) -> None:
    text = "check this machine, the installation and the cluster"
    verb = verbs.add_parser("doctor", help=text, description=text)
    verb.add_argument("--cluster", metavar="FILE", help="cluster file to check, such as configs/cluster/a100.yaml")
    verb.add_argument("--sweep", metavar="FILE", help="sweep file whose cluster, backbones and folder to check")
    verb.add_argument("--folder", default="runs", help="folder where runs will be written (default: runs)")
    verb.add_argument("--on-node", action="store_true", help="also check a node of each resource class, through srun")
    verb.set_defaults(run=verb_at("slurm.doctor:command"))


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs. `run` of the parsed arguments is the verb's function."""
    from embedscale import __version__

    text = "Compute-optimal recipes for turning language models into text-embedding models."
    top = argparse.ArgumentParser(prog="embedscale", description=text)
    top.add_argument("--version", action="version", version=f"embedscale {__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    _run_verbs(verbs)
    _model_verbs(verbs)
    _sweep_verbs(verbs)
    _fit_verb(verbs)
    _report_verbs(verbs)
    _doctor_verb(verbs)
    return top


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command. Settings may stand anywhere in it, which argparse alone does not allow for a list of words."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if [word for word in rest if word.startswith("-") or not hasattr(args, "words")]:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(args, "words"):
        for name, values in vars(args).items():
            if name != "words" and isinstance(values, list):  # an option with several values took settings too
                rest += [value for value in values if "=" in value]
                setattr(args, name, [value for value in values if "=" not in value])
        args.words += rest
    for name, value in vars(args).items():
        if isinstance(value, str) and value.startswith("~/"):  # a shell leaves it so in --out=~/x
            setattr(args, name, str(Path(value).expanduser()))
    return args


class _Interrupted(KeyboardInterrupt):
    """Raised by a signal.

    Not KeyboardInterrupt itself: if one passes through `exec`, as in the definition of a dataclass, Python changes the
    exit status of `python -m`.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit status: 0 done, 1 failed, 2 wrong command, 75 interrupted and resumable."""
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
        code = int(args.run(args))
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
