"""Validation looks and touches nothing, chooses the best checkpoint, stops a run; a user who stops it loses nothing."""

import errno
import io
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from qwen2vl_sft.config import ModelConfig, RunConfig, load_recipe
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.prepare import Prepared, prepare
from qwen2vl_sft.data.toy import WORDS, write_toy_suite
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.load import base_location, load_base
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring import suite
from qwen2vl_sft.scoring.suite import Scorer
from qwen2vl_sft.tasks import Suite, Task
from qwen2vl_sft.training import progress, trainer, validation
from qwen2vl_sft.training.order import TrainingOrder
from qwen2vl_sft.training.trainer import prepared_suite, train


def config(project, name: str, method: dict | None = None, **schedule) -> RunConfig:
    if not (project / "toy").exists():
        write_toy_suite(project / "toy", rows=12)
    schedule = {"steps": 6, "micro_batch": 6, "learning_rate": 3e-3, "log_every": 1, "tensorboard": False, **schedule}
    return RunConfig(suite=str(project / "toy" / "toy.yaml"), run=name, model={"device": "cpu"}, method=method or {"name": "lora", "dropout": 0.3}, schedule=schedule)


def weights(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    folder = run.checkpoints()[step]
    return load_file(next(path for name in ("adapter_model", "model") if (path := folder / f"{name}.safetensors").exists()))


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("packing", [False, True])
def test_validation_changes_no_bit_of_the_training(project, packing):
    "Dropout is on, so a random number drawn too many would show; free answers and packed attention change the model's state."
    plain = train(config(project, "plain", packing=packing))
    seen = train(config(project, "seen", packing=packing, validate_every=2, keep_best="task"))
    assert same(weights(plain, 6), weights(seen, 6))
    table = seen.metrics()
    assert table["loss"].tolist() == plain.metrics()["loss"].tolist()
    assert seen.validations()["step"].tolist() == [2, 4, 6] and table["validation/word/accuracy"].notna().sum() == 3
    assert {"loss/colour", "loss/word", "samples_per_second", "tokens_per_second", "memory_gb"} <= set(table)


def stock_token_losses(model, picture: Image.Image, question: str, label: str) -> list[float]:
    "Minus log P of each token of `label <|im_end|>`, by one stock forward pass."
    images, tokenizer = (kind.from_pretrained(base_location("small"), **more) for kind, more in ((AutoImageProcessor, {"backend": "pil"}), (AutoTokenizer, {})))
    inputs = images(images=picture, return_tensors="pt")
    tokens = int(inputs["image_grid_thw"].prod()) // images.merge_size**2
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * tokens)
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + label + "<|im_end|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), **inputs).logits[0].log_softmax(-1)
    return [-float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])]


def stock_answer(model, picture: Image.Image, question: str, labels: list[str]) -> str:
    "The label with the highest log P(label <|im_end|> | picture, question), by one stock forward pass a label."
    return min(labels, key=lambda label: sum(stock_token_losses(model, picture, question, label)))


def test_validation_finds_what_stock_forwards_find(project):
    run = train(config(project, "checked", {"name": "lora"}, validate_every=6, validation_samples=8, vision_cache=False))
    model = PeftModel.from_pretrained(Qwen2VLForConditionalGeneration.from_pretrained(base_location("small"), dtype=torch.float32), run.checkpoints()[6]).eval()
    rows = Prepared(project / "prepared" / "toy").split("colour", "validation")
    settings = config(project, "checked", validate_every=6, validation_samples=8)
    looked_at = next(data for data in validation.validation_sets(Prepared(project / "prepared" / "toy"), settings) if data.task.name == "colour")
    chosen = looked_at.chosen
    assert looked_at.column("sha256") == [rows[i]["sha256"] for i in chosen]
    answers = [stock_answer(model, Image.open(io.BytesIO(rows[i]["image"])), "Which colour is it?", ["red", "green", "blue"]) for i in chosen]
    targets = [rows[i]["label"] for i in chosen]
    found = run.validations().iloc[-1]
    assert len(chosen) == 8 and found["accuracy/colour"] == pytest.approx(accuracy_score(targets, answers))
    assert found["macro_f1/colour"] == pytest.approx(f1_score(targets, answers, labels=sorted(set(targets)), average="macro", zero_division=0))
    assert found["mean"] == pytest.approx((found["accuracy/colour"] + found["accuracy/word"]) / 2)


