"""What every test may use: saved models and tokenizers in the hub's own format, small and seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare CPUs with CPUs, often to the last bit
# Processes beside each other on few cores: threads that wait for each other by spinning take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import multiprocessing.forkserver
from pathlib import Path

import pytest
from saved import save_backbone, write_pairs

gc.disable()  # until everything is imported: what modules bring stays

# The files that take minutes, those that mostly wait first: begun last, one of them would end alone.
LONG = [
    "survival",
    "node",
    "export",
    "encode",
    "train",
    "kill",
    "local",
    "submit",
    "devcluster",
    "scoring",
    "status",
    "prefetch",
    "loss",
]


def pytest_collection_modifyitems(items):
    """Long files first, each beside the others; `--dist loadfile --no-loadscope-reorder` keeps this order."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter):
    """Show what tests have recorded as "shown", whichever process they ran in."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "shown":
                terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def server():
    """Fresh processes without the seconds of imports: real ones, forked from a server that holds the modules."""
    context = multiprocessing.get_context("forkserver")
    multiprocessing.forkserver._forkserver._stop()  # one that `prepare` started in this process holds fewer modules
    # Installed modules only: the server does not see this folder, and would pass over one of it without a word.
    context.set_forkserver_preload(
        ["embedscale.training.train", "transformers.models.gpt_neox.modeling_gpt_neox", "peft"]
    )
    multiprocessing.forkserver.ensure_running()  # before `prepare` asks for less
    return context


@pytest.fixture(scope="session")
def save_decoder():
    """`save_backbone`, for a test that needs a shape of its own."""
    return save_backbone


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """Four blocks of width 32."""
    return save_backbone(tmp_path_factory.mktemp("hub") / "pythia-tiny")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, backbone_folder) -> list[str]:
    """The settings of a run of seconds: a prepared store of 3,000 pairs, and everything small. Add a budget."""
    from embedscale.data.prepare import prepare
    from embedscale.run.config import load

    folder = tmp_path_factory.mktemp("tiny")
    source = write_pairs(folder / "pairs.jsonl", 3000)
    words = [
        f"backbone.name={backbone_folder}",
        f"data.store={folder / 'store'}",
        f"data.sources=[{{kind: jsonl, path: {source}, negative: neg}}]",
        "data.context=40",
        "data.held_out=0.1",
        "training.batch_size=16",
        "training.learning_rate=0.003",
        "evaluation.pool=64",
        "evaluation.negatives=31",
    ]
    assert prepare(load(None, words)) == 0
    return words
