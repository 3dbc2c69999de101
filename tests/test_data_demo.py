"""The demo suite: sources that share nothing between splits or with pretraining, the same bytes every time."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlxtend", reason="extra `demo` is not installed: pip install -e .[demo]")

from qwen2vl_sft.core import InputError, project_root, sha256_of
from qwen2vl_sft.data import demo, pretraining
from qwen2vl_sft.data.demo import DEMO_TASKS, SPLITS, source_parts
from qwen2vl_sft.data.sources import reader_of
from qwen2vl_sft.tasks import load_suite

LESSONS = 3000


@pytest.fixture(scope="module")
def rows():
    return {(task, split): list(demo.read_demo({"task": task, "split": split})) for task in DEMO_TASKS for split in SPLITS}


@pytest.fixture(scope="module")
def suite_sources(rows):
    return {part for found in rows.values() for row in found for part in source_parts(row.source)}


def pixels_hash(image):
    "Of the pixels, so that another PNG encoding of the same picture is found, too."
    image = image.convert("RGB")
    return sha256_of(repr(image.size).encode() + image.tobytes())


def test_suite_file_names_these_tasks_and_labels(rows):
    suite = load_suite(project_root() / "suites" / "demo.yaml")
    assert [task.name for task in suite.tasks] == list(DEMO_TASKS)
    for task in suite.tasks:
        for split in SPLITS:
            labels = {row.label for row in rows[task.name, split]}
            assert labels == set(task.labels) if task.is_closed else all(label.isdigit() for label in labels)


def test_suite_file_states_the_independent_sources(rows):
    text = (project_root() / "suites" / "demo.yaml").read_text()
    for task in DEMO_TASKS:
        stated = text.split(f"- name: {task}\n")[0].rsplit("# independent: ", 1)[1]
        counts = {split: len({part for row in rows[task, split] for part in source_parts(row.source)}) for split in SPLITS}
        assert stated.startswith(" / ".join(str(count) for count in counts.values())), task
        if task in ("number", "face"):
            assert demo.independent_sources(task) == counts


@pytest.mark.parametrize("task", DEMO_TASKS)
def test_no_source_and_no_picture_is_in_two_splits(rows, task):
    for kind in (lambda row: source_parts(row.source), lambda row: {pixels_hash(Image.open(io.BytesIO(row.image)))}):
        seen = [set().union(*(kind(row) for row in rows[task, split])) for split in SPLITS]
        assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_no_digit_is_in_two_handwriting_tasks(rows):
    used = {task: {p for s in SPLITS for row in rows[task, s] for p in source_parts(row.source)} for task in ("digit", "number")}
    assert not used["digit"] & used["number"]


def test_ids_are_unique(rows):
    ids = [row.id for found in rows.values() for row in found]
    assert len(ids) == len(set(ids))


def test_the_same_bytes_every_time(rows):
    demo.render_emoji.cache_clear()
    for task in ("number", "face", "content", "contact"):
        again = list(demo.read_demo({"task": task, "split": "test"}))
        assert [(row.id, row.label, row.image) for row in again] == [(row.id, row.label, row.image) for row in rows[task, "test"]]


def test_digits_are_labelled_as_mlxtend_labels_them(rows):
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    for row in rows["digit", "test"]:
        index = int(row.source.removeprefix("mnist:"))
        assert row.label == str(labels[index])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row.image))), images[index].reshape(28, 28))


def test_line_drawings_differ_from_outlined_ones():
    for family in demo.emoji_pool("suite", "thing")[:60]:
        if demo.has_line_layer(family):
            unified = demo.emoji_families()[family]["members"][0]
            line, outlined = (np.asarray(demo.render_emoji(unified, style)).astype(int) for style in ("line", "outlined"))
            assert np.abs(line - outlined).max() > 50 and (np.ptp(line, axis=2) < 40).mean() > 0.98


def test_unknown_task_and_split_get_a_suggestion():
    with pytest.raises(InputError, match="Did you mean 'digit'"):
        list(demo.read_demo({"task": "digits", "split": "train"}))
    with pytest.raises(InputError, match="Did you mean 'validation'"):
        list(demo.read_demo({"task": "digit", "split": "valdation"}))
    with pytest.raises(InputError, match="splt"):
        reader_of({"format": "demo", "task": "digit", "splt": "train"})


def test_skin_tones_genders_and_clocks_fold_into_one_family():
    family = demo.emoji_family
    assert family("1F44B-1F3FD") == family("1F44B")
    assert family("1F469-200D-2764-FE0F-200D-1F468") == family("1F468-200D-2764-FE0F-200D-1F468")
    assert family("1F550") == family("1F567") != family("1F569")


# ---- pretraining shares nothing with the suite ----


@pytest.fixture(scope="module")
def lessons():
    return [pretraining.lesson(number, seed) for seed in (0, 1) for number in (*range(LESSONS // 4), *range(10**6, 10**6 + LESSONS // 4))]


def test_pretraining_has_no_picture_of_the_suite(rows, lessons):
    ours = {pixels_hash(Image.open(io.BytesIO(row.image))) for found in rows.values() for row in found}
    assert not ours & {pixels_hash(lesson.image) for lesson in lessons}


def test_pretraining_has_no_source_of_the_suite(suite_sources, lessons):
    assert not suite_sources & {source for lesson in lessons for source in lesson.sources}


def test_every_emoji_pretraining_can_draw_is_foreign_to_the_suite(suite_sources):
    families = {family for family, _, _ in pretraining.named_emoji()}
    assert families and not {f"emoji:{family}" for family in families} & suite_sources
    drawn = {member: family for family in families for member in demo.emoji_families()[family]["members"]}
    suite_files = {demo.twemoji_file(m).read_bytes() for f, e in demo.emoji_families().items() if e["owner"] == "suite" for m in e["members"]}
    assert not suite_files & {demo.twemoji_file(member).read_bytes() for member in drawn}


def test_every_avatar_of_pretraining_is_foreign_to_the_suite(rows, suite_sources):
    people = [pretraining.other_avatar(number) for number in range(0, pretraining.AVATARS, 7)]
    assert not suite_sources & {demo.avatar_source(person) for _, person in people}
    assert not set(demo.SUITE_HAIR) & set(demo.PRETRAINING_HAIR)
    for _, person in people:
        assert person["top"].split(".")[1] in demo.PRETRAINING_HAIR and person["clothing"] != "BOND_SUIT"


def test_pretraining_uses_other_writers_fonts_and_photographs():
    assert not set(pretraining.other_fonts()) & set(demo.dejavu_fonts())
    assert len(pretraining.written_digits()[0]) == 1797  # scikit-learn's 43 writers, not MNIST
    assert "lfw_subset.npy" not in pretraining.PHOTOS.values()


def test_pretraining_never_asks_a_question_of_the_suite(lessons):
    questions = {task.question for task in load_suite(project_root() / "suites" / "demo.yaml").tasks}
    assert not questions & {lesson.question for lesson in lessons}


def test_a_lesson_follows_from_its_number(lessons):
    for number in (0, 3, 10**6):
        first, second = pretraining.lesson(number), pretraining.lesson(number)
        assert (first.question, first.answer, first.image.tobytes()) == (second.question, second.answer, second.image.tobytes())


def test_lessons_ask_many_kinds(lessons):
    kinds = {lesson.kind for lesson in lessons}
    assert len(kinds) > 15 and all(lesson.answer for lesson in lessons)
    assert all(lesson.image.mode == "RGB" and min(lesson.image.size) > 7 for lesson in lessons)
