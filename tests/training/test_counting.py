"""Skipped steps are counted on the device as the definition says, and their batches are found."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skipping import make_batch, plain_count, runs

from ununennium.training.counting import (
    DeviceTally,
    SkipCounts,
    load_counts,
    skip_codes,
    skip_runs,
    skips_in,
)
from ununennium.training.finite import CHECKED


def expected_numbers(windows, outcomes):
    """Return the batches to blame: one of each skipped window."""
    alone = [plain_count([w], [False])["first"] for w in windows]
    return [first[0] for first, stepped in zip(alone, outcomes, strict=True) if not stepped]


@settings(deadline=None)
@given(runs(), st.integers(1, 7), st.data())
def test_a_tally_is_the_plain_count_however_often_it_is_folded(run, size, data):
    windows, outcomes = run
    before = data.draw(st.integers(0, 5))
    tally, expected = DeviceTally(before), plain_count(windows, outcomes)
    tally.size = size
    for window, stepped in zip(windows, outcomes, strict=True):
        tally.add(window, torch.tensor(stepped))
        assert len(tally.pending) < size  # or a long epoch would keep every step's checks
    start = outcomes.index(True) if True in outcomes else len(outcomes)
    expected["longest"] = max(expected["longest"], (before + start) * (start > 0))
    expected["in_a_row"] += before * (True not in outcomes)
    found, late = tally.read()
    assert found == SkipCounts(**expected) and late == found.count
    assert tally.read() == (found, late)
    assert [number for number, _ in tally.skipped] == expected_numbers(windows, outcomes)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1), st.integers(0, 3))
def test_runs_of_skips(outcomes, before):
    expected, run = [], before
    for stepped in outcomes:
        run = 0 if stepped else run + 1
        expected.append(run)
    stepped = torch.tensor(outcomes)
    assert skip_runs(stepped, ~stepped, before).tolist() == expected
    assert skip_runs(stepped, ~stepped, torch.tensor(before)).tolist() == expected


def test_codes_of_batches_in_windows_of_unequal_size():
    numbers = [[0, 1, 2], [3], [4, 5]]
    finite = torch.ones(6, len(CHECKED), dtype=torch.bool)
    skipped = torch.tensor([False, False, True])

    def found(skipped):
        return skips_in(numbers, skip_codes(numbers, finite, skipped).tolist())

    assert found(skipped) == [(4, "gradient")]
    finite[5, 1:] = False
    finite[0, [0, 2]] = False  # this one hides in a step that was taken
    assert found(skipped) == [(5, "output")]
    assert found(~skipped) == [(0, "input"), (3, "gradient")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
def test_counting_on_a_gpu():
    windows = [[make_batch(n, output=math.nan if n % 7 == 5 else 1.0)] for n in range(700)]
    outcomes = [n % 7 != 5 for n in range(700)]
    on_gpu = [torch.tensor(outcome, device="cuda") for outcome in outcomes]
    for (batch,) in windows:
        batch.checks = {name: check.cuda() for name, check in batch.checks.items()}
    tally = DeviceTally()
    for window, stepped in zip(windows, on_gpu, strict=True):
        tally.add(window, stepped)
    assert tally.read() == (SkipCounts(100, (5, "output"), 0, 1), 100)


def test_windows_without_a_valid_pixel_are_neither_taken_nor_skipped():
    tally = DeviceTally(before := 1)
    for number, outcome in enumerate("e.se.sees"):  # empty, taken, skipped
        stepped, empty = torch.tensor(outcome == "."), torch.tensor(outcome == "e")
        tally.add([make_batch(number)], stepped, empty)
    counts, late = tally.read()
    assert counts == SkipCounts(3, (2, "gradient"), in_a_row=2, longest=2, taken=2)
    assert late == 7 and before == 1


def test_the_host_counts_step_by_step():
    counts, seen = SkipCounts(), []
    for outcome in "ss.s.":
        counts.add(outcome == ".")
        seen.append((counts.count, counts.in_a_row, counts.longest))
    # The run of two has been compared with the limit when it was the longest.
    assert seen == [(1, 1, 1), (2, 2, 2), (2, 0, 2), (3, 1, 1), (3, 0, 1)]


def test_counts_of_later_steps_are_added():
    early = SkipCounts(3, (4, "input"), in_a_row=2, longest=3)
    late = SkipCounts(2, (9, "loss"), in_a_row=1, longest=2)
    assert early.plus(late) == SkipCounts(5, (4, "input"), in_a_row=1, longest=3)
    assert late.plus(early).longest == 3 and SkipCounts().plus(late).first == (9, "loss")


def test_counts_of_a_file_are_those_that_were_saved():
    kept = {"count": 3, "first": [4, "input"], "in_a_row": 2, "longest": 3}
    assert load_counts(kept) == SkipCounts(3, (4, "input"), 2, 3, taken=1)
    assert load_counts(kept | {"first": None}).first is None


def test_without_a_step_the_run_of_skips_goes_on():
    assert DeviceTally(3).read() == (SkipCounts(in_a_row=3), 0)


def test_a_loss_that_has_no_check_is_looked_at_itself():
    tally, batch = DeviceTally(), make_batch(7, loss=math.inf)
    del batch.checks["loss"]
    tally.add([batch], torch.tensor(False))
    assert tally.read()[0].first == (7, "loss")
