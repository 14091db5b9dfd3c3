"""Loading runs: which runs enter the table, which are left out and why, and which input is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import records

from analysis import runs
from analysis.columns import parse_assignments
from embedscale.errors import UserError


def record(run_id: str = "a", **changes) -> dict:
    """Return the record.json of a LoRA run."""
    settings = {
        "learning_rate": 1e-3,
        "rank": 8,
        "targets": ["dense", "query_key_value"],
        "loss": "infonce",
        "method_label": "lora-r8",
    }
    evaluation = {"pool": 1000, "negatives": 127}
    mine = {"run_id": run_id, "method": "lora", "trainable_fraction": 0.1, "flop_per_token": 5_000_000}
    mine |= {"hyperparameters": settings, "evaluation": evaluation, "tokens": 300_000_000}
    return records.record(**mine | changes)


def save(folder, content: dict | str | None, name: str | None = None):
    directory = folder / (name or content["run_id"])
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("budget: 1\n")
    if content is not None:
        (directory / "record.json").write_text(content if isinstance(content, str) else json.dumps(content))


def csv(folder, **columns):
    path = folder / "runs.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


GOOD = {
    "n_parameters": [1e6, 4e6, 16e6],
    "tokens": [1e9, 1e9, 1e9],
    "budget_flop": [6e15, 24e15, 96e15],
    "loss": [3.0, 2.0, 1.5],
}


def test_records_become_tidy_rows(tmp_path):
    save(tmp_path / "sweep", record("a"))
    save(tmp_path / "sweep", record("b", seed=1, loss=2.6))
    loaded = runs.load(tmp_path)
    row = loaded.table.iloc[0]
    assert list(loaded.table["run"]) == ["a", "b"]
    assert (row["n_parameters"], row["budget_flop"], row["loss"], row["rank"]) == (1_189_888, 1.5e15, 2.5, 8)
    assert (row["loss_function"], row["targets"], row["blocks"]) == ("infonce", "dense query_key_value", "last")
    assert (row["evaluation.digest"], row["device"]) == ("e", "A100")
    assert loaded.excluded.empty
    assert loaded.methods == ["lora"]


def test_each_excluded_run_has_a_reason(tmp_path):
    save(tmp_path, record("good"))
    save(tmp_path, None, "unfinished")
    save(tmp_path, record("diverged", status="diverged", diverged_at_step=7))
    save(tmp_path, record("nan", loss=float("nan")))
    save(tmp_path, record("nothing", loss=0.0))
    save(tmp_path, "{torn", "torn")
    save(tmp_path, "{}", "empty")
    save(tmp_path / "copy", record("good"))
    save(tmp_path, record("other", data_digest="x"))
    with pytest.raises(UserError, match=r"differ in data_digest \(d, x\).*--where data_digest=d"):
        runs.load(tmp_path)
    loaded = runs.load(tmp_path, where={"data_digest": "d"})
    reasons = dict(zip(loaded.excluded["run"], loaded.excluded["reason"], strict=True))
    assert reasons == {
        "unfinished": "unfinished",
        "diverged": "diverged",
        "nan": "diverged",
        "nothing": "diverged",
        "torn": "unreadable",
        "empty": "unreadable",
        "good": "duplicate",
        "other": "another data_digest",
    }
    lost = loaded.excluded.set_index("run").loc["diverged"]
    assert (lost["detail"], lost["method"], lost["n_parameters"], lost["budget_flop"]) == (
        "at step 7",
        "lora",
        1_189_888,
        1.5e15,
    )


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("evaluation.pool", {"evaluation": {"pool": 500, "negatives": 127, "temperature": 0.025, "digest": "e"}}),
        ("evaluation.negatives", {"evaluation": {"pool": 1000, "negatives": 63, "temperature": 0.025, "digest": "e"}}),
        (
            "evaluation.temperature",
            {"evaluation": {"pool": 1000, "negatives": 127, "temperature": 0.05, "digest": "e"}},
        ),
        ("evaluation.digest", {"evaluation": {"pool": 1000, "negatives": 127, "temperature": 0.025, "digest": "f"}}),
        ("data_digest", {"data_digest": "x"}),
        ("batch_size", {"hyperparameters": {"batch_size": 2048, "context": 75}}),
        ("context", {"hyperparameters": {"batch_size": 1024, "context": 512}}),
        ("backbone_weights", {"backbone_weights": "random"}),
        ("family", {"family": "Qwen 3"}),
        ("attention", {"hyperparameters": {"batch_size": 1024, "context": 75, "attention": "bidirectional"}}),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_with_the_field(tmp_path, field, change):
    save(tmp_path, record("a"))
    save(tmp_path, record("b", **change))
    with pytest.raises(UserError, match=f"runs differ in {field} "):
        runs.load(tmp_path)


def test_thousands_of_runs_are_read(tmp_path):
    for i in range(1000):
        save(tmp_path, record(f"run{i:04}", seed=i))
    assert len(runs.load(tmp_path).table) == 1000


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_files_of_every_kind_give_the_same_table(tmp_path, ending):
    table = pd.DataFrame({"N": GOOD["n_parameters"], "C": GOOD["budget_flop"], "val": GOOD["loss"]})
    path = tmp_path / f"runs.{ending}"
    if ending == "csv":
        table.to_csv(path, index=False)
    elif ending == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=True)
    loaded = runs.load(path, {"n_parameters": "N", "budget_flop": "C", "loss": "val"}).table
    assert list(loaded["tokens"]) == pytest.approx([1e9, 1e9, 1e9])
    assert list(loaded["method"]) == ["full"] * 3


def test_a_mapped_column_replaces_a_column_of_our_name(tmp_path):
    path = csv(tmp_path, **GOOD, held_out=[9.0, 8.0, 7.0])
    assert list(runs.load(path, {"loss": "held_out"}).table["loss"]) == [9, 8, 7]


@pytest.mark.parametrize("missing", ["n_parameters", "tokens", "budget_flop"])
@pytest.mark.parametrize(
    ("method", "s", "factor"), [("full", 1, 6), ("bias", 0.01, 4), ("freeze", 0.5, 4), ("lora", 0.1, 4.6)]
)
def test_one_of_size_data_and_budget_follows_from_the_others(tmp_path, method, s, factor, missing):
    whole = {"n_parameters": [1e6, 2e6], "tokens": [1e9, 3e9], "budget_flop": [1e15 * factor, 6e15 * factor]}
    given = {name: values for name, values in whole.items() if name != missing}
    path = csv(tmp_path, **given, loss=[2.0, 1.5], method=[method] * 2, trainable_fraction=[s] * 2)
    assert list(runs.load(path).table[missing]) == pytest.approx(whole[missing])


def test_costs_from_the_trainable_fraction_follow_the_paper():
    """N_F, N_B and N_U agree with the cost module (section 3.5), except for the final norm and the biases' update."""
    from embedscale.run.cost import cost_of
    from embedscale.run.families import PYTHIA
    from embedscale.run.method import Method

    shape = PYTHIA.sizes["pythia-410m"].shape
    for method in (Method("full"), Method("bias"), Method("freeze", active_fraction=0.25), Method("lora", rank=32)):
        cost = cost_of(shape, method)
        s = 0.25 if method.name == "freeze" else cost.n_updated / cost.n_parameters
        assert runs.flop_per_token(method.name, shape.parameters, s) == pytest.approx(cost.flop_per_token, rel=2e-3)


