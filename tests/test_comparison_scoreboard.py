"""The scoreboard: the reference README's findings, reading experiments, means, output that aligns and escapes."""

import csv
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from statsmodels.stats.multitest import multipletests
from synthetic_experiment import LABELS, Plan, build_experiment

from qwen2vl_sft.comparison.board import accuracy_table, against, best_row, choice_table, differing, lead, recommended, row_of_kind, settings_table, standings, step_table
from qwen2vl_sft.comparison.browser import error_browser
from qwen2vl_sft.comparison.deployment import confidence_table
from qwen2vl_sft.comparison.findings import findings
from qwen2vl_sft.comparison.report import material_of, write_report
from qwen2vl_sft.comparison.samples import ORIGINAL, cells_from, checked_accuracies, class_figures, imported_cells, precision_at, prepared_folder, speed_figures, validation_choice
from qwen2vl_sft.comparison.scoreboard import LATEX, Scoreboard, cells_text, csv_text, difference, display_width, latex_table, latex_text, markdown_table, means_text, shortened, text_table, top_cells
from qwen2vl_sft.comparison.statistics import mcnemar
from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.audit import smallest_difference as audited_difference
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.tasks import Task

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def original() -> Scoreboard:
    return Scoreboard.from_csv()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    return build_experiment(tmp_path_factory.mktemp("synthetic"), Plan(api=True, parts=2))


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
    assert "Qwen2-vl-mix(3370) is 1.2 points below Qwen2-vl-mix(3000)" in text["last step"]
    assert original.chosen_on_test == ["Qwen2-vl-mix(3000)", "Qwen2-vl-full(3370)"]
    assert original.means.loc["Qwen2-vl-mix(3000)", "common"] - original.means.loc["Qwen2-vl-mix(3370)", "common"] == pytest.approx(1.3, abs=0.05)


def test_the_best_step_differs_by_data_set(original):
    table = accuracy_table(original).filter(like="Qwen2-vl-mix(", axis=0)
    best = table.columns[table.max() > table.loc["Qwen2-vl-mix(3000)"] + 0.05]
    assert topics(original)["step by task"].startswith(f"On {len(best)} of 20 tasks another step of Qwen2-vl-mix scores higher than Qwen2-vl-mix(3000): ")
    by = step_table(original).set_index(["model", "task"])["picked"]
    assert 1 < len(best) < 20 and all(table.loc[f"Qwen2-vl-mix({by['Qwen2-vl-mix', task]})", task] == table[task].max() for task in original.tasks)


def test_best_row_against_gpt4o(original):
    text = topics(original)
    assert "on 9 of the 18 tasks" in text["wins"]
    assert "67.0 to 61.4 (strict), 69.2 to 68.2 (common support), 67.0 to 68.2 (answered only)" in text["api"]
    assert "rule turns winner" in text


def test_an_import_without_n_has_no_intervals_and_no_paired_tests(original):
    assert original.cells[["low", "high"]].isna().all(axis=None) and original.means[["low", "high"]].isna().all(axis=None)
    assert against(original, "gpt4o", "Qwen2-vl").empty and lead(original.samples, "gpt4o", "Qwen2-vl") is None


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


def test_answers_off_the_list_are_badged_and_counted(board):
    flagged = board.cells[["off-list" in badges for badges in board.cells["badges"]]]
    planted = board.samples[board.samples["outcome"] == "off_list"].groupby(["row", "task"]).size()
    assert len(flagged) and set(flagged["row"]) == {"gpt-4o"}
    assert flagged.set_index(["row", "task"])["off_list"].to_dict() == planted[planted >= 0.01 * 120].to_dict()
    assert topics(board)["off-list"].startswith("gpt-4o answered off the list on")


def test_common_support_leaves_out_for_everybody_what_one_did_not_answer(board):
    answered = board.samples[board.samples["outcome"].isin(["correct", "wrong"])]
    everybody = answered.groupby(["task", "id"])["row"].nunique() == len(board.rows)
    row = board.samples[board.samples["row"] == "mix(300)"].set_index(["task", "id"])
    kept = row.loc[everybody.index[everybody], "outcome"].eq("correct")
    assert board.means.loc["mix(300)", "common"] == pytest.approx(100 * kept.groupby("task").mean().mean())
    assert board.means.loc["mix(300)", "common_micro"] == pytest.approx(100 * kept.mean())
    assert 0 < len(kept) < len(row)


def imported(lines: str) -> pd.DataFrame:
    return imported_cells(checked_accuracies(pd.read_csv(io.StringIO("model,step,dataset,accuracy,note,n,rule\n" + lines)).assign(reported_mean_score=None), Path("x")))


def test_a_mean_that_is_missing_turns_no_winner():
    board = Scoreboard(imported("mix,1,a,90,,100,closed\nmix,1,b,80,,100,closed\ngpt,,a,70,,100,closed\n"))
    assert math.isnan(board.means.loc["gpt", "strict"]) and "api" in topics(board) and "rule turns winner" not in topics(board)


def test_a_row_that_lacks_tasks_shrinks_the_common_support_for_all_and_is_never_bold(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=30, labels={task: ["x", "y"] for task in "abc"}, collapsed={}, refused={}))
    (folder / "paper").mkdir()
    write(folder / "paper" / "accuracies.csv", "model,step,dataset,accuracy,n\nsota,,a,99,200\n")
    board = Scoreboard.from_experiment(folder)
    accuracy = accuracy_table(board)
    assert board.means.loc["mix(300)", "common"] == pytest.approx(accuracy.loc["mix(300)", "a"])  # one set of tasks for all rows
    assert board.means.loc["sota", "coverage"] == pytest.approx(100 / 3) and board.means.loc["sota", "common"] == 99
    assert not {("sota", "common"), ("sota", "answered_only")} & top_cells(board) and ("sota", "a") in top_cells(board)
    for text in (text_table(board), markdown_table(board), latex_table(board), board.to_html()):
        assert "30 of 90 samples, 1 of 3 tasks" in text
    shutil.rmtree(folder / "full" / "predictions" / "step-100" / "b")
    assert Scoreboard.from_experiment(folder).means.loc["full(100)", "coverage_micro"] == pytest.approx(200 / 3)


