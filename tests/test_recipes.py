"""Every shipped recipe: validates, opens with the command that runs it, and says what it is for."""

import shlex
from pathlib import Path

import pytest

from qwen2vl_sft.config import load_recipe
from qwen2vl_sft.tasks import load_suite

RECIPES = sorted(path.name for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_its_commands_too(root, name):
    path = root / "recipes" / name
    lines = path.read_text().splitlines()
    commands = [shlex.split(line.removeprefix("# ")) for line in lines if line.startswith("# qwen2vl-sft")]
    assert lines[0].startswith(f"# qwen2vl-sft train recipes/{name}")
    for command in commands:
        config = load_recipe(root / command[2], [word for word in command[3:] if not word.startswith("suite=")])
        assert config.schedule.steps in config.schedule.checkpoint_steps
    load_suite(root / load_recipe(path).suite)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("qwen2-vl")])
def test_the_real_recipes_are_the_originals_schedule(root, name):
    schedule = load_recipe(root / "recipes" / name).schedule
    assert schedule.checkpoint_steps == [1000, 2000, 3000, 3370] and schedule.micro_batch * schedule.accumulation == 32


@pytest.mark.parametrize(("name", "method", "mixture"), [("demo-mix", "qlora", "equal"), ("demo-full", "full", "concatenate")])
def test_the_demos_recipes_have_the_originals_checkpoints_at_a_tenth(root, name, method, mixture):
    config = load_recipe(root / "recipes" / f"{name}.yaml")
    assert (config.method.name, config.mixture.name, config.schedule.checkpoint_steps) == (method, mixture, [100, 200, 300, 337])
