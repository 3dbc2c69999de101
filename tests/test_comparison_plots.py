"""Plots: they draw what they are given, whatever the names, without warnings, and readable without colour."""

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from synthetic_experiment import Plan, build_experiment

from qwen2vl_sft.comparison import plots
from qwen2vl_sft.comparison.board import against
from qwen2vl_sft.comparison.deployment import EVERY, Price, confidence_table, cost_table
from qwen2vl_sft.comparison.scoreboard import Scoreboard
from qwen2vl_sft.rundir import RunDir


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return build_experiment(tmp_path_factory.mktemp("plots"), Plan(samples=40))


@pytest.fixture(scope="module")
def board(experiment):
    return Scoreboard.from_experiment(experiment)


def drawn(figure) -> list[str]:
    """Every text in a figure, after drawing it with warnings as errors."""
    from matplotlib.text import Text

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def test_heat_map_prints_every_figure_and_the_means(board):
    texts = drawn(plots.heat_map(board.cells, board.means))
    for value in [*board.cells["accuracy"], *board.means["strict"]]:
        assert f"{value:.1f}" in texts
    assert "strict mean" in texts and "c" in texts and any("c: collapsed" in text for text in texts)


def test_heat_map_of_the_original_with_its_refusals():
    board = Scoreboard.from_csv()
    texts = drawn(plots.heat_map(board.cells, board.means))
    assert texts.count("67.8") >= 7 and "r" in texts and "Qwen2-vl-mix" in texts


def test_accuracy_by_step_has_a_panel_a_task_and_the_untuned_dashed(board):
    figure = plots.accuracy_by_step(board.cells)
    drawn(figure)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == board.tasks
    base = board.cells[(board.cells["row"] == "base") & (board.cells["task"] == "digit")]["accuracy"].item()
    level = [line for line in panels[0].lines if np.allclose(line.get_ydata(), base)]
    assert len(level) == 1 and level[0].get_linestyle() == "--"
    mix = board.cells[(board.cells["model"] == "mix") & (board.cells["task"] == "digit")]
    assert any(np.allclose(line.get_ydata(), mix["accuracy"]) for line in panels[0].lines if len(line.get_ydata()) == 4)
    assert len(panels[0].collections) == 2  # an interval band a run


def test_a_row_without_answers_is_not_drawn_as_zero():
    board = Scoreboard.from_csv()
    figure = plots.accuracy_by_step(board.cells)
    texts = drawn(figure)
    assert texts.count("gpt4o: no answer") == 2


def test_mean_by_step_marks_the_best_step_of_each_run(board):
    texts = drawn(plots.mean_by_step(board.means))
    for run in ("mix", "full"):
        best = board.means[board.means["model"] == run]["strict"].max()
        assert f"{best:.1f}" in texts
    assert any("strict" in text for text in texts)
    assert any("common support" in text for text in drawn(plots.mean_by_step(board.means, "common")))


def test_loss_curves_hold_the_logged_values(experiment):
    losses = pd.concat([RunDir(experiment / run).metrics().assign(model=run) for run in ("mix", "full")])
    figure = plots.loss_curves(losses)
    drawn(figure)
    line = figure.axes[0].lines[0]
    assert np.allclose(line.get_ydata(), losses[losses["model"] == "mix"]["loss"])
    assert "nothing was logged" in drawn(plots.loss_curves(pd.DataFrame({"model": [], "step": [], "loss": []})))


def renamed(board: Scoreboard, task: str, model: str) -> pd.DataFrame:
    cells = board.cells.copy()
    return cells.assign(task=cells["task"].replace("digit", task), model=cells["model"].replace("mix", model))


@pytest.mark.parametrize("name", ["违规信息检测_图片_182501", "a$b_{c}^d$", "x" * 90, "line\nbreak\t\x1b", "<img onerror=x>", "\U0001f52b emoji"])
def test_any_name_can_be_drawn(board, name):
    cells = renamed(board, name, name)
    for figure in (plots.heat_map(cells), plots.accuracy_by_step(cells), plots.mean_by_step(board.means.assign(model=name))):
        drawn(figure)


