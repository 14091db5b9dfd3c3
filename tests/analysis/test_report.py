"""The report: the verb writes it, it needs no other file, and its numbers are those of the fits."""

import html
import io
import json
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from browser import own
from sweeps import fitted, paper_like

from analysis import recipe, report, study
from analysis.fits import State
from embedscale.adaptive.choices import Choices, ChosenRun, Round
from embedscale.cli import main


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.targets, self.ids, self.open = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [values[key] for key in ("src", "srcset", "data") if key in values]
        self.targets += [values["href"]] if "href" in values else []
        self.ids |= {values["id"]} if "id" in values else set()
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def paper_report(paper_folder, tmp_path_factory) -> tuple[Path, str]:
    """Write the report of a sweep like the paper's; return its folder and what the terminal showed."""
    out, told = tmp_path_factory.mktemp("report"), io.StringIO()
    with redirect_stdout(told):
        assert main(["report", str(paper_folder), "--out", str(out)]) == 0
    return out, told.getvalue()


def test_the_page_needs_no_other_file(page, folder):
    links = Links()
    links.feed(page)
    assert links.open == []
    assert len(links.sources) >= 12
    assert all(source.startswith("data:image/png;base64,") for source in links.sources)
    inside = [target for target in links.targets if target[0] == "#"]
    assert inside and all(target[1:] in links.ids for target in inside)
    files = [target for target in links.targets if target[0] != "#"]
    assert files and all((folder / unquote(target)).exists() for target in files)
    assert "http" not in re.sub(r"base64,[^\"]*", "", own(page))
    assert len(page) < 5_000_000


def test_the_recipe_comes_first_and_everything_else_follows(page):
    order = [
        'What to train for <span id="shown">3e11 FLOP<',
        "Every budget",
        'id="figures"',
        'id="laws"',
        'id="runs"',
        'id="left-out"',
    ]
    places = [
        page.index(each)
        for each in [*order, 'id="notes"', 'id="settings"', 'id="costs"', 'id="checklist"', 'id="glossary"']
    ]
    assert places == sorted(places)
    for text in ("a miniature: models of 6,592 to 84,912 parameters", "Figures that are not drawn", "device-hours"):
        assert text in page
    # One notation of budgets, 3e11, except in the names of these runs.
    assert "e+" not in re.sub(r'base64,[^"]*|tiny-[^<" ]*|<script.*?</script>', "", own(page), flags=re.DOTALL)
    checklist = page[page.index('id="checklist"') :]
    assert "abc" in checklist  # the commit that the records name


def test_numbers_on_the_page_equal_those_of_the_fits(paper_report, paper_folder):
    text = html.unescape(own((paper_report[0] / "report.html").read_text()))
    fits = json.loads((paper_folder / "fits.json").read_text())
    law = fits["methods"]["full"]["power_laws"]["n_opt"]
    low, high = law["exponent_interval"]
    decimals = 1 - math.floor(math.log10(high - low))  # the second digit of the interval's width
    row = [f"{value:.{decimals}f}" for value in (law["exponent"], low, high)]
    assert "<td>{}</td><td>{} … {}</td>".format(*row) in text
    assert "1 diverged" in text
    assert "miniature" not in text
    assert "not recorded by these runs" in text[text.index('id="checklist"') :]


def test_texts_of_the_runs_are_never_markup(tmp_path):
    table = paper_like().query("method == 'full'").assign(method="<script>alert(1)</script>")
    folder = fitted(table, tmp_path)
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    text = own((tmp_path / "out" / "report.html").read_text())
    assert text.count("<script") == 4 and "<script>alert" not in text  # data, plotly.js, and the code of the page
    assert "&lt;script&gt;" in text
    assert (tmp_path / "out" / "figures" / "isoflop_other_1.png").exists()


class Cells(HTMLParser):
    """The rows of the table of runs, each cell a text and the address that it leads to."""

    def __init__(self, page: str):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.inside = self.inside or values.get("class") == "sortable"
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("td", "th"):
            self.rows[-1].append(["", ""])
        if self.inside and tag == "a":
            self.rows[-1][-1][1] = values["href"]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "table"

    def handle_data(self, data):
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1][0] += data


