"""Training: samples a second and peak memory of ours, of the stock recipe and of LLaMA-Factory, on the same samples.

    python benchmarks/training.py                         CPU: a small Qwen2-VL with the 2B model's ratio of operations
    python benchmarks/training.py --device cuda --shape 2b   real shapes with random weights (also 7b); needs a GPU
    sh benchmarks/peers/llamafactory.sh                   makes LLaMA-Factory's environment; without it its arms are left out

Each arm is a process that trains through its own public entry: ours through `train`, the stock recipe through the
Hugging Face Trainer with PEFT, LLaMA-Factory through its `run_exp`. All train LoRA adapters on the language model, from
the same first adapter, with a frozen tower, on the same samples in the same order, `supervise_newline` on. On a CPU all
are alive at once and take turns, an optimiser step each, in another order each round; on CUDA they follow each other.
Losses are compared before any time is reported.
"""
import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER = HERE / "peers" / ".venv-llamafactory" / "bin" / "python"
OURS = {  # arm: what it is; `train` of this package but for what is named
    "ours, warm cache": "everything on, pictures in the vision cache from an earlier epoch or run",
    "ours, cold cache": "everything on, an empty vision cache: the fill is part of the time, one epoch",
    "ours without vision cache": "the tower runs at every step (under no_grad)",
    "ours without packing": "warm cache, padded batches",
    "ours without supervised-position logits": "warm cache, lm_head on every position",
    "ours without last-layer trimming": "warm cache, the last layer's queries and feed-forward part on every position",
    "ours with checkpointing": "no cache, activation checkpointing of the language model, tower under no_grad outside it",
    "ours with checkpointing, without no_grad tower": "no cache, stock activation checkpointing, tower inside",
}
STOCK = {
    "stock": "HF Trainer with PEFT: padded batches, all logits, no checkpointing",
    "stock with checkpointing": "the same with gradient_checkpointing=True",
}
LLAMAFACTORY = {
    "LLaMA-Factory, defaults": "its defaults: gradient checkpointing on",
    "LLaMA-Factory, best settings": "disable_gradient_checkpointing, sdpa",
}
ARMS = OURS | STOCK | LLAMAFACTORY
TARGETS = [  # arm, times, of what
    ("ours, warm cache", 3.0, "LLaMA-Factory, defaults"), ("ours, warm cache", 3.0, "LLaMA-Factory, best settings"),
    ("ours, warm cache", 2.3, "best stock"),
    ("ours, cold cache", 1.5, "LLaMA-Factory, defaults"), ("ours, cold cache", 1.5, "LLaMA-Factory, best settings"),
]
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}  # bf16, dense, as published
QUESTIONS = {
    "kind": "Which of these kinds does the picture belong to: plain, striped, dotted, or none of them?",
    "words": "What is written in the picture? Answer with the words only.",
}
LABELS = ["plain", "striped", "dotted", "none of them"]
WORDS = ["open", "closed until ten", "no entry", "call 555 0100 for a table", "fresh bread", "sale"]


# --- the model -------------------------------------------------------------------------------------
SHAPES: dict[str, dict[str, Any]] = {  # tower depth and width, layers, width, key-value width, feed-forward width, vocabulary; tokens of the largest picture
    "ratio": dict(depth=8, embed=192, heads=3, layers=5, hidden=256, q_heads=4, kv_heads=2, ff=1152, vocab=3840, sizes=[(11, 10), (10, 11), (10, 10), (12, 9), (9, 12), (11, 9), (9, 10), (9, 9), (10, 8), (8, 8)]),
    "tiny": dict(depth=1, embed=32, heads=1, layers=1, hidden=64, q_heads=2, kv_heads=1, ff=96, vocab=2304, sizes=[(3, 2), (2, 2)]),
    "2b": dict(depth=32, embed=1280, heads=16, layers=28, hidden=1536, q_heads=12, kv_heads=2, ff=8960, vocab=151936, sizes=[(27, 27), (24, 27), (27, 24), (30, 24), (24, 24), (32, 22)]),
    "7b": dict(depth=32, embed=1280, heads=16, layers=28, hidden=3584, q_heads=28, kv_heads=4, ff=18944, vocab=152064, sizes=[(27, 27), (24, 27), (27, 24), (30, 24), (24, 24), (32, 22)]),
}


