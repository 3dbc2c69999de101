"""Methods: which weights learn, how fast, and that PEFT and transformers agree about what a setting means."""

import math
import tempfile

import pytest
import torch
import yaml
from torch import nn
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from qwen2vl_sft.config import OPTIMIZERS, SCHEDULERS, MethodConfig, ModelConfig, RunConfig, ScheduleConfig, validated, with_overrides
from qwen2vl_sft.core import InputError
from qwen2vl_sft.data.toy import write_toy_suite
from qwen2vl_sft.model.load import changes_outputs, load_adapter, load_base, parameter_groups, part_of, trainable
from qwen2vl_sft.training.checkpoints import changed_settings
from qwen2vl_sft.training.plan import resolved
from qwen2vl_sft.training.trainer import check_batch, check_optimizer, train

SMALL = ModelConfig(device="cpu")
IDS = torch.arange(1, 33)[None]


def adapted(**method) -> nn.Module:
    torch.manual_seed(0)
    return trainable(load_base(SMALL), MethodConfig(name="lora", **method))


def learning(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(("options", "scale"), [({}, 32 / 16), ({"rslora": True}, 32 / math.sqrt(16))])
def test_the_adapters_scale_is_the_papers(options, scale):
    "Against the formulas of LoRA (alpha / r) and rsLoRA (alpha / sqrt(r)), on one layer's output."
    model = adapted(rank=16, alpha=32, **options)
    layer = model.base_model.model.model.language_model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(3, a.shape[1])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * (x @ a.T @ b.T), rtol=1e-5, atol=1e-5)


def test_dora_learns_magnitudes_and_starts_as_the_base():
    model = adapted(dora=True, rank=4)
    magnitudes = [name for name in learning(model) if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 7 * model.config.text_config.num_hidden_layers
    base = load_base(SMALL)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, base(input_ids=IDS, use_cache=False).logits)


def test_further_options_reach_peft(tmp_path):
    model = adapted(rank=4, peft={"rank_pattern": {"q_proj": 2}, "init_lora_weights": "gaussian"})
    layer = model.base_model.model.model.language_model.layers[0].self_attn
    assert (layer.q_proj.lora_A["default"].out_features, layer.k_proj.lora_A["default"].out_features) == (2, 4)
    for name in learning(model):
        nn.init.normal_(model.get_parameter(name), std=0.05)
    model.save_pretrained(tmp_path)
    assert changes_outputs(load_adapter(load_base(SMALL), tmp_path, "again"))


@pytest.mark.parametrize(("peft", "message"), [
    ({"rank_patern": {}}, "Did you mean 'rank_pattern'"), ({"r": 3}, "is the setting method.rank"), ({"modules_to_save": ["lm_head"]}, "not supported"),
    ({"init_lora_weights": "pissa"}, "changes the base model's weights"), ({"bias": "all"}, "biases would train")])  # fmt: skip
def test_options_that_peft_does_not_have_or_that_break_promises_are_refused(project, peft, message):
    write_toy_suite(project / "toy", rows=12)
    content = {"suite": str(project / "toy" / "toy.yaml"), "model": {"device": "cpu", "base": "/nowhere"}, "method": {"name": "lora", "peft": peft}}
    with pytest.raises(InputError, match=message):
        train(validated(content, "recipe"))


@pytest.mark.parametrize(("frozen", "parts"), [
    ({}, {"language_model"}), ({"freeze_tower": False}, {"tower", "language_model"}),
    ({"freeze_merger": False, "freeze_language_model": True, "freeze_embeddings": True}, {"merger"}),
    ({"freeze_merger": False, "freeze_tower": False}, {"tower", "merger", "language_model"})])  # fmt: skip
def test_what_is_frozen_does_not_train(frozen, parts):
    method = MethodConfig(name="full", **frozen)
    model = trainable(load_base(SMALL, method), method)
    assert {part_of(name) for name in learning(model)} == parts == {part for part in ("tower", "merger", "language_model") if method.trains(part)}


