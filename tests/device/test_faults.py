"""What is right on a CPU and was wrong on a device."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from device import on_device
from ununennium import CheckpointCallback, Trainer, TrainerConfig
from ununennium.training.checkpoint import load_file

WEIGHT = torch.tensor([1.0, 2.0, 0.5])


def make_batches(count=8, spoiled=(), nodata=()):
    batches = []
    for number in range(count):
        image, mask = torch.randn(2, 4, 6, 6), torch.randint(3, (2, 6, 6))
        mask[0, 0] = 255
        if number in spoiled:
            image[0, 0, 0, 0] = torch.nan
        if number in nodata:
            mask[:] = 255
        batches.append((image, mask))
    return batches


def make_trainer(train, optimizer="fused", device="gpu", loss=None, scheduler=None, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    model = model.to(device)
    optimizer = {
        "fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
        "plain": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
        "for each": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=False),
    }[optimizer](model.parameters())
    callbacks = settings.pop("callbacks", [])
    config = TrainerConfig(**{"device": device, "progress": "none"} | settings)
    return Trainer(
        model, optimizer, loss or nn.CrossEntropyLoss(ignore_index=255), train,
        scheduler=scheduler and scheduler(optimizer), callbacks=callbacks, config=config,
    )  # fmt: skip


def state_of(trainer):
    return {name: value.cpu().host if hasattr(value, "host") else value.cpu()
            for name, value in trainer.model.state_dict().items()}  # fmt: skip


def result_of(trainer, epochs=1):
    """Train quietly; return parameters and buffers, history and steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = trainer.fit(epochs)
    state = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
    return state, {name: history[name] for name in sorted(history)}, trainer.global_step


def same(one, other, but=None):
    assert one[2] == other[2]
    for name in one[1]:
        assert one[1][name] == pytest.approx(other[1][name], rel=1e-6, nan_ok=True), name
    for name in (name for name in one[0] if not but or not name.startswith(but)):
        a, b = torch.tensor(one[0][name]).double(), torch.tensor(other[0][name]).double()
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), name


# Steps, skipped and empty.


def train_with(optimizer, device, where, accumulation, spoiled, nodata, weighted=False):
    torch.manual_seed(1)
    batches = make_batches(10, spoiled, nodata)
    if where == "gpu":
        batches = [(image.to("gpu"), mask.to("gpu")) for image, mask in batches]
    loss = nn.CrossEntropyLoss(WEIGHT if weighted else None, ignore_index=255)
    return result_of(
        make_trainer(batches, optimizer, device, loss, accumulation_steps=accumulation)
    )


@pytest.mark.parametrize("optimizer", ["fused", "SGD", "plain", "for each"])
@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_without_valid_pixels_do_nothing_wherever_the_labels_are(
    optimizer, where, accumulation
):
    """But running statistics see a batch on the device that shares its window with others."""
    details = accumulation, (3,), (0, 4, 5, 9)
    expected = on_device(train_with, optimizer, "cpu", "host", *details)
    assert expected[1]["train_empty_batches"] == [4.0]
    assert expected[1]["train_skipped_steps"] == [1.0]
    found = on_device(train_with, optimizer, "gpu", where, *details)
    same(found, expected, but="1." if where == "gpu" and accumulation > 1 else None)


def test_class_weights_of_labels_on_the_device():
    details = 1, (3,), (0, 4, 5, 9), True
    expected = on_device(train_with, "fused", "cpu", "host", *details)
    same(on_device(train_with, "fused", "gpu", "gpu", *details), expected)


def all_skipped():
    trainer = make_trainer(make_batches(8, spoiled=range(8)), max_skipped_steps=5)
    with pytest.raises(RuntimeError, match="5 steps in a row were skipped"):
        trainer.fit(1)


def test_too_many_skipped_steps_end_the_run():
    on_device(all_skipped)


def resume_after(steps, folder):
    """Stop after some steps and continue in a new trainer; and train without a stop."""

    def stop(trainer, batch, logs):
        if trainer.batch == steps:
            trainer.request_stop("enough")

    def make(**settings):
        torch.manual_seed(2)
        cycle = functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=100)
        return make_trainer(make_batches(8, spoiled=(1, 5)), scheduler=cycle, **settings)

    whole, first, second = make(), make(), make()
    first.callbacks = [type("Stop", (), {"on_batch_end": staticmethod(stop)})()]
    result_of(first)
    first.save_checkpoint(folder / "file.pt")
    second.load_checkpoint(folder / "file.pt")
    return result_of(whole, 2), result_of(second, 2)


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_a_run_with_skipped_steps_resumes_in_the_middle_of_an_epoch(steps, tmp_path):
    whole, resumed = on_device(resume_after, steps, tmp_path)
    assert whole[2] == 12 and whole[1]["train_skipped_steps"] == [2.0, 2.0]
    same(resumed, whole)


