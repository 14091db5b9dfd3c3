"""The command line: each verb a few lines that import what they need when they are called."""

import argparse
import atexit
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from embedscale.errors import FAILED, INTERRUPTED, WRONG, UserError
from embedscale.imports import importing

BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE)


def _config(args: argparse.Namespace):
    from embedscale.run import config

    words, path = list(args.words), None
    if words and "=" not in words[0]:
        path = words.pop(0)
    return config.load(path, words)


def _with_config(verbs, name: str, run, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text)
    verb.add_argument("words", nargs="*", metavar="[CONFIG] key=value", help="a YAML file, then settings over it")
    verb.set_defaults(run=run)
    return verb


def prepare(args: argparse.Namespace) -> int:
    from embedscale.data.prepare import prepare

    return prepare(_config(args))


def flops(args: argparse.Namespace) -> int:
    from embedscale.training.plan import print_flops

    return print_flops(_config(args), args.budgets)


def train(args: argparse.Namespace) -> int:
    if args.recipe is None:
        if args.fits is not None:
            raise UserError("--fits: says where --recipe looks; give --recipe BUDGET too")
        config = _config(args)
    else:
        from analysis.recipe import configuration

        file = args.words.pop(0) if args.words and "=" not in args.words[0] else None
        config = configuration(args.fits or ".", args.recipe, file, args.words)
    with importing():
        from embedscale.training.train import train

    return train(config)


def calibrate(args: argparse.Namespace) -> int:
    with importing():
        from embedscale.training.calibrate import calibrate

    return calibrate(_config(args), args.out, args.sizes, args.methods, args.seconds)


def evaluate(args: argparse.Namespace) -> int:
    with importing():
        from embedscale.serving.evaluate import evaluate

    return evaluate(args.run_folder, args.tasks)


def export(args: argparse.Namespace) -> int:
    with importing():
        from embedscale.serving.export import export

    return export(args.run_folder, args.folder)


def encode(args: argparse.Namespace) -> int:
    with importing():
        from embedscale.serving.encode import encode

    return encode(args.run_folder, args.texts, args.out, args.column, args.format)


def sweep_plan(args: argparse.Namespace) -> int:
    from slurm.plan import command

    return command(args)


def sweep_prefetch(args: argparse.Namespace) -> int:
    from slurm.prefetch import command

    return command(args)


def sweep_submit(args: argparse.Namespace) -> int:
    from slurm.submit import command

    return command(args)


def sweep_status(args: argparse.Namespace) -> int:
    from slurm.status import command

    return command(args)


def sweep_watch(args: argparse.Namespace) -> int:
    from slurm.status import watch

    return watch(args)


def sweep_cancel(args: argparse.Namespace) -> int:
    from slurm.status import cancel

    return cancel(args)


def doctor(args: argparse.Namespace) -> int:
    from slurm.doctor import command

    return command(args)


def fit(args: argparse.Namespace) -> int:
    if args.simulate is not None:
        from analysis.simulate import command as simulate

        return simulate(args, _grid(args) if args.runs.endswith((".yaml", ".yml")) else None)
    from analysis.fitting.fit import command

    return command(args)


def report(args: argparse.Namespace) -> int:
    from analysis.report import command

    return command(args)


def recipe(args: argparse.Namespace) -> int:
    from analysis.recipe import command

    return command(args)


def _grid(args: argparse.Namespace):
    """A sweep file's runs for the analysis, which knows neither configurations nor sweeps."""
    import pandas as pd

    from embedscale.run.cost import cost_of
    from slurm import grid
    from slurm.cluster import shape_of

    rows, refused = [], 0
    for run in grid.load(args.runs).runs:
        shape = shape_of(run.backbone.name)
        try:
            cost = cost_of(shape, run.method)
        except UserError:
            refused += 1
            continue
        share = cost.n_updated / cost.n_parameters
        if run.method.name == "freeze":
            share = len(run.method.training_blocks(shape.blocks)) / shape.blocks
        rows.append(
            {"run": run.run_id, "method": run.method.name, "params": cost.n_parameters, "budget": run.budget}
            | {"flop_per_token": cost.flop_per_token, "trainable_fraction": 1.0 if run.method.name == "full" else share}
            | {"rank": run.method.rank, "learning_rate": run.training.learning_rate, "seed": run.training.seed}
        )
    if refused:
        print(f"left out: {refused} runs whose method does not fit their backbone; embedscale sweep plan says which")
    return pd.DataFrame(rows).astype({"rank": float, "learning_rate": float})


