"""A sweep of full fine-tuning, freezing and LoRA whose laws are known, as a table."""

import numpy as np
import pandas as pd

from analysis.fitting.laws import CHINCHILLA, TRAINABLE_FRACTION

SIZES = 1.2e6 * 4.0 ** np.arange(6)
BUDGETS = 1.5e15 * 4.0 ** np.arange(5)
FULL = np.array([0.3, 900.0, 900.0, 0.45, 0.35])
LORA = np.array([0.25, 900.0, 1150.0, 0.44, 0.355])
FREEZE = np.array([0.3, 2.0, 800.0, 60.0, 1.5, 900.0, 0.45, 0.35])


def sweep(noise: float = 0.004, seeds: int = 1, seed: int = 0, methods=("full", "freeze", "lora")) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed), []

    def add(method, n, c, s, per_token, loss, **more):
        for replicate in range(seeds):
            noisy = float(np.ravel(loss)[0] * np.exp(noise * rng.standard_normal()))
            row = {
                "method": method,
                "n_parameters": n,
                "budget_flop": c,
                "tokens": c / per_token,
                "trainable_fraction": s,
            }
            rows.append(row | {"flop_per_token": per_token, "seed": replicate, "loss": noisy} | more)

    for n in SIZES:
        for c in BUDGETS:
            if "full" in methods:
                add("full", n, c, 1.0, 6 * n, CHINCHILLA.predict(FULL, n, c / (6 * n)))
            if "lora" in methods:
                for rank, worse in ((8, 1.05), (32, 1.0), (128, 1.04)):
                    s = rank * 1e-3
                    cost = (4 * (1 + s) + 2 * s) * n
                    add("lora", n, c, s, cost, worse * CHINCHILLA.predict(LORA, n, c / cost), rank=rank)
            if "freeze" in methods:
                for s in (1 / 3, 2 / 3, 1.0):
                    cost = (2 + 4 * s) * n
                    add("freeze", n, c, s, cost, TRAINABLE_FRACTION.predict(FREEZE, n, c / cost, s))
    return pd.DataFrame(rows)
