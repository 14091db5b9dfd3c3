"""Sweeps with known laws: as a table with its fits, and as run directories."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from records import record

from analysis import runs, study
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA, TRAINABLE_FRACTION
from embedscale.run.cost import cost_of
from embedscale.run.families import PYTHIA
from embedscale.run.method import Method

LAWS = {
    "full": np.array([0.1, 900.0, 90.0, 0.45, 0.25]),
    "bias": np.array([0.15, 1000.0, 130.0, 0.44, 0.245]),
    "lora": np.array([0.08, 900.0, 145.0, 0.45, 0.267]),
    "freeze": np.array([0.12, 2.0, 800.0, 60.0, 1.5, 105.0, 0.45, 0.25]),
}
BACKBONES = [PYTHIA.sizes[f"pythia-{name}"] for name in ("14m", "31m", "70m", "160m", "410m", "1b")]
BUDGETS = 1.5e15 * 4.0 ** np.arange(5)
FLOP_AN_HOUR = 2e17
METHODS = [
    *(Method("full"), Method("bias")),
    *(Method("freeze", active_fraction=share) for share in (1 / 2, 1.0)),
    *(Method("lora", rank=rank) for rank in (8, 32, 512)),
]
RANK_PENALTY = {8: 1.04, 32: 1.0, 512: 1.03}


def paper_like(noise: float = 0.004, batch: int = 1024, context: int = 75, seed: int = 0) -> pd.DataFrame:
    """Return six Pythias at five budgets by four methods, with costs of `cost_of` and losses of `LAWS`."""
    rng, rows = np.random.default_rng(seed), []
    for row in BACKBONES:
        for method in METHODS:
            cost = cost_of(row.shape, method)
            share = {"freeze": method.active_fraction}.get(method.name, cost.n_updated / cost.n_parameters)
            for budget in BUDGETS:
                tokens = budget / cost.flop_per_token
                if method.name == "freeze":
                    loss = TRAINABLE_FRACTION.predict(LAWS["freeze"], row.parameters, tokens, share)
                else:
                    loss = CHINCHILLA.predict(LAWS[method.name], row.parameters, tokens)
                worse = RANK_PENALTY.get(method.rank, 1.0) * np.exp(noise * rng.standard_normal())
                pairs = tokens / 78
                rows.append(
                    {"method": method.name, "backbone": row.name, "n_parameters": row.parameters, "budget_flop": budget}
                    | {"tokens": tokens, "flop_per_token": cost.flop_per_token, "trainable_fraction": share}
                    | {"rank": method.rank, "loss": float(np.ravel(loss)[0] * worse), "batch_size": batch}
                    | {"context": context, "pairs": pairs, "steps": np.ceil(pairs / batch), "seed": 0}
                    | {"gpu_hours": budget / FLOP_AN_HOUR, "evaluation.pool": 4096, "evaluation.negatives": 1023}
                )
    table = pd.DataFrame(rows)
    return table.assign(rank=table["rank"].astype(float), status="done")


def by_fraction(shift: float = 0.0, noise: float = 0.002) -> pd.DataFrame:
    """Freezing at six fractions, which fix every coefficient of its law; `shift` makes those of each size different."""
    rng, rows = np.random.default_rng(0), []
    for place, row in enumerate(BACKBONES):
        for share in np.arange(1, 7) / 6 - shift * place:
            per_token = (2 + 4 * share) * row.parameters
            for budget in BUDGETS:
                tokens = budget / per_token
                loss = TRAINABLE_FRACTION.predict(LAWS["freeze"], row.parameters, tokens, share)
                rows.append(
                    {"method": "freeze", "backbone": row.name, "n_parameters": row.parameters, "budget_flop": budget}
                    | {"tokens": tokens, "flop_per_token": per_token, "trainable_fraction": share, "seed": 0}
                    | {"loss": float(np.ravel(loss)[0] * np.exp(noise * rng.standard_normal()))}
                )
    return pd.DataFrame(rows)


def fitted(table: pd.DataFrame, folder: Path, **settings) -> Path:
    """Write the table's fits into a folder, as `embedscale fit` does.

    Joint laws by least squares take a sixth of the time that Huber's residual takes, and what follows from a fit is the
    same.
    """
    loaded = runs.load(table)
    study.write(fit(loaded, **{"bootstrap": 100, "residual": "log"} | settings), loaded, folder)
    return folder


def write_run(folder: Path, budget: float, size: int, method: str, loss: float, backbone: str, seed: int = 0) -> Path:
    """Write a run directory as training does: configuration, metrics, record."""
    settings = {"full": {}, "lora": {"rank": 8}, "bias": {}, "freeze": {"active_fraction": 0.5}}[method]
    path = folder / f"{Path(backbone).name}_{method}_{budget:.3g}_s{seed}"
    path.mkdir(parents=True)
    per_token = {"full": 6, "lora": 4.6, "bias": 4.1, "freeze": 4}[method] * size
    tokens = int(budget / per_token)
    config = {
        "budget": budget,
        "output": str(folder),
        "backbone": {"name": backbone},
        "method": {"name": method} | settings,
        "data": {"store": "stores/tiny"},
        "training": {"batch_size": 128, "learning_rate": 0.003, "seed": seed},
    }
    (path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    rows = []
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        value = loss * share**-0.2
        place = {"step": int(100 * share), "spent_flop": int(share * budget)}
        rows.append(place | {"train_loss": value * 1.02})
        rows.append(place | {"loss": value})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = record(
        run_id=path.name,
        backbone=Path(backbone).name,
        method=method,
        hyperparameters={"batch_size": 128, "learning_rate": 0.003} | settings,
        trainable_fraction={"full": 1.0, "lora": 0.1, "bias": 0.02, "freeze": 0.5}[method],
        seed=seed,
        data_digest="d1",
        budget_flop=budget,
        spent_flop=int(budget * 0.999),
        spent_flop_exact=int(budget * 1.1),
        flop_per_token=int(per_token),
        n_parameters=size,
        tokens=tokens,
        pairs=tokens // 120,
        steps=int(np.ceil(tokens / 120 / 128)),
        loss=loss,
        evaluation={"pool": 2048, "negatives": 127, "temperature": 0.05, "digest": "e1"},
        gpu_hours=budget / 1e13,
    )
    (path / "record.json").write_text(json.dumps(found))
    return path


def write_score(path: Path, task: str, score: float) -> None:
    (path / "scores").mkdir(exist_ok=True)
    (path / "scores" / f"{task}.json").write_text(json.dumps({"task": task, "score": score}))


TINY = {"tiny-7k": 6592, "tiny-13k": 12864, "tiny-25k": 25472, "tiny-50k": 50176, "tiny-85k": 84912}


def miniature(folder: Path, scores: bool = True) -> Path:
    """Write the quickstart's folder of run directories: tiny decoders, three budgets, the gaps of its sweep file."""
    rng = np.random.default_rng(0)
    for name, size in TINY.items():
        for budget in (5e10, 2e11, 6e11):
            for method in ("full", "lora", "freeze", "bias"):
                if method != "full" and (size < 20000 or budget != 2e11):
                    continue
                if budget == 6e11 and size < 20000:
                    continue
                best = 9000 * (budget / 5e10) ** 0.6
                worse = {"full": 1.0, "lora": 1.02, "freeze": 1.05, "bias": 1.2}[method]
                loss = 4.0 * (budget / 5e10) ** -0.18 * np.exp(0.06 * np.log(size / best) ** 2) * worse
                loss *= np.exp(0.01 * rng.standard_normal())
                path = write_run(folder, budget, size, method, float(loss), f"configs/quickstart/backbones/{name}")
                if scores:
                    write_score(path, "HeldOutRetrieval", float(1 - loss / 8))
    return folder
