"""What a script does on one rank only, or differently on each, is told before anything hangs."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    WeightedRandomSampler,
)

from processes import on_ranks
from ununennium import (
    Callback,
    CheckpointCallback,
    EarlyStopping,
    Trainer,
    TrainerConfig,
    class_weights,
    count_classes,
)


class Chips(Dataset):
    def __init__(self, count=16):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(index))
        return image, (image.argmax(0) + index) % 3


class Stream(IterableDataset):
    def __init__(self, is_shared):
        self.is_shared = is_shared

    def __iter__(self):
        first, step = (dist.get_rank(), dist.get_world_size()) if self.is_shared else (0, 1)
        return (Chips()[number] for number in range(first, 16, step))


class Net(nn.Module):
    """A norm, so that DDP exchanges buffers in its forward passes, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))

    def forward(self, x):
        return self.body(x)


def shared(dataset=None, **options):
    dataset = dataset or Chips()
    return DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, **options))


def make_trainer(train=None, val=None, callbacks=(), loss=None, metrics=None, **config):
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = TrainerConfig(**({"epochs": 2, "device": "cpu", "progress": "none"} | config))
    return Trainer(
        model, optimizer, loss or nn.CrossEntropyLoss(), shared() if train is None else train, val,
        callbacks=list(callbacks), config=config, metrics=metrics,
    )  # fmt: skip


