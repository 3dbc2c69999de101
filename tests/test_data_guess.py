"""The guess: every usual shape is understood, what isn't clear is one line, and no row is lost between tasks."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.guess import detect_encoding, guess, label_set, slug, split_of, suite_text, write_guess
from qwen2vl_sft.data.sources import read_rows
from qwen2vl_sft.tasks import load_suite

HOSTILE = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path):
    "Twelve pictures in a folder `img`."
    (tmp_path / "img").mkdir()
    for number in range(12):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / "img" / f"{number}.png")
    return tmp_path


def labels(count=12, names=("cat", "dog")):
    return [(f"img/{i}.png", names[i % len(names)]) for i in range(count)]


def write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def chat(image, question, answer):
    return {"image": image, "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]}


def suite_of(path, out=None):
    "The suite that the guess writes, loaded, and its sources' rows: usable ones and all."
    suite = load_suite(write_guess(guess(path), out))
    rows = [row for task in suite.tasks for source in task.sources.values() for row in read_rows(source, suite.folder)]
    return suite, rows


def error_of(path) -> str:
    with pytest.raises(InputError) as caught:
        guess(path)
    return str(caught.value)


# --- tables -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "delimiter", "header", "encoding"), [
    ("x.csv", ",", "image,label", "utf-8"), ("x.csv", ";", "file;class", "utf-8"), ("x.tsv", "\t", "Path\tLabel", "utf-8-sig"),
    ("x.csv", ",", "图片,标签", "gbk"), ("x.csv", ",", "图片,标签", "utf-16"), ("x.csv", "|", "whatever|else", "utf-8"),
    ("x.tsv", ",", "img,category", "utf-8"),
])
def test_tables(folder, name, delimiter, header, encoding):
    lines = [header] + [delimiter.join(pair) for pair in labels(names=("猫", "狗"))]
    (folder / name).write_bytes(("\n".join(lines) + "\n").encode(encoding))
    suite, rows = suite_of(folder / name)
    assert suite.tasks[0].labels == ["猫", "狗"] and [row.label for row in rows] == ["猫", "狗"] * 6
    assert all(row.path and os.path.exists(row.path) for row in rows)


def test_json_lines_and_parquet(folder):
    records = [{"photo": image, "kind": label, "note": f"n{i}"} for i, (image, label) in enumerate(labels())]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_json(folder / "y.json", records)
    content = (folder / "img" / "1.png").read_bytes()
    pq.write_table(pa.Table.from_pylist([{"p": content, "kind": label} for _, label in labels()]), folder / "z.parquet")
    for name in ("x.jsonl", "y.json", "z.parquet"):
        suite, rows = suite_of(folder / name, folder / f"{name}.yaml")
        assert len(rows) == 12 and suite.tasks[0].labels == ["cat", "dog"] and not any(row.reason for row in rows)


def test_what_is_not_clear_is_an_error_that_lists_the_columns(folder):
    (folder / "x.csv").write_text("image,a,b\n" + "".join(f"img/{i}.png,{i % 2},{i % 3}\n" for i in range(12)))
    assert "which column holds the label isn't clear; its columns: image, a, b" in error_of(folder / "x.csv")
    (folder / "x.csv").write_text("a,b\n1,2\n")
    assert "which column holds the image" in error_of(folder / "x.csv")
    (folder / "x.csv").write_text("img/0.png,cat\nimg/1.png,dog\n")
    assert "the first line looks like data" in error_of(folder / "x.csv")
    (folder / "x.csv").write_bytes("image,label\nimg/0.png,naïve café\n".encode("latin-1"))
    assert "encoding is neither UTF-8 nor clearly GBK" in error_of(folder / "x.csv")
    (folder / "x.csv").write_bytes(b"")
    assert "is empty" in error_of(folder / "x.csv")
    (folder / "x.xlsx").write_bytes(b"PK")
    assert "save spreadsheets as CSV" in error_of(folder / "x.xlsx")
    (folder / "x.csv").write_text("image,label\n,cat\n,dog\n")
    assert "none of its 2 rows can be used: no_image 2" in error_of(folder / "x.csv")
    assert "doesn't exist" in error_of(folder / "nothing")


def test_splits_by_file_name(folder):
    for split in ("train", "val", "test"):
        (folder / f"pets_{split}.csv").write_text("image,label\n" + "".join(f"{a},{b}\n" for a, b in labels()))
    suite, rows = suite_of(folder)
    assert [task.name for task in suite.tasks] == ["pets"] and list(suite.tasks[0].sources) == ["test", "train", "validation"]
    assert [split_of(each) for each in ("a.train", "dev", "training set")] == [("a", "train"), ("", "validation"), ("set", "train")]
    assert len(rows) == 36


def split_sizes(suite):
    return [{split: sum(1 for _ in read_rows(source, suite.folder)) for split, source in task.sources.items()} for task in suite.tasks]


def test_a_column_of_splits_divides_the_table(folder):
    says = ["Train"] * 8 + ["val", "dev", "test", ""]
    records = [{"image": image, "label": label, "split": split, "note": i} for i, ((image, label), split) in enumerate(zip(labels(), says, strict=True))]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n7\n")
    write_json(folder / "chat.json", [chat(r["image"], "Which pet?", r["label"]) | {"kind": r["split"]} for r in records])
    (folder / "x.csv").write_text("image,label,when\n" + "".join(f"{r['image']},{r['label']},{r['split']}\n" for r in records))
    pq.write_table(pa.Table.from_pylist(records), folder / "x.parquet")
    for name, more in (("x.jsonl", 1), ("chat.json", 0), ("x.csv", 0), ("x.parquet", 0)):
        suite, rows = suite_of(folder / name, folder / f"{name}.yaml")
        assert split_sizes(suite) == [{"train": 9 + more, "validation": 2, "test": 1}] and len(rows) == 12 + more
        (test,) = read_rows(suite.tasks[0].sources["test"], folder)
        assert test.path.endswith("10.png")
    said = guess(folder / "x.jsonl").text()
    assert "divided by what column 'split' says" in said and "columns that are not used: note" in said


def test_a_column_that_names_splits_and_more_is_a_question(folder):
    (folder / "x.csv").write_text("image,label,Split\n" + "".join(f"{a},{b},{'train' if i % 2 else 'extra'}\n" for i, (a, b) in enumerate(labels())))
    assert "its column 'Split' names splits, and 'extra' beside them" in error_of(folder / "x.csv")
    (folder / "x.csv").write_text("image,label,split\n" + "".join(f"{a},{b},{'' if i % 2 else 'test'}\n" for i, (a, b) in enumerate(labels())))
    assert "names splits, and nothing in 6 rows beside them" in error_of(folder / "x.csv")
    (folder / "x.csv").write_text("image,label,split\n" + "".join(f"{a},{b},train\n" for a, b in labels()))
    assert list(guess(folder / "x.csv").suite["tasks"][0]["sources"]) == ["all"]


@pytest.mark.parametrize("inside", [".", "data"])
def test_numbered_parts_are_one_table_of_their_split(folder, inside):
    place = folder / "hub [1]" / inside
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train-00000-of-00002", labels()[:4]), ("train-00001-of-00002", labels()[4:8]), ("test-00000-of-00001-0f9c2d", labels()[8:])):
        records = [{"image": {"bytes": (folder / image).read_bytes(), "path": image}, "label": label} for image, label in rows]
        pq.write_table(pa.Table.from_pylist(records), place / f"{name}.parquet")
    suite, _ = suite_of(folder / "hub [1]")
    assert split_sizes(suite) == [{"test": 4, "train": 8}] and guess(folder / "hub [1]").left == []
    (place / "train-00000-of-00002.parquet").unlink()
    assert guess(folder / "hub [1]").left == ["train: only 1 of 2 parts are here"]


def test_a_folder_beside_the_splits_is_no_class(tmp_path):
    for split, label in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog"), ("unlabeled", "x"), ("test", ".")):
        (tmp_path / "s" / split / label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "s" / split / label / "1.png")
    suite, _ = suite_of(tmp_path / "s")
    assert suite.tasks[0].labels == ["cat", "dog"] and split_sizes(suite) == [{"train": 2, "validation": 2}]
    assert guess(tmp_path / "s").left == ["test: pictures without folders of classes", "unlabeled: a folder beside the splits"]
    (tmp_path / "s" / "val").rename(tmp_path / "s" / "more")
    (tmp_path / "s" / "test" / "1.png").unlink()
    assert "whether train is a split or a class isn't clear" in error_of(tmp_path / "s")


def csv_of(path, rows, header="image,label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "\n" + "".join(f"{','.join(row)}\n" for row in rows))


def test_a_stray_table_blocks_nothing(folder):
    csv_of(folder / "pets.csv", labels())
    (folder / "notes.csv").write_text("a,b\n1,2\n")
    (folder / "classes.json").write_text('{\n"0": "cat", "1": "dog"}')
    csv_of(folder / "sample_submission.csv", labels())
    found = guess(folder)
    assert [task["name"] for task in found.suite["tasks"]] == ["pets"]
    assert "# left out: notes.csv: which column" in suite_text(found)
    assert [each.partition(":")[0] for each in found.left] == ["classes.json holds one JSON object; a list of objects is needed, or one object a line",
                                                               "notes.csv", "sample_submission.csv"]
    (folder / "pets.csv").write_bytes("image,label\nimg/0.png,naïve\n".encode("latin-1"))
    assert "encoding is neither" in error_of(folder)  # this one may be what was meant
    for label in ("cat", "dog"):
        (folder / "c" / label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "c" / label / "1.png")
    (folder / "c" / "classes.json").write_text('{"0": "cat", "1": "dog"}')
    assert guess(folder / "c").suite["tasks"][0]["labels"] == ["cat", "dog"]
    csv_of(folder / "c" / "x.csv", [("cat/1.png", "a", "b")], "image,size,colour")
    assert "which column holds the label" in error_of(folder / "c")


def test_an_unlabelled_test_table_leaves_the_others(folder):
    csv_of(folder / "s" / "train.csv", labels()), csv_of(folder / "s" / "val.csv", labels()), csv_of(folder / "s" / "test.csv", [(a,) for a, _ in labels()], "image")
    found = guess(folder / "s")
    assert list(found.suite["tasks"][0]["sources"]) == ["train", "validation"] and found.left[0].startswith("test.csv: which column holds the label")


def test_a_dataset_or_control_without_usable_rows_is_left_out(folder):
    write_json(folder / "pets.json", [chat(image, "Which pet?", label) | {"images": [image]} for image, label in labels()])
    write_json(folder / "identity.json", [{"instruction": "Who are you?", "input": "", "output": "A bot"}] * 3)
    pets = {"file_name": "pets.json", "formatting": "sharegpt"}
    write_json(folder / "dataset_info.json", {"pets": pets, "identity": {"file_name": "identity.json"}, "dpo": pets | {"ranking": True}})
    found = guess(folder)
    assert [task["name"] for task in found.suite["tasks"]] == ["pets"]
    assert "preference pairs" in found.left[0] and "identity: none of its 3 rows can be used: no_image 3; identity.json, row 1: the row names no image" in found.left[1]
    write_json(folder / "dataset_info.json", {"dpo": pets | {"ranking": True}})
    assert "preference pairs" in error_of(folder)


def test_classes_are_as_the_folders_say(tmp_path):
    for split, names in (("train", ["0", "O", "1", "l", "I", "cat"]), ("test", ["0", "O", "1", "l", "I", "Cat"])):
        for name in names:
            (tmp_path / "s" / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "s" / split / name / "1.png")
    found = guess(tmp_path / "s")
    assert sorted(found.suite["tasks"][0]["labels"]) == ["0", "1", "I", "O", "cat", "l"] and "not declared, as they look like a declared label: 'Cat'" in found.text()
    for number in range(120):
        (tmp_path / "m" / f"breed {number}").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "m" / f"breed {number}" / "1.png")
    assert len(guess(tmp_path / "m").suite["tasks"][0]["labels"]) == 120


def test_why_answers_are_open_is_said(folder):
    for names, why in ((["ok"], "there is one answer only"), ([f"t{i}" for i in range(12)], "many answers occur once")):
        csv_of(folder / "x.csv", labels(names=names))
        assert f"open text, since {why}" in guess(folder / "x.csv").text()
    csv_of(folder / "x.csv", [(f"img/{i % 12}.png", f"t{i}") for i in range(120)])
    assert "there are 120 different answers; state `labels`" in guess(folder / "x.csv").text()


def test_a_second_table_of_a_folder_gets_its_own_suite_file(folder):
    csv_of(folder / "cats.csv", labels()), csv_of(folder / "cars.csv", labels(names=("car", "bus")))
    assert [write_guess(guess(folder / name)).name for name in ("cats.csv", "cars.csv", "cats.csv", "cars.csv")] == [
        "suite.yaml", "cars.suite.yaml", "suite.yaml", "cars.suite.yaml"]


def test_texts_that_are_none(folder):
    file = folder / "x.jsonl"
    file.write_text('{"image": "img/0.png", "la\\ud83dbel": "cat"}\n')
    assert r"the name of the column 'la\ud83dbel' is not text" in error_of(file)
    table = pa.table({"image": ["img/0.png"] * 4, "label": pa.array([b"\xb9\xb7", b"\xc3\xa8"] * 2).view(pa.string())})
    pq.write_table(table, folder / "x.parquet")
    assert "a text in it is not UTF-8" in error_of(folder / "x.parquet")
    with pytest.raises(InputError, match="is not UTF-8"):
        list(read_rows({"format": "parquet", "path": "x.parquet"}, folder))
    write_json(folder / "studio.json", [])
    (folder / "studio.json").write_text(json.dumps([{"data": {"image": "img/0.png"}, "annotations": [{"result": [{"type": "choices", "from_name": "an\ud83d"}]}]}]))
    assert "is not text (half a character)" in error_of(folder / "studio.json")


def test_control_characters_do_not_reach_the_terminal(folder):
    csv_of(folder / "x.csv", labels(names=("\x1b[31mred", "\u202eevil", "")))
    text = guess(folder / "x.csv").text()
    assert "\x1b" not in text and "\u202e" not in text and "(empty) 4" in text


def test_samples_show_several_labels(folder):
    for label in ("cat", "dog"):
        (folder / "c" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (4, 4)).save(folder / "c" / label / f"{number}.png")
        (folder / "c" / label / "!Thumbs.db").write_bytes(b"x")
    (_, reading), = guess(folder / "c").origins
    assert [row.label for row in reading.samples] == ["cat", "dog", "cat"] and all(row.path.endswith(".png") for row in reading.samples)


def test_delimiters_quotes_and_blank_lines(folder):
    (folder / "a.csv").write_text("\n\nImage path (relative, posix);label\n" + "".join(f"{a};{b}\n\n" for a, b in labels()))
    suite, rows = suite_of(folder / "a.csv", folder / "a.yaml")
    assert len(rows) == 12 and suite.tasks[0].labels == ["cat", "dog"]
    (folder / "b.tsv").write_text("image\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in labels(names=('"big" one', '5"'))))
    suite, rows = suite_of(folder / "b.tsv", folder / "b.yaml")
    assert suite.tasks[0].labels == ['"big" one', '5"'] and suite.tasks[0].sources["all"]["quotes"] is False
    (folder / "c.tsv").write_text("image\tlabel\n" + "".join(f'{a}\t"the ""{b}"""\n' for a, b in labels()))
    suite, rows = suite_of(folder / "c.tsv", folder / "c.yaml")
    assert suite.tasks[0].labels == ['the "cat"', 'the "dog"']
    (folder / "d.csv").write_text('\n\nimage,label\na.png,"cat\n')
    with pytest.raises(InputError, match="line 4"):
        list(read_rows({"format": "csv", "path": "d.csv"}, folder))


