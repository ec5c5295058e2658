"""An epoch that has begun: its windows, its sums, and its file."""

import contextlib

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from ununennium.sampling import own_share
from ununennium.training.batches import AccumulationWindows, MicroBatch
from ununennium.training.epoch import (
    OpenEpoch,
    check_end,
    epoch_state,
    inherit_epoch,
    load_epoch,
    suspend,
)
from ununennium.training.loader import ResumableLoader
from ununennium.training.messages import TrainingWarning
from ununennium.training.step import Step


def prepare(raw, number):
    """A batch whose loss is its number, and whose weight is what the loader gave."""
    batch = MicroBatch(raw, None, None, raw, number)
    batch.losses = {"loss": torch.tensor(float(number)), "part": torch.tensor(1.0)}
    return batch


def open_epoch(loader, size=2):
    return OpenEpoch(AccumulationWindows(loader, size, prepare))


def own_loader():
    sampler = DistributedSampler(range(20), num_replicas=1, rank=0, shuffle=False)
    return ResumableLoader(own_share(DataLoader(range(20), 2, sampler=sampler), 1))


def take(epoch, stepped=True):
    window = epoch.next_window()
    epoch.close_window(Step([b for b in window if not b.is_empty], torch.tensor(1.0), stepped))


def test_a_window_is_the_same_until_its_step_is_done():
    epoch = open_epoch([1.0] * 3)
    first = epoch.next_window()
    assert epoch.next_window() is first and epoch.batches == 0
    take(epoch)
    assert epoch.batches == 2 and [b.number for b in epoch.next_window()] == [2]
    take(epoch)
    assert epoch.next_window() == []


def test_losses_count_by_weight_unless_the_step_was_skipped():
    epoch = open_epoch([1.0, 3.0, 100.0, 100.0, 0.0, 4.0])
    take(epoch)
    take(epoch, stepped=False)
    take(epoch)
    assert (epoch.batches, epoch.empty) == (6, 1)
    assert epoch.means["loss"].compute() == (0 * 1 + 1 * 3 + 5 * 4) / 8
    assert epoch.means["part"].compute() == 1.0


def test_an_epoch_comes_back_from_its_state():
    loader = ResumableLoader([1.0, 3.0, 0.0, 2.0], 2)
    epoch = open_epoch(loader)
    take(epoch)
    take(epoch)
    state = epoch_state(epoch, loader)
    again = load_epoch(state, torch.device("cpu"))
    assert (again.batches, again.empty, again.is_broken) == (4, 1, False)
    assert again.windows is None and again.position == state["place"]
    for name, mean in epoch.means.items():
        assert again.means[name].compute() == mean.compute()
    assert epoch_state(again, loader) == state  # before it is entered, too


class Broken:
    def __iter__(self):
        yield from (1.0, 1.0)
        raise OSError("the disk is gone")


def test_an_iterator_that_raised_is_dropped_for_its_position():
    loader = ResumableLoader(Broken(), 2)
    epoch = open_epoch(loader)
    take(epoch)
    with pytest.raises(OSError, match="the disk is gone"):
        epoch.next_window()
    suspend(epoch, loader)
    assert epoch.windows is None and epoch.is_broken and epoch.position["done"] == 2


def test_the_end_of_an_epoch_is_checked():
    with pytest.raises(ValueError, match="train_loader gave no batch in epoch 3"):
        check_end(OpenEpoch(), 2)
    with pytest.warns(TrainingWarning, match="No batch .* valid pixel in epoch 3: nothing was"):
        check_end(OpenEpoch(batches=2, empty=2), 2)
    epoch = open_epoch(Broken())
    take(epoch)
    with contextlib.suppress(OSError):
        epoch.next_window()
    with pytest.warns(TrainingWarning, match="epoch 1, of 2 batches, may lack one or more"):
        check_end(epoch, 0)


def test_a_file_has_the_names_of_samples_that_were_left_out_of_batches_that_are_done():
    """Those of a window that was read ahead are read, and left out, again."""
    loader, names = ResumableLoader([1.0] * 6), [["filename", "a.tif"]]
    epoch = open_epoch(loader)
    take(epoch)
    epoch.dropped |= {1: names, 2: names}
    state = epoch_state(epoch, loader)
    assert load_epoch(state, torch.device("cpu")).dropped == {1: names}
    epoch.dropped.clear()
    assert "dropped" not in epoch_state(epoch, loader)
    assert inherit_epoch([state | {"samples": 4}, state], own_loader(), 0)["dropped"] == {
        0: names + names
    }
