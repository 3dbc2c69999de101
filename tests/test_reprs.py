"""What notebooks show of our objects: escaped, without the network, and with no effect on what the objects do."""

import pickle
import re

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from synthetic_experiment import Plan, build_experiment

from qwen2vl_sft.core import ASSETS
from qwen2vl_sft.encoding.batch import KINDS, Batch, Sample, kinds_of, pack, pad, picture_of
from qwen2vl_sft.encoding.prompt import IGNORED, load_encoder
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.tasks import Suite

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(str(ASSETS / "small"))


@pytest.fixture(scope="module")
def samples(encoder):
    noise = lambda width, height: Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
    asked = [(f"{EVIL} 这是什么?", "武器 🙂 é", noise(96, 64)), ("Which digit?", "7", noise(32, 32)), ("Which?", "flat", noise(40, 120))]
    return [Sample(encoder.encode(question, image.size, answer), encoder.images.squares(image)) for question, answer, image in asked]


def harmless(page: str) -> bool:
    return EVIL not in page and not re.search(r"<script|https?:|\son\w+=", page.replace("&lt;img src=x onerror=alert(1)&gt;", ""))


def test_suite_and_task_are_escaped():
    task = {"name": "t", "question": EVIL, "labels": ["yes", EVIL], "positive": "yes", "aliases": {"yes": ["oui"]}}
    suite = Suite(name="s", description=EVIL, tasks=[task, {"name": "c", "question": "Which | one?", "answer": "text", "metric": "fields", "fields": ["phone"]}])
    for page in (suite._repr_html_(), suite.tasks[0]._repr_html_()):
        assert harmless(page) and "&lt;img" in page and "(looked for)" in page and "= oui" in page
    assert "compared by phone" in suite._repr_html_()


def test_a_sample_shows_its_picture_and_what_is_supervised(samples, encoder):
    page = samples[0]._repr_html_()
    assert harmless(page) and "data:image/png;base64" in page
    coloured = "".join(re.findall(r'<span style="background:#e69f00[^>]*>([^<]*)</span>', page))
    assert coloured == "武器 🙂 é&lt;|im_end|&gt;", "a character spread over tokens is one box"
    image = Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 96, 3))
    assert picture_of(encoder.images.squares(image)).tobytes() == picture_of(encoder.images.resize(image)).tobytes()
    assert "vision cache" in Sample(samples[0].encoded, features=torch.zeros(1))._repr_html_()


def test_a_sample_travels_without_the_tokenizer(samples):
    assert samples[0].encoded.encoder is not None
    content = pickle.dumps(samples[0].encoded)
    assert len(content) < 10_000
    assert "supervised" in pickle.loads(content)._repr_html_()


@pytest.mark.parametrize("side", ["right", "left", "packed"])
def test_a_batch_shows_what_each_position_is(samples, encoder, side):
    batch = pack(samples, encoder.images) if side == "packed" else pad(samples, encoder.images, encoder.pad_id, side)
    names = list(KINDS)
    for kinds, sample in zip(kinds_of(batch), samples, strict=True):
        counts = {name: int((kinds == names.index(name)).sum()) for name in names}
        assert counts["picture"] == sample.encoded.image_tokens and counts["supervised"] == (sample.encoded.labels != IGNORED).sum()
        assert counts["padding"] == len(kinds) - len(sample.encoded)
    assert harmless(batch._repr_html_()) and batch._repr_html_().count("<svg") == 3


def test_a_batch_is_a_dictionary_to_everyone_else(samples, encoder):
    batch = pad(samples, encoder.images, encoder.pad_id)
    moved = send_to_device(batch, torch.device("cpu"))
    assert isinstance(moved, Batch) and moved.keys() == batch.keys() and {**batch}.keys() == batch.keys()
    again = pickle.loads(pickle.dumps(batch))
    assert all(torch.equal(again[name], batch[name]) for name in batch)


def test_a_run_shows_checkpoints_by_tasks(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=20, labels={"weapon": ["weapon", "none"], "number": None}, steps=(1, 10), runs={"mix": {}}))
    page = RunDir(folder / "mix")._repr_html_()
    assert harmless(page) and page.count("<tr>") + page.count("<tr ") >= 3 and "weapon (n=20)" in page
    assert page.index("step-1<") < page.index("step-10<")
