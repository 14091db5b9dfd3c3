"""Which rows of a table are replicates, and what is refused, with the words to add, until the user chooses."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from own_tables import SHARED, crossed, fit, needs_shared, saved, sweep

from analysis import runs
from embedscale.errors import UserError

# --- Rows that are left out ------------------------------------------------------------------------------------------


def test_a_row_without_a_finite_loss_is_a_diverged_run(tmp_path):
    losses = sweep()["loss"].astype(object)
    losses[1], losses[2], losses[3] = "NaN", "", "inf"
    found = runs.load(saved(tmp_path, sweep(loss=losses)))
    assert (len(found.table), found.excluded["reason"].tolist()) == (9, ["diverged"] * 3)
    assert found.excluded["n_parameters"].to_numpy() == pytest.approx(sweep()["N"][1:4])


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        *(("finished", None), ("FINISHED", None), ("Completed", None), ("success", None), ("", None)),
        *(("crashed", "unfinished"), ("KILLED", "unfinished"), ("RUNNING", "unfinished"), ("diverged", "diverged")),
    ],
)
def test_the_words_of_trackers_for_done_are_known(tmp_path, word, reason):
    found = runs.load(saved(tmp_path, sweep(State=["finished"] * 11 + [word])))
    assert found.excluded["reason"].tolist() == ([reason] if reason else [])


def test_names_of_runs_that_recur_are_checkpoints_and_the_last_counts():
    table = sweep(run=[f"run-{i}" for i in range(12)])
    early = table.assign(D=table["D"] / 2, C=table["C"] / 2, loss=table["loss"] * 1.2)
    found = runs.load(pd.concat([table, early], ignore_index=True).sample(frac=1, random_state=0))
    assert sorted(found.table["loss"]) == pytest.approx(sorted(table["loss"]))
    assert found.excluded["reason"].tolist() == ["checkpoint"] * 12
    assert "12 rows are earlier checkpoints" in " ".join(found.notes)
    assert len(runs.load(pd.concat([table, early], ignore_index=True), ignore=["run"]).table) == 24


@pytest.mark.parametrize("change", [{"N": 2.0}, {"loss": 1.1}])
def test_a_name_of_several_runs_is_refused(change):
    table = sweep(run=[f"run-{i}" for i in range(12)])
    (name, factor), *_ = change.items()
    other = table.assign(**{name: table[name] * factor}).drop(columns="C")
    what = {"N": "n_parameters", "loss": "loss"}[name]
    with pytest.raises(UserError, match=rf"run: the rows of 'run-0' differ in {what} .*--ignore run"):
        runs.load(pd.concat([table.drop(columns="C"), other], ignore_index=True))


def test_a_name_that_recurs_is_not_taken_for_a_runs_without_being_named():
    """`name` may be that of the model: its rows are not checkpoints of one run."""
    table = sweep()
    found = runs.load(table.assign(name=[f"model-{value:.0f}" for value in table["N"]]))
    assert len(found.table) == 12


def test_a_broken_row_that_where_leaves_out_does_no_harm(tmp_path):
    table = crossed("corpus", ["web", "code"])
    table["N"] = table["N"].astype(object)
    table.loc[20, "N"] = "twelve"
    path = saved(tmp_path, table)
    with pytest.raises(UserError, match=r"runs.csv: N \(n_parameters\): row 21 has 'twelve'; write a number"):
        runs.load(path)
    found = runs.load(path, where={"corpus": "web"})
    assert (len(found.table), found.excluded["reason"].tolist()) == (12, ["another corpus"] * 12)
    assert len(runs.load(path, where={"corpus": "web", "C": "4e17"}).table) == 4
    assert len(runs.load(sweep().drop(columns="C"), where={"budget_flop": "4e17"}).table) == 4


# --- Rows that are not replicates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values", "shown"),
    [
        ("eta", [1e-3, 3e-3, 1e-2], r"eta \(0.001, 0.003, 0.01\)"),
        ("loss_definition", ["smoothed", "raw"], r"loss_definition \(raw, smoothed\)"),
        ("data", ["web", "code"], r"data \(code, web\)"),
        ("corpus", ["web", "code", "books"], r"corpus \(books, code, web\)"),
        ("experiment", list("abcdefgh"), r"experiment \(a, b, c, d, …\)"),
        ("z_loss", [0.0, 1e-4], r"z_loss \(0.0, 0.0001\)"),
        ("decay", [True, False], r"decay \(False, True\)"),
    ],
)
def test_rows_that_differ_in_an_unknown_setting_are_refused_until_the_user_chooses(tmp_path, column, values, shown):
    path = saved(tmp_path, crossed(column, values))
    with pytest.raises(UserError, match=f"not replicates: {shown}") as error:
        runs.load(path)
    assert "\n" not in str(error.value)
    assert all(f"--{word} " in str(error.value) for word in ("where", "columns", "ignore"))
    assert len(runs.load(path, where={column: str(values[0])}).table) == 12
    as_methods = runs.load(path, columns={"method": column})
    assert len(as_methods.methods) == len(values)
    ignored = runs.load(path, ignore=[column])
    assert len(ignored.table) == 12 * len(values)
    assert f"ignored, as asked: {column}" in " ".join(ignored.notes)


def test_learning_rates_are_known_by_their_short_name_and_the_best_counts():
    found = runs.load(crossed("lr", [1e-3, 3e-3]))
    assert sorted(found.table["learning_rate"].unique()) == [1e-3, 3e-3]
    mapped = runs.load(crossed("eta", [1e-3, 3e-3]), {"learning_rate": "eta"})
    assert mapped.table["learning_rate"].tolist() == found.table["learning_rate"].tolist()


def test_the_words_to_add_name_the_setting_that_a_name_holds():
    with pytest.raises(UserError, match="--columns 'rank=LoRA rank' .or another setting. takes the best value"):
        runs.load(crossed("LoRA rank", [8, 32]))


def test_corpora_with_sizes_of_their_own_are_refused_too():
    """No two rows are equal in size and budget, and still they are not one experiment."""
    other = sweep(corpus="code")
    other = other.assign(N=other["N"] * 1.2, D=other["D"] / 1.2)
    with pytest.raises(UserError, match=r"corpus \(code, web\)"):
        runs.load(pd.concat([sweep(corpus="web"), other], ignore_index=True))


RNG = np.random.default_rng(0)
HARMLESS = {
    "run name": lambda table: [f"run-{i}" for i in range(len(table))],
    "path of the log": lambda table: [f"logs/{i}.txt" for i in range(len(table))],
    "created": lambda table: [f"2026-03-0{1 + i % 4}" for i in range(len(table))],
    "started at": lambda table: [f"2026-03-01T0{i % 9}:00:00Z" for i in range(len(table))],
    "wall_seconds_total": lambda table: RNG.integers(100, 150, len(table)),
    "recall@5": lambda table: (1 / table["loss"]).round(3),
    "bits per byte": lambda table: table["loss"] * 0.3 + RNG.normal(0, 1e-3, len(table)),
    "n_layers": lambda table: table["N"].map(lambda n: 6 if n < 3e7 else 12),
    "size": lambda table: table["N"].map("{:.0f}M".format),
    "optimizer_steps": lambda table: (table["D"] / 5e5).round(),
    "tokens_per_parameter": lambda table: (table["D"] / table["N"]).round(1),
    "cell": lambda table: table["N"].map(str) + "-" + table["C"].map(str),
    "framework": lambda table: "torch",
    "_step": lambda table: [i % 2 for i in range(len(table))],
    "hostname": lambda table: [f"node{i % 2}" for i in range(len(table))],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_names_times_measurements_and_what_follows_from_the_size_are_no_settings(name):
    table = crossed("seed", [0, 1], worse=1.001)
    found = runs.load(table.assign(**{name: HARMLESS[name](table)}))
    assert len(found.table) == 24


# --- The verb --------------------------------------------------------------------------------------------------------


def test_any_name_is_text_in_the_terminal(tmp_path, capsys):
    names = ["[/b]", "[red]x$\\undefined{$y", "<script>", ":smile:"]
    table = pd.concat([sweep(method=name) for name in names], ignore_index=True)
    assert fit(saved(tmp_path, table), "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: optima" in shown for name in names)


def test_the_choice_is_told_and_kept(tmp_path, capsys):
    path, out = saved(tmp_path, crossed("corpus", ["web, new", "code"])), tmp_path / "out"
    assert fit(path, "--out", out) == 2
    assert "--where corpus=code uses one value" in capsys.readouterr().err
    assert not out.exists()
    assert fit(path, "--where", "corpus=web, new", "--out", out) == 0
    assert "12 another corpus" in capsys.readouterr().out
    assert fit(path, "--ignore", "corpus", "--columns", "N=N", "--columns", "tokens=D", "--out", out) == 0
    assert "ignored, as asked: corpus" in capsys.readouterr().out
    assert any("ignored" in note for note in json.loads((out / "fits.json").read_text())["notes"])


@pytest.mark.parametrize("name", ["runs.csv", "excluded.csv"])
def test_a_table_of_the_users_own_is_never_replaced(tmp_path, monkeypatch, capsys, name):
    """Without --out the results lie in the current folder, under names that the table may have."""
    before = saved(tmp_path, sweep(), name).read_bytes()
    monkeypatch.chdir(tmp_path)
    assert fit(name) == 2
    assert f"{name} would be replaced; give another folder" in capsys.readouterr().err
    assert fit(name, "--out", "results") == 0
    assert fit(name, "--out", "results") == 0
    assert fit("results/runs.csv", "--out", "results") == 0
    assert (tmp_path / name).read_bytes() == before


@needs_shared
@pytest.mark.parametrize(
    ("file", "used", "left_out"),
    [
        *(("nan.csv", 26, 2), ("status.csv", 27, 1), ("wandb.csv", 26, 2), ("runs.tsv", 28, 0), ("runs.csv.gz", 28, 0)),
        *(("suffix.csv", 28, 0), ("thousands.csv", 28, 0), ("centred0.csv", 28, 0), ("jitter0.02.csv", 28, 0)),
    ],
)
def test_the_shared_cases_are_read(file, used, left_out):
    found = runs.load(SHARED / "cases/tables" / file)
    assert (len(found.table), len(found.excluded)) == (used, left_out)


@needs_shared
@pytest.mark.parametrize(
    ("file", "words", "rows"),
    [
        ("chinchilla_epoch/runs.csv", [], 245),
        ("farseer/runs.csv", ["--where", "part=candidate"], 400),
        ("olmo_ladder/runs.csv", ["--columns", "loss=c4_mean5", "--where", "role=fit"], 16),
        ("porian_isoflop/isoflop_points.csv", ["--where", "experiment=rw__base__long__kaplan__kaplan__train"], 107),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_published_tables_load_with_a_short_command(tmp_path, capsys, file, words, rows):
    assert fit(SHARED / "data" / file, *words, "--out", tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"{rows} runs of ")


@needs_shared
@pytest.mark.parametrize(
    ("file", "words", "shown"),
    [
        ("porian_isoflop/isoflop_points.csv", [], r"experiment \(owt2__base"),
        ("farseer/runs.csv", [], r"part \(candidate, target\)"),
        ("olmo_ladder/runs.csv", ["--columns", "loss=c4_mean5"], r"role \(fit, holdout\)"),
    ],
)
def test_published_tables_of_several_experiments_are_refused(tmp_path, capsys, file, words, shown):
    assert fit(SHARED / "data" / file, *words, "--out", tmp_path) == 2
    assert re.search(shown, capsys.readouterr().err)
