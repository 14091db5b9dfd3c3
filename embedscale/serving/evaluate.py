"""Score a finished run with MTEB (paper, section 4.4, figures 8 to 12, 15, 16): one task at a time, one file per task.

A task with a file in RUN/scores is finished, so an interrupted evaluation continues with the next task. The price: a
task that is interrupted starts again from its beginning.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from embedscale.data.manifest import AddedTokens
from embedscale.data.store import PairBatch, PairStore
from embedscale.data.tokens import load_tokenizer, tokenizer_of
from embedscale.errors import DONE, INTERRUPTED, UserError
from embedscale.files import now
from embedscale.run.config import RunConfig
from embedscale.run.directory import RunDirectory, finished
from embedscale.run.record import RunRecord, sound
from embedscale.run.score import Score
from embedscale.run.settings import load
from embedscale.run.stop import StopRequest
from embedscale.serving.tasks import HELD_OUT, load_data, mteb_package, names_of, task_of
from embedscale.terminal import console

if TYPE_CHECKING:
    from embedscale.serving.embedder import Embedder


def evaluate(run: str, names: Sequence[str], tasks: Iterable[Any] = (), stop: StopRequest | None = None) -> int:
    """Score a run on tasks and suites by name, and on mteb `tasks` that the caller built.

    Writes RUN/scores/TASK.json, and skips tasks that have this file. Returns DONE, or INTERRUPTED after a request to
    stop. Raises UserError if the run is not done, mteb does not know a task, or a task's data cannot be loaded.
    """
    directory = RunDirectory(run)
    record = finished(directory)
    mteb = mteb_package()
    known = {task.metadata.name: task for task in tasks}
    known |= {name: held_out_task(directory, record) if name == HELD_OUT else task_of(name) for name in names_of(names)}
    if stop is None:
        stop = StopRequest()
        stop.on_signals()
    missing = {name: task for name, task in known.items() if not directory.score(name).exists()}
    if missing:
        from embedscale.model.hardware import keep_freed_memory
        from embedscale.serving.embedder import Embedder

        directory.scores.mkdir(exist_ok=True)
        keep_freed_memory()
        adapter = adapter_of(Embedder.load(run))
    for number, (name, task) in enumerate(missing.items(), 1):
        if stop.requested:
            print(f"{record.run_id}: interrupted ({stop.reason}) before {name}; run it again to continue")
            return INTERRUPTED
        print(f"{record.run_id}: task {number} of {len(missing)}, {name}", flush=True)
        replace(score_of(mteb, adapter, task, record), task=name).write(directory.score(name))
    _show(record, [found for name in known if (found := sound(Score.read(directory.score(name))))])
    return DONE


def score_of(mteb: Any, adapter: Any, task: Any, record: RunRecord) -> Score:
    """Load a task's data and score the run on it."""
    begun = time.monotonic()
    load_data(task)
    result = mteb.evaluate(adapter, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results[0]
    hyperparameters = record.hyperparameters
    return Score(
        task=task.metadata.name,
        type=task.metadata.type,
        score=result.get_score(),
        main_score=task.metadata.main_score,
        scores=result.scores,
        run_id=record.run_id,
        weights_digest=record.weights_digest,
        dataset_revision=result.dataset_revision,
        mteb=version("mteb"),
        precision=hyperparameters.precision,
        context=hyperparameters.context,
        seconds=round(time.monotonic() - begun, 1),
        time=now(),
    )


def _show(record: RunRecord, scores: list[Score]) -> None:
    from rich.table import Table

    table = Table("task", "kind", "score", "measure", "seconds", title=record.run_id)
    for found in scores:
        table.add_row(found.task, found.type, f"{found.score:.4f}", found.main_score, f"{found.seconds}")
    console().print(table)


def adapter_of(embedder: "Embedder") -> Any:
    """Return the run as an encoder of mteb 2, named after the run, with the digest of its weights as revision."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    record = embedder.record

    class Adapter(AbsEncoder):
        mteb_model_meta = ModelMeta(
            loader=None,
            name=f"embedscale/{record.run_id}",
            revision=record.weights_digest,
            release_date=None,
            languages=None,
            n_parameters=record.n_parameters,
            memory_usage_mb=None,
            max_tokens=record.hyperparameters.context,
            embed_dim=embedder.width,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
        )

        def encode(self, inputs: Any, **_: Any) -> np.ndarray:
            """Embed all texts together, so that they are sorted by length over the whole task, not within a batch."""
            return embedder.encode([text for batch in inputs for text in batch["text"]])

    return Adapter()


def held_out_task(directory: RunDirectory, record: RunRecord) -> Any:
    """Return an mteb retrieval task over the held-out pairs on which the run's recall was measured.

    Each group of the evaluation is a split. The texts are the stored tokens, decoded. Raises UserError if the store is
    missing or has changed.
    """
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    config = load(directory.config)
    store = PairStore.open(config.data.store)
    if store.digest != record.data_digest:
        raise UserError(f"data.store: {config.data.store} is {store.digest}; the run's was {record.data_digest}")
    size = record.evaluation.negatives + 1
    groups = record.evaluation.pool // size
    splits = [f"group-{number + 1}" for number in range(groups)]

    class HeldOutRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=HELD_OUT,
            description="The positive of each held-out pair among those of its group.",
            type="Retrieval",
            category="t2t",
            eval_splits=splits,
            eval_langs=["eng-Latn"],
            main_score="recall_at_10",
            dataset={"path": record.data, "revision": store.digest},
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            self.dataset: Any = {"default": {}}
            for number, split in enumerate(splits):
                texts = held_out_texts(config, store.held_out_batch(number * size, (number + 1) * size), store.added)
                queries, corpus = (
                    Dataset.from_dict({"id": [f"{kind}{i}" for i in range(size)], "text": some})
                    for kind, some in (("q", texts[:size]), ("d", texts[size:]))
                )
                self.dataset["default"][split] = {
                    "queries": queries,
                    "corpus": corpus,
                    "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(size)},
                    "top_ranked": None,
                }
            self.data_loaded = True

    return HeldOutRetrieval()


def held_out_texts(config: RunConfig, pairs: PairBatch, added: AddedTokens) -> list[str]:
    """Decode stored pairs, without the tokens added around texts: the queries' texts, then those of the positives."""
    tokenizer, _ = load_tokenizer(*tokenizer_of(config))
    sequences = np.split(pairs.tokens, np.cumsum(pairs.lengths)[:-1])
    own = [ids[len(added.before) : len(ids) - len(added.after)].tolist() for ids in sequences]
    texts = tokenizer.decode_batch(own, skip_special_tokens=False)
    # A text that was cut inside a character ends with the replacement character.
    return [text.rstrip("\ufffd") if len(text) > 1 else text for text in texts]