def test_layouts_with_folders_around_and_beside(folder):
    img = folder / "img"
    for n, place in enumerate(("a/pets/pets", "b/images/train", "b/images/val")):
        for label in ("cat", "dog"):
            (folder / place / label).mkdir(parents=True)
            Image.new("RGB", (4, 4 + n)).save(folder / place / label / "1.png")
    assert split_sizes(suite_of(folder / "a")[0]) == [{"all": 2}] and guess(folder / "a").suite["name"] == "a"
    assert split_sizes(suite_of(folder / "b")[0]) == [{"train": 2, "validation": 2}]
    for split, lines in (("train", labels()[:8]), ("test", labels()[8:])):  # imagefolder
        (folder / "c" / split).mkdir(parents=True)
        for image, _ in lines:
            (folder / "c" / split / image[4:]).write_bytes((folder / image).read_bytes())
        (folder / "c" / split / "metadata.jsonl").write_text("".join(json.dumps({"file_name": image[4:], "text": label}) + "\n" for image, label in lines))
    suite, rows = suite_of(folder / "c")
    assert split_sizes(suite) == [{"train": 8, "test": 4}] or split_sizes(suite) == [{"test": 4, "train": 8}]
    assert all(os.path.exists(row.path) for row in rows)
    csv_of(folder / "d" / "annotations" / "labels.csv", [(image[4:], label) for image, label in labels()])
    (folder / "d" / "images" / "all").mkdir(parents=True)
    for file in img.iterdir():
        (folder / "d" / "images" / "all" / file.name).write_bytes(file.read_bytes())
    suite, rows = suite_of(folder / "d")
    assert all(os.path.exists(row.path) for row in rows) and suite.tasks[0].sources["all"]["root"] == "images/all"


