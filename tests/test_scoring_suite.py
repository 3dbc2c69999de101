"""Scoring checkpoints: all in one pass, by both rules, killed and continued, redone when what decides them changes."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from qwen2vl_sft.cli import main
from qwen2vl_sft.config import MethodConfig, ModelConfig, PreprocessingConfig, RunConfig, ScoringConfig
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data import pixels
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.data.toy import toy_picture, write_toy_suite
from qwen2vl_sft.encoding.batch import image_inputs
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.load import base_location, load_base, trainable
from qwen2vl_sft.model.prefill import logits_of
from qwen2vl_sft.rundir import RunDir, Status
from qwen2vl_sft.scoring import experiment, labels, suite
from qwen2vl_sft.scoring.baselines import score_baselines
from qwen2vl_sft.scoring.experiment import score_experiment, score_run
from qwen2vl_sft.scoring.remote import ApiConfig
from qwen2vl_sft.scoring.labels import LabelScores, TreeReading, label_tree, path_sums
from qwen2vl_sft.scoring.suite import test_set
from qwen2vl_sft.tasks import Suite, Task, load_suite
from qwen2vl_sft.training.trainer import train

SETTINGS = ScoringConfig(max_new_tokens=4, batch=4)


def trained(project, name: str, method: str, **changes) -> RunDir:
    config = RunConfig(
        suite=str(project / "toy" / "toy.yaml"), experiment="toy", run=name, model={"device": "cpu"},
        method={"name": method, **({"freeze_tower": False, "freeze_merger": False} if method == "full" else {})},
        schedule={"steps": 4, "save_at": [2], "micro_batch": 6, "learning_rate": 1e-3, **changes},
    )  # fmt: skip
    return train(config)


@pytest.fixture
def prepared(project):
    return prepare(load_suite(write_toy_suite(project / "toy", rows=12)))


def part_times(run: RunDir) -> dict[str, int]:
    return {str(path.relative_to(run.path)): path.stat().st_mtime_ns for path in run.path.glob("predictions/*/*/part-*.parquet")}


def counted(monkeypatch, module, name: str) -> list:
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **named: calls.append(args) or real(*args, **named))
    return calls


def test_all_runs_and_the_untuned_model_go_over_the_data_once(project, prepared, monkeypatch, capsys):
    runs = [trained(project, method, method) for method in ("full", "lora", "qlora")]
    capsys.readouterr()
    decoded = counted(monkeypatch, suite, "open_image")
    towers = counted(monkeypatch, suite, "tower_features")
    tested = counted(monkeypatch, experiment, "self_test")
    score_experiment(project / "runs" / "toy", SETTINGS, baselines=False)
    assert len(decoded) == 24 + 2 * 3  # each picture once for all models; the self-test takes three a rule
    assert sum(len(args[2]) for args in towers) == 24
    said = capsys.readouterr().out
    assert Counter((data.task.name, rule) for _, _, data, rule, _ in tested) == {("colour", "closed"): 7, ("word", "free"): 7}  # every candidate
    assert said.count("answered alike") == 4
    assert "plain base (base, lora/step-2, lora/step-4)" in said and "nf4 base (qlora/step-2, qlora/step-4)" in said
    for run in runs:
        assert run.predicted() == [(f"step-{step}", task) for step in (2, 4) for task in ("colour", "word")]
        assert run.status().state == "finished" and run.status().progress["answers"] == run.status().progress["of"] == 7 * 24
        tables = [run.predictions(f"step-{step}", "colour") for step in (2, 4)]
        assert all(len(table) == 12 and table["id"].is_unique for table in tables)
        assert not tables[0]["probabilities"].equals(tables[1]["probabilities"])
    alone = RunDir(project / "runs" / "alone" / "base")
    experiment.score_untuned(alone, prepared, experiment.read_config(runs[1]).model, PreprocessingConfig(), SETTINGS)
    for task in ("colour", "word"):  # the untuned row is the plain base, with no adapter active
        there = RunDir(project / "runs" / "toy" / "base").predictions("base", task)
        assert there.drop(columns="seconds").equals(alone.predictions("base", task).drop(columns="seconds"))
    before = [part_times(run) for run in runs]
    score_experiment(project / "runs" / "toy", SETTINGS)
    assert [part_times(run) for run in runs] == before


def test_models_that_do_not_fit_together_take_turns_with_the_same_answers(project, prepared):
    runs = [trained(project, method, method) for method in ("full", "lora")]
    experiment_folder = project / "runs" / "toy"
    score_experiment(experiment_folder, SETTINGS, baselines=False)
    tables = {}
    for run in [*runs, RunDir(experiment_folder / "base")]:
        for pair in run.predicted():
            tables[run.name, *pair] = run.predictions(*pair)
            for part in run.predictions_folder(*pair).iterdir():
                part.unlink()
    candidates = [one for run in runs for one in experiment.candidates_of(run, experiment.read_config(run))]
    scorer = suite.Scorer(experiment.checked_encoder(experiment.read_config(runs[1]), []), SETTINGS)
    tests = [test_set(prepared, task, SETTINGS) for task in prepared.suite.tasks]
    experiment.score_candidates(candidates, scorer, tests, most=1)
    for run in runs:
        for pair in run.predicted():
            first, again = tables[run.name, *pair].set_index("id"), run.predictions(*pair).set_index("id")
            assert again["text"].to_dict() == first["text"].to_dict()
    assert scorer.pixel_cache is not None and (project / "prepared" / "pixel-cache").exists()


def test_both_rules_lie_side_by_side_and_their_disagreement_is_kept(project, prepared, capsys):
    run = trained(project, "lora", "lora")
    score_run(run, prepared, SETTINGS)
    before = part_times(run)
    score_experiment(run.path.parent, SETTINGS.model_copy(update={"rule": "both"}), baselines=False)
    assert before.items() <= part_times(run).items()  # by the closed rule, and of open tasks, all was there
    assert run.rules("step-4", "colour") == ["closed", "free"] and run.rules("step-4", "word") == ["free"]
    closed, free = (run.predictions("step-4", "colour", rule).set_index("id") for rule in ("closed", "free"))
    table = pd.read_csv(run.path.parent / "rules.csv").set_index(["run", "checkpoint", "task"])
    line = table.loc["lora", "step-4", "colour"]
    assert line["n"] == 12 and line["differ"] == pytest.approx((closed["prediction"] != free["prediction"].reindex(closed.index)).mean())
    said = capsys.readouterr().out
    assert "rules.csv" in said and list(table.index.unique("task")) == ["colour"]
    heads, *lines = [one.split() for one in said[said.index("rules.csv") :].splitlines()[1:]]
    shown = {tuple(line[:3]): dict(zip(heads[3:], map(float, line[3:]), strict=True)) for line in lines}  # the same in the terminal, a line a task
    assert shown.keys() == set(table.index) and shown["lora", "step-4", "colour"] == pytest.approx(line.to_dict(), abs=5e-4)
    assert "for want of free answers" not in said
    for part in RunDir(run.path.parent / "base").prediction_parts("base", "colour", "free"):
        part.unlink()
    experiment.report_rules(run.path.parent)
    assert "not in it, for want of free answers: base (colour); `qwen2vl-sft score toy --rule both` gives them" in capsys.readouterr().out


def test_a_changed_picture_or_label_is_scored_again_and_no_other_row(project, prepared):
    run = trained(project, "lora", "lora")
    score_run(run, prepared, SETTINGS, steps=[4])
    before = run.predictions("step-4", "colour").set_index("id")
    toy_picture("red", np.random.default_rng(77)).save(project / "toy" / "pictures" / "test-4.png")
    table = (project / "toy" / "test.csv").read_text().replace("test-7.png,green", "test-7.png,blue")
    (project / "toy" / "test.csv").write_text(table)
    again = prepare(load_suite(project / "toy" / "toy.yaml"))
    score_run(run, again, SETTINGS, steps=[4])
    after = run.predictions("step-4", "colour").set_index("id")
    assert len(after) == 12 and after.index.is_unique
    same = [name for name in after.index if name in before.index and after.loc[name, "seconds"] == before.loc[name, "seconds"]]
    assert len(same) == 10  # `seconds` is measured: rows that were scored again have another


def test_a_checkpoints_scores_are_those_of_the_weights_in_its_folder(project, prepared):
    "Adapters loaded side by side must not be mixed up: each is scored alone and together with the others."
    run = trained(project, "lora", "lora", learning_rate=3e-2)
    score_run(run, prepared, SETTINGS)
    together = {step: run.predictions(f"step-{step}", "colour") for step in (2, 4)}
    for step in (2, 4):
        for part in run.predictions_folder(f"step-{step}", "colour").iterdir():
            part.unlink()
        score_run(run, prepared, SETTINGS, steps=[step])
        alone = run.predictions(f"step-{step}", "colour")
        for one, other in zip(alone["probabilities"], together[step]["probabilities"], strict=True):
            assert json.loads(one) == pytest.approx(json.loads(other), abs=1e-4)


def test_changed_weights_or_wording_are_scored_again_and_nothing_else(project, prepared):
    run = trained(project, "lora", "lora")
    score_run(run, prepared, SETTINGS)
    before = part_times(run)
    file = run.checkpoints()[4] / "adapter_model.safetensors"
    save_file({name: weight * 1.5 for name, weight in load_file(file).items()}, file)
    score_run(run, prepared, SETTINGS)
    changed = {name for name, when in part_times(run).items() if before.get(name) != when}
    assert changed and all("step-4" in name for name in changed)

    file = project / "toy" / "toy.yaml"
    file.write_text(file.read_text().replace("Which colour is it?", "What colour is it?"))
    before = part_times(run)
    score_run(run, prepare(load_suite(file)), SETTINGS)
    changed = {name for name, when in part_times(run).items() if before.get(name) != when}
    assert changed and all("colour" in name for name in changed)


def test_a_killed_scoring_run_continues_where_it_was(project, prepared):
    run = trained(project, "lora", "lora")
    settings = ScoringConfig(max_new_tokens=4, batch=1)
    score_run(run, prepared, settings)
    whole = {pair: run.predictions(*pair) for pair in run.predicted()}
    for path in run.path.glob("predictions/*/*/*"):
        path.unlink()

    code = (
        "from pathlib import Path; from qwen2vl_sft.config import ScoringConfig; from qwen2vl_sft.scoring import experiment\n"
        f"experiment.score_experiment(Path({str(run.path.parent)!r}), ScoringConfig(max_new_tokens=4, batch=1), baselines=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "QWEN2VL_SFT_ROOT": str(project)})
    deadline = time.time() + 120
    while len(part_times(run)) < 7 and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert RunDir(run.path).status().state == "dead"
    kept = part_times(run)
    assert 7 <= len(kept) < 48

    score_run(run, prepared, settings)
    assert kept.items() <= part_times(run).items()
    for pair, table in whole.items():
        again = run.predictions(*pair)
        columns = ["id", "target", "prediction", "outcome", "text"]
        pd.testing.assert_frame_equal(again[columns].sort_values("id", ignore_index=True), table[columns].sort_values("id", ignore_index=True))


def test_a_checkpoint_with_another_preprocessing_is_refused(project, prepared):
    run = trained(project, "lora", "lora")
    run.config_path.write_text(run.config_path.read_text().replace("max_pixels: null", "max_pixels: 2048"))
    with pytest.raises(InputError, match=r"lora/step-2: trained with another preprocessing \(images differs\)"):
        score_run(run, prepared, SETTINGS)


def test_the_closed_rule_needs_a_closed_task_and_a_limit_draws_at_random(prepared):
    with pytest.raises(InputError, match="'word' is open"):
        test_set(prepared, prepared.suite.task("word"), ScoringConfig(rule="closed"))
    some = test_set(prepared, prepared.suite.task("colour"), ScoringConfig(limit=5))
    assert len(some) == 5 and some.chosen != list(range(5)) and some.chosen == sorted(some.chosen)
    assert some.chosen == test_set(prepared, prepared.suite.task("colour"), ScoringConfig(limit=5)).chosen
    assert torch.is_grad_enabled()


# --- what decides a prediction, without a training ---------------------------------------------------------

CPU = ModelConfig(device="cpu")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(base_location("small"))


def scored_untuned(project, prepared, model: ModelConfig, **changes) -> RunDir:
    run = RunDir(project / "runs" / "toy" / "base")
    experiment.score_untuned(run, prepared, model, PreprocessingConfig(), SETTINGS.model_copy(update=changes))
    return run


def test_another_precision_is_another_prediction_and_another_device_is_not(project, prepared, capsys):
    run = scored_untuned(project, prepared, CPU)
    before = part_times(run)
    scored_untuned(project, prepared, ModelConfig(device="auto" if not torch.cuda.is_available() else "cpu", dtype="float32"))
    assert part_times(run) == before and "device" not in run.config_path.read_text()  # the same computation
    capsys.readouterr()
    scored_untuned(project, prepared, CPU.model_copy(update={"dtype": "bfloat16"}))
    changed = part_times(run)
    assert changed.keys() == before.keys() and not changed.items() & before.items()
    assert "base: other precision than its predictions were made with; made again: colour (closed), word (free)" in capsys.readouterr().out
    assert "dtype: bfloat16" in run.config_path.read_text()
    scored_untuned(project, prepared, CPU.model_copy(update={"dtype": "bfloat16"}))
    assert part_times(run) == changed and "made again" not in capsys.readouterr().out


def test_what_predictions_follow_from(project, prepared, encoder, tmp_path):
    scorer, data = suite.Scorer(encoder, SETTINGS), test_set(prepared, prepared.suite.task("colour"), SETTINGS)
    decided = lambda **model: suite.decided_by(suite.Candidate(RunDir(tmp_path), "step-1", tmp_path, "w", "b", ModelConfig(**model)), data, "closed", scorer)
    assert decided(device="cpu") == decided(device="cpu", dtype="float32") != decided(device="cpu", dtype="bfloat16") == decided(device="cuda:7")
    assert decided(device="cpu", attention="eager") != decided(device="cpu") == decided(device="cpu", attention="flash_attention_2")  # which takes no masks


def test_the_untuned_row_follows_what_all_runs_state(project):
    "A run that sorts first, on another device or in another precision, changes no weights of the untuned row."
    config = lambda **model: RunConfig(suite="toy.yaml", experiment="toy", model=model, method={"name": "lora"}, schedule={"steps": 1})
    runs = {"mix": config(device="cpu", dtype="float32")}
    assert experiment.untuned_settings(runs)[0] == ModelConfig(device="cpu", dtype="float32")
    both = {"a": config(device="auto", dtype="bfloat16"), **runs}
    assert experiment.untuned_settings(both)[0] == ModelConfig()
    run = RunDir(project / "runs" / "toy" / "base")
    for model in (experiment.untuned_settings(runs)[0], experiment.untuned_settings(both)[0]):
        one = experiment.untuned_candidate(run, "toy", model, PreprocessingConfig())
    assert one.precision == "float32, sdpa" or torch.cuda.is_available()
    with pytest.raises(InputError, match="the run exists with suite: toy, now other is asked for"):
        experiment.untuned_candidate(run, "other", CPU, PreprocessingConfig())


def test_a_row_that_left_the_test_set_leaves_the_predictions(project, prepared):
    "Ids are numbers of lines, so those of the rows after it change: their predictions are not made again, only renamed."
    run = scored_untuned(project, prepared, CPU)
    pictures = lambda prepared: dict(zip(*map(prepared.split("colour", "test").column, ("id", "sha256")), strict=True))
    before, old = run.predictions("base", "colour"), pictures(prepared)
    table = (project / "toy" / "test.csv").read_text().splitlines()
    (project / "toy" / "test.csv").write_text("\n".join(table[:5] + table[6:]) + "\n")
    again = prepare(load_suite(project / "toy" / "toy.yaml"))
    scored_untuned(project, again, CPU)
    after, new = run.predictions("base", "colour"), pictures(again)
    assert len(after) == 11 and set(after["id"]) == set(new) and len(set(old) - set(new)) == 1
    assert sum(old[name] != picture for name, picture in new.items()) > 5, "most ids are other pictures' now"
    given = lambda table, names: {names[row.id]: (row.prediction, row.probabilities, row.seconds) for row in table.itertuples()}  # seconds are measured
    assert given(after, new).items() <= given(before, old).items()


def test_probabilities_are_kept_however_small(encoder):
    values = np.array([1 - 3.3e-9, 3.3e-9 - 1.25e-30, 1.25e-30])
    read = json.loads(suite.stated(["a", "b", "c"], values))
    assert list(read.values()) == pytest.approx(values.tolist(), rel=1e-8) and sum(read.values()) == pytest.approx(1, abs=1e-8)
    scores = LabelScores(["red", "blue"], np.array([[1 - 2e-11, 2e-11]]), np.ones(1), [None])
    row, = suite.closed_rows(scores, ["red"], Task(name="t", question="?", labels=["red", "blue"]))
    assert json.loads(row["probabilities"])["blue"] == pytest.approx(2e-11, rel=1e-8)


def test_nothing_that_scores_warns(encoder):
    "Two wordings of a label are added up without an operation that PyTorch calls unfinished."
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = label_tree(encoder, {"yes": ["yes", "yes, it does"], "no": ["no"]})
            reading = TreeReading(-torch.rand(2, len(tree)), -torch.rand(2, len(tree)), torch.zeros(2, 1 + len(tree), dtype=torch.long))
            sums = path_sums(reading, tree)
    finally:
        torch.set_warn_always(always)
    ends = {label: [tree.path(node) for index, node in tree.ends if index == label] for label in (0, 1)}
    for label, paths in ends.items():
        wordings = torch.stack([reading.arrivals[:, path].sum(1) + reading.stops[:, path[-1]] for path in paths])
        torch.testing.assert_close(sums[:, label], wordings.logsumexp(0))


# --- what is checked before the first answer, and what memory allows -----------------------------------------


def written_adapter(folder, scale: float, **method):
    "An adapter as a training would save it, whose effect is `scale`."
    model = trainable(load_base(CPU), MethodConfig(name="lora", rank=2, **method))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    model.save_pretrained(folder)


def test_an_adapter_that_changes_nothing_stops_the_run_and_one_of_the_tower_does_not(tmp_path, encoder):
    tower = {"targets": [], "tower_targets": ["qkv"]}
    for name, scale in (("active", 0.05), ("idle", 0.0)):
        written_adapter(tmp_path / name, scale, **tower)
        group = experiment.Group("plain base, own towers", [suite.Candidate(RunDir(tmp_path), name, tmp_path / name, "w", "b", CPU, MethodConfig(name="lora", rank=2, **tower))])
        if name == "active":
            assert len(experiment.load_group(group, encoder).adapters) == 1
            continue
        with pytest.raises(RunFailure, match="idle: the adapter changes no output.*Train the run further, or delete"):
            experiment.load_group(group, encoder)


def test_the_self_test_takes_an_open_task_for_the_free_rule(prepared, encoder, monkeypatch, capsys):
    "Also where the suite has no closed task, and each adapter on its own."
    both, closed, word = (test_set(prepared, prepared.suite.task(name), SETTINGS.model_copy(update={"rule": rule})) for name, rule in (("colour", "both"), ("colour", "auto"), ("word", "auto")))
    assert [experiment.tested_by(rule, [both, word]) for rule in ("closed", "free")] == [both, word]
    assert [experiment.tested_by(rule, [word]) for rule in ("closed", "free")] == [None, word] and experiment.tested_by("free", [both]) is both and experiment.tested_by("free", [closed]) is None
    group = experiment.Group("plain base", [suite.Candidate(RunDir(prepared.folder), "base", None, "w", config=CPU)])
    experiment.test_models([experiment.load_group(group, encoder)], suite.Scorer(encoder, SETTINGS), [word])
    assert "self-test, plain base, 1 models: word (free) alone and in a batch answered alike" in capsys.readouterr().out


def test_the_tokens_of_a_pass_follow_from_free_memory(monkeypatch):
    model = load_base(CPU)
    assert 0 < suite.free_bytes(torch.device("cpu")) < psutil.virtual_memory().total
    room = {}
    for free in (0, 2 * 10**9, 4 * 10**9, 10**15):
        monkeypatch.setattr(suite, "free_bytes", lambda device, free=free: free)
        room[free] = suite.batch_tokens(model)
    text = model.config.text_config
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * 4  # bytes of a token's keys and values
    assert room[0] == 1024 and room[10**15] == suite.BATCH_TOKENS
    monkeypatch.setattr(suite, "BATCH_TOKENS", 10**9)
    monkeypatch.setattr(suite, "free_bytes", lambda device: 2 * 10**9)
    half = suite.batch_tokens(model)
    monkeypatch.setattr(suite, "free_bytes", lambda device: 4 * 10**9)
    assert suite.batch_tokens(model) == pytest.approx(2 * half, rel=1e-3) and half * cache < 2 * 10**9 / 3


def test_a_batch_that_is_too_large_is_halved_and_a_sample_that_is_gets_named(project, prepared, score_batch_fitting, capsys):
    "Later batches of the task are no larger."
    sizes, most = score_batch_fitting(experiment, 2)
    run = scored_untuned(project, prepared, CPU, batch=8)
    assert sizes[:8] == [8, 4, 2, 2, 2, 2, 2, 2] and "score colour: out of memory; 4 samples at a time instead of 8" in capsys.readouterr().out
    assert all(len(run.predictions("base", task)) == 12 and run.predictions("base", task)["id"].is_unique for task in ("colour", "word"))
    most[0] = 0
    for path in run.path.glob("predictions/*/*/*"):
        path.unlink()
    with pytest.raises(RunFailure, match=r"colour, row \S+: one sample doesn't fit in memory; lower preprocessing.max_pixels"):
        scored_untuned(project, prepared, CPU, batch=2)


def test_progress_and_the_time_left(monkeypatch, encoder):
    "Loading the models counts until the first answers are there; of two processes each has half of the work."
    now, status = [100.0], Status()
    monkeypatch.setattr(experiment.time, "monotonic", lambda: now[0])
    report = experiment.progress_of([status])
    for seconds, done, left in ((110, 10, 90), (120, 60, 8), (128, 100, 0)):
        now[0] = float(seconds)
        report(done, 100)
        assert status.progress == {"answers": done, "of": 100, "seconds_left": left}
    said = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    work = experiment.Work(None, [], {("a", "t", "closed"): set(range(5))}, lambda *numbers: said.append(numbers))
    work.missing["a", "t", "closed"] -= {0, 1, 2}
    with tqdm(total=5, file=io.StringIO()) as bar, tqdm(disable=True) as none:
        work.count(1, bar)
        work.count(2, bar)
        experiment.Work(None, [], {("a", "t", "closed"): {0, 1}}, lambda *numbers: said.append(numbers)).count(1, none)
        assert said == [(2, 5), (5, 5), (2, 2)] and bar.n == 5


def predicted_by(one, data, rule: str, scorer) -> None:
    "Predictions as scoring would have kept them."
    ids = data.rows.column("id")
    rows = pd.DataFrame({"id": ids, "sample": data.row_keys, "rule": rule, "split": data.split, "outcome": "wrong"})
    suite.start_predictions(one, data, rule, scorer)
    one.run.write_predictions(one.checkpoint, data.task.name, None, rows)


def test_stale_predictions_of_the_other_rule_go(prepared, encoder, tmp_path, capsys):
    "Also those of a row that has changed; a longer answer alone makes none of them stale."
    run, both = RunDir(tmp_path / "toy" / "base"), SETTINGS.model_copy(update={"rule": "both"})
    one = suite.Candidate(run, "base", None, "w", config=CPU)
    data, = (test_set(prepared, prepared.suite.task("colour"), both) for _ in range(1))
    auto, scorer = test_set(prepared, prepared.suite.task("colour"), SETTINGS), suite.Scorer(encoder, SETTINGS)
    for rule in ("closed", "free"):
        predicted_by(one, data, rule, scorer)
    work = experiment.work_for([one], suite.Scorer(encoder, SETTINGS.model_copy(update={"max_new_tokens": 9})), [auto])
    assert work.answers == 0 and run.rules("base", "colour") == ["closed", "free"]
    part, = run.prediction_parts("base", "colour", "free")
    table = pd.read_parquet(part)
    table.loc[0, "sample"] = "another picture"
    table.to_parquet(part)
    experiment.work_for([one], scorer, [auto])
    assert len(run.predictions("base", "colour", "free")) == len(table) - 1 and "rows that have changed" in capsys.readouterr().out
    changed = suite.Candidate(run, "base", None, "other weights", config=CPU)
    assert experiment.work_for([changed], scorer, [auto]).answers == len(auto)
    assert run.rules("base", "colour") == ["closed"] and "removed: colour (free); score --rule both makes them again" in capsys.readouterr().out
    assert run.decided("base", "colour", "free") is None


def test_a_cut_answer_says_so_and_targets_that_are_too_long_are_named(prepared, encoder, capsys):
    task = Task(name="item", question="What is it?", labels=["red", "red car"])
    tokens = encoder.tokenizer.encode("red", add_special_tokens=False)
    cut, whole = (suite.free_row(encoder, [*tokens, *end], "red", task) for end in ([], [encoder.end_id]))
    assert (cut["outcome"], cut["reason"], cut["prediction"]) == ("unparseable", f"cut at {len(tokens)} tokens", None)
    assert (whole["outcome"], whole["reason"]) == ("correct", "")
    word = test_set(prepared, prepared.suite.task("word"), SETTINGS)
    lengths = {1 + len(encoder.tokenizer.encode(text)) for text in word.column("label")}
    for most, said in ((max(lengths), False), (max(lengths) - 1, True)):
        experiment.say_what_is_cut([word], suite.Scorer(encoder, SETTINGS.model_copy(update={"max_new_tokens": most})))
        assert (f"--max-new-tokens {max(lengths)} has room for all" in capsys.readouterr().out) == said


def test_the_longest_answer_is_the_recipes_unless_stated():
    recipes = [RunConfig(suite="s", experiment="e", run="r", scoring={"max_new_tokens": most}) for most in (20, 300)]
    assert experiment.with_longest_answer(ScoringConfig(), recipes).max_new_tokens == 300
    assert experiment.with_longest_answer(ScoringConfig(max_new_tokens=7), recipes).max_new_tokens == 7
    assert experiment.with_longest_answer(ScoringConfig(), []).max_new_tokens == ScoringConfig().max_new_tokens == ApiConfig(model="m").max_tokens


def test_the_commands_longest_answer_arrives(project, prepared):
    "What the untuned model writes has no end within two tokens."
    run = trained(project, "lora", "lora", steps=1, save_at=[])
    for longest in (1, 2):
        assert main(["score", "toy", "--rule", "free", "--max-new-tokens", str(longest)]) == 0
        base = RunDir(run.path.parent / "base")
        assert base.decided_parts("base", "word", "free")["longest answer"] == str(longest)
        assert base.predictions("base", "word", "free")["tokens_out"].max() == longest


@pytest.fixture
def two_models(tmp_path) -> list:
    "The untuned model, and a full checkpoint with the tower as it was."
    model = load_base(CPU)
    model.lm_head.weight.data[:50] += 0.1
    model.save_pretrained(tmp_path / "full")
    frozen = MethodConfig(name="full", freeze_tower=True, freeze_merger=True)
    return [
        suite.Candidate(RunDir(tmp_path / "toy" / "base"), "base", None, "w", config=CPU),
        suite.Candidate(RunDir(tmp_path / "toy" / "full"), "step-2", tmp_path / "full", "v", config=CPU, method=frozen),
    ]


def test_free_memory_decides_how_often_the_data_is_gone_over(two_models, encoder, monkeypatch):
    groups = experiment.groups_of(two_models)
    size = max(experiment.load_group(group, encoder).bytes for group in groups)
    for free, together in ((2 * size, [2]), (2 * size - 2, [1, 1])):  # another model like the largest must fit twice
        monkeypatch.setattr(experiment, "free_bytes", lambda device, free=free: free)
        assert [len(held) for held in experiment.passes(groups, encoder)] == together


def test_without_a_vision_cache_two_passes_decode_a_picture_once(project, prepared, two_models, encoder, monkeypatch):
    colour = test_set(prepared, prepared.suite.task("colour"), SETTINGS)
    monkeypatch.setattr(experiment, "test_models", lambda *_: None)
    decoded = counted(monkeypatch, suite, "open_image"), counted(monkeypatch, pixels, "open_image")
    experiment.score_candidates(two_models, suite.Scorer(encoder, SETTINGS), [colour], 0.0, most=1)
    assert sum(map(len, decoded)) == len(colour) and all(len(one.run.predictions(one.checkpoint, "colour")) == len(colour) for one in two_models)


def test_the_pixel_cache_is_for_a_further_pass_whose_pictures_the_vision_cache_does_not_hold(project, prepared, two_models, encoder):
    colour = test_set(prepared, prepared.suite.task("colour"), SETTINGS)
    held = [experiment.load_group(experiment.groups_of(two_models)[0], encoder)]
    for cache_gb, repeats, all_frozen, needed in ((0.0, True, True, True), (1.0, True, True, False), (1.0, False, True, False), (1.0, True, False, True), (1e-9, True, True, True)):
        scorer = suite.Scorer(encoder, SETTINGS)
        experiment.open_caches(scorer, held, cache_gb, repeats, [colour], all_frozen)
        assert (scorer.pixel_cache is not None) == needed


# --- on a GPU, looked at without one -----------------------------------------------------------------------

def test_outputs_from_the_cache_and_fresh_ones_meet_on_the_models_device(prepared, encoder, monkeypatch):
    "Fake tensors know their device: a batch that the cache has in part, as after a kill, can be put together on a GPU."
    colour = test_set(prepared, prepared.suite.task("colour"), SETTINGS)
    samples, width = suite.Scorer(encoder, SETTINGS).samples(colour, [0, 1, 2]), 64
    with FakeTensorMode():
        outputs = [torch.empty(sample.encoded.grid[1] * sample.encoded.grid[2] // 4, width) for sample in samples]
        samples[1].features, samples[1].pixels = outputs[1], None  # from the cache: on the CPU
        monkeypatch.setattr(suite, "unwrapped", lambda model: SimpleNamespace(device=torch.device("cuda:0")))
        monkeypatch.setattr(suite, "now_on", lambda device: 0.0)  # waits for a real device
        monkeypatch.setattr(suite, "frames_of", lambda model: 1)
        monkeypatch.setattr(suite, "tower_features", lambda model, patches, grid: [torch.empty(np.prod(one) // 4, width, device="cuda:0") for one in grid])
        monkeypatch.setattr(type(encoder.images), "patches", lambda self, pixels, device, frames: (None, [sample.encoded.grid for sample in samples if sample.features is None]))
        suite.add_features(suite.Scorer(encoder, SETTINGS), None, colour, [0, 1, 2], samples)
        together = image_inputs(samples, encoder.images)["image_features"]
    assert together.device.type == "cuda" and len(together) == sum(map(len, outputs)) and all(sample.pixels is None for sample in samples)


class Called(TorchDispatchMode):
    "Notes which operators run."

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "dtype", "operator"), [("cuda", torch.bfloat16, "aten.mm.dtype"), ("cuda", torch.float32, "aten.mm.default"), ("cpu", torch.bfloat16, "aten.mm.default")])
def test_logits_of_half_precision_states_are_not_rounded_on_a_gpu(device, dtype, operator):
    with FakeTensorMode(), Called() as called:
        head = nn.Linear(8, 16, bias=False, device="meta")
        head.weight = nn.Parameter(torch.empty(16, 8, dtype=dtype, device=device), requires_grad=False)
        logits = logits_of(SimpleNamespace(lm_head=head), torch.empty(3, 5, 8, dtype=dtype, device=device))
    assert logits.shape == (3, 5, 16) and logits.dtype is torch.float32 and logits.device.type == device and operator in called.names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_on_a_cpu_are_those_of_lm_head(dtype):
    model = load_base(ModelConfig(device="cpu", dtype=dtype))
    hidden = torch.randn(2, 3, model.lm_head.in_features, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    assert torch.equal(suite.logits_of(model, hidden), model.lm_head(hidden).float()) and suite.logits_of(model, hidden[:, -1]).shape == (2, model.lm_head.out_features)


# --- what rounding to bfloat16 explains --------------------------------------------------------------------

def in_company(monkeypatch, model, tokens: list[int], leak: float) -> None:
    "Where a prompt is alone, the first token is ahead by `leak`; in a batch the second."
    head = model.lm_head.forward

    def leaking(hidden):
        logits = head(hidden)
        if hidden.ndim == 2:
            logits[:, tokens] = logits.max(dim=1, keepdim=True).values + torch.tensor([0.0, leak] if len(hidden) > 1 else [leak, 0.0]).to(logits)
        return logits

    monkeypatch.setattr(model.lm_head, "forward", leaking)


@pytest.mark.parametrize(("dtype", "leak", "passes"), [("bfloat16", 0.125, True), ("bfloat16", 0.25, True), ("bfloat16", 1.0, False), ("float32", 0.125, False)])
def test_a_near_tie_stops_no_model_in_bfloat16(prepared, encoder, monkeypatch, dtype, leak, passes):
    model, word = load_base(ModelConfig(device="cpu", dtype=dtype)), test_set(prepared, prepared.suite.task("word"), SETTINGS)
    in_company(monkeypatch, model, encoder.text_ids("red")[:1] + encoder.text_ids("blue")[:1], leak)
    with nullcontext() if passes else pytest.raises(RunFailure, match="alone and '.*' in a batch"):
        suite.self_test(model, suite.Scorer(encoder, SETTINGS), word, "free")


@pytest.mark.parametrize(("nats", "passes"), [(0.9, True), (1.1, False)])
def test_a_label_that_moves_further_than_rounding_can_move_it_stops_the_run(prepared, encoder, monkeypatch, nats, passes):
    "The prediction stays the same, so only the log-probabilities show it."
    model, colour = load_base(ModelConfig(device="cpu", dtype="bfloat16")), test_set(prepared, prepared.suite.task("colour"), SETTINGS)
    found = suite.Apart(moved=nats * 0.125 * (2 * model.config.text_config.num_hidden_layers * 3) ** 0.5, tokens=3)
    monkeypatch.setattr(suite, "labels_apart", lambda *_: found)
    with nullcontext() if passes else pytest.raises(RunFailure, match="nats higher or lower in a batch"):
        suite.self_test(model, suite.Scorer(encoder, SETTINGS), colour)


def test_a_labels_movement_is_found(prepared, encoder, monkeypatch):
    model, colour = load_base(CPU), test_set(prepared, prepared.suite.task("colour"), SETTINGS)
    scorer, samples = suite.Scorer(encoder, SETTINGS), suite.Scorer(encoder, SETTINGS).samples(colour, [0, 1, 2])
    still = suite.labels_apart(model, scorer, colour.task, samples)
    head, token = model.lm_head.forward, encoder.text_ids(colour.task.labels[0])[0]

    def leaking(hidden):
        logits = head(hidden)
        if hidden.ndim == 2 and len(hidden) > 1:
            logits[:, token] -= 3
        return logits

    monkeypatch.setattr(model.lm_head, "forward", leaking)
    assert still.moved < 1e-3 and still.tokens >= 2 and suite.labels_apart(model, scorer, colour.task, samples).moved == pytest.approx(3, abs=0.7)


def test_pairs_of_labels_one_and_two_steps_of_bfloat16_apart_are_near_ties():
    rows = [dict(zip("abc", np.exp([0, -gap, -5]) / np.exp([0, -gap, -5]).sum(), strict=True)) for gap in (0.0, 0.125, 0.25, 0.375, 4.0)]
    assert [suite.near_ties(pd.DataFrame({"probabilities": [json.dumps(row)]})) for row in rows] == [1, 1, 1, 0, 0]


def test_the_next_batch_is_decoded_meanwhile_and_no_further(prepared, encoder, monkeypatch):
    colour, seen = test_set(prepared, prepared.suite.task("colour"), SETTINGS), []
    scorer = suite.Scorer(encoder, SETTINGS)
    plain = {row: scorer.pixels(colour, row) for row in colour.chosen}
    real = suite.Scorer.pixels
    monkeypatch.setattr(suite.Scorer, "pixels", lambda self, data, row, *lock: seen.append((row, threading.current_thread().name)) or real(self, data, row, *lock))
    numbered, given = [(2 * i, [3 * i, 3 * i + 1, 3 * i + 2]) for i in range(4)], []
    for number, places, decoded in experiment.decoded_ahead(scorer, colour, iter(numbered), set(colour.chosen) - {0}):
        given.append((number, places))
        time.sleep(0.1)
        assert {row for row, _ in seen} <= set(range(1, places[-1] + 4))  # one batch ahead
        assert decoded.keys() == set(places) - {0} and all(np.array_equal(decoded[row], plain[row]) for row in decoded)
    assert given == numbered and sorted(row for row, _ in seen) == list(range(1, 12)) and all(name.startswith("decode") for _, name in seen)
    stopped = experiment.decoded_ahead(scorer, colour, iter(numbered), set(colour.chosen))
    next(stopped)
    stopped.close()  # as after Ctrl-C
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_a_picture_that_cannot_be_decoded_stops_scoring_with_its_name(prepared, encoder, monkeypatch):
    colour = test_set(prepared, prepared.suite.task("colour"), SETTINGS)
    monkeypatch.setattr(type(colour.rows), "image", lambda self, row: b"nothing")
    with pytest.raises(InputError, match="colour, row 1"):
        list(experiment.decoded_ahead(suite.Scorer(encoder, SETTINGS), colour, iter([(0, [1, 2])]), {1, 2}))


def test_seconds_hold_the_towers_part_also_where_its_output_is_shared_or_cached(prepared, encoder, monkeypatch):
    "Else a model with the base's tower looks several times as fast as the same model with its own."
    colour, model, scorer = test_set(prepared, prepared.suite.task("colour"), SETTINGS), load_base(CPU), suite.Scorer(encoder, SETTINGS)
    tree, real = label_tree(encoder, colour.task.wordings), suite.tower_features
    monkeypatch.setattr(suite, "tower_features", lambda *given: time.sleep(0.3) or real(*given))
    for places in ([0, 1], [2, 3]):
        samples = scorer.samples(colour, places)
        suite.add_features(scorer, model, colour, places, samples)
    assert len(scorer.towers) == 2 and scorer.tower_rate == pytest.approx(scorer.towers[1][1] / scorer.towers[1][0]) and scorer.towers[1][1] > 0.3
    assert 0.15 < suite.score_batch(model, scorer, colour, [2, 3], samples, tree)["seconds"].iloc[0] < 0.3
    scorer.towers, scorer.cache = [], SimpleNamespace(seconds_a_token=1.0)
    cached = suite.score_batch(model, scorer, colour, [2, 3], samples, tree)["seconds"].iloc[0]
    assert cached == pytest.approx(len(samples[0].features), abs=0.2)


def test_tasks_without_rows_are_left_out_and_said(project, capsys):
    "One that can't be trained on has no baselines; one that can't be tested takes the others nothing."
    folder = write_toy_suite(project / "toy", rows=9).parent
    tables = {split: {"format": "csv", "path": f"{split}.csv"} for split in ("train", "validation", "test")}
    task = lambda name, *splits: Task(name=name, question="Which colour?", labels=["red", "green", "blue"], sources={split: tables[split] for split in splits})
    ready = prepare(Suite(name="some", tasks=[task("whole", "train", "validation", "test"), task("held", "test"), task("bare", "train")], folder=folder), project / "prepared" / "some")
    capsys.readouterr()
    assert [data.task.name for data in suite.test_sets(ready, SETTINGS)] == ["whole", "held"] and "not scored: bare, for want of test rows" in capsys.readouterr().out
    assert [data.task.name for data in suite.test_sets(ready, SETTINGS.model_copy(update={"split": "validation"}))] == ["whole"]
    score_baselines(project / "runs" / "e", ready, SETTINGS)
    assert RunDir(project / "runs/e/majority").predicted() == [("majority", "whole")] and "no baselines for held: no training rows" in capsys.readouterr().out
    ready.suite.tasks = ready.suite.tasks[2:]
    with pytest.raises(InputError, match="some: no task has test rows; give the suite a test source, or score another split"):
        suite.test_sets(ready, SETTINGS)


# --- several tasks about the same pictures -----------------------------------------------------------------


@pytest.fixture
def about_the_same(project, encoder):
    "Test sets: a closed task by both rules, one about eight of its twelve pictures, an open one about eight of them and eight others, one whose rows have questions of their own."
    folder = write_toy_suite(project / "toy", rows=12).parent
    rows = [line.split(",") for line in (folder / "test.csv").read_text().splitlines()[1:]]
    (folder / "red.csv").write_text("image,label\n" + "".join(f"{image},{'yes' if label == 'red' else 'no'}\n" for image, label in rows[2:10]))
    (folder / "own.csv").write_text("image,label,question\n" + "".join(f"{image},{label},Which colour is number {i}?\n" for i, (image, label) in enumerate(rows)))
    words = [line.split(",") for line in (folder / "word-test.csv").read_text().splitlines()[1:9]]
    (folder / "say.csv").write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in [*rows[4:], *words]))
    name = lambda table, **more: {"test": {"format": "csv", "path": table, **more}}
    tasks = [
        Task(name="colour", question="Which colour is it?", labels=["red", "green", "blue"], sources=name("test.csv")),
        Task(name="red", question="Is it red?", labels=["yes", "no"], sources=name("red.csv")),
        Task(name="say", question="Which colour?", answer="text", sources=name("say.csv")),
        Task(name="own", question="Which?", labels=["red", "green", "blue"], sources=name("own.csv", question="question")),
    ]
    ready = prepare(Suite(name="same", tasks=tasks, folder=folder), project / "prepared" / "same")
    return [test_set(ready, task, SETTINGS.model_copy(update={"rule": "both"})) for task in tasks]


@pytest.fixture
def three_models(tmp_path):
    "The untuned model and an adapter in one group, and full weights with a tower of their own; in a run folder of a name."
    torch.manual_seed(3)
    tuned = get_peft_model(load_base(CPU), LoraConfig(r=4, target_modules=r".*language_model.*_proj", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    model = load_base(CPU)
    model.model.visual.merger.mlp[2].weight.data *= 1.1
    model.save_pretrained(tmp_path / "full")
    own = MethodConfig(name="full", freeze_tower=False, freeze_merger=False)
    return lambda name: [
        suite.Candidate(RunDir(tmp_path / name / "base"), "base", None, "w", config=CPU),
        suite.Candidate(RunDir(tmp_path / name / "lora"), "step-1", tmp_path / "adapter", "v", config=CPU, method=MethodConfig(name="lora")),
        suite.Candidate(RunDir(tmp_path / name / "full"), "step-2", tmp_path / "full", "u", config=CPU, method=own),
    ]


def predicted(candidates, tests) -> dict:
    return {(str(one), data.task.name, rule): one.run.predictions(one.checkpoint, data.task.name, rule).set_index("id").loc[data.column("id")] for one in candidates for data in tests for rule in data.rules}


def test_tasks_about_the_same_pictures_are_scored_together_as_they_are_alone(about_the_same, three_models, encoder, monkeypatch, capsys):
    "By every model, with every rule; a picture's prompts are read once a model, and rows with questions of their own as before."
    together, apart = three_models("together"), three_models("apart")
    for data in about_the_same:
        experiment.score_candidates(apart, suite.Scorer(encoder, SETTINGS), [data], 0.0)
    capsys.readouterr()
    monkeypatch.setattr(experiment, "test_models", lambda *_: None)
    read = counted(monkeypatch, suite, "prefill")
    experiment.score_candidates(together, suite.Scorer(encoder, SETTINGS), about_the_same, 0.0)
    assert sum(len(samples) for _, _, samples in read) == 3 * (12 + 8 + 12), "a model reads twelve beginnings, eight prompts about other pictures and twelve with questions of their own"
    ours, theirs = predicted(together, about_the_same), predicted(apart, about_the_same)
    for key, table in theirs.items():
        same = ["target", "prediction", "outcome", "reason", "text", "tokens_in", "tokens_out", "sample"]
        assert ours[key][same].equals(table[same]) and (ours[key]["seconds"] > 0).all(), key
        if key[2] == "closed":
            for one, other in zip(ours[key]["probabilities"], table["probabilities"], strict=True):
                assert json.loads(one) == pytest.approx(json.loads(other), abs=1e-4)
    before = [part_times(one.run) for one in together]
    experiment.score_candidates(together, suite.Scorer(encoder, SETTINGS), about_the_same, 0.0)
    assert [part_times(one.run) for one in together] == before and "3 models, all scored" in capsys.readouterr().out


def test_what_is_missing_of_tasks_that_ride_is_scored_and_nothing_else(about_the_same, three_models, encoder, monkeypatch):
    "Cut off after a batch; then one model lacks a task that others have."
    models, scorer = three_models("some")[:2], suite.Scorer(encoder, SETTINGS)
    real = experiment.Parts.publish
    monkeypatch.setattr(experiment.Parts, "publish", lambda self, number: real(self, number) if number < 2 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        experiment.score_candidates(models, scorer, about_the_same, 0.0)
    monkeypatch.setattr(experiment.Parts, "publish", real)
    kept = [part_times(one.run) for one in models]
    assert all(len(one.run.predictions(one.checkpoint, "colour")) == 2 + 4 for one in models)  # two rows that nothing rides on, then a batch of four
    experiment.score_candidates(models, scorer, about_the_same, 0.0)
    assert all(was.items() <= part_times(one.run).items() for was, one in zip(kept, models, strict=True))
    whole = predicted(models, about_the_same)
    assert all(table.index.is_unique and len(table) == len(data) for data in about_the_same for key, table in whole.items() if key[1] == data.task.name)
    for part in models[1].run.prediction_parts("step-1", "red", "closed"):
        part.unlink()
    scored = counted(monkeypatch, experiment, "score_shared"), counted(monkeypatch, experiment, "score_batch")
    experiment.score_candidates(models, scorer, about_the_same, 0.0)
    assert not scored[0] and sum(len(args[3]) for args in scored[1]) == 8, "a task alone is read whole"
    again = predicted(models, about_the_same)
    assert all(again[key]["prediction"].equals(table["prediction"]) for key, table in whole.items())


def test_two_processes_share_tasks_about_the_same_pictures(about_the_same, three_models, encoder, monkeypatch):
    "Each takes every second batch, riders included; no part file is another's."
    models = three_models("two")[:1]
    begun, real = {}, experiment.first_parts

    def first_parts(work, candidates, data):  # the first process finds them, the second gets the same
        if data.task.name not in begun:
            begun[data.task.name] = real(work, candidates, data)
        return begun[data.task.name]

    monkeypatch.setattr(experiment, "first_parts", first_parts)
    works = [experiment.work_for(models, suite.Scorer(encoder, SETTINGS), about_the_same) for _ in range(2)]
    held = [experiment.load_group(experiment.groups_of(models)[0], encoder)]
    monkeypatch.setattr(experiment, "process_count", lambda: 2)
    for rank, work in enumerate(works):
        monkeypatch.setattr(experiment, "process_rank", lambda rank=rank: rank)
        work.riders = experiment.riders_of(work, models)
        with tqdm(disable=True) as bar:
            experiment.one_pass(work, held, bar)
        assert 0 < work.done < work.answers
    for data in about_the_same:
        for rule in data.rules:
            found = models[0].run.predictions("base", data.task.name, rule)
            assert sorted(found["id"]) == sorted(data.column("id")), (data.task.name, rule)


def test_pictures_that_do_not_fit_are_read_in_halves_with_all_their_tasks(about_the_same, three_models, encoder, monkeypatch, capsys):
    models, sizes, real = three_models("halves")[:1], [], experiment.score_shared

    def tight(model, scorer, wanted):
        pictures = {number for one in wanted for number in one.pictures}
        sizes.append(len(pictures))
        if len(pictures) > 2:
            raise MemoryError
        return real(model, scorer, wanted)

    monkeypatch.setattr(experiment, "score_shared", tight)
    experiment.score_candidates(models, suite.Scorer(encoder, SETTINGS), about_the_same, 0.0)
    assert sizes == [4, 2, 2, 2, 2, 2] and "score colour: out of memory; 2 samples at a time instead of 4" in capsys.readouterr().out
    assert all(table.index.is_unique and len(table) >= 8 for table in predicted(models, about_the_same).values())


def test_the_self_test_asks_beside_the_other_tasks(about_the_same, three_models, encoder, monkeypatch):
    "A model whose label depends on another task's question is stopped."
    models = three_models("self")[:1]
    work = experiment.work_for(models, suite.Scorer(encoder, SETTINGS), about_the_same)
    riders = experiment.riders_of(work, models)
    assert {name for name, _ in riders} == {"colour"} and sorted({other.task.name for rows in riders.values() for other, _ in rows}) == ["red", "say"]
    held = [experiment.load_group(experiment.groups_of(models)[0], encoder)]
    experiment.test_models(held, work.scorer, about_the_same, riders)
    real = labels.sight
    monkeypatch.setattr(labels, "sight", lambda tree, part: np.tril(np.ones((len(part), len(part)), dtype=bool)) if len(tree) > 20 else real(tree, part))
    experiment.test_models(held, work.scorer, about_the_same, {})
    with pytest.raises(RunFailure, match=r"self-test: sample \d of colour is '.*' alone and '.*' in a batch"):
        experiment.test_models(held, work.scorer, about_the_same, riders)


def test_rows_of_no_common_picture_or_beginning_do_not_ride(about_the_same, three_models, prepared):
    models = three_models("none")[:1]
    riding = lambda tests, **settings: experiment.riders_of(experiment.work_for(models, suite.Scorer(load_encoder(base_location("small"), PreprocessingConfig(**settings)), SETTINGS), tests), models)
    assert len(riding(about_the_same)) == 10
    assert riding(about_the_same, image_first=False) == {}
    assert riding([test_set(prepared, task, SETTINGS) for task in prepared.suite.tasks]) == {}