def operations(shape: dict, patches: float, tokens: float) -> dict[str, float]:
    "Floating point operations of one sample's forward pass: matrix products and attention."
    width, hidden, kv = shape["embed"], shape["hidden"], shape["hidden"] // shape["q_heads"] * shape["kv_heads"]
    tower = shape["depth"] * (24 * patches * width**2 + 4 * patches**2 * width) + 2 * patches * 1176 * width
    tower += patches / 2 * (16 * width**2 + 4 * width * hidden)
    layer = 2 * tokens * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * shape["ff"]) + 4 * tokens**2 * hidden
    return {"tower": tower, "language": shape["layers"] * layer, "lm_head": 2 * tokens * shape["vocab"] * hidden}


def write_model(folder: Path, shape: dict, dtype: str) -> None:
    "A Qwen2-VL of that shape with random weights, with tokenizer and image processor, as a folder every arm can load."
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from qwen2vl_sft.model.small import SPECIAL_TOKENS, small_base

    tokenizer = AutoTokenizer.from_pretrained(small_base())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    head = shape["hidden"] // shape["q_heads"]
    sections = [head // 2 - 2 * (head // 2 * 3 // 8), head // 2 * 3 // 8, head // 2 * 3 // 8]
    text = dict(vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["ff"], num_hidden_layers=shape["layers"],
                num_attention_heads=shape["q_heads"], num_key_value_heads=shape["kv_heads"], max_position_embeddings=32768, tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": sections},
                bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    vision = dict(depth=shape["depth"], embed_dim=shape["embed"], hidden_size=shape["hidden"], num_heads=shape["heads"], mlp_ratio=4, patch_size=14)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["<|image_pad|>"],
                           video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = Qwen2VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    columns, rows = max(shape["sizes"], key=lambda size: size[0] * size[1])
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=56 * 56, max_pixels=columns * rows * 28 * 28).save_pretrained(folder)
    from peft import LoraConfig, get_peft_model

    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=rf".*language_model\..*\.({names})")).save_pretrained(folder / "adapter")


# --- the samples -----------------------------------------------------------------------------------
def write_suite(folder: Path, shape: dict, rows: int) -> Path:
    "Pictures of sizes that no resize changes, questions and answers, as a suite of two tasks."
    import numpy as np
    from PIL import Image

    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for task, answers, split, count in [(task, answers, *part) for task, answers in (("kind", LABELS), ("words", WORDS)) for part in (("train", rows), ("test", 2))]:
        lines = ["image,label"]
        for row in range(count):
            columns, lines_high = shape["sizes"][rng.integers(len(shape["sizes"]))]
            soft = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((columns * 28, lines_high * 28), Image.Resampling.BICUBIC)
            soft.save(folder / "pictures" / f"{task}-{split}-{row}.jpg", quality=95)
            lines.append(f"pictures/{task}-{split}-{row}.jpg,{answers[rng.integers(len(answers))]}")
        (folder / f"{task}-{split}.csv").write_text("\n".join(lines) + "\n")
    tasks = [{"name": "kind", "question": QUESTIONS["kind"], "labels": LABELS}, {"name": "words", "question": QUESTIONS["words"], "answer": "text"}]
    for task in tasks:
        task["sources"] = {split: {"format": "csv", "path": f"{task['name']}-{split}.csv"} for split in ("train", "test")}
    (folder / "bench.yaml").write_text(json.dumps({"name": "bench", "tasks": tasks}))
    return folder / "bench.yaml"


