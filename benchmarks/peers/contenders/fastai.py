"""fastai's `Learner`, without bar and printed table."""

from functools import partial

import torch
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Metric
from fastai.optimizer import OptimWrapper

from ..workloads import Confusion, Job


class IoU(Metric):
    """The mean IoU of an epoch's validation data."""

    name = "val_IoU"

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def reset(self):
        """Start to count."""
        self.confusion = Confusion(self.classes)

    def accumulate(self, learn):
        """Count a batch."""
        self.confusion.update(learn.pred, learn.y)

    @property
    def value(self):
        """The score."""
        return self.confusion.iou()


def train(job: Job) -> None:
    """Train and validate."""
    workload, callbacks = job.workload, [GradientClip(1.0)]
    if workload.accumulation > 1:  # it counts samples
        callbacks.append(GradientAccumulation(workload.accumulation * workload.batch_size))
    adamw = partial(torch.optim.AdamW, fused=workload.fused)
    learner = Learner(
        DataLoaders(job.train_loader, job.val_loader, device="cpu"),
        job.model,
        loss_func=job.loss_fn,
        opt_func=partial(OptimWrapper, opt=adamw),
        metrics=IoU(workload.classes),
        cbs=callbacks,
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=1e-3)
