"""`--json`: the result and nothing else on stdout, what is said on the way on stderr; and what a shell completes."""

import json

import pandas as pd
import pytest
import yaml

from qwen2vl_sft import cli
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir


@pytest.fixture
def toy(project):
    suite = write_toy_suite(project / "suites", rows=6)
    schedule = {"steps": 2, "micro_batch": 2, "log_every": 1, "warmup_ratio": 0}
    recipe = {"suite": str(suite), "experiment": "e", "run": "mix", "model": {"device": "cpu"}, "schedule": schedule}
    (project / "recipes").mkdir()
    (project / "recipes/toy.yaml").write_text(yaml.safe_dump(recipe))
    (project / "sweep.yaml").write_text(yaml.safe_dump({"experiment": "s", "recipe": "recipes/toy.yaml", "matrix": {"seed": [0, 1]}}))
    api = {"suite": str(suite), "model": "m", "base_url": "http://127.0.0.1:1/v1", "key_variable": None}
    (project / "api.yaml").write_text(yaml.safe_dump(api))
    return project


@pytest.mark.slow
def test_every_result_as_json_and_nothing_else(toy, capsys):
    "One run from data to a scoreboard, each command asked for JSON."

    def asked(*arguments: str):
        assert cli.main([*arguments, "--json"]) == 0, capsys.readouterr().err
        shown = capsys.readouterr()
        return json.loads(shown.out), shown.err

    prepared, said = asked("prepare", "suites/toy.yaml", "--workers", "0")
    assert prepared["tasks"]["colour"]["test"]["rows"] == 6 and prepared["quarantined"] == 0 and "toy" in said
    plan, _ = asked("plan", "recipes/toy.yaml")
    assert plan["micro_batch"] == 2 and plan["estimate"]["weights"] > 1e6
    planned, _ = asked("sweep", "sweep.yaml", "--dry-run")
    assert [(one["run"], one["state"], one["minutes"]) for one in planned] == [("mix-seed-0", "missing", None), ("mix-seed-1", "missing", None)]
    forecast, _ = asked("score-api", "e", "api.yaml", "--dry-run")
    assert forecast[-1]["task"] == "total" and forecast[-1]["requests"] == sum(one["requests"] for one in forecast[:-1]) == 12
    run, said = asked("train", "recipes/toy.yaml")
    assert (run["state"], run["step"], run["folder"]) == ("finished", 2, str(toy / "runs/e/mix")) and said
    for split in ("test", "validation"):
        scored, _ = asked("score", "e", "--split", split)
        closed = next(one for one in scored if (one["run"], one["checkpoint"], one["task"]) == ("mix", "step-2", "colour"))
        outcomes = RunDir(toy / "runs/e/mix").predictions("step-2", "colour", "closed", split)["outcome"]
        assert closed["n"] == 6 and closed["correct"] == (outcomes == "correct").sum() and sum(closed["outcomes"].values()) == 6
    calibrated, _ = asked("calibrate", "e", "--task", "colour")
    assert {one["run"] for one in calibrated} >= {"mix"} and all(one["temperature"] > 0 for one in calibrated)
    board, _ = asked("compare", "e")
    written = pd.read_csv(toy / "runs/e/scoreboard.csv").set_index("model")
    assert {row["model"]: round(row["mean"], 1) for row in board["rows"]} == written["mean_score"].to_dict()
    assert board["report"] == str(toy / "runs/e/report.html") and board["findings"]
    exported, _ = asked("export", "e/mix/step-2")
    assert exported["kind"] == "adapter" and (toy / "runs/e/mix/exports/step-2-adapter/export.json").exists()
    labelled, _ = asked("label", "e/mix/step-2", str(toy / "suites/pictures"), "--task", "colour", "--out", str(toy / "l.csv"))
    assert sum(one["images"] for one in labelled["labels"]) == len(list((toy / "suites/pictures").glob("*")))
    assert cli.main(["export", "e/mix/step-3", "--json"]) == 2
    assert capsys.readouterr().out == "", "an error leaves stdout empty"


def test_what_a_shell_completes(toy, capsys, monkeypatch):
    RunDir(toy / "runs/e/mix").write_config(f"suite: {toy / 'suites/toy.yaml'}\n")
    (toy / "runs/e/mix/checkpoints/step-2").mkdir(parents=True)

    def completed(words: str) -> list[str]:
        given = ["qwen2vl-sft", *words.split(" ")]
        monkeypatch.setenv("COMP_WORDS", " ".join(given))
        monkeypatch.setenv("COMP_CWORD", str(len(given) - 1))
        monkeypatch.setenv("_QWEN2VL_SFT_COMPLETE", "complete_bash")
        with pytest.raises(SystemExit):
            cli.main([])
        return capsys.readouterr().out.split()

    monkeypatch.chdir(toy)
    assert completed("score-") == ["score-api"]
    assert completed("score ") == ["e"] and completed("runs e/") == ["e/mix"]
    assert completed("train recipes/t") == ["recipes/toy.yaml"] and "recipes/demo-mix.yaml" in completed("train recipes/demo")
    assert completed("train recipes/toy.yaml learning_") == ["learning_rate="]
    assert completed("label e/") == ["e/mix/step-2"] and completed("calibrate e --task ") == ["colour", "word"]
    assert "--dry-run" in completed("sweep --d") and completed("score nothing") == []
