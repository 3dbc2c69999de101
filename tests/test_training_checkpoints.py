"""A full disk, a changed base model, a second process, rotation, and what is read again on resume."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.core import ASSETS, InputError, RunFailure
from qwen2vl_sft.data.prepare import Rows
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.training.checkpoints import resume_points
from qwen2vl_sft.training.trainer import train


def config(project, name: str, method: str = "lora", base: str = "small", **schedule) -> RunConfig:
    if not (project / "toy").exists():
        write_toy_suite(project / "toy", rows=12)
    schedule = {"steps": 4, "save_at": [2], "micro_batch": 6, "learning_rate": 1e-3, "log_every": 1, **schedule}
    return RunConfig(suite=str(project / "toy" / "toy.yaml"), run=name, model={"base": base, "device": "cpu"}, method={"name": method}, schedule=schedule)


@pytest.fixture
def small_disk(project):
    "`runs/` on a disk of its own; `grow` makes it larger."
    place = project / "runs"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("lacks the right to mount a small disk")
    yield lambda: subprocess.run(["mount", "-o", "remount,size=200m", place], check=True)
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(project, small_disk):
    settings = config(project, "full", "full")
    run = RunDir(project / "runs" / "default" / "full")
    with pytest.raises(RunFailure, match=r"step-4 can't be written: .* MB free; make room, and the same command continues"):
        train(settings)
    assert list(resume_points(run)) == [2] and not list((run.path / "checkpoints").glob(".*"))
    assert load_file(run.checkpoints()[2] / "model.safetensors")
    torch.load(run.checkpoints()[2] / "optimizer.pt", weights_only=True)
    assert run.status().state == "failed" and "can't be written" in run.status().message
    small_disk()
    assert list(train(settings).checkpoints()) == [2, 4] and run.status().state == "finished"
    assert len(run.metrics()) == 4


def test_a_disk_that_is_full_when_a_line_is_logged_is_said_too(project, small_disk, monkeypatch):
    real = RunDir.log

    def crowded(run, step, **values):
        with suppress(OSError), (project / "runs" / "ballast").open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        real(run, step, **values)

    monkeypatch.setattr(RunDir, "log", crowded)
    with pytest.raises(RunFailure, match=r"runs/default/lines\S* can't be written: No space left on device. The disk has .* MB free; make room, and the same command continues"):
        train(config(project, "lines", "lora", steps=2, save_at=[], tensorboard=False))


def test_skipped_samples_are_not_read_again(project, monkeypatch):
    settings, read = config(project, "reads", vision_cache=False), []
    plain = Rows.image
    monkeypatch.setattr(Rows, "image", lambda rows, index: (read.append(index), plain(rows, index))[1])
    run = train(settings)
    assert len(read) == 4 * 6
    shutil.rmtree(run.checkpoints()[4])
    read.clear()
    train(settings)
    assert len(read) == 2 * 6  # steps 3 and 4


def test_another_base_model_under_the_same_name_is_refused(project):
    base = project / "base"
    shutil.copytree(ASSETS / "small", base)
    run = train(config(project, "based", base=str(base)))
    shutil.rmtree(run.checkpoints()[4])
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    save_file({**weights, name: weights[name] + 1e-3}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weights of the base model .* have changed .*hash \w+, now \w+"):
        train(config(project, "based", base=str(base)))


def test_a_difference_is_shown_by_its_name(project):
    run = train(config(project, "shown"))
    shutil.rmtree(run.checkpoints()[4])
    with pytest.raises(InputError, match=r"method.rank=16, now 8"):
        changed = config(project, "shown")
        changed.method.rank = 8
        train(changed)
    table = (project / "toy" / "train.csv").read_text().splitlines()
    (project / "toy" / "train.csv").write_text("\n".join(table[:-1]) + "\n")
    with pytest.raises(InputError, match=r"task 'colour': train rows 12, now 11"):
        train(config(project, "shown"))


def test_other_samples_than_those_trained_on_are_refused(project):
    run = train(config(project, "drawn"))
    shutil.rmtree(run.checkpoints()[4])
    path = run.checkpoints()[2] / "position.json"
    kept = json.loads(path.read_text())
    assert kept["samples"] == 12 and sum(kept["samples_by_task"].values()) == 12
    path.write_text(json.dumps({**kept, "order": "another", "versions": {**kept["versions"], "numpy": "1.0"}}))
    with pytest.raises(InputError, match=r"other samples than would be drawn now \(numpy 1.0, now "):
        train(config(project, "drawn"))


def test_rotation_keeps_the_named_steps(project):
    run = train(config(project, "rotated", steps=5, save_at=[2], save_every=1))
    assert list(run.checkpoints()) == [2, 5]
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["step-2", "step-5"]


def test_a_second_process_is_refused(project):
    settings = config(project, "held")
    run = RunDir(project / "runs" / "default" / "held")
    code = "import sys\nfrom qwen2vl_sft.rundir import RunDir\nwith RunDir(sys.argv[1]).running('training'):\n    print('holding', flush=True)\n    sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(RunFailure, match=rf"another process \(pid {holder.pid}\)"):
            train(settings)
        assert run.status().state == "running"
        holder.kill()
        holder.wait()
        assert run.status().state == "dead"
    finally:
        holder.kill()
    assert list(train(settings).checkpoints()) == [2, 4]
