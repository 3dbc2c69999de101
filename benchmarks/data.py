"""Images a second, from a JPEG on disk to model input: stock image processor, our path cold and cached, headers, prepare.

    python benchmarks/data.py                  2,000 pictures of 1024 x 768, about ten minutes
    python benchmarks/data.py --pictures 100   fewer

Every rate is of one thread on one core, except `prepare` with its workers (its rate per core is reported too). The
contenders take turns within a round, on the same pictures, so that a slow moment of the machine meets them all.
The pixels of all paths are compared before anything is timed. "ours" ends with what our tower is given: normalised
float32 patches as the stock processor's, but a picture's frame once (the patch embedding adds up the weights of the two
equal frames); "both frames" ends with just what the stock processor ends with; "to uint8" with the bytes that a
decoding worker hands on where the device normalises.
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image, __version__ as pillow
from transformers import __version__ as transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen2vl_sft.data.pixels import PixelCache
from qwen2vl_sft.data.prepare import prepare
from qwen2vl_sft.encoding.images import header_size, image_encoder, open_image
from qwen2vl_sft.tasks import Suite, Task

SIZE, MAX_PIXELS = (1024, 768), 756 * 756
TARGETS = {  # contender: (times, of what)
    "ours, cold": (3, "stock processor"), "ours, from the pixel cache": (10, "stock processor"),
    "token counts from headers": (50, "stock processor"), "prepare with audit": (0.5, "decode (PIL)")}


def draw(path: Path, seed: int) -> None:
    "A photograph-like JPEG of about 200 kB: soft shapes and some grain."
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = rng.integers(-8, 9, (SIZE[1], SIZE[0], 1), dtype=np.int16)
    Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)


def paths_to_model_input(folder: Path) -> tuple[dict[str, Callable[[Path], object]], PixelCache]:
    "Each contender as a function of one file."
    stock = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=MAX_PIXELS)
    images = image_encoder(stock)
    cache = PixelCache(folder / "pixels", images, limit_gb=20)
    pixels = lambda path: images.squares(open_image(path.read_bytes()))
    cached = lambda path: cache.get(path.stem)
    return {
        "decode (PIL)": lambda path: Image.open(path).load(),
        "stock processor": lambda path: stock(images=[Image.open(path)], return_tensors="pt")["pixel_values"],
        "ours, cold": lambda path: images.patches([pixels(path)], frames=1)[0],
        "ours, cold, both frames": lambda path: images.patches([pixels(path)])[0],
        "ours, cold, to uint8": pixels,
        "ours, from the pixel cache": lambda path: images.patches([cached(path)], frames=1)[0],
        "ours, from the pixel cache, both frames": lambda path: images.patches([cached(path)])[0],
        "ours, from the pixel cache, to uint8": cached,
        "token counts from headers": lambda path: images.tokens(*header_size(path.read_bytes())),
    }, cache


def check(contenders: dict, cache: PixelCache, files: list[Path]) -> float:
    "Fill the cache, and compare all paths with the stock processor; returns the largest difference."
    largest = 0.0
    for path in files:
        cache.put(path.stem, contenders["ours, cold, to uint8"](path))
    for path in files[:10]:
        expected = contenders["stock processor"](path)
        for name in ("ours, cold", "ours, from the pixel cache"):  # twice: the second time of a size is compiled
            contenders[name](path)
            frames = contenders[name](path).view(len(expected), 3, 1, -1)
            largest = max(largest, float((frames - expected.view(len(expected), 3, 2, -1)).abs().max()))
            assert (contenders[f"{name}, both frames"](path).view(len(expected), 3, 2, -1) == frames).all()
        assert contenders["token counts from headers"](path) * 4 == len(expected)
    assert largest < 1e-5, f"the paths differ by {largest}"
    return largest


def prepare_rate(files: list[Path], workers: int) -> float:
    "Rows a second of a whole prepare with audit, in an empty folder."
    folder = Path(tempfile.mkdtemp(dir=files[0].parent.parent))
    rows = "".join(f"{path},{'ab'[i % 2]}\n" for i, path in enumerate(files))
    (folder / "all.csv").write_text("image,label\n" + rows)
    source = {"format": "csv", "path": "all.csv", "root": str(files[0].parent)}
    suite = Suite(name="bench", folder=folder, tasks=[Task(name="t", question="?", labels=["a", "b"], sources={"all": source})])
    began = time.perf_counter()
    prepared = prepare(suite, folder / "out", workers=workers)
    seconds = time.perf_counter() - began
    assert prepared.audit["rows_read"] == prepared.audit["accepted"] == len(files)
    shutil.rmtree(folder)
    return len(files) / seconds


def measure(contenders: dict, files: list[Path], rounds: int, workers: int) -> dict[str, list[float]]:
    "Rates a round; each contender takes the round's pictures in turn, in another order each round."
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    rates |= {"prepare with audit": [], f"prepare with audit, {workers} workers": []}
    share = max(1, len(files) // rounds)
    for number in range(rounds):
        mine = files[number * share : (number + 1) * share]
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            for path in mine:
                contenders[name](path)
            rates[name].append(len(mine) / (time.perf_counter() - began))
        rates["prepare with audit"].append(prepare_rate(mine, 0))
    for _ in range(2):
        rates[f"prepare with audit, {workers} workers"].append(prepare_rate(files, workers))
    return rates


def report(rates: dict[str, list[float]]) -> dict:
    "Median, spread, ratios and whether the targets are met."
    median = {name: statistics.median(values) for name, values in rates.items()}
    table = {name: {"images_per_second": round(median[name], 2), "lowest": round(min(values), 2), "highest": round(max(values), 2),
                    "times_stock": round(median[name] / median["stock processor"], 2),
                    "times_decode": round(median[name] / median["decode (PIL)"], 3)} for name, values in rates.items()}
    targets = {name: {"target": f"{times} x {other}", "measured": round(median[name] / median[other], 2),
                      "met": median[name] >= times * median[other]} for name, (times, other) in TARGETS.items()}
    return {"rates": table, "targets": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the last prepare")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    (folder / "pictures").mkdir()
    files = [folder / "pictures" / f"{number:08x}.jpg" for number in range(options.pictures)]
    try:
        with ProcessPoolExecutor(options.workers) as pool:
            list(pool.map(draw, files, range(len(files)), chunksize=20))
        contenders, cache = paths_to_model_input(folder)
        largest = check(contenders, cache, files)
        prepare_rate(files[:4], 0)  # imports
        result = report(measure(contenders, files, options.rounds, options.workers))
        setup = {"pictures": len(files), "size": SIZE, "max_pixels": MAX_PIXELS, "mean_bytes": sum(f.stat().st_size for f in files) // len(files),
                 "rounds": options.rounds, "largest_difference_to_stock": largest, "load_average": os.getloadavg()[0],
                 "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
                 "torch": torch.__version__, "transformers": transformers, "pillow": pillow}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"setup": setup, **result}, indent=1) + "\n")
    for name, row in result["rates"].items():
        print(f"{name:40} {row['images_per_second']:9.1f}/s  ({row['lowest']:.1f} to {row['highest']:.1f})  {row['times_stock']:8.2f} x stock")
    for name, row in result["targets"].items():
        print(f"{'met   ' if row['met'] else 'MISSED'} {name}: {row['measured']} ({row['target']})")


if __name__ == "__main__":
    main()
