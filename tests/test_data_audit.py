"""Every check with a real broken file; and whatever happens, the counts add up to the rows read."""
import io
import os
import struct
import unicodedata
import zlib
from itertools import pairwise

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import qwen2vl_sft.data.audit as audit_module
from qwen2vl_sft.data.audit import (
    NOTES,
    REASONS,
    REPAIRS,
    Audit,
    Checked,
    Limits,
    argsorted,
    assign_groups,
    connected,
    counts_of,
    decode,
    detection_power,
    forecast_html,
    in_grey,
    inspect_row,
    label_remarks,
    look_alike,
    near_components,
    note_duplicates,
    note_two_labels,
    number_duplicate_ids,
    perceptual_hash,
    quarantine_leaks,
    runs_of,
    smallest_difference,
    task_remarks,
)
from qwen2vl_sft.data.sources import Row, read_rows
from qwen2vl_sft.tasks import Task

PET = Task(name="pet", question="Which pet?", labels=["cat", "dog", "naïve fish"], aliases={"cat": ["kitten"]})
TEXT = Task(name="text", question="What does it say?", answer="text")


def noise(width=60, height=40, seed=0, channels=3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def check(content=None, label="cat", task=PET, limits=None, **fields) -> Checked:
    content = encoded(noise()) if content is None and "path" not in fields and "reason" not in fields else content
    return inspect_row(Row("x", image=content, label=label, **fields), task, "train", limits or Limits())[0]


def png_claiming(width: int, height: int) -> bytes:
    "A PNG of a few bytes whose header states any size; its data are one compressed run of zeros."
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b""))


# --- one row's image --------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_whole_files_of_each_format_are_accepted_and_cut_ones_are_truncated(format):
    content = encoded(noise(), format)
    assert check(content).verdict == "accepted"
    for share in (0.5, 0.9):
        record = check(content[: int(len(content) * share)])
        assert record.reason == "truncated", record.detail


@pytest.mark.parametrize("content", [b"<svg/>", b"%PDF-1.7", b"GIF", b"\x89PNG\r\n\x1a\n", os.urandom(999), b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_not_an_image(content):
    assert check(content).reason in ("not_an_image", "undecodable", "truncated")


def test_no_external_program_is_started_for_postscript(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n%%EOF\n"
    assert check(postscript).reason == "not_an_image"


def test_empty_missing_and_unreadable_files(tmp_path):
    (tmp_path / "empty.png").touch()
    assert check(path=str(tmp_path / "empty.png")).reason == "empty_file"
    assert check(path=str(tmp_path / "missing.png")).reason == "missing_file"
    assert check(path=str(tmp_path)).reason == "missing_file"
    assert check(path=None).reason == "no_image"
    assert check(path=str(tmp_path / ("x" * 300))).detail.endswith("can't be read (File name too long)")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    assert check(path=str(tmp_path / "pipe.png")).reason == "missing_file"
    assert check(b"").reason == "empty_file"


def test_reasons_of_readers_are_kept(tmp_path):
    (tmp_path / "t.csv").write_text("image,label\n../x.png,cat\n,cat\nhttps://x.org/a.png,cat\n")
    rows = read_rows({"format": "csv", "path": "t.csv"}, tmp_path)
    records = [inspect_row(row, PET, "train", Limits())[0] for row in rows]
    assert [record.reason for record in records] == ["outside_root", "no_image", "remote_image"]
    assert check(reason="the reader's own words").reason == "unreadable"


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (60_000, 60_000), (9000, 9000)])
def test_huge_pictures_are_never_decoded(width, height, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert check(png_claiming(width, height)).reason == "too_many_pixels"


def test_limits_can_be_set(tmp_path):
    content = encoded(noise(60, 40))
    assert check(content, limits=Limits(pixels=2400)).verdict == "accepted"
    assert check(content, limits=Limits(pixels=2399)).reason == "too_many_pixels"
    assert check(content, limits=Limits(file_bytes=100)).reason == "too_many_bytes"
    (tmp_path / "a.png").write_bytes(content)
    assert check(path=str(tmp_path / "a.png"), limits=Limits(file_bytes=100)).reason == "too_many_bytes"


@pytest.mark.parametrize(("size", "reason"), [((200, 1), None), ((201, 1), "aspect_ratio"), ((1, 201), "aspect_ratio"), ((1, 1), None)])
def test_aspect_ratio(size, reason):
    assert check(encoded(noise(*size))).reason == reason


def test_broken_contents_behind_a_good_header():
    content = bytearray(encoded(noise(), "PNG"))
    content[200:260] = bytes(60)
    assert check(bytes(content)).reason in ("undecodable", "truncated")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_unusual_modes_are_accepted(mode):
    grey = noise(channels=1)
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    record = check(encoded(image, "TIFF"))
    assert record.verdict == "accepted" and (record.width, record.height) == (60, 40)


def test_a_tiff_of_shares_of_white_is_as_bright_as_one_of_bytes():
    shares = np.linspace(0, 1, 60 * 40, dtype=np.float32).reshape(40, 60)
    expected = np.rint(shares * 255)
    for values in (shares, shares * 255, np.where(shares > 0.5, shares, np.nan)):
        picture = np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))[..., 0]
        assert (picture == np.where(np.isnan(values), 0, expected)).all()


