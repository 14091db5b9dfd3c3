"""The page in a real browser, at desk and phone width: it is whole, and answers a budget as `recipe` does."""

import json
import math
import re

import pytest
from browser import browse, needed

from analysis import recipe
from analysis.advice.evidence import parse_limit
from embedscale.cli import main
from embedscale.errors import UserError

pytestmark = needed

MEASURE = """
  const root = page.documentElement;
  const figure = page.querySelector("figure:not([hidden])").getBoundingClientRect();
  const images = [...page.images], recipe = page.getElementById("recipe").getBoundingClientRect();
  const beyond = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".wide")
    && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + ": " + e.textContent.slice(0, 40));
  const table = page.querySelector("table.sortable"), heads = [...table.querySelectorAll("th button")];
  const sorted = (name, clicks) => {
    const column = heads.findIndex(head => head.textContent === name);
    for (let i = 0; i < clicks; i++) heads[column].click();
    return [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  };
  const rising = sorted("loss (nats)", 1), falling = sorted("loss (nats)", 1), texts = sorted("method", 1);
  return {width: root.clientWidth, scroll: root.scrollWidth, beyond, images: images.length,
    broken: images.filter(i => !i.complete || !i.naturalWidth).length, top: recipe.top, height: recipe.height,
    text: parseFloat(getComputedStyle(page.body).fontSize), figure: figure.top,
    paper: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color,
    rising, falling, texts};
"""


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (390, 844, True)])
def test_a_browser_shows_it_whole_at_desk_and_phone_width(page, tmp_path, width, height, dark):
    seen = browse(page, tmp_path, MEASURE, width, height, dark)
    assert seen["width"] == width
    assert seen["scroll"] <= width, seen["beyond"]
    assert seen["beyond"] == []
    assert (seen["images"] >= 12, seen["broken"]) == (True, 0)
    assert 0 < seen["top"] < height / 2 and seen["top"] < seen["figure"]
    assert seen["height"] > 200
    assert seen["text"] >= 15
    paper, ink = (sum(map(int, re.findall(r"\d+", seen[key])[:3])) for key in ("paper", "ink"))
    assert (paper < ink) == dark and abs(paper - ink) > 400
    losses = list(map(float, seen["rising"]))
    assert losses == sorted(losses) and list(map(float, seen["falling"])) == losses[::-1]
    assert seen["texts"] == sorted(seen["texts"])


# Type each text into the field; return what then stands in the box.
ASK = """
  const field = page.getElementById("budget");
  return %s.map(text => {
    field.value = text;
    field.dispatchEvent(new window.Event("input"));
    const told = page.getElementById("told"), [terms, texts] = ["dt", "dd"].map(
      tag => [...page.querySelectorAll("#answer " + tag)].map(each => each.textContent));
    return {shown: page.getElementById("shown").textContent, told: told.hidden ? "" : told.textContent, terms, texts,
      scroll: page.documentElement.scrollWidth, bad: field.getAttribute("aria-invalid")};
  });
"""


def asked(page, tmp_path, texts, width=1280):
    return browse(page, tmp_path, ASK % json.dumps(texts), width)


def printed(folder, budget, capsys):
    """Return the lines of `embedscale recipe`, as names and texts."""
    capsys.readouterr()
    status = main(["recipe", str(folder), budget])
    out = capsys.readouterr()
    if status:
        return [("no recipe", out.err.strip().removeprefix("embedscale: "))]
    return [(line[2:20].rstrip(": "), line[22:]) for line in out.out.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_field_answers_as_the_recipe_verb_does(page, folder, tmp_path, capsys, width):
    budgets = ["3e11", "1e12", "0.00002 EFLOP", "4e14", "2.4e11 FLOP", "0.02 gpu-hours", "0.3 device hours"]
    for budget, seen in zip(budgets, asked(page, tmp_path, budgets, width), strict=True):
        told = dict(enumerate(zip(seen["terms"], seen["texts"], strict=True)))
        lines = printed(folder, seen["shown"], capsys)
        assert [told[i] for i in range(len(lines))] == lines
        assert seen["scroll"] <= width
        wanted, shown = parse_limit(budget), parse_limit(seen["shown"])
        assert bool(wanted.flop) == bool(shown.flop)
        far = abs(math.log((wanted.flop or wanted.gpu_hours) / (shown.flop or shown.gpu_hours)))
        if far > 1e-3:
            assert far < (0.12 if wanted.flop else 0.29)
            assert f"Shown is {seen['shown']}, the nearest" in seen["told"] and budget.split()[0] in seen["told"]
        else:
            assert seen["told"] == ""


def test_the_field_says_what_it_cannot_answer(page, tmp_path):
    refused = ["much", "", "-1e12", "1,5e12", "24 cups", "5 gpu-hours and more", "<b>x</b>", "[/b] $x"]
    beyond = ["3e30", "1e9 gpu-hours"]
    found = dict(zip(beyond + refused, asked(page, tmp_path, beyond + refused), strict=True))
    assert {seen["shown"] for seen in found.values()} == {"3e11 FLOP"}  # the recipe from before stays
    for text in beyond:
        told = found[text]["told"]
        assert re.search(r"This page knows [\d.e-]+ [\w-]+ to .* For your budget: embedscale recipe ", told)
        assert found[text]["bad"] is None
    for text in refused:
        assert found[text]["bad"] == "true"
        assert found[text]["told"].startswith(text or "Type a budget")
    assert "not an amount with a known unit" in found["much"]["told"]
    assert "comma" in found["1,5e12"]["told"] and "out of range" in found["-1e12"]["told"]


def test_the_field_reads_amounts_as_the_command_line_does(page, tmp_path):
    texts = ["1e12", "1E12", " 1e12 flop", "1,000,000,000,000", "1 TFLOP", "1 t flop", "1 trillion FLOP"]
    texts += ["1×10^12 FLOP", "1 000 000 000 000", "1x10^12", "1_000_000_000_000", "0.0116 GFLOP-days"]
    texts += ["1.2.3", "1e", "e12", "1 ZB", "0x10"]
    for text, seen in zip(texts, asked(page, tmp_path, texts), strict=True):
        try:
            wanted = parse_limit(text).flop
        except UserError:
            assert seen["bad"] == "true", text
        else:
            assert seen["bad"] is None, text
            assert parse_limit(seen["shown"]).flop == pytest.approx(wanted, rel=0.12), text


def test_runs_without_hours_say_so(paper_folder, tmp_path):
    import pandas as pd
    from sweeps import fitted

    from analysis import report, study

    table = pd.read_csv(paper_folder / "runs.csv").query("method == 'full'").drop(columns=["gpu_hours", "run"])
    folder = fitted(table, tmp_path / "runs")
    text = report.page(study.load(folder), [], recipe.read(folder)[1])
    assert "these runs do not say how many device-hours they took" in text
    (seen,) = asked(text, tmp_path, ["24 gpu-hours"])
    assert seen["told"] == "These runs do not say how many device-hours they took. Give FLOP."
