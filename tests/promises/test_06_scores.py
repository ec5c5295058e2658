"""6 · Scores of the whole data set: computed from counts, whatever the batches."""

import math

import pytest
import torch
import torchmetrics.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from small import NamedOutput, make_batches, make_trainer, small_net
from ununennium import Callback, ConfusionMatrix, TrainingWarning


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_iou_does_not_depend_on_the_batches(sizes, seed):
    (image, mask), = make_batches(1, size=sum(sizes), seed=seed, nodata=0.4)  # fmt: skip
    trainer = make_trainer()
    whole = trainer.validate([(image, mask)])
    split = trainer.validate(list(zip(image.split(sizes), mask.split(sizes), strict=True)))
    assert split["val_IoU"] == whole["val_IoU"]
    assert split["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


def test_an_absent_class_is_nan_and_left_out():
    trainer = make_trainer(model=small_net(classes=5), class_names=list("abcde"))
    with torch.no_grad():
        trainer.model[-1].bias[3:] = -1e4
    scores = trainer.validate(make_batches())
    assert math.isnan(scores["val_IoU/d"]) and math.isnan(scores["val_IoU/e"])
    assert scores["val_IoU_classes"] == 3
    assert scores["val_IoU"] == pytest.approx(sum(scores[f"val_IoU/{c}"] for c in "abc") / 3)


def test_byte_masks_are_scored_alike():
    trainer = make_trainer()
    plain = trainer.validate(make_batches())
    byte = trainer.validate([(image, mask.to(torch.uint8)) for image, mask in make_batches()])
    assert byte == plain


def test_classification_and_metrics_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator)
    y = x[:, :3].argmax(1)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    model = nn.Linear(5, 3)
    metrics = {"F1": tm.MulticlassF1Score(3), "Recall": tm.MulticlassRecall(3, average=None)}
    trainer = make_trainer(
        batches, batches, model=model, loss=nn.CrossEntropyLoss(), metrics=metrics,
        class_names=["a", "b", "c"],
    )  # fmt: skip
    history = trainer.fit(2)
    assert {"val_F1", "val_Recall/a", "val_Recall/c"} <= set(history)
    assert "val_IoU" not in history and trainer.directions["val_F1"] == "max"
    default = make_trainer(batches, batches, model=nn.Linear(5, 3), loss=nn.CrossEntropyLoss())
    assert {"val_accuracy", "val_IoU/2"} <= set(default.fit(1))


def test_a_metric_collection_and_no_metrics():
    from torchmetrics import MetricCollection

    collection = MetricCollection([tm.MulticlassF1Score(3, ignore_index=255)])
    assert "val_MulticlassF1Score" in make_trainer(metrics=collection).validate(make_batches())
    assert set(make_trainer(metrics={}).validate(make_batches())) == {"val_loss"}


def test_two_tables_keep_their_scores_apart():
    metrics = {"all": ConfusionMatrix(3, 255), "without water": ConfusionMatrix(3, 0)}
    batches = make_batches(2, nodata=0.0)
    scores = make_trainer(val=batches, metrics=metrics).validate()
    assert scores["val_IoU"] != scores["val_without water_IoU"]


def test_an_output_without_out_is_trained_and_not_scored():
    loss = lambda output, target: nn.functional.cross_entropy(
        output["scores"], target, ignore_index=255
    )
    settings = {"val": make_batches(2), "model": NamedOutput(), "loss": loss, "ignore_index": 255}
    assert "val_loss" in make_trainer(metrics={}, **settings).fit(1)
    with pytest.raises(ValueError, match="Name the prediction 'out'"):
        make_trainer(**settings).fit(1)


def test_scores_that_come_later_have_nan_before():
    trainer = make_trainer()
    trainer.fit(2)
    trainer.val_loader = make_batches(1)
    history = trainer.fit(1)
    assert [math.isnan(value) for value in history["val_loss"]] == [True, True, False]
    trainer.val_loader = None
    assert [math.isnan(value) for value in trainer.fit(1)["val_IoU"]] == [True, True, False, True]


def test_a_validation_loader_may_come_and_go_during_a_fit():
    class Switch(Callback):
        def on_epoch_start(self, trainer, epoch):
            trainer.val_loader = make_batches(2) if epoch == 1 else None

    history = make_trainer(callbacks=[Switch()]).fit(3)
    assert [math.isnan(value) for value in history["val_loss"]] == [True, False, True]


def scene_data(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, generator=generator)
    y = {
        "classes": x[:, :3].argmax(1), "labels": (x[:, :3] > 0).float(),
        "values": x[:, :3].sum(1, keepdim=True),
    }[kind]  # fmt: skip
    return list(zip(x.split(8), y.split(8), strict=True))


