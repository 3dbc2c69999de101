"""The pixel cache: the same pixels as without it, whatever happens to its files, and never above its limit."""
import errno
import io
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from qwen2vl_sft.core import InputError, sha256_of
from qwen2vl_sft.data import pixels as module
from qwen2vl_sft.data.pixels import PixelCache, checksum, from_file, to_file
from qwen2vl_sft.encoding.images import ImageEncoder, open_image

IMAGES = ImageEncoder(patch=14, merge=2, temporal=2, min_pixels=3136, max_pixels=200_000, mean=(0.5,) * 3, std=(0.5,) * 3, resample=3)


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path):
    return PixelCache(tmp_path / "cache", IMAGES)


def fail() -> bytes:
    raise AssertionError("decoded though it was stored")


def test_equal_to_decoding_for_many_pictures(cache):
    contents = {sha256_of(content): content for content in map(picture, range(30))}
    for _ in range(2):
        for name, content in contents.items():
            stored = cache.get(name) is not None
            found = cache.pixels(name, fail if stored else lambda content=content: content)
            expected = IMAGES.squares(open_image(content))
            assert found.dtype == np.uint8 and found.shape == expected.shape and (found == expected).all()
    assert found.flags.writeable  # torch.from_numpy takes it without a warning
    assert cache.used() == sum(path.stat().st_size for path in cache.folder.rglob("??/*"))


@pytest.mark.parametrize("harm", ["cut", "empty", "zeroed", "flipped", "header", "longer"])
def test_a_damaged_file_is_decoded_again(cache, harm):
    content = picture(0)
    expected = cache.pixels("aa00", lambda: content)
    path = cache.path("aa00")
    stored = bytearray(path.read_bytes())
    path.write_bytes({
        "cut": stored[:-1], "empty": b"", "zeroed": stored[:100] + bytes(len(stored) - 100), "header": stored[:10], "longer": stored + b"x",
        "flipped": stored[:500] + bytes([stored[500] ^ 1]) + stored[501:]}[harm])
    assert cache.get("aa00") is None
    assert (cache.pixels("aa00", lambda: content) == expected).all()
    assert (cache.pixels("aa00", fail) == expected).all()


def test_other_sizes_are_other_entries(tmp_path, cache):
    content = picture(1)
    cache.pixels("bb", lambda: content)
    smaller = PixelCache(tmp_path / "cache", ImageEncoder(**(vars(IMAGES) | {"min_pixels": 784, "max_pixels": 784})))
    assert smaller.get("bb") is None and smaller.pixels("bb", lambda: content).size < cache.get("bb").size
    normalised = PixelCache(tmp_path / "cache", ImageEncoder(**(vars(IMAGES) | {"mean": (0.1,) * 3})))
    assert normalised.get("bb") is not None  # pixels come before the normalisation


def test_the_limit_holds_and_older_sizes_make_room(tmp_path):
    size = 24 + 56 * 56 * 3
    square = np.zeros((2, 2, 2, 2, 3, 14, 14), np.uint8)
    cache = PixelCache(tmp_path, IMAGES, limit_gb=3.5 * size / 1e9)
    assert [cache.put(f"a{i}", square) for i in range(5)] == [True] * 3 + [False] * 2
    assert cache.get("a0") is not None and cache.get("a3") is None
    full = PixelCache(tmp_path, IMAGES, limit_gb=3.1 * size / 1e9)
    assert full.used() == 3 * size and full.get("a0") is not None  # its own entries stay
    other = PixelCache(tmp_path, ImageEncoder(**(vars(IMAGES) | {"max_pixels": 3136})), limit_gb=3.1 * size / 1e9)
    assert other.used() == 0 and other.put("b0", square) and cache.get("a0") is None


def test_it_may_be_deleted_at_any_time(cache):
    content = picture(2)
    cache.pixels("cc", lambda: content)
    shutil.rmtree(cache.top)
    assert cache.get("cc") is None
    assert (cache.pixels("cc", lambda: content) == IMAGES.squares(open_image(content))).all()
    assert cache.get("cc") is not None
    (cache.top / "used").write_text("nonsense")
    assert PixelCache(cache.top, IMAGES).used() == cache.path("cc").stat().st_size


def test_a_full_disk_only_costs_time(cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "to_file", full)
    content = picture(3)
    assert (cache.pixels("dd", lambda: content) == IMAGES.squares(open_image(content))).all() and cache.get("dd") is None


def test_an_unreadable_picture_is_named(cache):
    with pytest.raises(InputError, match="task/row 7: not a readable image"):
        cache.pixels("ee", lambda: b"\x89PNG", "task/row 7")


def write_for_ever(folder, seed):
    cache = PixelCache(folder, IMAGES, limit_gb=0.02)
    for i in np.random.default_rng(seed).integers(0, 40, 100_000).tolist():
        cache.pixels(f"{i:02}", lambda i=i: picture(i))


def test_kill_9_of_two_writers_leaves_whole_files_only(tmp_path):
    context = multiprocessing.get_context("fork")
    for seed in range(4):
        writers = [context.Process(target=write_for_ever, args=(tmp_path, seed + part)) for part in (0, 100)]
        for writer in writers:
            writer.start()
        time.sleep(np.random.default_rng(seed).uniform(0.05, 0.4))
        for writer in writers:
            writer.kill()
            writer.join()
            assert writer.exitcode == -signal.SIGKILL
    cache = PixelCache(tmp_path, IMAGES, limit_gb=0.02)
    found = [path for path in cache.folder.rglob("??/*") if not path.name.endswith(".part")]
    assert found
    for path in found:
        assert (from_file(path) == IMAGES.squares(open_image(picture(int(path.name))))).all()
    (cache.top / "used").unlink()
    PixelCache(tmp_path, IMAGES)
    assert not list(cache.top.rglob("*.part"))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 3, 1, 1), (1, 1, 2, 2, 3, 14, 14), (5, 7, 1, 1, 3, 3, 3)])
def test_any_shape(tmp_path, shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    to_file(tmp_path / "x", values)
    assert (from_file(tmp_path / "x") == values).all() and checksum(values) != checksum(values ^ 1)
    assert os.listdir(tmp_path) == ["x"]
