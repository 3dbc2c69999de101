"""A suite or recipe of wrong types gets one line in the words of its file, never a traceback."""

import copy
from datetime import date

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2vl_sft.cli import main
from qwen2vl_sft.config import RunConfig, load_recipe, parse_overrides, settings_paths, validated, with_overrides
from qwen2vl_sft.core import InputError
from qwen2vl_sft.tasks import Suite, load_suite

TASK = {"name": "t", "question": "q?", "labels": ["yes", "no"], "positive": "yes", "aliases": {"no": ["No"]}, "sources": {"all": {"format": "csv", "path": "a.csv"}}}
OPEN = {"name": "o", "question": "q?", "answer": "text", "metric": "fields", "fields": ["phone"], "region": "CN", "sources": {"all": {"format": "csv", "path": "a.csv"}}}
SUITE = {"name": "s", "description": "", "tasks": [TASK, OPEN]}
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | st.sampled_from(["yes", "auto", "name", "[key]", "\n"])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6)


def places(value, path=()):
    "Every key and list position of nested content."
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(content, path, value, key):
    "The content with another value at the path or, where `key` is given, with the key in place of the path's last one."
    content = copy.deepcopy(content)
    if not path:
        return value
    place = content
    for step in path[:-1]:
        place = place[step]
    if key is None or not isinstance(place, dict):
        place[path[-1]] = value
    else:
        place[key] = place.pop(path[-1])
    return content


def one_line_or_none(read):
    try:
        read()
    except InputError as error:
        assert str(error).strip()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(places(SUITE))), values, st.none() | scalars)
def test_a_suite_of_any_types_gets_a_line(tmp_path_factory, path, value, key):
    content = changed(SUITE, path, value, key)
    one_line_or_none(lambda: validated(content, "suite", Suite))
    file = tmp_path_factory.getbasetemp() / "fuzzed-suite.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    one_line_or_none(lambda: load_suite(file))


RECIPE = RunConfig(suite="s.yaml").model_dump() | {"mixture": {"name": "weights", "weights": {"t": 1.0}}}


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(places(RECIPE))), values, st.none() | scalars, st.sampled_from(list(settings_paths())))
def test_a_recipe_of_any_types_gets_a_line(tmp_path_factory, path, value, key, setting):
    content = changed(RECIPE, path, value, key)
    one_line_or_none(lambda: validated(content, "recipe"))
    one_line_or_none(lambda: with_overrides(RunConfig(suite="s.yaml"), {".".join(setting): value}))
    file = tmp_path_factory.getbasetemp() / "fuzzed-recipe.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    one_line_or_none(lambda: load_recipe(file))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20) | st.sampled_from(["!!int ''", "!!bool x", "!!timestamp x", "2026-99-99", "[", "{a", "? [b]", "!!float x", "!!binary ä", "[" * 3000]))
def test_an_override_of_any_text_gets_a_line(text):
    one_line_or_none(lambda: parse_overrides([f"steps={text}"]))


QUOTE = "put quotes around {} (YAML reads yes, no and 7 as something else)"


@pytest.mark.parametrize(("text", "message"), [
    ("labels: [yes, no]", "tasks > 't' > labels: labels must be text; " + QUOTE.format("[True, False]")),
    ("aliases: {no: [No]}", "tasks > 't' > aliases: a key must be text; " + QUOTE.format(False)),
    ("aliases: {a: [7]}", "tasks > 't' > aliases > a > 0: it must be text; " + QUOTE.format(7)),
    ("positive: yes", "tasks > 't' > positive: it must be text; " + QUOTE.format(True)),
    ("question: 2026-11-22", "tasks > 't' > question: it must be text; " + QUOTE.format(date(2026, 11, 22))),
    ("sources: {no: {}}", "tasks > 't' > sources: a key must be text; " + QUOTE.format(False)),
    ("sources: {all: {yes: a}}", "tasks > 't' > sources > all: a key must be text; " + QUOTE.format(True)),
    ("sources: [a]", "tasks > 't' > sources: a mapping is wanted, not ['a']"),
    ("aliases: {a: b}", "tasks > 't' > aliases > a: a list is wanted, not b"),
    ("question:", "tasks > 't' > question: text is wanted, not nothing"),
    ("7: x", "tasks > 't': a key must be text; " + QUOTE.format(7)),
])
def test_what_yaml_reads_otherwise_is_said(tmp_path, capsys, text, message):
    file = tmp_path / "suite.yaml"
    lines = {name: line for name, line in (("question", "question: q"), ("labels", "labels: [a, b]")) if not text.startswith(name)}
    file.write_text("name: s\ntasks:\n- name: t\n  " + "\n  ".join([*lines.values(), text]) + "\n")
    assert main(["prepare", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}: {message}\n"


def test_an_error_of_overrides_says_what_to_pass(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("suite: s.yaml\nschedule: {steps: 50, save_at: [10, 30], accumulation: 2}\n")
    for wrong, remedy in ((["steps=20"], "pass save_at=[10]"), (["micro_batch=auto", "effective_batch=8"], "pass accumulation=1"), (["steps=["], "not YAML")):
        assert main(["plan", str(file), *wrong]) == 2
        assert remedy in capsys.readouterr().err