def run_config(folder: Path, arm: str, settings: dict) -> Any:
    "Our configuration of an arm; the stock recipe and LLaMA-Factory are given the same numbers."
    from qwen2vl_sft.config import RunConfig

    schedule = {"steps": settings["steps"], "micro_batch": settings["batch"], "learning_rate": 1e-4, "scheduler": "constant", "warmup_ratio": 0.0,
                "supervise_newline": True, "log_every": 1, "workers": 0, "packing": arm != "ours without packing",
                "vision_cache": arm in ("ours, warm cache", "ours, cold cache", "ours without packing", "ours without supervised-position logits", "ours without last-layer trimming"),
                "activation_checkpointing": arm.startswith("ours with checkpointing")}
    model = {"base": str(folder / "model"), "device": settings["device"], "dtype": settings["dtype"]}
    method = {"name": settings["method"], "rank": 4, "alpha": 8}
    return RunConfig(suite=str(folder / "suite" / "bench.yaml"), run="run", model=model, method=method, schedule=schedule)


def write_samples(folder: Path, settings: dict) -> dict[str, float]:
    "The samples in the order of our trainer, for the other arms; returns their mean size."
    from qwen2vl_sft.data.prepare import prepare
    from qwen2vl_sft.encoding.prompt import load_encoder
    from qwen2vl_sft.tasks import load_suite
    from qwen2vl_sft.training.order import TrainingOrder

    os.environ["QWEN2VL_SFT_ROOT"] = str(folder / "shared")
    config = run_config(folder, "ours, warm cache", settings)
    data = TrainingOrder(prepare(load_suite(config.suite_path)), load_encoder(str(folder / "model"), supervise_newline=True), config)
    rows, patches, tokens = [], [], []
    for key in data.order:
        encoded = data.encoded(key)
        image = folder / "images" / f"{data.value(key, 'sha256')}.jpg"
        if not image.exists():
            image.parent.mkdir(exist_ok=True)
            image.write_bytes(data.splits[key[0]].image(key[1]))
        rows.append({"image": str(image), "question": QUESTIONS[key[0]], "label": data.value(key, "label")})
        patches.append(encoded.image_tokens * 4)
        tokens.append(len(encoded))
    (folder / "samples.json").write_text(json.dumps(rows))
    chat = [{"messages": [{"role": "user", "content": "<image>" + row["question"]}, {"role": "assistant", "content": row["label"]}], "images": [row["image"]]} for row in rows]
    (folder / "sharegpt.json").write_text(json.dumps(chat))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    (folder / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": "sharegpt.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": tags}}))
    batch = settings["batch"]
    longest = [max(tokens[start : start + batch]) * len(tokens[start : start + batch]) for start in range(0, len(tokens), batch)]
    return {"patches": statistics.mean(patches), "tokens": statistics.mean(tokens), "padding": 1 - sum(tokens) / sum(longest), "pictures": len({row["image"] for row in rows})}


# --- one arm, in its own process -------------------------------------------------------------------
class Turns:
    "An arm's side of taking turns: wait for a word, work, report."

    def __init__(self, write: int):
        self.out, self.began = os.fdopen(write, "w"), 0.0

    def send(self, **message: Any) -> None:
        print(json.dumps(message), file=self.out, flush=True)

    def begin(self) -> None:
        self.send(kind="ready")
        if not sys.stdin.readline():
            os._exit(3)  # the parent is gone
        self.began = time.perf_counter()

    def end(self, what: str, samples: int) -> None:
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.synchronize()
        self.send(kind=what, seconds=time.perf_counter() - self.began, samples=samples, **memory())


def in_turns(turns: Turns, batch: int) -> Any:  # TrainerCallback
    "A callback that makes each optimiser step a turn, data loading included, and reports the losses."
    from transformers import TrainerCallback

    class InTurns(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            turns.begin()

        def on_step_end(self, args, state, control, **_):
            turns.end("step", batch)
            if state.global_step < state.max_steps:
                turns.begin()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                turns.send(kind="loss", loss=float(logs["loss"]))

        def on_train_end(self, args, state, control, **_):
            turns.send(kind="done")

    return InTurns()


def memory() -> dict[str, float]:
    "Peak resident memory of this process in MB; on CUDA the device's peaks too."
    import torch

    peaks = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    if torch.cuda.is_available():
        peaks |= {"cuda_allocated_mb": torch.cuda.max_memory_allocated() / 1e6, "cuda_reserved_mb": torch.cuda.max_memory_reserved() / 1e6}
    return peaks


def train_ours(arm: str, folder: Path, settings: dict, turns: Turns) -> None:
    "Our `train`, with the arm's feature taken away by replacing the function that gives it."
    root = folder / "roots" / arm
    (root / "prepared").mkdir(parents=True)
    (root / "prepared" / "bench").symlink_to(folder / "shared" / "prepared" / "bench")
    os.environ["QWEN2VL_SFT_ROOT"] = str(root)
    import torch
    from safetensors.torch import load_file

    from qwen2vl_sft.model import vision_cache
    from qwen2vl_sft.model.load import unwrapped
    from qwen2vl_sft.training import trainer as room

    build, by_size = room.build_trainer, vision_cache.by_size

    def built(*args: Any, **options: Any) -> Any:
        trainer = build(*args, **options)
        state = {name.replace(".weight", ".default.weight"): value for name, value in load_file(folder / "model" / "adapter" / "adapter_model.safetensors").items()}
        own = dict(trainer.model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
        if arm == "ours with checkpointing, without no_grad tower":
            unwrapped(trainer.model).gradient_checkpointing_enable({"use_reentrant": False})
            trainer.model.enable_input_require_grads()
        trainer.add_callback(in_turns(turns, settings["batch"]))
        return trainer

    def filled_in_turns(names: Any, *args: Any) -> Iterator[dict]:
        turns.begin()
        for pictures in by_size(names, *args):
            yield pictures
            turns.end("fill", len(pictures))
            turns.begin()
        turns.end("fill", 0)

    room.build_trainer = built
    if arm == "ours, cold cache":
        vision_cache.by_size = filled_in_turns
    if arm == "ours without supervised-position logits":
        room.token_losses = losses_from_all_logits
    if arm == "ours without last-layer trimming":
        room.token_losses = losses_from_whole_layers
    if arm == "ours with checkpointing, without no_grad tower":
        room.token_losses = losses_with_the_tower_inside
    room.train(run_config(folder, arm, settings))


def losses_from_all_logits(model: Any, batch: dict, tower_is_frozen: bool = True) -> Any:
    "What `token_losses` gives, from the logits of every position."
    from torch.nn import functional as F

    from qwen2vl_sft.model.attention import packed_inputs
    from qwen2vl_sft.model.vision_cache import forward_inputs

    logits = model(**packed_inputs(model, forward_inputs(model, batch, tower_is_frozen)), use_cache=False).logits.float()
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).to(logits.device)
    losses = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.flatten(), reduction="none")
    return losses[labels.flatten() != -100]


def losses_from_whole_layers(model: Any, batch: dict, tower_is_frozen: bool = True) -> Any:
    "What `token_losses` gives, with every layer computed at every position."
    from torch.nn import functional as F

    from qwen2vl_sft.model.attention import packed_inputs
    from qwen2vl_sft.model.vision_cache import forward_inputs
    from qwen2vl_sft.training.loss import predicting

    labels = batch["labels"].to(model.device)
    keep = predicting(labels)
    logits = model(**packed_inputs(model, forward_inputs(model, batch, tower_is_frozen)), logits_to_keep=keep, use_cache=False).logits
    return F.cross_entropy(logits.float(), labels.roll(-1, dims=1)[keep], reduction="none")


def losses_with_the_tower_inside(model: Any, batch: dict, tower_is_frozen: bool = True) -> Any:
    "`token_losses` with the tower run by the model's forward."
    from qwen2vl_sft.training.loss import token_losses

    return token_losses(model, batch, False)


def train_stock(arm: str, folder: Path, settings: dict, turns: Turns) -> None:
    "The usual recipe: HF Trainer, PEFT, a collator with the model's own image processor and template, all logits."
    import torch
    from peft import PeftModel
    from PIL import Image
    from torch.utils.data import SequentialSampler
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration, Trainer, TrainingArguments

    location, rows = folder / "model", json.loads((folder / "samples.json").read_text())
    tokenizer, processor = AutoTokenizer.from_pretrained(location), AutoImageProcessor.from_pretrained(location, backend="pil")
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def text(row: dict, answer: bool) -> str:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
        messages += [{"role": "assistant", "content": row["label"]}] if answer else []
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answer)

    def collate(rows: list[dict]) -> dict:
        vision = processor(images=[Image.open(row["image"]).convert("RGB") for row in rows], return_tensors="pt")
        counts = (vision["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist()
        whole = [text(row, True).replace("<|image_pad|>", "<|image_pad|>" * count) for row, count in zip(rows, counts, strict=True)]
        prompts = [text(row, False).replace("<|image_pad|>", "<|image_pad|>" * count) for row, count in zip(rows, counts, strict=True)]
        batch = tokenizer(whole, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for number, prompt in enumerate(tokenizer(prompts)["input_ids"]):
            labels[number, : len(prompt)] = -100
        return {**batch, **vision, "labels": labels, "mm_token_type_ids": (batch["input_ids"] == image_id).int()}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    model = Qwen2VLForConditionalGeneration.from_pretrained(location, dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa").to(settings["device"])
    model.requires_grad_(False)
    model = PeftModel.from_pretrained(model, location / "adapter", is_trainable=True)
    checkpointing = "checkpointing" in arm
    arguments = TrainingArguments(
        output_dir=str(folder / "roots" / arm), max_steps=settings["steps"], per_device_train_batch_size=settings["batch"], learning_rate=1e-4,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True,
        use_cpu=settings["device"] == "cpu", bf16=settings["dtype"] == "bfloat16", gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None, label_names=["labels"])  # fmt: skip
    InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[in_turns(turns, settings["batch"])]).train()


def train_llamafactory(arm: str, folder: Path, settings: dict, turns: Turns) -> None:
    "LLaMA-Factory's own SFT, from the settings a user would write in its YAML."
    from llamafactory.train.tuner import run_exp

    written = {
        "model_name_or_path": str(folder / "model"), "adapter_name_or_path": str(folder / "model" / "adapter"), "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "template": "qwen2_vl", "dataset": "bench", "dataset_dir": str(folder),
        "cutoff_len": 4096, "image_max_pixels": settings["max_pixels"], "image_min_pixels": 56 * 56, "disable_shuffling": True, "output_dir": str(folder / "roots" / arm),
        "per_device_train_batch_size": settings["batch"], "gradient_accumulation_steps": 1, "max_steps": settings["steps"], "learning_rate": 1e-4,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": settings["dtype"] == "bfloat16",
        "use_cpu": settings["device"] == "cpu", "overwrite_cache": True, "preprocessing_num_workers": 1, "dataloader_num_workers": 0, "trust_remote_code": False,
    }  # fmt: skip
    if arm == "LLaMA-Factory, best settings":
        written |= {"disable_gradient_checkpointing": True, "flash_attn": "sdpa"}
    run_exp(written, callbacks=[in_turns(turns, settings["batch"])])


# --- all arms --------------------------------------------------------------------------------------
class Arm:
    "The parent's side: an arm's process and what it reported."

    def __init__(self, name: str, folder: Path, threads: int):
        self.name, self.seconds, self.samples, self.losses, self.fill, self.memory, self.is_done = name, [], [], [], [0.0, 0], {}, False
        read, write = os.pipe()
        python = str(PEER) if name in LLAMAFACTORY else sys.executable
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "PYTHONPATH": str(HERE.parent)}  # fmt: skip
        environment.pop("CUDA_VISIBLE_DEVICES", None) if name not in LLAMAFACTORY else None
        self.log = open(folder / f"{name}.log", "w+")  # noqa: SIM115  read when the arm fails
        command = [python, str(HERE / "training.py"), "--arm", name, "--folder", str(folder), "--pipe", str(write)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT, pass_fds=[write], env=environment, text=True)
        os.close(write)
        self.reports = os.fdopen(read)

    def hear(self) -> dict:
        "The next report. Raises RuntimeError with the end of the arm's output if it ended without one."
        watch = threading.Timer(900, self.process.kill)
        watch.daemon = True
        watch.start()
        line = self.reports.readline()
        watch.cancel()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.name} ended early:\n" + "".join(self.log.readlines()[-15:]))
        return json.loads(line)

    def take_turn(self) -> bool:
        "One turn; whether another will follow."
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        while (report := self.hear())["kind"] not in ("ready", "done"):
            self.note(report)
        if report["kind"] == "done":
            self.is_done = True
            self.process.stdin.close()
            self.process.wait()
        return not self.is_done

    def note(self, report: dict) -> None:
        if report["kind"] == "loss":
            self.losses.append(report["loss"])
            return
        self.memory = {name: value for name, value in report.items() if name.endswith("_mb")}
        if report["kind"] == "fill":
            self.fill = [self.fill[0] + report["seconds"], self.fill[1] + report["samples"]]
        else:
            self.seconds.append(report["seconds"])
            self.samples.append(report["samples"])


@contextmanager
def started(names: list[str], folder: Path, threads: int) -> Iterator[list[Arm]]:
    "Arms that have loaded everything and wait for their first turn; none outlives the block."
    arms = [Arm(name, folder, threads) for name in names]
    try:
        for arm in arms:
            arm.hear()
        yield arms
    finally:
        for arm in arms:
            if arm.process.poll() is None:
                arm.process.kill()
                arm.process.wait()


def all_turns(arms: list[Arm], limit: float) -> None:
    "A turn each, in another order each round, until all are done, the time is up or Ctrl-C is pressed."
    order, began = random.Random(0), time.perf_counter()
    for arm in [arm for arm in arms if arm.name == "ours, cold cache"]:
        while not arm.seconds:  # the fill, and the first step
            arm.take_turn()
    for arm in [arm for arm in arms if not arm.seconds]:
        arm.take_turn()
    waiting = [arm for arm in arms if not arm.is_done]
    try:
        while waiting and time.perf_counter() - began < limit:
            order.shuffle(waiting)
            waiting = [arm for arm in waiting if arm.take_turn()]
            print("  ".join(f"{arm.seconds[-1]:.2f}" for arm in arms), flush=True)
    except KeyboardInterrupt:
        print("stopped: the steps made so far count", flush=True)


def measured(names: list[str], folder: Path, settings: dict) -> list[Arm]:
    "All arms, with their times and results."
    (folder / "settings.json").write_text(json.dumps(settings))
    groups = [names] if settings["in_turns"] else [[name] for name in names]
    done: list[Arm] = []
    for group in groups:
        with started(group, folder, settings["threads"]) as arms:
            all_turns(arms, settings["seconds"])
            done += arms
    return done


# --- the report ------------------------------------------------------------------------------------
def seconds_a_sample(arm: Arm, warm_up: int) -> list[float]:
    "Of each step after the warm-up; a cold cache's fill is spread over its pictures."
    fill = arm.fill[0] / arm.fill[1] if arm.fill[1] else 0.0
    return [seconds / samples + fill for seconds, samples in zip(arm.seconds[warm_up:], arm.samples[warm_up:], strict=True)]


def quartiles(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return [round(low, 4), round(middle, 4), round(high, 4)]


def ratio(one: list[float], other: list[float]) -> dict:
    "How many times as fast `one` is: the median of the steps' ratios, with quartiles."
    low, middle, high = quartiles([b / a for a, b in zip(one, other, strict=False)])
    return {"times": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)]}