def test_bias_only_needs_no_trainable_fraction(tmp_path):
    """A token costs 4 N FLOP for any share of biases (section 3.5)."""
    loaded = runs.load(csv(tmp_path, params=[1e6], tokens=[1e9], loss=[2.0], method=["bias"]))
    assert loaded.table["budget_flop"].tolist() == [4e15]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_texts_that_look_like_numbers_stay_texts(tmp_path, ending):
    table = pd.DataFrame(GOOD | {"name": ["000", "001", "1e3"], "data_digest": ["12e4567890123456"] * 3})
    path = tmp_path / f"runs.{ending}"
    table.to_csv(path, index=False) if ending == "csv" else table.to_json(path, orient="records", lines=True)
    found = runs.load(path, {"run": "name"}).table
    assert found["run"].tolist() == ["000", "001", "1e3"]
    assert set(found["data_digest"]) == {"12e4567890123456"}


def test_equal_rows_are_duplicates_and_other_seeds_are_not(tmp_path):
    path = csv(tmp_path, **{name: values * 2 for name, values in GOOD.items()})
    loaded = runs.load(path)
    assert (len(loaded.table), list(loaded.excluded["reason"])) == (3, ["duplicate"] * 3)
    path = csv(tmp_path, **{name: values * 2 for name, values in GOOD.items()}, seed=[0, 0, 0, 1, 1, 1])
    assert len(runs.load(path).table) == 6


