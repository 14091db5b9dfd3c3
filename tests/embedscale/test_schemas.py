"""The JSON Schemas in docs/schemas match the code, and the files of a run match the schemas."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest
from records import record

from embedscale.errors import DONE, UserError
from embedscale.run.directory import RunDirectory
from embedscale.run.record import AttemptRecord, Damaged, Metric, RunRecord, sound
from embedscale.run.settings import load
from embedscale.training.train import train

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import generate  # noqa: E402

SCHEMAS = {path.name.split(".")[0]: json.loads(path.read_text()) for path in (DOCS / "schemas").glob("*.schema.json")}


def checked(kind: str, value: object) -> None:
    jsonschema.validate(value, SCHEMAS[kind], jsonschema.Draft202012Validator)


def test_the_schemas_of_the_documentation_match_the_code():
    written = {path.name: json.loads(path.read_text()) for path in (DOCS / "schemas").glob("*.json")}
    assert written == generate.schemas(), "write them anew: python docs/generate.py"
    for schema in written.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_files_of_a_run_match_the_schemas(tmp_path, tiny_run):
    config = load(None, [*tiny_run, f"output={tmp_path / 'runs'}", "budget=2e9", "method.name=lora", "method.rank=2"])
    assert train(config) == DONE
    directory = RunDirectory(config.folder)
    checked("record", json.loads(directory.record.read_text()))
    checked("plan", json.loads(directory.plan.read_text()))
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    for row in rows:
        checked("metrics", row)
    assert {"spent_flop", "train_loss", "learning_rate", "loss"} <= {key for row in rows for key in row}
    assert not {"flops", "lr", "held_out_loss"} & {key for row in rows for key in row}
    for schema, text in (("record", directory.record), ("plan", directory.plan)):
        every = json.loads(text.read_text())
        assert every.keys() == SCHEMAS[schema]["properties"].keys(), "the schema describes every key that is written"


def test_records_of_the_first_version_match_the_schema_and_load():
    checked("record", record())
    found = RunRecord.from_json(record())
    since = {"family": None, "tokens_before": [], "tokens_after": [], "hyperparameters": {"attention": "causal"}}
    assert found.to_json() == record(diverged_at_step=None, code={"digest": None}, **since)
    early = {key: value for key, value in record().items() if key not in ("tokenizer_digest", "backbone_revision")}
    checked("record", early)
    assert RunRecord.from_json(early).tokenizer_digest is None


def test_rows_of_the_first_version_load_with_the_new_names():
    place = {"step": 10, "attempt": 1, "tokens": 100, "flops": 600}
    speed = {"tokens_per_second": 50.0, "seconds": 2.0}
    row = Metric.from_json(place | {"loss": 4.5, "lr": 0.001} | speed)
    assert (row.spent_flop, row.train_loss, row.learning_rate, row.loss) == (600, 4.5, 0.001, None)
    row = Metric.from_json(place | {"held_out_loss": 4.0, "recall_at_1": 0.1, "recall_at_10": 0.5})
    assert (row.spent_flop, row.train_loss, row.loss, row.recall_at_10) == (600, None, 4.0, 0.5)
    assert Metric.from_json(row.to_json()) == row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "low"}, "loss: 'low' was found; expected a number"),
        ({"steps": -1}, "steps: -1 was found; expected a number at least 0"),
        ({"seed": True}, "seed: True was found; expected a whole number"),
        ({"status": "finished"}, "status: 'finished' was found; expected 'done' or 'diverged'"),
        ({"recall_at_1": 1.5}, "recall_at_1: 1.5 was found; expected a number from 0 to 1"),
        ({"evaluation": {"pool": None}}, "evaluation.pool: None was found; expected a whole number"),
        ({"attempts": [{"number": 1}]}, "attempts.0: the key 'start' is missing"),
        ({"versions": {"torch": 2}}, "versions.torch: 2 was found; expected a text"),
    ],
)
def test_a_record_that_does_not_fit_is_a_damaged_value_that_names_the_key(tmp_path, change, message):
    directory = RunDirectory(tmp_path)
    directory.record.write_text(json.dumps(record(**change)))
    found = directory.read_record()
    assert found == Damaged(directory.record, message)
    with pytest.raises(UserError, match="record.json: "):
        sound(found)
    with pytest.raises(jsonschema.ValidationError):
        checked("record", record(**change))


@pytest.mark.parametrize("text", ["{torn", "", "\xff\xfe"])
def test_a_torn_file_is_damaged_and_a_missing_one_is_none(tmp_path, text):
    directory = RunDirectory(tmp_path)
    assert directory.read_record() is None
    directory.record.write_bytes(text.encode("latin-1"))
    assert directory.read_record() == Damaged(directory.record, "is not valid JSON")


def test_a_damaged_attempt_is_named(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.begin_attempt()
    second = directory.begin_attempt()
    assert [each.number for each in directory.read_attempts()] == [1, 2]
    second.file.write_text("[]")
    assert directory.read_attempts() == Damaged(second.file, "[] was found; expected an object")


def test_the_duration_of_an_attempt_is_from_start_to_end():
    attempt = AttemptRecord(1, "2026-01-01T00:00:00+00:00", end="2026-01-01T01:00:30+00:00")
    assert attempt.seconds == 3630
