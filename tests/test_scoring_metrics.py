"""The strict parser's edges, and label sets as large as they come."""

import numpy as np
import pytest
import torch

from qwen2vl_sft.config import ModelConfig
from qwen2vl_sft.encoding.batch import Sample
from qwen2vl_sft.encoding.prompt import load_encoder
from qwen2vl_sft.model.load import base_location, load_base
from qwen2vl_sft.scoring import labels
from qwen2vl_sft.scoring.labels import label_log_probabilities, label_tree
from qwen2vl_sft.scoring.metrics import judge
from qwen2vl_sft.tasks import Task


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
