"""Finished runs of a sweep are scored on this machine, and by jobs on a real SLURM."""

import json

import pytest

from embedscale.errors import DONE
from embedscale.run.settings import load
from embedscale.run.stop import StopRequest
from slurm.scoring import score_all

FILE = {"axes": {"budget": [1e9]}, "methods": ["full", "bias"]}


def scores(lab, name):
    return {d.path.name: json.loads(d.score("HeldOutRetrieval").read_text())["score"] for d in lab.directories(name)}


@pytest.mark.slow
def test_scoring_jobs_score_each_finished_run_once(lab, until):
    sweep = lab.write("scored", **FILE)
    assert "2 not done; 0 to score" in lab.sweep("submit", sweep, "--evaluate", "held-out")
    assert "2 done" in lab.sweep("submit", sweep, "--to", "here")
    said = lab.sweep("submit", sweep, "--evaluate", "held-out")
    assert "2 without all scores; 2 to score on 1 task" in said and "submitted 2 runs" in said
    assert "0 to score" in lab.sweep("submit", sweep, "--evaluate", "held-out")
    until(lambda: not lab.queued("scored"), 240, lambda: lab.log("scored"))
    found = scores(lab, "scored")
    assert len(found) == 2
    for directory in lab.directories("scored"):
        record = directory.read_record()
        score = json.loads(directory.score("HeldOutRetrieval").read_text())
        assert score["weights_digest"] == record.weights_digest
        assert found[directory.path.name] == pytest.approx(record.recall_at_10, abs=0.02)
        directory.score("HeldOutRetrieval").unlink()
    # The same on this machine, after one score was lost.
    assert "2 to score" in lab.sweep("submit", sweep, "--evaluate", "held-out", "--to", "here")
    assert scores(lab, "scored") == pytest.approx(found, abs=1e-6)


def test_a_task_unknown_to_mteb_is_refused_before_submission(laptop):
    sweep = laptop.write("scored", **FILE)
    said = laptop.sweep("submit", sweep, "--evaluate", "SciFcat", code=2)
    assert "--evaluate: 'SciFcat' is not a task, suite or benchmark of mteb" in said and "did you mean SciFact?" in said
    assert not laptop.directories("scored")


def test_a_failed_task_does_not_affect_the_scores_of_other_runs(tmp_path, monkeypatch, capsys):
    runs = [load(None, [f"output={tmp_path}", f"training.seed={seed}"]) for seed in range(3)]
    scored = []

    def evaluate(run, names, stop):
        if run.endswith(runs[1].run_id):
            raise ZeroDivisionError("of a task")
        scored.append(run)
        return DONE

    monkeypatch.setattr("embedscale.serving.evaluate.evaluate", evaluate)
    assert list(score_all(runs, ["STS15"], StopRequest()).values()) == ["done", "failed", "done"]
    assert scored == [str(runs[0].folder), str(runs[2].folder)] and "of a task" in capsys.readouterr().err
