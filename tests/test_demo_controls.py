"""Two short trainings on the demo suite: with its labels the model learns, with permuted labels it stays at chance."""

import math
from collections import Counter

import pytest

from qwen2vl_sft.config import ScoringConfig, load_recipe
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.scoring.experiment import score_run
from qwen2vl_sft.tasks import load_suite
from qwen2vl_sft.training.trainer import train

pytest.importorskip("mlxtend", reason="extra `demo` is not installed: pip install -e .[demo]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def excess(tmp_path_factory, root):
    "For a training with these labels: how far pooled closed-set accuracy lies above the commonest label's share, in standard errors."
    project = tmp_path_factory.mktemp("controls")

    def standard_errors(shuffle_labels: bool) -> float:
        name = "shuffled" if shuffle_labels else "true"
        changes = {"suite": str(root / "suites/demo.yaml"), "run": name, "steps": 60, "save_at": [], "shuffle_labels": shuffle_labels}
        run = train(load_recipe(root / "recipes/demo-mix.yaml", changes))
        prepared = prepare(load_suite(root / "suites/demo.yaml"))
        score_run(run, prepared, ScoringConfig(max_new_tokens=4))
        above = variance = 0.0
        for task in prepared.suite.tasks:
            if task.is_closed:
                answers = run.predictions("step-60", task.name)
                chance = max(Counter(answers["target"]).values()) / len(answers)
                above += (answers["outcome"] == "correct").sum() - chance * len(answers)
                variance += chance * (1 - chance) * len(answers)
        return above / math.sqrt(variance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2VL_SFT_ROOT", str(project))
        yield standard_errors


def test_permuted_labels_stay_at_chance(excess):
    assert excess(shuffle_labels=True) < 3.5


def test_true_labels_are_learnt(excess):
    assert excess(shuffle_labels=False) > 8
