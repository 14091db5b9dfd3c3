"""The words of the command line: every verb with its arguments and help texts, and how a command is parsed.

Nothing is imported here but argparse, so that `--help` and a wrong word answer at once. Which function a verb calls is
in `cli`; a verb's name stands in `verb` of the parsed arguments.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from embedscale.errors import UserError

TYPE_CHECKING = False  # as in `imports`
if TYPE_CHECKING:
    from typing import Any, NoReturn

REFERENCE = """\
sections of settings: backbone, method, data, loss, training, evaluation, resources; budget and output stand alone.
`embedscale config` prints every setting with its default and its meaning; docs/reference/settings.md is the same list.
"""
SWEEP_REFERENCE = """\
`embedscale config --of sweep` prints every setting of a sweep file, `--of cluster` those of a cluster file, and
`embedscale config` those of a run, for base, axes and the rows; docs/reference/settings.md is the same list.
"""


def number(text: str) -> float:
    """Return the finite number of an option; argparse adds the name of the option to an error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def whole(text: str) -> int:
    """Return the whole number of an option, as `number` does."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like those of the verbs."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


def _json(verb: Parser, what: str) -> None:
    verb.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def _with_config(verbs: Any, name: str, text: str) -> Parser:
    verb = verbs.add_parser(name, help=text, description=text, epilog=REFERENCE)
    verb.add_argument(
        "words", nargs="*", default=[], metavar="[CONFIG] key=value", help="a YAML file, then settings that override it"
    )
    verb.set_defaults(verb=name, refuse=verb.error)
    return verb


def _run_verbs(verbs: Any) -> None:
    _with_config(verbs, "prepare", "tokenise text pairs into a store; run it again to continue")
    shown = _with_config(verbs, "config", "print every setting with its value, default and meaning, as YAML")
    shown.add_argument(
        "--of", choices=["run", "sweep", "cluster"], default="run", help="what the file configures (default: run)"
    )
    costs = _with_config(verbs, "flops", "show what a run costs, without loading a model")
    costs.add_argument("--budgets", nargs="+", metavar="FLOP", help="budgets to show (default: that of the settings)")
    _json(costs, "the costs")
    trained = _with_config(verbs, "train", "train one run; run it again to resume it")
    trained.add_argument(
        "--recipe", metavar="BUDGET", help="train what the fits recommend for this budget: 1e17, '24 device-hours'"
    )
    trained.add_argument(
        "--fits",
        metavar="FITS",
        help="folder written by `embedscale fit`; used with --recipe (default: current folder)",
    )
    measured = _with_config(verbs, "calibrate", "measure how fast this hardware trains each size and method")
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
    def action(name: str, text: str) -> Parser:
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("run_folder", metavar="RUN", help="directory of a finished run")
        verb.set_defaults(verb=name, refuse=verb.error)
        return verb

    scored = action("evaluate", "score a finished run with MTEB: one file per task in RUN/scores")
    suites = "MTEB tasks, MTEB benchmarks such as 'MTEB(eng, v2)', held-out, paper, published-code (default: held-out)"
    scored.add_argument("--tasks", nargs="+", default=["held-out"], metavar="NAME", help=suites)
    exported = action("export", "export a finished run as a sentence-transformers model")
    exported.add_argument("folder", metavar="FOLDER", help="folder to write; it must be new or empty")
    encoded = action("encode", "embed the texts of a file; run it again to continue")
    encoded.add_argument(
        "texts",
        metavar="TEXTS",
        help="a .txt (a text per line), .jsonl, .csv or .parquet file, a folder or glob of them, or - (standard input)",
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

    def action(name: str, text: str) -> Parser:
        verb = actions.add_parser(name, help=text, description=text, epilog=SWEEP_REFERENCE)
        verb.add_argument("sweep", metavar="SWEEP", help="a YAML file, such as configs/sweep/paper.yaml")
        verb.add_argument(
            "words",
            nargs="*",
            default=[],
            metavar="key=value",
            help="settings that override the file: axes.budget=[1e15]",
        )
        verb.set_defaults(verb=f"sweep {name}", refuse=verb.error)
        return verb

    plan = action("plan", "show what the sweep costs, and which runs are impossible")
    plan.add_argument("--each", action="store_true", help="show a row for each run")
    plan.add_argument(
        "--max-gpu-hours", type=number, metavar="H", help="refuse a sweep that needs more by the estimate"
    )
    _json(plan, "totals and a row for each run")
    fetch = action("prefetch", "download models, tokenizers and pairs, for nodes without a network")
    fetch.add_argument(
        "--evaluate", nargs="+", metavar="TASK", help="also the data of these MTEB tasks, benchmarks or suites"
    )
    submit = action("submit", "start the runs that are missing or interrupted, and return")
    submit.add_argument(
        "--to",
        metavar="WHERE",
        help="where to run: slurm, or here on this machine (default: slurm, or here without it)",
    )
    text = "choose runs of the grid in rounds, each by what the finished ones say, until --spend is spent"
    submit.add_argument("--adaptive", action="store_true", help=text)
    text = "with --adaptive: budget to find the recipe for (default: the grid's largest)"
    submit.add_argument("--for", dest="budget", metavar="BUDGET", help=text)
    text = "with --adaptive: what to spend: 15%% of the grid, 1e18 or '24 device-hours'"
    submit.add_argument("--spend", metavar="AMOUNT", help=text)
    text = "show the batch scripts and the runs that would go out; send and write nothing"
    submit.add_argument("--dry-run", action="store_true", help=text)
    submit.add_argument("--retry-failed", action="store_true", help="also start failed runs again")
    submit.add_argument("--max-gpu-hours", type=number, metavar="H", help="refuse if the started runs need more")
    submit.add_argument(
        "--evaluate",
        nargs="+",
        metavar="TASK",
        help="score finished runs: MTEB tasks or benchmarks, or held-out, paper, …",
    )
    _json(action("status", "show the state of every run"), "the status of each run")
    watch = action("watch", "show the status repeatedly until all runs are done or Ctrl-C")
    watch.add_argument("--every", type=number, default=10.0, metavar="SECONDS", help="time between looks (default: 10)")
    cancel = action("cancel", "end the sweep's jobs and its processes on this machine")
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
    verb.add_argument("--law", metavar="KIND", help=text)
    verb.add_argument(
        "--residual",
        metavar="KIND",
        help="loss function for fitting joint laws: huber, lad, log or raw (default: huber)",
    )
    verb.add_argument("--delta", type=number, help="Huber's delta, in ln L (default: 1e-3)")
    text = "parabola, law, best-run, or akima (on dense grids it underestimates the loss) (default: parabola)"
    verb.add_argument("--optimum", metavar="KIND", help=text)
    verb.add_argument("--window", type=number, metavar="FACTOR", help="range of N around the optimum (default: 4)")
    text = "compare runs within N bins a decade of compute (default: within nearly equal budgets)"
    verb.add_argument("--bins", type=number, metavar="N", help=text)
    text = "standard deviation of ln L (default: from repeated runs and residuals; with --simulate that of fits.json "
    text += "or 0.005)"
    verb.add_argument("--noise", type=number, metavar="SD", help=text)
    verb.add_argument("--bootstrap", type=whole, metavar="DRAWS", help="bootstrap draws (default: 1000)")
    verb.add_argument("--seed", type=whole, help="seed of the draws (default: 0)")
    verb.add_argument(
        "--simulate",
        metavar="LAW",
        help="test a grid on a known law: E=…,A=…,B=…,alpha=…,beta=… or a fits.json",
    )
    text = "spend as an adaptive sweep on this table, to find the best size at its largest budget (largest) or the "
    text += "losses of the rows that have a value (COLUMN=VALUE); with --simulate (largest), on runs that the law draws"
    verb.add_argument("--replay", metavar="WHAT", help=text)
    _json(verb, "what fits.json holds")
    verb.set_defaults(verb="fit", refuse=verb.error)


def _report_verbs(verbs: Any) -> None:
    text = "recommend what to train for a budget, using the fitted laws"
    verb = verbs.add_parser("recipe", help=text, description=text)
    verb.add_argument("fits", metavar="FITS", help="folder written by `embedscale fit`, or its fits.json")
    # argparse would take a budget such as -1e17 for an option; this lets our own range check refuse it.
    verb._negative_number_matcher = re.compile(r"-\d")
    verb.add_argument(
        "budget",
        metavar="BUDGET",
        nargs="*",
        default=[],
        help="such as 1e17, 100 PFLOP, 2 PFLOP-days or 24 device-hours",
    )
    verb.add_argument("--tokens", metavar="D", help="limit of the data; without a budget, the data to be used")
    _json(verb, "the recipe")
    verb.set_defaults(verb="recipe", refuse=verb.error)
    text = "write one page with the recipe, all figures, the laws and the runs left out: report.html"
    verb = verbs.add_parser("report", help=text, description=text)
    verb.add_argument("fits", metavar="FITS", help="folder written by `embedscale fit`")
    verb.add_argument("--out", metavar="FOLDER", help="folder for report.html and the figures (default: FITS)")
    verb.add_argument("--budget", action="append", metavar="BUDGET", help="begin with its recipe; may be repeated")
    verb.add_argument("--compare", metavar="FITS", help="fits of another batch size or context, for figure 23")
    verb.set_defaults(verb="report", refuse=verb.error)


def _doctor_verb(verbs: Any) -> None:
    text = "check this machine, the installation and the cluster"
    verb = verbs.add_parser("doctor", help=text, description=text)
    verb.add_argument("--cluster", metavar="FILE", help="cluster file to check, such as configs/cluster/a100.yaml")
    verb.add_argument("--sweep", metavar="FILE", help="sweep file whose cluster, backbones and folder to check")
    verb.add_argument("--folder", default="runs", help="folder where runs will be written (default: runs)")
    verb.add_argument("--on-node", action="store_true", help="also check a node of each resource class, through srun")
    _json(verb, "what was found")
    verb.set_defaults(verb="doctor", refuse=verb.error)


def parser() -> Parser:
    """Return the parser of all verbs. `verb` of the parsed arguments is its name."""
    from embedscale import __version__

    text = "Compute-optimal recipes for turning language models into text-embedding models."
    top = Parser(prog="embedscale", description=text)
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
        args.refuse(f"{' '.join(rest)}: not an argument of this verb")
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
