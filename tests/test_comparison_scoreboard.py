"""The scoreboard: the reference README's findings, reading experiments, means, output that aligns and escapes."""

import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_experiment import LABELS, Plan, build_experiment

from qwen2vl_sft.comparison.scoreboard import (
    ORIGINAL,
    Scoreboard,
    accuracy_table,
    against,
    best_row,
    csv_text,
    display_width,
    findings,
    lead,
    markdown_table,
    prepared_folder,
    row_of_kind,
    shortened,
    text_table,
)
from qwen2vl_sft.core import InputError
from qwen2vl_sft.rundir import RunDir

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def original() -> Scoreboard:
    return Scoreboard.from_csv()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    return build_experiment(tmp_path_factory.mktemp("synthetic"), Plan(api=True))


@pytest.fixture(scope="module")
def board(experiment) -> Scoreboard:
    return Scoreboard.from_experiment(experiment)


def topics(board: Scoreboard) -> dict[str, str]:
    return {finding.topic: finding.text for finding in findings(board)}


# -------------------------------------------------------------------------- the original's published table


def test_nine_of_ten_printed_means_are_means_over_the_common_datasets(original):
    agree = {row: abs(original.means.loc[row, "common"] - printed) <= 0.1 for row, printed in original.reported.items()}
    assert len(agree) == 10
    assert [row for row, fits in agree.items() if not fits] == ["Qwen2-vl"]
    assert accuracy_table(original, "coverage").gt(0).all().sum() == 18


def test_the_untuned_row_is_flagged_with_both_means(original):
    text = topics(original)["reported mean"]
    assert text.startswith("Qwen2-vl is printed with a mean of 23.9") and "26.7 common support" in text
    assert sum(finding.topic == "reported mean" for finding in findings(original)) == 1


@pytest.mark.parametrize(
    ("row", "strict", "common", "answered"),
    [("gpt4o", 61.4, 68.2, 68.2), ("Qwen2-vl-mix(3000)", 67.0, 69.2, 67.0)],
)
def test_the_three_means(original, row, strict, common, answered):
    means = original.means.loc[row, ["strict", "common", "answered_only"]]
    assert [round(float(value), 1) for value in means] == [strict, common, answered]


def test_refusals_keep_their_reason_and_lower_the_coverage(original):
    cells = original.cells[original.cells["row"] == "gpt4o"]
    refused = cells[cells["coverage"] == 0]
    assert set(refused["note"]) == {"违规信息", "无法推理"} and all("refused" in badges for badges in refused["badges"])
    assert original.means.loc["gpt4o", "coverage"] == 90.0
    assert "违规信息" in topics(original)["refused"]


def test_collapsed_scores_are_flagged_and_nothing_else(original):
    cells = original.cells[original.cells["collapsed"] != ""]
    assert cells.groupby("task")["accuracy"].agg(["first", "size"]).to_dict("index") == {
        "secure_sexyxjj_fp_1222_182501": {"first": 67.8, "size": 7},
        "face_pixar_20231207_180654": {"first": 16.6, "size": 6},
    }


def test_last_step_best_step_and_the_choice_on_test(original):
    text = topics(original)
    assert best_row(original) == "Qwen2-vl-mix(3000)"
    assert "Qwen2-vl-mix(3370), is 1.2 points below Qwen2-vl-mix(3000)" in text["last step"]
    assert original.chosen_on_test == ["Qwen2-vl-mix(3000)", "Qwen2-vl-full(3370)"]
    assert original.means.loc["Qwen2-vl-mix(3000)", "common"] - original.means.loc["Qwen2-vl-mix(3370)", "common"] == pytest.approx(1.3, abs=0.05)


def test_best_row_against_gpt4o(original):
    text = topics(original)
    assert "on 9 of the 18 tasks" in text["wins"]
    assert "67.0 to 61.4 (strict), 69.2 to 68.2 (common support), 67.0 to 68.2 (answered only)" in text["api"]
    assert "rule turns winner" in text


def test_an_import_without_n_has_no_intervals_and_no_paired_tests(original):
    assert original.cells[["low", "high"]].isna().all(axis=None) and original.means[["low", "high"]].isna().all(axis=None)
    assert against(original.samples, "gpt4o", "Qwen2-vl").empty and lead(original.samples, "gpt4o", "Qwen2-vl") is None


def test_the_csv_round_trip_keeps_rows_tasks_and_figures(original, tmp_path):
    original.to_csv(tmp_path / "scoreboard.csv")
    again = Scoreboard.from_csv(tmp_path / "scoreboard.csv")
    assert again.rows == original.rows and again.tasks == original.tasks
    difference = (accuracy_table(again) - accuracy_table(original)).abs()
    assert difference.max(axis=None) <= 0.0501