def test_requests_without_a_response_count_neither_as_quick_nor_as_free():
    table = pd.DataFrame({"outcome": ["correct", "error", "wrong", "error"], "seconds": [1.0, 0.0, 2.0, 0.0], "cost": [0.002, 0.0, 0.004, 0.0]})
    found = speed_figures(table)
    assert (found["seconds"], found["cost_per_1000"]) == pytest.approx((1.5, 3.0))


def test_a_rule_from_a_file_is_escaped_in_every_form():
    board = Scoreboard(imported('mix,1,a,90,,100,"<b>|x\x1b[31m"\n'))
    text = markdown_table(board)
    assert "<b>" not in text and "&lt;b&gt;\\|x" in text and "\x1b" not in text + text_table(board)


def test_macro_and_micro_means_have_their_intervals(board):
    mean = board.means.loc["base"]
    for rule in ("strict", "answered_only", "common"):
        assert mean[f"{rule}_low"] < mean[rule] < mean[f"{rule}_high"]
        assert mean[f"{rule}_micro_low"] < mean[f"{rule}_micro"] < mean[f"{rule}_micro_high"]
    own = board.samples[board.samples["row"] == "base"]
    assert mean["strict_micro"] == pytest.approx(100 * own["outcome"].eq("correct").mean())
    assert mean["coverage_micro"] == pytest.approx(100 * (own["outcome"] != "refused").mean())
    assert mean["answered_only"] > mean["strict"]  # it refused some


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
    assert board.chosen_on_test == [] and best_row(board) == board.means.loc[["mix(200)", "full(337)"], "strict"].idxmax()
    best = board.means.loc[[f"mix({step})" for step in (100, 200, 300, 337)], "strict"]
    said = [finding.text for finding in findings(board) if finding.topic == "chosen on validation"]
    assert said[0].startswith(f"mix(200) was chosen on validation data: {best['mix(200)']:.1f} on the test sets.")
    assert f"would have claimed {best.max():.1f} ({best.idxmax()})" in said[0]


def test_paired_tests_name_their_reach(board):
    table = against(board, "mix(300)", "base").set_index("task")
    every = board.tests("base")
    assert (table["verdict"] == "better").all() and table["tests"].unique().tolist() == [len(every)]
    needed = round(table["smallest_difference"].iloc[0] * 120 / 100)  # whatever the two models do
    p = lambda k: mcnemar([1] * k + [0] * (120 - k), [0] * 120).p_value
    assert p(needed) <= 0.05 / len(every) < p(needed - 1) and table["smallest_difference"].nunique() == 1
    sure = every[every["verdict"] != "no evidence"]
    assert (sure["difference"].abs() >= sure["smallest_difference"] - 1e-9).all() and (table["detectable"] > table["smallest_difference"]).all()
    difference, low, high = lead(board.samples, "mix(300)", "base")
    assert low < difference < high
    assert difference == pytest.approx(board.means.loc["mix(300)", "strict"] - board.means.loc["base", "strict"])


def test_a_sentence_on_reach_says_what_holm_costs_and_what_the_audit_says():
    """15 samples, 3 tasks, 2 rows against base: the audit's 47.6 points of a single test stand beside the figures after Holm."""
    rng, lines = np.random.default_rng(0), []
    for row, kind in (("base", "base"), ("m(10)", "trained"), ("m(20)", "trained")):
        for task in "abc":
            lines += [{"row": row, "model": row[0], "step": int(row[2:4]) if kind == "trained" else None, "kind": kind, "task": task, "id": f"{task}{i}", "group": f"{task}{i}", "rule": "closed",
                       "target": "x", "prediction": "x" if right else "y", "outcome": "correct" if right else "wrong", "other_rule": False, "position": 0} for i, right in enumerate(rng.random(15) < 0.6)]
    samples = pd.DataFrame(lines)
    board = Scoreboard(cells_from(samples), samples)
    assert audited_difference(15) == 47.6 and set(against(board, best_row(board), "base")["alone"]) == {47.6}
    assert "four times in five, after Holm over 6 cells; 47.6 in a single test, as the audit says)" in topics(board)["no evidence"]


def test_holm_runs_over_the_whole_table_in_sentences_and_plots_too(board):
    every, own = board.tests("gpt-4o"), against(board, "mix(300)", "gpt-4o")
    by_task = every[every["row"] == "mix(300)"].set_index("task")["p_holm"]
    assert own.set_index("task")["p_holm"].to_dict() == by_task.to_dict() and len(every) == (len(board.rows) - 1) * len(board.tasks)
    assert f"Holm over all {len(every)} cells tested against gpt-4o" in topics(board)["paired"]


def test_a_regression_against_the_untuned_model_is_said(tmp_path):
    folder = build_experiment(tmp_path, Plan(labels={"a": ["x", "y"], "b": ["x", "y"]}, collapsed={("mix(300)", "b"): "y"}, skills={"base": 0.8, "full(100)": 0.1}))
    board = Scoreboard.from_experiment(folder, chosen={"mix": "mix(300)", "full": "full(100)"})
    assert best_row(board) == "mix(300)"
    assert "worse than the untuned model on b" in topics(board)["regressed"]


# -------------------------------------------------------------------------- rules


def test_against_an_api_model_the_headline_is_free_on_both_sides_with_the_closed_figure_beside(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=20, api=True, free=True, labels={"face": LABELS["face"], "number": None}))
    board = Scoreboard.from_experiment(folder)
    models = board.cells[~board.cells["kind"].isin(["majority", "nearest_neighbour"])]
    assert set(models["rule"]) == {"free"} and not models["other_rule"].any()
    for row in ("base", "mix(300)"):
        one = models[(models["row"] == row) & (models["task"] == "face")].iloc[0]
        closed = RunDir(folder / one["model"]).predictions("base" if row == "base" else "step-300", "face", "closed")
        assert (one["beside_rule"], one["beside"]) == ("closed", 100 * (closed["outcome"] == "correct").mean())
        assert f"<small>closed {one['beside']:.1f}</small>" in board.to_html()
    assert (board.cells["n"] == 20).all()  # two rules are two figures, not twice the samples
    assert "By the closed rule" in topics(board)["closed beside"] and "different rules" not in topics(board)


