"""The parts of a run, what others may read of it, and what they may ask."""

import pytest
import torch

from small import At, make_batches, make_trainer, same_state, stop
from ununennium import TrainerConfig
from ununennium.training.batches import MicroBatch
from ununennium.training.entering import close_epoch, end_of_loader, enter_epoch
from ununennium.training.hooks import RunParts, RunStatus
from ununennium.training.messages import TrainingWarning
from ununennium.training.run import (
    RunFacts,
    build_run,
    count_step,
    note_random_state,
    restore_random_state,
)
from ununennium.training.step import Step


def test_history_is_a_copy_of_plain_floats():
    trainer = make_trainer(val=make_batches(2))
    history = trainer.fit(1)
    history["train_loss"].clear()
    assert len(trainer.history["train_loss"]) == 1
    assert all(type(value) is float for values in trainer.history.values() for value in values)


def test_a_seed_makes_a_run_repeatable():
    def run():
        loader = torch.utils.data.DataLoader(make_batches(8), batch_size=None, shuffle=True)
        trainer = make_trainer(loader, seed=7)
        torch.rand(torch.randint(9, ()).item())
        trainer.fit(2)
        return trainer

    torch.manual_seed(1)
    one = run()
    torch.manual_seed(2)
    assert same_state(one, run())


# Parts, counted and closed.


def make_run(**changes):
    return make_trainer(**changes).run


def test_a_loader_is_read_by_one_reader_until_it_is_replaced():
    run = make_run(val=make_batches(1), accumulation_steps=3)
    reader = run.loader("train")
    assert run.loader("train") is reader and run.loader("val") is not reader
    run.train_loader = make_batches(2)
    assert run.loader("train") is not reader and run.loader("train").loader is run.train_loader


def test_an_epoch_is_entered_once_and_resumed_where_it_was():
    run, calls = make_run(), []
    call = lambda *details: calls.append(details)
    epoch = enter_epoch(run, call)
    assert enter_epoch(run, call) is epoch is run.open and calls == [("on_epoch_start", 0)]
    epoch.next_window()
    epoch.close_window(Step([]))
    epoch.position, epoch.windows = run.loader("train").state(1), None  # as after loading a file
    assert enter_epoch(run, call) is epoch and len(calls) == 1
    assert [batch.number for batch in epoch.next_window()] == [1]


def used():
    batch = MicroBatch(None, None, None, 1.0, 0)
    batch.losses, batch.checks = ({"loss": torch.tensor(1.0)} for _ in range(2))
    return [batch]


def test_steps_are_counted_and_windows_without_a_valid_pixel_are_not():
    run = make_run()
    enter_epoch(run, lambda *_: None)
    one = torch.tensor(1.0)
    for stepped in (True, None, False, True):
        count_step(run, Step([]) if stepped is None else Step(used(), one, stepped))
    assert run.global_step == 2
    with pytest.warns(TrainingWarning, match="1 step was skipped"):
        scores = close_epoch(run, run.open)
    assert run.open is None and run.global_step == run.progress.global_step == 2
    assert scores == {"lr": 0.02, "train_skipped_steps": 1.0, "train_empty_batches": 0.0}


def test_steps_decided_on_the_device_are_corrected_when_read():
    run = make_run()
    enter_epoch(run, lambda *_: None)
    for stepped in (True, False, True):
        count_step(run, Step(used(), torch.tensor(1.0), torch.tensor(stepped)))
    assert run.progress.global_step == 3 and run.global_step == 2


def test_an_epoch_without_a_batch_is_given_up():
    run = make_run(train=iter([]))
    epoch = enter_epoch(run, lambda *_: None)
    with pytest.raises(ValueError, match="gave no batch in epoch 1"):
        end_of_loader(run, epoch)
    assert run.open is None


def test_a_random_state_is_put_in_place_once():
    run = make_run(seed=5)
    note_random_state(run)
    expected = torch.rand(3)
    restore_random_state(run)
    assert torch.equal(torch.rand(3), expected) and run.random is None
    restore_random_state(run)  # a run that is fresh is seeded instead
    assert torch.initial_seed() == 5


def test_an_optimizer_that_has_trained_keeps_its_state():
    first = make_trainer()
    first.fit(1)
    again = build_run(
        first.model, first.optimizer, first.loss_fn, first.train_loader,
        config=TrainerConfig(epochs=7, device="cpu"),
    )  # fmt: skip
    assert again.optimizer.state and again.config.epochs == again.goal == 7


# What others may read and ask.


def test_everything_that_callbacks_may_read_is_there():
    facts = RunFacts(make_run(val=make_batches(1)))
    for view in (RunParts, RunStatus):
        for name in (name for name in vars(view) if not name.startswith("_")):
            getattr(facts, name)
    assert facts.history == {} and facts.goal == 100 and facts.data_wait == 0.0


def test_loaders_and_callbacks_can_be_set_and_facts_cannot():
    facts, batches = RunFacts(make_run()), make_batches(1)
    facts.train_loader = facts.val_loader = batches
    facts.callbacks = (callback := At("on_batch_end", 1, stop),)
    assert facts.run.train_loader is facts.run.val_loader is batches
    assert facts.callbacks == [callback]
    for name in ("model", "optimizer", "epoch", "history", "config"):
        with pytest.raises(AttributeError):
            setattr(facts, name, None)


def test_requests_reach_the_progress():
    facts = RunFacts(make_run())
    facts.request_pause()
    assert facts.run.progress.pause_requested
    facts.end_pause()
    facts.should_stop = True
    assert not facts.run.progress.pause_requested and facts.stop_reason == "should_stop was set"
    facts.should_stop = False
    facts.request_stop("enough")
    assert facts.should_stop and facts.stop_reason == "enough"
