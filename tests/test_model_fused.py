"""The fused parts compute what PEFT and stock transformers compute, and stand aside where they don't apply."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLForConditionalGeneration

from qwen2vl_sft.model.attention import use_packed_attention
from qwen2vl_sft.model.fused import Gate, RmsNorm, Rotation, fuse_language, fuse_lora, fuse_tower
from qwen2vl_sft.model.load import base_location

LOCATION = base_location("small")


def adapted(dtype: torch.dtype = torch.float32, **settings):
    model = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=dtype).requires_grad_(False)
    options = {"r": 8, "lora_alpha": 24, "target_modules": r".*language_model\..*_proj", "lora_dropout": 0.0, **settings}
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.train()


def step(model) -> list[torch.Tensor]:
    torch.manual_seed(1)
    logits = model(input_ids=torch.arange(60).view(2, 30), use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), *(weight.grad for weight in model.parameters() if weight.requires_grad)]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def assert_near(ours: list[torch.Tensor], theirs: list[torch.Tensor], share: float) -> None:
    "Within a share of each tensor's largest value."
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=share * float(other.abs().max().clamp(min=1)))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": r".*(q_proj|up_proj)"}, {"lora_dropout": 0.3}, {"use_dora": True}])
def test_logits_and_gradients_are_pefts(settings):
    ours, theirs = adapted(**settings), adapted(**settings)
    assert fuse_lora(ours) > 0
    assert_near(step(ours), step(theirs), 1e-5)


def test_half_precision_autocast_and_other_adapters_stay_pefts():
    ours, theirs = adapted(torch.bfloat16), adapted(torch.bfloat16)
    fuse_lora(ours)
    assert_equal(step(ours), step(theirs))
    ours, theirs = adapted(), adapted()
    fuse_lora(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(step(ours), step(theirs))
    for model in (ours, theirs):
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=2, target_modules=r".*q_proj", init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        model.zero_grad()
    assert_equal(step(ours), step(theirs))
    with ours.disable_adapter(), theirs.disable_adapter(), torch.no_grad():
        assert torch.equal(*(model(input_ids=torch.arange(9)[None]).logits for model in (ours, theirs)))


def stock() -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32).train()


def full_step(model, **inputs) -> list[torch.Tensor]:
    logits = model(input_ids=torch.arange(60).view(2, 30), use_cache=False, **inputs).logits
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), *(weight.grad for name, weight in model.named_parameters() if "visual" not in name)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_norms_gates_and_rotations_are_the_stock_ones_all_weights_learning(attention):
    ours, theirs = stock(), stock()
    for model in (ours, theirs):
        model.set_attn_implementation(attention)
    fuse_language(ours)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    assert_near(full_step(ours, attention_mask=mask), full_step(theirs, attention_mask=mask), 2e-5)


def test_activation_checkpointing_and_a_cache_work_through_the_fused_parts():
    ours, theirs = stock(), stock()
    fuse_language(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert_near(full_step(ours), full_step(theirs), 2e-5)
    ours.gradient_checkpointing_disable()
    ids = torch.arange(12)[None]
    written = [model.eval().generate(input_ids=ids, min_new_tokens=6, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True) for model in (ours, theirs)]
    for one, other in zip(*(answer.logits for answer in written), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_each_ways_back_is_the_derivative():
    torch.manual_seed(0)
    numbers = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    turns = (torch.randn(1, 5, 6, dtype=torch.float64), torch.randn(1, 5, 6, dtype=torch.float64))  # halves that differ, too
    assert torch.autograd.gradcheck(RmsNorm.apply, (numbers(2, 3, 8), numbers(8), 1e-6))
    assert torch.autograd.gradcheck(Gate.apply, (numbers(4, 6), numbers(4, 6)))
    assert torch.autograd.gradcheck(Rotation.apply, (numbers(2, 5, 6), *turns))


def test_half_precision_and_autocast_stay_stock():
    ours, theirs = stock().bfloat16(), stock().bfloat16()
    fuse_language(ours)
    fuse_tower(ours)
    assert_equal(full_step(ours), full_step(theirs))
    ours, theirs = stock(), stock()
    fuse_language(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(full_step(ours), full_step(theirs))


def test_the_towers_output_and_gradients_are_the_stock_ones():
    ours, theirs = (Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32).model.visual for _ in range(2))
    whole = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32)
    whole.model.visual = ours
    fuse_tower(whole)
    single, grid = torch.randn(32 + 48, 3, 1, 64), torch.tensor([[1, 8, 4], [1, 6, 8]])
    picture, video = single.expand(-1, -1, 2, -1).flatten(1), torch.randn(32 + 48, 3 * 2 * 64)
    for given, expected in ((single.flatten(1), picture), (picture, picture), (video, video)):
        with torch.no_grad():
            torch.testing.assert_close(ours(given, grid).pooler_output, theirs(expected, grid).pooler_output, rtol=0, atol=1e-5)
        for tower, patches in ((ours, given), (theirs, expected)):
            tower.zero_grad()
            tower(patches, grid).pooler_output.square().sum().backward()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max()))


def test_in_half_precision_a_picture_of_one_frame_meets_the_weights_of_both():
    whole = stock().bfloat16()
    fuse_tower(whole)
    embed, single = whole.model.visual.patch_embed, torch.randn(80, 3, 1, 64)
    assert torch.equal(embed(single.flatten(1)), embed(single.expand(-1, -1, 2, -1).flatten(1)))


def test_only_the_stock_attention_is_replaced():
    model = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, attn_implementation="eager")
    use_packed_attention(model)
    assert model.config.text_config._attn_implementation == "eager"