def speed_report(arms: list[Arm], settings: dict, work: dict[str, float]) -> dict:
    "Samples a second, ratios, and how far the losses are apart."
    times = {arm.name: seconds_a_sample(arm, settings["warm_up"]) for arm in arms}
    losses = {arm.name: arm.losses for arm in arms}
    reference = losses.get("stock") or next(iter(losses.values()))
    count = min(20, *(len(values) for values in losses.values()))
    table = {}
    for arm in arms:
        low, middle, high = quartiles(times[arm.name])
        table[arm.name] = {
            "what": ARMS[arm.name], "samples_per_second": round(1 / middle, 2), "spread": [round(1 / high, 2), round(1 / low, 2)],
            "largest_loss_difference": round(max(abs(a - b) for a, b in zip(losses[arm.name][:count], reference, strict=False)), 6),
            **{name: round(value, 1) for name, value in arm.memory.items()}, "steps": len(times[arm.name]), **mfu(arm, 1 / middle, settings, work),
        }  # fmt: skip
    stock = [name for name in STOCK if name in times]
    best = min(stock, key=lambda name: statistics.median(times[name])) if stock else None
    ratios = {}
    for one in OURS:
        for other in [*([best] if best else []), *LLAMAFACTORY]:
            if one in times and other in times:
                ratios[f"{one} : {other}"] = ratio(times[one], times[other])
    for one, other in (("ours, warm cache", "ours without vision cache"), ("ours, warm cache", "ours without packing"),
                       ("ours, warm cache", "ours without supervised-position logits"), ("ours, warm cache", "ours without last-layer trimming"),
                       ("ours with checkpointing", "ours with checkpointing, without no_grad tower")):
        if one in times and other in times:
            ratios[f"{one} : {other}"] = ratio(times[one], times[other])
    targets = []
    for one, times_wanted, other in TARGETS:
        found = ratios.get(f"{one} : {best if other == 'best stock' else other}")
        if found:
            targets.append({"target": f"{one} {times_wanted} x {other}", "measured": found["times"], "met": found["times"] >= times_wanted})
    return {"arms": table, "best_stock": best, "losses_compared": count, "ratios": ratios, "targets": targets}


