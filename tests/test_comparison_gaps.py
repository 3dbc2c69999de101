"""API rows that stopped half-way, failed, cost an unknown sum or were answered by another model: what may be said of them."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_experiment import Plan, build_experiment, write_run

from qwen2vl_sft.comparison.board import against, gap_of, lead, paired_tests, sparse_rows, support_text
from qwen2vl_sft.comparison.deployment import cost_table, currencies_of, parse_price
from qwen2vl_sft.comparison.findings import findings
from qwen2vl_sft.comparison.mistakes import distinct_models, label_noise, voters
from qwen2vl_sft.comparison.plots import accuracy_by_step, cost_accuracy, mean_by_step
from qwen2vl_sft.comparison.report import Material, deployment_html, look_at, material_of, page, tiles_html
from qwen2vl_sft.comparison.scoreboard import Scoreboard, difference, html_table, latex_table, markdown_table, text_table, top_cells
from qwen2vl_sft.rundir import RunDir

BUDGET = "not asked: the budget of 0.02 USD is spent"
LABELS = {"colour": ["red", "green", "blue"], "word": None}
RESPONSE = {"model_answered": "gpt-4o-2024-11-20", "system_fingerprint": "fp_1", "date": "2026-01-02T03:04:05+00:00", "tokens_estimated": False,
            "settings": json.dumps({"model": "gpt-4o-2024-11-20", "max_tokens": 128})}  # fmt: skip


def without_response(table: pd.DataFrame, which, reason: str) -> pd.DataFrame:
    """As scoring writes a sample without a response."""
    table = table.copy()
    gone = {"outcome": "error", "reason": reason, "prediction": None, "text": "", "seconds": 0.0, "cost": 0.0, "tokens_in": 0, "tokens_out": 0, **dict.fromkeys(RESPONSE), "tokens_estimated": False}
    for column, value in gone.items():
        table.loc[which, column] = value
    return table


def add_api(folder: Path, name: str, change, like: str = "gpt-4o") -> None:
    """Another API run: `like`'s answers, changed by (task, table)."""
    run, known = RunDir(folder / name), RunDir(folder / like)
    write_run(run, "api", {})
    for task in LABELS:
        run.write_predictions(name, task, 0, change(task, known.predictions("gpt-4o", task).assign(**RESPONSE)))


