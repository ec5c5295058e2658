"""A run to a file and back: part by part, as a whole or not at all."""

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from small import At, assert_same, make_trainer, outcome, small_net, stop
from ununennium import Callback, CheckpointError, EarlyStopping, TrainingWarning
from ununennium.training.checkpoint import copy_to_host, load_file
from ununennium.training.resuming import position_text
from ununennium.training.saving import (
    PARTS,
    Part,
    load_callback,
    load_own_state,
    run_state,
    take_over,
)

KEYS = {
    "format", "model", "optimizer", "optimizer_built", "scheduler", "scaler", "callbacks",
    "progress", "skips", "open", "workers", "random",
}  # fmt: skip


def make_run(seed=0, stops=True):
    """A trainer, stopped in the middle of its second epoch."""
    callbacks = [EarlyStopping("train_loss", 9), At("on_batch_end", 8, stop)][: 1 + stops]
    return make_trainer(
        model=small_net(seed=seed), epochs=3, callbacks=callbacks,
        scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    )  # fmt: skip


@pytest.fixture
def stopped():
    trainer = make_run()
    trainer.fit()
    assert (trainer.epoch, trainer.batch) == (1, 2)
    return trainer


def test_the_keys_of_a_file_stay_what_they_are(stopped):
    """A later version has to read them, whatever the names in the code become."""
    assert run_state(stopped.run).keys() == KEYS and {"format", *PARTS} == KEYS
    assert run_state(stopped.run)["format"] == 2


def test_every_part_comes_back(stopped):
    other = make_run(seed=5, stops=False)
    load_own_state(other.run, copy_to_host(run_state(stopped.run)))
    assert position_text(other.run) == "batch 2 of epoch 2, step 8"
    assert other.callbacks[0].best == stopped.callbacks[0].best
    outcomes = []
    for trainer in (stopped, other):
        trainer.fit()
        outcomes.append(outcome(trainer))
    assert_same(*outcomes)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_fails_leaves_the_whole_run_as_it_was(monkeypatch, stopped, tmp_path, name):
    """Wherever loading breaks off: the parts before it are put back."""
    saved = load_file(make_run(seed=3).save_checkpoint(tmp_path / "a.pt"))
    twin, good = copy.deepcopy(copy_to_host(run_state(stopped.run))), PARTS[name]
    calls = []

    def fail_once(run, saved):
        calls.append(name)
        if len(calls) == 1:
            raise ValueError("it is broken")
        good.restore(run, saved)

    monkeypatch.setitem(PARTS, name, Part(good.read, fail_once))
    position, epoch = stopped.run.open.position, stopped.run.open
    with pytest.raises(CheckpointError, match="does not fit this trainer .it is broken"):
        take_over(stopped.run, saved, "a.pt")
    assert len(calls) == 2 and stopped.stop_reason == "enough"
    assert stopped.run.open is epoch and epoch.position is position
    assert_same(copy_to_host(run_state(stopped.run)), twin)


def test_a_run_that_is_training_takes_nothing_over(stopped):
    stopped.run.is_running = True
    with pytest.raises(RuntimeError, match=r"cannot be loaded while fit\(\) runs"):
        take_over(stopped.run, run_state(stopped.run), "a.pt")


def test_files_that_lack_a_part_or_have_another_format_are_refused(stopped):
    state = run_state(stopped.run) | {"checksum": 0}
    for change, message in (
        ({name: part for name, part in state.items() if name != "skips"}, "it lacks skips"),
        (state | {"format": 3}, "has format 3, and this version reads format 2"),
        (state | {"format": torch.zeros(2)}, "reads format 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            take_over(stopped.run, change, "a.pt")


def test_callbacks_find_their_memory_by_type_and_order(stopped):
    first, second = EarlyStopping("train_loss", 3), EarlyStopping("train_loss", 4)
    one, two = EarlyStopping("train_loss", 3), EarlyStopping("train_loss", 4)
    first.best, second.best = 0.1, 0.2
    old = make_trainer(callbacks=[first, second])
    new = make_trainer(callbacks=[At("on_batch_end", 1, stop), one, two])
    load_own_state(new.run, copy_to_host(run_state(old.run)))
    assert (one.best, two.best) == (0.1, 0.2)


class Remembering(Callback):
    """A callback with a memory."""

    def __init__(self):
        self.memory = {"steps": 3}

    def state_dict(self):
        return dict(self.memory)

    def load_state_dict(self, state):
        self.memory["steps"] = state["steps"]


class Picky(Remembering):
    """A callback that refuses a file."""

    def load_state_dict(self, state):
        raise ValueError("3 is too many")


def test_a_memory_that_was_not_restored_is_reported(tmp_path):
    path = make_trainer(callbacks=[Remembering()]).save_checkpoint(tmp_path / "a.pt")
    with pytest.warns(TrainingWarning, match="Remembering was not restored.*no callback"):
        make_trainer().load_checkpoint(path)
    path = make_trainer(callbacks=[EarlyStopping("train_loss")]).save_checkpoint(path)
    with pytest.warns(TrainingWarning, match="Remembering was not restored: the file has no") as c:
        make_trainer(callbacks=[Remembering()]).load_checkpoint(path)
    assert len(c) == 1  # and none about early stopping, which may be left out on purpose


def test_a_callback_that_refuses_a_file_is_named(tmp_path):
    path = make_trainer(callbacks=[Picky()]).save_checkpoint(tmp_path / "a.pt")
    other = make_trainer(callbacks=[Picky()])
    with pytest.raises(ValueError, match="state of the callback Picky"):
        load_callback(other.callbacks[0], load_file(path)["callbacks"][0][1])


def test_a_scheduler_that_comes_or_goes_between_two_runs_is_told(tmp_path):
    """The rate was that of the old schedule, and nothing said so."""
    from torch.optim.lr_scheduler import StepLR

    def make(with_scheduler):
        scheduler = (lambda optimizer: StepLR(optimizer, 1)) if with_scheduler else None
        return make_trainer(scheduler=scheduler)

    for first in (True, False):
        before = make(first)
        before.fit(1)
        path = before.save_checkpoint(tmp_path / f"{first}.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(first).load_checkpoint(path)
        said = "the state of a StepLR" if first else "no state of a scheduler, so StepLR begins"
        with pytest.warns(UserWarning, match=said):
            make(not first).load_checkpoint(path)
