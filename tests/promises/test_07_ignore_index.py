"""7 · One ignore_index: read from the loss, for the loss, the weights and the default scores."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from small import make_batches, make_trainer, small_net
from ununennium import MaskedLoss, ValidPixels


@pytest.mark.parametrize("ignore", [1, 255, -1])
@pytest.mark.parametrize("shape", ["(N,H,W)", "(N,1,H,W)"])
def test_one_ignored_label_for_loss_and_scores_of_one_logit(ignore, shape):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 4, 8, 8, generator=generator)
    mask = (image[:, 0] > 0).to(torch.int16)
    mask[:, :3] = ignore
    mask = mask[:, None] if shape == "(N,1,H,W)" else mask

    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net(classes=1)

        def forward(self, x):
            return self.net(x) if shape == "(N,1,H,W)" else self.net(x)[:, 0]

    loss = MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"), ignore_index=ignore)
    trainer = make_trainer([(image, mask)], [(image, mask)], model=Squeezed(), loss=loss)
    history = trainer.fit(60)
    assert trainer.ignore_index == ignore
    assert history["val_accuracy"][-1] > 0.95
    # Whatever is in the ignored rows changes nothing.
    spoiled = image.clone()
    spoiled[:, :, :3] = 100.0
    assert trainer.validate([(spoiled, mask)])["val_IoU"] == history["val_IoU"][-1]


def test_nan_and_soft_targets_of_a_yes_or_no_map():
    image = torch.randn(2, 4, 8, 8)
    target = (image[:, :1] > 0).float() * 0.9 + 0.05
    target[:, :, :2] = math.nan
    loss = MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"))
    trainer = make_trainer([(image, target)], [(image, target)], model=small_net(1), loss=loss)
    history = trainer.fit(80)
    assert history["val_accuracy"][-1] > 0.95 and history["val_IoU_classes"][-1] == 2
    with pytest.raises(ValueError, match=r"255 \(\d+ times\)"):
        trainer.validate([(image, target.nan_to_num(255.0))])


def test_what_a_wrapped_loss_ignores_is_found():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.CrossEntropyLoss(ignore_index=255)

        def forward(self, output, target):
            return self.part(output, target) + 0.01 * output.square().mean()

    assert make_trainer(loss=Sum()).ignore_index == 255
    assert make_trainer(loss=nn.CrossEntropyLoss(ignore_index=np.int64(7))).ignore_index == 7


BCE = nn.BCEWithLogitsLoss()


def test_conflicting_ignore_index():
    with pytest.raises(ValueError, match=r"CrossEntropyLoss ignores -100"):
        make_trainer(loss=nn.CrossEntropyLoss(), ignore_index=255)
    with pytest.raises(ValueError, match=r"Pass loss_fn=MaskedLoss"):
        make_trainer(loss=BCE, ignore_index=255)
    masked = MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"), 255)
    assert make_trainer(loss=masked, ignore_index=255).ignore_index == 255
    assert make_trainer(loss=nn.CrossEntropyLoss(), ignore_index=None).ignore_index is None


def test_labels_of_a_function_are_checked_in_the_first_batch():
    loss = lambda output, target: nn.functional.cross_entropy(output, target, ignore_index=255)
    trainer = make_trainer(loss=loss)
    with pytest.raises(ValueError, match=r"pass TrainerConfig\(ignore_index=255\)"):
        trainer.validate(make_batches(2))


def test_metrics_that_count_what_the_loss_ignores_are_reported():
    from torchmetrics.classification import MulticlassF1Score

    with pytest.warns(UserWarning, match="ignores the label 255, and the metric 'F1' does not"):
        make_trainer(metrics={"F1": MulticlassF1Score(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(metrics={"F1": MulticlassF1Score(3, ignore_index=255)})


@pytest.mark.parametrize("own", [None, 255])
def test_a_metric_of_valid_pixels_is_not_said_to_count_nodata(own):
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassF1Score

    for wrap in (lambda metric: metric, lambda metric: MetricCollection([metric])):
        metric = ValidPixels(wrap(MulticlassF1Score(3, ignore_index=own)), None if own else 255)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_trainer(val=make_batches(1), metrics={"F1": metric})
    with pytest.warns(UserWarning, match="ignores the label 255, and the metric 'F1' does not"):
        make_trainer(val=make_batches(1), metrics={"F1": ValidPixels(MulticlassF1Score(3))})