def test_embeddings_freeze_apart_from_the_layers():
    method = MethodConfig(name="full", freeze_embeddings=True)
    names = learning(trainable(load_base(SMALL, method), method))
    assert names and not any("embed_tokens" in name or "lm_head" in name for name in names)


def test_adapters_on_tower_and_merger_train_and_nothing_else_does(project):
    write_toy_suite(project / "toy", rows=12)
    method = {"name": "lora", "rank": 4, "targets": ["q_proj"], "tower_targets": ["qkv", "fc1"], "merger_targets": ["mlp.0"]}
    config = RunConfig(suite=str(project / "toy" / "toy.yaml"), model={"device": "cpu"}, method=method,
                       schedule={"steps": 2, "micro_batch": 4, "warmup_ratio": 0, "learning_rate": 1e-2, "activation_checkpointing": True})  # fmt: skip
    run = train(config)
    assert not (project / "prepared" / "vision-cache.sqlite").exists()  # a trained tower has nothing to keep
    tuned = load_adapter(load_base(SMALL), run.checkpoints()[2], "tuned").state_dict()
    moved = {part_of(name) for name, weight in tuned.items() if "lora_B" in name and weight.any()}
    assert moved == {"tower", "merger", "language_model"}
    assert {name.split(".lora_")[0].split(".")[-1] for name in tuned if ".lora_" in name} == {"q_proj", "qkv", "fc1", "0"}


def test_each_part_learns_at_its_own_rate(project, monkeypatch):
    "One step of SGD moves a weight by rate x gradient, so rates of 1, 10 and 100 are seen in the weights."
    write_toy_suite(project / "toy", rows=12)

    def moved(**rates) -> dict[str, float]:
        schedule = {"steps": 1, "micro_batch": 4, "warmup_ratio": 0, "scheduler": "constant", "optimizer": "sgd", "learning_rate": 1e-4, "max_grad_norm": 1e9, **rates}
        config = RunConfig(suite=str(project / "toy" / "toy.yaml"), run="-".join(["r", *rates]), model={"device": "cpu"},
                           method={"name": "full", "freeze_tower": False, "freeze_merger": False}, schedule=schedule)  # fmt: skip
        tuned, base = load_base(SMALL, location=str(train(config).checkpoints()[1])), load_base(SMALL)
        found = {"tower": 0.0, "merger": 0.0, "language_model": 0.0}
        for (name, new), old in zip(tuned.named_parameters(), base.parameters(), strict=True):
            found[part_of(name)] += (new - old).pow(2).sum().item()
        return {part: math.sqrt(square) for part, square in found.items()}

    one, apart = moved(), moved(tower_learning_rate=1e-3, merger_learning_rate=1e-2)
    ratios = {part: apart[part] / one[part] for part in one}
    assert ratios["language_model"] == pytest.approx(1, rel=0.01)
    assert ratios["tower"] == pytest.approx(10, rel=0.05) and ratios["merger"] == pytest.approx(100, rel=0.05)


def test_groups_hold_every_trained_weight_once_and_decay_as_the_stock_trainer():
    from transformers import Trainer

    method = MethodConfig(name="full", freeze_tower=False, freeze_merger=False)
    model = trainable(load_base(SMALL, method), method)
    stock = Trainer(model=model, args=TrainingArguments(output_dir=tempfile.gettempdir(), weight_decay=0.1, use_cpu=True, report_to=[])).create_optimizer()
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    ours = parameter_groups(model, ScheduleConfig(weight_decay=0.1), decayed)
    by_decay = lambda groups: {decay: {id(p) for group in groups for p in group["params"] if group["weight_decay"] == decay} for decay in (0.0, 0.1)}
    assert by_decay(ours) == by_decay(stock.param_groups)
    assert sum(len(group["params"]) for group in ours) == sum(weight.requires_grad for weight in model.parameters())


