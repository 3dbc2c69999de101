"""`qwen2vl-sft prepare`: from data that nobody has described, strictly, with a recipe's forecast."""

import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from qwen2vl_sft import cli
from qwen2vl_sft.data.prepare import Prepared


@pytest.fixture
def pets(project):
    "Twenty pictures with labels in a CSV file whose columns have names of its own."
    rng = np.random.default_rng(0)
    (project / "data").mkdir()
    with open(project / "data" / "pets.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "breed"])
        for number in range(20):
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(project / "data" / f"{number}.png")
            table.writerow([f"{number}.png", ["cat", "dog"][number % 2]])
    return project / "data"


def test_from_a_table_to_prepared_data_without_edits(pets, project, capsys):
    assert cli.main(["prepare", "--from", str(pets / "pets.csv"), "--strict"]) == 0
    shown = capsys.readouterr().out
    for part in ("read as csv from pets.csv", "image: file", "label: breed", "20 rows", "cat 10, dog 10", "sample:", f"wrote {pets / 'suite.yaml'}"):
        assert part in shown
    prepared = Prepared(project / "prepared" / "pets")
    assert prepared.suite.task("pets").labels == ["cat", "dog"] and prepared.audit["accepted"] == 20
    assert cli.main(["prepare", "--from", str(pets / "pets.csv")]) == 0  # again: nothing changes
    assert cli.main(["prepare", str(pets / "suite.yaml")]) == 0


def test_an_edited_suite_is_not_overwritten(pets, capsys):
    assert cli.main(["prepare", "--from", str(pets / "pets.csv")]) == 0
    edited = (pets / "suite.yaml").read_text().replace("Which label fits", "Which pet fits")
    (pets / "suite.yaml").write_text(edited)
    capsys.readouterr()
    assert cli.main(["prepare", "--from", str(pets / "pets.csv")]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "exists already; prepare it with `qwen2vl-sft prepare" in shown.err and shown.out == ""
    assert (pets / "suite.yaml").read_text() == edited


def test_the_suite_can_be_written_elsewhere(pets, project, capsys):
    assert cli.main(["prepare", "--from", str(pets / "pets.csv"), "--out", str(project / "suites" / "mine.yaml")]) == 0
    content = yaml.safe_load((project / "suites" / "mine.yaml").read_text())
    assert content["tasks"][0]["sources"]["all"]["path"] == "../data/pets.csv" and not (pets / "suite.yaml").exists()


def test_strict_exits_with_2_after_preparing(pets, project, capsys):
    (pets / "3.png").write_bytes(b"no picture")
    assert cli.main(["prepare", "--from", str(pets / "pets.csv")]) == 0
    assert cli.main(["prepare", str(pets / "suite.yaml"), "--strict"]) == 2
    assert "1 row is quarantined" in capsys.readouterr().err
    assert Prepared(project / "prepared" / "pets").audit["reasons"] == {"not_an_image": 1}


def test_the_forecast_of_a_recipe(pets, project, root, capsys):
    recipe = str(root / "recipes" / "qwen2-vl-7b-mix.yaml")
    assert cli.main(["prepare", "--from", str(pets / "pets.csv"), "--recipe", recipe]) == 0
    *_, line, stand_in = capsys.readouterr().out.splitlines()
    assert line.startswith("Qwen/Qwen2-VL-7B-Instruct, at most 571,536 pixels") and "1 steps of 32 an epoch" in line and "qlora" in line
    assert "counted with the small model's tokenizer" in stand_in
    (plan,) = Prepared(project / "prepared" / "pets").audit["forecast"].items()
    assert plan[0] == "Qwen/Qwen2-VL-7B-Instruct" and plan[1]["max_pixels"] == 571_536 and plan[1]["tokenizer"] == "small, as a stand-in"
    page = (project / "prepared" / "pets" / "audit.html").read_text()
    assert page.count('<section id="forecast">') == 1 and "Qwen2-VL-7B" in page and "Qwen2-VL-2B" not in page
    assert cli.main(["prepare", str(pets / "suite.yaml")]) == 0  # nothing to do, and the forecast stays
    assert list(Prepared(project / "prepared" / "pets").audit["forecast"]) == ["Qwen/Qwen2-VL-7B-Instruct"]


def test_a_tiny_table_says_what_is_missing(project, capsys):
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(project / f"{number}.png")
    (project / "t.csv").write_text("image,label\n0.png,yes\n1.png,no\n2.png,yes\n")
    assert cli.main(["prepare", "--from", str(project / "t.csv")]) == 0
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "task t (closed, 2 labels, 3 rows)" in text and "1 task\n" in text and "1 tasks" not in text
    assert "no rows in test: nothing can be measured" in text


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "name either a suite file or, with --from"),
    (["suite.yaml", "--from", "data"], "name either a suite file or, with --from"),
    (["--from", "nothing"], "doesn't exist"),
    (["data/pets.csv"], "if it holds data: qwen2vl-sft prepare --from data/pets.csv"),
    (["data"], "prepare --from data"),
    (["--from", "data/pets.csv", "--recipe", "nothing.yaml"], "no such file"),
])
def test_bad_input_is_one_line(pets, project, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(project)
    assert cli.main(["prepare", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and message in shown.err and shown.out == ""


def test_random_bytes_in_every_format_are_no_traceback(project, capsys):
    rng = np.random.default_rng(0)
    for suffix in ("csv", "tsv", "json", "jsonl", "parquet", "xlsx", "zip"):
        for size in (0, 1, 40, 4000):
            file = project / f"x.{suffix}"
            file.write_bytes(rng.bytes(size))
            assert cli.main(["prepare", "--from", str(file)]) == 2
            assert capsys.readouterr().err.count("\n") == 1


def test_rows_without_a_picture_are_counted_not_fatal(pets, project, capsys):
    turns = [{"from": "human", "value": "<image>Which pet?"}, {"from": "gpt", "value": "cat"}]
    records = [{"image": f"{i}.png", "conversations": [turns[0], turns[1] | {"value": ["cat", "dog"][i % 2]}]} for i in range(20)]
    records += [{"conversations": turns}, {"image": ["1.png", "2.png"], "conversations": turns}, {"image": "3.png", "conversations": turns * 2}, 7]
    (pets / "chat.json").write_text(json.dumps(records))
    assert cli.main(["prepare", "--from", str(pets / "chat.json")]) == 0
    audit = Prepared(project / "prepared" / "chat").audit
    assert audit["rows_read"] == 24 and audit["reasons"] == {"no_image": 1, "several_images": 1, "several_turns": 1, "not_json": 1}


def test_a_new_row_between_two_splits_is_quarantined_and_said_so(project, capsys):
    def soft(seed):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)

    def save(name, strength, pair):  # 0 and 0.2 differ in more than 16 of 256 bits, 0.1 from either in fewer
        Image.blend(soft(2 * pair), soft(2 * pair + 1), strength).save(project / "data" / f"{name}{pair}.png")
        return f"{name}{pair}.png,{'ab'[pair % 2]}\n"

    (project / "data").mkdir()
    rows = "".join(save(name, strength, pair) for pair in range(24) for name, strength in (("one", 0.0), ("other", 0.2)))
    (project / "data" / "all.csv").write_text("image,label\n" + rows)
    (project / "data" / "suite.yaml").write_text("name: s\ntasks: [{name: t, question: q, labels: [a, b], sources: {all: {format: csv, path: all.csv}}}]\n")
    assert cli.main(["prepare", str(project / "data" / "suite.yaml")]) == 0

    def splits():
        prepared = Prepared(project / "prepared" / "s")
        return {id: split for split in ("train", "validation", "test") for id in prepared.split("t", split).column("id")}

    before = splits()
    place = lambda pair, other: before[f"all.csv:{2 * pair + 1 + other}"]
    apart = next(pair for pair in (0, 2, 3, 6, 9, *range(24)) if place(pair, 0) != place(pair, 1))
    with open(project / "data" / "all.csv", "a") as table:
        table.write(save("between", 0.1, apart))
    capsys.readouterr()
    assert cli.main(["prepare", str(project / "data" / "suite.yaml"), "--strict"]) == 2
    shown = capsys.readouterr()
    assert "quarantined: 1 x joins_splits: a new row that nearly equals old rows of different splits" in shown.out
    assert "1 row is quarantined" in shown.err and splits() == before
    row = Prepared(project / "prepared" / "s").quarantine().iloc[0]
    assert row["id"] == "all.csv:49" and row["detail"] == f"nearly equals, or has one source with, pictures of {' and '.join(sorted({place(apart, 0), place(apart, 1)}))}"