def test_the_shipped_copy_is_in_the_package():
    assert ORIGINAL.is_file() and len(pd.read_csv(ORIGINAL)) == 200


# -------------------------------------------------------------------------- importing


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,step,dataset,accuracy\nm,1,d,101\n", "m, step 1, d: accuracy '101' is not a percentage"),
        ("model,step,dataset,accuracy\nm,1,d,viel\n", "accuracy 'viel' is not a percentage"),
        ("model,step,dataset,accuracy\nm,1.5,d,10\n", "step must be a whole number"),
        ("model,step,dataset,accuracy\nm,one,d,10\n", "step must be a whole number"),
        ("model,step,dataset,accuracy\nm,1,d,10\nm,1,d,11\n", "m, step 1, d: given twice"),
        ("model,step,dataset,accuracy\n", "has no accuracies"),
        ("name,value\na,1\n", "needs the columns model and step"),
        ("", "not a CSV file in UTF-8"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, text, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        Scoreboard.from_csv(write(tmp_path / "bad.csv", text))
    assert "bad.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_file_in_another_encoding_or_missing(tmp_path):
    with pytest.raises(InputError, match="not a CSV file in UTF-8"):
        Scoreboard.from_csv(write(tmp_path / "gb.csv", "model,step,dataset,accuracy\n模型,1,违规,1\n", "gb18030"))
    with pytest.raises(InputError, match=r"none\.csv: no such file"):
        Scoreboard.from_csv(tmp_path / "none.csv")


def test_n_in_the_file_gives_intervals(tmp_path):
    text = "model,step,dataset,accuracy,n\nbase,,d,50,200\nmix,10,d,80,200\n"
    cells = Scoreboard.from_csv(write(tmp_path / "n.csv", text)).cells
    assert cells["n"].tolist() == [200, 200] and cells["correct"].tolist() == [100, 160]
    assert (cells["low"] < cells["accuracy"]).all() and (cells["high"] > cells["accuracy"]).all()


# -------------------------------------------------------------------------- reading an experiment


def test_rows_and_columns_stand_in_their_order(board):
    tuned = [f"{run}({step})" for run in ("mix", "full") for step in (100, 200, 300, 337)]
    assert board.rows == ["base", "gpt-4o", *tuned, "majority", "nearest_neighbour"]
    assert board.tasks == list(LABELS)  # the suite's order, not the alphabet's


def test_order_survives_a_row_that_lacks_the_first_task(experiment, tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=30))
    for part in (folder / "base" / "predictions" / "base" / "digit").iterdir():
        part.unlink()
    board = Scoreboard.from_experiment(folder)
    assert board.rows[0] == "base" and board.tasks == list(LABELS)
    assert math.isnan(board.means.loc["base", "strict"])  # never a mean over fewer tasks
    assert "base is not fully scored: 6 of 7 tasks" in topics(board)["incomplete"]
    assert csv_text(board).splitlines()[1].startswith("base,,,") and csv_text(board).splitlines()[1].endswith(",")
    assert "gain" not in topics(board) and "–" in text_table(board) and "not scored" in board.to_html()


def test_cells_agree_with_the_predictions_counted_by_hand(experiment, board):
    table = pd.concat(pd.read_parquet(p) for p in (experiment / "mix/predictions/step-300/digit").glob("*.parquet"))
    one = board.cells[(board.cells["row"] == "mix(300)") & (board.cells["task"] == "digit")].iloc[0]
    assert (one["n"], one["correct"]) == (120, (table["prediction"] == table["target"]).sum())
    assert one["accuracy"] == 100 * one["correct"] / 120 and one["low"] < one["accuracy"] < one["high"]
    mean = board.cells[board.cells["row"] == "mix(300)"]["accuracy"].mean()
    assert board.means.loc["mix(300)", "strict"] == pytest.approx(mean)


def test_planted_collapse_and_refusals_are_flagged_and_only_those(board):
    flagged = board.cells[[("collapsed" in badges) for badges in board.cells["badges"]]]
    assert {(one.row, one.task): one.collapsed for one in flagged.itertuples()} == {("base", "weapon"): "none", ("full(100)", "face"): "face"}
    refused = board.cells[[("refused" in badges) for badges in board.cells["badges"]]]
    assert list(zip(refused["row"], refused["task"], strict=True)) == [("base", "number")]


