"""A value that was logged is in the history: reduced, over ranks, and after a resume."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from small import make_batches, make_trainer
from ununennium import Callback, CheckpointCallback, EarlyStopping
from ununennium.ranks import Ranks
from ununennium.training.logged import (
    REDUCTIONS,
    Logged,
    LoggedValue,
    joined,
    merged_by_name,
    number_of,
)  # fmt: skip
from ununennium.training.messages import TrainingWarning

CPU = torch.device("cpu")
VALUES, WEIGHTS = (4.0, 1.0, 2.0), (1.0, 1.0, 2.0)
EXPECTED = {"mean": 2.25, "sum": 9.0, "last": 2.0, "max": 4.0, "min": 1.0}


def logged(reduce, count=3, start=0):
    value = LoggedValue(reduce)
    for number, weight in list(zip(VALUES, WEIGHTS, strict=True))[start:count]:
        value.add(torch.tensor(number), weight)
    return value


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_name_has_one_number_however_it_was_saved_or_divided(reduce):
    assert number_of(logged(reduce).state()) == EXPECTED[reduce]
    resumed = LoggedValue(reduce)
    resumed.load(logged(reduce, 2).state(), CPU)
    resumed.add(torch.tensor(VALUES[2]), WEIGHTS[2])
    assert number_of(resumed.state()) == EXPECTED[reduce]
    parts = [{"x": logged(reduce, 1).state()}, {}, {"x": logged(reduce, start=1).state()}]
    expected = EXPECTED[reduce] if reduce != "last" else 4.0  # of the lowest rank
    assert number_of(merged_by_name(parts)["x"]) == expected


class Log(Callback):
    """Logs in many places."""

    def on_train_start(self, trainer):
        trainer.log("begun", 1, reduce="sum")

    def on_epoch_start(self, trainer, epoch):
        trainer.log("begun", 1, reduce="sum")

    def on_batch_end(self, trainer, batch, logs):
        trainer.log("size", len(batch[0]), reduce="sum")
        if "grad_norm" in logs:
            trainer.log("grad_norm", logs["grad_norm"])

    def on_scores(self, trainer, epoch, logs):
        assert logs["size"] > 0 and "grad_norm" in logs
        trainer.log("val_ema_IoU", np.float32(0.5) + epoch)
        logs["twice"] = 2 * logs["train_loss"]


def test_what_callbacks_log_is_in_the_history():
    trainer = make_trainer(make_batches(3), val=make_batches(2), callbacks=[Log()])
    history = trainer.fit(2)
    assert history["size"] == [6, 6] and history["begun"] == [2, 1]
    assert history["val_ema_IoU"] == [0.5, 1.5]
    assert history["twice"] == [2 * loss for loss in history["train_loss"]]
    assert all(norm > 0 for norm in history["grad_norm"])


def test_a_score_that_a_callback_adds_is_monitored_and_its_best_model_is_kept(tmp_path):
    """The best model was lost silently: the checkpoint saw NaN for such a score."""
    kept = CheckpointCallback(tmp_path, monitor="val_ema_IoU", mode="max")
    stopping = EarlyStopping(monitor="val_ema_IoU", mode="max")
    make_trainer(val=make_batches(1), callbacks=[Log(), stopping, kept]).fit(2)
    assert stopping.best == 1.5 and kept.best_path is not None
    assert "val_ema_IoU=1.5000" in str(kept.best_path)


def test_a_run_without_logging_is_the_same():
    plain, told = make_trainer(val=make_batches(1)), make_trainer(val=make_batches(1))
    told.callbacks = [Log()]
    history, other = plain.fit(2), told.fit(2)
    assert {name: other[name] for name in history} == history


def test_a_loss_function_logs_in_training_and_in_validation():
    cross_entropy = nn.CrossEntropyLoss(ignore_index=255)

    def loss_fn(output, target):
        trainer.log("sharpness", output.std(), reduce="max")
        return cross_entropy(output, target)

    trainer = make_trainer(val=make_batches(2), loss=loss_fn, ignore_index=255)
    trainer.check()
    trainer.profile(2)
    history = trainer.fit(1)
    assert history["sharpness"][0] > 0 and history["val_sharpness"][0] > 0
    assert trainer.validate()["val_sharpness"] == history["val_sharpness"][0]


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_safepoint(self, trainer, phase):
        if phase == "train" and trainer.global_step == self.step:
            trainer.request_stop("enough")


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_resumed_epoch_has_logged_the_same(tmp_path, step):
    whole = make_trainer(callbacks=[Log()]).fit(2)
    stopped = make_trainer(callbacks=[Log(), StopAt(step)])
    stopped.fit(2)
    path = stopped.save_checkpoint(tmp_path / "run.pt")
    resumed = make_trainer(callbacks=[Log()])
    resumed.load_checkpoint(path)
    history = resumed.fit(2 - resumed.epoch)
    del history["begun"], whole["begun"]  # these count calls of fit too
    assert history == whole


def test_nothing_is_logged_between_epochs():
    class Late(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            trainer.log("late", 1.0)

    trainer = make_trainer(callbacks=[Late()])
    with pytest.raises(RuntimeError, match="when no epoch is open.*use on_scores"):
        trainer.fit(1)
    with pytest.raises(RuntimeError, match="Call it while fit runs"):
        trainer.log("later", 1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 3), r"a tensor of shape \(2, 3\). Log one number, such as its mean"),
        ("0.5", "got a str. Log a number"),
        (None, "got a NoneType"),
        (np.zeros(3), "got a ndarray"),
    ],
)
def test_what_is_no_number_is_refused(value, message):
    values = Logged()
    values.is_open = True
    with pytest.raises((TypeError, ValueError), match=message):
        values.add("x", value)


def test_a_name_is_reduced_in_one_way():
    values = Logged()
    values.is_open = True
    values.add("x", 1.0)
    with pytest.raises(ValueError, match="reduce='mean' before, and now with reduce='max'"):
        values.add("x", 1.0, "max")
    with pytest.raises(ValueError, match="reduce='median' is not known"):
        values.add("y", 1.0, "median")


def test_a_name_of_the_trainer_is_given_way_and_a_word_is_left_out():
    with pytest.warns(TrainingWarning, match="recorded as 'logged_lr'"):
        assert joined({"lr": 0.1}, {"lr": 2.0, "x": 1.0}) == {"lr": 0.1, "logged_lr": 2.0, "x": 1.0}
    scores, values = {"note": "good", "x": torch.tensor(2.0)}, Logged()
    with pytest.warns(TrainingWarning, match="score 'note' to a str"), values.deciding(scores):
        pass
    assert scores == {"x": 2.0}


def test_a_mean_of_nothing_is_nan_and_names_are_forgotten():
    values = Logged()
    values.is_open = True
    values.add("x", 1.0, weight=0.0)
    assert math.isnan(values.take(Ranks())["x"]) and values.take(Ranks()) == {}


def test_a_score_of_the_trainer_is_not_replaced_from_on_scores():
    """`trainer.log("val_loss", ...)` in `on_scores` replaced the loss without a word."""

    class Late(Callback):
        def on_scores(self, trainer, epoch, logs):
            trainer.log("val_loss", -1.0)
            trainer.log("own", 2.0)
            trainer.log("own", 3.0)  # the last one counts

    plain, trainer = (make_trainer(val=make_batches(1), callbacks=c) for c in ([], [Late()]))
    plain.fit(1)
    with pytest.warns(TrainingWarning, match="log.'val_loss'. uses the name of a score"):
        trainer.fit(1)
    assert trainer.history["val_loss"] == plain.history["val_loss"]
    assert trainer.history["logged_val_loss"] == [-1.0] and trainer.history["own"] == [3.0]


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_value_needs_a_name(name):
    class Nameless(Callback):
        def on_batch_end(self, trainer, batch, logs):
            trainer.log(name, 1.0)

    with pytest.raises(ValueError, match=r"log\(.*\) needs a name"):
        make_trainer(callbacks=[Nameless()]).fit(1)


def test_a_name_set_in_the_copy_of_the_history_does_not_vanish_in_silence():
    """`trainer.history.setdefault("val_ema", []).append(...)` was never seen again."""

    class Sets(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            trainer.history.setdefault("val_ema", []).append(0.5)

    trainer = make_trainer(callbacks=[Sets()])
    with pytest.warns(TrainingWarning, match=r"'val_ema' is not recorded. Call trainer.log"):
        trainer.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = trainer.fit(0)
        history["mine"] = [1.0]  # after fit, it is the user's own
        assert copy.deepcopy(trainer.history) == trainer.history
        assert history.setdefault("mine", []) == [1.0] and "mine" not in trainer.history


def test_a_copy_of_the_history_in_a_callback_is_ones_own():
    kept = []

    class Copies(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            kept.append(copy.deepcopy(trainer.history))
            kept[-1]["mine"] = [2.0]
            dict(trainer.history)["mine"] = [2.0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(callbacks=[Copies()]).fit(1)
    assert type(kept[0]).__name__ == "History" and kept[0]["mine"] == [2.0]


def test_who_monitors_before_it_is_logged_learns_of_the_order():
    class LateScore(Callback):
        def on_scores(self, trainer, epoch, logs):
            trainer.log("val_own", 0.5)

    trainer = make_trainer(callbacks=[EarlyStopping("val_own", mode="max"), LateScore()],
                           val=make_batches(1))  # fmt: skip
    hint = "If LateScore logs it in on_scores, put it before EarlyStopping."
    with pytest.warns(TrainingWarning), pytest.raises(ValueError, match=hint):
        trainer.fit(1)
    right = make_trainer(callbacks=[LateScore(), EarlyStopping("val_own", mode="max")],
                         val=make_batches(1))  # fmt: skip
    with pytest.warns(TrainingWarning, match="If nothing logs it"):
        right.fit(1)
    assert right.epoch == 1
