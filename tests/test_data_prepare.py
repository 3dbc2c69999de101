"""Prepared data: the contract's schema, splits without leaks that stay, and nothing half-written whatever happens."""
import errno
import gc
import io
import json
import multiprocessing
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer

from qwen2vl_sft.core import ASSETS, InputError, RunFailure, sha256_of, sole_use
from qwen2vl_sft.data import audit, forecast
from qwen2vl_sft.data import prepare as module
from qwen2vl_sft.data.audit import Audit, Checked, Limits, Records
from qwen2vl_sft.data.prepare import FRACTIONS, SCHEMA, Elsewhere, Prepared, Rows, divide, draw_folds, load_split, parts_to_draw, prepare
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
        "200 test pictures are in train of u too, asked another question there (the same file; the report also counts near duplicates)"]


def drawing(name: str, pictures: list[int], labels: int, spill, rng, parts=FRACTIONS, split="all", previous=()) -> module.Draw:
    "Rows of pictures that are far from each other, with random labels."
    shas = [sha256_of(b"%d" % number) for number in pictures]
    records = Records((Checked(name, split, str(number), "", label=str(rng.integers(labels)), group=sha[:16], sha256=sha, phash=sha) for number, sha in zip(pictures, shas, strict=True)), spill)
    return module.Draw(Task(name=name, question="?", labels=["a", "b"]), records, np.arange(len(pictures) if parts else 0), "all", parts, dict(previous))


@settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(1, 200), st.integers(1, 4), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_tasks_over_the_same_pictures_have_one_split_and_their_shares(count, labels, tasks, seed):
    "In all tasks the same split of a picture, and of a label in each split about its share; what one task has alone fills up."
    rng, spill = np.random.default_rng(seed), audit.Spill()
    had = [sorted({*rng.integers(0, count, count).tolist()}) for _ in range(tasks)]
    draws = [drawing(str(number), mine, labels, spill, rng) for number, mine in enumerate(had)]
    for draw, wanted in zip(draws, module.shared_splits(module.Shared(draws, Limits())), strict=True):
        module.settle_splits(draw, wanted)
    places = {}
    for draw in draws:
        for record in draw.records:
            assert places.setdefault(record.sha256, record.split) == record.split
        for label in {record.label for record in draw.records}:
            gets = Counter(record.split for record in draw.records if record.label == label)
            assert all(abs(gets[split] - share * gets.total()) <= 2 + 0.05 * gets.total() for split, share in FRACTIONS.items()), gets


@settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_given_and_earlier_splits_are_followed_by_new_rows(count, seed):
    "Train where any task trains, else test where any tests; rows of earlier preparations stay, and no further test row is seen."
    rng, spill = np.random.default_rng(seed), audit.Spill()
    some = lambda: sorted({*rng.integers(0, count, count).tolist()})
    old = {sha256_of(b"%d" % number): SPLITS[rng.integers(3)] for number in some()[::2]}
    two = {"train": 0.9, "validation": 0.1}
    given = [drawing(name, some()[::3], 2, spill, rng, {}, name) for name in ("train", "test")]
    draws = [drawing("a", some(), 2, spill, rng), *given, drawing("b", some(), 2, spill, rng, two), drawing("c", some(), 2, spill, rng, previous=old)]
    known = {}
    for draw in (*given, draws[-1]):
        for record in draw.records:
            if split := draw.previous.get(record.sha256) if draw.parts else record.split:
                known.setdefault(record.sha256, set()).add(split)
    for draw, wanted in zip(draws, module.shared_splits(module.Shared(draws, Limits())), strict=True):
        module.settle_splits(draw, wanted)
    for draw in draws:
        for record in draw.records if draw.parts else ():
            follows = next((split for split in ("train", "test", "validation") if split in known.get(record.sha256, ())), None)
            if record.sha256 in draw.previous:
                assert record.split == draw.previous[record.sha256]
            elif follows:
                assert record.split == ("validation" if follows == "test" and draw.task.name == "b" else follows)


def test_no_task_trains_on_what_a_later_one_tests(tmp_path):
    "Copies, recompressed copies and other pictures of a source, in a test that a later task gives; with real files."
    write_table(tmp_path, "one.csv", [("ab"[i % 2], i, f"clip{i}" if i >= 50 else "") for i in range(60)])
    for i in range(10, 20):
        Image.open(tmp_path / "img" / f"{i}.png").save(tmp_path / "img" / f"{i}.webp", quality=95)
    write_table(tmp_path, "test.csv", [("ab"[i % 2], i) for i in range(10)] + [("a", 200 + i, f"clip{i}") for i in range(50, 60)])
    add_rows(tmp_path / "test.csv", *(f"img/{i}.webp,a," for i in range(10, 20)))
    write_table(tmp_path, "train.csv", [("ab"[i % 2], i) for i in range(100, 120)])
    suite = suite_of(tmp_path, all="one.csv")
    alone = splits_of(prepare(suite, tmp_path / "alone", workers=0))
    assert {alone[f"one.csv:{i + 1}"] for i in range(20)} >= {"train", "test"}
    later = suite.tasks[0].model_copy(update={"name": "u", "sources": {split: {"format": "csv", "path": f"{split}.csv"} for split in ("train", "test")}})
    suite.tasks.append(later)
    report = prepare(suite, tmp_path / "out", workers=0)
    table = pq.read_table(report.folder / "splits.parquet").to_pandas()
    mine = dict(zip(table["id"], table["split"], strict=True))
    assert {mine[f"one.csv:{i + 1}"] for i in [*range(20), *range(50, 60)]} == {"test"}
    assert Counter(mine[f"one.csv:{i + 1}"] for i in range(20, 50))["train"] >= 28, "what is left fills train up to its share"
    assert not any("in train of" in remark for task in "tu" for remark in report.audit["tasks"][task]["remarks"])
    third = later.model_copy(update={"name": "v", "sources": {"train": {"format": "csv", "path": "one.csv"}, "test": {"format": "csv", "path": "train.csv"}}})
    suite.tasks = [third, later]
    given = prepare(suite, tmp_path / "given", workers=0)
    assert given.counts().loc["v"].tolist() == [54, 6, 20] and given.counts().loc["u"].tolist() == [18, 2, 30], "a given train is not emptied"
    remarks = " ".join(given.audit["tasks"]["u"]["remarks"])
    kept = set(given.split("v", "train").column("id"))
    near, same = ([f"one.csv:{i + 1}" in kept for i in part] for part in ([*range(10, 20), *range(50, 60)], range(10)))
    assert f"{sum(near)} test pictures have near duplicates, or rows of the same source, in train of v" in remarks and f"{sum(same)} test pictures are in train of v too" in remarks
    assert 24 <= sum(near) + sum(same) < 30, "validation has the others"