@pytest.mark.parametrize(("picture", "blank"), [
    (Image.new("RGB", (60, 40), "white"), True), (noise(), False),
    (Image.fromarray(np.linspace(0, 4095, 40 * 60).astype(np.uint16).reshape(40, 60)), True),  # 12 bits a pixel in a file of 16
])
def test_a_picture_of_one_colour_is_noted(picture, blank):
    record = check(encoded(picture, "TIFF"))
    assert ("blank" in record.notes) == blank and record.verdict == "accepted"


def test_size_is_the_size_after_exif_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6
    record = check(encoded(noise(60, 40), "JPEG", exif=exif))
    assert (record.width, record.height) == (40, 60)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_images_never_raise(data):
    content = bytearray(encoded(noise(20, 12), data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)):
        content[place] = value
    record = check(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert record.reason in (None, *REASONS)


# --- one row's label --------------------------------------------------------------------------

@pytest.mark.parametrize(("label", "stored", "notes"), [
    ("cat", "cat", []), (" cat\n", "cat", ["label_trimmed"]), ("kitten", "cat", ["label_alias"]),
    (unicodedata.normalize("NFD", "naïve fish"), "naïve fish", ["label_unicode"]),
])
def test_labels_that_are_repaired(label, stored, notes):
    record = check(label=label)
    assert (record.label, record.notes, record.reason) == (stored, notes, None)
    assert record.detail == (f"the label was {label!r}" if notes else None)
    assert record.verdict == ("repaired" if notes else "accepted") and set(notes) <= set(REPAIRS)


@pytest.mark.parametrize(("label", "reason", "hint"), [
    (None, "empty_label", ""), ("", "empty_label", ""), ("  ", "empty_label", ""), ("Cat", "undeclared_label", "'cat'"),
    ("ｃａｔ", "undeclared_label", "'cat'"), ("dgo", "undeclared_label", "'dog'"), ("KITTEN", "undeclared_label", "'kitten'"),
    ("elephant", "undeclared_label", "not declared"), ("naïvefish", "undeclared_label", "'naïve fish'"),
])
def test_labels_that_are_not_usable(label, reason, hint):
    record = check(label=label)
    assert record.reason == reason and hint in record.detail


def test_open_tasks_accept_any_text():
    assert check(label="Tel. 0171 ✆", task=TEXT).verdict == "accepted"
    assert check(label=" ", task=TEXT).reason == "empty_label"


def test_a_row_with_a_bad_label_keeps_its_picture_for_the_page():
    record, content = inspect_row(Row("x", image=encoded(noise()), label="elephant"), PET, "train", Limits())
    assert record.reason and content and record.phash


# --- across rows ------------------------------------------------------------------------------

def records_of(*rows) -> list[Checked]:
    "Records of (id, split, label, seed of the picture)."
    return [inspect_row(Row(id, image=encoded(noise(seed=seed)), label=label), PET, split, Limits())[0] for id, split, label, seed in rows]


def test_ids_are_unique_within_a_split_and_free_across():
    records = records_of(("a", "train", "cat", 0), ("a", "train", "cat", 1), ("a#2", "train", "cat", 2), ("a", "train", "cat", 3), ("a", "test", "cat", 4))
    number_duplicate_ids(records)
    assert [record.id for record in records] == ["a", "a#2", "a#2#2", "a#3", "a"]
    assert [record.verdict for record in records] == ["accepted", "repaired", "repaired", "repaired", "accepted"]
    assert [record.detail for record in records] == [None, "the id was 'a'", "the id was 'a#2'", "the id was 'a'", None]


def test_leaks_leave_test_alone():
    records = records_of(
        ("1", "train", "cat", 0), ("2", "validation", "cat", 0), ("3", "test", "cat", 0), ("4", "train", "dog", 1),
        ("5", "validation", "dog", 1), ("6", "train", "dog", 2), ("7", "train", "dog", 2), ("8", "all", "cat", 0))
    quarantine_leaks(records)
    assert [record.reason for record in records] == [
        "also_in_test", "also_in_test", None, "also_in_validation", None, None, None, "also_in_test"]
    assert "3" in records[0].detail


def test_a_quarantined_row_of_test_leaks_nothing():
    records = records_of(("1", "train", "cat", 0), ("2", "test", "elephant", 0))
    quarantine_leaks(records)
    assert records[0].reason is None


def test_two_labels_for_one_picture_are_reported_but_not_for_two_questions():
    records = records_of(("1", "train", "cat", 0), ("2", "test", "dog", 0), ("3", "train", "cat", 1), ("4", "train", "dog", 1))
    records[2].question, records[3].question = "one?", "another?"
    note_two_labels(records)
    assert [record.notes for record in records] == [["two_labels"], ["two_labels"], [], []]
    assert "'dog'" in records[0].detail


@pytest.mark.parametrize("size", [(411, 411), (700, 391), (1411, 1411)])
def test_the_hash_is_imagehashs_whatever_the_size(size):
    differing = lambda one, other: (int(one, 16) ^ int(other, 16)).bit_count()
    for seed in range(3):
        picture = noise(32, 24, seed).resize(size, Image.Resampling.BICUBIC)
        found = perceptual_hash(in_grey(picture))
        assert differing(found, str(imagehash.phash(picture, hash_size=16))) <= 6
        for scale in (0.5, 0.6, 1.3):
            copy = picture.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS)
            assert differing(found, perceptual_hash(in_grey(copy))) <= 6