# Files between optimizers of another kind.


def continue_with(before, after, folder):
    from device.pretend import WATCH

    torch.manual_seed(3)
    batches = make_batches(12)
    first = make_trainer(batches, before)
    first.fit(1)
    first.save_checkpoint(folder / "file.pt")
    second = make_trainer(batches, after)
    second.load_checkpoint(folder / "file.pt")
    WATCH.start()
    second.fit(2)
    WATCH.stop()
    steps = [entry["step"].device.type for entry in second.optimizer.state.values()]
    return set(steps), WATCH.waits, second.global_step


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [("plain", "fused", "gpu"), ("fused", "plain", "cpu"), ("fused", "for each", "cpu"),
     ("for each", "fused", "gpu"), ("fused", "fused", "gpu"), ("plain", "plain", "cpu")],
)  # fmt: skip
def test_step_counts_are_where_the_optimizer_wants_them(before, after, place, tmp_path):
    places, waits, steps = on_device(continue_with, before, after, tmp_path)
    assert places == {place} and steps == 36
    assert not any("adam" in line for line in waits), waits


def write_and_look(folder):
    trainer = make_trainer(make_batches(), callbacks=[CheckpointCallback(folder, "train_loss")])
    trainer.fit(1)
    trainer.save_checkpoint(folder / "own.pt")
    devices = set()
    for path in folder.glob("*.pt"):
        plain = torch.load(path, weights_only=True)  # as on a machine without a GPU
        devices |= {value.device.type for value in plain["model"].values()}
        load_file(path)
    return devices


def test_files_hold_tensors_of_the_host(tmp_path):
    assert on_device(write_and_look, tmp_path) == {"cpu"}


# The loss.


def train_with_loss(device, kind):
    loss = {
        "partial": functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=255),
        "partial of a partial": functools.partial(
            functools.partial(F.cross_entropy, weight=WEIGHT), ignore_index=255),
        "module": nn.CrossEntropyLoss(WEIGHT, ignore_index=255),
        "partial of a module": functools.partial(nn.CrossEntropyLoss(WEIGHT, ignore_index=255)),
    }[kind]  # fmt: skip
    torch.manual_seed(1)
    return result_of(make_trainer(make_batches(), "plain", device, loss))


@pytest.mark.parametrize("kind", ["partial", "partial of a partial", "module"])
def test_class_weights_are_moved_with_the_loss(kind):
    same(on_device(train_with_loss, "gpu", kind), on_device(train_with_loss, "cpu", "module"))


# Sums.


def mean_of(count, device):
    from ununennium.metrics import WeightedMean

    mean = WeightedMean()
    value, stepped = torch.tensor(1.0, device=device), torch.tensor(True, device=device)
    for _ in range(count):
        mean.update(value, 4_193_771.0, stepped)
    return mean.compute()


def test_the_mean_of_many_ones_is_one():
    assert on_device(mean_of, 20_000, "gpu") == 1.0


def means_of(values, kinds):
    """Return the mean on the host and on the device, and the state of a resumed one."""
    from ununennium.means import WeightedMean

    host, device, moved = WeightedMean(), WeightedMean(), WeightedMean()
    for value, weight, stepped in values:
        counts = weight > 0 and stepped
        host.update(torch.tensor(value), weight, stepped)
        device.update(
            torch.tensor(value if counts else float("nan")).to("gpu"),
            torch.tensor(weight).to("gpu") if "weight" in kinds else weight,
            torch.tensor(stepped).to("gpu") if "stepped" in kinds else stepped,
        )
        moved.load_state_dict(device.state_dict(), torch.device("gpu"))
        device.load_state_dict(moved.state_dict(), torch.device("gpu"))
    on_host = WeightedMean()
    on_host.load_state_dict(device.state_dict(), torch.device("cpu"))
    return host.compute(), device.compute(), on_host.compute()


@pytest.mark.parametrize("kinds", ["", "weight", "stepped", "weight and stepped"])
def test_means_on_the_device_are_those_of_the_host(kinds):
    torch.manual_seed(0)
    values = [
        (torch.randn(()).item(), int(weight), bool(torch.rand(()) < 0.7))
        for weight in torch.randint(0, 5, (40,))
    ]
    host, device, on_host = on_device(means_of, values, kinds)
    assert device == pytest.approx(host, rel=1e-12) and on_host == device
