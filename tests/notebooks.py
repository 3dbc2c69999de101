"""The notebooks as data, for tests; `python tests/notebooks.py clean` removes outputs and stray metadata."""

import json
import re
import subprocess
import sys
from pathlib import Path

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


if __name__ == "__main__":
    if sys.argv[1:] != ["clean"]:
        sys.exit(__doc__)
    clean()
