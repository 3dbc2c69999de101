"""A synthetic experiment on disk, with planted accuracies, collapse, refusals and near-duplicates.

It writes what scoring writes (config.yaml, status.json, metrics.jsonl, predictions/*.parquet) and nothing else, so that
tests of the comparison need no model. Which samples are right follows from a difficulty shared by all rows, as with real
models.
"""

import json
import math
from dataclasses import dataclass, field
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


@dataclass
class Plan:
    """What to plant. Skills are accuracies by (run, step or None)."""

    samples: int = 120
    labels: dict[str, list[str] | None] = field(default_factory=lambda: dict(LABELS))
    steps: tuple[int, ...] = STEPS
    collapsed: dict[tuple[str, str], str] = field(default_factory=lambda: {("base", "weapon"): "none", ("full(100)", "face"): "face"})
    refused: dict[tuple[str, str], float] = field(default_factory=lambda: {("base", "number"): 0.25})
    skills: dict[str, float] = field(default_factory=dict)  # row -> accuracy; the rest follows `default_skill`
    api: bool = False
    seed: int = 0


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


def predictions(plan: Plan, row: str, task: str, truth: list[str], difficulty: np.ndarray, skill: float, rng) -> pd.DataFrame:
    """One task's predictions of one row, in the columns of DESIGN section 4."""
    labels, n = plan.labels[task], len(truth)
    right = difficulty + rng.normal(0, 0.15, n) < np.quantile(difficulty, skill)
    other = [rng.choice([x for x in labels if x != t]) if labels else f"{t}0" for t in truth]
    answer = [t if r else o for t, r, o in zip(truth, right, other, strict=True)]
    if constant := plan.collapsed.get((row, task)):
        answer = [constant] * n
    if row == "majority":
        answer = [max(set(truth), key=truth.count)] * n
    outcome = ["correct" if a == t else "wrong" for a, t in zip(answer, truth, strict=True)]
    refused = rng.random(n) < plan.refused.get((row, task), 0.0)
    outcome = np.where(refused, "refused", outcome)
    closed = labels is not None and row != "gpt-4o"
    return pd.DataFrame({
        "id": [f"{task}-{i:04d}" for i in range(n)], "target": truth,
        "prediction": [None if r else a for a, r in zip(answer, refused, strict=True)],
        "rule": "closed" if closed else "free", "split": "test", "outcome": outcome,
        "reason": ["content policy" if r else None for r in refused], "text": answer,
        "probabilities": [json.dumps({a: 0.8}, ensure_ascii=False) if closed else None for a in answer],
        "in_set_mass": 0.9 if closed else np.nan, "seconds": 0.01, "tokens_in": 80, "tokens_out": 2, "cost": 0.0,
    })


def write_prepared(folder: Path, plan: Plan) -> None:
    """The suite as used, and test sets in which every third sample is a near-duplicate of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [{"name": task, **({"labels": labels} if labels else {"answer": "text"})} for task, labels in plan.labels.items()]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": folder.name, "tasks": tasks}, sort_keys=False, allow_unicode=True))
    for task in plan.labels:
        ids = [f"{task}-{i:04d}" for i in range(plan.samples)]
        table = pd.DataFrame({"id": ids, "group": [f"g{i - (i % 3 == 2)}" for i in range(plan.samples)]})
        (folder / task).mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / task / "test-00000.parquet", index=False)


def write_run(run: RunDir, kind: str | None, method: str = "qlora") -> None:
    """config.yaml, and for a training run status and metrics."""
    if kind:
        run.path.mkdir(parents=True)
        run.config_path.write_text(yaml.safe_dump({"kind": kind, "suite": "suites/synthetic.yaml"}))
        return
    config = RunConfig(
        suite="suites/synthetic.yaml", experiment=run.experiment, run=run.name, method={"name": method},
        schedule={"steps": 337, "save_at": [100, 200, 300]},
    )
    run.path.mkdir(parents=True)
    run.config_path.write_text(config.to_yaml())
    rng = np.random.default_rng(len(run.name))
    with run.running("training"):
        for step in range(10, 338, 10):
            run.log(step, loss=2.5 * math.exp(-step / 90) + 0.2 + 0.05 * rng.random(), learning_rate=1e-4)


def build_experiment(root: Path, plan: Plan | None = None, name: str = "demo") -> Path:
    """Write `root/runs/<name>` and `root/prepared/synthetic`; return the experiment's folder."""
    plan = plan or Plan()
    folder, rng = root / "runs" / name, np.random.default_rng(plan.seed)
    write_prepared(root / "prepared" / "synthetic", plan)
    truth = {task: targets(plan, task, rng) for task in plan.labels}
    original = np.array([i - (i % 3 == 2) for i in range(plan.samples)])  # a near-duplicate is as hard as its original
    difficulty = {task: rng.random(plan.samples)[original] for task in plan.labels}
    rows = [("base", None, "base"), *((run, step, None) for run in ("mix", "full") for step in plan.steps)]
    rows += [("majority", None, "majority"), ("nearest_neighbour", None, "nearest_neighbour")]
    rows += [("gpt-4o", None, "api")] if plan.api else []
    for run_name, step, kind in rows:
        run = RunDir(folder / run_name)
        if not run.path.exists():
            write_run(run, kind, method="full" if run_name == "full" else "qlora")
        row = run_name if step is None else f"{run_name}({step})"
        skill = plan.skills.get(row, default_skill(run_name, step))
        for task in plan.labels:
            table = predictions(plan, row, task, truth[task], difficulty[task], skill, rng)
            half = len(table) // 2
            for part, rows_of_part in enumerate((table[:half], table[half:])):
                run.write_predictions(run_name if step is None else f"step-{step}", task, part, rows_of_part)
    return folder
