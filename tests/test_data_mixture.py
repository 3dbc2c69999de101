"""Sample orders: the shares asked for, no row twice in an epoch, and the same order however it is computed."""
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_sft.config import MixtureConfig
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.mixture import BLOCK, MIXTURES, expected_shares, label_table, mixture, plot_shares, sample_order, share_table, subset

NAMES = ["concatenate", "proportional", "equal", "balanced", "temperature", "weights"]
SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 40), min_size=1, max_size=6)


def config(name: str, sizes: dict) -> MixtureConfig:
    weights = {task: float(i + 1) for i, task in enumerate(sizes)} if name == "weights" else {}
    return MixtureConfig(name=name, weights=weights)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.sampled_from(NAMES), st.integers(0, 300), st.integers(0, 2**31), st.integers(0, 300))
def test_orders(sizes, name, n, seed, shorter):
    order = sample_order(sizes, config(name, sizes), n, seed)
    assert len(order) == n == len(list(order)) and order.names == tuple(sizes)
    for task, size in sizes.items():
        rows = [row for owner, row in order if owner == task]
        assert all(0 <= row < size for row in rows)
        if name == "concatenate":
            continue
        for start in range(0, len(rows), size):  # no row comes again before all were seen
            epoch = rows[start : start + size]
            assert len(set(epoch)) == len(epoch)
    shorter = min(shorter, n)
    assert list(sample_order(sizes, config(name, sizes), shorter, seed)) == list(order[:shorter])


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(0, 1000))
def test_concatenate_gives_every_row_once_an_epoch(sizes, epochs, seed):
    total = sum(sizes.values())
    order = sample_order(sizes, MixtureConfig(name="concatenate"), total * epochs, seed)
    everything = {(task, row) for task, size in sizes.items() for row in range(size)}
    seen = [list(order[i * total : (i + 1) * total]) for i in range(epochs)]
    assert all(set(epoch) == everything for epoch in seen)
    if total > 20 and epochs > 1:
        assert seen[0] != seen[1]


@settings(max_examples=80, deadline=None)
@given(SIZES, st.sampled_from(NAMES[1:]), st.integers(0, 1000), st.integers(0, 20))
def test_each_block_meets_the_shares_within_one_sample(sizes, name, seed, block):
    shares = expected_shares(sizes, config(name, sizes))
    order = sample_order(sizes, config(name, sizes), BLOCK * (block + 1), seed)[BLOCK * block :]
    counts = Counter(task for task, _ in order)
    # a task's stretch of the 64 even points may begin and end within a point: less than 2 away, 1 almost always
    assert all(abs(counts[task] - BLOCK * share) < 2 for task, share in shares.items())


def test_long_runs_meet_the_shares():
    sizes = {"large": 5000, "middle": 500, "small": 50, "tiny": 5}
    for name in NAMES:
        settings = config(name, sizes)
        table = share_table(sizes, settings, sample_order(sizes, settings, 26_960, seed=1))
        assert (table["actual"] - table["expected"]).abs().max() < 0.004, name
        assert table["actual"].sum() == pytest.approx(1) and table["samples"].sum() == 26_960


def test_temperature_lies_between_proportional_and_equal():
    sizes = {"large": 900, "small": 100}
    share = {t: expected_shares(sizes, MixtureConfig(name="temperature", temperature=t))["small"] for t in (1, 2, 1e9)}
    assert share[1] == pytest.approx(0.1) and share[2] == pytest.approx(0.25) and share[1e9] == pytest.approx(0.5)


def test_zero_weight_leaves_a_task_out_completely():
    sizes = {"a": 5, "b": 5, "c": 5}
    for weights in ({"a": 1, "b": 1, "c": 0}, {"a": 0, "b": 1, "c": 1}, {"a": 0, "b": 3, "c": 0}):
        order = sample_order(sizes, MixtureConfig(name="weights", weights=weights), 5000, seed=0)
        assert {task for task, _ in order} == {task for task, weight in weights.items() if weight}


def test_an_empty_task_without_weight_is_no_problem():
    order = sample_order({"a": 5, "empty": 0}, MixtureConfig(name="proportional"), 100, seed=0)
    assert {task for task, _ in order} == {"a"}
    assert len(sample_order({"a": 5, "empty": 0}, MixtureConfig(name="concatenate"), 7, seed=0)) == 7


def test_a_tasks_rows_do_not_depend_on_the_other_tasks():
    def rows(sizes):
        return [row for task, row in sample_order(sizes, MixtureConfig(name="equal"), 400, seed=3) if task == "a"]

    alone, together = rows({"a": 30}), rows({"z": 9, "a": 30, "b": 7})
    assert together == alone[: len(together)]