def mfu(arm: Arm, samples_per_second: float, settings: dict, work: dict[str, float]) -> dict[str, float]:
    "Share of the device's published peak, on CUDA: operations that the method needs (the tower's forward counted, where it runs)."
    if settings["device"] == "cpu":
        return {}
    import torch

    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    tower = 0.0 if arm.name == "ours, warm cache" else work["tower"]
    return {"mfu": round(samples_per_second * (tower + 2 * work["language"] + 2 * work["lm_head"]) / peak, 3)} if peak else {}


def memory_report(arms: list[Arm]) -> dict:
    "Peak memory of each arm, and ours in terms of stock's."
    key = "cuda_reserved_mb" if any("cuda_reserved_mb" in arm.memory for arm in arms) else "peak_mb"
    peaks = {arm.name: {name: round(value) for name, value in arm.memory.items()} for arm in arms}
    stock = min(peaks[name][key] for name in STOCK if name in peaks)
    share = peaks["ours, warm cache"][key] / stock
    return {"peaks": peaks, "ours_of_leanest_stock": round(share, 3), "ours_of_stock": round(peaks["ours, warm cache"][key] / peaks["stock"][key], 3),
            "target": "a third of stock", "met": peaks["ours, warm cache"][key] <= peaks["stock"][key] / 3, "met_against_leanest": share <= 1 / 3}  # fmt: skip


