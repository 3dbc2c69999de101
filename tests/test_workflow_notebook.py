"""run_notebook: nothing starts with bad parameters, nothing ends with a false status."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from notebooks import ROOT, run_notebooks

from qwen2vl_sft.config import RunConfig, setting_path
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.workflow.notebook import (
    PLANS,
    SCORING_PARAMETERS,
    SHORT_NAMES,
    notebook_parameters,
    plan_notebook,
    run_notebook,
    scoring_config,
    training_config,
    workbench_file,
    write_html,
)

TRAINING_CELL = """
recipe = "recipe.yaml"
experiment = None
run = None
steps = None
learning_rate = None
overrides = {}
"""


def write_notebook(path: Path, *code: str, parameters: str = "number = 1") -> Path:
    cells = [nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(textwrap.dedent(text).strip()) for text in code]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def training(project):
    "A project whose train notebook runs the given code in place of training."
    (project / "suite.yaml").write_text('name: s\ntasks: [{name: t, question: "Which?", labels: ["a", "b"]}]\n')
    (project / "recipe.yaml").write_text("suite: suite.yaml\nexperiment: e\nrun: r\nschedule: {steps: 5}\n")

    def make(code: str) -> RunDir:
        head = f"from qwen2vl_sft.rundir import RunDir\nrunning = RunDir({str(project / 'runs/e/r')!r}).running"
        write_notebook(project / "nbs/runs/train.ipynb", head, code, "print('after')", parameters=TRAINING_CELL)
        return RunDir(project / "runs/e/r")

    return make


# --- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in run_notebooks() if path.stem in PLANS], ids=lambda path: path.stem)
def test_parameters_cells_agree_with_the_configuration(path):
    own = {"prepare": {"suite": str}, "train": {"recipe": str, "overrides": dict}, "score": {"experiment": str}, "compare": {"experiment": str}}
    defaults = notebook_parameters(path)
    settings = defaults.keys() - own[path.stem].keys()
    assert {name: type(defaults[name]) for name in own[path.stem]} == own[path.stem]
    assert all(defaults[name] is None for name in settings), "None keeps the recipe's value"
    if path.stem == "train":
        assert all(setting_path(SHORT_NAMES.get(name, name)) for name in settings)
        assert (ROOT / defaults["recipe"]).is_file() and training_config(defaults["recipe"], defaults["overrides"], **dict.fromkeys(settings)) == training_config(defaults["recipe"])
    else:
        assert settings == set(SCORING_PARAMETERS if path.stem == "score" else ())


def test_the_pretraining_cell_agrees_with_its_settings():
    from qwen2vl_sft.model.small import Pretraining

    defaults = notebook_parameters(ROOT / "nbs/runs/pretrain.ipynb")
    assert defaults.pop("folder") is None
    held = vars(Pretraining())
    assert {name: (held[name], type(held[name])) for name in defaults} == {name: (value, type(value)) for name, value in defaults.items()}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lerning_rate": 1e-4}, "train.ipynb has no parameter 'lerning_rate'. Did you mean 'learning_rate'?"),
        ({"weight_decay": 0.1}, "pass overrides={'schedule.weight_decay': ...}"),
        ({"learning_rate": "fast"}, "schedule > learning_rate: Input should be a valid number"),
        ({"steps": "3.5"}, "schedule > steps: Input should be a valid integer"),
        ({"steps": -1}, "schedule > steps"),
        ({"overrides": {"setps": 3}}, "unknown setting 'setps'. Did you mean 'steps'?"),
        ({"overrides": "rank"}, "override 'rank' is not of the form setting=value"),
        ({"overrides": 7}, "overrides: a mapping"),
        ({"recipe": "recipes/none.yaml"}, "recipes/none.yaml: no such file"),
        ({"run": "../../etc"}, "run: String should match pattern"),
        ({"experiment": "a/b"}, "experiment: String should match pattern"),
    ],
)
def test_bad_parameters_start_nothing(training, project, parameters, message):
    training("print('never')")
    with pytest.raises(InputError) as caught:
        run_notebook("train", parameters)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (project / "runs").exists()


@pytest.mark.parametrize("path", run_notebooks(), ids=lambda path: path.stem)
def test_papermills_own_help_lists_every_parameter(path):
    "Annotations such as Literal and X | None vanish from it, so there are none: a comment says what a parameter takes."
    import papermill

    shown, defaults = papermill.inspect_notebook(str(path)), notebook_parameters(path)
    assert list(shown) == list(defaults)
    assert all(ast.literal_eval(one["default"]) == defaults[name] for name, one in shown.items())
    assert {one["inferred_type_name"] for one in shown.values()} == {"None"}, "papermill's word for no annotation"


def test_what_papermill_takes_for_text_is_understood(training):
    "`1e-4` from YAML and `true` from -p reach a notebook as text."
    from papermill.cli import _resolve_type

    rate, switch = yaml.safe_load("1e-4"), _resolve_type("true")
    assert (rate, switch) == ("1e-4", "true"), "papermill reads them otherwise now: this test, and a note in the README, may go"
    training("print('never')")
    plan = plan_notebook(workbench_file("nbs/runs/train.ipynb"), {"learning_rate": rate, "overrides": {"double_quantisation": switch}})
    assert plan.parameters["learning_rate"] == 1e-4 and training_config("recipe.yaml", **plan.parameters).method.double_quantisation is True


def test_text_becomes_what_the_setting_is(training):
    training("print('never')")
    given = {"learning_rate": "1e-4", "steps": "7", "overrides": "{double_quantisation: 'false', targets: [q_proj]}"}
    plan = plan_notebook(workbench_file("nbs/runs/train.ipynb"), given)
    assert plan.parameters["learning_rate"] == 1e-4 and plan.parameters["steps"] == 7
    config = training_config("recipe.yaml", **plan.parameters)
    assert config.schedule.steps == 7 and config.method.double_quantisation is False and config.method.targets == ["q_proj"]


def test_scoring_parameters_are_checked():
    assert scoring_config() == RunConfig(suite="s").scoring
    with pytest.raises(InputError, match="scoring: rule"):
        scoring_config(rule="guess")


def test_parameters_cell_may_only_assign_literals(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", parameters="import os\nhome = os.getcwd()")
    with pytest.raises(InputError, match="may only assign literals"):
        notebook_parameters(path)


# --- execution ----------------------------------------------------------------------------------


def test_record_and_status_of_a_good_run(training, capfd):
    run = training("with running('training'):\n    print('loss', learning_rate)")
    executed = run_notebook("train", {"learning_rate": "1e-4"})
    assert executed == run.path / "notebook.ipynb" and run.status().state == "finished"
    assert "loss 0.0001" in executed.read_text() and "loss 0.0001" in capfd.readouterr().out
    assert "loss 0.0001" in executed.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("with running('training'): raise OSError('disk full')", RunFailure, r"OSError: disk full \(traceback in .*notebook.ipynb\)"),
        ("from qwen2vl_sft.core import InputError\nwith running('training'): raise InputError('row 7: no label')", InputError, "^row 7: no label$"),
        ("import os, signal\nwith running('training'): os.kill(os.getpid(), signal.SIGKILL)", RunFailure, "kernel died"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", RunFailure, "kernel died"),
    ],
    ids=["exception", "bad input", "killed while running", "killed before running"],
)
def test_a_failed_notebook_leaves_a_true_record(training, code, error, message):
    run = training(code)
    with pytest.raises(error, match=message):
        run_notebook("train")
    status = json.loads(run.status_path.read_text())
    assert status["state"] == "failed" and status["message"]
    executed = nbformat.read(run.path / "notebook.ipynb", as_version=4)
    assert executed.metadata.papermill.exception is True
    assert "failed" in [cell.metadata.papermill.status for cell in executed.cells if "papermill" in cell.metadata]
    assert "after" not in "".join(str(cell.get("outputs")) for cell in executed.cells)
    assert (run.path / "notebook.html").exists()


def test_a_refused_second_start_leaves_the_first_ones_record(training):
    "Refused before the kernel by a held lock, and in the kernel by a configuration that is another."
    run = training("from qwen2vl_sft.core import InputError\nif steps: raise InputError('the run exists with')\nwith running('training'): print('the first')")
    record = run_notebook("train")
    with run.running("training"), pytest.raises(RunFailure, match=r"another process \(pid \d+\) is working"):
        run_notebook("train")
    with pytest.raises(InputError, match="the run exists with"):
        run_notebook("train", {"steps": 3})
    assert "the first" in record.read_text() and "the first" in record.with_suffix(".html").read_text()
    assert run.status().state == "finished" and not list(run.path.glob(".*.before")) and not list(run.path.glob("*-refused*"))


def test_a_start_that_breaks_before_a_run_began_names_the_notebook_that_has_its_traceback(training):
    training("if steps: raise OSError('no such device')\nwith running('training'): print('the first')")
    record = run_notebook("train")
    with pytest.raises(RunFailure, match=r"OSError: no such device \(traceback in (.*)\)") as error:
        run_notebook("train", {"steps": 3})
    named = Path(re.search(r"traceback in (.*)\)", str(error.value))[1])
    assert "no such device" in named.read_text() and named != record and "the first" in record.read_text()
    run_notebook("train")
    assert not named.exists(), "of an earlier start"


def test_a_kernel_that_dies_at_its_start_is_started_again(training, tmp_path, monkeypatch, capfd):
    "As one does that lost a race for a port. The first one ends before it is up; the second runs the notebook."
    folder, marker = tmp_path / "first", tmp_path / "was-started"
    folder.mkdir()
    code = f"import os, pathlib, sys\nmarker = pathlib.Path({str(marker)!r})\n"
    code += "if 'ipykernel_launcher' in ' '.join(sys.orig_argv) and not marker.exists():\n    marker.touch()\n    os._exit(1)\n"
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    run = training("with running('training'): pass")
    run_notebook("train")
    assert marker.exists() and run.status().state == "finished"
    assert "the kernel didn't start; trying again (1 of 2)" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_stage(training, project, number):
    "The stage sees KeyboardInterrupt, has time to save, and the caller's process ends as interrupted."
    run = training(
        """
        import time
        with running('training'):
            try:
                print('training', flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                time.sleep(3)
                open('saved', 'w').close()
                raise
        """
    )
    code = "import sys\nfrom qwen2vl_sft.workflow.notebook import run_notebook\ntry: run_notebook('train')\nexcept KeyboardInterrupt: sys.exit(130)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=project, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "training" in line:
            break
    started = time.time()
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(timeout=60) == 130 and time.time() - started < 30
    assert (project / "saved").exists()
    assert run.status().state == "interrupted"


def test_output_arrives_while_the_cell_runs(tmp_path):
    notebook = write_notebook(tmp_path / "slow.ipynb", "import time\nprint('first', flush=True)\ntime.sleep(4)\nprint('last')")
    code = f"from qwen2vl_sft.workflow.notebook import run_notebook\nrun_notebook({str(notebook)!r}, output={str(tmp_path / 'out')!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    seen = {line.strip(): time.time() for line in process.stdout}
    assert process.wait() == 0 and seen["last"] - seen["first"] > 3


def test_kernel_is_this_interpreter_in_the_project(project, tmp_path, monkeypatch):
    "A kernelspec named python3 that points elsewhere is not used; the working directory doesn't matter."
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    notebook = write_notebook(tmp_path / "where.ipynb", "import os, sys\nprint(sys.executable, os.getcwd(), os.environ['QWEN2VL_SFT_ROOT'])")
    executed = run_notebook(notebook, output=tmp_path / "out").read_text()
    assert f"{sys.executable} {project} {project}" in executed


def test_html_needs_no_network(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("$x^2$ and <b>bold</b>")])
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    nbformat.write(notebook, tmp_path / "n.ipynb")
    page = write_html(tmp_path / "n.ipynb").read_text()
    assert not re.findall(r"<script|<link[^>]+href=.http|@import url\(.?http", page)
    assert len(page) < 2_000_000


def test_plain_papermill_runs_the_notebooks_too(project):
    "A typo in the recipe's name stops at the first cell, with the wrapper's words."
    papermill = Path(sys.executable).with_name("papermill")
    source = next(path for path in run_notebooks() if path.stem == "compare")
    command = [papermill, source, project / "out.ipynb", "-p", "experiment", "nowhere", "--no-progress-bar"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode != 0 and "no experiment 'nowhere'" in done.stderr
    cells = nbformat.read(project / "out.ipynb", as_version=4).cells
    (error,) = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs if output.output_type == "error"]
    assert error.traceback == [f"InputError: {error.evalue}"] and "\n" not in error.evalue, "one line, as the command's"