def test_what_lies_there_is_said(tmp_path):
    for label, suffix in (("cat", "png"), ("cat", "heic"), ("dog", "png"), ("dog", "HEIC")):
        (tmp_path / "mixed" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mixed" / label / f"1.{suffix}").write_bytes(b"x")
    assert "files of a kind that is not read, to be converted to JPEG or PNG: .heic 2" in guess(tmp_path / "mixed").text()
    for name, said in (("heic/cat/1.HEIC", "HEIC, which is not read"), ("one/cat/1.png", "all pictures lie in one folder, cat"), ("e/train/1.png", "no folders of classes")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
        assert said in error_of(tmp_path / name.partition("/")[0])


def test_pictures_that_are_not_there_are_said(folder):
    csv_of(folder / "x.csv", [(image.upper().replace("IMG", "img"), label) for image, label in labels()])
    text = guess(folder / "x.csv").text()
    assert "12 of the first 12 pictures are not there" in text and "0.png: another case)" in text


def test_two_files_for_one_split_are_an_error(folder):
    for name in ("pets_val.csv", "pets_validation.csv"):
        (folder / name).write_text("image,label\nimg/0.png,cat\nimg/1.png,dog\n")
    assert "both pets_val.csv and pets_validation.csv look like the validation split" in error_of(folder)


def test_folders_of_classes_with_and_without_splits(tmp_path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "s" / split / label).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (4, 4)).save(tmp_path / "s" / split / label / f"{number}.png")
    suite, rows = suite_of(tmp_path / "s")
    assert set(suite.tasks[0].sources) == {"train", "test"} and len(rows) == 16 and suite.tasks[0].labels == ["cat", "dog"]
    suite, rows = suite_of(tmp_path / "s" / "train")
    assert set(suite.tasks[0].sources) == {"all"} and len(rows) == 8
    (tmp_path / "empty").mkdir()
    assert "nothing in it is understood" in error_of(tmp_path / "empty")


# --- conversations ----------------------------------------------------------------------------

def test_questions_become_tasks_and_every_row_belongs_to_one(folder):
    records = [chat(f"img/{i}.png", "Which pet?", ["cat", "dog"][i % 2]) for i in range(12)]
    records += [chat(f"img/{i}.png", "What is written?", f"text {i}") for i in range(11)]
    records += [chat(f"img/{i}.png", f"Unique question {i}?", "yes") for i in range(7)]
    records += [{"image": "img/0.png", "conversations": records[0]["conversations"] * 2}, {"image": []}, 7, chat([], "Asked once?", "no")]
    write_json(folder / "chat.json", records)
    suite, rows = suite_of(folder / "chat.json")
    assert [(task.name, task.is_closed) for task in suite.tasks] == [
        ("which_pet", True), ("what_is_written", False), ("other_questions", False)]
    assert len(rows) == len(records) and sum(row.reason is not None for row in rows) == 4
    assert {row.question for row in rows if row.label == "cat" and not row.reason} == {None}
    assert "can't be used" in guess(folder / "chat.json").text()


def test_few_questions_are_all_tasks_and_stray_rows_go_to_the_first(folder):
    records = [chat("img/0.png", "Which pet?", "cat"), chat("img/1.png", "Which pet?", "dog"), chat([], "Only asked without image?", "x"), 7]
    write_json(folder / "chat.json", records)
    suite, rows = suite_of(folder / "chat.json")
    assert len(suite.tasks) == 1 and len(rows) == 4


def test_rows_of_a_table_that_ask_nothing_belong_to_one_task(folder):
    records = [{"image": image, "label": label, "question": ["Which?", "What?", None][i % 3]} for i, (image, label) in enumerate(labels())]
    write_json(folder / "x.json", records + [{"image": None, "label": "cat"}, {"image": None, "label": "cat", "question": "Why?"}])
    suite, rows = suite_of(folder / "x.json")
    assert len(suite.tasks) == 3 and len(rows) == 14


def test_only_unique_questions_are_one_open_task(folder):
    write_json(folder / "vqa.json", [chat(f"img/{i}.png", f"Question {i}?", f"a{i}") for i in range(12)])
    suite, rows = suite_of(folder / "vqa.json")
    assert [task.name for task in suite.tasks] == ["vqa"] and not suite.tasks[0].is_closed
    assert [row.question for row in rows] == [f"Question {i}?" for i in range(12)]


def test_llama_factory_folder_with_its_own_tags_and_image_root(folder):
    turns = [{"role": "user", "content": "<image>Which pet?"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": label}], "images": [image]} for image, label in labels()]
    write_json(folder / "a_train.json", rows), write_json(folder / "a_test.json", rows)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": tags}
    write_json(folder / "dataset_info.json", {"pets_train": {"file_name": "a_train.json", **entry}, "pets_test": {"file_name": "a_test.json", **entry},
                                              "far": {"hf_hub_url": "x/y"}})
    for path in (folder, folder / "dataset_info.json"):
        suite, rows = suite_of(path, folder / f"{path.name}.yaml")
        assert list(suite.tasks[0].sources) == ["train", "test"] and len(rows) == 24 and not any(row.reason for row in rows)
    (folder / "b").mkdir()
    write_json(folder / "b" / "plain.json", [{"conversations": [{"from": "user", "value": "Which?"}, {"from": "assistant", "value": label}], "images": [image]} for image, label in labels()])
    suite, rows = suite_of(folder / "b" / "plain.json")
    assert suite.tasks[0].sources["all"]["root"] == ".." and not any(row.reason for row in rows)


def test_alpaca_and_label_studio(folder):
    write_json(folder / "alpaca.json", [{"instruction": "<image>Which pet?", "input": "", "output": label, "images": [image]} for image, label in labels()])
    suite, rows = suite_of(folder / "alpaca.json", folder / "1.yaml")
    assert suite.tasks[0].labels == ["cat", "dog"] and suite.tasks[0].question == "Which pet?"
    results = lambda label, text: [{"type": "choices", "from_name": "pet", "value": {"choices": [label]}}, {"type": "textarea", "from_name": "note", "value": {"text": [text]}}]
    write_json(folder / "studio.json", [{"id": i, "data": {"picture": image}, "annotations": [{"result": results(label, f"note {i}")}]} for i, (image, label) in enumerate(labels())])
    suite, rows = suite_of(folder / "studio.json", folder / "2.yaml")
    assert {task.name: task.is_closed for task in suite.tasks} == {"studio_note": False, "studio_pet": True}
    assert len(rows) == 24 and not any(row.reason for row in rows)


def test_a_saved_dataset(folder):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"picture": [str(folder / "img" / f"{i}.png") for i in range(12)], "kind": [i % 2 for i in range(12)]}, features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(folder / "saved")
    suite, rows = suite_of(folder / "saved")
    assert set(suite.tasks[0].sources) == {"train", "test"} and {row.label for row in rows} == {"cat", "dog"} and rows[0].image


# --- labels, names, the file ------------------------------------------------------------------

@pytest.mark.parametrize(("answers", "expected"), [
    ({"cat": 9, "dog": 8, "Cat": 1, "": 3}, ["cat", "dog"]), ({"10": 5, "9": 6, "2": 7}, ["2", "9", "10"]), ({"cat": 20}, None),
    ({f"t{i}": 1 for i in range(50)}, None), ({f"t{i}": 5 for i in range(101)}, None), ({"x" * 81: 5, "y": 5}, None), ({}, None),
    ({"cat": 10, "dog": 10, "typo": 1}, ["cat", "dog", "typo"]),
])
def test_label_sets(answers, expected):
    from collections import Counter

    assert label_set(Counter(answers)) == expected


@given(st.text())
def test_names_are_valid(text):
    import re

    assert re.fullmatch(r"\w[\w.-]*", slug(text))


def test_hostile_texts_stay_in_comments_and_strings(folder):
    nasty = ["a\nb: [", "# x", "- {", "\u2028y: !!python/object", "'\"", "null", "yes", "2024-01-01"]
    write_json(folder / "x.json", [chat(f"img/{i}.png", "Q: [\n- x\u2028name: y?", nasty[i % 8]) for i in range(12)] * 2)
    suite, rows = suite_of(folder / "x.json")
    assert len(suite.tasks) == 1 and len(rows) == 24
    assert set(yaml.safe_load((folder / "suite.yaml").read_text())) == {"name", "tasks"}


@pytest.mark.parametrize(("content", "encoding"), [("图片,标签", "gbk"), ("图片,标签", "utf-8"), ("图片", "utf-16"), ("plain", "ascii")])
def test_encodings(tmp_path, content, encoding):
    (tmp_path / "x").write_bytes(content.encode(encoding))
    assert detect_encoding(tmp_path / "x") == {"ascii": "utf-8"}.get(encoding, encoding)


# --- fuzz -------------------------------------------------------------------------------------

@HOSTILE
@given(st.binary(max_size=300), st.sampled_from(["x.csv", "x.tsv", "x.json", "x.jsonl", "x.parquet", "dataset_info.json"]),
       st.sampled_from([b"", b"image,label\n", b"[", b'{"image": "a.png", "label": "', b'[{"conversations": [', b"PAR1"]))
def test_random_bytes_are_a_suite_or_an_input_error(tmp_path, content, name, start):
    (tmp_path / name).write_bytes(start + content)
    try:
        found = guess(tmp_path / name)
        (tmp_path / "suite.yaml").unlink(missing_ok=True)
        load_suite(write_guess(found))
    except InputError:
        return


KEYS = st.sampled_from(["image", "images", "label", "question", "conversations", "messages", "from", "role", "value", "content", "instruction", "output", "data", "annotations", "result"])
WORDS = st.sampled_from(["human", "gpt", "user", "<image>Which?", "Which?", "cat", "dog", "a.png", "b.png", "choices"])
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4) | WORDS,
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=10)


