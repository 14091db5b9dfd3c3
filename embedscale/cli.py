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


def parser() -> argparse.ArgumentParser:
    from embedscale import __version__

    top = argparse.ArgumentParser(prog="embedscale", description="Compute-optimal recipes for text-embedding models.")
    top.add_argument("--version", action="version", version=f"embedscale {__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    _with_config(verbs, "prepare", prepare, "text pairs into a PairStore")
    costs = _with_config(verbs, "flops", flops, "what a run costs, before anything is loaded")
    costs.add_argument("--budgets", nargs="+", metavar="FLOP", help="several budgets; default the configuration's")
    _with_config(verbs, "train", train, "one run; run again, it resumes or says that it is done")
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
