"""Every shipped recipe: validates, opens with the command that runs it, and says what it is for."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from qwen2vl_sft.config import load_recipe
from qwen2vl_sft.tasks import load_suite
from qwen2vl_sft.training.plan import memory_plan

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
    assert schedule.checkpoint_steps == [1000, 2000, 3000, 3370] and schedule.batch == 32


CELLS = [re.fullmatch(r"qwen2-vl-(2b|7b)-(full|lora|qlora)-(24|80)gb.yaml", name) for name in RECIPES]
CELLS = [cell for cell in CELLS if cell]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell[0])
def test_a_recipes_name_says_what_it_is_and_its_plan_fits(root, cell):
    "By the memory plan's estimate, for samples at the recipe's pixel budget (729 tokens of picture, 2,916 patches)."
    size, method, gigabytes = cell.groups()
    config = load_recipe(root / "recipes" / cell[0])
    assert config.model.base == f"Qwen/Qwen2-VL-{size.upper()}-Instruct"
    assert (config.method.name, config.run, config.plan.memory_gb, config.model.device) == (method, method, float(gigabytes), "cuda")
    plan = memory_plan(config, np.array([[800, 3, 2916, number] for number in range(64)]))
    assert plan.fits and plan.micro_batch * plan.accumulation == 32


def test_every_sensible_cell_has_a_recipe():
    "Of 7B, full training fits neither 24 nor 80 GB; QLoRA at 80 GB has no reason to be."
    cells = {cell.groups() for cell in CELLS}
    assert cells == {("2b", "full", "24"), ("2b", "full", "80"), ("2b", "lora", "24"), ("2b", "lora", "80"), ("2b", "qlora", "24"), ("7b", "lora", "24"), ("7b", "lora", "80"), ("7b", "qlora", "24")}


@pytest.mark.parametrize(("name", "method", "mixture"), [("demo-mix", "qlora", "equal"), ("demo-full", "full", "concatenate")])
def test_the_demos_recipes_have_the_originals_checkpoints_at_a_tenth(root, name, method, mixture):
    config = load_recipe(root / "recipes" / f"{name}.yaml")
    assert (config.method.name, config.mixture.name, config.schedule.checkpoint_steps) == (method, mixture, [100, 200, 300, 337])
