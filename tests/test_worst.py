"""The worst chips: their order, their labels, and what cannot be drawn."""

import pytest
import torch
from torch import nn

from small import make_batches, make_trainer, small_net
from ununennium import ConfusionMatrix
from ununennium.data import true_colour
from ununennium.worst import plot_predictions


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
