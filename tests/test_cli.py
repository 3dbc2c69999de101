"""The command line's manners: exit codes, one clear line, help with defaults and an example."""

import inspect
import re
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from qwen2vl_sft import cli
from qwen2vl_sft.comparison.scoreboard import display_width
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.rundir import RunDir, Status, write_status
from qwen2vl_sft.workflow.runs import delete, runs, runs_text, untidy

COMMANDS = [one.name or one.callback.__name__.replace("_", "-") for one in cli.app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_exit_codes_and_json(command, capsys):
    assert cli.main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: qwen2vl-sft {command}" in shown
    assert "Exit codes: 0 done, 1 failed, 2 bad input" in shown and "130 interrupted" in shown
    assert "--json" in shown, "every command has a result that a script can read"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_states_every_default(command, capsys):
    "An option that may be left out says what it is then, a flag and an optional argument aside."
    cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    function = next(one.callback for one in cli.app.registered_commands if (one.name or one.callback.__name__.replace("_", "-")) == command)
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(parameter.default, (int, float, str)) and not isinstance(parameter.default, bool):
            assert re.search(rf"\[default: {re.escape(str(parameter.default))}[];]", shown), f"{command}: {name}"  # a range stands after the default


def test_help_states_defaults(capsys):
    cli.main(["score", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[default: auto]" in shown and "[default: 32]" in shown and "[default: (all rows)]" in shown


def test_every_command_is_listed(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'recipe'"),
        (["train", "recipes/nowhere.yaml"], "recipes/nowhere.yaml: no such file"),
        (["train", "recipes/demo-mxi.yaml"], "Did you mean 'recipes/demo-mix.yaml'?"),
        (["train", "recipe.yml"], "Did you mean 'recipe.yaml'?"),
        (["prepare", "suit.yaml"], "Did you mean 'suite.yaml'?"),
        (["score", "demo", "--limt", "3"], "No such option: --limt (Possible options: --limit, --split)"),
        (["score", "demo", "--rule", "fre"], "Input should be 'auto', 'closed', 'free' or 'both'"),
        (["train", "recipe.yaml", "setps=3"], "unknown setting 'setps'. Did you mean 'steps'?"),
        (["train", "recipe.yaml", "steps=many"], "schedule > steps: Input should be a valid integer"),
        (["train", "recipe.yaml", "steps"], "override 'steps' is not of the form setting=value"),
        (["train", "recipe.yaml", "--notebook", "setps=3"], "unknown setting 'setps'"),
        (["prepare", "suites/none.yaml"], "suites/none.yaml: no such file"),
        (["score", "demp"], "no experiment 'demp'"),
        (["score", "demo", "--limit", "few"], "Invalid value for '--limit'"),
        (["score", "demo", "--rule", "guess"], "scoring: rule"),
        (["score-api", "demo", "recipes/api/nowhere.yaml"], "recipes/api/nowhere.yaml: no such file"),
        (["score-api", "demo", "recipe.yaml"], "unknown setting suiet. Did you mean 'suite'?"),
        (["label", "demo/mix/step-1", "photos"], "no checkpoint 'demo/mix/step-1'"),
        (["compare", "../outside"], "no experiment '../outside'"),
        (["runs", "demp"], "Did you mean 'demo'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(project, capsys, arguments, message):
    (project / "runs/demo").mkdir(parents=True)
    (project / "suite.yaml").write_text('name: s\ntasks: [{name: t, question: "Which?", labels: ["a", "b"]}]\n')
    (project / "recipe.yaml").write_text("suiet: suite.yaml\n" if arguments[0] == "score-api" else "suite: suite.yaml\n")
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("row 7: no label"), 2, "error: row 7: no label\n"),
        (RunFailure("loss is not a number\nat step 3"), 1, "error: loss is not a number at step 3\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command continues where it stopped\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(monkeypatch, capsys, error, code, message):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("qwen2vl_sft.workflow.runs.runs", fail)
    assert cli.main(["runs"]) == code
    assert capsys.readouterr().err == message


def test_a_misspelt_file_or_folder_is_suggested(tmp_path, project, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "work").mkdir()
    for name in ("mine.yaml", "mine.csv", "pets.csv"):
        (tmp_path / "data" / name).write_text("")
    monkeypatch.chdir(tmp_path / "work")
    for arguments, meant in {
        ("train", "../data/mine.yml"): "../data/mine.yaml", ("prepare", "../dta/mine.yaml"): "../data", ("prepare", "--from", "../dta"): f"{tmp_path}/data",
        ("prepare", "--from", "../data/pet.csv"): f"{tmp_path}/data/pets.csv", ("import-config", "../data/mime.yaml"): "../data/mine.yaml",
    }.items():  # fmt: skip
        assert cli.main(list(arguments)) == 2
        assert f"Did you mean '{meant}'?" in capsys.readouterr().err, arguments


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("qwen2vl_sft.workflow.runs.runs", lambda experiment: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["runs"])


def test_terminated_command_exits_as_interrupted(tmp_path):
    "SIGTERM is an interrupt, and the exit code is the process's."
    code = "import sys, time, qwen2vl_sft.workflow.runs as r\nfrom qwen2vl_sft.cli import main\n"
    code += "r.runs = lambda e: (print('ready', flush=True), time.sleep(30))\nsys.exit(main(['runs']))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130 and "the same command continues" in process.stderr.read()


def test_program_is_installed_and_answers_at_once(tmp_path):
    "Importing torch would take this over two seconds on a slow machine."
    program = Path(sys.executable).with_name("qwen2vl-sft")
    code = "import sys; from qwen2vl_sft.cli import main; main(['--help']); assert not {'torch', 'papermill'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([program, "runs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "no runs yet\n"


# --- the list of runs ------------------------------------------------------------------------------


def test_runs_shows_true_states(project, capsys):
    for name, state in (("good", "finished"), ("killed", "running"), ("stopped", "interrupted")):
        run = RunDir(project / "runs/demo" / name)
        run.write_config("method: {name: lora}\nschedule: {steps: 20}\n")
        write_status(run, Status(state, "training", pid=2**22 + 1, started=time.time() - 60, heartbeat=time.time() - 30))
    RunDir(project / "runs/demo/base").write_config("kind: base\n")
    (project / "runs/demo/plots").mkdir()
    (project / "runs/demo/good/checkpoints/step-20").mkdir(parents=True)
    states = dict(runs()[["run", "state"]].values)
    # another host's process can't be looked up, so a fresh heartbeat counts; ours is checked
    assert states == {"base": "created", "good": "finished", "killed": "running", "stopped": "interrupted"}
    status = json.loads((project / "runs/demo/killed/status.json").read_text())
    write_status(RunDir(project / "runs/demo/killed"), Status(**{**status, "host": os.uname().nodename}))
    assert cli.main(["runs", "demo"]) == 0
    shown = capsys.readouterr().out
    assert "dead" in shown and "lora" in shown and "base" in shown and "plots" not in shown
    assert runs().set_index("run").loc["good", "step"] == 20


def test_a_silent_run_is_dead_after_a_minute(project):
    "On another machine nobody can ask for the process: its heartbeat decides, and a machine that is slow by half a minute is no dead one."
    run = RunDir(project / "runs/demo/far")
    for age, state in ((30, "running"), (55, "running"), (65, "dead")):
        write_status(run, Status("running", "training", pid=1, host="far-away", started=time.time() - 300, heartbeat=time.time() - age))
        assert run.status().state == state


def test_damaged_run_directories_are_still_listed(project):
    folder = project / "runs/demo/half"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("method: [unclosed")
    (folder / "status.json").write_text('{"state": "runn')
    (folder / "best.json").write_text("")
    odd = project / "runs/demo/odd"
    odd.mkdir()
    (odd / "config.yaml").write_text("method: lora\nschedule: 3\n")
    (odd / "status.json").write_text('{"colour": "red"}')
    (odd / "best.json").write_text('["x"]')
    (odd / "metrics.jsonl").write_bytes(b'17\n\xff\x00\n{"step": 2, "loss": 0.5}\n')
    (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    assert runs("demo")[["run", "step", "message"]].values.tolist() == [["half", 3, "status.json is damaged"], ["odd", 2, "status.json is damaged"]]
    assert "half" in runs_text(runs())


def test_chinese_names_shift_no_column():
    table = pd.DataFrame({"experiment": ["demo", "违规信息"], "run": ["mix", "混合"], "state": ["finished", "running"]})
    starts = {display_width(line[: line.index(state)]) + display_width(state) for line, state in zip(runs_text(table).splitlines(), ["state", "finished", "running"], strict=True)}
    assert len(starts) == 1


def finished_run(project: Path, name: str, settings: str) -> RunDir:
    run = RunDir(project / "runs/demo" / name)
    run.write_config(f"run: {name}\n{settings}\n")
    for stage in ("training", "scoring"):
        with run.running(stage):
            time.sleep(0.3)
    return run


def test_the_time_of_a_run_is_that_of_all_stages(project):
    run = finished_run(project, "mix", "method: {name: lora}")
    status = run.status()
    assert status.stage == "scoring" and status.all_spent.keys() == {"training", "scoring"}
    assert 0.6 <= status.seconds < 20 and all(seconds >= 0.3 for seconds in status.all_spent.values())


def test_runs_of_baselines_show_blanks_and_json_shows_null(project, capsys):
    finished_run(project, "mix", "method: {name: lora}\nschedule: {steps: 20}")
    finished_run(project, "majority", "kind: majority")
    assert cli.main(["runs", "demo"]) == 0
    assert "NA" not in capsys.readouterr().out
    assert cli.main(["runs", "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["majority"]["steps"] is None and rows["mix"]["steps"] == 20


def test_the_difference_of_two_runs(project, capsys):
    finished_run(project, "mix", "method: {name: lora, rank: 8}")
    finished_run(project, "full", "method: {name: full}")
    assert cli.main(["runs", "--diff", "demo/mix", "demo/full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"setting": "method.name", "demo/mix": "lora", "demo/full": "full"},
        {"setting": "method.rank", "demo/mix": 8, "demo/full": None},
    ]
    assert cli.main(["runs", "--diff", "demo/mix", "demo/ful"]) == 2
    assert "Did you mean 'demo/full'?" in capsys.readouterr().err


def test_deleting_asks_and_refuses_a_running_run(project, capsys, monkeypatch):
    run = finished_run(project, "mix", "method: {name: lora}")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert cli.main(["runs", "--delete", "demo/mix"]) == 2 and "add --yes" in capsys.readouterr().err
    with run.running("training"):
        assert cli.main(["runs", "--delete", "demo/mix", "--yes"]) == 2
    assert "is running (pid" in capsys.readouterr().err and run.config_path.exists()
    assert cli.main(["runs", "--delete", "demo/mix", "--yes"]) == 0
    assert not list((project / "runs/demo").iterdir())


def test_a_half_deleted_run_is_no_run(project, capsys, monkeypatch):
    "The disk goes away in the middle, which leaves what a kill would."
    run = finished_run(project, "mix", "method: {name: lora}")
    with monkeypatch.context() as broken:
        broken.setattr("qwen2vl_sft.workflow.runs.shutil.rmtree", lambda path, ignore_errors=False: None if ignore_errors else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            delete(run)
    assert runs("demo").empty and runs().empty and not list((project / "runs").glob("*/*/config.yaml"))
    finished_run(project, "mix", "method: {name: lora}")
    assert cli.main(["runs", "--delete", "demo/mix", "--yes"]) == 0 and not list((project / "runs/demo").iterdir())


class Terminal(io.StringIO):
    "Somebody who types."

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "code", "stays", "said"), [("y\n", 0, False, "removed"), ("n\n", 0, True, "nothing was removed"), ("", 130, True, "interrupted; nothing was removed")])
def test_the_answer_decides(project, capsys, monkeypatch, typed, code, stays, said):
    "The last is Ctrl-D; Ctrl-C takes the same way."
    run = RunDir(project / "runs/demo/mix")
    run.write_config("method: {name: lora}\n")
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    assert cli.main(["runs", "--delete", "demo/mix"]) == code and run.path.exists() == stays
    shown = capsys.readouterr()
    assert said in shown.out + shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(("config", "best"), [(None, None), ("schedule: [unclosed", None), ("schedule: {steps: 40}", "{")])
def test_nothing_is_tidied_where_nobody_knows_what_is_named_or_best(project, config, best):
    run = RunDir(project / "runs/demo/mix")
    for step in (10, 20, 40):
        (run.path / f"checkpoints/step-{step}").mkdir(parents=True)
    for path, text in ((run.config_path, config), (run.path / "best.json", best)):
        if text:
            path.write_text(text)
    assert untidy(run) == []
    run.config_path.write_text("schedule: {steps: 40}")
    (run.path / "best.json").unlink(missing_ok=True)
    assert [path.name for path in untidy(run)] == ["step-10", "step-20"]


def test_tidying_keeps_the_named_the_best_and_the_newest(project, capsys, monkeypatch):
    run = finished_run(project, "mix", "method: {name: lora}\nschedule: {steps: 40, save_at: [10]}")
    for name in ("step-10", "step-15", "step-20", "resume-25", "resume-30"):
        (run.path / "checkpoints" / name).mkdir(parents=True)
    (run.path / "best.json").write_text('{"overall": {"step": 20, "mean_accuracy": 0.8}, "tasks": {}}')
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert cli.main(["runs", "demo", "--tidy"]) == 2
    shown = capsys.readouterr().out
    assert "step-15" in shown and "resume-25" in shown and "step-20" not in shown and len(list(run.path.glob("checkpoints/*"))) == 5
    assert cli.main(["runs", "demo/mix", "--tidy", "--yes", "--json"]) == 0
    said = capsys.readouterr()
    assert [Path(one).name for one in json.loads(said.out)["removed"]] == ["step-15", "resume-25"] and "step-15" in said.err
    assert sorted(path.name for path in run.path.glob("checkpoints/*")) == ["resume-30", "step-10", "step-20"]
