"""The documentation site: builds without a warning, follows from the sources, and every link leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from lab import CHROMIUM
from notebooks import ROOT, library_notebooks, module_name, run_notebooks

from qwen2vl_sft import cli

sys.path.insert(0, str(ROOT / "docs"))
from links import check  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site, built as `make docs` does. Warnings are errors."
    for module in ("sphinx", "myst_nb", "furo", "sphinx_copybutton", "latex2mathml"):
        pytest.importorskip(module, reason="lacks the documentation's tools (pip install 'qwen2vl-sft[docs]')")
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run([sys.executable, ROOT / "docs/build.py", folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_everything_has_its_page(site):
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    wanted = {"index.html", "command-line.html", "CONTRIBUTING.html", "CHANGELOG.html", "dev/LOG.html", "search.html"}
    wanted |= {f"nbs/{path.stem}.html" for path in library_notebooks()} | {f"api/{module_name(path)}.html" for path in library_notebooks()}
    wanted |= {f"nbs/runs/{path.stem}.html" for path in run_notebooks()}
    wanted |= {f"nbs/tutorials/{path.stem}.html" for path in (ROOT / "nbs/tutorials").glob("*.ipynb")}
    assert not wanted - pages
    commands = (site / "command-line.html").read_text()
    names = [one.name or one.callback.__name__.replace("_", "-") for one in cli.app.registered_commands]
    assert names and all(f'id="qwen2vl-sft-{name}"' in commands for name in names)
    api = (site / "api/encoding.batch.html").read_text()
    text = re.sub(r"<[^>]+>", "", api)
    assert 'id="qwen2vl_sft.encoding.batch.mrope_positions"' in api and "index of the first image token" in text, "the comment beside a parameter"


@pytest.mark.slow
def test_every_link_leads_somewhere_and_nothing_is_fetched(site, capsys):
    faults, elsewhere = check(site)
    assert not faults, faults
    with capsys.disabled():
        print(f"\n{len(elsewhere)} links to other sites, not followed")


def test_the_check_finds_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">x</a><a href="b.html#gone">x</a><a href="c.html">x</a><script src="https://cdn.example/x.js"></script>')
    (tmp_path / "b.html").write_text('<p id="here"><a href="https://example.org">elsewhere</a><img src="missing.png"></p>')
    (tmp_path / "s.css").write_text('@font-face { src: url("//fonts.example/f.woff2") } p { background: url(lost.png) }')
    faults, elsewhere = check(tmp_path)
    assert len(faults) == 6 and elsewhere == {"https://example.org"}
    assert sorted(re.findall(r"gone|c\.html|cdn|missing|fonts|lost", " ".join(faults))) == ["c.html", "cdn", "fonts", "gone", "lost", "missing"]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="lacks chromium (apt-get install chromium)")
def test_search_works_from_disk(site):
    sync = pytest.importorskip("playwright.sync_api", reason="lacks playwright")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{site}/search.html?q=mrope_positions")
        page.wait_for_selector("#search-results li a", timeout=20_000)
        assert "encoding.batch" in page.locator("#search-results").inner_text()
        chromium.close()
    assert asked and all(url.startswith(("file:", "data:")) for url in asked), asked
