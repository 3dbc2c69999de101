"""The ways of use agree: JupyterLab, papermill, the command line and Python leave the same run directory."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from lab import CHROMIUM, Lab, jupyterlab
from nbclient import NotebookClient
from notebooks import ROOT

from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROGRAMS = Path(sys.executable).parent
TUTORIAL = "03_what_the_model_sees"
RECIPE = """
suite: suites/demo.yaml
experiment: demo
run: mix
schedule: {steps: 2, save_at: [1], micro_batch: 4, log_every: 1}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A project with our run notebooks as they are, in which the demo's suite and recipe are a toy's."
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs/runs", folder / "nbs/runs")
    (folder / "nbs/tutorials").mkdir()
    shutil.copy(ROOT / f"nbs/tutorials/{TUTORIAL}.ipynb", folder / "nbs/tutorials")
    (folder / "recipes").mkdir()
    (folder / "recipes/demo-mix.yaml").write_text(RECIPE)
    write_toy_suite(folder / "suites", rows=8).rename(folder / "suites/demo.yaml")
    return folder


@pytest.fixture(scope="module")
def opened(checkout, tmp_path_factory):
    "The four notebooks run top to bottom where they lie, parameters as they stand: in JupyterLab if there is a browser."
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("MPLBACKEND", raising=False)  # of the tests; a reader's kernel shows figures
        return executed_notebooks(checkout, tmp_path_factory.mktemp("jupyter"))


def executed_notebooks(checkout: Path, home: Path) -> dict:
    names = [f"nbs/runs/{name}.ipynb" for name in ("prepare", "train", "score", "compare")]
    if CHROMIUM:
        return in_jupyterlab([f"nbs/tutorials/{TUTORIAL}.ipynb", *names], checkout, home)
    executed = {}
    for name in names:
        notebook = nbformat.read(checkout / name, as_version=4)
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(checkout / "nbs/runs")}})
        executed[Path(name).stem] = client.execute()
    return executed


def in_jupyterlab(names: list[str], checkout: Path, home: Path) -> dict:
    "Open each in JupyterLab and click Run All Cells; no error may show. Pictures of the pages stay in `home`."
    sync = pytest.importorskip("playwright.sync_api", reason="lacks playwright")
    executed = {}
    with sync.sync_playwright() as playwright, jupyterlab(checkout, home) as address:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        lab = Lab(chromium, address, checkout)
        for name in names:
            executed[Path(name).stem] = lab.run_all(name)
            lab.page.screenshot(path=home / f"{Path(name).stem}.png")
            assert not lab.errors(), lab.errors()
            executed[f"pictures of {Path(name).stem}"] = lab.page.locator(".jp-OutputArea img[src^='data:image/png']").count()
        executed["tables on the page"] = "\n".join(lab.page.locator(".jp-RenderedHTMLCommon table").all_inner_texts())
        chromium.close()
    return executed


def outputs(notebook) -> str:
    return "\n".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))


def run(command: list, folder: Path) -> str:
    "Run a program in a folder; its output, or a failure with it."
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_notebooks_run_top_to_bottom_where_they_lie(opened, checkout):
    assert "mix(2)" in outputs(opened["compare"]) and (checkout / "runs/demo/report.html").exists()
    assert "learning_rate" in outputs(opened["train"]) and "scored" in outputs(opened["score"])
    drawn = [cell for cell in opened["compare"].cells if cell.cell_type == "code" and re.match(r"plots\.|test = ", cell.source)]
    shown = ["image/png" in out.get("data", {}) for cell in drawn for out in cell.outputs[-1:]]
    assert len(drawn) == 10 and shown == [True] * 10, "each of the ten plots is drawn from the run directories alone"
    assert not (checkout / "nbs/runs/runs").exists() and not (checkout / "nbs/runs/prepared").exists()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="lacks chromium (apt-get install chromium)")
def test_jupyterlab_ran_every_cell_and_shows_the_scoreboard(opened):
    for name in (TUTORIAL, "prepare", "train", "score", "compare"):
        cells = [cell for cell in opened[name].cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), name
        assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"], name
    assert "mix(2)" in outputs(opened["compare"]) and "models" in opened["tables on the page"]
    assert opened[f"pictures of {TUTORIAL}"] >= 1 and "background:#e69f00" in outputs(opened[TUTORIAL]), "the label mask"


def test_every_way_gives_the_same_run(opened, checkout):
    papermill = [PROGRAMS / "papermill", "--no-progress-bar", "nbs/runs/train.ipynb", "out.ipynb"]
    run([*papermill, "-p", "run", "by-papermill", "-p", "learning_rate", "1e-4"], checkout)
    run([PROGRAMS / "qwen2vl-sft", "train", "recipes/demo-mix.yaml", "run=by-command", "learning_rate=1e-4"], checkout)
    run([PROGRAMS / "qwen2vl-sft", "train", "../recipes/demo-mix.yaml", "run=by-notebook", "learning_rate=1e-4", "--notebook"], checkout / "nbs")
    code = "from qwen2vl_sft.config import load_recipe; from qwen2vl_sft.training.trainer import train\n"
    run([sys.executable, "-c", code + "train(load_recipe('recipes/demo-mix.yaml', {'run': 'by-python'}))"], checkout)
    runs = {name: RunDir(checkout / "runs/demo" / name) for name in ("mix", "by-papermill", "by-command", "by-notebook", "by-python")}
    configs = {each.config_path.read_text().replace(f"run: {name}", "run: X") for name, each in runs.items()}
    assert len(configs) == 1, "1e-4 is the default: given as text, as YAML or not at all"
    weights = {(each.checkpoints()[2] / "adapter_model.safetensors").read_bytes() for each in runs.values()}
    assert len(weights) == 1
    files = {name: {p.name for p in each.path.iterdir() if not p.name.startswith(("notebook", "."))} for name, each in runs.items()}
    assert all(names - {"predictions"} == files["by-command"] for names in files.values()), files
    assert {each.status().state for each in runs.values()} == {"finished"}
    assert (runs["by-notebook"].path / "notebook.html").exists()
