"""Two processes train, score, continue and fail as one would, on the CPU (gloo), under `accelerate launch` and with the variables that `torchrun` sets."""

import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from qwen2vl_sft.config import RunConfig, ScoringConfig
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring.experiment import score_experiment
from qwen2vl_sft.training.checkpoints import resume_points
from qwen2vl_sft.training.trainer import train

ROOT = Path(__file__).resolve().parent.parent


def config(project, name: str, method: str = "lora", **schedule) -> RunConfig:
    if not (project / "toy").exists():
        write_toy_suite(project / "toy", rows=12)
    schedule = {"steps": 4, "save_at": [2], "micro_batch": 3, "accumulation": 2, "packing": True, "learning_rate": 1e-3, "log_every": 1, "warmup_ratio": 0.0, **schedule}
    frozen = {"freeze_tower": False, "freeze_merger": False} if method == "full" else {}
    return RunConfig(
        suite=str(project / "toy" / "toy.yaml"), experiment="two", run=name, model={"device": "cpu"},
        method={"name": method, **frozen}, mixture={"name": "equal"}, schedule=schedule,
    )  # fmt: skip


def recipe(project, config: RunConfig) -> str:
    path = project / f"{config.run}.yaml"
    path.write_text(config.to_yaml())
    return str(path)