def test_tasks_that_share_nothing_are_divided_one_by_one(tmp_path):
    write_table(tmp_path, "one.csv", [("ab"[i % 2], i, f"clip{i // 3}") for i in range(40)])
    write_table(tmp_path, "two.csv", [("ab"[i % 3 > 0], i) for i in range(50, 90)])
    alone = {}
    for path in ("one.csv", "two.csv"):
        alone |= splits_of(prepare(suite_of(tmp_path, all=path), tmp_path / path[:3], workers=0))
    suite = suite_of(tmp_path, all="one.csv")
    suite.tasks.append(suite.tasks[0].model_copy(update={"name": "u", "sources": {"all": {"format": "csv", "path": "two.csv"}}}))
    assert splits_of(prepare(suite, tmp_path / "out", workers=0)) == alone


def test_two_questions_about_the_same_pictures_share_no_test_and_train(tmp_path):
    rows = [("ab"[i % 2], i) for i in range(60)]
    write_table(tmp_path, "one.csv", rows)
    write_table(tmp_path, "two.csv", [("ab"[i % 3 > 0], i) for _, i in rows[:50]])
    write_table(tmp_path, "tests.csv", [("a", i) for i in range(60, 63)])
    suite = suite_of(tmp_path, all="one.csv")
    task = lambda name, **sources: suite.tasks[0].model_copy(update={"name": name, "sources": {split: {"format": "csv", "path": path} for split, path in sources.items()}})
    suite.tasks.append(task("u", all="two.csv"))
    prepared = prepare(suite, tmp_path / "out", workers=0)
    shas = {name: {split: set(prepared.split(name, split).column("sha256")) for split in SPLITS} for name in ("t", "u")}
    assert not shas["t"]["test"] & shas["u"]["train"] and not shas["u"]["test"] & shas["t"]["train"]
    assert shas["t"]["test"] & shas["u"]["test"]
    assert not any("asked another question" in remark for name in ("t", "u") for remark in prepared.audit["tasks"][name]["remarks"])
    suite.tasks = [task("v", all="one.csv", test="tests.csv"), *suite.tasks]  # new, and first: it follows what is there
    again = prepare(suite, tmp_path / "out", workers=0)
    for name in ("t", "u"):
        assert {split: set(again.split(name, split).column("sha256")) for split in SPLITS} == shas[name]
    assert not set(again.split("v", "train").column("sha256")) & shas["t"]["test"]


def test_a_second_suite_of_the_same_name_is_said(tmp_path, capsys):
    write_table(tmp_path, "one.csv", [("ab"[i % 2], i) for i in range(10)])
    write_table(tmp_path, "two.csv", [("ab"[i % 2], i) for i in range(8)])
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"name: s\ntasks: [{{name: t, question: q, labels: [a, b], sources: {{all: {{format: csv, path: {name}.csv}}}}}}]\n")
    for name, other in (("one", None), ("one", None), ("two", "one"), ("one", "two")):
        prepare(load_suite(tmp_path / f"{name}.yaml"), tmp_path / "out", workers=0)
        shown = capsys.readouterr().out
        assert ("give one of the two suites another name" in shown) == bool(other) and (f"{other}.yaml and is replaced" in shown or not other)
    add_rows(tmp_path / "one.csv", "img/0.png,a,")
    (tmp_path / "one.yaml").rename(tmp_path / "moved.yaml")
    prepare(load_suite(tmp_path / "moved.yaml"), tmp_path / "out", workers=0)
    assert "another name" not in capsys.readouterr().out, "a renamed file is no other suite"


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


@pytest.fixture
def small(tmp_path):
    "47 rows, two of each clip; `all` is to be divided."
    write_table(tmp_path, "all.csv", [("ab"[i % 2], i, f"clip{i // 2}") for i in range(47)])
    return suite_of(tmp_path, all="all.csv")


def test_folds_test_each_row_once_and_keep_clips_together(small, tmp_path):
    prepared = prepare(small, tmp_path / "out", folds=4)
    tested, validated = Counter(), Counter()
    for number in range(4):
        part = prepared.fold("t", number)
        clips = {split: set(part[split].column("source")) for split in SPLITS}
        assert not clips["test"] & clips["train"] and not clips["test"] & clips["validation"] and not clips["train"] & clips["validation"]
        assert sum(map(len, part.values())) == 47 and 10 <= len(part["test"]) <= 13
        assert [row["id"] for row in part["test"]] == part["test"].column("id")
        assert all(sha256_of(row["image"]) == row["sha256"] for row in part["validation"])
        tested.update(part["test"].column("id"))
        validated.update(part["validation"].column("id"))
    assert len(tested) == len(validated) == 47 and {*tested.values(), *validated.values()} == {1}


@settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(1, 90), st.integers(1, 4), st.integers(3, 6), st.integers(0, 2**32 - 1))
def test_folds_of_tasks_over_the_same_pictures_agree_as_far_as_their_labels_allow(count, labels, folds, seed):
    "Per label as many rows in each fold as without the other task, and no more pictures in another fold than these numbers force."
    rng = np.random.default_rng(seed)
    hashes = [sha256_of(b"%d" % number) for number in range(count)]
    label = rng.integers(0, labels, count)
    records = [Checked("b", "train", str(i), "", label=str(label[i]), group=hashes[i], sha256=hashes[i]) for i in range(count)]
    first = rng.integers(-1, folds, count)  # -1: the other task doesn't have the picture
    elsewhere = Elsewhere()
    elsewhere.add_folds(records, first)
    alone, found = draw_folds(records, folds, {}), draw_folds(records, folds, {}, elsewhere=elsewhere)
    forced = 0
    for one in range(labels):
        gets = np.bincount(found[label == one], minlength=folds)
        assert (gets == np.bincount(alone[label == one], minlength=folds)).all()
        forced += np.maximum(0, np.bincount(first[(label == one) & (first >= 0)], minlength=folds) - gets).sum()
    assert (found != first)[first >= 0].sum() == forced


def test_no_fold_trains_one_task_on_what_it_tests_in_another(tmp_path):
    write_table(tmp_path, "one.csv", [("ab"[i % 2], i) for i in range(60)])
    write_table(tmp_path, "two.csv", [("ab"[i // 2 % 2], i) for i in range(12, 60)])
    suite = suite_of(tmp_path, all="one.csv")
    suite.tasks.append(suite.tasks[0].model_copy(update={"name": "u", "sources": {"all": {"format": "csv", "path": "two.csv"}}}))

    def shared(prepared, *names) -> int:
        views = [[{split: set(prepared.fold(name, number)[split].column("sha256")) for split in SPLITS} for name in names] for number in range(4)]
        assert all(one["test"] & other["test"] for one, other in views)
        return sum(len(one["test"] & other["train"]) + len(other["test"] & one["train"]) for one, other in views)

    assert shared(prepare(suite, tmp_path / "out", folds=4, workers=0), "t", "u") <= 12  # in four folds of 48 pictures; drawn apart: 54
    before = [splits_of_task(tmp_path / "out" / "s", name) for name in ("t", "u")]
    write_table(tmp_path, "three.csv", [("ab"[i // 3 % 2], i) for i in range(60)])
    suite.tasks.insert(0, suite.tasks[0].model_copy(update={"name": "v", "sources": {"all": {"format": "csv", "path": "three.csv"}}}))
    prepared = prepare(suite, tmp_path / "out", workers=0)  # a task that is new, and first, follows what is there
    assert [splits_of_task(prepared.folder, name) for name in ("t", "u")] == before

    assert shared(prepared, "v", "t") <= 16


def test_folds_stay_when_rows_are_added_or_folds_are_not_mentioned(small, tmp_path, capsys):
    prepare(small, tmp_path / "out", folds=3)
    before = splits_of_task(tmp_path / "out" / "s", "t")
    prepare(small, tmp_path / "out")  # as training does
    assert "up to date" in capsys.readouterr().out
    write_table(tmp_path, "more.csv", [("a", i) for i in range(100, 130)])
    add_rows(tmp_path / "all.csv", *(tmp_path / "more.csv").read_text().split()[1:])
    prepared = prepare(small, tmp_path / "out")
    after = splits_of_task(prepared.folder, "t")
    assert len(after) == 77 and all(after[sha] == place for sha, place in before.items())
    assert prepared.audit["settings"]["folds"] == 3
    assert "fold" not in pq.read_schema(prepare(small, tmp_path / "out", folds=0).folder / "splits.parquet").names


def test_folds_with_a_given_test_set(given, tmp_path):
    del given.tasks[0].sources["validation"]
    prepared = prepare(given, tmp_path / "out", folds=3)
    parts = [prepared.fold("t", number) for number in range(3)]
    assert [len(part["validation"]) for part in parts] == [2, 2, 2] and [len(part["train"]) for part in parts] == [4, 4, 4]
    assert all(part["test"].column("id") == ["test.csv:1", "test.csv:2"] for part in parts)


def test_folds_that_cannot_be(given, small, tmp_path):
    with pytest.raises(InputError, match="3 or more"):
        prepare(given, tmp_path / "out", folds=2)
    with pytest.raises(InputError, match="without folds"):
        prepare(given, tmp_path / "out").fold("t", 0)
    with pytest.raises(InputError, match="nothing to divide into folds"):
        prepare(given, tmp_path / "out", folds=3)
    with pytest.raises(InputError, match="there are 0 to 2"):
        prepare(small, tmp_path / "small", folds=3).fold("t", 3)
    with pytest.raises(InputError, match="leaves no rows for test; prepare with fewer folds"):
        prepare(small, tmp_path / "small", folds=30).fold("t", 29)
    with pytest.raises(InputError, match="workers must be 0"):
        prepare(small, tmp_path / "small", workers=-1)


def test_a_row_that_joins_two_folds_is_in_none():
    records = [Checked("t", "all", sha, "", label="a", group="g", sha256=sha) for sha in ("aa", "bb", "cc")]
    assert draw_folds(records, 3, {"aa": 0, "bb": 2}).tolist() == [0, 2, -1]
    assert draw_folds(records, 3, {"aa": 1}).tolist() == [1, 1, 1]


def test_a_row_that_joins_two_splits_is_quarantined():
    def record(id, sha, group):
        return Checked("t", "all", id, "", label="a", group=group, sha256=sha)

    records = [record("1", "aa", "g"), record("2", "bb", "g"), record("3", "cc", "g"), record("4", "dd", "h")]
    divide(records, FRACTIONS, {"aa": "train", "bb": "test"})
    assert [r.split for r in records[:2]] == ["train", "test"]
    assert records[2].reason == "joins_splits" and records[3].reason is None


def test_a_new_picture_between_two_splits_is_quarantined_and_said_so(tmp_path, capsys):
    def soft(seed):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)

    def save(name, strength, number):  # 18 to 26 of 256 bits lie between strength 0 and 0.2, 8 to 16 from the middle to either
        Image.blend(soft(2 * number), soft(2 * number + 1), strength).save(tmp_path / "img" / f"{name}-{number}.png")
        return f"img/{name}-{number}.png,a,"

    write_table(tmp_path, "all.csv", [("ab"[i % 2], i) for i in range(6)])
    pairs = (0, 2, 3, 6, 9)
    add_rows(tmp_path / "all.csv", *(save(name, strength, number) for number in pairs for name, strength in (("one", 0.0), ("other", 0.2))))
    fractions = {"train": 0.5, "validation": 0.0, "test": 0.5}
    before = splits_of(prepare(suite_of(tmp_path, all="all.csv"), tmp_path / "out", fractions=fractions))
    apart = [number for i, number in enumerate(pairs) if before[f"all.csv:{7 + 2 * i}"] != before[f"all.csv:{8 + 2 * i}"]]
    capsys.readouterr()
    add_rows(tmp_path / "all.csv", save("between", 0.1, apart[0]))
    prepared = prepare(suite_of(tmp_path, all="all.csv"), tmp_path / "out", fractions=fractions)
    row = prepared.quarantine().iloc[0]
    assert len(prepared.quarantine()) == 1 and (row["id"], row["reason"]) == ("all.csv:17", "joins_splits")
    assert row["detail"] == "nearly equals, or has one source with, pictures of test and train"
    assert splits_of(prepared) == before  # no old row moves
    assert (prepared.audit["rows_read"], sum(prepared.counts().loc["t"])) == (17, 16)
    assert "a new row that nearly equals old rows of different splits" in capsys.readouterr().out
    assert "nearly equals, or has one source with, pictures of test and train" in (prepared.folder / "audit.html").read_text()


def hashed(id: str, flipped: int, source=None) -> Checked:
    "A row whose perceptual hash has so many of 256 bits set, and whose sha256 begins with its id."
    return Checked("t", "all", id, id, "a", source=source, sha256=id * 8, phash=f"{(1 << flipped) - 1:064x}", format="PNG", width=1, height=1)


def test_only_the_row_that_joins_is_quarantined_and_the_groups_fall_apart():
    records = [hashed("a", 0), hashed("b", 60), hashed("c", 8), hashed("d", 14), hashed("e", 29), hashed("f", 44), hashed("g", 52), hashed("h", 200, "clip"), hashed("i", 60, "clip")]
    task = Task(name="t", question="?", labels=["a", "b"], sources={"all": {}})
    module.settle_splits(module.check_rows(task, records, Limits(), FRACTIONS, {"a" * 8: "train", "b" * 8: "test", "h" * 8: "validation"}))
    found = {record.id: (record.split, record.reason) for record in records}
    assert {id for id, (_, reason) in found.items() if reason} == {"f", "i"}  # f: a-c-d-e-f-b; i equals b and is of h's clip
    assert {id: split for id, (split, reason) in found.items() if not reason} == dict.fromkeys("acde", "train") | dict.fromkeys("bg", "test") | {"h": "validation"}
    assert records[0].group != records[1].group and not any("near_duplicate" in record.notes for record in records)
    assert [records[i].detail for i in (5, 8)] == ["nearly equals, or has one source with, pictures of test and train", "nearly equals, or has one source with, pictures of test and validation"]


@pytest.mark.parametrize("first", [True, False])
def test_a_copy_of_a_train_picture_with_the_source_of_a_test_row_is_quarantined(first):
    old = [hashed("a", 0, "one"), hashed("b", 60, "one"), hashed("c", 120, "two"), hashed("d", 180, "three")]
    copy = hashed("a", 0, "two")
    records = [copy, *old] if first else [*old, copy]
    task = Task(name="t", question="?", labels=["a", "b"], sources={"all": {}})
    module.settle_splits(module.check_rows(task, records, Limits(), FRACTIONS, {"a" * 8: "train", "b" * 8: "train", "c" * 8: "test", "d" * 8: "test"}))
    assert [record.split for record in old] == ["train", "train", "test", "test"] and not any(record.reason for record in old)
    assert (copy.reason, copy.detail) == ("joins_splits", "nearly equals, or has one source with, pictures of test and train")


def small_buckets(monkeypatch, rows: int) -> None:
    for owner, name in ((audit, "BUCKET"), (module, "BUCKET"), (audit, "BLOCK"), (module, "BLOCK"), (module, "TABLE_GROUP"), (module, "TABLE_ROWS"), (forecast, "PART")):
        monkeypatch.setattr(owner, name, rows)


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    "Checks and splits; folds; the tables and the report; places prepared before: of rows of which some are copies, with buckets of 100."
    task = Task(name="t", question="?", labels=["a", "b"], sources={"all": {"format": "csv", "path": "all.csv"}})
    suite = Suite(name="s", folder=tmp_path, tasks=[task])
    small_buckets(monkeypatch, 100)

    def peaks(rows: int, traced: bool = True) -> np.ndarray:
        shas = np.random.default_rng(0).integers(0, 256, (rows, 64), dtype=np.uint8)
        shas[::10] = shas[1::10]
        copies, shas = 2 * len(shas[::10]), shas.tobytes()
        found = (Checked("t", "all", f"row-{i}", f"all.csv, row {i}", "ab"[i % 2], name=f"{i:06}.png", format="PNG", width=24, height=16,
                         sha256=shas[64 * i : 64 * i + 32].hex(), phash=shas[64 * i + 32 : 64 * i + 64].hex(), asked="?") for i in range(rows))
        progress = module.Progress(tmp_path / str(rows))
        progress.begin("key")
        if traced:
            tracemalloc.start()
        audit, peak = Audit("s", Records(found, progress.spill), settings={"limits": {}, "fractions": FRACTIONS, "folds": 3}), []

        def step(function, *arguments):
            tracemalloc.reset_peak()
            result = function(*arguments)
            peak.append(tracemalloc.get_traced_memory()[1])
            return result

        audit.remarks["t"] = step(lambda: module.settle_splits(module.check_rows(task, audit.records, Limits(), FRACTIONS, {})))
        progress.keep_task(0, audit)
        step(lambda: module.assigned_folds(suite, audit, module.Drawn(suite, audit), {}))
        report = step(module.write_tables, progress.next, audit, suite, module.Former())
        (progress.next / "audit.json").write_text(json.dumps({"settings": {"folds": 3}}))
        places = step(module.previous_places, progress.next, "fold", "folds", 3, progress.state)
        step(lambda: sum(1 for _ in module.Former(progress.next, {}, places).gone(module.Drawn(suite, Audit("s", Records(), settings=audit.settings)))))
        assert report["rows_read"] == rows and report["notes"]["two_labels"] == copies
        tracemalloc.stop()
        return np.array(peak)

    few, many = [peaks(400, traced) for traced in (False, True, True)][-1], peaks(2000)  # before: imports, tokenizers, caches
    assert ((many - few) / 1600 < 50).all()  # columns in memory add 50 to 90, pages of records 141; of single arrays see the next test


def peak(function, *arguments) -> int:
    "The most bytes of Python's and numpy's that a call holds at a time."
    gc.collect()
    tracemalloc.start()
    function(*arguments)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_no_array_over_the_rows_is_in_memory(tmp_path, monkeypatch):
    "Beyond a bucket, more rows take less than a byte a row more at any moment."
    small_buckets(monkeypatch, 5000)

    def peaks(rows: int) -> np.ndarray:
        rng, places = np.random.default_rng(0), module.Places(rows, {0, 1, 2}, tmp_path)
        places.hashes[:], places.codes[:] = rng.integers(-(2**63), 2**63, rows), rng.integers(0, 3, rows)
        hashes, unit, two = module.zeros(32 * rows, np.uint8, tmp_path).reshape(rows, 32), module.counting(rows), module.counting(2)
        unit //= 3
        steps = [(audit.band_keys, hashes, np.arange(20)), (audit.near_components, hashes[: rows // 20], 16), (module.argsorted, [places.hashes, unit]), (module.rows_by_unit, unit),
                 (audit.join, audit.counting(rows), [two[None]]), (audit.numbers_of, places.codes), (places.settle,), (places.pictures,), (audit.distinct, module.taken(places.hashes, unit))]
        return np.array([peak(*step) for step in steps])

    growth = peaks(200_000) - peaks(20_000)
    assert (growth < 180_000).all(), growth


def test_small_buckets_give_the_same_files(undisturbed, tmp_path, monkeypatch):
    "Of checks across rows; tables of Parquet have row groups of their own then."
    folder, expected, _ = undisturbed
    small_buckets(monkeypatch, 5)
    assert finish(folder, tmp_path) == 52
    found = tree(tmp_path / "s")
    assert {name: content for name, content in found.items() if name not in ("splits.parquet", "quarantine.parquet")} == {
        name: content for name, content in expected.items() if name not in ("splits.parquet", "quarantine.parquet")}
    for name in ("splits.parquet", "quarantine.parquet"):
        assert pq.read_table(tmp_path / "s" / name).equals(pq.read_table(folder / "out" / "s" / name))


def test_no_temporary_file_is_left_and_a_full_disk_is_said(given, tmp_path, monkeypatch):
    small_buckets(monkeypatch, 4)
    monkeypatch.setattr(audit.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RunFailure, match="No space left on device"):
        prepare(given, tmp_path / "out", workers=0)
    monkeypatch.undo()
    prepare(given, tmp_path / "out", workers=0)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [".s.lock", "s"]


def test_labels_whose_tokens_begin_anothers_are_remarked(tmp_path, capsys):
    "Which labels those are, transformers says, with the small model's tokenizer."
    labels = ["phone", "phone number", "fax"]
    ids = AutoTokenizer.from_pretrained(ASSETS / "small")
    tokens = {label: ids(label, add_special_tokens=False)["input_ids"] for label in labels}
    begins = [(a, b) for a in labels for b in labels if a != b and tokens[b][: len(tokens[a])] == tokens[a]]
    assert begins == [("phone", "phone number")]
    write_table(tmp_path, "all.csv", [(labels[i % 3], i) for i in range(30)])
    for declared, said in ((labels, True), (["phone number", "fax", "mobile"], False)):
        if not said:
            write_table(tmp_path, "all.csv", [(declared[i % 3], i) for i in range(30)])
        suite = Suite(name="s", folder=tmp_path, tasks=[Task(name="t", question="?", labels=declared, sources={"all": {"format": "csv", "path": "all.csv"}})])
        prepared = prepare(suite, tmp_path / "out", workers=0)
        remarks = [remark for remark in prepared.audit["tasks"]["t"]["remarks"] if "beginning of another" in remark]
        assert [("'phone' of 'phone number'" in remark) for remark in remarks] == [True] * said
        assert ("'phone' of 'phone number'" in capsys.readouterr().out) == said
        assert ("beginning of another" in (prepared.folder / "audit.html").read_text()) == said


@pytest.mark.parametrize("folds", [0, 3])
def test_a_row_that_leaves_and_returns_keeps_its_place(tmp_path, folds):
    write_table(tmp_path, "all.csv", [("ab"[i % 2], i) for i in range(30)])
    suite, text = suite_of(tmp_path, all="all.csv"), (tmp_path / "all.csv").read_text()

    def places() -> dict:
        table = pq.read_table(prepare(suite, tmp_path / "out", folds=folds, workers=0).folder / "splits.parquet").to_pandas()
        return dict(zip(table["sha256"], zip(table["split"], table.get("fold", table["split"]), strict=True), strict=True))

    before = places()
    lines = text.splitlines(keepends=True)
    for kept in (lines[:1] + lines[12:], lines[:1] + lines[15:]):  # gone for two preparations
        (tmp_path / "all.csv").write_text("".join(kept))
        assert places().items() < before.items()
    (tmp_path / "all.csv").write_text(text.replace("img/3.png,b", "img/3.png,wrong"))  # and one in quarantine for one more
    assert len(places()) == 29 and (tmp_path / "out" / "s" / "former-splits.parquet").exists()
    (tmp_path / "all.csv").write_text(lines[0] + "".join(lines[:0:-1]))
    assert places() == before and not (tmp_path / "out" / "s" / "former-splits.parquet").exists()


def test_near_duplicates_across_given_splits_are_noted_and_kept(given, tmp_path):
    soft = Image.fromarray(np.random.default_rng(5).integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    soft.save(tmp_path / "img" / "soft.png")
    soft.save(tmp_path / "img" / "soft.jpg", quality=85)
    add_rows(tmp_path / "train.csv", "img/soft.png,a,")
    add_rows(tmp_path / "test.csv", "img/soft.jpg,a,")
    prepared = prepare(given, tmp_path / "out", workers=0)
    report = prepared.audit
    assert report["notes"] == {"near_duplicate": 2} and report["quarantined"] == 0
    assert {(each["split"], each["id"]) for each in report["examples"]["near_duplicate"]} == {("train", "train.csv:7"), ("test", "test.csv:3")}
    assert all("lies in test, train" in each["detail"] for each in report["examples"]["near_duplicate"])


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


def test_a_second_process_waits_and_says_so(given, tmp_path, capsys):
    ended = []
    waiting = threading.Thread(target=lambda: (prepare(given, tmp_path / "out", workers=0), ended.append(True)), daemon=True)
    with sole_use(tmp_path / "out" / ".s.lock", lambda: RunFailure("held by another")):
        waiting.start()
        waiting.join(0.5)
        assert not ended and f"{tmp_path / 'out' / 's'}: another process is preparing this suite; waiting for it" in capsys.readouterr().out
    waiting.join(60)
    assert ended and Prepared(tmp_path / "out" / "s").audit["rows_read"] == 10


def test_a_failure_leaves_the_old_state(given, tmp_path):
    prepared = prepare(given, tmp_path / "out")
    before = tree(prepared.folder)
    (tmp_path / "train.csv").write_text("image,lable\n")
    with pytest.raises(InputError, match=r"task t, train: .*no column 'label'.*Did you mean 'lable'"):
        prepare(given, tmp_path / "out")
    assert tree(prepared.folder) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".lock")) == ["s"]


# --- kill -9 ----------------------------------------------------------------------------------

def dying(owner, name: str, times: int):
    "Replace a function by one that is killed instead of running for the (times + 1)-th time."
    function, calls = getattr(owner, name), iter(range(times))

    def counted(*arguments, **options):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, counted)


def prepare_in_child(folder, out, workers, place, times) -> None:
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared by all that are forked from here: one killed while it draws would stop the others for good
    inspect = module.inspect_row

    def slowly(*arguments):
        with open(folder / "inspected", "a") as file:
            file.write("x")
        time.sleep(0.01)
        return inspect(*arguments)

    module.inspect_row, module.CHUNK_ROWS, module.ROWS_BEFORE_WORKERS, module.GROUP_ROWS = slowly, 4, 8, 3
    audit.forecast = lambda *_: {}  # imports transformers, which takes longer than all the rest
    if place:
        owner, _, name = place.partition(".")
        dying({"module": module, "Path": Path, "shutil": shutil, "Progress": module.Progress}[owner], name, times)
    module.prepare(two_tasks(folder), out, workers=workers, folds=3)


def two_tasks(folder) -> Suite:
    one = {"all": {"format": "csv", "path": "all.csv"}}
    two = {"train": {"format": "csv", "path": "train.csv"}, "test": {"format": "csv", "path": "test.csv"}}
    return Suite(name="s", folder=folder, tasks=[
        Task(name=name, question="?", labels=["a", "b"], sources=sources) for name, sources in (("one", one), ("two", two))])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "A suite of 52 rows in 14 chunks, one picture broken, and what preparing it gives."
    folder = tmp_path_factory.mktemp("suite")
    write_table(folder, "all.csv", [("ab"[i % 2], i, f"clip{i // 2}") for i in range(24)])
    write_table(folder, "train.csv", [("ab"[i % 2], i) for i in range(100, 120)])
    write_table(folder, "test.csv", [("ab"[i % 2], i) for i in range(200, 208)])
    (folder / "img" / "7.png").write_bytes(picture(7)[:60])
    prepare(two_tasks(folder), folder / "warm", workers=0)  # imports what its children need
    began = time.perf_counter()
    finish(folder, folder / "out")
    return folder, tree(folder / "out" / "s"), time.perf_counter() - began


def child(folder, out, workers=0, place="", times=0):
    (folder / "inspected").write_text("")
    process = multiprocessing.get_context("fork").Process(target=prepare_in_child, args=(folder, out, workers, place, times))
    process.start()
    return process


def end(process) -> int:
    process.join(60)
    return process.exitcode


def finish(folder, out, workers=0) -> int:
    "Prepare to the end; returns how many rows were inspected."
    assert end(child(folder, out, workers)) == 0
    assert [path.name for path in sorted(out.iterdir()) if not path.name.endswith(".lock")] == ["s"]
    return len((folder / "inspected").read_text())


PLACES = [  # the call that kill -9 comes before, and how many of its calls went well
    ("module.write_chunk", 0), ("module.write_chunk", 5), ("module.settle_splits", 1), ("Progress.keep_task", 1), ("module.write_task", 0), ("module.write_task", 1),
    ("Progress.finish_task", 0), ("module.write_tables", 0), ("Progress.publish", 0), ("Path.rename", 3),
    ("Path.rename", 13), ("shutil.rmtree", 4), ("shutil.rmtree", 7), ("shutil.rmtree", 9), ("shutil.rmtree", 10)]


@pytest.mark.parametrize(("place", "times"), PLACES)
def test_killed_anywhere_it_continues_and_ends_the_same(undisturbed, tmp_path, place, times):
    folder, expected, _ = undisturbed
    assert end(child(folder, tmp_path, 0, place, times)) == -signal.SIGKILL
    before = len((folder / "inspected").read_text())
    after = finish(folder, tmp_path)
    assert tree(tmp_path / "s") == expected
    assert before + after <= 52 + 4  # at most one chunk is inspected twice


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_time_with_workers(undisturbed, tmp_path, seed):
    folder, expected, seconds = undisturbed
    reading, writing = os.pipe()
    process = child(folder, tmp_path, 2)
    os.close(writing)
    time.sleep(np.random.default_rng(seed).uniform(0, seconds))
    process.kill()
    assert select.select([reading], [], [], 10)[0], "a worker outlived its parent"  # its end of the pipe is open
    os.close(reading)
    finish(folder, tmp_path, 2)
    assert tree(tmp_path / "s") == expected


@pytest.mark.parametrize("place", [("Path.rename", 23), ("Path.rename", 24)])
def test_killed_while_replacing_it_keeps_the_old_splits(undisturbed, tmp_path, place):
    source, _, _ = undisturbed
    folder = tmp_path / "suite"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("out"))
    finish(folder, tmp_path / "out")
    old = splits_of_task(tmp_path / "out" / "s", "one")
    write_table(folder, "more.csv", [("a", i) for i in range(300, 340)])
    (folder / "all.csv").write_text((folder / "all.csv").read_text() + "".join((folder / "more.csv").read_text().splitlines(True)[1:]))
    assert end(child(folder, tmp_path / "out", 0, *place)) == -signal.SIGKILL
    finish(folder, tmp_path / "out")
    new = splits_of_task(tmp_path / "out" / "s", "one")
    assert len(new) == len(old) + 40 and all(new[key] == value for key, value in old.items())


def splits_of_task(folder, task) -> dict:
    table = pq.read_table(folder / "splits.parquet").to_pandas()
    table = table[table["task"] == task]
    return dict(zip(table["sha256"], zip(table["split"], table["fold"], strict=True), strict=True))


def test_other_settings_do_not_take_up_what_was_begun(undisturbed, tmp_path):
    folder, _, _ = undisturbed
    assert end(child(folder, tmp_path, 0, "module.write_tables", 0)) == -signal.SIGKILL
    (tmp_path / ".s.state" / "0000.json").write_text("{}")  # would be believed
    prepared = prepare(two_tasks(folder), tmp_path, limits=Limits(near_bits=1))
    assert prepared.audit["rows_read"] == 52 and sorted(path.name for path in tmp_path.iterdir() if "lock" not in path.name) == ["s"]


def test_a_damaged_chunk_or_task_is_read_again(undisturbed, tmp_path):
    folder, expected, _ = undisturbed
    assert end(child(folder, tmp_path, 0, "module.write_task", 1)) == -signal.SIGKILL
    chunk = tmp_path / ".s.state" / "0001" / "train-000002.arrow"
    chunk.write_bytes(chunk.read_bytes()[:-100])  # as after a power cut
    (tmp_path / ".s.next" / "one" / "train-00000.parquet").write_bytes(b"PAR1")
    assert finish(folder, tmp_path) == 24 + 4
    assert tree(tmp_path / "s") == expected


def test_workers_give_the_same_files(undisturbed, tmp_path):
    folder, expected, _ = undisturbed
    for workers in (1, 3):
        assert finish(folder, tmp_path / str(workers), workers) == 52
        assert tree(tmp_path / str(workers) / "s") == expected


def test_a_worker_that_dies_is_a_clear_failure(given, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_BEFORE_WORKERS", 0)
    monkeypatch.setattr(module, "inspect_row", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunFailure, match=r"a worker process died.*fewer workers"):
        prepare(given, tmp_path / "out", workers=1)


def test_image_bytes_in_memory_stay_bounded(tmp_path, monkeypatch):
    "60 pictures of 0.5 MB are read and written with a tenth of that in Arrow's memory."
    import pyarrow as pa

    write_table(tmp_path, "all.csv", [("ab"[i % 2], i) for i in range(2)])
    pixels = np.random.default_rng(0)
    for i in range(60):
        picture = Image.fromarray(pixels.integers(0, 256, (300, 600, 3), dtype=np.uint8))
        picture.save(tmp_path / "img" / f"{i}.bmp")
    (tmp_path / "all.csv").write_text("image,label\n" + "".join(f"img/{i}.bmp,a\n" for i in range(60)))
    for name, value in (("CHUNK_ROWS", 8), ("SHARD_BYTES", 4_000_000)):
        monkeypatch.setattr(module, name, value)
    allocated = []
    monkeypatch.setattr(module, "stored_row", lambda *arguments: (allocated.append(pa.total_allocated_bytes()), module_stored_row(*arguments))[1])
    prepared = prepare(suite_of(tmp_path, all="all.csv"), tmp_path / "out", workers=0)
    assert len(list((prepared.folder / "t").glob("train-*"))) >= 6 and max(allocated) < 4_000_000
    assert sum(map(len, (prepared.split("t", split) for split in SPLITS))) == 60


module_stored_row = module.stored_row


def test_a_full_disk_is_a_clear_failure(given, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tables", full)
    with pytest.raises(RunFailure, match="No space left on device"):
        prepare(given, tmp_path / "out")
    assert not (tmp_path / "out" / "s").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.sampled_from(['1.png', 'a', 'b', ',', '"', '""', "\n", "\r\n", "\r", '1.png,a\n', '"1.png","b"\n', "x" * 300]), max_size=14))
def test_any_quotes_and_breaks_lose_no_row(tmp_path, pieces):
    text = "".join(["image,label\n1.png,a\n", *pieces])
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "all.csv").write_text(text, newline="")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    try:
        counts = prepare(suite_of(tmp_path, all="all.csv"), tmp_path / "out", workers=0).audit
    except InputError as error:
        assert "all.csv, line " in str(error) and '"' in text
        return
    quoted = re.sub(r'(?:(?<=[,\r\n])|\A)"(?:[^"]|"")*"', "q", text)  # whole cells in quotes may hold breaks, and nothing else may
    rows = [line for line in re.split(r"\r\n|\r|\n", quoted)[1:] if line]
    assert counts["rows_read"] == len(rows) == counts["accepted"] + counts["repaired"] + counts["quarantined"]


def test_a_name_that_is_too_long_and_a_loose_picture_are_quarantined(tmp_path):
    write_table(tmp_path, "all.csv", [("ab"[i % 2], i) for i in range(4)])
    add_rows(tmp_path / "all.csv", "x" * 300 + ".png,a,")
    for label in "ab":
        (tmp_path / "f" / label).mkdir(parents=True)
        (tmp_path / "f" / label / "1.png").write_bytes(picture(ord(label)))
    (tmp_path / "f" / "lost.png").write_bytes(picture(9))
    (tmp_path / "f" / "notes.txt").touch()
    suite = suite_of(tmp_path, all="all.csv")
    suite.tasks.append(Task(name="f", question="?", labels=["a", "b"], sources={"test": {"format": "folder", "path": "f"}}))
    prepared = prepare(suite, tmp_path / "out", workers=0)
    assert prepared.audit["rows_read"] == 8 and prepared.audit["reasons"] == {"missing_file": 1, "empty_label": 1}
    assert any("notes.txt" in remark and "lost" not in remark for remark in prepared.audit["tasks"]["f"]["remarks"])


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


def test_shuffled_access_reads_little_more_than_the_row(tmp_path, monkeypatch):
    write_table(tmp_path, "all.csv", [("a", 0)])
    pixels = np.random.default_rng(0)
    for i in range(100):
        Image.fromarray(pixels.integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(tmp_path / "img" / f"{i}.png")  # 180 kB
    (tmp_path / "test.csv").write_text("image,label\n" + "".join(f"img/{i}.png,a\n" for i in range(100)))
    rows = Rows(prepare(suite_of(tmp_path, test="test.csv"), tmp_path / "out").split("t", "test").files, cache_bytes=1)
    read = []
    original = Rows.read_group
    monkeypatch.setattr(Rows, "read_group", lambda self, group: read.append(original(self, group)) or read[-1])
    order = np.random.default_rng(0).permutation(100)
    assert all(sha256_of(rows.image(i)) == rows.table["sha256"][i].as_py() for i in order.tolist())
    wanted = sum(len(rows.image(i)) for i in range(100))
    assert sum(map(len, map(b"".join, read[:100]))) < 8 * wanted  # not the 16 MB group it used to be: 90 times
    assert len(rows.opened) == 1


def test_streaming_gives_the_same_rows_with_one_group_in_memory(given, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP_ROWS", 2)
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    del given.tasks[0].sources["validation"]
    prepared = prepare(given, tmp_path / "out", fractions={"train": 1.0, "validation": 0.0, "test": 0.0})
    assert list(prepared.stream("t", "train")) == list(prepared.split("t", "train"))
    assert list(prepared.stream("t", "validation")) == []
    shuffled = list(prepared.stream("t", "train").shuffle(seed=0, buffer_size=4))
    assert sorted(row["id"] for row in shuffled) == sorted(prepared.split("t", "train").column("id"))
    parts = [list(prepared.stream("t", "train").shard(3, i)) for i in range(3)]  # a machine each
    assert sorted(row["id"] for part in parts for row in part) == sorted(row["id"] for row in shuffled)


def test_rows_in_data_loader_workers(given, tmp_path):
    from torch.utils.data import DataLoader

    rows = prepare(given, tmp_path / "out").split("t", "train")
    assert rows.image(0)  # opens the file here, before the workers start
    assert [row for batch in DataLoader(rows, 2, num_workers=2, collate_fn=list) for row in batch] == list(rows)


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


def test_a_fold_held_out_is_what_training_and_scoring_see(tmp_path):
    write_table(tmp_path, "all.csv", [("ab"[n % 2], n) for n in range(40)])
    drawn = suite_of(tmp_path, all="all.csv")
    prepared = prepare(drawn, tmp_path / "out", folds=4, workers=0)
    name = prepared.tasks[0]
    views = [prepared.holding_out(number) for number in range(4)]
    tests = [view.split(name, "test").column("id") for view in views]
    assert sorted(id for ids in tests for id in ids) == sorted(id for split in SPLITS for id in prepared.split(name, split).column("id"))
    for view, test in zip(views, tests, strict=True):
        parts = [view.split(name, split).column("id") for split in SPLITS]
        assert not set(parts[0]) & set(test) and sum(map(len, parts)) == 40
        assert view.counts().loc[name].tolist() == [len(part) for part in parts]
    assert len({view.audit["fingerprint"] for view in [prepared, *views]}) == 5 and prepared.held_out is None
    with pytest.raises(InputError, match="there is no fold 4"):
        prepared.holding_out(4)
    with pytest.raises(InputError, match="prepared without folds"):
        prepare(drawn, tmp_path / "plain", workers=0).holding_out(0)


def test_each_image_file_is_read_once(given, tmp_path, monkeypatch):
    opened = Counter()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (opened.update([path.name]), read(path))[1])
    prepared = prepare(given, tmp_path / "out", workers=0)
    pictures = {name: times for name, times in opened.items() if name.endswith(".png")}
    assert prepared.audit["accepted"] and set(pictures.values()) == {1}
