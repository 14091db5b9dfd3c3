"""fits.json as values: a written file reads back equal, its schema describes it, and old files load."""

import json
from pathlib import Path

import jsonschema
import pytest

from analysis import fits, recipe, study
from analysis.advice.evidence import Limit
from embedscale.errors import UserError
from embedscale.values import sealed

FIRST = Path(__file__).parent / "first_version"  # the quickstart of version 0.1.0, with six draws of each law
SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "fits.schema.json"


def test_written_fits_read_back_equal(paper_folder):
    written = json.loads((paper_folder / "fits.json").read_text())
    found = fits.read(paper_folder)
    assert fits.Fits.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert sealed(json.loads(json.dumps(found.to_json()))) == written


def test_a_file_matches_the_schema_and_every_key_is_described(paper_folder):
    schema = json.loads(SCHEMA.read_text())
    written = json.loads((paper_folder / "fits.json").read_text())
    jsonschema.validate(written, schema, jsonschema.Draft202012Validator)
    assert written.keys() == schema["properties"].keys()
    optimum = written["methods"]["full"]["optima"][0]
    described = schema["properties"]["methods"]["additionalProperties"]["properties"]["optima"]["items"]["properties"]
    assert optimum.keys() == described.keys()
    written["methods"]["full"]["optima"][0]["state"] = "fine"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, schema, jsonschema.Draft202012Validator)


def test_fits_of_the_first_version_load_with_all_their_numbers():
    old, new = json.loads((FIRST / "fits.json").read_text()), fits.read(FIRST)
    assert (old["format"], new.format) == (1, fits.FORMAT)
    assert list(new.runs.budgets) == old["runs"]["budgets"]
    for name, method in old["methods"].items():
        found = new.methods[name]
        for before, after in zip(method["points"], found.points, strict=True):
            assert (after.budget_flop, after.n_parameters, after.loss) == (
                before["budget"],
                before["params"],
                before["loss"],
            )
            assert after.setting("learning_rate") == before["learning_rate"] and after.run == before["run"]
        for before, after in zip(method["optima"], found.optima, strict=True):
            assert (after.budget_flop, after.state, after.n_opt) == (
                before["budget"],
                before["state"],
                before["n_opt"],
            )
        for law, before in method["joint_laws"].items():
            if "refused" in before:
                assert found.refused[law] == before["refused"] and law not in found.joint_laws
            else:
                after = found.joint_laws[law]
                assert after.coefficients == {key: before[key] for key in ("E", "A", "B", "alpha", "beta")}
                assert after.span.n_parameters == tuple(before["span"]["params"])
    (segment,), (before,) = new.frontier.segments, old["frontier"]["segments"]
    assert (segment.method, segment.from_flop, segment.to_flop) == (before["method"], before["from"], before["to"])


def test_a_folder_of_the_first_version_gives_recipes_and_figures():
    found = recipe.recipe(*recipe.read(FIRST)[:1], Limit(flop=1e12), recipe.read(FIRST)[1])
    # Two optima extrapolate nothing; version 0.1 drew a line through them: 2.33, between 2.01 and 2.77.
    assert found.best.backbone == "tiny-85k" and set(found.laws) == {"chinchilla law"}
    assert found.best.loss_interval[0] < 3.01 < found.best.loss_interval[1]  # the joint law
    loaded = study.load(FIRST)
    assert {"n_parameters", "budget_flop"} <= set(loaded.table)
    assert loaded.points["full"]["loss"].tolist() == [point.loss for point in loaded.fits.methods["full"].points]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["settings"].update(confidence=95), "settings.confidence: 95 was found; expected a number"),
        (lambda data: data["methods"]["full"]["optima"][0].update(state="fine"), "methods.full.optima.0.state: 'fine'"),
        (lambda data: data["methods"]["full"]["points"][0].pop("loss"), "methods.full.points.0: the key 'loss' is"),
        (lambda data: data.update(notes="none"), "notes: 'none' was found; expected a list"),
    ],
)
def test_a_value_that_does_not_fit_is_named(paper_folder, tmp_path, change, message):
    data = json.loads((paper_folder / "fits.json").read_text())
    change(data)
    data.pop("checksum")  # as a file of earlier code
    (tmp_path / "fits.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"{tmp_path}/fits.json: {message}.*run embedscale fit again"):
        fits.read(tmp_path)
