"""The vision cache: exact, bounded, shared, and the same training with it, without it and with half of it."""

import os
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from qwen2vl_sft.config import ModelConfig, RunConfig
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model import vision_cache
from qwen2vl_sft.model.load import base_location, load_base
from qwen2vl_sft.model.vision_cache import VisionCache, tower_features, tower_key
from qwen2vl_sft.training.order import TrainingOrder, filled_cache
from qwen2vl_sft.training.trainer import prepared_suite, train

LOCATION = base_location("small")


def pictures(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"picture-{i}": rng.integers(0, 256, (32, 64, 3), dtype=np.uint8) for i in range(count)}


def of(some: dict[str, np.ndarray]):
    "What `fill` reads pictures with."
    return lambda absent: ((name, some[name]) for name in absent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stored_output_has_the_towers_bits(tmp_path, dtype):
    model, images = load_base(ModelConfig(device="cpu", dtype=dtype)), load_encoder(LOCATION).images
    some = pictures(3)
    cache = VisionCache(tmp_path / "cache.sqlite", model, images)
    cache.fill(model, images, some, of(some))
    fresh = tower_features(model, *images.patches(list(some.values())))
    reopened = VisionCache(tmp_path / "cache.sqlite", model, images)
    for name, value in zip(some, fresh, strict=True):
        assert torch.equal(reopened.get(name), value) and reopened.get(name).dtype is getattr(torch, dtype)
    assert reopened.get("another") is None


def test_worker_processes_decode_the_fill_and_a_pass_too_large_is_halved(project, monkeypatch, capsys):
    config = RunConfig(suite=str(write_toy_suite(project / "toy", rows=9)), model={"device": "cpu"}, schedule={"steps": 3, "micro_batch": 6})
    encoder, model = load_encoder(LOCATION, config.preprocessing), load_base(config.model)
    data = TrainingOrder(prepared_suite(config.suite_path), encoder, config)
    images = {data.value(key, "sha256") for key in data.order}
    real, sizes = vision_cache.tower_features, []

    def filled(name: str, at_once: int, workers: int) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("QWEN2VL_SFT_ROOT", str(project / name))
        before = torch.get_rng_state()
        cache = filled_cache(model, data, 1.0, at_once, workers)
        assert torch.equal(torch.get_rng_state(), before), "a warm cache and a cold one train the same"
        return {image: cache.get(image) for image in images}

    def tight(model, pixels, grid):
        sizes.append(len(grid))
        if len(grid) > 2:
            torch.empty(2**60, dtype=torch.uint8)  # the CPU allocator's own error
        return real(model, pixels, grid)

    expected = filled("serial", 8, 0)
    opened = os.getpid()
    monkeypatch.setattr(TrainingOrder, "pixels", lambda data, key, plain=TrainingOrder.pixels: plain(data, key) if os.getpid() != opened else pytest.fail("decoded in the training process"))
    found = filled("workers", 8, 2)
    assert all(torch.equal(found[image], expected[image]) for image in images) and len(images) > 8
    monkeypatch.setattr(vision_cache, "tower_features", tight)
    found = filled("tight", 8, 2)
    assert sizes[:3] == [8, 4, 2] and "vision cache: out of memory; 2 pictures at a time instead of 4" in capsys.readouterr().out
    for image in images:
        torch.testing.assert_close(found[image], expected[image], rtol=1e-4, atol=1e-5)


def test_another_tower_or_resize_shares_nothing(tmp_path):
    model, encoder = load_base(ModelConfig(device="cpu")), load_encoder(LOCATION)
    key = tower_key(model, encoder.images)
    some = pictures(1)
    cache = VisionCache(tmp_path / "cache.sqlite", model, encoder.images)
    cache.fill(model, encoder.images, some, of(some))
    with torch.no_grad():
        model.model.visual.merger.mlp[0].weight[0, 0] += 1e-3
    assert tower_key(model, encoder.images) != key
    assert VisionCache(tmp_path / "cache.sqlite", model, encoder.images).missing(some) == list(some)


def test_the_limit_stops_the_fill_and_keeps_what_is_there(tmp_path):
    model, images = load_base(ModelConfig(device="cpu")), load_encoder(LOCATION).images
    some = pictures(10)
    one = 8 * model.config.text_config.hidden_size * 4  # bytes of 8 tokens in float32
    cache = VisionCache(tmp_path / "cache.sqlite", model, images, limit_gb=4 * one / 1e9)
    assert cache.fill(model, images, some, of(some), batch=2) == 4
    assert cache.missing(some) == list(some)[4:] and cache.bytes == 4 * one
    assert cache.fill(model, images, some, of(some), batch=2) == 0


KILLED = """
import sys
import numpy as np
from qwen2vl_sft.config import ModelConfig
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.load import base_location, load_base
from qwen2vl_sft.model.vision_cache import VisionCache

rng = np.random.default_rng(0)
pictures = {f"picture-{i}": rng.integers(0, 256, (32, 64, 3), dtype=np.uint8) for i in range(400)}
model, images = load_base(ModelConfig(device="cpu")), load_encoder(base_location("small")).images
cache, put = VisionCache(sys.argv[1], model, images), VisionCache.put


def told(self, *values):
    put(self, *values)
    print("stored", flush=True)


VisionCache.put = told
cache.fill(model, images, pictures, lambda absent: ((name, pictures[name]) for name in absent), batch=2)
"""


def test_a_killed_fill_leaves_whole_entries_and_is_gone_on_with(tmp_path):
    path = tmp_path / "cache.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "stored\n"
    process.kill()
    process.communicate()
    model, images = load_base(ModelConfig(device="cpu")), load_encoder(LOCATION).images
    some = pictures(400)
    cache = VisionCache(path, model, images)
    there = [name for name in some if name not in set(cache.missing(some))]
    assert 6 <= len(there) < 400 and there == list(some)[: len(there)]
    wanted = list(some)[: len(there) + 4]
    assert cache.fill(model, images, wanted, of(some), batch=2) == 4
    for pair in range(0, len(wanted), 2):  # as the fill had them: two at a time
        fresh = tower_features(model, *images.patches([some[name] for name in wanted[pair : pair + 2]]))
        assert all(torch.equal(cache.get(name), value) for name, value in zip(wanted[pair : pair + 2], fresh, strict=True))


def test_a_damaged_file_is_begun_anew(tmp_path, capsys):
    model, images = load_base(ModelConfig(device="cpu")), load_encoder(LOCATION).images
    some, path = pictures(4), tmp_path / "cache.sqlite"
    path.write_bytes(b"no database" * 1000)
    cache = VisionCache(path, model, images)
    assert "damaged" in capsys.readouterr().out and cache.fill(model, images, some, of(some)) == 4
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 20000)  # while it is open
    again = VisionCache.__new__(VisionCache)
    again.__dict__ |= {**vars(cache), "_owner": 0}
    assert again.get("picture-0") is None or torch.equal(again.get("picture-0"), cache.get("picture-0"))


