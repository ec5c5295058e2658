"""skorch's `NeuralNet`, without printed table; accumulation as its documentation shows it."""

import torch
from skorch import NeuralNet
from skorch.callbacks import EpochScoring, GradientNormClipping
from skorch.helper import predefined_split

from ..workloads import Confusion, Job


class Net(NeuralNet):
    """A net that counts its confusion matrix in validation."""

    def on_epoch_begin(self, *details, **more):
        """Start to count."""
        super().on_epoch_begin(*details, **more)
        self.confusion = Confusion(self.classes)

    def validation_step(self, batch, **more):
        """Score a batch."""
        step = super().validation_step(batch, **more)
        self.confusion.update(step["y_pred"], batch[1])
        return step


class AccumulatingNet(Net):
    """A net that steps once in several batches."""

    def get_loss(self, output, target, X=None, training=False):
        """Return the share of the window's loss."""
        loss = super().get_loss(output, target, X=X, training=training)
        return loss / self.accumulation if training else loss

    def train_step(self, batch, **more):
        """Add to the gradient, and take a step at the end of a window."""
        step = self.train_step_single(batch, **more)
        if (len(self.history[-1, "batches"])) % self.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(self.module_.parameters(), 1.0)
            self.optimizer_.step()
            self.optimizer_.zero_grad()
        return step


def iou(net, *data):
    """Return the score of an epoch."""
    return net.confusion.iou()


def train(job: Job) -> None:
    """Train and validate."""
    accumulation = job.workload.accumulation
    loader = {f"iterator_train__{name}": value for name, value in job.loader_options.items()}
    loader |= {f"iterator_valid__{name}": value for name, value in job.loader_options.items()}
    callbacks = [("iou", EpochScoring(iou, name="val_IoU", use_caching=False))]
    if accumulation == 1:
        callbacks.append(("clip", GradientNormClipping(1.0)))
    net = (Net if accumulation == 1 else AccumulatingNet)(
        job.model,
        job.loss_fn,
        optimizer=torch.optim.AdamW,
        max_epochs=1,
        train_split=predefined_split(job.val_data),
        callbacks=callbacks,
        callbacks__print_log=None,
        **{f"optimizer__{name}": value for name, value in job.optimizer_options.items()},
        **loader,
    )
    net.classes, net.accumulation = job.workload.classes, accumulation
    net.fit(job.train_data)
