"""A loop written by hand with Hugging Face's accelerate."""

import torch
from accelerate import Accelerator

from ..workloads import Confusion, Job


def train(job: Job) -> None:
    """Train and validate."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=job.workload.accumulation)
    model, optimizer, train_loader, val_loader = accelerator.prepare(
        job.model, job.optimizer, job.train_loader, job.val_loader
    )
    total = torch.zeros(())
    model.train()
    for x, y in train_loader:
        with accelerator.accumulate(model):
            loss = job.loss_fn(model(x), y)
            accelerator.backward(loss)
            total += loss.detach()
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    history = {"train_loss": total.item() / len(train_loader)}
    history |= validate(job, accelerator, model, val_loader)


def validate(job: Job, accelerator, model, loader) -> dict[str, float]:
    """Return the scores of the validation data."""
    total, confusion = torch.zeros(()), Confusion(job.workload.classes)
    model.eval()
    with torch.no_grad():
        for x, y in loader:
            output = model(x)
            output, y = accelerator.gather_for_metrics((output, y))
            total += job.loss_fn(output, y)
            confusion.update(output, y)
    return {"val_loss": total.item() / len(loader), "val_IoU": confusion.iou()}