def launched(project, *command: str) -> subprocess.Popen:
    "The command in two processes. `accelerate launch --cpu` would start one, whatever --num_processes says."
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    settings = {"ACCELERATE_USE_CPU": "true", "QWEN2VL_SFT_ROOT": str(project), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = (project / "output.txt").open("w")
    return subprocess.Popen([*launch, *command], cwd=project, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(path for name in ("adapter_model", "model") if (path := folder / f"{name}.safetensors").exists()))


@pytest.fixture
def together(project, monkeypatch) -> Callable[..., list[int]]:
    "Trains the recipes in two processes, forked from a server that has everything imported; their exit codes. What they print is in `output.txt`."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))  # the server imports `killed_run`
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run"])
    from killed_run import go_together

    def together(*recipes: str, act: str = "train") -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = [context.Process(target=go_together, args=(rank, port, str(project), str(project / "output.txt"), list(recipes), act)) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join(120)
        return [process.exitcode for process in both]

    return together


@pytest.mark.slow
def test_two_processes_train_and_score_as_one_with_twice_the_accumulation(project, together):
    runs = {method: config(project, method, method, packing=method != "full") for method in ("lora", "qlora", "full")}
    codes = together(*[recipe(project, one) for one in runs.values()], act="score")
    assert codes == [0, 0], (project / "output.txt").read_text()[-3000:]
    two = {method: RunDir(project / "runs" / "two" / method) for method in runs}
    shutil.move(project / "runs" / "two", project / "runs" / "by-two")

    for method in runs:  # the loss of every step
        one, there = train(config(project, method, method, accumulation=4, packing=method != "full")), RunDir(project / "runs" / "by-two" / method)
        pd.testing.assert_series_equal(there.metrics().loss, one.metrics().loss, rtol=0, atol=1e-5)
        assert sum('"loss"' in line for line in there.metrics_path.read_text().splitlines()) == 4 and there.status().state == "finished"
        held = json.loads((there.checkpoints()[4] / "position.json").read_text())
        assert (held["processes"], held["samples"]) == (2, 4 * 12)
        assert len(torch.load(there.checkpoints()[4] / "random.pt", weights_only=True)) == 2
    said = (project / "output.txt").read_text()
    assert said.count("micro-batch 3 x accumulation 2 x 2 processes: 12 samples a step") == 3
    for method in runs:  # one meaning wherever it is stored
        there = project / "runs" / "by-two" / method
        assert yaml.safe_load((there / "config.yaml").read_text())["schedule"]["effective_batch"] == json.loads((there / "plan.json").read_text())["effective_batch"] == 12
    assert said.count("million weights train") == 3 and said.count("scoring plain base (base, ") == 1
    total = (1 + 2 * len(runs)) * 24  # answers of both processes; one of them draws
    drawn = re.findall(r"score word: +\d+%[^\r\n]*/(\d+) ", said)
    assert drawn and set(drawn) == {str(total)} and said.count(f"{total} answers in") == 1, said[-2000:]
    progress = RunDir(project / "runs" / "by-two" / "lora").status().progress
    assert (progress["answers"], progress["of"], progress["seconds_left"]) == (total, total, 0)

    # predictions: scored again by this one process from the very same checkpoints
    again = project / "runs" / "again"
    shutil.copytree(project / "runs" / "by-two", again, ignore=shutil.ignore_patterns("predictions"))

    score_experiment(again, ScoringConfig(batch=4, max_new_tokens=4))
    for run in sorted(again.iterdir()):
        for checkpoint, task in RunDir(run).predicted():
            parts = sorted((project / "runs" / "by-two" / run.name / "predictions" / checkpoint / task).glob("part-*"))
            assert len(parts) >= 3 or run.name in ("majority", "nearest_neighbour")
            mine, theirs = (RunDir(place / run.name).predictions(checkpoint, task) for place in (again, project / "runs" / "by-two"))
            pd.testing.assert_frame_equal(mine.drop(columns="seconds"), theirs.drop(columns="seconds"))

    # one process goes on where two stopped, if a step keeps its samples
    whole = weights(RunDir(project / "runs" / "two" / "lora").checkpoints()[4])
    for folder in (project / "runs" / "by-two").iterdir():
        shutil.rmtree(folder / "checkpoints" / "step-4", ignore_errors=True)
    shutil.rmtree(project / "runs" / "two")
    shutil.move(project / "runs" / "by-two", project / "runs" / "two")
    with pytest.raises(InputError, match="samples in a step=12 on 2 processes, now 6 on 1 process"):
        train(config(project, "lora"))
    last = weights(train(config(project, "lora", accumulation=4)).checkpoints()[4])
    assert all(torch.allclose(last[name], whole[name], atol=2e-5) for name in whole)
    assert two["lora"].status().state == "finished"


@pytest.mark.slow
def test_when_one_of_two_ends_the_run_says_so_and_the_same_command_continues(project, together):
    "kill -9, then memory that runs out in one of them; the end is that of one process that nothing happened to."
    settings = config(project, "killed", steps=12, save_at=[], save_every=2)
    path, run, until = recipe(project, settings), RunDir(project / "runs" / "two" / "killed"), time.monotonic() + 120
    group = launched(project, "-m", "qwen2vl_sft.cli", "train", path)
    while len(run.metrics()) < 3 and time.monotonic() < until and group.poll() is None:
        time.sleep(0.01)
    second = next(child for child in psutil.Process(group.pid).children(recursive=True) if child.environ().get("RANK") == "1")
    second.suspend()  # the first waits for it
    with pytest.raises(RunFailure, match="another process"):  # refused while it runs
        train(config(project, "killed", steps=12, save_at=[], save_every=2, accumulation=4))
    second.kill()
    assert group.wait(60) != 0
    assert psutil.pid_exists(second.pid) is False
    status, said = run.status(), (project / "output.txt").read_text()
    if status.state != "dead":  # gloo may end the first process before Python hears of it
        assert status.state in ("failed", "interrupted") and "error: " in said, status
        assert "lost another one" in status.message or "another of its 2 processes ended" in status.message
    reached = max(resume_points(run))
    assert 2 <= reached <= 8

    assert together(path, act="exhausted") == [1, 1]
    said = (project / "output.txt").read_text()
    assert re.search(rf"error: process 1 of 2, step {reached + 2}: out of memory at micro_batch=3 .*; the same command continues from the last checkpoint with micro_batch=1", said)
    event = json.loads((run.path / "plan.json").read_text())["out_of_memory"][-1]
    assert (event["after_step"], event["micro_batch"]) == (reached + 1, 1) and "allocate" in event["reason"]
    status = run.status()
    assert status.state == "failed" and "another of 2 processes was out of memory" in status.message and "micro_batch=1" in status.message

    assert together(path) == [0, 0], (project / "output.txt").read_text()[-2000:]
    assert "memory ran out before, so micro-batches of 1 x accumulation 6" in (project / "output.txt").read_text()
    shutil.move(run.path, project / "runs" / "two" / "continued")
    last, whole = (weights(one.checkpoints()[12]) for one in (RunDir(project / "runs" / "two" / "continued"), train(config(project, "killed", steps=12, save_at=[], accumulation=4))))
    assert all(torch.allclose(last[name], whole[name], atol=1e-4) for name in whole)


def test_the_sharding_configuration_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    content = load_config_from_file(str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"))
    assert (content.distributed_type, content.num_processes, content.fsdp_config["fsdp_version"]) == ("FSDP", 8, 2)
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    assert hasattr(modeling_qwen2_vl, content.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])


@pytest.mark.gpu
def test_sharded_full_training_is_that_of_one_gpu_and_continues(project):
    if torch.cuda.device_count() < 2:
        pytest.skip("lacks two CUDA devices")
    settings = config(project, "sharded", "full")
    settings.method.freeze_tower = settings.method.freeze_merger = True
    settings.model.device, settings.schedule.save_every = "cuda", 1
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"), "--num_processes=2"]
    command = [*launch, "-m", "qwen2vl_sft.cli", "train", recipe(project, settings)]
    environment = {**os.environ, "QWEN2VL_SFT_ROOT": str(project), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=project, env=environment, check=True)
    run = RunDir(project / "runs" / "two" / "sharded")
    whole, losses = weights(run.checkpoints()[4]), run.metrics().loss
    shutil.rmtree(run.checkpoints()[4])
    subprocess.run(command, cwd=project, env=environment, check=True)
    again = weights(run.checkpoints()[4])
    assert all(torch.allclose(again[name], whole[name], atol=1e-4) for name in whole)
    settings.run, settings.schedule.accumulation = "one", 4
    pd.testing.assert_series_equal(losses, train(settings).metrics().loss, rtol=0, atol=1e-2)
