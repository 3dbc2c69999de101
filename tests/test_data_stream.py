"""Training from a stream: the pictures of the shards in passes, a bounded number in memory, the same result however it is cut."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from qwen2vl_sft.config import ModelConfig, RunConfig, load_recipe
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.prepare import Rows
from qwen2vl_sft.data.stream import ImageStream
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.load import base_location, load_base
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.model.vision_cache import VisionCache, tower_features
from qwen2vl_sft.training.order import StreamSampler, TrainingOrder, streamed_pixels
from qwen2vl_sft.training.trainer import check_devices, prepared_suite, train


def config(project, name: str = "stream", **schedule) -> RunConfig:
    if not (project / "toy").exists():
        write_toy_suite(project / "toy", rows=12)
    schedule = {"steps": 6, "save_at": [4], "micro_batch": 6, "learning_rate": 1e-3, "log_every": 1, "stream": True, "stream_buffer": 3, "vision_cache": False, **schedule}
    return RunConfig(suite=str(project / "toy" / "toy.yaml"), run=name, model={"device": "cpu"}, method={"name": "lora"}, schedule=schedule)


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoints()[6] / "adapter_model.safetensors")


@pytest.fixture
def no_lookup(monkeypatch):
    "A picture that is looked up in the shards fails the test."
    def refuse(rows, index):
        raise AssertionError("a picture was looked up")

    monkeypatch.setattr(Rows, "image", refuse)


@pytest.mark.slow
def test_a_run_from_a_stream_that_is_cut_or_decoded_by_workers_ends_with_the_same_bits(project, no_lookup):
    run = train(config(project))
    whole = weights(run)
    shutil.rmtree(run.checkpoints()[6])
    assert train(config(project, workers=2)).path == run.path  # goes on from step 4, in the second epoch of each task
    again = weights(run)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_vision_cache_is_filled_from_the_stream(project, no_lookup):
    assert 2 in train(config(project, "cached", steps=2, save_at=[], vision_cache=True)).checkpoints()


def test_what_the_cache_gets_under_a_hash_is_that_picture_though_another_run_stores_between(project):
    class Contested(VisionCache):
        "Another run stores the first picture after this one has listed what is missing."
        def missing(self, images):
            found = super().missing(images)
            if len(found) == len(wanted):
                other.fill(model, encoder.images, found[:1], lambda absent: ((image, data.pixels(wanted[image])) for image in absent))
            return found

    settings = config(project)
    encoder, model = load_encoder(base_location("small")), load_base(ModelConfig(device="cpu"))
    data = TrainingOrder(prepared_suite(settings.suite_path), encoder, settings)
    wanted = dict(sorted({data.value(key, "sha256"): key for key in data.order}.items(), key=lambda item: item[1]))
    cache, other = (kind(project / "cache.sqlite", model, encoder.images, 1) for kind in (Contested, VisionCache))
    cache.fill(model, encoder.images, wanted, lambda lacking: streamed_pixels(data, wanted, lacking), 4)
    assert VisionCache.missing(cache, wanted) == []
    for image, key in wanted.items():
        (expected,) = tower_features(model, *encoder.images.patches([data.pixels(key)]))
        assert torch.allclose(cache.get(image), expected, atol=1e-4)


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (2, 0), (0, 17), (0, 60)])
def test_every_sample_gets_its_own_picture_and_few_are_held(project, monkeypatch, workers, start):
    write_toy_suite(project / "toy", rows=24)
    streams = []
    begin = ImageStream.__init__
    monkeypatch.setattr(ImageStream, "__init__", lambda self, *arguments: streams.append(self) or begin(self, *arguments))
    settings = config(project, steps=12)  # an epoch and a half
    data = TrainingOrder(prepared_suite(settings.suite_path), load_encoder(base_location("small")), settings)
    data.start = start
    loader, most = DataLoader(data, batch_size=None, sampler=StreamSampler(data), num_workers=workers), 0
    for index, sample in enumerate(loader):
        assert torch.equal(torch.as_tensor(sample.pixels), torch.as_tensor(data[index].pixels))
        most = max(most, *(len(stream.held) for stream in streams))
    assert index == 71 and 0 < most <= 3 + 6 + (6 if workers else 0)  # the buffer, and a batch that is sorted by length


def test_the_order_of_a_stream_shuffles_anew_in_each_epoch(project):
    settings = config(project)
    prepared, encoder = prepared_suite(settings.suite_path), load_encoder(base_location("small"))
    data = TrainingOrder(prepared, encoder, settings)
    sizes = {task: len(rows) for task, rows in data.splits.items()}
    for task, size in sizes.items():
        rows = [row for name, row in data.order if name == task]
        assert sorted(rows[:size]) == list(range(size)) != rows[:size] != rows[size : 2 * size]
    assert data.order != TrainingOrder(prepared, encoder, config(project, seed=1)).order


def test_what_a_stream_cannot_do_is_refused_before_anything_loads(project, monkeypatch):
    recipe = project / "recipe.yaml"
    recipe.write_text(config(project).to_yaml())
    for setting in ("fold=1", "mixture.balance_labels=true", "mixture.replacement=true"):
        with pytest.raises(InputError, match=f"schedule.stream .*{setting.split('=')[0]}"):
            load_recipe(recipe, [setting])
    monkeypatch.setattr("qwen2vl_sft.training.trainer.process_count", lambda: 2)
    with pytest.raises(InputError, match="reads in one process"):
        check_devices(config(project))
