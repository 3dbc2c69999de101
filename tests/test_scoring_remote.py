"""API models: faults of every kind, nothing asked twice, the key nowhere, money and time kept, kill -9."""

import asyncio
import http.server
import itertools
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from faulty_server import behaviour_of
from PIL import Image

from qwen2vl_sft import cli
from qwen2vl_sft.config import ScoringConfig
from qwen2vl_sft.core import InputError, RunFailure
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring import remote, responses
from qwen2vl_sft.scoring.metrics import open_figures
from qwen2vl_sft.scoring.remote import (
    ApiConfig,
    Question,
    Session,
    ask_all,
    connect,
    load_api_recipe,
    open_session,
    picture_url,
    prediction_row,
    run_to_end,
    score_api,
    wait_for_turn,
)
from qwen2vl_sft.scoring.responses import Key, ResponseStore
from qwen2vl_sft.tasks import Task

HERE = Path(__file__).parent
CANARY = "sk-canary-5f7a1c9e2b"
WEAPON = Task(name="weapon", question="Does the picture show a weapon?", labels=["yes", "no"])


@contextmanager
def served(script: str, *options: str):
    "A server in a process of its own; yields its address."
    command = [sys.executable, HERE / script, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE)
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def counts(address: str) -> dict:
    with urllib.request.urlopen(f"{address}/counts") as response:
        content = json.load(response)
    return content | {name: {int(number): count for number, count in content[name].items()} for name in ("asked", "answered")}


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def numbered(numbers) -> list[Question]:
    content = png()
    return [Question(Key(f"{number:064x}", "asked"), f"sample {number}", ("yes", "no"), lambda: content, 100) for number in numbers]


def config_for(address: str, **changes) -> ApiConfig:
    settings = {"concurrency": 200, "attempts": 3, "first_wait": 0.02, "timeout": 3.0, "key_variable": "CANARY_KEY"}
    return ApiConfig(model="faulty", base_url=f"{address}/v1", **settings | changes)


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("CANARY_KEY", CANARY)


def asked(config: ApiConfig, path: Path, questions: list[Question], run: str = "faults/faulty"):
    "Ask everything in a new session; session and reasons."
    session = open_session(config, ResponseStore(path), run)
    return session, run_to_end(partial(ask_all, session, questions), session)


EXPECTED = {
    "429": "correct", "500": "correct", "slow": "correct", "closed": "correct", "invalid": "correct", "refusal": "refused",
    "content_filter": "refused", "400 policy": "refused", "400 azure": "refused", "sorry": "refused",
    "cannot infer": "cannot_infer", "off list": "off_list", "empty": "unparseable", "always 500": "error",
    "400 image": "error", "wrong": "wrong", "cut": "unparseable", "yes": "correct",
}  # fmt: skip


def test_the_key_is_nowhere(project, key, caplog, capfd):
    "Every fault, by a service that repeats the key in bodies and headers, with every logger at its loudest."
    caplog.set_level(logging.DEBUG)
    questions = numbered(range(40))
    with served("faulty_server.py", "--slow", "4") as address:
        session, reasons = asked(config_for(address, timeout=2.0), project / "store.sqlite", questions)
        assert counts(address)["bad_keys"] == 0
    rows = [prediction_row(WEAPON, str(i), "yes", session.store.get(q.key), reasons.get(q.key, "not asked"), None) for i, q in enumerate(questions)]
    assert [row["outcome"] for row in rows] == [EXPECTED[behaviour_of(i)] for i in range(40)]
    first, second = session.store.database.execute("SELECT started, ended, state FROM requests WHERE image = ? ORDER BY number", [questions[0].key.image]).fetchall()
    assert first[2].startswith("failed: HTTP 429") and second[2] == "answered" and 1.0 <= second[0] - first[1] < 5  # as Retry-After asks; of itself it would wait 0.02 s
    shown = capfd.readouterr()
    written = b"".join(file.read_bytes() for file in project.glob("store.sqlite*"))
    assert "chat/completions" in caplog.text  # the client did log
    for text in (caplog.text, shown.out, shown.err, str(rows), str(reasons), repr(session), written.decode("latin-1")):
        assert CANARY not in text
    assert b"your key is [key]" in written and "Invalid image, key [key]" in str(rows)


