"""A real JupyterLab on loopback, driven by headless Chromium: open a notebook, Run All, wait, save, look."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IDLE = "() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"

STARTED = "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(one => /[\\d*]/.test(one.textContent))"
# Some cell on the page has a number, and none is waiting.
RAN = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(one => one.textContent.trim());
    return prompts.some(text => /\\d/.test(text)) && !prompts.some(text => text.includes('*'));
}"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextmanager
def jupyterlab(folder: Path, home: Path):
    "A JupyterLab server that shows `folder`; yields its address, with the token. Settings and state stay in `home`."
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--allow-root"]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    places = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    home.mkdir(parents=True, exist_ok=True)
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **places}, stdout=log, stderr=log)
        try:
            wait_until_up(f"http://127.0.0.1:{port}/api?token={token}", server, home / "server.log")
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
        finally:
            server.terminate()  # kernels end with it
            server.wait(30)


def wait_until_up(address: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


class Lab:
    "One browser window on the server."

    def __init__(self, browser, address: str, folder: Path):
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.address, self.folder = address, folder

    def run_all(self, path: str, seconds: float = 300) -> nbformat.NotebookNode:
        "Open a notebook, click Run > Run All Cells, wait until its kernel is idle, save. The notebook as saved."
        page, limit = self.page, {"timeout": 1000 * seconds}
        page.goto(self.address.format(path))
        page.wait_for_selector(".jp-Notebook", timeout=60_000)
        page.wait_for_function(IDLE, **limit)
        page.wait_for_function("() => document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')", **limit)
        for _ in range(5):  # while the kernel is still being connected, JupyterLab drops what it is asked to run
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            page.wait_for_timeout(1500)
            if page.evaluate(STARTED):
                break
        page.wait_for_function(RAN, **limit)
        page.wait_for_function(IDLE, **limit)
        page.keyboard.press("Control+s")
        page.wait_for_function("() => !document.querySelector('.lm-DockPanel-tabBar .jp-mod-dirty')", timeout=30_000)
        return nbformat.read(self.folder / path, as_version=4)

    def errors(self) -> list[str]:
        "Texts of the error outputs and dialogs on the page."
        return self.page.locator('[data-mime-type="application/vnd.jupyter.error"], .jp-Dialog').all_inner_texts()
