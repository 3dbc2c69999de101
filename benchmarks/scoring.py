"""Scoring many checkpoints, against stock batched `generate` and against one stock forward pass a label.

    python benchmarks/scoring.py            pictures of 756 x 756 on the model of ratio_model.py, about five minutes
    python benchmarks/scoring.py --tiny     everything once, small: shows that it runs
    python benchmarks/scoring.py --only several_tasks_on_one_picture     that section; the others' figures in the file stay

Both sides start from the JPEG bytes with all weights in memory and end with every answer (ours: written to part files,
label probabilities too). Stock is transformers' `generate`: sdpa, the largest batch that is not slower, early stop by
its own eos, as many new tokens as the longest label has, adapters merged beforehand; ours takes its default batch. The contenders take turns within a
round; float32; the written answers of both sides are compared. First pass: empty vision cache, its fill included.
Second pass: other checkpoints of the same base, later.

Several tasks on one picture: labelling 1, 4 and 20 tasks of two labels, from JPEG bytes to labels; ours with the
prompts' common beginning read once, ours with every task's prompts read whole (the tower once in both), and stock
`generate`, task after task, the pictures decoded and resized once for all.
"""
import argparse
import copy
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from ratio_model import write_ratio_model
from tqdm import tqdm
from transformers import AutoImageProcessor, Qwen2VLForConditionalGeneration, __version__ as transformers

from qwen2vl_sft.config import MethodConfig, ModelConfig, ScoringConfig
from qwen2vl_sft.data.prepare import Prepared, prepare
from qwen2vl_sft.data.sources import Row
from qwen2vl_sft.encoding.batch import Sample, pad
from qwen2vl_sft.encoding.images import open_image
from qwen2vl_sft.encoding.prompt import Encoder, load_encoder
from qwen2vl_sft.model.load import load_base
from qwen2vl_sft.model.prefill import Prefill, prefill
from qwen2vl_sft.model.vision_cache import forward_inputs
from qwen2vl_sft.rundir import RunDir
from qwen2vl_sft.scoring import experiment
from qwen2vl_sft.scoring.labels import label_tree, path_sums, read_tree, score_labels
from qwen2vl_sft.scoring.labeler import Decision, Labeler, Picture, label_pictures, read_picture, shared_answers, tower_outputs
from qwen2vl_sft.scoring.suite import Candidate, Scorer, batch_tokens, test_set, weights_hash
from qwen2vl_sft.tasks import Suite, Task

LABELS = ["cat", "dog", "a red car", "a street at night", "flowers", "a city by the sea", "people", "food on a table", "snow", "none"]
QUESTION = "What does the picture show? Answer with one of the labels."


def draw(seed: int, side: int) -> bytes:
    "A photograph-like JPEG."
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    soft.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_suite(folder: Path, pictures: int, side: int) -> Prepared:
    "A closed task with that many test pictures, prepared."
    (folder / "pictures").mkdir(parents=True)
    lines = ["image,label"]
    for i in range(pictures):
        (folder / "pictures" / f"{i}.jpg").write_bytes(draw(i, side))
        lines.append(f"pictures/{i}.jpg,{LABELS[i % len(LABELS)]}")
    (folder / "test.csv").write_text("\n".join(lines) + "\n")
    task = Task(name="scene", question=QUESTION, labels=LABELS, sources={"test": {"format": "csv", "path": "test.csv"}})
    return prepare(Suite(name="scoring", tasks=[task], folder=folder), folder / "prepared")


