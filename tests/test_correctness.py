"""DESIGN section 5, point by point: what correct Qwen2-VL fine-tuning means.

Reference values come from stock transformers: its chat template, image processor, forward pass, loss and optimiser.
tests/mutants.py breaks one line of the package for each point and expects the test named here to turn red.
"""

import copy
import io
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from qwen2vl_sft.config import MethodConfig, ModelConfig, PreprocessingConfig, RunConfig, ScoringConfig
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.data.sources import Row
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.encoding.batch import Sample, pack, pad, with_pixel_values
from qwen2vl_sft.encoding.images import header_size, open_image
from qwen2vl_sft.encoding.prompt import IGNORED, Encoder, load_encoder
from qwen2vl_sft.model import attention
from qwen2vl_sft.model.attention import PACKED, use_packed_attention
from qwen2vl_sft.model.export import export_merged, merged
from qwen2vl_sft.model.load import (
    base_location, changes_outputs, load_adapter, load_base, load_checkpoint, trainable, unwrapped,
)
from qwen2vl_sft.model.prefill import beginning, ending, prefill
from qwen2vl_sft.model.vision_cache import forward_inputs
from qwen2vl_sft.scoring.labels import LabelTree, label_log_probabilities, label_tree, read_tree, score_labels, walks
from qwen2vl_sft.scoring.labeler import Decision, Labeler, Picture, label_pictures
from qwen2vl_sft.scoring.suite import Scorer, self_test, test_set
from qwen2vl_sft.scoring.text import write_answers
from qwen2vl_sft.tasks import Task, load_suite
from qwen2vl_sft.training.loss import averaged, token_losses
from qwen2vl_sft.training.trainer import train

CPU = ModelConfig(base="small", device="cpu")
LOCATION = base_location("small")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(LOCATION)


@pytest.fixture(scope="module")
def stock() -> Qwen2VLForConditionalGeneration:
    "The stock model in float32, as transformers loads it."
    return Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32).eval()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def sample_of(encoder: Encoder, question: str, answer: str | None, width: int, height: int, seed: int = 0) -> Sample:
    return Sample(encoder.encode(question, (width, height), answer), encoder.images.resize(picture(width, height, seed)))


def three_samples(encoder: Encoder, answers: bool = True) -> list[Sample]:
    rows = [("Is there a weapon?", "no", 96, 64), ("Which number is written here, from left to right?", "12 3456 789", 40, 120), ("Digit?", "7", 32, 32)]
    return [sample_of(encoder, q, a if answers else None, w, h, seed) for seed, (q, a, w, h) in enumerate(rows)]


def stock_inputs(encoder: Encoder, question: str, answer: str | None, image: Image.Image, image_first: bool = True) -> tuple[dict, str]:
    "What stock transformers makes of a conversation: its template, its image processor, its tokenizer. Also the text."
    processor = AutoImageProcessor.from_pretrained(LOCATION, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(LOCATION)
    vision = processor(image, return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content if image_first else content[::-1]}]
    messages += [] if answer is None else [{"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * int(vision["image_grid_thw"].prod() // processor.merge_size**2))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {"input_ids": ids, "mm_token_type_ids": kinds, **vision}, text


def stock_loss(stock, encoder: Encoder, question: str, answer: str, image: Image.Image, image_first: bool = True) -> tuple[torch.Tensor, int]:
    "The stock loss of one conversation, supervised where LLaMA-Factory's mask and DESIGN 5.2 agree, and its tokens."
    inputs, text = stock_inputs(encoder, question, answer, image, image_first)
    tokenizer = AutoTokenizer.from_pretrained(LOCATION)
    prompt = tokenizer(text[: text.rindex(answer + "<|im_end|>")])["input_ids"]
    labels = inputs["input_ids"].clone()
    labels[:, : len(prompt)] = -100
    labels[:, -1] = -100  # the newline after <|im_end|>
    return stock(**inputs, labels=labels).loss, int((labels != -100).sum())


# --- 5.1 and 5.2: text and labels ----------------------------------------------------------------
@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 31), (31, 200), (9, 9)])
def test_5_1_the_text_is_the_templates_byte_for_byte(encoder, width, height):
    inputs, text = stock_inputs(encoder, "Is there a weapon?", "no", picture(width, height))
    ours = encoder.encode("Is there a weapon?", (width, height), "no")
    assert encoder.tokenizer.decode(ours.input_ids) == text
    assert ours.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>")


