"""A synthetic experiment on disk, with planted accuracies, collapse, refusals, leaks, seeds and near-duplicates.

It writes what scoring writes (config.yaml, status.json, metrics.jsonl, best.json, predictions/*.parquet) and what
preparing writes (suite.yaml, audit.json, pictures), and nothing else, so that tests of the comparison need no model. Which
samples are right follows from a difficulty shared by all rows, as with real models.
"""

import io
import json
import math
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.rundir import RunDir

STEPS = (100, 200, 300, 337)
LABELS: dict[str, list[str] | None] = {
    "digit": [str(i) for i in range(10)],
    "number": None,  # open text
    "face": ["face", "no face"],
    "headwear": ["helmet", "bow tie", "neither"],
    "weapon": ["weapon", "none"],
    "style": ["twemoji", "openmoji"],
    "contact": ["contact", "no contact"],
}
BASELINES = ("majority", "nearest_neighbour")


@dataclass
class Plan:
    """What to plant. Skills are accuracies by (run, step or None)."""

    samples: int = 120
    labels: dict[str, list[str] | None] = field(default_factory=lambda: dict(LABELS))
    steps: tuple[int, ...] = STEPS
    runs: dict[str, dict] = field(default_factory=lambda: {"mix": {}, "full": {"method": {"name": "full"}}})  # run -> settings
    collapsed: dict[tuple[str, str], str] = field(default_factory=lambda: {("base", "weapon"): "none", ("full(100)", "face"): "face"})
    refused: dict[tuple[str, str], float] = field(default_factory=lambda: {("base", "number"): 0.25})
    skills: dict[str, float] = field(default_factory=dict)  # row -> accuracy; the rest follows `default_skill`
    positive: dict[str, str] = field(default_factory=dict)  # task -> positive label
    api: bool = False  # a row gpt-4o: free answers, prices, some off the list
    free: bool = False  # local models have free answers beside the closed ones
    best: dict[str, dict] = field(default_factory=dict)  # run -> content of best.json
    validation: bool = False  # predictions on the validation split
    leaked: dict[str, int] = field(default_factory=dict)  # task -> how many test pictures are trained on too
    elsewhere: dict[str, tuple[str, int]] = field(default_factory=dict)  # task -> another one that trains on so many of its last test pictures
    noise: dict[str, int] = field(default_factory=dict)  # task -> how many test labels are wrong
    pictures: int = 0  # their side in pixels; 0: none
    baselines: bool = True
    parts: int = 1  # files of predictions a task
    seed: int = 0

    def skill(self, row: str, run: str, step: int | None) -> float:
        return self.skills.get(row, default_skill(run, step))


def default_skill(run: str, step: int | None) -> float:
    if step is None:
        return {"base": 0.3, "gpt-4o": 0.7, "majority": 0.35, "nearest_neighbour": 0.55}.get(run, 0.5)
    rise = {"mix": 0.9, "full": 0.84}.get(run, 0.8)
    fall = 0.02 if step == 337 else 0.0
    return 0.3 + (rise - 0.3) * (1 - math.exp(-step / 120)) - fall


def targets(plan: Plan, task: str, rng: np.random.Generator) -> list[str]:
    labels = plan.labels[task]
    if labels is None:
        return [str(n) for n in rng.integers(100, 9999, plan.samples)]
    weights = np.r_[2.0, np.ones(len(labels) - 1)]
    return rng.choice(labels, plan.samples, p=weights / weights.sum()).tolist()


def other_answers(labels: list[str] | None, truth: list[str], rng) -> list[str]:
    """A wrong answer for each sample."""
    if labels is None:
        return [f"{t}0" for t in truth]
    place = {label: i for i, label in enumerate(labels)}
    shift = rng.integers(1, len(labels), len(truth))
    return [labels[(place[t] + s) % len(labels)] for t, s in zip(truth, shift, strict=True)]


def confidences(right: np.ndarray, rng) -> np.ndarray:
    """Higher where the answer is right, and a little too high everywhere."""
    return np.clip(rng.normal(np.where(right, 0.9, 0.7), 0.08), 0.51, 0.999)


def probabilities(labels: list[str], answers: list[str], confidence: np.ndarray) -> list[str]:
    rest = (1 - confidence) / (len(labels) - 1)
    return [json.dumps({x: round(float(c if x == a else r), 6) for x in labels}, ensure_ascii=False) for a, c, r in zip(answers, confidence, rest, strict=True)]


