"""From runs to fits.json, and the verb: files, notes, refusals, and sweeps with missing runs."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from law_sweep import BUDGETS, FULL, SIZES, sweep
from sweeps import paper_like, write_run

from analysis import fits, runs, study, summary
from analysis.fitting.fit import fit
from analysis.fitting.laws import CHINCHILLA
from embedscale.cli import main
from embedscale.errors import UserError


@pytest.fixture(scope="module")
def whole() -> fits.Fits:
    return fit(runs.load(sweep()), bootstrap=100, residual="log")


def test_the_fit_recovers_the_laws_and_their_intervals_hold_them(whole):
    law = whole.methods["full"].joint_laws["chinchilla"]
    for name, true in zip(("E", "A", "B", "alpha", "beta"), FULL, strict=True):
        low, high = law.intervals[name]
        assert low < true < high
    assert law.convergence.agreeing >= 0.8 * law.convergence.starts  # the others end in basins that are higher
    low, high = whole.methods["full"].power_laws.n_opt.exponent_interval
    assert low < 0.35 / 0.8 < high
    law = whole.methods["freeze"].joint_laws["trainable_fraction"]
    assert [law.coefficients[name] for name in ("E", "alpha", "beta")] == pytest.approx([0.3, 0.45, 0.35], rel=0.05)
    assert set(law.intervals) == {"E", "a_d", "b_d", "a_s", "b_s", "c_s", "alpha", "beta"}


def test_optima_equal_the_closed_form(whole):
    best = (0.45 / 0.35) ** (1 / 0.8) * (BUDGETS / 6) ** (0.35 / 0.8)
    rows = [row for row in whole.methods["full"].optima if row.state == "interior"]
    assert len(rows) >= 4
    for row in rows:
        true = best[np.argmin(np.abs(BUDGETS - row.budget_flop))]
        assert row.law.n_opt == pytest.approx(true, rel=0.05)
        assert row.n_opt == pytest.approx(true, rel=0.25)
        assert 6 * row.n_opt * row.d_opt == pytest.approx(row.budget_flop, rel=1e-6)
        assert row.n_opt_interval[0] < row.n_opt < row.n_opt_interval[1]


def test_every_point_names_the_best_rank(whole):
    points = whole.methods["lora"].points
    assert {point.setting("rank") for point in points} == {32.0}
    assert {point.tried for point in points} == {3}


def test_a_hold_out_fit_does_not_use_what_it_predicts(whole):
    rows = {(row.left_out, row.law): row for row in whole.methods["full"].hold_out}
    assert set(rows) == {(f"largest {what}", "chinchilla") for what in ("budget", "size")} | {
        ("largest budget", "n_opt"),
        ("largest budget", "loss"),
    }
    table = sweep(methods=("full",))
    last = table["budget_flop"] == BUDGETS[-1]
    changed = table.assign(loss=table["loss"] * np.where(last, 1.02, 1))
    found = [
        {
            row.law: row
            for row in fit(runs.load(each), bootstrap=100, residual="log").methods["full"].hold_out
            if row.left_out == "largest budget"
        }
        for each in (table, changed)
    ]
    line, changed_line = (each["loss"] for each in found)
    assert changed_line.predicted == pytest.approx(line.predicted, rel=1e-9)
    assert changed_line.found == pytest.approx(1.02 * line.found)
    before, after = (each["chinchilla"] for each in found)
    assert (before.left_out, before.value, before.points) == ("largest budget", BUDGETS[-1], 6)
    assert before.error < 0.02
    assert after.predicted == pytest.approx(before.predicted, rel=1e-9)
    assert after.found == pytest.approx(1.02 * before.found)
    assert after.error == pytest.approx(1 - 1 / 1.02, abs=0.01)


def test_the_best_method_changes_where_the_lines_meet(whole):
    frontier = whole.frontier
    assert (frontier.segments[0].from_flop, frontier.segments[-1].to_flop) == pytest.approx((BUDGETS[0], BUDGETS[-1]))
    for below, above, crossing in zip(frontier.segments, frontier.segments[1:], frontier.crossings, strict=False):
        assert below.to_flop == above.from_flop == crossing.budget_flop
        assert (crossing.below, crossing.above) == (below.method, above.method)
        values = []
        for name in (below.method, above.method):
            law = whole.methods[name].power_laws.loss
            values.append(law.coefficient * crossing.budget_flop**law.exponent)
        assert values[0] == pytest.approx(values[1])


def test_a_crossing_has_an_interval():
    table = pd.concat(
        [
            pd.DataFrame(
                {"method": name, "n_parameters": n, "budget_flop": c, "tokens": c / 6 / n, "loss": low * bowl},
                index=[0],
            )
            for name, slope, level in (("full", -0.20, 3.0), ("lora", -0.24, 3.0 + 0.04 * np.log(2.4e16)))
            for c in BUDGETS
            for n in SIZES
            for low, bowl in [
                (np.exp(level + slope * np.log(c)) * 1e3, np.exp(0.01 * np.log(n / 1e7 / (c / 2.4e16) ** 0.5) ** 2))
            ]
        ]
    )
    frontier = fit(runs.load(table), noise=0.002, bootstrap=300, residual="log").frontier
    (crossing,) = frontier.crossings
    assert [segment.method for segment in frontier.segments] == ["full", "lora"]
    assert crossing.budget_flop == pytest.approx(2.4e16, rel=0.15)
    assert crossing.interval[0] < 2.4e16 < crossing.interval[1]
    assert crossing.share > 0.95
    found = {row.budget_flop: row.distinguishable for row in frontier.comparisons}
    assert found[BUDGETS[0]] and found[BUDGETS[-1]]
    assert found[2.4e16] is False


def test_methods_within_the_noise_are_not_distinguishable():
    table = sweep(methods=("full",))
    both = pd.concat([table, sweep(seed=1, methods=("full",)).assign(method="other")])
    found = fit(runs.load(both), noise=0.004, bootstrap=200, residual="log")
    told = [row.distinguishable for row in found.frontier.comparisons]
    assert told.count(False) >= len(told) - 1
    assert any("not distinguishable within the noise: full and other" in note for note in found.notes)


def test_methods_that_are_all_alike_are_named_once():
    alike = [sweep(seed=seed, methods=("full",)).assign(method=name) for seed, name in enumerate(("full", "a", "b"))]
    worse = sweep(seed=9, methods=("full",)).assign(method="worse")
    worse["loss"] *= 1.5
    notes = fit(runs.load(pd.concat([*alike, worse])), noise=0.01, bootstrap=200, residual="log").notes
    (note,) = (note for note in notes if "not distinguishable" in note)
    assert note.count("full") == 1 and "full, a and b at" in note and "worse" not in note


@pytest.mark.parametrize(
    ("given", "seeds", "source"), [(None, 3, "pooled"), (None, 1, "residuals"), (0.01, 3, "given")]
)
def test_the_noise_is_known_from_replicates_or_residuals_or_given(given, seeds, source):
    found = fit(runs.load(sweep(seeds=seeds, methods=("full",))), noise=given, bootstrap=100, residual="log").noise
    assert found.source == source
    assert found.log_loss == pytest.approx(given or 0.004, rel=0.35)


def test_an_edge_enters_no_law_and_names_the_size_to_add():
    table = sweep(methods=("full",))
    table = table[table["n_parameters"] >= SIZES[2]]
    found = fit(runs.load(table), bootstrap=100, residual="log")
    rows = found.methods["full"].optima
    edges = [row for row in rows if row.state == "edge"]
    assert len(edges) >= 2
    assert all(row.add_size == pytest.approx(SIZES[1]) and row.n_opt is None for row in edges)
    interior = [row for row in rows if row.state == "interior"]
    law = found.methods["full"].power_laws.n_opt
    assert (law.points if law else 0) == (len(interior) if len(interior) >= 2 else 0)
    assert any("(edge): the best size is the smallest: add one below it" in note for note in found.notes)


def test_diverged_runs_make_the_state_of_a_budget_diverged():
    table = sweep(methods=("full",)).assign(status="done")
    first = (table["budget_flop"] == BUDGETS[0]) & (table["n_parameters"] >= SIZES[2])
    table.loc[first, "status"] = "diverged"
    rows = fit(runs.load(table), bootstrap=100, residual="log").methods["full"].optima
    assert rows[0].state == "diverged"
    assert rows[0].why.startswith("4 of 6 sizes diverged: run them with a lower learning rate")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_sweep_with_missing_runs_never_crashes(seed, tmp_path):
    """With as few as a tenth of the runs, the result is fits or one line that says why not."""
    rng = np.random.default_rng(seed)
    methods = [("full", "freeze"), ("full", "lora"), ("lora",)][seed % 3]
    whole = sweep(seeds=1 + seed % 2, seed=seed, methods=methods)
    table = whole.sample(frac=[0.9, 0.6, 0.3, 0.1][seed % 4], random_state=seed).assign(status="done")
    table.loc[rng.random(len(table)) < 0.1, "status"] = "diverged"
    loaded = runs.load(table)
    optimum = ("parabola", "akima", "law")[seed % 3]
    try:
        found = fit(loaded, bootstrap=100, optimum=optimum, residual=("huber", "log")[(seed + seed // 4) % 2])
    except UserError as error:
        assert "\n" not in str(error)
        return
    study.write(found, loaded, tmp_path)
    assert "NaN" not in (tmp_path / "fits.json").read_text()
    for method in fits.read(tmp_path).methods.values():
        assert {row.state for row in method.optima} <= set(get_args(fits.State))


def test_every_estimator_gives_optima():
    table = runs.load(sweep(methods=("full",)))
    exponents = {}
    for name in ("parabola", "akima", "law"):
        law = fit(table, optimum=name, bootstrap=100, residual="log").methods["full"].power_laws.n_opt
        assert law.exponent_interval[0] <= law.exponent <= law.exponent_interval[1]
        exponents[name] = law.exponent
    assert exponents["law"] == pytest.approx(0.4375, abs=0.02)
    assert exponents["parabola"] == pytest.approx(0.4375, abs=0.05)


def test_the_same_seed_gives_the_same_fits():
    table = runs.load(sweep(methods=("full",)))
    first, again, other = (fit(table, bootstrap=100, residual="log", seed=seed) for seed in (0, 0, 1))
    first, again, other = (replace(each, made="") for each in (first, again, other))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (
            sweep().query(f"budget_flop == {BUDGETS[0]}"),
            {},
            "budget_flop: all .* runs have 1.5e15 FLOP; laws need at least two",
        ),
        (sweep().query(f"n_parameters < {SIZES[2]}"), {}, r"n_parameters: 2 sizes only \(1.2e6, 4.8e6\)"),
        (sweep(), {"noise": -1.0}, "noise: -1.0 is out of range; allowed: above 0"),
        (sweep(), {"bootstrap": 5}, "bootstrap: 5 is out of range; allowed: at least 100"),
        (sweep(), {"confidence": 95}, "confidence: 95 is out of range; allowed: between 0 and 1"),
        (sweep(), {"optimum": "best"}, "optimum: 'best' is unknown"),
        (sweep(), {"window": 0.5}, "window: 0.5 is out of range"),
        (sweep(), {"residual": "cubic"}, "residual: 'cubic' is unknown"),
        (sweep(), {"delta": -1.0}, "delta: -1.0 is out of range"),
        (sweep(), {"delta": float("inf")}, "delta: inf is out of range"),
        (sweep(), {"seed": -1}, "seed: -1 is out of range"),
        (sweep(), {"bins": 0.0}, "bins: 0.0 is out of range; allowed: above 0, the bins of a decade of compute"),
        (sweep(), {"bins": float("inf")}, "bins: inf is out of range"),
    ],
)
def test_bad_input_is_refused_in_one_line(table, settings, message):
    with pytest.raises(UserError, match=message) as error:
        fit(runs.load(table), **settings)
    assert "\n" not in str(error.value)


def test_laws_without_enough_runs_are_refused_with_the_reason():
    table = sweep(methods=("full", "freeze"))
    few = table[(table["method"] == "full") | (table["trainable_fraction"] == 1)]
    few = pd.concat([few[few["method"] == "full"], few[few["method"] == "freeze"].head(4)])
    found = fit(runs.load(few), bootstrap=100, residual="log")
    assert found.methods["freeze"].joint_laws == {}
    refused = found.methods["freeze"].refused
    assert refused["chinchilla"].startswith("the chinchilla law")
    assert refused["trainable_fraction"].endswith("at least 3 trainable fractions; found 1")
    assert any(note.startswith("freeze: the chinchilla law") for note in found.notes)


def test_fits_of_another_version_are_refused(tmp_path, whole):
    with pytest.raises(UserError, match="does not exist; write it by embedscale fit"):
        fits.read(tmp_path)
    for content, message in (
        ("{", "is not valid JSON"),
        ("{}", "holds no fits"),
        (
            json.dumps(whole.to_json() | {"format": 99, "version": "9.9"}),
            "made by version 9.9 in format 99; this version reads",
        ),
        (json.dumps(whole.to_json() | {"format": True}), "format: True was found; expected a whole number"),
    ):
        (tmp_path / "fits.json").write_text(content)
        with pytest.raises(UserError, match=message):
            fits.read(tmp_path)


def test_the_verb_writes_fits_and_prints_them(tmp_path, capsys):
    sweep(methods=("full",)).rename(columns={"n_parameters": "N", "budget_flop": "C", "tokens": "D"}).to_csv(
        tmp_path / "runs.csv"
    )
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
    written = fits.read(tmp_path / "out")
    assert written.excluded == ()
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == written.runs.used == 30
    assert written.settings.residual == "huber"
    ends = written.methods["full"].joint_laws["chinchilla"].intervals
    assert all(ends[name][0] < true < ends[name][1] for name, true in zip(CHINCHILLA.coefficients, FULL, strict=True))
    words = ["fit", str(tmp_path / "out" / "runs.csv"), "--out", str(tmp_path / "again"), "--bootstrap", "100"]
    assert main([*words, "--json"]) == 0
    again = fits.read(tmp_path / "again")
    assert fits.Fits.from_json(json.loads(capsys.readouterr().out)) == again
    assert again.methods["full"].joint_laws == written.methods["full"].joint_laws
    (tmp_path / "taken").write_text("")
    assert main(["fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "taken")]) == 2
    assert main(["fit", str(tmp_path / "nothing")]) == 2
    assert "embedscale: " in capsys.readouterr().err


def test_the_analysis_never_imports_torch():
    modules = ("fitting.fit", "figures.catalogue", "simulate", "summary", "report", "recipe", "study")
    code = f"import sys, importlib; [importlib.import_module('analysis.' + name) for name in {modules}]; "
    code += "sys.exit('torch' in sys.modules)"
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
def test_runs_with_different_settings_are_not_replicates(tmp_path, better):
    """Each size has the better of two settings, not the mean of both with their distance as noise."""
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
    found = fit(runs.load(tmp_path), bootstrap=100, residual="log")
    points = found.methods["full"].points
    assert {(point.budget_flop, point.n_parameters): point.loss for point in points} == losses
    assert {(point.seeds, point.tried) for point in points} == {(1, 2)}
    assert found.noise.replicates_freedom == 0
    (name, value), *_ = better.get("hyperparameters", better).items()
    assert all(getattr(point, name, point.setting(name)) == value for point in points) or name == "blocks"


def test_a_record_without_a_revision_has_the_default_of_the_hub(tmp_path):
    for seed in range(2):
        for budget in BUDGETS[:2]:
            for size in SIZES[:3]:
                path = write_run(tmp_path, budget, int(size), "full", 2.0, f"b-{size:.3g}", seed)
                record = json.loads((path / "record.json").read_text())
                if seed == 0:
                    del record["backbone_revision"]
                (path / "record.json").write_text(json.dumps(record))
    found = fit(runs.load(tmp_path), bootstrap=100, residual="log")
    assert {point.seeds for point in found.methods["full"].points} == {2}


@pytest.mark.parametrize("told", ["spent", "tokens alone"])
def test_methods_are_compared_at_budgets_that_are_nearly_equal(told):
    """Tokens are whole numbers, so the budgets computed from them differ between sizes and methods."""
    table = sweep(noise=0.0, methods=("full",))
    table = pd.concat([table, table.assign(method="bias", loss=1.05 * table["loss"])], ignore_index=True)
    per_token = table["n_parameters"] * np.where(table["method"] == "full", 6, 4)
    table["tokens"] = (table["budget_flop"] / per_token).round(-3)
    table = table.drop(columns=["flop_per_token"]).assign(budget_flop=table["tokens"] * per_token)
    loaded = runs.load(table if told == "spent" else table.drop(columns="budget_flop"))
    found = fit(loaded, noise=0.002, bootstrap=100, residual="log")
    rows = found.frontier.comparisons
    assert [row.budget_flop for row in rows] == pytest.approx(list(BUDGETS), rel=1e-3)
    assert [row.budget_flop for row in rows] == list(found.runs.budgets)
    assert [row.difference for row in rows] == pytest.approx([-np.log(1.05)] * 5, abs=1e-4)  # full minus bias
    assert all(row.distinguishable for row in rows)


def test_notes_that_say_the_same_of_several_methods_are_one():
    notes = ("full: few", "a note", "lora, 1e11 FLOP: edge", "full, 1e11 FLOP: edge", "lora: few", "other: few")
    assert summary.merged(notes, ["full", "lora"]) == [
        "full, lora: few",
        "a note",
        "lora, full, 1e11 FLOP: edge",
        "other: few",
    ]


@pytest.mark.parametrize(("unit", "note"), [("", "note: sizes of 14 to 1,000 parameters are no models"), (":1e6", "")])
def test_sizes_in_millions_are_not_called_a_miniature(tmp_path, capsys, unit, note):
    sizes, budgets = [14, 70, 160, 410, 1000], [1e18, 4e18, 1.6e19]
    rows = [
        {"loss": 1.5 + 800 / (n * 1e6) ** 0.4 + 900 / (c / 6e6 / n) ** 0.37, "size": n, "budget": c}
        for c in budgets
        for n in sizes
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    words = [
        "fit",
        str(tmp_path / "table.csv"),
        "--columns",
        f"params=size{unit}",
        "--bootstrap",
        "100",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert note in printed and "a miniature" not in printed and ("sizes of" in printed) == bool(note)


def test_a_law_of_s_needs_two_fractions_at_one_size():
    """Else S follows from N: bias-only training trains a share that the size sets, and so does LoRA of one rank."""
    table = paper_like()
    table = table[(table["method"] == "bias") | (table["rank"] == 8)]
    assert table.groupby("method")["trainable_fraction"].nunique().min() >= 3
    found = fit(runs.load(table), noise=0.004, bootstrap=100, residual="log").methods
    assert "trainable_fraction" not in {**found["bias"].joint_laws, **found["bias"].refused}
    assert "trainable_fraction" not in found["lora"].joint_laws
    told = found["lora"].refused["trainable_fraction"]
    assert told == "the trainable_fraction law needs two trainable fractions at one size at least; each size has one"
