"""Every figure of a sweep: its files, its content, and its look, in grey, at its size, and with missing runs."""

import itertools
import re
from dataclasses import replace

import matplotlib.colors
import numpy as np
import own_tables
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sweeps import BUDGETS, by_fraction, fitted, miniature, paper_like

from analysis import study as studies
from analysis.figures import catalogue as figures
from analysis.figures import laws as figures_laws
from analysis.figures import optima as figures_optima
from analysis.figures import runs as figures_runs
from analysis.figures import style
from embedscale.errors import UserError

NAMES = [figure.name for figure in figures.FIGURES]


@pytest.mark.parametrize("number", range(1, 24))
def test_every_figure_of_the_paper_is_among_them(number):
    assert sum(name.startswith(f"figure_{number:02d}_") for name in NAMES) == 1


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_off_and_axes_have_names(drawn, name):
    figure = drawn[name].figure
    with style.style():
        FigureCanvasAgg(figure).draw()
    words = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    for artist in [*figure.legends, *(text for text in words if text.get_text())]:
        box = artist.get_window_extent()
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, artist
        assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, artist
    for first, second in itertools.combinations([*figure.legends, *(text for text in words if text.get_text())], 2):
        assert not first.get_window_extent().padded(-1).overlaps(second.get_window_extent().padded(-1)), (first, second)
    assert any(axes.get_xlabel() for axes in figure.axes)
    assert any(axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize("name", NAMES)
def test_each_figure_has_a_table_and_a_caption(drawn, name):
    assert len(drawn[name].rows)
    assert drawn[name].caption.endswith(".")


def test_tables_hold_the_values_of_the_fits(drawn, study):
    optima = study.fits.methods["full"].optima
    rows = drawn["figure_01_frontier"].rows
    full = rows[rows["method"] == "full"]
    assert full["loss"].tolist() == [row.loss for row in optima]
    assert (full["low"] < full["loss"]).all() and (full["loss"] < full["high"]).all()
    bias = rows[(rows["method"] == "bias") & (rows["budget_flop"] == BUDGETS[-1])].iloc[0]
    assert bias["state"] != "interior" and bias["why"]
    profiles = drawn["figure_02_isoflop"].rows
    found = profiles[(profiles["method"] == "full") & (profiles["state"] == "optimum")]
    assert found["n_parameters"].tolist() == [row.n_opt for row in optima]
    ranks = drawn["figure_04_isoflop"].rows
    assert set(ranks[ranks["method"] == "lora"]["choice"]) <= {"8", "32", "512", ""}


def test_a_table_names_the_runs_left_out(drawn):
    rows = drawn["figure_02_isoflop"].rows
    lost = rows[rows["state"] == "diverged"]
    assert lost[["n_parameters", "budget_flop"]].to_numpy().tolist() == [[302_311_424, 6e15]]


def test_edges_are_hollow_and_interior_optima_are_not(drawn, study):
    axes = drawn["figure_01_frontier"].figure.axes[0]
    look = style.method_style("bias", study.methods)
    filled = {}
    for line in axes.get_lines():
        if line.get_marker() == look["marker"] and len(line.get_xdata()) == 1:
            face = matplotlib.colors.to_hex(line.get_markerfacecolor())
            filled[float(line.get_xdata()[0])] = face != "#ffffff"
    states = {row.budget_flop: row.state == "interior" for row in study.fits.methods["bias"].optima}
    assert filled == states
    assert not all(states.values())


@pytest.mark.slow
def test_captions_name_what_is_drawn_and_what_is_not(fractions, tmp_path):
    """Freezing at six fractions has a bar each; fractions that differ with the size, as LoRA's do, have none."""
    different = studies.load(fitted(by_fraction(shift=0.01), tmp_path))
    for found in (fractions, different):
        for draw in (figures_laws.fraction_trend, figures_laws.coefficient_trend):
            with style.style():
                drawn = draw(found)
            axes, values = drawn.figure.axes[0], drawn.rows["part"]
            low, high = axes.get_ylim()
            outside = int(((values < low) | (values > high)).sum())
            told = re.search(r"(\d+) of the (\d+) points lie outside", drawn.caption)
            assert (tuple(map(int, told.groups())) if told else (0, len(values))) == (outside, len(values))
            if draw is figures_laws.fraction_trend:
                bars = any(line.get_marker() == "_" for line in axes.get_lines())
                assert bars == ("bars: medians" in drawn.caption) == (found is fractions)


def luminance(color) -> float:
    red, green, blue = matplotlib.colors.to_rgb(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_differ_in_grey(study):
    budgets = [style.budget_style(budget, study) for budget in study.budgets]
    grey = [luminance(look["color"]) for look in budgets]
    assert grey == sorted(grey, reverse=True)
    assert min(-np.diff(grey)) > 0.05
    assert len({look["marker"] for look in budgets}) == len(budgets)
    methods = [style.method_style(name, study.methods) for name in study.methods]
    for key in ("color", "marker", "linestyle"):
        assert len({look[key] for look in methods}) == len(methods)


def test_a_budget_has_one_colour_in_all_figures(drawn, study):
    wanted = {style.budget_style(budget, study)["marker"]: style.budget_style(budget, study)["color"]
              for budget in study.budgets}  # fmt: skip
    for name in ("figure_02_isoflop", "figure_03_fraction", "figure_04_isoflop", "figure_05_rank", "figure_08_score",
                 "figure_09_score", "figure_10_score", "figure_11_score", "figure_15_score"):  # fmt: skip
        (legend,) = drawn[name].figure.legends
        marks = (line for line in legend.get_lines() if line.get_color() != style.GREY)
        entries = {line.get_marker(): line.get_color() for line in marks}
        assert entries and all(wanted[marker] == color for marker, color in entries.items())


@pytest.mark.parametrize(("of_loss", "of_score"), [("03_fraction", "09_score"), ("05_rank", "11_score")])
def test_scores_that_follow_the_loss_give_the_same_choice(drawn, of_loss, of_score):
    losses, scores = (drawn[f"figure_{name}"].rows for name in (of_loss, of_score))
    losses = losses[losses["state"] == ""]
    cells = (
        losses.groupby(["budget_flop", "n_parameters"])["loss"].idxmin(),
        scores.groupby(["budget_flop", "n_parameters"])["score"].idxmax(),
    )
    column = scores.columns[2]
    assert list(losses.loc[cells[0], column]) == list(scores.loc[cells[1], column])
    np.testing.assert_allclose(scores["score"], 0.8 - 0.1 * np.log(losses["loss"]), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_sweep_with_missing_runs_leaves_out_figures_with_a_reason(seed, tmp_path):
    table = paper_like(seed=seed).sample(frac=[0.3, 0.1][seed], random_state=seed)
    if seed == 1:
        table = table.drop(columns=["steps", "backbone"])
    study = studies.load(fitted(table, tmp_path))
    told = 0
    for figure in figures.FIGURES:
        try:
            with style.style():
                FigureCanvasAgg(figure.draw(study).figure).draw()
        except style.NotDrawn as reason:
            assert str(reason), figure.name
            told += 1
    assert told >= 5  # at least those of scores, curves and the second sweep


def test_the_same_runs_give_the_same_files(study, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with style.style():
            figures.save(figures_optima.frontier(study), tmp_path / name / "figure_01_frontier")
    for ending in ("png", "pdf", "csv"):
        first, second = ((tmp_path / name / f"figure_01_frontier.{ending}").read_bytes() for name in ("a", "b"))
        assert first == second
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        figures.write(study, tmp_path / "taken")


def test_run_directories_give_curves_and_scores(tmp_path, capsys):
    folder = miniature(tmp_path / "runs")
    assert own_tables.fit(folder) == 0
    study = studies.load(folder)
    assert set(study.curves["run"]) == set(study.table["run"])
    assert study.curves["loss"].notna().sum() == 5 * len(study.table)
    assert len(study.scores) == len(study.table)
    with style.style():
        rows = figures_runs.score_and_loss(study).rows
    assert len(rows) == len(study.table)
    moved = folder.rename(tmp_path / "moved")
    assert studies.load(moved).curves.equals(study.curves)
    folder = moved
    (folder / "runs.csv").unlink()
    with pytest.raises(UserError, match="runs.csv: does not exist; embedscale fit writes it"):
        studies.load(folder)


def test_hours_shows_the_best_run_of_each_budget_and_says_why_it_is_missing(study, tmp_path):
    budget = study.table["budget_flop"]
    slow = np.where(budget == budget.min(), 1e3, 1.0)  # runs that were on a slow device
    timed = study.table.assign(gpu_hours=slow * budget / 1e15)
    found = figures.draw(replace(study, table=timed), "loss_hours")
    best = timed.groupby(["method", "budget_flop"])["loss"].min()
    assert found.rows.set_index(["method", "budget_flop"])["loss"].to_dict() == best.to_dict()
    lines = {line.get_label(): line for line in found.figure.axes[0].get_lines()}
    assert set(lines) == {style.label(method) for method in study.methods}
    for method in study.methods:
        rows = found.rows[found.rows["method"] == method]
        assert lines[style.label(method)].get_xydata().tolist() == rows[["gpu_hours", "loss"]].to_numpy().tolist()
        assert rows["gpu_hours"].is_monotonic_increasing and not rows["budget_flop"].is_monotonic_increasing
    for table in (timed.assign(gpu_hours=np.nan), timed.drop(columns="gpu_hours")):
        with pytest.raises(style.NotDrawn, match="device-hours"):
            figures.draw(replace(study, table=table), "loss_hours")
