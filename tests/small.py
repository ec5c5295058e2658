"""Small runs, and other things that tests share."""

import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from ununennium import Callback, Trainer, TrainerConfig
from ununennium.training.checkpoint import save_file
from ununennium.training.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
        ],
    ),
]


# Data and models.


def make_batches(count=6, size=2, side=8, classes=3, nodata=0.1, seed=0):
    """Batches whose mask follows from the image, with some nodata (255)."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        image = torch.randn(size, 4, side, side, generator=generator)
        mask = image[:, :classes].argmax(1)
        mask[torch.rand(mask.shape, generator=generator) < nodata] = 255
        batches.append((image, mask))
    return batches


def spoiled(*numbers, count=8):
    """Batches of which some have a NaN in their first image."""
    batches = make_batches(count)
    for number in numbers:
        batches[number][0][0, 1, 2, 3] = math.nan
    return batches


class Named(Dataset):
    """Samples with file names; some have an infinite pixel."""

    def __init__(self, bad=(), count=12):
        image, mask = make_batches(1, size=count)[0]
        self.image, self.mask = image, mask
        for number in bad:
            self.image[number, 0, 0, 0] = torch.inf

    def __len__(self):
        return len(self.image)

    def __getitem__(self, number):
        return {
            "image": self.image[number], "mask": self.mask[number],
            "filename": f"tile_{number}.tif",
        }  # fmt: skip


def small_net(classes=3, norm=True, seed=0):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm2d(8)] if norm else []
    return nn.Sequential(nn.Conv2d(4, 8, 1), *middle, nn.ReLU(), nn.Conv2d(8, classes, 1))


# Runs.


def make_trainer(
    train=None,
    val=None,
    *,
    model=None,
    loss=None,
    optimizer=None,
    scheduler=None,
    callbacks=(),
    metrics=None,
    **settings,
):
    """A quiet trainer on the CPU; `optimizer` and `scheduler` are functions of what they wrap."""
    model = small_net() if model is None else model
    optimizer = (optimizer or (lambda p: torch.optim.AdamW(p, lr=0.02)))(model.parameters())
    return Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(ignore_index=255) if loss is None else loss,
        make_batches() if train is None else train,
        val,
        scheduler=scheduler(optimizer) if scheduler else None,
        callbacks=list(callbacks),
        config=TrainerConfig(**({"device": "cpu", "progress": "none"} | settings)),
        metrics=metrics,
    )


def half(trainer, device, dtype=torch.float16, **scaler):
    """Let a trainer compute in a half precision, which the settings offer on CUDA only."""
    trainer.run.task.precision = Precision(torch.device(device), dtype)
    if scaler:
        trainer.run.task.precision.scaler = torch.amp.GradScaler(device, **scaler)
    return trainer


class At(Callback):
    """Do something once, at the n-th call of a hook."""

    def __init__(self, hook, when, action):
        self.calls, self.when, self.action = 0, when, action
        setattr(self, hook, self.act)

    def act(self, trainer, *details):
        self.calls += 1
        if self.calls == self.when:
            self.action(trainer)


class AtStep(Callback):
    """Do something once, after a number of steps, or in a validation."""

    def __init__(self, step, act, phase="train"):
        self.step, self.act, self.phase = step, act, phase

    def on_safepoint(self, trainer, phase):
        if self.act and phase == self.phase and trainer.global_step == self.step:
            act, self.act = self.act, None
            act(trainer)


SCHEDULERS = {
    "none": None,
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=36),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
}


def shuffled(callbacks=(), own_generator=False):
    generator = torch.Generator().manual_seed(3) if own_generator else None
    data = make_batches(8)
    return make_trainer(
        DataLoader(data, batch_size=None, shuffle=True, generator=generator),
        DataLoader(make_batches(2), batch_size=None, shuffle=True), seed=1, epochs=3,
        model=nn.Sequential(nn.Dropout(0.3), small_net()), callbacks=callbacks,
    )  # fmt: skip


def stop(trainer):
    """Ask a run to stop."""
    trainer.request_stop("enough")


def raising(error):
    """Return an action that raises an error."""

    def act(trainer):
        raise error

    return act


def boom(trainer):
    raise RuntimeError("boom")


def button(dashboard, name):
    """Return a button of a running dashboard, the only place that knows where it is."""
    return dashboard.live.view.buttons[name]


class Clicks(Callback):
    """Click buttons of a dashboard after these steps."""

    def __init__(self, dashboard, **steps):
        self.dashboard, self.steps = dashboard, steps

    def on_batch_end(self, trainer, batch, logs):
        for name, step in self.steps.items():
            if trainer.global_step == step:
                button(self.dashboard, name).click()


def wait_for(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# Comparisons.


class NamedOutput(nn.Module):
    """A small network whose output is a dictionary in which nothing is named as a prediction."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return {"scores": self.net(x)}


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def same_state(one, other):
    """Parameters, buffers and optimizer state are bitwise equal."""
    for a, b in zip(
        one.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        if not torch.equal(a, b):
            return False
    states = [list(trainer.optimizer.state.values()) for trainer in (one, other)]
    return all(
        torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key]))
        for a, b in zip(*states, strict=True)
        for key in a
    )


def same_history(one, other):
    """Histories are equal, NaN to NaN."""
    return str(one) == str(other)


def outcome(trainer):
    """Return everything that has to be the same after an exact resume."""
    names = ("patience", "best", "count")
    scheduler = trainer.run.schedule.scheduler
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "history": trainer.history,
        "scheduler": scheduler and scheduler.state_dict(),
        "step": trainer.global_step,
        "memory": {n: getattr(c, n) for c in trainer.callbacks for n in names if hasattr(c, n)},
        "random": (torch.rand(1).item(), np.random.rand(), random.random()),
    }


def assert_same(a, b, name=""):
    """Compare nested values bit by bit, NaN to NaN; `name` says where in the message."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name}/{i}")
    else:
        assert a == b or (a != a and b != b), (name, a, b)


# Files and processes.


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def forge(state, path):
    """Write a file with a right checksum, whatever is in it."""
    save_file({name: part for name, part in state.items() if name != "checksum"}, path)


class Hostile:
    """An object whose pickle creates a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


class HostReads(TorchDispatchMode):
    """Counts reads of tensors by the host: item, bool, float, tolist and the like."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "is_nonzero",
            "equal",
            "nonzero",
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


def start_process(target: Callable, *args) -> BaseProcess:
    """Run a function in a new process, which need not import PyTorch first."""
    context = multiprocessing.get_context("forkserver")
    # The first optimizer of a process imports torch._dynamo, which takes a second.
    context.set_forkserver_preload(["ununennium.training", "torch._dynamo"])
    process = context.Process(target=target, args=args)
    process.start()
    return process
