"""The report: written files, escaping, no requests, and how it behaves in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml
from synthetic_experiment import LABELS, Plan, build_experiment

from qwen2vl_sft.cli import main
from qwen2vl_sft.comparison.browser import BROWSER_SCRIPT, browser_data, error_browser, static_browser
from qwen2vl_sft.comparison.mistakes import label_noise
from qwen2vl_sft.comparison.report import SCRIPT, Material, audit_html, automatic_text, config_text, material_of, page, pictures, summary_html, task_deployment_html, write_report
from qwen2vl_sft.comparison.scoreboard import Scoreboard, csv_text
from qwen2vl_sft.config import RunConfig
from qwen2vl_sft.core import InputError
from qwen2vl_sft.rundir import RunDir

EVIL_TASK = "<img src=x onerror=document.title='task'>"
EVIL_LABEL = "<img src=x onerror=document.title='label'>\"'</script><script>document.title='script'</script>"


PLAN = Plan(
    samples=60, api=True, free=True, validation=True, pictures=48, positive={"weapon": "weapon"}, noise={"headwear": 4},
    labels={task: LABELS[task] for task in ("digit", "number", "headwear", "weapon")}, collapsed={("base", "weapon"): "none"},
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    folder = build_experiment(tmp_path_factory.mktemp("report"), PLAN)
    write_report(folder)
    return folder


def evil(what: str) -> str:
    return f"<img src=x onerror=document.title='{what}'>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Markup in everything that comes from data or from the disk: task, label, run, model, note, sample id, configuration, status."""
    labels = {EVIL_TASK: ["x", EVIL_LABEL], "违规信息": ["违规", "正常"]}
    plan = Plan(samples=40, labels=labels, collapsed={("base", EVIL_TASK): EVIL_LABEL}, noise={EVIL_TASK: 4}, steps=(100, 300), api=True)
    folder = build_experiment(tmp_path_factory.mktemp("hostile"), plan, name="demo")
    for part in folder.rglob("part-*.parquet"):
        table = pd.read_parquet(part)
        table.assign(id=evil("id") + table["id"], reason=evil("reason")).to_parquet(part)
    mix, api = RunDir(folder / "mix"), RunDir(folder / "gpt-4o")
    mix.config_path.write_text(mix.config_path.read_text() + f"# {EVIL_LABEL}\n")
    status = json.loads(mix.status_path.read_text())
    mix.status_path.write_text(json.dumps(status | {"state": "failed", "message": evil("status")}))
    mix.path.rename(folder / evil("run"))
    shutil.move(api.path / "predictions" / "gpt-4o", api.path / "predictions" / evil("model"))
    (folder / "paper").mkdir()
    (folder / "paper" / "accuracies.csv").write_text(f'model,step,dataset,accuracy,note\n"{evil("import")}",,违规信息,0,"{evil("note")}"\n')
    return write_report(folder)