def predictions(plan: Plan, row: str, task: str, truth: list[str], difficulty: np.ndarray, skill: float, rng, rule: str, split: str = "test") -> pd.DataFrame:
    """One task's predictions of one row, in the columns of DESIGN section 4."""
    labels, n = plan.labels[task], len(truth)
    right = difficulty + rng.normal(0, 0.15, n) < np.quantile(difficulty, skill)
    wrong = other_answers(labels, truth, rng)
    answer = [t if r else o for t, r, o in zip(truth, right, wrong, strict=True)]
    if constant := plan.collapsed.get((row, task)):
        answer = [constant] * n
    if row == "majority":
        answer = [max(set(truth), key=truth.count)] * n
    outcome = np.where([a == t for a, t in zip(answer, truth, strict=True)], "correct", "wrong").astype(object)
    outcome[rng.random(n) < plan.refused.get((row, task), 0.0)] = "refused"
    closed, api = rule == "closed" and row not in BASELINES, row == "gpt-4o"
    if api and labels:
        outcome[rng.random(n) < 0.02] = "off_list"
    silent = np.isin(outcome, ["refused", "off_list"])
    return pd.DataFrame({
        "id": [f"{task}-{split}-{i:04d}" for i in range(n)], "target": truth,
        "prediction": [None if s else a for a, s in zip(answer, silent, strict=True)],
        "rule": rule, "split": split, "outcome": outcome,
        "reason": [{"refused": "content policy", "off_list": "not a declared label or alias"}.get(o) for o in outcome], "text": answer,
        "probabilities": probabilities(labels, answer, confidences(outcome == "correct", rng)) if closed else None,
        "in_set_mass": 0.9 if closed else np.nan, "seconds": 1.5 if api else 0.01, "tokens_in": 80, "tokens_out": 2, "cost": 0.002 if api else 0.0,
        "similarity": None if labels else [0.0 if s else 1.0 if a == t else 0.8 for a, t, s in zip(answer, truth, silent, strict=True)],
        "fields": None if labels else [json.dumps({"phone": bool(a == t and not s)} if i % 3 else {}) for i, (a, t, s) in enumerate(zip(answer, truth, silent, strict=True))],
    })


