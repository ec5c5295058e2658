"""What is trained: models, data and the counts of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Samples(Dataset):
    """Samples in memory. A batch is read at once, so that the loader takes little time."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices):
        """Return a batch. PyTorch's loaders call this one if there is one."""
        return self[indices]


class Chips(Dataset):
    """Satellite images with 13 bands, stored as integers and scaled when they are read."""

    def __init__(self, count: int, classes: int) -> None:
        stored = 32  # they repeat
        self.count = count
        self.images = torch.randint(10_000, (stored, 13, 128, 128), dtype=torch.int16)
        self.masks = torch.randint(classes, (stored, 128, 128), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        index %= len(self.images)
        return self.images[index].float() / 10_000, self.masks[index].long()


def as_it_is(batch):
    """Collate nothing: `Samples` returns whole batches."""
    return batch


def vectors(count: int, classes: int) -> Dataset:
    """Return vectors of 16 numbers and their classes."""
    return Samples(torch.randn(count, 16), torch.randint(classes, (count,)))


def images(count: int, classes: int) -> Dataset:
    """Return images of 4 bands and 64 × 64 pixels, and their masks."""
    return Samples(torch.randn(count, 4, 64, 64), torch.randint(classes, (count, 64, 64)))


def mlp(classes: int) -> nn.Module:
    """Return two linear layers."""
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, classes))


def unet(classes: int) -> nn.Module:
    """Return the project's small U-Net."""
    from ununennium.models import UNet

    return UNet(4, classes)


def two_convolutions(classes: int) -> nn.Module:
    """Return a model that is so quick that the loader matters."""
    return nn.Sequential(nn.Conv2d(13, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))


@dataclass(frozen=True)
class Workload:
    """A model, its data, and how long to train: one epoch, then one pass over validation data."""

    model: Callable[[int], nn.Module]
    data: Callable[[int, int], Dataset]
    train_batches: int
    val_batches: int
    batch_size: int = 32
    accumulation: int = 1
    classes: int = 4
    fused: bool = False  # the optimizer, AdamW
    workers: int = 0  # processes that load data

    @property
    def has_tail(self) -> bool:
        """Whether the last batches are too few for a whole accumulation window."""
        return self.train_batches % self.accumulation > 0


TINY = Workload(mlp, vectors, 2000, 20)
WORKLOADS = {
    "tiny MLP, 2000 steps": TINY,
    "tiny MLP, fused AdamW": replace(TINY, fused=True),
    "validation-heavy, 100 + 1000 batches": replace(TINY, train_batches=100, val_batches=1000),
    "accumulation 4": replace(TINY, accumulation=4),
    "accumulation 4, ragged tail": replace(TINY, accumulation=4, train_batches=1998),
    "U-Net 64×64×4, batch 8": Workload(unet, images, 12, 4, batch_size=8, classes=5),
    "2 workers, 13×128×128": Workload(
        two_convolutions, Chips, 100, 20, batch_size=4, classes=5, workers=2
    ),
    "20 steps (fixed cost)": replace(TINY, train_batches=20, val_batches=2),
}


@dataclass
class Job:
    """Everything that a contender needs. All of them get the same."""

    workload: Workload
    model: nn.Module
    loss_fn: nn.Module
    optimizer: torch.optim.Optimizer
    train_data: Dataset
    val_data: Dataset

    @property
    def optimizer_options(self) -> dict:
        """The optimizer's arguments, for libraries that make their own AdamW."""
        return {"lr": 1e-3, "fused": self.workload.fused}

    @property
    def loader_options(self) -> dict:
        """The loader's arguments, for libraries that make their own `DataLoader`."""
        options = {"batch_size": self.workload.batch_size, "num_workers": self.workload.workers}
        return options | ({"collate_fn": as_it_is} if isinstance(self.train_data, Samples) else {})

    @property
    def train_loader(self) -> DataLoader:
        """A new loader of the training data. It does not shuffle: results are compared."""
        return DataLoader(self.train_data, **self.loader_options)

    @property
    def val_loader(self) -> DataLoader:
        """A new loader of the validation data."""
        return DataLoader(self.val_data, **self.loader_options)


def make_job(workload: Workload) -> Job:
    """Return a job with the same numbers in every process."""
    torch.manual_seed(0)
    model = workload.model(workload.classes)
    train, val = (
        workload.data(count * workload.batch_size, workload.classes)
        for count in (workload.train_batches, workload.val_batches)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=workload.fused)
    return Job(workload, model, nn.CrossEntropyLoss(), optimizer, train, val)


class Confusion:
    """The confusion matrix of all validation data, for all contenders but the trainer."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.table = torch.zeros(classes * classes, dtype=torch.int64)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Count the pairs of truth and prediction in a batch."""
        pairs = target * self.classes + output.argmax(1)
        self.table += torch.bincount(pairs.flatten(), minlength=self.classes**2)

    def iou(self) -> float:
        """Return the mean over classes of intersection over union."""
        table = self.table.reshape(self.classes, self.classes)
        hits = table.diagonal()
        return (hits / (table.sum(0) + table.sum(1) - hits)).nanmean().item()