class Structure(HTMLParser):
    """Tags, addresses and scripts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.scripts, self.inside = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = "json" if ("type", "application/json") in attrs else tag
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        if self.inside == "script" and data.strip():
            self.scripts.append(data)
            self.inside = ""


def test_everything_is_written_beside_the_runs(experiment):
    names = {path.relative_to(experiment).as_posix() for path in experiment.rglob("*") if path.is_file()}
    assert {"report.html", "scoreboard.csv", "scoreboard.md"} <= names
    plots = ["heat_map", "mean_by_step", "accuracy_by_step", "loss_curves", "task_differences", "confusion_matrices", "reliability_diagram", "precision_recall", "cost_accuracy"]
    assert {"scoreboard.tex", "accuracies.csv", *(f"plots/{name}.png" for name in plots)} <= names
    board = Scoreboard.from_experiment(experiment)
    assert (experiment / "scoreboard.csv").read_text() == csv_text(board)
    assert all((experiment / "plots" / path).read_bytes().startswith(b"\x89PNG") for path in ("heat_map.png", "loss_curves.png"))


def test_the_summary_is_computed_from_the_data(experiment):
    text = re.sub(r"<[^>]+>", "", (experiment / "report.html").read_text())
    board = Scoreboard.from_experiment(experiment)
    best, base = board.means.loc[list(board.chosen.values()), "strict"].idxmax(), board.means.loc["base", "strict"]
    assert f"{best} has the highest strict mean of the rows to choose from" in text and f": {board.means.loc[best, 'strict']:.1f} %" in text
    assert f"That is {board.means.loc[best, 'strict'] - base:.1f} points above the untuned base ({base:.1f} %; paired" in text
    assert f"{best} was chosen on validation data" in text and "Picking the step on test would have claimed" in text
    assert "is weakest on" in text and "labels are contradicted by several models" in text
    assert "base collapsed on weapon (“none”)" in text and "would decide" in text


def test_a_share_decided_automatically_is_no_headline_where_few_validation_rows_chose_the_threshold(tmp_path):
    plan = Plan(samples=60, labels={"a": ["x", "y"], "b": ["x", "y"]}, runs={"mix": {}}, steps=(300,), collapsed={}, validation=True, skills={"mix(300)": 0.99})
    folder = build_experiment(tmp_path, plan)
    tile = lambda: re.search(r"automatic at 95 % precision, %</dt><dd>([^<]*)<small>([^<]*)", summary_html(material_of(folder))).groups()
    value, how = tile()
    assert float(value) > 0 and how == "mean over 2 tasks, thresholds from n=60; the rest to people"
    run = RunDir(folder / "mix")
    for task in "ab":
        part = run.prediction_parts("step-300", task, "closed", "validation")[0]
        pd.read_parquet(part).head(5 if task == "a" else 60).to_parquet(part)
    assert tile()[1] == "mean over 1 task, thresholds from n=60; the rest to people; too few validation rows on a (n=5; 20 decided ones, nearly all right, are needed)"
    pd.read_parquet(part).head(4).to_parquet(part)
    assert tile() == ("–", "too few validation rows (n=4 to 5; 20 decided ones, nearly all right, are needed)")
    material = material_of(folder)
    assert "isn't known: too few validation rows (n=4 to 5" in automatic_text(material) and "validation, n=4; too few" in task_deployment_html(material, "b")


def test_settings_counts_and_provenance_are_in_it(experiment):
    text = (experiment / "report.html").read_text()
    assert "learning_rate: 0.0001" in text and "trained · finished (training)" in text
    assert "suite.yaml sha256 " in text and "transformers " in text and "Labels: helmet, bow tie, neither" in text
    assert text.index("<summary>mix ") < text.index("<summary>majority ")


def test_provenance_leaves_out_the_settings_of_other_methods(tmp_path):
    for name, kept, left_out in (("lora", ("rank", "alpha", "targets"), ("quantisation", "double_quantisation", "freeze_tower")), ("full", ("freeze_tower",), ("rank", "targets", "quantisation")), ("qlora", ("quantisation", "rank"), ("freeze_embeddings",))):
        run = RunDir(tmp_path / name)
        run.write_config(RunConfig(suite="s.yaml", method={"name": name}).to_yaml())
        shown = yaml.safe_load(config_text(run))
        assert shown["method"]["name"] == name and set(kept) <= set(shown["method"]) and not set(left_out) & set(shown["method"])
        assert {**shown, "method": None} == {**yaml.safe_load(run.config_path.read_text()), "method": None}, "the rest stays"
        assert set(left_out) <= set(config_text(run).splitlines()[-1].rpartition(": ")[2].split(", "))


def test_the_page_asks_nobody_for_anything(experiment):
    structure = Structure((experiment / "report.html").read_text())
    assert structure.addresses and all(address.startswith(("data:image/", "#")) for address in structure.addresses)
    assert structure.scripts == [SCRIPT] and not structure.handlers
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(structure.tags)
    assert not re.search(r"url\(|@import", (experiment / "report.html").read_text())


def test_what_comes_from_data_is_escaped(hostile):
    structure = Structure(hostile.read_text())
    assert structure.scripts == [SCRIPT] and not structure.handlers
    assert structure.tags.count("img") == len(list((hostile.parent / "plots").glob("*.png")))
    words = re.sub(r"<[^>]*>", "", hostile.read_text().split("<script")[0])
    for what in ("run", "model", "import", "note", "id", "status"):
        assert f"onerror=document.title=&#x27;{what}&#x27;&gt;" in words, what  # it is shown, as text


def test_a_second_report_replaces_the_first(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    first, again = write_report(folder).read_text(), write_report(folder).read_text()
    without_time = lambda text: re.sub(r"Written [^w]*with", "", text)
    assert without_time(first) == without_time(again) and not list(folder.rglob("*.tmp"))


def test_a_plot_that_is_no_longer_drawn_is_removed_and_nothing_else(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    (folder / "plots").mkdir()
    for name in ("task_differences_2", "mixture_gain", "my_own_1"):
        (folder / "plots" / f"{name}.png").write_bytes(b"old")
    write_report(folder)
    left = {path.stem for path in (folder / "plots").glob("*.png")}
    assert {"heat_map", "my_own_1"} <= left and not {"task_differences_2", "mixture_gain"} & left


def test_with_many_rows_the_ones_that_matter_keep_their_thresholds(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen2vl_sft.comparison.report.ROWS_DEPLOYED", 2)
    folder = build_experiment(tmp_path, Plan(samples=20, labels={"face": LABELS["face"]}, collapsed={}))
    material = material_of(folder)
    assert material.deployed == [material.best, "base"] and set(material.confidences["row"]) == set(material.deployed)
    assert "worked out for 2 rows" in page(material, {}) and material.board.rows[-1] in material.cut


def test_runs_that_failed_are_said(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    with pytest.raises(RuntimeError), RunDir(folder / "full").running("training"):
        raise RuntimeError("out of memory")
    text = write_report(folder).read_text()
    assert "Run full is failed (training): RuntimeError: out of memory" in text


def test_an_experiment_without_training_or_prepared_data(tmp_path):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}))
    for run in ("mix", "full"):
        shutil.rmtree(folder / run)
    shutil.rmtree(tmp_path / "prepared")
    text = write_report(folder).read_text()
    assert "there is no best row" in text and "was not found beside the experiment" in text
    assert not (folder / "plots" / "loss_curves.png").exists()


def test_the_command_tests_against_a_row_and_says_what_changed(tmp_path, monkeypatch, capsys):
    folder = build_experiment(tmp_path, Plan(samples=12, labels={"face": LABELS["face"]}, runs={"mix": {}}, steps=(100,)))
    monkeypatch.setenv("QWEN2VL_SFT_ROOT", str(tmp_path))
    (tmp_path / "before.csv").write_text("model,step,face,mean_score\nbase,,1.0,1.0\n")
    assert main(["compare", "demo", "--against", "majority", "--before", str(tmp_path / "before.csv")]) == 0
    assert "| base | face | 1.0 |" in capsys.readouterr().out
    assert '<option value="0">majority</option>' in (folder / "report.html").read_text()
    assert main(["compare", "demo", "--price", "3.6", "--price", "mix=7.2@10", "--precision", "0.8"]) == 0
    text = (folder / "report.html").read_text()
    assert "at 80 % precision" in text and "<td>0.2</td>" in text  # 1,000 images at 10 a second and 7.2 an hour
    for options, message in ((["--against", "gpt-5"], "no row is named 'gpt-5'"), (["--price", "gpt-5=1"], "no row or model is named 'gpt-5'")):
        assert main(["compare", "demo", *options]) == 2
        assert message in capsys.readouterr().err


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such experiment"):
        write_report(tmp_path / "none")


def test_imported_figures_make_a_page_too():
    material = Material(Scoreboard.from_csv())
    text = page(material, pictures(material))
    assert "no intervals, because the numbers of samples are not known" in text and "违规信息" in text


# -------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="lacks playwright (pip install playwright)")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("lacks chromium (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Open a file; `opened.requests` are addresses it asked for, `opened.messages` what it complained about."""
    pages = []

    def go(path: Path, width: int = 1200, scheme: str = "light"):
        tab = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        tab.asked, tab.messages = [], []
        tab.on("request", lambda request: tab.asked.append(request.url) if not request.url.startswith("data:") else None)
        tab.on("console", lambda message: tab.messages.append(message.text))
        tab.on("pageerror", lambda error: tab.messages.append(str(error)))
        tab.goto(path.as_uri())
        pages.append(tab)
        return tab

    yield go
    for tab in pages:
        tab.context.close()


