"""A finished run as a sentence-transformers model, which old and new releases, and transformers alone, can load.

The folder is written beside its target, loaded again by a fresh process, compared with the live model, and only then
renamed: what lies at the target is a whole model that was seen to work.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from embedscale.data.tokens import PROBE
from embedscale.errors import DONE, FAILED, UserError
from embedscale.files import read_json
from embedscale.run.directory import RunDirectory
from embedscale.serving.embedder import Embedder

SIMILAR = 0.9999  # the least cosine between a text's embedding here and in the exported model
POOLING_FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
    "weighted": "pooling_mode_weightedmean_tokens",
}
MODULES = ("Transformer", "Pooling", "Normalize")
RELOAD = """
import gc; gc.disable()  # the imports take a fifth less
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = json.load(open(sys.argv[2], encoding="utf-8"))
np.save(sys.argv[3], model.encode(texts, convert_to_numpy=True, show_progress_bar=False))
"""


def export(run: str, folder: str) -> int:
    """Write the model of RUN into FOLDER, LoRA merged in float32. Returns FAILED where it does not embed as the run.

    Raises UserError for a run that is not done, a folder that holds something, and a missing package.
    """
    target = Path(folder).resolve()  # of a link, the folder behind it
    if target == Path.cwd():
        raise UserError(f"{target}: is the folder that you are in, which cannot be replaced; name another one")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is not empty; name an empty or a new folder")
    try:
        version("sentence-transformers")
    except ModuleNotFoundError:
        raise UserError("export needs sentence-transformers: pip install 'embedscale[mteb]'") from None
    # Exported in float32, it is compared in float32: over many blocks, bf16's rounding alone is beyond what is similar.
    embedder = Embedder.of_run(run, "cpu", "float32")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        _write_model(embedder, made)
        likeness = _compare(embedder, made, Path(temporary))
        if isinstance(likeness, str) or likeness <= SIMILAR:
            found = likeness if isinstance(likeness, str) else f"cosine {likeness:.6f}, expected above {SIMILAR}"
            print(f"embedscale: the exported model does not embed as the run does ({found}); nothing was left")
            return FAILED
        card = model_card(embedder, RunDirectory(run), target.name, likeness)
        (made / "README.md").write_text(card, encoding="utf-8")
        made.rename(target)
    print(f"{target}: a sentence-transformers model; cosine with the run's embeddings at least {likeness:.7f}")
    return DONE


def _write_model(embedder: Embedder, folder: Path) -> None:
    config = embedder.config
    body: Any = embedder.encoder.body
    body.save_pretrained(folder)
    _edit_json(folder / "config.json", _legacy_rotary(body.config) | {"use_cache": False})
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
        # Flags, not the newer one-word form, which older readers take for the mode they happen to prefer.
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
        weights.chmod(mode)  # safetensors lets nobody but the owner read them
    (folder / "2_Normalize").mkdir()
    for name, value in write.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n")


def _legacy_rotary(config: Any) -> dict[str, Any]:
    """What releases of transformers before 5 read in place of `rope_parameters`."""
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


def _write_tokenizer(embedder: Embedder, folder: Path) -> None:
    """The tokenizer as trained with, and a token to pad with, on the right, where causal attention never sees it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    # What it was trained with has no special token around a text, which other callers would ask for.
    tokenizer = Tokenizer.from_str(embedder.tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.post_processor = None
    name = embedder.config.data.tokenizer or embedder.config.backbone.name
    known = read_json(Path(name) / "tokenizer_config.json") or {} if Path(name).is_dir() else {}
    end = known.get("eos_token") or known.get("pad_token")
    if isinstance(end, dict):
        end = end["content"]
    if end is None or tokenizer.token_to_id(end) is None:
        special = [t.content for _, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
        # Without any special token a symbol serves, for attention and pooling go by the mask: the longest one, since
        # what pads is cut out of texts first, wherever they spell it.
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
    # The class by which every release knows a plain tokenizer.json.
    _edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _edit_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def _compare(embedder: Embedder, model: Path, scratch: Path) -> float | str:
    """The least cosine over texts of every length, the exported model in a process of its own; or what went wrong."""
    texts = [PROBE[:n] for n in range(1, len(PROBE) + 1, 3)] + [PROBE * 20, "a " * 5000]
    (scratch / "texts.json").write_text(json.dumps(texts))
    words = [sys.executable, "-P", "-c", RELOAD, str(model), str(scratch / "texts.json"), str(scratch / "found.npy")]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | offline)
    if done.returncode != 0:
        return f"loading failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    found = np.load(scratch / "found.npy")
    return float((found * embedder.encode(texts)).sum(1).min())


def model_card(embedder: Embedder, directory: RunDirectory, name: str, likeness: float) -> str:
    """README.md: how to use the model, and what made it."""
    record, config = embedder.record, embedder.config
    settings = record.hyperparameters
    scores = [read_json(path) for path in directory.score_paths()]
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
        **{f"MTEB {score['task']} ({score['main_score']})": score["score"] for score in scores},
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
