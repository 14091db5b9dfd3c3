"""Optima that the runs do not show are told by their state, with what to add, and enter no law."""

import numpy as np
import pandas as pd
import pytest
from law_sweep import BUDGETS, FULL, sweep

from analysis import fits, runs, summary
from analysis.fitting import optima
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA

CLUSTER = {"sizes": [4e7, 4.004e7, 4.008e7, 1.6e8], "loss": [0.56, 0.53, 0.50, 0.60]}  # its parabola falls to 1e-10
OUTLIER = {"sizes": 5e7 * 1.5 ** np.arange(-3, 4), "loss": [0.504, 0.502, 0.501, 0.499, 0.5, 0.501, 0.7]}
NARROW = {"sizes": [5e7, 5.125e7, 5.25e7], "loss": [0.503, 0.499, 0.502]}


def beside_another(sizes, loss, budget: float = 4 * BUDGETS[-1]) -> fits.Fits:
    """The fits of a sound profile and, at the largest budget, one of these sizes, at the law's level.

    These are too few runs to tell which of them lie far off their joint law.
    """
    sizes = np.asarray(sizes, float)
    level = CHINCHILLA.predict(FULL, 5.6e7, budget / 6 / 5.6e7)[0]
    loss = np.asarray(loss) * level / min(loss)
    rows = {"method": "full", "n_parameters": sizes, "budget_flop": budget, "tokens": budget / 6 / sizes}
    sound = sweep(methods=("full",)).query("budget_flop == budget_flop.max()")
    return fit(
        runs.load(pd.concat([sound, pd.DataFrame(rows | {"loss": loss})])), noise=0.004, bootstrap=100, residual="log"
    )


@pytest.mark.parametrize(
    ("case", "state", "told"),
    [
        (
            CLUSTER,
            "below all runs",
            "more than noise and the depth of the valley explain: add a size near",
        ),
        (OUTLIER, "below all runs", "% below the best run"),
        (NARROW, "too narrow", "the sizes span a factor 1.05 only, a curve needs 1.5: add sizes on both sides"),
    ],
    ids=["cluster", "outlier", "narrow"],
)
def test_an_optimum_that_no_run_shows_is_none_and_says_what_to_add(case, state, told, capsys):
    found = beside_another(**case)
    row = found.methods["full"].optima[-1]
    assert (row.state, row.n_opt, row.loss, row.n_opt_interval) == (state, None, None, None)
    assert told in row.why and row.add_size > 0
    assert row.lowest_loss == row.best.loss
    assert len(found.methods["full"].interior) == 1 and found.methods["full"].power_laws.loss is None
    assert any(f"({state}): {row.why}" in note for note in found.notes)
    summary.show_fits(found, summary.console())
    assert state in capsys.readouterr().out


@pytest.mark.parametrize("wild", [1.2, 2.6, 100.0])
def test_one_run_worse_than_its_neighbours_makes_no_optimum_beyond_it(wild):
    """The parabola from the wild run to the size beyond the best dips far below every run: 1.71 beside 3.0."""
    loss = np.array([0.53, 0.505, 0.5 * wild, 0.506, 0.532])
    found = beside_another(5e7 * 2.1 ** np.arange(-2, 3), loss)
    row = found.methods["full"].optima[-1]
    assert (row.state, row.n_opt) == ("uneven", None)
    assert "the run of 5e7 parameters is" in row.why and "worse than the next one farther out" in row.why
    log_n, log_loss = np.log(5e7 * 2.1 ** np.arange(-2, 3)), np.log(loss)
    lowest = np.exp(optima.parabola(log_n, log_loss[None])[1][0])
    assert lowest < 0.995 * loss.min()
    assert len(found.methods["full"].interior) == 1


