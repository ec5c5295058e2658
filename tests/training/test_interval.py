"""A scheduler that is built for steps, and would move once per epoch, is told at the start."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from small import make_batches, make_trainer, small_net
from ununennium import TrainerConfig
from ununennium.training.interval import built_length, check_interval, seeming_length
from ununennium.training.messages import TrainingWarning
from ununennium.training.schedule import Schedule


def make_optimizer():
    return torch.optim.SGD(small_net().parameters(), lr=0.1)


def warmup_and_cosine(sgd, warmup, rest):
    parts = [lr_scheduler.LinearLR(sgd, total_iters=warmup)]
    parts.append(lr_scheduler.CosineAnnealingLR(sgd, T_max=rest))
    return lr_scheduler.SequentialLR(sgd, parts, milestones=[warmup])


BY_STEP = {
    "cosine": lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, T_max=12),
    "warm-up and cosine": lambda sgd: warmup_and_cosine(sgd, 4, 8),
    "polynomial": lambda sgd: lr_scheduler.LambdaLR(sgd, lambda step: (1 - step / 12) ** 0.9),
    "PolynomialLR": lambda sgd: lr_scheduler.PolynomialLR(sgd, total_iters=12, power=0.9),
    "milestones": lambda sgd: lr_scheduler.MultiStepLR(sgd, milestones=[6, 12]),
}


@pytest.mark.parametrize("name", BY_STEP)
def test_the_usual_schedules_of_papers_are_not_run_once_per_epoch_in_silence(name):
    """The rate was 0.01, 0.0098, 0.0093 and should have gone to 0, and nobody said so."""
    kind = type(BY_STEP[name](make_optimizer())).__name__
    wanted = f"{kind} seems to be built for 12 steps, but it moves once per epoch: 3 times in this"
    with pytest.warns(TrainingWarning, match=wanted) as caught:
        make_trainer(make_batches(4), scheduler=BY_STEP[name], epochs=3).fit()
    assert "4 per epoch, pass TrainerConfig(scheduler_interval='step')" in str(caught[0].message)


def told(scheduler, epochs=3, batches=4, **settings):
    schedule = Schedule(scheduler, TrainerConfig(**({"epochs": epochs} | settings)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_interval(schedule, epochs, batches)
    return len(caught)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_who_has_chosen_is_not_asked(interval):
    for make in BY_STEP.values():
        assert told(make(make_optimizer())) == 1
        assert told(make(make_optimizer()), scheduler_interval=interval) == 0
        assert told(make(make_optimizer()), batches=None) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, T_max=3),
        lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, T_max=5),  # a trial of a longer run
        lambda sgd: warmup_and_cosine(sgd, 1, 2),
        lambda sgd: lr_scheduler.LambdaLR(sgd, lambda epoch: 0.95**epoch),
        lambda sgd: lr_scheduler.LambdaLR(sgd, lambda epoch: 0.5**epoch),
        lambda sgd: lr_scheduler.LambdaLR(sgd, lambda epoch: 1 / (1 + epoch)),
        lambda sgd: lr_scheduler.LambdaLR(sgd, lambda epoch: [1.0, 0.1, 0.01][epoch]),
        lambda sgd: lr_scheduler.StepLR(sgd, step_size=30),
        lambda sgd: lr_scheduler.ExponentialLR(sgd, 0.9),
        lambda sgd: lr_scheduler.MultiStepLR(sgd, milestones=[1, 2]),
        lambda sgd: lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=12),
        lambda sgd: lr_scheduler.ReduceLROnPlateau(sgd),
    ],
)
def test_schedules_of_epochs_are_left_alone(make):
    assert told(make(make_optimizer())) == 0


def test_a_trial_of_the_planned_run_is_left_alone():
    cosine = lr_scheduler.CosineAnnealingLR(make_optimizer(), T_max=100)
    assert told(cosine, epochs=3, batches=33) == 1  # 100 is about 3 times 33
    schedule = Schedule(cosine, TrainerConfig(epochs=100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_interval(schedule, 3, 33)


def test_a_schedule_of_batches_under_accumulation_is_one_of_steps():
    cosine = lr_scheduler.CosineAnnealingLR(make_optimizer(), T_max=12)
    assert told(cosine, accumulation_steps=2) == 1


def test_lengths_of_chains():
    sgd = make_optimizer()
    chained = lr_scheduler.ChainedScheduler([
        lr_scheduler.LinearLR(sgd, total_iters=4), lr_scheduler.ExponentialLR(sgd, 0.9),
    ])  # fmt: skip
    assert built_length(chained) == 4
    assert built_length(warmup_and_cosine(make_optimizer(), 4, 8)) == 12
    assert built_length(object()) is None


def test_far_more_moves_than_epochs_are_steps_even_if_the_number_is_off():
    cosine = lr_scheduler.CosineAnnealingLR(make_optimizer(), T_max=10_000)
    assert seeming_length(cosine, 30, 30, [1920]) == 10_000
    assert seeming_length(cosine, 30, 30, []) == 10_000


def test_a_resumed_fit_does_not_repeat_it():
    trainer = make_trainer(make_batches(4), scheduler=BY_STEP["cosine"], epochs=3)
    with pytest.warns(TrainingWarning, match="built for 12 steps"):
        trainer.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        trainer.fit(1)


def test_a_schedule_of_epochs_that_moves_with_each_step_is_told():
    """`scheduler_interval="step"` with a length in epochs ended after the first of four epochs."""
    cosine = lr_scheduler.CosineAnnealingLR(make_optimizer(), T_max=4)
    assert told(cosine, epochs=4, batches=10, scheduler_interval="step") == 1
    for epochs, batches in ((4, 1), (4, 2), (5, 10)):
        assert told(cosine, epochs=epochs, batches=batches, scheduler_interval="step") == 0
    step = lr_scheduler.StepLR(make_optimizer(), 4)
    assert told(step, epochs=4, batches=10, scheduler_interval="step") == 0


def test_a_chain_that_moves_with_each_step_by_itself_is_left_alone():
    """A chain with a OneCycleLR was said to move once per epoch, and it does not."""
    sgd = make_optimizer()
    parts = [lr_scheduler.LinearLR(sgd, total_iters=40), lr_scheduler.OneCycleLR(sgd, 0.1, 360)]
    assert told(lr_scheduler.SequentialLR(sgd, parts, milestones=[40]), epochs=4, batches=100) == 0
