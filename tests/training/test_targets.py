"""Targets: their shape, their labels, and their dtype."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from small import make_batches, make_trainer
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
        ({"scores": LOGITS}, MASK[:, :4], CE),  # the loss knows what it takes from it
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
                       r"build the loss with ignore_index=5. If these are ids of classes, "),
        ([0, 3], r"ignore_index=3; if it is a class, the model needs 4 classes.$"),
        ([1, 2, 3], r"They seem to start at 1: subtract 1.$"),
        ([-1, 1, 9], r"-1 \(1 time\), 9 \(1 time\); .*Correct them, .*ignore_index=<its label>.$"),
        ([-1.5, 0.5], r"-1.5 \(1 time\)"),
    ],
)  # fmt: skip
def test_labels_that_are_no_class(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor(labels), 3, None)


@pytest.mark.parametrize(
    ("labels", "classes", "ignored", "message"),
    [
        ([10] * 9 + [20, 30], 3, None, r"None. If these are ids .*\(mask, \[10, 20, 30\]\).$"),
        ([1, 2, 8, 8], 6, 0, r"set these pixels to 0 .* remap_labels\(mask, \[1, 2, 8, ...\]\).$"),
        ([0] * 200 + [7], 6, 255, r"Correct the mask, or set these pixels to 255 in the dataset.$"),
        ([0, 1, 2, 7], 3, -100, r"If 7 means no data, build the loss with ignore_index=7.$"),
    ],
)
def test_a_stray_label_and_ids_with_gaps_are_told_apart(labels, classes, ignored, message):
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor(labels), classes, ignored)


def test_the_samples_with_a_stray_label_are_named():
    masks = torch.zeros(4, 8, 8, dtype=torch.uint8)
    masks[1, 2, 3] = masks[3, 0, 0] = 9
    names = {"mask": masks, "path": ["a", "b", "c", "d"]}
    for raw, where in ((names, "in path b, d;"), ((None, masks), "in sample 1, 3;")):
        with pytest.raises(ValueError, match=rf"9 \(2 times\) {where} ignore_index"):
            check_labels(masks, 3, None, raw=raw)
    with pytest.raises(ValueError, match=r"9 \(256 times\); ignore_index"):  # all of them
        check_labels(torch.full_like(masks, 9), 3, None, raw=names)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((2, 1, 8, 8), "Drop the channel: mask.squeeze(1)."),
        ((2, 3, 8, 8), "one-hot: pass target.argmax(1), or mask.argmax(0) in the dataset."),
        ((2, 8, 8, 3), "one-hot: pass target.argmax(-1), or mask.argmax(-1) in the dataset."),
        ((2, 16, 32), "Enlarge the output: F.interpolate(output, size=mask.shape[1:])."),
        ((2, 9, 8), ""),
        ((2, 4, 8), ""),
    ],
)
def test_shapes_of_masks_say_what_they_are(shape, hint):
    with pytest.raises(ValueError, match="wants labels of shape") as caught:
        check_shapes(LOGITS, torch.zeros(shape, dtype=torch.int64), CE)
    assert str(caught.value).partition("int64.")[2].strip().removeprefix("The mask is ") == hint


def test_labels_of_several_classes_are_not_for_an_elementwise_loss():
    with pytest.raises(ValueError, match=r"element by element, .* use nn.CrossEntropyLoss.$"):
        check_shapes(LOGITS, MASK, BCE)


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


def test_a_sample_in_place_of_a_batch_is_told():
    """The cure was to enlarge the output."""
    image, mask = make_batches(1)[0]
    with pytest.raises(ValueError, match="a single sample without a batch dimension"):
        make_trainer([(image[0], mask[0])], model=nn.Conv2d(4, 3, 1)).fit(1)


def test_one_channel_for_a_loss_of_classes_is_the_models_fault_and_not_the_masks():
    image, mask = make_batches(1)[0]
    batches = [(image, (mask == 1).long())]
    with pytest.raises(ValueError, match="one output channel, and CrossEntropyLoss needs one for"):
        make_trainer(batches, model=nn.Conv2d(4, 1, 1)).fit(1)
