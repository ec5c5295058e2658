"""A run that reads ahead stops, saves and resumes with the same bits as one that never stopped."""

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from device import on_device
from device.test_faults import make_trainer, result_of
from ununennium import Callback


class Drawn(Dataset):
    """Tiles that are drawn as they are read, from the global generator."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        image = torch.randn(4, 6, 6) + index / 24
        return image, image[:3].argmax(0)


class AsItGoes(Sampler):
    """Draws each index when it is asked for, from the global generator."""

    def __iter__(self):
        for _ in range(24):
            yield int(torch.randint(24, ()))

    def __len__(self):
        return 24


class Tiles:
    """Not a `DataLoader`: batches that are drawn as they are read."""

    def __iter__(self):
        for _ in range(8):
            image = torch.randn(3, 4, 6, 6)
            yield image, image[:, :3].argmax(1)


LOADERS = {
    "shuffled": lambda: DataLoader(Drawn(), batch_size=3, shuffle=True),
    "as it goes": lambda: DataLoader(Drawn(), batch_size=3, sampler=AsItGoes()),
    "workers": lambda: DataLoader(Drawn(), batch_size=3, shuffle=True, num_workers=1),
    "iterable": Tiles,
}


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_safepoint(self, trainer, phase):
        if trainer.global_step == self.step and phase == "train":
            trainer.request_stop("enough for now")


def run_of(loader, accumulation=1, callbacks=(), device="gpu"):
    return make_trainer(
        LOADERS[loader](), "plain", device, accumulation_steps=accumulation, seed=3,
        callbacks=list(callbacks),
    )  # fmt: skip


def whole_and_resumed(loader, accumulation, step, resume_on):
    """Return what a whole run ends with, and one that is stopped, saved and resumed."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("error")
        whole = result_of(run_of(loader, accumulation), 2)
        run_of(loader, accumulation)  # draws other numbers
        stopped = run_of(loader, accumulation, [StopAt(step)])
        result_of(stopped, 2)
        path = stopped.save_checkpoint(Path(folder) / "run.pt")
        torch.manual_seed(1)
        resumed = run_of(loader, accumulation, device=resume_on)
        resumed.load_checkpoint(path)
        return whole, result_of(resumed, 2), stopped.batch


@pytest.mark.parametrize("resume_on", ["gpu", "cpu"])
@pytest.mark.parametrize(("accumulation", "step"), [(1, 1), (1, 3), (1, 7), (2, 2), (3, 2)])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_that_reads_ahead_is_resumed_exactly(loader, accumulation, step, resume_on):
    whole, resumed, batch = on_device(whole_and_resumed, loader, accumulation, step, resume_on)
    assert batch == step * accumulation
    assert resumed == whole


def order_of_reading():
    """Return when batches were read and steps were taken."""
    seen = []

    class Told:
        def __iter__(self):
            for number, batch in enumerate(Tiles()):
                seen.append(f"read {number}")
                yield batch

    class Tell(Callback):
        def on_batch_end(self, trainer, batch, logs):
            seen.append("stepped")

    result_of(make_trainer(Told(), callbacks=[Tell()]))
    return seen


def test_the_next_batch_is_read_before_the_step_is_done():
    seen = on_device(order_of_reading)
    expected = ["read 0"]
    for number in range(1, 8):
        expected += [f"read {number}", "stepped"]
    assert seen == [*expected, "stepped"]


def steps_before_an_error():
    """Return the steps done when the third batch cannot be read, and the error's text."""

    class Broken:
        def __iter__(self):
            yield from list(Tiles())[:2]
            raise OSError("tile_0002.tif is truncated")

    trainer = make_trainer(Broken())
    try:
        trainer.fit(1)
    except OSError as error:
        return trainer.global_step, trainer.batch, str(error)


def test_an_error_of_the_next_batch_does_not_cost_the_current_step():
    steps, batches, error = on_device(steps_before_an_error)
    assert (steps, batches) == (2, 2) and "tile_0002.tif is truncated" in error


class Fixed(Drawn):
    """Tiles that are the same whenever they are read."""

    def __getitem__(self, index):
        image = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(index))
        return image, image[:3].argmax(0)


def resumed_after_an_error_in_a_step(workers):
    """Return what a whole run ends with, and one whose third step fails once, from a file."""
    make = lambda: make_trainer(
        DataLoader(Fixed(), batch_size=3, shuffle=True, num_workers=workers), "plain",
        accumulation_steps=2, seed=3,
    )  # fmt: skip
    whole, failing = result_of(make(), 2), make()
    step, calls = failing.optimizer.step, []

    def fail(*details):
        calls.append(failing.run.open.windows.next)  # the next window has been read by now
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return step(*details)

    failing.optimizer.step = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.fit(2)
    assert calls[-1]
    with tempfile.TemporaryDirectory() as folder:
        path = failing.save_checkpoint(Path(folder) / "run.pt")
        resumed = make()
        resumed.load_checkpoint(path)
        return whole, result_of(resumed, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_after_an_error_in_a_step_the_file_has_the_window_of_that_step(workers):
    whole, resumed = on_device(resumed_after_an_error_in_a_step, workers)
    assert resumed == whole
