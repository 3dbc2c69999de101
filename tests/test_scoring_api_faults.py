"""API models, one kind of misbehaviour at a time: what it costs, what the rows and the user are told, and that it ends."""

import json
import os
import re
import signal
import socket
import sqlite3
import threading
import time
from functools import partial

import pandas as pd
import pytest
from odd_server import started
from test_scoring_remote import CANARY, WEAPON, asked, config_for, numbered, response_of, start_toy, write_prices

from qwen2vl_sft import cli
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring import responses
from qwen2vl_sft.scoring.remote import ApiConfig, Session, ask_all, open_session, prediction_row, price_of, run_to_end
from qwen2vl_sft.scoring.responses import Key, ResponseStore
from qwen2vl_sft.tasks import Task


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("CANARY_KEY", CANARY)


def states(session) -> dict[str, int]:
    return session.store.usage(session.run)["states"]


# --- what ends, and what it costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"extra": {"seed": 1}}, {"temperature": None, "extra": {"temperature": 0.2}}, {"temperature": None, "extra": {"reasoning_effort": "low"}}], ids=lambda changes: "-".join(changes["extra"]))
def test_a_refused_field_of_extra_is_not_sent_for_ever(project, key, changes):
    with started("no settings") as server:
        session, reasons = asked(config_for(server.address, concurrency=1, max_minutes=0.05, **changes), project / "store.sqlite", numbered(range(4)))
        name = next(iter(changes["extra"]))
        assert len(server.received) <= 2 and len(reasons) == 4
        assert f"(take {name} out of the recipe's `extra`)" in session.stopped and session.spent == 0


def test_a_setting_that_is_refused_in_other_words_is_left_out(project, key):
    with started("backticks") as server:
        session, reasons = asked(config_for(server.address, concurrency=1), project / "store.sqlite", numbered(range(3)))
        assert reasons == {} and len(server.received) == 4 and session.refused == {"temperature"}


def test_a_service_without_structured_answers_is_asked_once(project, key):
    with started("no structure") as server:
        session, reasons = asked(config_for(server.address, concurrency=1, structured=True), project / "store.sqlite", numbered(range(4)))
        assert len(server.received) == 1 and len(reasons) == 4 and "structured=false asks for plain ones" in session.stopped


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("where", ["nobody", "no TLS", "no such host", "dead proxy"])
def test_a_request_that_never_left_costs_nothing(project, key, monkeypatch, where):
    (project / "prices.yaml").write_text("faulty: {input: 1000, output: 10000}\n")
    with started("yes") as server:
        address = {"nobody": f"http://127.0.0.1:{free_port()}", "no TLS": server.address.replace("http", "https"), "no such host": "http://nobody.invalid"}.get(where, server.address)
        if where == "dead proxy":
            monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
            monkeypatch.setenv("NO_PROXY", "")
        session = open_session(config_for(address, attempts=2, concurrency=2, budget=3.0), ResponseStore(project / "store.sqlite"), "faults/faulty")
        reasons = run_to_end(partial(ask_all, session, numbered(range(3))), session)
        assert server.received == []
    words = {"nobody": "ConnectionRefusedError", "no TLS": "SSLError", "no such host": "gaierror", "dead proxy": "ConnectionRefusedError"}
    assert all(reason.startswith("no connection") and words[where] in reason for reason in reasons.values()), reasons
    assert len(reasons) == 3 and session.spent == 0 and not session.stopped and sum(states(session).values()) == 6


def test_a_request_that_left_counts_at_its_expected_cost(project, key):
    "A service that hangs up on every request may have worked for it."
    (project / "prices.yaml").write_text("faulty: {input: 1000, output: 10000}\n")  # at most 0.1 + 1.28 a request
    with socket.create_server(("127.0.0.1", 0)) as silent:
        session, reasons = asked(config_for(f"http://127.0.0.1:{silent.getsockname()[1]}", attempts=1, concurrency=2, timeout=0.5), project / "store.sqlite", numbered(range(2)))
    assert set(reasons.values()) == {"no answer within 0.5 s"} and session.spent == pytest.approx(2 * 1.38)