def test_a_row_without_free_answers_is_badged_and_not_shipped_against_an_api_model(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=20, api=True, free=True, labels={"face": LABELS["face"]}, skills={"full(337)": 0.99}))
    for part in (folder / "full/predictions/step-337/face").glob("*free*"):
        part.unlink()
    board = Scoreboard.from_experiment(folder)
    one = board.cells[board.cells["row"] == "full(337)"].iloc[0]
    assert one["rule"] == "closed" and "other rule" in one["badges"] and best_row(board) != "full(337)"


def test_where_only_the_api_model_is_free_its_badge_says_so(board):
    one = board.cells[(board.cells["row"] == "gpt-4o") & (board.cells["task"] == "face")].iloc[0]
    assert one["rule"] == "free" and "other rule" in one["badges"]


def test_every_figure_names_its_rule(board):
    assert set(board.cells["rule"]) == {"closed", "free"}
    assert "rule: closed, free on number" in text_table(board) and "rule: closed, free on number" in markdown_table(board)
    assert "different rules" in topics(board)


# -------------------------------------------------------------------------- broken input


def test_every_form_names_the_rule(board, tmp_path):
    frame = board.to_frame()
    assert set(frame["rule"]) == {"closed", "free"} and len(frame) == len(board.cells)
    write(tmp_path / "accuracies.csv", cells_text(board))
    again = Scoreboard.from_csv(tmp_path / "accuracies.csv")  # rule, n and figures survive
    assert again.rows == board.rows and again.tasks == board.tasks
    assert again.to_frame()[["rule", "n"]].equals(frame[["rule", "n"]]) and np.allclose(again.to_frame()["low"], frame["low"], atol=0.01)
    for text in (text_table(board), markdown_table(board), latex_table(board), board.to_html(), topics(board)["best"]):
        assert "rule: closed, free on number" in text


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
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}, parts=2))
    part = folder / "mix/predictions/step-100/face/part-test-closed-00001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(RunFailure, match=r"step-100/face/part-test-closed-00001.parquet can't be read .*; delete it, then score"):
        Scoreboard.from_experiment(folder)


def test_a_sample_scored_twice_counts_once(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    run = RunDir(folder / "mix")
    run.write_predictions("step-100", "face", 2, run.predictions("step-100", "face"))
    assert set(Scoreboard.from_experiment(folder).cells["n"]) == {12}


def test_partly_scored_rows_are_badged_and_never_best(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=40, labels={"face": LABELS["face"]}, skills={"mix(300)": 0.99}, parts=2))
    (folder / "mix/predictions/step-300/face/part-test-closed-00001.parquet").unlink()
    board = Scoreboard.from_experiment(folder)
    one = board.cells[board.cells["row"] == "mix(300)"].iloc[0]
    assert one["n"] == 20 and "partial" in one["badges"] and best_row(board) != "mix(300)"


def note_asked(folder: Path, run: str, checkpoint: str, task: str, asked: str, split: str = "test", rule: str = "closed") -> None:
    """What scoring notes beside its answers, without removing them."""
    RunDir(folder / run).decided_path(checkpoint, task, rule, split).write_text(json.dumps({"decided": "d", "task": asked}))


def asked_now(folder: Path, task: str) -> str:
    suite = yaml.safe_load((folder.parent.parent / "prepared/synthetic/suite.yaml").read_text())
    return Task(**next(one for one in suite["tasks"] if one["name"] == task)).fingerprint


def test_answers_to_another_question_are_marked_and_stand_in_nothing_else(tmp_path, capsys):
    """The question was changed, mix(300) and the API model scored, the question changed back: their figures are the old ones."""
    plan = Plan(samples=40, labels={task: ["x", "y"] for task in "ab"}, collapsed={}, refused={}, skills={"mix(300)": 0.99}, api=True)
    folder = build_experiment(tmp_path, plan)
    fresh = Scoreboard.from_experiment(folder)
    assert best_row(fresh) == "mix(300)" and "q" not in "".join(text_table(fresh).splitlines()[-4:])
    for run, checkpoint in (("mix", "step-200"), ("full", "step-200"), ("base", "base")):
        note_asked(folder, run, checkpoint, "a", asked_now(folder, "a"))  # the question of now
    note_asked(folder, "mix", "step-300", "a", "another")
    note_asked(folder, "gpt-4o", "gpt-4o", "a", "another", rule="free")
    board = material_of(folder).board
    said = capsys.readouterr()
    for text in (said.out + said.err, topics(board)["another question"]):
        assert "a (gpt-4o and mix(300))" in text and "`qwen2vl-sft score demo` and `qwen2vl-sft score-api demo RECIPE`" in text
    marked = board.cells[["another question" in badges for badges in board.cells["badges"]]]
    assert set(zip(marked["row"], marked["task"], strict=True)) == {("mix(300)", "a"), ("gpt-4o", "a")}
    assert marked["accuracy"].notna().all() and [badges for badges in marked["badges"] if len(badges) > 1] == []
    assert best_row(board) != "mix(300)" and math.isnan(board.means.loc["mix(300)", "strict"]) and not board.means.loc["mix(300)", "complete"]
    assert ("mix(300)", "a") not in top_cells(board) and ("mix(300)", "b") in top_cells(board)
    for reference in ("base", "mix(200)"):
        tests = board.tests(reference)
        assert set(tests.loc[tests["row"] == "mix(300)", "task"]) == {"b"} and len(tests) == len(fresh.tests(reference)) - 2
    assert board.means["common"].round(6).equals(accuracy_table(board)["b"].round(6).rename("common")) and "1 of 2 tasks" in text_table(board)
    assert re.search(r"^q  another question: .*`qwen2vl-sft score EXPERIMENT`", text_table(board), re.MULTILINE)
    line = next(line for line in csv.DictReader(io.StringIO(csv_text(board))) if (line["model"], line["step"]) == ("mix", "300"))
    assert (line["a"], line["mean_score"]) == ("", "") and line["b"]  # this file has no place for a mark