def test_chinese_falls_back_visibly_without_a_cjk_font(board, monkeypatch):
    monkeypatch.setattr(plots, "fonts", lambda: ("DejaVu Sans",))
    texts = drawn(plots.heat_map(renamed(board, "违规_1", "mix")))
    assert "1: □□_1" in texts
    assert any("install a CJK font" in text for text in texts)


def test_chinese_is_drawn_where_a_font_is_installed():
    if len(plots.fonts()) == 1:
        pytest.skip("no CJK font installed (apt-get install fonts-noto-cjk)")
    assert plots.drawable(["违规信息"]) == ["违规信息"]


def test_missing_cells_and_tables_without_steps(board):
    some = board.cells[~((board.cells["row"] == "base") & (board.cells["task"] == "digit"))]
    assert "–" in drawn(plots.heat_map(some))
    levels = board.cells[board.cells["step"].isna()]
    drawn(plots.accuracy_by_step(levels))
    drawn(plots.mean_by_step(board.means[board.means["step"].isna()]))
    drawn(plots.heat_map(board.cells[board.cells["task"] == "digit"]))


def luminance(colour) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_the_heat_map_survives_a_grey_printer_and_its_figures_can_be_read():
    shades = [luminance(plots.shade(value)) for value in range(0, 101, 5)]
    assert all(a > b for a, b in itertools.pairwise(shades))
    for value in range(101):
        ground, ink = luminance(plots.shade(value)), 0.0 if plots.ink_on(plots.shade(value)) == "#000000" else 1.0
        high, low = max(ground, ink), min(ground, ink)
        assert (high + 0.05) / (low + 0.05) >= 3.6


MACHADO = {  # severity 1.0; Machado, Oliveira & Fernandes 2009, IEEE TVCG 15:1291, on linear RGB
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
}


def apart(first: str, second: str) -> float:
    """The least colour difference (CIEDE2000) of two colours over the three kinds of sight; 2.3 is just noticeable."""
    from matplotlib.colors import to_rgb
    from skimage.color import deltaE_ciede2000, rgb2lab

    def seen(colour: str, sight: np.ndarray) -> np.ndarray:
        c = np.array(to_rgb(colour))
        linear = np.clip(sight @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4), 0, 1)
        return rgb2lab(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).reshape(1, 1, 3))

    return min(float(deltaE_ciede2000(seen(first, sight), seen(second, sight)).item()) for sight in MACHADO.values())


@pytest.mark.parametrize("palette", ["runs", "levels", "verdicts"])
def test_colours_used_together_are_told_apart_by_the_colour_blind(palette):
    colours = {"runs": plots.COLOURS, "levels": [*(colour for colour, _ in plots.REFERENCES.values()), *plots.OTHERS], "verdicts": list(plots.VERDICT_COLOURS.values())}[palette]
    assert {pair: round(apart(*pair), 1) for pair in itertools.combinations(colours, 2) if apart(*pair) < 10} == {}
    assert apart("#FF0000", "#8B6D00") < 10  # the measure sees what it should: red and olive look alike


def test_levels_differ_from_the_first_runs_in_colour_and_in_dash():
    for colour in [*plots.OTHERS, plots.REFERENCES["base"][0]]:
        assert min(apart(colour, run) for run in plots.COLOURS[:5]) > 9


def test_two_api_models_differ_in_colour_and_dash(board):
    cells = board.cells.assign(kind=board.cells["kind"].where(~board.cells["row"].isin(["majority", "nearest_neighbour"]), "api"))
    styles = plots.reference_styles(cells)
    assert len({colour for colour, _ in styles.values()}) == len({dash for _, dash in styles.values()}) == len(styles) == 3
    assert {"majority", "nearest_neighbour"} <= set(drawn(plots.mean_by_step(board.means.assign(kind=cells.groupby("row")["kind"].first()))))


