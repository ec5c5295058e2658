"""Batches go to the device without a wait, and from the memory in which the loader put them."""

import pytest

from nullcuda import logged, mark
from nullcuda.runs import make_run
from small import make_batches
from ununennium import Callback


class Marks(Callback):
    """Write the end of each step into the log."""

    def on_safepoint(self, trainer, phase):
        if phase == "train":
            mark("stepped")


def pinned_batches():
    """Return batches of 1, 3, 5 … images, so that the bytes of a copy tell the batch."""
    sizes = range(1, 20, 2)
    batches = [make_batches(1, size=size)[0] for size in sizes]
    return [tuple(part.pin_memory() for part in batch) for batch in batches]


def log_of_epoch(batches, optimizer="AdamW"):
    """Return the log of an epoch, and where in it each step ended."""
    trainer = make_run(optimizer, train=batches, val=None, callbacks=[Marks()])
    with logged() as log:
        trainer.fit(1)
    return log, [n for n, entry in enumerate(log) if entry.what == "mark"]


def copies_of(log, batch):
    """Return where in the log a batch's image is copied to the device."""
    size = str(batch[0].nbytes)
    return [n for n, entry in enumerate(log) if entry.way == "h2d" and entry.details[1] == size]


@pytest.mark.parametrize("memory", ["pinned", "pageable"])
def test_a_batch_is_copied_once_and_without_a_wait(memory):
    batches = pinned_batches()
    if memory == "pageable":
        batches = [tuple(part.clone() for part in batch) for batch in batches]
    log, ends = log_of_epoch(batches)
    assert len(ends) == len(batches)
    for batch in batches:
        (n,) = copies_of(log, batch)
        assert log[n].details[2:] == (memory, "async") and log[n + 1].what != "wait"


def first(log, start, what, stream, *details):
    """Return where the log first has this, from `start` on; its end if it does not."""
    found = (
        n for n, entry in enumerate(log[start:], start)
        if (entry.what, entry.stream) == (what, stream) and entry.details[: len(details)] == details
    )  # fmt: skip
    return next(found, len(log))


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW fused"])
def test_the_next_window_is_copied_while_the_current_one_computes(optimizer):
    """On a stream of its own, and before the host waits for the norm, or the last kernel."""
    batches = pinned_batches()
    log, ends = log_of_epoch(batches, optimizer)
    last = "launch" if "fused" in optimizer else "wait"
    for number in range(2, len(batches) - 1):
        step = range(ends[number - 1], ends[number])
        (n,) = copies_of(log, batches[number + 1])
        side = log[n].stream
        assert side != 0 and log[n].details[2] == "pinned"
        assert n < max(n for n in step if log[n].what == last)
        # What computes waits for the copy, on the device.
        recorded = first(log, n, "record", side)
        assert recorded < len(log)
        assert first(log, recorded, "join", 0, *log[recorded].details) < ends[number + 1]
