"""Mistakes and deployment: trajectories, label noise as cleanlab finds it, thresholds that keep what they promise."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from synthetic_experiment import LABELS, Plan, build_experiment

from qwen2vl_sft.comparison.board import accuracy_table
from qwen2vl_sft.comparison.deployment import automatic_line, confidence_table, cost_table, detection_line, parse_price, speed_table, thresholds
from qwen2vl_sft.comparison.mistakes import NO_ANSWER, confident_thresholds, confusion, disagreements, label_noise, mixture_table, trajectories, trajectory_table, votes_of
from qwen2vl_sft.comparison.scoreboard import Scoreboard
from qwen2vl_sft.core import InputError
from qwen2vl_sft.rundir import RunDir

TASKS = {"weapon": LABELS["weapon"], "headwear": LABELS["headwear"], "number": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    plan = Plan(samples=150, labels=TASKS, api=True, validation=True, noise={"headwear": 6}, positive={"weapon": "weapon"}, collapsed={}, skills={"base": 0.6})
    return build_experiment(tmp_path_factory.mktemp("mistakes"), plan)


@pytest.fixture(scope="module")
def board(folder):
    return Scoreboard.from_experiment(folder)


def test_confusion_counts_every_sample_once(board):
    for row in ("base", "gpt-4o"):
        own = board.samples[(board.samples["row"] == row) & (board.samples["task"] == "headwear")]
        table = confusion(own, LABELS["headwear"])
        assert table.to_numpy().sum() == len(own) and table.sum(axis=1).to_dict() == own["target"].value_counts().to_dict()
        if NO_ANSWER in table:
            assert table[NO_ANSWER].sum() == (~own["outcome"].isin(["correct", "wrong"])).sum()
    few = confusion(own, LABELS["headwear"], most=2)
    assert few.to_numpy().sum() == len(own) and "(other labels)" in few.index


def test_trajectories_agree_with_the_accuracies(board):
    table = trajectories(board, "mix")
    accuracy = accuracy_table(board)
    for task, part in table.groupby("task"):
        for row in ("base", "mix(100)", "mix(337)"):
            assert 100 * part[row].mean() == pytest.approx(accuracy.loc[row, task])
        learned, forgotten = (part["kind"] == kind for kind in ("learned", "forgotten"))
        assert not part.loc[learned, "base"].any() and part.loc[learned, "mix(337)"].all()
        assert part.loc[forgotten, "base"].all() and not part.loc[forgotten, "mix(337)"].any()
    assert (trajectory_table(board).sum(axis=1) == 150).all()


def test_planted_label_noise_comes_first(board):
    queue = label_noise(board)
    own = queue[queue["task"] == "headwear"]
    planted = {f"headwear-test-{i:04d}" for i in range(6)}
    assert len(planted & set(own["id"])) >= 5 and (own["agree"] >= 2).all()
    assert len(planted & set(own["id"].head(8))) >= 4
    assert all(len(models) == len({m.split("(")[0] for m in models}) for models in queue["models"])  # one vote a run


def test_an_answer_that_is_correct_in_other_words_accuses_no_label():
    table = pd.DataFrame({"id": ["1", "2"], "target": ["wx: abc", "wx: abc"], "prediction": ["WeChat abc", "wx: abd"], "outcome": ["correct", "wrong"], "rule": "free"})
    votes = votes_of(table, None)
    assert votes["vote"].isna().tolist() == [True, False] and votes["doubt"].tolist() == [0.0, 1.0]


def test_confident_thresholds_and_issues_are_cleanlabs():
    count = pytest.importorskip("cleanlab.count", reason="lacks cleanlab (pip install cleanlab)")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    scores = rng.dirichlet([0.6, 0.6, 0.6], 300) * 0.4
    scores[np.arange(300), np.where(rng.random(300) < 0.9, truth, (truth + 1) % 3)] += 0.6
    assert np.allclose(confident_thresholds(scores, truth), count.get_confident_thresholds(truth, scores))
    labels = ["a", "b", "c"]
    table = pd.DataFrame({
        "id": range(300), "target": [labels[i] for i in truth], "prediction": [labels[i] for i in scores.argmax(axis=1)], "outcome": "wrong",
        "probabilities": [json.dumps(dict(zip(labels, row, strict=True))) for row in scores],
    })
    _, where = count.compute_confident_joint(truth, scores, calibrate=False, return_indices_of_off_diagonals=True)
    ours = votes_of(table, labels)["vote"].notna().to_numpy().nonzero()[0]
    assert set(ours) <= set(where) and len(ours) > 0.8 * len(where)  # cleanlab also takes a confident label that is not the most probable


def test_disagreements_name_who_is_right(board):
    table = disagreements(board, "mix(100)")
    assert len(table) == (board.samples[board.samples["row"] == "mix(100)"]["outcome"] != "correct").sum()
    one = table[table["gpt-4o"]].iloc[0]
    match = board.samples[(board.samples["row"] == "gpt-4o") & (board.samples["task"] == one["task"]) & (board.samples["id"] == one["id"])]
    assert match["outcome"].item() == "correct"


def test_shares_come_from_the_mixture_and_the_audit(folder, board):
    path = folder.parent.parent / "prepared" / "synthetic" / "audit.json"
    audit = json.loads(path.read_text())
    audit["tasks"] = {task: {"splits": {"train": {"rows": rows}}} for task, rows in zip(TASKS, (100, 300, 600), strict=True)}
    path.write_text(json.dumps(audit))
    table = mixture_table(board, path.parent)
    name = board.configs["mix"]["mixture"]["name"]
    shares = table[table["model"] == "mix"].set_index("task")["share"].to_dict()
    assert shares == pytest.approx({"weapon": 10, "headwear": 30, "number": 60} if name in ("concatenate", "proportional") else dict.fromkeys(TASKS, 100 / 3))
    one = table[(table["model"] == "mix") & (table["task"] == "weapon")].iloc[0]
    accuracy = accuracy_table(board)
    assert one["gain"] == pytest.approx(accuracy.loc[one["row"], "weapon"] - accuracy.loc["base", "weapon"])
    assert mixture_table(board, path.parent / "nowhere").empty


# -------------------------------------------------------------------------- deployment


def test_thresholds_are_chosen_on_validation_and_judged_on_test(folder):
    table = confidence_table(folder, rows=["mix(300)", "base"])
    lines = thresholds(table, precision=0.9, positives={"weapon": "weapon"})
    assert set(lines["chosen_on"]) == {"validation"} and set(lines["task"]) == {"weapon", "headwear"}
    for one in lines.to_dict("records"):
        own = table[(table["row"] == one["row"]) & (table["task"] == one["task"])]
        validation, test = own[own["split"] == "validation"], own[own["split"] == "test"]
        taken = validation["confidence"] >= one["threshold"]
        assert validation.loc[taken, "right"].mean() >= 0.9
        assert one["automatic"] == pytest.approx(100 * (test["confidence"] >= one["threshold"]).mean()) and one["automatic"] + one["people"] == pytest.approx(100)
        assert (one["task"] == "weapon") == (not np.isnan(one["recall"]))
    alone = thresholds(table[table["split"] == "test"])
    assert set(alone["chosen_on"]) == {"test"}


def test_calibrated_thresholds_keep_their_promise_in_simulation():
    """Chosen on 400 validation samples, judged on the truth: the wanted precision is kept up to its sampling error."""
    rng, kept = np.random.default_rng(0), []
    for _ in range(100):
        draw = lambda n: (lambda c: pd.DataFrame({"confidence": c, "right": rng.random(n) < c}))(rng.uniform(0.5, 1, n))
        kept.append(automatic_line(draw(400), draw(4000), 0.9)["precision"])
    assert 88 < np.mean(kept) < 91


def test_what_cannot_be_reached_decides_nothing():
    never = pd.DataFrame({"confidence": [0.9, 0.8], "right": [False, False]})
    line = automatic_line(never, never, 0.95)
    assert np.isnan(line["threshold"]) and (line["automatic"], line["people"]) == (0, 100)
    detect = detection_line(pd.DataFrame({"score": [0.9, 0.6, 0.2], "target": ["yes", "yes", "no"]}), pd.DataFrame({"score": [0.8, 0.7, 0.1], "target": ["yes", "no", "no"]}), "yes", 1.0)
    assert detect["recall"] == 100 and detect["precision_at_recall"] == 50


def test_costs_and_speed(board):
    table = cost_table(board).set_index("row")
    assert table.loc["gpt-4o", "cost_per_1000"] == pytest.approx(2.0) and table.loc["gpt-4o", "images_per_second"] == pytest.approx(1 / 1.5)
    assert np.isnan(table.loc["mix(300)", "cost_per_1000"])
    priced = cost_table(board, dict(map(parse_price, ["3.6", "full=7.2", "mix(200)=3.6@50"]))).set_index("row")
    assert priced.loc["mix(300)", "cost_per_1000"] == pytest.approx(1000 * 0.01 * 3.6 / 3600)
    assert priced.loc["full(300)", "cost_per_1000"] == pytest.approx(2 * priced.loc["mix(300)", "cost_per_1000"])
    assert (priced.loc["mix(200)", "images_per_second"], priced.loc["mix(200)", "cost_per_1000"]) == (pytest.approx(50), pytest.approx(1000 / 50 * 3.6 / 3600))
    assert priced.loc["gpt-4o", "cost_per_1000"] == pytest.approx(2.0)
    speeds = speed_table(board).set_index(["row", "task"])
    assert len(speeds) == len(board.cells) and speeds.loc[("gpt-4o", "weapon"), "images_per_second"] == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("text", ["mix", "mix=", "mix=-1", "mix=2@0", "mix=nan", "mix=2@x"])
def test_prices_that_make_no_sense_are_said(text):
    with pytest.raises(InputError, match="write ROW=PRICE"):
        parse_price(text)


def test_a_price_for_a_row_that_is_not_there_is_said(board):
    with pytest.raises(InputError, match="no row or model is named 'mixx'"):
        cost_table(board, dict([parse_price("mixx=2")]))


def test_predictions_without_probabilities_have_no_thresholds(folder, tmp_path):
    copy = RunDir(shutil.copytree(folder.parent.parent, tmp_path / "all") / "runs" / folder.name / "mix")
    for part in copy.predictions_folder("step-300", "weapon").glob("*closed*"):
        pd.read_parquet(part).drop(columns="probabilities").to_parquet(part)
    table = confidence_table(copy.path.parent, rows=["mix(300)"])
    assert set(table["task"]) == {"headwear"}
