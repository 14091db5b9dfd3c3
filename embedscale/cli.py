"""The command line: each verb a few lines that import what they need when they are called."""

import argparse
import signal
import sys
from collections.abc import Sequence

from embedscale.errors import FAILED, INTERRUPTED, WRONG, UserError


def _config(args: argparse.Namespace):
    from embedscale import config

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
    from embedscale.prepare import prepare

    return prepare(_config(args))


def flops(args: argparse.Namespace) -> int:
    from embedscale.plan import print_flops

    return print_flops(_config(args), args.budgets)


def train(args: argparse.Namespace) -> int:
    from embedscale.train import train

    return train(_config(args))


def sweep_plan(args: argparse.Namespace) -> int:
    from slurm.plan import command

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
    action("status", sweep_status, "where every run stands")
    watch = action("watch", sweep_watch, "the status, refreshed until all is done or Ctrl-C")
    watch.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="default 10")
    cancel = action("cancel", sweep_cancel, "take the sweep's jobs out of the queue; asks first")
    cancel.add_argument("--yes", action="store_true", help="do not ask")


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
    _with_config(verbs, "train", train, "one run; run again, it resumes or says that it is done")
    _sweep_verbs(verbs)
    _doctor_verb(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; 0 done, 1 the work failed, 2 the command was wrong, 75 interrupted and resumable."""
    # A reader that closes the pipe early (`| head`) is no error.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"embedscale: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("embedscale: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        print(f"embedscale: the package {error.name!r} is missing", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