def _sweep_verbs(verbs) -> None:
    text = "many runs from one YAML file"
    actions = verbs.add_parser("sweep", help=text, description=text).add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run, text: str) -> argparse.ArgumentParser:
        verb = actions.add_parser(name, help=text, description=text)
        verb.add_argument("sweep", metavar="SWEEP", help="a YAML file, such as configs/sweep/paper.yaml")
        verb.add_argument("words", nargs="*", metavar="key=value", help="settings over the file: axes.budget=[1e15]")
        verb.set_defaults(run=run)
        return verb

    plan = action("plan", sweep_plan, "what the sweep costs, and what of it cannot be run")
    plan.add_argument("--each", action="store_true", help="a row for each run")
    plan.add_argument("--max-gpu-hours", type=float, metavar="H", help="refuse a sweep estimated to need more")
    fetch = action("prefetch", sweep_prefetch, "models, tokenizers and pairs, fetched for nodes without a network")
    fetch.add_argument("--evaluate", nargs="+", metavar="TASK", help="the data of these mteb tasks or suites too")
    submit = action("submit", sweep_submit, "send out the runs that are missing or interrupted, and return")
    submit.add_argument("--to", choices=["slurm", "here", "this-process"], help="default slurm, or here without it")
    submit.add_argument("--retry-failed", action="store_true", help="failed runs too")
    submit.add_argument("--max-gpu-hours", type=float, metavar="H", help="refuse if what would go out needs more")
    submit.add_argument(
        "--evaluate", nargs="+", metavar="TASK", help="score the runs that are done: mteb's tasks, held-out, paper, …"
    )
    action("status", sweep_status, "where every run stands")
    watch = action("watch", sweep_watch, "the status, refreshed until all is done or Ctrl-C")
    watch.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="default 10")
    cancel = action("cancel", sweep_cancel, "end the sweep's jobs, and its processes here; asks first")
    cancel.add_argument("--yes", action="store_true", help="do not ask")


