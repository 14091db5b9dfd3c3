"""Settings of all tests, and shared fixtures: a small saved backbone, the settings of a small run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare results on CPUs, often to the last bit
# Several processes share few cores. If OpenMP threads waited by spinning, tests would take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gc
import multiprocessing.forkserver
from pathlib import Path

import pytest
from saved import save_backbone, write_pairs

gc.disable()  # imports are faster without garbage collection; it is enabled after them

# Files that take minutes. They start first, so that none runs alone at the end. `survival`, `node`, `away`, `kill`,
# `local` and `devcluster` mostly wait, so they stand apart. `make test-quick` leaves all of these out.
LONG = [
    "survival", "docs", "encode", "train", "node", "resume", "report", "together", "live", "uncertainty", "gpu_blocks",
    "away", "gpu", "gradcache", "end_of_run", "damage", "page", "figures", "forecast_tables", "figures_tell", "kill",
    "snapshot", "submit", "layouts", "special_tokens", "export", "damaged", "local", "parallel", "without_cpu",
    "status", "store_damage", "damaged_fits", "budgets", "devcluster", "prefetch", "prepare_interrupted", "calibrate",
    "scoring", "families",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sort long files to the front and mark them slow. `--dist loadfile --no-loadscope-reorder` keeps the order."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    for item in items:
        if item.path.stem in place:
            item.add_marker("slow")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded under the name "shown", from all worker processes."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "shown":
                terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def server():
    """Return a multiprocessing context whose processes need no imports: a server with all imports forks them."""
    context = multiprocessing.get_context("forkserver")
    multiprocessing.forkserver._forkserver._stop()  # `prepare` may have started one with fewer modules
    # Only installed modules: the server does not see this folder, and ignores modules that it does not find.
    context.set_forkserver_preload(
        ["embedscale.training.train", "transformers.models.gpt_neox.modeling_gpt_neox", "peft"]
    )
    multiprocessing.forkserver.ensure_running()  # before `prepare` starts one with fewer modules
    return context


@pytest.fixture(scope="session")
def save_decoder():
    """Return the function `save_backbone`, for tests that need another shape."""
    return save_backbone


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """A saved backbone of four blocks and width 32."""
    return save_backbone(tmp_path_factory.mktemp("hub") / "pythia-tiny")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, backbone_folder) -> list[str]:
    """The settings of a run that takes seconds, with a prepared store of 3,000 pairs. Tests add a budget."""
    from embedscale.data.prepare import prepare
    from embedscale.run.settings import load

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
