"""4 · Schedules: per epoch or per step, as the scheduler demands, or when a score says so."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from small import At, make_batches, make_trainer, stop
from ununennium import Callback


def rates_of(scheduler, epochs=3, optimizer=None, **settings):
    rates = []

    class Watch(Callback):
        def on_batch_start(self, trainer, batch):
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer = make_trainer(
        make_batches(4), make_batches(1), scheduler=scheduler, callbacks=[Watch()],
        optimizer=optimizer or (lambda p: torch.optim.SGD(p, lr=1.0)), **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = trainer.fit(epochs)
    return rates, history, trainer


def test_most_schedulers_move_per_epoch():
    rates, history, _ = rates_of(lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5))
    assert rates == [1.0] * 4 + [0.5] * 4 + [0.25] * 4
    assert history["lr"] == [1.0, 0.5, 0.25]


def test_a_scheduler_moves_per_step_by_kind_or_by_config():
    by_kind, _, _ = rates_of(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=12))
    assert len(set(by_kind)) == 12
    by_config, _, _ = rates_of(
        lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
        scheduler_interval="step",
        accumulation_steps=2,
    )
    assert by_config == [1.0] * 4 + [0.5] * 4 + [0.25] * 4


def test_a_cycle_of_the_right_length_fits_and_a_shorter_one_is_refused():
    rates_of(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=12))
    with pytest.raises(ValueError, match=r"built for 11 steps .* up to 12 .* total_steps=12"):
        rates_of(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=11))


def test_a_cycle_continues_after_a_pause():
    cycle = lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12)
    trainer = make_trainer(scheduler=cycle, callbacks=[At("on_batch_end", 2, stop)], epochs=2)
    trainer.fit()
    trainer.fit()
    assert trainer.global_step == 12


def test_a_plateau_watches_the_validation_loss_or_the_named_score():
    seen = []

    class Plateau(lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics)

    _, history, _ = rates_of(lambda o: Plateau(o))
    assert seen == history["val_loss"]
    seen.clear()
    trainer = make_trainer(scheduler=lambda o: Plateau(o))
    assert trainer.fit(2)["train_loss"] == seen
    seen.clear()
    _, history, _ = rates_of(lambda o: Plateau(o, mode="max"), scheduler_monitor="val_IoU")
    assert seen == history["val_IoU"]


def test_a_plateau_in_the_wrong_direction_is_refused():
    plateau = lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match="Pass mode='max'"):
        make_trainer(scheduler=plateau, scheduler_monitor="val_accuracy")
    with pytest.raises(ValueError, match="Pass mode='min'"):
        make_trainer(scheduler=lambda o: plateau(o, mode="max"))