def test_drawing_leaves_the_readers_settings_and_pyplot_alone(board):
    import matplotlib
    import matplotlib.pyplot as plt

    before, figures = dict(matplotlib.rcParams), plt.get_fignums()
    plots.heat_map(board.cells)
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == figures


def test_importing_needs_no_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import qwen2vl_sft.comparison.plots"
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------- the plots beside the scoreboard's


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    plan = Plan(samples=60, api=True, free=True, validation=True, positive={"weapon": "weapon"}, labels={"weapon": ["weapon", "none"], "违规": ["违规", "正常", "可疑"], "number": None})
    folder = build_experiment(tmp_path_factory.mktemp("rich"), plan)
    return Scoreboard.from_experiment(folder), folder


def test_task_differences_are_sorted_and_hollow_where_unsure(rich):
    board, _ = rich
    table = against(board, "mix(300)", "gpt-4o")
    figure = plots.task_differences(table, "mix(300)", "gpt-4o")
    texts = drawn(figure)
    assert [f"{d:+.1f}" for d in sorted(table["difference"])] == [t for t in texts if t[0] in "+-" and t[1:2].isdigit()]
    markers = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", None, "")]
    hollow = sum(line.get_markerfacecolor() == "white" for line in markers)
    assert hollow == (table["verdict"] == "no evidence").sum() and len(markers) == len(table)


def test_confusion_matrices_hold_every_sample(rich):
    board, _ = rich
    own = board.samples[(board.samples["row"] == "mix(300)") & (board.samples["task"] != "number")]
    figure = plots.confusion_matrices(own, {"weapon": ["weapon", "none"]})
    drawn(figure)
    for axes, (_, part) in zip(figure.axes, own.groupby("task", sort=False), strict=False):
        assert sum(int(text.get_text()) for text in axes.texts) == len(part)
    many = own.assign(target=[f"label {i % 40}" for i in range(len(own))])
    assert any(text.startswith("(other") for text in drawn(plots.confusion_matrices(many)))


def test_reliability_bins_are_the_shares_of_right_answers(rich):
    _, folder = rich
    table = confidence_table(folder, rows=["base", "mix(300)"])
    assert set(table["split"]) == {"validation", "test"} and table["calibrated"].all()
    test = table[table["split"] == "test"]
    points = plots.binned(test)
    assert points["n"].sum() == len(test) and np.average(points["accuracy"], weights=points["n"]) == pytest.approx(test["right"].mean())
    assert any("mean gap" in text for text in drawn(plots.reliability_diagram(test)))
    texts = drawn(plots.precision_recall(test, {"weapon": "weapon"}))
    assert "recall of weapon" in texts and "share decided" in texts


def test_precision_curve_is_scikit_learns():
    from sklearn.metrics import precision_recall_curve

    rng = np.random.default_rng(0)
    hit, score = rng.random(80) < 0.4, rng.random(80).round(1)
    _, recall, precision = plots.precision_curve(hit, score)
    expected = precision_recall_curve(hit, score)
    assert np.allclose(precision[::-1], expected[0][:-1]) and np.allclose(recall[::-1], expected[1][:-1])


def test_mixture_and_cost_plots_name_their_points(rich):
    board, _ = rich
    shares = pd.DataFrame({"model": "mix", "task": ["weapon", "违规", "number"], "share": [30.0, 30, 40], "gain": [40.0, 40, -5]})
    assert {"weapon", "number"} <= set(drawn(plots.mixture_gain(shares)))
    costs = cost_table(board)
    assert "seconds an image, as measured while scoring" in drawn(plots.cost_accuracy(costs)) and "gpt-4o" in drawn(plots.cost_accuracy(costs))
    assert "cost of 1,000 images" in drawn(plots.cost_accuracy(cost_table(board, {EVERY: Price(2.0)})))


