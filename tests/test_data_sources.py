"""Readers: every row comes out once, whatever the file holds; a bad file is one clear InputError."""
import base64
import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_sft.core import InputError, fingerprint
from qwen2vl_sft.data.guess import guess_file
from qwen2vl_sft.data.sources import (
    LAZY_READERS,
    READERS,
    JsonText,
    Row,
    csv_records,
    locate_image,
    read_rows,
    reader_of,
    source_contents,
    source_remarks,
    what_it_is,
    why_missing,
)

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


def test_where_takes_rows_by_a_column(table):
    (table / "w.csv").write_text("image,label,split\na.png,cat,train\na.png,dog, val\na.png,cat,\n")
    texts = lambda where: [row.label for row in read_rows({"format": "csv", "path": "w.csv", "where": where}, table)]
    assert [texts({"split": each}) for each in ("train", ["val"], [None, "train"])] == [["cat"], ["dog"], ["cat", "cat"]]
    for where, message in (({"spilt": "train"}, "Did you mean 'split'"), ("train", "has to name a column"), ({"split": [1]}, "put quotes around 1"), ({}, "has to name")):
        with pytest.raises(InputError, match=message):
            texts(where)


def test_paths_as_people_write_them(table):
    Image.new("RGB", (60, 60), "red").save(table / "a.png")
    content = (table / "a.png").read_bytes()
    inside = str((table / "a.png").resolve())
    long = base64.b64encode(content).decode()
    found = [locate_image(cell, table) for cell in (f"file://{inside}", "file:///etc/passwd", long, long[:-3] + "!!!", "/a.png", str(table.parent / "x.png"))]
    assert found[0] == {"path": inside} and found[2] == {"image": content}
    assert [each.get("reason", "").partition(":")[0] for each in found] == ["", "outside_root", "", "bad_data_uri", "outside_root", "outside_root"]
    assert found[4]["reason"].endswith("without its first / it is there")
    (table.parent / "x.png").write_bytes(content)
    assert f"such as root: {table.parent.resolve()}" in locate_image(str(table.parent / "x.png"), table)["reason"]


@pytest.mark.parametrize(("written", "there", "reason"), [
    ("A.PNG", "a.png", "another case"), ("Img/a.png", "img/a.png", "another case"), ("caf\u00e9.png", "cafe\u0301.png", "composed otherwise"),
    ("img%2Fa.png", "img/a.png", "write characters for %"), ("C:/img/a.png", "img/a.png", "another computer"), ("b.png", "a.png", ""),
])
def test_why_a_file_is_missing(tmp_path, written, there, reason):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(b"x")
    assert (reason in (said := why_missing(str(tmp_path / written)))) and bool(said) == bool(reason)
    assert why_missing("relative/and/absent.png") == ""


def test_the_root_of_a_folder_allows_links(tmp_path):
    (tmp_path / "store" / "cat").mkdir(parents=True)
    for name in ("1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "store" / "cat" / name)
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "1.png").symlink_to(tmp_path / "store" / "cat" / "1.png")
    (tmp_path / "set" / "tom").symlink_to(tmp_path / "store" / "cat")
    first, second = rows_of(tmp_path, format="folder", path="set")
    assert "it is a link to" in first.reason and "root to a folder that holds both" in first.reason and second.reason.startswith("linked_folder")
    rows = rows_of(tmp_path, format="folder", path="set", root=".")
    assert [(row.id, row.label, row.reason) for row in rows] == [("cat/1.png", "cat", None), ("tom/1.png", "tom", None), ("tom/2.png", "tom", None)]
    (tmp_path / "set" / "cat" / "1.png").unlink()
    (tmp_path / "set" / "cat" / "1.png").symlink_to("/etc/passwd")
    assert rows_of(tmp_path, format="folder", path="set", root=".")[0].reason.startswith("outside_root")


@pytest.mark.parametrize(("content", "code", "said"), [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "not_an_image", "HEIC"), (b"\0\0\0\x0cjP  \r\n\x87\n", "not_an_image", "JPEG 2000"), (b"%PDF-1.7", "not_an_image", "a PDF"),
    (b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg xmlns=''>", "not_an_image", "SVG"), (b"version https://git-lfs.github.com/spec/v1\noid", "not_an_image", "git lfs pull"),
    (b"<!DOCTYPE html><html>", "not_an_image", "web page"), (b"\0\0\0\x1cftypavif\0\0", "truncated", "AVIF"), (b"hello world", "not_an_image", "starts with b'hello"),
])
def test_what_bytes_are_that_no_decoder_knows(content, code, said):
    assert what_it_is(content)[0] == code and said in what_it_is(content)[1]


