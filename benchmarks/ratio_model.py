"""A small Qwen2-VL with the 2B model's ratio of operations: vision tower, language model and lm_head, at 756 x 756 pixels.

Qwen2-VL-2B's forward pass over one picture of 756 x 756 pixels and its conversation (870 tokens) is about 5.1, 2.4 and
0.41 tera-operations. What a trick saves depends on these proportions, so benchmarks on a CPU keep them at a 240th of
the size. Patch, merge, grouped keys (4 heads, 1 of keys) and the tower's length are the 2B model's kind; the weights
are random.

    python benchmarks/ratio_model.py       print the operations
"""
import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from qwen2vl_sft.core import ASSETS

SIDE, TOKENS = 756, 870  # pixels; tokens of a conversation about one picture
REAL = {"tower": 5.1, "language model": 2.4, "lm_head": 0.41}  # tera-operations of the 2B model


def ratio_config() -> Qwen2VLConfig:
    "The small model's configuration, with the token ids of the shipped small tokenizer."
    config = json.loads((ASSETS / "small" / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 224, "intermediate_size": 1312, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "num_attention_heads": 4,
        "num_key_value_heads": 1, "vocab_size": 4288, "initializer_range": 0.04,
        "rope_parameters": {"mrope_section": [8, 10, 10], "rope_theta": 1e6, "rope_type": "default"},
    }
    config["vision_config"] |= {"depth": 2, "embed_dim": 192, "hidden_size": 224, "num_heads": 4, "patch_size": 14, "initializer_range": 0.04}
    return Qwen2VLConfig(**{name: value for name, value in config.items() if name not in ("dtype", "transformers_version")})


def operations(config: Qwen2VLConfig, side: int = SIDE, tokens: int = TOKENS) -> dict[str, float]:
    "Multiplications and additions of one forward pass, by part."
    vision, text = config.vision_config, config.text_config
    patches = (side // vision.patch_size) ** 2
    wide, merged = vision.embed_dim, 4 * vision.embed_dim
    tower = vision.depth * (2 * patches * 12 * wide**2 + 4 * patches**2 * wide)
    tower += 2 * patches * 6 * vision.patch_size**2 * wide + 2 * patches // 4 * (merged**2 + merged * text.hidden_size)
    keys = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    layer = 2 * text.hidden_size**2 + 2 * text.hidden_size * keys + 3 * text.hidden_size * text.intermediate_size
    model = text.num_hidden_layers * (2 * tokens * layer + 4 * tokens**2 * text.hidden_size)
    return {"tower": tower, "language model": model, "lm_head": 2 * tokens * text.hidden_size * text.vocab_size}


def write_ratio_model(folder: Path, side: int = SIDE, seed: int = 0) -> Path:
    "A folder like a base model's: random weights, the small tokenizer, an image processor with a budget of side² pixels."
    config = ratio_config()
    shutil.copytree(ASSETS / "small", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": side * side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))
    torch.manual_seed(seed)
    Qwen2VLForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    found = operations(ratio_config())
    for part, count in found.items():
        print(f"{part:15} {count / 1e9:6.2f} giga-operations, {count / found['tower'] * 5.1:5.2f} (2B: {REAL[part]})")
