"""Parts that do what a user does: train, stop, resume, embed, calibrate."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from parts import Row, Setting

from embedscale.errors import DONE
from embedscale.files import read_json
from embedscale.run.settings import load

TESTS = Path(__file__).parents[2]


def train(setting: Setting) -> Iterator[Row]:
    """A run alone, and one that is stopped three times and resumed: metrics, record and weights to the last bit."""
    sys.path += [str(TESTS.parent), str(TESTS)]  # tests has a folder `embedscale` too: the package comes first
    from saved import save_backbone, write_pairs
    from training_runs import StopAfter, comparable

    from embedscale.data.prepare import prepare
    from embedscale.run.directory import RunDirectory
    from embedscale.training.train import train as train_run

    folder = setting.folder / "runs"
    folder.mkdir()
    backbone = save_backbone(folder / "pythia-own", width=setting.pick(512, 64), blocks=6, heads=setting.pick(8, 2))
    pairs = write_pairs(folder / "pairs.jsonl", setting.pick(20_000, 2_000))
    words = [
        f"backbone.name={backbone}", f"data.store={folder / 'store'}", f"data.sources=[{{kind: jsonl, path: {pairs}}}]",
        f"training.batch_size={setting.pick(256, 32)}", "training.learning_rate=1e-3", "data.held_out=0.1",
        "evaluation.pool=64", "evaluation.negatives=31", f"training.precision={setting.pick('bf16', 'float32')}",
        f"budget={setting.pick(6e13, 4e10)}", "resources.log_every=3",
    ]  # fmt: skip
    begun = time.perf_counter()
    prepare(load(None, words))
    yield {"name": "prepare", "pairs": setting.pick(20_000, 2_000), "seconds": time.perf_counter() - begun}
    found = {}
    for name, more in {
        "full": [], "lora": ["method.name=lora", "method.rank=8", "method.dropout=0.1", "training.learning_rate=1e-2"],
    }.items():  # fmt: skip
        alone = load(None, [*words, *more, f"output={folder / 'alone'}"])
        begun = time.perf_counter()
        code = train_run(alone)
        seconds, record = time.perf_counter() - begun, RunDirectory(alone.folder).read_record()
        yield {"name": f"{name}, alone", "ok": code == DONE, "seconds": seconds} | {
            key: getattr(record, key, None) for key in ("steps", "tokens", "loss", "train_loss", "recall_at_1")
        }
        resumed = load(None, [*words, *more, f"output={folder / 'resumed'}"])
        codes: list[int] = []
        while not codes or codes[-1] != DONE:
            codes.append(train_run(resumed, StopAfter(8) if len(codes) < 3 else None))
            if len(codes) > 5:
                break
        found[name] = [comparable(RunDirectory(each.folder)) for each in (alone, resumed)]
        names = ("metrics", "record", "weights")
        equal = {part: a == b for part, a, b in zip(names, *found[name], strict=True)}
        yield {"name": f"{name}, stopped and resumed", "ok": all(equal.values()), "attempts": len(codes)} | equal


def encode(setting: Setting) -> Iterator[Row]:
    """Embeddings of the runs of `train`, on this device and on the CPU in float32; texts a second."""
    from embedscale.serving.embedder import Embedder

    texts = [" ".join(f"word {i * j % 97}" for j in range(1 + i % 12)) for i in range(setting.pick(20_000, 500))]
    for run in sorted((setting.folder / "runs" / "alone").iterdir()):
        truth = Embedder.load(run, "cpu", "float32").encode(texts[:500])
        for precision in setting.pick(("float32", "bf16"), ("float32",)):
            embedder = Embedder.load(run, setting.pick("cuda", "cpu"), precision)
            found = embedder.encode(texts[:500])
            embedder.encode(texts)  # warm
            begun = time.perf_counter()
            embedder.encode(texts)
            speed = len(texts) / (time.perf_counter() - begun)
            cosine = float(np.sum(found * truth, axis=1).min())
            limit = 0.9999 if precision == "float32" else 0.99
            yield {"name": f"{run.name[:20]}, {precision}", "ok": cosine > limit, "least_cosine": cosine,
                   "texts_per_second": speed}  # fmt: skip


def calibrated(
    setting: Setting, size: str, methods: tuple[str, ...], seconds: float, compiled: bool = False
) -> Iterator[Row]:
    """Rows of `embedscale calibrate`, which go on in one file."""
    from embedscale.training.pricing.calibrate import calibrate

    out = setting.folder / ("compiled.json" if compiled else "calibration.json")
    size = setting.pick(size, "pythia-14m")
    words = ["training.precision=bf16", f"training.batch_size={setting.pick(1024, 8)}"]
    words += ["resources.compile=true"] if compiled and not setting.cpu else []
    calibrate(load(None, words), str(out), [size], list(methods), setting.pick(seconds, 0.2))
    found = read_json(out)
    assert found is not None
    for row in found["rows"] + found["too_large"]:
        if row["backbone"] == size and row["method"] in methods:
            name = f"{row['backbone']}, {row['method']}" + (", compiled" if compiled else "")
            kept = ("tokens_per_second", "pairs_per_second", "share_of_peak", "memory_gb", "chunk_tokens", "steps",
                    "seconds", "compile_seconds")  # fmt: skip
            yield {"name": name, "fits": "steps" in row} | {key: row[key] for key in kept if key in row}
    yield {"name": "peak", "TFLOP_per_second": found["peak_flop_per_second"] / 1e12, "device": found["device"]}


def calibrate_two(setting: Setting) -> Iterator[Row]:
    """14M and 160M, as `embedscale calibrate` measures them."""
    for size in setting.pick(("pythia-14m", "pythia-160m"), ("pythia-14m",)):
        yield from calibrated(setting, size, ("full", "lora-r32"), 2.0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