FAULTS = {
    "an end of the window": (lambda place: place == 2 * 7 + 4, 1.4, 1),
    "the best run": (lambda place: place == 2 * 7 + 3, 0.8, 1),
    "a whole budget": (lambda place: place // 7 == 2, 1.15, 1),
    "one seed of three": (lambda place: place == 2 * 7 + 3, 1.4, 3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_runs_far_off_the_joint_law_take_the_optimum_of_their_budget_alone(fault):
    """They gave "interior" optima below or above every run, and a noise that made other budgets too narrow."""
    wrong, factor, seeds = FAULTS[fault]
    rng, rows = np.random.default_rng(0), []
    for i, budget in enumerate(BUDGETS):
        best = (0.45 / 0.35) ** (1 / 0.8) * (budget / 6) ** (0.35 / 0.8)
        for j, size in enumerate(best * 2.0 ** np.arange(-3, 4)):
            for seed in range(seeds):
                loss = CHINCHILLA.predict(FULL, size, budget / 6 / size)[0] * np.exp(0.003 * rng.standard_normal())
                loss *= factor if wrong(7 * i + j) and seed == 0 else 1
                rows.append((size, budget / 6 / size, budget, seed, loss))
    table = pd.DataFrame(rows, columns=["n_parameters", "tokens", "budget_flop", "seed", "loss"])
    found = fit(runs.load(table), bootstrap=100)
    optima_ = found.methods["full"].optima
    assert [row.state for row in optima_] == ["interior", "interior", "uneven", "interior", "interior"]
    assert 0.0015 < found.noise.log_loss < 0.006
    told = {"one seed of three": "the mean of 3 runs of", "a whole budget": "sizes near the best lies far off"}
    assert told.get(fault, "the run of") in optima_[2].why
    assert ("below" if factor < 1 else "above") + " the joint law: look at it" in optima_[2].why
    assert any(optima_[2].why in note for note in found.notes)
    assert [point.off is not None for point in found.methods["full"].points] == [
        bool(wrong(place)) for place in range(35)
    ]


@pytest.mark.parametrize("wild", [99.0, 1e4])
def test_an_absurd_loss_where_the_law_could_bend_through_it_is_taken_as_diverged(wild):
    """The run with the fewest tokens: the law's term of the tokens could serve this run alone."""
    table = sweep(noise=0.002, methods=("full",)).reset_index(drop=True)
    row = table["tokens"].idxmin()
    without = fit(runs.load(table.drop(index=row)), bootstrap=100, residual="log").methods["full"]
    table.loc[row, "loss"] = wild
    loaded = runs.load(table)
    assert loaded.excluded["reason"].tolist() == ["diverged"]
    found = fit(loaded, bootstrap=100, residual="log")
    assert found.methods["full"].joint_laws["chinchilla"] == without.joint_laws["chinchilla"]
    assert any(f"loss {wild:.4g} is far above all others" in note for note in found.notes)


def test_sizes_beyond_the_window_are_named_where_they_would_fix_the_curve():
    """To add a size where one was run already, or one that enters no curve, would change nothing."""
    log_n = np.log(1e8) + np.log([0.15, 0.4, 1, 2.5, 6])
    columns = {"n_parameters": np.exp(log_n), "loss": np.exp(0.01 * (log_n - log_n[2]) ** 2)}
    points = pd.DataFrame(columns | {"flop_per_token": 6 * np.exp(log_n), "seeds": 1})
    state, why, added = optima.Profile(1e17, points).state(noise=0.01)
    assert (state, added) == ("too narrow", None) and why.endswith("fit with --window 6, or add seeds")
    assert optima.Profile(1e17, points).state(noise=0.01, window=7)[0] == "interior"
    _, why, added = optima.Profile(1e17, points.iloc[1:4]).state(noise=0.01)
    assert added == pytest.approx(4e8) and "add sizes farther out, of about 4e8 parameters" in why


def test_a_run_far_off_the_law_and_far_from_the_best_size_is_noted():
    table = sweep(noise=0.002, methods=("full",))
    smallest, largest = table["n_parameters"].min(), table["budget_flop"].max()
    table.loc[(table["n_parameters"] == smallest) & (table["budget_flop"] == largest), "loss"] *= 1.5
    found = fit(runs.load(table), bootstrap=100, residual="log")
    (note,) = [note for note in found.notes if "far off the joint law" in note]
    assert note.startswith("full: 1 point of 30 far off the joint law, most of all (by ")
    assert not any(row.state == "uneven" for row in found.methods["full"].optima)


def test_a_curve_that_bends_downward_is_said_to():
    columns = {"n_parameters": 1e7 * 2.0 ** np.arange(5), "loss": np.exp([0.01, 0.025, 0.0, 0.025, 0.01])}
    points = pd.DataFrame(columns | {"flop_per_token": 6 * columns["n_parameters"], "seeds": 1})
    state, why, _ = optima.Profile(1e17, points).state(noise=0.02)
    assert state == "too narrow" and why.startswith("the curve bends downward: add sizes farther out")


def test_what_was_taken_for_an_optimum():
    """The parabolas themselves: 1e-10 beside a best run of 0.50, and 28 deviations of the noise below it."""
    log_n, log_loss = (np.log(np.asarray(CLUSTER[name])) for name in ("sizes", "loss"))
    assert np.exp(optima.parabola(log_n, log_loss[None])[1][0]) < 1e-6
    log_n, log_loss = (np.log(np.asarray(OUTLIER[name])) for name in ("sizes", "loss"))
    assert np.log(0.499) - optima.parabola(log_n, log_loss[None])[1][0] > 28 * 0.001


def test_a_curve_within_the_noise_is_too_narrow_and_a_sound_grid_is_not():
    log_n = np.log(1e7) + 0.4 * np.arange(-1, 2)
    loss = 0.5 * np.exp(0.04 * (log_n - log_n[1]) ** 2)
    columns = {"n_parameters": np.exp(log_n), "loss": loss, "flop_per_token": 6 * np.exp(log_n)}
    points = pd.DataFrame(columns).assign(seeds=1)
    profile = optima.Profile(1e17, points)
    assert profile.state(noise=0.001)[0] == "interior"
    state, why, added = profile.state(noise=0.01)
    assert state == "too narrow" and "± 0.077, within 2 standard errors of a line" in why
    assert added >= 2 * np.exp(log_n[-1]) or added <= np.exp(log_n[0]) / 2
    assert optima.Profile(1e17, points.assign(seeds=100)).state(noise=0.01)[0] == "interior"


@pytest.mark.parametrize("step", [1.5, 2, 4, 8])
def test_without_noise_every_centred_optimum_is_interior(step):
    """Also where the parabola of a wide grid, or of one between two sizes, dips below all runs."""
    for budget in BUDGETS:
        best = (0.45 / 0.35) ** (1 / 0.8) * (budget / 6) ** (0.35 / 0.8)
        for shift in (-0.5, -0.25, 0.0, 0.25):
            sizes = best * step ** (np.arange(-3, 4) + shift)
            loss = np.ravel(CHINCHILLA.predict(FULL, sizes, budget / 6 / sizes))
            points = pd.DataFrame({"n_parameters": sizes, "loss": loss, "flop_per_token": 6 * sizes, "seeds": 1})
            profile = optima.Profile(budget, points)
            assert profile.state(noise=1e-6)[0] == "interior"
            _, lowest, _ = optima.parabola(profile.log_n, profile.log_loss[None])
            assert not profile.too_deep(lowest[0], 1e-6)
