"""What a notebook shows while a run trains, in a real kernel: one picture, kept; an interrupt that reads well."""

import os
import signal
import threading
import time

import nbformat
import pytest
from nbclient import NotebookClient

from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir

SETTINGS = {"steps": 400, "micro_batch": 8, "log_every": 1, "tensorboard": False, "validate_every": 10, "validation_samples": 4}
CODE = """
from qwen2vl_sft.config import load_recipe
from qwen2vl_sft.training.trainer import train
train(load_recipe("recipe.yaml"))
"""


@pytest.mark.slow
def test_an_interrupted_notebook_keeps_the_last_picture_and_a_readable_message(project):
    suite = write_toy_suite(project / "toy", rows=12)
    (project / "recipe.yaml").write_text(RunConfig(suite=str(suite), run="live", model={"device": "cpu"}, method={"name": "lora"}, schedule=SETTINGS).to_yaml())
    run = RunDir(project / "runs/default/live")
    watching = "from qwen2vl_sft.workflow.runs import Run\nRun.load('default/live').watch()"
    cells = [nbformat.v4.new_code_cell(CODE), nbformat.v4.new_code_cell(watching)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(project)}})

    def interrupt():
        while not len(run.validations()):
            time.sleep(0.05)
        os.kill(run.status().pid, signal.SIGINT)  # as the interrupt button does

    threading.Thread(target=interrupt, daemon=True).start()
    client.execute()
    outputs = notebook.cells[0].outputs
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1, "one display handle, however often it was renewed"
    error = next(output for output in outputs if output.output_type == "error")
    assert error.ename == "Interrupted" and "the same command continues from there" in error.evalue
    assert len(error.traceback) == 1 and "Traceback" not in error.traceback[0]
    step = run.status().progress["step"]
    assert run.status().state == "interrupted" and list((run.path / "checkpoints").glob(f"*-{step}"))
    assert f"interrupted, step {step} of 400" in pictures[0].data["text/plain"], "the picture shows where it ended"
    later = [output for output in notebook.cells[1].outputs if "image/png" in output.get("data", {})]
    assert len(later) == 1 and "interrupted" in later[0].data["text/plain"]
