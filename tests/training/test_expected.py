"""What is wrong with monitors and metrics is told at the first batch, not after the first epoch."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from small import make_batches, make_trainer
from ununennium import EMA, Callback, CheckpointCallback, EarlyStopping, Loop, Trainer
from ununennium.training.messages import TrainingWarning


def refused(message, **parts):
    """Expect a `fit` to be refused before its first step, and return the trainer."""
    trainer = make_trainer(make_batches(4), make_batches(2), **parts)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer.fit(3)
    assert trainer.epoch == trainer.global_step == 0
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "num_b" not in name)
    return trainer


@pytest.mark.parametrize(
    ("monitor", "meant"),
    [
        ("val_iou", "val_IoU"),
        ("IoU", "val_IoU"),
        ("val_los", "val_loss"),
        ("train_los", "train_loss"),
    ],
)
def test_a_monitor_with_a_typing_error_does_not_cost_an_epoch(monitor, meant, tmp_path):
    for callback in (
        EarlyStopping(monitor, mode="max" if "o" in monitor.lower()[-2:] else "auto"),
        CheckpointCallback(tmp_path, monitor, "auto"),
    ):
        refused(f"monitors '{monitor}'.*Did you mean '{meant}'", callbacks=[callback])


def test_a_scheduler_that_watches_a_missing_score_does_not_cost_an_epoch():
    refused(
        "scheduler_monitor='val_iou' is not among the scores",
        scheduler=lambda sgd: ReduceLROnPlateau(sgd, mode="max"),
        scheduler_monitor="val_iou",
    )


def test_a_score_of_unknown_direction_does_not_cost_an_epoch():
    refused(
        "cannot tell whether 'val_quality'",
        metrics={"quality": lambda output, target: output.std()},
        callbacks=[EarlyStopping("val_quality")],
    )


class Logs(Callback):
    """Logs a score late in the epoch."""

    def on_scores(self, trainer, epoch, logs):
        trainer.log("val_odd_quality", 1.0)


def test_what_a_callback_may_still_log_is_a_warning_and_no_error():
    trainer = make_trainer(
        val=make_batches(2), callbacks=[Logs(), EarlyStopping("val_odd_quality", mode="max")]
    )
    with pytest.warns(TrainingWarning, match="If nothing logs it before the end of the epoch"):
        trainer.fit(1)
    assert trainer.history["val_odd_quality"] == [1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        trainer.fit(1)  # the names are known now


def test_a_trainer_of_ones_own_may_log_too():
    class Own(Trainer):
        def run_model(self, inputs):
            return self.model(inputs)

    small = make_trainer()
    trainer = Own(
        small.model, small.optimizer, nn.CrossEntropyLoss(ignore_index=255), make_batches(),
        make_batches(1), callbacks=[EarlyStopping("val_odd", mode="max")], config=small.config,
    )  # fmt: skip
    said = "monitors 'val_odd'"
    with pytest.warns(TrainingWarning, match=said), pytest.raises(ValueError, match=said):
        trainer.fit(1)
    assert trainer.epoch == 1


def test_what_the_loss_has_logged_is_known():
    def loss(output, target):
        value = nn.functional.cross_entropy(output, target, ignore_index=255)
        trainer.log("sharpness", value)
        return value

    trainer = make_trainer(
        loss=loss, ignore_index=255, callbacks=[EarlyStopping("sharpness", mode="min")]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        trainer.fit(1)


def test_scores_of_averaged_weights_are_known(tmp_path):
    callbacks = [EMA(0.9), CheckpointCallback(tmp_path, "val_ema_IoU", "max")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        make_trainer(val=make_batches(2), callbacks=callbacks).fit(1)
    refused("monitors 'val_ema_iou'", callbacks=[EMA(0.9), EarlyStopping("val_ema_iou")])


class Cover:
    """A metric that gives several scores."""

    def reset(self):
        self.count = 0

    def update(self, output, target):
        self.count += 1

    def compute(self):
        return {"water": self.count, "forest": 0.0}


@pytest.mark.parametrize(
    "parts",
    [
        {"callbacks": [EarlyStopping("val_IoU/1")]},
        {"callbacks": [EarlyStopping("val_F1")], "scores": ("F1",)},
        {"callbacks": [EarlyStopping("val_rough", mode="max")],
         "metrics": {"rough": lambda output, target: output.std()}},
        {"callbacks": [EarlyStopping("val_loss")], "metrics": {}},
        {"callbacks": [EarlyStopping("val_water", mode="max")], "metrics": {"cover": Cover()}},
    ],
)  # fmt: skip
def test_what_will_be_there_is_not_questioned(parts):
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        make_trainer(make_batches(2), make_batches(2), **parts).fit(2)


def test_soft_targets_in_training_do_not_hide_the_scores_of_validation():
    def loss(output, target):
        ignored = {} if target.is_floating_point() else {"ignore_index": 255}
        return nn.functional.cross_entropy(output, target, **ignored)

    soft = [(x, nn.functional.one_hot(y.clamp(max=2), 3).movedim(-1, 1).float())
            for x, y in make_batches(2)]  # fmt: skip
    stopping = EarlyStopping("val_IoU")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        make_trainer(soft, make_batches(1), loss=loss, callbacks=[stopping], ignore_index=255).fit(
            1
        )
    assert stopping.best is not None


class NeedsIntegers:
    def reset(self):
        self.count = 0

    def update(self, output, target):
        raise ValueError("Expected argument `target` to be an int or long tensor")

    def compute(self):
        return 0.0


def test_a_metric_that_will_fail_is_told_at_the_first_batch():
    told = []

    class First(Callback):
        def on_batch_end(self, trainer, batch, logs):
            told.append(len(caught))

    trainer = make_trainer(
        val=make_batches(1), metrics={"F1": NeedsIntegers()}, callbacks=[First()]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="int or long"):
            trainer.fit(1)
    assert told[0] == 1 and "A metric cannot score the first batch" in str(caught[0].message)
    assert "metrics['F1']" in str(caught[0].message) and "target_dtype" in str(caught[0].message)


def test_looking_ahead_leaves_the_metrics_alone():
    class Counts:
        updates = 0

        def reset(self):
            self.values = []

        def update(self, output, target):
            self.values.append(len(target))

        def compute(self):
            return sum(self.values)

    class First(Callback):
        def on_batch_end(self, trainer, batch, logs):
            assert not hasattr(counts, "values")

    counts, parts = Counts(), (make_batches(3), make_batches(2))
    trainer = make_trainer(*parts, metrics={"seen": counts}, callbacks=[First()])
    trainer.fit(1)
    expected = sum(len(target) for _, target in make_batches(2))
    assert trainer.history["val_seen"] == [expected] and trainer.run.task.at_first is None


def float_batches():
    return [(image, image[:, :1].clone()) for image, _ in make_batches(2)]


def own(output, target):
    return ((output - target) ** 2).mean()


@pytest.mark.parametrize("runs", ["fit", "check"])
def test_a_loss_of_ones_own_with_floats_says_that_there_are_no_scores(runs, capsys):
    """All scores vanished, and the check found nothing suspicious."""
    data = float_batches()
    trainer = make_trainer(data, data, model=nn.Conv2d(4, 1, 1), loss=own)
    if runs == "check":
        (text,) = trainer.check()
        assert text.startswith("There are no scores") and "'own'" in text
        return
    with pytest.warns(TrainingWarning, match="There are no scores: the targets are floats"):
        trainer.fit(1)
    for metrics in ({}, {"rough": lambda output, target: output.std()}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", TrainingWarning)
            make_trainer(data, data, model=nn.Conv2d(4, 1, 1), loss=own, metrics=metrics).fit(1)


def test_scores_of_classes_that_a_regression_cannot_have_are_told():
    data = float_batches()
    trainer = make_trainer(data, data, model=nn.Conv2d(4, 1, 1), loss=nn.MSELoss(), scores=["IoU"])
    with pytest.warns(TrainingWarning, match=r"scores=\['IoU'\]. chooses among the scores of cl"):
        trainer.fit(1)


class ReturnsItsLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 1, 1)

    def forward(self, image):
        return self.layer(image).mean()


def test_a_model_that_returns_its_loss_trains_as_before(capsys):
    data = [(image, image[:, 0]) for image, _ in make_batches(2)]
    loss = lambda output, target: output**2
    trainer = make_trainer(data, data, model=ReturnsItsLoss(), loss=loss)
    trainer.check()
    assert trainer.fit(1)["val_loss"]


def test_a_loop_of_ones_own_may_add_scores_too(monkeypatch):
    class Own(Loop):
        def validate(self):
            return (super().validate() or {}) | {"val_extra": 0.5}

    monkeypatch.setattr(Trainer, "loop_class", Own)
    trainer = make_trainer(val=make_batches(1), callbacks=[EarlyStopping("val_extra", mode="max")])
    with pytest.warns(TrainingWarning, match="monitors 'val_extra'"):
        trainer.fit(1)
    assert trainer.history["val_extra"] == [0.5]


def test_dropped_samples_can_be_monitored():
    stopping = EarlyStopping("train_dropped_samples", mode="min")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        make_trainer(callbacks=[stopping], drop_bad_samples=True).fit(1)
    assert stopping.best == 0
