"""From runs to fits.json, and the verb: what is written, what is noted, what is refused, and holes everywhere."""

import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sweeps import write_run

from analysis import runs
from analysis.fitting import fit as fits_file
from analysis.fitting import uncertainty
from analysis.fitting.laws import predict_chinchilla, predict_trainable_fraction
from analysis.fitting.optima import Profile
from embedscale.cli import main
from embedscale.errors import UserError
from embedscale.run.cost import cost_of
from embedscale.run.families import PYTHIA
from embedscale.run.method import Method

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
            row = {"method": method, "params": n, "budget": c, "tokens": c / per_token, "trainable_fraction": s}
            rows.append(row | {"flop_per_token": per_token, "seed": replicate, "loss": noisy} | more)

    for n in SIZES:
        for c in BUDGETS:
            if "full" in methods:
                add("full", n, c, 1.0, 6 * n, predict_chinchilla(FULL, n, c / (6 * n)))
            if "lora" in methods:
                for rank, worse in ((8, 1.05), (32, 1.0), (128, 1.04)):
                    s = rank * 1e-3
                    cost = (4 * (1 + s) + 2 * s) * n
                    add("lora", n, c, s, cost, worse * predict_chinchilla(LORA, n, c / cost), rank=rank)
            if "freeze" in methods:
                for s in (1 / 3, 2 / 3, 1.0):
                    cost = (2 + 4 * s) * n
                    add("freeze", n, c, s, cost, predict_trainable_fraction(FREEZE, n, c / cost, s))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def fits() -> dict:
    return fits_file.fit(runs.from_table(sweep()), bootstrap=300)


def test_laws_come_back_with_intervals_that_hold_them(fits):
    law = fits["methods"]["full"]["joint_laws"]["chinchilla"]
    for name, true in zip(("E", "A", "B", "alpha", "beta"), FULL, strict=True):
        low, high = law["intervals"][name]
        assert low < true < high
    assert law["convergence"]["agreeing"] == law["convergence"]["starts"]
    low, high = fits["methods"]["full"]["power_laws"]["n_opt"]["exponent_interval"]
    assert low < 0.35 / 0.8 < high
    law = fits["methods"]["freeze"]["joint_laws"]["trainable_fraction"]
    assert [law[name] for name in ("E", "alpha", "beta")] == pytest.approx([0.3, 0.45, 0.35], rel=0.05)
    assert set(law["intervals"]) == {"E", "a_d", "b_d", "a_s", "b_s", "c_s", "alpha", "beta"}


def test_optima_lie_at_the_closed_form(fits):
    best = (0.45 / 0.35) ** (1 / 0.8) * (BUDGETS / 6) ** (0.35 / 0.8)
    rows = [row for row in fits["methods"]["full"]["optima"] if row["state"] == "interior"]
    assert len(rows) >= 4
    for row in rows:
        true = best[np.argmin(np.abs(BUDGETS - row["budget"]))]
        assert row["law"]["n_opt"] == pytest.approx(true, rel=0.05)
        assert row["n_opt"] == pytest.approx(true, rel=0.25)
        assert 6 * row["n_opt"] * row["d_opt"] == pytest.approx(row["budget"], rel=1e-6)
        assert row["n_opt_interval"][0] < row["n_opt"] < row["n_opt_interval"][1]


def test_the_best_rank_is_in_every_point(fits):
    points = fits["methods"]["lora"]["points"]
    assert {point["rank"] for point in points} == {32.0}
    assert {point["tried"] for point in points} == {3}


