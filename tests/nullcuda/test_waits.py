"""The host waits for the device once per step, or never if a fused optimizer lets it decide."""

import time

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from nullcuda.runs import OPTIMIZERS, PRECISIONS, make_run, waits_expected
from nullcuda.waits import waits_of
from small import make_batches, small_net
from ununennium import CheckpointCallback, MaskedLoss


def assert_waits(trainer, phase, expected):
    """The host waits so often in each step, or for each validation batch; else say where."""
    found = waits_of(trainer).steady(phase)
    assert len(found) >= 5 and all(len(lines) == expected for lines in found), found


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_waits_per_step(precision, optimizer, accumulation, clip):
    settings = {"accumulation_steps": accumulation, "gradient_clip": clip}
    assert_waits(make_run(optimizer, precision, **settings), "train", waits_expected(optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validation_never_waits(precision, optimizer):
    assert_waits(make_run(optimizer, precision), "validate", 0)


def test_a_long_epoch_with_a_fused_optimizer_never_waits():
    assert_waits(make_run("AdamW fused", train=make_batches(300)), "train", 0)


# Options.


def of_loaders(**options):
    """Batches from DataLoaders."""
    made = (DataLoader(make_batches(count), batch_size=None, **options) for count in (10, 8))
    return dict(zip(("train", "val"), made, strict=True))


def on_device():
    """Batches that are on the device already."""
    batches = ([(x.cuda(), y.cuda()) for x, y in make_batches(count)] for count in (10, 8))
    return dict(zip(("train", "val"), batches, strict=True))


def one_logit(loss, nodata):
    """A loss of one logit, with masks of 0, 1 and `nodata`."""
    batches = {"train": make_batches(10), "val": make_batches(8)}
    for name, pairs in batches.items():
        batches[name] = [
            (image, (mask == 1).float().masked_fill(mask == 255, nodata).unsqueeze(1))
            for image, mask in pairs
        ]
    return batches | {"loss": loss, "model": small_net(1)}


def weighted(nodata, **options):
    """A loss with class weights."""
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), **options)
    batches = {
        name: make_batches(count, nodata=nodata) for name, count in (("train", 10), ("val", 8))
    }
    return batches | {"loss": loss}


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)


OPTIONS = {
    "class weights": lambda folder: weighted(0.0),
    "class weights and ignore_index": lambda folder: weighted(0.1, ignore_index=255),
    "OneCycleLR": lambda folder: {"scheduler": one_cycle},
    "CheckpointCallback": lambda folder: {
        "callbacks": [CheckpointCallback(folder, every_n_steps=100)]
    },
    "MaskedLoss": lambda folder: one_logit(
        MaskedLoss(nn.BCEWithLogitsLoss(reduction="none")), torch.nan
    ),
    "BCEWithLogitsLoss": lambda folder: one_logit(nn.BCEWithLogitsLoss(), 0.0),
    "batches on the device": lambda folder: on_device(),
    "pinned batches": lambda folder: of_loaders(pin_memory=True),
    "workers": lambda folder: of_loaders(num_workers=2),
    "channels_last": lambda folder: {"channels_last": True, "model": nn.Conv2d(4, 3, 3, padding=1)},
    "channels_last on the device": lambda folder: (
        on_device() | {"channels_last": True, "model": nn.Conv2d(4, 3, 3, padding=1).cuda()}
    ),
    "text": lambda folder: {"progress": "text"},
    "bar": lambda folder: {"progress": "bar"},
    "dashboard": lambda folder: {"progress": "dashboard"},
}


@pytest.fixture
def time_stands_still(monkeypatch, shown):
    """Displays read the device at a pace of theirs; now they do so once. A page shows them."""
    for clock, now in (("monotonic", time.monotonic()), ("perf_counter", time.perf_counter())):
        monkeypatch.setattr(time, clock, lambda now=now: now)


@pytest.mark.usefixtures("time_stands_still")
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("option", OPTIONS)
def test_waits_per_step_with(option, optimizer, tmp_path):
    trainer = make_run(optimizer, **OPTIONS[option](tmp_path))
    assert_waits(trainer, "train", waits_expected(optimizer))


@pytest.mark.usefixtures("time_stands_still")
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("option", OPTIONS)
def test_validation_never_waits_with(option, optimizer, tmp_path):
    assert_waits(make_run(optimizer, **OPTIONS[option](tmp_path)), "validate", 0)