def test_a_row_without_a_price_is_left_out_of_the_cost_plot_by_name():
    costs = pd.DataFrame({"row": ["mix(1)", "gpt-4o", "paper"], "kind": ["trained", "api", "imported"], "accuracy": [80.0, 70, 90], "low": np.nan, "high": np.nan, "images_per_second": [100, 1.0, np.nan], "cost_per_1000": [0.01, 2.0, np.nan]})
    texts = drawn(plots.cost_accuracy(costs))
    assert "cost of 1,000 images" in texts and "paper" not in texts and any("not shown, no price: paper" in text for text in texts)


def test_the_heat_map_marks_the_row_chosen_on_test(board):
    picked = [row.rpartition("(")[2].rstrip(")") for row in board.chosen_on_test]
    texts = drawn(plots.heat_map(board.cells, board.means))
    assert picked and {f"{step} t" for step in picked} <= set(texts) and any("t: chosen on test" in text for text in texts)


def test_every_plot_names_its_rule(rich):
    board, folder = rich
    own = board.samples[(board.samples["row"] == "mix(300)") & (board.samples["task"] == "weapon")]
    gain = pd.DataFrame({"model": "mix", "task": ["weapon"], "rule": "free", "share": [30.0], "gain": [40.0]})
    figures = [plots.heat_map(board.cells), plots.accuracy_by_step(board.cells), plots.mean_by_step(board.means), plots.mixture_gain(gain), plots.confusion_matrices(own),
               plots.task_differences(against(board, "mix(300)", "gpt-4o"), "mix(300)", "gpt-4o"), plots.cost_accuracy(cost_table(board))]
    for figure in figures:
        assert any("rule: free" in text for text in drawn(figure))
    test = confidence_table(folder, rows=["mix(300)"]).query("split == 'test'")
    for figure in (plots.reliability_diagram(test), plots.precision_recall(test)):
        assert any("rule: closed" in text for text in drawn(figure))


def test_runs_that_differ_in_the_seed_are_one_line_with_their_spread(tmp_path):
    runs = {f"mix-{i}": {"schedule": {"seed": i}} for i in range(3)} | {"slow": {"schedule": {"learning_rate": 1e-5}}}
    board = Scoreboard.from_experiment(build_experiment(tmp_path, Plan(samples=30, labels={"a": ["x", "y"]}, runs=runs, steps=(100, 200), collapsed={}, refused={})))
    over = board.means[board.means["model"].str.startswith("mix")].groupby("step")["strict"]
    for figure in (plots.mean_by_step(board.means, seeds=board.seeds), plots.accuracy_by_step(board.cells, seeds=board.seeds)):
        texts = drawn(figure)
        assert "mix, 3 seeds" in texts and "mix-0" not in texts and any("lowest to highest seed" in text for text in texts)
        lines = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 2 and len(set(line.get_xdata())) == 2 and max(line.get_xdata()) == 200]
        assert len(lines) == 2 and any(np.allclose(line, over.mean()) for line in lines)
        spread = [s for c in figure.axes[0].collections if hasattr(c, "get_segments") for s in c.get_segments()]
        assert any(np.allclose(sorted(s[:, 1]), [over.min()[100], over.max()[100]]) for s in spread)
    assert "mix, 3 seeds" in drawn(plots.mean_by_step(board.means, "common", seeds=board.seeds))


@pytest.mark.parametrize("plot", ["task_differences", "confusion_matrices", "reliability_diagram", "precision_recall", "mixture_gain", "cost_accuracy"])
def test_empty_tables_are_drawn_empty(plot):
    columns = ["task", "difference", "low", "high", "verdict", "row", "target", "prediction", "outcome", "confidence", "right", "score", "model", "share", "gain", "kind", "accuracy", "images_per_second", "cost_per_1000"]
    drawn(getattr(plots, plot)(pd.DataFrame({name: pd.Series(dtype=float) for name in columns})))
