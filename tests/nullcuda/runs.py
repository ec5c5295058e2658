"""Runs on the GPU that computes nothing, in every precision and with many optimizers."""

import torch

from small import make_batches, make_trainer

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "momentum fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW one by one": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW capturable": lambda p: torch.optim.AdamW(p, capturable=True),
}
PRECISIONS = {
    "float32": {"mixed_precision": False},
    "bfloat16": {"amp_dtype": "bfloat16"},
    "float16": {"amp_dtype": "float16"},
}


def make_run(optimizer="AdamW", precision="float32", **options):
    """Return a trainer on the GPU, with an epoch of 10 steps."""
    if "train" not in options:
        options["train"] = make_batches(10 * options.get("accumulation_steps", 1))
    settings = {"val": make_batches(8), "device": "cuda"} | PRECISIONS[precision] | options
    return make_trainer(optimizer=OPTIMIZERS[optimizer], **settings)


def waits_expected(optimizer):
    """Return how often the host waits in a step: for the norm, unless the device decides."""
    return 0 if "fused" in optimizer else 1
