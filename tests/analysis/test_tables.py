"""Tables as people have them: which forms are read, which column is which, and tables of optima."""

import gzip
import json
import math
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from own_tables import SHARED, fit, needs_shared, saved, sweep

import analysis
from analysis import fit as fit_runs
from analysis import runs
from analysis.columns import amount
from embedscale.cli import main
from embedscale.errors import UserError

# --- Forms of a table ------------------------------------------------------------------------------------------------


FORMS = {
    "runs.csv": lambda table: table.to_csv(index=False).encode(),
    "runs.csv.gz": lambda table: gzip.compress(table.to_csv(index=False).encode()),
    "gzipped_without_ending.csv": lambda table: gzip.compress(table.to_csv(index=False).encode()),
    "runs.tsv": lambda table: table.to_csv(index=False, sep="\t").encode(),
    "tabs.csv": lambda table: table.to_csv(index=False, sep="\t").encode(),
    "semicolons.csv": lambda table: table.to_csv(index=False, sep=";").encode(),
    "decimal_commas.csv": lambda table: table.to_csv(index=False, sep=";", decimal=",").encode(),
    "bom.csv": lambda table: b"\xef\xbb\xbf" + table.to_csv(index=False).encode(),
    "unicode.csv": lambda table: table.to_csv(index=False, sep="\t").encode("utf-16"),
    "blank_lines.csv": lambda table: (table.to_csv(index=False) + "\n,,,\n").encode(),
    "records.json": lambda table: json.dumps(table.to_dict("records")).encode(),
    "named.json": lambda table: json.dumps({"about": "runs", "runs": table.to_dict("records")}).encode(),
    "columns.json": lambda table: json.dumps(table.to_dict("list")).encode(),
    "split.json": lambda table: table.to_json(orient="split", double_precision=15).encode(),
    "lines.json": lambda table: table.to_json(orient="records", lines=True, double_precision=15).encode(),
    "runs.jsonl": lambda table: table.to_json(orient="records", lines=True, double_precision=15).encode(),
    "runs.jsonl.gz": lambda table: gzip.compress(
        table.to_json(orient="records", lines=True, double_precision=15).encode()
    ),
    "runs.parquet": lambda table: table.to_parquet(),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_table_gives_the_same_runs(tmp_path, name):
    table = sweep()
    (tmp_path / name).write_bytes(FORMS[name](table))
    found = runs.load(tmp_path / name).table
    for ours, theirs in (("n_parameters", "N"), ("tokens", "D"), ("budget_flop", "C"), ("loss", "loss")):
        assert found[ours].to_numpy() == pytest.approx(table[theirs].to_numpy(), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(
            ("1.3B", 1.3e9),
            ("0.043M", 43e3),
            ("70m", 70e6),
            ("6e18 FLOP", 6e18),
            ("2 GFLOP", 2e9),
            ("1.5 EFLOPs", 1.5e18),
        ),
        *(("43,033", 43033), ("1,234,567.5", 1234567.5), ("1 500 000", 1.5e6), ("20 billion tokens", 20e9)),
        *(("6×10^18", 6e18), ("1_000", 1000), ("2 PFLOP-days", 2e15 * 86400), ("-3", -3), ("inf", math.inf)),
    ],
)
def test_amounts_are_read_as_people_write_them(text, number):
    assert amount(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["two", "1.3 X", "1,5", "1,50,000", "6e18 FLOPZ", "", "1.2.3"])
def test_other_texts_are_no_amounts(text):
    with pytest.raises(ValueError, match="write "):
        amount(text)


def test_cells_with_units_and_thousands_are_read(tmp_path):
    table = sweep()
    written = table.assign(
        N=[f"{value / 1e6!r}M" for value in table["N"]],
        D=[f"{value:,.3f}" for value in table["D"]],
        C=[f"{value / 1e15!r} PFLOP" for value in table["C"]],
    )
    found = runs.load(saved(tmp_path, written)).table
    for ours, theirs in (("n_parameters", "N"), ("tokens", "D"), ("budget_flop", "C")):
        assert found[ours].to_numpy() == pytest.approx(table[theirs].to_numpy(), rel=1e-9)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        ({"D": "tok", "C": "C"}, {"tokens": "tok:1e9", "C": "C:EFLOP"}),
        ({"D": "tok", "C": "C"}, {"D": "tok:B", "budget_flop": "C:1e18"}),
        ({"D": "tokens (B)", "C": "compute [EFLOP]"}, {}),
        ({"D": "Tokens (billion)", "C": "training FLOP (1e18)"}, {}),
    ],
)
def test_units_are_told_in_the_mapping_or_in_the_header(names, columns):
    table = sweep()
    scaled = table.assign(D=table["D"] / 1e9, C=table["C"] / 1e18).rename(columns=names)
    found = runs.load(scaled, columns)
    assert found.table["tokens"].to_numpy() == pytest.approx(table["D"].to_numpy())
    assert found.table["budget_flop"].to_numpy() == pytest.approx(table["C"].to_numpy())
    assert columns or "tokens from" in found.notes[0]


