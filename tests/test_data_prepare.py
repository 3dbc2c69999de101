"""Prepared data: the contract's schema, splits without leaks that stay, and nothing half-written whatever happens."""
import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen2vl_sft.core import InputError, RunFailure, sha256_of
from qwen2vl_sft.data import prepare as module
from qwen2vl_sft.data.audit import Checked, Limits
from qwen2vl_sft.data.prepare import FRACTIONS, SCHEMA, Prepared, Rows, divide, load_split, parts_to_draw, prepare
from qwen2vl_sft.tasks import SPLITS, Suite, Task, load_suite


def picture(seed: int, width=24, height=16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(folder, name, rows):
    "A CSV of (label, seed of the picture) or (label, seed, source), and its pictures."
    (folder / "img").mkdir(parents=True, exist_ok=True)
    lines = ["image,label,source"]
    for label, seed, *source in rows:
        (folder / "img" / f"{seed}.png").write_bytes(picture(seed))
        lines.append(f"img/{seed}.png,{label},{source[0] if source else ''}")
    (folder / name).write_text("\n".join(lines) + "\n")


def suite_of(folder, **sources) -> Suite:
    named = {split: {"format": "csv", "path": path} for split, path in sources.items()}
    return Suite(name="s", folder=folder, tasks=[Task(name="t", question="?", labels=["a", "b"], sources=named)])


@pytest.fixture
def given(tmp_path):
    "A suite whose three splits are given: 6 + 2 + 2 rows."
    write_table(tmp_path, "train.csv", [("ab"[i % 2], i) for i in range(6)])
    write_table(tmp_path, "validation.csv", [("a", 10), ("b", 11)])
    write_table(tmp_path, "test.csv", [("a", 20), ("b", 21)])
    return suite_of(tmp_path, train="train.csv", validation="validation.csv", test="test.csv")


def add_rows(path, *lines):
    with open(path, "a") as file:
        file.write("".join(line + "\n" for line in lines))


def splits_of(prepared) -> dict[str, str]:
    table = pq.read_table(prepared.folder / "splits.parquet").to_pandas()
    return dict(zip(table["id"], table["split"], strict=True))


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- the contract -----------------------------------------------------------------------------

def test_files_and_schema(given, tmp_path):
    prepared = prepare(given, tmp_path / "out")
    assert sorted(path.name for path in prepared.folder.iterdir()) == [
        "audit.html", "audit.json", "quarantine.parquet", "splits.parquet", "suite.yaml", "t"]
    assert sorted(path.name for path in (prepared.folder / "t").iterdir()) == [
        "test-00000.parquet", "train-00000.parquet", "validation-00000.parquet"]
    schema = pq.read_schema(prepared.folder / "t" / "train-00000.parquet")
    assert schema.equals(SCHEMA) and schema.names == [
        "id", "image", "label", "question", "width", "height", "sha256", "phash", "group", "source"]
    row = prepared.split("t", "train")[0]
    assert row["image"] == picture(0) and row["sha256"] == sha256_of(picture(0)) and row["question"] is None
    assert (row["width"], row["height"], row["label"]) == (24, 16, "a")
    assert load_suite(prepared.folder / "suite.yaml").model_dump() == given.model_dump()


@pytest.mark.parametrize("empty", [False, True])
def test_hugging_face_datasets_reads_it(given, tmp_path, empty):
    from datasets import Image as ImageFeature
    from datasets import Value, load_dataset

    if empty:
        given.tasks[0].sources = {"test": given.tasks[0].sources["test"]}
    prepared = prepare(given, tmp_path / "out")
    dataset = load_dataset("parquet", data_dir=str(prepared.folder / "t"), cache_dir=str(tmp_path / "cache"))
    assert set(dataset) == ({"test"} if empty else set(SPLITS)) and len(prepared.split("t", "train")) == (0 if empty else 6)
    assert dataset["test"].features["image"] == ImageFeature() and dataset["test"].features["width"] == Value("int32")
    assert dataset["test"][1]["image"].size == (24, 16)
    raw = dataset["test"].cast_column("image", ImageFeature(decode=False))[0]["image"]
    assert raw["bytes"] == picture(20) and raw["path"] == "20.png"


def test_size_is_upright_and_bytes_are_the_originals(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).save(buffer, "JPEG", exif=exif)
    write_table(tmp_path, "test.csv", [("a", 1)])
    (tmp_path / "img" / "1.png").write_bytes(buffer.getvalue())
    row = prepare(suite_of(tmp_path, test="test.csv"), tmp_path / "out").split("t", "test")[0]
    assert (row["width"], row["height"], row["image"]) == (16, 24, buffer.getvalue())


def test_every_row_is_somewhere(given, tmp_path):
    add_rows(tmp_path / "train.csv", "img/none.png,a,", "../x.png,a,", "img/1.png,c,", ",,", "img/20.png,a,", "img/0.png, a ,")
    prepared = prepare(given, tmp_path / "out")
    audit, quarantine = prepared.audit, prepared.quarantine()
    assert audit["rows_read"] == 16 == len(splits_of(prepared)) + len(quarantine)
    assert audit["accepted"] + audit["repaired"] + audit["quarantined"] == 16
    assert sorted(quarantine["reason"]) == ["also_in_test", "missing_file", "no_image", "outside_root", "undeclared_label"]
    assert quarantine["where"].iloc[0] == "train.csv, row 7"
    page = (prepared.folder / "audit.html").read_text()
    assert page.count("data:image/png;base64,") >= 3  # the leak, the undeclared label, the repaired row
    with pytest.raises(InputError, match="5 rows are quarantined"):
        prepare(given, tmp_path / "out", strict=True)


# --- splits -----------------------------------------------------------------------------------

def test_given_splits_are_respected(given, tmp_path):
    prepared = prepare(given, tmp_path / "out")
    assert prepared.counts().loc["t"].to_dict() == {"train": 6, "validation": 2, "test": 2}
    assert prepared.audit["tasks"]["t"]["remarks"] == ["test has 2 independent sources: a score is known to ±69 points"]


def test_remarks_on_what_the_data_cannot_support(tmp_path):
    write_table(tmp_path, "train.csv", [("a", i) for i in range(5)])
    write_table(tmp_path, "test.csv", [("a", i) for i in range(100, 290)] + [("b", i) for i in range(300, 310)])
    suite = suite_of(tmp_path, train="train.csv", test="test.csv")
    suite.tasks.append(suite.tasks[0].model_copy(update={"name": "u", "sources": {"train": {"format": "csv", "path": "test.csv"}}}))
    audit = prepare(suite, tmp_path / "out", fractions={"train": 1.0, "validation": 0.0, "test": 0.0}).audit
    assert audit["tasks"]["t"]["remarks"][1:] == [
        "no rows in validation", "no rows in train with the label b", "answering 'a' always scores 95 on test",
        "200 test pictures are in train of u, with its question"]


def test_validation_is_drawn_from_train_and_said(tmp_path):
    write_table(tmp_path, "train.csv", [("ab"[i % 2], i) for i in range(90)])
    write_table(tmp_path, "test.csv", [("a", 100), ("b", 101)])
    prepared = prepare(suite_of(tmp_path, train="train.csv", test="test.csv"), tmp_path / "out")
    assert prepared.counts().loc["t"].to_dict() == {"train": 80, "validation": 10, "test": 2}
    assert "validation 11 %" in prepared.audit["tasks"]["t"]["remarks"][0]
    assert Counter(prepared.split("t", "validation").column("label")) == {"a": 5, "b": 5}


def test_rows_of_one_source_stay_together(tmp_path):
    write_table(tmp_path, "all.csv", [("ab"[i % 2], i, f"clip{i // 4}") for i in range(80)])
    prepared = prepare(suite_of(tmp_path, all="all.csv"), tmp_path / "out")
    sources = {split: set(prepared.split("t", split).column("source")) for split in SPLITS}
    assert sum(map(len, sources.values())) == 20 == len(set.union(*sources.values()))
    assert prepared.counts("sources").loc["t"].to_dict() == {"train": 16, "validation": 2, "test": 2}


def test_near_duplicates_stay_together(tmp_path):
    write_table(tmp_path, "all.csv", [("a", i) for i in range(40)])
    for i in range(40):  # a recompressed copy of each
        Image.open(tmp_path / "img" / f"{i}.png").save(tmp_path / "img" / f"{i}.webp", quality=95)
    add_rows(tmp_path / "all.csv", *(f"img/{i}.webp,a," for i in range(40)))
    prepared = prepare(suite_of(tmp_path, all="all.csv"), tmp_path / "out")
    split = splits_of(prepared)
    assert all(split[f"all.csv:{i + 1}"] == split[f"all.csv:{i + 41}"] for i in range(40))
    assert "near_duplicate" not in prepared.audit["notes"] and set(split.values()) == set(SPLITS)


def test_the_order_of_rows_and_their_number_do_not_move_old_ones(tmp_path):
    rows = [("ab"[i % 2], i) for i in range(50)]
    write_table(tmp_path, "all.csv", rows)
    suite = suite_of(tmp_path, all="all.csv")

    def by_picture():
        prepared = prepare(suite, tmp_path / "out")
        table = pq.read_table(prepared.folder / "splits.parquet").to_pandas()
        return dict(zip(table["sha256"], table["split"], strict=True))

    first = by_picture()
    write_table(tmp_path, "all.csv", rows[::-1] + [("ab"[i % 2], i) for i in range(50, 90)])
    more = by_picture()
    assert all(more[sha] == split for sha, split in first.items())
    assert Counter(more.values()) == {"train": 72, "validation": 9, "test": 9} or abs(Counter(more.values())["train"] - 72) <= 2
    fresh = prepare(suite_of(tmp_path, all="all.csv"), tmp_path / "elsewhere").counts().loc["t"].to_dict()
    assert sum(fresh.values()) == 90


def test_a_row_that_joins_two_splits_is_quarantined():
    def record(id, sha, group):
        return Checked("t", "all", id, "", label="a", group=group, sha256=sha)

    records = [record("1", "aa", "g"), record("2", "bb", "g"), record("3", "cc", "g"), record("4", "dd", "h")]
    divide(records, FRACTIONS, {"aa": "train", "bb": "test"})
    assert [r.split for r in records[:2]] == ["train", "test"]
    assert records[2].reason == "joins_splits" and records[3].reason is None


def test_other_fractions_draw_anew(tmp_path):
    write_table(tmp_path, "all.csv", [("a", i) for i in range(40)])
    suite = suite_of(tmp_path, all="all.csv")
    prepare(suite, tmp_path / "out")
    half = prepare(suite, tmp_path / "out", fractions={"train": 0.5, "validation": 0.25, "test": 0.25})
    assert half.counts().loc["t"].to_dict() == {"train": 20, "validation": 10, "test": 10}


@pytest.mark.parametrize("fractions", [{"train": 1.0}, {"train": 0.9, "validation": 0.2, "test": 0.1}, {"train": 1.2, "validation": -0.2, "test": 0.0}])
def test_bad_fractions(given, tmp_path, fractions):
    with pytest.raises(InputError, match="fractions"):
        prepare(given, tmp_path / "out", fractions=fractions)


def test_all_beside_three_splits_is_an_error():
    with pytest.raises(InputError, match="remove one"):
        parts_to_draw(Task(name="t", question="?", answer="text", sources={name: {} for name in (*SPLITS, "all")}), FRACTIONS)


# --- once, and whole --------------------------------------------------------------------------

def test_a_second_prepare_does_nothing(given, tmp_path, capsys, monkeypatch):
    prepared = prepare(given, tmp_path / "out")
    before = tree(prepared.folder), (prepared.folder / "audit.json").stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr(module, "inspect_row", lambda *_: pytest.fail("read again"))
    prepare(given, tmp_path / "out")
    assert "up to date" in capsys.readouterr().out
    assert before == (tree(prepared.folder), (prepared.folder / "audit.json").stat().st_mtime_ns)


@pytest.mark.parametrize("change", ["image", "label", "question", "limits", "lost file", "force"])
def test_a_change_prepares_again(given, tmp_path, change):
    prepared = prepare(given, tmp_path / "out")
    before = (prepared.folder / "audit.json").stat().st_mtime_ns
    options = {}
    if change == "image":
        (tmp_path / "img" / "0.png").write_bytes(picture(99))
    if change == "label":
        (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text().replace("0.png,a", "0.png,b"))
    if change == "question":
        given.tasks[0].question = "another?"
    if change == "limits":
        options = {"limits": Limits(pixels=1000)}
    if change == "lost file":
        (prepared.folder / "t" / "test-00000.parquet").unlink()
    if change == "force":
        options = {"force": True}
    again = prepare(given, tmp_path / "out", **options)
    assert (again.folder / "audit.json").stat().st_mtime_ns > before
    assert (again.audit["fingerprint"] == prepared.audit["fingerprint"]) == (change in ("lost file", "force"))


def test_preparing_twice_gives_the_same_files(given, tmp_path):
    assert tree(prepare(given, tmp_path / "one").folder) == tree(prepare(given, tmp_path / "two").folder)


def test_a_failure_leaves_the_old_state(given, tmp_path):
    prepared = prepare(given, tmp_path / "out")
    before = tree(prepared.folder)
    (tmp_path / "train.csv").write_text("image,lable\n")
    with pytest.raises(InputError, match=r"task t, train: .*no column 'label'.*Did you mean 'lable'"):
        prepare(given, tmp_path / "out")
    assert tree(prepared.folder) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".lock")) == ["s"]


