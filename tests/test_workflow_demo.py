"""The whole pipeline through papermill, at reduced size; started again it does only what is missing."""

import re
import shutil

import nbformat
import pandas as pd
import pytest

from qwen2vl_sft.core import InputError
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.workflow import demo as demo_module
from qwen2vl_sft.workflow.demo import REDUCED_DEMO, DemoSettings, demo, demo_stages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A project in which the reduced demo has run; QWEN2VL_SFT_ROOT points there for the module."
    project = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2VL_SFT_ROOT", str(project))
        report = demo(reduced=True)
        yield project, report


@pytest.fixture
def started(monkeypatch):
    "Names of the notebooks that are started."
    names, run_notebook = [], demo_module.run_notebook
    monkeypatch.setattr(demo_module, "run_notebook", lambda name, *rest: (names.append(name), run_notebook(name, *rest)))
    return names


def test_scoreboard_has_every_row_and_task(finished):
    report = finished[1]
    board = pd.read_csv(report.parent / "scoreboard.csv")
    steps = {(row.model, "" if pd.isna(row.step) else str(int(row.step))) for row in board.itertuples()}
    trained = {(model, step) for model in ("mix", "full") for step in ("2", "4")}
    assert trained <= steps and {"base", "majority", "nearest_neighbour"} <= {model for model, _ in steps}
    assert len(board.columns) >= 9 and board.columns[:2].tolist() == ["model", "step"]
    assert board["mean_score"].between(0, 100).all()
    assert len(list((report.parent / "plots").glob("*.png"))) >= 4


def test_runs_are_recorded(finished):
    project, report = finished
    for name in ("mix", "full"):
        run = RunDir(report.parent / name)
        assert run.status().state == "finished" and list(run.checkpoints()) == [2, 4]
        executed = nbformat.read(run.path / "notebook.ipynb", as_version=4)
        assert not executed.metadata.papermill.exception
        assert "<script src" not in (run.path / "notebook.html").read_text()
    assert {"score.ipynb", "score.html", "compare.ipynb", "compare.html"} <= {p.name for p in report.parent.iterdir()}
    assert (project / "prepared/demo.ipynb").exists()


def test_report_needs_no_network(finished):
    assert not re.findall(r"(?:src|href)=[\"']?https?:", finished[1].read_text())


def test_second_start_runs_nothing(finished, started, capsys):
    assert demo(reduced=True) == finished[1]
    shown = capsys.readouterr().out
    assert started == [] and shown.count("done before, kept") == 5
    assert shown.rstrip().splitlines()[-1] == f"report: {finished[1]}"
    assert "mix(4)" in shown and "nearest_neighbour" in shown


def test_missing_predictions_are_scored_again(finished, started):
    run = RunDir(finished[1].parent / "mix")
    before = run.predictions("step-2", run.predicted()[0][1])
    shutil.rmtree(run.predictions_folder("step-2", run.predicted()[0][1]))
    demo(reduced=True)
    after = run.predictions("step-2", run.predicted()[0][1])
    assert started == ["score", "compare"] and after["prediction"].tolist() == before["prediction"].tolist()


def test_a_missing_checkpoint_is_trained_again(finished, started):
    run = RunDir(finished[1].parent / "full")
    shutil.rmtree(run.checkpoints()[4])
    demo(reduced=True)
    assert started[0] == "train" and list(run.checkpoints()) == [2, 4]


def test_stages_are_checked_before_any_starts(finished, started):
    settings = DemoSettings("other", training={**REDUCED_DEMO.training, "steps": 0})
    with pytest.raises(InputError, match="steps"):
        demo(settings=settings)
    assert started == []
    assert [stage.notebook for stage in demo_stages(REDUCED_DEMO)] == ["prepare", "train", "train", "score", "compare"]
