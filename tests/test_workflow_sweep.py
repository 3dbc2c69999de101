"""Sweeps: the run directories are the database, one failure stops no other, a killed sweep goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir, Status, refuse_if_held, write_status
from qwen2vl_sft.workflow import sweep as sweep_room
from qwen2vl_sft.workflow.notebook import settle_status, training_config
from qwen2vl_sft.workflow.sweep import Sweep, load_sweep, plan_sweep, plan_table, run_in_slots, run_sweep, seconds_a_sample, slot_environment

COMMAND = [sys.executable, "-c", "import sys; from qwen2vl_sft.cli import main; sys.exit(main(sys.argv[1:]))"]


@pytest.fixture
def toy(project):
    "A project with a toy suite and a recipe of three steps."
    suite = write_toy_suite(project / "toy", rows=6)
    schedule = {"steps": 3, "save_at": [2], "micro_batch": 2, "log_every": 1, "warmup_ratio": 0}
    recipe = {"suite": str(suite), "run": "mix", "model": {"device": "cpu"}, "schedule": schedule}
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return project


def write_sweep(project, **content):
    file = project / "sweep.yaml"
    file.write_text(yaml.safe_dump({"experiment": "e", "recipe": "recipe.yaml", **content}))
    return file


def started(project, file, *options):
    return subprocess.Popen([*COMMAND, "sweep", str(file), *options], cwd=project, env={**os.environ, "QWEN2VL_SFT_ROOT": str(project)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "at least one run"),
        ({"matrix": {"learning_rat": [1]}}, "Did you mean 'learning_rate'"),
        ({"matrix": {"seed": []}}, "matrix.seed has no values"),
        ({"matrix": {"seed": [0, 0]}}, "two runs are named 'mix-seed-0'"),
        ({"matrix": {"learning_rate": [-1]}}, "learning_rate"),
        ({"matrix": {"seed": [0]}, "slot": 2}, "Did you mean 'slots'"),
        ({"matrix": {"seed": [0]}, "slots": 2, "devices": ["0"]}, "2 slots but 1 devices"),
        ({"runs": [{"recipe": "other.yaml"}]}, "other.yaml: no such file"),
        ({"recipe": None, "runs": [{"seed": 1}]}, "no recipe"),
        ({"matrix": {"max_pixels": [None, 50176]}}, "differ in base model or preprocessing"),
        ({"matrix": {"fold": [0, 1]}}, "hold out different folds (0, 1)"),
        ({"runs": [{"run": "a"}, {"run": "b", "suite": "other.yaml"}]}, "several suites"),
        ({"runs": [{"run": "base"}]}, "'base' is that of a row of the scoreboard"),
        ({"matrix": {"seed": [0]}, "settings": {"experiment": "f"}}, "`experiment` is the sweep's own"),
        ({"matrix": {"seed": [0]}, "scoring": {"limt": 2}}, "Did you mean 'limit'"),
        ({"matrix": {"seed": [0]}, "scoring": {"limit": 0}}, "scoring: limit"),
        ({"matrix": {"seed": [0, 1]}, "exclude": [{"sed": 1}]}, "exclude: unknown setting 'sed'. Did you mean 'seed'"),
        ({"matrix": {"seed": [0, 1]}, "exclude": [{"learning_rate": 1e-4}]}, "exclude names schedule.learning_rate, which the matrix doesn't vary"),
        ({"matrix": {"seed": [0, 1]}, "exclude": [{"seed": 2}]}, "fits no combination"),
    ],
)
def test_a_bad_file_starts_nothing(toy, content, message):
    (toy / "other.yaml").write_text((toy / "toy/toy.yaml").read_text()) if "suites" in message else None
    file = write_sweep(toy, **content)
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        run_sweep(file)
    assert message in str(error.value) and not (toy / "runs").exists()


def test_names_and_settings_follow_the_file(toy):
    matrix = {"learning_rate": [1e-3, 4e-3], "mixture.name": ["equal", "concatenate"]}
    file = write_sweep(toy, settings={"steps": 5}, matrix=matrix, exclude=[{"learning_rate": 1e-3, "mixture.name": "equal"}], runs=[{"run": "all", "method.name": "full", "steps": 7}])
    planned = {one.run.name: one.config for one in plan_sweep(load_sweep(file))}
    assert list(planned) == ["mix-learning_rate-0.001-name-concatenate", "mix-learning_rate-0.004-name-equal", "mix-learning_rate-0.004-name-concatenate", "all"]
    assert planned["mix-learning_rate-0.004-name-equal"].schedule.learning_rate == 4e-3
    assert planned["mix-learning_rate-0.004-name-equal"].mixture.name == "equal"
    assert [config.schedule.steps for config in planned.values()] == [5, 5, 5, 7] and planned["all"].method.name == "full"


def test_what_is_left_out_is_compared_as_settings_not_as_text(toy):
    file = write_sweep(toy, matrix={"schedule.learning_rate": ["1e-3", 4e-3], "seed": [0, 1]}, exclude=[{"learning_rate": 0.001, "schedule.seed": "1"}])
    assert [one.run.name for one in plan_sweep(load_sweep(file))] == ["mix-learning_rate-1e-3-seed-0", "mix-learning_rate-0.004-seed-0", "mix-learning_rate-0.004-seed-1"]


def test_runs_of_before_are_scored_along_so_they_must_fit(toy):
    sweep = load_sweep(write_sweep(toy, matrix={"seed": [0]}))
    earlier = RunDir(toy / "runs/e/earlier")
    earlier.write_config(training_config("recipe.yaml", {"max_pixels": 50176}).to_yaml())
    assert plan_sweep(sweep), "it has no checkpoint"
    (earlier.path / "checkpoints/step-3").mkdir(parents=True)
    with pytest.raises(InputError, match="'mix-seed-0' and 'earlier' differ in base model or preprocessing.*--no-compare"):
        plan_sweep(sweep)
    assert plan_sweep(sweep, compare=False)


def test_a_damaged_run_elsewhere_stops_no_plan(toy):
    for name, text in {"torn": "method: [unclosed", "odd": "schedule: 3", "empty": ""}.items():
        run = RunDir(toy / "runs/other" / name)
        run.path.mkdir(parents=True)
        run.config_path.write_text(text)
        run.metrics_path.write_text('{"step": 1, "time": 1, "loss": 1}\n{"step": 2, "time": 2, "loss": 1}\n17\n')
    assert list(plan_table(plan_sweep(load_sweep(write_sweep(toy, matrix={"seed": [0]})))).state) == ["missing"]


HOLDER = "import sys; from qwen2vl_sft.rundir import RunDir\nwith RunDir(sys.argv[1]).running('training'):\n    print('', flush=True); sys.stdin.readline()\n    if sys.argv[2] == 'interrupted': raise KeyboardInterrupt"
REFUSED = """import subprocess, sys
from qwen2vl_sft.core import RunFailure
from qwen2vl_sft.rundir import RunDir, refuse_if_held
run, ends, number = RunDir(sys.argv[1]), sys.argv[2], sys.argv[3]
if number == "1":
    holder = subprocess.Popen([sys.executable, "-c", sys.argv[4], str(run.path), ends], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    holder.stdout.readline()
    try:
        refuse_if_held(run)
    except RunFailure as error:
        print(f"error: {error}")
    holder.communicate(b"go")
if number == "2" or ends == "finished":
    (run.path / "checkpoints/step-3").mkdir(parents=True)
sys.exit(number == "1")
"""


@pytest.mark.parametrize(("ends", "started"), [("finished", 1), ("interrupted", 2)])
def test_a_training_refused_by_one_that_ends_in_that_instant_is_not_failed(toy, monkeypatch, capsys, ends, started):
    """The refusal is real; when the sweep looks, nobody works in the run any more. Done is done; what was interrupted goes on."""
    (one,) = plan_sweep(load_sweep(write_sweep(toy, runs=[{"run": "a"}])))
    one.run.write_config(one.config.to_yaml())
    starts = []
    monkeypatch.setattr(sweep_room, "training_command", lambda planned: starts.append(planned) or [sys.executable, "-c", REFUSED, str(planned.run.path), ends, str(len(starts)), HOLDER])
    assert run_in_slots(load_sweep(toy / "sweep.yaml"), [one]) == {"a": 0} and len(starts) == started
    assert "1/1 a: done" in capsys.readouterr().out and (one.state, one.notes) == ("done", "")
    assert "is working in this run directory" in (one.run.path / "train.log").read_text()


def test_early_stopping_has_ended_a_run_whose_scoring_failed(toy):
    file = write_sweep(toy, settings={"steps": 40, "validate_every": 2, "early_stopping_patience": 2}, runs=[{"run": "a"}])
    (one,) = plan_sweep(load_sweep(file))
    one.run.write_config(one.config.to_yaml())
    (one.run.path / "checkpoints/step-6").mkdir(parents=True)
    write_status(one.run, Status("failed", "scoring", message="disk full"))
    means = [0.5, 0.6, 0.55]
    for step, mean in zip((2, 4, 6), means, strict=True):
        one.run.log(step, **{"validation/mean": mean})
    assert one.state == "missing", "one validation without a better mean: it was going on"
    one.run.log(2, **{"validation/mean": 0.7})
    assert one.state == "done", "two"


def test_a_slot_has_its_device_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    sweep = Sweep(experiment="e", matrix={"seed": [0]}, slots=3, devices=["0", "2,3", "GPU-5"])
    assert [slot_environment(sweep, slot) for slot in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2"}, {"CUDA_VISIBLE_DEVICES": "2,3", "OMP_NUM_THREADS": "2"}]
    assert slot_environment(Sweep(experiment="e", matrix={"seed": [0]}), 0) == {}, "one slot has what the process has"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in slot_environment(sweep, 0), "the user's number stands"


def test_a_run_that_cannot_be_started_ends_no_slot(toy, capsys):
    "Its folder cannot be made; the one after it still gets its turn."
    sweep = load_sweep(write_sweep(toy, runs=[{"run": "a"}, {"run": "b"}]))
    (toy / "runs/e").mkdir(parents=True)
    for name in ("a", "b"):
        (toy / "runs/e" / name).write_text("a file in the way")
    assert run_in_slots(sweep, plan_sweep(sweep)) == {"a": 1, "b": 1}
    assert "2/2 b: FAILED: NotADirectoryError" in capsys.readouterr().out


@pytest.mark.parametrize(("ends", "code"), [("finished", 0), ("failed", 1)])
def test_a_training_that_another_process_was_first_in_is_waited_for(toy, monkeypatch, ends, code):
    "The other one was still importing when this one started: it holds the lock now, so this one is refused."
    (one,) = plan_sweep(load_sweep(write_sweep(toy, runs=[{"run": "a"}])))
    one.run.write_config(one.config.to_yaml())

    def refused_training(planned, environment, stopping):
        other = "import sys, time\nfrom qwen2vl_sft.rundir import RunDir\nrun = RunDir(sys.argv[1])\nwith run.running('training'):\n    print('', flush=True); time.sleep(0.7)\n"
        other += "    (run.path / 'checkpoints/step-3').mkdir(parents=True)\n" if ends == "finished" else "    raise OSError('disk full')\n"
        shell = ["sh", "-c", '"$0" -c "$1" "$2" 2>/dev/null &', sys.executable, other, str(one.run.path)]  # which ends at once: no child of this process
        with subprocess.Popen(shell, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            child.stdout.close()
        with pytest.raises(RunFailure, match="another process"):
            refuse_if_held(one.run)
        settle_status([one.run], time.time() - 60, "failed", "refused")
        assert one.state == "running", "the living run's status stays"
        return 1

    monkeypatch.setattr(sweep_room, "_one_process", refused_training)
    assert sweep_room.train_in_process(one, {}) == code
    assert one.state == ("done" if code == 0 else "failed") and ("disk full" in one.notes) == bool(code)


def test_a_training_that_is_killed_is_not_started_over_and_over(toy, monkeypatch, capsys):
    "Its kernel lives a little longer. What its log held from an earlier session is not why it ended."
    sweep = load_sweep(write_sweep(toy, runs=[{"run": "a"}]))
    (one,) = plan_sweep(sweep)
    one.run.write_config(one.config.to_yaml())
    (one.run.path / "train.log").write_text("error: of last week\n")
    kernel = "import sys, time\nfrom qwen2vl_sft.rundir import RunDir\nwith RunDir(sys.argv[1]).running('training'):\n    print('', flush=True); time.sleep(2)\n"
    code = f"import os, subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {kernel!r}, sys.argv[1]], stdout=subprocess.PIPE)\n"
    code += "child.stdout.readline()\nprint('step 7', flush=True)\nos.kill(os.getpid(), 9)\n"
    started = []
    monkeypatch.setattr(sweep_room, "training_command", lambda planned: started.append(planned) or [sys.executable, "-c", code, str(planned.run.path)])
    assert run_in_slots(sweep, [one]) == {"a": -9} and len(started) == 1
    assert "1/1 a: FAILED: killed by SIGKILL (step 7)" in capsys.readouterr().out and one.state == "failed"


def test_the_estimate_is_the_pace_of_earlier_runs_times_what_is_left(toy):
    sweep = Sweep(experiment="e", recipe="recipe.yaml", matrix={"seed": [0, 1]})
    assert plan_table(plan_sweep(sweep)).minutes.isna().all(), "nothing to go by"
    earlier = RunDir(toy / "runs/before/mix")
    earlier.write_config(plan_sweep(sweep)[0].config.to_yaml())
    lines = [{"step": step, "time": 1000 + 60 * step + (900 if step > 4 else 0), "loss": 1.0} for step in range(1, 9)]
    earlier.metrics_path.write_text("\n".join(map(json.dumps, lines)))
    assert seconds_a_sample(earlier) == 30, "a minute a step of two samples; a pause of 15 minutes doesn't count"
    assert list(plan_table(plan_sweep(sweep)).minutes) == [3.0, 3.0]


def refused(project):
    "Settings of a run that is refused when its turn comes: the suite file is there, and says nothing."
    (project / "broken.yaml").write_text("name: broken\ntasks: []\n")
    return {"run": "bad", "suite": "broken.yaml"}


@pytest.mark.slow
def test_failed_runs_are_started_again_only_on_request(toy):
    file, bad = write_sweep(toy, runs=[refused(toy)]), RunDir(toy / "runs/e/bad")
    write_status(bad, Status("failed", "training", message="a sample has 31 tokens, above schedule.max_tokens=1"))
    table = run_sweep(file, compare=False)
    assert list(table.state) == ["failed"] and table.notes[0] == "a sample has 31 tokens, above schedule.max_tokens=1"
    assert not (bad.path / "train.log").exists(), "left alone"
    table = run_sweep(file, compare=False, retry=True)
    assert list(table.state) == ["failed"] and "broken.yaml: tasks" in table.notes[0] and (bad.path / "train.log").exists()


@pytest.mark.slow
def test_a_sweep_fails_is_killed_is_stopped_and_goes_on(toy):
    "Three starts of one sweep of three runs: killed in the second, stopped in the third, then to its end."
    file = write_sweep(toy, settings={"save_at": [3]}, runs=[refused(toy), {"run": "a", "steps": 40}, {"run": "b", "seed": 1, "steps": 60}], scoring={"limit": 2})
    a, b = RunDir(toy / "runs/e/a"), RunDir(toy / "runs/e/b")
    killed = started(toy, file, "--no-compare")
    wait_for(lambda: 3 in a.checkpoints())
    killed.kill()  # its training goes on by itself
    text = killed.communicate()[0]
    assert re.search("1/3 bad: FAILED: .*broken.yaml: tasks", text), "a failure is reported, and stops no other"
    assert a.status().state == "running"
    stopped = started(toy, file, "--no-compare", "--slots", "2")  # waits for the one that is left over
    wait_for(lambda: 3 in b.checkpoints())
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 130
    assert a.status().state == "finished" and list(a.checkpoints()) == [3, 40]
    assert b.status().state == "interrupted"
    table = run_sweep(file, compare=False)
    assert list(table.state) == ["failed", "done", "done"] and list(table.step) == [0, 40, 60]
    with pytest.raises(InputError, match="several suites"):  # one table needs one suite: said before anything starts
        run_sweep(file)
    run_sweep(write_sweep(toy, settings={"save_at": [3]}, runs=[{"run": "a", "steps": 40}, {"run": "b", "seed": 1, "steps": 60}], scoring={"limit": 2}))
    assert (b.path / "notebook.ipynb").exists() and (b.path / "train.log").exists()
    board = (toy / "runs/e/scoreboard.csv").read_text()
    assert "a,40" in board and "b,3" in board and (toy / "runs/e/report.html").exists()


@pytest.mark.slow
def test_ray_places_the_runs(toy):
    pytest.importorskip("ray", reason="lacks ray (pip install 'qwen2vl-sft[ray]')")
    file = write_sweep(toy, runs=[{"run": "good"}, refused(toy)], ray={"address": "local", "cpus": 1})
    table = run_sweep(file, compare=False)
    assert list(table.state) == ["done", "failed"] and "broken.yaml: tasks" in table.notes[1]
    assert json.loads((toy / "runs/e/good/status.json").read_text())["state"] == "finished"
    assert re.match(r"placed by ray on \S+ with CPU 1\n", (toy / "runs/e/good/train.log").read_text())
    with pytest.raises(InputError, match="no cluster at '127.0.0.1:1'"):
        run_sweep(write_sweep(toy, runs=[{"run": "new"}], ray={"address": "127.0.0.1:1"}), compare=False)
