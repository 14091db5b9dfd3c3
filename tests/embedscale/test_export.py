"""A finished run, exported to sentence-transformers and scored by mteb: both embed as the run does."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import in_fresh_process
from conftest import METHODS
from saved import save_byte_tokenizer
from tokenizers import Tokenizer, processors
from transformers import AutoModel, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from embedscale.cli import main
from embedscale.data.prepare import prepare
from embedscale.data.store import PairStore
from embedscale.errors import DONE, INTERRUPTED, UserError
from embedscale.run.directory import RunDirectory
from embedscale.run.settings import load
from embedscale.run.stop import StopRequest
from embedscale.serving.embedder import Embedder
from embedscale.serving.evaluate import adapter_of, evaluate, held_out_task, held_out_texts
from embedscale.serving.export import export
from embedscale.serving.tasks import HELD_OUT, SUITES, load_data, names_of, task_of
from embedscale.training.train import train

TEXTS = ["a", "the query", "naïve café 北京 🙂", "x = [1, 2, 3]\n\treturn x", "long " * 200]
OLDEST = Path(sys.prefix) / "oldest"  # the oldest supported sentence-transformers, installed by `make test`


@pytest.fixture(scope="module")
def exported(tmp_path_factory, runs) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "elsewhere").mkdir()
    (folder / "bias").symlink_to("elsewhere")
    for name, run in runs.items():
        assert export(str(run), str(folder / name)) == DONE
    return {name: folder / name for name in runs}


def held_out(run: Path) -> list[str]:
    config = load(RunDirectory(run).config)
    store = PairStore.open(config.data.store)
    return held_out_texts(config, store.held_out_batch(0, 64), store.added)


SENTENCE_TRANSFORMERS = """
import json, sys, numpy, sentence_transformers, transformers
for case in json.load(open(sys.argv[1])):
    model = sentence_transformers.SentenceTransformer(case["model"], device="cpu")
    numpy.save(case["found"], model.encode(case["texts"], convert_to_numpy=True))
print(sentence_transformers.__version__, transformers.__version__)
"""


@pytest.mark.parametrize("release", ["newest", "oldest"])
def test_sentence_transformers_embeds_as_the_run_does(tmp_path, runs, exported, release):
    if release == "oldest" and not OLDEST.is_dir():
        pytest.skip("the oldest supported sentence-transformers is not installed; `make test` installs it")
    texts = {name: TEXTS + held_out(runs[name]) for name in METHODS}
    found = {name: tmp_path / f"{name}.npy" for name in METHODS}
    cases = [{"model": str(exported[n]), "texts": texts[n], "found": str(found[n])} for n in METHODS]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    path = OLDEST if release == "oldest" else None
    said = in_fresh_process(SENTENCE_TRANSFORMERS, str(tmp_path / "cases.json"), path=path)
    assert said.startswith("5.0") == (release == "oldest")
    for name in METHODS:
        embeddings = np.load(found[name])
        np.testing.assert_allclose(embeddings, Embedder.load(runs[name]).encode(texts[name]), atol=1e-5)
        assert recalls(embeddings[len(TEXTS) :]) == recorded_recalls(runs[name])


def recalls(embeddings: np.ndarray) -> list[float]:
    """Return recall@1 and @10 in the two groups of 32 of the run's pool of 64 pairs; the queries come first."""
    similar = embeddings[:64] @ embeddings[64:].T
    ranks = [(part >= part.diagonal()[:, None]).sum(1) for part in (similar[:32, :32], similar[32:, 32:])]
    return [float(np.mean([rank <= k for rank in ranks])) for k in (1, 10)]


def recorded_recalls(run: Path) -> list[float]:
    record = RunDirectory(run).read_record()
    assert (record.evaluation.pool, record.evaluation.negatives) == (64, 31)
    return [record.recall_at_1, record.recall_at_10]


def test_transformers_alone_loads_an_exported_model(runs, exported):
    """The mean over the mask and the normalisation are written out here."""
    tokenizer, model = AutoTokenizer.from_pretrained(exported["lora"]), AutoModel.from_pretrained(exported["lora"])
    assert tokenizer.padding_side == "right" and tokenizer.pad_token is not None
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    found = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(found.numpy(), Embedder.load(runs["lora"]).encode(TEXTS), atol=1e-5)
    card = (exported["lora"] / "README.md").read_text()
    assert "lora" in card and RunDirectory(runs["lora"]).read_record().run_id in card


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POOLING_FLAGS", {"mean": "pooling_mode_cls_token"}),
        ("RELOAD", "import sys; import numpy as np; np.save(sys.argv[3], np.full((1, 1), np.nan))"),
    ],
    ids=["other-numbers", "nan"],
)
def test_an_export_that_embeds_differently_leaves_no_files(tmp_path, runs, monkeypatch, name, value):
    monkeypatch.setattr(f"embedscale.serving.export.{name}", value)
    assert export(str(runs["full"]), str(tmp_path / "out" / "model")) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bf16_run_is_compared_in_float32(tmp_path, tiny_run):
    """For deep backbones, bf16 rounding alone exceeded the tolerance; four blocks need a finer measure."""
    config = load(None, [*tiny_run, "budget=1e9", f"output={tmp_path / 'runs'}", "training.precision=bf16"])
    assert train(config) == DONE
    assert export(str(config.folder), str(tmp_path / "model"), least_cosine=1 - 1e-6) == DONE


