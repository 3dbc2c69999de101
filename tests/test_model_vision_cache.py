"""The vision cache: exact, bounded, shared, and the same training with it, without it and with half of it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_sft.config import ModelConfig, RunConfig
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.load import base_location, load_base
from qwen2vl_sft.model.vision_cache import VisionCache, tower_features, tower_key
from qwen2vl_sft.training.trainer import train

LOCATION = base_location("small")


def pictures(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"picture-{i}": rng.integers(0, 256, (32, 64, 3), dtype=np.uint8) for i in range(count)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stored_output_has_the_towers_bits(tmp_path, dtype):
    model, images = load_base(ModelConfig(device="cpu", dtype=dtype)), load_encoder(LOCATION).images
    some = pictures(3)
    cache = VisionCache(tmp_path / "cache.sqlite", model, images)
    cache.fill(model, images, some, some.get)
    fresh = tower_features(model, *images.patches(list(some.values())))
    reopened = VisionCache(tmp_path / "cache.sqlite", model, images)
    for name, value in zip(some, fresh, strict=True):
        assert torch.equal(reopened.get(name), value) and reopened.get(name).dtype is getattr(torch, dtype)
    assert reopened.get("another") is None


def test_another_tower_or_resize_shares_nothing(tmp_path):
    model, encoder = load_base(ModelConfig(device="cpu")), load_encoder(LOCATION)
    key = tower_key(model, encoder.images)
    some = pictures(1)
    cache = VisionCache(tmp_path / "cache.sqlite", model, encoder.images)
    cache.fill(model, encoder.images, some, some.get)
    with torch.no_grad():
        model.model.visual.merger.mlp[0].weight[0, 0] += 1e-3
    assert tower_key(model, encoder.images) != key
    assert VisionCache(tmp_path / "cache.sqlite", model, encoder.images).missing(some) == list(some)


def test_the_limit_stops_the_fill_and_keeps_what_is_there(tmp_path):
    model, images = load_base(ModelConfig(device="cpu")), load_encoder(LOCATION).images
    some = pictures(10)
    one = 8 * model.config.text_config.hidden_size * 4  # bytes of 8 tokens in float32
    cache = VisionCache(tmp_path / "cache.sqlite", model, images, limit_gb=4 * one / 1e9)
    assert cache.fill(model, images, some, some.get, batch=2) == 4
    assert cache.missing(some) == list(some)[4:] and cache.bytes == 4 * one
    assert cache.fill(model, images, some, some.get, batch=2) == 0


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
    packed = weights("packed", packing=True)
    for name, weight in without.items():
        for other in (some, every, packed):
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