def test_the_hold_out_is_fitted_without_what_it_predicts(fits):
    rows = {(row["left_out"], row["law"]): row for row in fits["methods"]["full"]["hold_out"]}
    assert set(rows) == {(f"largest {what}", "chinchilla") for what in ("budget", "size")} | {
        ("largest budget", "n_opt"),
        ("largest budget", "loss"),
    }
    table = sweep(methods=("full",))
    last = table["budget"] == BUDGETS[-1]
    changed = table.assign(loss=table["loss"] * np.where(last, 2, 1))
    found = [
        {
            row["law"]: row
            for row in fits_file.fit(runs.from_table(each), bootstrap=100)["methods"]["full"]["hold_out"]
            if row["left_out"] == "largest budget"
        }
        for each in (table, changed)
    ]
    line, changed_line = (each["loss"] for each in found)
    assert changed_line["predicted"] == pytest.approx(line["predicted"], rel=1e-9)
    assert changed_line["found"] == pytest.approx(2 * line["found"])
    before, after = (each["chinchilla"] for each in found)
    assert (before["left_out"], before["value"], before["points"]) == ("largest budget", BUDGETS[-1], 6)
    assert before["error"] < 0.02
    assert after["predicted"] == pytest.approx(before["predicted"], rel=1e-9)
    assert after["found"] == pytest.approx(2 * before["found"])
    assert after["error"] == pytest.approx(0.5, abs=0.02)


def test_the_frontier_changes_hands_where_the_lines_meet(fits):
    frontier = fits["frontier"]
    assert (frontier["segments"][0]["from"], frontier["segments"][-1]["to"]) == pytest.approx((BUDGETS[0], BUDGETS[-1]))
    for below, above, crossing in zip(
        frontier["segments"], frontier["segments"][1:], frontier["crossings"], strict=False
    ):
        assert below["to"] == above["from"] == crossing["budget"]
        assert (crossing["below"], crossing["above"]) == (below["method"], above["method"])
        values = []
        for name in (below["method"], above["method"]):
            law = fits["methods"][name]["power_laws"]["loss"]
            values.append(law["coefficient"] * crossing["budget"] ** law["exponent"])
        assert values[0] == pytest.approx(values[1])


def test_a_crossing_has_an_interval():
    table = pd.concat(
        [
            pd.DataFrame({"method": name, "params": n, "budget": c, "tokens": c / 6 / n, "loss": low * bowl}, index=[0])
            for name, slope, level in (("full", -0.20, 3.0), ("lora", -0.24, 3.0 + 0.04 * np.log(2.4e16)))
            for c in BUDGETS
            for n in SIZES
            for low, bowl in [
                (np.exp(level + slope * np.log(c)) * 1e3, np.exp(0.01 * np.log(n / 1e7 / (c / 2.4e16) ** 0.5) ** 2))
            ]
        ]
    )
    frontier = fits_file.fit(runs.from_table(table), noise=0.002, bootstrap=300)["frontier"]
    (crossing,) = frontier["crossings"]
    assert [segment["method"] for segment in frontier["segments"]] == ["full", "lora"]
    assert crossing["budget"] == pytest.approx(2.4e16, rel=0.15)
    assert crossing["interval"][0] < 2.4e16 < crossing["interval"][1]
    assert crossing["share"] > 0.95
    found = {row["budget"]: row["distinguishable"] for row in frontier["comparisons"]}
    assert found[BUDGETS[0]] and found[BUDGETS[-1]]
    assert found[2.4e16] is False


def test_methods_within_the_noise_are_not_distinguishable():
    table = sweep(methods=("full",))
    both = pd.concat([table, sweep(seed=1, methods=("full",)).assign(method="other")])
    found = fits_file.fit(runs.from_table(both), noise=0.004, bootstrap=200)
    told = [row["distinguishable"] for row in found["frontier"]["comparisons"]]
    assert told.count(False) >= len(told) - 1
    assert any("full and other are not distinguishable" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("given", "seeds", "source"), [(None, 3, "replicates"), (None, 1, "residuals"), (0.01, 3, "given")]
)
def test_the_noise_is_known_from_replicates_or_residuals_or_given(given, seeds, source):
    found = fits_file.fit(runs.from_table(sweep(seeds=seeds, methods=("full",))), noise=given, bootstrap=100)["noise"]
    assert found["source"] == source
    assert found["log_loss"] == pytest.approx(given or 0.004, rel=0.35)


