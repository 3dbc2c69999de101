"""The small base model: a stock Qwen2-VL in everything but its sizes."""

import json

import pytest
import torch

from qwen2vl_sft.core import ASSETS, InputError
from qwen2vl_sft.encoding.prompt import chat_text, load_encoder, load_tokenizer
from qwen2vl_sft.model import small
from qwen2vl_sft.model.small import SPECIAL_TOKENS, build_tokenizer, merges_of, random_base, size_in_words, small_base

needs_ranks = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("dashscope"), reason="Qwen2's ranks are missing: pip install dashscope (extra `dev`)"
)


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(small_base(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(str(small_base()))


# ---- tokenizer ----


@pytest.fixture(scope="module")
def full_tokenizer():
    return build_tokenizer(None)


@needs_ranks
def test_all_ranks_rebuild_qwen2s_tokenizer(full_tokenizer):
    assert len(merges_of(small.qwen_ranks())) == 151_387
    assert full_tokenizer.convert_tokens_to_ids("<|im_end|>") == 151_645
    assert full_tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151_655
    assert full_tokenizer("Hello, world! 违规信息").input_ids == [9707, 11, 1879, 0, 32181, 251, 74386, 27369]


@needs_ranks
def test_a_saved_full_tokenizer_loads_by_its_auto_class(full_tokenizer, tmp_path):
    full_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(151_643, 151_657))
    assert loaded("Hello, world! 违规信息").input_ids == [9707, 11, 1879, 0, 32181, 251, 74386, 27369]


@needs_ranks
def test_shipped_tokenizer_is_the_builders(encoder):
    built = build_tokenizer()
    assert built.get_vocab() == encoder.tokenizer.get_vocab()
    text = "Which digit is it? E-mail: anna.k@mail.org, 违规信息 \n\n 12,5 €"
    assert built(text).input_ids == encoder.tokenizer(text).input_ids
    assert encoder.tokenizer.decode(encoder.tokenizer(text).input_ids) == text


def test_shipped_tokenizer_loads_as_stock_qwen2(encoder):
    tokenizer = encoder.tokenizer
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer") and tokenizer.is_fast
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert tokenizer("<|im_start|>x<|im_end|>").input_ids[::2] == tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


def test_ranks_without_two_parts_are_refused():
    with pytest.raises(InputError, match="not a byte pair encoding"):
        merges_of({bytes([b]): b for b in range(256)} | {b"abc": 256})


# ---- template ----

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>Which digit is it?<|im_end|>\n<|im_start|>assistant\n"
)


def test_template_renders_qwen2_vls_prompt(encoder):
    assert chat_text(encoder.tokenizer, "Which digit is it?") == PROMPT


def test_template_numbers_pictures_and_videos_on_request(encoder):
    content = [{"type": "image"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "Same?"}]
    text = encoder.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_vision_id=True)
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert f"user\nPicture 1: {image}Picture 2: {image}Video 1: {video}Same?<|im_end|>\n" in text and "assistant" not in text.split("helpful assistant")[1]


def test_template_keeps_a_given_system_prompt(encoder):
    text = encoder.tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


# ---- configuration and weights ----


def test_every_id_in_the_configuration_is_the_tokenizers(model, encoder):
    config, ids = model.config, encoder.tokenizer.convert_tokens_to_ids
    assert config.image_token_id == ids("<|image_pad|>") and config.video_token_id == ids("<|video_pad|>")
    assert config.vision_start_token_id == ids("<|vision_start|>") and config.vision_end_token_id == ids("<|vision_end|>")
    assert config.text_config.vocab_size == len(encoder.tokenizer)
    assert config.text_config.eos_token_id == ids("<|im_end|>") and config.text_config.pad_token_id == ids("<|endoftext|>")
    assert model.generation_config.eos_token_id == [ids("<|im_end|>"), ids("<|endoftext|>")]


def test_sizes(model):
    sizes = size_in_words(model)
    assert 0.8e6 < sum(sizes.values()) - sizes["embeddings"] < 2e6
    assert sum(file.stat().st_size for file in small_base().glob("*.safetensors")) <= 6e6
    for name, weight in model.model.language_model.layers.named_parameters():
        assert weight.dim() == 1 or weight.shape[0] % 64 == weight.shape[1] % 64 == 0, f"{name} has no whole NF4 blocks"
    rope = model.config.text_config.rope_parameters["mrope_section"]
    assert sum(rope) * 2 == model.config.text_config.hidden_size // model.config.text_config.num_attention_heads
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_shipped_weights_are_bfloat16():
    from safetensors import safe_open

    with safe_open(small_base() / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_shipped_weights_have_learnt_the_lessons(model, encoder):
    accuracy = small.lesson_accuracy(model, encoder, count=256)
    assert accuracy["all"] > 0.33 and accuracy["character"] > 0.6


def test_base_depends_on_seed_only(tmp_path):
    first, again, other = (random_base(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    read = lambda folder: (folder / "model.safetensors").read_bytes()  # noqa: E731
    assert read(first) == read(again) != read(other)
    assert without_dtypes(first) == without_dtypes(small_base())


def test_random_base_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    random_base(tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_missing_weights_name_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(small, "ASSETS", tmp_path)
    with pytest.raises(InputError, match=r"pretrain\.ipynb"):
        small_base()
    assert (ASSETS / "small").is_dir()


# ---- pretraining ----


def test_answers_stand_at_the_end_of_a_batch(encoder):
    lessons = small.Lessons(encoder, 8, start=small.FIRST_LESSONS)
    rows = [lessons[i] for i in range(8)]
    batch = small.collate_answers(rows, encoder)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        supervised = labels[labels != -100]
        assert torch.equal(supervised, torch.from_numpy(row["sample"].encoded.labels[row["sample"].encoded.labels != -100]))
        assert supervised[-1] == encoder.end_id and ids[-1] == encoder.tokenizer("\n").input_ids[0]
    assert batch["labels"].shape[1] == batch["logits_to_keep"] and (batch["labels"][:, 0] == -100).all()


def test_cut_labels_give_the_whole_sequences_loss(model, encoder):
    lessons = small.Lessons(encoder, 6, start=small.FIRST_LESSONS)
    rows = [lessons[i] for i in range(6)]
    batch = small.collate_answers(rows, encoder)
    whole = {**batch, "logits_to_keep": 0}
    whole["labels"] = torch.full_like(batch["input_ids"], -100)
    whole["labels"][:, -batch["labels"].shape[1]:] = batch["labels"]
    with torch.no_grad():
        assert torch.isclose(model(**batch).loss, model(**whole).loss, atol=1e-5)


def test_pretraining_runs_and_saves(tmp_path):
    settings = small.Pretraining(steps=3, batch_size=4, save_every=2, held_out=8)
    accuracy = small.pretrain(tmp_path, settings)
    steps = [json.loads(line)["step"] for line in (tmp_path / "pretraining.jsonl").read_text().splitlines()]
    assert 0 <= accuracy["all"] <= 1 and {2, 3} <= set(steps)
    assert load_encoder(str(tmp_path)).tokenizer.chat_template == small.CHAT_TEMPLATE
    assert without_dtypes(tmp_path) == without_dtypes(random_base(tmp_path / "new"))


def without_dtypes(folder):
    "A folder's configuration; a missing `use_cache` means true."
    config = {"use_cache": True} | json.loads((folder / "config.json").read_text())
    return {key: {k: v for k, v in value.items() if k != "dtype"} if isinstance(value, dict) else value for key, value in config.items()}
