"""The project's own trainer."""

from ununennium import CheckpointCallback, Trainer, TrainerConfig

from ..workloads import Job

CALLBACKS = {"checkpoint": lambda: CheckpointCallback("checkpoints")}


def train(job: Job, callbacks, settings) -> None:
    """Train and validate. The scores are the trainer's own."""
    config = TrainerConfig(
        device="cpu",
        mixed_precision=False,
        accumulation_steps=job.workload.accumulation,
        progress="none",
        **settings,
    )
    Trainer(
        job.model,
        job.optimizer,
        job.loss_fn,
        job.train_loader,
        job.val_loader,
        callbacks=[CALLBACKS[name]() for name in callbacks],
        config=config,
    ).fit(1)