def test_groups_hold_recompressed_and_resized_copies_only():
    face = Image.new("RGB", (120, 120), "white")
    pen = ImageDraw.Draw(face)
    pen.ellipse((10, 10, 110, 110), fill="peachpuff")
    pen.ellipse((35, 40, 50, 55), fill="black")
    pen.arc((35, 60, 85, 95), 0, 180, fill="black", width=5)
    copies = [encoded(face), encoded(face, "JPEG", quality=60), encoded(face.resize((80, 80)), "PNG"), encoded(face.convert("L"), "WEBP")]
    others = [encoded(noise(seed=seed)) for seed in range(3)]
    records = [check(content) for content in copies + others]
    assign_groups(records, Limits())
    assert len({record.group for record in records[:4]}) == 1 and len({record.group for record in records}) == 4
    assert records[0].group == min(record.sha256 for record in records[:4])[:16]
    before = [record.group for record in records]
    assign_groups(records[::-1], Limits())
    assert before == [record.group for record in records]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 60))
def test_components_equal_those_of_comparing_all(seed, most, count):
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2, (4, 256), dtype=np.uint8)
    bits = centres[rng.integers(0, 4, count)] ^ (rng.random((count, 256)) < rng.random() * 0.12)
    brute = {(i, j) for i in range(count) for j in range(i + 1, count) if (bits[i] != bits[j]).sum() <= most}
    expected, found = connected(count, np.array(sorted(brute))), near_components(np.packbits(bits.astype(np.uint8), axis=1), most)
    assert ((found[:, None] == found) == (expected[:, None] == expected)).all()
    assert all(expected[i] == expected[j] for i, j in brute)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.integers(1, 40), st.sampled_from([np.int16, np.uint16, np.int32, np.int64, np.uint64]), st.integers(0, 64))
