"""What exact resuming costs: the trainer with and without a `ResumableLoader`.

    python benchmarks/exactness.py [--rounds 7]

The smallest model of `loop.py`, for 2000 steps. *reading* compares the loader alone, read through a
`ResumableLoader` and read as it is: the median difference per batch, as a share of a training step.
*run* compares whole runs with a `ResumableLoader` and with one that records nothing, and *control*
is the latter with itself: what is noise. Rounds are interleaved.
"""

import argparse
import statistics
import time

import torch
from loop import mlp, mlp_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium import Trainer, TrainerConfig
from ununennium.training.loader import ResumableLoader

BATCHES, SIZE = 2000, 32


class NoRecord(ResumableLoader):
    """Read a loader and record nothing."""

    def __iter__(self):
        return iter(self.loader)


class Without(Trainer):
    """A trainer whose loader is read without notes."""

    def fit(self, epochs=None):
        """Train as ever, on a loader that keeps no record."""
        self.run.loaders["train"] = NoRecord(self.train_loader)
        return super().fit(epochs)


def loaders():
    """Return the same samples as a list of batches and as data loaders, by name."""
    batches = mlp_data(BATCHES, torch.Generator().manual_seed(0))
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
    options = {"batch_size": SIZE, "shuffle": True}
    return {
        "list of batches": batches,
        "DataLoader": DataLoader(data, **options),
        "DataLoader, 2 workers": DataLoader(data, num_workers=2, **options),
    }


def train(kind, loader):
    """Return the seconds of a run of one epoch."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = TrainerConfig(device="cpu", progress="none")
    trainer = kind(model, optimizer, nn.CrossEntropyLoss(), loader, config=config)
    start = time.perf_counter()
    trainer.fit(1)
    return time.perf_counter() - start


def read(kind, loader):
    """Return the seconds that it takes to read all batches."""
    batches = kind(loader)
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each loader."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'loader':24s} {'step':>8s} {'reading':>20s} {'run':>6s} {'control':>8s}")
    for name, loader in loaders().items():
        more, ratio, control, steps = [], [], [], []
        for _ in range(rounds):
            more.append(read(ResumableLoader, loader) - read(NoRecord, loader))
            before, seconds, after = (train(kind, loader) for kind in (Without, Trainer, Without))
            ratio.append(2 * seconds / (before + after))
            control.append(after / before)
            steps.append(before / BATCHES)
        step, extra = statistics.median(steps), statistics.median(more) / BATCHES
        reading = f"{1e6 * extra:6.1f} µs = {extra / step:6.2%}"
        ratios = f"{statistics.median(ratio):6.3f} {statistics.median(control):8.3f}"
        print(f"{name:24s} {1e6 * step:5.0f} µs {reading:>20s} {ratios}", flush=True)


if __name__ == "__main__":
    main()
