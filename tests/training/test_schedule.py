"""When a scheduler moves, and how often it may."""

import pytest
import torch
from torch.optim import lr_scheduler

from small import HostReads
from ununennium import TrainerConfig
from ununennium.training.schedule import OwedMoves, Schedule, count_moves, find_pace


def make_optimizer():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return optimizer


def sequence(optimizer):
    cycle = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.ConstantLR(optimizer), cycle], [2])


@pytest.mark.parametrize(
    ("make", "interval", "pace"),
    [
        (lambda o: None, "step", "never"),
        (lambda o: lr_scheduler.StepLR(o, 1), "auto", "epoch"),
        (lambda o: lr_scheduler.StepLR(o, 1), "step", "step"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5), "auto", "step"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5), "epoch", "epoch"),
        (lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0), "auto", "step"),
        (sequence, "auto", "step"),
        (lr_scheduler.ReduceLROnPlateau, "auto", "plateau"),
    ],
)
def test_the_pace_follows_the_kind_or_the_setting(make, interval, pace):
    assert find_pace(make(make_optimizer()), interval) == pace


def test_a_plateau_per_step_is_refused():
    with pytest.raises(ValueError, match="scores come once per epoch: drop"):
        find_pace(lr_scheduler.ReduceLROnPlateau(make_optimizer()), "step")


@pytest.mark.parametrize(
    ("pace", "epochs", "batches", "done", "accumulation", "moves"),
    [
        ("epoch", 3, 10, 0, 1, 3),
        ("step", 3, 10, 0, 1, 30),
        ("step", 3, 10, 0, 4, 9),
        ("step", 2, 10, 4, 4, 5),
        ("step", 3, None, 0, 1, 3),
    ],
)
def test_moves_are_counted_in_windows(pace, epochs, batches, done, accumulation, moves):
    assert count_moves(pace, epochs, batches, done, accumulation) == moves


class Counter:
    def __init__(self):
        self.moves = 0

    def step(self):
        self.moves += 1


def test_a_skipped_step_moves_nothing():
    counter = Counter()
    schedule = Schedule(counter, TrainerConfig(scheduler_interval="step"))
    for stepped in (True, False):
        schedule.after_step(stepped)
    schedule.after_epoch({}, 2)
    assert counter.moves == 1


@pytest.mark.parametrize("size", [1, 2, 3, 256])
@pytest.mark.parametrize("saved_after", [None, 0, 3, 4, 5])
def test_a_step_that_the_device_skipped_is_left_out_later(size, saved_after, monkeypatch):
    """As often as outcomes are read, and the same if the run is resumed in between."""
    monkeypatch.setattr(OwedMoves, "size", size)
    config = TrainerConfig(scheduler_interval="step")
    schedules = [Schedule(Counter(), config) for _ in range(2)]
    moves = [[], []]
    for number, stepped in enumerate("..s.s.s......"):
        for schedule, seen in zip(schedules, moves, strict=True):
            schedule.after_step(torch.tensor(stepped == "."))
            seen.append(schedule.scheduler.moves)
        if number == saved_after:
            resumed = Schedule(schedules[1].scheduler, config)
            resumed.owed.load_state_dict(schedules[1].owed.state_dict())
            schedules[1] = resumed
    assert moves[0] == moves[1]
    if size == 1:
        assert moves[0] == [1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 10]
    schedules[0].after_epoch({}, 10)
    assert moves[0][-1] - schedules[0].owed.count == 10


def test_outcomes_are_read_together():
    schedule = Schedule(Counter(), TrainerConfig(scheduler_interval="step"))
    with HostReads() as reads:
        for _ in range(OwedMoves.size - 1):
            schedule.after_step(torch.tensor(True))
    assert reads.count == 0


def test_an_epoch_moves_once_the_run_has_taken_a_step():
    counter = Counter()
    schedule = Schedule(counter, TrainerConfig())
    schedule.after_epoch({}, 0)
    schedule.after_step(True)
    assert counter.moves == 0
    schedule.after_epoch({}, 1)
    assert counter.moves == 1


def test_the_watched_score_and_the_error_if_it_is_not_there():
    plateau = lr_scheduler.ReduceLROnPlateau(make_optimizer(), mode="max")
    schedule = Schedule(plateau, TrainerConfig(scheduler_monitor="val_IoU"))
    schedule.after_epoch({"val_IoU": 0.5, "val_loss": 1.0}, 1)
    assert plateau.best == 0.5
    with pytest.raises(ValueError, match="'val_IoU' is not among the scores: lr, train_loss"):
        schedule.score_name({"train_loss": 1.0, "lr": 0.1})
    schedule = Schedule(lr_scheduler.ReduceLROnPlateau(make_optimizer()), TrainerConfig())
    assert schedule.score_name({"train_loss": 1.0}) == "train_loss"
    assert schedule.score_name({"train_loss": 1.0, "val_loss": 1.0}) == "val_loss"


def test_a_schedule_that_would_run_out_is_refused_before_it_starts():
    cycle = lr_scheduler.OneCycleLR(make_optimizer(), 0.1, total_steps=10)
    schedule = Schedule(cycle, TrainerConfig())
    schedule.check_length(2, 5, 0)
    schedule.check_length(2, None, 0)  # of unknown length, so nothing is known
    for _ in range(4):
        cycle.optimizer.step()
        cycle.step()
    with pytest.raises(ValueError, match="for 10 steps and has 6 left, .* up to 8 .*steps=12"):
        schedule.check_length(2, 5, 2)
    schedule.check_length(2, 5, 4)


def test_a_function_that_ends_before_the_run_is_named():
    """A complex rate reached the optimizer: "result type ComplexFloat can't be cast"."""
    polynomial = lr_scheduler.LambdaLR(make_optimizer(), lambda epoch: (1 - epoch / 2) ** 0.9)
    schedule = Schedule(polynomial, TrainerConfig())
    polynomial.optimizer.step()
    for _ in range(2):
        schedule.after_epoch({}, 1)
    with pytest.raises(ValueError, match="LambdaLR has set the rate to .*j. Its function seems"):
        schedule.after_epoch({}, 1)


@pytest.mark.parametrize("make", [None, lambda sgd: lr_scheduler.StepLR(sgd, 2)])
def test_a_score_to_watch_without_a_plateau_is_refused(make):
    scheduler = make and make(make_optimizer())
    with pytest.raises(ValueError, match="scheduler_monitor='val_IoU' is for ReduceLROnPlateau"):
        Schedule(scheduler, TrainerConfig(scheduler_monitor="val_IoU"))