def test_an_order_over_many_buckets_is_that_of_numpy(seed, count, bucket, kind, most):
    rng, limits = np.random.default_rng(seed), np.iinfo(kind)
    both = [rng.integers(max(limits.min, -most), min(limits.max, most), count, kind, endpoint=True), rng.integers(limits.min, limits.max, count, kind, endpoint=True)]
    for columns in ([both[0]], [both[1]], both, both[::-1]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(audit_module, "BUCKET", bucket)
            order = argsorted(columns)
            runs = [(part.start + low, part.start + high) for part, ends in runs_of(columns[-1], order) for low, high in pairwise(ends)]
            assert all(part.stop - part.start <= bucket or len(ends) == 2 for part, ends in runs_of(columns[-1], order))
        assert order.tolist() == np.lexsort(columns).tolist()
        values = columns[-1][order]
        assert [low for low, _ in runs] + [count] == [0, *(high for _, high in runs)]
        assert all(len(set(values[low:high].tolist())) == 1 for low, high in runs) and len(runs) == len(set(values.tolist()))


@pytest.mark.parametrize("bucket", [30, 700])
def test_components_in_files_are_those_in_memory(monkeypatch, bucket):
    "Copies, near ones, a chain, and unlike ones that share bands, some in more than a bucket."
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2, (1500, 256), dtype=np.uint8)
    bits[:800, :40] = 1
    bits[:300] = bits[0]
    bits[np.arange(300), rng.integers(0, 256, 300)] ^= 1
    bits[900:1150] = 1 - np.tri(250, 256, dtype=np.uint8)
    hashes = np.packbits(bits, axis=1)[rng.permutation(1500)]
    expected = near_components(hashes, 16)
    for name, value in (("BUCKET", bucket), ("ROUNDS", 2), ("COMPARISONS", 2000)):
        monkeypatch.setattr(audit_module, name, value)
    assert (near_components(hashes, 16) == expected).all() and 900 < len(set(expected.tolist())) < 1000


def test_large_buckets_take_bounded_time_and_memory_and_lose_nothing():
    import time
    import tracemalloc

    rng = np.random.default_rng(0)
    dense = np.zeros((4000, 256), np.uint8)
    dense[np.arange(4000), rng.integers(0, 256, 4000)] ^= 1  # all near each other, most bands equal
    chain = 1 - np.tri(257, 256, dtype=np.uint8)[1:]  # each near the next few, the ends far apart
    loose = np.concatenate([np.ones((400, 20), np.uint8), rng.integers(0, 2, (400, 236), dtype=np.uint8)], 1)  # one band equal, far apart
    tracemalloc.start()
    start = time.perf_counter()
    component = near_components(np.packbits(np.concatenate([dense, loose, chain])[:-20], axis=1), 16)  # the chain's end would meet `dense`
    assert time.perf_counter() - start < 15 and tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    assert len(set(component[:4000])) == 1 and len(set(component[4400:])) == 1 and len(set(component)) == 402