def test_common_support_leaves_out_for_everybody_what_one_refused(board):
    kept = board.samples[(board.samples["row"] == "base") & (board.samples["task"] == "number") & (board.samples["outcome"] != "refused")]
    row = board.samples[(board.samples["row"] == "mix(300)")]
    parts = [part["outcome"].eq("correct").mean() for task, part in row.groupby("task") if task != "number"]
    number = row[(row["task"] == "number") & row["id"].isin(kept["id"])]["outcome"].eq("correct").mean()
    assert board.means.loc["mix(300)", "common"] == pytest.approx(100 * np.mean([*parts, number]))


def test_near_duplicates_widen_the_interval(experiment, board, tmp_path):
    alone = Scoreboard.from_experiment(experiment, prepared=tmp_path)
    assert board.samples["group"].nunique() < alone.samples["group"].nunique()
    assert alone.means["strict"].tolist() == pytest.approx(board.means["strict"].tolist())
    width = lambda board: (board.means["high"] - board.means["low"]).mean()
    assert width(board) > 1.1 * width(alone)


@pytest.mark.parametrize(
    ("stated", "folder"),
    [("suites/other.yaml", "named"), ("suites/missing.yaml", "missing"), ("v1.2", "v1.2"), ("demo", "demo")],
)
def test_prepared_data_is_found_by_the_suite_that_runs_state(tmp_path, stated, folder):
    write(tmp_path / "other.yaml", "name: named\n")
    (tmp_path / "suites").mkdir()
    (tmp_path / "other.yaml").rename(tmp_path / "suites" / "other.yaml")
    run = RunDir(tmp_path / "runs" / "x" / "base")
    run.write_config(f"kind: base\nsuite: {stated}\n")
    assert prepared_folder(run.path.parent, [run]) == tmp_path / "prepared" / folder


def test_a_step_chosen_on_validation_loses_the_badge(experiment):
    board = Scoreboard.from_experiment(experiment, chosen={"mix": "mix(200)", "full": "full(337)"})
    assert board.chosen_on_test == [] and best_row(board) == "full(337)"
    assert "mix(200) was chosen on validation data." in [finding.text for finding in findings(board)]


def test_paired_tests_name_their_reach(board):
    table = against(board.samples, "mix(300)", "base").set_index("task")
    assert (table["verdict"] == "better").all() and (table["p_holm"] >= table["p_value"]).all()
    assert table["smallest_difference"].iloc[0] == pytest.approx(100 * 9 / 120)  # 2 / 2^9 < 0.05 / 7
    difference, low, high = lead(board.samples, "mix(300)", "base")
    assert low < difference < high
    assert difference == pytest.approx(board.means.loc["mix(300)", "strict"] - board.means.loc["base", "strict"])


def test_a_regression_against_the_untuned_model_is_said(tmp_path):
    folder = build_experiment(tmp_path, Plan(labels={"a": ["x", "y"], "b": ["x", "y"]}, collapsed={("mix(300)", "b"): "y"}, skills={"base": 0.8, "full(100)": 0.1}))
    board = Scoreboard.from_experiment(folder, chosen={"mix": "mix(300)", "full": "full(100)"})
    assert best_row(board) == "mix(300)"
    assert "worse than the untuned model on b" in topics(board)["regressed"]


# -------------------------------------------------------------------------- rules


def rescore(folder: Path, run: str, checkpoint: str, task: str, rule: str) -> None:
    directory = RunDir(folder / run)
    table = directory.predictions(checkpoint, task).assign(rule=rule, id=lambda t: t["id"])
    directory.write_predictions(checkpoint, task, 9, table)


def test_against_an_api_model_the_column_is_free_where_everybody_has_it(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=20, api=True, labels={"face": LABELS["face"], "style": LABELS["style"]}))
    rescore(folder, "base", "base", "face", "free")
    for run in ("mix", "full"):
        for step in (100, 200, 300, 337):
            rescore(folder, run, f"step-{step}", "face", "free")
    cells = Scoreboard.from_experiment(folder).cells
    models = cells[~cells["kind"].isin(["majority", "nearest_neighbour"])]
    assert set(models[models["task"] == "face"]["rule"]) == {"free"} and not models[models["task"] == "face"]["other_rule"].any()
    style = models[models["task"] == "style"].set_index("row")
    assert style.loc["base", "rule"] == "closed" and style["other_rule"].sum() == 1 and "other rule" in style.loc["gpt-4o", "badges"]
    assert (cells["n"] == 20).all()  # two rules are two figures, not twice the samples


def test_every_figure_names_its_rule(board):
    assert set(board.cells["rule"]) == {"closed", "free"}
    assert "rule: closed, free on number" in text_table(board) and "rule: closed, free on number" in markdown_table(board)
    assert "different rules" in topics(board)


# -------------------------------------------------------------------------- broken input


