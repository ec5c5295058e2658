"""A step asks the device for hardly more than a loop written by hand does."""

import collections

import pytest
import torch
from torch import nn

from nullcuda import counts
from small import make_batches, make_trainer
from ununennium import Callback
from ununennium.models import UNet

WORK = ("launches", "h2d", "d2h", "d2d", "memsets")
STEPS = 6


def make_parts(fused):
    model = UNet(4, 3, width=4)
    return model, lambda parameters: torch.optim.AdamW(parameters, fused=fused or None)


class Work(Callback):
    """What the device was asked for up to each step."""

    def __init__(self):
        self.seen = []

    def on_safepoint(self, trainer=None, phase="train"):
        if phase == "train":
            self.seen.append(collections.Counter({name: counts()[name] for name in WORK}))

    def of_last_step(self):
        return self.seen[-1] - self.seen[-2]


def by_hand(fused, half):
    """Return the work of a step with clipping and loss scaling, written as PyTorch's docs do."""
    model, make_optimizer = make_parts(fused)
    optimizer = make_optimizer(model.cuda().parameters())
    scaler = torch.amp.GradScaler("cuda", enabled=half)
    loss_fn, work = nn.CrossEntropyLoss(ignore_index=255), Work()
    for image, mask in make_batches(STEPS):
        optimizer.zero_grad()
        image, mask = (part.to("cuda", non_blocking=True) for part in (image, mask))
        with torch.autocast("cuda", torch.float16, enabled=half):
            loss = loss_fn(model(image), mask)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        work.on_safepoint()
    return work.of_last_step()


def by_trainer(fused, half):
    work, (model, make_optimizer) = Work(), make_parts(fused)
    make_trainer(
        make_batches(STEPS), model=model, optimizer=make_optimizer, callbacks=[work], device="cuda",
        mixed_precision=half,
    ).fit(1)  # fmt: skip
    return work.of_last_step()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("fused", [False, True], ids=["AdamW", "AdamW fused"])
def test_a_step_does_little_more_than_by_hand(fused, half):
    ours, theirs = by_trainer(fused, half), by_hand(fused, half)
    assert ours.total() <= theirs.total() + 10, (ours, theirs)
