"""Small runs that the tests share."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ununennium import Trainer, TrainerConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

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


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


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


def small_net(classes=3, norm=True, seed=0):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm2d(8)] if norm else []
    return nn.Sequential(nn.Conv2d(4, 8, 1), *middle, nn.ReLU(), nn.Conv2d(8, classes, 1))


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
