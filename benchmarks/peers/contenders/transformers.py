"""The `Trainer` of Hugging Face's transformers, without bar, logs and checkpoints."""

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from ..workloads import Confusion, Job


class WithLoss(nn.Module):
    """A model that returns its loss, as this trainer expects it."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.loss_fn = job.model, job.loss_fn

    def forward(self, inputs, labels):
        """Return loss and output."""
        logits = self.model(inputs)
        return {"loss": self.loss_fn(logits, labels), "logits": logits}


class InOrder(Trainer):
    """A trainer that does not shuffle, as nobody does here."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Scores:
    """The mean IoU, counted batch by batch."""

    def __init__(self, classes: int) -> None:
        self.confusion = Confusion(classes)

    def __call__(self, predictions, compute_result: bool):
        """Count a batch."""
        self.confusion.update(predictions.predictions, predictions.label_ids)
        return {"IoU": self.confusion.iou()} if compute_result else {}


def train(job: Job) -> None:
    """Train and validate."""
    workload, collate = job.workload, job.train_loader.collate_fn

    def as_dict(batch):
        inputs, labels = collate(batch)
        return {"inputs": inputs, "labels": labels}

    arguments = TrainingArguments(
        output_dir=".",
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=workload.batch_size,
        per_device_eval_batch_size=workload.batch_size,
        gradient_accumulation_steps=workload.accumulation,
        max_grad_norm=1.0,
        eval_strategy="epoch",
        batch_eval_metrics=True,
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=workload.workers,
        label_names=["labels"],
    )
    constant = torch.optim.lr_scheduler.LambdaLR(job.optimizer, lambda step: 1.0)
    InOrder(
        WithLoss(job),
        arguments,
        data_collator=as_dict,
        train_dataset=job.train_data,
        eval_dataset=job.val_data,
        compute_metrics=Scores(workload.classes),
        optimizers=(job.optimizer, constant),
    ).train()
