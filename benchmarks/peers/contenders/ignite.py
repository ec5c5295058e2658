"""Engines of PyTorch-Ignite, with an update function of one's own, as its guide shows it."""

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from torch import nn

from ..workloads import Confusion, Job


def make_trainer(job: Job) -> Engine:
    """Return the engine that trains."""
    model, optimizer, accumulation = job.model, job.optimizer, job.workload.accumulation

    def update(engine, batch):
        model.train()
        x, y = batch
        loss = job.loss_fn(model(x), y)
        (loss / accumulation if accumulation > 1 else loss).backward()
        if engine.state.iteration % accumulation == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    trainer = Engine(update)
    Average().attach(trainer, "train_loss")
    return trainer


def make_evaluator(job: Job) -> Engine:
    """Return the engine that scores."""
    confusion = Confusion(job.workload.classes)

    def score(engine, batch):
        job.model.eval()
        with torch.no_grad():
            x, y = batch
            output = job.model(x)
            confusion.update(output, y)
            return job.loss_fn(output, y)

    evaluator = Engine(score)
    Average().attach(evaluator, "val_loss")

    @evaluator.on(Events.COMPLETED)
    def add_iou(engine):
        engine.state.metrics["val_IoU"] = confusion.iou()

    return evaluator


def train(job: Job) -> None:
    """Train and validate."""
    trainer, evaluator = make_trainer(job), make_evaluator(job)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate(engine):
        evaluator.run(job.val_loader)

    trainer.run(job.train_loader, max_epochs=1)
