"""Hugging Face data sets: by their hub name from a hub on this machine, from a folder laid out like one, and broken ones."""
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.sources import Row, read_rows

NAME, COMMIT = "someone/pets", "a" * 40


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(count: int) -> bytes:
    "A Parquet file as the hub has it: an Image column and a ClassLabel."
    features = {"image": {"_type": "Image"}, "kind": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("kind", pa.int64())], metadata={"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": png(i), "path": None}, "kind": i % 2} for i in range(count)], schema), buffer)
    return buffer.getvalue()


FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Pets\n",
    "data/train-00000-of-00001.parquet": parquet(6),
    "data/test-00000-of-00001.parquet": parquet(2),
}


class Hub(BaseHTTPRequestHandler):
    "The part of the hub's interface that reading a data set takes."
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, content: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        files, tree = f"/datasets/{NAME}/resolve/", f"/api/datasets/{NAME}/tree/{COMMIT}"
        name = path.removeprefix(files).partition("/")[2]
        if path.startswith(files) and name in FILES:
            self.reply(FILES[name], ETag=f'"{hashlib.sha1(FILES[name]).hexdigest()}"')
        elif path == f"/api/datasets/{NAME}/revision/{COMMIT}":
            self.reply(json.dumps({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}).encode())
        elif path in (tree, f"{tree}/data"):
            below = path.removeprefix(tree).lstrip("/")
            entries = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                       for name, content in FILES.items() if name.rpartition("/")[0] == below]
            folders = [] if below else [{"type": "directory", "path": "data", "size": 0, "oid": "0" * 40}]
            self.reply(json.dumps(entries + folders).encode())
        else:
            self.reply(b"{}", 404, **{"X-Error-Code": "EntryNotFound" if path.startswith(files) else "RepoNotFound"})

    do_GET = do_HEAD = answer


CODE = """
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.sources import read_rows
for split in ("train", "test"):
    rows = list(read_rows({"format": "huggingface", "path": "someone/pets", "split": split, "label": "kind"}, "."))
    print([row.label for row in rows], {row.image[:4] for row in rows}, rows[-1].where)
for source in ({"path": "someone/cats"}, {"path": "someone/pets", "split": "half", "label": "kind"}):
    try:
        list(read_rows({"format": "huggingface", **source}, "."))
    except InputError as error:
        print(error)
"""


def test_a_data_set_by_its_name_on_the_hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    environment = {name: value for name, value in environment.items() if "proxy" not in name.lower()}
    try:
        done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    train, test, unknown, split = done.stdout.splitlines()
    assert train == "['cat', 'dog', 'cat', 'dog', 'cat', 'dog'] {b'\\x89PNG'} dataset, row 6"
    assert test == "['cat', 'dog'] {b'\\x89PNG'} dataset, row 2"
    assert unknown.startswith("someone/cats: not readable as a Hugging Face dataset") and "doesn't exist on the Hub" in unknown
    assert split.startswith("someone/pets has no split 'half'.") and "Its splits: train, test" in split


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "No data set of another test is found."
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(folder, **source) -> list[Row]:
    return list(read_rows({"format": "huggingface", **source}, folder))


def test_a_folder_laid_out_like_one_of_the_hub(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(content)
    assert [row.label for row in rows_of(tmp_path, path="pets", split="test", label="kind")] == ["cat", "dog"]
    with pytest.raises(InputError, match="no split ''"):
        rows_of(tmp_path, path="pets", label="kind")


def test_a_folder_of_pictures_with_their_metadata(tmp_path):
    (tmp_path / "pets" / "train").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "pets" / "train" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "pets" / "train" / "metadata.csv").write_text("file_name,breed\n" + "".join(f"{i}.png,b{i}\n" for i in range(3)))
    rows = rows_of(tmp_path, path="pets", label="breed")
    assert [row.label for row in rows] == ["b0", "b1", "b2"] and all(row.path or row.image for row in rows)


BROKEN = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.sampled_from(["x.csv", "x.json", "x.jsonl", "x.parquet", "x.arrow", "state.json", "dataset_dict.json", "dataset_info.json", "README.md", "data/train-0.parquet", "x.zip"])
BYTES = st.binary(max_size=120) | st.sampled_from([b"{}", b"[]", b"image,label\na.png,cat\n", b'{"splits": ["train"]}', b'{"_data_files": [{"filename": "../x"}]}', b"---\nconfigs: 7\n---\n"])


@BROKEN
@given(st.dictionaries(NAMES, BYTES, max_size=3))
def test_any_folder_gives_rows_or_an_input_error(tmp_path, files):
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    for name, content in files.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(content)
    try:
        rows = rows_of(tmp_path, path="d")
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert all(isinstance(row, Row) and (row.reason or row.path or row.image is not None) for row in rows)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("saved") / "good"
    datasets.Dataset.from_dict({"image": [b"x", b"y"], "label": ["cat", "dog"]}).save_to_disk(str(folder))
    return folder


@BROKEN
@example(0, 596, b"\t")  # a length that takes in what is no text
@example(0, 593, b"\x01")  # a negative length
@given(st.integers(0, 2), st.integers(0, 2000), st.binary(min_size=1, max_size=20))
def test_a_damaged_saved_data_set_gives_its_rows_or_an_input_error(tmp_path, saved, which, place, content):
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    shutil.copytree(saved, tmp_path / "d")
    file = sorted(path for path in (tmp_path / "d").iterdir() if path.is_file())[which]
    stored = bytearray(file.read_bytes())
    place %= len(stored)
    stored[place : place + len(content)] = content
    file.write_bytes(stored)
    try:
        rows = rows_of(tmp_path, path="d")
    except InputError:
        return
    assert len(rows) == 2
