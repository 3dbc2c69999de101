"""The compiled resize gives Pillow's bytes at every size, or is not used."""
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from qwen2vl_sft.encoding import resize as module
from qwen2vl_sft.encoding.images import ImageEncoder, header_size
from qwen2vl_sft.encoding.resize import fast_squares, kernels, resized_squares

IMAGES = ImageEncoder(patch=14, merge=2, temporal=2, min_pixels=3136, max_pixels=756 * 756, mean=(0.5,) * 3, std=(0.5,) * 3, resample=3)


@pytest.fixture(autouse=True, scope="module")
def from_the_first_picture_on():
    "Compiled at once, not only where many pictures make it worth while."
    before, module.WORTH = module.WORTH, 0
    yield
    module.WORTH = before


def test_a_few_pictures_are_not_worth_compiling(monkeypatch):
    "Nor importing numba: Pillow resizes them."
    asked = []
    monkeypatch.setattr(module, "kernels", lambda: asked.append(1))
    monkeypatch.setattr(module, "WORTH", 3)
    monkeypatch.setattr(module, "SO_FAR", iter(range(10)))
    image = picture(700, 500, 1, "noise")
    for _ in range(5):
        assert (as_picture(resized_squares(image, 560, 392, 14, 2)) == pillow(image, 560, 392)).all()
    assert len(asked) == 2


def picture(width: int, height: int, seed: int, kind: str) -> Image.Image:
    "Noise, hard edges of black and white, or one colour."
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    values = {"noise": values, "edges": (values > 127).astype(np.uint8) * 255, "flat": np.full_like(values, values[0, 0])}[kind]
    return Image.fromarray(values)


def pillow(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def as_picture(squares: np.ndarray) -> np.ndarray:
    "[rows, columns, merge, merge, 3, patch, patch] back to [height, width, 3]."
    rows, columns, merge, _, _, patch, _ = squares.shape
    return squares.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * merge * patch, columns * merge * patch, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9), st.sampled_from(["noise", "edges", "flat"]))
def test_every_size_gives_the_bytes_of_pillow_however_often_it_comes(width, height, columns, rows, seed, kind):
    image = picture(width, height, seed, kind)
    expected = pillow(image, 28 * columns, 28 * rows)
    least, module.LARGE = module.LARGE, 0
    try:
        for _ in range(3):
            assert (as_picture(resized_squares(image, 28 * columns, 28 * rows, 14, 2)) == expected).all()
    finally:
        module.LARGE = least


def test_a_picture_of_the_wanted_size_is_only_arranged():
    image = picture(560, 588, 0, "noise")
    assert (as_picture(resized_squares(image, 560, 588, 14, 2)) == pillow(image, 560, 588)).all() and (560, 588, 560, 588) not in module.CAME


@pytest.mark.parametrize("size", [(1024, 768), (640, 480), (1920, 1080), (3000, 4000)])
def test_photographs_take_the_fast_way(size):
    pytest.importorskip("numba")
    image = picture(*size, 0, "edges")
    new = IMAGES.size(*size)
    for _ in range(2):
        found = resized_squares(image, *new, 14, 2)
    order = module.ROWS_FIRST[(*size, *new)]
    assert order is not None and (as_picture(found) == pillow(image, *new)).all()
    assert (fast_squares(image, *new, 14, 2, order) == found).all()


def test_an_order_that_differs_from_pillow_is_not_used(monkeypatch):
    pytest.importorskip("numba")
    image, new = picture(1024, 768, 0, "noise"), (868, 56)
    expected, orders = pillow(image, *new), {order: as_picture(fast_squares(image, *new, 14, 2, order)) for order in (True, False)}
    assert (orders[True] != orders[False]).any() and any((found == expected).all() for found in orders.values())
    for _ in range(3):
        assert (as_picture(resized_squares(image, *new, 14, 2)) == expected).all()
    monkeypatch.setattr(module, "ROWS_FIRST", {})
    monkeypatch.setattr(module, "fast_squares", lambda image, width, height, *_: np.zeros((height // 28, width // 28, 2, 2, 3, 14, 14), np.uint8))
    assert (as_picture(resized_squares(image, *new, 14, 2)) == expected).all() and module.ROWS_FIRST == {(1024, 768, 868, 56): None}


def test_without_numba_pillow_does_it(monkeypatch):
    monkeypatch.setattr(module, "kernels", lambda: None)
    image = picture(700, 500, 1, "noise")
    for _ in range(3):
        assert (as_picture(resized_squares(image, 560, 392, 14, 2)) == pillow(image, 560, 392)).all()
    assert kernels() is None or callable(kernels().along_rows)


@pytest.mark.parametrize(("patch", "merge"), [(14, 1), (7, 2), (8, 3)])
def test_other_patches(patch, merge):
    side = patch * merge
    image = picture(650, 470, 2, "noise")
    for _ in range(2):
        found = resized_squares(image, 20 * side, 14 * side, patch, merge)
    assert found.shape == (14, 20, merge, merge, 3, patch, patch) and (as_picture(found) == pillow(image, 20 * side, 14 * side)).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_token_counts_decode_nothing(monkeypatch, format):
    buffer = io.BytesIO()
    picture(640, 480, 0, "flat").save(buffer, format)

    def fail(*_):
        raise AssertionError("the picture was decoded")

    for kind in (ImageFile.ImageFile, type(Image.open(buffer))):
        monkeypatch.setattr(kind, "load", fail)
    assert header_size(buffer.getvalue()) == (640, 480) and IMAGES.tokens(640, 480) == 17 * 23