def test_int8_trains_and_keeps_the_tower(project):
    write_toy_suite(project / "toy", rows=12)
    config = RunConfig(
        suite=str(project / "toy" / "toy.yaml"), model={"device": "cpu"}, method={"name": "qlora", "quantisation": "int8"},
        schedule={"steps": 3, "micro_batch": 6, "warmup_ratio": 0, "learning_rate": 3e-3, "log_every": 1})  # fmt: skip
    run = train(config)
    kinds = {type(module).__name__ for module in load_base(SMALL, config.method).model.visual.modules() if isinstance(module, nn.Linear)}
    assert kinds == {"Linear"}
    assert changes_outputs(load_adapter(load_base(SMALL, config.method), run.checkpoints()[3], "tuned"))


def test_names_of_optimisers_and_schedulers_are_transformers():
    assert set(OPTIMIZERS) <= {one.value for one in OptimizerNames}
    assert set(SCHEDULERS) <= {one.value for one in SchedulerType}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_options_of_schedulers_are_transformers(name):
    import inspect

    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters) - common >= set(SCHEDULERS[name])


ON_CUDA_ONLY = ["paged_ademamix_32bit", "paged_ademamix_8bit"]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ON_CUDA_ONLY])
def test_an_optimiser_runs_and_keeps_the_stated_bytes(name):
    "A step on a 512 x 512 weight on the CPU; the state's size is what the memory plan counts."
    from transformers import Trainer

    weight = nn.Parameter(torch.randn(512, 512))
    weight.grad = torch.randn(512, 512)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(output_dir=tempfile.gettempdir(), optim=name, use_cpu=True, report_to=[]))
    optimizer, before = kind([weight], **options), weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)
    state = sum(value.numel() * value.element_size() for key, value in optimizer.state[weight].items() if torch.is_tensor(value) and "qmap" not in key)
    assert state / weight.numel() == pytest.approx(OPTIMIZERS[name], abs=0.1)


