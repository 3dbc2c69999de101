"""Scoring checkpoints: all in one pass, by both rules, killed and continued, redone when what decides them changes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl_sft.config import PreprocessingConfig, RunConfig, ScoringConfig
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.data.toy import toy_picture, write_toy_suite
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring import experiment, suite
from qwen2vl_sft.scoring.experiment import score_experiment, score_run
from qwen2vl_sft.scoring.suite import test_set
from qwen2vl_sft.tasks import load_suite
from qwen2vl_sft.training.trainer import train

SETTINGS = ScoringConfig(max_new_tokens=4, batch=4)


def trained(project, name: str, method: str, **changes) -> RunDir:
    config = RunConfig(
        suite=str(project / "toy" / "toy.yaml"), experiment="toy", run=name, model={"device": "cpu"},
        method={"name": method, **({"freeze_tower": False, "freeze_merger": False} if method == "full" else {})},
        schedule={"steps": 4, "save_at": [2], "micro_batch": 6, "learning_rate": 1e-3, **changes},
    )  # fmt: skip
    return train(config)


@pytest.fixture
def prepared(project):
    return prepare(load_suite(write_toy_suite(project / "toy", rows=12)))


def part_times(run: RunDir) -> dict[str, int]:
    return {str(path.relative_to(run.path)): path.stat().st_mtime_ns for path in run.path.glob("predictions/*/*/part-*.parquet")}


def counted(monkeypatch, module, name: str) -> list:
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **named: calls.append(args) or real(*args, **named))
    return calls


def test_all_runs_and_the_untuned_model_go_over_the_data_once(project, prepared, monkeypatch, capsys):
    runs = [trained(project, method, method) for method in ("full", "lora", "qlora")]
    capsys.readouterr()
    decoded = counted(monkeypatch, suite, "open_image")
    towers = counted(monkeypatch, suite, "tower_features")
    score_experiment(project / "runs" / "toy", SETTINGS, baselines=False)
    assert len(decoded) == 24 + 4 * 4  # each picture once for all models; the self-test takes 4 for each of the four
    assert sum(len(args[2]) for args in towers) == 24
    said = capsys.readouterr().out
    assert "plain base (base, lora/step-2, lora/step-4)" in said and "nf4 base (qlora/step-2, qlora/step-4)" in said
    for run in runs:
        assert run.predicted() == [(f"step-{step}", task) for step in (2, 4) for task in ("colour", "word")]
        assert run.status().state == "finished" and run.status().progress["answers"] == run.status().progress["of"] == 7 * 24
        tables = [run.predictions(f"step-{step}", "colour") for step in (2, 4)]
        assert all(len(table) == 12 and table["id"].is_unique for table in tables)
        assert not tables[0]["probabilities"].equals(tables[1]["probabilities"])
    alone = RunDir(project / "runs" / "alone" / "base")
    experiment.score_untuned(alone, prepared, experiment.read_config(runs[1]).model, PreprocessingConfig(), SETTINGS)
    for task in ("colour", "word"):  # the untuned row is the plain base, with no adapter active
        there = RunDir(project / "runs" / "toy" / "base").predictions("base", task)
        assert there.drop(columns="seconds").equals(alone.predictions("base", task).drop(columns="seconds"))
    before = [part_times(run) for run in runs]
    score_experiment(project / "runs" / "toy", SETTINGS)
    assert [part_times(run) for run in runs] == before


def test_models_that_do_not_fit_together_take_turns_with_the_same_answers(project, prepared):
    runs = [trained(project, method, method) for method in ("full", "lora")]
    experiment_folder = project / "runs" / "toy"
    score_experiment(experiment_folder, SETTINGS, baselines=False)
    tables = {}
    for run in [*runs, RunDir(experiment_folder / "base")]:
        for pair in run.predicted():
            tables[run.name, *pair] = run.predictions(*pair)
            for part in run.predictions_folder(*pair).iterdir():
                part.unlink()
    candidates = [one for run in runs for one in experiment.candidates_of(run, experiment.read_config(run))]
    scorer = suite.Scorer(experiment.checked_encoder(experiment.read_config(runs[1]), []), SETTINGS)
    tests = [test_set(prepared, task, SETTINGS) for task in prepared.suite.tasks]
    experiment.score_candidates(candidates, scorer, tests, most=1)
    for run in runs:
        for pair in run.predicted():
            first, again = tables[run.name, *pair].set_index("id"), run.predictions(*pair).set_index("id")
            assert again["text"].to_dict() == first["text"].to_dict()
    assert scorer.pixel_cache is not None and (project / "prepared" / "pixel-cache").exists()


def test_both_rules_lie_side_by_side_and_their_disagreement_is_kept(project, prepared, capsys):
    run = trained(project, "lora", "lora")
    score_run(run, prepared, SETTINGS)
    before = part_times(run)
    score_experiment(run.path.parent, SETTINGS.model_copy(update={"rule": "both"}), baselines=False)
    assert before.items() <= part_times(run).items()  # by the closed rule, and of open tasks, all was there
    assert run.rules("step-4", "colour") == ["closed", "free"] and run.rules("step-4", "word") == ["free"]
    closed, free = (run.predictions("step-4", "colour", rule).set_index("id") for rule in ("closed", "free"))
    table = pd.read_csv(run.path.parent / "rules.csv").set_index(["run", "checkpoint", "task"])
    line = table.loc["lora", "step-4", "colour"]
    assert line["n"] == 12 and line["differ"] == pytest.approx((closed["prediction"] != free["prediction"].reindex(closed.index)).mean())
    assert "rules.csv" in capsys.readouterr().out and list(table.index.unique("task")) == ["colour"]


def test_a_changed_picture_or_label_is_scored_again_and_no_other_row(project, prepared):
    run = trained(project, "lora", "lora")
    score_run(run, prepared, SETTINGS, steps=[4])
    before = run.predictions("step-4", "colour").set_index("id")
    toy_picture("red", np.random.default_rng(77)).save(project / "toy" / "pictures" / "test-4.png")
    table = (project / "toy" / "test.csv").read_text().replace("test-7.png,green", "test-7.png,blue")
    (project / "toy" / "test.csv").write_text(table)
    again = prepare(load_suite(project / "toy" / "toy.yaml"))
    score_run(run, again, SETTINGS, steps=[4])
    after = run.predictions("step-4", "colour").set_index("id")
    assert len(after) == 12 and after.index.is_unique
    same = [name for name in after.index if name in before.index and after.loc[name, "seconds"] == before.loc[name, "seconds"]]
    assert len(same) == 10  # `seconds` is measured: rows that were scored again have another


def test_a_checkpoints_scores_are_those_of_the_weights_in_its_folder(project, prepared):
    "Adapters loaded side by side must not be mixed up: each is scored alone and together with the others."
    run = trained(project, "lora", "lora", learning_rate=3e-2)
    score_run(run, prepared, SETTINGS)
    together = {step: run.predictions(f"step-{step}", "colour") for step in (2, 4)}
    for step in (2, 4):
        for part in run.predictions_folder(f"step-{step}", "colour").iterdir():
            part.unlink()
        score_run(run, prepared, SETTINGS, steps=[step])
        alone = run.predictions(f"step-{step}", "colour")
        for one, other in zip(alone["probabilities"], together[step]["probabilities"], strict=True):
            assert json.loads(one) == pytest.approx(json.loads(other), abs=1e-4)


def test_changed_weights_or_wording_are_scored_again_and_nothing_else(project, prepared):
    run = trained(project, "lora", "lora")
    score_run(run, prepared, SETTINGS)
    before = part_times(run)
    file = run.checkpoints()[4] / "adapter_model.safetensors"
    save_file({name: weight * 1.5 for name, weight in load_file(file).items()}, file)
    score_run(run, prepared, SETTINGS)
    changed = {name for name, when in part_times(run).items() if before.get(name) != when}
    assert changed and all("step-4" in name for name in changed)

    file = project / "toy" / "toy.yaml"
    file.write_text(file.read_text().replace("Which colour is it?", "What colour is it?"))
    before = part_times(run)
    score_run(run, prepare(load_suite(file)), SETTINGS)
    changed = {name for name, when in part_times(run).items() if before.get(name) != when}
    assert changed and all("colour" in name for name in changed)


def test_a_killed_scoring_run_continues_where_it_was(project, prepared):
    run = trained(project, "lora", "lora")
    settings = ScoringConfig(max_new_tokens=4, batch=1)
    score_run(run, prepared, settings)
    whole = {pair: run.predictions(*pair) for pair in run.predicted()}
    for path in run.path.glob("predictions/*/*/*"):
        path.unlink()

    code = (
        "from pathlib import Path; from qwen2vl_sft.config import ScoringConfig; from qwen2vl_sft.scoring import experiment\n"
        f"experiment.score_experiment(Path({str(run.path.parent)!r}), ScoringConfig(max_new_tokens=4, batch=1), baselines=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "QWEN2VL_SFT_ROOT": str(project)})
    deadline = time.time() + 120
    while len(part_times(run)) < 7 and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert RunDir(run.path).status().state == "dead"
    kept = part_times(run)
    assert 7 <= len(kept) < 48

    score_run(run, prepared, settings)
    assert kept.items() <= part_times(run).items()
    for pair, table in whole.items():
        again = run.predictions(*pair)
        columns = ["id", "target", "prediction", "outcome", "text"]
        pd.testing.assert_frame_equal(again[columns].sort_values("id", ignore_index=True), table[columns].sort_values("id", ignore_index=True))


def test_a_checkpoint_with_another_preprocessing_is_refused(project, prepared):
    run = trained(project, "lora", "lora")
    run.config_path.write_text(run.config_path.read_text().replace("max_pixels: null", "max_pixels: 2048"))
    with pytest.raises(InputError, match=r"lora/step-2: trained with another preprocessing \(images differs\)"):
        score_run(run, prepared, SETTINGS)


def test_the_closed_rule_needs_a_closed_task_and_a_limit_draws_at_random(prepared):
    with pytest.raises(InputError, match="'word' is open"):
        test_set(prepared, prepared.suite.task("word"), ScoringConfig(rule="closed"))
    some = test_set(prepared, prepared.suite.task("colour"), ScoringConfig(limit=5))
    assert len(some) == 5 and some.chosen != list(range(5)) and some.chosen == sorted(some.chosen)
    assert some.chosen == test_set(prepared, prepared.suite.task("colour"), ScoringConfig(limit=5)).chosen
    assert torch.is_grad_enabled()