def test_a_question_that_failed_before_the_end_says_so(project, key):
    "'Not asked' is said only of what was never asked."
    with started("500") as server:
        config = config_for(server.address, concurrency=2, attempts=5, first_wait=30.0, longest_wait=30.0, max_minutes=0.01)
        began = time.monotonic()
        _, reasons = asked(config, project / "store.sqlite", numbered(range(5)))
        assert time.monotonic() - began < 5 and len(server.received) == 2
    told = sorted(reasons.values())
    assert told[:2] == ["HTTP 500 server_error: The server had an error; then stopped: max_minutes=0.01 are over"] * 2
    assert told[2:] == ["not asked: max_minutes=0.01 are over"] * 3


# --- what the user is told ----------------------------------------------------------------------------------


def rows_of(project, run: str = "service"):
    run = RunDir(project / "runs" / "toy" / run)
    return pd.concat([run.predictions(run.name, task, "free") for task in ("colour", "word")])


def test_a_run_without_an_answer_says_why_and_fails(project, key, capfd):
    with started("500") as server:
        command = start_toy(project, server.address, attempts=1, concurrency=1, structured=True)
        assert cli.main(command) == 1 and len(server.received) == 12
        shown = capfd.readouterr()
        assert "error: toy/service: none of 12 questions was answered: 12 x HTTP 500 server_error: The server had an error; the same command asks again" in shown.err
        assert "toy/service: without an answer: 12 x HTTP 500 server_error" in shown.out
        assert RunDir(project / "runs/toy/service").status().state == "failed"

        assert cli.main([*command, "same_failures=4"]) == 1 and len(server.received) == 16
        assert "stopped: 4 questions failed alike and none was answered: HTTP 500 server_error" in capfd.readouterr().err
        assert rows_of(project)["reason"].eq("HTTP 500 server_error: The server had an error").all()  # of the command before, where this one didn't ask

        server.mode = "no structure"
        assert cli.main(command) == 1 and "structured=false asks for plain ones" in capfd.readouterr().err
        assert cli.main([*command, "structured=false"]) == 0  # a run without an answer may be changed
        assert cli.main([*command, "structured=true"]) == 2 and "the run exists with structured: False" in capfd.readouterr().err
        assert cli.main([*command, "structured=true", "--dry-run"]) == 2
    rows = rows_of(project)
    assert rows["outcome"].ne("error").all() and rows["cost"].isna().all() and rows["currency"].isna().all()  # no price is known


def test_one_answer_among_failures_is_enough_to_go_on(project, key):
    with started("500") as server:
        session = open_session(config_for(server.address, concurrency=1, attempts=1, same_failures=3), ResponseStore(project / "store.sqlite"), "a/b")
        server.mode = "yes"
        run_to_end(partial(ask_all, session, numbered([0])), session)
        server.mode = "500"
        reasons = run_to_end(partial(ask_all, session, numbered(range(8))), session)
        assert len(reasons) == 7 and not session.stopped and len(server.received) == 8
        config = config_for(server.address, concurrency=1, attempts=1, same_failures=3)
        session, reasons = asked(config, project / "store.sqlite", numbered(range(8)), "a/b")  # what is left are those that fail
        assert len(reasons) == 7 and not session.stopped and len(server.received) == 15
    session, _ = asked(config, project / "store.sqlite", numbered(range(8)), "a/b")
    assert session.stopped.startswith("3 questions failed alike and none was answered: no connection")


