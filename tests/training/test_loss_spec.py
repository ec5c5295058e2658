"""What a loss function reveals about itself, and the batch weight that follows."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from ununennium import MaskedLoss
from ununennium.training.loss_spec import (
    HostTable,
    LossSpec,
    agreed_ignore_index,
    batch_weight,
    inspect_loss,
    named_losses,
    weight_on_device,
    weight_on_host,
)

WEIGHT = torch.tensor([0.2, 1.0, 5.0])


class Sum(nn.Module):
    """A loss made of losses."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, output, target):
        return sum(part(output, target) for part in self.parts)


def cross_entropy(**options):
    return nn.CrossEntropyLoss(**options)


# The spec.


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (cross_entropy(), {"wants_classes": True, "ignore_index": -100}),
        (nn.NLLLoss(ignore_index=7), {"wants_classes": True, "ignore_index": 7}),
        (F.cross_entropy, {"wants_classes": True, "ignore_index": -100}),
        (F.nll_loss, {"wants_classes": True, "ignore_index": -100}),
        (
            functools.partial(F.cross_entropy, ignore_index=255),
            {"wants_classes": True, "ignore_index": 255},
        ),
        (nn.BCEWithLogitsLoss(), {"wants_logits": True, "elementwise": True}),
        (F.binary_cross_entropy_with_logits, {"wants_logits": True, "elementwise": True}),
        (nn.BCELoss(), {"elementwise": True}),
        (nn.HuberLoss(), {"elementwise": True}),
        (functools.partial(F.l1_loss), {"elementwise": True}),
        (
            MaskedLoss(nn.MSELoss(reduction="none"), 255),
            {"elementwise": True, "masked": True, "ignore_index": 255, "weighs": True},
        ),
        (
            MaskedLoss(nn.BCEWithLogitsLoss(reduction="none")),
            {"elementwise": True, "masked": True, "wants_logits": True, "weighs": True},
        ),
        (lambda output, target: output.mean(), {}),
    ],
)
def test_specs_of_losses(loss, expected):
    spec = inspect_loss(loss)
    assert spec == LossSpec(name=spec.name, **expected)


def test_names_for_messages():
    def mine(output, target):
        return output.mean()

    class Callable:
        def __call__(self, output, target):
            return output.mean()

    for loss, name in (
        (nn.MSELoss(), "MSELoss"), (F.mse_loss, "mse_loss"), (mine, "mine"),
        (functools.partial(functools.partial(mine)), "mine"), (Callable(), "Callable"),
        (MaskedLoss(nn.L1Loss(reduction="none")), "MaskedLoss"),
    ):  # fmt: skip
        assert inspect_loss(loss).name == name


def test_outer_settings_of_a_partial_win():
    inner = functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=0)
    spec = inspect_loss(functools.partial(inner, ignore_index=255))
    assert spec.ignore_index == 255 and spec.class_weight.find() is WEIGHT


def test_class_weights_are_those_of_a_mean_over_classes():
    assert inspect_loss(cross_entropy(weight=WEIGHT)).class_weight.find() is WEIGHT
    assert inspect_loss(cross_entropy()).class_weight is None
    assert inspect_loss(nn.BCELoss(weight=WEIGHT)).class_weight is None  # divided by elements


@pytest.mark.parametrize(
    ("ignored", "found"), [((255, 255), 255), ((255, 0), None), ((), None), ((3,), 3)]
)
def test_what_the_parts_of_a_loss_ignore(ignored, found):
    loss = Sum(nn.MSELoss(), *(cross_entropy(ignore_index=label) for label in ignored))
    assert inspect_loss(loss).ignore_index == found


def test_an_ignored_label_is_an_int():
    spec = inspect_loss(cross_entropy(ignore_index=np.int64(7)))
    assert spec.ignore_index == 7 and type(spec.ignore_index) is int


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_means_can_be_combined(reduction):
    losses = nn.MSELoss(reduction=reduction), functools.partial(F.mse_loss, reduction=reduction)
    for loss in losses:
        with pytest.raises(ValueError, match=f"reduction='{reduction}', .* Pass reduction='mean'"):
            inspect_loss(loss)


