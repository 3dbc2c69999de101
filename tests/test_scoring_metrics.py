"""The strict parser's edges, and label sets as large as they come."""

import numpy as np
import pandas as pd
import pytest
import torch

from qwen2vl_sft.config import ModelConfig
from qwen2vl_sft.encoding.batch import Sample
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.load import base_location, load_base
from qwen2vl_sft.scoring import labels
from qwen2vl_sft.scoring.labels import label_log_probabilities, label_tree
from qwen2vl_sft.core import InputError
from qwen2vl_sft.scoring.metrics import fields_match, judge, open_figures, similarity
from qwen2vl_sft.tasks import Task, load_suite


@pytest.mark.parametrize(
    ("text", "outcome"),
    [("A", "correct"), ("a", "wrong"), ("A.", "off_list"), ("m²", "wrong"), ("no", "off_list"), (" A ", "correct"), ("\n", "unparseable")],
)
def test_labels_that_differ_only_in_case_or_form_stay_two(text, outcome):
    assert judge(Task(name="letter", question="Which letter?", labels=["A", "a", "m2", "m²"]), "A", text).outcome == outcome


def test_a_thousand_labels_in_chunks(monkeypatch):
    encoder, model = load_encoder(base_location("small")), load_base(ModelConfig(device="cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    samples = [Sample(encoder.encode("Which article?", (32, 32)), picture) for picture in pixels]
    tree = label_tree(encoder, {f"article {i:03d}": [f"article {i:03d}"] for i in range(1000)})
    whole = label_log_probabilities(model, encoder, samples, tree)
    assert whole.shape == (2, 1000) and bool((whole.exp().sum(1) <= 1).all())
    monkeypatch.setattr(labels, "PROJECTED", 7)
    monkeypatch.setattr(labels, "NODES", 37)
    torch.testing.assert_close(label_log_probabilities(model, encoder, samples, tree), whole, rtol=0, atol=1e-4)


CARD = "Jo Lee, Tel. 138 0013 8000, jo.lee@Shop.example.com, http://www.shop.example.com/"


@pytest.mark.parametrize(
    ("text", "target", "matches"),
    [
        ("+86 13800138000 JO.LEE@shop.example.com shop.example.com", CARD, {"phone": True, "email": True, "url": True}),
        ("１３８-００１３-８０００ jo.lee@shop.example.com https://shop.example.com#top", CARD, {"phone": True, "email": True, "url": True}),
        ("138 0013 8000 and 139 0013 8000", CARD, {"phone": False, "email": False, "url": False}),  # one number too many
        ("jo.lee@shop.example.co", "jo.lee@shop.example.com", {"email": False}),
        ("no contact details", "010-62770334", {"phone": False}),
        ("None", "none", {"text": True}),  # nothing to read in the target: its text counts
        ("138 0013 8000", "none", {"text": False}),
        ("shop.example.com/a?b=2", "https://shop.example.com/a?b=3", {"url": False}),
        ("例子.公司", "http://www.例子.公司/", {"url": True}),
    ],
)
def test_contact_details_are_compared_field_by_field(text, target, matches):
    task = Task(name="card", question="Which contact details?", answer="text", metric="fields", fields=["phone", "email", "url"], region="CN")
    assert fields_match(text, target, task) == matches
    assert judge(task, target, text).outcome == ("correct" if all(matches.values()) else "wrong")


def test_edit_similarity_is_one_less_the_distance_over_the_longer_length():
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)  # the textbook's pair
    assert similarity("", "abc") == 0 and similarity("Ａ b", "a  B") == 1


def test_open_figures_count_only_samples_that_have_the_detail():
    table = pd.DataFrame({"similarity": [1.0, 0.5, None], "fields": ['{"phone": true}', '{"phone": false, "url": true}', '{"text": true}']})
    assert open_figures(table) == {"similarity": 0.5, "phone": 0.5, "url": 1.0, "text": 1.0}
    assert open_figures(pd.DataFrame({"outcome": ["correct"]})) == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("metric: fields", "needs `fields`"),
        ("metric: fields\n    fields: [fone]", "phone"),
        ("fields: [phone]\n    region: china", "region"),
    ],
)
def test_a_task_with_wrong_fields_is_refused(tmp_path, line, message):
    (tmp_path / "s.yaml").write_text(f"name: s\ntasks:\n  - name: card\n    question: Which?\n    answer: text\n    {line}\n")
    with pytest.raises(InputError, match=message):
        load_suite(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("text", "target", "region", "right"),
    [
        ("138 0013 8000 a@b.com", "139 9999 9999 a@b.com", None, False),  # nothing says how to read them: another number is another number
        ("139-9999-9999 a@b.com", "139 9999 9999 a@b.com", None, True),
        ("a@b.com", "139 9999 9999 a@b.com", None, False),
        ("+1 650-253-0000 and 139 9999 9999", "+1 650 253 0000", None, False),
        ("a12345678@b.com", "A12345678@b.com", None, True),  # digits of an address are no number
        ("95588", "95599", "CN", False),
        ("010-62770334 ext 12", "010-62770334 ext. 99", "CN", False),
        ("010-62770334 ext. 12", "+86 10 6277 0334 ext 12", "CN", True),
        ("010-62770334 转12", "010-62770334 转99", None, False),
    ],
)
def test_another_number_or_extension_is_wrong(text, target, region, right):
    task = Task(name="card", question="Which contact details?", answer="text", metric="fields", fields=["phone", "email"], region=region)
    assert judge(task, target, text).outcome == ("correct" if right else "wrong")


def test_a_cut_answer_names_no_label():
    "`gun` was on its way to `gun case`."
    task = Task(name="item", question="What is it?", labels=["gun", "gun case"])
    assert judge(task, "gun", "gun").outcome == judge(task, "gun", "gun。").outcome == judge(task, "gun", "ｇｕｎ．").outcome == "correct"
    judged = judge(task, "gun", "gun", "cut at 1 tokens")
    assert (judged.prediction, judged.outcome, judged.reason) == (None, "unparseable", "cut at 1 tokens")
    assert judge(task, "gun", "a gun in", "cut at 3 tokens").reason == "not a declared label or alias; cut at 3 tokens"