def test_a_llama_whose_tokenizer_begins_texts_with_a_special_token_is_exported(tmp_path, tiny_run):
    torch.manual_seed(0)
    folder = save_byte_tokenizer(tmp_path / "llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    AutoModel.from_config(config).save_pretrained(folder)
    words = [*tiny_run, f"backbone.name={folder}", f"data.store={tmp_path / 'store'}", f"output={tmp_path / 'runs'}"]
    run = load(None, [*words, "budget=1e9"])
    assert prepare(run) == DONE and train(run) == DONE
    assert export(str(run.folder), str(tmp_path / "model")) == DONE
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("ab")["input_ids"] == tokenizer.encode("ab").ids[1:]
    # Releases of transformers before 5 read this key; without it they would use 10,000.
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_theta"] == 1e6


def test_weights_have_the_permissions_of_other_files(tmp_path, runs, exported):
    (tmp_path / "plain").touch()
    for weights in (exported["full"] / "model.safetensors", runs["full"] / "model" / "trainable.safetensors"):
        assert weights.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_export_writes_through_a_link_but_not_into_the_current_folder(tmp_path, runs, exported, monkeypatch):
    link = exported["bias"]
    assert link.is_symlink() and (link.parent / "elsewhere" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current folder"):
        export(str(runs["bias"]), ".")


def small_tasks() -> list:
    """Return mteb tasks of three kinds, on data made here."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.pair_classification import AbsTaskPairClassification
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    animals, tools = ["cat", "dog", "cow", "hen", "pig"], ["saw", "axe", "nail", "file", "drill"]
    first = [f"the {word} number {i}" for i in range(8) for word in animals + tools]
    second = [first[(7 * i) % len(first)] for i in range(len(first))]
    same = [int((a.split()[1] in animals) == (b.split()[1] in animals)) for a, b in zip(first, second, strict=True)]

    def described(name: str, kind: str, score: str) -> TaskMetadata:
        return TaskMetadata(
            name=name,
            description="made here",
            type=kind,
            category="t2t" if kind == "STS" else "t2c",
            eval_langs=["eng-Latn"],
            main_score=score,
            dataset={"path": "local/made", "revision": "1"},
        )

    def loaded(task, splits):
        task.dataset = DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()})
        task.data_loaded = True
        return task

    class LocalSTS(AbsTaskSTS):
        metadata = described("LocalSTS", "STS", "cosine_spearman")
        max_score = 1

    class LocalClassification(AbsTaskClassification):
        metadata = described("LocalClassification", "Classification", "accuracy")
        n_experiments = 2

    class LocalPairs(AbsTaskPairClassification):
        metadata = described("LocalPairs", "PairClassification", "max_ap")

    kinds = [int(text.split()[1] in animals) for text in first]
    scores = [float(len(set(a) & set(b))) / 20 for a, b in zip(first, second, strict=True)]
    return [
        loaded(LocalSTS(), {"test": {"sentence1": first, "sentence2": second, "score": scores}}),
        loaded(LocalClassification(), {name: {"text": first, "label": kinds} for name in ("train", "test")}),
        loaded(LocalPairs(), {"test": {"sentence1": first, "sentence2": second, "labels": same}}),
    ]


@pytest.mark.parametrize("name", METHODS)
def test_mteb_scores_the_run_and_its_export_equally(runs, exported, name, capsys):
    import datasets
    import mteb
    from sentence_transformers import SentenceTransformer

    shutil.rmtree(runs[name] / "scores", ignore_errors=True)
    tasks = small_tasks()
    datasets.enable_progress_bars()
    assert evaluate(str(runs[name]), [HELD_OUT], tasks) == DONE
    assert not capsys.readouterr().err  # a pipe gets no progress bar
    found = {path.stem: json.loads(path.read_text()) for path in (runs[name] / "scores").glob("*.json")}
    assert found.keys() == {HELD_OUT, "LocalSTS", "LocalClassification", "LocalPairs"}
    record = RunDirectory(runs[name]).read_record()
    splits = found[HELD_OUT]["scores"]
    recall = {k: np.mean([rows[0][f"recall_at_{k}"] for rows in splits.values()]) for k in (1, 10)}
    assert recall == pytest.approx({1: record.recall_at_1, 10: record.recall_at_10})
    other = SentenceTransformer(str(exported[name]), device="cpu")
    for task in [*small_tasks(), held_out_task(RunDirectory(runs[name]), record)]:
        task.load_data()
        result = mteb.evaluate(other, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results[0]
        rounding = 0.01 if task.metadata.type == "Classification" else 1e-5  # one of its 160 items may change sides
        assert result.get_score() == pytest.approx(found[task.metadata.name]["score"], abs=rounding)


def test_a_stopped_evaluation_continues_with_the_next_task(runs, capsys):
    import datasets

    datasets.enable_progress_bars()
    run = runs["bias"]
    shutil.rmtree(run / "scores", ignore_errors=True)
    stop, tasks = StopRequest(), small_tasks()
    tasks[1].load_data = lambda: stop.request("SIGTERM")  # during the second task
    assert evaluate(str(run), [HELD_OUT], tasks, stop) == INTERRUPTED
    done = {path.stem: path.stat().st_mtime_ns for path in (run / "scores").glob("*.json")}
    assert done.keys() == {tasks[0].metadata.name, tasks[1].metadata.name}
    assert evaluate(str(run), [HELD_OUT], small_tasks(), StopRequest()) == DONE
    every = {path.stem: path.stat().st_mtime_ns for path in (run / "scores").glob("*.json")}
    assert every.keys() == {HELD_OUT, "LocalSTS", "LocalClassification", "LocalPairs"}
    assert done.items() <= every.items()  # these are not scored again
    assert evaluate(str(run), [HELD_OUT], small_tasks(), StopRequest()) == DONE
    assert every == {path.stem: path.stat().st_mtime_ns for path in (run / "scores").glob("*.json")}
    assert "examples/s" not in capsys.readouterr().err


def test_two_checkpoints_never_share_a_name(runs):
    metas = {(m.name, m.revision) for m in (adapter_of(Embedder.load(run)).mteb_model_meta for run in runs.values())}
    assert len(metas) == len(runs)


def test_unusable_runs_and_folders_are_refused_in_one_line(tmp_path, runs, capsys, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    damaged = tmp_path / "damaged"
    shutil.copytree(runs["full"], damaged)
    with (damaged / "model" / "trainable.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x01" * 8)
    good = str(runs["full"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cases = {
        ("export", good, str(full)): "is not empty",
        ("export", str(unfinished), str(tmp_path / "x")): "is not finished",
        ("export", str(tmp_path / "none"), str(tmp_path / "x")): "does not exist",
        ("export", str(damaged), str(tmp_path / "x")): "is damaged: its digest is",
        ("evaluate", good, "--tasks", "STS51"): "did you mean STS",
        ("evaluate", good, "--tasks", "STS15"): "its data is not in the local cache",
    }
    for words, expected in cases.items():
        assert main(list(words)) == 2, words
        said = capsys.readouterr().err.splitlines()
        assert any(expected in line for line in said if line.startswith("embedscale:")), said
    assert (full / "thesis.tex").read_text() == "mine" and not (tmp_path / "x").exists()


def test_mteb_knows_every_task_of_every_suite():
    names = {name for suite in SUITES.values() for name in suite} - {HELD_OUT}
    assert len(names) == 20
    assert {task_of(name).metadata.name for name in names} == names


def test_multilingual_tasks_are_scored_as_in_the_english_benchmark():
    import mteb

    benchmark = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    for name in {name for suite in SUITES.values() for name in suite} & benchmark.keys():
        task, theirs = task_of(name), benchmark[name]
        assert (task.hf_subsets, task.eval_splits) == (theirs.hf_subsets, theirs.eval_splits), name


def test_a_benchmark_of_mteb_stands_for_its_tasks_in_its_languages():
    import mteb

    benchmark = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v2)").tasks}
    names = names_of(["SciFact", "MTEB(eng, v2)"])
    assert {"ArguAna", "STS22.v2@MTEB(eng, v2)"} <= set(names) and names[0] == "SciFact"
    assert [name.partition("@")[0] for name in names[1:]] == [*benchmark]
    for name in names[1:]:
        task, theirs = task_of(name), benchmark[name.partition("@")[0]]
        assert sorted(task.hf_subsets) == sorted(theirs.hf_subsets), name
        assert sorted(task.eval_splits) == sorted(theirs.eval_splits), name
    assert names_of(names) == names, "jobs expand what submit has expanded"
    with pytest.raises(UserError, match=r"did you mean MTEB\(eng, v[12]\)\?"):
        task_of("MTEB(eng, v3)")


def test_other_tasks_than_texts_are_refused_and_an_aggregate_loads_its_parts(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="'CIFAR10' is a task of image; allowed: tasks of text alone"):
        task_of("CIFAR10")
    with pytest.raises(UserError, match="mteb/CQADupstackAndroidRetrieval"):  # its first part
        load_data(task_of("CQADupstackRetrieval"))
