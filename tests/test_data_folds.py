"""Folds in training and scoring: each run trains without its fold and is scored on it."""
import pytest

from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.tasks import load_suite
from qwen2vl_sft.training.trainer import train


def run_config(project, **changes) -> RunConfig:
    if not (project / "toy").exists():
        write_toy_suite(project / "toy", rows=12)
    schedule = {"steps": 4, "save_at": [2], "micro_batch": 6, "learning_rate": 1e-3, "log_every": 1, **changes.pop("schedule", {})}
    return RunConfig(suite=str(project / "toy" / "toy.yaml"), model={"device": "cpu"}, method={"name": "lora"}, schedule=schedule, **changes)


@pytest.mark.slow
def test_a_fold_is_trained_and_scored(project):
    import csv

    from qwen2vl_sft.scoring.experiment import score_experiment

    write_toy_suite(project / "toy", rows=12)
    rows = [row for split in ("train", "test") for row in csv.reader((project / "toy" / f"{split}.csv").open()) if row[0] != "image"]
    (project / "toy" / "all.csv").write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in rows))
    (project / "toy" / "toy.yaml").write_text(
        "name: toy\ntasks:\n  - {name: colour, question: 'Which colour is it?', labels: [red, green, blue], sources: {all: {format: csv, path: all.csv}}}\n")
    prepared = prepare(load_suite(project / "toy" / "toy.yaml"), folds=4)
    for number in (0, 3):
        run = train(run_config(project, run="r", experiment=f"fold{number}", fold=number, schedule={"steps": 1, "save_at": [], "warmup_ratio": 0.0}))
        score_experiment(project / "runs" / f"fold{number}", baselines=True)
        expected = prepared.fold("colour", number)["test"].column("id")
        for name, checkpoint in (("r", "step-1"), ("base", "base"), ("majority", "majority")):
            found = RunDir(run.path.parent / name).predictions(checkpoint, "colour")
            assert sorted(found["id"]) == sorted(expected)
    (project / "runs" / "fold3" / "r").rename(project / "runs" / "fold0" / "other")
    with pytest.raises(InputError, match="hold out different folds"):
        score_experiment(project / "runs" / "fold0")