@pytest.mark.parametrize(("most", "vary", "limits"), [(16, 240, (32, 1_000_000)), (16, 240, (1, 1)), (16, 60, (1, 1)), (5, 60, (2, 200)), (1, 60, (1, 1))])
def test_unlike_hashes_that_share_a_band_are_divided_again_and_nothing_is_lost(monkeypatch, most, vary, limits):
    "Against comparing all. What is near shares that band only, in chains of three, and the search gives up early."
    monkeypatch.setattr(audit_module, "ROUNDS", limits[0])
    monkeypatch.setattr(audit_module, "COMPARISONS", limits[1])
    rng = np.random.default_rng(most)
    bits = rng.integers(0, 2, (330, 256), dtype=np.uint8)  # the last 30 let all bits vary
    first, *others = np.array_split(np.arange(256), most + 1)
    bits[:300, : len(first)] = 0
    bits[:300, len(first) : 256 - vary] = 0
    for at in range(0, 90, 3):
        bits[at + 1], bits[at + 2] = bits[at], bits[at]
        bits[at + 1 : at + 3, [band[0] for band in others]] ^= 1
        bits[at + 2, [band[1] for band in others]] ^= 1
    brute = np.argwhere((bits[:, None] != bits).sum(2) <= most)
    expected, found = connected(330, brute), near_components(np.packbits(bits, axis=1), most)
    assert ((found[:, None] == found) == (expected[:, None] == expected)).all() and len(set(expected)) <= 330 - 60


def test_a_bucket_of_many_unlike_hashes_takes_seconds():
    import time

    hashes = np.random.default_rng(0).integers(0, 256, (20_000, 32), dtype=np.uint8)
    hashes[:19_900, :4] = 255  # one band and more of another are equal
    hashes[10_000] = hashes[5]
    hashes[10_000, 31] ^= 7
    start = time.perf_counter()
    component = near_components(hashes, 16)
    assert time.perf_counter() - start < 8  # comparing all pairs took 16 s
    assert len(set(component)) == 19_999 and component[10_000] == component[5]


def test_twenty_thousand_hashes_take_seconds():
    import time

    bits = np.random.default_rng(0).integers(0, 2, (20_000, 256), dtype=np.uint8)
    start = time.perf_counter()
    assert len(set(near_components(np.packbits(bits, axis=1), 16))) == 20_000
    assert time.perf_counter() - start < 20


def test_duplicates_and_shared_sources_are_noted():
    records = records_of(("1", "train", "cat", 0), ("2", "train", "cat", 0), ("3", "train", "cat", 1), ("4", "test", "dog", 2))
    for record in records[2:]:
        record.source = "clip"
    assign_groups(records, Limits())
    note_duplicates(records)
    assert [record.notes for record in records] == [["exact_duplicate"], ["exact_duplicate"], ["shared_source"], ["shared_source"]]
    assert all(record.verdict == "accepted" for record in records)


def test_near_copies_within_a_split_name_one_another():
    face = noise(seed=3).resize((120, 120))
    contents = [encoded(face), encoded(face, "JPEG", quality=85), encoded(face), encoded(noise(seed=4))]
    records = [inspect_row(Row(str(i), image=content, label="cat"), PET, "train", Limits())[0] for i, content in enumerate(contents)]
    assign_groups(records, Limits())
    note_duplicates(records)
    assert [record.notes for record in records] == [["exact_duplicate", "near_copy"], ["near_copy"], ["exact_duplicate", "near_copy"], []]
    assert records[0].detail == f"group {records[0].group} of 2 pictures, such as 1 (1)" and "such as 0 (0)" in records[1].detail
    assert counts_of(records)["notes"] == {"near_copy": 3, "exact_duplicate": 2}


# --- the report -------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["train", "validation", "test", "all"]), st.sampled_from(["cat", "dog", "Cat", "", " kitten", None]), st.integers(-2, 3)), max_size=12))
def test_counts_always_add_up(rows):
    contents = {seed: encoded(noise(seed=seed)) for seed in range(4)} | {-1: b"no image", -2: b""}
    records = [inspect_row(Row("x", image=contents[seed], label=label), PET, split, Limits())[0] for split, label, seed in rows]
    number_duplicate_ids(records)
    note_two_labels(records)
    quarantine_leaks(records)
    assign_groups(records, Limits())
    note_duplicates(records)
    counts = counts_of(records)
    assert counts["accepted"] + counts["repaired"] + counts["quarantined"] == counts["rows_read"] == len(rows)
    assert sum(counts["reasons"].values()) == counts["quarantined"]
    assert set(counts["reasons"]) <= set(REASONS) and set(counts["notes"]) <= set(NOTES)
    kept = {record.sha256 for record in records if not record.reason and record.split == "test"}
    assert not kept & {record.sha256 for record in records if not record.reason and record.split != "test"}
    assert Audit("s", records).page()