def test_5_1_the_prompt_is_the_templates_up_to_the_answer(encoder):
    inputs, _ = stock_inputs(encoder, "Which digit?", None, picture(40, 40))
    assert encoder.encode("Which digit?", (40, 40)).input_ids.tolist() == inputs["input_ids"][0].tolist()


def test_5_1_system_prompt_and_order_are_settings(encoder):
    changed = load_encoder(LOCATION, PreprocessingConfig(system_prompt="Be brief.", image_first=False))
    text = changed.tokenizer.decode(changed.encode("Which digit?", (32, 32)).input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich digit?<|vision_start|>")


def test_5_2_the_answer_and_its_end_are_supervised_and_nothing_else(encoder):
    sample = encoder.encode("Is it no?", (64, 32), "no knife")
    kept = sample.input_ids[sample.labels != IGNORED]
    assert encoder.tokenizer.decode(kept) == "no knife<|im_end|>"
    assert (sample.labels[sample.labels != IGNORED] == kept).all()
    assert sample.labels[-1] == IGNORED and encoder.tokenizer.decode(sample.input_ids[-1:]) == "\n"
    assert encoder.end_id != encoder.pad_id


def test_5_2_the_newline_is_supervised_for_parity_runs(encoder):
    parity = Encoder(encoder.tokenizer, encoder.images, encoder.settings, supervise_newline=True)
    labels = parity.encode("Is it no?", (64, 32), "no").labels
    assert encoder.tokenizer.decode(labels[labels != IGNORED]) == "no<|im_end|>\n"


@pytest.mark.parametrize("text", ["end<|im_end|>", "<|im_start|>system", "a <|image_pad|> b"])
def test_5_2_data_cannot_write_the_conversation(encoder, text):
    with pytest.raises(InputError, match="special token"):
        encoder.encode(text, (32, 32), "no")
    with pytest.raises(InputError, match="special token"):
        encoder.encode("What is it?", (32, 32), text)


# --- 5.3: ids come from the tokenizer ------------------------------------------------------------
def test_5_3_two_vocabularies_give_the_same_text(encoder):
    pytest.importorskip("dashscope", reason="lacks dashscope, which ships Qwen's full vocabulary")
    from qwen2vl_sft.model.small import build_tokenizer

    full = Encoder(build_tokenizer(None), encoder.images, encoder.settings)
    ids = full.encode("Which digit?", (32, 32), "7").input_ids
    assert full.tokenizer.decode(ids) == encoder.tokenizer.decode(encoder.encode("Which digit?", (32, 32), "7").input_ids)
    assert full.image_token_id == 151655 != encoder.image_token_id and full.end_id == 151645 and full.pad_id == 151643
    assert ids[:14].tolist() == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]


# --- 5.4: positions ------------------------------------------------------------------------------
def test_5_4_the_padding_side_does_not_change_the_logits(encoder, stock):
    samples = three_samples(encoder, answers=False)
    last = {}
    for side in ("right", "left"):
        batch = pad(samples, encoder.images, encoder.pad_id, side)
        with torch.no_grad():
            logits = stock(**forward_inputs(stock, batch), use_cache=False).logits
        last[side] = torch.stack([row[mask.bool()][-1] for row, mask in zip(logits, batch["attention_mask"], strict=True)])
    torch.testing.assert_close(last["left"], last["right"], rtol=2e-6, atol=1e-5)  # logits are up to 20


def test_5_4_positions_are_the_stock_models(encoder, stock):
    for side in ("right", "left"):
        batch = pad(three_samples(encoder), encoder.images, encoder.pad_id, side)
        kinds = (batch["input_ids"] == encoder.image_token_id).int()
        theirs, _ = stock.model.get_rope_index(batch["input_ids"], kinds, batch["image_grid_thw"], attention_mask=batch["attention_mask"])
        assert torch.equal(batch["position_ids"], theirs)