@HOSTILE
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=5) | VALUES, min_size=1, max_size=8))
def test_any_json_is_an_input_error_or_a_suite_that_has_every_row(tmp_path, records):
    (tmp_path / "x.json").write_text(json.dumps(records))
    (tmp_path / "suite.yaml").unlink(missing_ok=True)
    try:
        suite = load_suite(write_guess(guess(tmp_path / "x.json")))
    except InputError:
        return
    controls = {source.get("label") for task in suite.tasks for source in task.sources.values() if source["format"] == "labelstudio"}
    rows = [row for task in suite.tasks for source in task.sources.values() for row in read_rows(source, suite.folder)]
    assert len(rows) == len(records) * max(1, len(controls))


@HOSTILE
@given(st.lists(st.tuples(st.sampled_from(["Which?", "What?", "Where is it?", "", "Once?"]), st.sampled_from(["cat", "dog", "Cat", "", "<image>"]), st.integers(0, 3)), min_size=1, max_size=60))
def test_questions_divide_rows_without_remainder(tmp_path, talks):
    records = [chat(["a.png"] * images if images != 1 else "a.png", question, answer) for question, answer, images in talks]
    write_json(tmp_path / "x.json", records)
    (tmp_path / "suite.yaml").unlink(missing_ok=True)
    try:
        _suite, rows = suite_of(tmp_path / "x.json")
    except InputError as error:
        assert "can be used" in str(error)
        return
    assert len(rows) == len(records)


