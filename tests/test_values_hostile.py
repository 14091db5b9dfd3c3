"""Values read from files with absurd content: the error is one short line, never a traceback."""

import json

import pytest

from embedscale.run.record import Metric, RunRecord
from embedscale.values import Damaged, Misfit


def test_a_whole_number_too_large_for_a_float_does_not_fit():
    with pytest.raises(Misfit, match="loss: 1000.* was found; expected a number below 1e308"):
        Metric.from_json({"step": 1, "loss": 10**400})


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_does_not_fit(text):
    values = json.loads(f'{{"step": 1, "loss": {text}, "seconds": {text}}}')
    with pytest.raises(Misfit, match="was found; expected a finite number"):
        Metric.from_json(values)


def test_a_message_quotes_the_beginning_of_a_long_value():
    with pytest.raises(Misfit) as error:
        Metric.from_json({"step": "x" * 5000})
    assert len(str(error.value)) < 200


def test_a_file_nested_without_end_is_damaged(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("[" * 200_000)
    assert isinstance(RunRecord.read(path), Damaged)
