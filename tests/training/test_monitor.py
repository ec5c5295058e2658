"""Monitored scores: which direction is better, and names that do not exist."""

import math

import pytest

from ununennium.training.messages import Unchosen
from ununennium.training.monitor import Monitor, direction_of, missing_score


@pytest.mark.parametrize(
    ("name", "way"),
    [("val_loss", "min"), ("val_IoU/water", "max"), ("lr", None), ("val_accuracy_loss", None),
     ("val_dice", None), ("val_priority", None)],
)  # fmt: skip
def test_well_known_names_have_a_direction(name, way):
    assert direction_of(name) == way


def test_the_word_of_a_metric_counts_more_than_a_default_but_not_than_a_choice():
    scores, directions = {"val_distance": 1.0}, {"val_distance": "max"}
    monitor = Monitor("val_distance", Unchosen("min"))
    monitor.read(scores, directions)
    assert monitor.mode == "max" and monitor.is_better(2.0, 1.0)
    monitor = Monitor("val_loss", Unchosen("min"))
    monitor.read({"val_loss": 1.0}, directions)
    assert monitor.mode == "min"
    with pytest.raises(ValueError, match=r"mode='min'\) would keep the worst model"):
        Monitor("val_distance", "min").read(scores, directions)


@pytest.mark.parametrize(
    ("value", "error"),
    [("0.1", TypeError), (True, TypeError), (None, TypeError), (-1, ValueError),
     (math.nan, ValueError), (math.inf, ValueError)],
)  # fmt: skip
def test_bad_tolerances_are_refused(value, error):
    with pytest.raises(error, match=r"Owner\(min_delta=.* must be a number, 0 or more"):
        Monitor("val_loss", "min", value, owner="Owner")


def test_better_is_strictly_better_and_never_nan():
    more, less = Monitor("val_IoU", "max"), Monitor("val_loss", "min", min_delta=0.1)
    assert more.is_better(0.0, None) and more.is_better(0.1, 0.0)
    assert not more.is_better(0.5, 0.5) and not more.is_better(math.nan, None)
    assert less.is_better(0.39, 0.5) and not less.is_better(0.41, 0.5)
    assert less.is_better(0.5, math.inf) and not less.is_better(math.inf, math.inf)


def test_a_score_that_can_be_asked_for_is_named_with_the_setting():
    text = missing_score("EarlyStopping", "val_F1", ["train_loss", "val_loss", "val_IoU"])
    assert text.endswith("To have it, add 'F1' to TrainerConfig(scores=[...]).")
    assert "Did you mean 'val_IoU'" in missing_score("EarlyStopping", "val_iou", ["val_IoU"])
