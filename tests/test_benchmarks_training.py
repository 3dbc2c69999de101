"""The benchmark of training runs at a tiny size: the arms train on the same samples and give the same losses."""

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.slow
def test_ours_and_the_stock_recipe_give_the_same_losses(root, tmp_path):
    out = tmp_path / "training.json"
    command = [sys.executable, str(root / "benchmarks" / "training.py"), "--shape", "tiny", "--steps", "2", "--warm-up", "1", "--batch", "4", "--threads", "1"]
    only = ["--only", "ours, cold cache", "stock", "--no-memory", "--out", str(out)]
    done = subprocess.run(command + only, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert set(result["arms"]) == {"ours, cold cache", "stock"} and result["losses_compared"] == 3
    assert all(row["largest_loss_difference"] < 1e-3 and row["samples_per_second"] > 0 and row["peak_mb"] > 100 and row["steps"] == 2 for row in result["arms"].values())
    assert "ours, cold cache : stock" in result["ratios"] and str(tmp_path.parents[2]) not in out.read_text()
    assert "CUDA: not measured" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_it_says_so(root):
    done = subprocess.run([sys.executable, str(root / "benchmarks" / "training.py"), "--device", "cuda"], capture_output=True, text=True)
    assert done.stdout.startswith("not measured")
