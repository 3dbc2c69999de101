"""Build the documentation site: `python docs/build.py [FOLDER]` (build/docs if none is named).

The README, the notebooks and the docstrings are the sources; nothing is written twice and nothing is executed.
They are laid out in a folder beside the site as they lie in the repository, so that their links stay true, and
Sphinx reads that folder.
"""

import ast
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ROOMS = {  # first number -> title of a group of lessons
    0: "Foundation", 9: "Encoding", 19: "Data", 30: "Model", 40: "Scoring", 50: "Training", 60: "Comparison", 70: "Workflow", 90: "Command line",
}  # fmt: skip
PAGES = {"CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "dev/LOG.md": "dev/LOG.md"}


def toctree(caption: str, entries: list[str]) -> str:
    "A hidden table of contents: a group of the side bar."
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""])


def lessons(root: Path) -> dict[str, list[Path]]:
    "Room -> its notebooks, in the order of their numbers."
    rooms: dict[str, list[Path]] = {title: [] for title in ROOMS.values()}
    for path in sorted(root.glob("nbs/[0-9][0-9]_*.ipynb")):
        first = max(number for number in ROOMS if number <= int(path.name[:2]))
        rooms[ROOMS[first]].append(path)
    return rooms


def module_name(path: Path) -> str:
    "`nbs/20_data.sources.ipynb` -> `data.sources`."
    return path.stem.partition("_")[2]


def as_lesson(notebook: dict, module: str | None) -> dict:
    "A notebook without nbdev's directives; exported cells carry the tag `exported`, and the first cell names the module."
    cells = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            directives = re.findall(r"^#\|\s*(\w+)", text, re.M)
            text = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip("\n")
            if not text or "hide" in directives:
                continue
            tags = [*cell["metadata"].get("tags", []), *(["exported"] if "export" in directives else [])]
            outputs = [{**out, "text": without_bars("".join(out["text"]))} if "text" in out else out for out in cell["outputs"]]
            cell = {**cell, "outputs": outputs, "metadata": {**cell["metadata"], "tags": tags}}
        cells.append({**cell, "source": text})
    if module:
        note = f"*Lesson and source of* `qwen2vl_sft.{module}`*: cells with a bar at their left are exported to it.* [API of this module](/api/{module}.md)"
        cells.insert(1, {"cell_type": "markdown", "id": "api-of-this", "metadata": {}, "source": note})
    return {**notebook, "cells": cells}


def without_bars(text: str) -> str:
    "Terminal output as it looks when it is over: of a line that was redrawn, the last state."
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def copy_notebook(path: Path, target: Path, module: str | None = None) -> None:
    notebook = as_lesson(json.loads(path.read_text(encoding="utf-8")), module)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")


def api_page(path: Path, module: str) -> str:
    "A table of what the module has, then what autodoc makes of it."
    tree = ast.parse((ROOT / "qwen2vl_sft" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    lines = [f"# {module}", "", ast.get_docstring(tree) or "", "", f"Lesson: [{path.stem}](/nbs/{path.stem}.ipynb)", ""]
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    rows = [(node.name, first_line(ast.get_docstring(node) or "")) for node in public]
    if rows:
        lines += ["| | |", "|---|---|", *(f"| {{py:obj}}`{name} <qwen2vl_sft.{module}.{name}>` | {text} |" for name, text in rows), ""]
    return "\n".join([*lines, "```{eval-rst}", f".. automodule:: qwen2vl_sft.{module}", "   :members:", "```", ""])


def first_line(docstring: str) -> str:
    "The first line, as a cell of a Markdown table."
    line = docstring.partition("\n")[0]
    parts = re.split(r"(`[^`]+`)", line)
    parts[::2] = [re.sub(r"([<*_\[\]$`])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")


def command_line() -> str:
    "Every command's help as one page."
    import typer
    from typer.cli import get_docs_for_click

    from qwen2vl_sft.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="qwen2vl-sft", title="Command line")
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    parts[::2] = [re.sub(r"<(?=\w)", r"\\<", part) for part in parts[::2]]  # `prepared/<suite>/` is no HTML
    return re.sub(r"^Example: (.*)$", r"```console\n$ \1\n```", "".join(parts), flags=re.M)


def lay_out(folder: Path) -> None:
    "Everything that Sphinx is to read, in `folder`."
    rooms = lessons(ROOT)
    tutorials = sorted(ROOT.glob("nbs/tutorials/*.ipynb"))
    for path in tutorials:
        copy_notebook(path, folder / "nbs/tutorials" / path.name)
    for path in sorted(ROOT.glob("nbs/runs/*.ipynb")):
        copy_notebook(path, folder / "nbs/runs" / path.name)
    (folder / "api").mkdir(parents=True)
    for path in [path for paths in rooms.values() for path in paths]:
        copy_notebook(path, folder / "nbs" / path.name, module_name(path))
        (folder / "api" / f"{module_name(path)}.md").write_text(api_page(path, module_name(path)), encoding="utf-8")
    (folder / "command-line.md").write_text(command_line(), encoding="utf-8")
    for source, target in PAGES.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, folder / target)
    shutil.copytree(HERE / "images", folder / "docs/images")
    for extra in ("LICENSE",):
        shutil.copy(ROOT / extra, folder / extra)
    (folder / "index.md").write_text(front_page(rooms, tutorials), encoding="utf-8")


def front_page(rooms: dict[str, list[Path]], tutorials: list[Path]) -> str:
    "The README, and the side bar."
    room_pages = lambda kind: [f"{title} <{kind}-{title.lower().replace(' ', '-')}>" for title in rooms]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text += toctree("Tutorials", [f"nbs/tutorials/{path.stem}" for path in tutorials])
    text += toctree("Run notebooks", [f"nbs/runs/{path.stem}" for path in sorted(ROOT.glob("nbs/runs/*.ipynb"))])
    text += toctree("Lessons", room_pages("lessons"))
    text += toctree("Reference", ["command-line", *room_pages("api")])
    return text + toctree("Project", ["CONTRIBUTING", "CHANGELOG", "dev/LOG"])


def room_pages(folder: Path) -> None:
    "A page a room, of its lessons and of its modules."
    for title, paths in lessons(ROOT).items():
        for kind, heading, name in (("lessons", f"{title}: lessons", lambda path: f"nbs/{path.stem}"), ("api", f"{title}: API", lambda path: f"api/{module_name(path)}")):
            lines = [f"# {heading}", "", "| | |", "|---|---|"]
            lines += [f"| [{path.stem if kind == 'lessons' else module_name(path)}](/{name(path)}{'.ipynb' if kind == 'lessons' else '.md'}) | {summary(path)} |" for path in paths]
            lines.append("\n".join(["", "```{toctree}", ":hidden:", "", *[name(path) for path in paths], "```", ""]))
            (folder / f"{kind}-{title.lower().replace(' ', '-')}.md").write_text("\n".join(lines), encoding="utf-8")


def summary(path: Path) -> str:
    "The quoted line under a notebook's title."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if found := re.search(r"^> (.*)", "".join(cell["source"]), re.M):
            return found[1]
    return ""


def build(target: Path, processes: str = "1") -> int:
    "Build the site into `target`. Warnings are errors. The exit code of Sphinx."
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        lay_out(source)
        room_pages(source)
        return build_main(["-q", "-W", "--keep-going", "-j", processes, "-c", str(HERE), "-d", f"{scratch}/doctrees", "-D", f"nb_execution_cache_path={scratch}/cache", str(source), str(target)])


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/docs").resolve()
    code = build(site)
    print(f"{site / 'index.html'}: open it in a browser, no server is needed")
    sys.exit(code)