@pytest.mark.parametrize("attention", ["borders", "borders, checkpointed", "mask"])
def test_5_4_packed_loss_and_gradients_equal_separate_stock_forwards(encoder, attention):
    ours, theirs = (Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32) for _ in range(2))
    if attention != "mask":
        use_packed_attention(ours)
    if "checkpointed" in attention:
        ours.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train()
    samples = three_samples(encoder)
    batch = pack(samples, encoder.images)
    loss = averaged(token_losses(ours, batch, tower_is_frozen=False), batch)
    loss.backward()
    rows = [("Is there a weapon?", "no", 96, 64), ("Which number is written here, from left to right?", "12 3456 789", 40, 120), ("Digit?", "7", 32, 32)]
    parts = [stock_loss(theirs, encoder, q, a, picture(w, h, seed)) for seed, (q, a, w, h) in enumerate(rows)]
    reference = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["borders", "mask"])
def test_5_4_changing_one_packed_sample_changes_nothing_in_the_others(encoder, attention):
    stock = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32).eval()
    if attention == "borders":
        use_packed_attention(stock)
        assert stock.config.text_config._attn_implementation == PACKED
    samples = three_samples(encoder)
    other = [sample_of(encoder, "Is there a weapon?", "no", 96, 64, seed=99), *samples[1:]]
    with torch.no_grad():
        one, two = (token_losses(stock, pack(some, encoder.images)) for some in (samples, other))
    changed = int((samples[0].encoded.labels != IGNORED).sum())
    assert torch.equal(one[changed:], two[changed:]) and not torch.equal(one[:changed], two[:changed])


def test_5_4_packed_attention_without_lengths_is_the_stock_one(encoder, stock):
    batch = pad(three_samples(encoder), encoder.images, encoder.pad_id, "left")
    ours = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32).eval()
    use_packed_attention(ours)
    with torch.no_grad():
        for extra in ({}, {"use_cache": False}):
            one, other = (model(**forward_inputs(model, batch), **extra).logits for model in (ours, stock))
            assert torch.equal(one, other)
        written = [model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3, do_sample=False) for model in (ours, stock)]
    assert torch.equal(*written)


def attention_under_autocast(monkeypatch, device: str) -> list[torch.dtype]:
    "The precisions that packed attention computes in, of a model with float32 weights under bfloat16 autocast."
    seen = []
    for name in ("varlen", "one_by_one"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda query, key, value, *rest, real=real, name=name: seen.append((name, query.dtype, key.dtype, value.dtype)) or real(query, key, value, *rest))
    model = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32).to(device)
    use_packed_attention(model)
    encoder = load_encoder(LOCATION)
    with torch.autocast(device, torch.bfloat16):
        token_losses(model, pack(three_samples(encoder), encoder.images)).sum().backward()
    return seen


def test_5_4_under_autocast_packed_attention_is_in_half_precision(monkeypatch):
    "With float32 weights the rotary embedding's cosines are float32, and so would be queries and keys."
    assert set(attention_under_autocast(monkeypatch, "cpu")) == {("one_by_one", *[torch.bfloat16] * 3)}


@pytest.mark.gpu
def test_5_4_under_autocast_a_gpu_takes_varlen(monkeypatch):
    assert set(attention_under_autocast(monkeypatch, "cuda")) == {("varlen", *[torch.bfloat16] * 3)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_5_4_packed_samples_on_a_gpu_equal_separate_ones(encoder, dtype):
    "bfloat16 takes torch's varlen_attn, float32 one attention a sample."
    ours, theirs = (Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=dtype).cuda() for _ in range(2))
    use_packed_attention(ours)
    samples = three_samples(encoder)
    batch = pack(samples, encoder.images)
    packed = token_losses(ours, batch)
    single = torch.cat([token_losses(theirs, pad([sample], encoder.images, encoder.pad_id)) for sample in samples])
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(packed, single, rtol=0, atol=tolerance)
    packed.sum().backward()
    single.sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            assert (one.grad - other.grad).norm() <= 10 * tolerance * other.grad.norm() + tolerance
    other = [sample_of(encoder, "Is there a weapon?", "no", 96, 64, seed=99), *samples[1:]]
    changed = int((samples[0].encoded.labels != IGNORED).sum())
    assert torch.equal(packed[changed:], token_losses(ours, pack(other, encoder.images))[changed:])


