"""Skipped steps are counted alike on host and device, explained, and limited."""

import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small import HostReads
from ununennium import TrainingDiverged
from ununennium.training.batches import MicroBatch
from ununennium.training.finite import CHECKED
from ununennium.training.messages import TrainingWarning
from ununennium.training.skips import (
    DeviceTally,
    DivergenceTrail,
    SkipCounts,
    SkippedSteps,
    batch_text,
    find_culprit,
    first_skip,
    growth_of,
    skip_runs,
)
from ununennium.training.step import Step


def make_batch(number=0, raw=None, inputs=None, **checks):
    values = {name: torch.tensor(value) for name, value in ({"loss": 0.5} | checks).items()}
    return MicroBatch(
        raw, inputs, None, 1.0, number, losses={"loss": values["loss"]}, checks=values
    )


def note(skips, window, stepped, number=0, epoch=0, norm=1.0):
    skips.note(Step(window, torch.tensor(norm), stepped), number, epoch)


def plain_culprit(batch):
    bad = {name for name in batch.checks if not math.isfinite(batch.checks[name])}
    if "output" in bad:
        return "input" if "input" in bad else "output"
    if "loss" in bad:
        return "target" if "target" in bad else "loss"
    return None


def plain_count(windows, outcomes):
    """Count as the definition says, with nothing but Python's own loops."""
    first, run, longest = None, 0, 0
    for window, stepped in zip(windows, outcomes, strict=True):
        run = 0 if stepped else run + 1
        longest = max(longest, run)
        if not stepped and first is None:
            bad = [(batch.number, name) for batch in window if (name := plain_culprit(batch))]
            first = bad[0] if bad else (window[0].number, "gradient")
    return {
        "count": outcomes.count(False), "first": first, "in_a_row": run, "longest": longest,
    }  # fmt: skip


@st.composite
def runs(draw, most=40):
    """Windows and whether their steps were taken; bad checks only where they were not."""
    outcomes = draw(st.lists(st.booleans(), min_size=1, max_size=most))
    size, number, windows = draw(st.integers(1, 3)), 0, []
    for stepped in outcomes:
        window = []
        for _ in range(size):
            bad = set() if stepped else draw(st.sets(st.sampled_from(CHECKED)))
            checks = {name: 1.0 for name in CHECKED if name != "target" or draw(st.booleans())}
            window.append(make_batch(number, **(checks | dict.fromkeys(bad, math.nan))))
            number += 1
        windows.append(window)
    return windows, outcomes


# Counting.


