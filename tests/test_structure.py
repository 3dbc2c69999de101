"""What DESIGN calls layout: order of imports, notebooks clean, package in sync, a light import."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import mutants
import pytest
from notebooks import (
    NOTEBOOKS,
    PACKAGE,
    ROOT,
    code_cells,
    library_notebooks,
    module_name,
    number,
    outputless_notebooks,
    read,
    run_notebooks,
    tutorials,
)

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
HEAVY = ["nbdev", "fastcore", "execnb", "papermill", "nbconvert", "nbformat", "nbclient", "jupyter_client"]
HEAVY += ["jupyterlab", "ipykernel", "IPython", "ipywidgets", "matplotlib", "openai", "ray", "bitsandbytes"]
HEAVY += ["torchvision"]


def name_of(path: Path) -> str:
    return path.name if path.parent == NOTEBOOKS else f"{path.parent.name}/{path.name}"


def python_of(cell: dict) -> str:
    "A cell's code without IPython magics and shell lines."
    return "\n".join(line for line in cell["text"].splitlines() if not re.match(r"\s*[%!]", line))


def imported_modules(source: str) -> set[str]:
    "Modules of the package that the code imports anywhere, as `data.sources`."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("qwen2vl_sft.") for name in found if name.startswith("qwen2vl_sft.")}


@pytest.mark.parametrize("path", library_notebooks(), ids=name_of)
def test_import_order_goes_down(path):
    numbers = {module_name(other): number(other) for other in library_notebooks()}
    for cell in code_cells(path):
        for module in imported_modules(python_of(cell)) & numbers.keys():
            if module != module_name(path):
                assert numbers[module] < number(path), f"{path.name} imports {module}, which has number {numbers[module]}"


def test_notebook_numbers_differ():
    numbers = [number(path) for path in library_notebooks()]
    assert len(set(numbers)) == len(numbers), [path.name for path in library_notebooks()]


@pytest.mark.parametrize("path", library_notebooks(), ids=name_of)
def test_one_notebook_exports_one_module_of_its_name(path):
    stated = [m for cell in code_cells(path) for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", cell["text"], re.M)]
    assert stated == [module_name(path)]
    assert not [cell for cell in code_cells(path) if re.search(r"^#\|\s*export[a-z]*[ \t]+\S", cell["text"], re.M)]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_comes_from_a_notebook(module):
    dotted = ".".join(module.relative_to(PACKAGE).with_suffix("").parts)
    assert dotted in [module_name(path) for path in library_notebooks()], f"{module} has no notebook"


def test_package_and_notebooks_in_sync_and_clean(tmp_path):
    "Cleaning and exporting a copy changes nothing. Modules that git doesn't know yet count."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for folder in (NOTEBOOKS, PACKAGE):
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "assets", ".last_checked")
        shutil.copytree(folder, tmp_path / folder.name, ignore=ignore)
    programs = Path(sys.executable).parent
    for program in ("nbdev_clean", "nbdev_export"):
        subprocess.run([programs / program], cwd=tmp_path, check=True, capture_output=True, text=True)
    for folder, pattern in ((NOTEBOOKS, "*.ipynb"), (PACKAGE, "*.py")):
        fresh = tmp_path / folder.name
        hidden = lambda path: any(part.startswith(".") for part in path.parts)
        names = {p.relative_to(folder) for p in folder.rglob(pattern) if not hidden(p.relative_to(folder))}
        names |= {p.relative_to(fresh) for p in fresh.rglob(pattern) if not hidden(p.relative_to(fresh))}
        text = lambda path: path.read_text() if path.exists() else None
        differing = sorted(str(n) for n in names if text(folder / n) != text(fresh / n))
        assert not differing, f"run `make export`; out of sync or not clean: {folder.name}/ {differing}"


@pytest.mark.parametrize("path", outputless_notebooks(), ids=name_of)
def test_no_outputs_in_library_and_run_notebooks(path):
    left = [i for i, cell in enumerate(code_cells(path)) if cell["outputs"] or cell["execution_count"]]
    assert not left, f"run `make export`; cells {left} carry outputs"


@pytest.mark.parametrize("path", tutorials(), ids=name_of)
def test_tutorials_show_what_a_reader_should_see(path):
    "Run top to bottom, without errors, warnings, progress bars, hours and places on somebody's disk."
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = json.dumps([{**o, "data": {k: v for k, v in o.get("data", {}).items() if k.startswith("text/")}} for o in outputs])
    assert not re.search(r"/tmp/|/home/|/root/|[Ww]arning|\[\d\d:\d\d:\d\d\]|/site-packages/", text)
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", run_notebooks(), ids=name_of)
def test_run_notebooks_are_thin(path):
    thick = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.While, ast.Lambda)
    tags = [tag for cell in read(path)["cells"] for tag in cell["metadata"].get("tags", [])]
    assert tags == ["parameters"]
    for cell in code_cells(path):
        assert not [node for node in ast.walk(ast.parse(python_of(cell))) if isinstance(node, thick)]


def test_light_import():
    "Every module imports with the notebook, plotting, API and quantisation packages absent."
    dotted = [".".join(module.relative_to(ROOT).with_suffix("").parts) for module in MODULES]
    code = f"""
import importlib, importlib.util, sys
hidden = lambda name: name.split('.')[0] in {HEAVY}
find_spec = importlib.util.find_spec  # what libraries ask whether an optional package is there
importlib.util.find_spec = lambda name, package=None: None if hidden(name) else find_spec(name, package)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if hidden(name):
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden by the test)", name=name)
sys.meta_path.insert(0, Absent())
for module in {dotted}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_quick_import():
    "Rooms that a command line needs before any model does don't pull in torch."
    wanted = ["core", "config", "tasks", "rundir", "data.sources", "comparison", "workflow", "cli"]
    dotted = [".".join(m.relative_to(PACKAGE).with_suffix("").parts) for m in MODULES]
    dotted = [f"qwen2vl_sft.{m}" for m in dotted if m in wanted or m.split(".")[0] in wanted]
    code = f"import importlib, sys\nfor m in {dotted}:\n    importlib.import_module(m)\n"
    code += "    heavy = {'torch', 'transformers', 'datasets'} & sys.modules.keys()\n    assert not heavy, (m, heavy)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_requirements_name_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    stated = [*project["dependencies"], *extras]
    canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    stated = {canonical(re.match(r"[\w.-]+", line).group()) for line in stated}
    providers = packages_distributions()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"qwen2vl_sft"}:
                distributions = {canonical(d) for d in providers.get(name, [name])}
                assert distributions & stated, f"{module.name} imports {name}; pyproject.toml doesn't state it"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_habits(module):
    source = module.read_text()
    numbers = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.NUMBER]
    assert not [n for n in numbers if re.fullmatch(r"151[3-9]\d\d", n)], "a token id of Qwen's vocabulary as a literal"
    assert not re.search(r"\bTODO\b|\bFIXME\b|NotImplementedError", source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
    assert "trust_remote_code=True" not in source


@pytest.mark.parametrize("mutation", mutants.MUTATIONS, ids=lambda m: f"{m.point} {m.module}")
def test_mutation_fits_the_code(mutation):
    "The text that a mutation replaces occurs exactly once, and its test exists."
    assert (ROOT / mutation.module).read_text().count(mutation.old) == 1
    compile((ROOT / mutation.module).read_text().replace(mutation.old, mutation.new), mutation.module, "exec")
    for node in mutation.tests:
        path, _, name = node.partition("::")
        assert re.search(rf"def {re.escape(name.split('[')[0])}\b", (ROOT / path).read_text()), node
