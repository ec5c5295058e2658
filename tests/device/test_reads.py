"""No step makes the host wait: 0 reads with fused optimizers, 1 per optimizer step with others."""

import itertools
import tempfile

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from device import on_device
from ununennium import Callback, CheckpointCallback, MaskedLoss, Trainer, TrainerConfig
from ununennium.models import UNet

FIRST, LAST = 8, 32  # the steps that are watched: state and caches are there, nothing ends
WEIGHT = torch.tensor([1.0, 2.0, 0.5])


class Watched(Callback):
    """Counts between two calls of a hook; what happens once is not among them."""

    def __init__(self, phase, watch):
        self.phase, self.watch, self.calls = phase, watch, 0

    def on_safepoint(self, trainer, phase):
        self.calls += phase == self.phase
        if phase == self.phase and self.calls == FIRST:
            self.watch.start()
        if phase == self.phase and self.calls == LAST:
            self.watch.stop()


class CudaWatch:
    """Lets PyTorch raise where the host waits for a GPU."""

    def start(self):
        torch.cuda.set_sync_debug_mode("error")

    def stop(self):
        torch.cuda.set_sync_debug_mode("default")


def make_net():
    return nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )


def make_data(count=(LAST + 2) * 4, classes=3, nodata=255):
    masks = [torch.randint(classes, (2, 6, 6)) for _ in range(count)]
    for mask in masks:
        mask[0, 0] = nodata
    return [(torch.randn(2, 4, 6, 6), mask) for mask in masks]


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10**6)


def checkpoints():
    return CheckpointCallback(tempfile.mkdtemp(), monitor="train_loss", every_n_steps=10**6)


class Named:
    """Batches with file names, as those of many data sets."""

    def __iter__(self):
        for number, (image, mask) in enumerate(make_data()):
            yield {"image": image, "mask": mask, "filename": [f"{number}_{i}" for i in range(2)]}


class OnDevice:
    """Batches that are on the device already."""

    def __init__(self, device="gpu"):
        self.device = device

    def __iter__(self):
        for batch in make_data():
            yield tuple(part.to(self.device, non_blocking=True) for part in batch)


def binary(count=(LAST + 2) * 4):
    data = make_data(count, classes=2)
    return [
        (image, mask[:, None].float().masked_fill(mask[:, None] > 1, torch.nan))
        for image, mask in data
    ]


def plain_loss(**options):
    return nn.CrossEntropyLoss(ignore_index=255, **options)


class LogMuch(Callback):
    """Log tensors of the device in every way."""

    def on_batch_end(self, trainer, batch, logs):
        for reduce in ("mean", "sum", "last", "max", "min"):
            trainer.log(f"{reduce}_norm", logs["grad_norm"], reduce=reduce, weight=2.0)


