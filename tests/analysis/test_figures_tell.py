"""How figures tell what they show: names as text, legends, labels, ticks, what is exact, and what is not drawn."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from sweeps import BUDGETS, fitted, paper_like

from analysis import study as studies
from analysis.figures import catalogue as figures
from analysis.figures import optima as figures_optima
from analysis.figures import style
from embedscale.cli import main


def of_others(*names: str) -> pd.DataFrame:
    """The paper-like runs of full fine-tuning, under each of these names, each a little better than the one before."""
    table = paper_like().query("method == 'full'").drop(columns=["trainable_fraction"])
    return pd.concat([table.assign(method=name, loss=table["loss"] * 0.97**i) for i, name in enumerate(names)])


@pytest.mark.parametrize("names", [("sft",), ("A", "B")])
def test_methods_of_other_names_have_what_the_paper_draws_for_its_own(names, tmp_path):
    study = studies.load(fitted(of_others(*names), tmp_path))
    for number, name in enumerate(names, 1):
        for kind in ("isoflop", "size", "held_out"):
            drawn = figures.draw(study, f"{kind}_other_{number}")
            assert set(drawn.rows["method"]) == {name}
        optima = study.fits.methods[name].optima
        assert figures.draw(study, f"size_other_{number}").rows["n_parameters"].tolist() == [
            row.n_opt if row.interior else row.best.n_parameters for row in optima
        ]
    looks = [tuple(style.method_style(name, study.methods).values()) for name in names]
    assert len(set(looks)) == len(names)
    legend = figures.draw(study, "figure_01_frontier").figure.legends[0]
    assert {text.get_text() for text in legend.get_texts()} - {"optimal frontier", figures_optima.NO_OPTIMUM} == {
        *names
    }
    with pytest.raises(style.NotDrawn, match="no run of full fine-tuning or block freezing"):
        figures.draw(study, "figure_02_isoflop")


def test_a_table_without_methods_is_full_fine_tuning(tmp_path):
    study = studies.load(fitted(of_others("x").drop(columns="method"), tmp_path))
    for name in ("figure_01_frontier", "figure_02_isoflop", "figure_06_size", "figure_07_held_out"):
        drawn = figures.draw(study, name)
        assert set(drawn.rows["method"]) == {"full"}
    (figure,) = [each for each in figures.FIGURES if each.name == "figure_06_size"]
    assert figure.heading(drawn=figures.draw(study, "figure_06_size")) == "6. Optimal size: full fine-tuning"


def words(figure) -> list[str]:
    """Every text of a figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


MARKUP = ("x$\\undefined{$y", "[/b]", "<script>alert(1)</script>", "_hidden", "a" * 200, "line\nbreak", "数")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_is_text_in_every_figure(tmp_path):
    table = of_others(*MARKUP[:2])
    table["backbone"] = table["backbone"].map(dict(zip(table["backbone"].unique(), MARKUP, strict=False)))
    study = studies.load(fitted(table, tmp_path))
    seen = []
    for figure in figures.figures_of(study):
        try:
            drawn = figures.draw(study, figure.name)
        except style.NotDrawn:
            continue
        with style.style():
            figures.save(drawn, tmp_path / figure.name)
        seen += words(drawn.figure)
    for name in MARKUP[:4]:
        assert any(name in text for text in seen), name
    assert max(map(len, "\n".join(seen).splitlines())) < 100