SLOW = """
import sys, time
from pathlib import Path
import qwen2vl_sft.data.prepare as module
from test_data_prepare import suite_of
slow = module.inspect_row
def inspect_row(row, *rest):
    print("row", flush=True)
    time.sleep(0.05)
    return slow(row, *rest)
module.inspect_row = inspect_row
folder = Path(sys.argv[1])
module.prepare(suite_of(folder, train="train.csv", validation="validation.csv", test="test.csv"), folder / "out")
"""


def test_kill_9_leaves_nothing_half_and_the_next_run_finishes(given, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    for line in process.stdout:
        if line.strip() == b"row":
            break
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out" / "s").exists()
    with pytest.raises(InputError, match="no prepared data"):
        Prepared(tmp_path / "out" / "s")
    prepared = prepare(given, tmp_path / "out")
    assert tree(prepared.folder) == tree(prepare(given, tmp_path / "other").folder)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) in (["s"], [".s.lock", "s"])


def test_a_full_disk_is_a_clear_failure(given, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tables", full)
    with pytest.raises(RunFailure, match="No space left on device"):
        prepare(given, tmp_path / "out")
    assert not (tmp_path / "out" / "s").exists()


@pytest.mark.parametrize(("content", "message"), [
    ("image,label\n", "has no rows"), ("", "no column"), ("image,label\nnone.png,a\n", "none of its 1 rows can be used.*missing_file"),
])
def test_sources_without_usable_rows(tmp_path, content, message):
    (tmp_path / "test.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        prepare(suite_of(tmp_path, test="test.csv"), tmp_path / "out")


def test_a_task_without_sources(tmp_path):
    with pytest.raises(InputError, match="task t has no sources"):
        prepare(suite_of(tmp_path), tmp_path / "out")


# --- reading ----------------------------------------------------------------------------------

def test_shards_and_a_small_image_cache(given, tmp_path, monkeypatch):
    whole = prepare(given, tmp_path / "whole").split("t", "train")
    monkeypatch.setattr(module, "GROUP_ROWS", 2)
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    prepared = prepare(given, tmp_path / "out")
    assert sorted(path.name for path in (prepared.folder / "t").glob("train-*")) == [f"train-0000{i}.parquet" for i in range(3)]
    rows = Rows(sorted((prepared.folder / "t").glob("train-*")), cache_bytes=1)
    assert [rows[i] for i in (5, 0, 3, 1, 4, 2)] == [whole[i] for i in (5, 0, 3, 1, 4, 2)]
    assert len(rows.images) == 1 and rows[-1] == whole[5] and list(rows) == list(whole)
    with pytest.raises(IndexError):
        rows[6]
    copy = pickle.loads(pickle.dumps(rows))
    assert copy[2] == whole[2] and len(rows) == 6


def test_prepared_names_what_is_missing(given, tmp_path):
    prepared = prepare(given, tmp_path / "out")
    assert "<table>" in prepared._repr_html_()
    with pytest.raises(InputError, match="no task 'x'"):
        prepared.split("x", "train")
    with pytest.raises(InputError, match="no split 'dev'"):
        prepared.split("t", "dev")
    with pytest.raises(InputError, match="prepare"):
        Prepared(tmp_path)
    (prepared.folder / "t" / "train-00000.parquet").unlink()
    with pytest.raises(InputError, match="missing or changed"):
        prepared.split("t", "train")
    assert len(load_split(prepared.folder, "t", "test")) == 2 and prepared.tasks == ["t"]
    assert json.loads((prepared.folder / "audit.json").read_text())["schema"] == 1


def test_import_needs_no_notebook_tools():
    code = ("import sys\nfor name in ('nbdev', 'papermill', 'jupyter', 'matplotlib', 'openai', 'bitsandbytes'): sys.modules[name] = None\n"
            "import qwen2vl_sft.data.prepare, qwen2vl_sft.data.mixture\nassert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
