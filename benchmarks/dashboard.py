"""What the dashboard costs: runs with and without it, in turn, in a kernel whose messages are read.

    python benchmarks/dashboard.py [rounds]

A round trains the same model without, with, and again without a dashboard.

- *share*: the time spent in callbacks, plus what the processor did for other threads of the kernel
  (those that send messages and handle clicks), less the same without a dashboard, over the time of
  the run.
- *with / without*: the time of the run with it over the mean of the two others.
- *without / without*: the same of the second over the first, which is what noise makes.

Medians over the rounds are printed. The first view of a kernel, for which plotly is imported, is
made before and timed by itself.
"""

import json
import sys
import time
from typing import Any

import numpy as np
from jupyter_client.manager import start_new_kernel

SETUP = """
import time, torch
from torch import nn
from ununennium import Trainer, TrainerConfig
from ununennium.models import UNet
from ununennium.training.hooks import Hooks
torch.set_num_threads(1)

inside = 0.0
def call(self, *details, original=Hooks.call, **options):
    global inside
    start = time.perf_counter()
    try:
        original(self, *details, **options)
    finally:
        inside += time.perf_counter() - start
Hooks.call = call

def tiny():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))
    return model, (16, 32), (16,), 1000

def small():
    layers = nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1)
    return nn.Sequential(*layers), (8, 6, 16, 16), (8, 16, 16), 1000

def unet():
    return UNet(in_channels=4, num_classes=5), (8, 4, 64, 64), (8, 64, 64), 20

def run(make, steps, progress):
    torch.manual_seed(0)
    model, image, target, count = make()
    batches = [(torch.randn(image), torch.randint(5, target)) for _ in range(count)]
    optimizer = torch.optim.AdamW(model.parameters())
    config = TrainerConfig(device="cpu", progress=progress)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), batches, batches[: count // 10], config=config
    )
    def clocks():
        others = time.process_time() - time.thread_time()
        return time.perf_counter(), inside + others
    start = clocks()
    trainer.fit(steps // count)
    return [now - before for now, before in zip(clocks(), start)]
"""
WORKLOADS = {
    "20,000 short steps": "small, 20_000",
    "200 long steps": "unet, 200",
    "20,000 of the shortest": "tiny, 20_000",
}


class Kernel:
    """A kernel, and the number of bytes that it sends."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self.sent: list[tuple[float, int]] = []

    def run(self, code: str) -> str:
        """Run a cell, read all of its messages, return what it printed."""
        request, text = self.client.execute(code), ""
        while True:
            message: dict[str, Any] = self.client.get_iopub_msg(timeout=600)
            size = len(json.dumps(message["content"])) + sum(map(len, message["buffers"]))
            self.sent.append((time.monotonic(), size))
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "error":
                raise RuntimeError("\n".join(message["content"]["traceback"]))
            text += message["content"].get("text", "")
            if message["content"].get("execution_state") == "idle":
                return text

    def seconds(self, workload: str, progress: str) -> list[float]:
        """Time a run: all of it, and what was spent in callbacks and other threads."""
        return json.loads(self.run(f"print(run({workload}, {progress!r}))"))


def bytes_of_thirds(kernel: Kernel, workload: str) -> list[int]:
    """Return the bytes a minute in each third of a run with a dashboard, after its beginning."""
    kernel.sent.clear()
    kernel.seconds(workload, "dashboard")
    start, end = kernel.sent[0][0], kernel.sent[-1][0]
    third = (end - start) / 3
    small = [(when, size) for when, size in kernel.sent if size < 1_000_000]  # not plotly itself
    return [
        round(60 / third * sum(s for w, s in small if i * third <= w - start < (i + 1) * third))
        for i in range(3)
    ]


def main(rounds: int) -> None:
    """Print a table."""
    kernel = Kernel()
    try:
        kernel.run(SETUP)
        warm_up = [kernel.seconds("tiny, 1000", progress)[0] for progress in ("dashboard", "none")]
        print(f"The first view takes {warm_up[0] - warm_up[1]:.1f} s, mostly to import plotly.")
        print("| run | seconds | share | with / without | without / without | kB a minute |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, workload in WORKLOADS.items():
            times = np.array([
                [kernel.seconds(workload, progress) for progress in ("none", "dashboard", "none")]
                for _ in range(rounds)
            ])  # fmt: skip
            plain, shown, again = times[:, :, 0].T
            idle, busy, _ = times[:, :, 1].T
            cells = (
                f"{np.median(plain):.1f} | {np.median((busy - idle) / shown):.2%} | "
                f"{np.median(2 * shown / (plain + again)):.3f} | {np.median(again / plain):.3f}"
            )
            sent = ", ".join(f"{size / 1000:.0f}" for size in bytes_of_thirds(kernel, workload))
            print(f"| {name} | {cells} | {sent} |", flush=True)
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