@pytest.mark.slow
def test_every_sample_has_one_outcome_and_no_answer_is_asked_for_twice(project, key):
    "5,000 samples, 200 at a time, against every fault."
    questions = numbered(range(5000))
    path = project / "store.sqlite"
    with served("faulty_server.py", "--gather", "200", "--slow", "60") as address:
        session, reasons = asked(config_for(address, timeout=8.0), path, questions)
        first = counts(address)
        rows = [prediction_row(WEAPON, str(i), "yes", session.store.get(q.key), reasons.get(q.key, "not asked"), None) for i, q in enumerate(questions)]
        again, repeated = asked(config_for(address, timeout=8.0), path, questions)
        second = counts(address)
    assert [row["outcome"] for row in rows] == [EXPECTED[behaviour_of(i)] for i in range(5000)]
    assert Counter(first["answered"].values()) == {1: 4900} and first["most"] == 200 and first["bad_keys"] == 0

    never = {"always 500", "400 image"}
    assert repeated.keys() == reasons.keys() == {q.key for i, q in enumerate(questions) if behaviour_of(i) in never}
    for number in range(5000):  # errors are asked again, answers and refusals are not
        more = second["asked"][number] - first["asked"][number]
        assert more == {"always 500": 3, "400 image": 1}.get(behaviour_of(number), 0)
    assert first["asked"][13] == 3 and first["asked"][14] == 1

    paid = again.store.usage("faults/faulty")
    assert paid["requests"] == sum(second["asked"].values()) and paid["lost"] == 0 and paid["states"]["answered"] == 4800
    guessed = {behaviour_of(i) for i, row in enumerate(rows) if row["reason"].startswith("guessed")}
    assert guessed == {"sorry", "cannot infer"} and all(row["reason"] for row in rows if row["outcome"] not in ("correct", "wrong"))
    assert rows[17]["model_answered"] == "faulty-1-2026-01-01" and rows[17]["system_fingerprint"] == "fp_7"
    assert json.loads(rows[17]["settings"]) == {"model": "faulty", "max_tokens": 128, "temperature": 0.0, "base_url": f"{address}/v1"}


def test_a_notebook_whose_event_loop_runs_may_ask(project, key):
    "In a running loop the requests go out from another thread than the one that opened the store."
    async def cell(address: str):
        return asked(config_for(address), project / "store.sqlite", numbered([17, 34]))

    with served("faulty_server.py") as address:
        session, reasons = asyncio.run(cell(address))
        assert reasons == {} and sum(counts(address)["answered"].values()) == 2
    assert session.store.usage("faults/faulty")["states"] == {"answered": 2}


CHILD = """
import sys
from functools import partial
sys.path.insert(0, {tests!r})
import test_scoring_remote as t
config = t.config_for({address!r}, **{changes!r})
session, reasons = t.asked(config, t.Path({path!r}), t.numbered(range({start}, {stop})), {run!r})
print(session.counts, len(reasons))
"""


def child(address: str, path: Path, numbers: range, run: str, **changes) -> subprocess.Popen:
    code = CHILD.format(tests=str(HERE), address=address, changes=changes, path=str(path), start=numbers.start, stop=numbers.stop, run=run)
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CANARY_KEY": CANARY}, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_and_shared(tmp_path, key):
    "After kill -9 only what was in flight is asked again; two processes ask every question once between them."
    path, numbers = tmp_path / "store.sqlite", range(400)
    with served("faulty_server.py", "--delay", "0.1") as address:
        process = child(address, path, numbers, "kill/one", concurrency=16)
        while process.poll() is None and len(counts(address)["answered"]) < 60:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = ResponseStore(path)
        flying = store.database.execute("SELECT image FROM requests WHERE ended IS NULL").fetchall()
        kept = store.database.execute("SELECT count(*) FROM responses").fetchone()[0]
        assert 1 <= len(flying) <= 16 and 40 <= kept < 380

        process = child(address, path, numbers, "kill/one", concurrency=16)
        while process.poll() is None and len(counts(address)["answered"]) < len(numbers) // 2:
            time.sleep(0.01)
        session, _ = asked(config_for(address, concurrency=16), path, list(reversed(numbered(numbers))), "kill/two")
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        final = counts(address)
    twice = {number for number, count in final["answered"].items() if count > 1 and behaviour_of(number) != "400 image"}
    assert {f"{number:064x}" for number in twice} <= {image for (image,) in flying}
    assert final["answered"].keys() == {n for n in numbers if behaviour_of(n) != "always 500"}
    assert f"'lost': {len(flying)}" in said and session.counts["lost"] == 0
    assert len(flying) == store.usage("kill/one")["lost"]
    asked_by = {run: store.usage(run)["states"].get("answered", 0) for run in ("kill/one", "kill/two")}
    assert sum(asked_by.values()) == 384 and min(asked_by.values()) > 0


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    "A process that ended without a word: its request is lost, counted once at its expected cost, and asked again."
    code = f"from qwen2vl_sft.scoring.responses import *\nResponseStore({str(tmp_path / 's.sqlite')!r}).begin(Key('p', 'q'), 'r', 600, 0.5)"
    subprocess.run([sys.executable, "-c", code], check=True)
    store = ResponseStore(tmp_path / "s.sqlite")
    number = store.begin(Key("p", "q"), "r", 600, 0.25)
    assert number is not None and store.begin(Key("p", "q"), "r", 600, 0.25) is None
    assert store.usage("r") == {"requests": 2, "lost": 1, "tokens_in": 0, "tokens_out": 0, "cost": 0.75, "states": {"in flight": 1, "lost": 1}}
    assert store.settle("r") == 0