def test_seeds_differ():
    sizes = {"a": 50, "b": 50}
    for name in ("concatenate", "equal"):
        orders = [list(sample_order(sizes, MixtureConfig(name=name), 100, seed)) for seed in range(3)]
        assert orders[0] != orders[1] != orders[2]


def test_tasks_of_equal_size_are_not_shuffled_alike():
    order = sample_order({"a": 50, "b": 50}, MixtureConfig(name="equal"), 100, seed=0)
    rows = {task: [row for owner, row in order if owner == task] for task in "ab"}
    assert rows["a"][:40] != rows["b"][:40]


@pytest.mark.parametrize(("settings", "message"), [
    (MixtureConfig(name="equl"), "Did you mean 'equal'"),
    (MixtureConfig(name="weights", weights={"a": 1, "bb": 1}), "'bb'.*Its tasks: a, b"),
    (MixtureConfig(name="weights", weights={"a": 1}), "lacks b"),
    (MixtureConfig(name="equal", weights={"a": 1, "b": 3}), "mixture.weights is for mixture.name=weights"),
    (MixtureConfig(name="weights", weights={"a": 1, "b": -1}), "must be 0 or more"),
    (MixtureConfig(name="weights", weights={"a": 1, "b": float("nan")}), "must be 0 or more"),
    (MixtureConfig(name="weights", weights={"a": 0, "b": 0}), "no task has a weight"),
])
def test_unusable_settings(settings, message):
    with pytest.raises(InputError, match=message):
        sample_order({"a": 3, "b": 4}, settings, 10, seed=0)


def test_an_empty_task_with_weight_is_an_error():
    with pytest.raises(InputError, match="task b has no training rows"):
        sample_order({"a": 3, "b": 0}, MixtureConfig(name="balanced"), 10, seed=0)


def test_a_mixture_of_ones_own():
    @mixture("only_first")
    def only_first(sizes, settings):
        return {task: float(i == 0) for i, task in enumerate(sizes)}

    try:
        assert {task for task, _ in sample_order({"a": 3, "b": 4}, MixtureConfig(name="only_first"), 10, 0)} == {"a"}
    finally:
        del MIXTURES["only_first"]


def test_the_order_is_the_same_in_another_process():
    code = ("from qwen2vl_sft.config import MixtureConfig; from qwen2vl_sft.data.mixture import sample_order\n"
            "print(list(sample_order({'a': 30, 'b': 7}, MixtureConfig(name='equal'), 50, 5)))")
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "77"})
    assert printed.stdout.strip() == str(list(sample_order({"a": 30, "b": 7}, MixtureConfig(name="equal"), 50, 5)))


def test_a_million_samples_take_seconds():
    import time

    start = time.perf_counter()
    order = sample_order({"a": 100_000, "b": 1000, "c": 50}, MixtureConfig(name="equal"), 1_000_000, seed=0)
    assert time.perf_counter() - start < 10 and np.unique(order.tasks).size == 3


# --- subsets, caps, balanced labels, replacement ------------------------------------------------

LABELS = {"a": ["x"] * 27 + ["y"] * 3, "b": ["z"] * 6 + ["w"]}
VARIANTS = st.builds(
    MixtureConfig, name=st.sampled_from(["concatenate", "proportional", "equal", "temperature"]), cap=st.none() | st.integers(1, 40),
    fraction=st.floats(0.01, 1), max_rows=st.none() | st.integers(1, 40), balance_labels=st.booleans(), replacement=st.booleans())


@settings(max_examples=150, deadline=None)
@given(VARIANTS, st.integers(0, 200), st.integers(0, 200), st.integers(0, 2**31))
def test_every_variant_is_a_prefix_of_a_longer_order_and_keeps_to_its_subset(mix, n, shorter, seed):
    sizes = {"a": 30, "b": 7, "open": 12}
    order = sample_order(sizes, mix, n, seed, LABELS)
    shorter = min(n, shorter)
    assert list(sample_order(sizes, mix, shorter, seed, LABELS)) == list(order[:shorter])
    for task, size in sizes.items():
        used = set(subset(size, mix, seed, task))
        rows = [row for owner, row in order if owner == task]
        assert set(rows) <= used and len(used) == max(1, min(round(mix.fraction * size), mix.max_rows or size))
        if not mix.replacement and not (mix.balance_labels and task in LABELS):
            for start in range(0, len(rows), len(used)):
                epoch = rows[start : start + len(used)]
                assert len(set(epoch)) == len(epoch)


