"""Labelling new images: as scoring does, with calibrated probabilities, through kill -9, from folders and tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from qwen2vl_sft import cli
from qwen2vl_sft.config import RunConfig, ScoringConfig
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.data.sources import Row
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.model.memory import AtOnce
from qwen2vl_sft.model.prefill import Prefill
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring import labeler as room
from qwen2vl_sft.scoring import suite as scoring_suite
from qwen2vl_sft.scoring.calibration import Wanted, calibrate_run, calibration_path
from qwen2vl_sft.scoring.experiment import score_experiment
from qwen2vl_sft.scoring.labeler import Labeler, find_checkpoint, fitting, images_of, label_to_file, label_pictures, read_picture
from qwen2vl_sft.scoring.labels import room_beside
from qwen2vl_sft.tasks import Task, load_suite
from qwen2vl_sft.training.trainer import train

CHECKPOINT = "toy/lora/step-4"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    "A project with a trained run, scored on validation and test; tests work on copies."
    project = tmp_path_factory.mktemp("labeler")
    before = os.environ.get("QWEN2VL_SFT_ROOT")
    os.environ["QWEN2VL_SFT_ROOT"] = str(project)
    try:
        suite = write_toy_suite(project / "toy", rows=24)
        suite.write_text(suite.read_text().replace("labels: [red, green, blue]", "labels: [red, green, blue]\n    positive: red"))
        train(RunConfig(
            suite=str(suite), experiment="toy", run="lora", model={"device": "cpu"}, method={"name": "lora"},
            schedule={"steps": 4, "micro_batch": 6, "learning_rate": 3e-3},
        ))  # fmt: skip
        prepared = prepare(load_suite(suite))
        for split in ("validation", "test"):
            score_experiment(project / "runs" / "toy", ScoringConfig(max_new_tokens=4, split=split), prepared, baselines=False)
    finally:
        os.environ.pop("QWEN2VL_SFT_ROOT")
        os.environ.update({"QWEN2VL_SFT_ROOT": before} if before else {})
    return project


@pytest.fixture
def home(shared, monkeypatch):
    monkeypatch.setenv("QWEN2VL_SFT_ROOT", str(shared))
    for path in shared.glob("runs/toy/lora/predictions/*/*/calibration.json"):
        path.unlink()
    return shared


def scored(home: Path) -> tuple[pd.DataFrame, list[bytes]]:
    "The test predictions and the bytes of the same images."
    rows = prepare(load_suite(home / "toy" / "toy.yaml")).split("colour", "test")
    table = RunDir(home / "runs/toy/lora").predictions("step-4", "colour").set_index("id").loc[rows.column("id")]
    return table, [rows.image(i) for i in range(len(rows))]


@pytest.mark.slow
def test_labels_are_those_of_scoring(home):
    table, images = scored(home)
    labelled = Labeler.load(CHECKPOINT, ["colour"], device="cpu").label(images)
    assert labelled["label"].tolist() == table["prediction"].tolist() and not labelled["calibrated"].any()
    for ours, theirs in zip(labelled["probabilities"], table["probabilities"], strict=True):
        assert json.loads(ours) == pytest.approx(json.loads(theirs), abs=1e-4)
    assert labelled["in_set_mass"].tolist() == pytest.approx(table["in_set_mass"].tolist(), abs=1e-4)
    folder = find_checkpoint(CHECKPOINT).folder
    assert folder == home / "runs/toy/lora/checkpoints/step-4" and find_checkpoint(folder).run.name == "lora"
    with pytest.raises(InputError, match=r"no checkpoint 'toy/lora/step-5'. Did you mean 'toy/lora/step-4'"):
        find_checkpoint("toy/lora/step-5")


@pytest.mark.slow
def test_calibration_and_threshold_apply(home, capsys):
    table, images = scored(home)
    content, = calibrate_run(RunDir(home / "runs/toy/lora"), load_suite(home / "toy" / "toy.yaml").tasks, Wanted(recall=0.9))
    stated = pd.DataFrame([json.loads(text) for text in table["probabilities"]])[["red", "green", "blue"]].to_numpy()
    path = calibration_path(RunDir(home / "runs/toy/lora"), "step-4", "colour")
    for temperature in (2.5, content["temperature"]):
        path.write_text(json.dumps(content | {"temperature": temperature}))
        labelled = Labeler.load(CHECKPOINT, ["colour"], device="cpu").label(images)
        powers = stated ** (1 / temperature)
        ours = pd.DataFrame([json.loads(text) for text in labelled["probabilities"]])[["red", "green", "blue"]].to_numpy()
        assert np.abs(ours - powers / powers.sum(axis=1, keepdims=True)).max() < 1e-3
    assert labelled["calibrated"].all()
    flagged = (labelled["label"] == "red").to_numpy()
    assert (flagged == (ours[:, 0] >= content["operating_point"]["threshold"])).all()
    assert flagged.sum() == content["operating_point"]["test"]["flagged"]

    certain = Labeler.load(CHECKPOINT, ["colour"], threshold=1.0, device="cpu").label(images)
    assert ((certain["label"] == "undecided") == (certain["most_probable"] == "red")).all()
    point = content["operating_point"] | {"reached": False, "threshold": None}
    path.write_text(json.dumps(content | {"operating_point": point}))
    assert "red" not in set(Labeler.load(CHECKPOINT, ["colour"], device="cpu").label(images)["label"])
    assert "task 'colour': no threshold reached what `calibrate` was asked for, so red is undecided; calibrate for less, or give --threshold" in capsys.readouterr().out
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="threshold 90: give a probability, from 0 to 1"):
        Labeler.load(CHECKPOINT, ["colour"], threshold=90, device="cpu")
    text = (home / "toy" / "toy.yaml").read_text()
    other = home / "toy" / "other.yaml"
    other.write_text(text.replace("Which colour is it?", "What colour is it?"))
    with pytest.raises(InputError, match="task 'colour' has another question or other labels than when toy/lora/step-4 was calibrated"):
        Labeler.load(CHECKPOINT, ["colour"], suite=other, device="cpu")
    settings = home / "runs/toy/lora/checkpoints/step-4/adapter_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"lora_alpha": 1}))  # other weights under the same name
    try:
        with pytest.raises(InputError, match="task 'colour': toy/lora/step-4 was calibrated with other weights than it has now; run `qwen2vl-sft score toy --split validation` and"):
            Labeler.load(CHECKPOINT, ["colour"], device="cpu")
    finally:
        settings.write_text(before)


@pytest.mark.slow
def test_the_commands_calibrate_and_label(home, tmp_path, capsys):
    assert cli.main(["calibrate", "toy", "--task", "colour", "--recall", "0.9"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]  # lines with a time are notes
    assert shown[0].split()[:4] == ["run", "checkpoint", "task", "temperature"] and [line.split()[:3] for line in shown[1:]] == [["base", "base", "colour"], ["lora", "step-4", "colour"]]
    assert cli.main(["calibrate", "toy", "--task", "word"]) == 2 and "task 'word' is open: " in capsys.readouterr().err
    for number in range(3):
        shutil.copy(home / "toy" / "pictures" / f"test-{number}.png", tmp_path / f"{number}.png")
    (tmp_path / "torn.png").write_bytes(b"nothing")
    for out, read in (("labels.csv", pd.read_csv), ("labels.parquet", pd.read_parquet)):
        assert cli.main(["label", CHECKPOINT, str(tmp_path), "--task", "colour", "--out", str(tmp_path / out), "--threshold", "1.0", "--device", "cpu"]) == 0
        table = read(tmp_path / out).set_index("image")
        said = capsys.readouterr().out
        assert table.index.tolist() == ["0.png", "1.png", "2.png", "torn.png"] and table["calibrated"].tolist()[:3] == [True] * 3
        assert ((table["label"] == "undecided") == (table["most_probable"] == "red")).all() and table.loc["torn.png", "reason"].startswith("not_an_image")
        assert "unreadable" in said and said.splitlines()[-1] == str(tmp_path / out)


def test_many_pictures_go_through_the_tower_in_parts_with_the_same_labels(home, monkeypatch):
    labeler = Labeler.load(CHECKPOINT, device="cpu")
    runs = []
    labeler.model.get_base_model().model.visual.register_forward_hook(lambda module, inputs, output: runs.append(len(inputs[0])))
    pictures = [read_picture(labeler.encoder, row) for row in list(images_of(home / "toy/pictures"))[:6]]
    whole = label_pictures(labeler, pictures)
    assert len(runs) == 1
    monkeypatch.setattr(scoring_suite, "TOWER_BYTES", 2 * pictures[0].pixels.size)
    labeler.tokens = 1  # and one sample in a pass of the language model
    parts = label_pictures(labeler, pictures)
    assert len(runs) >= 1 + 3 and sum(runs[1:]) == runs[0]
    assert [(row["image"], row["task"], row["label"]) for row in parts] == [(row["image"], row["task"], row["label"]) for row in whole]
    lengths = [4, 3, 9, 2, 2]
    assert [lengths[part] for part in fitting(lengths, 9)] == [[4, 3], [9], [2, 2]]
    read = lambda length: Prefill(None, torch.ones(32, length), None, torch.ones(32, 1))
    assert [room_beside(read(length), 32 * 1024) for length in (24, 760, 2000)] == [1000, 264, 1], "what is kept of the beginnings counts"


def test_two_tasks_run_the_tower_once(home):
    labeler = Labeler.load(CHECKPOINT, ["colour", "word", "colour"], device="cpu")  # one that is named twice is asked once
    runs = []
    inner = labeler.model.get_base_model().model.visual
    inner.register_forward_hook(lambda module, inputs, output: runs.append(len(inputs[0])))
    pictures = [read_picture(labeler.encoder, row) for row in list(images_of(home / "toy/pictures"))[:4]]
    rows = label_pictures(labeler, pictures)
    assert [row["task"] for row in rows] == ["colour"] * 4 + ["word"] * 4 and len(runs) == 1
    assert all(isinstance(row["label"], str) for row in rows) and torch.is_grad_enabled()


def test_bad_images_get_a_row_with_the_reason(home, tmp_path):
    shutil.copy(next((home / "toy/pictures").glob("test-0.png")), tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    Image.new("RGB", (600, 2)).save(tmp_path / "strip.png")
    (tmp_path / "notes.txt").write_text("not an image, not asked for")
    table = label_to_file(Labeler.load(CHECKPOINT, ["colour"], device="cpu"), tmp_path, tmp_path / "out.parquet").set_index("image")
    reasons = {"empty.png": "empty_file", "text.jpg": "not_an_image", "torn.png": "truncated", "strip.png": "aspect_ratio"}
    assert table.index.tolist() == ["empty.png", "good.png", "strip.png", "text.jpg", "torn.png"]
    for name, reason in reasons.items():
        assert table.loc[name, "reason"].startswith(reason) and pd.isna(table.loc[name, "label"]), name
    assert table.loc["good.png", "label"] in ("red", "green", "blue")
    assert pd.read_parquet(tmp_path / "out.parquet")["image"].tolist() == table.index.tolist()
    with pytest.raises(InputError, match="an image is a ndarray; give a file's path, or the bytes of one"):
        Labeler.label(None, [tmp_path / "good.png", np.zeros((9, 9, 3))])


def test_tables_name_images_by_path_or_bytes(home, tmp_path):
    names = [f"test-{i}.png" for i in range(3)]
    for name in names:
        shutil.copy(home / "toy/pictures" / name, tmp_path / name)
    (tmp_path / "a.csv").write_text("id,file,note\n7,test-0.png,x\n8,test-1.png,y\n9,../../etc/passwd.png,z\n")
    rows = list(images_of(tmp_path / "a.csv"))
    assert [row.id for row in rows] == ["7", "8", "9"] and rows[2].reason.startswith("outside_root")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"picture": name}) for name in names))
    assert [Path(row.path).name for row in images_of(tmp_path / "b.jsonl")] == names
    pd.DataFrame({"image": [(tmp_path / name).read_bytes() for name in names]}).to_parquet(tmp_path / "c.parquet")
    assert [row.image for row in images_of(tmp_path / "c.parquet")] == [(tmp_path / name).read_bytes() for name in names]
    for bad, message in (("id,word\n1,a\n", "which column holds the image"), ("file\n", "no rows")):
        (tmp_path / "d.csv").write_text(bad)
        with pytest.raises(InputError, match=message):
            list(images_of(tmp_path / "d.csv"))
    with pytest.raises(InputError, match="no column 'fiel'. Did you mean 'file'"):
        list(images_of(tmp_path / "a.csv", "fiel"))
    labeler = Labeler.load(CHECKPOINT, ["colour"], device="cpu")
    (tmp_path / "e.csv").write_text("id,file\n1,test-0.png\n1,test-1.png\n")
    with pytest.raises(InputError, match="the id '1' occurs twice"):
        label_to_file(labeler, tmp_path / "e.csv", tmp_path / "out.csv")
    assert isinstance(rows[0], Row)


@pytest.mark.slow
def test_a_killed_labelling_continues_where_it_was(home, tmp_path):
    pictures, out = home / "toy" / "pictures", tmp_path / "labels.csv"
    code = (
        "import qwen2vl_sft.scoring.labeler as room\nroom.FLUSH_SECONDS = 0\n"
        f"labeler = room.load_labeler({CHECKPOINT!r}, ['colour'], batch=1, device='cpu')\n"
        f"room.label_to_file(labeler, {str(pictures)!r}, {str(out)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    parts = lambda: {path.name: path.stat().st_mtime_ns for path in Path(f"{out}.parts").glob("part-*.parquet")}
    deadline = time.time() + 120
    while len(parts()) < 5 and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = parts()
    assert 5 <= len(kept) < 144 and not out.exists()
    labeler = Labeler.load(CHECKPOINT, ["colour"], device="cpu")
    table = label_to_file(labeler, pictures, out)
    assert kept.items() <= parts().items() and len(table) == 144 and table["label"].notna().all()
    assert sum(len(pd.read_parquet(path)) for path in Path(f"{out}.parts").glob("part-*.parquet")) == 144
    done = parts()
    assert label_to_file(labeler, pictures, out).equals(table) and parts() == done
    read = pd.read_csv(out)
    assert read["label"].tolist() == table["label"].tolist() and read["image"].is_unique


# --- what is written, without a model ------------------------------------------------------------------------


def kept(parts: Path, *rows: tuple[str, str, str]) -> None:
    room.write_part(parts, [{"image": image, "task": "colour", **room.EMPTY, "label": label, "checkpoint": "c", "follows_from": "f", "stamp": stamp} for image, stamp, label in rows])


def test_rows_without_ids_are_named_by_their_paths_and_what_is_no_row_gets_a_reason(tmp_path):
    "As Windows writes a table: a byte order mark, line ends of two characters, blank lines."
    (tmp_path / "a.csv").write_bytes("\ufefffile,说明\r\na.png,x\r\n\r\nsub/b.png,y\r\na.png,z\r\n,x\r\nc.png,x,y\r\n".encode())
    rows = list(images_of(tmp_path / "a.csv"))
    assert [row.id for row in rows] == ["a.png", "sub/b.png", "a.png (2)", "a.csv:4", "c.png"]
    assert [row.path and Path(row.path).relative_to(tmp_path).as_posix() for row in rows] == ["a.png", "sub/b.png", "a.png", None, "c.png"]
    assert rows[3].reason.startswith("no_image") and rows[4].reason.startswith("extra_cells")
    (tmp_path / "b.jsonl").write_text('{"image": "a.png"}\n\n["b.png"]\n{"image": \n{"image": {"path": "c.png"}}\n')
    rows = list(images_of(tmp_path / "b.jsonl"))
    assert [(row.id, (row.reason or "")[:8]) for row in rows] == [("a.png", ""), ("b.jsonl:3", "not_json"), ("b.jsonl:4", "not_json"), ("c.png", "")]
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    odd = next(row for row in images_of(tmp_path) if row.reason)
    assert odd.id == "\\udcff.png" and odd.reason.startswith("bad_characters")
    for content, message in ((b"file;note\na.png;x\n", "cells are separated by ,. Its columns: file;note"), ("file,说明\na.png,红色\n".encode("gbk"), "c.csv is not UTF-8 text; save it as UTF-8"), (b'[1]\n', "no rows"), (b'file,x\n"a.png\n', "c.csv, line 2: not readable as CSV")):
        (tmp_path / "c.csv").write_bytes(content)
        with pytest.raises(InputError, match=message):
            list(images_of(tmp_path / "c.csv"))
    (tmp_path / "d.csv").write_text("id,file\n1,a.png\n2,b.png\n1,c.png\n")
    with pytest.raises(InputError, match=r"d.csv: the id '1' occurs twice, again in d.csv, row 3; .* make them unique, or leave their column out"):
        room.stamps_of(images_of(tmp_path / "d.csv"), tmp_path / "d.csv")


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/labels.csv: .*/file is no folder; name another --out"):
        room.check_labelling("c", tmp_path / "one.png", tmp_path / "file" / "labels.csv")
    with pytest.raises(RunFailure, match=r"labels.csv: can't be written \(Not a directory\); make room, or name another --out"), room.held_parts(tmp_path / "file" / "labels.csv.parts", tmp_path / "labels.csv"):
        pass
    out = tmp_path / "labels.csv"
    out.write_text("labels")
    kept(room.parts_of(out), ("a.png", "s", "red"))
    (torn := room.parts_of(out) / "part-00001.parquet").write_bytes(b"torn")
    with pytest.raises(RunFailure, match=r"part-00001.parquet can't be read \(.*\); delete it, then score \(or label\) again: only its rows are made again"):
        room.check_labelling("c", tmp_path / "one.png", out)
    run = RunDir(tmp_path / "runs/x/y")
    run.write_predictions("step-1", "t", 0, pd.DataFrame([{"rule": "closed", "split": "test", "id": "1"}]))
    run.prediction_parts("step-1", "t", "closed")[0].write_bytes(b"PAR1")
    with pytest.raises(RunFailure, match="part-test-closed-00000.parquet can't be read"):
        run.predictions("step-1", "t")
    torn.unlink()
    (room.parts_of(out) / "written.json").write_text("{")
    with pytest.raises(RunFailure, match=r"written.json can't be read \(.*\); delete it, and label again"):
        room.check_labelling("c", tmp_path / "one.png", out)


def test_a_picture_that_came_back_gets_its_own_label(tmp_path):
    "The latest row of the name is another picture's."
    one = SimpleNamespace(tasks=[SimpleNamespace(name="colour")], follows_from={"colour": "f"})
    kept(tmp_path, ("a.png", "first", "red"), ("b.png", "other", "blue"))
    kept(tmp_path, ("a.png", "second", "green"))
    for stamp, label in (("first", "red"), ("second", "green")):
        assert room.assembled(tmp_path, {"b.png": "other", "a.png": stamp}, one)["label"].tolist() == ["blue", label]
    with pytest.raises(RunFailure, match="1 images changed while they were labelled, such as a.png"):
        room.assembled(tmp_path, {"a.png": "third"}, one)


def test_one_process_at_a_time_labels_into_a_file(tmp_path):
    out = tmp_path / "labels.csv"
    again = room.held_parts(tmp_path / "labels.csv.parts", out)
    with room.held_parts(tmp_path / "labels.csv.parts", out), pytest.raises(RunFailure, match="labels.csv: another process is labelling into this file"):
        again.__enter__()
    with room.held_parts(tmp_path / "labels.csv.parts", out):
        pass


def test_a_table_of_pictures_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    pd.DataFrame({"image": [bytes([i]) * 100 for i in range(100)]}).to_parquet(tmp_path / "t.parquet", row_group_size=100)
    rows = room.images_of(tmp_path / "t.parquet", "image")
    first = next(rows)
    assert first.image == b"\0" * 100
    stamps = room.stamps_of(room.images_of(tmp_path / "t.parquet", "image"), tmp_path / "t.parquet")
    assert len(stamps) == 100 and len(set(stamps.values())) == 100
    read = []
    monkeypatch.setattr(room, "TABLE_ROWS", 8)
    monkeypatch.setattr(room, "row_of_record", lambda record, names, file, number, *more: read.append(number) or Row(str(number), image=record["image"]))
    monkeypatch.setattr(room, "read_picture", lambda encoder, row: row)
    monkeypatch.setattr(room, "label_fitting", lambda one, rows, at_once: [len(rows)])
    batches = room.label_rows(SimpleNamespace(encoder=None, batch=10), room.images_of(tmp_path / "t.parquet", "image"))
    assert next(batches) == [10] and len(read) == 20  # a batch, and the next one being decoded


def test_a_batch_without_memory_is_halved_and_a_picture_without_gets_a_reason(monkeypatch, capsys):
    def label_pictures(one, pictures):
        if sum(picture.pixels or 0 for picture in pictures) > 3:
            raise MemoryError
        return [{"image": picture.row.id, "reason": picture.reason} for picture in pictures]

    monkeypatch.setattr(room, "label_pictures", label_pictures)
    at_once = AtOnce(8, "label", "pictures")
    rows = room.label_fitting(None, [room.Picture(Row(str(i)), pixels) for i, pixels in enumerate((1, 1, 1, 4, 2))], at_once)
    assert [row["image"] for row in rows] == list("01234") and [bool(row["reason"]) for row in rows] == [False, False, False, True, False]
    assert "doesn't fit in memory" in rows[3]["reason"] and "label: out of memory; 2 pictures at a time instead of 5" in capsys.readouterr().out
    assert at_once.most == 8  # the one picture was to blame
    rows = room.label_fitting(None, [room.Picture(Row(str(i)), 1) for i in range(8)], at_once)
    assert not any(row["reason"] for row in rows) and at_once.most == 2  # the batch was


def test_an_exported_calibration_belongs_to_its_weights_and_its_positive_label(tmp_path):
    task = Task(name="colour", question="Which?", labels=["red", "blue"], positive="red")
    (tmp_path / "calibration").mkdir()
    stored = {"task_fingerprint": task.fingerprint, "positive": "red", "operating_point": None, "temperature": 2.0, "exported_weights": "w"}
    for changes, message in (({}, None), ({"exported_weights": "v"}, "made for other weights"), ({"positive": "blue"}, "other labels")):
        (tmp_path / "calibration" / "colour.json").write_text(json.dumps(stored | changes))
        if message is None:
            assert room.decision_for(room.Checkpoint(tmp_path), task, weights="w") == room.Decision(2.0, None, True)
            continue
        with pytest.raises(InputError, match=message):
            room.decision_for(room.Checkpoint(tmp_path), task, weights="w")


# --- what is refused before any weights are loaded ---------------------------------------------------------

def test_only_an_earlier_labelling_is_replaced(tmp_path):
    "Not a file of somebody's, not an edited one, not another checkpoint's labels unless that is said."
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    out = tmp_path / "gold.csv"
    out.write_text("image,label\none.png,cat\n")
    with pytest.raises(InputError, match=r"gold.csv is there already and no labelling wrote it .* name another --out"):
        room.check_labelling("a/b/step-10", tmp_path / "one.png", out)
    room.note_written(room.parts_of(out), "a/b/step-10", out.read_bytes())
    room.check_labelling("a/b/step-10", tmp_path / "one.png", out)
    with pytest.raises(InputError, match=r"holds labels of a/b/step-10, and these would be of a/b/step-20; .* --replace"):
        room.check_labelling("a/b/step-20", tmp_path / "one.png", out)
    room.check_labelling("a/b/step-20", tmp_path / "one.png", out, replace=True)
    room.note_written(room.parts_of(out), "a/b/step-10", out.read_bytes(), tmp_path, ["face", "logo"])
    with pytest.raises(InputError, match=r"gold.csv holds labels of the images of .*, which would go; name another --out, or give --replace"):
        room.check_labelling("a/b/step-10", tmp_path / "one.png", out)
    with pytest.raises(InputError, match=r"gold.csv also holds labels of task 'logo', which would go; name it with --task, too, "):
        room.check_labelling("a/b/step-10", tmp_path, out, tasks=["face"])
    room.check_labelling("a/b/step-10", tmp_path, out, tasks=["face", "logo", "word"])
    room.check_labelling("a/b/step-10", tmp_path / "one.png", out, replace=True, tasks=["word"])
    room.note_written(room.parts_of(out), "a/b/step-10", b"labels that a kill kept from being written")
    room.check_labelling("a/b/step-10", tmp_path / "one.png", out)
    out.write_text("image,label\none.png,dog\n")
    with pytest.raises(InputError, match="has been changed since it was labelled"):
        room.check_labelling("a/b/step-10", tmp_path / "one.png", out, replace=True)


def test_an_interrupted_labelling_keeps_what_it_has(tmp_path, monkeypatch):
    def rows(*_):
        yield [{"image": "a.png", "label": "red"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "label_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        room.label_into(tmp_path, SimpleNamespace(tasks=["colour"]), [], 2, 1)
    assert room.read_parts(tmp_path)["image"].tolist() == ["a.png"]


def test_labels_of_a_version_without_notes_are_known_by_their_parts(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    out = tmp_path / "labels.csv"
    out.write_text("labels")
    room.parts_of(out).mkdir()
    room.write_part(room.parts_of(out), [{"image": "one.png", "task": "t", "label": "x", "checkpoint": "a/b/step-10", "follows_from": "f", "stamp": "s"}])
    room.check_labelling("a/b/step-10", tmp_path / "one.png", out)
    with pytest.raises(InputError, match="holds labels of a/b/step-10"):
        room.check_labelling("a/b/step-20", tmp_path / "one.png", out)


def test_a_wrong_path_is_refused_with_a_suggestion_before_weights_load(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "new").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "new" / "one.png")
    monkeypatch.setattr(room, "load_labeler", lambda *_, **__: pytest.fail("weights were loaded"))
    assert cli.main(["label", CHECKPOINT, str(tmp_path / "nwe"), "--out", str(tmp_path / "labels.csv")]) == 2
    assert "new'?" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "gold.csv").write_text("mine")
    assert cli.main(["label", CHECKPOINT, str(tmp_path / "new"), "--out", str(tmp_path / "labels.csv"), "--batch", "0"]) == 2
    assert "--batch" in capsys.readouterr().err
    assert cli.main(["label", CHECKPOINT, str(tmp_path / "new"), "--out", str(tmp_path / "gold.csv")]) == 2
    assert (tmp_path / "gold.csv").read_text() == "mine"