def test_the_page_escapes_all_text_and_needs_nothing_outside():
    evil = '<script>alert("x")</script>'
    record = check(label=evil)
    record.id = record.where = record.task = evil
    page = Audit(evil, [record, check()], remarks={evil: [evil]}).page()
    assert "<script" not in page and "http://" not in page and "https://" not in page
    assert "undeclared_label" in page


def test_codes_mean_one_thing():
    assert len({*REASONS, *NOTES, *REPAIRS}) == len(REASONS) + len(NOTES) + len(REPAIRS)


def test_decode_gives_upright_rgb():
    assert decode(encoded(noise().convert("CMYK"), "JPEG")).mode == "RGB"


# --- look-alikes, small tests, the forecast -----------------------------------------------------

@pytest.mark.parametrize("label", ["\u0441at", "c\u0430t", "\uff43\uff41\uff54", "ca\u200bt", "\U0001d41cat", "C\u0391T", "\u00adcat", "c a t"])
def test_unicode_confusables_are_quarantined_with_a_suggestion(label):
    record = check(label=label)
    assert record.reason == "undeclared_label" and "Did you mean 'cat'?" in record.detail
    assert ("It contains U+" in record.detail) == (not label.isascii())


def test_different_words_do_not_look_alike():
    words = ["cat", "dog", "违规", "正常", "éclair", "eclair", "yes", "no", "🐈", *"abcdefghijkmnopqrstuvwxyz", *(f"t{i}" for i in range(200))]
    assert [(a, b) for i, a in enumerate(words) for b in words[:i] if look_alike(a, b)] == []


def test_classes_are_those_of_the_standard():
    "Examples of UTS #39: paypal with Cyrillic letters, scope in Cyrillic, the digit and the letter."
    for pair in (("dog", "d0g"), ("co", "c0"), ("DOG", "D0G"), ("paypal", "\u0440\u0430ypal"), ("scope", "\u0455\u0441\u043e\u0440\u0435"), ("0", "O"), ("1", "l"), ("rn", "m"), ("I", "l")):
        assert look_alike(*pair), pair


def test_declared_labels_that_look_alike_or_begin_alike_are_remarked():
    task = Task(name="t", question="Which?", labels=["phone", "phone number", "\u0440hone"])
    look, begin = label_remarks(task)
    assert "'phone' and '\u0440hone' look alike" in look and "'phone' of 'phone number'" in begin
    assert label_remarks(PET) == [] and label_remarks(TEXT) == []


def test_without_a_tokenizer_labels_are_still_audited(monkeypatch):
    monkeypatch.setattr("qwen2vl_sft.data.audit.small_plan", lambda: None)
    assert label_remarks(Task(name="t", question="Which?", labels=["phone", "phone number"])) == []


@pytest.mark.parametrize("rows", [30, 100, 400])
def test_the_smallest_difference_is_found_four_times_in_five(rows):
    from statsmodels.stats.contingency_tables import mcnemar

    rng, difference = np.random.default_rng(0), smallest_difference(rows) / 100
    share = max(0.2, difference)
    found = 0
    for _ in range(600):
        better, worse, _ = rng.multinomial(rows, [(share + difference) / 2, (share - difference) / 2, 1 - share])
        found += mcnemar([[0, better], [worse, 0]], exact=True).pvalue <= 0.05
    assert 0.75 < found / 600 < 0.88


def test_tiny_tests_can_show_nothing_and_power_is_no_more_than_the_level_without_a_difference():
    assert smallest_difference(0) is None and smallest_difference(5) is None and smallest_difference(7) is not None
    assert detection_power(200, 0.0) <= 0.05
    assert smallest_difference(50_000) < 1


def test_an_imbalance_is_remarked_and_counted():
    records = [Checked("pet", "train", str(i), "", label="cat" if i else "dog", sha256=str(i), group=str(i)) for i in range(12)]
    assert any("11 rows of 'cat' and 1 of 'dog'" in remark for remark in task_remarks(PET, records))
    report = Audit("s", records).to_json()["tasks"]["pet"]
    assert report["splits"]["train"]["imbalance"] == 11 and report["splits"]["test"]["imbalance"] == 1
    assert report["smallest_difference"] is None


