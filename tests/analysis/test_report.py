"""The report: the verb writes it, it needs no other file, and a real browser shows it at desk and phone width."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sweeps import fitted, miniature, paper_like

from analysis import recipe, report, study
from embedscale.cli import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return miniature(tmp_path_factory.mktemp("quickstart") / "runs")


@pytest.fixture(scope="module")
def page(folder) -> str:
    """Write the report of a quickstart: run directories, fit, report."""
    assert main(["fit", str(folder), "--bootstrap", "100"]) == 0
    assert main(["report", str(folder), "--budget", "3e11"]) == 0
    return (folder / "report.html").read_text()


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.targets, self.ids, self.open = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [values[key] for key in ("src", "srcset", "data") if key in values]
        self.targets += [values["href"]] if "href" in values else []
        self.ids |= {values["id"]} if "id" in values else set()
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file(page, folder):
    links = Links()
    links.feed(page)
    assert links.open == []
    assert len(links.sources) >= 12
    assert all(source.startswith("data:image/png;base64,") for source in links.sources)
    inside = [target for target in links.targets if target[0] == "#"]
    assert inside and all(target[1:] in links.ids for target in inside)
    files = [target for target in links.targets if target[0] != "#"]
    assert files and all((folder / target).exists() for target in files)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_the_recipe_comes_first_and_everything_else_follows(page):
    order = ["What to train for 3e+11 FLOP", "Every budget", 'id="figures"', 'id="laws"', 'id="left-out"', 'id="notes"']
    places = [page.index(each) for each in [*order, 'id="settings"', 'id="costs"', 'id="checklist"']]
    assert places == sorted(places)
    for text in ("a miniature: models of 6,592 to 84,912 parameters", "Figures that could not be drawn", "GPU-hours"):
        assert text in page
    checklist = page[page.index('id="checklist"') :]
    assert "abc" in checklist  # the commit that the records name


def test_numbers_on_the_page_equal_those_of_the_fits(page, paper_folder):
    text = html.unescape(report.page(study.load(paper_folder), [], recipe.read(paper_folder)[1]))
    fits = json.loads((paper_folder / "fits.json").read_text())
    law = fits["methods"]["full"]["power_laws"]["n_opt"]
    assert f"{law['exponent']:.4g}" in text
    assert f"{law['exponent_interval'][0]:.3g} … {law['exponent_interval'][1]:.3g}" in text
    assert "1 diverged" in text
    assert "miniature" not in text
    assert "not recorded by these runs" in text[text.index('id="checklist"') :]


def test_texts_of_the_runs_are_never_markup(tmp_path):
    table = paper_like().query("method == 'full'").assign(method="<script>alert(1)</script>")
    folder = fitted(table, tmp_path)
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert (tmp_path / "out" / "figures" / "isoflop_other_1.png").exists()


def test_bad_words_are_refused_in_one_line(paper_folder, tmp_path, capsys):
    for words, message in (
        (["--budget", "much"], "budget: 'much' is not an amount with a known unit"),
        (["--compare", str(tmp_path)], "does not exist; write it by embedscale fit RUNS"),
    ):
        assert main(["report", str(paper_folder), *words]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


def test_a_refused_budget_has_a_row_of_full_width(tmp_path):
    """These runs do not record their GPU-hours."""
    table = paper_like().query("method == 'full'").drop(columns="gpu_hours")
    folder = fitted(table, tmp_path)
    text = report.page(study.load(folder), [], recipe.read(folder)[1], ["24 GPU-hours"])
    shown = text[text.index("<h3>Every budget") :]
    shown = shown[: shown.index("</table>")]
    refused, *others = shown.split("<tr>")[2:]
    assert "24 device-hours" in refused and "runs that say how many device-hours they took" in refused
    assert {row.count("<td>") for row in (refused, *others)} == {shown.count("<th>")}


MEASURE = """
<body style="margin:0"><iframe id=f style="width:%dpx;height:%dpx;border:0" srcdoc="%s"></iframe><script>
window.onload = () => {
  const page = document.getElementById("f").contentDocument, root = page.documentElement;
  const images = [...page.images], recipe = page.getElementById("recipe").getBoundingClientRect();
  const beyond = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".wide")
    && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + ": " + e.textContent.slice(0, 40));
  document.title = JSON.stringify({width: root.clientWidth, scroll: root.scrollWidth, beyond, images: images.length,
    broken: images.filter(i => !i.complete || !i.naturalWidth).length, top: recipe.top, height: recipe.height,
    text: parseFloat(getComputedStyle(page.body).fontSize), figure: page.images[0].getBoundingClientRect().top});
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_browser_shows_it_whole_at_desk_and_phone_width(page, tmp_path, width, height):
    # In a frame, because a browser window cannot be as narrow as a phone.
    file = tmp_path / "frame.html"
    file.write_text(MEASURE % (width, height, html.escape(page)))
    found = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--hide-scrollbars", f"--window-size={width},{height}", "--virtual-time-budget=5000"),
            *("--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", found.stdout)[1]))
    assert seen["width"] == width
    assert seen["scroll"] <= width, seen["beyond"]
    assert seen["beyond"] == []
    assert (seen["images"] >= 12, seen["broken"]) == (True, 0)
    assert 0 < seen["top"] < height / 2 and seen["top"] < seen["figure"]
    assert seen["height"] > 200
    assert seen["text"] >= 15
