"""A training that is killed at a planned moment: forked by `test_training_kills.py` from a process that has everything imported and has trained once.

The product's code is not touched. A Python audit hook sees each file operation in the run directory before it
happens and sends SIGKILL at the chosen one; a thread sends it after the chosen time. What comes out is a process that is
gone between two of its own instructions, as if by the kernel's hand.
"""

import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm import tqdm

from qwen2vl_sft.cli import main
from qwen2vl_sft.config import MethodConfig, ModelConfig, ScoringConfig, load_recipe
from qwen2vl_sft.model.load import load_base, trainable
from qwen2vl_sft.scoring.experiment import score_experiment
from qwen2vl_sft.training.trainer import LabelTrainer, train

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # tqdm's own is shared by all that are forked from here: one killed while it draws would stop the others for good
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
    root: str,
    log: str,
    recipes: list[str],
    act: str,  # "train" the first; "exhausted": the second process's memory runs out in its second step; "score": train all, then score
) -> None:
    "Work as one of two processes, with the variables that `torchrun` sets."
    gc.freeze()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["QWEN2VL_SFT_ROOT"] = root
    prints_to(log)
    real, first = LabelTrainer.compute_loss, []

    def compute_loss(self: LabelTrainer, model: torch.nn.Module, inputs: dict, **options: object) -> torch.Tensor:
        first.append(self.state.global_step)
        if act == "exhausted" and rank == 1 and self.state.global_step > first[0]:
            torch.empty(2**60)
        return real(self, model, inputs, **options)

    LabelTrainer.compute_loss = compute_loss
    if act == "score":
        runs = [train(load_recipe(recipe)) for recipe in recipes]
        score_experiment(runs[0].path.parent, ScoringConfig(batch=4, max_new_tokens=4))
    else:
        sys.exit(main(["train", recipes[0]]))


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
    faulthandler.dump_traceback_later(100, exit=True)  # where it hangs, if it does: into the log, before the test's patience ends
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
    faulthandler.cancel_dump_traceback_later()
    if events:
        Path(events).write_text(f"{seen['event']} {time.monotonic() - started}")


def serve(requests: Connection, recipe: str, root: str, log: str) -> None:
    "Train once; then fork a process for each request (the arguments of `go`) and answer with its exit code."
    tqdm.monitor_interval = 0  # no thread of its own
    go(recipe, root, log, "none", 0)
    requests.send(0)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page of what is there
    for request in iter(requests.recv, None):
        child = os.fork()
        if not child:
            code = 1
            try:
                go(*request)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        requests.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
