"""8 · Monitors: what improves, in which direction, and for how long to wait."""

import math

import pytest
import torch

from small import make_batches, make_trainer
from ununennium import CheckpointCallback, EarlyStopping


def test_a_constant_score_ends_the_run_after_its_patience():
    frozen = lambda p: torch.optim.SGD(p, lr=0.0)
    for patience in (1, 2, 5):
        trainer = make_trainer(
            optimizer=frozen, callbacks=[EarlyStopping("train_loss", patience=patience)],
            model=torch.nn.Conv2d(4, 3, 1),
        )  # fmt: skip
        trainer.fit(20)
        assert trainer.epoch == patience + 1
        assert "did not improve" in trainer.stop_reason


def test_a_fit_after_an_early_stop_trains():
    trainer = make_trainer(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0), model=torch.nn.Conv2d(4, 3, 1),
        callbacks=[EarlyStopping("train_loss", patience=2)],
    )  # fmt: skip
    trainer.fit(20)
    trainer.fit(20)
    assert trainer.epoch == 5


def test_a_script_that_is_started_again_stays_stopped(tmp_path):
    """A cluster restarts it for ever; more patience, or a second fit, trains on."""

    def script(patience):
        trainer = make_trainer(
            optimizer=lambda p: torch.optim.SGD(p, lr=0.0), model=torch.nn.Conv2d(4, 3, 1),
            callbacks=[
                EarlyStopping("train_loss", patience=patience),
                CheckpointCallback(tmp_path, "train_loss", "min"),
            ],
            epochs=20,
        )  # fmt: skip
        trainer.resume(tmp_path)
        trainer.fit()
        return trainer

    first, again = script(2), script(2)
    assert first.epoch == again.epoch == 3
    assert first.stop_reason == again.stop_reason and "did not improve" in again.stop_reason
    assert script(4).epoch == 5
    again.fit()
    assert again.epoch == 5


def test_an_unknown_score_is_not_taken_for_a_loss(tmp_path):
    class Quality:
        def reset(self):
            self.value = 0.0

        def update(self, output, target):
            self.value += 1.0

        def compute(self):
            return self.value

    settings = {"val": make_batches(2), "metrics": {"quality": Quality()}}
    callback = CheckpointCallback(tmp_path, "val_quality")
    with pytest.raises(ValueError, match="cannot tell whether 'val_quality'"):
        make_trainer(callbacks=[callback], **settings).fit(1)
    for mode in ("min", "max"):  # passed, and so meant
        make_trainer(
            callbacks=[CheckpointCallback(tmp_path / mode, "val_quality", mode)], **settings
        ).fit(1)


def test_worst_models_missing_scores_and_unknown_directions_are_refused():
    for mode, name in (("min", "val_IoU"), ("max", "val_loss"), ("min", "val_accuracy")):
        with pytest.raises(ValueError, match="would keep the worst model"):
            CheckpointCallback("x", monitor=name, mode=mode)
    with pytest.raises(ValueError, match="no val_loader"):
        make_trainer(callbacks=[EarlyStopping()]).fit(1)
    trainer = make_trainer(callbacks=[EarlyStopping("train_los")])
    with pytest.raises(ValueError, match="Did you mean 'train_loss'"):
        trainer.fit(3)
    assert trainer.epoch == trainer.global_step == 0  # nothing was spent on it
    with pytest.raises(ValueError, match="cannot tell whether 'lr'"):
        make_trainer(callbacks=[EarlyStopping("lr")]).fit(1)


def test_a_checkpoint_does_not_quote_a_mode_that_was_never_passed():
    with pytest.raises(ValueError, match="would keep the worst model") as told:
        CheckpointCallback("x", monitor="val_F1")
    assert str(told.value) == (
        "CheckpointCallback(monitor='val_F1') would keep the worst model: val_F1 is better when it "
        "is larger, and the default keeps the smallest. Pass mode='max'."
    )


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


class Given:
    """A metric whose scores are given."""

    higher_is_better = True

    def __init__(self, *scores):
        self.scores = iter(scores)

    def update(self, output, target):
        pass

    def compute(self):
        return next(self.scores)

    def reset(self):
        pass


def test_without_a_mode_a_checkpoint_keeps_what_the_metric_calls_best(tmp_path):
    keep = CheckpointCallback(tmp_path, monitor="val_distance")  # better when smaller, by its name
    metrics = {"distance": Given(0.1, 0.3, 0.2)}  # better when larger, as it says itself
    make_trainer(val=make_batches(1), metrics=metrics, callbacks=[keep]).fit(3)
    assert keep.best_score == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.2, 0.5, 0.4], 2),
        ([0.0, 0.0, 0.0], 1),
        ([math.nan, 0.0, math.nan], 2),
        ([0.5, math.nan, 0.5], 1),
        ([-2.0, -1.0, 0.0], 3),
    ],
)
def test_the_earlier_of_equal_scores_is_kept_and_nan_never(tmp_path, scores, best):
    keep = CheckpointCallback(tmp_path, "val_quality", "max")
    make_trainer(val=make_batches(1), metrics={"quality": Given(*scores)}, callbacks=[keep]).fit(3)
    assert keep.best_path.name.startswith(f"epoch={best:03d}-")
    assert keep.best_score == scores[best - 1]