def test_the_loss_of_each_task_is_the_stock_loss_of_its_samples(project):
    "Step 1 of a run that warms up from learning rate 0 sees the base model."
    settings = config(project, "losses", {"name": "lora"}, steps=2, warmup_ratio=0.5, micro_batch=8)
    logged = train(settings).metrics().iloc[0]
    data = Prepared(project / "prepared" / "toy")
    order = TrainingOrder(data, load_encoder(base_location("small"), settings.preprocessing), settings).order[:8]
    model = Qwen2VLForConditionalGeneration.from_pretrained(base_location("small"), dtype=torch.float32).eval()
    losses: dict[str, list[float]] = {"colour": [], "word": []}
    questions = {task.name: task.question for task in data.suite.tasks}
    for task, row in order:
        one = data.split(task, "train")[row]
        losses[task] += stock_token_losses(model, Image.open(io.BytesIO(one["image"])), questions[task], one["label"])
    assert losses["colour"] and losses["word"]
    for task, values in losses.items():
        assert logged[f"loss/{task}"] == pytest.approx(sum(values) / len(values), abs=1e-4)


@pytest.fixture
def about_the_same(project):
    "What validates four tasks: one that all its pictures are asked about, one about some of them, an open one about others too, and one about those and more."
    folder = write_toy_suite(project / "toy", rows=12).parent
    rows, words = ([line.split(",") for line in (folder / f"{name}.csv").read_text().splitlines()[1:]] for name in ("validation", "word-validation"))
    (folder / "red.csv").write_text("image,label\n" + "".join(f"{image},{'yes' if label == 'red' else 'no'}\n" for image, label in rows[2:11]))
    (folder / "say.csv").write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in [*rows[4:], *words[:3]]))
    task = lambda name, question, table, **more: Task(name=name, question=question, sources={"validation": {"format": "csv", "path": table}}, **more)
    tasks = [
        task("colour", "Which colour is it?", "validation.csv", labels=["red", "green", "blue"]), task("red", "Is it red?", "red.csv", labels=["yes", "no"]),
        task("say", "Which colour?", "say.csv", answer="text"), task("word", "Which word?", "word-validation.csv", labels=list(WORDS.values())),
    ]  # fmt: skip
    ready = prepare(Suite(name="same", tasks=tasks, folder=folder), project / "prepared" / "same")
    settings = RunConfig(suite="x.yaml", schedule={"validate_every": 1}, scoring={"batch": 4, "max_new_tokens": 3})
    encoder = load_encoder(base_location("small"), settings.preprocessing)
    return lambda sets=None: validation.Validation(sets or validation.validation_sets(ready, settings), Scorer(encoder, settings.scoring))


def test_tasks_about_the_same_pictures_are_validated_together_as_they_are_alone(about_the_same, monkeypatch):
    model, whole, read = load_base(ModelConfig(device="cpu")).train(), about_the_same(), []
    apart = [about_the_same([data]) for data in whole.sets]
    expected = {name: value for one in apart for name, value in validation.validate(one, model).items()}
    tables = {one.sets[0].task.name: validation.predicted_sets(one, model, lambda: False) for one in apart}
    real = suite.prefill
    monkeypatch.setattr(suite, "prefill", lambda model, encoder, samples: read.append(len(samples)) or real(model, encoder, samples))
    found = validation.validate(whole, model)
    assert sum(read) == 12 + 3 + 12, "a picture that colour, red and say ask about is read once; three pictures of word's are not worth a pass of say's"
    assert {**found, "validation/mean": 0} == {**expected, "validation/mean": 0}
    assert found["validation/mean"] == pytest.approx(sum(found[f"validation/{data.task.name}/accuracy"] for data in whole.sets) / 4)
    with torch.no_grad():
        for name, table in validation.predicted_sets(whole, model, lambda: False).items():
            ours, theirs = (one.set_index("id").sort_index() for one in (table, tables[name][name]))
            assert ours.index.is_unique and ours[["target", "prediction", "outcome", "text"]].equals(theirs[["target", "prediction", "outcome", "text"]])
            for one, other in zip(ours["probabilities"].dropna(), theirs["probabilities"].dropna(), strict=True):
                assert json.loads(one) == pytest.approx(json.loads(other), abs=1e-4)
    assert [validation.validate(whole, model, stop=iter(asked).__next__) for asked in ([False, True], [False, False, False, True])] == [None, None]
    plan = validation.largest_reading(whole)
    assert plan.branches and plan.nodes > max(map(len, whole.trees.values())) and not any(validation.largest_reading(one).branches for one in apart)


