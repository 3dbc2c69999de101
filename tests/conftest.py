"""Settings for every test: one thread a process, no hub, and a loud list of what was skipped and why."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a shell: what the tests start would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name, value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)
os.environ.pop("QWEN2VL_SFT_ROOT", None)

from collections import Counter  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return ROOT


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    "An empty project folder: `runs/` and `prepared/` land in it."
    monkeypatch.setenv("QWEN2VL_SFT_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def score_batch_fitting(monkeypatch):
    "Makes a module's `score_batch` fail for more than `most[0]` samples, with the CPU allocator's own error; gives the sizes that were tried, and `most`."
    import torch

    def limit(module, most: int) -> tuple[list[int], list[int]]:
        real, sizes, limits = module.score_batch, [], [most]

        def tight(model, scorer, data, places, *rest):
            sizes.append(len(places))
            if len(places) > limits[0]:
                torch.empty(2**60, dtype=torch.uint8)
            return real(model, scorer, data, places, *rest)

        monkeypatch.setattr(module, "score_batch", tight)
        return sizes, limits

    return limit


def pytest_collection_modifyitems(items):
    "The slow ones come first, so that two workers end together; those that need a GPU say so when there is none."
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="lacks a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    "Skipped tests prove nothing: say how many there were and what they lacked."
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter()
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    terminalreporter.section(f"{len(skipped)} TESTS DID NOT RUN", sep="!", yellow=True, bold=True)
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4d} x {reason}", yellow=True)