def test_missing_or_unscored_experiments_are_said(tmp_path):
    with pytest.raises(InputError, match="no such experiment"):
        Scoreboard.from_experiment(tmp_path / "nothing")
    with pytest.raises(InputError, match="no run in it has predictions"):
        Scoreboard.from_experiment(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="target"), "no column 'target'"),
        (lambda t: t.assign(outcome="corect"), r"unknown outcome 'corect'\. Did you mean 'correct'\?"),
    ],
)
def test_predictions_out_of_contract_are_named(tmp_path, change, message):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    run = RunDir(folder / "mix")
    run.write_predictions("step-100", "face", 1, change(run.predictions("step-100", "face")))
    (run.predictions_folder("step-100", "face") / "part-test-closed-00000.parquet").unlink()
    with pytest.raises(InputError, match=message) as error:
        Scoreboard.from_experiment(folder)
    assert "step-100/face" in str(error.value)


def test_a_truncated_part_file_is_named(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    part = folder / "mix/predictions/step-100/face/part-test-closed-00001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="step-100/face: unreadable predictions"):
        Scoreboard.from_experiment(folder)


def test_a_sample_scored_twice_counts_once(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    run = RunDir(folder / "mix")
    run.write_predictions("step-100", "face", 2, run.predictions("step-100", "face"))
    assert set(Scoreboard.from_experiment(folder).cells["n"]) == {12}


def test_partly_scored_rows_are_badged_and_never_best(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=40, labels={"face": LABELS["face"]}, skills={"mix(300)": 0.99}))
    (folder / "mix/predictions/step-300/face/part-test-closed-00001.parquet").unlink()
    board = Scoreboard.from_experiment(folder)
    one = board.cells[board.cells["row"] == "mix(300)"].iloc[0]
    assert one["n"] == 20 and "partial" in one["badges"] and best_row(board) != "mix(300)"


# -------------------------------------------------------------------------- output


def test_csv_is_the_contract(board):
    lines = list(csv.reader(io.StringIO(csv_text(board))))
    assert lines[0] == ["model", "step", *LABELS, "mean_score"]
    assert [line[:2] for line in lines[1:4]] == [["base", ""], ["gpt-4o", ""], ["mix", "100"]]
    assert all(re.fullmatch(r"\d+\.\d", value) for line in lines[1:] for value in line[2:])
    assert float(lines[1][-1]) == pytest.approx(board.means.loc["base", "strict"], abs=0.05)


@pytest.fixture(scope="module")
def chinese(tmp_path_factory) -> Scoreboard:
    labels = {"违规信息检测_图片_182501": ["违规", "正常"], "plain": ["a", "b"], f"evil_{HOSTILE.replace('/', '')}|x": ["a", HOSTILE]}
    plan = Plan(samples=40, labels=labels, collapsed={("base", f"evil_{HOSTILE.replace('/', '')}|x"): HOSTILE})
    return Scoreboard.from_experiment(build_experiment(tmp_path_factory.mktemp("chinese"), plan))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_text_fits_and_aligns_with_wide_characters(chinese, original, width):
    for board in (chinese, original):
        table = text_table(board, width).split("\n\n")[1:]
        for block in table:
            lines = [line for line in block.splitlines() if not re.match(r"[a-z]  ", line)]
            if not lines or not lines[0].startswith("model(step)"):
                continue
            assert len(lines) == len(board.rows) + 1
            assert all(display_width(line) <= width for line in lines)
            points = [{display_width(line[: m.start()]) for m in re.finditer(r"\.\d(?!\d)", line)} for line in lines[1:]]
            assert all(one == points[0] for one in points)


def test_names_lose_their_middle_not_their_end():
    assert shortened("short", 12) == "short"
    assert shortened("违规信息检测_图片_182501", 13).endswith("182501") and display_width(shortened("违规信息检测_图片_182501", 13)) <= 13
    assert shortened("a\x1b[31mb\n", 20) == "a�[31mb�"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_html_escapes_what_comes_from_data(chinese):
    parser = Tags()
    parser.feed(chinese.to_html())
    assert set(parser.tags) <= {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "small", "span", "p", "b", "wbr"}
    assert not {name for name in parser.attributes if name.startswith("on")}
    assert "&lt;img" in chinese.to_html()


def test_markdown_escapes_and_stays_a_table(chinese):
    text = markdown_table(chinese)
    assert "<img" not in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_rich_repr_is_the_fragment(board):
    page = board._repr_html_()
    assert page.startswith('<div class="qboard">') and "<script" not in page and "http" not in page
    assert page.count("<tr") == len(board.rows) + 1 and 'class="best"' in page
    assert row_of_kind(board, "base") == "base" and repr(board) == text_table(board)