def first_column(tab) -> list[str]:
    return tab.eval_on_selector_all("#scoreboard tbody tr", "rows => rows.filter(r => !r.hidden).map(r => r.cells[0].textContent)")


SMALLEST_TEXT = """() => Math.min(...[...document.querySelectorAll('body *')].filter(one => one.checkVisibility() && [...one.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
  .map(one => parseFloat(getComputedStyle(one).fontSize)))"""
# elements that stick out of the page, other than inside a box that scrolls
STICKING_OUT = """() => [...document.querySelectorAll('body *')].filter(one => one.checkVisibility() && !one.closest('.scroll') && !one.closest('pre') && one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_opens_without_requests_errors_or_sideways_scrolling(opened, experiment, width, scheme):
    tab = opened(experiment / "report.html", width, scheme)
    assert tab.asked == [(experiment / "report.html").as_uri()] and tab.messages == []
    assert tab.evaluate("[...document.querySelectorAll('#plots img')].every(image => image.complete && image.naturalWidth > 300)")
    background, ink = (tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 384 for colour in (background, ink)]
    assert light == ([True, False] if scheme == "light" else [False, True])
    tab.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width and tab.evaluate(STICKING_OUT) == []
    assert tab.evaluate(SMALLEST_TEXT) >= 12


def test_at_400_pixels_the_table_scrolls_in_its_own_box_and_keeps_its_names(opened, experiment):
    tab = opened(experiment / "report.html", 400)
    box = tab.locator("#scoreboard .scroll").first
    assert box.evaluate("one => one.scrollWidth > one.clientWidth + 100 && one.clientWidth <= 400")
    box.focus()
    for _ in range(40):
        box.press("ArrowRight")
    tab.wait_for_function("document.querySelector('#scoreboard .scroll').scrollLeft > 100")
    box.evaluate("one => { one.scrollLeft = one.scrollWidth; }")
    assert box.evaluate("one => one.scrollLeft") > 100
    name, last = box.locator("tbody tr").first.locator("th"), box.locator("tbody tr").first.locator("td").last
    assert name.bounding_box()["x"] >= 0 and name.bounding_box()["width"] < 200  # the row's name stays in sight
    assert last.bounding_box()["x"] + last.bounding_box()["width"] <= 400


def test_columns_sort_by_click_and_by_keyboard(opened, experiment):
    tab = opened(experiment / "report.html")
    board = Scoreboard.from_experiment(experiment)
    start = first_column(tab)
    down = board.means["strict"].sort_values(ascending=False).index
    head = tab.locator("#scoreboard th", has_text=re.compile("^mean$"))
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending" and first_column(tab)[0].startswith(down[0])
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending" and first_column(tab)[0].startswith(down[-1])
    tab.locator("#scoreboard th button").first.click()
    assert first_column(tab) == start


def test_rows_filter(opened, experiment):
    tab = opened(experiment / "report.html")
    tab.fill("#filter", "full base")
    assert [re.split(r"\(|untuned", name)[0] for name in first_column(tab)] == ["base", "full", "full", "full", "full"]
    tab.fill("#filter", "")
    assert len(first_column(tab)) == 12
    tab.fill("#tasks-filter", "weap")
    heads = tab.eval_on_selector_all("#scoreboard thead th", "heads => heads.filter(h => !h.hidden).map(h => h.textContent)")
    assert len(heads) == 6 and heads[-1].startswith("weapon")


def test_the_reference_of_the_tests_can_be_chosen(opened, experiment):
    tab = opened(experiment / "report.html")
    shown = "spans => spans.filter(s => getComputedStyle(s).display !== 'none').length"
    count = lambda: tab.eval_on_selector_all("#scoreboard tbody td .v", shown)
    assert count() == 11 * 4  # every row but the reference, every task
    names = tab.eval_on_selector_all("#against option", "all => all.map(one => one.textContent)")
    assert names[:2] == ["base", "gpt-4o"]
    tab.select_option("#against", "1")
    assert count() == 11 * 4
    assert tab.eval_on_selector_all("#scoreboard tbody tr:nth-child(2) .v", shown) == 0  # gpt-4o against itself


def test_mistakes_can_be_browsed(opened, experiment):
    tab = opened(experiment / "report.html", 400)
    board = Scoreboard.from_experiment(experiment)
    tab.locator("#tasks summary", has_text="headwear").press("Enter")  # by keyboard
    browser = tab.locator("#tasks details[open] .errors")
    row = browser.locator("select").first.evaluate("one => one.selectedOptions[0].textContent")
    own = board.samples[(board.samples["row"] == row) & (board.samples["task"] == "headwear") & (board.samples["outcome"] != "correct")]
    text = lambda: browser.locator("p").inner_text()
    assert text().startswith(f"{len(own)} mistakes") and browser.locator("figure").count() == min(24, len(own))
    assert browser.locator("figure img").first.evaluate("one => one.complete && one.naturalWidth") == 48
    truth, answer = own[["target", "prediction"]].value_counts().index[0]
    cell = browser.locator(f'button[aria-label*="times {truth} answered as {answer}:"]')
    cell.focus()
    cell.press("Enter")
    wanted = int(((own["target"] == truth) & (own["prediction"] == answer)).sum())
    assert text().startswith(f"{wanted} mistake") and set(browser.locator("figcaption strong").all_inner_texts()) == {truth}
    browser.locator("select").nth(1).select_option("")
    browser.locator("select").nth(2).select_option("")
    browser.locator("input[type=checkbox]").check()
    api = board.samples[(board.samples["row"] == "gpt-4o") & (board.samples["task"] == "headwear") & (board.samples["outcome"] == "correct")]
    assert text().startswith(f"{len(set(own['id']) & set(api['id']))} mistake")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400 and tab.messages == []


def test_rare_labels_are_found_behind_their_common_cell(opened, tmp_path):
    labels = [f"label {i:02d}" for i in range(30)]
    folder = build_experiment(tmp_path, Plan(samples=150, labels={"many": labels}, runs={"mix": {}}, steps=(100, 200, 300, 337), collapsed={}, refused={}, skills={"mix(300)": 0.4}))
    board = Scoreboard.from_experiment(folder)
    assert len(board.rows) > 6
    data = browser_data(board, "many", most=5000)
    wrong = board.samples[board.samples["outcome"] != "correct"].groupby("row").size()
    assert data["wrong"] == [wrong.get(row, 0) for row in data["rows"]]
    held = [sum(item["o"][i] not in (None, 0) for item in data["items"]) for i in range(len(data["rows"]))]
    assert held == data["wrong"] and data["kept"] == data["total"]  # of every row, not of those that vote only
    tab = opened(write_report(folder))
    tab.locator("#tasks summary").click()
    browser = tab.locator("#tasks .errors")
    browser.locator("select").first.select_option(label="mix(300)")
    cell = browser.locator('button[aria-label*="times (other labels) answered as (other labels)"]')
    counted = int(cell.inner_text())
    cell.click()
    own = board.samples[(board.samples["row"] == "mix(300)") & (board.samples["outcome"] != "correct")]
    matrix = next(one for row, one in zip(data["rows"], data["matrices"], strict=True) if row == "mix(300)")
    expected = int((~own["target"].isin(matrix["index"]) & ~own["prediction"].isin(matrix["columns"])).sum())
    assert 0 < expected <= counted and browser.locator("p").inner_text().startswith(f"{expected} mistake")
    assert browser.locator("select").nth(1).evaluate("one => one.value") == "(other labels)" and tab.messages == []


def test_a_page_that_holds_only_some_mistakes_says_so(opened, experiment, tmp_path):
    board = Scoreboard.from_experiment(experiment)
    data = browser_data(board, "headwear", most=6)
    script = f"{BROWSER_SCRIPT}errorBrowser(document.getElementById('e'), JSON.parse(document.getElementById('d').textContent));"
    path = tmp_path / "some.html"
    path.write_text(f"<meta charset=utf-8><div id=e></div><script id=d type=application/json>{json.dumps(data).replace('<', chr(92) + 'u003c')}</script><script>{script}</script>")
    main_row = data["rows"][data["start"]]
    assert f"(the page holds 6 of the {data['wrong'][data['start']]} mistakes of {main_row})" in opened(path).inner_text("p")


def test_the_label_queue_and_the_audit_are_in_the_page(opened, experiment):
    tab = opened(experiment / "report.html")
    noise = label_noise(Scoreboard.from_experiment(experiment))
    planted = {f"headwear-test-{i:04d}" for i in range(4)}
    assert len(planted & set(noise["id"])) >= 3
    text = tab.inner_text("#queue-section").replace("\u200b", "")
    assert f"{len(noise)} samples on which" in text and all(name in text for name in noise["id"].head(5))
    assert "59 of 60 rows accepted" in tab.inner_text("#settings") and "would decide by itself at 95 % precision" in tab.inner_text("#deployment")
    steps = tab.inner_text("#training")
    assert "mix: chosen on validation" in steps and "mix: picked on test" in steps and "One step for all tasks" in steps


def test_labels_from_data_run_nothing(opened, hostile):
    tab = opened(hostile)
    tab.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    tab.wait_for_timeout(200)
    assert tab.title() == "demo: comparison" and tab.asked == [hostile.as_uri()] and tab.messages == []
    assert EVIL_TASK in tab.inner_text("#scoreboard thead").replace("\u200b", "").replace("\n", "")


def test_the_policy_stops_a_script_even_if_escaping_failed(opened, experiment, tmp_path):
    text = (experiment / "report.html").read_text()
    broken = text.replace("<h1>", "<h1><img src=x onerror=document.title='hacked'><script>document.title='hacked'</script>")
    path = tmp_path / "broken.html"
    path.write_text(broken)
    tab = opened(path)
    tab.wait_for_timeout(200)
    assert tab.title() != "hacked"
    assert sum("Content Security Policy" in message for message in tab.messages) >= 2


def test_a_notebook_keeps_the_mistakes_without_a_kernel(opened, experiment, tmp_path):
    widget = error_browser(experiment, "headwear")
    bundle = widget._repr_mimebundle_()
    content = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in content and widget.data["task"] == "headwear"
    assert "http" not in widget._esm and "import " not in widget._esm
    path = tmp_path / "static.html"
    path.write_text(f"<meta charset=utf-8>{content['text/html']}")
    tab = opened(path)
    assert tab.locator("figure").count() == 12 and tab.asked == [path.as_uri()]
    with pytest.raises(InputError, match="no task 'headwaer'"):
        error_browser(experiment, "headwaer")


def test_the_widgets_script_draws_the_same_browser(opened, experiment, tmp_path):
    widget = error_browser(experiment, "headwear")
    script = widget._esm.replace("export default", "const widget =") + "widget.render({ model: { get: () => JSON.parse(document.getElementById('d').textContent) }, el: document.getElementById('e') });"
    path = tmp_path / "widget.html"
    path.write_text(f"<meta charset=utf-8><div id=e></div><script id=d type=application/json>{json.dumps(widget.data).replace('<', chr(92) + 'u003c')}</script><script>{script}</script>")
    tab = opened(path)
    assert tab.locator("figure").count() > 5 and tab.messages == []


def test_static_mistakes_are_escaped(hostile):
    board = Scoreboard.from_experiment(hostile.parent)
    text = static_browser(browser_data(board, EVIL_TASK))
    assert "<script" not in text and "<img src=x" not in text and "&lt;img" in text


@pytest.mark.slow
def test_twenty_tasks_of_500_samples_stay_small_and_quick(opened, tmp_path):
    labels = {f"a_rather_long_name_of_a_task_{i:06d}": ["yes", "no"] for i in range(20)}
    plan = Plan(samples=500, labels=labels, collapsed={}, refused={}, api=True, steps=(100, 200, 300), pictures=160)
    path = write_report(build_experiment(tmp_path, plan))
    assert len((path.parent / "scoreboard.csv").read_text().splitlines()) == 1 + 10
    assert path.stat().st_size < 15e6
    loading = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
    assert any(opened(path).evaluate(loading) < 3 for _ in range(3))  # seconds; the best of three: other work may run beside
    sort = """() => {
      const start = performance.now();
      document.querySelectorAll('#scoreboard th button')[1].click();
      document.body.offsetHeight;
      return performance.now() - start;
    }"""
    tab = opened(path)
    assert min(tab.evaluate(sort) for _ in range(5)) < 100  # milliseconds


def test_repaired_rows_count_as_accepted(tmp_path):
    counts = {"rows_read": 144, "accepted": 139, "repaired": 1, "quarantined": 4}
    (tmp_path / "audit.json").write_text(json.dumps({**counts, "tasks": {"t": counts}}))
    assert "<small>140 of 144 rows accepted, 1 of them repaired</small>" in audit_html(tmp_path)