def test_the_status_column_of_a_table_leaves_runs_out(tmp_path):
    path = csv(tmp_path, **(GOOD | {"loss": [3.0, np.nan, 1.5]}), status=["done", "diverged", "done"])
    loaded = runs.load(path)
    assert (len(loaded.table), list(loaded.excluded["reason"])) == (2, ["diverged"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": [3.0, 0.0, 1.5]}, r"loss: row 2 has 0.0; allowed: finite and above 0"),
        ({"loss": [3.0, 2.0, -1.5]}, r"loss: row 3 has -1.5"),
        ({"loss": [3.0, 1e200, 1.5]}, r"loss: row 2 has 1e\+200; allowed: 1e-100 to 1e\+100"),
        ({"loss": ["3.0", "two", "1.5"]}, r"runs.csv: loss: row 2 has 'two'; write a number such as 1.5e17"),
        ({"loss": ["3.0", "1,5", "1.5"]}, r"loss: row 2 has '1,5'; the comma does not separate thousands: write 1.5"),
        ({"n_parameters": ["1M", "4 apples", "16M"]}, r"n_parameters: row 2 has '4 apples'"),
        ({"n_parameters": [1e6, -4e6, 16e6]}, r"n_parameters: row 2 has -4000000.0"),
        ({"tokens": [1e9, 0, 1e9]}, r"tokens: row 2 has 0.0"),
        ({"loss": None}, r"column 'loss' is missing; name it by --columns loss=NAME"),
        (
            {"n_parameters": None, "tokens": None},
            r"two are needed, and n_parameters, tokens are missing",
        ),
    ],
)
def test_bad_values_are_named_with_their_row(tmp_path, change, message):
    columns = {name: values for name, values in (GOOD | change).items() if values is not None}
    with pytest.raises(UserError, match=message) as error:
        runs.load(csv(tmp_path, **columns))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"colour": "n_parameters"}, "columns: 'colour' is unknown; allowed: n_parameters, tokens"),
        ({"loss": "val"}, r"column 'val' \(loss\) is missing; the table has n_parameters, tokens, budget_flop, loss"),
    ],
)
def test_wrong_column_names_are_refused(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        runs.load(csv(tmp_path, **GOOD), columns)


@pytest.mark.parametrize("text", ["n_parameters", "params=", "=N", "loss=a,loss=b"])
def test_assignments_are_checked(text):
    with pytest.raises(UserError, match="columns: "):
        parse_assignments("columns", text)


def test_a_comma_belongs_to_the_name_unless_a_name_and_an_equals_sign_follow():
    assert parse_assignments("columns", "params=N, loss=val") == {"params": "N", "loss": "val"}
    assert parse_assignments("columns", ["loss=val, nats", "N=size"]) == {"loss": "val, nats", "N": "size"}


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        runs.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no run"):
        runs.load(tmp_path)
    (tmp_path / "runs.xlsx").write_text("")
    with pytest.raises(UserError, match="has the ending '.xlsx'; allowed: .csv, .tsv, .json"):
        runs.load(tmp_path / "runs.xlsx")
    for name, content in (("empty.csv", ""), ("torn.jsonl", '{"loss": 1'), ("no.parquet", "text")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="cannot be read as"):
            runs.load(tmp_path / name)
    (tmp_path / "header.csv").write_text("params,loss\n")
    with pytest.raises(UserError, match="holds no run"):
        runs.load(tmp_path / "header.csv")
    save(tmp_path / "folder", None, "a")
    save(tmp_path / "folder", record("b", status="diverged"))
    with pytest.raises(UserError, match=r"no finished run \(1 unfinished, 1 diverged\)"):
        runs.load(tmp_path / "folder")
    with pytest.raises(UserError, match="columns: .* is a folder"):
        runs.load(tmp_path / "folder", {"loss": "val"})


def test_where_is_checked(tmp_path):
    path = csv(tmp_path, **GOOD, learning_rate=[1e-3, 1e-3, 1e-2])
    assert len(runs.load(path, where={"learning_rate": "1e-3"}).table) == 2
    with pytest.raises(UserError, match="where: .*runs.csv has no column 'colour'; allowed: n_parameters"):
        runs.load(path, where={"colour": "red"})
    with pytest.raises(UserError, match="where: learning_rate=high: 'high' is not a number"):
        runs.load(path, where={"learning_rate": "high"})
    with pytest.raises(UserError, match="no finished run"):
        runs.load(path, where={"learning_rate": "5"})