def test_where_all_answers_are_to_another_question_nothing_is_concluded(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"a": ["x", "y"]}, steps=(100, 300), baselines=False))
    for run in [RunDir(path) for path in folder.iterdir()]:
        for checkpoint, task in run.predicted():
            note_asked(folder, run.name, checkpoint, task, "another")
    report = write_report(folder)
    board = Scoreboard.from_experiment(folder)
    assert best_row(board) is None and board.means["strict"].isna().all() and not len(board.samples)
    text = report.read_text()
    assert text.index("Score again") < text.index("Scored with another question") < text.index("there is no best row") < text.index("<table")
    assert error_browser(folder, board=board) is not None  # as the notebook shows it


def test_validation_answers_to_another_question_choose_neither_a_step_nor_a_threshold(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=60, labels={"a": ["x", "y"]}, steps=(100, 300), validation=True))
    assert validation_choice(RunDir(folder / "mix")).step == 300 and set(Scoreboard.from_experiment(folder).chosen) == {"mix", "full"}
    for step in (100, 300):
        note_asked(folder, "mix", f"step-{step}", "a", "another", "validation")
    assert set(Scoreboard.from_experiment(folder).chosen) == {"full"}
    table = confidence_table(folder)
    assert set(table.loc[table["row"] == "mix(300)", "split"]) == {"test"} and set(table.loc[table["row"] == "full(300)", "split"]) == {"validation", "test"}


def test_a_tie_is_called_a_tie_and_what_needs_no_training_is_preferred(tmp_path):
    """base, mix(100) and mix(300) give the same answers; the nearest training picture is above all three."""
    plan = Plan(samples=40, labels={"a": ["x", "y"]}, runs={"mix": {}}, steps=(100, 300), collapsed={}, skills={"nearest_neighbour": 0.95})
    folder = build_experiment(tmp_path, plan)
    base = RunDir(folder / "base").predictions("base", "a", "closed")
    for step in (100, 300):
        RunDir(folder / "mix").write_predictions(f"step-{step}", "a", 0, base)
    board = Scoreboard.from_experiment(folder)
    said = topics(board)
    assert said["best"].startswith("mix(100) and mix(300) tie for the highest strict mean") and "mix(100), of the fewest steps" in said["best"]
    assert said["gain"].startswith("That is as much as the untuned base") and recommended(board) is None
    assert "is not above base (" in said["ship"] and "nearest_neighbour (" in said["ship"] and "no tuned row is recommended" in said["ship"]
    page = write_report(folder).read_text()
    assert re.search(r"<dt>ship</dt><dd>nothing<small>mix\(100\), the best tuned row, is not above base", page) and 'class="ship"' not in page


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
    assert page.startswith('<div class="qboard"') and "<script" not in page and "http" not in page
    assert page.count("<tr") == len(board.rows) + 1 and page.count('class="ship"') == 1
    assert row_of_kind(board, "base") == "base" and repr(board) == text_table(board)


# -------------------------------------------------------------------------- metrics of a cell


def test_per_class_figures_and_macro_f1_are_scikit_learns(board):
    from sklearn.metrics import precision_recall_fscore_support

    own = board.samples[(board.samples["row"] == "mix(100)") & (board.samples["task"] == "headwear")]
    expected = precision_recall_fscore_support(own["target"], own["prediction"].fillna(""), labels=LABELS["headwear"], zero_division=0)
    figures = class_figures(own, LABELS["headwear"])
    assert np.allclose(figures[["precision", "recall", "f1"]].to_numpy().T, 100 * np.array(expected[:3]))
    assert figures["support"].tolist() == expected[3].tolist()
    one = board.cells[(board.cells["row"] == "mix(100)") & (board.cells["task"] == "headwear")].iloc[0]
    assert one["macro_f1"] == pytest.approx(figures["f1"].mean())
    assert board.cells[board.cells["task"] == "number"]["macro_f1"].isna().all()  # open text has no classes


def test_auroc_and_precision_at_recall_are_scikit_learns(tmp_path):
    from sklearn.metrics import precision_recall_curve, roc_auc_score

    plan = Plan(samples=90, labels={"weapon": LABELS["weapon"], "headwear": LABELS["headwear"]}, positive={"weapon": "weapon"}, collapsed={})
    board = Scoreboard.from_experiment(build_experiment(tmp_path, plan))
    cells = board.cells.set_index(["row", "task"])
    own = board.samples[(board.samples["row"] == "mix(200)")]
    weapon, wear = (own[own["task"] == task] for task in ("weapon", "headwear"))
    p = np.array([json.loads(text)["weapon"] for text in weapon["probabilities"]])
    positive = (weapon["target"] == "weapon").to_numpy()
    assert cells.loc[("mix(200)", "weapon"), "auroc"] == pytest.approx(100 * roc_auc_score(positive, p))
    precision, recall, _ = precision_recall_curve(positive, p)
    assert cells.loc[("mix(200)", "weapon"), "precision_at_recall"] == pytest.approx(100 * precision[recall >= 0.9].max())
    table = np.array([[json.loads(text)[x] for x in sorted(LABELS["headwear"])] for text in wear["probabilities"]])
    expected = np.mean([roc_auc_score(wear["target"] == x, table[:, i]) for i, x in enumerate(sorted(LABELS["headwear"]))])
    assert cells.loc[("mix(200)", "headwear"), "auroc"] == pytest.approx(100 * expected)
    assert math.isnan(cells.loc[("mix(200)", "headwear"), "precision_at_recall"]) and math.isnan(cells.loc[("majority", "weapon"), "auroc"])


def test_equal_scores_are_accepted_together():
    assert precision_at(np.array([0.5, 0.5, 0.5, 0.1]), np.array([True, False, False, False])) == pytest.approx(1 / 3)
    assert math.isnan(precision_at(np.array([0.5]), np.array([False])))


def test_leaked_pictures_are_badged_with_the_accuracy_without_them(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=30, labels={"face": LABELS["face"]}, leaked={"face": 6}))
    board = Scoreboard.from_experiment(folder)
    one = board.cells[board.cells["row"] == "mix(300)"].iloc[0]
    own = board.samples[board.samples["row"] == "mix(300)"].sort_values("id")
    assert one["leaked"] == 6 and "leaked" in one["badges"]
    assert one["without_leaked"] == pytest.approx(100 * own["outcome"].iloc[6:].eq("correct").mean())
    assert "leaked" not in board.cells[board.cells["row"] == "base"].iloc[0]["badges"]  # it was not trained on them
    assert "6 of 30 test pictures" in topics(board)["leaked"]
    assert f"unleaked {one['without_leaked']:.1f}" in board.to_html()


