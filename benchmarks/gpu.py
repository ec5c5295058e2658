"""The trainer against the same loop written by hand, on one GPU, in under eight minutes.

    python benchmarks/gpu.py [--minutes 7] [--batch-size N] [--out FOLDER]
    python benchmarks/gpu.py --tiny --device cpu

No real GPU has run this yet; only one that computes nothing has. On a CPU, `--tiny` runs the same
code with a small model and small images; its numbers mean nothing, and all precisions are fp32.

Both train a U-Net as large as one with a ResNet-34 (24 million parameters) on chips of 12 bands and
512 × 512 pixels. The loader returns 16-bit integers, from worker processes and in pinned memory,
and the model scales them on the device. Both use autocast and loss scaling, clip the
gradient to norm 1, take a fused AdamW's step and keep the mean loss on the device. Every row is a
precision, a memory format and a way to run the model. The columns:

- *images/s*: the median over rounds. Rounds of the two alternate, and the GPU is waited for before
  and after.
- *ratio*: time with the trainer / by hand, the median over rounds with quartiles in brackets.
- *syncs per step*: how often a step makes the host wait for the GPU, as PyTorch counts it.
- *peak memory*: of tensors, without those of the other loop.
- *loader*: the share of the time in which the host waits for the next batch.
- *loss*: the relative difference of the mean losses after one epoch.
- *first epoch*: two steps, with the choice of kernels and compilation. The second loop finds what
  the first one has compiled.

The batch size is the largest of a few with which fp32 fits. A row ends when its share of the time
is over, and one that fails is reported and left out. Writes `gpu.json` and `gpu.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ununennium import Trainer, TrainerConfig

CLASSES = 5


class Row(NamedTuple):
    """What to compare."""

    name: str
    amp: str | None = None  # the type that autocast uses
    tf32: bool = True
    channels_last: bool = False
    compiled: bool = False
    fused: bool = True
    share: float = 1.0  # of the time


ROWS = [
    Row("fp32", tf32=False),
    Row("TF32"),
    Row("TF32, channels_last", channels_last=True),
    Row("fp16", amp="float16"),
    Row("fp16, channels_last", amp="float16", channels_last=True),
    Row("fp16, channels_last, AdamW not fused", amp="float16", channels_last=True, fused=False),
    Row("bf16", amp="bfloat16"),
    Row("bf16, channels_last", amp="bfloat16", channels_last=True),
    Row("bf16, channels_last, compiled", "bfloat16", channels_last=True, compiled=True, share=3.0),
]


class Size(NamedTuple):
    """How large model and images are."""

    widths: tuple[int, ...]  # channels of the encoder: the stem and the stages
    blocks: tuple[int, ...]  # residual blocks of each stage
    pixels: int
    bands: int
    batch_sizes: tuple[int, ...]  # to try
    fewest_steps: int


FULL = Size((64, 64, 128, 256, 512), (3, 4, 6, 3), 512, 12, (64, 32, 16, 8, 4, 2), 4)
TINY = Size((4, 4, 8, 8, 8), (1, 1, 1, 1), 64, 12, (2,), 2)


# The model


def convolution(channels_in: int, channels_out: int, size: int = 3, stride: int = 1) -> nn.Module:
    """Return a convolution with batch norm."""
    padding = size // 2
    layer = nn.Conv2d(channels_in, channels_out, size, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels_out))


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(channels_in, channels_out, stride=stride)
        self.second = convolution(channels_out, channels_out)
        is_same = stride == 1 and channels_in == channels_out
        self.around = (
            nn.Identity() if is_same else convolution(channels_in, channels_out, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add what the two convolutions find."""
        return F.relu(self.second(F.relu(self.first(x))) + self.around(x))