def test_a_run_counts_its_own_lost_requests(project, key):
    code = f"from qwen2vl_sft.scoring.responses import *\nstore = ResponseStore({str(project / 's.sqlite')!r})\nfor run in ('a', 'a', 'b'): store.begin(Key(run, str(store.usage(run)['requests'])), run, 600, 0.5)"
    subprocess.run([sys.executable, "-c", code], check=True)
    store = ResponseStore(project / "s.sqlite")
    config = config_for("http://127.0.0.1:9")
    assert [open_session(config, store, run).counts["lost"] for run in ("c", "b", "a", "a")] == [0, 1, 2, 0]
    assert [store.usage(run)["lost"] for run in ("a", "b", "c")] == [2, 1, 0]


def test_a_full_disk_ends_the_run_with_one_line(project, key, monkeypatch):
    "SQLite itself finds no more room; what is stored is kept, what is in flight comes home, nothing more is asked."
    monkeypatch.setattr(responses, "GRACE_SECONDS", 0.0)  # requests whose end couldn't be noted count as lost when their time is over
    questions = numbered([50 * i + 17 for i in range(60)])
    with served("faulty_server.py") as address:
        store = ResponseStore(project / "store.sqlite")
        pages = store.database.execute("PRAGMA page_count").fetchone()[0]
        store.database.execute(f"PRAGMA max_page_count = {pages + 6}")
        session = open_session(config_for(address, concurrency=4, timeout=1.0), store, "faults/faulty")
        with pytest.raises(RunFailure, match=r"store.sqlite: can't be written \(database or disk is full\); nothing more is asked.*the same command continues") as failure:
            run_to_end(partial(ask_all, session, questions), session)
        kept, seen = store.database.execute("SELECT count(*) FROM responses").fetchone()[0], sum(counts(address)["asked"].values())
        assert "\n" not in str(failure.value) and 0 < kept < 60 and seen <= kept + 4
        store.close()
        session, reasons = asked(config_for(address, concurrency=4), project / "store.sqlite", questions)
        assert reasons == {} and sum(counts(address)["answered"].values()) <= 60 + 4
    (project / "text.sqlite").write_text("no database, but long enough to be read as one " * 30)
    with pytest.raises(InputError, match=r"text.sqlite: can't be opened as a store of responses \(file is not a database\)"):
        ResponseStore(project / "text.sqlite")


# --- money, time and pace ------------------------------------------------------------------------------


def write_prices(project: Path) -> None:
    (project / "prices.yaml").write_text("faulty: {input: 1000, output: 10000}\n")  # 0.1 + 0.02 a request as answered


def test_the_budget_ends_the_run_and_more_money_continues_it(project, key):
    write_prices(project)
    questions = numbered([50 * i + 17 for i in range(40)])
    with served("faulty_server.py") as address:
        config = partial(config_for, address, concurrency=4, max_tokens=10)  # at most 0.1 + 0.1 a request
        session, reasons = asked(config(budget=1.0), project / "store.sqlite", questions)
        assert session.spent <= 1.0 and session.stopped == "the budget of 1 USD is spent"
        assert 6 <= session.counts["answered"] <= 8 and len(reasons) == 40 - session.counts["answered"]
        assert set(reasons.values()) == {"not asked: the budget of 1 USD is spent"}
        session, reasons = asked(config(budget=2.0), project / "store.sqlite", questions)  # all commands together
        assert 1.0 < session.spent <= 2.0 and session.store.usage("faults/faulty")["cost"] == pytest.approx(session.spent)
        session, reasons = asked(config(budget=100), project / "store.sqlite", questions)
        assert reasons == {} and session.spent == pytest.approx(40 * 0.12)
        assert sum(counts(address)["asked"].values()) == 40