# --- 5.5 and 5.6: images -------------------------------------------------------------------------
def test_5_5_a_sample_that_cannot_fit_is_named_before_any_weight_loads(project):
    suite = write_toy_suite(project / "toy", rows=3)
    picture(128, 128).save(project / "toy" / "pictures" / "train-2.png")
    folder = project / "no-weights"
    shutil.copytree(LOCATION, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = RunConfig(suite=str(suite), model={"base": str(folder), "device": "cpu"}, schedule={"steps": 4, "max_tokens": 80, "micro_batch": 3})
    with pytest.raises(InputError, match=r"colour/.* tokens, above schedule.max_tokens=80 \(1 such samples\)"):
        train(config)


@pytest.mark.parametrize(("width", "height"), [(31, 57), (200, 20), (640, 480), (8, 8)])
def test_5_6_patches_equal_the_stock_processors(encoder, width, height):
    image = picture(width, height)
    theirs = AutoImageProcessor.from_pretrained(LOCATION, backend="pil")(image, return_tensors="pt")
    values, grid = encoder.images.patches([encoder.images.resize(image)])
    assert grid.tolist() == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(values, theirs["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_5_6_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = file_bytes(picture(40, 20), exif=exif)
    assert open_image(content).size == header_size(content) == ((20, 40) if orientation > 4 else (40, 20))


def test_5_6_transparency_is_white_and_16_bits_are_scaled():
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert open_image(file_bytes(drawing)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([10, 20, 30] * 256)
    assert open_image(file_bytes(palette, transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(file_bytes(palette)).getpixel((0, 0)) == (10, 20, 30)
    half = Image.fromarray(np.full((4, 4), 65535 // 2, dtype=np.uint16))
    assert open_image(file_bytes(half)).getpixel((0, 0)) == (127, 127, 127)
    cmyk = Image.new("CMYK", (4, 4), (0, 0, 0, 255))
    assert open_image(file_bytes(cmyk, "TIFF")).getpixel((0, 0)) == (0, 0, 0)


# --- 5.7 and 5.8: weights and precisions ---------------------------------------------------------
def test_5_7_nf4_covers_the_language_model_and_nothing_else():
    import bitsandbytes as bnb

    model = load_base(ModelConfig(base="small", device="cpu", dtype="bfloat16"), MethodConfig(name="qlora"))
    quantised = {name for name, part in model.named_modules() if isinstance(part, bnb.nn.Linear4bit)}
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert quantised == {name for name in linear if name.startswith("model.language_model.layers.")}
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested and layer.compute_dtype is torch.bfloat16
    rest = trainable(model, MethodConfig(name="qlora")).named_parameters()
    assert {weight.dtype for name, weight in rest if "lora_" not in name and weight.dtype is not torch.uint8} == {torch.bfloat16}


def test_5_8_adapters_are_float32_on_the_seven_projections():
    model = trainable(load_base(ModelConfig(base="small", device="cpu", dtype="bfloat16"), MethodConfig(name="lora")), MethodConfig(name="lora"))
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in learning.values()} == {torch.float32}
    layers = unwrapped(model).config.text_config.num_hidden_layers
    assert len(learning) == 7 * 2 * layers and all("language_model" in name for name in learning)


def test_5_8_full_training_has_float32_master_weights():
    model = load_base(ModelConfig(base="small", device="cpu", dtype="bfloat16"), MethodConfig(name="full"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def tuned_adapter(folder, method: MethodConfig, scale: float = 0.05):
    model = trainable(load_base(CPU, method), method)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    model.save_pretrained(folder)
    return model


def test_5_8_an_adapter_whose_keys_do_not_land_is_an_error(tmp_path):
    tuned_adapter(tmp_path, MethodConfig(name="lora"))
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name.replace("language_model.", "text_model."): weight for name, weight in weights.items()}, file)
    with pytest.raises(RunFailure, match="did not land|has no weight"):
        load_adapter(load_base(CPU), tmp_path, "step-1")


def test_5_8_an_adapter_that_changes_nothing_is_an_error(tmp_path):
    tuned_adapter(tmp_path, MethodConfig(name="lora"), scale=0.0)
    with pytest.raises(RunFailure, match="changes no output"):
        load_checkpoint(CPU, MethodConfig(name="lora"), tmp_path)
    tuned_adapter(tmp_path, MethodConfig(name="lora"))
    assert changes_outputs(load_checkpoint(CPU, MethodConfig(name="lora"), tmp_path))


# --- 5.9 to 5.11: the step -----------------------------------------------------------------------
def test_5_9_the_frozen_towers_backward_does_not_run_under_activation_checkpointing(encoder):
    model = trainable(load_base(CPU, MethodConfig(name="lora")), MethodConfig(name="lora"))
    model.enable_input_require_grads()  # what PEFT users call; it hooks the tower too
    unwrapped(model).model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    passes = {"forward": 0, "backward": 0}
    block = unwrapped(model).model.visual.blocks[0]
    block.register_forward_hook(lambda *_: passes.update(forward=passes["forward"] + 1))
    block.register_full_backward_hook(lambda *_: passes.update(backward=passes["backward"] + 1))
    batch = pad(three_samples(encoder), encoder.images, encoder.pad_id)
    averaged(token_losses(model, batch, tower_is_frozen=True), batch).backward()
    assert passes == {"forward": 1, "backward": 0}
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_5_10_the_head_runs_on_supervised_positions_only(encoder, stock):
    seen = []
    hook = stock.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:-1].numel()))
    batch = pad(three_samples(encoder), encoder.images, encoder.pad_id)
    with torch.no_grad():
        loss = averaged(token_losses(stock, batch), batch)
    hook.remove()
    assert seen == [int((batch["labels"] != IGNORED).sum())]
    with torch.no_grad():
        reference = stock(**with_pixel_values(batch), use_cache=False).loss
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-5)


def trained_weights(project, name: str, **schedule) -> dict[str, torch.Tensor]:
    config = RunConfig(
        suite=str(project / "toy" / "toy.yaml"), experiment="toy", run=name, model=CPU, method={"name": "lora", "rank": 4},
        schedule={"steps": 2, "learning_rate": 1e-3, "warmup_ratio": 0, **schedule},
    )  # fmt: skip
    return load_file(train(config).checkpoints()[2] / "adapter_model.safetensors")


def test_5_11_accumulation_averages_over_the_tokens_of_the_effective_batch(project):
    write_toy_suite(project / "toy", rows=12)  # answers of one to three tokens
    whole = trained_weights(project, "whole", micro_batch=8, accumulation=1)
    parts = trained_weights(project, "parts", micro_batch=2, accumulation=4)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-5)
    by_sample = trained_weights(project, "sample", micro_batch=8, loss_average="sample")
    in_parts = trained_weights(project, "sample-parts", micro_batch=2, accumulation=4, loss_average="sample")
    for name, weight in by_sample.items():
        torch.testing.assert_close(in_parts[name], weight, rtol=0, atol=1e-5)
    assert any((whole[name] - by_sample[name]).abs().max() > 1e-4 for name in whole)


def test_5_11_the_logged_loss_is_the_stock_loss_of_the_effective_batch(project, encoder, stock):
    suite = load_suite(write_toy_suite(project / "toy", rows=3))
    config = RunConfig(
        suite=str(project / "toy" / "toy.yaml"), run="once", model=CPU, method={"name": "lora"},
        schedule={"steps": 1, "micro_batch": 2, "accumulation": 3, "log_every": 1},
    )  # fmt: skip
    run = train(config)
    prepared = prepare(suite)
    parts = []
    for task in suite.tasks:
        rows = prepared.split(task.name, "train")
        parts += [stock_loss(stock, encoder, task.question, row["label"], open_image(row["image"])) for row in (rows[i] for i in range(3))]
    reference = sum(loss.item() * count for loss, count in parts) / sum(count for _, count in parts)
    assert run.metrics().loss.tolist() == pytest.approx([reference], abs=2e-4)  # one epoch: all six samples


# --- 5.12: merging -------------------------------------------------------------------------------
def test_5_12_a_merge_is_made_in_the_original_weights(tmp_path):
    tuned = tuned_adapter(tmp_path, MethodConfig(name="qlora"))
    model = merged(CPU, tmp_path)
    assert not any(type(part).__name__ == "Linear4bit" for part in model.modules())
    name = "model.language_model.layers.0.mlp.up_proj"
    adapter = tuned.base_model.model.get_submodule(name)
    delta = adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight * adapter.scaling["default"]
    plain = load_base(CPU).get_submodule(name).weight
    torch.testing.assert_close(model.get_submodule(name).weight, plain + delta, rtol=0, atol=1e-5)


def test_5_12_the_gate_refuses_a_merge_that_changes_labels(tmp_path):
    tuned_adapter(tmp_path / "step-1", MethodConfig(name="qlora"))
    answers = iter([np.array([[0.9, 0.1]] * 4), np.array([[0.9, 0.1]] * 3 + [[0.4, 0.6]])])
    with pytest.raises(RunFailure, match="75.0% of 4 labels stay"):
        export_merged(CPU, MethodConfig(name="qlora"), tmp_path / "step-1", tmp_path / "out", lambda model: next(answers), least_agreement=0.9)
    assert not (tmp_path / "out").exists()


# --- 5.13 and 5.14: scoring ----------------------------------------------------------------------
LABELS = {
    "no": ["no"],
    "no weapon": ["no weapon"],  # begins like the one before
    "违规信息": ["违规信息", "违规"],  # two wordings, one a beginning of the other
    "7": ["7", "8", "1"],  # wordings that are about as likely as each other
    "long": ["a very long label of many words and numbers such as 1234567890 and more of them"],
}


def stock_label_log_probability(stock, encoder, question, wording, image, image_first=True) -> float:
    loss, count = stock_loss(stock, encoder, question, wording, image, image_first)
    return -loss.item() * count


def test_5_13_label_probabilities_equal_one_stock_forward_a_label(encoder, stock):
    question, sizes = "What is shown?", [(32, 32), (96, 48), (40, 100)]
    samples = [sample_of(encoder, question, None, w, h, seed) for seed, (w, h) in enumerate(sizes)]
    ours = label_log_probabilities(stock, encoder, samples, label_tree(encoder, LABELS))
    for seed, (w, h) in enumerate(sizes):
        for column, wordings in enumerate(LABELS.values()):
            with torch.no_grad():
                each = [stock_label_log_probability(stock, encoder, question, wording, picture(w, h, seed)) for wording in wordings]
            assert ours[seed, column].item() == pytest.approx(np.logaddexp.reduce(each), abs=1e-4)


LONG = "a handgun lying on a wooden table beside two knives and a broken bottle of very old red wine"


@pytest.mark.parametrize(
    ("labels", "checked"),
    [
        (["a", "a gun", "a gun and", "a gun and a knife", "an"], range(5)),
        (["a", LONG], range(2)),
        (["是", "不是", "违规信息", "刀具和枪支"], range(4)),
        ([f"article {i:03d}" for i in range(1000)], (0, 9, 500, 999)),
    ],
    ids=["beginnings of others", "1 and 30 tokens", "Chinese", "a thousand"],
)
def test_5_13_label_sets_of_every_kind_equal_stock_forwards(encoder, stock, labels, checked):
    assert labels[1] != LONG or (len(encoder.text_ids("a")), len(encoder.text_ids(LONG)) >= 30) == (1, True)
    ours = label_log_probabilities(stock, encoder, [sample_of(encoder, "What is it?", None, 48, 32)], label_tree(encoder, {label: [label] for label in labels}))
    for column in checked:
        with torch.no_grad():
            theirs = stock_label_log_probability(stock, encoder, "What is it?", labels[column], picture(48, 32))
        assert ours[0, column].item() == pytest.approx(theirs, abs=1e-4)


QUESTIONS = {  # about one picture: labels that begin alike, one and thirty tokens, two wordings, an open answer, the same question with other labels
    "weapon": Task(name="weapon", question="Is there a weapon?", labels=["no", "no weapon", "违规信息"], aliases={"违规信息": ["违规"]}),
    "long": Task(name="long", question="Is there anything else that should be told to somebody? Answer in one of two ways.", labels=["a", LONG]),
    "text": Task(name="text", question="Which number is written here, from left to right?", answer="text"),
    "again": Task(name="again", question="Is there a weapon?", labels=["yes", "no"]),
}


def adapted(stock) -> torch.nn.Module:
    "The stock model with an adapter that changes its outputs, as PEFT makes it."
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(stock), LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj", init_lora_weights=False)).eval()


def beginnings_read(model: torch.nn.Module, monkeypatch) -> list[int]:
    "Prompts of every pass of the language model that starts without a cache."
    inner, read = unwrapped(model).model.language_model, []
    real = inner.forward

    def forward(*args, **named):
        if not (named.get("past_key_values") and named["past_key_values"].get_seq_length()):
            read.append(len(named["inputs_embeds"]))
        return real(*args, **named)

    monkeypatch.setattr(inner, "forward", forward)
    return read


@pytest.mark.parametrize(("has_adapter", "image_first"), [(False, True), (True, True), (False, False)], ids=["base", "adapter", "question first"])
def test_5_13_tasks_about_one_picture_share_its_beginning_and_equal_stock_forwards(stock, monkeypatch, has_adapter, image_first):
    "One reading of each picture for all tasks that begin alike; every label's probability, and the free answer, is that of separate stock passes."
    encoder = load_encoder(LOCATION, PreprocessingConfig(image_first=image_first))
    reference = adapted(stock) if has_adapter else stock
    images = [picture(w, h, seed) for seed, (w, h) in enumerate([(96, 64), (32, 32), (40, 120)])]
    labeler = Labeler(copy.deepcopy(reference), encoder, list(QUESTIONS.values()), dict.fromkeys(QUESTIONS, Decision()), "c", "w", max_new_tokens=6)
    read = beginnings_read(labeler.model, monkeypatch)
    rows = label_pictures(labeler, [Picture(Row(str(i)), encoder.images.squares(image), image.size) for i, image in enumerate(images)])
    assert read == [len(images)] * (1 if image_first else 3), "a beginning is read once; with the question first, once a question"
    for row, (task, image) in zip(rows, itertools.product(QUESTIONS.values(), images), strict=True):
        inputs, _ = stock_inputs(encoder, task.question, None, image, image_first)
        if not task.is_closed:
            written = reference.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert row["label"] == encoder.tokenizer.decode(written, skip_special_tokens=True)
            continue
        ours = np.log(list(json.loads(row["probabilities"]).values())) + np.log(row["in_set_mass"])
        with torch.no_grad():
            each = [[stock_label_log_probability(reference, encoder, task.question, wording, image, image_first) for wording in wordings] for wordings in task.wordings.values()]
        np.testing.assert_allclose(ours, [np.logaddexp.reduce(one) for one in each], atol=1e-4)


def test_5_13_branches_of_a_beginning_do_not_see_each_other(encoder, stock):
    "Cut, selected and continued apart: the beginnings stay as they were, and so does a second branch."
    samples = [sample_of(encoder, "Digit?", None, w, h, seed) for seed, (w, h) in enumerate([(96, 64), (32, 32)])]
    shared = prefill(stock, encoder, [beginning(sample) for sample in samples])
    before = [layer.keys.clone() for layer in shared.keys_values.layers]
    first = shared.followed_by(stock, ending(samples[0])).last
    one = shared.branch().only([1])
    assert len(one) == 1 and one.keys_values.get_seq_length() == shared.keys_values.get_seq_length()
    shared.followed_by(stock, tuple(encoder.text_ids("something else")))
    assert all(torch.equal(layer.keys, was) for layer, was in zip(shared.keys_values.layers, before, strict=True))
    assert torch.equal(shared.followed_by(stock, ending(samples[0])).last, first)
    inputs, _ = stock_inputs(encoder, "Digit?", None, picture(32, 32, 1))
    token = torch.tensor([encoder.text_ids("7")[:1]])
    inputs |= {name: torch.cat([inputs[name], more], dim=1) for name, more in (("input_ids", token), ("mm_token_type_ids", token * 0))}
    with torch.no_grad():
        theirs = stock.model(**inputs).last_hidden_state[0, -2:]
    whole = one.followed_by(stock, ending(samples[1]))
    after = whole.read_on(stock, token, torch.zeros(1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(torch.stack([whole.last[0], after[0, 0]]), theirs, rtol=1e-4, atol=1e-4)


def test_5_13_what_is_read_off_the_tree_is_what_stock_generates(encoder, stock):
    rows = [("Is there a weapon?", 96, 64), ("Which number is written here, from left to right?", 40, 120), ("Digit?", 32, 32)]
    tree, written, ends = LabelTree(["other", "some"]), [], {encoder.end_id, encoder.pad_id}
    for seed, (question, w, h) in enumerate(rows):
        inputs, _ = stock_inputs(encoder, question, None, picture(w, h, seed))
        ids = stock.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        written.append(ids)
        tree.add(1, [token for token in ids if token not in ends] if seed else [encoder.text_ids("zebra")[0]])  # the first is left out
    reading = read_tree(stock, encoder, prefill(stock, encoder, three_samples(encoder, answers=False)), tree)
    ours = walks(reading, tree, ends)
    expected = [ids if ids[-1] in ends else None for ids in written]
    assert ours[0] is None and ours[1:] == expected[1:] and any(expected[1:])


def test_5_13_probabilities_are_a_softmax_over_the_set(encoder, stock):
    samples = three_samples(encoder, answers=False)
    tree = label_tree(encoder, LABELS)
    logs = label_log_probabilities(stock, encoder, samples, tree).double()
    scores = score_labels(stock, encoder, samples, tree)
    np.testing.assert_allclose(scores.probabilities, logs.softmax(1).numpy(), atol=1e-6)
    np.testing.assert_allclose(scores.in_set_mass, logs.exp().sum(1).numpy(), atol=1e-6)


def test_5_13_free_answers_are_stock_greedy_generation(encoder, stock):
    samples = three_samples(encoder, answers=False)
    texts, _ = write_answers(stock, encoder, samples, max_new_tokens=6)
    rows = [("Is there a weapon?", 96, 64), ("Which number is written here, from left to right?", 40, 120), ("Digit?", 32, 32)]
    for seed, ((question, w, h), text) in enumerate(zip(rows, texts, strict=True)):
        inputs, _ = stock_inputs(encoder, question, None, picture(w, h, seed))
        written = stock.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert text == encoder.tokenizer.decode(written, skip_special_tokens=True)


def test_5_14_a_sample_alone_and_in_a_batch_has_the_same_label(encoder, stock):
    samples, tree = three_samples(encoder, answers=False), label_tree(encoder, LABELS)
    together = label_log_probabilities(stock, encoder, samples, tree)
    alone = torch.cat([label_log_probabilities(stock, encoder, [sample], tree) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert torch.equal(together.argmax(1), alone.argmax(1))


def test_5_14_the_self_test_stops_a_model_that_depends_on_the_batch(project, encoder, monkeypatch):
    prepared = prepare(load_suite(write_toy_suite(project / "toy", rows=6)))
    data, scorer = test_set(prepared, prepared.suite.tasks[0], ScoringConfig()), Scorer(encoder, ScoringConfig())
    model = load_base(CPU)
    assert self_test(model, scorer, data) < 1e-4 and self_test(model, scorer, data, "free") < 1e-4
    head = model.lm_head.forward
    tokens = [encoder.text_ids(label)[0] for label in ("red", "green", "blue")]

    def leaking(hidden):
        logits = head(hidden)
        if hidden.ndim == 2:  # after the prompt, another favourite when there is company
            logits[:, tokens[len(hidden) > 1]] += 50
        return logits

    monkeypatch.setattr(model.lm_head, "forward", leaking)
    with pytest.raises(RunFailure, match="self-test"):
        self_test(model, scorer, data)
    word = test_set(prepared, prepared.suite.task("word"), ScoringConfig())
    with pytest.raises(RunFailure, match=r"self-test: sample 0 of word is '.*' alone and '.*' in a batch \(rule free\)"):
        self_test(model, scorer, word, "free")


def test_weights_and_trainer_state_are_read_without_running_code(project):
    write_toy_suite(project / "toy", rows=6)
    trained_weights(project, "safe", micro_batch=2)
    folder = project / "runs" / "toy" / "safe" / "checkpoints" / "step-2"
    for file in folder.glob("*.pt*"):
        torch.load(file, weights_only=True) if file.name != "rng_state.pth" else None
    assert not list(folder.glob("*.bin")) and json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    assert yaml.safe_load((folder.parent.parent / "config.yaml").read_text())["schedule"]["steps"] == 2