@pytest.mark.parametrize("name", [figure.name for figure in figures.FIGURES])
def test_a_print_can_be_read(drawn, name):
    """A column is 3.3 inches, a page 6.9: the figure is as wide, so its points are the reader's points."""
    figure = drawn[name].figure
    with style.style():
        FigureCanvasAgg(figure).draw()
    assert figure.get_size_inches()[0] in (3.3, 6.9)
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 6.5
    assert not [text for text in texts if re.search(r"e\+|\$|10\^", text.get_text())]  # one notation: 6.4e12
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            assert 2 <= sum(low <= tick <= high for tick in axis.get_majorticklocs()) <= 9, axis
        inside = axes.get_window_extent()
        # The halo and the space above and below a digit do not count.
        boxes = [
            text.get_window_extent().padded(-1)
            for text in axes.texts
            if inside.contains(*text.get_window_extent().get_points().mean(0))
        ]
        marks = [
            place
            for line in axes.get_lines()
            if line.get_marker() not in ("None", "", None)
            for place in axes.transData.transform(line.get_xydata())
        ]
        assert not [(box, place) for box in boxes for place in marks if box.contains(*place)]
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def quickstart_like() -> pd.DataFrame:
    """Three sizes at three budgets of full fine-tuning, the lowest budget's best at an end; others at one budget."""
    table = paper_like(noise=0.0)
    sizes = sorted(table["n_parameters"].unique())[1:6:2]
    table = table[table["n_parameters"].isin(sizes) & table["rank"].isin([np.nan, 8])]
    table = table[table["trainable_fraction"].ne(0.5) & table["budget_flop"].isin(BUDGETS[1:4])]
    return table[(table["method"] == "full") | (table["budget_flop"] == BUDGETS[2])]


def test_legends_name_only_what_is_drawn(tmp_path):
    study = studies.load(fitted(quickstart_like(), tmp_path))
    for figure in figures.figures_of(study):
        try:
            drawn = figures.draw(study, figure.name)
        except style.NotDrawn:
            continue
        (legend,) = drawn.figure.legends
        named = {text.get_text() for text in legend.get_texts()}
        if "method" in drawn.rows and figure.name in ("figure_01_frontier", "figure_06_size", "loss_hours"):
            methods = {style.label(method) for method in drawn.rows["method"].unique()}
            assert {style.label(method) for method in study.methods} & named == methods, figure.name
        if figure.name.endswith("isoflop"):
            budgets = {f"{budget:.3g}".replace("e+", "e") for budget in drawn.rows["budget_flop"].unique()}
            assert {name for name in named if re.fullmatch(r"[\d.]+e\d+", name)} == budgets, figure.name
        lines = [line for axes in drawn.figure.axes for line in axes.get_lines()]
        dotted = [line for line in lines if line.get_linestyle() == ":" and line.get_color() == style.GREY]
        assert ("optimum by the joint law" in named) == (figure.name == "figure_06_size" and bool(dotted))


def test_one_value_and_one_budget_show_nothing_and_are_not_drawn(tmp_path):
    study = studies.load(fitted(quickstart_like(), tmp_path))
    for name, why in (
        ("figure_03_fraction", "no size of block freezing has a loss at two values of the share of active blocks"),
        ("figure_05_rank", "no size of LoRA has a loss at two values of the LoRA rank"),
        ("figure_13_size", "block freezing and bias-only ran at one budget"),
    ):
        with pytest.raises(style.NotDrawn, match=why):
            figures.draw(study, name)
    assert set(figures.draw(study, "figure_06_size").rows["method"]) == {"full"}  # LoRA ran at one budget


def test_a_parabola_through_three_points_is_marked_as_exact(tmp_path):
    study = studies.load(fitted(quickstart_like(), tmp_path / "exact"))
    found = figures.draw(study, "figure_02_isoflop")
    stars = found.rows[found.rows["state"] == "optimum"]
    assert len(stars) and set(stars["points"]) == {3}
    assert "three points: exact, no residual" in words(found.figure)
    assert "exactly three points is exact" in found.caption
    assert {line.get_linestyle() for line in found.figure.axes[0].get_lines()} >= {"--"}
    residual = figures.draw(studies.load(fitted(dense(2), tmp_path / "dense")), "figure_02_isoflop")
    assert (residual.rows["points"].dropna() > 3).all()
    assert "three points: exact, no residual" not in words(residual.figure)


