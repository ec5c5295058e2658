"""Checks that show whether a batch is finite, and which part of it is not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from small import DEVICES, HostReads
from ununennium.training.finite import (
    CHECKED,
    HINTS,
    bad_rows,
    culprit_in,
    finite_checks,
    finite_sum,
    first_bad,
)

NUMBERS = st.floats(-1e4, 1e4, width=16) | st.sampled_from([math.nan, math.inf, -math.inf])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
TENSORS = st.builds(lambda x, dtype: torch.tensor(x, dtype=dtype), st.lists(NUMBERS), DTYPES)
OTHERS = st.sampled_from([None, "EPSG:32633", 7, math.nan, torch.arange(3), torch.tensor([True])])
NESTED = st.recursive(
    TENSORS | OTHERS,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def floats_in(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, (dict, list, tuple))
    return [tensor for item in items for tensor in floats_in(item)] if nested else []


@given(NESTED)
def test_a_sum_is_finite_where_every_number_is(value):
    found, expected = finite_sum(value), floats_in(value)
    assert (found is None) == (not expected)
    if found is not None:
        assert found.shape == ()
        assert bool(found.isfinite()) == all(bool(x.isfinite().all()) for x in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_sums_of_small_dtypes_are_no_false_alarm(dtype):
    assert finite_sum(torch.full((4096,), 6e4, dtype=dtype)).item() == pytest.approx(2.4576e8, 0.01)


def test_complex_numbers_are_checked():
    assert finite_sum(torch.ones(3, dtype=torch.complex64)).isfinite()
    assert not finite_sum(torch.tensor([complex(1, math.nan)])).isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_checks_read_nothing_and_hold_no_graph(device):
    image = torch.rand(2, 3, 8, 8, device=device, requires_grad=True)
    parts = {"s2": [image]}, image, image * 2, image.mean()
    with HostReads() as reads:
        checks = finite_checks(dict(zip(CHECKED, parts, strict=True)))
    assert reads.count == 0 and tuple(checks) == CHECKED
    assert not any(check.requires_grad for check in checks.values())
    assert all(check.device.type == device for check in checks.values())


def test_integer_labels_have_no_check():
    parts = torch.rand(2), torch.zeros(2, dtype=torch.uint8), torch.rand(2), torch.tensor(0.5)
    checks = finite_checks(dict(zip(CHECKED, parts, strict=True)))
    assert tuple(checks) == ("input", "output", "loss")


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [
        ("", None),
        ("input", None),  # and the model copes with it
        ("input target", None),
        ("output loss", "output"),
        ("input output loss", "input"),
        ("target output loss", "output"),
        ("loss", "loss"),
        ("input loss", "loss"),
        ("target loss", "target"),
    ],
)
def test_the_culprit_is_what_spoiled_output_or_loss(bad, culprit):
    parts = {name: torch.tensor(math.nan if name in bad else 1.0) for name in CHECKED}
    checks = finite_checks(parts)
    assert first_bad(checks) == first_bad(dict(reversed(checks.items()))) == culprit
    assert culprit_in({name: name not in bad for name in checks}) == culprit
    known = {name: check for name, check in checks.items() if name in bad}  # others have none
    assert first_bad(known) == culprit


def test_every_culprit_has_a_hint():
    assert set(HINTS) == {*CHECKED, "gradient"}


@given(st.lists(st.booleans(), max_size=6), st.integers(0, 99))
def test_bad_rows_are_those_with_a_bad_number(bad, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(len(bad), 2, 3, 3, generator=generator)
    for image, is_bad in zip(images, bad, strict=True):
        if is_bad:
            position = int(torch.randint(18, (), generator=generator))
            image.view(-1)[position] = [math.nan, math.inf, -math.inf][position % 3]
    assert bad_rows(images) == [row for row, is_bad in enumerate(bad) if is_bad]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "a.tif",
        [torch.tensor([math.nan])],
        torch.tensor(math.nan),
        torch.tensor([math.nan]),
        torch.arange(6).view(2, 3),
        torch.empty(2, 3, device="meta"),
    ],
)
def test_bad_rows_of_anything_else_are_none(value):
    assert bad_rows(value) == []


def test_bad_rows_by_example():
    image = torch.zeros(4, 2, 3)
    image[1, 0, 2], image[3, 1, 0] = math.nan, -math.inf
    assert bad_rows(image) == [1, 3] and bad_rows(torch.zeros(4, 2)) == []
    for other in (
        None,
        "a",
        torch.zeros(2, 8, 8, dtype=torch.long),
        torch.tensor(math.nan),
        torch.tensor([math.nan]),
    ):
        assert bad_rows(other) == []
    assert bad_rows(torch.zeros(2, 2, device="meta")) == []
