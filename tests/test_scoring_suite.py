"""Scoring checkpoints: full and adapter, killed and continued, redone when what decides them changes."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl_sft.config import RunConfig, ScoringConfig
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring.experiment import score_experiment, score_run
from qwen2vl_sft.scoring.suite import test_set
from qwen2vl_sft.tasks import load_suite
from qwen2vl_sft.training.trainer import train

SETTINGS = ScoringConfig(max_new_tokens=4, batch=4)


def trained(project, name: str, method: str, **changes) -> RunDir:
    config = RunConfig(
        suite=str(project / "toy" / "toy.yaml"), experiment="toy", run=name, model={"device": "cpu"},
        method={"name": method, "freeze_tower": False, "freeze_merger": False},
        schedule={"steps": 4, "save_at": [2], "micro_batch": 6, "learning_rate": 1e-3, **changes},
    )  # fmt: skip
    return train(config)


@pytest.fixture
def prepared(project):
    return prepare(load_suite(write_toy_suite(project / "toy", rows=12)))


def part_times(run: RunDir) -> dict[str, int]:
    return {str(path.relative_to(run.path)): path.stat().st_mtime_ns for path in run.path.glob("predictions/*/*/part-*.parquet")}


def test_full_and_adapter_runs_are_scored_and_kept(project, prepared):
    runs = [trained(project, method, method) for method in ("full", "lora", "qlora")]
    score_experiment(project / "runs" / "toy", SETTINGS)
    for run in runs:
        assert run.predicted() == [(f"step-{step}", task) for step in (2, 4) for task in ("colour", "word")]
        assert run.status().state == "finished"
        tables = [run.predictions(f"step-{step}", "colour") for step in (2, 4)]
        assert all(len(table) == 12 and table["id"].is_unique for table in tables)
        assert not tables[0]["probabilities"].equals(tables[1]["probabilities"])
    before = [part_times(run) for run in runs]
    score_experiment(project / "runs" / "toy", SETTINGS)
    assert [part_times(run) for run in runs] == before


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

    suite = project / "toy" / "toy.yaml"
    suite.write_text(suite.read_text().replace("Which colour is it?", "What colour is it?"))
    before = part_times(run)
    score_run(run, prepare(load_suite(suite)), SETTINGS)
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
        "experiment.PART_SECONDS = 0\n"
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
