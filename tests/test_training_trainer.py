"""Training goes on where it was, for every method, and ends instead of pretending."""

import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.model.load import base_location
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.training.progress import Speed
from qwen2vl_sft.training.trainer import train


def config(project, name: str, method: str = "lora", **schedule) -> RunConfig:
    if not (project / "toy").exists():
        write_toy_suite(project / "toy", rows=12)
    schedule = {"steps": 4, "save_at": [2], "micro_batch": 6, "learning_rate": 1e-3, "log_every": 1, **schedule}
    frozen = {"freeze_tower": False, "freeze_merger": False} if method == "full" else {}
    return RunConfig(suite=str(project / "toy" / "toy.yaml"), run=name, model={"device": "cpu"}, method={"name": method, **frozen}, schedule=schedule)


def weights(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    folder = run.checkpoints()[step]
    return load_file(next(path for name in ("adapter_model", "model") if (path := folder / f"{name}.safetensors").exists()))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_continued_run_ends_with_the_same_bits(project, method):
    run = train(config(project, "whole", method))
    whole = weights(run, 4)
    shutil.rmtree(run.checkpoints()[4])
    train(config(project, "whole", method))
    again = weights(run, 4)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_loss_that_is_no_number_ends_the_run(project):
    with pytest.raises(RunFailure, match="lower schedule.learning_rate"):
        train(config(project, "wild", "full", learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0))
    status = RunDir(project / "runs" / "default" / "wild").status()
    assert status.state == "failed" and "lower schedule.learning_rate" in status.message


def test_the_remedy_of_an_early_error_is_accepted(project):
    with pytest.raises(InputError, match="max_tokens=10"):
        train(config(project, "tight", max_tokens=10))
    assert list(train(config(project, "tight", max_tokens=400)).checkpoints()) == [2, 4]


def test_a_mixture_that_the_suite_does_not_fit_leaves_no_run(project):
    wrong = config(project, "wrong")
    wrong.mixture.name, wrong.mixture.weights = "weights", {"shapes_train": 1.0}
    with pytest.raises(InputError, match="mixture.weights names 'shapes_train'"):
        train(wrong)
    assert not (project / "runs").exists()


def test_other_settings_or_data_are_refused_once_there_is_a_checkpoint(project):
    run = train(config(project, "fixed"))
    train(config(project, "fixed", workers=1))  # doesn't decide what is trained
    for changed in ({"learning_rate": 2e-3}, {"steps": 6}):
        with pytest.raises(InputError, match=f"the run exists with .*{next(iter(changed))}"):
            train(config(project, "fixed", **changed))
        assert run.status().state == "finished"
    suite = project / "toy" / "toy.yaml"
    suite.write_text(suite.read_text().replace("Which colour", "What colour"))
    with pytest.raises(InputError, match="prepared data have changed"):
        train(config(project, "fixed"))
    assert list(run.checkpoints()) == [2, 4]


def test_scoring_does_not_finish_a_failed_training(project):
    run = RunDir(project / "runs" / "default" / "half")
    with pytest.raises(MemoryError), run.running("training") as status:
        status.progress = {"step": 2, "steps": 4}
        raise MemoryError("7 GB wanted")
    with run.running("scoring"):
        pass
    assert (run.status().state, run.status().stage, run.status().progress) == ("failed", "training", {"step": 2, "steps": 4})


def test_a_frozen_tower_keeps_its_precision_and_weights_in_full_training(project):
    settings = config(project, "frozen", "full")
    settings.method.freeze_tower = settings.method.freeze_merger = True
    settings.model.dtype = "bfloat16"
    tuned = weights(train(settings), 4)
    base = load_file(base_location("small") + "/model.safetensors")
    tower = {name for name in base if name.startswith("visual")}
    assert tower and all(torch.equal(tuned[name], base[name]) for name in tower)
    assert {tuned[name].dtype for name in tuned if name not in tower} == {torch.float32}


def test_a_pause_inside_a_pause_counts_once():
    "The picture that a validation draws is no second pause: a speed must not come from time below zero."
    speed = Speed()
    time.sleep(0.02)
    with speed.pause(), speed.pause():
        time.sleep(0.05)
    assert speed.read({"samples": 1, "tokens": 3}, 1)["samples_per_second"] < 50