class FastLoop(asyncio.SelectorEventLoop):
    "An event loop whose clock jumps to the next timer."

    def __init__(self):
        super().__init__()
        self.now, select = 0.0, self._selector.select

        def jump(timeout: float | None):
            self.now += (timeout or 0.0) + 1e-7  # time passes, as it does
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("requests", "tokens", "largest", "most", "least"),
    [(4, None, 1, 4, 39), (300, None, 1, 300, 2900), (1000, None, 1, 1000, 9800), (None, 30_000, 1000, 30_000, 285_000), (600, 60_000, 600, 60_000, 580_000), (None, 1000, 900, 1500, 4900)],
    ids=str,
)
def test_in_no_minute_more_than_stated_leaves(requests, tokens, largest, most, least):
    "Ten minutes of a clock that jumps: the fullest window of sixty seconds, and that little is left unused."
    config = ApiConfig(model="m", key_variable=None, requests_per_minute=requests, tokens_per_minute=tokens)
    left: list[tuple[float, float]] = []

    async def ten_minutes():
        session = Session(config, None, "r", None, "none")
        connect(session, largest)
        loop, sizes = asyncio.get_running_loop(), cycle((largest, largest / 2, largest / 3))

        async def work():
            while loop.time() < 600:
                amount = next(sizes)
                await wait_for_turn(session, amount)
                left.append((loop.time(), 1 if tokens is None else amount))

        await asyncio.gather(*(work() for _ in range(8)))

    with asyncio.Runner(loop_factory=FastLoop) as runner:
        runner.run(ten_minutes())
    times, amounts = (np.array(column) for column in zip(*left, strict=True))
    total = np.concatenate([[0.0], amounts.cumsum()])
    windows = [total[np.searchsorted(times, time + 60 - 1e-6)] - total[i] for i, time in enumerate(times)]
    assert max(windows) <= most + 1e-6 and total[np.searchsorted(times, 600)] >= least


def test_the_time_is_kept(project, key):
    questions = numbered([50 * i + 17 for i in range(30)])
    with served("faulty_server.py") as address:
        session, reasons = asked(config_for(address, max_minutes=1e-6), project / "store.sqlite", questions)
        assert len(reasons) == 30 and session.stopped.startswith("max_minutes=1e-06 are over") and counts(address)["asked"] == {}


def test_a_budget_needs_a_price_and_a_key_must_be_there(project, key, monkeypatch):
    store = ResponseStore(project / "store.sqlite")
    with pytest.raises(InputError, match=r"no price is known for 'faulty'; add it to .*prices.yaml"):
        open_session(config_for("http://127.0.0.1:9", budget=5), store, "r")
    (project / "prices.yaml").write_text("faulty: {inptu: 3, output: 1}\n")
    with pytest.raises(InputError, match=r"prices.yaml: faulty: unknown setting inptu. Did you mean 'input'"):
        open_session(config_for("http://127.0.0.1:9", budget=5), store, "r")
    write_prices(project)
    monkeypatch.delenv("CANARY_KEY")
    with pytest.raises(InputError, match="the environment variable CANARY_KEY holds no key"):
        open_session(config_for("http://127.0.0.1:9", budget=5), store, "r")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("model: m\nbase_url: https://u:p@host/v1\n", "base_url: leave names, keys and parameters out"),
        ("model: m\nbase_url: https://host/v1?api-key=1\n", "base_url: leave names, keys and parameters out"),
        ("model: m\napi_key: sk-1\n", "unknown setting api_key"),
        ("model: m\ntemprature: 1\n", "Did you mean 'temperature'"),
        ("concurrency: 2\n", "model: Field required"),
    ],
)
def test_bad_recipes_name_the_setting(tmp_path, written, message):
    (tmp_path / "api.yaml").write_text(written)
    with pytest.raises(InputError, match=message):
        load_api_recipe(tmp_path / "api.yaml")


def test_the_picture_sent_is_the_picture_local_models_see():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "blue").save(file, "JPEG", exif=exif)
    import base64

    sent = Image.open(io.BytesIO(base64.b64decode(picture_url(file.getvalue()).partition(",")[2])))
    assert sent.format == "PNG" and sent.size == (4, 8)
    file = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(file, "PNG")
    sent = Image.open(io.BytesIO(base64.b64decode(picture_url(file.getvalue()).partition(",")[2])))
    assert sent.mode == "RGB" and sent.getpixel((0, 0)) == (255, 255, 255)
    assert picture_url(png()).startswith("data:image/png;base64,")
    with pytest.raises(InputError, match="row 7: not a readable image"):
        picture_url(b"no image", "row 7")


# --- a whole run -----------------------------------------------------------------------------------------


