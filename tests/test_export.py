"""What leaves the workbench loads with stock transformers and PEFT, answers the same, and says what it is; what others made comes in."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from statsmodels.stats.proportion import proportion_confint
from transformers import Qwen2VLForConditionalGeneration

from qwen2vl_sft.cli import main
from qwen2vl_sft.config import MethodConfig, ModelConfig, PreprocessingConfig, RunConfig, ScoringConfig
from qwen2vl_sft.core import ASSETS, InputError, RunFailure
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.encoding.images import load_image_processor
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.export import export_merged
from qwen2vl_sft.model.load import add_adapters, load_adapter, load_base
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring.calibration import Wanted, calibrate_run, calibration_path
from qwen2vl_sft.scoring.experiment import score_run, score_untuned
from qwen2vl_sft.scoring.labeler import Checkpoint, Labeler, decision_for
from qwen2vl_sft.tasks import load_suite
from qwen2vl_sft.training.checkpoints import save_model
from qwen2vl_sft.training.export import export_run
from qwen2vl_sft.training.trainer import train

CPU = ModelConfig(device="cpu")
IDS = torch.arange(30)[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RunDir:
    "A QLoRA run whose base model is a plain folder, with predictions by both rules."
    project = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2VL_SFT_ROOT", str(project))
        shutil.copytree(ASSETS / "small", project / "base")
        suite = write_toy_suite(project / "toy", rows=9)
        config = RunConfig(
            suite=str(suite), experiment="toy", run="mix", model={"base": str(project / "base"), "device": "cpu"}, method={"name": "qlora"},
            mixture={"name": "equal"}, schedule={"steps": 40, "micro_batch": 8, "learning_rate": 5e-3, "log_every": 10}, export={"samples": 9},
        )  # fmt: skip
        run = train(config)
        for more in ({}, {"rule": "free"}, {"split": "validation"}):
            score_run(run, prepare(load_suite(suite)), ScoringConfig(max_new_tokens=8, **more))
        calibrate_run(run, load_suite(suite).tasks, Wanted(recall=0.5))
        yield run


def stock_environment(folder: Path) -> Path:
    "A Python that sees the libraries of this one, but not this package: an empty venv with a path to the libraries."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_cards_own_code_answers_as_the_checkpoint_did_without_this_package(trained, tmp_path, kind):
    out = tmp_path / "exported"
    assert main(["export", "toy/mix/step-40", "--out", str(out), *(["--merged"] if kind == "merged" else [])]) == 0
    card = (out / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    folder, table = trained.path.parents[2] / "toy", (trained.path.parents[2] / "toy" / "test.csv").read_text().splitlines()[1:]
    asked = [(str(folder / line.split(",")[0]), "Which colour is it?") for line in table]
    script = f"import importlib.util, json\nassert importlib.util.find_spec('qwen2vl_sft') is None\n{code}\nprint(json.dumps([answer(*pair) for pair in {asked!r}]))"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "QWEN2VL_SFT_ROOT")}
    done = subprocess.run([stock_environment(tmp_path / "venv"), "-c", script], cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 9 and len(set(said)) > 1
    assert sorted(said) == sorted(trained.predictions("step-40", "colour", "free")["text"])
    assert all(name in card for name in ("| colour | test | closed | 9 |", "| colour | test | free | 9 |", "Mixture `equal`", json.loads((out / "preprocessing.json").read_text())["hash"]))
    if kind == "adapter":
        keys = load_file(out / "adapter_model.safetensors")
        assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
        model, notes = Qwen2VLForConditionalGeneration.from_pretrained(trained.path.parents[2] / "base", output_loading_info=True)
        assert not notes["missing_keys"]
        assert any(weight.abs().sum() > 0 for name, weight in PeftModel.from_pretrained(model, out).named_parameters() if "lora_B" in name)
    else:
        _, notes = Qwen2VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
        assert not notes["missing_keys"] and not notes["unexpected_keys"]
        report = json.loads((out / "export.json").read_text())
        assert report["trained_on"] == "NF4 weights" and report["samples"] == 18 and "bfloat16" in report["made"] and report["agreement"] >= 0.98
        assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


@pytest.fixture
def changed(trained) -> Callable[..., None]:
    "Other settings in the run's `config.yaml`, for one test."
    text = trained.config_path.read_text()
    content = yaml.safe_load(text)
    yield lambda section=None, **settings: (content[section] if section else content).update(settings) or trained.config_path.write_text(yaml.safe_dump(content))
    trained.config_path.write_text(text)


def test_a_merge_that_moves_more_than_the_recipe_allows_is_refused(trained, changed, tmp_path):
    changed("export", most_shift=0.0)
    with pytest.raises(RunFailure, match=r"label probabilities move by .* above the 0.0 allowed"):
        export_run(trained, 40, True, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["export", "toy/mix/step-4"]) == 2


def test_an_8_bit_run_is_called_so(trained, changed, tmp_path):
    changed("method", quantisation="int8")
    changed("export", samples=1, least_agreement=0.0, most_shift=1.0)
    merged = export_run(trained, 40, True, tmp_path / "merged")
    assert json.loads((merged / "export.json").read_text())["trained_on"] == "8-bit weights (LLM.int8())"
    card = (export_run(trained, 40, False, tmp_path / "adapter") / "README.md").read_text()
    assert "BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules" in card and "nf4" not in card


def test_the_held_out_fold_is_the_runs(trained, changed, tmp_path):
    changed(fold=1)
    with pytest.raises(InputError, match="fold"):  # the data have none
        export_run(trained, 40, False, tmp_path / "out")


def test_calibration_goes_along_and_the_labeler_finds_it(trained, tmp_path):
    out = export_run(trained, 40, False, tmp_path / "out")
    stored = json.loads(calibration_path(trained, "step-40", "colour").read_text())
    assert json.loads((out / "calibration" / "colour.json").read_text()) == stored and not (out / "calibration" / "word.json").exists()
    task = load_suite(trained.path.parents[2] / "toy" / "toy.yaml").task("colour")
    decision = decision_for(Checkpoint(out), task, weights=stored["weights"])
    assert (decision.temperature, decision.threshold) == (stored["temperature"], stored["operating_point"]["threshold"])
    assert f"| colour | {decision.temperature:.3f} | recall 0.5 | {decision.threshold:.3f} |" in (out / "README.md").read_text()


def test_the_gate_judges_what_a_reader_will_load(trained, tmp_path):
    "Rotary frequencies are in no file and stay float32 there; in a model that was moved to bfloat16 as a whole they would be rounded."
    out, judged = tmp_path / "out", []

    def probabilities(model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            judged.append(model(input_ids=torch.arange(200)[None]).logits)
        return np.ones((1, 1))

    export_merged(CPU, MethodConfig(name="qlora"), trained.checkpoints()[40], out, probabilities)
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(out, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(judged[-1], loaded(input_ids=torch.arange(200)[None]).logits)


def test_scores_of_another_question_are_left_out_of_the_card(trained, tmp_path, capsys):
    suite = trained.path.parents[2] / "toy" / "toy.yaml"
    text = suite.read_text()
    try:
        suite.write_text(text.replace("Which colour is it?", "Which colour do you see?"))
        card = (export_run(trained, 40, out=tmp_path / "other") / "README.md").read_text()
    finally:
        suite.write_text(text)
    assert "| colour | Which colour do you see? |" in card and "| colour | test" not in card and "| word | test | free | 9 |" in card
    assert "task 'colour' on test was scored with another question or other labels; `qwen2vl-sft score toy --split test` first" in capsys.readouterr().out
    card = (export_run(trained, 40, out=tmp_path / "same") / "README.md").read_text()
    rows = trained.predictions("step-40", "colour", "closed")
    low, high = proportion_confint((rows["outcome"] == "correct").sum(), 9, method="wilson")
    assert f"| colour | test | closed | 9 | {(rows['outcome'] == 'correct').mean():.1%} ({low:.1%} to {high:.1%}) |" in card


def test_an_export_replaces_an_earlier_one_and_nothing_else(trained, tmp_path, monkeypatch, capsys):
    place = tmp_path / "models"
    (place / "older").mkdir(parents=True)
    (place / "older" / "weights").write_text("months of work")
    monkeypatch.chdir(place)
    for given in (str(place), "."):
        assert main(["export", "toy/mix/step-40", "--out", given]) == 2
        said = capsys.readouterr().err
        assert str(place) in said and "other files" in said and len(said.strip().splitlines()) == 1
    assert (place / "older" / "weights").read_text() == "months of work"
    (place / "export.json").write_text("[]")  # another program's
    with pytest.raises(InputError, match="other files"):
        export_run(trained, 40, False, place)
    with pytest.raises(InputError, match="is a file"):
        export_run(trained, 40, False, place / "export.json")
    out = export_run(trained, 40, False, place / "new")
    (out / "README.md").unlink()
    assert export_run(trained, 40, False, Path("new")) == out and (out / "README.md").exists()
    assert sorted(path.name for path in place.iterdir()) == ["export.json", "new", "older"]


def test_what_exported_weights_gave_belongs_to_their_bytes_and_not_to_their_place(trained, tmp_path, capsys):
    "Predictions and labels of a merged checkpoint: the same under another path, made again after one bit has changed. The longest answer is that of the command."
    toy = trained.path.parents[2] / "toy"
    prepared, settings = prepare(load_suite(toy / "toy.yaml")), ScoringConfig(max_new_tokens=4)
    export_run(trained, 40, True, tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")

    def scored(name: str, place: str) -> dict[str, int]:
        run = RunDir(tmp_path / "runs" / "toy" / name)
        score_untuned(run, prepared, ModelConfig(base=str(tmp_path / place), device="cpu"), PreprocessingConfig(), settings)
        assert all(len(run.predictions(name, task)) == 9 for task in ("colour", "word"))
        return {str(path): path.stat().st_mtime_ns for path in run.path.glob("predictions/*/*/part-*")}

    def labelled(place: str, task: str) -> tuple[int, int, list[str]]:
        done = main(["label", str(tmp_path / place), str(toy / "test.csv"), "--suite", str(toy / "toy.yaml"), "--task", task, "--max-new-tokens", "1", "--replace", "--out", str(tmp_path / "labels.csv")])
        parts = list((tmp_path / "labels.csv.parts").glob("part-*.parquet"))
        return done, len(parts), pd.read_csv(tmp_path / "labels.csv")["reason"].unique().tolist() if parts else []

    runs = {name: scored(name, name) for name in ("first", "second")}
    decided = [RunDir(tmp_path / "runs" / "toy" / name).decided(name, task, rule) for task, rule in (("colour", "closed"), ("word", "free")) for name in runs]
    assert decided[0] == decided[1] != decided[2] == decided[3]
    assert labelled("first", "word") == labelled("second", "word") == (0, 1, ["cut at 1 tokens"])
    file = tmp_path / "second" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # the last digit of the last weight
    file.write_bytes(content)
    capsys.readouterr()
    again = {name: scored(name, name) for name in runs}
    assert again["first"] == runs["first"] and again["second"].keys() == runs["second"].keys() and not again["second"].items() & runs["second"].items()
    assert "second: other weights than its predictions were made with; made again: colour (closed), word (free)" in capsys.readouterr().out
    assert labelled("first", "word")[:2] == (0, 1) and labelled("second", "word")[:2] == (0, 2)
    assert labelled("second", "colour")[0] == 2 and "made for other weights" in capsys.readouterr().err  # its calibration
    with pytest.raises(InputError, match="the run exists with model"):
        scored("first", "second")


def test_a_full_run_leaves_as_whole_weights_that_stock_transformers_loads(trained, tmp_path):
    project = trained.path.parents[2]
    run = train(RunConfig(
        suite=str(project / "toy" / "toy.yaml"), experiment="toy", run="whole", model={"base": str(project / "base"), "device": "cpu"}, method={"name": "full"},
        schedule={"steps": 1, "micro_batch": 4, "learning_rate": 1e-3, "warmup_ratio": 0.0, "tensorboard": False}, export={"samples": 2, "least_agreement": 0.0, "most_shift": 1.0},
    ))  # fmt: skip
    out = export_run(run, 1, False, tmp_path / "out")
    model, notes = Qwen2VLForConditionalGeneration.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"] and model.dtype is torch.bfloat16
    there, base = (Qwen2VLForConditionalGeneration.from_pretrained(place, dtype=torch.float32).state_dict() for place in (run.checkpoints()[1], project / "base"))
    found = model.state_dict()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in there.items())
    assert sum(not torch.equal(found[name], value.bfloat16()) for name, value in base.items()) > 10
    assert "Whole weights, from" in (out / "README.md").read_text()


# --- what others wrote ---------------------------------------------------------------------------
def original_files(folder: Path, tied: bool) -> dict[str, torch.Tensor]:
    "A checkpoint with the names of the original Qwen2-VL releases: `visual.*`, `model.*`, and `lm_head.weight` where it is untied."
    shutil.copytree(ASSETS / "small", folder)
    settings = json.loads((folder / "config.json").read_text())
    for part in (settings, settings.get("text_config", {})):
        part["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(settings))
    state = Qwen2VLForConditionalGeneration.from_pretrained(ASSETS / "small").state_dict()
    written = {}
    for name, value in state.items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        written[name] = value.clone()
    written["lm_head.weight"] = torch.randn_like(written["lm_head.weight"])
    if tied:
        del written["lm_head.weight"]
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    return written


@pytest.mark.parametrize("tied", [True, False], ids=["tied as 2B", "untied as 7B"])
def test_original_names_come_in_and_go_out(tmp_path, tied):
    written = original_files(tmp_path / "original", tied)
    assert {name.split(".")[0] for name in written} == ({"visual", "model"} if tied else {"visual", "model", "lm_head"})
    location = str(tmp_path / "original")
    model = load_base(ModelConfig(base=location, device="cpu"), MethodConfig(name="full"))
    assert torch.equal(model.model.visual.blocks[0].attn.qkv.weight, written["visual.blocks.0.attn.qkv.weight"])
    assert torch.equal(model.model.language_model.layers[0].mlp.up_proj.weight, written["model.layers.0.mlp.up_proj.weight"])
    head = written["model.embed_tokens.weight"] if tied else written["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head)
    save_model(tmp_path, model, load_encoder(location), load_image_processor(location))
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == written.keys() and all(torch.equal(again[name], written[name]) for name in written)


@pytest.mark.parametrize("older", [True, False], ids=["layers", "language_model.layers"])
def test_an_adapter_of_llama_factory_lands_and_acts(tmp_path, older):
    torch.manual_seed(0)
    tuned = add_adapters(load_base(CPU), MethodConfig(name="lora", rank=4))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    tuned.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["target_modules"] = "^(?!.*(?:visual)).*(?:down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj).*"  # as it writes with a frozen tower
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    if older:
        stored = load_file(tmp_path / "adapter_model.safetensors")
        renamed = {name.replace("model.model.language_model.layers.", "model.model.layers."): value for name, value in stored.items()}
        assert renamed.keys() != stored.keys()
        save_file(renamed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    loaded = load_adapter(load_base(CPU), tmp_path, "theirs")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, tuned(input_ids=IDS).logits)
        assert not torch.equal(loaded(input_ids=IDS).logits, load_base(CPU)(input_ids=IDS).logits)


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_exported_folder_labels_as_the_checkpoint_in_its_run_does(trained, tmp_path, merge):
    "It knows its base model, its tasks and its calibration; the suite file isn't asked for."
    out = export_run(trained, 40, merge, tmp_path / "out")
    rows = prepare(load_suite(trained.path.parents[2] / "toy" / "toy.yaml")).split("colour", "test")
    pictures = [rows.image(i) for i in range(4)]
    exported, original = (Labeler.load(folder, device="cpu") for folder in (out, trained.path / "checkpoints" / "step-40"))
    assert [task.fingerprint for task in exported.tasks] == [task.fingerprint for task in original.tasks]
    assert exported.decisions == original.decisions and exported.max_new_tokens == original.max_new_tokens
    assert not any(task.sources for task in exported.tasks)  # places of the training data stay at home
    ours, theirs = (one.label(pictures) for one in (exported, original))
    if not merge:
        assert ours.label.tolist() == theirs.label.tolist() and ours.probability.tolist() == pytest.approx(theirs.probability.tolist(), nan_ok=True, abs=1e-5)
    (out / "suite.yaml").unlink()
    with pytest.raises(InputError, match="--suite"):
        Labeler.load(out, device="cpu")
    if not merge:
        (out / "export.json").write_text(json.dumps({"kind": "adapter", "made": "before"}))
        with pytest.raises(InputError, match="export the checkpoint again"):
            Labeler.load(out, suite=trained.path.parents[2] / "toy" / "toy.yaml", device="cpu")
