"""A script as users write it, under torchrun, in which something happens at one point.

`job.py FOLDER EVENT PHASE RANK`; the event `none` lets it train to its end.
"""

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ununennium import Callback, CheckpointCallback, Trainer, TrainerConfig
from ununennium.training import checkpoint

faulthandler.register(signal.SIGUSR1)  # where a process hangs
FOLDER, EVENT, PHASE, RANK = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
SAFEPOINT = 5  # of its phase, after which the event happens


def tell(name):
    """Leave a message for whoever started this; return whether it is the first one."""
    try:
        with open(FOLDER / name, "x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return False
    return True


class Chips(Dataset):
    def __init__(self, count, is_faulty=False):
        self.count, self.is_faulty, self.calls = count, is_faulty, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.calls += 1  # in the only worker
        if self.is_faulty and self.calls >= 10 and tell("happened"):
            raise OSError("the archive is gone")
        image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return image + 0.1 * torch.randn(3, 16, 16), image.argmax(0)


class Act(Callback):
    def __init__(self):
        self.count = 0

    def on_epoch_start(self, trainer, epoch):
        self.count = 0

    def on_safepoint(self, trainer, phase):
        if phase != ("validate" if PHASE == "validation" else "train"):
            return
        self.count += 1
        if EVENT == "terminate" and self.count >= SAFEPOINT:
            tell("please")
            time.sleep(0.1)
        is_here = self.count == SAFEPOINT and dist.get_rank() == RANK
        if is_here and EVENT in ACTIONS and tell("happened"):
            ACTIONS[EVENT](trainer)


def raise_error(trainer):
    raise ValueError("a bad callback")


ACTIONS = {
    "stop": lambda trainer: trainer.request_stop("enough"),
    "interrupt": lambda trainer: os.kill(os.getpid(), signal.SIGINT),
    "kill": lambda trainer: os.kill(os.getpid(), signal.SIGKILL),
    "callback": raise_error,
    "save": lambda trainer: trainer.save_checkpoint(FOLDER / "mine.pt"),
}
calls = 0


def loss(output, target):
    global calls
    calls += output.requires_grad == (PHASE != "validation")
    if EVENT == "loss" and dist.get_rank() == RANK and calls == SAFEPOINT and tell("happened"):
        raise ValueError("a bad loss")
    return nn.functional.cross_entropy(output, target)


def write_slowly():
    """Let every file take longer than several steps."""
    write = checkpoint.write_atomically
    slow = lambda content: lambda file: (content(file), time.sleep(0.7))
    checkpoint.write_atomically = lambda path, content, *rest: write(path, slow(content), *rest)


def make_loader(count, is_faulty, shuffle):
    data = Chips(count, is_faulty and EVENT == "worker" and dist.get_rank() == RANK)
    return DataLoader(data, 2, sampler=DistributedSampler(data, shuffle=shuffle), num_workers=1)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if PHASE == "checkpointing":
        write_slowly()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    model = DistributedDataParallel(net)
    folder = FOLDER / "runs"
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), 1e-3),
        loss,
        make_loader(50, PHASE != "validation", True),
        make_loader(25, PHASE == "validation", False),
        callbacks=[CheckpointCallback(folder, "val_loss", every_n_steps=2), Act()],
        config=TrainerConfig(epochs=2, device="cpu", progress="text", seed=0),
    )
    trainer.resume(folder)
    trainer.fit()
    print(f"step {trainer.global_step}, {trainer.stop_reason}", flush=True)
    if dist.get_rank() == 0:
        state = {"model": net.state_dict(), "history": dict(trainer.history)}
        torch.save(state, FOLDER / "result")
    dist.destroy_process_group()