@pytest.mark.parametrize(("answers", "expected"), [
    (["yes"], ["yes", "no"]), (["No", "Yes"], ["Yes", "No"]), (["NO"], ["YES", "NO"]), (["是", "否", "是"], ["是", "否"]),
    (["true", "false"], ["true", "false"]), (["1", "0"], ["1", "0"]), (["1"], None), (["a", "b"], None), (["a", "b", "a"], ["a", "b"]),
    (["a", "b", "c"], None), (["yes", "no", "maybe"], None),
])
def test_a_few_rows_with_yes_and_no_are_a_closed_task(tmp_path, answers, expected):
    for number in range(len(answers)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "tiny.csv").write_text("image,label\n" + "".join(f"{i}.png,{answer}\n" for i, answer in enumerate(answers)))
    (task,) = guess(tmp_path / "tiny.csv").suite["tasks"]
    assert task.get("labels") == expected


def test_the_short_export_of_label_studio(folder):
    write_json(folder / "short.json", [{"image": f"/data/img/{i}.png", "id": i, "pet": ["cat", "dog"][i % 2], "age": "old" if i % 3 else "young",
                                        "annotator": 1, "annotation_id": i, "created_at": "2024", "lead_time": 1.5} for i in range(12)])
    found = guess(folder / "short.json")
    assert [(task["name"], task["labels"]) for task in found.suite["tasks"]] == [("short_pet", ["cat", "dog"]), ("short_age", ["old", "young"])]
