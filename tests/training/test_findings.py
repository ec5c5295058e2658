"""What a single batch shows about images, targets and outputs, and what is said about it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ununennium import MaskedLoss
from ununennium.training.findings import (
    band_dim,
    broadcast_problem,
    find_gap,
    inspect_image,
    inspect_output,
    inspect_target,
    inspect_values,
    last_operation,
    listed,
    scale_problem,
)
from ununennium.training.loss_spec import inspect_loss

# Images.


def test_thirteen_bands_do_not_look_like_eight():
    """Only eight means were printed, with no sign that there were more."""
    report, problems = inspect_image(torch.randn(4, 13, 16, 16))
    means = report.split("means ")[1].split(";")[0]
    assert "; 13 channels;" in report and len(means.split(", ")) == 13 and not problems
    report, _ = inspect_image(torch.randn(4, 224, 4, 4))
    assert report.count("... (224 in all)") == 2 and listed(torch.arange(16.0)).endswith("15")


@pytest.mark.parametrize(
    ("model", "dim"),
    [
        (nn.Conv2d(4, 8, 3), 2),
        (nn.Sequential(nn.Identity(), nn.Conv2d(20, 8, 3)), 2),  # dates and bands in one
        (nn.Conv3d(5, 8, 3), 1),
        (nn.Conv2d(5, 8, 3), 1),
        (nn.Linear(4, 4), 1),
    ],
)
def test_dates_are_told_from_channels(model, dim):
    assert band_dim(torch.zeros(2, 5, 4, 8, 8), model) == dim
    assert band_dim(torch.zeros(2, 4, 8, 8), model) == 1


def test_an_empty_date_is_no_empty_channel():
    """ "Channels [1, 2, 5] have the same value everywhere" were cloudy dates."""
    series = torch.randn(2, 5, 4, 8, 8)
    series[:, 1] = 0
    report, problems = inspect_image(series, nn.Conv2d(4, 8, 3))
    assert "4 channels, 5 dates" in report and not problems
    series[:, :, 3] = 0
    assert inspect_image(series, nn.Conv2d(4, 8, 3))[1][0].startswith("Channels [3] have the same")


def test_decibels_are_not_fine():
    """Radar in decibels passed; one epoch reached an IoU of 0.32, and 0.77 once normalised."""
    radar = -16.8 + 4 * torch.randn(4, 2, 32, 32)
    radar[:, 1] = 0.1 * torch.randn(4, 32, 32)
    _, (problem,) = inspect_image(radar)
    assert problem.startswith("The image is not centred: the mean of channel 0 is -16.")
    assert "Subtract the mean" in problem


@pytest.mark.parametrize(
    ("mean", "spread"),
    [(0.0, 1.0), (0.5, 0.05), (1.0, 0.0), (5.0, 0.0), (2.9, 0.1), (4.0, 3.0), (-1.0, 0.3), (0, 0)],
)
def test_what_is_near_zero_and_one_is_fine(mean, spread):
    assert scale_problem(torch.tensor([float(mean)]), torch.tensor([float(spread)])) == ""


def test_an_image_of_mostly_zeros_is_fine():
    image = torch.zeros(2, 3, 32, 32)
    image[..., :3] = torch.rand(2, 3, 32, 3)
    assert not inspect_image(image)[1]


# Targets.


@pytest.mark.parametrize("gap", [-9999.0, -32768.0, 1e20, torch.finfo(torch.float32).min])
def test_a_number_for_nodata_in_a_height_is_told(gap):
    """-9999 in a regression target passed, and the loss took it for a valley."""
    height = torch.rand(4, 16, 16) * 30
    height[:, 4] = gap
    text, (problem,) = inspect_values(height)
    assert "in 6.2% of its elements" in problem and "MaskedLoss" in problem
    assert "0.0% not finite" in text and "mean 1" in text  # of the others
    ignored = int(gap) if abs(gap) < 1e6 else None
    assert not inspect_values(height, ignored)[1] or ignored is None


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0, 1.0, 1.0],
        [-9999.0, -9000.0, -8000.0, -7000.0],
        [9999.0, 12_000.0, 8000.0],
        [-999.0, 999.0, 0.0],
        [-9999.0, -9999.0],
        [0.0, 1e6],
        [],
    ],
)
def test_plain_numbers_are_not_taken_for_gaps(values):
    assert find_gap(torch.tensor(values)) is None


def test_gaps_among_elevations_and_missing_values():
    elevation = torch.tensor([200.0, 900.0, 4000.0, -9999.0])
    assert find_gap(elevation) == (-9999.0, 0.25)
    text, _ = inspect_values(torch.tensor([torch.nan, 1.0, 2.0, 3.0]))
    assert "25.0% not finite" in text
    assert inspect_values(torch.empty(0))[0] == "; 0.0% not finite"


CROSS = inspect_loss(nn.CrossEntropyLoss())


def test_one_hot_scene_labels_are_told_why_there_are_no_scores():
    """Training worked, and there was neither a score nor a word."""
    labels = F.one_hot(torch.tensor([0, 2, 1, 2]), 3).float()
    _, (problem,) = inspect_target(labels, torch.randn(4, 3), CROSS, None)
    assert problem.startswith("The target is one-hot, (4, 3)") and "target.argmax(1)" in problem
    mixed = 0.9 * labels + 0.1 / 3
    several = torch.tensor([[1.0, 1.0, 0.0]] * 4)
    for target in (mixed, several, torch.zeros(4, 3)):
        assert not inspect_target(target, torch.randn(4, 3), CROSS, None)[1]
    bce = inspect_loss(nn.BCEWithLogitsLoss())
    assert not inspect_target(labels, torch.randn(4, 3), bce, None)[1]
    assert not inspect_target(labels[:, :1], torch.randn(4, 1), CROSS, None)[1]


# Outputs.

BCE = (
    nn.BCEWithLogitsLoss(),
    F.binary_cross_entropy_with_logits,
    functools.partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(2.0)),
    MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"), ignore_index=255),
)


@pytest.mark.parametrize("loss", BCE)
def test_a_sigmoid_before_a_loss_with_one_is_told(loss):
    image, spec = torch.randn(2, 4, 8, 8), inspect_loss(loss)
    layer = nn.Conv2d(4, 1, 1)
    for output in (
        layer(image).sigmoid(),
        nn.Sequential(layer, nn.Sigmoid())(image)[:, 0],
        F.sigmoid(layer(image)).squeeze(1).double(),
    ):
        (problem,) = inspect_output(output, spec)
        assert "comes from a sigmoid" in problem
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.fill_(0.5)  # logits that look like probabilities
    assert not inspect_output(layer(image), spec)
    assert not inspect_output(layer(image).sigmoid(), inspect_loss(nn.BCELoss()))


def test_the_last_operation_is_unknown_without_a_graph():
    assert last_operation(torch.zeros(2)) == ""
    assert last_operation(torch.zeros(2, requires_grad=True)) != "Sigmoid"


def test_losses_as_functions_are_understood_too():
    logits = torch.randn(2, 3, 4, 4)
    cross, nll = inspect_loss(F.cross_entropy), inspect_loss(F.nll_loss)
    assert "sums to 1" in inspect_output(logits.softmax(1), cross)[0]
    assert "takes logarithms" in inspect_output(logits, nll)[0]
    assert not inspect_output(logits, cross) and not inspect_output(logits.log_softmax(1), nll)


def test_nodata_in_an_image_is_not_called_a_large_number():
    """The cure was to normalise it, which makes -9999 worse."""
    image = torch.rand(2, 3, 8, 8)
    image[:, :, :2] = -9999
    report, (problem,) = inspect_image(image)
    assert problem.startswith("The image is -9999 in 25.0% of its values") and "-2.5e" not in report


def test_a_loss_of_ones_own_that_would_broadcast_is_told():
    """(N, 1, H, W) - (N, H, W) trained on nonsense, and nothing was suspicious."""
    spec = inspect_loss(lambda output, target: ((output - target) ** 2).mean())
    output, target = torch.zeros(4, 1, 8, 8), torch.zeros(4, 8, 8)
    assert "compares each sample with all others" in broadcast_problem(output, target, spec)[0]
    for other in (target[:, None], target.long(), torch.zeros(4, 8), None):
        assert not broadcast_problem(output, other, spec)
    assert not broadcast_problem(output, target, inspect_loss(nn.MSELoss()))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.uint8])
def test_images_of_integers_are_looked_at_too(dtype):
    """They have no NaN to stand for a gap, and 16 bits without a sign have no minimum."""
    image = torch.randint(0, 200, (2, 3, 8, 8)).to(dtype)
    report, problems = inspect_image(image)
    assert f"{str(dtype).removeprefix('torch.')}; 3 channels" in report
    assert problems[0].startswith("The image is not normalised")
    if dtype == torch.int16:
        image[:, :, 0] = -9999
        assert inspect_image(image)[1][0].startswith("The image is -9999 in 12.5% of its values")