# --- the key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["401 escaped", "200 escaped", "200 in numbers"])
def test_a_key_that_a_service_repeats_escaped_is_blotted_out(project, monkeypatch, capfd, mode):
    "JSON spells one text in many ways; none of them may bring the key back."
    monkeypatch.setenv("CANARY_KEY", "sk-CAN/ARY/7f3a9b2c1d")
    with started(mode) as server:
        cli.main(start_toy(project, server.address, attempts=1, concurrency=1))
    rows, shown = rows_of(project), capfd.readouterr()
    written = b"".join(path.read_bytes() for path in project.rglob("*") if path.is_file()).decode("latin-1")
    for text in (*shown, str(rows.to_dict()), written):
        plain = re.sub(r"\\+u00([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text, flags=re.IGNORECASE)
        assert "7f3a9b2c1d" not in plain and "ARY/" not in plain
    assert "[key]" in written and (mode[0] == "4" or not rows["outcome"].eq("error").any())


@pytest.mark.parametrize("word", ["green", "token", "lm-studio"])
def test_a_word_that_stands_for_a_key_changes_no_answer(project, monkeypatch, word):
    monkeypatch.setenv("CANARY_KEY", word)
    with started("green") as server:
        session, reasons = asked(config_for(server.address), project / "store.sqlite", numbered([1]))
    row = prediction_row(Task(name="c", question="Which colour?", labels=["red", "green"]), "1", "green", session.store.get(numbered([1])[0].key), "", None)
    assert reasons == {} and row["outcome"] == "correct" and row["tokens_in"] == 100 and not row["tokens_estimated"]


@pytest.mark.parametrize("name", ["sk-proj-abc", "sk_live_abc", "AIzaSyA1234567890abcdefghi"])
def test_a_key_in_the_place_of_its_variables_name_is_not_shown(project, name, capfd):
    assert cli.main([*start_toy(project, "http://127.0.0.1:9"), f"key_variable={name}", "--dry-run"]) == 2
    shown = capfd.readouterr()
    assert name not in "".join(shown) and "key_variable: the name of an environment variable is wanted" in shown.err


# --- what a service says and what it costs ------------------------------------------------------------------

FREE, EXPECTED = 0.0, 1.38  # as write_prices: at most 0.1 in and 1.28 out a request


@pytest.mark.parametrize(
    ("mode", "reason", "cost"),
    [
        ("page", "HTTP 200, but no chat completion: Log in to the proxy", FREE),
        ("error in 200", "HTTP 200 with an error 502: Provider returned error: model overloaded", FREE),
        ("choice of error", "HTTP 200 with an error : finish_reason=error", 0.12),
        ("no choices", "the response is no complete chat completion", 0.01),
        ("cut", "the response is no complete chat completion", EXPECTED),
        ("half-way", "connection lost", EXPECTED),
        ("deep", "HTTP 200, but no chat completion: [[[[", FREE),
        ("deep 500", "HTTP 500 : {", FREE),
        ("no such year", "HTTP 429 invalid_request_error: later", FREE),
    ],
)
def test_what_is_no_answer_says_why_and_costs_what_it_may_have_cost(project, key, mode, reason, cost):
    write_prices(project)
    with started(mode) as server:
        config = config_for(server.address, attempts=2, limited_attempts=2, concurrency=1, first_wait=0.0)
        session, reasons = asked(config, project / "store.sqlite", numbered([1]))
    told = next(iter(reasons.values()))
    assert told.startswith(reason) and len(server.received) == 2 and session.spent == pytest.approx(2 * cost) and not session.stopped
    assert session.store.usage(session.run)["cost"] == pytest.approx(2 * cost)


@pytest.mark.parametrize("usage", ["infinite", "huge", "negative"])
def test_a_usage_that_cannot_be_is_estimated(project, key, usage):
    write_prices(project)
    with started(f"{usage} usage") as server:
        session, reasons = asked(config_for(server.address), project / "store.sqlite", numbered([1]))
    row = prediction_row(WEAPON, "1", "yes", session.store.get(numbered([1])[0].key), "", session.price)
    assert reasons == {} and row["tokens_estimated"] and session.spent == pytest.approx(EXPECTED) == row["cost"]


def test_a_moderation_by_a_gateway_is_a_refusal(project, key):
    with started("moderation") as server:
        session, reasons = asked(config_for(server.address), project / "store.sqlite", numbered(range(3)))
        row = prediction_row(WEAPON, "1", "yes", session.store.get(numbered([1])[0].key), "", None)
        assert reasons == {} and not session.stopped and (row["outcome"], row["reason"]) == ("refused", "HTTP 403 moderation: Your input was flagged")


def test_a_wait_until_tomorrow_ends_the_command(project, key, capfd):
    with started("tomorrow") as server:
        session, reasons = asked(config_for(server.address, concurrency=2, max_minutes=5), project / "store.sqlite", numbered(range(4)))
        assert len(server.received) <= 2 and len(reasons) == 4
    assert session.stopped == "HTTP 429 rate_limit_exceeded: Daily limit reached: the service asks to wait 24 hours, more than longest_retry_after=600 s"


def test_long_waits_are_said_once(capsys):
    session = Session(ApiConfig(model="m"), None, "toy/m", None, "k")
    for seconds in (90.0, 91.0, 92.0):
        session.announce(seconds, "HTTP 429 : slow down")
    assert capsys.readouterr().out.count("toy/m: HTTP 429 : slow down: waiting for 90 s") == 1


def test_the_forecast_counts_what_extra_asks_for(project, key, capfd):
    write_prices(project)
    command = [*start_toy(project, "http://127.0.0.1:9", budget=1000), "--dry-run", "--json"]
    tokens = []
    for changes in ([], ['extra={"max_completion_tokens": 5000}'], ['extra={"n": 4}']):
        assert cli.main([*command, *changes]) == 0
        tokens.append(json.loads(capfd.readouterr().out)[-1]["tokens_out"])
    assert tokens == [12 * 128, 12 * 5000, 12 * 128 * 4]
    (project / "prices.yaml").write_text("faulty: {input: 0.001, output: 0.001}\n")
    assert cli.main(command[:-1]) == 0 and "cost: USD 0.01 at most, repeated requests aside" in capfd.readouterr().out  # rounded up


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ("{input: 1, output: 1, image: {low: 85}}", "image: either low, base and tile are wanted, or patch with most and factor"),
        ("{input: 1, output: 1, image: {base: 85, tile: 170}}", "image: either low, base and tile"),
        ("{input: 1, output: 1, image: {patch: 0}}", "image: patch: a finite number of at least 1 is wanted, not 0"),
        ("{input: 1, output: 1, image: {low: 85, base: .inf, tile: 1}}", "image: base: a finite number of at least 0"),
        ("{input: 1, output: 1, image: {low: 85, base: -5, tile: 1}}", "image: base: a finite number of at least 0"),
        ("{input: .inf, output: 1}", "input: a finite number is wanted"),
    ],
)
def test_a_price_that_cannot_be_names_its_field(project, price, message):
    (project / "prices.yaml").write_text(f"m: {price}\n")
    with pytest.raises(InputError, match=f"prices.yaml: m: {re.escape(message)}"):
        price_of("m")


