"""Print what the study says about each finding of the paper.

    python configs/study/findings.py docs/study/runs.csv

Losses are held-out losses in nats, the mean over seeds. Percentages are differences of the loss; those of methods are
from that of full fine-tuning.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import runs
from analysis.advice.choice import Choice
from analysis.fits import Fits
from analysis.fitting.fit import fit
from analysis.recipe import advise
from embedscale.texts import counted, number, spread


def title(words: str) -> None:
    print(f"\n{words}")


def sizes(fits: Fits) -> None:
    title("Best sizes grow with the budget: N* of each budget with an optimum, and the exponent of N* in C")
    for name, method in fits.methods.items():
        found = ", ".join(f"{number(row.n_opt)} at {number(row.budget_flop)}" for row in method.interior)
        line = method.power_laws.n_opt
        told = f"{line.exponent:.2f} ({spread(line.exponent_interval)})" if line else "no exponent"
        print(f"{name}: {told}; {found or 'no optimum'}")


def profiles(fits: Fits) -> None:
    title("Profiles flatten at both ends: ln L about a parabola, curvature in (ln N)²")
    for name, method in fits.methods.items():
        found = [f"{row.curve.curvature:.3f} at {number(row.budget_flop)}" for row in method.optima if row.curve]
        print(f"{name}: {', '.join(found) or 'no parabola'}")


def methods(settings: pd.DataFrame) -> None:
    title("Full fine-tuning is best at low budgets, LoRA at high ones, freezing close to the best, bias-only worst")
    lowest = settings.loc[settings.groupby(["budget_flop", "method"])["loss"].idxmin()]
    for budget, rows in lowest.sort_values("loss").groupby("budget_flop"):
        full = rows.loc[rows["method"] == "full", "loss"].min()
        told = (
            f"{row.method} {row.loss:.3f} ({row.setting}, {row.backbone}, {100 * (row.loss / full - 1):+.1f} %)"
            for row in rows.itertuples()
        )
        print(f"{number(budget)}: {'; '.join(told)}")


def choices(settings: pd.DataFrame, method: str, words: str) -> None:
    title(words)
    rows = settings[settings["method"] == method]
    wide = rows.pivot_table(index=["budget_flop", "backbone"], columns="setting", values="loss")
    above = 100 * (wide.div(wide.min(axis=1), axis=0) - 1)
    for budget, part in above.groupby("budget_flop"):
        known = part.dropna(axis=1, how="all")
        told = (f"{name} +{known[name].mean():.1f} % ({counted(int(known[name].count()), 'size')})" for name in known)
        print(f"{number(budget)}: {', '.join(told)}")


def prices(settings: pd.DataFrame) -> None:
    title("The best run of a method: what a token costs, and how far full fine-tuning gets with as many tokens")
    found = settings[settings["method"] != "full"]
    for row in found.loc[found.groupby(["method", "budget_flop"])["loss"].idxmin()].itertuples():
        full = settings[(settings["method"] == "full") & (settings["backbone"] == row.backbone)].sort_values("tokens")
        if len(full) and full["tokens"].min() <= row.tokens <= full["tokens"].max():
            same = math.exp(np.interp(math.log(row.tokens), np.log(full["tokens"]), np.log(full["loss"])))
            price = row.flop_per_token / full["flop_per_token"].iloc[0]
            told = f"{row.setting}, {row.backbone}: {100 * price:.0f} % of the FLOP a token"
            print(f"{row.method} at {number(row.budget_flop)}, {told}; {100 * (row.loss / same - 1):+.1f} % in loss")


def scores(table: pd.DataFrame) -> None:
    title("Loss and retrieval go together: Spearman's correlation of the loss and recall among 4,096 texts")
    for name in ("recall_at_1", "recall_at_10"):
        print(f"{name}: {table['loss'].corr(table[name], method='spearman'):.3f} over {len(table)} runs")


def predictions(fits: Fits) -> None:
    title("The largest budget and size are predicted: fits without them")
    for name, method in fits.methods.items():
        for row in method.hold_out:
            found = f"{number(row.predicted, 4)} predicted, {number(row.found, 4)} found, {100 * row.error:.1f} %"
            print(f"{name}, without the {row.left_out}, {row.law}: {found}")


def runs_of(choice: Choice, table: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with a choice's method, backbone, rank and share of active blocks."""
    same = table[(table["method"] == choice.method) & (table["backbone"] == choice.backbone)]
    for name, value in (("rank", choice.rank), ("active_fraction", choice.active_fraction)):
        same = same if value is None else same[np.isclose(same[name], value)]
    return same


def recipes(table: pd.DataFrame, fitted: Callable[[runs.Runs], Fits]) -> None:
    title("Recipes for the two largest budgets from the runs with less, and what was measured there")
    for budget in sorted(set(table["budget_flop"]))[-2:]:
        before = runs.load(table[table["budget_flop"] < budget].drop(columns="setting"))
        found = advise(fitted(before), budget, runs=before)
        there = table[table["budget_flop"] == budget]
        best = there.loc[there["loss"].idxmin()]
        told = f"{best.loss:.3f} ({best.method}, {best.setting}, {best.backbone})"
        print(f"{number(budget)}: lowest of {counted(len(there), 'run')} {told}")
        for choice in (found.best, *(each.choice for each in found.others if each.choice)):
            if len(same := runs_of(choice, there)):
                loss, (low, high) = same["loss"].mean(), choice.loss_interval or (math.nan, math.nan)
                kind = "recommended" if choice is found.best else "other"
                told = f"{choice.loss:.3f} ({low:.3f} … {high:.3f}) expected, {loss:.3f} measured"
                held = "inside" if low <= loss <= high else "outside"
                lost = f"{100 * (loss / best.loss - 1):.1f} % above the lowest"
                print(f"  {kind}: {choice.label}, {choice.backbone}: {told}, {held}; {lost}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", type=Path, help="the table of the runs")
    parser.add_argument("--bootstrap", type=int, default=1000, help="draws behind each interval")
    parser.add_argument("--window", type=float, default=4.0, help="factor in N within which a parabola is fitted")
    args = parser.parse_args()
    fitted = partial(fit, bootstrap=args.bootstrap, window=args.window)
    data = runs.load(args.table)
    table = data.table.copy()
    rank, fraction = table["rank"].map("rank {:.0f}".format), table["active_fraction"].map("{:.2f} active".format)
    table["setting"] = rank.where(table["method"] == "lora", fraction.where(table["method"] == "freeze", "–"))
    settings = table.groupby(["budget_flop", "method", "setting", "backbone"], as_index=False)[
        ["loss", "tokens", "flop_per_token"]
    ].mean()
    fits = fitted(data)
    sizes(fits)
    profiles(fits)
    methods(settings)
    choices(settings, "lora", "Middle ranks are best, the highest worst: mean excess over a size's best rank")
    choices(settings, "freeze", "Active blocks: mean excess over a size's best fraction")
    prices(settings)
    scores(table)
    predictions(fits)
    recipes(table, fitted)


if __name__ == "__main__":
    main()