def test_pictures_that_another_task_trains_on_are_told_apart(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=30, labels={"face": LABELS["face"], "style": LABELS["style"]}, elsewhere={"face": ("style", 7)}))
    board = Scoreboard.from_experiment(folder)
    one = board.cells.set_index(["row", "task"]).loc[("mix(300)", "face")]
    own = board.samples[(board.samples["row"] == "mix(300)") & (board.samples["task"] == "face")].sort_values("id")
    assert (one["elsewhere"], one["leaked"]) == (7, 0) and "leaked" not in one["badges"]
    assert one["without_elsewhere"] == pytest.approx(100 * own["outcome"].iloc[:-7].eq("correct").mean())
    assert "7 of 30 test pictures of face, trained on for style" in topics(board)["seen elsewhere"] and "leaked" not in topics(board)
    assert set(board.cells[board.cells["task"] == "style"]["elsewhere"]) == {0}


# -------------------------------------------------------------------------- choices, seeds, settings


def test_the_step_comes_from_best_json_and_its_price_is_said(tmp_path):
    best = {"mix": {"overall": {"step": 200}, "tasks": {"face": {"step": 100}, "style": {"step": 337}}}}
    folder = build_experiment(tmp_path, Plan(samples=60, labels={"face": LABELS["face"], "style": LABELS["style"]}, best=best))
    board = Scoreboard.from_experiment(folder)
    assert board.chosen == {"mix": "mix(200)"} and board.chosen_on_test == [r for r in board.chosen_on_test if r.startswith("full")]
    table = choice_table(board).set_index(["model", "what"])
    accuracy = accuracy_table(board)
    steps = [f"mix({step})" for step in (100, 200, 300, 337)]
    one = table.loc[("mix", "overall")]
    assert (one["honest"], one["claimed"]) == (board.means.loc["mix(200)", "strict"], board.means.loc[steps, "strict"].max())
    by_task = table.loc[("mix", "by task")]
    assert by_task["honest"] == pytest.approx((accuracy.loc["mix(100)", "face"] + accuracy.loc["mix(337)", "style"]) / 2)
    assert by_task["claimed"] == pytest.approx(accuracy.loc[steps].max().mean())
    assert table.loc[("full", "overall"), "source"] == "random halves"
    by = step_table(board).set_index(["model", "task"])
    assert (by.loc[("mix", "face"), "chosen"], by.loc[("mix", "style"), "chosen"]) == (100, 337) and by["chosen"].isna().sum() == 2
    one = by.loc[("mix", "face")]
    assert one["score"] == accuracy.loc["mix(100)", "face"] and one["claimed"] == accuracy.loc[steps, "face"].max() and one["picked"] == int(accuracy.loc[steps, "face"].idxmax()[4:-1])
    assert one["optimism"] == pytest.approx(one["claimed"] - one["score"])
    assert {"chosen on validation", "chosen by task", "chosen on test"} <= set(topics(board))


@pytest.mark.parametrize("content", ['{"overall": {"step": 999}}', "[]", '{"overall": null}', "not json"])
def test_a_best_json_that_fits_nothing_chooses_nothing(tmp_path, content):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    (folder / "mix" / "best.json").write_text(content)
    assert Scoreboard.from_experiment(folder).chosen == {}


def test_validation_predictions_choose_where_there_is_no_best_json(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=60, labels={"face": LABELS["face"], "style": LABELS["style"]}, validation=True, collapsed={}))
    board = Scoreboard.from_experiment(folder)
    run = RunDir(folder / "mix")
    accuracy = {step: np.mean([(run.predictions(f"step-{step}", task, split="validation")["outcome"] == "correct").mean() for task in ("face", "style")]) for step in (100, 200, 300, 337)}
    assert board.chosen["mix"] == f"mix({max(accuracy, key=accuracy.get)})" and board.chosen_on_test == []


def test_a_step_that_is_best_on_validation_but_not_scored_on_test_is_not_chosen(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=30, labels={"face": LABELS["face"]}, validation=True, collapsed={}, skills={"mix(200)": 1.0}))
    assert validation_choice(RunDir(folder / "mix")).step == 200
    for part in (folder / "mix" / "predictions" / "step-200").rglob("part-test-*"):
        part.unlink()
    board = Scoreboard.from_experiment(folder)
    assert board.choices["mix"].step != 200 and board.choices["mix"].by_task["face"] != 200 and board.chosen["mix"] in board.rows


def test_runs_that_differ_in_the_seed_alone_are_one_recipe(tmp_path):
    seeds = {f"mix-{i}": {"schedule": {"seed": i}} for i in range(3)} | {"slow": {"schedule": {"learning_rate": 1e-5, "seed": 9}}}
    skills = {"mix-0(100)": 0.70, "mix-1(100)": 0.90, "mix-2(100)": 0.80, "slow(100)": 0.5}
    folder = build_experiment(tmp_path, Plan(samples=100, labels={"a": ["x", "y"], "b": ["x", "y"]}, runs=seeds, steps=(100,), skills=skills))
    board = Scoreboard.from_experiment(folder)
    assert board.seed_groups == {"mix": ["mix-0", "mix-1", "mix-2"]}
    own = board.means.loc[[f"mix-{i}(100)" for i in range(3)], "strict"]
    one = board.seeds[board.seeds["task"].isna()].iloc[0]
    assert one["seeds"] == 3 and one["accuracy"] == pytest.approx(own.mean()) and one["sd"] == pytest.approx(own.std())
    assert (one["lowest"], one["highest"]) == (own.min(), own.max()) and one["low"] < one["accuracy"] < one["high"]
    assert one["high"] - one["low"] < board.means.loc["mix-0(100)", "high"] - board.means.loc["mix-0(100)", "low"] + 3
    assert best_row(board) == "mix-0(100)"  # the recipe wins; its first run stands for it, not the luckiest
    assert "mix(100) x 3 seeds" in topics(board)["seeds"] and "mix(100) x 3 seeds" in board.to_text()
    assert board.to_html().count('class="seeds"') == 1
    assert sum(f.topic == "several settings" for f in findings(board)) == 1
    assert topics(board)["several settings"].startswith("mix-0 and slow differ in 2 settings (schedule.learning_rate and schedule.seed)")
    assert one["seed_low"] < one["lowest"] and one["seed_high"] > one["highest"]  # three seeds say little
    assert settings_table(board.configs).index.tolist() == ["schedule.learning_rate", "schedule.seed"]