@cache
def picture(seed: int, side: int) -> bytes:
    """A picture about as detailed as a photograph."""
    from PIL import Image

    buffer = io.BytesIO()
    block = np.random.default_rng(seed).integers(0, 255, (max(6, side // 6), max(6, side // 6), 3), dtype=np.uint8)
    Image.fromarray(block).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_prepared(folder: Path, plan: Plan, truth: dict[str, list[str]]) -> None:
    """The suite as used, its audit, and test sets in which every third sample is a near-duplicate of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    describe = lambda task, labels: {"name": task, "question": f"What about {task}?", **({"labels": labels} if labels else {"answer": "text"})}
    tasks = [describe(task, labels) | ({"positive": plan.positive[task]} if task in plan.positive else {}) for task, labels in plan.labels.items()]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": folder.name, "tasks": tasks}, sort_keys=False, allow_unicode=True))
    counts = {"rows_read": plan.samples, "accepted": plan.samples - 1, "repaired": 0, "quarantined": 1, "reasons": {"unreadable": 1}, "remarks": ["a remark"]}
    (folder / "audit.json").write_text(json.dumps({"schema": 1, "fingerprint": "f00", **counts, "tasks": dict.fromkeys(plan.labels, counts)}))
    for task in plan.labels:
        (folder / task).mkdir(parents=True, exist_ok=True)
        group = [f"{task}-g{i - (i % 3 == 2)}" for i in range(plan.samples)]
        table = pd.DataFrame({"id": [f"{task}-test-{i:04d}" for i in range(plan.samples)], "label": truth[task], "group": group, "sha256": [f"{task}{i}" for i in range(plan.samples)]})
        if plan.pictures:
            table["image"] = [{"bytes": picture(i, plan.pictures), "path": None} for i in range(plan.samples)]
        table.to_parquet(folder / task / "test-00000.parquet", index=False)
        train = [f"{task}{i}" if i < plan.leaked.get(task, 0) else f"train-{task}-{i}" for i in range(plan.samples)]
        for other, (where, count) in plan.elsewhere.items():
            if where == task:
                train[-count:] = [f"{other}{i}" for i in range(plan.samples - count, plan.samples)]
        pd.DataFrame({"group": [f"{task}-t{i}" for i in range(plan.samples)], "sha256": train, "label": truth[task]}).to_parquet(folder / task / "train-00000.parquet", index=False)


def write_run(run: RunDir, kind: str | None, settings: dict) -> None:
    """config.yaml, and for a training run status and metrics."""
    run.path.mkdir(parents=True)
    if kind:
        run.config_path.write_text(yaml.safe_dump({"kind": kind, "suite": "suites/synthetic.yaml"}))
        return
    schedule = {"steps": 337, "save_at": [100, 200, 300]} | settings.get("schedule", {})
    config = RunConfig(suite="suites/synthetic.yaml", experiment=run.experiment, run=run.name, **{**settings, "schedule": schedule})
    run.config_path.write_text(config.to_yaml())
    rng = np.random.default_rng(len(run.name))
    with run.running("training"):
        for step in range(10, 338, 10):
            run.log(step, loss=2.5 * math.exp(-step / 90) + 0.2 + 0.05 * rng.random(), learning_rate=1e-4)


def rules_of(plan: Plan, row: str, task: str) -> list[str]:
    if row == "gpt-4o" or plan.labels[task] is None:
        return ["free"]
    return ["closed", "free"] if plan.free and row not in BASELINES else ["closed"]


def build_experiment(root: Path, plan: Plan | None = None, name: str = "demo") -> Path:
    """Write `root/runs/<name>` and `root/prepared/synthetic`; return the experiment's folder."""
    plan = plan or Plan()
    folder, rng = root / "runs" / name, np.random.default_rng(plan.seed)
    truth = {task: targets(plan, task, rng) for task in plan.labels}
    original = np.array([i - (i % 3 == 2) for i in range(plan.samples)])  # a near-duplicate is as hard as its original
    difficulty = {task: rng.random(plan.samples)[original] for task in plan.labels}
    labelled = {task: list(labels) for task, labels in truth.items()}  # what the data says: with wrong labels planted
    for task, count in plan.noise.items():
        labelled[task][:count] = other_answers(plan.labels[task], truth[task][:count], rng)
        difficulty[task][:count] = 0.0  # every model that learned anything sees the truth
    write_prepared(root / "prepared" / "synthetic", plan, labelled)
    rows = [("base", None, "base"), *((run, step, None) for run in plan.runs for step in plan.steps)]
    rows += [(kind, None, kind) for kind in BASELINES] if plan.baselines else []
    rows += [("gpt-4o", None, "api")] if plan.api else []
    for run_name, step, kind in rows:
        run = RunDir(folder / run_name)
        if not run.path.exists():
            write_run(run, kind, plan.runs.get(run_name, {}))
            if run_name in plan.best:
                (run.path / "best.json").write_text(json.dumps(plan.best[run_name]))
        row = run_name if step is None else f"{run_name}({step})"
        write_row(plan, run, row, run_name if step is None else f"step-{step}", plan.skill(row, run_name, step), truth, labelled, difficulty, rng)
    return folder


def write_row(plan: Plan, run: RunDir, row: str, checkpoint: str, skill: float, truth: dict, labelled: dict, difficulty: dict, rng) -> None:
    for task in plan.labels:
        for rule in rules_of(plan, row, task):
            table = predictions(plan, row, task, truth[task], difficulty[task], skill, rng, rule)
            if task in plan.noise:
                right = table["prediction"].to_numpy() == np.array(labelled[task], dtype=object)
                table = table.assign(target=labelled[task], outcome=np.where(table["outcome"].isin(["correct", "wrong"]), np.where(right, "correct", "wrong"), table["outcome"]))
            bounds = np.linspace(0, len(table), plan.parts + 1).astype(int)
            for part, (first, last) in enumerate(pairwise(bounds)):
                run.write_predictions(checkpoint, task, part, table[first:last])
        if plan.validation and row not in (*BASELINES, "gpt-4o"):
            run.write_predictions(checkpoint, task, 0, predictions(plan, row, task, truth[task], difficulty[task], skill, rng, rules_of(plan, row, task)[0], "validation"))
