"""The GPU that computes nothing, seen from a test: what it counted and logged, and late copies.

`launch.py` runs Python with it; `make nullcuda` runs the tests of this folder. Real are PyTorch
with its dispatcher, autocast, loss scaling, optimizers, allocators and random states, and the
device's streams, events, copies, memsets and plain fills (`torch.ones`). Other kernels, cuBLAS and
cuDNN do nothing: a result is 0, a comparison False, a mean perhaps NaN, so that tests say where
tensors lie and when the host waits, and nothing about values. They say nothing either about time,
races on the device, CUDA graphs, NCCL or a second GPU.
"""

import contextlib
import ctypes
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

COUNTERS = ("launches", "waits", "h2d", "d2h", "d2d", "memsets")


def library():
    """Return the preloaded library."""
    return ctypes.CDLL(None)


def counts():
    """Return how often each thing has happened since the process began."""
    count = library().nullcuda_count
    count.restype = ctypes.c_long
    return {name: count(number) for number, name in enumerate(COUNTERS)}


@dataclass(frozen=True)
class Entry:
    """A line of the log.

    `what` is copy, memset, launch, wait, mark, record (an event) or join (a stream waits for an
    event). Stream 0 is the default one. The `details` of a copy are its way (h2d, d2h, d2d), its
    bytes, the memory on the host (pinned, pageable), and whether it is async or waits; those of a
    launch are the kernel's name.
    """

    what: str
    stream: int
    details: tuple[str, ...]

    @property
    def way(self):
        """The way of a copy, None for anything else."""
        return self.details[0] if self.what == "copy" else None


def entry_of(line):
    what, stream, *details = line.split()
    return Entry(what, int(stream), tuple(details))


@contextlib.contextmanager
def logged():
    """Log what the device is asked for; yield a list that has the entries after the block."""
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        library().nullcuda_log(str(path).encode())
        try:
            yield entries
        finally:
            library().nullcuda_log(None)
            entries += map(entry_of, path.read_text().splitlines())


def mark(text):
    """Write a mark into the log."""
    library().nullcuda_mark(text.encode())


@contextlib.contextmanager
def late_copies():
    """Let copies from the device into pinned memory arrive only when the host waits."""
    library().nullcuda_lazy(1)
    try:
        yield
    finally:
        library().nullcuda_lazy(0)


def known_fault(reason):
    """Mark a test of what should be and is not yet: whoever mends it removes the mark."""
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