def test_a_recipe_is_named_and_ranked_by_its_seeds_even_if_the_first_one_is_not_complete(tmp_path):
    seeds = {f"mix-{i}": {"schedule": {"seed": i}} for i in range(3)} | {"slow": {"schedule": {"learning_rate": 1e-5}}}
    skills = {"mix-0(100)": 0.70, "mix-1(100)": 0.90, "mix-2(100)": 0.80, "slow(100)": 0.75}
    folder = build_experiment(tmp_path, Plan(samples=90, labels={"a": ["x", "y"], "b": ["x", "y"]}, runs=seeds, steps=(100,), skills=skills, collapsed={}))
    board = Scoreboard.from_experiment(folder)
    own = board.means.loc[[f"mix-{i}(100)" for i in range(3)], "strict"]
    said, behind = topics(board), own.mean() - board.means.loc["slow(100)", "strict"]
    assert said["best"].startswith(f"mix(100) x 3 seeds has the highest strict mean of the rows to choose from (seeds by their mean): {own.mean():.1f} % (95 % interval")
    assert f"slow(100), is {behind:.1f} points behind mix(100) x 3 seeds" in said["runner-up"] and behind > 0
    assert f"That is {own.mean() - board.means.loc['base', 'strict']:.1f} points above" in said["gain"]
    assert f"from {own.min():.1f} to {own.max():.1f}" in said["ship"] and "differ by chance" in said["ship"] and "mix-0(100), the first that is fully scored" in said["ship"]
    shutil.rmtree(folder / "mix-0" / "predictions" / "step-100" / "a")
    board = Scoreboard.from_experiment(folder)
    assert [one.recipe for one in standings(board)] == ["mix", "slow"] and best_row(board) == "mix-1(100)"
    assert topics(board)["best"].startswith("mix(100) x 2 seeds has the highest") and f"{own.iloc[1:].mean():.1f} %" in topics(board)["best"]


def test_pairs_without_the_best_row_that_differ_in_several_settings_are_named_too():
    cells = pd.concat([imported_cells(checked_accuracies(pd.DataFrame({"model": m, "step": 1, "dataset": ["d"], "accuracy": a, "note": None, "n": 100, "rule": "closed"}), Path("x"))) for m, a in (("a", 90), ("b", 80), ("c", 70))], ignore_index=True)
    configs = {"a": {"lr": 1, "rank": 1}, "b": {"lr": 2, "rank": 1}, "c": {"lr": 3, "rank": 2}}
    found = topics(Scoreboard(cells, configs=configs))
    assert found["several settings"].startswith("a and c differ in 2 settings") and "b and c (2)" in found["several settings elsewhere"]


def test_recipes_that_differ_in_one_setting_are_comparable(board, experiment):
    assert "several settings" not in topics(board)  # mix and full differ in method.name alone
    assert differing({"run": "a", "method": {"name": "x"}}, {"run": "b", "method": {"name": "y"}}) == ["method.name"]


def test_settings_of_other_methods_are_no_difference():
    method = RunConfig(suite="s.yaml").method.model_dump()
    qlora, lora, full = ({"method": {**method, "name": name}, "schedule": {"steps": 10}} for name in ("qlora", "lora", "full"))
    for one in (lora, full):
        one["method"] |= {"quantisation": "int8", "double_quantisation": False}  # says nothing of a model that isn't quantised
    full["method"] |= {"rank": 64, "freeze_tower": False}
    assert differing(qlora, lora) == differing(lora, full) == ["method.name"]
    assert differing(qlora, qlora | {"method": {**qlora["method"], "quantisation": "int8"}}) == ["method.quantisation"]
    assert differing(full, full | {"method": {**full["method"], "freeze_merger": False}}) == ["method.freeze_merger"]
    again = {**lora, "method": {**lora["method"], "rank": 8}}
    table = settings_table({"qlora": qlora, "lora": lora, "again": again, "full": full})
    assert list(table.index) == ["method.name", "method.rank"] and list(table.loc["method.rank", ["qlora", "lora", "again"]]) == [16, 16, 8] and pd.isna(table.loc["method.rank", "full"])


def test_tasks_lost_against_the_untuned_model_are_badged(tmp_path):
    labels = {"a": ["x", "y"], "b": ["x", "y"]}
    folder = build_experiment(tmp_path, Plan(labels=labels, collapsed={("mix(100)", "b"): "y"}, skills={"base": 0.85, "mix(300)": 0.9}, runs={"mix": {}}))
    board = Scoreboard.from_experiment(folder)
    lost = {(one.row, one.task) for one in board.cells.itertuples() if "below untuned" in one.badges}
    assert ("mix(100)", "b") in lost and ("mix(300)", "a") not in lost
    tests = board.tests("base").set_index(["row", "task"])
    assert all(tests.loc[key, "verdict"] == "worse" for key in lost)
    assert "mix(100) on" in topics(board)["regressed elsewhere"]


def test_the_original_lost_tasks_are_named(original):
    cells = original.cells[original.cells["row"] == "Qwen2-vl-mix(3000)"].set_index("task")
    base = accuracy_table(original).loc["Qwen2-vl"]
    assert cells.index[cells["below_untuned"]].tolist() == [t for t in original.tasks if cells.loc[t, "accuracy"] < base[t]]
    assert "figures only" in topics(original)["regressed"]


def test_any_row_can_be_the_reference(board, experiment):
    other = Scoreboard.from_experiment(experiment, reference="gpt-4o")
    tests = other.tests()
    assert len(tests) == (len(other.rows) - 1) * len(other.tasks) and set(tests["verdict"]) <= {"better", "worse", "no evidence"}
    assert (tests["p_holm"] >= tests["p_value"]).all() and "Against gpt-4o" in other.to_html()
    with pytest.raises(InputError, match="no row is named 'gpt-5'"):
        Scoreboard.from_experiment(experiment, reference="gpt-5")