def test_how_to_ignore_a_label():
    for loss, hint in (
        (cross_entropy(), "build the loss with ignore_index=9"),
        (nn.MSELoss(), r"use MaskedLoss(loss with reduction='none', ignore_index=9)"),
        (lambda output, target: 0, "pass TrainerConfig(ignore_index=9)"),
    ):
        assert inspect_loss(loss).ignore_hint.format(9) == hint


# The weight of a batch.


def weight_of(target, loss, ignore_index=255):
    return batch_weight(target, loss, inspect_loss(loss), ignore_index)


LABELS = torch.tensor([[0, 1, 2, 255], [2, 2, 255, 255]])


class Own(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def batch_weight(self, target):
        return self.weight

    def forward(self, output, target):
        return output.mean()


@pytest.mark.parametrize(
    ("target", "loss", "expected"),
    [
        (LABELS, cross_entropy(ignore_index=255), 5.0),
        (LABELS.to(torch.uint8), cross_entropy(ignore_index=255), 5.0),
        (LABELS, cross_entropy(weight=WEIGHT, ignore_index=255), 0.2 + 1.0 + 3 * 5.0),
        (LABELS, lambda o, t: o.mean(), 5.0),
        (torch.rand(2, 3, 4, 5), cross_entropy(), 2.0 * 4 * 5),  # class probabilities
        (torch.rand(2, 3), cross_entropy(), 2.0),
        (torch.rand(2, 1, 4), nn.MSELoss(), 8.0),
        (LABELS, nn.MSELoss(), 8.0),
        (LABELS, MaskedLoss(nn.MSELoss(reduction="none"), 255), 5),
        (torch.rand(6, 4), lambda o, t: o.mean(), 6.0),
        (torch.tensor(0.5), lambda o, t: o.mean(), 1.0),
        ([{"boxes": None}] * 3, lambda o, t: o.mean(), 3.0),
        ({"mask": LABELS}, lambda o, t: o.mean(), 2.0),
        (LABELS, Own(12.5), 12.5),
        (LABELS, Own(torch.tensor(3)), 3),
    ],
)
def test_the_table_of_weights(target, loss, expected):
    weight = weight_of(target, loss)
    assert weight == pytest.approx(expected) and not isinstance(weight, torch.Tensor)


def test_a_weight_on_a_device_is_not_read():
    on_device = LABELS.to("meta")
    assert weight_of(on_device, cross_entropy()).is_meta
    assert weight_of(on_device, cross_entropy(weight=WEIGHT.to("meta"))).is_meta
    assert weight_of(LABELS, Own(torch.zeros((), device="meta"))).is_meta
    assert weight_of(on_device.float(), nn.MSELoss()) == 8.0  # known from the shape


def test_a_weight_that_requires_a_gradient():
    assert weight_of(LABELS, Own(torch.tensor(3.0, requires_grad=True))) == 3.0


def test_labels_outside_the_classes_are_no_empty_batch():
    loss = cross_entropy(weight=WEIGHT)
    assert weight_of(torch.full((2, 4), 7), loss) == 8.0
    assert weight_of(torch.tensor([-1, 0, 3]), loss) == pytest.approx(2.2)


def table_of(weight):
    return None if weight is None else HostTable(lambda: weight).numbers()


def test_class_weights_that_change_are_read_again():
    loss = cross_entropy(weight=WEIGHT.clone())
    spec = inspect_loss(loss)
    assert batch_weight(LABELS, loss, spec, 255) == pytest.approx(16.2)
    loss.weight *= 2
    assert batch_weight(LABELS, loss, spec, 255) == pytest.approx(32.4)
    loss.weight = WEIGHT / 2
    assert batch_weight(LABELS, loss, spec, 255) == pytest.approx(8.1)


@given(
    arrays.arrays(np.int64, st.tuples(st.integers(0, 3), st.integers(1, 5)),
                  elements=st.sampled_from([0, 1, 2, 255])),
    st.sampled_from([None, WEIGHT]),
    st.sampled_from([0, 255, -100]),
)  # fmt: skip
def test_host_and_device_count_alike(labels, class_weight, ignored):
    if ignored != 255:
        labels = np.minimum(labels, 2)
    found = weight_on_host(labels, table_of(class_weight), ignored)
    expected = weight_on_device(torch.from_numpy(labels), class_weight, ignored)
    assert found == pytest.approx(expected.item())


@pytest.mark.parametrize("ignored", [None, 255])
def test_nothing_ignored_counts_everything(ignored):
    labels = torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8)
    for weight, expected in ((None, 4.0), (WEIGHT, 11.2)):
        assert weight_on_host(labels.numpy(), table_of(weight), ignored) == pytest.approx(expected)
        assert weight_on_device(labels, weight, ignored).item() == pytest.approx(expected)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 999))