def start_toy(project: Path, address: str, **changes) -> list[str]:
    write_toy_suite(project / "toy", rows=6)
    content = {"model": "faulty", "base_url": f"{address}/v1", "suite": "toy/toy.yaml", "key_variable": "CANARY_KEY", "run": "service", **changes}
    (project / "api.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in content.items()))
    suite = (project / "toy" / "toy.yaml").read_text()
    (project / "toy" / "toy.yaml").write_text(suite.replace("Which colour is it?", "sample 17, which colour?").replace("Which word belongs to it?", "sample 37, which word?"))
    return ["score-api", "toy", str(project / "api.yaml")]


def test_a_run_from_the_command_line(project, key, capfd, monkeypatch):
    with served("faulty_server.py") as address:
        command = start_toy(project, address)
        with monkeypatch.context() as without:
            without.delenv("CANARY_KEY")
            assert cli.main([*command, "--dry-run"]) == 0
            shown_without_key = capfd.readouterr().out
        assert cli.main([*command, "--dry-run"]) == 0
        shown = capfd.readouterr().out
        assert shown_without_key.splitlines()[-6:] == shown.splitlines()[-6:] and "total       12       0        12" in shown and "no price for 'faulty'" in shown
        assert counts(address)["asked"] == {} and not (project / "runs" / "toy").exists()

        assert cli.main([*command, "--limit", "2"]) == 0 and sum(counts(address)["asked"].values()) == 4
        assert cli.main(command) == 0
        seen = counts(address)
        assert sum(seen["asked"].values()) == 12
        run = RunDir(project / "runs" / "toy" / "service")
        for task in ("colour", "word"):
            table = run.predictions("service", task)
            assert len(table) == 6 and table["id"].is_unique and (table["rule"] == "free").all() and table["text"].eq("Yes.").all()
            assert table["detail"].eq("auto").all() and not table["tokens_estimated"].any()
            assert all(timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(date) < timedelta(minutes=5) for date in table["date"])
        assert run.predictions("service", "colour")["outcome"].eq("off_list").all() and run.status().state == "finished"

        (project / "api.yaml").write_text((project / "api.yaml").read_text() + "\nconcurrency: 3\ndetail: auto")
        assert cli.main(command) == 0 and counts(address) == seen  # another pace asks nothing again
        assert cli.main([*command, "detail=low"]) == 2
        assert "the run exists with detail: 'auto', now 'low' is asked for" in capfd.readouterr().err
        assert cli.main([*command, "detail=low", "run=low", "structured=true"]) == 0 and sum(counts(address)["asked"].values()) == 24
        written = b"".join(file.read_bytes() for file in project.rglob("*") if file.is_file())
        assert CANARY.encode() not in written and CANARY not in "".join(capfd.readouterr())


def test_a_wrong_key_stops_the_run_and_the_denominator_stays(project, key, capfd, monkeypatch):
    "A service that repeats the key in its refusal of it."
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Locked(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps({"error": {"message": f"Incorrect API key provided: {self.headers['authorization'][7:]}", "code": "invalid_api_key"}}).encode()
            self.send_response(401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Locked)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        command = start_toy(project, f"http://127.0.0.1:{server.server_port}", concurrency=1)
        assert cli.main(command) == 1
        shown = capfd.readouterr()
        assert "stopped: HTTP 401 invalid_api_key: Incorrect API key provided: [key]" in shown.err
        table = RunDir(project / "runs/toy/service").predictions("service", "colour")
        assert len(table) == 6 and table["outcome"].eq("error").all() and (table["reason"] == table["reason"].iloc[-1]).sum() == 5
        with pytest.raises(RunFailure) as failure:
            score_api(project / "runs" / "toy", load_api_recipe(project / "api.yaml"), ScoringConfig())
        import traceback

        trace = "".join(traceback.format_exception(failure.value))
        assert CANARY not in trace + "".join(shown) + str(table.to_dict()) + (project / "runs/toy/service/status.json").read_text()
    finally:
        server.shutdown()


def test_settings_that_the_model_refuses_are_left_out(project, key):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    received = []

    class Choosy(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            received.append(body)
            wrong = next((name for name in ("temperature", "max_tokens") if name in body), None)
            answer = {"error": {"message": f"Unsupported parameter: '{wrong}'", "param": wrong, "code": "unsupported_parameter"}}
            content = json.dumps(answer if wrong else {"choices": [{"message": {"content": '{"label": "yes"}'}, "finish_reason": "stop"}]}).encode()
            self.send_response(400 if wrong else 200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Choosy)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        (project / "prices.yaml").write_text("faulty: {input: 1000, output: 10000}\n")
        config = config_for(f"http://127.0.0.1:{server.server_port}", concurrency=1, attempts=1, structured=True, extra={"reasoning_effort": "low"})
        session, reasons = asked(config, project / "store.sqlite", numbered([17, 37]))
    finally:
        server.shutdown()
    assert reasons == {} and len(received) == 4
    assert [sorted(body.keys() & {"temperature", "max_tokens", "max_completion_tokens"}) for body in received[2:]] == [["max_completion_tokens"]] * 2
    assert received[3]["reasoning_effort"] == "low" and received[3]["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"] == ["yes", "no"]
    row = prediction_row(WEAPON, "1", "yes", session.store.get(numbered([17])[0].key), "", session.price)
    assert row["outcome"] == "correct" and row["text"] == "yes"
    assert row["tokens_estimated"] and (row["tokens_in"], row["tokens_out"]) == (100, 128)  # no usage is stated: as the forecast counts
    assert row["cost"] == pytest.approx(0.1 + 1.28) and session.spent == pytest.approx(2 * row["cost"])
    assert "temperature" not in json.loads(row["settings"]) and json.loads(row["settings"])["max_completion_tokens"] == 128


def test_no_row_is_lost_by_asking_about_fewer(project, key, capfd):
    "Rows of errors stay, with their reason, when a later command asks about a part of the samples; so do rows whose picture has changed."
    with served("faulty_server.py") as address:
        command = start_toy(project, address, concurrency=1, attempts=1)
        suite = (project / "toy" / "toy.yaml").read_text()
        (project / "toy" / "toy.yaml").write_text(suite.replace("sample 17", "sample 13"))  # always HTTP 500
        outcomes = lambda: RunDir(project / "runs/toy/service").predictions("service", "colour").set_index("id")
        assert cli.main(command) == 0
        before = outcomes()
        assert len(before) == 6 and before["outcome"].eq("error").all() and before["reason"].str.startswith("HTTP 500").all()
        assert cli.main([*command, "--limit", "2"]) == 0
        after = outcomes()
        assert after[["outcome", "reason"]].equals(before[["outcome", "reason"]])
        suite = (project / "toy" / "toy.yaml").read_text()
        (project / "toy" / "toy.yaml").write_text(suite.replace("sample 13", "sample 17"))
        assert cli.main([*command, "--limit", "2"]) == 0
        changed = outcomes()
        assert changed.index.equals(before.index) and sorted(changed["outcome"]) == ["error"] * 4 + ["off_list"] * 2
        assert cli.main(command) == 0 and outcomes()["outcome"].eq("off_list").all()
        (project / "toy" / "toy.yaml").write_text(suite.replace("sample 13", "sample 37"))
        assert cli.main([*command, "--limit", "2"]) == 0
        assert outcomes()["reason"].eq("not asked: its picture or question has changed since its answer").sum() == 4


@pytest.mark.slow
def test_the_key_is_in_no_executed_notebook_and_no_report(project, key, capfd):
    "A notebook whose calls fail and succeed against a service that repeats the key, and the report on the run."
    import nbformat
    from nbclient import NotebookClient

    from qwen2vl_sft.comparison.report import write_report

    with served("faulty_server.py") as address:
        start_toy(project, address, attempts=1)
        suite = (project / "toy" / "toy.yaml").read_text()
        (project / "toy" / "toy.yaml").write_text(suite.replace("sample 17", "sample 11").replace("sample 37", "sample 14"))  # both repeat the key
        cells = [
            "from pathlib import Path; from qwen2vl_sft.scoring.remote import *; from qwen2vl_sft.config import ScoringConfig",
            f"config = load_api_recipe({str(project / 'api.yaml')!r}); config",
            f"run = score_api(Path({str(project / 'runs' / 'toy')!r}), config, ScoringConfig()); run",
            "session = open_session(config, ResponseStore('again.sqlite'), 'a/b'); session",
            "for task in ('colour', 'word'): print(run.predictions('service', task)[['text', 'reason']].to_dict())",
            f"score_api(Path({str(project / 'runs' / 'toy')!r}), config.model_copy(update={{'run': 'other', 'budget': 1.0}}), ScoringConfig())",
        ]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        NotebookClient(notebook, allow_errors=True, timeout=120, resources={"metadata": {"path": str(project)}}).execute()
    written = nbformat.writes(notebook)
    assert CANARY not in written
    assert written.count("(your key is [key])") >= 6 and written.count("Invalid image, key [key]") >= 6 and "InputError" in written
    report = Path(write_report(project / "runs" / "toy"))
    assert CANARY not in report.read_text() and CANARY.encode() not in b"".join(file.read_bytes() for file in project.rglob("*") if file.is_file())


@pytest.mark.slow
def test_a_served_model_answers_as_the_same_model_here(project, monkeypatch):
    "The small model behind stock transformers and HTTP gives the local free rule's texts, labels and outcomes."
    from qwen2vl_sft.config import ModelConfig
    from qwen2vl_sft.data.prepare import prepare
    from qwen2vl_sft.encoding.batch import Sample
    from qwen2vl_sft.encoding.images import open_image
    from qwen2vl_sft.encoding.prompt import load_encoder
    from qwen2vl_sft.model.load import base_location, load_base
    from qwen2vl_sft.scoring.metrics import judge
    from qwen2vl_sft.scoring.text import write_answers
    from qwen2vl_sft.tasks import load_suite

    folder = base_location("small")
    prepared = prepare(load_suite(write_toy_suite(project / "toy", rows=12)))
    with served("small_model_server.py", folder) as address:
        config = ApiConfig(model="small", base_url=f"{address}/v1", key_variable=None, max_tokens=8, concurrency=2, detail=None)
        run = score_api(project / "runs" / "toy", config, prepared=prepared)
    model, encoder = load_base(ModelConfig(device="cpu")), load_encoder(folder)
    texts = set()
    for task in prepared.suite.tasks:
        rows, table = prepared.split(task.name, "test"), run.predictions("small", task.name)
        images = [open_image(rows.image(i)) for i in range(len(rows))]
        samples = [Sample(encoder.encode(task.question, image.size), encoder.images.squares(image)) for image in images]
        written, _ = write_answers(model, encoder, samples, 8)
        judged = [judge(task, target, text) for target, text in zip(rows.column("label"), written, strict=True)]
        assert table["id"].tolist() == rows.column("id") and table["text"].tolist() == written
        assert [one if isinstance(one, str) else None for one in table["prediction"]] == [one.prediction for one in judged]
        assert table["tokens_in"].tolist() == [len(sample.encoded) for sample in samples]
        known = [(a, b.outcome) for a, b in zip(table["outcome"], judged, strict=True) if a != "cannot_infer"]
        assert all(a == b for a, b in known)
        texts |= set(written)
    assert len(texts) > 2


# --- what a service may say --------------------------------------------------------------------------------


def response_of(content, finish: str = "stop", **more) -> dict:
    body = json.dumps({"model": "m", "choices": [{"message": {"content": content, "refusal": None}, "finish_reason": finish}]} | more)
    return {"status": 200, "body": body, "date": "2026-01-01", "seconds": 1.0, "request_id": "", "sent": {}, "detail": "auto", "structured": False, "base_url": "http://x/v1"}


def test_half_a_character_and_odd_parts_block_no_run(tmp_path):
    "JSON can spell a lone surrogate, which no Parquet file can hold."
    assert "\\ud83d" in response_of("yes \ud83d")["body"]
    refused = response_of(None) | {"status": 400, "body": '{"error": {"code": "content_filter", "message": "no \\ud83d"}}'}
    parts = response_of([{"text": {"value": "yes"}}, {"text": 7}, {"type": "image"}, "."])
    rows = [prediction_row(WEAPON, "1", "yes", response, "", None) for response in (response_of("yes \ud83d", model="m\ud83d"), response_of({"a": 1}, system_fingerprint=5), parts, refused)]
    rows.append(prediction_row(WEAPON, "1", "yes", None, "connection: \ud83d", None))
    table = pd.read_parquet(io.BytesIO(pd.DataFrame(rows).to_parquet()))
    assert table["outcome"].tolist() == ["off_list", "unparseable", "correct", "refused", "error"]
    assert table["text"].tolist()[:3] == ["yes ?", "", "yes."] and table["model_answered"][0] == "m?" and table["reason"][3].endswith("no ?")
    assert remote.failure_of(500, '{"error": {"message": "\\ud83d"}}', {}, {}).reason == "HTTP 500 : ?"


def test_structured_json_that_is_cut_is_no_answer():
    for text, finish, outcome in (('{"label": "ye', "length", "unparseable"), ('{"label": "yes"}', "stop", "correct"), ("yes", "stop", "correct"), ("yes", "length", "unparseable")):
        row = prediction_row(WEAPON, "1", "yes", response_of(text, finish) | {"structured": True}, "", None)
        assert row["outcome"] == outcome and ("cut at max_tokens" in row["reason"]) == (outcome == "unparseable")


def test_open_rows_have_similarity_and_fields_also_where_there_is_no_answer():
    card = Task(name="card", question="Which?", answer="text", metric="fields", fields=["phone"], region="CN")
    rows = [prediction_row(card, str(i), "138 0013 8000", response, "", None) for i, response in enumerate((response_of("+86 138-0013-8000"), None))]
    assert open_figures(pd.DataFrame(rows))["phone"] == 0.5 and rows[1]["similarity"] == 0
    assert prediction_row(WEAPON, "1", "yes", response_of("yes"), "", None)["similarity"] is None


def test_after_429_the_waits_are_more_than_a_minute_and_keep_the_attempts():
    config = ApiConfig(model="m")
    tries, waited = remote.Tries(config), 0.0
    limited = remote.failure_of(429, "{}", {}, {})
    for _ in range(config.limited_attempts):
        assert not tries.are_over
        tries.count(limited)
        waited += 0 if tries.are_over else tries.wait(limited)
        assert tries.wait(limited) <= 60
    assert tries.are_over and 60 < waited < 600 and tries.other == 0
    asked_to = [remote.failure_of(429, "{}", {"retry-after": str(seconds)}, {}) for seconds in (90, 5000)]
    assert [tries.wait(failure) for failure in asked_to] == [90, 600]


class LimitedOnce(http.server.BaseHTTPRequestHandler):
    "429 without Retry-After to the first request; the two beside it are answered a little later, all others at once."

    times: ClassVar[list] = []
    numbers: ClassVar[itertools.count] = itertools.count()

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.times.append(time.monotonic())
        number = next(self.numbers)
        time.sleep(0.5 if number in (1, 2) else 0)
        status, content = (200, {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}) if number else (429, {"error": {"message": "slow down"}})
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_after_429_all_workers_pause_and_errors_keep_their_attempts(project, key):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), LimitedOnce)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        config = config_for(f"http://127.0.0.1:{server.server_port}", concurrency=3, attempts=1, first_wait=2.0)
        session, reasons = asked(config, project / "store.sqlite", numbered(range(1, 7)))
    finally:
        server.shutdown()
        server.server_close()
    times = LimitedOnce.times
    assert reasons == {} and len(times) == 7 and session.counts["retried"] == 1
    assert times[3] - times[0] > 0.8  # those that were answered after 0.5 s don't ask on in the pause of 1 to 2 s


class Busy(http.server.BaseHTTPRequestHandler):
    "The first request gets `status` with Retry-After; all others are answered."

    times: list
    numbers: itertools.count
    status, after = 429, 3

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.times.append(time.monotonic())
        is_first = next(self.numbers) == 0
        body = json.dumps({"error": {"message": "later"}} if is_first else {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}).encode()
        self.send_response(self.status if is_first else 200)
        if is_first:
            self.send_header("retry-after", str(self.after))
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def busy(**changes):
    "The address of such a server, and when it was asked."
    handler = type("Handler", (Busy,), {"times": [], "numbers": itertools.count(), **changes})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.times
    finally:
        server.shutdown()
        server.server_close()


def test_after_a_pause_requests_leave_at_the_stated_pace(project, key):
    "Twenty workers whose turn came while the service wanted quiet don't all leave at its end."
    with busy(after=3) as (address, times):
        _, reasons = asked(config_for(address, concurrency=20, requests_per_minute=300), project / "store.sqlite", numbered(range(20)))
    after = np.array([when for when in times if when > times[0] + 2.5])
    fullest = max(int(((after >= start) & (after < start + 0.5)).sum()) for start in after)
    assert reasons == {} and len(times) == 21 and len(after) >= 14
    assert fullest <= 5 + 3, "a second's worth, and what half a second adds"


@pytest.mark.parametrize(("status", "changes"), [(503, {"max_minutes": 0.02}), (200, {"max_minutes": 0.02, "requests_per_minute": 1}), (200, {"max_minutes": 0.02, "tokens_per_minute": 300})], ids=["Retry-After", "requests", "tokens"])
def test_a_run_whose_time_is_over_waits_for_nothing(project, key, status, changes):
    "Neither for the minute that a service asks for, nor for a turn."
    began = time.monotonic()
    with busy(status=status, after=60) as (address, times):
        session, reasons = asked(config_for(address, concurrency=2, attempts=2, **changes), project / "store.sqlite", numbered(range(1 if status == 503 else 4)))
    assert time.monotonic() - began < 6 and session.stopped == "max_minutes=0.02 are over"
    told = "HTTP 503 : later; then stopped: max_minutes=0.02 are over" if status == 503 else "not asked: max_minutes=0.02 are over"
    assert told in reasons.values() and len(times) <= 2


def test_an_interrupted_notebook_does_not_wait_for_the_end_of_a_pause(project, key):
    with busy(after=20) as (address, times):
        session = open_session(config_for(address, concurrency=3), ResponseStore(project / "store.sqlite"), "a/b")

        def interrupt():
            while not times:
                time.sleep(0.05)
            time.sleep(0.5)
            session.stopped = "interrupted"

        threading.Thread(target=interrupt, daemon=True).start()
        reasons = run_to_end(partial(ask_all, session, numbered(range(8))), session)
        assert time.monotonic() - times[0] < 5 and "not asked: interrupted" in reasons.values()


def test_a_pause_beyond_the_time_ends_the_run():
    session = remote.Session(ApiConfig(model="m", max_minutes=1), None, "r", None, "k")
    session.pause(30)
    assert not session.stopped
    session.pause(90)
    assert session.stopped == "the service asks to wait 90 s, which is beyond max_minutes=1"


def test_money_spent_before_the_lock_was_ours_counts(project, key, monkeypatch):
    start_toy(project, "http://127.0.0.1:9", model="gpt-4o")
    config, seen = remote.load_api_recipe(project / "api.yaml"), []

    def forecast(session, tests):  # between opening and locking another process asks
        session.store.finish(session.store.begin(Key("i", "a"), session.run, 1.0, 2.5), "answered", cost=2.5)
        return None, ""

    monkeypatch.setattr(remote, "_forecast", forecast)
    monkeypatch.setattr(remote, "ask_tests", lambda session, tests: seen.append(session.spent) or {})
    with pytest.raises(RunFailure, match="none of 12 questions was answered: 12 x not asked"):
        score_api(project / "runs" / "toy", config)
    assert seen == [2.5]
