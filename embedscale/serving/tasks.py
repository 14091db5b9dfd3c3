"""MTEB tasks by name, the suites of the paper and of its published code, and their data."""

import os
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from embedscale.errors import UserError

HELD_OUT = "HeldOutRetrieval"  # retrieval over the store's held-out pairs; needs no network
SUITES = {
    "held-out": (HELD_OUT,),
    "paper": (  # section 4.4: one task of each category
        "EmotionClassification",
        "TwentyNewsgroupsClustering",
        "SprintDuplicateQuestions",
        "AskUbuntuDupQuestions",
        "SciFact",
        "STS15",
        "SummEval",
    ),
    "published-code": (  # the tasks that the authors' repository lists as broad
        "MedrxivClusteringS2S",
        "StackExchangeClusteringP2P",
        "ArguAna",
        "CQADupstackGisRetrieval",
        "CQADupstackAndroidRetrieval",
        "QuoraRetrieval",
        "BIOSSES",
        "SICK-R",
        "STS22",
        "SummEval",
        "ImdbClassification",
        "Banking77Classification",
        "AmazonReviewsClassification",
        "SprintDuplicateQuestions",
        "StackOverflowDupQuestions",
    ),
}
# Tasks in several languages. As in MTEB's English benchmark, only the English test split is scored.
ENGLISH = ("STS22", "AmazonReviewsClassification")


def names_of(words: Iterable[str]) -> list[str]:
    """Return task names in order, each once, with suites and MTEB's benchmarks replaced by their tasks.

    A benchmark may score other languages or splits of a task than the task does by itself: `STS22.v2@MTEB(eng, v2)`.
    """
    return list(dict.fromkeys(name for word in words for name in SUITES.get(word) or _tasks_of(word)))


def _tasks_of(word: str) -> list[str]:
    if word == HELD_OUT or word not in _benchmarks():
        return [word]
    tasks = mteb_package().get_benchmark(word).tasks
    return [
        name if _scored(task) == _scored(task_of(name)) else f"{name}@{word}"
        for task, name in ((task, task.metadata.name) for task in tasks)
    ]


def _benchmarks() -> list[str]:
    return [each.name for each in mteb_package().get_benchmarks()]


def _scored(task: Any) -> tuple[list[str], list[str]]:
    return sorted(task.hf_subsets or []), sorted(task.eval_splits or [])


def mteb_package() -> Any:
    """Import mteb. Raises UserError if it is not installed."""
    try:
        import mteb
    except ModuleNotFoundError:
        raise UserError("evaluate needs the package mteb: pip install 'embedscale[mteb]'") from None
    return mteb


def task_of(name: str) -> Any:
    """Return the mteb task of a name, TASK or TASK@BENCHMARK.

    Raises UserError for an unknown name, and for a task that is not about texts.
    """
    import difflib

    mteb = mteb_package()
    own, at, benchmark = name.partition("@")
    if at and benchmark in _benchmarks():
        for task in mteb.get_benchmark(benchmark).tasks:
            if task.metadata.name == own:
                return task
    english = {"languages": ["eng"], "exclusive_language_filter": True, "eval_splits": ["test"]}
    try:
        task = mteb.get_task(name, **(english if name in ENGLISH else {}))
    except KeyError:
        every = [*(task.metadata.name for task in mteb.get_tasks()), *SUITES, *_benchmarks()]
        near = difflib.get_close_matches(name, every, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = f"task, suite or benchmark of mteb {version('mteb')}"
        raise UserError(f"--tasks: {name!r} is not a {known}{hint}") from None
    if set(task.metadata.modalities) != {"text"}:
        raise UserError(
            f"--tasks: {name!r} is a task of {' and '.join(task.metadata.modalities)}; allowed: tasks of text alone"
        )
    return task


def load_data(task: Any) -> None:
    """Load a task's data. Raises UserError if they are neither in the local cache nor on the hub."""
    import datasets

    datasets.disable_progress_bars()  # they would be drawn into pipes and logs too
    try:
        for part in getattr(task.metadata, "tasks", [task]):  # an aggregate has no data of its own
            part.load_data()
    except UserError:
        raise
    except Exception as error:  # the hub's client and datasets raise many unrelated classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        offline = " and HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        name = task.metadata.name
        raise UserError(
            f"--tasks: {name}: its data is not in the local cache{offline}; download it on a machine with a "
            f"network and the same HF_HOME: embedscale sweep prefetch SWEEP --evaluate {name} ({reason})"
        ) from None