def test_a_trained_tower_has_no_cache(project):
    write_toy_suite(project / "toy", rows=6)
    method = {"name": "full", "freeze_tower": False, "freeze_merger": False}
    config = RunConfig(suite=str(project / "toy" / "toy.yaml"), model={"device": "cpu"}, method=method, schedule={"steps": 1, "micro_batch": 4})
    train(config)
    assert not (project / "prepared" / "vision-cache.sqlite").exists()
    with pytest.raises((InputError, ValidationError), match="cache"):
        RunConfig(**{**config.model_dump(), "schedule": {"steps": 1, "vision_cache": True}})


def test_the_run_reports_what_the_cache_gave(project, capsys):
    write_toy_suite(project / "toy", rows=12)

    def last(name: str, **schedule) -> dict:
        schedule = {"steps": 6, "micro_batch": 8, "save_at": [3], **schedule}
        config = RunConfig(suite=str(project / "toy" / "toy.yaml"), run=name, model={"device": "cpu"}, method={"name": "lora"}, schedule=schedule)
        return train(config).metrics().iloc[-1].to_dict()

    cold, warm = last("cold"), last("warm")  # 24 pictures, each used twice
    size = sum(len(row[0]) for row in sqlite3.connect(project / "prepared" / "vision-cache.sqlite").execute("SELECT value FROM features"))
    for row in (cold, warm):
        assert (row["vision_cache/hits"], row["vision_cache/misses"], row["vision_cache/bytes"]) == (48, 0, size)
    assert warm["vision_cache/fill_seconds"] == 0 < cold["vision_cache/fill_seconds"]
    assert warm["vision_cache/seconds_saved"] > cold["vision_cache/seconds_saved"] > 0  # two uses for one computation
    assert warm["vision_cache/seconds_saved"] == pytest.approx(2 * cold["vision_cache/fill_seconds"], rel=1e-3)
    assert "vision cache: used for 48 of 48 samples" in capsys.readouterr().out
    (project / "prepared" / "vision-cache.sqlite").unlink()
    some = last("some", vision_cache_gb=1e-5)
    assert 0 < some["vision_cache/hits"] < 48 and some["vision_cache/hits"] + some["vision_cache/misses"] == 48
    assert some["vision_cache/bytes"] <= 1e-5 * 1e9


def test_training_is_the_same_with_any_share_of_the_cache(project):
    write_toy_suite(project / "toy", rows=12)

    def weights(name: str, **schedule) -> dict[str, torch.Tensor]:
        schedule = {"steps": 3, "micro_batch": 8, "learning_rate": 1e-3, **schedule}
        config = RunConfig(suite=str(project / "toy" / "toy.yaml"), run=name, model={"device": "cpu"}, method={"name": "lora"}, schedule=schedule)
        return load_file(train(config).checkpoints()[3] / "adapter_model.safetensors")

    without = weights("without", vision_cache=False)
    assert not (project / "prepared" / "vision-cache.sqlite").exists()
    some = weights("some", vision_cache_gb=1e-5)
    every = weights("every")
    padded = weights("padded", packing=False)
    for name, weight in without.items():
        for other in (some, every, padded):
            torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-5)


def test_training_is_the_same_from_the_pixel_cache(project):
    write_toy_suite(project / "toy", rows=12)

    def weights(name: str, **schedule) -> dict[str, torch.Tensor]:
        schedule = {"steps": 2, "micro_batch": 8, "learning_rate": 1e-3, "vision_cache": False, **schedule}
        mixture = {"name": "equal", "balance_labels": True}
        config = RunConfig(suite=str(project / "toy" / "toy.yaml"), run=name, model={"device": "cpu"}, method={"name": "lora"}, mixture=mixture, schedule=schedule)
        return load_file(train(config).checkpoints()[2] / "adapter_model.safetensors")

    plain, kept = weights("plain"), weights("kept", pixel_cache_gb=0.1)
    assert list((project / "prepared" / "pixel-cache").iterdir())
    again = weights("again", pixel_cache_gb=0.1)
    assert all(torch.equal(plain[name], kept[name]) and torch.equal(plain[name], again[name]) for name in plain)
