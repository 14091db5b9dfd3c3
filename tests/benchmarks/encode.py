"""Measure texts per second of our encoder and of others: same weights, same texts, same threads.

    python tests/benchmarks/encode.py [--sizes pythia-14m pythia-70m] [--context 512] [--texts 4000] [--bf16]

The weights are random: the cost is that of trained weights. The texts are docstrings and functions of the installed
Python, short and long ones mixed. All tokenise, and sort by length. sentence-transformers runs with its default batch
size of 32 and with its fastest of `BATCHES`; ONNX Runtime and OpenVINO, where they are installed with onnx and
onnxscript, run the exported model in float32 with their fastest. Each has its own process; repetitions alternate, and
the fastest of each counts. Our side is set up like `embedscale encode`.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional
from turns import Contestant

from embedscale.data.installed_python import documented_functions, installed_files
from embedscale.model.hardware import keep_freed_memory
from embedscale.run.families import PYTHIA
from embedscale.run.settings import load
from embedscale.serving.embedder import Embedder
from embedscale.serving.export import write_model
from embedscale.training.pricing.calibrate import build

BATCHES = (8, 16, 32, 64)  # 32 is the default of sentence-transformers


def texts_of_this_machine(number: int) -> list[str]:
    """Return docstrings and functions in turn, each once."""
    files = installed_files()
    step = max(1, len(files) // 4000)
    pairs = (pair for path in files[::step] for pair in documented_functions(path, Counter()))
    texts = dict.fromkeys(text for pair in pairs for text in (pair.query.strip(), pair.positive.strip()) if text)
    return list(itertools.islice(texts, number))


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    """Save a byte-level BPE tokenizer like Pythia's, with 8,192 symbols."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def embedder_of(size: str, tokenizer: Path, context: int, precision: str) -> Embedder:
    torch.manual_seed(0)
    body = build(size, vocab_size=8192).eval()
    words = [f"data.context={context}", f"data.tokenizer={tokenizer}", f"training.precision={precision}"]
    width = PYTHIA.sizes[size].shape.width
    record = SimpleNamespace(width=width, tokenizer_digest=None, tokens_before=[], tokens_after=[])
    return Embedder(body, load(None, words), record, "cpu")


def ours(size: str, tokenizer: Path, context: int, precision: str, texts: list[str]) -> Callable[[], Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    keep_freed_memory()
    embedder = embedder_of(size, tokenizer, context, precision)
    return lambda: timed(lambda: embedder.encode(texts))


def theirs(folder: Path, bf16: bool, texts: list[str]) -> Callable[[int], Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    kinds = {"model_kwargs": {"dtype": torch.bfloat16}} if bf16 else {}
    model = SentenceTransformer(str(folder), device="cpu", **kinds)
    return lambda batch: timed(lambda: model.encode(texts, batch_size=batch, convert_to_numpy=True))


def runtime(name: str, model: Path, tokenizer: Path, context: int, texts: list[str]) -> Callable[[int], Any]:
    """Embed with ONNX Runtime or OpenVINO, in batches of texts of similar lengths, each padded to its longest."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    split = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    split.enable_truncation(context)
    embed = (onnx_runtime if name == "onnxruntime" else openvino)(model)

    def encode(batch: int) -> np.ndarray:
        rows = [each.ids for each in split.encode_batch(texts)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[Any] = [None] * len(rows)
        for begin in range(0, len(order), batch):
            part = order[begin : begin + batch]
            longest = len(rows[part[-1]])
            ids, mask = (np.zeros((len(part), longest), np.int64) for _ in range(2))
            for row, index in enumerate(part):
                ids[row, : len(rows[index])], mask[row, : len(rows[index])] = rows[index], 1
            for index, vector in zip(part, embed(ids, mask), strict=True):
                found[index] = vector
        return np.stack(found)

    return lambda batch: timed(lambda: encode(batch))


def onnx_runtime(model: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"ids": ids, "mask": mask})[0]


def openvino(model: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    from openvino import Core

    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = Core().compile_model(str(model), "CPU", hints)
    return lambda ids, mask: compiled([ids, mask])[0]


def save_onnx(body: torch.nn.Module, path: Path) -> None:
    """Export padded encoding with mean pooling. The body attends in torch's own way afterwards."""

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            return functional.normalize((hidden * mask[..., None]).sum(1), dim=-1)

    body.set_attn_implementation("sdpa")  # type: ignore[operator]
    sizes = {0: torch.export.Dim("texts", min=1), 1: torch.export.Dim("tokens", min=2)}
    example = torch.arange(51).view(3, 17)  # a mask of ones alone would be left out, and causality with it
    torch.onnx.export(
        Whole(), (example, (example % 17 < 9).long()), path, input_names=["ids", "mask"], dynamo=True, verbose=False,
        dynamic_shapes={"ids": sizes, "mask": sizes},
    )  # fmt: skip


def timed(encode: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    begun = time.perf_counter()
    found = encode()
    return time.perf_counter() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pythia-14m", "pythia-70m"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    texts, precision = texts_of_this_machine(args.texts), "bf16" if args.bf16 else "float32"
    installed = [each for each in ("onnxruntime", "openvino") if find_spec(each) and find_spec("onnxscript")]
    table = Table(
        "size", "tokens a text", "encoder", "texts/s", "ours is faster by", "largest difference",
        title=f"{len(texts):,} texts, {torch.get_num_threads()} threads, {precision}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = folder / "tokenizer"
        save_tokenizer(tokenizer, texts)
        for size in args.sizes:
            embedder = embedder_of(size, tokenizer, args.context, precision)
            (folder / size).mkdir()
            write_model(embedder, folder / size)
            lengths = [min(len(e.ids), args.context) for e in embedder.tokenizer.encode_batch(texts)]
            others = {"sentence-transformers": Contestant(theirs, folder / size, args.bf16, texts)}
            if installed and not args.bf16:
                model = folder / f"{size}.onnx"
                save_onnx(embedder.encoder.body, model)
                others |= {n: Contestant(runtime, n, model, tokenizer, args.context, texts) for n in installed}
            own = Contestant(ours, size, tokenizer, args.context, precision, texts)
            taken = {"ours": [own.turn()]}
            for _ in range(args.repeats - 1):
                taken["ours"].append(own.turn())
                for name, other in others.items():
                    for batch in BATCHES:
                        taken.setdefault(f"{name}, batch {batch}", []).append(other.turn(batch))
            best = {name: min(turns, key=lambda turn: turn[0]) for name, turns in taken.items()}
            shown = ["ours", "sentence-transformers, batch 32"]
            for name in others:
                fastest = min((n for n in best if n.startswith(f"{name},")), key=lambda n: best[n][0])
                shown += [fastest] if fastest not in shown else []
            for name in shown:
                seconds, vectors = best[name]
                table.add_row(
                    size, f"{np.mean(lengths):.0f}", name, f"{len(texts) / seconds:,.0f}",
                    f"{seconds / best['ours'][0]:.2f}", f"{np.abs(vectors - best['ours'][1]).max():.1e}",
                )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
