"""Readers: every row comes out once, whatever the file holds; a bad file is one clear InputError."""
import base64
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.sources import LAZY_READERS, READERS, Row, locate_image, read_rows, reader_of, source_contents

HOSTILE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(folder, **source):
    return list(read_rows(source, folder))


def error_of(folder, **source) -> str:
    with pytest.raises(InputError) as caught:
        rows_of(folder, **source)
    return str(caught.value)


@pytest.fixture
def table(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    (tmp_path / "t.csv").write_text("id,image,label,question,source\n1,a.png,cat,what?,clip1\n2,b.png,,,\n")
    return tmp_path


def test_all_columns_of_a_table_arrive(table):
    first, second = rows_of(table, format="csv", path="t.csv")
    assert first == Row("1", path=str(table / "a.png"), label="cat", question="what?", source="clip1", where="t.csv, row 1")
    assert second.label == "" and second.reason is None  # an empty label is the audit's matter
    assert second.question is second.source is None  # rows without a source must not become one source


def test_columns_can_have_any_name(table):
    (table / "t.csv").write_text("文件;标签\na.png;猫\n", encoding="utf-8")
    (row,) = rows_of(table, format="csv", path="t.csv", image="文件", label="标签", delimiter=";")
    assert row.label == "猫" and row.id == "t.csv:1"


@pytest.mark.parametrize(("encoding", "stated"), [
    ("utf-8", {}), ("utf-8-sig", {}), ("utf-8-sig", {"encoding": "utf8"}), ("gbk", {"encoding": "gbk"}),
    ("gbk", {"encoding": "gb18030"}), ("utf-16", {"encoding": "utf-16"}),
])
@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_encodings(table, encoding, stated, format):
    text = "image,label\na.png,违规信息\n" if format == "csv" else '{"image": "a.png", "label": "违规信息"}\n'
    (table / "x").write_bytes(text.encode(encoding))
    (row,) = rows_of(table, format=format, path="x", **stated)
    assert row.label == "违规信息" and row.path == str(table / "a.png")


def test_a_wrong_encoding_is_an_error_that_names_the_right_one(table):
    chinese = "image,label\n" + "a.png,违规信息\n" * 20
    (table / "x.csv").write_bytes(chinese.encode("gbk"))
    assert "state `encoding: gbk`" in error_of(table, format="csv", path="x.csv")
    (table / "x.csv").write_bytes(chinese.encode("utf-8"))
    assert "is UTF-8; remove" in error_of(table, format="csv", path="x.csv", encoding="gbk")
    assert "is UTF-8; remove" in error_of(table, format="csv", path="x.csv", encoding="latin-1")
    (table / "x.csv").write_bytes(chinese.encode("utf-16"))
    assert "utf-16" in error_of(table, format="csv", path="x.csv")
    assert "unknown encoding" in error_of(table, format="csv", path="x.csv", encoding="gkb")


def test_a_wrong_byte_far_into_a_file_names_its_line(table):
    (table / "x.csv").write_bytes(b"image,label\n" + b"a.png,cat\n" * 20000 + b"a.png,\xce\xa5\xb9\xe6\n")
    assert "x.csv, line 20002: not utf-8" in error_of(table, format="csv", path="x.csv")


def test_settings_are_checked(table):
    assert "Did you mean 'csv'?" in error_of(table, format="cvs", path="t.csv")
    assert "Did you mean 'label'?" in error_of(table, format="csv", path="t.csv", labell="x")
    assert "Did you mean 'label'?" in error_of(table, format="csv", path="t.csv", label="labell")
    assert "needs a path" in error_of(table, format="csv")
    assert "doesn't exist" in error_of(table, format="csv", path="nothing.csv")
    assert "no column 'image'" in error_of(table, format="csv", path="a.png")
    assert "not readable as Parquet" in error_of(table, format="parquet", path="t.csv")


def test_a_row_with_too_many_cells_is_kept_with_a_reason(table):
    (table / "x.csv").write_text("image,label\na.png,cat,dog\na.png\n")
    first, second = rows_of(table, format="csv", path="x.csv")
    assert first.reason.startswith("extra_cells") and second.label is None


def test_data_uris_longer_than_the_csv_module_allows(table):
    content = os.urandom(300_000)
    (table / "x.csv").write_text(f'image,label\n"data:image/png;base64,{base64.b64encode(content).decode()}",cat\n')
    assert rows_of(table, format="csv", path="x.csv")[0].image == content


def test_paths_and_links_that_leave_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    (outside / "x.png").write_bytes(b"x")
    (root / "in.png").write_bytes(b"x")
    (root / "link.png").symlink_to(outside / "x.png")
    (root / "folder").symlink_to(outside)
    (root / "good_link.png").symlink_to(root / "in.png")
    (root / "loop").symlink_to(root / "loop")
    for reference in ("../outside/x.png", str(outside / "x.png"), "link.png", "folder/x.png", "a/../../outside/x.png"):
        assert locate_image(reference, root)["reason"].startswith("outside_root"), reference
    for reference in ("in.png", "./in.png", "good_link.png", "folder/../in.png", str(root / "in.png")):
        assert "path" in locate_image(reference, root) or reference.startswith("folder"), reference
    assert locate_image("loop", root).keys() <= {"path", "reason"}
    assert locate_image("nul\0.png", root)["reason"].startswith("no_image")
    assert locate_image("x" * 5000, root).keys() <= {"path", "reason"}


def test_a_root_that_is_itself_a_link_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"x")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert "path" in locate_image("a.png", tmp_path / "root")


