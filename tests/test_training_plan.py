"""Memory: estimates against measured peaks, the plan's choices, and runs that go on after memory ran out."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from qwen2vl_sft.config import RunConfig, with_overrides
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.model import vision_cache
from qwen2vl_sft.training import plan as plan_module
from qwen2vl_sft.training import trainer
from qwen2vl_sft.training.plan import _rounded, memory_plan, model_config, tower_bytes
from qwen2vl_sft.training.trainer import LabelTrainer, train
from qwen2vl_sft.training.validation import Reading

PRELUDE = """
import os, resource, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.training import trainer
import bitsandbytes, peft
"""


def process(project: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "QWEN2VL_SFT_ROOT": str(project), "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run([sys.executable, "-c", PRELUDE + script, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def middling(tmp_path_factory) -> Path:
    "A folder with a random Qwen2-VL whose activations outweigh everything else."
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from qwen2vl_sft.encoding.images import load_image_processor
    from qwen2vl_sft.encoding.prompt import load_encoder
    from qwen2vl_sft.config import PreprocessingConfig
    from qwen2vl_sft.model.load import base_location

    folder, small = tmp_path_factory.mktemp("middling"), base_location("small")
    config = Qwen2VLConfig.from_pretrained(small)
    text, tower = config.text_config, config.vision_config
    heads = text.hidden_size // text.num_attention_heads
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_key_value_heads = heads * 8, heads * 24, 4, 2
    text.num_attention_heads, text.layer_types, tower.hidden_size = 8, ["full_attention"] * 4, heads * 8
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    load_encoder(small).tokenizer.save_pretrained(folder)
    load_image_processor(small, PreprocessingConfig()).save_pretrained(folder)
    return folder


CASES = {  # name -> method, schedule
    "lora": ({"name": "lora"}, {"packing": False}),
    "recomputed": ({"name": "lora"}, {"packing": False, "activation_checkpointing": True, "vision_cache": False}),
    "packed": ({"name": "lora"}, {"packing": True, "micro_batch": 4, "vision_cache": False}),
    "full": ({"name": "full"}, {"accumulation": 2}),
    "tower": ({"name": "full", "freeze_tower": False, "freeze_merger": False}, {"micro_batch": 4}),
    "nf4": ({"name": "qlora"}, {"vision_cache": False}),
    "validated": ({"name": "lora"}, {"micro_batch": 1, "validate_every": 2, "validation_samples": 48}),
}


@pytest.fixture
def allocated(monkeypatch) -> Callable[[RunConfig], int]:
    "Trains, and gives the most that PyTorch's allocator held, by its profiler's record of every allocation: resident memory also counts what the C library keeps of earlier work."
    loaded, load = {}, trainer.load_base

    def load_base(*arguments, **options):
        gc.collect()  # what is freed later must not have been there before
        model = load(*arguments, **options)
        loaded["weights"], loaded["profile"] = model.get_memory_footprint(), profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        loaded["profile"].start()
        return model

    def most(config: RunConfig) -> int:
        train(config)
        loaded["profile"].stop()
        events = [event for event in loaded["profile"].profiler.kineto_results.events() if event.name() == "[memory]"]
        return loaded["weights"] + max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))

    monkeypatch.setattr(trainer, "load_base", load_base)
    return most


@pytest.mark.slow
def test_estimates_are_within_15_percent_of_measured_peaks(project, middling, allocated, monkeypatch):
    monkeypatch.setattr(plan_module, "PICTURES_ON_CPU", 2)  # in one pass of the tower, so that filling the cache isn't all there is to see
    suite, ratios = write_toy_suite(project / "toy", rows=24), {}
    for name, (method, schedule) in CASES.items():
        schedule = {"steps": 2, "micro_batch": 8, "learning_rate": 1e-4, "log_every": 1, "save_at": [], "tensorboard": False, **schedule}
        config = RunConfig(suite=str(suite), run=name, model={"base": str(middling), "device": "cpu"}, method=method, preprocessing={"min_pixels": 140**2, "max_pixels": 140**2},
                           scoring={"batch": 48}, schedule=schedule)  # fmt: skip
        measured = allocated(config)
        estimate = json.loads((project / "runs" / "default" / name / "plan.json").read_text())["estimate"]
        assert (estimate["weights"] + estimate["optimizer"] + estimate["validation"] == pytest.approx(estimate["peak"])) == (name == "validated"), estimate
        ratios[name] = round(estimate["peak"] / measured, 3)
    print(ratios)
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


def toy(project: Path, name: str, **schedule) -> RunConfig:
    if not (project / "toy").exists():
        write_toy_suite(project / "toy", rows=12)
    schedule = {"steps": 3, "micro_batch": 4, "accumulation": 2, "learning_rate": 1e-3, "warmup_ratio": 0, "log_every": 1, **schedule}
    return RunConfig(suite=str(project / "toy" / "toy.yaml"), run=name, model={"device": "cpu"}, method={"name": "lora"}, schedule=schedule)


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoints()[max(run.checkpoints())] / "adapter_model.safetensors")


def exhausting(monkeypatch, call: int, above: int) -> None:
    "From one call of the loss on, a real allocation of the CPU's allocator fails for micro-batches above a size, after the forward pass."
    real, count = LabelTrainer.compute_loss, [0]

    def compute_loss(self, model, inputs, **options):
        loss, count[0] = real(self, model, inputs, **options), count[0] + 1
        samples = int((inputs["position_ids"][0] == 0).sum()) if len(inputs["position_ids"]) == 4 else len(inputs["input_ids"])
        if count[0] >= call and samples > above:
            torch.empty(2**60)
        return loss

    monkeypatch.setattr(LabelTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(("call", "above", "packing"), [(1, 2, True), (4, 2, False), (4, 1, True)])  # in the first step, in the second micro-batch of the second one; twice halved
def test_a_step_is_done_again_with_smaller_micro_batches_and_ends_with_the_same_weights(project, monkeypatch, call, above, packing):
    expected = weights(train(toy(project, "smaller", micro_batch=above, accumulation=8 // above, packing=packing)))
    exhausting(monkeypatch, call, above)
    run = train(toy(project, "halved", packing=packing))
    found = weights(run)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)  # a step moves a weight by up to 1e-3; rounding, through Adam, by a few 1e-6
    record = json.loads((run.path / "plan.json").read_text())["out_of_memory"]
    assert [event["micro_batch"] for event in record] == [2, 1][: 1 if above == 2 else 2] and "allocate" in record[0]["reason"]
    stated = yaml.safe_load(run.config_path.read_text())["schedule"]
    assert (stated["micro_batch"], stated["accumulation"]) == (above, 8 // above)
    assert above in run.metrics().micro_batch.tolist()
    assert run.status().state == "finished" and f"out of memory at step {record[-1]['after_step'] + 1}; since then micro-batches of {above} x accumulation {8 // above}, 8 samples" in run.status().message


def test_one_sample_that_does_not_fit_ends_the_run_with_a_remedy(project, monkeypatch):
    exhausting(monkeypatch, 1, 0)
    with pytest.raises(RunFailure, match="one sample at a time.*activation_checkpointing"):
        train(toy(project, "hopeless"))


def test_weights_that_do_not_fit_are_said_with_a_remedy(project, monkeypatch):
    monkeypatch.setattr(trainer, "load_base", lambda *arguments, **options: torch.empty(2**60))
    with pytest.raises(RunFailure, match=r"out of memory.*before the first step: .* choose method=qlora or a smaller model"):
        train(toy(project, "heavy"))


LIMITED = """
import gc
import json
content = json.loads(sys.argv[1])
config = RunConfig(**content)
train = trainer.LabelTrainer.train
def limited(self, **options):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * os.sysconf("SC_PAGE_SIZE") + int(float(sys.argv[2]))
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    return train(self, **options)
trainer.LabelTrainer.train = limited
print(trainer.train(config))
"""


@pytest.mark.slow
def test_a_process_that_meets_a_real_limit_goes_on(project, middling):
    "The kernel refuses the memory that a micro-batch of 16 takes; 4 or 8 fit."
    suite = write_toy_suite(project / "toy", rows=24)
    content = {"suite": str(suite), "run": "limited", "model": {"base": str(middling), "device": "cpu"}, "method": {"name": "lora"}, "preprocessing": {"min_pixels": 200**2, "max_pixels": 200**2},
               "schedule": {"steps": 2, "micro_batch": 16, "learning_rate": 1e-4, "log_every": 1}}  # fmt: skip
    found = process(project, LIMITED, json.dumps(content), "150e6")
    run = project / "runs" / "default" / "limited"
    assert found.returncode == 0, found.stderr[-1500:]
    record = json.loads((run / "plan.json").read_text())
    assert record["micro_batch"] == 16 and record["out_of_memory"][-1]["micro_batch"] in (4, 8)
    assert (run / "checkpoints" / "step-2").exists()


def test_a_continued_run_keeps_the_smaller_micro_batch(project, monkeypatch):
    with monkeypatch.context() as patch:
        exhausting(patch, 1, 2)
        run = train(toy(project, "again", save_at=[2]))
    __import__("shutil").rmtree(run.checkpoints()[3])
    assert yaml.safe_load(train(toy(project, "again", save_at=[2])).config_path.read_text())["schedule"]["micro_batch"] == 2


def test_auto_takes_the_largest_micro_batch_that_fits(project):
    config = toy(project, "auto", micro_batch="auto", accumulation=1, effective_batch=8)
    run = train(config)
    stated = yaml.safe_load(run.config_path.read_text())["schedule"]
    assert (stated["micro_batch"], stated["accumulation"]) == (8, 1)


def test_full_7b_does_not_fit_24_gb_and_is_refused_before_anything_loads():
    sizes = np.array([[800, 3, 2916, number] for number in range(8)])
    config = RunConfig(suite="x.yaml", model={"base": "Qwen/Qwen2-VL-7B-Instruct", "device": "cuda", "dtype": "bfloat16"}, method={"name": "full"}, plan={"memory_gb": 24})
    with pytest.raises(InputError, match="full training of .*7B-Instruct needs about .* GB; use method.name=lora|needs about .*use method.name=lora"):
        memory_plan(config, sizes)
    with pytest.raises(InputError, match="or qlora$"):  # nothing that is done already is advised
        memory_plan(with_overrides(config, {"optimizer": "adamw_bnb_8bit"}), sizes)


def test_full_7b_fits_eight_gpus_that_divide_its_weights(monkeypatch):
    "As `recipes/accelerate/fsdp2.yaml` starts it; eight whole copies (DDP) don't fit."
    sizes = np.array([[870, 3, 2916, number] for number in range(32)])
    config = RunConfig(suite="x.yaml", model={"base": "Qwen/Qwen2-VL-7B-Instruct", "device": "cuda", "dtype": "bfloat16"}, method={"name": "full"},
                       schedule={"micro_batch": 2, "accumulation": 2, "optimizer": "adamw_torch", "activation_checkpointing": True}, plan={"memory_gb": 80})  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match="full training of .*7B-Instruct needs about"):
        memory_plan(config, sizes)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    shared = memory_plan(config, sizes)
    assert shared.fits and (shared.micro_batch, shared.accumulation) == (2, 2)
    trained = 7_615_616_512  # the language model's weights
    assert shared.estimate.optimizer == pytest.approx(8 * trained / 8, rel=1e-3)
    assert shared.estimate.gradients == pytest.approx(4 * trained / 8 + 4 * trained, rel=1e-3)  # its part, and those that wait for the step's last micro-batch
    at_once = memory_plan(with_overrides(config, {"micro_batch": 4, "accumulation": 1}), sizes)
    assert at_once.estimate.gradients == pytest.approx(4 * trained / 8, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_the_estimate_is_within_15_percent_of_cudas_peak(project, middling, method):
    suite = write_toy_suite(project / "toy", rows=24)
    torch.cuda.reset_peak_memory_stats()
    config = RunConfig(suite=str(suite), run=method, model={"base": str(middling), "device": "cuda"}, method={"name": method}, preprocessing={"min_pixels": 200**2, "max_pixels": 200**2},
                       schedule={"steps": 2, "micro_batch": 16, "learning_rate": 1e-4, "vision_cache": False})  # fmt: skip
    run = train(config)
    planned = json.loads((run.path / "plan.json").read_text())["estimate"]["peak"]
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def base_config(**schedule) -> RunConfig:
    return RunConfig(suite="x.yaml", model={"device": "cpu"}, method={"name": "lora"}, schedule={"micro_batch": 2, **schedule}, plan={"memory_gb": 4})


SIZES = np.array([[120, 3, 400, number] for number in range(8)])


def test_what_a_validation_reads_is_in_the_plan_and_made_to_fit():
    without, reading = memory_plan(base_config(), SIZES).estimate, Reading(32, 3000, 60, 12_000, 50, 600_000)
    config = base_config(validate_every=2, vision_cache=False)
    roomy = memory_plan(with_overrides(config, {"plan.memory_gb": 40}), SIZES, reading).estimate
    assert roomy.validation_batch == 32 and roomy.peak == roomy.weights + roomy.optimizer + roomy.validation > without.peak
    small, shared = (memory_plan(with_overrides(config, {"plan.memory_gb": 40}), SIZES, Reading(32, 512, 300, 16, 50, 800, branches)).estimate for branches in (False, True))
    text = model_config("small").text_config
    copy = 32 * 512 * text.num_hidden_layers * 2 * text.hidden_size * text.num_key_value_heads // text.num_attention_heads * 4
    assert shared.validation - small.validation == pytest.approx(copy, rel=0.01), "keys and values of the beginnings stay beside those of a branch"
    tight = memory_plan(with_overrides(config, {"plan.memory_gb": roomy.peak / 1.5e9}), SIZES, reading)
    assert tight.fits and 1 <= tight.estimate.validation_batch < 32
    cached = memory_plan(base_config(validate_every=2), SIZES, reading)
    assert cached.shape.picture == 12_000 and cached.estimate.pictures == tower_bytes("small", torch.float32, cached.estimate.pictures_at_once * 12_000)  # its pictures go into the cache, too


def test_pictures_beyond_the_caches_limit_are_computed_beside_the_optimizers_states():
    sizes = np.array([[60, 3, 8000, number % 2] for number in range(8)])
    held, beyond = (memory_plan(with_overrides(base_config(vision_cache_gb=limit, micro_batch=8), {"plan.memory_gb": 40}), sizes).estimate for limit in (1, 1e-6))
    tower = tower_bytes("small", torch.float32, _rounded(8 * 8000))
    assert held.pictures_at_once == 2 and held.pictures == tower_bytes("small", torch.float32, 2 * 8000)
    assert beyond.pictures == tower and beyond.peak == beyond.weights + beyond.optimizer + beyond.gradients + tower > 2 * held.peak


def test_validation_fills_the_cache_as_many_pictures_at_a_time_as_training(project, monkeypatch):
    passes, real = [], vision_cache.tower_features
    monkeypatch.setattr(vision_cache, "tower_features", lambda model, pixels, grid: (passes.append(len(grid)), real(model, pixels, grid))[1])
    monkeypatch.setattr(plan_module, "PICTURES_ON_CPU", 2)
    train(toy(project, "filled", steps=1, validate_every=1))
    assert max(passes) == 2 and len(passes) > 12


def test_planning_a_published_model_asks_no_network(project, capsys, monkeypatch):
    "Its tokenizer isn't on this machine: the small one stands in, and a line says so."
    import socket

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *of, **named: asked.append(of) or (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_CACHE", str(project / "hub"))
    encoder = trainer.encoder_at_hand(RunConfig(suite="x.yaml", model={"base": "Qwen/Qwen2-VL-2B-Instruct"}, preprocessing={"max_pixels": 571_536}))
    assert not asked and encoder.images.patch == 14 and encoder.images.max_pixels == 571_536
    assert "counted with the small model's tokenizer" in capsys.readouterr().out


def test_planning_an_unknown_hub_model_without_a_network_fails_at_once(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(InputError, match="model 'someone/else' is not on this machine, and http://127.0.0.1:9 can't be reached"):
        trainer.encoder_at_hand(RunConfig(suite="x.yaml", model={"base": "someone/else"}))
    assert time.monotonic() - started < 5
