"""The trainer over several processes against hand-written DDP: the ratio of their times.

    python benchmarks/processes.py [--ranks 1 2 4] [--rounds 9] [--batches 60]

Gloo ranks train a U-Net on images of 64 x 64 pixels, 4 of them in a batch of each rank. Both loops
do the same: read from memory, forward, cross-entropy, backward, which exchanges gradients, clip,
take an optimizer step, keep a running mean of the loss. The hand-written one averages over ranks
and counts every batch alike, as most scripts do. Rounds are interleaved, and a ratio is the median
over rounds of trainer / hand-written in the same round, which runs the latter before and after.
*Noise* is the hand-written loop against itself. The time of a round is that of its slowest rank.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ununennium import Trainer, TrainerConfig
from ununennium.models import UNet


def make_batches(rank, count):
    """Return batches of 4 images of 4 bands and their masks."""
    generator = torch.Generator().manual_seed(rank)
    return [
        (
            torch.randn(4, 4, 64, 64, generator=generator),
            torch.randint(5, (4, 64, 64), generator=generator),
        )
        for _ in range(count)
    ]


def make_parts():
    """Return the same wrapped model on all ranks, and its optimizer."""
    torch.manual_seed(0)
    net = UNet(4, 5)
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def by_hand(batches, accumulation):
    """Return the seconds of an epoch as one would write it."""
    (model, optimizer), loss_fn = make_parts(), nn.CrossEntropyLoss()
    model.train()
    total = torch.zeros(())
    begin = start()
    for number, (x, y) in enumerate(batches, 1):
        is_last = number % accumulation == 0
        waits = dist.is_initialized() and not is_last
        with model.no_sync() if waits else contextlib.nullcontext():
            loss = loss_fn(model(x), y)
            (loss / accumulation).backward()
        total += loss.detach()
        if is_last:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return end(begin)


def by_trainer(batches, accumulation):
    """Return the seconds of the same epoch with the trainer."""
    config = TrainerConfig(device="cpu", progress="none", accumulation_steps=accumulation)
    trainer = Trainer(*make_parts(), nn.CrossEntropyLoss(), batches, config=config)
    begin = start()
    trainer.fit(1)
    return end(begin)


def start():
    """Return the time when all ranks are ready."""
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


def end(begin):
    """Return the seconds since then on the slowest rank."""
    seconds = torch.tensor(time.perf_counter() - begin)
    if dist.is_initialized():
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def compare(rank, size, path, rounds, count, accumulation):
    """Run all rounds on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    batches, noise, ratios, plain = make_batches(rank, count), [], [], []
    for number in range(rounds + 1):
        first = by_hand(batches, accumulation)
        ours = by_trainer(batches, accumulation)
        second = by_hand(batches, accumulation)
        if number:  # the first round warms up
            noise.append(second / first)
            ratios.append(2 * ours / (first + second))
            plain.append((first + second) / 2 / count)
    if rank == 0:
        milliseconds = 1000 * statistics.median(plain)
        print(
            f"{size} rank{'s' * (size > 1):1}, accumulation {accumulation}: "
            f"{milliseconds:6.1f} ms per batch by hand, noise {statistics.median(noise):.3f}, "
            f"trainer {statistics.median(ratios):.3f}",
            flush=True,
        )
    if size > 1:
        dist.destroy_process_group()


def main():
    """Compare for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=60, help="per epoch and rank")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    for size in options.ranks:
        for accumulation in options.accumulation:
            with tempfile.TemporaryDirectory() as folder:
                details = (size, f"{folder}/group", options.rounds, options.batches, accumulation)
                torch.multiprocessing.spawn(compare, details, nprocs=size)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