@settings(deadline=None, max_examples=40)
@given(
    steps=st.integers(1, 600),
    size=st.integers(1, 3),
    skipped=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_counting_on_the_device_is_counting_on_the_host(steps, size, skipped, seed):
    generator = torch.Generator().manual_seed(seed)
    host, device = SkippedSteps(limit=10**9), SkippedSteps(limit=10**9)
    longest = run = 0
    for number in range(steps):
        stepped = bool(torch.rand((), generator=generator) >= skipped)
        run = 0 if stepped else run + 1
        longest = max(longest, run)
        window = []
        for position in range(size):
            bad = not stepped and bool(torch.rand((), generator=generator) < 0.3)
            window.append(make_batch(number * size + position, output=math.nan if bad else 1.0))
        note(host, window, stepped)
        note(device, window, torch.tensor(stepped))
    one, other = host.state_dict(), device.state_dict()
    assert [one[name] for name in ("count", "first")] == [other[n] for n in ("count", "first")]
    assert other["longest"] == longest and one["in_a_row"] == other["in_a_row"] == run


@settings(deadline=None)
@given(runs(), st.integers(1, 7), st.data())
def test_a_tally_is_the_plain_count_however_often_it_is_folded(run, size, data):
    windows, outcomes = run
    before = data.draw(st.integers(0, 5))
    tally, expected = DeviceTally(before), plain_count(windows, outcomes)
    tally.size = size
    for window, stepped in zip(windows, outcomes, strict=True):
        tally.add(window, torch.tensor(stepped))
    start = outcomes.index(True) if True in outcomes else len(outcomes)
    expected["longest"] = max(expected["longest"], (before + start) * (start > 0))
    expected["in_a_row"] += before * (True not in outcomes)
    found, late = tally.read()
    assert found == SkipCounts(**expected) and late == found.count
    assert tally.read() == (found, late)


@settings(deadline=None)
@given(runs(), st.lists(st.sampled_from(["host", "device", "read"]), min_size=40, max_size=40))
def test_host_device_and_readings_mix(run, ways):
    windows, outcomes = run
    skips, on_device = SkippedSteps(limit=10**9), 0
    for window, stepped, way in zip(windows, outcomes, ways, strict=False):
        if way == "read":
            skips.state_dict()
        note(skips, window, stepped if way == "host" else torch.tensor(stepped))
        on_device += way != "host" and not stepped
    expected, found = plain_count(windows, outcomes), skips.state_dict()
    assert list(found) == ["count", "first", "in_a_row", "longest"]
    assert {**found, "longest": 0} == {**expected, "longest": 0}
    assert skips.uncounted() == on_device


@given(st.lists(st.booleans(), min_size=1), st.integers(0, 3))
def test_runs_of_skips(outcomes, before):
    expected, run = [], before
    for stepped in outcomes:
        run = 0 if stepped else run + 1
        expected.append(run)
    stepped = torch.tensor(outcomes)
    assert skip_runs(stepped, ~stepped, before).tolist() == expected
    assert skip_runs(stepped, ~stepped, torch.tensor(before)).tolist() == expected


def test_the_first_skip_among_windows_of_unequal_size():
    numbers = [[0, 1, 2], [3], [4, 5]]
    finite = torch.ones(6, len(CHECKED), dtype=torch.bool)
    skipped = torch.tensor([False, False, True])
    assert first_skip(numbers, finite, skipped).tolist() == [4, 1, 1, 1, 1, 1]
    finite[5, 1:] = finite[0, 0] = False  # the second hides in a step that was taken
    assert first_skip(numbers, finite, skipped).tolist() == [5, 1, 1, 0, 0, 0]
    assert first_skip(numbers, finite, ~skipped).tolist() == [0, 1, 0, 1, 1, 1]


def test_nothing_is_read_until_it_is_asked_for():
    skips = SkippedSteps(limit=10**9)
    outcomes = torch.rand(600) > 0.3
    windows = [[make_batch(number, output=1.0)] for number in range(600)]
    steps = zip(windows, outcomes.unbind(), strict=True)
    with HostReads() as reads:
        for number, (window, stepped) in enumerate(steps):
            skips.note(Step(window, window[0].losses["loss"], stepped), number, 0)
    assert reads.count == 0
    with HostReads() as reads:
        assert skips.uncounted() == skips.state_dict()["count"] == skips.uncounted()
    assert reads.count <= 12  # one tolist of nine numbers, however many steps
    assert skips.uncounted() == int((~outcomes).sum())


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
    assert counts == SkipCounts(3, (2, "gradient"), in_a_row=2, longest=2)
    assert late == 7 and before == 1


def test_an_empty_window_is_no_step():
    skips = SkippedSteps(limit=1)
    skips.note(Step([]), 0, 0)
    assert skips.state_dict() == {"count": 0, "first": None, "in_a_row": 0, "longest": 0}
    assert not skips.trail.steps


# What a file keeps.


@pytest.mark.parametrize("decide", [bool, torch.tensor])
def test_a_resumed_count_continues_and_corrects_only_what_is_new(decide):
    straight, skips = SkippedSteps(limit=9), SkippedSteps(limit=9)
    outcomes = [True, False, True, False, False, False, True, False]
    for number, stepped in enumerate(outcomes):
        if number == 5:
            saved = skips.state_dict()
            skips = SkippedSteps(limit=9)
            skips.load_state_dict(saved)
        for one in (straight, skips):
            note(one, [make_batch(number)], decide(stepped))
    assert skips.state_dict() == straight.state_dict()
    on_device = decide is torch.tensor
    assert (straight.uncounted(), skips.uncounted()) == ((5, 2) if on_device else (0, 0))


def test_a_loaded_count_replaces_what_was_pending():
    skips = SkippedSteps(limit=9)
    note(skips, [make_batch(3)], torch.tensor(False))
    state = {"count": 1, "first": [2, "input"], "in_a_row": 0, "longest": 1}
    skips.load_state_dict(state)
    assert skips.state_dict() == state | {"first": (2, "input")} and skips.uncounted() == 0


# Giving up.


def test_the_host_gives_up_at_once():
    skips = SkippedSteps(limit=3)
    for stepped in (False, False, True, False, False):
        note(skips, [make_batch(7, input=math.nan, output=math.nan)], stepped)
    message = (
        r"^3 steps in a row were skipped because the gradient was not finite; the parameters are "
        r"as they were before. The first skipped step of epoch 5 was at batch index 7, where the "
        r"input was not finite. Look for NaN or infinity in the images"
    )
    with pytest.raises(TrainingDiverged, match=message):
        note(skips, [make_batch(8)], False, epoch=4)
    note(skips, [make_batch(9)], False)  # a later fit starts afresh
    assert skips.state_dict() == {
        "count": 6, "first": (7, "input"), "in_a_row": 1, "longest": 1,
    }  # fmt: skip


def test_the_device_is_checked_every_ten_seconds_and_at_the_end(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("ununennium.training.skips.time.monotonic", lambda: clock[0])
    skips = SkippedSteps(limit=3)
    for _ in range(5):
        note(skips, [make_batch()], torch.tensor(False))
    clock[0] += 11
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        note(skips, [make_batch()], torch.tensor(False))
    for stepped in (False, False, False, True):
        note(skips, [make_batch()], torch.tensor(stepped))
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        skips.close_epoch(0)


@pytest.mark.parametrize("decide", [bool, torch.tensor])
def test_a_run_of_skips_crosses_epochs(decide):
    skips = SkippedSteps(limit=4)
    for _ in range(2):
        note(skips, [make_batch(1)], decide(False))
    with pytest.warns(TrainingWarning, match="Epoch 1: 2 steps were skipped"):
        assert skips.close_epoch(0) == 2
    assert skips.state_dict() == {"count": 0, "first": None, "in_a_row": 2, "longest": 2}

    def rest():
        for _ in range(2):
            note(skips, [make_batch(0)], decide(False), epoch=1)
        skips.close_epoch(1)

    with pytest.raises(TrainingDiverged, match="of epoch 2 was at batch index 0"):
        rest()


# Messages.


def closing(skips, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = skips.close_epoch(0, **options)
    assert all(w.category is TrainingWarning for w in caught)
    return count, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1 step was .* finite, at batch"), (2, "2 steps were .* the first at")]
)
def test_one_warning_per_epoch(count, text):
    skips = SkippedSteps(limit=9)
    assert closing(skips) == (0, [])
    for number in range(count):
        note(skips, [make_batch(number, output=math.inf)], False)
    found, (message,) = closing(skips)
    assert found == count
    assert re.match(
        f"Epoch 1: {text}.* index 0, where the output was not finite. The model", message
    )
    assert closing(skips) == (0, [])


def test_an_overflow_of_a_scaled_loss_is_no_reason_to_warn_but_a_bad_image_is():
    for checks, warned in (({}, 0), ({"input": math.nan, "output": math.nan}, 1)):
        skips = SkippedSteps(limit=9)
        note(skips, [make_batch(**checks)], False)
        count, messages = closing(skips, scaled=True)
        assert count == 1 and len(messages) == warned


@pytest.mark.parametrize(("decide", "names"), [(bool, "b.tif"), (torch.tensor, "a.tif, b.tif")])
def test_samples_are_named(decide, names):
    image = torch.zeros(2, 1, 2, 2)
    image[1] = math.nan
    names_of = {"filename": ["a.tif", "b.tif"]}
    batch = make_batch(4, names_of, image, input=math.nan, output=math.nan)
    skips = SkippedSteps(limit=9)
    note(skips, [make_batch(3), batch], decide(False))
    _, (message,) = closing(skips)
    assert f"at batch index 4 (filename {names}), where the input" in message


def test_the_culprit_of_a_window():
    window = [make_batch(0), make_batch(1, output=math.nan, loss=math.nan)]
    assert find_culprit(window) == (window[1], "output")
    assert find_culprit(window[:1]) == (window[0], "gradient")


def test_what_did_no_harm_is_not_blamed():
    """Missing dates before a nanmean, and heights that a MaskedLoss leaves out."""
    harmless = make_batch(0, input=math.nan, target=math.nan, output=1.0)
    overflown = make_batch(1, target=math.nan, output=math.inf, loss=math.nan)
    assert find_culprit([harmless, overflown]) == (overflown, "output")
    assert find_culprit([harmless]) == (harmless, "gradient")
    tally = DeviceTally()
    tally.add([harmless, overflown], torch.tensor(False))
    assert tally.read()[0].first == (1, "output")


def test_a_batch_in_words():
    assert batch_text(3, "") == "batch index 3"


@pytest.mark.parametrize(("culprit", "is_described"), [("output", True), ("input", False)])
def test_how_the_loss_grew_is_described_unless_the_data_are_to_blame(culprit, is_described):
    skips = SkippedSteps(limit=9)
    for number, loss in enumerate([1.0, 1.0, 1.0, 1.0, 8.0, 64.0]):
        note(skips, [make_batch(number, loss=loss)], True, number + 1, norm=loss / 2)
    note(skips, [make_batch(6, **dict.fromkeys((culprit, "output", "loss"), math.nan))], False, 6)
    _, (message,) = closing(skips)
    story = (
        " The loss was about 1 and grew from step 5 on: 8, 64. The gradient norms were 0.5, 0.5, "
        "0.5 before, and 4, 32 after."
    )
    assert message.endswith(story) == is_described


def test_a_trail_of_steady_losses_has_no_story():
    trail = DivergenceTrail()
    for step in range(100):
        trail.add(step, 1.0 + 0.1 * (step % 3), 1.0)
    assert len(trail.steps) == 64 and trail.describe() == ""


@pytest.mark.parametrize("losses", [[], [1.0, 1.0, 9.0], [math.nan] * 9, [9.0, 9.0, 9.0, 1.0]])
def test_a_short_or_falling_trail_has_no_story(losses):
    trail = DivergenceTrail()
    for step, loss in enumerate(losses):
        trail.add(step, loss, 1.0)
    assert trail.describe() == ""


@given(st.integers(2, 20), st.integers(1, 20))
def test_growth_is_found_where_it_began(steady, grown):
    usual, count = growth_of([1.0] * (steady + grown) + [5.0] * grown)
    assert (usual, count) == (1.0, grown)
