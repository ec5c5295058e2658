"""An epoch is begun once, and continued where it was left, with the same random numbers."""

import pytest
import torch

from small import make_batches, make_trainer
from ununennium.training.entering import enter_epoch
from ununennium.training.epoch import OpenEpoch, epoch_state, load_epoch
from ununennium.training.messages import TrainingWarning
from ununennium.training.rng import random_state
from ununennium.training.step import Step


def quiet(*details):
    pass


def test_an_epoch_begins_once():
    run, calls = make_trainer(val=None).run, []
    epoch = enter_epoch(run, lambda *details: calls.append(details))
    assert enter_epoch(run, quiet) is epoch is run.open and calls == [("on_epoch_start", 0)]


def test_a_broken_epoch_continues_with_the_batch_that_was_lost_and_says_so():
    run = make_trainer(make_batches(4), val=None).run
    epoch = enter_epoch(run, quiet)
    for _ in range(2):
        epoch.next_window()
        epoch.close_window(Step([]))
    epoch.position, epoch.windows, epoch.is_broken = run.loader("train").state(2), None, True
    with pytest.warns(TrainingWarning, match="raised an error in epoch 1, after 2 batches"):
        enter_epoch(run, quiet)
    assert epoch.next_window()[0].number == 2 and not epoch.is_broken


class Noise:
    def __iter__(self):
        while True:
            yield torch.rand(1, 4, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)


def test_a_window_that_was_read_ahead_is_drawn_again_from_the_same_state():
    run = make_trainer(Noise(), val=None).run
    state = random_state()
    noise = torch.rand(1, 4, 8, 8)
    run.open = OpenEpoch(before=state)
    after = random_state()
    epoch = enter_epoch(run, quiet)
    assert torch.equal(epoch.next_window()[0].inputs, noise) and epoch.before is None
    assert torch.equal(random_state()["torch"], after["torch"])


def test_a_file_has_the_random_state_only_while_a_window_is_read_ahead():
    run = make_trainer(val=None).run
    epoch, loader = enter_epoch(run, quiet), run.loader("train")
    assert "before" not in epoch_state(epoch, loader)
    epoch.windows.before = {"torch": torch.ones(3)}
    state = epoch_state(epoch, loader)
    assert load_epoch(state, torch.device("cpu")).before["torch"].tolist() == [1, 1, 1]
    epoch.next_window()
    assert "before" not in epoch_state(epoch, loader)  # the window is open: its step is not done
