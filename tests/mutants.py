"""Break one line of the package at a time; the named tests must turn red (`make mutants`).

Each entry stands for a point of the design that a plausible slip would break silently. A mutation whose
tests stay green is a hole in the tests. `python tests/mutants.py 2. 10` runs the points that start so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("qwen2vl_sft", "tests", "settings.ini", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    point: str  # which point of the design, such as "5.2"
    slip: str  # what is broken, in words
    module: str  # file under the project root
    old: str  # occurs exactly once in it
    new: str
    tests: tuple[str, ...]  # node ids; each must fail


MUTATIONS: list[Mutation] = []


def tree_copy(folder: Path) -> None:
    "A checkout in `folder`: package and tests copied, everything else linked."
    for path in ROOT.iterdir():
        if path.name in COPIED and path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif path.name in COPIED:
            shutil.copy(path, folder)
        elif path.name not in (".git", ".venv", "runs"):
            (folder / path.name).symlink_to(path)


def run_tests(folder: Path, tests: list[str]) -> tuple[int, float, str]:
    "pytest's exit code, seconds and the end of its output, with the package of `folder` first on the path."
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, time.perf_counter() - started, done.stdout[-2500:] + done.stderr[-1000:]


def loads_the_copy(folder: Path) -> bool:
    code = "import qwen2vl_sft; print(qwen2vl_sft.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    return Path(done.stdout.strip()).is_relative_to(folder)


def verdict(folder: Path, mutation: Mutation) -> tuple[str, float]:
    "'red' when every named test fails under the mutation; otherwise what happened. The copy is restored."
    path = folder / mutation.module
    original = path.read_text()
    path.write_text(original.replace(mutation.old, mutation.new))
    seconds = 0.0
    try:
        for test in mutation.tests:
            code, took, output = run_tests(folder, [test])
            seconds += took
            if code != 1:  # 0: all passed; 2 to 5: the tests didn't run
                print(output)
                return (f"STAYED GREEN: {test}" if code == 0 else f"pytest exit {code}: {test}"), seconds
    finally:
        path.write_text(original)
    return "red", seconds


def main(points: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not points or any(m.point.startswith(point) for point in points)]
    tests = list(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        tree_copy(folder)
        if not loads_the_copy(folder):
            print("the copy of the package is not the one imported")
            return 1
        code, seconds, output = run_tests(folder, tests)
        if code != 0:
            print(output, f"\nthe unbroken package fails its tests (pytest exit {code})")
            return 1
        print(f"unbroken: {len(tests)} tests green in {seconds:.0f} s\n")
        survivors = 0
        for mutation in chosen:
            result, seconds = verdict(folder, mutation)
            survivors += result != "red"
            print(f"{mutation.point:6} {mutation.slip:70.70} {seconds:5.0f} s  {result}", flush=True)
    print(f"\n{len(chosen) - survivors} passed, {survivors} failed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