def test_holm_runs_over_all_cells_of_the_table(board):
    tests = board.tests("base").sort_values("p_value")
    expected = multipletests(tests["p_value"], method="holm")[1]
    assert tests["p_holm"].tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=0)
    assert (expected > 2 * tests["p_value"]).any(), "all of them 0 or 1: nothing to correct"
    assert len(tests) == (len(board.rows) - 1) * len(board.tasks)


def test_published_figures_stand_beside_our_own(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=30, labels={"face": LABELS["face"], "style": LABELS["style"]}))
    (folder / "paper").mkdir()
    write(folder / "paper" / "accuracies.csv", "model,step,dataset,accuracy,n\nsota,,face,97.5,200\nsota,,style,88,100\nsota,,else,1,1\n")
    board = Scoreboard.from_experiment(folder)
    assert board.means.loc["sota", "kind"] == "imported" and board.means.loc["sota", "strict"] == pytest.approx(92.75)
    assert "sota" not in set(board.tests()["row"]) and "97.5" in board.to_html()
    write(folder / "paper" / "accuracies.csv", "model,step,dataset,accuracy\nsota,,else,97.5\n")
    with pytest.raises(InputError, match="none of its data sets is a task here"):
        Scoreboard.from_experiment(folder)


# -------------------------------------------------------------------------- LaTeX, differences


KNOWN = {"begin", "end", "toprule", "midrule", "bottomrule", "rotatebox", "textbf", "mathrm", "par", "smallskip", "noindent", "footnotesize", "symbol"}


def latex_rows(text: str) -> list[list[str]]:
    """Read a tabular as LaTeX would: fails on anything that it would act on and that we did not write."""
    escapes = {re.match(r"\\(\w+)", value)[1] for value in LATEX.values() if re.match(r"\\\w+", value)}
    rows, cells, cell, depth, maths, i = [], [], "", 0, False, 0
    while i < len(text):
        if command := re.match(r"\\([A-Za-z]+)", text[i:]):
            assert command[1] in KNOWN | escapes, command[0]
            cell, i = cell + command[0], i + command.end()
        elif text.startswith(r"\\", i):
            assert depth == 0 and not re.match(r"\s*[\[*]", text[i + 2 :]), "an argument of the line break"
            rows, cells, cell, i = [*rows, [*cells, cell]], [], "", i + 2
        elif text[i] == "\\":
            assert text[i + 1] in "{}$&#%_"
            cell, i = cell + text[i : i + 2], i + 2
        else:
            assert text[i] not in "#%~" and (text[i] not in "^_" or maths), text[i - 20 : i + 1]
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            maths ^= text[i] == "$"
            assert depth >= 0
            cells, cell = ([*cells, cell], "") if text[i] == "&" and depth == 0 else (cells, cell + text[i])
            i += 1
    assert depth == 0 and not maths
    return rows


def test_latex_has_as_many_columns_as_it_says_and_escapes(chinese, original):
    for board in (chinese, original):
        text = latex_table(board)
        columns = text.split(r"\begin{tabular}{")[1].split("}")[0]
        rows = latex_rows(text)
        assert len(rows) == len(board.rows) + 1 and {len(row) for row in rows} == {len(columns)}
        assert "<img" not in text
    assert r"\textbf{69.2}" in latex_table(original)
    assert r"Qwen2-vl-mix(3000)$^{\mathrm{t}}$" in latex_table(original) and "optimistic" in latex_table(original)


@pytest.mark.parametrize("name", ["[4pt] row", "*row", r"\\input{x}", "a & b % c", "~^_#$", "{open", "--", "`?", 'quote"'])
def test_no_name_is_an_instruction_to_latex(name):
    assert len(latex_rows(rf"first \\ {latex_text(name)} & 1 \\")[1]) == 2


def test_means_over_samples_stand_in_every_form(board):
    value = f"{board.means.loc['mix(300)', 'strict_micro']:.1f}"
    for text in (text_table(board), markdown_table(board), latex_table(board)):
        line = next(line for line in text.splitlines() if "mix(300)" in line and re.search(r"\d\.\d", line))
        assert re.search(r"\bmicro\b", text) and value in line


def test_means_keep_their_intervals_and_seeds_in_every_file(tmp_path):
    seeds = {f"mix-{i}": {"schedule": {"seed": i}} for i in range(2)}
    board = Scoreboard.from_experiment(build_experiment(tmp_path, Plan(samples=30, labels={"a": ["x", "y"], "b": ["x", "y"]}, runs=seeds, steps=(100,), collapsed={})))
    mean, (over,) = board.means.loc["base"], board.seeds[board.seeds["task"].isna()].to_dict("records")
    low, high = f"{mean['strict_low']:.1f}", f"{mean['strict_high']:.1f}"
    assert f"{mean['strict']:.1f} ({low}–{high})" in markdown_table(board) and rf"{{\footnotesize({low}--{high})}}" in latex_table(board)
    spread = f"seeds {over['lowest']:.1f} to {over['highest']:.1f}"
    assert all(spread in text and "n = 30 for each task" in text.replace("\\", "") for text in (markdown_table(board), latex_table(board)))
    assert {len(row) for row in latex_rows(latex_table(board))} == {1 + 4 + 3 + 2}
    table = pd.read_csv(io.StringIO(means_text(board))).set_index("row")
    for rule in ("strict", "answered_only", "common", "strict_micro"):
        assert table.loc["base", [rule, f"{rule}_low", f"{rule}_high"]].tolist() == pytest.approx([mean[rule], mean[f"{rule}_low"], mean[f"{rule}_high"]], abs=1e-4)
    one = table.loc["mix(100) x 2 seeds"]
    assert (one["kind"], one["seeds"]) == ("seeds", 2) and one[["strict", "strict_low", "sd"]].tolist() == pytest.approx([over["accuracy"], over["low"], over["sd"]], abs=1e-4)


def test_column_maxima_are_bold_in_html(original):
    text = original.to_html()
    tops = re.findall(r'<td class="top"[^>]*>([\d.]+)', text)
    assert len(tops) >= len(original.tasks)
    best = accuracy_table(original).max()
    assert {f"{value:.1f}" for value in best} <= set(tops)


