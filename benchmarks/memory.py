"""The memory of the trainer: flat over a long epoch, and at its peak beside a loop by hand.

    python benchmarks/memory.py [--steps 100000]

The first table trains a tiny model for one epoch. It shows what the process holds and how long a
step takes, by tenths of the epoch. The second compares peaks of fresh processes that train a U-Net.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from loop import by_hand, by_trainer, image_data, mlp
from torch import nn

from ununennium import Callback, Trainer, TrainerConfig
from ununennium.models import UNet

PEAKS = {"by hand": by_hand, "trainer": by_trainer}


def resident() -> float:
    """Return the memory that this process holds now, in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class Batches:
    """The same batch again and again, as long as an epoch shall be."""

    def __init__(self, count: int) -> None:
        self.count, self.batch = count, (torch.randn(32, 16), torch.randint(4, (32,)))

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return iter([self.batch] * self.count)


class Tenths(Callback):
    """Notes memory and time after each tenth of an epoch."""

    def __init__(self, count: int) -> None:
        self.every, self.seen = count // 10, [(time.perf_counter(), resident())]

    def on_safepoint(self, trainer, phase: str) -> None:
        """Look once in a while."""
        if trainer.batch % self.every == 0:
            self.seen.append((time.perf_counter(), resident()))


def long_epoch(steps: int, fused: bool) -> list[tuple[float, float]]:
    """Return megabytes and microseconds per step, by tenths of an epoch."""
    model, tenths = mlp(), Tenths(steps)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    config = TrainerConfig(device="cpu", progress="none")
    Trainer(
        model, optimizer, nn.CrossEntropyLoss(), Batches(steps), callbacks=[tenths], config=config
    ).fit(1)
    pairs = zip(tenths.seen, tenths.seen[1:], strict=False)
    return [(now[1], (now[0] - then[0]) / tenths.every * 1e6) for then, now in pairs]


def peak_of(name: str) -> None:
    """Print the peak of this process after a short U-Net training, in megabytes."""
    data = image_data(6, torch.Generator().manual_seed(0))
    model = UNet(4, 5)
    optimizer, loss = torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss()
    PEAKS[name](model, optimizer, loss, data, data[:2], 2, 5)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def peak_in_a_process(name: str) -> float:
    """Return the peak of a fresh process."""
    command = [sys.executable, __file__, "--peak", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        return peak_of(options.peak)
    for fused in (False, True):
        found = long_epoch(options.steps, fused)
        print(f"{options.steps} steps, fused={fused}: MB and microseconds per step, by tenths")
        print(" ".join(f"{megabytes:7.1f}" for megabytes, _ in found))
        print(" ".join(f"{micros:7.0f}" for _, micros in found), flush=True)
    peaks = {name: [peak_in_a_process(name) for _ in range(3)] for name in PEAKS}
    for name, found in peaks.items():
        ratio = statistics.median(found) / statistics.median(peaks["by hand"])
        print(f"U-Net, {name}: {statistics.median(found):.0f} MB, {ratio:.3f}")


if __name__ == "__main__":
    main()