@pytest.mark.parametrize("port", ["abc", "99999"])
def test_an_address_with_no_port_is_refused(project, capfd, port):
    assert cli.main([*start_toy(project, "http://127.0.0.1:9"), f"base_url=http://127.0.0.1:{port}/v1"]) == 2
    assert "base_url: " in (shown := capfd.readouterr().err) and "is no address such as https://api.openai.com/v1" in shown


@pytest.mark.parametrize(("text", "outcome"), [('{"label": null}', "unparseable"), ('{"answer": "yes"}', "unparseable"), ('```json\n{"label": "yes"}\n```', "unparseable"), ('{"label": "yes"}', "correct"), ('{"label": "maybe"}', "off_list"), ("Yes.", "correct")])
def test_a_structured_answer_without_a_label_is_unparseable(text, outcome):
    assert prediction_row(WEAPON, "1", "yes", response_of(text) | {"structured": True}, "", None)["outcome"] == outcome


def test_a_store_of_another_kind_is_left_alone_and_a_damaged_or_held_one_is_named(project, monkeypatch):
    other = sqlite3.connect(project / "pictures.sqlite")
    other.execute("CREATE TABLE pictures (content BLOB)")
    other.commit()
    before = (project / "pictures.sqlite").read_bytes()
    with pytest.raises(InputError, match=r"pictures.sqlite: holds other tables \(pictures\), so it is no store of responses; name another file"):
        ResponseStore(project / "pictures.sqlite")
    assert (project / "pictures.sqlite").read_bytes() == before
    monkeypatch.setattr(responses, "WAIT_SECONDS", 0.1)
    store = ResponseStore(project / "s.sqlite")
    holder = sqlite3.connect(project / "s.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunFailure, match="another program has held this store for 0.1 s; nothing more is asked"):
        store.begin(Key("a", "b"), "r", 1.0, 0.0)
    holder.execute("ROLLBACK")
    store.database.execute("PRAGMA writable_schema=ON")
    store.database.execute("DROP TABLE responses")
    with pytest.raises(RunFailure, match=r"s.sqlite: can't be read \(no such table: responses\); nothing more is asked"):
        store.get(Key("a", "b"))


# --- the run, its names and its money -----------------------------------------------------------------------


def test_what_was_asked_before_a_price_was_known_counts_too(project, key):
    with started("yes") as server:
        config = config_for(server.address, concurrency=1)
        session, _ = asked(config, project / "store.sqlite", numbered(range(5)))
        assert session.spent == 0
        write_prices(project)  # 0.12 an answer
        session, reasons = asked(config.model_copy(update={"budget": 0.5}), project / "store.sqlite", numbered(range(9)))
        assert session.spent == pytest.approx(5 * 0.12) and len(server.received) == 5 and len(reasons) == 4
        session, _ = asked(config, project / "store.sqlite", numbered(range(9)))
        assert session.spent == pytest.approx(9 * 0.12)
    (project / "prices.yaml").write_text("faulty: {input: 1000, output: 10000, currency: EUR}\n")
    with pytest.raises(InputError, match="faults/faulty has paid in USD, and prices.yaml states the price of 'faulty' in EUR; state it in the same currency, or choose another run name"):
        open_session(config, ResponseStore(project / "store.sqlite"), "faults/faulty")


def test_a_store_of_an_earlier_version_goes_on(project, key):
    "Its ledger has no currency."
    store = ResponseStore(project / "store.sqlite")
    store.database.execute("ALTER TABLE requests DROP COLUMN currency")
    store.database.execute("INSERT INTO requests VALUES (1, 'i', 'a', 'faults/faulty', '[]', 0, 0, 1, 'answered', 100, 2, 0.25)")
    store.close()
    write_prices(project)
    with started("yes") as server:
        session, reasons = asked(config_for(server.address), project / "store.sqlite", numbered([1]))
    assert reasons == {} and session.spent == pytest.approx(0.25 + 0.12)


def test_ctrl_c_brings_home_what_is_in_flight(project, key, capfd):
    "Answers are kept, nothing is dropped, and the rows are written."
    with started("slowly") as server:
        command = start_toy(project, server.address, concurrency=2)

        def press() -> None:
            while len(server.received) < 2:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press, daemon=True).start()
        assert cli.main(command) == 130
        shown = capfd.readouterr()
        assert "error: interrupted; the same command continues" in shown.err and "waiting at most 60 s for what is in flight" in shown.out
        asked_then = len(server.received)
    states = ResponseStore(project / "runs/api-responses.sqlite").usage("toy/service")["states"]
    assert states == {"answered": asked_then} and asked_then == 2
    rows = rows_of(project)
    assert len(rows) == 12 and rows["reason"].eq("not asked: interrupted").sum() == 10
    assert RunDir(project / "runs/toy/service").status().state == "interrupted"