def test_every_run_has_a_row_that_leads_to_its_directory(page, folder):
    head, *rows = Cells(page).rows
    names = [text for text, _ in head]
    records = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/record.json")}
    assert {row[0][0] for row in rows} == set(records)
    for row in rows:
        told = dict(zip(names, (text for text, _ in row), strict=True))
        record = records[told["run"]]
        assert (folder / unquote(row[0][1])).resolve() == (folder / told["run"]).resolve()
        for name, key in (("loss (nats)", "loss"), ("recall@1", "recall_at_1"), ("recall@10", "recall_at_10")):
            assert float(told[name]) == pytest.approx(record[key], rel=1e-4)
        assert (told["method"], told["backbone"], told["state"]) == (record["method"], record["backbone"], "used")


def test_runs_that_are_left_out_are_in_the_table_with_the_reason(paper_report, paper_folder):
    rows = Cells((paper_report[0] / "report.html").read_text()).rows
    assert len(rows) == 1 + len(study.load(paper_folder).table) + 1
    assert rows[-1][-1][0] == "left out, diverged"
    assert not any(address for row in rows for _, address in row)  # a table has no run directories


def test_the_recipes_box_says_what_it_rests_on(page):
    box = html.unescape(re.sub(r"<[^>]*>", " ", page[page.index('id="recipe"') : page.index("Every budget")]))
    assert re.search(r"rests on\s+\d optim(um|a) between sizes, at 3 budgets; one seed a setting", box)
    assert re.search(r"chance level\s+4.852 nats: the ln of 128 candidates", box)  # 127 negatives and the positive
    assert re.search(r"nearest run\s+tiny-\w+_full", box)
    assert re.search(r"measured there\s+loss [\d.]+, recall@1 0.5, recall@10 0.8", box)


def test_the_glossary_has_a_word_for_every_state_and_sign(page):
    links = Links()
    links.feed(page)
    assert {f"word-{state.replace(' ', '-')}" for state in get_args(State)} <= links.ids
    words = page[page.index('id="glossary"') :]
    for word in ("N*, D*, L*", "edge", "interior", "chance level", "recall@1", "not fixed", "extrapolates"):
        assert f">{word}" in words, word


def test_many_pairs_that_noise_does_not_separate_are_one_sentence(tmp_path, capsys):
    table = paper_like(noise=0.02).query("method == 'full'")
    rng = np.random.default_rng(0)
    same = [
        table.assign(method=name, loss=table["loss"] * np.exp(0.02 * rng.standard_normal(len(table))))
        for name in "abcde"
    ]
    folder = fitted(pd.concat(same), tmp_path)
    found = study.load(folder)
    alike = [each for each in found.fits.frontier.comparisons if each.distinguishable is False]
    assert len(alike) > 30
    text = report.page(found, [], recipe.read(folder)[1])
    assert text.count("ot distinguishable within the noise: ") == 2  # the note, and the sentence below the table
    assert sum("distinguishable" in note for note in found.fits.notes) == 1


def test_notes_stand_in_order_of_weight(page, folder):
    notes = study.load(folder).fits.notes
    places = [next((i for i, note in enumerate(notes) if word in note), None) for word in ("no optimum", "do not fix")]
    assert None not in places and places == sorted(places)
    assert not any("needs at least" in note for note in notes[: places[0]])


def test_the_terminal_tells_in_one_sentence_what_is_not_drawn(paper_report):
    folder, out = paper_report
    (line,) = [line for line in out.splitlines() if "not drawn" in line]
    assert re.search(r"not drawn, because .*: \d+ figures; report.html says what each needs", line)
    assert out.endswith(f"written: {folder / 'report.html'}; open it in a browser and type a budget\n")
    text = (folder / "report.html").read_text()
    assert '<form id="ask" hidden>' in text and '<figure id="live-size" class="live" hidden>' in text  # without scripts
    assert "because no run has scores" in text[text.index("Figures that are not drawn") :]


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


def test_an_adaptive_sweep_says_why_each_run_was_chosen(folder, page):
    assert "Why these runs" not in page
    rounds = (
        Round((ChosenRun("run-a", "lowers <the> variance", 1e12),), 0),
        Round((ChosenRun("run-b", "b", 2e12),), 1),
    )
    found = replace(study.load(folder), choices=Choices(3e11, 1e13, "FLOP", 1, rounds, "the money is spent"))
    text = report.page(found, [], recipe.read(folder)[1])
    assert "Why these runs" in text and "lowers &lt;the&gt; variance" in text and "the money is spent" in text
    assert text.index("run-a") < text.index("run-b")
