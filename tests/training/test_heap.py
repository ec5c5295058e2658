"""On a CPU the process keeps freed memory while it trains, and returns it afterwards."""

import os
import subprocess
import sys

import pytest

from ununennium.training.heap import TUNED, tunable_library

PROGRAM = """
import contextlib, resource, torch
from ununennium.training.heap import heap_kept


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20


def faults(context):
    with context:
        for number in range(6):
            if number == 1:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.ones(2**22) for _ in range(10)]
            del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, resident()


for device in ("meta", "cpu"):
    print(*faults(heap_kept(torch.device(device))), resident())
"""
tunable = pytest.mark.skipif(tunable_library() is None, reason="the C library is not tunable here")


def measured(**environment):
    """Return page faults, and MiB in the block and after it, first without and then with it."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, text=True, check=True,
        capture_output=True,
    )  # fmt: skip
    return [tuple(map(int, line.split())) for line in result.stdout.splitlines()]


@tunable
def test_freed_memory_is_kept_in_the_block_and_returned_after_it():
    (usual, *_), (kept, during, after) = measured()
    assert kept < usual / 10
    assert during - after > 100  # of the 160 MiB that the tensors took


@tunable
@pytest.mark.parametrize("name", TUNED[:2])
def test_nothing_is_changed_for_those_who_have_tuned_it_themselves(name):
    (usual, *_), (kept, *_) = measured(**{name: "131072"})
    assert kept > usual / 2
