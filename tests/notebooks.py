"""The notebooks as data, for tests.

`python tests/notebooks.py clean` removes outputs and stray metadata; `python tests/notebooks.py tutorials [NAME ...]` runs
the tutorials from top to bottom and keeps what a reader should see: no progress bars, hours or temporary folders.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
PACKAGE = ROOT / "qwen2vl_sft"
NUMBERED = re.compile(r"^(\d\d)_([\w.]+)\.ipynb$")


def library_notebooks() -> list[Path]:
    "The notebooks that export a module, in their order."
    return sorted(path for path in NOTEBOOKS.glob("*.ipynb") if NUMBERED.match(path.name))


def run_notebooks() -> list[Path]:
    "The notebooks that papermill runs."
    return sorted((NOTEBOOKS / "runs").glob("*.ipynb"))


def tutorials() -> list[Path]:
    "The lessons."
    return sorted((NOTEBOOKS / "tutorials").glob("*.ipynb"))


def outputless_notebooks() -> list[Path]:
    "Notebooks that are committed without outputs; tutorials keep small ones."
    return [*library_notebooks(), *run_notebooks()]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[dict]:
    "Code cells, each with its `text`."
    return [{**cell, "text": "".join(cell["source"])} for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def module_name(path: Path) -> str:
    "`nbs/20_data.sources.ipynb` -> `data.sources`."
    return NUMBERED.match(path.name).group(2)


def number(path: Path) -> int:
    return int(NUMBERED.match(path.name).group(1))


def clean() -> None:
    "Remove outputs (not the tutorials'), execution counts and metadata other than tags."
    for path in outputless_notebooks():
        notebook = read(path)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=ROOT, check=True)


PASSING = re.compile(  # what is there already, the hour, a temporary folder, how long something took here
    r"(?m)^(?:\[[\d:]+\] )?\S+ is up to date\n|^\[\d\d:\d\d:\d\d\] |"
    rf"(?:{re.escape(tempfile.gettempdir())}|/tmp)/tmp\w+/?| [\d.,kM]+ samples/s .*left$|, \d+ s to fill, .*$| in \d+ s$"
)


def in_few_colours(png: str) -> str:
    "A picture (base64) in 128 colours, if that is smaller."
    picture, small = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    white.convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    fewer = base64.b64encode(small.getvalue()).decode()
    return min(png, fewer, key=len)


def without_passing(output: dict) -> dict:
    "A cell's output without what differs from run to run and says nothing."
    tidied = lambda lines: PASSING.sub("", "".join(lines)).splitlines(keepends=True)
    if "text" in output:
        return {**output, "text": tidied(output["text"])}
    data = {kind: tidied(value) if kind.startswith("text/") else value for kind, value in output.get("data", {}).items()}
    if "image/png" in data:
        data["image/png"] = in_few_colours(data["image/png"])
    return {**output, "data": data} if data else output


def run_tutorials(names: list[str]) -> None:
    "Run tutorials (none named: all) on one thread and keep their outputs."
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for path in [path for path in tutorials() if not names or path.stem in names]:
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", path, "--log-level", "WARN"]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | quiet)
        notebook = read(path)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                tidied = [without_passing(output) for output in cell["outputs"]]
                cell["outputs"] = [output for output in tidied if output.get("text") != []]
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=ROOT, check=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["clean"]:
        clean()
    elif sys.argv[1:2] == ["tutorials"]:
        run_tutorials(sys.argv[2:])
    else:
        sys.exit(__doc__)
