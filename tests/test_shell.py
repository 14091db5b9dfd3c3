"""What a shell or another program gets: JSON, and the words that could follow."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import in_fresh_process

from embedscale.cli import main
from embedscale.run.config import RunConfig
from embedscale.run.cost import cost_of
from embedscale.run.families import shape_by_name
from embedscale.run.settings import read
from embedscale.values import plain

DOCS = Path(__file__).parents[1] / ".venv" / "docs"  # where `make docs` installs argcomplete


def printed(capsys, *words: str):
    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    assert main(list(words)) == 0
    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_flops_as_json_are_those_of_the_formula(capsys, tmp_path):
    words = ["flops", f"data.store={tmp_path}", "--budgets", "1e14", "2e14", "--json"]
    found = printed(capsys, *words)
    n = found["n_parameters"]
    assert (found["n_forward"], found["n_backward"], found["n_updated"]) == (n, n, n) == (1_189_888,) * 3
    assert [each["tokens"] for each in found["budgets"]] == [int(1e14) // (6 * n), int(2e14) // (6 * n)]
    cost = cost_of(shape_by_name("pythia-14m"), RunConfig().method)
    assert (found["forward"], found["backward"]) == (cost.forward, cost.backward)
    assert found["counted_in"] is None


def test_the_plan_as_json_has_the_sums_of_its_rows(capsys, tmp_path):
    (tmp_path / "s.yaml").write_text(
        f"output: {tmp_path}\naxes: {{budget: [1e15, 2e15, 1e8]}}\nmethods: [full, bias]\n"
    )
    found = printed(capsys, "sweep", "plan", str(tmp_path / "s.yaml"), "--json")
    rows = found["runs"]
    assert len(rows) == 6 and [row["obstacle"] is None for row in rows].count(False) == 2
    for name in ("spent_flop", "device_hours", "disk_bytes"):
        assert found[name] == pytest.approx(sum(row[name] for row in rows))
    assert {row["method"] for row in rows} == {"full", "bias"} and rows[0]["budget"] == 1e15


def test_json_has_no_number_that_json_lacks():
    @dataclass
    class Value:
        path: Path
        numbers: list[float]
        more: dict[str, "Value | None"]

    value = Value(Path("a/b"), [1.5, float("nan"), float("inf")], {"x": None})
    assert plain({1: (value,)}) == {"1": [{"path": "a/b", "numbers": [1.5, None, None], "more": {"x": None}}]}


def test_one_entry_of_a_list_is_overridden(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data: {sources: [{path: a.jsonl, query: q}, {path: b.jsonl}]}\nevaluation: {at: [0.2, 0.4]}\n"
    )
    words = ["data.sources[1].path=c.jsonl", "evaluation.at[0]=0.1", "data.sources[0].weight=0.5"]
    config = read(RunConfig, tmp_path / "run.yaml", words)
    assert [(each.path, each.query, each.weight) for each in config.data.sources] == [
        ("a.jsonl", "q", 0.5),
        ("c.jsonl", "query", None),
    ]
    assert config.evaluation.at == [0.1, 0.4]
    assert read(RunConfig, None, ["evaluation.at[2]=0.9"]).evaluation.at == [0.25, 0.5, 0.9]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("embedscale sweep st", ["status"]),
        ("embedscale fit --boot", ["--bootstrap"]),
        ("embedscale train training.learn", ["training.learning_rate="]),
        ("embedscale config --of cluster warn", ["warning_seconds="]),
        ("embedscale sweep plan s.yaml expected_p", ["expected_pairs="]),
        ("embedscale report FITS --out fol", ["folder/"]),
    ],
)
def test_a_shell_is_told_what_could_follow(tmp_path, line, words):
    environment = os.environ | {"PYTHONPATH": f"{DOCS}:{os.environ.get('PYTHONPATH', '')}"}
    has = subprocess.run([sys.executable, "-c", "import argcomplete"], env=environment, capture_output=True)
    if has.returncode:
        pytest.skip("argcomplete is not installed; `make docs` installs it")
    (tmp_path / "folder").mkdir()
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    subprocess.run([sys.executable, "-m", "embedscale.cli"], env=environment | asked, cwd=tmp_path, capture_output=True)
    assert [word.strip() for word in (tmp_path / "answer").read_text().split("\n")] == words


@pytest.mark.slow
def test_training_starts_without_scipys_signals_which_are_there_afterwards(monkeypatch):
    code = "import sys; from slurm.scheduler.processes import import_everything; import_everything(); "
    code += "assert 'scipy.signal' not in sys.modules; from scipy.signal import find_peaks; import scipy; "
    code += "assert list(find_peaks([0, 1, 0])[0]) == [1] and scipy.signal.windows.hann(3)[1] == 1"
    # And OpenMP's threads sleep while they wait. GNU's library prints its settings when torch loads it.
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    assert "GOMP_SPINCOUNT = '0'" in in_fresh_process(f"import os; os.dup2(1, 2); {code}")