def test_processes_share_the_pictures_of_a_validation(about_the_same, monkeypatch):
    "Each row is scored by one of them, with those that ride on it."
    model, whole, scored = load_base(ModelConfig(device="cpu")), about_the_same(), []
    monkeypatch.setattr(validation, "process_count", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(validation, "process_rank", lambda rank=rank: rank)
        with torch.no_grad():
            scored.append(validation.predicted_sets(whole, model, lambda: False))
    for data in whole.sets:
        ids = [table[data.task.name]["id"].tolist() for table in scored]
        assert all(ids) and sorted(ids[0] + ids[1]) == sorted(data.column("id"))


# --- the best checkpoint, and stopping early -------------------------------------------------------


def planted(monkeypatch, means: dict[int, float | tuple[float, float] | None]) -> None:
    "Let the validations, one after the other, find these accuracies of the task `colour`, or of `colour` and `word`; None: SIGTERM comes meanwhile."
    left = sorted(means)

    def found(*arguments):
        mean = means[left.pop(0)]
        if mean is None:
            return signal.raise_signal(signal.SIGTERM)
        if isinstance(mean, tuple):
            return {**{f"validation/{task}/{name}": value for task, value in zip(("colour", "word"), mean, strict=True) for name in ("accuracy", "macro_f1")}, "validation/mean": sum(mean) / 2}
        return {"validation/colour/accuracy": mean, "validation/colour/macro_f1": mean, "validation/colour/collapsed": "red" if mean < 0.4 else "", "validation/mean": mean}

    monkeypatch.setattr(progress, "validate", found)


def test_the_best_checkpoint_is_kept_by_validation(project, monkeypatch, capsys):
    planted(monkeypatch, {1: 0.3, 2: 0.6, 3: 0.8, 4: 0.7, 5: 0.5, 6: 0.4})
    run = train(config(project, "best", validate_every=1, save_at=[5]))
    assert list(run.checkpoints()) == [3, 5, 6], "named ones and the best; those that were the best once are gone"
    assert run.best()["overall"] == {"step": 3, "mean_accuracy": 0.8} and run.best()["stopped"] is None
    assert "step 1: colour has collapsed: nearly every answer is 'red'" in capsys.readouterr().out
    assert run.validations()["collapsed/colour"].tolist() == ["red", "", "", "", "", ""]


def test_each_tasks_best_is_kept_and_an_old_best_stays_until_the_new_one_is_saved(project, monkeypatch):
    "Colour is best at step 1; word, and the mean, at 2 and then at 4, after the named step 3. The disk is full when 4 is saved."
    settings = config(project, "tasks", steps=5, validate_every=1, save_at=[3])
    figures = {1: (0.9, 0.1), 2: (0.5, 0.6), 3: (0.3, 0.3), 4: (0.2, 0.95), 5: (0.1, 0.1)}
    real = trainer.save_checkpoint

    def full(run, step, *rest):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(run, step, *rest)

    with monkeypatch.context() as patch:
        planted(patch, figures)
        patch.setattr(trainer, "save_checkpoint", full)
        with pytest.raises(RunFailure, match="No space left.*make room"):
            train(settings)
    run = RunDir(project / "runs" / "default" / "tasks")
    assert list(run.checkpoints()) == [1, 2, 3] and run.best()["overall"] == {"step": 2, "mean_accuracy": 0.55}
    planted(monkeypatch, {step: figures[step] for step in (4, 5)})
    train(settings)
    assert list(run.checkpoints()) == [1, 3, 4, 5] and run.best()["overall"]["step"] == 4
    assert {task: (best["step"], best["accuracy"]) for task, best in run.best()["tasks"].items()} == {"colour": (1, 0.9), "word": (4, 0.95)}


def test_a_validation_that_is_too_large_goes_on_in_halves(project, score_batch_fitting, capsys):
    settings = config(project, "tight", validate_every=6)
    prepared = prepared_suite(settings.suite_path)
    model, encoder = load_base(settings.model), load_encoder(base_location("small"), settings.preprocessing)
    seen = validation.validation_of(prepared, settings, encoder)
    seen.read_at_once(8)
    expected = validation.validate(seen, model)
    sizes, most = score_batch_fitting(validation, 2)
    assert validation.validate(seen, model) == expected
    assert sizes[:3] == [8, 4, 2] and max(sizes[-4:]) <= 2 and seen.scorer.settings.batch == 2
    assert "validation: out of memory; 4 samples at a time instead of 8" in capsys.readouterr().out
    most[0] = 0
    with pytest.raises(RunFailure, match=r"validation of colour, row \S+: out of memory with one sample; lower preprocessing.max_pixels"):
        validation.validate(seen, model)


def test_a_run_stops_early_and_stays_stopped(project, monkeypatch, capsys):
    planted(monkeypatch, {2: 0.6, 4: 0.8, 6: 0.8, 8: 0.7})
    settings = config(project, "early", steps=20, validate_every=2, early_stopping_patience=2)
    run = train(settings)
    reason = "stopped early at step 8: the best validation mean, 80.0% at step 4, is 2 validations ago"
    assert (run.status().state, run.status().message, run.best()["stopped"]["reason"]) == ("finished", reason, reason)
    assert list(run.checkpoints()) == [4, 8] and run.best()["overall"]["step"] == 4
    (run.path / "best.json").unlink()
    before = run.metrics_path.read_bytes()
    train(settings)
    assert "already trained" in capsys.readouterr().out and run.metrics_path.read_bytes() == before


def test_early_stopping_needs_validation(project):
    with pytest.raises(ValueError, match="set validate_every"):
        config(project, "never", early_stopping_patience=2)


# --- a user who stops it --------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_bits(project):
    "A real process, SIGINT in the middle of a step; then the same command again."
    schedule = {"steps": 14, "validate_every": 5, "micro_batch": 12}
    whole = train(config(project, "whole", **schedule))
    (project / "recipe.yaml").write_text(config(project, "stopped", **schedule).to_yaml())
    run = RunDir(project / "runs" / "default" / "stopped")
    command = [sys.executable, "-c", "import sys; from qwen2vl_sft.cli import main; sys.exit(main())", "train", str(project / "recipe.yaml")]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not len(table := run.metrics()) or table["step"].max() < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in error, error
    status = run.status()
    assert status.state == "interrupted" and 2 <= status.progress["step"] < 14, "the step it was in is done and saved"
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == [f"resume-{status.progress['step']}"] or status.progress["step"] in run.checkpoints()
    train(load_recipe(project / "recipe.yaml"))
    assert same(weights(whole, 14), weights(run, 14))
    assert not list((run.path / "checkpoints").glob("resume-*")) and run.status().spent.keys() == {"training"}
    assert run.validations()["mean"].tolist() == whole.validations()["mean"].tolist()


def test_a_checkpoint_saved_during_its_validation_is_kept_if_it_is_the_best(project, monkeypatch):
    settings, folder = config(project, "during", steps=4, validate_every=2), project / "runs" / "default" / "during" / "checkpoints"
    for _ in range(2):  # the second time while the validation is made up for
        planted(monkeypatch, {2: None})
        with pytest.raises(KeyboardInterrupt, match="stopped after step 2 and is saved"):
            train(settings)
        assert [path.name for path in folder.iterdir()] == ["resume-2"]
    saved = load_file(folder / "resume-2" / "adapter_model.safetensors")
    planted(monkeypatch, {2: 0.8, 4: 0.5})
    run = train(settings)
    assert list(run.checkpoints()) == [2, 4] and run.best()["overall"] == {"step": 2, "mean_accuracy": 0.8}
    assert run.validations()["step"].tolist() == [2, 4] and same(weights(run, 2), saved)


def test_a_run_stopped_during_the_validation_that_ends_it_ends_there(project, monkeypatch, capsys):
    settings = config(project, "ended", steps=20, validate_every=2, early_stopping_patience=1)
    planted(monkeypatch, {2: 0.8, 4: None})
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4 and is saved"):
        train(settings)
    planted(monkeypatch, {4: 0.7})
    run = train(settings)
    assert list(run.checkpoints()) == [2, 4] and run.metrics()["step"].max() == 4 and run.best()["overall"]["step"] == 2
    assert run.status().state == "finished" and "stopped early at step 4" in run.status().message
    before = run.metrics_path.read_bytes()
    train(settings)
    assert "already trained" in capsys.readouterr().out and run.metrics_path.read_bytes() == before


# --- TensorBoard ----------------------------------------------------------------------------------


def test_tensorboard_has_the_same_figures(project):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(config(project, "events", steps=4, validate_every=4, tensorboard=True))
    events = accumulator.EventAccumulator(str(run.path / "tensorboard")).Reload()
    table = run.metrics()
    assert [event.step for event in events.Scalars("training/loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss/colour")] == pytest.approx(table["loss/colour"].tolist())
    assert events.Scalars("validation/mean")[0].value == pytest.approx(table["validation/mean"].iloc[-1])


def test_without_tensorboard_there_is_a_line_and_an_error_only_where_asked(project, monkeypatch, capsys):
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    run = RunDir(project / "runs" / "default" / "none")
    assert progress.event_writer(run, None, 0) is None and "pip install 'qwen2vl-sft[tensorboard]'" in capsys.readouterr().out
    with pytest.raises(InputError, match="needs the package tensorboard"):
        progress.event_writer(run, True, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_validation_on_cuda_in_bfloat16(project, method):
    "Adapters in float32 on NF4, and float32 master weights, are validated in the precision that they train in."
    settings = config(project, method, {"name": method}, validate_every=3)
    settings.model.device, settings.model.dtype = "cuda", "bfloat16"
    run = train(settings)
    assert run.validations()["step"].tolist() == [3, 6] and run.metrics()["reserved_gb"].notna().any()
