"""The frontier is told only where an optimum is known, and never against a run."""

import numpy as np
import pandas as pd
import pytest

from analysis import runs
from analysis.fitting.fit import fit

BUDGETS = 1e15 * 4.0 ** np.arange(4)
SIZES = 1e6 * 4.0 ** np.arange(5)


def table(lowest: dict[str, list[float]], best: dict[str, list[float]]) -> pd.DataFrame:
    """Valleys of the lowest losses about the best sizes (in steps of the grid) of each method and budget."""
    return pd.DataFrame(
        {"method": name, "n_parameters": n, "budget_flop": c, "tokens": c / 6 / n}
        | {"loss": low * np.exp(0.03 * (np.log(n / SIZES[0]) - np.log(4) * place) ** 2)}
        for name in lowest
        for c, low, place in zip(BUDGETS, lowest[name], best[name], strict=True)
        for n in SIZES
    )


def measured(found: pd.DataFrame, budget: float) -> float:
    return found[np.isclose(found["budget_flop"], budget)]["loss"].min()


def test_no_frontier_where_every_method_has_its_best_size_at_the_edge():
    """At the smallest budget all best sizes are the smallest; the laws, extended to it, lie above every run."""
    rows = table(
        {"full": [3.94, 3.9, 3.3, 2.8], "lora": [4.0, 4.0, 3.2, 2.56]},
        {"full": [-0.5, 1.2, 2.1, 2.9], "lora": [-0.5, 1.3, 2.0, 2.9]},
    )
    found = fit(runs.load(rows), noise=0.002, bootstrap=100, residual="log")
    for method in found.methods.values():
        assert [row.interior for row in method.optima] == [False, True, True, True]
    frontier = found.frontier
    assert frontier.segments[0].from_flop == pytest.approx(BUDGETS[1])
    assert [gap.budget_flop for gap in frontier.gaps] == pytest.approx([BUDGETS[0]])
    assert any(note.startswith("no frontier at 1e15 FLOP: ") for note in found.notes)
    for segment in frontier.segments:
        law = found.methods[segment.method].power_laws.loss
        for budget in BUDGETS:
            if segment.from_flop <= budget <= segment.to_flop:
                assert law.at(budget) < measured(rows, budget) * 1.05


def test_a_run_below_every_law_makes_a_gap_that_names_it():
    """LoRA has no optimum at the third budget, but a run far below the law of full fine-tuning."""
    rows = table(
        {"full": [4.0, 3.5, 3.0, 2.6], "lora": [4.4, 3.6, 2.4, 2.5]}, {"full": [1, 1.5, 2, 2.5], "lora": [9, 9, 9, 9]}
    )
    lora = rows["method"] == "lora"
    rows.loc[lora, "loss"] = rows[lora].groupby("budget_flop")["loss"].transform(lambda each: each / each.min())
    rows.loc[lora, "loss"] *= rows[lora]["budget_flop"].map(dict(zip(BUDGETS, [4.4, 3.6, 2.4, 2.7], strict=True)))
    found = fit(runs.load(rows), noise=0.002, bootstrap=100, residual="log")
    (gap,) = found.frontier.gaps
    assert gap.budget_flop == pytest.approx(BUDGETS[2])
    assert gap.why.endswith("but lora was measured at 2.4")
    spans = [(segment.from_flop, segment.to_flop) for segment in found.frontier.segments]
    assert spans == [pytest.approx((BUDGETS[0], BUDGETS[1])), pytest.approx((BUDGETS[3], BUDGETS[3]))]


def test_where_one_method_was_not_run_nothing_crosses():
    """Freezing is the best wherever it was run, which is not at the largest budget."""
    rows = table(
        {"full": [4.0, 3.5, 3.0, 2.6], "freeze": [3.8, 3.3, 2.8, 2.4]},
        {name: [1, 1.5, 2, 2.5] for name in ("full", "freeze")},
    )
    rows = rows[(rows["method"] == "full") | (rows["budget_flop"] < BUDGETS[3])]
    found = fit(runs.load(rows), noise=0.002, bootstrap=100, residual="log")
    assert [row.method for row in found.frontier.segments] == ["freeze", "full"]
    assert not found.frontier.crossings
    (note,) = [note for note in found.notes if note.startswith("the frontier goes from freeze to full at 1.6e16 FLOP")]
    assert note.endswith("not because their laws meet")
