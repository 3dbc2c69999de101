"""The scoring benchmark runs, at a tiny size, and both sides give the same answers."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_benchmark_runs_and_both_sides_agree(root, tmp_path):
    out = tmp_path / "scoring.json"
    command = [sys.executable, "benchmarks/scoring.py", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    runs = [value for key, value in result["against_generate"].items() if key.endswith("checkpoints")]
    assert len(runs) == 2 and all(run["same_answers"] == 1 for run in runs)
    assert all(found["largest_difference_nats"] < 1e-3 for found in result["against_one_forward_a_label"].values())
    several = result["several_tasks_on_one_picture"]
    assert several["3 tasks"]["largest_difference_nats"] < 1e-3 and {"stock", "task by task", "shared"} == set(several["1 tasks"]["seconds"])
    assert result["bfloat16"]["largest_margin_of_a_changed_label"] < 0.05
    assert len(result["targets"]) == 4 and {"tree", "suffixes"} <= set(result["tree_or_suffixes"]["10"])
