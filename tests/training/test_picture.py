"""Curves chosen from a log, and the static picture."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ununennium.training.picture import (
    limits,
    picture,
    picture_html,
    score_curves,
    smooth,
    ticks,
)
from ununennium.training.runlog import RunLog, Series, Timeline, add_mark
from ununennium.training.status import record_html


def long_log(epochs=100, classes=6, steps=50_000):
    log = RunLog(state="done", epoch=epochs, goal=epochs)
    random = np.random.default_rng(0)
    log.where = Timeline(batches=max(1, steps // max(1, epochs)))
    log.losses.extend(range(1, steps + 1), random.random(steps))
    log.rates.extend(range(1, steps + 1), np.full(steps, 1e-3))
    names = ["train_loss", "val_loss", "val_IoU", *(f"val_IoU/class {c}" for c in range(classes))]
    log.history = {name: list(random.random(epochs)) for name in names}
    for number in range(20):
        add_mark(log, f"mark {number}", number * steps / 20)
    return log


def test_smoothing_follows_and_ignores_nan():
    values = np.array([math.nan, 2.0, math.nan, 4.0])
    np.testing.assert_array_equal(smooth(values, share=0.5), [math.nan, 2.0, 2.0, 4.0])
    assert len(smooth(np.empty(0))) == 0


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_inside_and_few(low, span):
    found = ticks(low, low + span)
    assert len(found) <= 7
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= tick <= low + span + slack for tick in found)


def test_limits_of_nothing_and_of_one_value():
    assert limits([]) == (0.0, 1.0)
    assert limits([np.array([math.nan, 2.0])]) == (1.5, 2.5)


def test_the_title_says_how_many_classes_are_left_out():
    log = long_log(3, 60)
    title, curves = score_curves(log)
    assert title == "IoU, 12 of 60" and len(curves) == 13
    assert len({(curve.colour, curve.style) for curve in curves}) == 13


@pytest.mark.parametrize(("epochs", "classes"), [(0, 0), (1, 0), (1, 3), (100, 6), (3000, 60)])
def test_the_record_is_small_and_well_formed(epochs, classes):
    log = long_log(epochs, classes, steps=epochs * 100)
    assert len(record_html(log) + picture_html(log)) < 200_000
    ElementTree.fromstring(picture(log))


def test_class_names_are_escaped_in_the_picture():
    log = long_log(2, 0)
    log.history["val_IoU"] = log.history["val_IoU/<script>"] = [0.5, 0.5]
    assert "<script>" not in picture(log) and "&lt;script&gt;" in picture(log)


def test_a_run_of_only_nan_can_be_drawn():
    log = long_log(3)
    log.losses = Series()
    log.losses.extend([1, 2, 3], [math.nan] * 3)
    log.history = {"train_loss": [math.nan] * 3, "val_IoU": [math.nan] * 3}
    ElementTree.fromstring(picture(log))