def teach(model: torch.nn.Module, encoder: Encoder, steps: int, rate: float, seed: int) -> None:
    "Train the language model (or its adapter) on small noise, so that it answers with a label and stops."
    rng, weights = np.random.default_rng(seed), [weight for name, weight in model.named_parameters() if weight.requires_grad and "visual" not in name]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    for _ in range(steps):
        samples = []
        for label in rng.choice(LABELS, 8):
            pixels = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
            samples.append(Sample(encoder.encode(QUESTION, (56, 56), str(label)), pixels))
        batch = pad(samples, encoder.images, encoder.pad_id)
        loss = model(**forward_inputs(model, batch), labels=batch["labels"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_checkpoints(folder: Path, side: int, adapters: int, steps: int) -> tuple[Path, list[Path]]:
    "The base, taught to answer, and adapters on it, each taught further."
    base, found = write_ratio_model(folder / "base", side), []
    encoder, model = load_encoder(str(base)), Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    teach(model, encoder, steps, 2e-3, 0)
    model.save_pretrained(base)
    for number in range(adapters):
        tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model\..*_proj"))
        teach(tuned, encoder, max(3, steps // 6), 1e-3, 1 + number)
        found.append(folder / f"step-{number + 1}")
        tuned.save_pretrained(found[-1])
    return base, found


def stock_inputs(encoder: Encoder, processor: object, contents: list[bytes]) -> dict[str, torch.Tensor]:
    "What a stock processor makes of pictures and the question: one size, so nothing is padded."
    pixels = processor(images=[Image.open(io.BytesIO(content)).convert("RGB") for content in contents], return_tensors="pt")
    size = Image.open(io.BytesIO(contents[0])).size
    ids = torch.from_numpy(encoder.encode(QUESTION, size).input_ids).expand(len(contents), -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == encoder.image_token_id).int(), **pixels}


@torch.no_grad()
def stock_answers(models: list, encoder: Encoder, processor: object, contents: list[bytes], batch: int, most: int) -> list[list[str]]:
    "Batched greedy `generate`, one model after another."
    answers = []
    for model in models:
        texts = []
        for start in range(0, len(contents), batch):
            inputs = stock_inputs(encoder, processor, contents[start : start + batch])
            written = model.generate(**inputs, max_new_tokens=most, do_sample=False, eos_token_id=encoder.end_id, pad_token_id=encoder.pad_id)
            texts += [encoder.tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True) for row in written]
        answers.append(texts)
    return answers


class Ours:
    "The checkpoints as candidates of one pass, with the models in memory."

    def __init__(self, folder: Path, base: Path, adapters: list[Path], prepared: Prepared):
        self.folder, self.prepared, self.count = folder, prepared, 0
        self.settings = ScoringConfig(rule="both", max_new_tokens=12)
        self.encoder = load_encoder(str(base))
        config, method = ModelConfig(base=str(base), device="cpu"), MethodConfig(name="lora")
        run = RunDir(folder / "none" / "run")
        self.candidates = [Candidate(run, one.name, one, weights_hash(one), weights_hash(base), config, method) for one in adapters]
        self.held = next(experiment.passes(experiment.groups_of(self.candidates), self.encoder))

    def __call__(self) -> list[list[str]]:
        "Score into a fresh run directory; the vision cache is as it was left."
        self.count += 1
        run = RunDir(self.folder / "none" / f"run{self.count}")
        for one in self.candidates:
            one.run = run
        self.held[0].adapters = {str(one): name for one, name in zip(self.candidates, self.held[0].adapters.values(), strict=True)}
        scorer = Scorer(self.encoder, self.settings)
        experiment.open_caches(scorer, self.held, 20.0, False)
        tests = [test_set(self.prepared, self.prepared.suite.tasks[0], self.settings)]
        work = experiment.work_for(self.candidates, scorer, tests)
        with tqdm(disable=True) as bar:
            experiment.one_pass(work, self.held, bar)
        order = tests[0].column("id")
        tables = [run.predictions(one.checkpoint, "scene", "free").set_index("id") for one in self.candidates]
        return [table.loc[order, "text"].tolist() for table in tables]


def empty_cache(folder: Path) -> None:
    for file in (folder / "prepared").glob("vision-cache.sqlite*"):
        file.unlink()


def timed(work: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def against_generate(folder: Path, base: Path, adapters: list[Path], prepared: Prepared, rounds: int, batches: tuple[int, ...]) -> dict:
    "Seconds of both sides for one checkpoint and for all, in interleaved rounds."
    data = test_set(prepared, prepared.suite.tasks[0], ScoringConfig())
    contents = [prepared.split("scene", "test").image(row) for row in data.chosen]
    encoder, processor = load_encoder(str(base)), AutoImageProcessor.from_pretrained(base, backend="pil")
    load = lambda: Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa").eval()
    merged = [PeftModel.from_pretrained(load(), one).merge_and_unload() for one in adapters]
    most = 1 + max(len(encoder.text_ids(label)) for label in LABELS)
    stock = lambda models, batch: stock_answers(models, encoder, processor, contents, batch, most)
    tried = {batch: timed(lambda batch=batch: stock_answers(merged[:1], encoder, processor, contents[: 2 * batches[0]], batch, most))[0] for batch in batches}
    best = min(tried, key=tried.get)
    found: dict = {"pictures": len(contents), "max_new_tokens": most, "stock_batch": best, "stock_batches_tried_seconds": tried}
    for count in (1, len(adapters)):
        ours, seconds, same, theirs = Ours(folder, base, adapters[:count], prepared), {}, [], None
        for _ in range(rounds):
            empty_cache(folder)
            for name, work in (("stock", lambda count=count: stock(merged[:count], best)), ("first pass", ours), ("second pass", ours)):
                spent, texts = timed(work)
                seconds.setdefault(name, []).append(spent)
                theirs = texts if name == "stock" else theirs
                same.append(np.mean(np.array(texts) == np.array(theirs)))
        ratios = {name: [a / b for a, b in zip(seconds["stock"], seconds[name], strict=True)] for name in ("first pass", "second pass")}
        found[f"{count} checkpoints"] = {"seconds": seconds, "times_faster": {name: spread(values) for name, values in ratios.items()}, "same_answers": min(same)}
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


@torch.no_grad()
def one_forward_a_label(model: torch.nn.Module, encoder: Encoder, pixels: list[np.ndarray], labels: list[str], size: tuple[int, int]) -> np.ndarray:
    "Stock forward passes over whole conversations, all pictures in one batch, a label at a time."
    columns = []
    for label in labels:
        batch = pad([Sample(encoder.encode(QUESTION, size, label), one) for one in pixels], encoder.images, encoder.pad_id)
        values, grid = encoder.images.patches(pixels)
        ids = batch["input_ids"]
        logits = model(input_ids=ids, pixel_values=values, image_grid_thw=grid, mm_token_type_ids=(ids == encoder.image_token_id).int(), use_cache=False).logits
        places = torch.nonzero(batch["labels"][0] >= 0)[:, 0]
        columns.append(logits[:, places - 1].log_softmax(-1).gather(2, ids[:, places, None])[..., 0].sum(1))
    return torch.stack(columns, 1).numpy()


def against_forwards(base: Path, side: int, pictures: int, counts: tuple[int, ...], rounds: int) -> dict:
    "Label probabilities by one reading and a tree, against one stock forward pass a label."
    encoder, model, found = load_encoder(str(base)), Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval(), {}
    for count in counts:
        labels = [f"article number {i}" for i in range(count)]
        tree, pixels = label_tree(encoder, {label: [label] for label in labels}), [encoder.images.resize(open_image(draw(900 + i, side))) for i in range(pictures)]
        samples = lambda pixels=pixels: [Sample(encoder.encode(QUESTION, (side, side)), one) for one in pixels]
        ratios, apart = [], 0.0
        for _ in range(rounds):
            theirs, expected = timed(lambda labels=labels, pixels=pixels: one_forward_a_label(model, encoder, pixels, labels, (side, side)))
            spent, ours = timed(lambda tree=tree, samples=samples: path_sums(read_tree(model, encoder, prefill(model, encoder, samples()), tree), tree).numpy())
            ratios.append(theirs / spent)
            apart = max(apart, float(np.abs(ours - expected).max()))
        found[str(count)] = {"times_faster": spread(ratios), "target": count / 2, "met": statistics.median(ratios) >= count / 2, "largest_difference_nats": apart}
    return found


SUBJECTS = ["a weapon", "a person", "a vehicle", "any written text", "an animal", "a building at night", "food or drink", "water", "a telephone number", "the sky"]
QUESTIONS = [f"{ask} {subject}? Answer yes or no." for subject in SUBJECTS for ask in ("Does the picture show", "Is the largest thing in the foreground of the picture")]


def labeler_of(base: Path, adapter: Path, count: int, batch: int) -> Labeler:
    "The adapter as a labeler of that many tasks."
    tasks = [Task(name=f"task{number}", question=question, labels=["yes", "no"]) for number, question in enumerate(QUESTIONS[:count])]
    model = PeftModel.from_pretrained(load_base(ModelConfig(base=str(base), device="cpu")), adapter)
    return Labeler(model, load_encoder(str(base)), tasks, {task.name: Decision() for task in tasks}, "adapter", "weights", batch, tokens=batch_tokens(model))


def pictures_of(labeler: Labeler, contents: list[bytes]) -> list[Picture]:
    return [read_picture(labeler.encoder, Row(str(number), image=content)) for number, content in enumerate(contents)]


def nats(row: dict) -> np.ndarray:
    return np.log(list(json.loads(row["probabilities"]).values())) + np.log(row["in_set_mass"])


def labelled(labeler: Labeler, contents: list[bytes]) -> dict[tuple[str, str], np.ndarray]:
    "Picture and task -> log-probabilities of the labels, from what `label` states."
    batches = [contents[start : start + labeler.batch] for start in range(0, len(contents), labeler.batch)]
    return {(f"{number} {row['image']}", row["task"]): nats(row) for number, some in enumerate(batches) for row in label_pictures(labeler, pictures_of(labeler, some))}


def labelled_task_by_task(labeler: Labeler, contents: list[bytes]) -> dict[tuple[str, str], np.ndarray]:
    "The same with the tower once, and every task's prompts read whole."
    found, batches = {}, [contents[start : start + labeler.batch] for start in range(0, len(contents), labeler.batch)]
    for number, some in enumerate(batches):
        pictures = pictures_of(labeler, some)
        features = tower_outputs(labeler, [picture.pixels for picture in pictures])
        for task in labeler.tasks:
            samples = [Sample(labeler.encoder.encode(task.question, picture.size), features=value) for picture, value in zip(pictures, features, strict=True)]
            rows = shared_answers(labeler, [task], {task.name: samples})[task.name]
            found |= {(f"{number} {picture.row.id}", task.name): nats(row) for picture, row in zip(pictures, rows, strict=True)}
    return found


@torch.no_grad()
def generated(model: torch.nn.Module, encoder: Encoder, processor: object, contents: list[bytes], batch: int, count: int) -> list[str]:
    "Stock `generate` for that many tasks; a label has one token, and its end is another."
    texts, most = [], 1 + max(len(encoder.text_ids(label)) for label in ("yes", "no"))
    for start in range(0, len(contents), batch):
        some = contents[start : start + batch]
        inputs = stock_inputs(encoder, processor, some)
        for question in QUESTIONS[:count]:
            ids = torch.from_numpy(encoder.encode(question, Image.open(io.BytesIO(some[0])).size).input_ids).expand(len(some), -1)
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == encoder.image_token_id).int()}
            written = model.generate(**inputs, max_new_tokens=most, do_sample=False, eos_token_id=encoder.end_id, pad_token_id=encoder.pad_id)
            texts += [encoder.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in written]
    return texts


def several_tasks(base: Path, adapter: Path, side: int, pictures: int, counts: tuple[int, ...], rounds: int, batch: int) -> dict:
    "Seconds of all three for so many tasks on the same pictures, in interleaved rounds, and how far shared and whole readings are apart."
    encoder, processor = load_encoder(str(base)), AutoImageProcessor.from_pretrained(base, backend="pil")
    stock = PeftModel.from_pretrained(Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa"), adapter).merge_and_unload().eval()
    contents, found = [draw(700 + number, side) for number in range(pictures)], {"pictures": pictures, "batch": batch}
    for count in counts:
        labeler, seconds, apart = labeler_of(base, adapter, count, batch), {"stock": [], "task by task": [], "shared": []}, 0.0
        work = {"stock": lambda count=count: generated(stock, encoder, processor, contents, batch, count),
                "task by task": lambda labeler=labeler: labelled_task_by_task(labeler, contents), "shared": lambda labeler=labeler: labelled(labeler, contents)}
        for number in range(rounds + 1):  # the first warms up
            spent = {name: timed(do) for name, do in work.items()}
            for name, (took, _) in spent.items() if number else ():
                seconds[name].append(took)
            ours, theirs = (spent[name][1] for name in ("shared", "task by task"))
            assert ours.keys() == theirs.keys() and len(ours) == pictures * count
            apart = max(apart, *(float(np.abs(values - theirs[key]).max()) for key, values in ours.items()))
        ratio = lambda slow, fast, seconds=seconds: spread([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])
        found[f"{count} tasks"] = {"seconds": seconds, "shared_against_task_by_task": ratio("task by task", "shared"), "shared_against_stock": ratio("stock", "shared"),
                                   "task_by_task_against_stock": ratio("stock", "task by task"), "largest_difference_nats": apart}
    return found


@torch.no_grad()
def batched_suffixes(model: torch.nn.Module, encoder: Encoder, prompts: Prefill, labels: list[str], rows: int = 512) -> torch.Tensor:
    "The tree's rival: every label a row of its own, over copies of the prompt's cache."
    ids, scores = [[*encoder.text_ids(label), encoder.end_id] for label in labels], []
    step = max(1, rows // len(prompts))
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        longest, cache = max(map(len, part)), copy.deepcopy(prompts.keys_values)
        cache.batch_repeat_interleave(len(part))
        tokens = torch.tensor([one + [encoder.pad_id] * (longest - len(one)) for one in part]).repeat(len(prompts), 1)
        copies = lambda value, count=len(part): value.repeat_interleave(count, dim=0)
        many = Prefill(cache, copies(prompts.seen), copies(prompts.positions), copies(prompts.last))
        hidden = many.read_on(model, tokens[:, :-1], torch.arange(longest - 1), torch.ones(longest - 1, longest - 1, dtype=torch.bool).tril())
        logs = model.lm_head(torch.cat([many.last[:, None], hidden], 1)).float().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        mask = torch.tensor([[i < len(one) for i in range(longest)] for one in part]).repeat(len(prompts), 1)
        scores.append((logs * mask).sum(1).view(len(prompts), -1))
    return torch.cat(scores, 1)


def tree_or_suffixes(base: Path, side: int, pictures: int, counts: tuple[int, ...], rounds: int) -> dict:
    "Seconds after the prompts have been read, by the packed tree and by batched suffixes."
    encoder, model, found = load_encoder(str(base)), load_base(ModelConfig(base=str(base), device="cpu")), {}
    samples = [Sample(encoder.encode(QUESTION, (side, side)), encoder.images.resize(open_image(draw(900 + i, side)))) for i in range(pictures)]
    prompts = prefill(model, encoder, samples)
    for count in counts:
        labels = [f"article number {i}" for i in range(count)]
        tree, seconds = label_tree(encoder, {label: [label] for label in labels}), {"tree": [], "suffixes": []}
        for _ in range(rounds):
            spent, ours = timed(lambda tree=tree: path_sums(read_tree(model, encoder, prompts, tree), tree))
            seconds["tree"].append(spent)
            spent, theirs = timed(lambda labels=labels: batched_suffixes(model, encoder, prompts, labels))
            seconds["suffixes"].append(spent)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        found[str(count)] = {"nodes": len(tree), **{name: spread(values) for name, values in seconds.items()}}
    return found


def bfloat16_deviation(base: Path, side: int, pictures: int) -> dict[str, float]:
    "How far probabilities and log-probabilities in bfloat16 are from those in float32."
    encoder, scores = load_encoder(str(base)), []
    tree = label_tree(encoder, {label: [label] for label in LABELS})
    samples = [Sample(encoder.encode(QUESTION, (side, side)), encoder.images.resize(open_image(draw(500 + i, side)))) for i in range(pictures)]
    for dtype in ("float32", "bfloat16"):
        scores.append(score_labels(load_base(ModelConfig(base=str(base), device="cpu", dtype=dtype)), encoder, samples, tree))
    exact, rounded = scores
    same = np.array(exact.predictions) == np.array(rounded.predictions)
    return {"largest_probability_difference": float(np.abs(exact.probabilities - rounded.probabilities).max()), "same_labels": float(same.mean()),
            "largest_margin_of_a_changed_label": float(max(exact.margins[~same], default=0.0)), "pictures": pictures}


def targets(runs: dict) -> dict:
    "What was asked for, and what was measured."
    found = {}
    for key, times in zip([key for key in runs if key.endswith("checkpoints")], (3, 6), strict=True):
        for name, values in runs[key]["times_faster"].items():
            found[f"{key}, {name}"] = {"times": times, "measured": round(values["median"], 2), "met": values["median"] >= times}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small pictures, one round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scoring.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="one section")
    options = parser.parse_args()
    tiny, rounds = options.tiny, 1 if options.tiny else options.rounds
    side, pictures = (112, 4) if tiny else (756, 8)
    result: dict = json.loads(options.out.read_text()) if options.only else {"setting": {
        "side": side, "rounds": rounds, "dtype": "float32", "threads": torch.get_num_threads(), "processor": platform.machine(),
        "torch": torch.__version__, "transformers": transformers, "device": "cpu"}}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["QWEN2VL_SFT_ROOT"] = name
        prepared = write_suite(folder / "suite", pictures, side)
        base, adapters = write_checkpoints(folder, side, 2 if tiny else 4, 6 if tiny else 60)
        sections = {
            "against_generate": lambda: against_generate(folder, base, adapters, prepared, rounds, (2, 4) if tiny else (2, 4, 8)),
            "tree_or_suffixes": lambda: tree_or_suffixes(base, side, 2 if tiny else 8, (2, 10) if tiny else (2, 10, 100, 1000), rounds),
            "against_one_forward_a_label": lambda: against_forwards(base, side, 2, (2, 6) if tiny else (2, 10, 30), rounds),
            "several_tasks_on_one_picture": lambda: several_tasks(base, adapters[0], side, pictures, (1, 3) if tiny else (1, 4, 20), rounds, 2 if tiny else 4),
            "bfloat16": lambda: bfloat16_deviation(base, 112 if tiny else 224, 4 if tiny else 48),
        }
        for section, work in sections.items():
            if options.only not in (None, section):
                continue
            spent, result[section] = timed(work)
            print(f"{section}: {spent:.0f} s", flush=True)
            result["targets"] = targets(result["against_generate"])
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result[options.only] if options.only else result["targets"], indent=1))


if __name__ == "__main__":
    main()