def test_a_column_whose_name_holds_a_colon_is_found():
    table = sweep().rename(columns={"loss": "eval:1e3"})
    assert runs.load(table, {"loss": "eval:1e3"}).table["loss"].tolist() == sweep()["loss"].tolist()
    with pytest.raises(UserError, match="'D:miles' has the unit 'miles'; allowed: a factor or a unit: D:1e9, D:B"):
        runs.load(sweep(), {"tokens": "D:miles"})


def test_numbers_of_every_type_are_numbers():
    table = sweep().astype({"loss": "Float64"}).assign(N=[Decimal(int(value)) for value in sweep()["N"]])
    assert runs.load(table).table["n_parameters"].tolist() == [float(int(value)) for value in sweep()["N"]]
    with pytest.raises(UserError, match=r"N \(n_parameters\): row 1 has True; write a number"):
        runs.load(sweep(N=True).astype({"N": object}))


def test_units_that_do_not_fit_are_refused():
    table = sweep()
    with pytest.raises(UserError, match=r"budget_flop is 6e\+09 × n_parameters × tokens, .*or tokens=NAME:1e9"):
        runs.load(table.assign(D=table["D"] / 1e9))
    assert any("median" in note for note in runs.load(table.assign(D=table["D"] / 1e9), ignore=["C"]).notes)


@pytest.mark.parametrize(("name", "factor"), [("D", 1e-9), ("C", 1e3), ("N", 1e-6), ("D", 10), ("N", 10)])
def test_a_row_in_another_unit_is_refused(name, factor):
    table = sweep()
    table.loc[4, name] *= factor
    with pytest.raises(UserError, match=r"row 5: budget_flop is .* and in most rows 6 ×: one of the three is wrong"):
        runs.load(table)


def test_amounts_far_from_six_flop_a_parameter_and_token_are_noted():
    assert any("is 42 × n_parameters × tokens" in note for note in runs.load(sweep().assign(C=7 * sweep()["C"])).notes)
    assert not any("6 is usual" in note for note in runs.load(sweep().assign(C=2 * sweep()["C"])).notes)


def test_an_export_of_wandb_is_read():
    """As the web page exports it, and as its documentation's script does: dictionaries in the cells of a CSV."""
    table = sweep()
    rows = []
    for i, (n, d, c, loss) in enumerate(table.itertuples(index=False)):
        config = {"N": {"desc": None, "value": n}, "train": {"D": {"desc": None, "value": d}, "lr": {"value": 1e-3}}}
        config |= {"_wandb": {"value": {"framework": "torch", "start_time": 1.7e9 + i}}}
        summary = {"_runtime": 60.0 + i % 3, "_step": 100, "C": c, "val/loss": loss if i else float("nan")}
        rows.append({"name": f"run-{i}", "state": "finished", "config": config, "summary": summary})
    rows.append(rows[0] | {"name": "lost", "state": "crashed"})
    as_text = [row | {"config": str(row["config"]), "summary": str(row["summary"])} for row in rows]
    for export in (pd.DataFrame(rows), pd.DataFrame(as_text)):
        found = runs.load(export, {"tokens": "config.train.D", "budget_flop": "summary.C"})
        assert len(found.table) == len(table) - 1
        assert found.table["loss"].to_numpy() == pytest.approx(table["loss"].to_numpy()[1:])
        assert found.table["tokens"].to_numpy() == pytest.approx(table["D"].to_numpy()[1:])
        assert found.excluded["reason"].tolist() == ["diverged", "unfinished"]