@pytest.mark.parametrize(
    ("kind", "loss", "outputs", "expected"),
    [
        ("classes", nn.CrossEntropyLoss(), 3, ["accuracy", "F1", "IoU"]),
        ("labels", nn.BCEWithLogitsLoss(), 3, ["F1", "precision", "recall"]),
        ("values", nn.MSELoss(), 1, ["MAE", "RMSE", "R2"]),
    ],
)
def test_every_task_has_the_scores_that_people_publish(kind, loss, outputs, expected):
    batches = scene_data(kind)
    trainer = make_trainer(batches, batches, model=nn.Linear(6, outputs), loss=loss)
    history = trainer.fit(1)
    found = [name for name in history if name.startswith("val_") and "/" not in name]
    assert [name for name in found if name not in ("val_loss", "val_IoU_classes")] == [
        f"val_{name}" for name in expected
    ]


def test_other_scores_are_one_setting_away_also_beside_own_metrics():
    settings = {"scores": ["kappa", "F1"], "class_names": ["a", "b", "c"]}
    names = ["kappa", "F1", "F1/a", "F1/b", "F1/c"]
    found = make_trainer(**settings).validate(make_batches(2))
    assert list(found) == ["val_loss", *(f"val_{name}" for name in names)]
    metrics = {"spread": lambda output, target: output.std()}
    both = make_trainer(metrics=metrics, **settings).validate(make_batches(2))
    assert list(both) == ["val_loss", "val_spread", *(f"val_{name}" for name in names)]
    with pytest.raises(ValueError, match="pass a list of some of IoU, F1"):
        make_trainer(scores=["f1"])


def test_a_function_is_a_metric_weighted_like_a_loss():
    batches = make_batches(3, nodata=0.5)
    error = nn.CrossEntropyLoss(ignore_index=255)
    found = make_trainer(metrics={"error": error}).validate(batches)
    assert found["val_error"] == pytest.approx(found["val_loss"], rel=1e-6)


def test_a_metric_that_fails_is_named_with_the_cure():
    def f1(output, target):
        raise ValueError("Expected argument `target` to be an int or long tensor")

    with pytest.raises(ValueError, match="Expected argument") as caught:
        make_trainer(metrics={"F1": f1}).validate(make_batches(1))
    assert "raised by metrics['F1']" in str(caught.value)
    assert "ValidPixels(metric, target_dtype=torch.long)" in str(caught.value)


def test_a_metric_that_is_silently_nan_is_told():
    metrics = {"RMSE": lambda output, target: torch.tensor(math.nan)}
    with pytest.warns(TrainingWarning, match="'val_RMSE' is NaN, and the losses are finite"):
        make_trainer(metrics=metrics).validate(make_batches(1))


def test_the_confusion_matrix_of_a_default_run_can_be_looked_at():
    trainer = make_trainer(class_names=["a", "b", "c"])
    assert trainer.confusion is None
    scores = trainer.validate(make_batches(2))
    table = trainer.confusion.table
    assert int(table.sum()) > 0
    assert float(table.diag().sum() / table.sum()) == pytest.approx(scores["val_accuracy"])
    assert "precision" in repr(trainer.confusion)


def test_the_scores_of_a_test_set_have_its_name():
    trainer = make_trainer()
    test, val = trainer.validate(make_batches(2), prefix="test"), trainer.validate(make_batches(2))
    assert test == {f"test_{name[4:]}": value for name, value in val.items()}


def test_a_metric_may_keep_its_own_values_and_items():
    class Mean:
        def reset(self):
            self.values, self.items = [0.0], [0]

        def update(self, output, target):
            self.values.append(2.0)
            self.items.append(4)

        def compute(self):
            return sum(self.values) / sum(self.items)

    metric = Mean()
    metric.reset()
    trainer = make_trainer(val=make_batches(2), metrics={"mean": metric})
    assert trainer.fit(1)["val_mean"] == [0.5]


def test_a_torchmetrics_metric_may_have_a_state_named_values():
    from torchmetrics import Metric

    class Spread(Metric):
        def __init__(self):
            super().__init__()
            self.add_state("values", [], dist_reduce_fx="cat")

        def update(self, output, target):
            self.values.append(torch.tensor([1.0, 3.0]))

        def compute(self):
            return torch.cat(self.values).max()

    trainer = make_trainer(val=make_batches(2), metrics={"spread": Spread()})
    assert trainer.fit(1)["val_spread"] == [3.0]