def machine(peer: bool) -> dict:
    import torch
    import transformers

    found = {"cores": os.cpu_count(), "cpu": cpu_name(), "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if peer:
        asked = "import torch, transformers; print(torch.__version__, transformers.__version__)"
        version, library = subprocess.run([PEER, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
        found |= {"llamafactory": "0.9.5", "llamafactory_torch": version, "llamafactory_transformers": library}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def prepared(shape: dict, settings: dict) -> tuple[Path, dict[str, float]]:
    "A temporary folder with model, samples and their description."
    folder = Path(tempfile.mkdtemp(prefix="bench-training-"))
    write_model(folder / "model", shape, settings["dtype"])
    write_suite(folder / "suite", shape, 4 + settings["steps"] * settings["batch"] * 2 // 3)  # some become validation rows
    return folder, write_samples(folder, settings)


def with_folder(shape: dict, settings: dict, names: list[str], report: Callable[[list[Arm], dict], dict], keep: bool) -> dict:
    "Measure the arms in a folder of their own, which goes afterwards."
    folder, sizes = prepared(shape, settings)
    try:
        return report(measured(names, folder, settings), sizes)
    finally:
        print(folder) if keep else shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="ratio", choices=list(SHAPES))
    parser.add_argument("--method", default="lora", choices=["lora", "qlora"], help="of our arms; the others train LoRA")
    parser.add_argument("--steps", type=int, default=20, help="measured, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=240.0, help="of taking turns, after which the steps made so far count")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), help="some of the arms")
    parser.add_argument("--no-memory", action="store_true", help="leave out the case with the full vocabulary")
    parser.add_argument("--memory-only", action="store_true", help="only that case, into a result that is there")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training.json")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        turns, settings = Turns(options.pipe), json.loads((options.folder / "settings.json").read_text())
        entry = train_ours if options.arm in OURS else train_stock if options.arm in STOCK else train_llamafactory
        return entry(options.arm, options.folder, settings, turns)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("not measured: there is no CUDA device here")
            return None
    return report_all(options)


def report_all(options: argparse.Namespace) -> None:
    "Both cases, printed and written."
    shape = SHAPES[options.shape]
    names = [name for name in options.only or ARMS if name not in LLAMAFACTORY or PEER.exists()]
    columns, rows = max(shape["sizes"], key=lambda size: size[0] * size[1])
    settings = {"steps": options.steps + options.warm_up, "warm_up": options.warm_up, "batch": options.batch, "device": options.device, "method": options.method,
                "dtype": "float32" if options.device == "cpu" else "bfloat16", "threads": options.threads, "seconds": options.seconds, "in_turns": options.device == "cpu", "max_pixels": columns * rows * 28 * 28}  # fmt: skip

    def speed(arms: list[Arm], sizes: dict) -> dict:
        work = operations(shape, sizes["patches"], sizes["tokens"])
        setup = {**settings, "method": f"{options.method} on the language model's seven projections, rank 4, frozen tower; the others: lora",
                 "model": {name: value for name, value in shape.items() if name != "sizes"}, "samples": {name: round(value, 3) for name, value in sizes.items()},
                 "forward_gflop_a_sample": {name: round(value / 1e9, 3) for name, value in work.items()},
                 "machine": machine(any(arm.name in LLAMAFACTORY for arm in arms)), "load_average": round(os.getloadavg()[0], 2)}  # fmt: skip
        return {"setup": setup, **speed_report(arms, settings, work)}

    if options.memory_only:
        result = json.loads(options.out.read_text())
    else:
        result = with_folder(shape, settings, names, speed, options.keep)
    if not options.no_memory and options.shape in ("ratio", "tiny"):
        whole = {**shape, "vocab": 151936}
        few = {**settings, "steps": 2, "warm_up": 0, "in_turns": False}
        lean = [name for name in ("ours, warm cache", "ours, cold cache", *STOCK, *LLAMAFACTORY) if name in names]
        result["full_vocabulary"] = {"batch": few["batch"], "vocabulary": 151936, **with_folder(whole, few, lean, lambda arms, _: memory_report(arms), False)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def show(result: dict) -> None:
    for name, row in result["arms"].items():
        print(f"{name:50} {row['samples_per_second']:8.2f} samples/s ({row['spread'][0]} to {row['spread'][1]})  {row['peak_mb']:7.0f} MB  losses within {row['largest_loss_difference']:.1e}")
    for name, row in result["ratios"].items():
        print(f"{row['times']:6.2f} x  ({row['quartiles'][0]} to {row['quartiles'][1]})  {name}")
    for row in result["targets"]:
        print(f"{'met   ' if row['met'] else 'MISSED'} {row['target']}: {row['measured']}")
    if whole := result.get("full_vocabulary"):
        print(f"{'met   ' if whole['met'] else 'MISSED'} full vocabulary: ours holds {whole['ours_of_stock']} of stock's peak ({whole['ours_of_leanest_stock']} of the leanest stock arm's)")
    if result["setup"]["device"] == "cpu":
        print("CUDA: not measured")


if __name__ == "__main__":
    main()
