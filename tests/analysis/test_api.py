"""The Python API: what a user of `import analysis` types, on an own table."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import analysis
from embedscale.errors import UserError

TRUE = {"E": 1.7, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.37}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Write forty runs with other column names, and losses of a known law with a noise of 0.1 %."""
    n, c = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 3e9, 8), 1e18 * 4.0 ** np.arange(5)))
    d = c / (6 * n)
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    loss *= np.exp(1e-3 * np.random.default_rng(0).standard_normal(len(n)))
    path = tmp_path_factory.mktemp("own") / "own.csv"
    pd.DataFrame({"N": n, "D": d, "val_loss": loss}).to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_five_lines_lead_from_a_table_to_laws_and_a_recipe(file, capsys):
    runs = analysis.read_runs(file, columns={"n_parameters": "N", "tokens": "D", "loss": "val_loss"})
    fits = analysis.fit(runs)
    law = fits.methods["full"].joint_laws["chinchilla"]
    best = analysis.make_recipe(fits, "1e20", runs=runs).best
    print(law.coefficients, best.n_parameters, best.tokens, best.loss)

    assert "alpha" in capsys.readouterr().out
    for name, true in TRUE.items():
        low, high = law.intervals[name]
        assert low <= true <= high
    best_loss = TRUE["E"] + TRUE["A"] / best.n_parameters ** TRUE["alpha"] + TRUE["B"] / best.tokens ** TRUE["beta"]
    assert best.loss == pytest.approx(best_loss, rel=0.02)
    assert 6 * best.n_parameters * best.tokens == pytest.approx(1e20)


def test_a_data_frame_works_like_a_file(file):
    names = {"n_parameters": "N", "tokens": "D", "loss": "val_loss"}
    table = analysis.read_runs(pd.read_csv(file, float_precision="round_trip"), names).table
    pd.testing.assert_frame_equal(table, analysis.read_runs(file, names).table)


def test_fits_are_written_and_read_and_drawn(file, tmp_path):
    runs = analysis.read_runs(file, {"n_parameters": "N", "tokens": "D", "loss": "val_loss"})
    fits = analysis.fit(runs, bootstrap=100)
    assert analysis.read_fits(analysis.write_fits(fits, runs, tmp_path)) == fits
    drawn = analysis.draw_figure(analysis.study_of(fits, runs), "figure_01_frontier")
    assert drawn.rows["loss"].tolist() == [row.lowest_loss for row in fits.methods["full"].optima]
    assert analysis.read_study(tmp_path).fits == fits
    with pytest.raises(UserError, match="figure: 'figure_99' is unknown; allowed: figure_01_frontier, "):
        analysis.draw_figure(analysis.study_of(fits, runs), "figure_99")


def test_a_sweep_is_simulated_from_the_text_of_a_law(file):
    rows = pd.DataFrame({"method": "full", "n_parameters": n, "budget_flop": c} for n in np.geomspace(1e7, 3e9, 8)
                        for c in 1e18 * 4.0 ** np.arange(5))  # fmt: skip
    text = ",".join(f"{name}={value}" for name, value in TRUE.items())
    found = analysis.simulate_sweep(rows, text, 1e-3, repeats=50)["full"]
    assert found.n_exponent.truth == pytest.approx(TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"]))


def test_every_public_name_exists_and_the_import_is_quick():
    assert all(getattr(analysis, name) is not None for name in analysis.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        analysis.nothing  # noqa: B018
    code = "import sys, analysis; sys.exit(any(name in sys.modules for name in ('numpy', 'pandas', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
