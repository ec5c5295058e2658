"""A mean of means is the mean over everything."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ununennium.means import WeightedMean

NAN = torch.tensor(math.nan)


@settings(deadline=None)
@given(
    values=st.lists(
        st.tuples(st.floats(-100, 100, width=32), st.sampled_from([0, 1, 4, 1000]), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    on_device=st.sampled_from(["nothing", "weight", "stepped", "both"]),
)
def test_weighted_mean_counts_what_was_stepped_by_its_divisor(values, on_device):
    """Whether weight and outcome are numbers or tensors; what does not count may be NaN."""
    mean, total, divisor = WeightedMean(), 0.0, 0
    for value, weight, stepped in values:
        counts = weight > 0 and stepped
        mean.update(
            torch.tensor(value) if counts else NAN,
            torch.tensor(weight) if on_device in ("weight", "both") else weight,
            torch.tensor(stepped) if on_device in ("stepped", "both") else stepped,
        )
        total, divisor = total + value * weight * counts, divisor + weight * counts
    expected = total / divisor if divisor else math.nan
    assert mean.compute() == pytest.approx(expected, rel=1e-5, abs=1e-4, nan_ok=True)


def test_weighted_mean_keeps_double_precision():
    mean = WeightedMean()
    mean.update(torch.tensor(1.0), 2.0**25)
    for _ in range(4):
        mean.update(torch.tensor(2.0), 1.0)
    assert mean.compute() == (2.0**25 + 8) / (2.0**25 + 4) > 1


def test_weighted_mean_resumes_and_its_state_is_a_copy():
    mean, resumed = WeightedMean(), WeightedMean()
    mean.update(torch.tensor(0.3), torch.tensor(7))
    resumed.load_state_dict(mean.state_dict(), torch.device("cpu"))
    for one in (mean, resumed):
        one.update(torch.tensor(0.7), torch.tensor(2))
    assert resumed.compute() == mean.compute() == pytest.approx((0.3 * 7 + 0.7 * 2) / 9)