def test_edges_enter_no_law_and_name_the_size_to_add():
    table = sweep(methods=("full",))
    table = table[table["params"] >= SIZES[2]]
    found = fits_file.fit(runs.from_table(table), bootstrap=100)
    rows = found["methods"]["full"]["optima"]
    edges = [row for row in rows if row["state"] == "edge"]
    assert len(edges) >= 2
    assert all(row["add_size"] == pytest.approx(SIZES[1]) and row["n_opt"] is None for row in edges)
    interior = [row for row in rows if row["state"] == "interior"]
    law = found["methods"]["full"]["power_laws"]["n_opt"]
    assert (law["points"] if law else 0) == (len(interior) if len(interior) >= 2 else 0)
    assert any("(edge): the best size is the smallest: add one below it" in note for note in found["notes"])


def test_diverged_runs_make_a_budget_diverged():
    table = sweep(methods=("full",)).assign(status="done")
    first = (table["budget"] == BUDGETS[0]) & (table["params"] >= SIZES[2])
    table.loc[first, "status"] = "diverged"
    rows = fits_file.fit(runs.from_table(table), bootstrap=100)["methods"]["full"]["optima"]
    assert rows[0]["state"] == "diverged"
    assert rows[0]["why"] == "4 of 6 sizes diverged"


@pytest.mark.parametrize("seed", range(8))
def test_a_sweep_with_holes_never_crashes(seed, tmp_path):
    """Down to a tenth of the runs: whatever is left gives fits, or one line that says why not."""
    rng = np.random.default_rng(seed)
    methods = [("full", "freeze"), ("full", "lora"), ("lora",)][seed % 3]
    whole = sweep(seeds=1 + seed % 2, seed=seed, methods=methods)
    table = whole.sample(frac=[0.9, 0.6, 0.3, 0.1][seed % 4], random_state=seed).assign(status="done")
    table.loc[rng.random(len(table)) < 0.1, "status"] = "diverged"
    loaded = runs.from_table(table)
    optimum = ("parabola", "akima", "law")[seed % 3]
    try:
        found = fits_file.fit(loaded, bootstrap=100, optimum=optimum)
    except UserError as error:
        assert "\n" not in str(error)
        return
    fits_file.write(found, loaded, tmp_path)
    assert "NaN" not in (tmp_path / "fits.json").read_text()
    for method in fits_file.read(tmp_path)["methods"].values():
        assert {row["state"] for row in method["optima"]} <= {"interior", "edge", "too few", "diverged"}


def test_every_estimator_gives_optima():
    table = runs.from_table(sweep(methods=("full",)))
    exponents = {}
    for name in ("parabola", "akima", "law"):
        law = fits_file.fit(table, optimum=name, bootstrap=100)["methods"]["full"]["power_laws"]["n_opt"]
        assert law["exponent_interval"][0] <= law["exponent"] <= law["exponent_interval"][1]
        exponents[name] = law["exponent"]
    assert exponents["law"] == pytest.approx(0.4375, abs=0.02)
    assert exponents["parabola"] == pytest.approx(0.4375, abs=0.05)


def test_fits_are_the_same_for_the_same_seed():
    table = runs.from_table(sweep(methods=("full",)))
    first, again, other = (fits_file.fit(table, bootstrap=100, seed=seed) for seed in (0, 0, 1))
    for each in (first, again, other):
        each.pop("made")
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (sweep().query(f"budget == {BUDGETS[0]}"), {}, "budget: all .* runs have 1.5e.15 FLOP; laws need at least two"),
        (sweep().query(f"params < {SIZES[2]}"), {}, r"params: 2 sizes only \(1.2e.06, 4.8e.06\)"),
        (sweep(), {"noise": -1.0}, "noise: -1.0 is out of range; allowed: above 0"),
        (sweep(), {"bootstrap": 5}, "bootstrap: 5 is out of range; allowed: at least 100"),
        (sweep(), {"confidence": 95}, "confidence: 95 is out of range; allowed: between 0 and 1"),
        (sweep(), {"optimum": "best"}, "optimum: 'best' is unknown"),
        (sweep(), {"window": 0.5}, "window: 0.5 is out of range"),
        (sweep(), {"residual": "cubic"}, "residual: 'cubic' is unknown"),
        (sweep(), {"delta": -1.0}, "delta: -1.0 is out of range"),
        (sweep(), {"delta": float("inf")}, "delta: inf is out of range"),
        (sweep(), {"seed": -1}, "seed: -1 is out of range"),
    ],
)
def test_bad_input_is_one_clear_line(table, settings, message):
    with pytest.raises(UserError, match=message) as error:
        fits_file.fit(runs.from_table(table), **settings)
    assert "\n" not in str(error.value)