@pytest.mark.parametrize(("value", "code"), [
    (None, "no_image"), ("", "no_image"), ("  ", "no_image"), ([], "no_image"), ({"bytes": None, "path": None}, "no_image"),
    (["a", "b"], "several_images"), ("https://example.org/a.png", "remote_image"),
    ("data:image/png;base64,%%%", "bad_data_uri"), ("data:image/png,abc", "bad_data_uri"), ("data:", "bad_data_uri"),
])
def test_image_cells_without_a_usable_image(tmp_path, value, code):
    assert locate_image(value, tmp_path)["reason"].startswith(code + ": ")


def test_the_root_setting(table):
    (table / "images").mkdir()
    (table / "images" / "c.png").write_bytes(b"c")
    (table / "x.csv").write_text("image,label\nc.png,cat\n")
    (row,) = rows_of(table, format="csv", path="x.csv", root="images")
    assert row.path == str(table / "images" / "c.png")


def test_broken_json_lines_are_rows(table):
    lines = ['{"image": "a.png", "label": 3}', "", "[1]", "{", '"text"', "[" * 100_000, '{"label": "x"}',
             '{"image": "a.png", "label": null}', '{"image": ["a.png"], "label": true}']
    (table / "x.jsonl").write_text("\n".join(lines))
    rows = rows_of(table, format="jsonl", path="x.jsonl")
    assert [(row.reason or "fine").split(":")[0] for row in rows] == [
        "fine", "not_json", "not_json", "not_json", "not_json", "no_image", "fine", "fine"]
    assert rows[0].label == "3" and rows[0].id == "x.jsonl:1" and rows[1].where == "x.jsonl, row 3"


def test_folders(tmp_path):
    for name in ("cat/1.png", "cat/deep/2.png", "dog/3.png", ".hidden/4.png", "dog/.DS_Store"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "5.png").write_bytes(b"x")
    (tmp_path / "f" / "cat" / "z").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f" / "bird").symlink_to(tmp_path / "elsewhere")
    rows = rows_of(tmp_path, format="folder", path="f")
    assert [(row.id, row.label) for row in rows] == [
        ("bird", "bird"), ("cat/1.png", "cat"), ("cat/deep/2.png", "cat"), ("cat/z", "cat"), ("dog/3.png", "dog")]
    assert [row.id for row in rows if (row.reason or "").startswith("linked_folder")] == ["bird", "cat/z"]
    assert "no subfolders" in error_of(tmp_path, format="folder", path="elsewhere")


def test_a_file_where_a_folder_is_expected(table):
    assert "has to be a folder" in error_of(table, format="folder", path="t.csv")


def test_a_folder_where_a_file_is_expected(table):
    for format in ("csv", "jsonl", "parquet"):
        assert "has to be a file" in error_of(table, format=format, path=".")


def test_parquet_with_class_labels_patterns_and_bytes(tmp_path):
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], metadata={"huggingface": json.dumps({"info": {"features": features}})})
    for number in range(2):
        pq.write_table(pa.table({"image": [b"x", b"y"], "label": [1, number]}, schema=schema), tmp_path / f"p-{number}.parquet")
    rows = rows_of(tmp_path, format="parquet", path="p-*.parquet")
    assert [row.label for row in rows] == ["yes", "no", "yes", "yes"] and rows[3].id == "p-1.parquet:2"


def test_float_labels_that_spreadsheets_make_of_numbers(tmp_path):
    pq.write_table(pa.table({"image": ["a", "b"], "label": [3.0, None]}), tmp_path / "x.parquet")
    assert [row.label for row in rows_of(tmp_path, format="parquet", path="x.parquet")] == ["3", None]


def test_contents_change_with_table_image_and_setting(table):
    source = {"format": "csv", "path": "t.csv"}
    states = [source_contents(source, table)]
    (table / "a.png").write_bytes(b"changed")
    states.append(source_contents(source, table))
    (table / "b.png").unlink()
    states.append(source_contents(source, table))
    (table / "t.csv").write_text((table / "t.csv").read_text().replace("cat", "dog"))
    states.append(source_contents(source, table))
    states.append(source_contents(source | {"label": "question"}, table))
    assert all(a != b for i, a in enumerate(states) for b in states[:i])
    assert json.dumps(states)


def test_lazy_formats_register_themselves():
    for name in LAZY_READERS:
        assert reader_of({"format": name}).name == name and name in READERS


def test_reading_needs_no_torch():
    code = "import qwen2vl_sft.data.sources, sys; assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@HOSTILE
@given(st.binary(max_size=400), st.sampled_from(["csv", "tsv", "jsonl", "parquet"]), st.sampled_from([None, "gbk", "utf-16"]))
def test_random_bytes_give_rows_or_an_input_error(tmp_path, content, format, encoding):
    (tmp_path / "x").write_bytes(b"image,label\n" + content if format == "csv" else content)
    stated = {"encoding": encoding} if encoding and format != "parquet" else {}
    try:
        rows = rows_of(tmp_path, format=format, path="x", **stated)
    except InputError:
        return
    assert all(isinstance(row, Row) for row in rows)


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "x"]), inner))


@HOSTILE
@given(st.lists(st.dictionaries(st.sampled_from(["image", "label", "question", "id", "source"]), JSON), max_size=8))
def test_any_json_object_is_one_row(tmp_path, records):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = rows_of(tmp_path, format="jsonl", path="x.jsonl")
    assert len(rows) == len(records)
    for row in rows:
        assert row.reason or row.path or row.image is not None
        assert all(value is None or isinstance(value, str) for value in (row.label, row.question, row.source, row.id))


@HOSTILE
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))), max_size=8))
def test_any_csv_record_is_one_row(tmp_path, records):
    import csv

    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerows([("image", "label"), *records])
    rows = rows_of(tmp_path, format="csv", path="x.csv")
    assert [row.label for row in rows] == [label for _, label in records]
