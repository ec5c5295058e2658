"""Targets: their shape, their labels, and their dtype."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ununennium import MaskedLoss
from ununennium.training.loss_spec import inspect_loss
from ununennium.training.targets import (
    cast_target,
    check_labels,
    check_shapes,
    labels_outside,
    quote_labels,
)

CE, BCE = inspect_loss(nn.CrossEntropyLoss()), inspect_loss(nn.BCEWithLogitsLoss())
OWN = inspect_loss(lambda output, target: output.mean())
MASKED = inspect_loss(MaskedLoss(nn.MSELoss(reduction="none"), 255))
LOGITS, MASK = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)


# Shapes.


@pytest.mark.parametrize(
    ("output", "target", "spec"),
    [
        (LOGITS, MASK, CE),
        (LOGITS, MASK.to(torch.uint8), CE),
        (LOGITS, LOGITS, CE),  # class probabilities
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), CE),
        (torch.zeros(3), torch.tensor(1), CE),  # a sample without a batch
        ({"out": LOGITS, "aux": None}, MASK, CE),
        ((LOGITS, None), MASK, CE),
        ({"logits": LOGITS}, MASK[:, :4], CE),  # the loss knows what it takes from it
        (LOGITS, [MASK], CE),
        (LOGITS, LOGITS, BCE),
        (LOGITS, LOGITS.long(), BCE),
        (LOGITS, MASK[:, :4], OWN),
    ],
)
def test_targets_that_fit(output, target, spec):
    check_shapes(output, target, spec)


@pytest.mark.parametrize(
    ("output", "target", "spec", "message"),
    [
        (LOGITS, MASK.float(), CE, r"wants class numbers, .*torch.float32. Pass integers"),
        (LOGITS, MASK[:, None], CE, r"labels of shape \(2, 8, 8\), .*\(2, 1, 8, 8\).*squeeze\(1\)"),
        (LOGITS, MASK[:, :4], CE, r"\(2, 8, 8\), but .* \(2, 4, 8\), torch.int64.$"),
        (LOGITS, MASK[:1], CE, r"labels of shape \(2, 8, 8\)"),
        ({"out": LOGITS}, MASK[:1], CE, r"labels of shape \(2, 8, 8\)"),
        (LOGITS[:, :1], MASK.float(), BCE, r"by element, .*dimension: target.unsqueeze\(1\).$"),
        (LOGITS, MASK.float(), BCE, r"the target \(2, 8, 8\), torch.float32.$"),
        (LOGITS[:, 0], MASK[:, None], BCE, "compares element by element"),
        (LOGITS[:, :1], MASK, MASKED, "MaskedLoss compares element by element"),
    ],
)
def test_targets_that_do_not_fit(output, target, spec, message):
    with pytest.raises(ValueError, match=message):
        check_shapes(output, target, spec)


# Labels.


@given(
    st.lists(st.integers(-3, 6), max_size=12), st.integers(1, 4), st.sampled_from([None, 0, 5, -1])
)
def test_labels_outside_are_counted(labels, classes, ignored):
    found = labels_outside(torch.tensor(labels, dtype=torch.int16), classes, ignored)
    outside = [x for x in labels if not 0 <= x < classes and x != ignored]
    assert list(found.items()) == [(x, outside.count(x)) for x in sorted(set(outside))]


def test_labels_of_every_dtype_and_shape():
    assert labels_outside(torch.tensor(255, dtype=torch.uint8), 3, None) == {255: 1}
    assert labels_outside(torch.zeros(0, 8, dtype=torch.int64), 3, None) == {}
    floats = torch.tensor([-0.5, 0.5, 1.0, 2.0, math.nan, math.inf], requires_grad=True)
    assert labels_outside(floats, 2, None) == {-0.5: 1, 2.0: 1, math.inf: 1}
    assert labels_outside(torch.tensor([0.0, 1.0, 3.0], dtype=torch.bfloat16), 2, None) == {3.0: 1}


def test_labels_are_quoted_with_their_counts():
    assert quote_labels({-1: 1, 255: 12}) == "-1 (1 time), 255 (12 times)"
    assert quote_labels({0.5: 2}) == "0.5 (2 times)"
    many = quote_labels(dict.fromkeys(range(7), 3))
    assert many.endswith("4 (3 times) and 2 other values") and many.count("times") == 5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 5, 5], r"classes 0..2: 5 \(2 times\); ignore_index is None. If 5 means no data, "
                       r"build the loss with ignore_index=5.$"),
        ([0, 3], r"ignore_index=3; if it is a class, the model needs 4 classes.$"),
        ([1, 2, 3], r"They seem to start at 1: subtract 1.$"),
        ([-1, 1, 9], r"-1 \(1 time\), 9 \(1 time\); .*Correct them, .*ignore_index=<its label>.$"),
        ([-1.5, 0.5], r"-1.5 \(1 time\)"),
    ],
)  # fmt: skip
def test_labels_that_are_no_class(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor(labels), 3, None)


def test_the_hint_comes_from_the_loss():
    with pytest.raises(ValueError, match=r"no data, pass TrainerConfig\(ignore_index=9\)."):
        check_labels(torch.tensor([9]), 3, None, OWN.ignore_hint)


def test_ignored_labels_and_unknown_targets_pass():
    check_labels(torch.tensor([0, 255]), 2, 255)
    for other in (None, [9], np.array([9]), torch.zeros(2, device="meta")):
        check_labels(other, 2, None)


# Dtypes.


@pytest.mark.parametrize(
    ("spec", "expected"),
    [(CE, torch.int64), (BCE, torch.float32), (MASKED, torch.uint8), (OWN, torch.uint8)],
)
def test_bytes_become_what_the_loss_wants(spec, expected):
    output = {"out": torch.zeros(2, 8, 8, dtype=torch.float16)}
    assert cast_target(MASK.to(torch.uint8), output, spec).dtype == expected


def test_other_targets_are_left_alone():
    for target in (MASK.float(), torch.zeros(2, dtype=torch.complex64), [MASK], None):
        for spec in (CE, BCE, MASKED, OWN):
            assert cast_target(target, LOGITS, spec) is target


def test_a_boolean_mask_is_cast_too():
    assert cast_target(torch.tensor([True]), LOGITS, CE).dtype == torch.int64
    assert cast_target(torch.tensor([True]), LOGITS, BCE).dtype == torch.float32