def test_laws_that_the_runs_cannot_hold_are_refused_with_the_reason():
    table = sweep(methods=("full", "freeze"))
    few = table[(table["method"] == "full") | (table["trainable_fraction"] == 1)]
    few = pd.concat([few[few["method"] == "full"], few[few["method"] == "freeze"].head(4)])
    found = fits_file.fit(runs.from_table(few), bootstrap=100)
    laws = found["methods"]["freeze"]["joint_laws"]
    assert laws["chinchilla"]["refused"].startswith("the chinchilla law")
    assert laws["trainable_fraction"]["refused"].endswith("at least 3 trainable fractions; found 1")
    assert any(note.startswith("freeze: the chinchilla law") for note in found["notes"])


def test_fits_of_another_version_are_refused(tmp_path, fits):
    with pytest.raises(UserError, match="does not exist; write it by embedscale fit"):
        fits_file.read(tmp_path)
    for content, message in (
        ("{", "is no valid JSON"),
        ("{}", "holds no fits"),
        (json.dumps(fits | {"format": 99, "version": "9.9"}), "made by version 9.9 in format 99; this version reads"),
    ):
        (tmp_path / "fits.json").write_text(content)
        with pytest.raises(UserError, match=message):
            fits_file.read(tmp_path)


def test_the_verb_writes_fits_and_prints_them(tmp_path, capsys):
    sweep(methods=("full",)).rename(columns={"params": "N", "budget": "C", "tokens": "D"}).to_csv(tmp_path / "runs.csv")
    words = [
        "fit",
        str(tmp_path / "runs.csv"),
        "--columns",
        "params=N,tokens=D,budget=C,loss=loss",
        "--bootstrap",
        "100",
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for text in ("full: optima", "interior", "chinchilla", "held out", "frontier", "written: "):
        assert text in printed
    written = fits_file.read(tmp_path / "out")
    assert set(written) >= {"methods", "frontier", "excluded"}
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == written["runs"]["used"] == 30
    assert (
        main(["fit", str(tmp_path / "out" / "runs.csv"), "--out", str(tmp_path / "again"), "--bootstrap", "100"]) == 0
    )
    again = fits_file.read(tmp_path / "again")
    assert again["methods"]["full"]["joint_laws"] == written["methods"]["full"]["joint_laws"]
    (tmp_path / "taken").write_text("")
    assert main([*words, "--out", str(tmp_path / "taken")]) == 2
    assert main(["fit", str(tmp_path / "nothing")]) == 2
    assert "embedscale: " in capsys.readouterr().err


def test_the_analysis_never_imports_torch():
    modules = "fit, frontier, joint, laws, optima, runs, simulate, solver, summary, uncertainty"
    code = f"import sys; from analysis import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "better",
    [
        {"backbone": "pythia-70m-deduped"},
        {"backbone_revision": "step1000"},
        {"hyperparameters": {"clip": 1.0}},
        {"hyperparameters": {"mask_equal_texts": True}},
        {"hyperparameters": {"blocks": "one", "active_blocks": 3}},
    ],
)
def test_runs_that_differ_in_science_are_no_replicates(tmp_path, better):
    """The better of two settings stands at every size, alone: not the mean of both, with their distance as noise."""
    losses = {}
    for budget in BUDGETS[:3]:
        for size in SIZES[:4]:
            for number, change in enumerate(({}, better)):
                path = write_run(tmp_path, budget, int(size), "full", 2.0 - 0.2 * number, f"b{number}-{size:.3g}")
                record = json.loads((path / "record.json").read_text())
                record["hyperparameters"] |= {"clip": None, "mask_equal_texts": False, "blocks": "one"}
                record["hyperparameters"] |= {"active_blocks": 0} | change.get("hyperparameters", {})
                record |= {"backbone": f"own-{size:.3g}"} | {k: v for k, v in change.items() if k != "hyperparameters"}
                (path / "record.json").write_text(json.dumps(record))
                losses[budget, int(size)] = 1.8
    found = fits_file.fit(runs.load(tmp_path), bootstrap=100)
    points = found["methods"]["full"]["points"]
    assert {(point["budget"], point["params"]): point["loss"] for point in points} == losses
    assert {(point["seeds"], point["tried"]) for point in points} == {(1, 2)}
    assert found["noise"]["source"] != "replicates"
    (name, value), *_ = better.get("hyperparameters", better).items()
    assert all(point[name] == value for point in points) or name == "blocks"