@pytest.mark.parametrize("name", ON_CUDA_ONLY)
def test_an_optimiser_that_does_not_run_is_refused_before_weights_load(project, name):
    config = RunConfig(suite="none.yaml", model={"device": "cpu", "base": "/nowhere"}, method={"name": "lora"}, schedule={"optimizer": name})
    with pytest.raises(InputError, match=f"{name} does not run on cpu.*choose"):
        train(config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_runs_on_cuda(project, name):
    check_optimizer(RunConfig(suite="none.yaml", model={"device": "cuda"}, method={"name": "lora"}, schedule={"optimizer": name}))


@pytest.mark.parametrize(("content", "message"), [
    ({"method": {"name": "full", "freeze_tower": False}, "schedule": {"vision_cache": True}}, "vision_cache keeps a frozen tower's"),
    ({"method": {"name": "lora", "tower_targets": ["qkv"]}, "schedule": {"vision_cache": True}}, "vision_cache keeps a frozen tower's"),
    ({"method": {"name": "lora"}, "schedule": {"tower_learning_rate": 1e-5}}, "the tower doesn't train"),
    ({"method": {"name": "lora", "freeze_tower": False}}, "freeze_tower belongs to full"),
    ({"method": {"name": "full", "dora": True}}, "dora belongs to lora and qlora"),
    ({"method": {"name": "full", "freeze_language_model": True, "freeze_embeddings": True}}, "nothing would train"),
    ({"method": {"name": "lora", "targets": ["q_prj"]}}, "Did you mean 'q_proj'"),
    ({"method": {"name": "lora", "targets": []}}, "no layer gets adapters"),
    ({"schedule": {"optimizer": "adamw_bnb_8bits"}}, "Did you mean 'adamw_bnb_8bit'"),
    ({"schedule": {"optimizer": "galore_adamw"}}, "no optimiser that runs here"),
    ({"schedule": {"scheduler": "cosin"}}, "Did you mean 'cosine'"),
    ({"schedule": {"scheduler": "linear", "scheduler_options": {"power": 2}}}, "linear has no option 'power'"),
    ({"schedule": {"scheduler": "cosine_with_min_lr"}}, "needs min_lr"),
    ({"schedule": {"micro_batch": "auto"}}, "needs effective_batch"),
    ({"schedule": {"micro_batch": 4, "effective_batch": 6}}, "not micro_batch 4 x accumulation 1")])  # fmt: skip
def test_settings_are_validated_together(content, message):
    with pytest.raises(InputError, match=message):
        validated({"suite": "x.yaml", **content}, "recipe")


def test_the_effective_batch_decides_what_is_trained_and_its_parts_do_not():
    def fingerprint(**schedule) -> str:
        return RunConfig(suite="x.yaml", schedule=schedule).fingerprint

    same = {fingerprint(micro_batch=8, accumulation=4), fingerprint(micro_batch=2, accumulation=16), fingerprint(micro_batch="auto", effective_batch=32)}
    assert len(same) == 1 and fingerprint(micro_batch=16) not in same


def test_the_effective_batch_is_that_of_all_processes(monkeypatch):
    alone = RunConfig(suite="x.yaml", schedule={"micro_batch": 4, "accumulation": 4})
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = RunConfig(suite="x.yaml", schedule={"micro_batch": 4, "accumulation": 2})
    assert (alone.schedule.process_batch, two.schedule.batch, two.schedule.process_batch) == (16, 16, 8)
    stated = resolved(two, 2, False).schedule
    assert (stated.micro_batch, stated.accumulation, stated.effective_batch) == (2, 4, 16)
    same = [resolved(two, 8, False), two, RunConfig(suite="x.yaml", schedule={"micro_batch": "auto", "effective_batch": 16})]
    assert len({config.fingerprint for config in same}) == 1 and not changed_settings(same[0], same[2], (2, 2))
    assert changed_settings(RunConfig(suite="x.yaml", schedule={"micro_batch": 4, "accumulation": 4}), two, (1, 2)) == []
    for schedule, message in (({"micro_batch": "auto", "effective_batch": 15}, "15 can't be divided among 2 processes"), ({"micro_batch": 2, "effective_batch": 2}, "2 is not micro_batch 2 x accumulation 1 x 2 processes")):
        with pytest.raises(InputError, match=message):
            check_batch(RunConfig(suite="x.yaml", schedule=schedule))


def test_numbers_that_came_as_text_are_numbers():
    "YAML 1.1 reads 1e-06 as text, and so does papermill's -p."
    content = yaml.safe_load("{suite: x.yaml, schedule: {scheduler: polynomial, scheduler_options: {lr_end: 1e-06, power: '2'}}}")
    assert isinstance(content["schedule"]["scheduler_options"]["lr_end"], str)
    assert validated(content, "recipe").schedule.scheduler_options == {"lr_end": 1e-6, "power": 2.0}
    decay = validated({"suite": "x.yaml", "schedule": {"scheduler": "warmup_stable_decay", "scheduler_options": {"num_decay_steps": "10", "decay_type": "cosine"}}}, "recipe").schedule
    assert repr(decay.scheduler_options) == "{'num_decay_steps': 10, 'decay_type': 'cosine'}"
    with pytest.raises(InputError, match="power 'two' is not a number"):
        validated({"suite": "x.yaml", "schedule": {"scheduler": "polynomial", "scheduler_options": {"power": "two"}}}, "recipe")


@pytest.mark.parametrize(("name", "value"), [("validation_samples", 50), ("sample_seed", 1), ("max_new_tokens", 8)])
def test_what_steers_a_run_through_its_validation_is_part_of_it(name, value):
    def config(**schedule) -> RunConfig:
        return RunConfig(suite="x.yaml", schedule=schedule)

    plain, seen, stopping = config(), config(validate_every=5), config(validate_every=5, early_stopping_patience=2)
    assert plain.fingerprint == seen.fingerprint == with_overrides(seen, {name: value}).fingerprint  # the same weights
    assert stopping.fingerprint != with_overrides(stopping, {name: value}).fingerprint
    assert not changed_settings(plain, with_overrides(seen, {name: value})) and not changed_settings(plain, with_overrides(plain, {name: value}))
    for validated_twice in (seen, stopping):  # else the best step would be chosen from figures that don't compare
        assert len(changed := changed_settings(validated_twice, with_overrides(validated_twice, {name: value}))) == 1 and f"{name}=" in changed[0]
