"""Fitted sweeps like the paper's for the tests of this folder, and every figure drawn from them."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import own_tables
import pandas as pd
import pytest
from filelock import FileLock
from sweeps import BUDGETS, by_fraction, fitted, miniature, paper_like

from analysis.figures import catalogue, style
from analysis.study import Study, load
from embedscale.cli import main


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first test process to ask for it fills by `make`; the others wait."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = root / name, root / f"{name}.made"
    with FileLock(root / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def paper_folder(tmp_path_factory) -> Path:
    table = paper_like()
    # One run is missing, and bias-only has no optimum inside the grid at the largest budget.
    table.loc[
        (table["method"] == "full") & (table["n_parameters"] == 302_311_424) & (table["budget_flop"] == 6e15), "status"
    ] = "diverged"
    edge = (table["method"] == "bias") & (table["budget_flop"] == BUDGETS[-1]) & (table["n_parameters"] > 18_915_328)
    return made_once(tmp_path_factory, "paper", lambda folder: fitted(table[~edge], folder))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A quickstart: run directories, their fits and their report."""

    def make(folder: Path) -> None:
        miniature(folder)
        assert own_tables.fit(folder) == 0
        assert main(["report", str(folder), "--budget", "3e11"]) == 0

    return made_once(tmp_path_factory, "quickstart", make)


@pytest.fixture(scope="session")
def page(folder) -> str:
    return (folder / "report.html").read_text()


@pytest.fixture(scope="session")
def study(paper_folder, tmp_path_factory) -> Study:
    """Of the paper's shape, with a second sweep, and scores and curves as run directories give them."""
    found = load(paper_folder)
    other = paper_like(batch=2048, context=512, seed=1)
    other = other[other["method"] == "full"]
    other = load(made_once(tmp_path_factory, "other", lambda folder: fitted(other, folder)))
    best = found.points["full"]
    scores = found.table[["run"]].assign(task="STS15", score=0.8 - 0.1 * np.log(found.table["loss"]))
    curves = best[["run", "method", "n_parameters", "budget_flop"]].assign(
        spent_flop=best["budget_flop"], loss=best["loss"]
    )
    curves = pd.concat(
        [curves.assign(spent_flop=curves["spent_flop"] * f, loss=curves["loss"] / f**0.1) for f in (0.2, 1)]
    )
    return replace(found, other=other, scores=scores, curves=curves.assign(train_loss=curves["loss"]))


@pytest.fixture(scope="session")
def fractions(tmp_path_factory) -> Study:
    """Of a sweep that fixes every coefficient of the law L(S, N, D), which the paper-like sweep does not."""
    return load(made_once(tmp_path_factory, "fractions", lambda folder: fitted(by_fraction(), folder)))


@pytest.fixture(scope="session")
def drawn(study, fractions) -> dict[str, style.Drawn]:
    with style.style(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a figure that warns is a figure with a flaw
        return {
            figure.name: figure.draw(fractions if figure.name in OF_FRACTIONS else study)
            for figure in catalogue.FIGURES
        }


OF_FRACTIONS = ("figure_21_fraction", "figure_22_coefficient")
