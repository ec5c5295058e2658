"""Skipped steps are counted alike on host and device, explained, and limited."""

import math
import re
import warnings
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skipping import make_batch, plain_count, runs

from small import HostReads
from ununennium import TrainingDiverged
from ununennium.training.counting import DeviceTally, SkipCounts
from ununennium.training.messages import TrainingWarning
from ununennium.training.skips import (
    DivergenceTrail,
    SkippedSteps,
    batch_text,
    find_culprit,
    growth_of,
    others_message,
    quote_culprit,
)
from ununennium.training.step import Step


def note(skips, window, stepped, number=0, epoch=0, norm=1.0):
    skips.note(Step(window, torch.tensor(norm), stepped), number, epoch)


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
    assert list(found) == ["count", "first", "in_a_row", "longest", "taken", "idle"]
    assert {**found, "longest": 0} == {**expected, "longest": 0, "idle": 0}
    assert skips.uncounted() == on_device


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
    assert reads.count <= 12  # one copy to the host, however many steps
    assert skips.uncounted() == int((~outcomes).sum())


def test_an_empty_window_is_no_step():
    skips = SkippedSteps(limit=1)
    skips.note(Step([]), 0, 0)
    assert skips.state_dict() == asdict(SkipCounts())
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
    state = asdict(SkipCounts(1, [2, "input"], in_a_row=0, longest=1, taken=4, idle=1))
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
    assert skips.state_dict() == asdict(SkipCounts(6, (7, "input"), 1, 1, taken=1))


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
    assert skips.state_dict() == asdict(SkipCounts(in_a_row=2, longest=2, idle=1))

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


@pytest.mark.parametrize("decide", [bool, torch.tensor])
def test_all_skipped_steps_are_named_with_their_files_once_each(decide):
    skips = SkippedSteps(limit=99)
    for number in range(30):
        raw = {"filename": [f"t{number % 26}.tif"]}
        culprit = "output" if number == 3 else "input"
        image = torch.full((1, 1, 2, 2), 0.0 if number == 3 else math.nan)
        note(
            skips, [make_batch(number, raw, image, **{culprit: math.nan})], decide(number % 2 == 0)
        )
    _, (message,) = closing(skips)
    assert message.startswith(
        "Epoch 1: 15 steps were skipped because the gradient was not finite, "
        "the first at batch index 1 (filename t1.tif), where the input"
    )
    others = message.partition("The other skipped steps: ")[2]
    assert others.startswith("batch index 3 (filename t3.tif), its output; batch index 5 (filename")
    assert others.endswith("batch index 25 (filename t25.tif); and 2 more.")  # t1 and t3 again
    assert others.count(".tif") == 12


def test_the_list_of_skipped_steps_ends():
    told = [(f"batch index {n}", "input") for n in range(64)]
    message = others_message(told, 500)
    assert message.count("batch") == 20 and message.endswith("batch index 20; and 479 more.")


@pytest.mark.parametrize("decide", [bool, torch.tensor])
def test_samples_without_names_have_their_index_in_the_data_set(decide):
    skips = SkippedSteps(limit=9)
    skips.tally.locate = {4: [57, 3]}.get
    image = torch.zeros(2, 1, 2, 2)
    image[1] = math.nan
    note(skips, [make_batch(4, image, image, input=math.nan)], decide(False))
    _, (message,) = closing(skips)
    assert f"index 4 (dataset index {'3' if decide is bool else '57, 3'}), where" in message


def test_a_batch_that_lacks_samples_quotes_all_names():
    """The third row of what is left was the fourth that was read."""
    left = make_batch(0, {"filename": list("abcd")}, torch.tensor([[0.0], [0.0], [math.nan]]))
    names = "filename", list("abcd")
    assert quote_culprit(left, "input", names) == "filename a, b, c, d"


@pytest.mark.parametrize("decide", [bool, torch.tensor])
def test_a_bad_image_is_told_among_overflows_of_a_scaled_loss(decide):
    skips = SkippedSteps(limit=9)
    for number, checks in enumerate(({}, {}, {"input": math.nan}, {})):
        note(skips, [make_batch(number, **checks)], decide(False))
    count, (message,) = closing(skips, scaled=True)
    assert count == 4 and "1 step was skipped" in message and "at batch index 2, where" in message


def test_a_resumed_epoch_says_how_many_more_there_were():
    skips = SkippedSteps(limit=9)
    skips.load_state_dict({"count": 3, "first": [2, "input"], "in_a_row": 0, "longest": 1})
    note(skips, [make_batch(8, input=math.nan)], False)
    _, (message,) = closing(skips)
    assert "4 steps were" in message and "first at batch index 2" in message
    assert message.endswith("The other skipped steps: batch index 8; and 2 more.")


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


# Epochs without a step.


@pytest.mark.parametrize("decide", [bool, torch.tensor])
def test_a_small_data_set_of_bad_steps_does_not_run_for_all_its_epochs(decide):
    """The limit counts steps, and two per epoch never reached it: all epochs learned nothing."""
    skips = SkippedSteps(limit=25)
    for epoch in range(2):
        note(skips, [make_batch(0, input=math.nan)], decide(False), epoch)
        if epoch == 0:
            with pytest.warns(TrainingWarning, match="No step was taken, so nothing was learned"):
                skips.close_epoch(epoch)
    with pytest.raises(TrainingDiverged, match="^Epochs 1 and 2 took no step. Epoch 2: 1 "):
        skips.close_epoch(1)
    with warnings.catch_warnings(record=True):  # a later fit has a chance again
        warnings.simplefilter("always")
        skips.close_epoch(1)


@pytest.mark.parametrize("decide", [bool, torch.tensor])
def test_one_step_between_two_idle_epochs_is_enough(decide):
    skips = SkippedSteps(limit=25)
    for epoch, outcomes in enumerate([(False,), (False, True, False), (False,)]):
        for number, stepped in enumerate(outcomes):
            note(skips, [make_batch(number)], decide(stepped), epoch)
        with pytest.warns(TrainingWarning) as caught:
            skips.close_epoch(epoch)
        (message,) = [str(warning.message) for warning in caught]
        assert ("No step was taken" in message) == (epoch != 1)


def test_a_resumed_epoch_remembers_its_steps_and_an_old_file_is_given_the_benefit():
    for state, is_idle in (
        (asdict(SkipCounts(1, (0, "input"), 0, 1, taken=3)), False),
        (asdict(SkipCounts(1, (0, "input"), 1, 1)), True),
        ({"count": 1, "first": [0, "input"], "in_a_row": 1, "longest": 1}, False),
    ):
        skips = SkippedSteps(limit=25)
        skips.load_state_dict(state)
        with pytest.warns(TrainingWarning) as caught:
            skips.close_epoch(0)
        assert ("No step was taken" in str(caught[0].message)) == is_idle


def test_a_scale_that_is_still_being_found_is_no_idle_epoch():
    skips = SkippedSteps(limit=25)
    for epoch in range(4):
        note(skips, [make_batch(0)], False, epoch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert skips.close_epoch(epoch, scaled=True) == 1
