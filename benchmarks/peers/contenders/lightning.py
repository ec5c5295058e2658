"""PyTorch Lightning, with its defaults or with bar, logger, summary and checkpoints off."""

import lightning

from ..workloads import Confusion, Job


class Module(lightning.LightningModule):
    """The model and what to do with a batch."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.model, self.loss_fn = job, job.model, job.loss_fn

    def training_step(self, batch, index):
        """Return the loss. Lightning averages it over the epoch."""
        x, y = batch
        loss = self.loss_fn(self.model(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def on_validation_epoch_start(self):
        """Start to count."""
        self.confusion = Confusion(self.job.workload.classes)

    def validation_step(self, batch, index):
        """Score a batch."""
        x, y = batch
        output = self.model(x)
        self.log("val_loss", self.loss_fn(output, y), batch_size=len(y))
        self.confusion.update(output, y)

    def on_validation_epoch_end(self):
        """Log the score."""
        self.log("val_IoU", self.confusion.iou())

    def configure_optimizers(self):
        """Return the optimizer."""
        return self.job.optimizer


OFF = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def train(job: Job, bare: bool) -> None:
    """Train and validate."""
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        accumulate_grad_batches=job.workload.accumulation,
        **(OFF if bare else {}),
    ).fit(Module(job), job.train_loader, job.val_loader)
