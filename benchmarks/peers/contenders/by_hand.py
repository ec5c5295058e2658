"""The loop as one would write it: what all others are compared to."""

import itertools

import torch
from torch import nn

from ..workloads import Confusion, Job


def train(job: Job, tail: str = "divided by its own") -> None:
    """Train and validate.

    `tail` says what becomes of a last accumulation window that is too short: `"divided by its own"`
    number of batches, divided `"as a full window"`, or `"dropped"`.
    """
    model, loss_fn, optimizer = job.model, job.loss_fn, job.optimizer
    size = job.workload.accumulation
    total, count = torch.zeros(()), 0
    model.train()
    batches = iter(job.train_loader)
    while window := list(itertools.islice(batches, size)):
        if len(window) < size and tail == "dropped":
            break
        divisor = size if tail == "as a full window" else len(window)
        for x, y in window:
            loss = loss_fn(model(x), y)
            (loss / divisor if divisor > 1 else loss).backward()
            total += loss.detach()
            count += 1
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    history = {"train_loss": total.item() / count}
    history |= validate(job)


def validate(job: Job) -> dict[str, float]:
    """Return the mean loss and the mean IoU of the validation data."""
    total, confusion, loader = torch.zeros(()), Confusion(job.workload.classes), job.val_loader
    job.model.eval()
    with torch.no_grad():
        for x, y in loader:
            output = job.model(x)
            total += job.loss_fn(output, y)
            confusion.update(output, y)
    return {"val_loss": total.item() / len(loader), "val_IoU": confusion.iou()}
