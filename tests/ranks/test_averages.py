"""The average of the weights on two processes: one average, scored on all data, and resumed."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from processes import on_ranks
from small import assert_same
from ununennium import EMA, Callback, CheckpointCallback, Trainer, TrainerConfig, load_weights
from ununennium.scores import SCORES


class Chips(Dataset):
    """Chips with nodata, in float64; the last class is absent."""

    def __init__(self, count, first=0):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.first + index)
        image = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64)
        mask = image[:3].argmax(0)
        mask[torch.rand(6, 6, generator=generator) < 0.1 * (index % 5)] = 255
        return image, mask


def make_net(norm):
    torch.manual_seed(0)
    middle = nn.BatchNorm2d(8) if norm else nn.Tanh()
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), middle, nn.Conv2d(8, 4, 1)).double()


def make_loader(data, batch_size, shuffle):
    if not dist.is_initialized():
        return DataLoader(data, batch_size, shuffle=False)
    return DataLoader(data, batch_size, sampler=DistributedSampler(data, shuffle=shuffle))


def make_trainer(*callbacks, norm=True, batch_size=2, shuffle=True, epochs=3):
    model = make_net(norm)
    model = DistributedDataParallel(model) if dist.is_initialized() else model
    loaders = make_loader(Chips(24), batch_size, shuffle), make_loader(Chips(9, 100), 2, False)
    config = TrainerConfig(
        device="cpu", progress="none", epochs=epochs, seed=1, scores=SCORES, gradient_clip=None
    )
    loss = nn.CrossEntropyLoss(ignore_index=255)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.5)
    return Trainer(model, optimizer, loss, *loaders, callbacks=list(callbacks), config=config)


def found(trainer, ema):
    """Return what has to be the same: weights, their average, and all scores."""
    model = getattr(trainer.model, "module", trainer.model)
    return copy.deepcopy((dict(model.state_dict()), ema.state_dict(), dict(trainer.history)))


def train(folder, norm, batch_size):
    ema = EMA(0.8)
    trainer = make_trainer(ema, norm=norm, batch_size=batch_size, shuffle=False)
    trainer.fit()
    trainer.save_checkpoint(folder / "end.pt")
    return found(trainer, ema)


@pytest.mark.parametrize("norm", [True, False])
def test_two_processes_have_one_average_and_its_scores_are_those_of_all_data(tmp_path, norm):
    first, second = on_ranks(2, train, tmp_path, norm, 2)
    assert_same(first, second)
    _, state, history = first
    assert state["updates"] == 18
    one = make_trainer(norm=norm)  # a single process, over the data of both
    load_weights(one.model, tmp_path / "end.pt", averaged=True)
    assert_same(dict(one.model.state_dict()), state["model"])
    scores = {name: value for name, value in one.validate().items() if "_classes" not in name}
    assert {name.replace("val_", "val_ema_") for name in scores} == {
        name for name in history if name.startswith("val_ema_")
    }
    for name, value in scores.items():
        own = history[name.replace("val_", "val_ema_")][-1]
        assert own == pytest.approx(value, rel=1e-9, nan_ok=True), name
    assert history["val_ema_loss"] != history["val_loss"]


def test_the_average_of_two_processes_is_that_of_one_with_batches_twice_as_large(tmp_path):
    (_, state, history), _ = on_ranks(2, train, tmp_path, False, 2)
    torch.manual_seed(0)
    _, alone, wanted = train(tmp_path, False, 4)
    assert alone["updates"] == state["updates"]
    torch.testing.assert_close(state["model"], alone["model"], rtol=0, atol=1e-9)
    for name, values in wanted.items():
        assert history[name] == pytest.approx(values, rel=1e-6, nan_ok=True), name


class Stop(Callback):
    """Stop in the middle of an epoch, or while the raw weights are validated."""

    def __init__(self, step, phase):
        self.step, self.phase = step, phase

    def on_safepoint(self, trainer, phase):
        if phase == self.phase and trainer.global_step == self.step:
            trainer.request_stop("enough")


def train_to(folder, step, phase="train"):
    ema, files = EMA(0.8), CheckpointCallback(folder, monitor="val_ema_IoU", mode="max")
    trainer = make_trainer(ema, files, Stop(step, phase))
    trainer.resume(folder)
    trainer.fit()
    return found(trainer, ema), trainer.global_step


@pytest.mark.parametrize(("step", "phase"), [(4, "train"), (9, "train"), (6, "validate")])
def test_a_file_of_two_processes_resumes_to_the_same_average(tmp_path, step, phase):
    whole = on_ranks(2, train_to, tmp_path / "whole", None)
    stopped = on_ranks(2, train_to, tmp_path / "parts", step, phase)
    resumed = on_ranks(2, train_to, tmp_path / "parts", None)
    (taken,) = {taken for _, taken in stopped}
    assert taken in (step, step + 1)  # the processes agree with the next step, if there is one
    for own, other in zip(whole, resumed, strict=True):
        assert_same(own, other)


def train_with_one_validation():
    ema = EMA(0.8)
    trainer = make_trainer(ema, epochs=1)
    if dist.get_rank() == 1:
        trainer.val_loader = None
    trainer.fit()
    return found(trainer, ema)


def test_a_process_without_validation_has_the_same_scores_of_the_average():
    first, second = on_ranks(2, train_with_one_validation)
    assert_same(first, second)
    assert "val_ema_loss" in first[2]


def refused():
    model = fully_shard(make_net(True), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    loader = make_loader(Chips(8), 2, False)
    config = TrainerConfig(device="cpu", progress="none")
    loss = nn.CrossEntropyLoss(ignore_index=255)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, loss, loader, callbacks=[EMA()], config=config)
    with pytest.raises(ValueError, match="EMA cannot average a model that is divided"):
        trainer.fit(1)
    with pytest.raises(ValueError, match="divided among processes cannot predict"):
        trainer.predict(loader)
    return trainer.global_step


def test_a_model_that_is_divided_among_processes_is_refused():
    assert on_ranks(2, refused) == [0, 0]
