"""Keras 3 with PyTorch as its backend, around the same model, with Keras's own AdamW."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch.nn.functional as F

from ..workloads import Confusion, Job


def loss(target, output):
    """Return the cross-entropy. Keras turns targets into floating-point numbers."""
    return F.cross_entropy(output, target.long())


class Model(keras.Model):
    """A layer around the model. Scores are counted in validation only, as everybody does here."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.layer = keras.layers.TorchModuleWrapper(job.model)
        self.classes, self.confusion = job.workload.classes, None

    def call(self, inputs, training=None):
        """Return the output."""
        return self.layer(inputs, training=training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Count a batch in validation; return the mean loss so far."""
        if self.confusion is not None:
            self.confusion.update(y_pred, y)
        return super().compute_metrics(x, y, y_pred, sample_weight)


def train(job: Job) -> None:
    """Train and validate."""
    accumulation = job.workload.accumulation
    model = Model(job)
    model.compile(
        optimizer=keras.optimizers.AdamW(
            1e-3,
            weight_decay=0.01,
            epsilon=1e-8,
            global_clipnorm=1.0,
            gradient_accumulation_steps=accumulation if accumulation > 1 else None,
        ),
        loss=loss,
    )

    def start_to_count(logs=None):
        model.confusion = Confusion(job.workload.classes)

    count = keras.callbacks.LambdaCallback()
    count.on_test_begin = start_to_count
    model.fit(
        job.train_loader, validation_data=job.val_loader, epochs=1, verbose=0, callbacks=[count]
    )
    model.confusion.iou()
