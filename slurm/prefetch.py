"""Fetch what a sweep's nodes load, on a machine with a network: models, tokenizers and pairs.

Models go into the cache of the Hugging Face hub (HF_HOME). Nodes find them there under the same name without a
network. Pairs go into their stores. The nodes must see both folders.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from embedscale.data.prepare import prepare
from embedscale.errors import DONE, UserError
from embedscale.serving.tasks import HELD_OUT, load_data, names_of, task_of
from embedscale.texts import counted
from slurm import grid
from slurm.grid import Sweep
from slurm.tables import size

DESCRIPTION = ("*.json", "*.txt", "*.model")  # files of the configuration and of the tokenizer
WEIGHTS = (("*.safetensors",), ("*.bin",))  # formats of weights; the first one that the repository has is fetched


def prefetch(sweep: Sweep, scores: Sequence[str] = ()) -> int:
    """Fetch what is missing. Returns DONE, or the exit code of `prepare` if it was interrupted.

    `scores` names mteb tasks whose data are fetched too. Raises UserError for a model or data set that cannot be
    fetched, and for a source that cannot be read.
    """
    tasks = [task_of(name) for name in names_of(scores) if name != HELD_OUT]
    backbones = [run.backbone for run in sweep.runs]
    pretrained = {(each.name, each.revision) for each in backbones if each.weights == "pretrained"}
    for name, revision in dict.fromkeys((each.name, each.revision) for each in backbones):
        if not Path(name).is_dir():
            _fetch(name, revision, weights=(name, revision) in pretrained)
    for name in sorted({run.data.tokenizer for run in sweep.runs if run.data.tokenizer}):
        if not Path(name).is_dir():
            _fetch(name, None, weights=False)
    for run in {run.data.store: run for run in sweep.runs}.values():
        if code := prepare(run):
            return code
    for task in tasks:
        load_data(task)
        print(
            f"{task.metadata.name}: {task.metadata.dataset['path']} at {task.metadata.dataset['revision']}", flush=True
        )
    return DONE


def _fetch(name: str, revision: str | None, weights: bool) -> None:
    folder = _download(name, revision, DESCRIPTION)
    for patterns in WEIGHTS if weights else ():
        folder = _download(name, revision, patterns)
        if any(folder.glob(patterns[0])):
            break
    else:
        if weights:
            raise UserError(
                f"backbone.name: the repository {name!r} has no weights; set backbone.weights=random or another name"
            )
    files = [file for file in folder.rglob("*") if file.is_file()]
    total = size(sum(file.stat().st_size for file in files))
    print(f"{name}: {counted(len(files), 'file')}, {total} in {folder}", flush=True)


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises many classes
        raise UserError(f"backbone.name: {name!r} cannot be fetched ({str(error).splitlines()[0]})") from None


def command(args: Namespace) -> int:
    """`embedscale sweep prefetch SWEEP.yaml [key=value …]`."""
    return prefetch(grid.load(args.sweep, args.words), args.evaluate or [])
