"""Simulated sweeps: the fit recovers the law, and a bad grid is recognised."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import simulate
from embedscale.cli import main
from embedscale.errors import UserError
from embedscale.run.families import PYTHIA
from slurm.grid import load
from slurm.plan import plan_sweep

LAW = "E=0.3,A=900,B=900,alpha=0.45,beta=0.35"
FRACTION_LAW = "E=0.3,a_d=2,b_d=800,a_s=60,b_s=1.5,c_s=800,alpha=0.45,beta=0.35"
BUDGETS = 1.5e15 * 4.0 ** np.arange(6)
SIZES = [row.parameters for row in list(PYTHIA.sizes.values())[:8]]


def grid(sizes=SIZES, budgets=BUDGETS, method="full", fractions=(1.0,)) -> pd.DataFrame:
    rows = [(method, n, c, s) for n in sizes for c in budgets for s in fractions]
    return pd.DataFrame(rows, columns=["method", "n_parameters", "budget_flop", "trainable_fraction"])


def test_the_papers_grid_recovers_both_laws():
    rows = pd.concat([grid(), grid(method="freeze", fractions=np.arange(1, 7) / 6)])
    found = simulate.simulate(rows, simulate.stated_laws(f"full: {LAW}; freeze: {FRACTION_LAW}"), 0.005, repeats=100)
    for method, law in (("full", "chinchilla"), ("freeze", "trainable_fraction")):
        facts = found[method]
        assert (facts.law, facts.not_fixed) == (law, ())
        for coefficient in facts.coefficients.values():
            low, high = coefficient.interval
            assert low < coefficient.truth < high
        for row in facts.optima:
            assert row.law.median == pytest.approx(1, abs=0.01)
            assert row.parabola.median == pytest.approx(1 + row.bias_without_noise, abs=0.02)
        assert max(row.law.high for row in facts.recipe) < 1e-3
    assert found["full"].n_exponent.truth == pytest.approx(0.35 / 0.8)
    assert found["full"].optima[0].truth == pytest.approx(
        (0.45 / 0.35) ** (1 / 0.8) * (BUDGETS[0] / 6) ** (0.35 / 0.8), rel=1e-3
    )


def test_a_wide_off_centre_grid_biases_the_parabola_but_not_the_law():
    """A wide grid whose sizes are not around the optima biases parabolas, but not joint laws."""
    best = (0.45 / 0.35) ** (1 / 0.8) * (BUDGETS / 6) ** (0.35 / 0.8)
    rows = pd.concat(
        [grid(sizes=n * np.geomspace(0.3, 100, 7), budgets=[c]) for n, c in zip(best, BUDGETS, strict=True)]
    )
    rows = simulate.simulate(rows, simulate.stated_laws(LAW), 0.002, repeats=50, window=1e4)["full"].optima
    assert all(row.bias_without_noise < -0.1 for row in rows)
    assert all(abs(row.law.median - 1) < 0.02 for row in rows)


def test_a_grid_beside_its_optima_is_reported():
    found = simulate.simulate(grid(sizes=SIZES[-4:]), simulate.stated_laws(LAW), 0.005, repeats=20)["full"]
    assert [row.truth for row in found.optima] == [None] * 6
    assert found.recipe[0].parabola is None or found.optima[0].missing < 1


def test_a_grid_too_small_is_refused_with_the_reason():
    found = simulate.simulate(grid(sizes=SIZES[:2]), simulate.stated_laws(LAW), 0.005)["full"]
    assert "needs at least 3 sizes; found 2" in found.refused


def test_simulated_losses_follow_the_law_with_the_given_noise():
    rows = grid(sizes=np.geomspace(1e6, 1e9, 200))
    clean = 0.3 + 900 / rows["n_parameters"] ** 0.45 + 900 / (rows["budget_flop"] / 6 / rows["n_parameters"]) ** 0.35
    drawn = np.log(simulate.draw(rows, simulate.stated_laws(LAW), 0.01)["loss"] / clean)
    assert drawn.std() == pytest.approx(0.01, rel=0.1)
    assert simulate.draw(rows, simulate.stated_laws(LAW), 0.01, seed=1)["loss"].iloc[0] != drawn.iloc[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("E=1,A=2", "E, A are not the coefficients of a law; allowed: E, A, B, alpha, beta or E, A, B, alpha or"),
        ("E=one", "'E=one' was found; write COEFFICIENT=NUMBER"),
        ("E=0,A=1,B=1,alpha=1,beta=1", "E, alpha and beta must be above 0"),
        ("nowhere", "'nowhere' is neither a law such as .* nor a file"),
    ],
)
def test_a_wrong_law_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        simulate.stated_laws(text)


def test_a_grid_that_cannot_be_simulated_is_refused():
    laws = simulate.stated_laws(f"full: {LAW}")
    with pytest.raises(UserError, match="noise: 0 is out of range; allowed: above 0"):
        simulate.simulate(grid(), laws, 0)
    with pytest.raises(UserError, match="no law for the method 'lora'; allowed: full"):
        simulate.simulate(grid(method="lora"), laws, 0.01)
    with pytest.raises(UserError, match="column 'budget_flop' is missing"):
        simulate.simulate(grid().drop(columns="budget_flop"), laws, 0.01)
    with pytest.raises(UserError, match="no loss above 0"):
        simulate.simulate(grid(), simulate.stated_laws("E=0.3,A=-9e9,B=900,alpha=0.45,beta=0.35"), 0.01)


SWEEP = """
name: trial
axes: {budget: [1.5e15, 6e15, 2.4e16, 9.6e16]}
backbones: [EleutherAI/pythia-14m, EleutherAI/pythia-31m, EleutherAI/pythia-70m, EleutherAI/pythia-160m]
methods: [full, {name: lora, rank: [8, 32, 2048]}]
"""


def test_the_command_line_simulates_a_sweep_file(tmp_path, capsys):
    (tmp_path / "trial.yaml").write_text(SWEEP)
    text = f"full: {LAW}; lora: {FRACTION_LAW}"
    assert main(["fit", str(tmp_path / "trial.yaml"), "--simulate", text, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "left out: 8 runs that cannot be run; `embedscale sweep plan` says why" in printed
    found = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert (found["full"]["runs"], found["lora"]["runs"]) == (16, 40)
    assert main(["fit", str(tmp_path / "trial.yaml"), "--simulate", "E=1"]) == 2


def test_a_sweep_file_is_simulated_without_its_unknown_backbones(tmp_path, capsys):
    unknown = SWEEP.replace("[EleutherAI/pythia-14m", "[nobody/gpt-unknown, EleutherAI/pythia-14m")
    (tmp_path / "trial.yaml").write_text(unknown.replace("[full, {name: lora, rank: [8, 32, 2048]}]", "[full]"))
    assert main(["fit", str(tmp_path / "trial.yaml"), "--simulate", LAW, "--out", str(tmp_path / "out")]) == 0
    assert "left out: 4 runs that cannot be run" in capsys.readouterr().out
    (tmp_path / "trial.yaml").write_text("axes: {budget: [1e15]}\nbackbones: [nobody/gpt-unknown]")
    assert main(["fit", str(tmp_path / "trial.yaml"), "--simulate", LAW]) == 2
    assert "none of its 1 run can be run" in capsys.readouterr().err


def test_a_sweep_file_is_simulated_with_the_runs_that_its_plan_would_make(tmp_path, capsys):
    """Runs that the data and the batch rule out would find a law that the sweep cannot find."""
    (tmp_path / "trial.yaml").write_text(f"{SWEEP}expected_pairs: 50_000_000\nbase: {{training.batch_size: 65536}}")
    plan = plan_sweep(load(tmp_path / "trial.yaml"))
    reasons = " ".join(each.obstacle for each in plan.blocked)
    assert "the data are too small" in reasons and "less than one batch" in reasons
    words = ["--simulate", f"full: {LAW}; lora: {FRACTION_LAW}", "--out", str(tmp_path / "out")]
    assert main(["fit", str(tmp_path / "trial.yaml"), *words]) == 0
    assert f"left out: {len(plan.blocked)} runs that cannot be run" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert sum(each["runs"] for each in found.values()) == len(plan.runnable) < 56
    (tmp_path / "none.yaml").write_text("axes: {budget: 1e9}")
    assert main(["fit", str(tmp_path / "none.yaml"), "--simulate", LAW]) == 2
    assert "none of its 1 run can be run" in capsys.readouterr().err


def test_a_grid_may_be_a_table_without_losses(tmp_path, capsys):
    grid().rename(columns={"n_parameters": "N"}).to_csv(tmp_path / "grid.csv", index=False)
    assert main(["fit", str(tmp_path / "grid.csv"), "--columns", "params=N", "--simulate", LAW]) == 0
    assert "exponent of N*, law" in capsys.readouterr().out


def test_a_table_without_methods_is_a_grid(tmp_path):
    path = tmp_path / "grid.csv"
    grid().drop(columns="method").to_csv(path, index=False)
    assert main(["fit", str(path), "--simulate", LAW]) == 0


@pytest.mark.parametrize("option", ["--law tied", "--residual lad", "--optimum akima", "--bins 3", "--bootstrap 100"])
def test_an_option_that_a_simulation_does_not_look_at_is_refused(tmp_path, capsys, option):
    path = tmp_path / "grid.csv"
    grid().to_csv(path, index=False)
    assert main(["fit", str(path), "--simulate", LAW, *option.split()]) == 2
    assert f"{option.split()[0]}: has no meaning with --simulate" in capsys.readouterr().err


def test_a_simulation_of_fits_has_their_noise(tmp_path, capsys):
    table = simulate.draw(grid(), simulate.stated_laws(LAW), 0.02).drop(columns="trainable_fraction")
    table.to_csv(tmp_path / "runs.csv", index=False)
    out = tmp_path / "fits"
    assert main(["fit", str(tmp_path / "runs.csv"), "--out", str(out), "--bootstrap", "100"]) == 0
    noise = json.loads((out / "fits.json").read_text())["noise"]["log_loss"]
    capsys.readouterr()
    assert main(["fit", str(tmp_path / "runs.csv"), "--simulate", str(out)]) == 0
    assert f"noise of ln L {noise:.3g}" in capsys.readouterr().out


def test_an_estimator_that_advises_nothing_is_a_dash_not_a_number(tmp_path, capsys):
    table = grid()
    table = table[table["budget_flop"] <= sorted(set(table["budget_flop"]))[2]]
    table.to_csv(tmp_path / "grid.csv", index=False)
    # The law's best size at each budget is beyond the grid, so that no parabola has an optimum.
    assert main(["fit", str(tmp_path / "grid.csv"), "--simulate", "E=0.1,A=9000,B=9,alpha=0.45,beta=0.35"]) == 0
    printed = capsys.readouterr().out
    beyond = next(line for line in printed.splitlines() if "beyond the grid" in line)
    assert "nan" not in printed
    assert beyond.split()[-2:] == ["–", "–"]
