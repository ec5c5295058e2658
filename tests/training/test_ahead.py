"""The next window is read ahead, with its error and its random numbers; copies are taken once."""

import pytest
import torch

from ununennium.training.ahead import Copies, WindowsAhead, open_windows
from ununennium.training.batches import AccumulationWindows, MicroBatch
from ununennium.training.loader import ResumableLoader
from ununennium.training.rng import random_state

META = torch.device("meta")
IMAGE, MASK = torch.rand(2, 4, 6, 6), torch.zeros(2, 6, 6, dtype=torch.long)


def prepare(raw, number):
    return MicroBatch(raw, *raw, weight=72.0, number=number)


def batches(count, read=None):
    for number in range(count):
        if read is not None:
            read.append(number)
        yield IMAGE.clone(), MASK.clone()


def ahead_of(loader, size=1, device=META, random=None):
    return WindowsAhead(AccumulationWindows(loader, size, prepare), Copies(device), random)


def test_a_batch_is_copied_once_and_its_copy_is_handed_over():
    batch, copies = prepare((IMAGE, MASK), 0), Copies(META)
    copies.start(batch)
    begun = batch.copy
    copies.start(batch)
    assert batch.copy is begun
    inputs, target = copies.take(batch)
    assert inputs is begun[0][0] and target is begun[0][1] and batch.copy is None
    assert copies.take(batch)[0] is not inputs  # a step that is tried again copies again


def test_on_a_cpu_nothing_is_copied():
    batch, copies = prepare((IMAGE, MASK), 0), Copies(torch.device("cpu"))
    copies.start(batch)
    copies.start(None)
    assert batch.copy is None and copies.take(batch) == (IMAGE, MASK)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_window_is_read_once_and_one_window_early(size):
    read = []
    windows, plain = (
        ahead_of(batches(7, read), size),
        AccumulationWindows(batches(7), size, prepare),
    )
    window, numbers = windows.read(), []
    while window:
        numbers.append([batch.number for batch in window])
        windows.read_ahead(window)
        windows.read_ahead(window)  # once is enough
        assert len(read) == min(7, size * (len(numbers) + 1))
        window = windows.read()
        assert [batch.copy is not None for batch in window] == [n == 0 for n in range(len(window))]
    expected = []
    while window := plain.read():
        expected.append([batch.number for batch in window])
    assert numbers == expected and windows.read() == [] and not windows.raised


def test_a_batch_knows_the_next_one_of_its_window():
    first, second, third = AccumulationWindows(batches(3), 3, prepare).read()
    assert first.next is second and second.next is third and third.next is None


def test_an_error_in_the_next_window_waits_until_that_window_is_read():
    def load():
        yield from batches(1)
        raise OSError("tile_0001.tif is truncated")

    windows = ahead_of(load(), random=random_state)
    window = windows.read()
    windows.read_ahead(window)
    windows.read_ahead(window)
    assert windows.raised
    with pytest.raises(OSError, match="truncated"):
        windows.read()
    assert windows.before is None


def test_an_interrupt_is_not_kept():
    def load():
        yield from batches(1)
        raise KeyboardInterrupt

    windows = ahead_of(load())
    with pytest.raises(KeyboardInterrupt):
        windows.read_ahead(windows.read())


def test_the_random_state_before_a_window_is_known_until_it_is_taken():
    def load():
        while True:
            yield torch.rand(1, 4, 6, 6), MASK

    windows = ahead_of(load(), random=random_state)
    windows.read_ahead(windows.read())
    torch.set_rng_state(windows.before["torch"])
    noise = torch.rand(1, 4, 6, 6)
    assert torch.equal(windows.read()[0].inputs, noise) and windows.before is None


def test_nothing_is_read_ahead_of_a_loader_that_reuses_its_buffers():
    buffer, read = torch.zeros(1, 4, 6, 6), []

    def load():
        for number in range(4):
            read.append(number)
            yield buffer.fill_(number), MASK

    windows = ahead_of(load())
    for number in range(4):
        (batch,) = windows.read()
        windows.read_ahead([batch])
        assert len(read) == max(2, number + 1)


class OwnPosition(list):
    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("loader", "device", "kind"),
    [
        ([(IMAGE, MASK)], META, WindowsAhead),
        ([(IMAGE, MASK)], torch.device("cpu"), AccumulationWindows),
        (OwnPosition([(IMAGE, MASK)]), META, AccumulationWindows),
    ],
)
def test_windows_are_read_ahead_where_that_is_of_use(loader, device, kind):
    reader = ResumableLoader(loader)
    windows = open_windows(reader, reader, 1, prepare, 0, Copies(device), random_state)
    assert type(windows) is kind and len(windows.read()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_random_states_are_noted_only_if_reading_draws_in_this_process(workers):
    loader = torch.utils.data.DataLoader([(IMAGE, MASK)], num_workers=workers)
    reader = ResumableLoader(loader)
    windows = open_windows(reader, iter([]), 1, prepare, 0, Copies(META), random_state)
    assert (windows.random is None) == bool(workers)
