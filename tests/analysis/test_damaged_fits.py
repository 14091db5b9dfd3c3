"""Any content of fits.json gives one line about that file, or a recipe; never a traceback."""

import json
import random
import shutil

import pytest
from damage import CONTENTS, every_way, flipped

from embedscale.cli import main


def test_any_content_of_fits_json_is_one_line(paper_folder, tmp_path, capsys, record_property):
    refused = tried = 0
    folder = shutil.copytree(paper_folder, tmp_path / "fits")
    file = folder / "fits.json"
    whole = json.loads(file.read_text())
    del whole["checksum"]  # as in a file of version 0.2, whose values are the only thing to go by
    for method in whole["methods"].values():  # the draws alone are most of the file's values
        for law in [*method["power_laws"].values(), *method["joint_laws"].values()]:
            if law:
                law["draws"] = law["draws"][:2]
    file.write_text(json.dumps(whole))
    for how, content in every_way(file, random.Random(0), values=25):
        file.write_bytes(content)
        code = main(["recipe", str(folder), "1e17"])
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == (code != 0) and code in (0, 2), (how, printed)
        assert code == 0 or (str(file) in printed[0] or "value" in how), (how, printed)
        assert code == 2 or how not in CONTENTS, how
        tried, refused = tried + 1, refused + (code == 2)
    record_property("shown", f"fits.json: {tried} contents, {refused} damaged, {tried - refused} readable")


@pytest.mark.parametrize("name", ["fits.json", "runs.csv"])
def test_one_flipped_bit_gives_no_other_recipe(paper_folder, tmp_path, capsys, record_property, name):
    folder, rng, refused = shutil.copytree(paper_folder, tmp_path / "fits"), random.Random(3), 0
    file = folder / name
    whole = file.read_bytes()
    assert main(["recipe", str(folder), "1e17"]) == 0
    truth = capsys.readouterr()
    for _ in range(40):
        file.write_bytes(flipped(whole, rng))
        if main(["recipe", str(folder), "1e17"]) == 0:
            assert capsys.readouterr() == truth
        else:
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"embedscale: {file}: ")
            refused += 1
    record_property("shown", f"{name}: 40 flipped bits, {refused} noticed, the others changed nothing")
