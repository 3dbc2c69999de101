"""Calibration and operating points: scikit-learn's numbers, no leak from the test set, honest edge cases."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss
from statsmodels.stats.proportion import proportion_confint

from qwen2vl_sft.core import InputError
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring.calibration import (
    Probabilities,
    Wanted,
    achieved,
    calibrate_predictions,
    calibrate_run,
    calibration_figures,
    calibration_for,
    calibration_notes,
    calibration_path,
    calibration_table,
    fit_temperature,
    kept_points,
    operating_point,
    read_calibration,
    reliability,
    rows_needed,
    threshold_for,
)
from qwen2vl_sft.tasks import Task

FACE = Task(name="face", question="Is it a face?", labels=["yes", "no"], positive="yes")
KIND = Task(name="kind", question="What is it?", labels=["a", "b", "c", "d"], aliases={"a": ["A one"]})


def drawn(task: Task, samples: int, seed: int, sharpness: float = 2.0) -> pd.DataFrame:
    "Predictions of a model that is too sure by that factor."
    rng = np.random.default_rng(seed)
    honest = rng.dirichlet(np.full(len(task.labels), 0.5), samples)
    truth = [task.labels[rng.choice(len(task.labels), p=row)] for row in honest]
    stated = (honest**sharpness / (honest**sharpness).sum(axis=1, keepdims=True))
    return pd.DataFrame({
        "id": [f"{task.name}-{i}" for i in range(samples)], "target": truth, "rule": "closed",
        "probabilities": [json.dumps(dict(zip(task.labels, row, strict=True))) for row in stated],
    })  # fmt: skip


def as_arrays(task: Task, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([list(json.loads(row).values()) for row in table["probabilities"]])
    return np.maximum(values, 1e-300), np.array([task.labels.index(target) for target in table["target"]])


@pytest.mark.parametrize("task", [FACE, KIND], ids=["two", "four"])
def test_the_temperature_has_the_greatest_likelihood(task):
    "Against a direct search with scipy over scikit-learn's log loss."
    table = drawn(task, 600, 0)
    values, truth = as_arrays(task, table)

    def loss(log_temperature: float) -> float:
        powers = values ** np.exp(-log_temperature)
        return log_loss(truth, powers / powers.sum(axis=1, keepdims=True), labels=range(len(task.labels)))

    expected = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)
    content = calibrate_predictions(task, table)
    assert content["temperature"] == pytest.approx(expected, rel=1e-3) and 1.4 < expected < 2.5
    assert content["operating_point"] is None and content["note"] == ""
    figures = content["figures"]["validation"]
    assert figures["after"]["log_loss"] == pytest.approx(loss(np.log(expected)), abs=1e-4) and figures["after"]["log_loss"] < figures["before"]["log_loss"]


def test_a_label_that_validation_lacks_and_aliases_as_targets():
    table = drawn(KIND, 200, 1)
    table = table[table["target"] != "d"]
    table.loc[table["target"] == "a", "target"] = "A one"
    content = calibrate_predictions(KIND, table)
    values, truth = as_arrays(KIND, table.assign(target=table["target"].replace("A one", "a")))
    figures = content["figures"]["validation"]["before"]
    assert figures["log_loss"] == pytest.approx(log_loss(truth, values / values.sum(axis=1, keepdims=True), labels=range(4)), rel=1e-3)
    one_hot = np.eye(4)[truth]
    assert figures["brier"] == pytest.approx(((values - one_hot) ** 2).sum(axis=1).mean(), abs=1e-4)
    table["target"] = "e"
    with pytest.raises(InputError, match="task 'kind': the target 'e' is no label"):
        calibrate_predictions(KIND, table)


def test_calibration_error_by_hand():
    "Four answers: 0.95 right, 0.95 wrong, 0.65 right, 0.65 right."
    values = np.array([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]])
    split = Probabilities(("yes", "no"), values, np.array([0, 1, 0, 0]))
    bins = reliability(split)
    assert bins["n"].tolist() == [2, 2] and bins["accuracy"].tolist() == [1.0, 0.5] and bins["confidence"].tolist() == pytest.approx([0.65, 0.95])
    figures = calibration_figures(split)
    assert figures["ece"] == pytest.approx((0.35 + 0.45) / 2)
    assert figures["brier"] == pytest.approx(2 * (0.05**2 + 0.95**2 + 2 * 0.35**2) / 4)


@pytest.mark.parametrize("right", [True, False])
def test_answers_that_no_temperature_follows_from(right):
    values = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    truth = values.argmax(axis=1) if right else values.argmin(axis=1)
    temperature, note = fit_temperature(Probabilities(("yes", "no"), values, truth))
    assert temperature == 1.0 and note
    assert fit_temperature(Probabilities(("yes", "no"), values[:0], truth[:0])) == (1.0, "no validation samples")


def test_the_test_set_decides_nothing():
    "Other test answers, even permuted targets, change no temperature and no threshold."
    validation, test = drawn(FACE, 300, 2), drawn(FACE, 300, 3)
    shuffled = test.assign(target=test["target"].sample(frac=1, random_state=0).tolist())
    found = [calibrate_predictions(FACE, validation, one, Wanted(precision=0.9)) for one in (test, shuffled, None)]
    assert len({(one["temperature"], one["operating_point"]["threshold"]) for one in found}) == 1
    assert found[0]["figures"]["test"] != found[1]["figures"]["test"] and found[2]["operating_point"]["test"] is None
    assert found[0]["operating_point"]["test"]["precision"] > found[1]["operating_point"]["test"]["precision"]


def test_thresholds_by_exhaustive_search():
    rng = np.random.default_rng(4)
    for _ in range(8):
        score = rng.random(40).round(2)
        hit = rng.random(40) < score
        for wanted in (Wanted(precision=0.8), Wanted(recall=0.7)):
            threshold = threshold_for(hit, score, wanted)
            figures = [achieved(hit, score, cut) for cut in np.unique(score)]
            if wanted.precision:
                good = [one for one in figures if one["precision"] >= 0.8 and one["recall"] > 0]
                assert (threshold is None) == (not good)
                assert not good or achieved(hit, score, threshold)["recall"] == max(one["recall"] for one in good)
            else:
                good = [one for one in figures if one["recall"] >= 0.7]
                assert achieved(hit, score, threshold)["precision"] == max(one["precision"] for one in good)
    assert threshold_for(np.array([False, True]), np.array([0.9, 0.1]), Wanted(precision=0.9)) is None
    for bad in ({"precision": 0.9, "recall": 0.9}, {"precision": 0.0}, {"recall": 1.1}):
        with pytest.raises(InputError, match="one wanted precision or one wanted recall"):
            Wanted(**bad)


def predicted(run: RunDir, task: Task, split: str, seed: int, weights: str = "w") -> None:
    "Predictions of a checkpoint that is there, with the note that scoring makes."
    (run.path / "checkpoints" / "step-4").mkdir(parents=True, exist_ok=True)
    run.note_decided("step-4", task.name, "closed", f"{weights} {task.fingerprint}", split, {"task": task.fingerprint, "weights": weights})
    run.write_predictions("step-4", task.name, 0, drawn(task, 120, seed).assign(split=split))


def test_a_run_is_calibrated_from_its_files_and_changed_predictions_void_it(tmp_path):
    run = RunDir(tmp_path / "runs/x/mix")
    for split, seed in (("validation", 5), ("test", 6)):
        predicted(run, FACE, split, seed)
    open_task = Task(name="word", question="Which word?", answer="text")
    written = calibrate_run(run, [FACE, KIND, open_task], Wanted(recall=0.9))
    assert [one["task"] for one in written] == ["face"]
    stored = read_calibration(run, "step-4", "face")
    assert stored == json.loads(calibration_path(run, "step-4", "face").read_text()) and stored["operating_point"]["validation"]["recall"] >= 0.9
    assert {one["n"] for one in (stored["figures"]["validation"]["after"], stored["figures"]["test"]["after"])} == {120}
    run.write_predictions("step-4", "face", 0, drawn(FACE, 120, 7).assign(split="validation"))
    assert read_calibration(run, "step-4", "face") is None
    for wanted in (None, Wanted()):  # what `label` says to run then keeps what was wanted
        (again,) = calibrate_run(run, [FACE], wanted)
        assert again["operating_point"]["wanted"] == {"recall": 0.9} and again["operating_point"]["validation"]["recall"] >= 0.9
        assert again["operating_point"]["threshold"] != stored["operating_point"]["threshold"] and kept_points([again]) == "face (recall 0.9)"
    calibration_path(run, "step-4", "face").unlink()
    assert calibrate_run(run, [FACE])[0]["operating_point"] is None


def test_a_calibration_belongs_to_its_labels_and_its_weights(tmp_path):
    "A label that came later, other weights under the same name, predictions of two states: each is refused with what to do."
    run = RunDir(tmp_path / "runs/x/mix")
    predicted(run, KIND, "validation", 8)
    wider = Task(name="kind", question="What is it?", labels=["a", "b", "c", "d", "e"], aliases={"a": ["A one"]})
    with pytest.raises(InputError, match="task 'kind' has another question or other labels than when x/mix/step-4 was scored on validation; run `qwen2vl-sft score x --split validation` first"):
        calibrate_run(run, [wider])
    with pytest.raises(InputError, match=r"task 'kind': its predictions were made over other labels \(e came or went\)"):
        calibrate_predictions(wider, run.predictions("step-4", "kind", "closed", "validation"))
    predicted(run, KIND, "test", 9, weights="newer")
    with pytest.raises(InputError, match="x/mix/step-4 was scored on test and on validation with different weights; run `qwen2vl-sft score x --split test` first"):
        calibrate_run(run, [KIND])
    predicted(run, KIND, "test", 9)
    (written,) = calibrate_run(run, [KIND])
    assert calibration_for(run, "step-4", KIND, "w") == written and calibration_for(run, "step-5", KIND, "w") is None
    for task, weights, message in ((KIND, "newer", "was calibrated with other weights than it has now"), (wider, "w", "has another question or other labels than when")):
        with pytest.raises(InputError, match=rf"{message}.*run `qwen2vl-sft score x --split validation` and `qwen2vl-sft calibrate x`, or delete .*calibration.json"):
            calibration_for(run, "step-4", task, weights)
    predicted(run, KIND, "validation", 10)
    with pytest.raises(InputError, match="the validation predictions of x/mix/step-4 have changed since it was calibrated"):
        calibration_for(run, "step-4", KIND, "w")
    (run.path / "checkpoints" / "step-4").rmdir()
    assert calibrate_run(run, [wider]) == []  # deleted since: nobody can score it again


def test_a_confidence_beyond_six_decimals_counts():
    "Wrong answers that the model was surer of than any rounding shows make the temperature higher."
    sure = pd.DataFrame({"id": range(40), "target": ["yes"] * 36 + ["no"] * 4, "probabilities": [json.dumps({"yes": 1 - 1e-12, "no": 1e-12})] * 40})
    temperature = calibrate_predictions(FACE, sure)["temperature"]
    assert temperature == pytest.approx(np.log((1 - 1e-12) / 1e-12) / np.log(0.9 / 0.1), rel=1e-3)  # where 90 % are right, 0.9 is what to state


def test_too_few_rows_for_a_wanted_precision_are_said():
    "Four flagged rows, all right, show a precision of 0.95 as little as one of 0.6."
    rows = {}
    for count in (5, 400):
        split = Probabilities(FACE.labels, np.array([[0.9, 0.1]] * (count - 1) + [[0.2, 0.8]]), np.array([0] * (count - 1) + [1]))
        point = operating_point(FACE.positive, split, None, Wanted(precision=0.95))
        rows[count] = {"run": "run", "checkpoint": "step-4", "task": "face", "temperature": 1.0, "note": "", "operating_point": point}
    assert rows[5]["operating_point"]["needed"] == 20 and rows[5]["operating_point"]["validation"]["flagged"] == 4
    low = proportion_confint(4, 4, method="wilson")[0]
    assert calibration_notes([rows[5]]) == [f"run/step-4, task 'face': too few validation rows for a precision of 0.95: it was seen on 4 flagged ones, at least 20 are needed to tell 0.95 from 1; it may be anything from {low:.3f} to 1.000"]
    assert calibration_notes([rows[400]]) == [] and rows_needed(Wanted(recall=0.9)) == 10 and rows_needed(Wanted(precision=1.0)) is None
    lacking = operating_point(FACE.positive, Probabilities(FACE.labels, np.array([[0.4, 0.6]] * 9), np.ones(9, dtype=int)), None, Wanted(recall=0.9))
    assert calibration_notes([{**rows[5], "positive": FACE.positive, "operating_point": lacking}]) == ["run/step-4, task 'face': no threshold reaches a recall of 0.9 on validation: no validation row is 'yes'"]
    (line,) = calibration_notes([{**rows[400], "note": "every validation answer is right, so no temperature follows from them"}])
    assert line == "run/step-4, task 'face': the temperature stays 1: every validation answer is right, so no temperature follows from them"


def test_the_table_states_both_numbers_of_rows_and_the_interval():
    content = calibrate_predictions(FACE, drawn(FACE, 150, 0), drawn(FACE, 90, 1), Wanted(precision=0.8))
    table = calibration_table([{"run": "r", "checkpoint": "c", **content}])
    low, high = content["operating_point"]["test"]["precision_interval"]
    assert table[["n_validation", "n_test"]].iloc[0].tolist() == [150, 90] and table["interval_test"].iloc[0] == f"{low:.3f} to {high:.3f}"
