"""The trainer against the same loop written by hand: the ratio of their times.

    python benchmarks/loop.py [--device cpu] [--rounds 7] [--fused]

Both do the same work: forward, cross-entropy, backward, clipping, optimizer step, a running mean of
the loss without reading it, and a validation pass with a confusion matrix. Rounds are interleaved,
and a ratio is the median over rounds of trainer / hand-written in the same round, which runs the
latter before and after. The first column is the hand-written loop against itself: what is noise.
Final parameters are compared too.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from ununennium import Trainer, TrainerConfig
from ununennium.models import UNet


def by_hand(model, optimizer, loss_fn, train, val, accumulation, classes):
    """Train one epoch as one would write it, and validate."""
    model.train()
    device = next(model.parameters()).device
    parameters = list(model.parameters())
    total, count = torch.zeros((), device=device), 0
    for start in range(0, len(train), accumulation):
        window = train[start : start + accumulation]
        for x, y in window:
            loss = loss_fn(model(x.to(device, non_blocking=True)), y.to(device, non_blocking=True))
            (loss / len(window) if len(window) > 1 else loss).backward()
            total += loss.detach()
            count += 1
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    table = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    with torch.no_grad():
        for x, y in val:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            output = model(x)
            total += loss_fn(output, y)
            pairs = (y * classes + output.argmax(1)).flatten()
            table += torch.bincount(pairs, minlength=classes * classes)
    return total.item() / max(1, count), table.cpu()


def by_trainer(model, optimizer, loss_fn, train, val, accumulation, classes):
    """Do the same with the trainer."""
    config = TrainerConfig(
        device=str(next(model.parameters()).device),
        mixed_precision=False,
        accumulation_steps=accumulation,
        progress="none",
    )
    return Trainer(model, optimizer, loss_fn, train, val or None, config=config).fit(1)


def mlp_data(count, generator):
    """Return batches of 32 vectors and classes."""
    return [
        (torch.randn(32, 16, generator=generator), torch.randint(4, (32,), generator=generator))
        for _ in range(count)
    ]


def image_data(count, generator):
    """Return batches of 8 images of 4 bands and their masks."""
    return [
        (
            torch.randn(8, 4, 64, 64, generator=generator),
            torch.randint(5, (8, 64, 64), generator=generator),
        )
        for _ in range(count)
    ]


def mlp():
    """Return two linear layers."""
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


WORKLOADS = {
    "tiny MLP, 2000 steps": (mlp, mlp_data, 2000, 0, 1, 4),
    "validation-heavy (100 train, 1000 val)": (mlp, mlp_data, 100, 1000, 1, 4),
    "accumulation 4, 2000 batches": (mlp, mlp_data, 2000, 0, 4, 4),
    "U-Net 64×64×4, batch 8, 12 steps": (lambda: UNet(4, 5), image_data, 12, 4, 1, 5),
    "20 steps (fixed cost)": (mlp, mlp_data, 20, 0, 1, 4),
}


def timed(loop, workload, device, fused):
    """Return seconds of one epoch, and the parameters after it."""
    build, data, train, val, accumulation, classes = workload
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, val = data(train, generator), data(val, generator)
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    start = time.perf_counter()
    loop(model, optimizer, nn.CrossEntropyLoss(), train, val, accumulation, classes)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, nn.utils.parameters_to_vector(model.parameters()).detach().cpu()


def main() -> None:
    """Print a line for each workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--fused", action="store_true", help="a fused AdamW, which skips on the device"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'workload':42s} {'control':>8s} {'trainer':>8s}  parameters")
    for name, workload in WORKLOADS.items():
        control, ratio, equal = [], [], True
        for _ in range(options.rounds):
            hand, expected = timed(by_hand, workload, options.device, options.fused)
            ours, found = timed(by_trainer, workload, options.device, options.fused)
            again, _ = timed(by_hand, workload, options.device, options.fused)
            control.append(again / hand)
            ratio.append(2 * ours / (hand + again))
            equal = torch.equal(expected, found)
        medians = f"{statistics.median(control):8.2f} {statistics.median(ratio):8.2f}"
        print(f"{name:42s} {medians}  {'bitwise equal' if equal else 'differ'}", flush=True)


if __name__ == "__main__":
    main()