def test_a_record_without_a_revision_is_one_of_the_hubs_default(tmp_path):
    for seed in range(2):
        for budget in BUDGETS[:2]:
            for size in SIZES[:3]:
                path = write_run(tmp_path, budget, int(size), "full", 2.0, f"b-{size:.3g}", seed)
                record = json.loads((path / "record.json").read_text())
                if seed == 0:
                    del record["backbone_revision"]
                (path / "record.json").write_text(json.dumps(record))
    found = fits_file.fit(runs.load(tmp_path), bootstrap=100)
    assert {point["seeds"] for point in found["methods"]["full"]["points"]} == {2}


@pytest.mark.parametrize("told", ["spent", "tokens alone"])
def test_methods_are_compared_at_budgets_that_are_nearly_equal(told):
    """Tokens are whole numbers, so that budgets which follow from them differ between sizes, and between methods."""
    table = sweep(noise=0.0, methods=("full",))
    table = pd.concat([table, table.assign(method="bias", loss=1.05 * table["loss"])], ignore_index=True)
    per_token = table["params"] * np.where(table["method"] == "full", 6, 4)
    table["tokens"] = (table["budget"] / per_token).round(-3)
    table = table.drop(columns=["flop_per_token"]).assign(budget=table["tokens"] * per_token)
    loaded = runs.from_table(table if told == "spent" else table.drop(columns="budget"))
    found = fits_file.fit(loaded, noise=0.002, bootstrap=100)
    rows = found["frontier"]["comparisons"]
    assert [row["budget"] for row in rows] == pytest.approx(list(BUDGETS), rel=1e-3)
    assert [row["budget"] for row in rows] == found["runs"]["budgets"]
    assert [row["difference"] for row in rows] == pytest.approx([-np.log(1.05)] * 5, abs=1e-6)  # full over bias
    assert all(row["distinguishable"] for row in rows)


def bias_notes(method: str, cost_of_size, sizes, budgets, noise: float = 0.002) -> tuple[dict, list[str]]:
    """The joint law of a noiseless sweep, and what is noted of the exponent of N*."""
    law = np.array([0.08, 900.0, 145.0, 0.45, 0.267])
    rows = [
        {"method": method, "params": n, "budget": c, "tokens": c / cost_of_size(n), "flop_per_token": cost_of_size(n)}
        | {"loss": float(np.ravel(predict_chinchilla(law, n, c / cost_of_size(n)))[0])}
        for c in budgets
        for n in sizes
    ]
    found = fits_file.fit(runs.from_table(pd.DataFrame(rows)), noise=noise, bootstrap=200)
    return found["methods"][method]["joint_laws"]["chinchilla"], [note for note in found["notes"] if "grows" in note]


