"""One look at the labels tells what counting them one by one would tell."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from small import HostReads
from ununennium.training.labels import look_at, weight_seen
from ununennium.training.loss_spec import weight_on_host
from ununennium.training.targets import labels_outside

TABLE = np.array([0.2, 1.0, 5.0])
DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


@given(
    arrays.arrays(np.int64, st.tuples(st.integers(0, 3), st.integers(0, 6)),
                  elements=st.sampled_from([0, 1, 2, 3, 7, 200, 255])),
    st.sampled_from(DTYPES[::-1]),
    st.sampled_from([None, 0, 2, 3, 100, 255, -100]),
    st.sampled_from([None, TABLE]),
)  # fmt: skip
def test_a_look_tells_weight_and_labels(labels, dtype, ignored, table):
    labels = torch.from_numpy(labels).to(dtype)
    look = look_at(labels, ignored, table is not None)
    expected = weight_on_host(labels.numpy(), table, ignored)
    assert weight_seen(look, labels.numel(), table, ignored) == pytest.approx(expected)
    for classes in (1, 3, 4, 300):
        assert look.are_classes(classes, ignored) == (not labels_outside(labels, classes, ignored))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([-1, 0, 2], torch.int64), ([0, 2**20], torch.int32), ([-1, 1], torch.int8)],
)
def test_labels_that_cannot_be_counted_are_left_to_others(values, dtype):
    labels = torch.tensor(values, dtype=dtype)
    look = look_at(labels, values[0], by_class=True)
    assert (look.low, look.high) == (values[0], values[-1]) and look.counts is None
    assert weight_seen(look, len(values), None, values[0]) is None
    assert not look.are_classes(1, values[0])  # it cannot tell


def test_other_kinds_of_labels():
    assert look_at(torch.tensor([True, False]), None).are_classes(2, None)
    assert look_at(torch.tensor([0.0, 0.5]), None).are_classes(2, None)
    assert not look_at(torch.tensor([0.0, torch.nan]), None).are_classes(2, None)
    assert look_at(torch.tensor([3, 9], dtype=torch.uint16), None).high == 9
    assert look_at(torch.zeros(0, 4), 255).are_classes(1, 255)


def test_labels_are_looked_at_once():
    labels = torch.tensor([[0, 1], [2, 1]])
    with HostReads() as reads:
        look = look_at(labels, 255)
        look.are_classes(3, 255)
        weight_seen(look, 4, None, 255)
    assert reads.count == 2 and look.counts is None