class ResidualUNet(nn.Module):
    """A U-Net whose encoder is a ResNet with basic blocks; ResNet-34 in its full size."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        stem, *widths = size.widths
        self.stem = convolution(size.bands, stem, 7, stride=2)
        self.stages = nn.ModuleList()
        for stage, (count, below, width) in enumerate(
            zip(size.blocks, size.widths, widths, strict=False)
        ):
            first = Block(below, width, stride=2 if stage else 1)
            rest = (Block(width, width, stride=1) for _ in range(count - 1))
            self.stages.append(nn.Sequential(first, *rest))
        skips = [*widths[-2::-1], stem, 0]  # channels that join on the way up
        above = [*widths[-2::-1], stem // 2, stem // 4]
        self.decoder = nn.ModuleList(
            nn.Sequential(convolution(deep + skip, up), nn.ReLU(), convolution(up, up), nn.ReLU())
            for deep, skip, up in zip([widths[-1], *above], skips, above, strict=False)
        )
        self.head = nn.Conv2d(above[-1], CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return scores `(N, K, H, W)` for 16-bit images `(N, bands, H, W)`."""
        x = F.relu(self.stem(image.float() / 10_000))
        skips, x = [x], F.max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        skips = [*skips[-2::-1], None]
        for block, skip in zip(self.decoder, skips, strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
        return self.head(x)


# The data


class Chips(Dataset):
    """Images of 16-bit integers and their masks. A few are stored, and they repeat."""

    def __init__(self, size: Size, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (8, size.pixels, size.pixels)
        self.images = torch.randint(
            10_000, (8, size.bands, *shape[1:]), dtype=torch.int16, generator=generator
        )
        self.masks = torch.randint(CLASSES, shape, generator=generator)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        return self.images[index % 8], self.masks[index % 8]


@contextlib.contextmanager
def waiting() -> Iterator[list[float]]:
    """Collect how long each call for the next batch takes, whoever calls."""
    original, seconds = _BaseDataLoaderIter.__next__, []

    def timed(self):
        start = time.perf_counter()
        try:
            return original(self)
        finally:
            seconds.append(time.perf_counter() - start)

    _BaseDataLoaderIter.__next__ = timed
    try:
        yield seconds
    finally:
        _BaseDataLoaderIter.__next__ = original


# The two loops


@dataclass
class Parts:
    """What both loops train with; each has its own."""

    row: Row
    device: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: nn.Module

    @property
    def is_scaled(self) -> bool:
        """Whether gradients are too small for the type, so that the loss is scaled."""
        return self.row.amp == "float16" and self.device != "cpu"


def make_parts(row: Row, size: Size, device: str) -> Parts:
    """Return a model with the same parameters in every call, and its optimizer."""
    torch.manual_seed(0)
    model = ResidualUNet(size).to(device)
    if row.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=row.fused)
    model = torch.compile(model) if row.compiled else model
    return Parts(row, device, model, optimizer, nn.CrossEntropyLoss())


def by_hand(parts: Parts, loader: DataLoader) -> Callable[[], float]:
    """Return a function that trains for an epoch, as one would write it; it returns the loss."""
    model, optimizer, device = parts.model, parts.optimizer, parts.device
    is_mixed, dtype = parts.row.amp is not None and device != "cpu", parts.row.amp or "bfloat16"
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, enabled=parts.is_scaled)

    def epoch() -> float:
        total = torch.zeros((), device=device)
        model.train()
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with torch.autocast(kind, getattr(torch, dtype), enabled=is_mixed):
                loss = parts.loss_fn(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total += loss.detach()
        return total.item() / len(loader)

    return epoch


def by_trainer(parts: Parts, loader: DataLoader) -> Callable[[], float]:
    """Return a function that does the same with the trainer."""
    config = TrainerConfig(
        device=parts.device,
        mixed_precision=parts.row.amp is not None,
        amp_dtype=parts.row.amp or "float16",
        progress="none",
    )
    trainer = Trainer(parts.model, parts.optimizer, parts.loss_fn, loader, config=config)
    return lambda: trainer.fit(1)["train_loss"][-1]


LOOPS = {"by hand": by_hand, "trainer": by_trainer}


# Measuring


class Bench:
    """What stays the same in all rows."""

    def __init__(self, size: Size, device: str, batch_size: int, workers: int) -> None:
        self.size, self.device, self.batch_size, self.workers = size, device, batch_size, workers
        self.has_gpu = torch.device(device).type == "cuda"

    def loader(self, steps: int, workers: int = 0) -> DataLoader:
        """Return a loader of so many batches."""
        return DataLoader(
            Chips(self.size, steps * self.batch_size),
            self.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.has_gpu,
        )

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.has_gpu:
            torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        """Return the bytes of all tensors on the GPU."""
        return torch.cuda.memory_allocated(self.device) if self.has_gpu else 0

    def time(self, epoch: Callable[[], float]) -> dict[str, float]:
        """Time an epoch; return seconds, those spent waiting for batches, and the loss."""
        with waiting() as seconds:
            self.wait()
            start = time.perf_counter()
            loss = epoch()
            self.wait()
            total = time.perf_counter() - start
        return {"seconds": total, "waiting": sum(seconds), "loss": loss}

    def count_syncs(self, epoch: Callable[[], float]) -> int:
        """Return how often an epoch makes the host wait."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                epoch()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    def syncs(self, loop: Callable, parts: Parts) -> dict[str, float]:
        """Return the syncs of a step, and those of an epoch apart from its steps."""
        if not self.has_gpu:
            return {}
        counts = [self.count_syncs(loop(parts, self.loader(steps))) for steps in (2, 2, 6)]
        _, few, many = counts  # the first epoch of a process waits once more
        per_step = (many - few) / 4
        return {"syncs_per_step": per_step, "syncs_per_epoch": few - 2 * per_step}


def make_loop(bench: Bench, row: Row, loop: Callable) -> tuple[Parts, dict[str, float]]:
    """Return a loop's parts after a first epoch, with what was found out about it."""
    before = bench.memory()
    parts = make_parts(row, bench.size, bench.device)
    first = bench.time(loop(parts, bench.loader(2)))  # chooses kernels, compiles
    if bench.has_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    second = bench.time(loop(parts, bench.loader(bench.size.fewest_steps)))
    facts = {"first_seconds": first["seconds"], "first_loss": first["loss"]}
    facts["step_seconds"] = second["seconds"] / bench.size.fewest_steps
    if bench.has_gpu:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(bench.device) - before
    return parts, facts | bench.syncs(loop, parts)


def measure(bench: Bench, row: Row, seconds: float) -> dict:
    """Return everything about a row: facts of both loops and their rounds."""
    torch.set_float32_matmul_precision("high" if row.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = row.tf32
    deadline = time.perf_counter() + seconds
    made = {name: make_loop(bench, row, loop) for name, loop in LOOPS.items()}
    step = min(facts["step_seconds"] for _, facts in made.values())
    left = max(0.0, deadline - time.perf_counter())
    steps = min(200, max(bench.size.fewest_steps, int(left / 12 / step)))
    epochs = {
        name: LOOPS[name](parts, bench.loader(steps, bench.workers))
        for name, (parts, _) in made.items()
    }
    rounds: dict[str, list[dict]] = {name: [] for name in LOOPS}
    for number in range(6):
        for name, epoch in epochs.items():
            found = bench.time(epoch)
            if number:  # in the first one, workers start
                rounds[name].append(found)
        if number >= 2 and time.perf_counter() > deadline:
            break
    facts = {name: facts for name, (_, facts) in made.items()}
    return {"row": row._asdict(), "steps": steps, "facts": facts, "rounds": rounds}


def largest_batch(size: Size, device: str) -> int:
    """Return the largest batch size with which fp32 takes at most four fifths of the memory."""
    if torch.device(device).type != "cuda":
        return size.batch_sizes[-1]
    for batch_size in size.batch_sizes[:-1]:
        if fits(Bench(size, device, batch_size, 0)):
            return batch_size
    return size.batch_sizes[-1]


def fits(bench: Bench) -> bool:
    """Return whether two steps leave some of the memory free."""
    torch.cuda.reset_peak_memory_stats(bench.device)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    try:
        by_hand(make_parts(ROWS[0], bench.size, bench.device), bench.loader(2))()
        return torch.cuda.max_memory_allocated(bench.device) < 0.8 * total
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        free()


def free() -> None:
    """Give memory back before the next row."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitting_workers(size: Size, batch_size: int, wanted: int) -> int:
    """Return how many workers the shared memory allows; each prepares two batches for each loop."""
    batch = batch_size * size.pixels**2 * (2 * size.bands + 8)
    folder = "/dev/shm"
    shared = os.statvfs(folder) if os.path.isdir(folder) else None
    free_bytes = shared.f_bavail * shared.f_frsize if shared else 0
    return max(0, min(wanted, int(free_bytes * 0.8 / (4 * batch)) - 1))


# Reporting


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the quartiles; the median is in the middle."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def summary(result: dict, batch_size: int) -> dict[str, str]:
    """Return the cells of a row's two lines in the table, by column."""
    rounds, facts = result["rounds"], result["facts"]
    images = result["steps"] * batch_size
    pairs = list(zip(rounds["trainer"], rounds["by hand"], strict=True))
    low, median, high = quartiles([one["seconds"] / other["seconds"] for one, other in pairs])
    ours, hand = (facts[name]["first_loss"] for name in ("trainer", "by hand"))

    def both(text: Callable[[str], str]) -> str:
        return " / ".join(text(name) for name in LOOPS)

    def middle(name: str, value: Callable[[dict], float]) -> float:
        return statistics.median(value(found) for found in rounds[name])

    def fact(name: str, key: str, scale: float = 1.0) -> str:
        return f"{facts[name][key] / scale:.1f}" if key in facts[name] else "–"

    return {
        "images/s": both(lambda n: f"{images / middle(n, lambda r: r['seconds']):.1f}"),
        "ratio": f"{median:.3f} ({low:.3f}–{high:.3f})",
        "syncs per step": both(lambda n: fact(n, "syncs_per_step")),
        "peak memory, GB": both(lambda n: fact(n, "peak_bytes", 1e9)),
        "loader": both(lambda n: f"{middle(n, lambda r: r['waiting'] / r['seconds']):.0%}"),
        "first epoch, s": both(lambda n: fact(n, "first_seconds")),
        "loss": f"{abs(ours - hand) / max(abs(hand), 1e-12):.0e}",
    }


def page(content: dict) -> str:
    """Return a Markdown page."""
    facts = content["facts"]
    lines = [
        "# The trainer and a hand-written loop on one GPU",
        "",
        "Pairs are *by hand / trainer*. The docstring of `benchmarks/gpu.py` explains the columns.",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
    ]
    for number, (name, result) in enumerate(content["rows"].items()):
        cells = summary(result, facts["batch_size"])
        if not number:
            lines += ["", f"| row | {' | '.join(cells)} |", "| --- |" + " --- |" * len(cells)]
        lines.append(f"| {name} | {' | '.join(cells.values())} |")
    lines += [f"\n{name}: {reason}" for name, reason in content["left_out"].items()]
    return "\n".join(lines) + "\n"


def facts_of(bench: Bench) -> dict:
    """Return what the numbers depend on."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(bench.device) if bench.has_gpu else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in ResidualUNet(bench.size).parameters()),
        "batch_size": bench.batch_size,
        "chips": f"{bench.size.bands} × {bench.size.pixels} × {bench.size.pixels}",
        "workers": bench.workers,
        "cpus": os.cpu_count(),
    }


def run(bench: Bench, content: dict, deadline: float, save: Callable[[], None]) -> None:
    """Measure row after row until the time is over; save after each."""
    shares = sum(row.share for row in ROWS)
    for row in ROWS:
        left = deadline - time.perf_counter()
        if left < 0:
            content["left_out"][row.name] = "left out, the time was over"
            continue
        start = time.perf_counter()
        try:
            content["rows"][row.name] = measure(bench, row, left * row.share / shares)
        except Exception as error:  # a row that fails must not cost the others
            content["left_out"][row.name] = f"failed: {type(error).__name__}: {error}"[:500]
        shares -= row.share
        free()
        print(f"{row.name}: {time.perf_counter() - start:.0f} s", flush=True)
        save()


def main() -> None:
    """Run, and print the page."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model and small images")
    parser.add_argument("--minutes", type=float, default=7.0, help="about how long it may take")
    parser.add_argument("--batch-size", type=int, help="the default is what fits")
    parser.add_argument("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 1) - 1)))
    parser.add_argument("--out", type=Path, default=Path("_gpu"), help="a folder")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    size = TINY if options.tiny else FULL
    batch_size = options.batch_size or largest_batch(size, options.device)
    workers = fitting_workers(size, batch_size, options.workers)
    bench = Bench(size, options.device, batch_size, workers)
    content = {"facts": facts_of(bench), "rows": {}, "left_out": {}}
    options.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (options.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
        (options.out / "gpu.md").write_text(page(content))

    run(bench, content, start + 60 * options.minutes, save)
    print(page(content))


if __name__ == "__main__":
    main()