def outcome(action):
    """Return the error of an action, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            action()
            error = ""
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return error, [str(warning.message) for warning in caught]


# Calls that one rank makes alone.


def call_alone(name, folder):
    trainer = make_trainer(val=shared())
    is_main = dist.get_rank() == 0
    alone = {
        "save_checkpoint": lambda: trainer.save_checkpoint(f"{folder}/run.pt"),
        "validate": trainer.validate,
        "check": trainer.check,
        "resume": lambda: trainer.resume(folder),
        "load_checkpoint": lambda: trainer.load_checkpoint(f"{folder}/none.pt"),
    }

    def script():
        if is_main:
            alone[name]()
        trainer.fit(1)

    return outcome(script)[0]


@pytest.mark.parametrize(
    "name", ["save_checkpoint", "validate", "check", "resume", "load_checkpoint"]
)
def test_a_call_of_one_rank_is_named(name, tmp_path):
    for error in on_ranks(2, call_alone, name, str(tmp_path)):
        assert error.startswith("RuntimeError: The ranks have parted")
        assert f"rank 0 is in {name} and rank 1 is in fit" in error
    assert not list(tmp_path.iterdir())


def train_again():
    trainer = make_trainer()

    def fail(trainer, *details):
        raise OSError("the archive is gone")

    if dist.get_rank() == 1:
        failing = Callback()
        failing.on_epoch_end = fail
        trainer.callbacks.append(failing)
    first, _ = outcome(trainer.fit)
    trainer.callbacks = []
    later = trainer.fit, trainer.check, lambda: trainer.save_checkpoint("run.pt"), make_trainer
    return first, [outcome(action)[0] for action in later]


def test_after_a_failure_the_processes_have_to_start_again():
    (first, later), (own, own_later) = on_ranks(2, train_again)
    assert first.startswith("RankFailed: Rank 1 failed: OSError: the archive is gone.")
    assert own == "OSError: the archive is gone"
    for error in (*later, *own_later):
        assert error.startswith("RankMissing: A rank has failed") and "resume" in error


# Settings that differ.


def differ(case, folder):
    rank = dist.get_rank()
    names = ["accuracy", "other"] if case == "metrics" and rank else ["accuracy"]
    metrics = {name: Count() for name in names} if case == "metrics" else None
    callbacks = {
        "checkpoint": [CheckpointCallback(folder)],
        "stopping": [EarlyStopping("train_loss")],
        "logger": [Callback()],
    }
    steps = 1 + rank if case == "accumulation" else 1
    own = callbacks.get(case, []) if rank == 0 else []
    trainer = make_trainer(
        val=shared(), callbacks=own, metrics=metrics, accumulation_steps=steps, seed=rank
    )
    epochs = 1 + rank if case == "epochs" else 2
    error, _ = outcome(lambda: trainer.fit(epochs))
    if error:
        assert trainer.global_step == 0
        trainer.callbacks, trainer.run.config.accumulation_steps = [], 1
        trainer.run.evaluator.metrics = None
        assert len(trainer.fit(1)["train_loss"]) == 1  # the ranks are still in step
    return error


class Count:
    """A metric that counts batches."""

    def __init__(self):
        self.count = 0

    def update(self, output, target):
        self.count += 1

    def merge_state(self, others):
        self.count += sum(other.count for other in others)

    def compute(self):
        return float(self.count)

    def reset(self):
        self.count = 0


DIFFERENCES = {
    "accumulation": "accumulation_steps is 1 on rank 0 and 2 on rank 1.",
    "epochs": "The number of epochs at the end of fit is 1 on rank 0 and 2 on rank 1.",
    "checkpoint": "need all ranks is ['CheckpointCallback'] on rank 0 and [] on rank 1.",
    "stopping": "need all ranks is ['EarlyStopping'] on rank 0 and [] on rank 1.",
    "metrics": "metrics is ['accuracy'] on rank 0 and ['accuracy', 'other'] on rank 1.",
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_setting_that_differs_is_an_error_before_the_first_step(case, tmp_path):
    for error in on_ranks(2, differ, case, str(tmp_path)):
        assert error.startswith("ValueError: ") and DIFFERENCES[case] in error


@pytest.mark.parametrize("case", ["logger", "nothing"])
def test_a_rank_may_have_a_logger_and_a_seed_of_its_own(case, tmp_path):
    assert on_ranks(2, differ, case, str(tmp_path)) == ["", ""]


# Data that is not shared.


def loader_of(case):
    chips, rank = Chips(), dist.get_rank()
    batches = [(image[None], mask[None]) for image, mask in map(chips.__getitem__, range(16))]
    generator = torch.Generator().manual_seed(0 if "same" in case else rank)
    weighted = WeightedRandomSampler([1.0] * 16, 16, generator=generator)
    return {
        "plain": lambda: DataLoader(chips, 2),
        "list": lambda: batches,
        "part of a list": lambda: batches[rank::2],
        "stream": lambda: DataLoader(Stream(is_shared=False), 2),
        "part of a stream": lambda: DataLoader(Stream(is_shared=True), 2),
        "same weighted": lambda: DataLoader(chips, 2, sampler=weighted),
        "weighted": lambda: DataLoader(chips, 2, sampler=weighted),
        "sampler": lambda: shared(),
        "seed": lambda: shared(seed=rank),
        "rank": lambda: shared(num_replicas=2, rank=0),
        "other size": lambda: shared(num_replicas=4, rank=rank),
    }[case]()


def read(case):
    return outcome(lambda: make_trainer(loader_of(case)).fit(1))


READ = {
    "plain": ["Each of 2 processes reads all 16 samples of train_loader"],
    "list": ["Ranks 0, 1 begin with the same batch of train_loader"],
    "part of a list": [],
    "stream": ["Ranks 0, 1 begin with the same batch of train_loader"],
    "part of a stream": [],
    "same weighted": ["Ranks 0, 1 begin with the same batch of train_loader"],
    "weighted": [],
    "sampler": [],
    "seed": ["The DistributedSampler of train_loader has another seed on each rank: 0 on rank 0"],
    "rank": [
        "The DistributedSamplers of train_loader are those of ranks 0, 0",
        "Ranks 0, 1 begin with the same batch of train_loader",
    ],
    "other size": [],
}


@pytest.mark.parametrize("case", READ)
def test_ranks_that_read_the_same_samples_are_told(case):
    (error, main), (other_error, others) = on_ranks(2, read, case)
    assert (error, other_error, others) == ("", "", [])  # rank 0 speaks for all
    assert len(main) == len(READ[case])
    for text, start in zip(main, READ[case], strict=True):
        assert text.startswith(start)


def weigh(is_whole):
    loader = shared()
    counts = count_classes(Chips() if is_whole else loader, 3)
    loss = nn.CrossEntropyLoss(class_weights(counts))
    return outcome(lambda: make_trainer(loader, loss=loss))


def test_class_weights_of_one_ranks_share_are_told():
    (error, [text]), _ = on_ranks(2, weigh, False)
    assert not error and text.startswith("loss_fn.weight is [") and "count_classes(dataset" in text
    assert on_ranks(2, weigh, True) == [("", []), ("", [])]


# Models that differ.


def spoil():
    """Rank 1 alone has a parameter that is NaN; rank 0 does not see it."""

    def change(trainer, *details):
        if dist.get_rank() == 1:
            nn.init.constant_(trainer.model.module.body[2].bias, math.nan)

    callback = Callback()
    callback.on_safepoint = change
    trainer = make_trainer(DataLoader(Chips(4), 2, sampler=DistributedSampler(Chips(4))))
    trainer.callbacks = [callback]
    return outcome(lambda: trainer.fit(1))


def test_a_parameter_that_is_nan_on_one_rank_is_named():
    (_, texts), _ = on_ranks(2, spoil)
    assert any("body.2.bias differs between them" in text for text in texts)


def draw():
    torch.manual_seed(3)
    trainer = make_trainer(seed=7, epochs=1)
    drawn = []
    callback = Callback()
    callback.on_train_start = lambda trainer: drawn.append(torch.rand(1).item())
    trainer.callbacks = [callback]
    trainer.fit()
    return drawn[0]


def test_each_rank_draws_its_own_random_numbers():
    first, second = on_ranks(2, draw)
    assert first == torch.rand(1, generator=torch.Generator().manual_seed(7)).item()
    assert second == torch.rand(1, generator=torch.Generator().manual_seed(8)).item()
