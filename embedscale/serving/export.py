"""Export a finished run as a sentence-transformers model, readable by old and new releases and by transformers alone.

The model is written to a temporary folder, loaded by a new process and compared with the run's embeddings. Only then is
the folder renamed to its target, so a model at the target is complete and known to work. The price: half a minute.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedscale.data.tokens import PROBE, tokenizer_of
from embedscale.errors import DONE, FAILED, UserError
from embedscale.files import read_json
from embedscale.run.directory import RunDirectory, finished
from embedscale.run.score import Score
from embedscale.values import sound

if TYPE_CHECKING:
    from embedscale.serving.embedder import Embedder

LEFT_SECONDS = 3600.0  # since its last change, after which the folder of an unfinished export is removed
SIMILAR = 0.9999  # least cosine between the embeddings of a text by the run and by the exported model
POOLING_FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
    "weighted": "pooling_mode_weightedmean_tokens",
}
MODULES = ("Transformer", "Pooling", "Normalize")
RELOAD = """
import gc; gc.disable()  # makes the imports a fifth faster
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = json.load(open(sys.argv[2], encoding="utf-8"))
np.save(sys.argv[3], model.encode(texts, convert_to_numpy=True, show_progress_bar=False))
"""


def export(run: str, folder: str, least_cosine: float = SIMILAR) -> int:
    """Write the model of a run into a new or empty folder. LoRA adapters are merged in float32.

    Returns DONE, or FAILED if the exported model does not embed as the run does; then nothing is left. Raises UserError
    if the run is not done, the folder is not empty, or sentence-transformers is not installed.
    """
    target = Path(folder).resolve()  # the real folder behind a link
    if target == Path.cwd():
        raise UserError(f"{target}: is the current folder, which cannot be replaced; name another folder")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is not empty; name an empty or a new folder")
    try:
        version("sentence-transformers")
    except ModuleNotFoundError:
        raise UserError("export needs sentence-transformers: pip install 'embedscale[mteb]'") from None
    finished(RunDirectory(run))
    from embedscale.serving.embedder import Embedder  # imports torch

    # The export is float32, so it is compared with float32: in deep models, rounding to bf16 alone exceeds SIMILAR.
    embedder = Embedder.load(run, "cpu", "float32")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):  # by an export that was killed
        if time.time() - left.stat().st_mtime > LEFT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        write_model(embedder, made)
        likeness = _compare(embedder, made, Path(temporary))
        if isinstance(likeness, str) or not likeness > least_cosine:  # NaN is not above anything
            found = likeness if isinstance(likeness, str) else f"cosine {likeness:.6f}, expected above {least_cosine}"
            print(f"embedscale: the exported model does not embed as the run does ({found}); no file was kept")
            return FAILED
        card = model_card(embedder, RunDirectory(run), target.name, likeness)
        (made / "README.md").write_text(card, encoding="utf-8")
        made.rename(target)
    print(f"{target}: a sentence-transformers model; lowest cosine with the run's embeddings: {likeness:.7f}")
    return DONE


def write_model(embedder: "Embedder", folder: Path) -> None:
    """Write the files of the sentence-transformers model into an existing, empty folder."""
    config = embedder.config
    body: Any = embedder.encoder.body
    body.save_pretrained(folder)
    _edit_json(folder / "config.json", _legacy_rotary(body.config) | {"use_cache": False} | _direction(config))
    _write_tokenizer(embedder, folder)
    write = {
        "modules.json": [
            {
                "idx": number,
                "name": str(number),
                "path": "" if number == 0 else f"{number}_{name}",
                "type": f"sentence_transformers.models.{name}",
            }
            for number, name in enumerate(MODULES)
        ],
        "sentence_bert_config.json": {"max_seq_length": config.data.context, "do_lower_case": False},
        # Flags instead of the newer single word, which older releases ignore and replace by their default.
        "1_Pooling/config.json": {
            "word_embedding_dimension": embedder.width,
            "pooling_mode_cls_token": False,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            **{flag: name == config.backbone.pooling for name, flag in POOLING_FLAGS.items()},
            "include_prompt": True,
        },
        "config_sentence_transformers.json": {
            "__version__": {name.replace("-", "_"): version(name) for name in ("transformers", "torch")},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    mode = (folder / "config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)  # safetensors makes them readable by the owner only
    (folder / "2_Normalize").mkdir()
    for name, value in write.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n")


def _direction(config: Any) -> dict[str, Any]:
    """Return the setting by which transformers lets a decoder attend to later tokens too, where the run did."""
    return {"is_causal": False} if config.backbone.attention == "bidirectional" else {}


def _legacy_rotary(config: Any) -> dict[str, Any]:
    """Return the settings that transformers before 5 reads instead of `rope_parameters`."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or "rope_theta" not in rope:
        return {}
    scaling = {key: x for key, x in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    neox = config.model_type == "gpt_neox"
    return {
        "rotary_emb_base" if neox else "rope_theta": rope["rope_theta"],
        "rotary_pct" if neox else "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
        "torch_dtype": "float32",
    }


def _write_tokenizer(embedder: "Embedder", folder: Path) -> None:
    """Write the run's tokenizer with a padding token.

    Padding is on the right, where causal attention does not see it.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(embedder.tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.post_processor = _template(embedder)
    name, _ = tokenizer_of(embedder.config)
    known = read_json(Path(name) / "tokenizer_config.json") or {} if Path(name).is_dir() else {}
    end = known.get("eos_token") or known.get("pad_token")
    if isinstance(end, dict):
        end = end["content"]
    if end is None or tokenizer.token_to_id(end) is None:
        special = [t.content for _, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
        # Without a special token, any symbol can pad, because attention and pooling use the mask. But tokenizers first
        # search texts for the padding token itself; the longest symbol is the least likely to occur in them.
        end = special[0] if special else max(tokenizer.get_vocab(), key=lambda symbol: (len(symbol), symbol))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=end,
        eos_token=end if end in (known.get("eos_token"), "<|endoftext|>") else None,
        padding_side="right",
        truncation_side="right",
        model_max_length=embedder.config.data.context,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    # The class that every release has for a plain tokenizer.json.
    _edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _template(embedder: "Embedder") -> Any:
    """Return what adds the special tokens around a text that training added, and no others; None if it added none."""
    from tokenizers import processors

    added = embedder.added
    if not added:
        return None
    before, after = ([embedder.tokenizer.id_to_token(each) for each in ids] for ids in (added.before, added.after))
    ids = zip((*before, *after), (*added.before, *added.after), strict=True)
    return processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=list(dict.fromkeys(ids)))


def _edit_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def _compare(embedder: "Embedder", model: Path, scratch: Path) -> float | str:
    """Embed texts of many lengths with the exported model, in a new process, and with the run.

    Returns the least cosine, or what went wrong as a text.
    """
    texts = [PROBE[:n] for n in range(1, len(PROBE) + 1, 3)] + [PROBE * 20, "a " * 5000]
    (scratch / "texts.json").write_text(json.dumps(texts))
    words = [sys.executable, "-P", "-c", RELOAD, str(model), str(scratch / "texts.json"), str(scratch / "found.npy")]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | offline)
    if done.returncode != 0:
        return f"loading failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    found = np.load(scratch / "found.npy")
    return float((found * embedder.encode(texts)).sum(1).min())


def model_card(embedder: "Embedder", directory: RunDirectory, name: str, likeness: float) -> str:
    """Return the text of the model's README.md: how to use it, how it was trained, and its scores."""
    record, config = embedder.record, embedder.config
    settings = record.hyperparameters
    scores = [score for path in directory.score_paths() if (score := sound(Score.read(path)))]
    rows = {
        "backbone": f"{record.backbone} ({record.backbone_weights}, digest {record.backbone_digest})",
        "method": settings.method_label,
        "parameters outside the embedding": f"{record.n_parameters:,}",
        "budget": f"{record.spent_flop:,} of {record.budget_flop:,} FLOP, C = 2 (N_F + N_B + N_U) D",
        "data": f"{record.data} (digest {record.data_digest}), {record.pairs:,} pairs, "
        f"{record.tokens:,} tokens, cut at {settings.context}",
        "batch, steps": f"{settings.batch_size} pairs, {record.steps:,} steps",
        "peak learning rate": f"{settings.learning_rate:g}",
        "loss": f"{settings.loss} InfoNCE, temperature {settings.temperature:g}",
        "precision": settings.precision,
        "GPU-hours": f"{record.gpu_hours} on {record.device.name}",
        "run": f"{record.run_id}, weights {record.weights_digest}, seed {record.seed}",
    }
    evaluation = record.evaluation
    measured = {
        f"held-out loss (among {evaluation.negatives + 1}, temperature {evaluation.temperature:g})": record.loss,
        f"recall@1 among {evaluation.negatives + 1}": record.recall_at_1,
        "recall@10": record.recall_at_10,
        **{f"MTEB {score.task} ({score.main_score})": score.score for score in scores},
    }
    front = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    front += ["tags:", *(f"- {tag}" for tag in ("sentence-transformers", "feature-extraction", "embedscale"))]
    if not Path(config.backbone.name).exists():
        front.append(f"base_model: {config.backbone.name}")
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    found = [f"| {key} | {value:.4f} |" for key, value in measured.items()]
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {name}",
            "",
            f"Text embeddings of {embedder.width} numbers from {record.backbone}, fine-tuned with embedscale.",
            "",
            "```python",
            "from sentence_transformers import SentenceTransformer",
            f'embeddings = SentenceTransformer("{name}").encode(["a text", "another"])',
            "```",
            "",
            *("| recipe | |", "|---|---|", *table, ""),
            *("| measured | |", "|---|---|", *found, ""),
            f"Loaded in a fresh process, its embeddings had a cosine of at least {likeness:.7f} with the run's own,\n"
            "both in float32.",
            "",
        ]
    )
