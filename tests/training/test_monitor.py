"""Monitored scores: which direction is better, and names that do not exist."""

import math

import pytest

from conftest import make_batches, make_trainer
from ununennium import CheckpointCallback, EarlyStopping
from ununennium.training.monitor import Monitor, direction_of


def test_monitors_are_checked():
    for mode, name in (("min", "val_IoU"), ("max", "val_loss"), ("min", "val_accuracy")):
        with pytest.raises(ValueError, match="would keep the worst model"):
            CheckpointCallback("x", monitor=name, mode=mode)
    with pytest.raises(ValueError, match="no val_loader"):
        make_trainer(callbacks=[EarlyStopping()]).fit(1)
    trainer = make_trainer(callbacks=[EarlyStopping("train_los")])
    with pytest.raises(ValueError, match="Did you mean 'train_loss'"):
        trainer.fit(3)
    assert trainer.epoch == 1
    with pytest.raises(ValueError, match="cannot tell whether 'lr'"):
        make_trainer(callbacks=[EarlyStopping("lr")]).fit(1)


def test_a_metric_says_which_way_is_better():
    class Odd:
        higher_is_better = False

        def update(self, output, target):
            self.value = output.mean()

        def compute(self):
            return self.value

        def reset(self):
            pass

    stopping = EarlyStopping("val_quality", patience=1)
    make_trainer(val=make_batches(1), metrics={"quality": Odd()}, callbacks=[stopping]).fit(1)
    assert stopping.monitor.mode == "min"


def test_members_of_a_collection_say_which_way_is_better():
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassF1Score

    collection = MetricCollection({"quality": MulticlassF1Score(3, ignore_index=255)})
    stopping = EarlyStopping("val_quality")
    make_trainer(val=make_batches(2), metrics=collection, callbacks=[stopping]).fit(1)
    assert stopping.monitor.mode == "max"


@pytest.mark.parametrize(
    ("name", "way"),
    [("val_loss", "min"), ("val_IoU/water", "max"), ("lr", None), ("val_accuracy_loss", None),
     ("val_dice", None), ("val_priority", None)],
)  # fmt: skip
def test_well_known_names(name, way):
    assert direction_of(name) == way


@pytest.mark.parametrize(
    ("value", "error"),
    [("0.1", TypeError), (True, TypeError), (None, TypeError), (-1, ValueError),
     (math.nan, ValueError), (math.inf, ValueError)],
)  # fmt: skip
def test_tolerances_that_mean_nothing(value, error):
    with pytest.raises(error, match=r"Owner\(min_delta=.* must be a number, 0 or more"):
        Monitor("val_loss", "min", value, owner="Owner")


def test_comparisons():
    more, less = Monitor("val_IoU", "max"), Monitor("val_loss", "min", min_delta=0.1)
    assert more.is_better(0.0, None) and more.is_better(0.1, 0.0)
    assert not more.is_better(0.5, 0.5) and not more.is_better(math.nan, None)
    assert less.is_better(0.39, 0.5) and not less.is_better(0.41, 0.5)
    assert less.is_better(0.5, math.inf) and not less.is_better(math.inf, math.inf)