def test_labels_that_are_lists_or_objects(table):
    cells = [["cat"], [], ["cat", "dog"], {"name": "cat"}, [["cat"]], None]
    (table / "l.jsonl").write_text("".join(json.dumps({"image": "a.png", "label": cell}) + "\n" for cell in cells))
    rows = list(read_rows({"format": "jsonl", "path": "l.jsonl"}, table))
    assert [(row.label, (row.reason or "").partition(":")[0]) for row in rows] == [
        ("cat", ""), (None, ""), (None, "several_answers"), (None, "label_no_text"), (None, "label_no_text"), (None, "")]


def test_boxes_of_label_studio_are_named(table):
    boxes = [{"result": [{"type": "rectanglelabels", "from_name": "x", "value": {}}]}]
    (table / "b.json").write_text(json.dumps([{"data": {"image": "a.png"}, "annotations": boxes}, {"data": {"image": "a.png"}, "annotations": []}]))
    boxed, none = read_rows({"format": "labelstudio", "path": "b.json"}, table)
    assert boxed.reason.startswith("empty_label: it is annotated with rectanglelabels") and none.reason == "empty_label: nobody has annotated it"


def test_a_column_of_that_name_can_be_left_aside(table):
    (table / "s.csv").write_text("image,label,source\na.png,cat,web\n")
    assert [row.source for row in read_rows({"format": "csv", "path": "s.csv"}, table)] == ["web"]
    assert [row.source for row in read_rows({"format": "csv", "path": "s.csv", "source": None}, table)] == [None]


def test_two_columns_of_one_name_are_an_error(table):
    (table / "d.csv").write_text("image,label,label,note,note\na.png,cat,x,1,2\n")
    with pytest.raises(InputError, match="2 columns are called 'label'"):
        list(read_rows({"format": "csv", "path": "d.csv"}, table))


def test_a_row_with_too_many_cells_is_kept_with_a_reason(table):
    (table / "x.csv").write_text("image,label\na.png,cat,dog\na.png\n")
    first, second = rows_of(table, format="csv", path="x.csv")
    assert first.reason.startswith("extra_cells") and second.label is None


@pytest.mark.parametrize(("content", "line"), [
    ('image,label\na.png,"yes\nb.png,no\nc.png,yes', 2),  # never closed
    ('image,label\na.png,yes\n\nb.png,"yes\nb.png,no\nc.png,"no\nd.png,yes\n', 4),  # closed by the next stray quote
    ('"image,label\na.png,yes\n', 1), ('image,label\na.png,"a\nb"\nb.png,"x" y\n', 4)])
def test_a_stray_quote_swallows_no_row(table, content, line):
    (table / "x.csv").write_text(content)
    (table / "x.tsv").write_text(content.replace(",", "\t"))
    for source in ({"format": "csv", "path": "x.csv"}, {"format": "tsv", "path": "x.tsv"}):
        assert f"{source['path']}, line {line}: not readable as CSV" in error_of(table, **source)
    with pytest.raises(InputError, match=f"x.csv, line {line}"):
        guess_file(table / "x.csv", table)
    with pytest.raises(InputError, match=f"x.csv, line {line}"):
        list(csv_records(table / "x.csv", {}))


@pytest.mark.parametrize("delimiter", [r"\t", "||", "", '"', "\n", None])
def test_a_delimiter_is_one_character(table, delimiter):
    assert "has to be one character" in error_of(table, format="csv", path="t.csv", delimiter=delimiter)


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
    (root / "sub").mkdir()
    (root / "sub" / "a b.png").write_bytes(b"x")
    assert locate_image("sub\\a b.png", root) == {"path": str(root / "sub" / "a b.png")}, "as Windows writes it"
    assert locate_image("..\\outside\\x.png", root)["reason"].startswith("outside_root")
    (root / "odd\\name.png").write_bytes(b"x")
    assert locate_image("odd\\name.png", root) == {"path": str(root / "odd\\name.png")}
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


