"""Time is charged to the innermost phase, once, and the table adds up."""

import time

import pytest
import torch

from ununennium.training.phases import (
    BACKWARD,
    CHECKS,
    FORWARD,
    OTHER,
    PHASES,
    WAIT,
    Mark,
    PhaseTimer,
    Profile,
    mark_now,
    seconds_by_phase,
)

CPU = torch.device("cpu")


def steps_of(*waits, rest=0.01):
    return [dict.fromkeys(PHASES, 0.0) | {WAIT: wait, FORWARD: rest} for wait in waits]


def test_time_goes_to_the_innermost_phase():
    timer = PhaseTimer(CPU)
    timer.mark()
    with timer.phase(CHECKS):
        with timer.phase(FORWARD):
            time.sleep(0.05)
        time.sleep(0.02)
    time.sleep(0.03)
    timer.end_step()
    (step,) = seconds_by_phase(timer)
    assert step[FORWARD] >= 0.05 and step[CHECKS] >= 0.02 and step[OTHER] >= 0.03
    whole = timer.marks[-1].host - timer.marks[0].host
    assert sum(step.values()) == pytest.approx(whole)


def test_each_moment_belongs_to_one_step():
    timer = PhaseTimer(CPU)
    timer.mark()
    for _ in range(3):
        with timer.phase(WAIT):
            time.sleep(0.001)
        timer.end_step()
    steps = seconds_by_phase(timer)
    whole = timer.marks[-1].host - timer.marks[0].host
    assert len(steps) == 3
    assert sum(sum(step.values()) for step in steps) == pytest.approx(whole)


def test_a_phase_ends_if_its_block_raises():
    timer = PhaseTimer(CPU)
    with pytest.raises(OSError, match="gone"), timer.phase(FORWARD):
        raise OSError("gone")
    assert timer.current == [OTHER]


def test_the_clock_of_the_device_counts_if_there_is_one():
    class Event:
        def __init__(self, time):
            self.time = time

        def elapsed_time(self, later):
            return later.time - self.time  # ms

        def synchronize(self):
            self.is_waited_for = True

    timer = PhaseTimer(CPU)
    timer.marks = [Mark(OTHER, 0.0, Event(0)), Mark(FORWARD, 0.001, Event(20))]
    timer.marks += [Mark(BACKWARD, 0.002, Event(60))]
    timer.ends = [3]
    (step,) = seconds_by_phase(timer)
    assert (step[FORWARD], step[BACKWARD]) == pytest.approx((0.02, 0.04))
    assert timer.marks[-1].event.is_waited_for
    (step,) = seconds_by_phase(timer, on_host=True)
    assert (step[FORWARD], step[BACKWARD]) == pytest.approx((0.001, 0.001))


def test_a_device_without_events_is_waited_for_at_each_mark(monkeypatch):
    class Device:
        waits = 0

        @classmethod
        def synchronize(cls):
            cls.waits += 1

    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)
    mark_now(WAIT, torch.device("mps"))
    assert Device.waits == 1


def test_the_table_shows_means_that_add_up_and_medians():
    steps = steps_of(0.0, 0.0, 0.0, 0.12)
    profile = Profile(steps, steps, [2.0] * 4, "title", ["a note"], "advice.")
    lines = str(profile).splitlines()
    assert lines[0] == "title" and lines[-2:] == ["advice.", "a note"]
    rows = {line[:18].strip(): line[18:].split() for line in lines[3:11]}
    assert rows["waiting for data"] == ["30.00", "ms", "0.00", "ms", "75%"]
    assert rows["whole step"] == ["40.00", "ms", "10.00", "ms", "100%"]
    assert profile.milliseconds[WAIT] == pytest.approx(30) and profile.shares[WAIT] == 0.75
    assert profile.samples_per_second == pytest.approx(50) and "50 samples/s" in lines


def test_the_plot_has_a_bar_for_each_phase_of_each_step():
    pytest.importorskip("matplotlib")
    steps = steps_of(0.01, 0.03)
    (axis,) = Profile(steps, steps, [1.0, 1.0]).plot().axes
    assert len(axis.patches) == 2 * len(PHASES)
    tops = [bar.get_y() + bar.get_height() for bar in axis.patches]
    assert max(tops) == pytest.approx(40)
    assert len(axis.get_legend().get_texts()) == len(PHASES)