def _model_verbs(verbs) -> None:
    def action(name: str, run, text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("run_folder", metavar="RUN", help="the directory of a run that is done")
        verb.set_defaults(run=run)
        return verb

    scored = action("evaluate", evaluate, "MTEB scores of a run: RUN/scores, a file a task")
    suites = "mteb's, or a suite: held-out (default), paper, published-code"
    scored.add_argument("--tasks", nargs="+", default=["held-out"], metavar="NAME", help=suites)
    exported = action("export", export, "a run as a sentence-transformers model")
    exported.add_argument("folder", metavar="FOLDER", help="a new one")
    encoded = action("encode", encode, "texts into embeddings; run again, it goes on")
    encoded.add_argument("texts", metavar="TEXTS", help="a .txt (a text a line), .jsonl or .parquet file")
    encoded.add_argument("out", metavar="OUT", help="a folder for 00000.npy, 00001.npy, …")
    encoded.add_argument("--column", default="text", metavar="NAME", help="of .jsonl and .parquet; default text")
    encoded.add_argument("--format", default="npy", metavar="KIND", help="npy (default) or arrow")


def _fit_verb(verbs) -> None:
    text = "runs into optima, laws and intervals: fits.json"
    verb = verbs.add_parser("fit", help=text, description=text)
    verb.add_argument(
        "runs", metavar="RUNS", help="a folder of runs, a .csv, .parquet or .jsonl file; with --simulate a sweep"
    )
    verb.add_argument("--columns", metavar="OURS=THEIRS,…", help="params=N,tokens=D,budget=C,loss=loss")
    verb.add_argument("--where", action="append", metavar="NAME=VALUE", help="keep only these runs; may be repeated")
    verb.add_argument("--out", metavar="FOLDER", help="of fits.json; default RUNS, or here for a file")
    verb.add_argument(
        "--residual", default="huber", metavar="KIND", help="of joint laws: huber (default), lad, log or raw"
    )
    verb.add_argument("--delta", type=float, default=1e-3, help="Huber's, on ln L; default 1e-3")
    text = "parabola (default), law, or akima, whose loss is too low and too sure on dense grids"
    verb.add_argument("--optimum", default="parabola", metavar="KIND", help=text)
    verb.add_argument("--window", type=float, default=4.0, metavar="FACTOR", help="of N in the parabola; default 4")
    verb.add_argument("--noise", type=float, metavar="SD", help="standard deviation of ln L; default from replicates")
    verb.add_argument("--bootstrap", type=int, default=1000, metavar="DRAWS", help="default 1000")
    verb.add_argument("--seed", type=int, default=0, help="of the draws; default 0")
    verb.add_argument("--simulate", metavar="LAW", help="E=…,A=…,B=…,alpha=…,beta=… or a fits.json: try a grid on it")
    verb.set_defaults(run=fit)


def _report_verbs(verbs) -> None:
    text = "what to train for a budget, by the fits"
    verb = verbs.add_parser("recipe", help=text, description=text)
    verb.add_argument("fits", metavar="FITS", help="the folder that fit wrote into, or its fits.json")
    verb._negative_number_matcher = re.compile(r"-\d")  # -1e17 is a budget out of range, and no option
    verb.add_argument("budget", metavar="BUDGET", nargs="*", help="1e17, 100 PFLOP, 2 PFLOP-days, 24 GPU-hours")
    verb.add_argument("--tokens", metavar="D", help="at most so much data; with no budget, for this much")
    verb.add_argument("--json", action="store_true", help="print it as JSON")
    verb.set_defaults(run=recipe)
    text = "one page with the recipe, every figure, the laws and what was left out: report.html"
    verb = verbs.add_parser("report", help=text, description=text)
    verb.add_argument("fits", metavar="FITS", help="the folder that fit wrote into")
    verb.add_argument("--out", metavar="FOLDER", help="of report.html and figures; default FITS")
    verb.add_argument("--budget", action="append", metavar="BUDGET", help="a recipe for it first; may be repeated")
    verb.add_argument("--compare", metavar="FITS", help="of another batch size or context, for figure 23")
    verb.set_defaults(run=report)


def _doctor_verb(verbs) -> None:
    text = "is this machine, installation and cluster fit to run"
    verb = verbs.add_parser("doctor", help=text, description=text)
    verb.add_argument("--cluster", metavar="FILE", help="the cluster file to check, such as configs/cluster/a100.yaml")
    verb.add_argument("--sweep", metavar="FILE", help="a sweep file, for its cluster, its backbones and its folder")
    verb.add_argument("--folder", default="runs", help="where runs are to lie; default runs")
    verb.add_argument("--on-node", action="store_true", help="also ask a node of each resource class, by srun")
    verb.set_defaults(run=doctor)


def parser() -> argparse.ArgumentParser:
    from embedscale import __version__

    top = argparse.ArgumentParser(prog="embedscale", description="Compute-optimal recipes for text-embedding models.")
    top.add_argument("--version", action="version", version=f"embedscale {__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    _with_config(verbs, "prepare", prepare, "text pairs into a PairStore")
    costs = _with_config(verbs, "flops", flops, "what a run costs, before anything is loaded")
    costs.add_argument("--budgets", nargs="+", metavar="FLOP", help="several budgets; default the configuration's")
    trained = _with_config(verbs, "train", train, "one run; run again, it resumes or says that it is done")
    trained.add_argument(
        "--recipe", metavar="BUDGET", help="what the fits advise for this budget: 1e17, '24 GPU-hours'"
    )
    trained.add_argument("--fits", metavar="FITS", help="of --recipe: the folder that fit wrote into; default here")
    measured = _with_config(verbs, "calibrate", calibrate, "what this hardware reaches for each size and method")
    measured.add_argument(
        "--sizes",
        nargs="+",
        default=["pythia-14m"],
        metavar="SIZE",
        help="of the Pythia suite, or folders; default pythia-14m",
    )
    usual = ["full", "freeze-0.5", "bias", "lora-r32"]
    measured.add_argument("--methods", nargs="+", default=usual, metavar="METHOD", help=f"default {' '.join(usual)}")
    measured.add_argument("--seconds", type=float, default=10.0, metavar="S", help="to measure each for; default 10")
    measured.add_argument(
        "--out", default="calibration.json", metavar="FILE", help="default calibration.json; run again, it goes on"
    )
    _model_verbs(verbs)
    _sweep_verbs(verbs)
    _fit_verb(verbs)
    _report_verbs(verbs)
    _doctor_verb(verbs)
    return top


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; settings may stand anywhere, which argparse allows of no list of words."""
    top = parser()
    args, behind = top.parse_known_args(argv)
    if [word for word in behind if word.startswith("-") or not hasattr(args, "words")]:
        top.error(f"unrecognized arguments: {' '.join(behind)}")
    if hasattr(args, "words"):
        for name, values in vars(args).items():
            if name != "words" and isinstance(values, list):  # of an option that takes several: it took them too
                behind += [value for value in values if "=" in value]
                setattr(args, name, [value for value in values if "=" not in value])
        args.words += behind
    return args


class _Interrupted(KeyboardInterrupt):
    """A signal's. Python's own changes the status of `python -m` where it went through `exec`, as in a dataclass."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; 0 done, 1 the work failed, 2 the command was wrong, 75 interrupted and resumable."""
    # SIGPIPE stays ignored, as Python has it: by default it would end a run whose logger's socket is closed.
    # A terminal that lacks a character is no error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    asked: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        asked.append(number)
        raise _Interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)  # until a verb sees to them itself
        # While Python ends it takes handlers away, and a late signal would change the exit status.
        atexit.register(signal.signal, number, signal.SIG_IGN)
    try:
        args = _parsed(argv)
        code = int(args.run(args))
        with suppress(BrokenPipeError):  # `| head` is no error, a full disk is
            print(end="", flush=True)
        return code
    except (KeyboardInterrupt, Exception) as error:
        # OmegaConf, interrupted, may raise an error of its own.
        if asked or isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, lambda number, frame: None)  # an impatient user's next one
            said, code = "interrupted", INTERRUPTED
        elif isinstance(error, UserError):
            said, code = str(error), WRONG
        elif isinstance(error, ModuleNotFoundError):
            said, code = f"the package {error.name!r} is missing", FAILED
        elif isinstance(error, OSError) and error.errno is not None:  # without one it is a library's own
            said = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
            code = FAILED if error.errno in BROKEN else WRONG
        else:
            raise
        print(f"embedscale: {said}", file=sys.stderr)
        return code
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # all is said: Python would complain once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
