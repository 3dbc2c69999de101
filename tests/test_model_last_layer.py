"""The last layer at the wanted places gives the numbers, gradients and cache of the stock forward."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration

from qwen2vl_sft.encoding.batch import Sample, pack, pad, with_pixel_values
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.attention import use_packed_attention
from qwen2vl_sft.model.last_layer import only_at, places
from qwen2vl_sft.model.load import base_location, unwrapped
from qwen2vl_sft.model.prefill import beginning, ending, prefill
from qwen2vl_sft.scoring.labels import Asked, label_tree, read_trees
from qwen2vl_sft.training.loss import token_losses

LOCATION = base_location("small")


def stock_model(attention: str = "sdpa", lora: bool = False):
    model = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32, attn_implementation=attention)
    if not lora:
        return model.requires_grad_(True)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model\..*_proj", init_lora_weights=False))


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(LOCATION)


@pytest.fixture(scope="module")
def samples(encoder):
    def one(seed, width, height, answer):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Sample(encoder.encode("What is shown?", (width, height), answer), pixels)

    return [one(0, 64, 32, "a red circle"), one(1, 32, 32, "no"), one(2, 48, 64, "two")]


def stock_losses(model, batch) -> torch.Tensor:
    "By the logits of every position."
    inputs = {name: value for name, value in with_pixel_values(batch).items() if name != "labels"}
    logits, labels = model(**inputs, use_cache=False).logits, batch["labels"]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)[labels[:, 1:].flatten() != -100]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("attention", "packed", "lora", "checkpointing"), [
    ("sdpa", False, False, False), ("sdpa", True, False, False), ("eager", False, False, False), ("sdpa", True, True, True),
])
def test_loss_and_gradients_are_those_of_the_stock_forward(encoder, samples, attention, packed, lora, checkpointing):
    model = stock_model(attention, lora)
    padded = pad(samples, encoder.images, encoder.pad_id)
    expected = stock_losses(model, padded)
    expected.sum().backward()
    theirs = gradients(model)
    if checkpointing:
        unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if packed:
        use_packed_attention(model)
    ours = token_losses(model, pack(samples, encoder.images) if packed else padded, tower_is_frozen=False)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    ours.sum().backward()
    mine = gradients(model)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5 * max(1.0, float(value.abs().max())), msg=name)


def test_padding_on_the_left_is_not_seen(encoder, samples):
    model = stock_model()
    left, right = (pad(samples, encoder.images, encoder.pad_id, side) for side in ("left", "right"))
    with torch.no_grad():
        torch.testing.assert_close(token_losses(model, left), stock_losses(model, right), rtol=0, atol=1e-5)


def test_the_last_layer_runs_at_the_wanted_places_only_and_caches_all_keys(encoder, samples):
    model, asked = stock_model(), [Sample(encoder.encode("What is shown?", (one.pixels.shape[1], one.pixels.shape[0])), one.pixels) for one in samples]
    seen = []
    layers = model.model.language_model.layers
    for layer in layers:
        layer.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:-1].numel()))
    prompts = prefill(model, encoder, asked)
    length = max(len(sample.encoded) for sample in asked)
    assert seen == [3 * length] * (len(layers) - 1) + [3]
    for row, sample in enumerate(asked):
        one = with_pixel_values(pad([sample], encoder.images, encoder.pad_id))
        with torch.no_grad():
            whole = stock_model()(**{name: value for name, value in one.items() if name != "labels"}, use_cache=True)
        torch.testing.assert_close(model.lm_head(prompts.last[row]), whole.logits[0, -1], rtol=0, atol=1e-4)
        for ours, theirs in zip(prompts.keys_values.layers, whole.past_key_values.layers, strict=True):
            torch.testing.assert_close(ours.keys[row, :, : len(sample.encoded)], theirs.keys[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(ours.values[row, :, : len(sample.encoded)], theirs.values[0], rtol=0, atol=1e-4)


def test_what_follows_a_shared_beginning_runs_the_last_layer_where_it_is_read(encoder, samples):
    "Of a question its last token, of labels all; what is behind them finds every key and value. The numbers: test_5_13_tasks_about_one_picture..."
    model, asked = stock_model(), [Sample(encoder.encode("What is shown?", (one.pixels.shape[1], one.pixels.shape[0])), one.pixels) for one in samples]
    beginnings, whole, question = prefill(model, encoder, [beginning(one) for one in asked]), prefill(model, encoder, asked), ending(asked[0])
    ran = []
    model.model.language_model.layers[-1].mlp.register_forward_hook(lambda _, given, __: ran.append(given[0].shape[:-1].numel()))
    after = beginnings.followed_by(model, question)
    torch.testing.assert_close(after.last, whole.last, rtol=0, atol=1e-4)
    tree = label_tree(encoder, {"yes": ["yes"], "no weapon": ["no weapon"]})
    behind, = read_trees(model, encoder, beginnings, [Asked(question, tree)])
    assert ran == [3, 3 * (1 + len(tree))]
    expected = read_trees(model, encoder, whole, [Asked((), tree)])[0]
    for name in ("arrivals", "stops"):
        torch.testing.assert_close(getattr(behind, name), getattr(expected, name), rtol=0, atol=1e-4)
        torch.testing.assert_close(getattr(read_trees(model, encoder, after, [Asked((), tree)])[0], name), getattr(expected, name), rtol=0, atol=1e-4)


def test_a_call_that_names_no_places_is_the_stock_one(encoder):
    model, ids = stock_model().eval(), torch.arange(12).view(2, 6) + 300
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model(input_ids=ids, **only_at(model, places({}, torch.ones_like(ids, dtype=torch.bool))))
        assert torch.equal(model(input_ids=ids).logits, before)