def test_a_subset_is_random_and_grows_by_addition():
    for seed in range(5):
        parts = [set(subset(1000, MixtureConfig(fraction=fraction), seed, "t")) for fraction in (0.01, 0.1, 0.5, 1.0)]
        assert [len(part) for part in parts] == [10, 100, 500, 1000] and parts[0] < parts[1] < parts[2] < parts[3]
        assert abs(np.mean(list(parts[1])) - 500) < 100 and parts[1] != set(range(100))
    assert set(subset(100, MixtureConfig(max_rows=9), 0, "t")) != set(subset(100, MixtureConfig(max_rows=9), 1, "t"))
    assert list(subset(3, MixtureConfig(fraction=0.01), 0, "t")) != [] and list(subset(0, MixtureConfig(), 0, "t")) == []


def test_a_cap_limits_the_share_and_loses_no_row():
    sizes, mix = {"large": 1000, "small": 50}, MixtureConfig(name="concatenate", cap=100)
    order = sample_order(sizes, mix, 1500, seed=0)
    assert Counter(task for task, _ in order[:150]) == {"large": 100, "small": 50}
    assert {row for task, row in order if task == "large"} == set(range(1000))  # after ten epochs of 150
    assert expected_shares(sizes, MixtureConfig(name="temperature", temperature=1, cap=50))["small"] == 0.5
    assert expected_shares(sizes, MixtureConfig(name="equal", cap=1))["small"] == 0.5


def test_balanced_labels_are_balanced_in_every_block_and_rows_come_in_epochs():
    order = sample_order({"a": 30}, MixtureConfig(name="equal", balance_labels=True), BLOCK * 30, 0, LABELS)
    for start in range(0, len(order), BLOCK):
        assert abs(Counter(LABELS["a"][row] for _, row in order[start : start + BLOCK])["y"] - BLOCK / 2) <= 1
    rare = [row for _, row in order if row >= 27]
    assert all(sorted(rare[start : start + 3]) == [27, 28, 29] for start in range(0, len(rare) - 3, 3))
    with pytest.raises(InputError, match="needs the rows' labels"):
        sample_order({"a": 30}, MixtureConfig(balance_labels=True), 10, 0)


def test_open_tasks_are_not_balanced():
    plain, balanced = (sample_order({"open": 20}, MixtureConfig(name="equal", balance_labels=on), 50, 3, {}) for on in (False, True))
    assert list(plain) == list(balanced)


def test_with_replacement_rows_repeat_and_shares_hold():
    for name in ("concatenate", "proportional", "equal"):
        order = sample_order({"a": 900, "b": 100}, MixtureConfig(name=name, replacement=True), 20_000, 0)
        share = Counter(task for task, _ in order)["b"] / 20_000
        assert share == pytest.approx(expected_shares({"a": 900, "b": 100}, MixtureConfig(name=name))["b"], abs=0.01)
        first = [row for task, row in order if task == "a"][:900]
        assert 0.58 < len(set(first)) / 900 < 0.68  # 1 - 1/e


@pytest.mark.parametrize("balance", [False, True])
def test_the_label_table_adds_up(balance):
    sizes, mix = {"a": 30, "b": 7}, MixtureConfig(name="equal", balance_labels=balance, fraction=0.9)
    order = sample_order(sizes, mix, 6400, 1, LABELS)
    table = label_table(sizes, mix, order, LABELS, 1)
    assert table["expected"].sum() == pytest.approx(1) and table["actual"].sum() == pytest.approx(1)
    assert (table["expected"] - table["actual"]).abs().max() < 0.01 and table["rows"].sum() == 27 + 6
    assert (table["samples"] / table["rows"]).equals(table["epochs"])


def test_plots_show_tasks_or_labels():
    pytest.importorskip("matplotlib").use("Agg")
    figure = plot_shares({"a": 30, "b": 7}, {"one": MixtureConfig(), "two": MixtureConfig(balance_labels=True)}, 200, 0, LABELS)
    assert [len(axis.patches) for axis in figure.axes] == [8, 8] and figure.axes[1].get_title() == "two"


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_order_is_the_same_for_any_number_of_workers(workers):
    from torch.utils.data import DataLoader

    order = sample_order({"a": 30, "b": 7}, MixtureConfig(name="equal", balance_labels=True, replacement=True), 64, 5, LABELS)
    loaded = [key for batch in DataLoader(order, batch_size=8, num_workers=workers, collate_fn=list) for key in batch]
    assert loaded == list(order)
    resumed = DataLoader(order[24:], batch_size=8, num_workers=workers, collate_fn=list)
    assert [key for batch in resumed for key in batch] == list(order)[24:]
