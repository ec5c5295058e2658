"""Where the host waits for the device, by PyTorch's own debug mode."""

import contextlib
import itertools
import sys
import warnings
from pathlib import Path

import torch

import ununennium
from nullcuda import counts
from ununennium import Callback

PACKAGE = Path(ununennium.__file__).parent


def line_of_package():
    """Return the package's innermost line that is being run, such as `training/step.py:210`."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"


@contextlib.contextmanager
def waits_noted(note):
    """Call `note` with the package's line whenever PyTorch makes the host wait for the device."""

    def show(message, *details, **options):
        if "called a synchronizing CUDA operation" in str(message):
            note(line_of_package())

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Waits(Callback):
    """The waits between two safepoints: one list of lines for each step or validation batch."""

    def __init__(self):
        self.steps, self.batches = [], []
        self.counted = {"train": [], "validate": []}  # by the device itself, up to each safepoint
        self.now = []

    def on_safepoint(self, trainer, phase):
        self.now = []
        (self.steps if phase == "train" else self.batches).append(self.now)
        self.counted[phase].append(counts()["waits"])

    def steady(self, phase):
        """Return the lines for each step or validation batch, but for the first ones and the last.

        The device counts them: PyTorch says nothing when the host waits for an event.
        """
        lines = (self.steps if phase == "train" else self.batches)[2:-1]
        counted = itertools.pairwise(self.counted[phase][2:])
        return [
            known + ["untold by PyTorch"] * (after - before - len(known))
            for known, (before, after) in zip(lines, counted, strict=True)
        ]


def waits_of(trainer):
    """Train for one epoch; return the waits."""
    waits = Waits()
    trainer.callbacks.append(waits)
    with waits_noted(lambda line: waits.now.append(line)):
        trainer.fit(1)
    return waits
