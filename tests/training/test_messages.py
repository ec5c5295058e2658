"""Warnings point at the user's code, numbers are checked, hints are added once."""

import math
import warnings

import numpy as np
import pytest
from torch import nn

from small import make_trainer
from ununennium.training.messages import (
    TrainingWarning,
    add_hint,
    format_bytes,
    format_score,
    warn,
    whole_number,
)


def test_a_warning_points_at_the_line_that_called_the_package():
    with pytest.warns(TrainingWarning, match="a message") as caught:
        warn("a message")
    assert caught[0].filename == __file__
    trainer = make_trainer(epochs=0)
    with pytest.warns(TrainingWarning, match="All 0 epochs") as caught:
        trainer.fit()
    assert caught[0].filename == __file__


def test_frames_of_pytorch_are_skipped():
    class Warning_(nn.Module):
        def forward(self, x):
            return x

    model = Warning_()
    model.register_forward_hook(lambda *_: warn("from a hook"))
    with pytest.warns(TrainingWarning) as caught:
        model(1)
    assert caught[0].filename == __file__


def test_training_warnings_can_be_errors_by_their_class():
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        with pytest.raises(TrainingWarning, match="a message"):
            warn("a message")
    assert issubclass(TrainingWarning, UserWarning)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_every_kind_become_int(value):
    number = whole_number("epochs", value, 0)
    assert number == 3 and type(number) is int


@pytest.mark.parametrize(
    ("value", "error"),
    [(1.5, TypeError), ("3", TypeError), (True, TypeError), (None, TypeError), (-1, ValueError),
     (8, ValueError)],
)  # fmt: skip
def test_other_numbers_are_refused_with_name_value_and_limits(value, error):
    with pytest.raises(error) as caught:
        whole_number("epochs", value, 0, 7)
    message = f"epochs={value!r} must be a whole number, 0 or more, 7 or less."
    assert str(caught.value) == message


def test_a_hint_is_appended_once():
    error = OSError("the disk is full", 28)
    for _ in range(2):
        add_hint(error, "Delete something.")
        add_hint(error, "")
    assert error.args[0].splitlines()[1:] == ["Delete something."] and error.args[1] == 28


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (12_345, "12 kB"), (2_000_000, "2 MB"),
     (1_500_000_000, "1.5 GB"), (2e12, "2000.0 GB")],
)  # fmt: skip
def test_bytes_for_reading(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (310293721832432336896.0, "3.103e+20"), (1e5, "1.000e+05"), (99999.0, "99999.0000"),
        (-2e7, "-2.000e+07"), (9e-5, "9.000e-05"), (1e-4, "0.0001"), (0.0, "0.0000"),
        (0.51234, "0.5123"), (math.inf, "inf"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_huge_and_tiny_scores_are_written_with_a_power_of_ten(value, text):
    assert format_score(value) == text
