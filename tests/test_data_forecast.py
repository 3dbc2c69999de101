"""The forecast against stock transformers and peft: numbers of parameters, lengths; and what doesn't fit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.core import ASSETS, InputError
from qwen2vl_sft.data import forecast as module
from qwen2vl_sft.data.forecast import (
    METHODS,
    PUBLISHED,
    PUBLISHED_TOWER,
    Plan,
    Sample,
    forecast,
    forecast_lines,
    histogram,
    histogram_svg,
    memory_gigabytes,
    plan_of_recipe,
    published_plan,
    sequence_lengths,
    shape_of,
    small_plan,
)

SAMPLE = Sample("train", "Which digit is it?", "7", 40, 30)


@pytest.mark.parametrize("base", PUBLISHED)
def test_shapes_count_the_parameters_that_stock_transformers_makes(base):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tower = PUBLISHED_TOWER | {"hidden_size": PUBLISHED[base]["hidden_size"], "num_heads": 16}
    tied = PUBLISHED[base]["tie_word_embeddings"]
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=PUBLISHED[base], vision_config=tower, tie_word_embeddings=tied))
    shape = shape_of(PUBLISHED[base], PUBLISHED_TOWER)
    language = sum(p.numel() for name, p in model.named_parameters() if "visual" not in name)
    vision = sum(p.numel() for name, p in model.named_parameters() if "visual" in name)
    assert abs(shape.language / language - 1) < 0.01 and abs(shape.tower / vision - 1) < 0.01


def test_adapters_are_as_many_as_peft_makes():
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = json.loads((ASSETS / "small" / "config.json").read_text())
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))
        targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules=targets))
    made = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    shape = shape_of(config["text_config"], config["vision_config"])
    assert 16 * shape.adapter_width * shape.layers == made


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.text(max_size=20), st.sampled_from(["Which?", "什么动物？"]))
def test_lengths_are_those_of_the_encoder(width, height, answer, question):
    encoder = small_plan().encoder
    if max(width, height) > 200 * min(width, height):
        return
    (length,) = sequence_lengths([Sample("train", question, answer, width, height)], encoder)
    assert length == len(encoder.encode(question, (width, height), answer))


def test_what_does_not_fit_is_counted():
    small = small_plan()
    tight = Plan("tight", small.encoder, small.shape, max_tokens=60)
    samples = [SAMPLE, SAMPLE._replace(width=400, height=400), SAMPLE._replace(answer="a <|im_end|> b")]
    report = forecast(samples, [tight])["tight"]
    assert (report["too_long"], report["special_tokens"], report["steps_per_epoch"]) == (1, 1, 1)
    assert sum(rows for *_, rows in report["histogram"]) == 2
    assert any("special token" in line for line in forecast_lines({"tight": report}))


def test_nothing_to_forecast(monkeypatch):
    assert forecast([]) == {} and forecast_lines({}) == [] and histogram_svg([]) == ""
    monkeypatch.setattr(module, "small_plan", lambda: None)
    assert forecast([SAMPLE]) == {} and published_plan(next(iter(PUBLISHED)), RunConfig(suite="x").preprocessing) is None


def test_memory_grows_with_tokens_and_falls_with_the_method():
    shape = shape_of(PUBLISHED["Qwen/Qwen2-VL-7B-Instruct"], PUBLISHED_TOWER)
    needs = [memory_gigabytes(shape, method, 1000) for method in METHODS]
    assert needs == sorted(needs, reverse=True)
    assert memory_gigabytes(shape, "qlora", 8000) > memory_gigabytes(shape, "qlora", 1000)


def test_a_recipe_states_budget_batch_and_longest_sample():
    config = RunConfig(suite="x", model={"base": "Qwen/Qwen2-VL-2B-Instruct"}, preprocessing={"min_pixels": 3136, "max_pixels": 10_000},
                       schedule={"micro_batch": 2, "accumulation": 3, "max_tokens": 99})
    plan = plan_of_recipe(config)
    assert (plan.batch, plan.micro_batch, plan.max_tokens, plan.encoder.images.max_pixels) == (6, 2, 99, 10_000)
    assert plan_of_recipe(RunConfig(suite="x")).name == "small"
    with pytest.raises(InputError, match="no forecast for model 'someone/model'"):
        plan_of_recipe(RunConfig(suite="x", model={"base": "someone/model"}))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=50))
def test_every_row_is_in_one_bin(lengths):
    bins = histogram(np.array(lengths, np.int64))
    assert sum(rows for *_, rows in bins) == len(lengths) and len(bins) <= 25
    for low, high, rows in bins:
        assert rows == sum(low <= length < high for length in lengths)