def test_means_stand_in_one_order_everywhere(board):
    order = ["mean", "answered", "coverage", "common"]
    text = next(line for line in text_table(board).splitlines() if line.startswith("model(step)"))
    assert text.split()[1:5] == order
    heads = re.findall(r'<th scope="col" class="mean"[^>]*>([^<]+)', board.to_html())
    assert [head.split()[0] for head in heads] == order


def test_the_difference_of_two_scoreboards(tmp_path):
    plan = {"samples": 60, "labels": {"face": LABELS["face"], "style": LABELS["style"]}, "runs": {"mix": {}}, "steps": (100, 200), "collapsed": {}}
    before = Scoreboard.from_experiment(build_experiment(tmp_path / "a", Plan(**plan, skills={"mix(200)": 0.5})))
    folder = build_experiment(tmp_path / "b", Plan(**plan, skills={"mix(200)": 0.95}))
    (folder / "mix/predictions/step-100").rename(folder / "mix/predictions/step-150")
    after = Scoreboard.from_experiment(folder)
    table = difference(before, after).table.astype({"task": object}).fillna({"task": "mean"}).set_index(["row", "task"])
    assert table.loc[("mix(100)", "face"), "state"] == "gone" and table.loc[("mix(150)", "face"), "state"] == "new"
    assert table.loc[("mix(200)", "face"), "verdict"] == "better" and table.loc[("mix(200)", "face"), "n"] == 60
    assert table.loc[("base", "face"), "state"] == "same"
    change = after.means.loc["mix(200)", "strict"] - before.means.loc["mix(200)", "strict"]
    assert table.loc[("mix(200)", "mean"), "change"] == pytest.approx(change)
    assert "figures differ" in difference(before, after).to_markdown() and "mix(150)" in difference(before, after)._repr_html_()
    assert (difference(before, before).table["state"] == "same").all() and not difference(before, before).notes
    after.configs["mix"]["schedule"] |= {"learning_rate": 0.5, "warmup": 7}
    assert "mix was trained with 2 settings changed (schedule.learning_rate and schedule.warmup)" in difference(before, after).to_markdown().replace("\\", "")


# -------------------------------------------------------------------------- open text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "The small model's and the baselines' own answers to an open task with contact details."
    from qwen2vl_sft.config import ModelConfig, PreprocessingConfig, ScoringConfig
    from qwen2vl_sft.data.prepare import prepare
    from qwen2vl_sft.data.toy import write_toy_suite
    from qwen2vl_sft.scoring.baselines import score_baselines
    from qwen2vl_sft.scoring.experiment import score_untuned
    from qwen2vl_sft.tasks import load_suite

    folder, settings = tmp_path_factory.mktemp("written"), ScoringConfig(max_new_tokens=4)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QWEN2VL_SFT_ROOT", str(folder))
        suite = write_toy_suite(folder / "toy", rows=6)
        suite.write_text(suite.read_text().replace("answer: text", "answer: text\n    metric: fields\n    fields: [email, url]"))
        for path in (folder / "toy").glob("word-*.csv"):
            path.write_text(path.read_text().replace("fire", "fire@example.org").replace("a leaf", "mail a@b.org or www.leaf.org"))
        prepared = prepare(load_suite(suite))
        score_untuned(RunDir(folder / "runs" / "toy" / "base"), prepared, ModelConfig(device="cpu"), PreprocessingConfig(), settings)
        score_baselines(folder / "runs" / "toy", prepared, settings)
    return Scoreboard.from_experiment(folder / "runs" / "toy")


def test_how_near_open_answers_came_stands_in_every_form(written):
    from rapidfuzz.distance import Levenshtein

    from qwen2vl_sft.comparison.report import Material, page
    from qwen2vl_sft.workflow.records import scoreboard_record

    own = written.samples[(written.samples["row"] == "base") & (written.samples["task"] == "word")]
    near = [Levenshtein.normalized_similarity(text.strip().lower(), target) for text, target in zip(own["text"], own["target"], strict=True)]
    cells = written.to_frame().query("dataset == 'word'").set_index("model")
    assert cells.loc["base", "similarity"] == pytest.approx(100 * np.mean(near), abs=1e-6) and 0 <= cells.loc["base", "similarity"] < 60
    assert cells.loc["base", ["exact_match", "email", "email_n", "url", "url_n"]].tolist() == [0, 0, 4, 0, 2]
    guess = own["target"].mode()  # three of each: the baseline takes one of them
    assert cells.loc["majority", "exact_match"] == pytest.approx(100 / 3) and len(guess) == 3
    assert written.to_frame().query("dataset == 'colour'")["similarity"].isna().all()
    line = f"base 0.0 / {cells.loc['base', 'similarity']:.1f} / 0.0 (4) / 0.0 (2)"
    assert "word, open text, exact match / edit similarity / e-mail (samples) / URL (samples)" in text_table(written)
    assert line in re.sub(r"\s+", " ", text_table(written)) and line in markdown_table(written).replace("\\_", "_") and line in latex_table(written)
    html = page(Material(written), {})
    table = html[html.index("Open text, %") :].partition("</table>")[0]
    assert table.count("<tr>") == 4 and f"<td>{cells.loc['base', 'similarity']:.1f}</td><td>0.0 (4)</td><td>0.0 (2)</td>" in table
    assert html.count("Open text, %") == 1, "the closed task has no such table"
    tasks = scoreboard_record(written)["rows"][0]["tasks"]
    assert tasks["word"]["open"]["similarity"] == pytest.approx(100 * np.mean(near)) and tasks["colour"]["open"] is None


def test_nothing_that_is_printed_is_in_a_tooltip_only(board):
    "Coverage below 100 %, and p-values after Holm."
    html, part = board.to_html(), board.cells[board.cells["coverage"] < 100]
    assert len(part) and html.count("<small>coverage ") == len(part) and f"<small>coverage {part['coverage'].iloc[0]:.1f}</small>" in html
    tests = board.tests()
    assert sorted(re.findall(r'data-p="([^"]+)"', html)) == sorted(f"{p:.2g}" for p in tests["p_holm"]) and 'content:"\\a p " attr(data-p)' in html