def test_weighted_means_are_the_mean_over_everything(valid, seed):
    """The definition of a weight, for each loss of which PyTorch knows the mean."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(valid), 3, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (len(valid), 9), generator=generator)
    for row, count in zip(labels, valid, strict=True):
        row[count:] = 255
    for options in ({}, {"weight": WEIGHT.double()}, {"label_smoothing": 0.1}):
        loss, parts, total = cross_entropy(ignore_index=255, **options), 0.0, 0.0
        for score, label in zip(scores.split(1), labels.split(1), strict=True):
            if weight := weight_of(label, loss):
                parts, total = parts + weight * loss(score, label).item(), total + weight
        if total:
            assert parts / total == pytest.approx(loss(scores, labels).item())


# Losses by name.


def test_the_loss_comes_first_and_is_a_scalar():
    parts = {"dice": torch.tensor([0.4]), "loss": torch.tensor([[0.9]])}
    found = named_losses(parts, "mine")
    assert list(found) == ["loss", "dice"] and all(value.ndim == 0 for value in found.values())
    assert list(parts) == ["dice", "loss"]  # the caller's is as it was
    loss = torch.tensor(0.5)
    assert named_losses(loss, "mine")["loss"] is loss


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        ({"ce": torch.tensor(0.1)}, ValueError, r"mine returned \['ce'\], .* called 'loss'"),
        (torch.zeros(2, 8), ValueError, r"one number, .*'loss' has shape \(2, 8\). Take the mean"),
        (torch.zeros(0), ValueError, r"'loss' has shape \(0,\)"),
        (0.5, TypeError, "'loss' is of type float. Return the tensor, not its .item"),
        (None, TypeError, "'loss' is of type NoneType"),
        ({"loss": torch.tensor(0.1), "dice": 0.5}, TypeError, "'dice' is of type float"),
    ],
)
def test_results_that_are_no_losses(loss, kind, message):
    with pytest.raises(kind, match=message):
        named_losses(loss, "mine")


# The ignored label.


@pytest.mark.parametrize(
    ("asked", "loss", "agreed"),
    [
        ("auto", cross_entropy(ignore_index=255), 255),
        ("auto", cross_entropy(), -100),
        ("auto", nn.MSELoss(), None),
        (255, cross_entropy(ignore_index=255), 255),
        (None, cross_entropy(), None),  # -100 is no label
        (None, nn.MSELoss(), None),
        (255, MaskedLoss(nn.MSELoss(reduction="none"), 255), 255),
        (255, lambda o, t: o.mean(), 255),  # which may ignore what it likes
        (255, Sum(nn.MSELoss()), 255),
    ],
)
def test_what_loss_and_config_agree_on(asked, loss, agreed):
    assert agreed_ignore_index(asked, inspect_loss(loss)) == agreed


@pytest.mark.parametrize(
    ("asked", "loss", "message"),
    [
        (255, cross_entropy(), r"CrossEntropyLoss ignores -100: .*nn.CrossEntropyLoss\(ignore"),
        (255, nn.BCEWithLogitsLoss(), r"ignores no label: .*Pass loss_fn=MaskedLoss\(..., ignore"),
        (7, cross_entropy(ignore_index=255), "ignore_index=7, but CrossEntropyLoss ignores 255"),
        (None, cross_entropy(ignore_index=255), "scores would count .* Pass ignore_index=255"),
        (None, MaskedLoss(nn.MSELoss(reduction="none"), 9), "MaskedLoss ignores 9: scores would"),
    ],
)
def test_conflicting_ignore_index(asked, loss, message):
    with pytest.raises(ValueError, match=message):
        agreed_ignore_index(asked, inspect_loss(loss))
