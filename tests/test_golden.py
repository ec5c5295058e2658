"""49 small runs: each repeats a plain PyTorch loop bit for bit, and is resumed exactly.

`make golden` compares the same runs with an earlier version of the package.
"""

import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from small import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import golden

CASES = golden.cases()
EPOCHS, CLIP, SEED = 3, 1.0, 7


def name_of(case):
    name, fused = case["optimizer"]
    words = [f"fused-{name}" if fused else name, f"{case['accumulation']}", case["schedule"]]
    chosen = ("validates", "is_spoiled", "dropout", "workers")
    return "-".join(words + [word.removeprefix("is_") for word in chosen if case[word]])


def weight_of(mask, loss_fn):
    """What PyTorch divides a mean cross-entropy by: the class weights of the valid pixels."""
    return loss_fn.weight[mask[mask != 255]].double().sum().item()


def mean_loss(pairs):
    """The mean over all pixels, from means over batches and what these were divided by."""
    total = sum(loss * weight for loss, weight in pairs)
    return total / weight if (weight := sum(weight for _, weight in pairs)) else math.nan


def take_step(model, optimizer, loss_fn, window):
    """One step on a window of batches; return their losses and weights, and whether it counted."""
    weights = [weight_of(batch["mask"], loss_fn) for batch in window]
    buffers = [buffer.clone() for buffer in model.buffers()]
    losses = []
    for batch, weight in zip(window, weights, strict=True):
        if weight:
            loss = loss_fn(model(batch["image"]), batch["mask"])
            (loss * (weight / sum(weights))).backward()
            losses.append((loss.item(), weight))
    if not losses:
        return [], None  # not a pixel to learn from
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    is_finite = bool(norm.isfinite())
    if is_finite:
        optimizer.step()
    else:
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    optimizer.zero_grad()
    return losses, is_finite


@torch.no_grad()
def validate(model, loss_fn, loader):
    state = torch.get_rng_state()
    model.eval()
    pairs = [
        (loss_fn(model(batch["image"]), batch["mask"]).item(), weight_of(batch["mask"], loss_fn))
        for batch in loader
    ]
    model.train()
    torch.set_rng_state(state)
    return mean_loss(pairs)


def train_plainly(model, optimizer, loss_fn, loader, val_loader, scheduler, accumulation):
    """The whole training in plain PyTorch; return the history and the number of steps."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    history, steps = [], 0
    for _ in range(EPOCHS):
        losses, skipped, empty, batches = [], 0, 0, list(loader)
        for start in range(0, len(batches), accumulation):
            window = batches[start : start + accumulation]
            empty += sum(weight_of(batch["mask"], loss_fn) == 0 for batch in window)
            found, stepped = take_step(model, optimizer, loss_fn, window)
            losses += found if stepped else []
            steps += stepped is True
            skipped += stepped is False
        scores = {"train_loss": mean_loss(losses)}
        if val_loader is not None:
            scores["val_loss"] = validate(model, loss_fn, val_loader)
        scores["lr"] = optimizer.param_groups[0]["lr"]
        scores |= {"train_skipped_steps": skipped, "train_empty_batches": empty}
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(scores.get("val_loss", scores["train_loss"]))
        elif scheduler is not None:
            scheduler.step()
        history.append(scores)
    return {name: [scores[name] for scores in history] for name in history[0]}, steps


def parts_of(case):
    """Build the parts of a case, and leave the trainer around them aside."""
    trainer = golden.make_trainer(case)
    return (
        trainer.model, trainer.optimizer, trainer.loss_fn, trainer.train_loader,
        trainer.val_loader, trainer.run.schedule.scheduler, case["accumulation"],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_run_repeats_a_plain_loop_bit_for_bit(case):
    parts, trainer = parts_of(case), golden.make_trainer(case)
    expected, steps = train_plainly(*parts)
    history = trainer.fit()
    assert {name: history[name] for name in expected} == expected
    assert trainer.global_step == steps
    found = zip(trainer.model.state_dict().values(), parts[0].state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in found)


@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_run_is_resumed_exactly(case):
    _, is_exact = golden.describe(case)
    assert is_exact


def test_the_cases_cover_every_setting():
    assert len(CASES) == len({name_of(case) for case in CASES}) == 49
    for setting in ("optimizer", "accumulation", "validates", "schedule", "is_spoiled", "dropout"):
        assert len({str(case[setting]) for case in CASES}) > 1