def test_an_export_of_mlflow_is_read():
    """Parameters are texts there; a name under `params` is a setting, and one under `metrics` is an outcome."""
    table = sweep()
    export = pd.DataFrame(
        {
            "run_id": [f"{i:032x}" for i in range(len(table))],
            "experiment_id": "1",
            "status": ["FINISHED"] * (len(table) - 1) + ["FAILED"],
            "artifact_uri": [f"mlruns/{i}" for i in range(len(table))],
            "start_time": [f"2026-01-{i + 1:02} 10:00:00+00:00" for i in range(len(table))],
            "metrics.val_loss": table["loss"],
            "metrics.accuracy": [0.5, 0.6] * (len(table) // 2),
            "params.n_params": table["N"].map(str),
            "params.tokens": table["D"].map(str),
            "params.loss": "infonce",
            "tags.mlflow.user": ["a", "b"] * (len(table) // 2),
        }
    )
    found = runs.load(export)
    assert found.table["loss"].to_numpy() == pytest.approx(table["loss"].to_numpy()[:-1])
    assert found.table["budget_flop"].to_numpy() == pytest.approx(table["C"].to_numpy()[:-1])
    assert found.table["run"].tolist() == export["run_id"].tolist()[:-1]
    assert found.excluded["reason"].tolist() == ["unfinished"]
    export["params.optimizer"] = ["adam", "muon", "muon"] * (len(table) // 3)
    with pytest.raises(UserError, match=r"not replicates: params.optimizer \(adam, muon\)"):
        runs.load(export)


# --- Which column is which -------------------------------------------------------------------------------------------


def test_one_column_for_two_fields_is_refused():
    """With N as the tokens, the sizes would follow from C: N* and D* would swap without a message."""
    with pytest.raises(UserError, match="'N' is given for tokens, and its name says n_parameters"):
        runs.load(sweep(), {"tokens": "N"})
    with pytest.raises(UserError, match="'N' is given for n_parameters and for tokens"):
        runs.load(sweep(), {"n_parameters": "N", "tokens": "N"})
    swapped = sweep().rename(columns={"N": "D", "D": "N"})
    found = runs.load(swapped, {"n_parameters": "D", "tokens": "N"})
    assert found.table["n_parameters"].tolist() == sweep()["N"].tolist()


def test_a_name_of_a_run_may_serve_as_another_column():
    table = sweep(name=["a", "b", "c", "d"] * 3)
    assert runs.load(table, {"method": "name"}).methods == ["a", "b", "c", "d"]


def test_methods_are_known_in_capitals_too():
    """The cost of a method that is known needs no column."""
    table = sweep(method=["LoRA", "Bias", "Full"] * 4, trainable_fraction=0.1).drop(columns="C")
    assert runs.load(table).methods == ["full", "bias", "lora"]


@pytest.mark.parametrize("name", ["none", "nan", "null", "n/a", "-"])
def test_a_method_may_have_any_name(tmp_path, name):
    """These are blank cells of other columns; as methods they became full fine-tuning."""
    path = tmp_path / "runs.csv"
    sweep(method=[name, "full", "lora"] * 4).to_csv(path, index=False)
    assert set(runs.load(path).methods) == {"full", "lora", name}


@pytest.mark.parametrize("cell", ["", " ", None])
def test_a_row_without_a_method_among_others_is_refused(tmp_path, cell):
    table = sweep(method=["full", "lora", cell] * 4)
    table.to_csv(tmp_path / "runs.csv", index=False)
    for source in (table, tmp_path / "runs.csv"):
        with pytest.raises(UserError, match="method: row 3 is empty, and other rows name a method; write one, such as"):
            runs.load(source)
        assert runs.load(source, where={"method": "full"}).methods == ["full"]
    assert runs.load(sweep(method=[cell] * 12)).methods == ["full"]


def test_two_columns_that_could_be_one_field_are_refused():
    with pytest.raises(UserError, match=r"loss may be any of val_loss, test_loss; choose by --columns loss=val_loss"):
        runs.load(sweep().rename(columns={"loss": "val_loss"}).assign(test_loss=2.0))


def test_the_loss_of_a_training_step_is_not_taken_for_the_held_out_loss():
    table = sweep().rename(columns={"loss": "eval_loss"}).assign(loss=1.0)
    with pytest.raises(UserError, match="loss may be any of eval_loss, loss; choose by --columns loss=eval_loss"):
        runs.load(table)
    assert runs.load(table, {"loss": "eval_loss"}).table["loss"].tolist() == sweep()["loss"].tolist()


@pytest.mark.parametrize("cell", ["OOM", "diverged"])
def test_a_word_in_place_of_a_loss_is_refused_with_what_to_write(tmp_path, cell):
    table = sweep().astype({"loss": object})
    table.loc[3, "loss"] = cell
    with pytest.raises(UserError, match=f"loss: row 4 has '{cell}'; .*; leave the cell empty if the run diverged"):
        runs.load(saved(tmp_path, table))


def test_what_is_missing_is_named_with_the_columns_that_may_be_meant():
    nested = sweep().rename(columns={"N": "model.n_params", "D": "data.tokens", "loss": "result.loss"})
    with pytest.raises(UserError, match="'loss' is missing; name it by --columns loss=result.loss; the table"):
        runs.load(nested)
    with pytest.raises(UserError, match=r"name it by --columns n_parameters=model.n_params,tokens=data.tokens; the"):
        runs.load(nested.drop(columns="C"), {"loss": "result.loss"})


def test_a_table_without_a_header_is_refused(tmp_path):
    sweep().to_csv(tmp_path / "runs.csv", index=False, header=False)
    with pytest.raises(UserError, match="its first row holds numbers, and must name the columns"):
        runs.load(tmp_path / "runs.csv")


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "runs.csv").write_text("N,D,loss,loss\n1e7,1e9,3,3\n")
    with pytest.raises(UserError, match="runs.csv: two columns are called 'loss'; rename one of them"):
        runs.load(tmp_path / "runs.csv")


@pytest.mark.parametrize("told", [False, True])
def test_a_recipe_says_what_it_assumes_where_the_table_does_not_tell(tmp_path, capsys, told):
    table = sweep()
    if told:
        table = table.assign(pairs=table["D"] / 100, batch_size=512)
    assert fit(saved(tmp_path, table), "--out", tmp_path / "out") == 0
    assert main(["recipe", str(tmp_path / "out"), "1e18"]) == 0
    shown = capsys.readouterr().out
    assert ("78 tokens a pair are assumed" in shown) is not told
    assert ("1,024 pairs a step are assumed" in shown) is not told


# --- Tables of optima ------------------------------------------------------------------------------------------------


def test_a_law_is_fitted_to_optima_alone():
    """N* = 0.1 C^0.5 with known errors: the exponent and its interval are those of scipy's least squares."""
    from scipy.stats import linregress, t

    c = 1e17 * 4.0 ** np.arange(5)
    errors = np.array([0.05, -0.1, 0.02, 0.08, -0.05])
    table = pd.DataFrame({"C": c, "N*": 0.1 * c**0.5 * np.exp(errors)})
    found = runs.load(table)
    law = fit_runs(found).methods["full"].power_laws.n_opt
    truth = linregress(np.log(c), np.log(table["N*"]))
    reach = t.ppf(0.975, 3) * truth.stderr
    assert law.exponent == pytest.approx(truth.slope)
    assert law.exponent_interval == pytest.approx((truth.slope - reach, truth.slope + reach))
    assert np.std([draw[1] for draw in law.draws]) == pytest.approx(truth.stderr * 3**0.5, rel=0.4)  # t has variance 3
    assert fit_runs(found).methods["full"].power_laws.loss is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"C": [1e17, 1e17, 4e17]}, "full has two optima at 1e17 FLOP; choose one by --where"),
        ({"N": [2e7, "", ""]}, "full has one optimum; a law needs at least two budgets"),
    ],
)
def test_optima_that_make_no_law_are_refused(change, message):
    table = pd.DataFrame({"C": [1e17, 2e17, 4e17], "N": [2e7, 3e7, 4e7]} | change)
    with pytest.raises(UserError, match=message):
        fit_runs(runs.load(table, {"n_opt": "N"}))


@needs_shared
def test_the_published_exponents_follow_from_the_published_optima(tmp_path, capsys):
    """Porian et al. (2024): unweighted, and weighted by the spreads of their bootstrap."""
    folder = SHARED / "data/porian_isoflop"
    published = pd.read_csv(folder / "published_fits.csv").set_index("experiment")
    for name in ("rw__base__long__kaplan__kaplan__train", "rw__tuned__short__const__standard__val"):
        assert fit(folder / "optimal_pairs.csv", "--where", f"experiment={name}", "--out", tmp_path) == 0
        law = analysis.read_fits(tmp_path).methods["full"].power_laws.n_opt
        assert law.exponent == pytest.approx(published.loc[name, "n_exponent_basic"], rel=1e-9)
        assert law.weighted.exponent == pytest.approx(published.loc[name, "n_exponent"], rel=1e-9)
    assert "N* = k C^a" in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 2
    assert "holds the fits of a table of optima" in capsys.readouterr().err
    assert fit(folder / "optimal_pairs.csv", "--out", tmp_path / "all") == 2
    assert "experiment (owt2__base" in capsys.readouterr().err
