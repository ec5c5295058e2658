"""The worst chips: their order, their labels, and what cannot be drawn."""

import math
from types import SimpleNamespace

import matplotlib.colors
import pytest
import torch
from torch import nn

from small import make_batches, make_trainer, small_net
from ununennium import ConfusionMatrix, MaskedLoss
from ununennium.data import true_colour
from ununennium.worst import chip_score, plot_predictions, worst_chips


def fitted(**options):
    batches = make_batches(3, size=4)
    batches[1][1][2] = 255  # a chip without a valid pixel
    trainer = make_trainer(batches, batches, **options)
    trainer.fit(1)
    return trainer


def test_the_worst_predictions_come_first_with_their_score():
    trainer = fitted(class_names=["water", "wood", "town"])
    trainer.model[1].eval()
    modes = [module.training for module in trainer.model.modules()]
    scored = []
    for image, mask in trainer.val_loader:
        for one, truth in zip(image, mask, strict=True):
            guess = torch.as_tensor(trainer.predict([(one[None], truth[None])])[0])
            matrix = ConfusionMatrix(3, 255, None, ("IoU",))
            matrix.update(nn.functional.one_hot(guess.long(), 3).movedim(-1, 0)[None], truth[None])
            scored.append((matrix.compute()["IoU"], one))
    scored = sorted((s for s in scored if s[0] == s[0]), key=lambda s: s[0])
    figure = plot_predictions(trainer, worst=3)
    labels = [axis.texts[0].get_text() for axis in figure.axes[::4]]
    assert labels == [f"IoU {score:.2f}" for score, _ in scored[:3]]
    for row, (_, one) in zip(figure.axes[::4], scored, strict=False):
        shown = torch.tensor(row.get_images()[0].get_array())
        assert torch.equal(shown, true_colour(one))
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["water", "wood"]
    assert modes == [module.training for module in trainer.model.modules()]


def test_the_worst_predictions_of_one_logit_and_of_a_regression():
    batches = [(image, (mask == 1).float()[:, None]) for image, mask in make_batches(2)]
    trainer = make_trainer(batches, batches, model=small_net(1), loss=nn.BCEWithLogitsLoss())
    trainer.fit(1)
    assert len(plot_predictions(trainer, worst=2).axes) == 8
    batches = [(image, image[:, :1] * 2) for image, _ in batches]
    trainer = make_trainer(batches, batches, model=small_net(1), loss=nn.MSELoss())
    trainer.fit(1)
    errors = [
        (torch.as_tensor(trainer.predict([b])) - b[1][:, 0]).abs().mean((1, 2)) for b in batches
    ]
    figure = plot_predictions(trainer, worst=1)
    assert figure.axes[0].texts[0].get_text() == f"error {float(torch.cat(errors).max()):.3g}"


def test_predictions_without_a_map_are_refused():
    with pytest.raises(ValueError, match="pass a loader"):
        plot_predictions(make_trainer())
    batches = [(torch.randn(4, 4, 8, 8), torch.randint(3, (4,)))]
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    trainer = make_trainer(batches, batches, model=model)
    with pytest.raises(ValueError, match="one map each"):
        plot_predictions(trainer)


def test_a_score_is_that_of_the_valid_pixels_and_of_all_classes_in_either_map():
    truth, predicted = torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 2, 1, 0]])
    assert chip_score(truth, predicted, 255) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert chip_score(truth, predicted, None) == pytest.approx((1 / 3 + 1 + 0 + 0) / 4)
    assert math.isnan(chip_score(torch.full((1, 4), 255), predicted, 255))
    values = torch.tensor([[1.5, math.nan, 2.0]])
    assert chip_score(values, torch.tensor([[1.0, 7.0, 5.0]]), None) == -1.75
    assert chip_score(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.25, 2.0]]), None) == -0.125


def test_a_chip_without_a_valid_pixel_is_not_drawn():
    assert len(plot_predictions(fitted(), worst=99).axes) == 4 * 11  # of twelve


def test_a_loader_of_ones_own_is_drawn_with_bands_and_colours_of_ones_own():
    trainer, (other,) = fitted(), make_batches(1, size=2, seed=5)
    figure = plot_predictions(trainer, [other], worst=9, rgb=(0, 1, 3), colours=["red"] * 3)
    assert len(figure.axes) == 8
    shown = [torch.tensor(axis.get_images()[0].get_array()) for axis in figure.axes[::4]]
    expected = [true_colour(image, (0, 1, 3)) for image in other[0]]
    assert all(any(torch.equal(own, one) for one in expected) for own in shown)
    patches = figure.legends[0].get_patches()[:3]
    assert {matplotlib.colors.to_hex(patch.get_facecolor()) for patch in patches} == {"#ff0000"}


def test_a_chip_of_which_nothing_is_right_has_an_iou_of_zero():
    batch = torch.randn(1, 4, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)
    trainer = make_trainer([batch], [batch])
    trainer.predict = lambda loader: torch.ones(1, 8, 8, dtype=torch.uint8)
    assert plot_predictions(trainer).axes[0].texts[0].get_text() == "IoU 0.00"


@pytest.mark.parametrize(
    ("images", "truth"),
    [((2, 3, 4, 8, 8), (2, 8, 8)), ((2, 4, 8, 8), (2, 3, 8, 8)), ((2, 4, 8, 8), (2, 4, 4))],
)
def test_series_and_maps_that_do_not_fit_are_refused(images, truth):
    trainer = SimpleNamespace(
        ignore_index=None, unpack=lambda batch: batch, predict=lambda loader: torch.zeros(2, 8, 8)
    )
    with pytest.raises(ValueError, match="one map each, but got images"):
        worst_chips(trainer, [(torch.zeros(images), torch.zeros(truth))], 4)


def test_what_a_regression_ignores_is_no_error_and_no_colour():
    """A chip that was right but for its -9999 pixels was the worst, with an error of 2,500."""
    images = torch.rand(2, 3, 8, 8)
    truth = images[:, :1].clone()
    truth[0, :, :2], truth[1] = -9999, truth[1] + 0.25
    first = nn.Conv2d(3, 1, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(3)[:1, :, None, None])
    loss = MaskedLoss(nn.L1Loss(reduction="none"), ignore_index=-9999)
    trainer = make_trainer([(images, truth)], [(images, truth)], model=first, loss=loss)
    figure = plot_predictions(trainer, worst=2)
    labels = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert labels[:2] == ["error 0.25", "error 0"]
    pictures = [axis.images[0] for axis in figure.axes if axis.images]
    assert min(picture.get_clim()[0] for picture in pictures) > -10


def test_the_worst_chips_of_a_regression_with_a_loss_of_ones_own():
    """It asked for an argument that it does not have."""
    batches = [(image, image[:, :1] * 2) for image, _ in make_batches(2)]
    loss = lambda output, target: ((output - target) ** 2).mean()
    trainer = make_trainer(batches, batches, model=nn.Conv2d(4, 1, 1), loss=loss, metrics={})
    assert plot_predictions(trainer, worst=1).axes[0].texts[0].get_text().startswith("error")