def test_coefficients_that_the_data_do_not_fix_are_not_drawn(study):
    fit = study.fits.methods["full"]
    law = fit.joint_laws["chinchilla"]
    assert not law.not_fixed
    free = replace(fit, joint_laws={"chinchilla": replace(law, not_fixed=("E", "A"))})
    only = replace(
        study,
        fits=replace(study.fits, methods={"full": free}),
        table=study.table[study.table["method"] == "full"],
    )
    with pytest.raises(style.NotDrawn, match=r"full fine-tuning: the data do not fix E and A of the law L\(N, D\)"):
        figures.draw(only, "figure_18_data_term")
    with pytest.raises(style.NotDrawn, match="do not fix E and A"):
        figures.draw(only, "figure_20_size_term")
    assert "joint law" not in figures.draw(only, "figure_17_fixed_data").caption
    assert "optimum by the joint law" not in words(figures.draw(only, "figure_06_size").figure)
    with_law = replace(only, fits=replace(study.fits, methods={"full": replace(free, joint_laws={"chinchilla": law})}))
    assert "joint law" in figures.draw(with_law, "figure_17_fixed_data").caption


def test_a_law_through_two_optima_is_drawn_between_them_only(tmp_path):
    table = paper_like(noise=0.0).query("method == 'full'")
    table = table[table["budget_flop"].isin(BUDGETS[1:4])]
    low = (table["budget_flop"] == BUDGETS[1]) & (table["n_parameters"] < 3e7)
    study = studies.load(fitted(table[~low], tmp_path))
    law = study.fits.methods["full"].power_laws.n_opt
    inside = [row.budget_flop for row in study.fits.methods["full"].interior]
    assert law.points == len(inside) == 2
    for name in ("figure_01_frontier", "figure_06_size"):
        drawn = figures.draw(study, name)
        assert "Two optima fix the line of full fine-tuning exactly" in drawn.caption
        color = style.method_style("full", study.methods)["color"]
        for line in drawn.figure.axes[0].get_lines():
            if line.get_color() == color and len(line.get_xdata()) > 1:
                assert min(inside) * 0.999 <= min(line.get_xdata()) and max(line.get_xdata()) <= max(inside) * 1.001


def test_prints_have_300_dots_an_inch(study, tmp_path):
    with style.style():
        figures.save(figures_optima.frontier(study), tmp_path / "frontier")
    header = (tmp_path / "frontier.png").read_bytes()[:64]
    assert int.from_bytes(header[16:20]) == 990  # 3.3 inches


def dense(budgets: int) -> pd.DataFrame:
    """Sizes a factor 2 apart at so many budgets."""
    rows = []
    for budget in 1.5e15 * 2.0 ** np.arange(budgets):
        for size in 1e6 * 2.0 ** np.arange(8):
            tokens = budget / 6 / size
            loss = 0.1 + 900 / size**0.45 + 90 / tokens**0.25
            rows.append({"n_parameters": size, "tokens": tokens, "budget_flop": budget, "loss": loss})
    return pd.DataFrame(rows)


def test_a_table_with_one_size_at_each_budget_has_a_page(tmp_path):
    """Sizes crossed with tokens: 20 budgets, none of which has a profile."""
    n, d = (each.ravel() for each in np.meshgrid(2e7 * 1.9 ** np.arange(5), 1e9 * 2.7 ** np.arange(4)))
    table = pd.DataFrame({"method": "full", "n_parameters": n, "tokens": d, "budget_flop": 6 * n * d})
    table["loss"] = 1.8 + 400 / n**0.34 + 400 / d**0.28
    assert main(["report", str(fitted(table, tmp_path))]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "no budget has three sizes" in page and "three sizes at fewer than two budgets" in page


def test_of_very_many_budgets_an_even_selection_is_drawn(tmp_path):
    drawn = figures.draw(studies.load(fitted(dense(13), tmp_path)), "figure_02_isoflop")
    assert drawn.rows["budget_flop"].nunique() == 10
    assert "at an even selection of 10 budgets" in drawn.caption
