"""Rules 8-11: data-set-level scores, one ignore_index, absent classes."""

import math

import pytest
import torch
import torchmetrics.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import make_batches, make_trainer, small_net
from ununennium import ConfusionMatrix, MaskedLoss


@settings(deadline=None, max_examples=50)
@given(
    classes=st.integers(2, 6),
    ignore=st.sampled_from([None, 0, 1, 255, -1]),
    seed=st.integers(0, 999),
)
def test_agrees_with_torchmetrics(classes, ignore, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, classes, 7, 5, generator=generator)
    truth = torch.randint(classes, (3, 7, 5), generator=generator)
    if ignore is not None:
        truth[torch.rand(truth.shape, generator=generator) < 0.3] = ignore
    ours = ConfusionMatrix(classes, ignore_index=ignore)
    theirs = tm.MulticlassConfusionMatrix(classes, ignore_index=ignore)
    ours.update(scores, truth)
    theirs.update(scores, truth)
    assert torch.equal(ours.table, theirs.compute())


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_iou_does_not_depend_on_the_batches(sizes, seed):
    (image, mask), = make_batches(1, size=sum(sizes), seed=seed, nodata=0.4)  # fmt: skip
    trainer = make_trainer()
    whole = trainer.validate([(image, mask)])
    split = trainer.validate(list(zip(image.split(sizes), mask.split(sizes), strict=True)))
    assert split["val_IoU"] == whole["val_IoU"]
    assert split["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


def test_absent_class_is_nan_and_left_out():
    trainer = make_trainer(model=small_net(classes=5), class_names=list("abcde"))
    with torch.no_grad():
        trainer.model[-1].bias[3:] = -1e4
    scores = trainer.validate(make_batches())
    assert math.isnan(scores["val_IoU/d"]) and math.isnan(scores["val_IoU/e"])
    assert scores["val_IoU_classes"] == 3
    assert scores["val_IoU"] == pytest.approx(sum(scores[f"val_IoU/{c}"] for c in "abc") / 3)


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


def test_byte_masks_and_channel_masks():
    trainer = make_trainer()
    plain = trainer.validate(make_batches())
    byte = trainer.validate([(image, mask.to(torch.uint8)) for image, mask in make_batches()])
    assert byte == plain


def test_classification_and_torchmetrics():
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


def test_metric_collection_and_no_metrics():
    from torchmetrics import MetricCollection

    collection = MetricCollection([tm.MulticlassF1Score(3, ignore_index=255)])
    assert "val_MulticlassF1Score" in make_trainer(metrics=collection).validate(make_batches())
    assert set(make_trainer(metrics={}).validate(make_batches())) == {"val_loss"}


def test_regression_has_no_scores_by_default():
    batches = [(torch.randn(2, 4, 8, 8), torch.randn(2, 1, 8, 8))]
    trainer = make_trainer(batches, batches, model=small_net(1), loss=nn.MSELoss())
    assert set(trainer.validate()) == {"val_loss"}


def test_class_names_must_match():
    with pytest.raises(ValueError, match="2 names, .* 3 classes"):
        make_trainer(class_names=["a", "b"]).validate(make_batches())


def test_modes_are_restored_module_by_module():
    model = small_net()
    model[1].eval()  # a frozen batch norm
    frozen = model[1].running_mean.clone()
    trainer = make_trainer(val=make_batches(), model=model)
    trainer.fit(2)
    assert torch.equal(model[1].running_mean, frozen)
    assert model.training and not model[1].training and model[0].training
    model.eval()  # somebody looked at predictions
    seen = []
    trainer.callbacks.append(
        type("See", (), {"on_batch_end": lambda s, t, b, logs: seen.append(t.model[0].training)})()
    )
    trainer.fit(1)
    assert all(seen) and not model.training