def half(task: str, table: pd.DataFrame) -> pd.DataFrame:
    return without_response(table, table.index[2 if task == "colour" else 40 :], BUDGET) if task == "word" else without_response(table, table.index[20:], "HTTP 500 server_error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    plan = Plan(samples=60, labels=LABELS, api=True, free=True, steps=(300,), runs={"mix": {}}, baselines=False, collapsed={}, refused={}, skills={"gpt-4o": 0.97, "mix(300)": 0.75, "base": 0.3})
    folder = build_experiment(tmp_path_factory.mktemp("gaps"), plan)
    everything = lambda task, table: without_response(table, table.index, "HTTP 500 server_error: The server had an error")
    other = lambda task, table: table.assign(settings='{"model": "gpt-4o"}', model_answered=np.where(np.arange(len(table)) % 2, "gpt-4o-2024-11-20", "gpt-4o-mini-2024-07-18"))
    added = {"half": half, "failed": everything, "limited": lambda task, table: table.head(10), "other": other,
             "unpriced": lambda task, table: table.assign(cost=0.0, settings='{"model": "nobody-knows-it"}', model_answered="nobody-knows-it"),
             "long": lambda task, table: table.assign(tokens_estimated=True, **({} if LABELS[task] else {"prediction": "very " * 200_000, "text": "very " * 200_000, "outcome": "wrong", "similarity": 0.0}))}  # fmt: skip
    for name, change in added.items():
        add_api(folder, name, change)
    return folder


@pytest.fixture(scope="module")
def material(folder):
    return material_of(folder)


@pytest.fixture(scope="module")
def board(material):
    return material.board


@pytest.fixture(scope="module")
def text(material):
    return page(material, {})


def said(board: Scoreboard, *words: str, topic: str | None = None) -> list[str]:
    return [one.text for one in findings(board) if all(word in one.text for word in words) and topic in (None, one.topic)]


# -------------------------------------------------------------------------- what nobody answered


def test_what_was_never_asked_or_failed_is_evidence_for_no_row(folder, board):
    """The tests rest on the samples with both responses: counted here from the files."""
    table = against(board, "mix(300)", "half").set_index("task")
    for task in LABELS:
        theirs = RunDir(folder / "half").predictions("half", task).set_index("id")
        ours = RunDir(folder / "mix").predictions("step-300", task, "free").set_index("id")
        ids = theirs.index[theirs["outcome"] != "error"]
        right = [frame.loc[ids, "outcome"].eq("correct").to_numpy() for frame in (ours, theirs)]
        assert (table.loc[task, "n"], table.loc[task, "left_out"]) == (len(ids), 60 - len(ids)) and len(ids) < 60
        assert table.loc[task, "difference"] == pytest.approx(100 * (right[0].mean() - right[1].mean()))
        assert (table.loc[task, "only_first"], table.loc[task, "only_second"]) == ((right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum())
        assert table.loc[task, "low"] <= table.loc[task, "difference"] <= table.loc[task, "high"]
    strict, honest = board.means.loc["mix(300)", "strict"] - board.means.loc["half", "strict"], lead(board.samples, "mix(300)", "half")[0]
    assert strict > 20 > 0 > honest  # by the strict means ours is far ahead; of what both answered, behind
    assert not said(board, "Paired tests of mix(300) against half", "better on 1") and not said(board, "Paired tests of mix(300) against half", "better on 2")
    assert said(board, "This is over the 60 of 120 samples that both responded to; the other 60 were not asked, or failed for technical reasons", topic="paired")
    assert said(board, "mix(300) is ahead of half on 0 of the 2 tasks that both answered, on the samples that both responded to")
    assert not [text for text in said(board, "Which of mix(300) and half") if "depends" in text and honest < 0 and board.means.loc["half", "answered_only"] > board.means.loc["mix(300)", "answered_only"]]


def test_a_refusal_is_a_response_and_stays_in_the_tests(board):
    refused = board.samples.copy()
    at = refused.index[(refused["row"] == "gpt-4o") & (refused["outcome"] == "correct")][:30]
    refused.loc[at, "outcome"] = ["refused", "off_list", "unparseable"] * 10
    both, counts = paired_tests(refused, "base", ["gpt-4o"]), paired_tests(board.samples, "base", ["gpt-4o"])
    assert both["n"].tolist() == counts["n"].tolist() == [60, 60] and both["left_out"].sum() == 0
    assert both["difference"].sum() == pytest.approx(counts["difference"].sum() - 100 * 30 / 60)


def test_a_row_without_any_response_is_compared_with_nothing(board):
    assert "failed" not in set(board.tests("base")["row"]) and board.tests("failed").empty and lead(board.samples, "mix(300)", "failed") is None
    assert said(board, "No paired test of mix(300) against failed: there is no sample that both responded to.")
    assert not [text for text in said(board, "against failed") + said(board, "ahead of failed") if "better on" in text or "ahead of" in text]


def test_the_denominator_stays_and_the_row_is_marked(folder, board):
    means, cells = board.means, board.cells.set_index(["row", "task"])
    for row in ("half", "failed"):
        correct = [(RunDir(folder / row).predictions(row, task)["outcome"] == "correct").sum() / 60 for task in LABELS]
        assert means.loc[row, "strict"] == pytest.approx(100 * np.mean(correct)) and not means.loc[row, "complete"]
        assert all({"partial", "error"} <= set(cells.loc[(row, task), "badges"]) and cells.loc[(row, task), "n"] == 60 for task in LABELS)
    assert means.loc["gpt-4o", "complete"] and not {"half", "failed", "limited"} & {row for row, _ in top_cells(board)}
    assert said(board, "mix(300) against half", "(strict, where 60 of 120 samples without a response count as wrong)", "half responded to 60 samples and answered", topic="api")
    assert said(board, "mix(300) against limited", "(strict, over the 20 of 120 samples that were scored)") and said(board, "failed responded to no sample")
    assert said(board, "gpt-4o answered", "of what it was asked")


def test_reasons_stand_with_their_counts(folder, board):
    assert gap_of(board, "half").why == {"HTTP 500 server_error": 40, BUDGET: 20} and gap_of(board, "gpt-4o").missing == 0
    text = said(board, "half is not fully scored: 60 of 120 samples have no response", topic="incomplete")[0]
    assert f"(40 × HTTP 500 server_error and 20 × {BUDGET})" in text and "`qwen2vl-sft score-api demo RECIPE run=half` asks again" in text and "is no random sample" in text
    assert said(board, "failed is not fully scored", "120 × HTTP 500 server_error: The server had an error") and said(board, "limited is not fully scored", "100 × not scored", "none of its figures")
    assert "without a response: 40 × HTTP 500 server_error" in html_table(board).replace("&quot;", '"')


def test_the_rule_is_said_where_it_applies_and_nowhere_else(folder, board, tmp_path):
    rule = "Tests compare two rows on the samples that both responded to"
    assert all(rule in text for text in (markdown_table(board), html_table(board), latex_table(board)))
    clean = Scoreboard.from_experiment(build_experiment(tmp_path, Plan(samples=12, labels={"a": ["x", "y"]}, steps=(300,))))
    assert not any(rule in text for text in (markdown_table(clean), html_table(clean)))


def test_a_run_that_goes_on_after_its_budget_is_not_better_than_before(folder, board, tmp_path):
    """Yesterday half of it was never asked, today it has all answers: the answers themselves are the same."""
    later = build_experiment(tmp_path, Plan(samples=60, labels=LABELS, api=True, free=True, steps=(300,), runs={"mix": {}}, baselines=False, collapsed={}, refused={}, skills={"gpt-4o": 0.97, "mix(300)": 0.75, "base": 0.3}))
    add_api(later, "half", lambda task, table: table)
    changes = difference(board, Scoreboard.from_experiment(later)).table
    own = changes[(changes["row"] == "half") & changes["task"].notna()]
    assert (own["change"] > 20).all() and (own["verdict"] == "no evidence").all() and own["n"].tolist() == [20, 40]


def test_a_bad_row_does_not_empty_the_common_support(folder, board):
    assert set(sparse_rows(board.samples)) == {"half", "failed", "limited"}
    kept = board.samples[~board.samples["row"].isin(["half", "failed", "limited"])]
    answered = kept[kept["outcome"].isin(["correct", "wrong"])].groupby(["task", "id"])["row"].nunique()
    shared = answered.index[answered == kept["row"].nunique()]
    own = kept[kept["row"] == "mix(300)"].set_index(["task", "id"]).loc[shared, "outcome"].eq("correct")
    assert len(shared) > 50 and board.means.loc["mix(300)", "common"] == pytest.approx(100 * own.groupby("task").mean().mean())
    assert board.means.loc[["half", "failed", "limited"], "common"].isna().all()
    assert all(name in board.support for name in ("half", "failed", "limited", f"{len(shared)} of 120 samples"))
    assert board.support == support_text(board) and board.support in text_table(board)


def test_plots_leave_out_what_is_not_fully_scored_and_say_so(board):
    texts = lambda figure: " ".join(text.get_text() for text in figure.findobj(match=lambda one: hasattr(one, "get_text")))
    for figure in (mean_by_step(board.means), accuracy_by_step(board.cells), cost_accuracy(cost_table(board))):
        assert re.search(r"not fully scored: (failed|limited|half), ", texts(figure))
    legend = [text.get_text() for text in mean_by_step(board.means).legends[0].get_texts()]
    assert "gpt-4o" in legend and not {"half", "failed", "limited"} & set(legend)


# -------------------------------------------------------------------------- costs and speed


def test_an_unknown_price_is_no_price_and_an_estimate_is_marked(board, text):
    costs = cost_table(board).set_index("row")
    assert np.isnan(costs.loc["unpriced", "cost_per_1000"]) and np.isnan(costs.loc["failed", "cost_per_1000"]) and np.isnan(costs.loc["failed", "images_per_second"])
    assert costs.loc["long", "cost_per_1000"] == pytest.approx(2.0) and costs.loc["long", "estimated"] == 1 and costs.loc["other", "estimated"] == 0
    assert costs.loc["other", "currency"] == "USD" and costs.loc["half", "cost_per_1000"] == pytest.approx(2.0)  # over what it was asked
    row = lambda name: re.search(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', text[text.index('id="deployment"') :])[1]
    assert "≈ 2.00 USD" in row("long") and "≈" not in row("other") and "2.00 USD" in row("other") and "0.667<small>one at a time</small>" in row("other")
    assert row("unpriced").count("<td>–</td>") >= 1 and "USD" not in row("unpriced") and ">0<" not in row("unpriced")
    assert "their cost is an estimate" in text and "can't be compared" not in text


def test_a_price_of_zero_is_known_and_currencies_are_not_mixed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2VL_SFT_ROOT", str(tmp_path))
    (tmp_path / "prices.yaml").write_text("mine: {input: 0, output: 0}\nours: {input: 1, output: 1, currency: EUR}\n")
    copy = build_experiment(tmp_path, Plan(samples=6, labels=LABELS, api=True, free=True, steps=(300,), runs={"mix": {}}, baselines=False))
    add_api(copy, "gratis", lambda task, table: table.assign(cost=0.0, settings='{"model": "mine"}'))
    add_api(copy, "dollars", lambda task, table: table)
    add_api(copy, "euros", lambda task, table: table.assign(settings='{"model": "ours"}'))
    board = Scoreboard.from_experiment(copy)
    costs = cost_table(board, dict([parse_price("1")]))
    assert costs.set_index("row").loc["gratis", "cost_per_1000"] == 0 and currencies_of(costs) == ["EUR", "USD"]
    assert currencies_of(costs[costs["row"] != "euros"]) == ["USD"]
    assert "seconds" in cost_accuracy(costs).axes[0].get_xlabel() and cost_accuracy(costs[costs["row"] != "euros"]).axes[0].get_xlabel() == "cost of 1,000 images, USD"
    assert "Costs are in EUR and USD, so they can't be compared." in deployment_html(Material(board))


# -------------------------------------------------------------------------- sentences, intervals, who answered


def test_a_long_answer_is_cut_in_every_sentence(board):
    assert said(board, "long collapsed on word (“very very", "…”)")
    for text in (markdown_table(board), html_table(board), latex_table(board)):
        assert len(text) < 300_000 and "very " * 17 not in text


@pytest.mark.parametrize("right", [0, 1, 23, 24])
def test_no_interval_leaves_0_to_100(right):
    ids = [f"s{i}" for i in range(24)]
    lines = [{"row": "m", "model": "m", "step": None, "kind": "base", "task": task, "id": f"{task}{name}", "group": f"{task}{name}", "rule": "free", "target": "x", "prediction": "x", "outcome": "correct" if i < right else "wrong",
              "other_rule": False, "position": 0} for task in "ab" for i, name in enumerate(ids)]  # fmt: skip
    from qwen2vl_sft.comparison.samples import cells_from

    board = Scoreboard(cells_from(pd.DataFrame(lines)), pd.DataFrame(lines))
    ends = board.means.filter(regex="low|high").loc["m"].astype(float)
    assert ends.between(0, 100).all() and not any(str(value).startswith("-") for value in ends)
    assert "(-" not in markdown_table(board)


def test_another_model_that_answered_is_named(board, text):
    assert said(board, "In other (asked for: gpt-4o), other models than the one asked for answered", "60 of 120 from gpt-4o-mini-2024-07-18", topic="another model")
    assert len([one for one in findings(board) if one.topic == "another model"]) == 1
    at = text.index("Who answered")
    assert "gpt-4o-mini" in text[at:].replace("<wbr>", "") and "fp_1" in text[at:].replace("<wbr>", "") and "0 of 120" in text[at:]


def test_tiles_lead_with_rows_that_are_fully_scored(material):
    tiles = re.findall(r"points to ([^<]*)<", tiles_html(material))
    assert not {"half", "failed", "limited"} & set(tiles)


# -------------------------------------------------------------------------- labels to look at again


def test_one_api_model_in_several_rows_has_one_vote_and_free_answers_are_no_confidence(tmp_path):
    labels = {"colour": ["red", "green", "blue"], "word": None}
    plan = Plan(samples=60, labels=labels, api=True, steps=(300,), runs={"mix": {}}, collapsed={}, refused={}, baselines=False, skills={"gpt-4o": 0.6, "mix(300)": 1.0, "base": 0.2})
    folder = build_experiment(tmp_path, plan)
    for name in ("again", "third"):
        add_api(folder, name, lambda task, table: table)
    add_api(folder, "stranger", lambda task, table: table.assign(model_answered="another-model", settings='{"model": "another-model"}'))
    board = Scoreboard.from_experiment(folder)
    assert {"again", "third", "stranger"} <= set(voters(board)) and [row for row in distinct_models(board, voters(board)) if row in ("again", "third")] == ["again"]
    noise = label_noise(board)
    assert not len(noise[noise["task"] == "colour"])  # the API models agree with each other, but nobody states a probability
    assert (noise["confident"] == 0).all() and not any({"again", "third"} <= set(models) for models in noise["models"])
    assert not [one for one in look_at(Material(board)) if "with confidence" in one]