def test_a_stopped_command_still_prints_its_rows_as_json(project, key, capfd):
    write_prices(project)
    with started("yes") as server:
        command = start_toy(project, server.address, concurrency=1, budget=2.0)
        assert cli.main([*command, "--json"]) == 1
        shown = capfd.readouterr()
        lines = json.loads(shown.out)
        assert sum(line["n"] for line in lines) == 12 and "the budget of 2 USD is spent" in shown.err
        assert cli.main([*command, "budget=1000"]) == 0 and len(server.received) == 12
        capfd.readouterr()
        assert cli.main(command) == 0
        assert "question/s" not in capfd.readouterr().err  # no bar where nothing is asked


def test_another_suite_is_refused_before_anything_is_asked(project, key, capfd):
    with started("yes") as server:
        command = start_toy(project, server.address)
        assert cli.main(command) == 0 and len(server.received) == 12
        suite = (project / "toy" / "toy.yaml").read_text()
        (project / "toy" / "other.yaml").write_text(suite.replace("sample 17, which colour?", "Another question?"))
        for more in ([], ["--dry-run"]):
            assert cli.main([*command, "suite=toy/other.yaml", "run=second", *more]) == 2
            assert "its runs are about the suite" in capfd.readouterr().err
        (project / "toy" / "toy.yaml").write_text(suite.replace("sample 17, which colour?", "Another question?"))
        assert cli.main([*command, "run=second", "--dry-run"]) == 0
        assert "note: the rows of service answer another question or other labels of 'colour' than the suite has now" in capfd.readouterr().out
        (project / "toy" / "toy.yaml").write_text(suite)
        assert cli.main([*command, "run=second", "model=other", "suite=null", "--dry-run"]) == 0  # the suite of the run that is there
        assert len(server.received) == 12


@pytest.mark.parametrize("name", ["../evil", "toy/ours", "", ".", "/tmp/evil"])
def test_an_experiment_has_a_plain_name(project, key, capfd, name):
    command = start_toy(project, "http://127.0.0.1:9")
    assert cli.main([command[0], name, *command[2:]]) == 2
    assert "a name of letters, digits" in capfd.readouterr().err and not (project / "runs").exists()
