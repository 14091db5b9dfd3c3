"""What findings.py prints of runs whose law is known."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2] / "configs" / "study"))
import findings

SIZES, BUDGETS = np.geomspace(1e4, 1e6, 7), 1e12 * 4.0 ** np.arange(5)


def law(n, d):
    return 1.2 + 48 / n**0.35 + 208 / d**0.37


def test_findings_of_a_known_law(tmp_path, monkeypatch, capsys):
    noise = np.random.default_rng(0).normal(0, 0.003, len(SIZES) * len(BUDGETS))
    n, c = (each.ravel() for each in np.meshgrid(SIZES, BUDGETS))
    table = pd.DataFrame(
        {"n_parameters": n, "budget_flop": c, "method": "full", "tokens": c / 6 / n, "flop_per_token": 6 * n}
    )
    table = table.assign(loss=law(n, table["tokens"]) * np.exp(noise), backbone=[f"size-{size:.0f}" for size in n])
    table = table.assign(
        rank=np.nan, active_fraction=np.nan, recall_at_1=1 / table["loss"], recall_at_10=-table["loss"]
    )
    table.to_csv(tmp_path / "runs.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["findings.py", str(tmp_path / "runs.csv"), "--bootstrap", "100"])
    findings.main()
    printed = capsys.readouterr().out

    exponent, low, high = map(float, re.search(r"full: (\S+) \((\S+) … (\S+)\)", printed).groups())
    truth = 0.37 / (0.35 + 0.37)
    assert low < truth < high
    assert abs(exponent - truth) < 0.05
    assert "recall_at_1: -1.000 over 35 runs" in printed
    for budget, words in zip(BUDGETS[-2:], printed.split("lowest of 7 runs")[1:], strict=True):
        there = table[table["budget_flop"] == budget].set_index("backbone")["loss"]
        assert words.startswith(f" {there.min():.3f} (full, –, {there.idxmin()})")
        chosen, measured, held, lost = re.search(
            r"recommended: full, (size-\d+): .* (\S+) measured, (\w+); (\S+) %", words
        ).groups()
        assert (float(measured), held) == (round(there[chosen], 3), "inside")
        assert float(lost) == round(100 * (there[chosen] / there.min() - 1), 1) < 1