def test_what_a_reader_changed_is_a_repair_and_unknown_codes_are_ignored():
    record = check(notes=("placeholder_moved: it stood within", "of_ones_own: x"))
    assert record.notes == ["placeholder_moved"] and record.verdict == "repaired" and "it stood within" in record.detail


def test_every_reason_of_the_readers_has_a_meaning(root):
    import re

    text = (root / "qwen2vl_sft" / "data" / "sources.py").read_text()
    codes = set(re.findall(r'"([a-z]+_[a-z_]+): ', text))
    assert len(codes) > 15 and codes <= {*REASONS, *REPAIRS, *NOTES}, codes - {*REASONS, *REPAIRS, *NOTES}


def test_the_report_forecasts_lengths_and_draws_them():
    audit = Audit("s", [check(), check(label="elephant")])
    report = audit.to_json()
    assert report["forecast"]["small"]["tokens"]["max"] > 10 and report["forecast"]["small"]["too_long"] == 0
    assert sum(rows for *_, rows in report["forecast"]["small"]["histogram"]) == 1  # quarantined rows don't train
    assert "<svg" in audit.page() and "Forecast" in audit._repr_html_() and "forecast (estimates)" in audit.summary()
    assert report["forecast"]["Qwen/Qwen2-VL-7B-Instruct"]["gigabytes"]["qlora"] < 20
    assert Audit("s", [check(label="elephant")]).to_json()["forecast"] == {}


def test_each_model_of_the_forecast_has_its_own_sentence():
    report = Audit("s", [check()]).to_json()
    for block, (name, plan) in zip(forecast_html(report).split("<details>")[1:], report["forecast"].items(), strict=True):
        assert f"{name}, at most {plan['max_pixels']:,} pixels" in block
        assert not any(f"{other}, at most" in block for other in report["forecast"] if other != name)


def test_why_nothing_is_left_for_test_is_said():
    said = lambda count, group, source: " ".join(task_remarks(PET, [Checked("pet", "train", str(i), "", label="cat", group=group(i), source=source(i)) for i in range(count)]))
    assert "its 80 rows are one group of nearly equal pictures" in said(80, lambda i: "g", lambda i: "g")
    assert "few independent sources (flickr, google, own)" in said(80, str, lambda i: ["flickr", "google", "own"][i % 3])
    assert "stays in one split" not in said(80, str, str) + said(2, lambda i: "g", lambda i: "g")


def test_tables_in_the_terminal_line_up_with_chinese_names():
    "By wcwidth, which asks Unicode's tables itself."
    wcwidth = pytest.importorskip("wcwidth")
    records = [Checked(task, "train", str(i), "", label="cat", sha256=str(i), group=str(i), width=56, height=56) for i, task in enumerate(("违规图片分类", "t\x1b[31m", "long name"))]
    audit = Audit("s", records)
    audit.forecast = {"模型/大": audit.to_json()["forecast"]["small"], "b": audit.forecast["small"]}
    lines = audit.summary().splitlines()
    assert not any("\x1b" in line for line in lines)
    tasks = [line for line in lines if " 0 / 0" in line]
    assert len(tasks) == 3 and len({wcwidth.wcswidth(line[: line.index(" 1 ")]) for line in tasks}) == 1
    table = lines[lines.index(next(line for line in lines if "forecast (" in line)) :][:3]
    assert len({wcwidth.wcswidth(line) for line in table}) == 1 and "大" in table[1]


def test_control_tokens_in_labels_and_questions_are_quarantined():
    assert check(label="12<|im_end|>34", task=TEXT).reason == "special_token"
    assert check(label="a <b> |c|", task=TEXT).verdict == "accepted"
    asked = check(question="<|image_pad|> Which pet?")
    assert (asked.reason, asked.detail) == ("special_token", "the question holds <|image_pad|>")
