"""kill -9 at any moment: a checkpoint that loads, a status that is true, and in the end the same bits."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.training.checkpoints import resume_points

KILLS = {"qlora": 18, "lora": 16, "full": 16}  # 50 together
STEPS, NAMED = 4, 2


def recipe(project: Path, name: str, method: str) -> tuple[Path, RunDir]:
    frozen = {"freeze_tower": False, "freeze_merger": False} if method == "full" else {"dropout": 0.1, "rank": 4}
    config = RunConfig(
        suite=str(project / "toy" / "toy.yaml"), experiment="kills", run=name, model={"device": "cpu"}, method={"name": method, **frozen},
        schedule={"steps": STEPS, "save_at": [NAMED], "save_every": 1, "micro_batch": 2, "learning_rate": 1e-3, "log_every": 1, "warmup_ratio": 0.0},
    )  # fmt: skip
    path = project / f"{name}.yaml"
    path.write_text(config.to_yaml())
    return path, RunDir(project / "runs" / "kills" / name)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(path for name in ("adapter_model", "model") if (path := folder / f"{name}.safetensors").exists()))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_what_is_left(run: RunDir, code: int, newest: int) -> int:
    "Every published checkpoint loads, nothing was lost, the status is true; returns the newest step."
    assert code in (0, -signal.SIGKILL)
    points = resume_points(run)
    assert max(points, default=0) >= newest, "a published checkpoint is gone"
    for step, folder in points.items():
        assert weights(folder)
        for name in ("optimizer.pt", "scheduler.pt", "random.pt"):
            torch.load(folder / name, weights_only=True)
        assert json.loads((folder / "position.json").read_text())["samples"] == 2 * step
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
        assert json.loads((folder / "preprocessing.json").read_text())["hash"]
    state = run.status().state
    assert state == "finished" if code == 0 else state in ("dead", "created", "finished"), state
    assert state != "finished" or STEPS in run.checkpoints()
    return max(points, default=0)


@pytest.fixture
def start(project, monkeypatch) -> Callable[..., int]:
    "Start `go` in a process of its own, forked from one that has trained; its exit code. The first call gives the recipe to train there."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]))  # the server imports `killed_run`
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run"])
    from killed_run import serve

    requests, theirs = context.Pipe()
    servers = []

    def answer() -> int:
        assert requests.poll(120), (project / "log.txt").read_text()[-2000:]
        return requests.recv()

    def start(path: Path, kind: str = "none", when: float = 0, *more: str) -> int:
        if not servers:
            servers.append(context.Process(target=serve, args=(theirs, str(path), str(project), str(project / "log.txt"))))
            servers[0].start()
            theirs.close()
        else:
            requests.send((str(path), str(project), str(project / "log.txt"), kind, when, *more))
        return answer()

    yield start
    for server in servers:
        requests.send(None)
        server.join(20)
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("method", list(KILLS))
def test_killed_at_random_times_a_run_ends_as_if_never_stopped(project, method, start):
    write_toy_suite(project / "toy", rows=12)
    start(recipe(project, "warm-up", method)[0])
    path, reference = recipe(project, "reference", method)
    assert start(path, "none", 0, str(project / "events.txt")) == 0, (project / "log.txt").read_text()[-2000:]
    events, seconds = (float(word) for word in (project / "events.txt").read_text().split())
    whole = {step: weights(folder) for step, folder in reference.checkpoints().items()}
    assert list(whole) == [NAMED, STEPS] and not list((reference.path / "checkpoints").glob("resume-*"))

    dice, kills, in_save, kinds = random.Random(f"seed 0 {method}"), 0, 0, ["time", "event", "before rename", "after rename"]
    chain = 0
    while kills < KILLS[method]:
        path, run = recipe(project, f"chain-{chain}", method)
        newest = chain_kills = 0
        while chain_kills < 6 and kills < KILLS[method]:
            kind = dice.choice(kinds)
            when = {"time": dice.uniform(0, seconds), "event": dice.randint(1, int(events))}.get(kind, dice.randint(1, 3))
            code = start(path, kind, when)
            newest = check_what_is_left(run, code, newest)
            if code == 0:  # it finished before its time came
                break
            kills, chain_kills = kills + 1, chain_kills + 1
            in_save += any((run.path / "checkpoints").glob(".*.staging"))
        assert start(path) == 0, (project / "log.txt").read_text()[-2000:]
        check_what_is_left(run, 0, newest)
        assert all(same(weights(run.checkpoints()[step]), whole[step]) for step in whole), f"other weights after {chain_kills} kills"
        assert sorted(folder.name for folder in (run.path / "checkpoints").iterdir()) == [f"step-{NAMED}", f"step-{STEPS}"]
        chain += 1
    assert in_save >= KILLS[method] // 5, f"only {in_save} of {kills} kills fell into a save"
    print(f"{method}: {kills} kills in {chain} runs, {in_save} with a half-written checkpoint")
