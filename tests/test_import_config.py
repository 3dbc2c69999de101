"""LLaMA-Factory's training files become recipes; nothing is dropped silently, and hostile files get one line."""

import json
import re
import shutil

import pytest
import yaml
from PIL import Image
from transformers import TrainingArguments

from qwen2vl_sft.cli import main
from qwen2vl_sft.config import validated
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.mixture import expected_shares
from qwen2vl_sft.data.prepare import Prepared
from qwen2vl_sft.import_config import READ_APART, RENAMED, WITHOUT_EFFECT, import_config, import_text

BASE = {"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "stage": "sft", "dataset": "pets", "template": "qwen2_vl"}


def read(tmp_path, rows=None, **theirs):
    file = tmp_path / "their.yaml"
    file.write_text(yaml.safe_dump({**BASE, **theirs}))
    return import_config(file, rows=rows)


def test_their_defaults_are_written_out(tmp_path):
    "LLaMA-Factory 0.9.5's own defaults (hparams), not ours."
    config, _ = read(tmp_path)
    assert (config.method.name, config.method.rank, config.method.alpha) == ("lora", 8, 16)
    assert (config.schedule.learning_rate, config.schedule.scheduler, config.schedule.warmup_ratio) == (5e-5, "linear", 0.0)
    assert (config.schedule.micro_batch, config.schedule.accumulation, config.schedule.max_tokens, config.schedule.seed) == (8, 1, 2048, 42)
    assert (config.preprocessing.max_pixels, config.preprocessing.min_pixels) == (768 * 768, 32 * 32)


@pytest.mark.parametrize(("theirs", "ours"), [
    ({"finetuning_type": "full", "freeze_vision_tower": False, "freeze_multi_modal_projector": False}, {"name": "full", "freeze_tower": False, "freeze_merger": False}),
    ({"quantization_bit": 4}, {"name": "qlora", "quantisation": "nf4", "double_quantisation": True}),
    ({"quantization_bit": 8}, {"name": "qlora", "quantisation": "int8"}),
    ({"lora_target": "q_proj,v_proj", "lora_alpha": 5, "use_rslora": True}, {"targets": ["q_proj", "v_proj"], "alpha": 5, "rslora": True}),
    ({"freeze_vision_tower": False}, {"tower_targets": ["qkv", "proj", "fc1", "fc2"]})])  # fmt: skip
def test_methods(tmp_path, theirs, ours):
    method = read(tmp_path, **theirs)[0].method
    assert {name: getattr(method, name) for name in ours} == ours


def test_epochs_become_steps_when_the_rows_are_known(tmp_path):
    config, found = read(tmp_path, rows=1001, per_device_train_batch_size=2, gradient_accumulation_steps=8, num_train_epochs=2, save_steps=50, warmup_steps=63)
    assert config.schedule.steps == 2 * 63 and config.schedule.warmup_ratio == 0.5 and config.schedule.save_at == [50, 100]
    _, found = read(tmp_path, num_train_epochs=2)
    assert any("num_train_epochs" in note for note in found.not_mapped)


def test_shares_of_the_steps_are_read_as_transformers_reads_them(tmp_path):
    stock = TrainingArguments(output_dir=str(tmp_path), max_steps=200, warmup_steps=0.15, use_cpu=True)
    theirs = {"max_steps": 200, "warmup_steps": 0.15, "save_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.1, "logging_steps": 0.05}
    schedule = read(tmp_path, **theirs)[0].schedule
    assert round(schedule.warmup_ratio * schedule.steps) == stock.get_warmup_steps(200) == 30
    assert (schedule.save_at, schedule.validate_every, schedule.log_every) == ([50, 100, 150], 20, 10)
    config, found = read(tmp_path, **{**theirs, "max_steps": -1})
    assert config.schedule.warmup_ratio == 0.15, "a share needs no number of steps"
    assert all(any(note.startswith(f"{name} {theirs[name]}: needs the number of steps") for note in found.not_mapped) for name in ("save_steps", "eval_steps", "logging_steps"))


def test_every_key_leaves_a_trace(tmp_path):
    config, found = read(tmp_path, use_galore=True, loraplus_lr_ratio=16, cutof_len=3, pure_bf16=True, neat_packing=True, template="llama3", optim="galore_adamw")
    lost = " ".join(found.not_mapped)
    assert all(name in lost for name in ("use_galore", "loraplus_lr_ratio", "cutof_len", "template", "galore_adamw"))
    assert any("newline" in note for note in found.differs) and any("cutoff_len" in note for note in found.differs)
    assert config.schedule.packing and config.model.dtype == "bfloat16"
    for name in ("template", "dataset_dir", "media_dir", "gradient_checkpointing", "lora_target", "eval_steps", "optim", "do_train", "quantization_method"):
        _, found = read(tmp_path, **{"finetuning_type": "full", name: {"template": "qwen2_vl", "quantization_method": "bnb", "eval_steps": 50, "lora_target": "all"}.get(name, "x")})
        assert any(re.search(rf"\b{name}\b", note) for note in found.notes), name
    assert not set(RENAMED) & set(WITHOUT_EFFECT) and not set(READ_APART) & set(RENAMED)


def test_the_printed_text_is_a_recipe(tmp_path, capsys):
    file = tmp_path / "their.yaml"
    file.write_text(yaml.safe_dump({**BASE, "max_steps": 30, "output_dir": "saves/qwen2 vl: #1"}))
    assert main(["import-config", str(file), "--suite", "suites/demo.yaml"]) == 0
    printed = capsys.readouterr()
    config = validated(yaml.safe_load(printed.out), "printed")
    assert (config.schedule.steps, config.suite, config.run) == (30, "suites/demo.yaml", "qwen2-vl---1")
    assert "# will differ" in printed.out and "not" in printed.err


@pytest.mark.parametrize(("text", "message"), [
    ("- a list", "is a mapping"), ("a: [", "not a YAML file"), ("!!python/object/apply:os.system ['true']", "not a YAML file"), ("stage: dpo\nmodel_name_or_path: x", "stage 'dpo'"),
    ("lora_rank: 8", "model_name_or_path is missing"), ("model_name_or_path: x\nlora_rank: [8]", "wrong type|rank"), ("model_name_or_path: x\nlearning_rate: fast", "learning_rate"),
    ("model_name_or_path: x\nfinetuning_type: oft", "oft"), ("model_name_or_path: x\nsave_steps: {}\nmax_steps: 5", "wrong type"), ("model_name_or_path: x\nquantization_bit: 3", "quantization_bit 3"),
    ("x: " + "[" * 3000, "not a YAML file"), ("model_name_or_path: x\ndataset: \"a\\nb # c\"", "")])  # fmt: skip
def test_hostile_files_get_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "their.yaml"
    file.write_text(text)
    if not message:  # fine, but what it says must stay inside comments and values
        yaml.safe_load(import_text(import_config(file)[1]))
        return
    with pytest.raises(InputError, match=message) as caught:
        import_config(file)
    assert str(file) in str(caught.value)
    assert main(["import-config", str(file)]) == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_tower_that_trains_is_not_called_frozen(tmp_path):
    for theirs, frozen in (({}, True), ({"freeze_vision_tower": False}, False), ({"finetuning_type": "full", "freeze_multi_modal_projector": False}, False)):
        config, found = read(tmp_path, **theirs)
        assert config.method.tower_is_frozen == frozen == any("frozen" in note for note in found.differs)


def test_without_rows_the_number_of_steps_is_said(tmp_path):
    config, found = read(tmp_path)
    assert any(f"the default, {config.schedule.steps}" in note for note in found.not_mapped)


@pytest.fixture
def theirs(project, tmp_path_factory):
    "A folder as LLaMA-Factory's `data`, of two data sets, one with two questions; and a training file that names them."
    folder = tmp_path_factory.mktemp("theirs") / "data"
    folder.mkdir()
    asked = {"shapes_train": [("Is it red?", ("yes", "no")), ("Is it large?", ("yes", "no"))], "phones": [("Which phone?", ("old", "new"))]}
    info = {}
    for number, (name, questions) in enumerate(asked.items()):
        rows = []
        for i in range(40):
            file = folder / f"{name}-{i}.png"
            Image.effect_noise((32, 32), 50 + i).save(file)
            question, labels = questions[i % 4 == 1 and len(questions) > 1]
            rows.append({"conversations": [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": labels[i // 2 % 2]}], "images": [file.name]})
        (folder / f"file-{number}.json").write_text(json.dumps(rows))
        info[name] = {"file_name": f"file-{number}.json", "formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    file = folder.parent / "their.yaml"
    file.write_text(yaml.safe_dump({**BASE, "dataset": "shapes_train,phones", "dataset_dir": str(folder), "mix_strategy": "interleave_under", "interleave_probs": "0.7,0.3", "num_train_epochs": 2, "save_steps": 10}))
    return file


def test_weights_name_the_tasks_of_the_suite_that_prepare_wrote(theirs, project, capsys):
    "import-config and prepare --from meet: the suite's file, its training rows and its tasks' weights are in the recipe."
    data = theirs.parent / "data"
    config, found = import_config(theirs)
    assert config.mixture.weights == {} and config.mixture.name == "concatenate"
    assert any("TASK_OF_shapes_train: 0.7" in note for note in found.not_mapped) and any("prepare --from" in note for note in found.differs)
    assert main(["prepare", "--from", str(data), "--workers", "0"]) == 0
    for suite in (None, str(data / "suite.yaml")):
        config, found = import_config(theirs, suite)
        prepared = Prepared(project / "prepared" / "data")
        sizes = prepared.counts()["train"].to_dict()
        shares = expected_shares(sizes, config.mixture)
        (phones,) = [task.name for task in prepared.suite.tasks if any(source["dataset"] == "phones" for source in task.sources.values())]
        assert shares[phones] == pytest.approx(0.3) and shares["is_it_red"] == pytest.approx(0.7 * sizes["is_it_red"] / (sum(sizes.values()) - sizes[phones]), abs=1e-5)
        assert config.suite_path == data / "suite.yaml"
        assert config.schedule.steps == 2 * -(-sum(sizes.values()) // 8), "epochs of the rows that train here"
    shutil.rmtree(project / "prepared")
    config, found = import_config(theirs, str(data / "suite.yaml"))
    assert config.mixture.weights == {} and any("interleave_probs" in note for note in found.not_mapped), "two tasks share one data set in unknown parts"
    capsys.readouterr()
    assert main(["import-config", str(theirs), "--suite", str(data / "nosuch.yaml")]) == 0
    assert "nosuch.yaml" in capsys.readouterr().err