@pytest.mark.parametrize("entries", [1, 3, 11])
def test_a_large_folder_is_read_in_order_part_by_part(tmp_path, monkeypatch, entries):
    "In the order of Python's sorted paths; names of any bytes and a folder among the files."
    from qwen2vl_sft.data import sources

    (tmp_path / "f" / "cat" / "m").mkdir(parents=True)
    names = ["b.png", "a\nb.png", "Z.png", "ä.png", "m/1.png", "m/0.png", "l.png", "n.png", ".hidden.png", '"q".png', os.fsdecode(b"\xff.png"), "c.png"]
    for name in names:
        (tmp_path / "f" / "cat" / name).write_bytes(b"x")
    monkeypatch.setattr(sources, "ENTRIES", entries)
    assert [row.id for row in rows_of(tmp_path, format="folder", path="f")] == [f"cat/{name}".encode(errors="backslashreplace").decode() for name in sorted(names) if name[0] != "."]


def test_files_beside_the_folders_of_classes_are_rows_without_a_label_or_named(tmp_path):
    for name in ("cat/1.png", "lost.PNG", "README.md", ".DS_Store"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(b"x")
    source = {"format": "folder", "path": "f"}
    first, lost = rows_of(tmp_path, **source)
    assert (first.id, lost.id, lost.label) == ("cat/1.png", "lost.PNG", None) and lost.reason.startswith("empty_label: lost.PNG lies beside")
    assert source_remarks(source, tmp_path) == ["beside the folders of the classes lie README.md, no pictures and not read"]
    assert source_remarks({"format": "csv"}, tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_that_may_not_be_opened_is_a_row(tmp_path):
    (tmp_path / "f" / "cat").mkdir(parents=True)
    (tmp_path / "f" / "dog").mkdir()
    (tmp_path / "f" / "cat").chmod(0)
    assert [row.reason[:12] for row in rows_of(tmp_path, format="folder", path="f")] == ["missing_file"]
    (tmp_path / "f" / "cat").chmod(0o700)


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


def read_in_pieces(text: str, size: int) -> list | str:
    try:
        return list(JsonText(iter([text[at : at + size] for at in range(0, len(text), size)])).elements())
    except ValueError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_json_lists_are_read_by_the_element_as_json_reads_them_whole(data):
    "Whatever the list and however it is cut into blocks or damaged; errors name the same place."
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8)
    value = data.draw(st.lists(st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_size=5))
    text = json.dumps(value, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=data.draw(st.booleans()))
    if data.draw(st.booleans()):
        at, cut = data.draw(st.integers(1, len(text))), data.draw(st.integers(0, 3))
        text = text[:at] + data.draw(st.sampled_from(["", "]", "[", ",", '"', "\\", "1", "-", "\n", "x", "{"])) + text[at + cut :]
    try:
        expected = json.loads(text)
    except ValueError as error:
        expected = str(error)
    assert repr(read_in_pieces(text, data.draw(st.integers(1, 40)))) == repr(expected)


def test_a_json_list_of_any_length_is_read_in_little_memory(tmp_path):
    import tracemalloc

    row = {"image": "data:image/png;base64," + "A" * 20_000, "label": "cat"}
    (tmp_path / "x.json").write_text(json.dumps([row] * 200))
    reading = read_rows({"format": "json", "path": "x.json"}, tmp_path)
    next(reading)
    tracemalloc.start()
    assert sum(1 for _ in reading) == 199
    assert tracemalloc.get_traced_memory()[1] < 700_000  # the file has 4 MB
    tracemalloc.stop()


def test_float_labels_that_spreadsheets_make_of_numbers(tmp_path):
    pq.write_table(pa.table({"image": ["a", "b"], "label": [3.0, None]}), tmp_path / "x.parquet")
    assert [row.label for row in rows_of(tmp_path, format="parquet", path="x.parquet")] == ["3", None]


def test_contents_change_with_table_image_and_setting(table):
    source = {"format": "csv", "path": "t.csv"}
    states = [fingerprint(source_contents(source, table))]
    (table / "a.png").write_bytes(b"changed")
    states.append(fingerprint(source_contents(source, table)))
    (table / "b.png").unlink()
    states.append(fingerprint(source_contents(source, table)))
    (table / "t.csv").write_text((table / "t.csv").read_text().replace("cat", "dog"))
    states.append(fingerprint(source_contents(source, table)))
    states.append(fingerprint(source_contents(source | {"label": "question"}, table)))
    assert all(a != b for i, a in enumerate(states) for b in states[:i])


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


# --- JSON, conversations, Label Studio, Hugging Face ---------------------------------------------

def human(text, answer="cat"):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def test_json_lists_lines_and_single_objects(table):
    write_json(table / "x.json", [{"image": "a.png", "label": "cat"}, 7, {"image": "b.png"}])
    assert [(row.label, (row.reason or "fine").split(":")[0]) for row in rows_of(table, format="json", path="x.json")] == [
        ("cat", "fine"), (None, "not_json"), (None, "fine")]
    (table / "x.json").write_text('{"image": "a.png", "label": "cat"}\n{"image": \n')
    assert len(rows_of(table, format="json", path="x.json")) == 2
    (table / "x.json").write_text('{"image": \n{"image": "a.png", "label": "cat"}\n')
    assert len(rows_of(table, format="json", path="x.json")) == 2
    (table / "x.json").write_text(json.dumps({"image": "a.png"}, indent=2))
    assert "one JSON object" in error_of(table, format="json", path="x.json")
    (table / "x.json").write_text('[{"image": "a.png"},')
    assert "x.json: not readable as JSON" in error_of(table, format="json", path="x.json")
    (table / "x.json").write_text("[" * 200_000)
    assert "not readable as JSON" in error_of(table, format="json", path="x.json")
    (table / "x.json").write_text("[" + "9" * 10_000 + "]")
    assert "not readable as JSON" in error_of(table, format="json", path="x.json")


def test_half_characters_and_file_names_that_are_not_text(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "label": "\\ud800", "id": "\\udc80"}\n{"image": "\\ud800.png", "label": "cat"}\n')
    rows = rows_of(tmp_path, format="jsonl", path="x.jsonl")
    assert [row.reason.split(":")[0] for row in rows] == ["bad_characters", "missing_file"]
    (tmp_path / "f" / "cat").mkdir(parents=True)
    (tmp_path / "f" / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    rows += rows_of(tmp_path, format="folder", path="f")
    assert rows[2].reason.startswith("bad_characters") and len(rows) == 3
    for row in rows:
        "".join(filter(None, (row.id, row.label, row.where, row.reason, row.path))).encode()


@pytest.mark.parametrize(("text", "question", "notes"), [
    ("<image>\nWhich pet?", "Which pet?", 0), ("<image>Which pet?", "Which pet?", 0), ("Which pet?\n<image>", "Which pet?", 0),
    ("  <image>  Which pet?", "Which pet?", 0), ("Which pet?", "Which pet?", 0), ("请看<image>这张图", "请看这张图", 1),
    ("See <image> and say: which pet?", "See and say: which pet?", 1), ("See\n<image>\nWhich pet?", "See\nWhich pet?", 1),
])
def test_the_placeholder_may_stand_anywhere(table, text, question, notes):
    write_json(table / "x.json", [{"image": "a.png", "conversations": human(text)}])
    (row,) = rows_of(table, format="llava", path="x.json")
    assert (row.question, row.label, row.reason, len(row.notes)) == (question, "cat", None, notes)


def test_a_text_of_spaces_takes_no_time(table):
    write_json(table / "x.json", [{"image": "a.png", "conversations": human(" \n" * 500_000 + "x" + " \n" * 500_000)}])
    assert rows_of(table, format="llava", path="x.json")[0].question == "x"


CHATS = {
    "several_images": {"images": ["a.png", "b.png"], "conversations": human("<image><image>Which?")},
    "several_images ": {"images": ["a.png"], "conversations": human("<image><image>Which?")},
    "no_image": {"images": [], "conversations": human("Which?")},
    "no_image ": {"conversations": human("Which?")},
    "several_turns": {"images": ["a.png"], "conversations": human("<image>Which?") * 2},
    "not_a_conversation": {"images": ["a.png"], "conversations": [{"from": "gpt", "value": "hello"}]},
    "not_a_conversation ": {"images": ["a.png"], "conversations": []},
    "not_a_conversation  ": {"images": ["a.png"], "conversations": "Which?"},
    "not_a_conversation   ": {"images": ["a.png"], "conversations": [{"value": "Which?"}, 7]},
    "not_a_conversation    ": {"images": ["a.png"], "conversations": human("Which?", "see <image>")},
    "no_question": {"images": ["a.png"], "conversations": human("<image>")},
    "outside_root": {"images": ["../a.png"], "conversations": human("<image>Which?")},
    "other_media": {"images": ["a.png"], "videos": ["x.mp4"], "conversations": human("<image>Which?")},
    "not_json": 7,
}


def test_conversations_that_are_no_sample_are_rows_with_their_reason(table):
    write_json(table / "x.json", list(CHATS.values()))
    rows = rows_of(table, format="llamafactory", path="x.json")
    assert [row.reason.split(":")[0] for row in rows] == [code.strip() for code in CHATS]
    assert [rows[4].question, rows[4].where] == ["Which?", "x.json, row 5"]


def test_llama_factory_description_with_tags_system_and_columns(table):
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "sys"}
    turns = [{"role": "sys", "content": "Be brief."}, {"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "cat"}]
    write_json(table / "x.json", [{"talk": turns, "pics": ["a.png"]}, {"talk": turns[1:], "pics": "b.png", "sys_text": "Be long."}])
    columns = {"messages": "talk", "images": "pics", "system": "sys_text"}
    write_json(table / "dataset_info.json", {
        "pets": {"file_name": "x.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        "hub": {"hf_hub_url": "someone/pets"}, "away": {"file_name": "../x.json"}, "pairs": {"file_name": "x.json", "ranking": True}})
    first, second = rows_of(table, format="llamafactory", path="dataset_info.json", dataset="pets")
    assert first.notes == ("system_prompt_left_out: Be brief.",) and second.notes == ("system_prompt_left_out: Be long.",)
    assert {first.label, second.label} == {"cat"} and second.path == str(table / "b.png")
    assert "Did you mean 'pets'?" in error_of(table, format="llamafactory", path=".", dataset="pet")
    assert "names no file" in error_of(table, format="llamafactory", path=".", dataset="hub")
    assert "is outside of" in error_of(table, format="llamafactory", path=".", dataset="away")
    assert "preference" in error_of(table, format="llamafactory", path=".", dataset="pairs")
    (table / "dataset_info.json").write_text("[]")
    assert "no dataset_info.json" in error_of(table, format="llamafactory", path=".", dataset="pets")


def test_alpaca(table):
    rows = [{"instruction": "Which?", "input": "Look.", "output": "cat", "images": ["a.png"]},
            {"instruction": "Which?", "output": "cat", "images": ["a.png"], "history": [["a", "b"]]},
            {"instruction": ["Which?"], "output": "cat", "images": ["a.png"]}, {"output": "cat", "images": ["a.png"]}]
    write_json(table / "x.json", rows)
    rows = rows_of(table, format="llamafactory", path="x.json", formatting="alpaca")
    assert rows[0].question == "Which?\nLook." and rows[0].label == "cat"
    assert [row.reason.split(":")[0] for row in rows[1:]] == ["several_turns", "not_a_conversation", "no_question"]
    assert "Did you mean 'alpaca'?" in error_of(table, format="llamafactory", path="x.json", formatting="alpacca")


def test_content_in_parts(table):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which?"}]
    urls = [{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, {"type": "text", "text": "Which?"}]
    write_json(table / "x.json", [{"conversations": human(parts, [{"type": "text", "text": "cat"}])}, {"conversations": human(urls)}])
    first, second = rows_of(table, format="llamafactory", path="x.json")
    assert (first.question, first.label, first.path) == ("Which?", "cat", str(table / "a.png"))
    assert second.reason.startswith("remote_image")


def test_only_and_without_divide_a_file_without_remainder(table):
    texts = ["Which?", "What colour?", "Which?", "Unique?"]
    write_json(table / "x.json", [{"image": "a.png", "conversations": human(text)} for text in texts] + [{}])
    parts = [{"only": ["Which?", None]}, {"only": ["What colour?"]}, {"without": ["Which?", "What colour?", None]}]
    found = [rows_of(table, format="llava", path="x.json", **part) for part in parts]
    assert [len(rows) for rows in found] == [3, 1, 1] and found[0][0].question is None and found[2][0].question == "Unique?"
    for bad in ("Which?", [], [3]):
        assert "list of questions" in error_of(table, format="llava", path="x.json", only=bad)


def test_label_studio(table):
    def task(*answers, **more):
        result = [{"type": kind, "from_name": name, "value": {"choices" if kind == "choices" else "text": value}} for kind, name, value in answers]
        return {"id": 5, "data": {"image": "/data/local-files/?d=a.png"}, "annotations": [{"result": result}]} | more

    cat, dog, note = ("choices", "pet", ["cat"]), ("choices", "pet", ["dog"]), ("textarea", "note", ["it sleeps"])
    write_json(table / "x.json", [
        task(cat), task(cat, note), task(note), task(("choices", "pet", ["cat", "dog"])), task(),
        task(cat) | {"annotations": task(cat)["annotations"] + task(dog)["annotations"]},
        task(cat) | {"annotations": task(cat)["annotations"] * 2}, task() | {"annotations": [{"was_cancelled": True, "result": None}]},
        task() | {"annotations": [{"result": [{"type": "choices", "from_name": "pet"}]}]}, {"id": 6}, 7, task(cat) | {"data": {"image": "../a.png"}}])
    rows = rows_of(table, format="labelstudio", path="x.json", label="pet")
    assert [row.label or row.reason.split(":")[0] for row in rows] == [
        "cat", "cat", "empty_label", "several_answers", "empty_label", "several_answers", "cat", "empty_label",
        "not_a_conversation", "not_json", "not_json", "cat"]
    assert rows[0].path == str(table / "a.png") and rows[11].reason.startswith("outside_root")
    assert rows_of(table, format="labelstudio", path="x.json")[1].reason.startswith("several_answers: cat, it sleeps")


def test_the_short_export_of_label_studio(table):
    def short(answer, **more):
        return {"image": "/data/local-files/?d=a.png", "id": 5, "pet": answer, "annotator": 1, "annotation_id": 9, "lead_time": 2.5} | more

    write_json(table / "x.json", [
        short("cat"), short({"choices": ["cat", "dog"]}), short({"choices": ["dog"]}), short(["cat", "dog"]), short(None), short(" "),
        {"image": "a.png", "annotation_id": 3}, short("cat", image="../a.png"), {"image": "a.png", "pet": "cat"}, 7])
    rows = rows_of(table, format="labelstudio", path="x.json", label="pet")
    assert [row.label or row.reason.split(":")[0] for row in rows] == [
        "cat", "several_answers", "dog", "several_answers", "empty_label", "empty_label", "empty_label", "cat", "not_json", "not_json"]
    assert rows[0].path == str(table / "a.png") and rows[7].reason.startswith("outside_root")
    write_json(table / "x.json", [short("cat"), short("cat", note="asleep")])
    one, two = rows_of(table, format="labelstudio", path="x.json")
    assert one.label == "cat" and two.reason == "several_answers: pet, note; name one control with label: NAME in the source"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt"])
def test_llama_factory_files_of_any_kind_give_the_same_rows(table, suffix, formatting):
    import csv

    if formatting == "alpaca":
        records = [{"instruction": f"<image>Which? {i}", "input": "", "output": "cat", "system": "Be brief.", "images": ["a.png"]} for i in range(9)]
    else:
        records = [{"conversations": human(f"<image>Which? {i}"), "system": "Be brief.", "images": ["a.png"]} for i in range(9)]
    file = table / f"x.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    elif suffix == "csv":
        with open(file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows({name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in each.items()} for each in records)
    else:
        file.write_text(json.dumps(records) if suffix == "json" else "".join(json.dumps(each) + "\n" for each in records))
    for file_name in (file.name, "folder"):
        (table / "folder").mkdir(exist_ok=True)
        (table / "folder" / file.name).write_bytes(file.read_bytes())
        write_json(table / "dataset_info.json", {"pets": {"file_name": file_name, "formatting": formatting, "columns": {"images": "images", "system": "system"}}})
        rows = rows_of(table, format="llamafactory", path=".", dataset="pets")
        assert [(row.question, row.label, row.reason, row.path, row.notes) for row in rows] == [
            (f"Which? {i}", "cat", None, str(table / "a.png"), ("system_prompt_left_out: Be brief.",)) for i in range(9)]


def test_num_samples_takes_random_rows_and_the_same_ones_each_time(table):
    write_json(table / "x.json", [{"conversations": human(f"<image>{i}"), "images": ["a.png"]} for i in range(100)])
    info = {"file_name": "x.json", "formatting": "sharegpt"}

    def taken(count):
        write_json(table / "dataset_info.json", {"pets": info | {"num_samples": count}})
        return [int(row.question) for row in rows_of(table, format="llamafactory", path=".", dataset="pets")]

    first = taken(20)
    assert len(set(first)) == 20 and first == taken(20) and first != list(range(20)) and taken(1000) == list(range(100))
    for bad in (0, -1, "ten", True, 2.5):
        write_json(table / "dataset_info.json", {"pets": info | {"num_samples": bad}})
        assert "num_samples has to be a whole number above 0" in error_of(table, format="llamafactory", path=".", dataset="pets")


def test_hugging_face_splits_columns_and_broken_folders(tmp_path):
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    features = datasets.Features({"pics": datasets.List(datasets.Image()), "class": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"pics": [[cell], [cell, cell], []], "class": [1, 0, None]}, features)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "saved")
    source = {"format": "huggingface", "path": "saved", "image": "pics", "label": "class"}
    rows = rows_of(tmp_path, **source, split="train")
    assert [row.label for row in rows] == ["dog", "cat", None] and rows[0].image == buffer.getvalue()
    assert rows[1].reason.startswith("several_images") and rows[2].reason.startswith("no_image")
    assert "Its splits: train, test" in error_of(tmp_path, **source)
    assert "Did you mean 'train'?" in error_of(tmp_path, **source, split="trian")
    assert "no column 'image'" in error_of(tmp_path, format="huggingface", path="saved", split="test")
    before = source_contents(source, tmp_path)
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    assert source_contents(source, tmp_path) != before
    assert "not readable as a Hugging Face dataset" in error_of(tmp_path, **source, split="train")


def test_a_dataset_on_a_hub_that_is_out_of_reach_is_one_clear_line(tmp_path):
    assert "not readable as a Hugging Face dataset" in error_of(tmp_path, format="huggingface", path="someone/pets", split="train")


READERS_OF_JSON = [("json", {}), ("jsonl", {}), ("llava", {}), ("llamafactory", {}), ("llamafactory", {"formatting": "alpaca"}), ("labelstudio", {})]


@HOSTILE
@given(st.binary(max_size=300), st.sampled_from(READERS_OF_JSON), st.sampled_from([b"", b"[", b"{", b'[{"data": ', b'[{"conversations": ']))
def test_random_bytes_as_json(tmp_path, content, how, start):
    (tmp_path / "x").write_bytes(start + content)
    try:
        rows = rows_of(tmp_path, format=how[0], path="x", **how[1])
    except InputError:
        return
    assert all(isinstance(row, Row) for row in rows)


KEYS = ["conversations", "messages", "from", "value", "images", "image", "instruction", "output", "history", "data", "annotations", "result", "type", "choices", "text", "id"]
WORDS = st.sampled_from(["human", "gpt", "system", "<image>", "<image>Which?", "cat", "choices", "textarea", "a.png", "../a.png"])
RECORDS = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | WORDS,
                       lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=12)


@HOSTILE
@given(st.lists(RECORDS, max_size=6), st.sampled_from([how for how in READERS_OF_JSON if how[0] != "jsonl"]))
def test_any_json_list_gives_one_row_a_record(tmp_path, records, how):
    (tmp_path / "x").write_text(json.dumps(records))
    rows = rows_of(tmp_path, format=how[0], path="x", **how[1])
    assert len(rows) == len(records)
    for row in rows:
        assert row.reason or row.path or row.image is not None
        assert all(value is None or isinstance(value, str) for value in (row.label, row.question, row.source, row.id))
        json.dumps([row.id, row.label, row.question, row.reason], ensure_ascii=False).encode()


@HOSTILE
@given(RECORDS, st.binary(max_size=60))
def test_any_dataset_info_is_rows_or_an_input_error(tmp_path, entry, content):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    (tmp_path / "x.json").write_bytes(content)
    try:
        rows_of(tmp_path, format="llamafactory", path=".", dataset="x")
    except InputError:
        return


@HOSTILE
@given(st.dictionaries(st.sampled_from(["file_name", "formatting", "columns", "tags", "ranking"]), RECORDS | st.just("x.json"), min_size=1))
def test_any_description_is_rows_or_an_input_error(tmp_path, entry):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    write_json(tmp_path / "x.json", [{"conversations": human("<image>Which?")}])
    try:
        rows_of(tmp_path, format="llamafactory", path=".", dataset="x")
    except InputError:
        return
