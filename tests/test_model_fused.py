"""The fused parts compute what PEFT and stock transformers compute, and stand aside where they don't apply."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLForConditionalGeneration

from qwen2vl_sft.model.attention import use_packed_attention
from qwen2vl_sft.model.fused import fuse_lora, fuse_tower
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


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": r".*(q_proj|up_proj)"}, {"lora_dropout": 0.3}, {"use_dora": True}])
def test_logits_and_gradients_are_pefts(settings):
    ours, theirs = adapted(**settings), adapted(**settings)
    assert fuse_lora(ours) > 0
    for one, other in zip(step(ours), step(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max().clamp(min=1)))


def test_half_precision_autocast_and_other_adapters_stay_pefts():
    ours, theirs = adapted(torch.bfloat16), adapted(torch.bfloat16)
    fuse_lora(ours)
    assert all(torch.equal(one, other) for one, other in zip(step(ours), step(theirs), strict=True))
    ours, theirs = adapted(), adapted()
    fuse_lora(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(step(ours), step(theirs), strict=True))
    for model in (ours, theirs):
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=2, target_modules=r".*q_proj", init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(step(ours), step(theirs), strict=True))
    with ours.disable_adapter(), theirs.disable_adapter(), torch.no_grad():
        assert torch.equal(*(model(input_ids=torch.arange(9)[None]).logits for model in (ours, theirs)))


def test_the_towers_output_and_gradients_are_the_stock_ones():
    ours, theirs = (Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32).model.visual for _ in range(2))
    whole = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, dtype=torch.float32)
    whole.model.visual = ours
    fuse_tower(whole)
    patches, grid = torch.randn(32 + 48, 3 * 2 * 64), torch.tensor([[1, 8, 4], [1, 6, 8]])
    with torch.no_grad():
        torch.testing.assert_close(ours(patches, grid).pooler_output, theirs(patches, grid).pooler_output, rtol=0, atol=1e-5)
    for tower in (ours, theirs):
        tower(patches, grid).pooler_output.square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max()))


def test_only_the_stock_attention_is_replaced():
    model = Qwen2VLForConditionalGeneration.from_pretrained(LOCATION, attn_implementation="eager")
    use_packed_attention(model)
    assert model.config.text_config._attn_implementation == "eager"
