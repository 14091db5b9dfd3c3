"""The study's tables hold what `fit` reads from the run directories, and curves are thinned."""

import json
import sys
from pathlib import Path

import pandas as pd
from records import record

from analysis import runs
from analysis.columns import TEXTS

sys.path.insert(0, str(Path(__file__).parents[2] / "configs" / "study"))
import table


def write_run(folder: Path, steps: int, **changes) -> None:
    run = record(steps=steps, **changes)
    path = folder / run["run_id"]
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("")
    (path / "record.json").write_text(json.dumps(run))
    rows = [{"step": s, "spent_flop": s * 10, "train_loss": 5 - s / 1000} for s in range(10, steps + 1, 10)]
    rows.append({"step": steps, "spent_flop": steps * 10, "loss": run["loss"]})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tables_hold_the_values_of_the_run_directories(tmp_path, monkeypatch):
    write_run(tmp_path / "runs", 50, run_id="b", loss=2.123456789012345)
    lora = {"rank": 8, "learning_rate": 1e-2}
    write_run(tmp_path / "runs", 1000, run_id="a", method="lora", trainable_fraction=0.1, hyperparameters=lora)
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "runs"), str(tmp_path / "out")])
    table.main()

    before = runs.load(tmp_path / "runs").table.drop(columns="path").set_index("run").sort_index()
    after = runs.load(tmp_path / "out/runs.csv").table.set_index("run")
    assert list(after.index) == ["a", "b"]
    given = [name for name in before if before[name].notna().any() and (before[name] != "").any()]
    texts = {name: str for name in given if name in TEXTS}  # a file has no Boolean values
    pd.testing.assert_frame_equal(before[given].astype(texts), after[given].astype(texts), check_dtype=False)

    curves = pd.read_csv(tmp_path / "out/curves.csv")
    a, b = (curves[curves["run"] == run] for run in "ab")
    assert b["train_loss"].dropna().tolist() == [4.99, 4.98, 4.97, 4.96]  # without the cut last batch
    assert 8 <= a["train_loss"].notna().sum() <= table.POINTS
    assert a["spent_flop"].is_monotonic_increasing
    assert b["loss"].dropna().tolist() == [2.123457]


def test_rows_of_runs_that_are_gone_stay_byte_for_byte(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for folder, names in (("first", "bc"), ("second", "ac")):
        for name in names:
            write_run(tmp_path / folder, 50, run_id=name, loss=2 + len(folder) / 7 + ord(name) / 3)
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "first"), str(out)])
    table.main()
    before = {path.name: path.read_text().splitlines() for path in out.iterdir()}
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "second"), str(out)])
    table.main()

    assert len(before) == 2
    for name, lines in before.items():
        after = (out / name).read_text().splitlines()
        assert [line for line in after if line[0] == "b"] == [line for line in lines if line[0] == "b"]
        assert [line[0] for line in after[1:]] == sorted(line[0] for line in after[1:])
    losses = pd.read_csv(out / "runs.csv").set_index("run")["loss"]
    assert losses["c"] == 2 + len("second") / 7 + ord("c") / 3
    assert sorted(losses.index) == ["a", "b", "c"]
