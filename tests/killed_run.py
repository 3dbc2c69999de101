"""A training that is killed at a planned moment: started by `test_training_kills.py` from a server that has everything imported.

The product's code is not touched. A Python audit hook sees each file operation in the run directory before it
happens and sends SIGKILL at the chosen one; a thread sends it after the chosen time. What comes out is a process that is
gone between two of its own instructions, as if by the kernel's hand.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from qwen2vl_sft.cli import main
from qwen2vl_sft.config import MethodConfig, ModelConfig, load_recipe
from qwen2vl_sft.model.load import load_base, trainable
from qwen2vl_sft.training.trainer import LabelTrainer, train

torch.set_num_threads(1)
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads that load weights find torch's pool as it was before the fork, now and then
trainable(load_base(ModelConfig(device="cpu"), MethodConfig(name="qlora")), MethodConfig(name="qlora"))  # imports what is imported late
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prints_to(log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)


def go_together(
    rank: int,
    port: int,
    recipe: str,
    root: str,
    log: str,
    exhausted: bool,  # whether the second process's memory runs out, in the second step
) -> None:
    "Train as one of two processes, with the variables that `torchrun` sets."
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["QWEN2VL_SFT_ROOT"] = root
    prints_to(log)
    real, first = LabelTrainer.compute_loss, []

    def compute_loss(self: LabelTrainer, model: torch.nn.Module, inputs: dict, **options: object) -> torch.Tensor:
        first.append(self.state.global_step)
        if exhausted and rank == 1 and self.state.global_step > first[0]:
            torch.empty(2**60)
        return real(self, model, inputs, **options)

    LabelTrainer.compute_loss = compute_loss
    sys.exit(main(["train", recipe]))


def go(
    recipe: str,
    root: str,
    log: str,  # file for what it prints
    kind: str,  # "none", "time", "event", "before rename", "after rename"
    when: float,  # seconds after the start of `train`, or the number of the event
    events: str | None = None,  # file that receives the number of file operations and the seconds of a whole run
) -> None:
    "Train; the planned kill comes on the way."
    os.environ["QWEN2VL_SFT_ROOT"] = root
    prints_to(log)
    config = load_recipe(recipe)
    folder, seen, started = str(config.experiment_folder / config.run), {"event": 0, "rename": 0}, time.monotonic()

    def hook(event: str, arguments: tuple) -> None:
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(folder):
            return
        seen["event"] += 1
        publishes = event == "os.rename" and str(arguments[0]).endswith(".staging")
        if kind == "after rename" and seen["rename"] >= when:
            die()
        seen["rename"] += publishes
        if (kind == "event" and seen["event"] >= when) or (kind == "before rename" and publishes and seen["rename"] >= when):
            die()

    sys.addaudithook(hook)
    if kind == "time":
        threading.Thread(target=lambda: (time.sleep(when), die()), daemon=True).start()
    train(config)
    if events:
        Path(events).write_text(f"{seen['event']} {time.monotonic() - started}")