# Each may set the loss, loaders, model, scheduler, callbacks and settings.
CASES = {
    "plain": {},
    "U-Net": {"model": lambda: UNet(4, 3), "train": lambda: DataLoader(
        [(torch.randn(4, 16, 16), torch.randint(3, (16, 16))) for _ in range(40)])},
    "class weights": {"loss": lambda: plain_loss(weight=WEIGHT)},
    "smoothed class weights": {"loss": lambda: plain_loss(weight=WEIGHT, label_smoothing=0.1)},
    "scheduler by step": {"scheduler": one_cycle},
    "checkpoints by step": {"callbacks": [checkpoints]},
    "accumulation": {"settings": {"accumulation_steps": 4}},
    "no clipping": {"settings": {"gradient_clip": None}},
    "batches on the device": {"train": OnDevice},
    "batches on the device, class weights": {
        "train": OnDevice, "loss": lambda: plain_loss(weight=WEIGHT)},
    "file names": {"train": Named},
    "masked loss": {
        "model": lambda: nn.Conv2d(4, 1, 1), "train": binary,
        "loss": lambda: MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"))},
    "logged values": {"callbacks": [LogMuch]},
    "progress in text": {"settings": {"progress": "text"}},
    "bad samples dropped": {"settings": {"drop_bad_samples": True}},
}  # fmt: skip

VALIDATED = [case for case in CASES if case != "accumulation"]  # which is of steps

OPTIMIZERS = {
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "SGD fused, momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "fused": True}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.01, "fused": True}),
    "AdamW": (torch.optim.AdamW, {"foreach": True}),
    "AdamW for each": (torch.optim.AdamW, {"foreach": False}),
    "SGD": (torch.optim.SGD, {"lr": 0.01, "foreach": True}),
}


def run(case, optimizer, phase="train"):
    """Train or validate; return the waits, and the operations per step or batch."""
    from device.pretend import WATCH

    run_watched(case, optimizer, phase, WATCH, "gpu")
    return dict(WATCH.waits), WATCH.operations / (LAST - FIRST)


def run_dropping(optimizer):
    """Train on batches that are on the device, and drop bad samples of them."""
    CASES["on the device, dropped"] = CASES["batches on the device"] | CASES["bad samples dropped"]
    return run("on the device, dropped", optimizer)


def run_watched(case, optimizer, phase, watch, device, **settings):
    """Train or validate on a device, and watch what happens."""
    with_defaults = {"model": make_net, "loss": plain_loss, "train": make_data} | CASES[case]
    model = with_defaults["model"]()
    kind, options = OPTIMIZERS[optimizer]
    if kind is torch.optim.AdamW:
        model = model.to(device)  # as PyTorch wants it before an optimizer is built
    optimizer = kind(model.parameters(), **options)
    make_scheduler = with_defaults.get("scheduler")
    train, val = with_defaults["train"](), None
    if isinstance(train, OnDevice):
        train.device = device
    if phase == "validate":
        train, val = list(itertools.islice(train, 2)), train
    trainer = Trainer(
        model, optimizer, with_defaults["loss"](), train, val,
        scheduler=make_scheduler and make_scheduler(optimizer),
        callbacks=[Watched(phase, watch), *(make() for make in with_defaults.get("callbacks", ()))],
        config=TrainerConfig(
            **{"device": device, "progress": "none", "epochs": 1, "mixed_precision": False}
            | with_defaults.get("settings", {}) | settings
        ),
    )  # fmt: skip
    try:
        trainer.fit()
    finally:
        watch.stop()


@pytest.mark.parametrize("case", CASES)
def test_a_fused_optimizer_needs_no_read(case):
    assert on_device(run, case, "AdamW fused")[0] == {}


@pytest.mark.parametrize("optimizer", ["SGD fused", "SGD fused, momentum"])
def test_no_fused_optimizer_needs_a_read(optimizer):
    assert on_device(run, "plain", optimizer)[0] == {}


@pytest.mark.parametrize("case", CASES)
def test_another_optimizer_needs_one_read_per_step(case):
    waits, _ = on_device(run, case, "AdamW")
    assert len(waits) == 1 and "step.py" in next(iter(waits)), waits
    assert sum(waits.values()) == LAST - FIRST


@pytest.mark.parametrize("optimizer", ["AdamW for each", "SGD"])
def test_every_other_optimizer_needs_one_read_per_step(optimizer):
    waits, _ = on_device(run, "plain", optimizer)
    assert sum(waits.values()) == LAST - FIRST, waits


@pytest.mark.parametrize("case", VALIDATED)
def test_a_validation_batch_needs_no_read(case):
    assert on_device(run, case, "AdamW fused", "validate")[0] == {}


def test_a_batch_on_the_device_is_looked_at_with_one_read():
    """Only there, and only if bad samples are to be dropped."""
    waits, _ = on_device(run_dropping, "AdamW fused")
    assert len(waits) == 1 and "tolist at dropping.py" in next(iter(waits)), waits
    assert sum(waits.values()) == LAST - FIRST


# On a real GPU, PyTorch itself tells.

PRECISIONS = {
    "float32": {}, "bfloat16": {"mixed_precision": True, "amp_dtype": "bfloat16"},
    "float16": {"mixed_precision": True, "amp_dtype": "float16"},
}  # fmt: skip
# With label smoothing and class weights, PyTorch's own loss reads on CUDA.
ON_A_GPU = [case for case in CASES if case != "smoothed class weights"]
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.mark.parametrize("precision", [pytest.param(name, marks=on_a_gpu) for name in PRECISIONS])
@pytest.mark.parametrize("case", ON_A_GPU)
def test_cuda_sees_no_read_with_a_fused_optimizer(case, precision):
    run_watched(case, "AdamW fused", "train", CudaWatch(), "cuda", **PRECISIONS[precision])


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=on_a_gpu) for case in VALIDATED if case in ON_A_GPU]
)
def test_cuda_sees_no_read_in_a_validation(case):
    run_watched(case, "AdamW fused", "validate", CudaWatch(), "cuda")
