"""The figures in the browser: a method can be switched off, a mark says which run it is, and a name is only text."""

import json

import pytest
from browser import browse, needed
from sweeps import BUDGETS, fitted, paper_like

from embedscale.cli import main

pytestmark = needed

# Move the mouse to a mark of a plot.
POINT = """
  async function point(plot, trace, place) {
    const {x, y} = plot.data[trace], {xaxis, yaxis} = plot._fullLayout, layer = plot.querySelector(".nsewdrag");
    const box = layer.getBoundingClientRect();
    const [clientX, clientY] = [box.left + xaxis.d2p(x[place]), box.top + yaxis.d2p(y[place])];
    layer.dispatchEvent(new window.MouseEvent("mousemove", {bubbles: true, clientX, clientY}));
    await new Promise(done => setTimeout(done, 200));
  }
"""
# What each figure shows: the texts of its marks.
SHOWN = """
  const figures = () => Object.fromEntries([...page.querySelectorAll("figure.live")].map(figure => [
    figure.id, {hidden: figure.hidden, width: figure.querySelector(".plot").getBoundingClientRect().width,
      marks: (figure.querySelector(".plot").data ?? []).flatMap(trace => trace.hovertext ?? [])}]));
  const press = (kind, name) => [...page.querySelectorAll(`#legend-${kind} button`)].find(
    button => button.textContent.endsWith(name)).click();
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_methods_and_budgets_are_switched_off_by_the_legend(page, tmp_path, width):
    script = """
      const root = page.documentElement, seen = {whole: figures()};
      [seen.text, seen.scroll] = [page.body.clientWidth, root.scrollWidth];
      press("method", "LoRA");
      seen.without = figures();
      press("budget", "2e11");
      seen.less = figures();
      press("method", "LoRA");
      press("budget", "2e11");
      seen.again = figures();
      press("method", "all");
      seen.none = figures();
      seen.pressed = [...page.querySelectorAll("#legend-method button")].map(each => each.ariaPressed);
      const displays = which => [...page.querySelectorAll(which)].map(each => window.getComputedStyle(each).display);
      [seen.replaced, seen.others] = [displays("figure.replaced"), displays(".figures figure:not(.replaced)")];
      seen.first = page.querySelector("figure").id;
      return seen;
    """
    seen = browse(page, tmp_path, SHOWN + script, width)
    assert list(seen["whole"]) == ["live-size", "live-profiles", "live-frontier", "live-curves"]
    assert seen["first"] == "live-size" and seen["scroll"] <= width
    for name, whole in seen["whole"].items():
        assert not whole["hidden"] and whole["width"] > 0.9 * seen["text"] - 40  # as wide as the text
        of_lora = [text for text in whole["marks"] if "_lora" in text or text.startswith("LoRA")]
        assert of_lora, name
        without = seen["without"][name]["marks"]
        assert sorted(without + of_lora) == sorted(whole["marks"])
        assert not any("_2e+11_" in text or "2e11 FLOP" in text for text in seen["less"][name]["marks"])
        assert len(seen["less"][name]["marks"]) < len(without)
        assert seen["again"][name]["marks"] == whole["marks"]
        assert seen["none"][name]["marks"] == []
    assert set(seen["pressed"]) == {"false"}
    assert set(seen["replaced"]) == {"none"} and set(seen["others"]) == {"block"}


def test_pointing_at_a_run_says_its_settings_and_folder(page, folder, tmp_path):
    script = """
      const figure = page.getElementById("live-profiles"), plot = figure.querySelector(".plot");
      const trace = plot.data.findIndex(each => each.customdata?.length), said = [];
      page.querySelector("table.sortable th button").click();  // a sorted table changes nothing
      for (let i = 0; i < plot.data[trace].customdata.length; i++) {
        await point(plot, trace, i);
        const at = plot._hoverdata?.[0];
        if (at?.curveNumber !== trace || at.pointNumber !== i) continue;  // another mark lies on this one
        const told = figure.querySelector(".pointed"), link = told.querySelector("a");
        said.push([link?.textContent, link?.getAttribute("href"), told.textContent, plot.data[trace].y[i]]);
      }
      return said;
    """
    said = browse(page, tmp_path, POINT + script)
    assert len(said) > 3
    for run, address, told, loss in said:
        record = json.loads((folder / run / "record.json").read_text())
        assert record["loss"] == pytest.approx(loss, rel=1e-4)
        assert address == f"./{run.replace('+', '%2B')}/" and f"folder ./{run}/" in told
        for text in (
            f"method {record['method']}",
            f"backbone {record['backbone']}",
            "loss (nats)",
            "all runs: learning rate",
        ):
            assert text in told


HOSTILE = {
    "full": "x$\\undefined{$y",
    "lora": "</script><script>document.title='gone'</script>",
    "bias": "[/b] <b>b</b> %{y} &lt; <a href=x>",
    "freeze": "<!--<script>{{ 7 * 7 }}",
}


def test_any_name_is_text(tmp_path):
    table = paper_like().query(f"budget_flop < {BUDGETS[3]}")
    table = table.assign(method=table["method"].map(HOSTILE), run=[f"{HOSTILE['lora']} {i}" for i in range(len(table))])
    folder = fitted(table, tmp_path / "runs")
    assert main(["report", str(folder)]) == 0
    script = """
      const plot = page.querySelector("#live-frontier .plot"), pointed = page.querySelector("#live-frontier .pointed");
      await point(plot, 0, 0);
      const label = plot.querySelector(".hoverlayer")?.textContent;
      await point(plot, plot.data.length - 1, 0);
      return {title: page.title, scripts: page.querySelectorAll("script").length, told: pointed.textContent, label,
        links: pointed.querySelectorAll("a").length, bold: page.querySelectorAll("svg [style*='bold']").length,
        optimum: plot.querySelector(".hoverlayer").textContent, answer: page.getElementById("answer").textContent,
        methods: [...page.querySelectorAll("#legend-method button")].map(each => each.textContent.slice(1))};
    """
    seen = browse((folder / "report.html").read_text(), tmp_path, POINT + script)
    assert seen["title"].startswith("embedscale: ")
    assert (seen["scripts"], seen["links"], seen["bold"]) == (4, 0, 0)
    assert seen["told"].startswith(f"{HOSTILE['lora']} ") and any(name in seen["told"] for name in HOSTILE.values())
    assert seen["label"].startswith("</script><script>do")
    assert {HOSTILE[name] for name in ("full", "bias", "freeze")} < set(seen["methods"])  # a longer name is shortened