def test_the_exponent_of_the_best_size_is_none_where_cost_is_not_in_proportion_to_size():
    """Adapters of rank 128: their share, and with it a token's cost a parameter, falls with the size."""
    backbones = [PYTHIA.sizes[f"pythia-{name}"] for name in ("14m", "31m", "70m", "160m", "410m", "1b")]
    costs = {row.parameters: cost_of(row.shape, Method("lora", rank=128)).flop_per_token for row in backbones}
    law, notes = bias_notes("lora", costs.get, list(costs), BUDGETS)
    assert [law["alpha"], law["beta"]] == pytest.approx([0.45, 0.267], rel=1e-3)
    assert notes == []  # the optima follow the law
    assert law["n_exponent"] is law["n_exponent_interval"] is None
    law, notes = bias_notes("full", lambda n: 6 * n, list(costs), BUDGETS)
    assert law["n_exponent"] == pytest.approx(0.267 / 0.717, rel=1e-3)
    assert notes == []


def test_a_wide_grids_biased_parabolas_are_noted():
    """The law has no symmetric profiles; parabolas through wide steps grow otherwise than its optima."""
    _, (note,) = bias_notes("full", lambda n: 6 * n, np.geomspace(1e6, 1e9, 5), 1e16 * 8.0 ** np.arange(3), 5e-4)
    assert f"C^{0.267 / 0.717:.3f} by the joint law, outside the interval" in note


def test_the_luck_of_the_best_among_many_settings_is_noted():
    """Equal laws, of which one method was run at twelve ranks: their best is low by the least of twelve draws."""
    rng, rows = np.random.default_rng(0), []
    for name, settings in (("full", 1), ("lora", 12)):
        for c in BUDGETS[:3]:
            for n in SIZES:
                for rank in range(settings):
                    loss = np.ravel(predict_chinchilla(FULL, n, c / 6 / n))[0] * np.exp(0.005 * rng.standard_normal())
                    row = {"method": name, "params": n, "budget": c, "tokens": c / 6 / n, "loss": float(loss)}
                    rows.append(row | {"rank": 2.0**rank if settings > 1 else np.nan, "trainable_fraction": 0.1})
    table = pd.DataFrame(rows)
    found = fits_file.fit(runs.from_table(table), noise=0.005, bootstrap=100)
    (note,) = [note for note in found["notes"] if "settings a size" in note]
    low = -100 * 0.005 * rng.standard_normal((100_000, 12)).min(1).mean()
    assert note.startswith("methods are the best of 1 (full), 12 (lora) settings a size: of 12 equal ones")
    assert float(re.search(r"lies (.*) % low", note)[1]) == pytest.approx(low, rel=0.02)
    fair = fits_file.fit(runs.from_table(table[~(table["rank"] > 1)]), noise=0.005, bootstrap=100)
    assert not any("settings a size" in note for note in fair["notes"])


def test_akimas_lucky_losses_are_noted():
    """Fifteen sizes within the noise of the best: an interval of 95 % holds the true loss half the time."""
    x = np.log(1e8) + np.linspace(-np.log(8), np.log(8), 15)
    points = pd.DataFrame({"params": np.exp(x), "flop_per_token": 6 * np.exp(x), "seeds": 1})
    rng, held = np.random.default_rng(0), {"akima": [], "parabola": []}
    for _ in range(60):
        loss = np.exp(0.02 * (x - x[7]) ** 2 + 0.01 * rng.standard_normal(15))
        for kind, found in held.items():
            draws = uncertainty.optimum_draws(Profile(1e18, points.assign(loss=loss)), kind, 4.0, 0.01, 200, rng)
            low, high = uncertainty.interval(draws.log_loss)
            found.append(low <= 0 <= high)
    assert np.mean(held["akima"]) < 0.7 < 0.85 < np.mean(held["parabola"])
    table = runs.from_table(sweep(methods=("full",)))
    for kind in held:
        notes = fits_file.fit(table, optimum=kind, bootstrap=100)["notes"]
        assert any(note.startswith("akima: ") for note in notes) == (kind == "akima")
