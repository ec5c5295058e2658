"""The parts of the metrics by themselves."""

import math

import pytest
import torch
import torchmetrics.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st

from small import DEVICES
from ununennium import ConfusionMatrix
from ununennium.metrics import MetricSet, PairCounts, predicted_classes


@pytest.mark.parametrize("classes", [2, 5, 16, 17])
@pytest.mark.parametrize("device", DEVICES)
def test_predicted_classes_are_the_argmax_ties_included(classes, device):
    scores = torch.randint(3, (2, classes, 6, 6), device=device).float()
    first = (scores == scores.amax(1, keepdim=True)).byte().cpu().numpy().argmax(1)
    if device == "cpu":  # argmax on a GPU picks any of equal scores
        assert (predicted_classes(scores).numpy() == first).all()
    chosen = scores.gather(1, predicted_classes(scores)[:, None])[:, 0]
    assert torch.equal(chosen, scores.amax(1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4, 4), (6, 1, 4, 4)])
def test_soft_labels_of_one_logit(shape, device):
    """Half is class 1; NaN and the ignored value count nowhere; with or without a channel."""
    logit = torch.randn(shape).to(device)
    truth = torch.rand(shape)
    truth.view(-1)[:3] = torch.tensor([0.5, math.nan, -1.0])
    metric = ConfusionMatrix(2, ignore_index=-1)
    metric.update(logit, truth.to(device))
    valid = truth >= 0
    pairs = (truth[valid] >= 0.5).long() * 2 + (logit.cpu()[valid] > 0).long()
    assert metric.table.flatten().tolist() == pairs.bincount(minlength=4).tolist()
    metric.compute()


@pytest.mark.parametrize(
    ("label", "found"), [(7, "1 label"), (-3, "1 label"), ((3, 9), "2 labels")]
)
def test_labels_outside_the_classes_are_counted_in_the_error(label, found):
    truth = torch.zeros(2, 4, 4, dtype=torch.int64)
    truth[0, 0, : len(label) if isinstance(label, tuple) else 1] = torch.tensor(label)
    metric = ConfusionMatrix(3, ignore_index=255)
    metric.update(torch.randn(2, 3, 4, 4), truth)
    with pytest.raises(ValueError, match=rf"Found {found} outside the classes 0\.\.2; ignore_ind"):
        metric.compute()
    metric.reset()
    assert math.isnan(metric.compute()["IoU"]) and not metric.table.any()


class Fixed:
    """A metric that computes what it was given."""

    def __init__(self, value, **facts):
        self.value, self.updates = value, 0
        self.__dict__ |= facts

    def update(self, output, target):
        self.updates += 1

    def compute(self):
        return self.value

    def reset(self):
        self.updates = 0


def test_metric_set_names_every_number():
    nested = {"a": {"deep": 1.0}, "b": torch.tensor([2.0, 3.0])}
    metrics = {
        "number": Fixed(torch.tensor(0.5)),
        "vector": Fixed([0.25, 0.75]),
        "other length": Fixed([1, 2, 3]),
        "dictionary": Fixed(nested),
    }
    scores = MetricSet(metrics, ["water", "land"]).compute()
    assert scores == {
        "number": 0.5,
        "vector/water": 0.25, "vector/land": 0.75,
        "other length/0": 1.0, "other length/1": 2.0, "other length/2": 3.0,
        "deep": 1.0, "b/water": 2.0, "b/land": 3.0,
    }  # fmt: skip
    assert all(type(value) is float for value in scores.values())


def test_metric_set_keeps_equal_names_apart_and_directions_with_them():
    first, second = (Fixed({"F1": v}, higher_is_better=h) for v, h in ((1.0, True), (2.0, False)))
    metrics = MetricSet({"one": first, "two": second, "own": Fixed(3.0)})
    assert metrics.compute() == {"F1": 1.0, "two_F1": 2.0, "own": 3.0}
    assert metrics.directions == {"F1": "max", "two_F1": "min"}


def test_metric_set_drives_all_metrics():
    one, two = Fixed(1.0), Fixed(2.0)
    moved = []
    two.to = moved.append
    metrics = MetricSet({"one": one, "two": two})
    metrics.update(torch.zeros(1), torch.zeros(1))
    assert (one.updates, two.updates) == (1, 1)
    metrics.reset(torch.device("cpu"))
    assert (one.updates, two.updates) == (0, 0) and moved == [torch.device("cpu")]
    assert MetricSet(one).compute() == {"metric": 1.0}


def test_metric_set_refuses_what_is_no_metric():
    with pytest.raises(TypeError, match="metrics is of type tuple. Pass a dictionary"):
        MetricSet((Fixed(1.0),))
    with pytest.raises(TypeError, match=r"metrics\['F1'\] is of type Tensor, which lacks update"):
        MetricSet({"ok": Fixed(1.0), "F1": torch.zeros(1)})
    with pytest.raises(TypeError, match=r"metrics\['F1'\] is a class; pass an instance: Fixed"):
        MetricSet({"F1": Fixed})


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


@pytest.mark.parametrize("size", [0, 60, 10**6])
def test_batches_that_are_gathered_are_counted_as_one(size, monkeypatch):
    """Whatever the labels are, and whoever looks at the counts in between."""
    monkeypatch.setattr(PairCounts, "size", size)
    metric = ConfusionMatrix(3, ignore_index=255)
    outputs, targets = torch.randn(7, 2, 3, 4), torch.tensor([0, 1, 2, 255, -7, 3])
    targets = targets[torch.randint(6, (7, 2, 4))]
    for number, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        metric.update(
            output, target.to(torch.uint8) if number == 3 and target.min() >= 0 else target
        )
        if number == 4:
            assert metric.table.sum() == (targets[:5] < 3).logical_and(targets[:5] >= 0).sum()
    whole = ConfusionMatrix(3, ignore_index=255)
    whole.update(outputs.flatten(0, 1), targets.flatten(0, 1))
    assert torch.equal(metric.state, whole.state)
    assert metric.state[-2] == (targets == 255).sum()
    assert metric.state[-1] == (targets == -7).sum() + (targets == 3).sum()


def test_hard_and_soft_labels_are_gathered_apart():
    metric, logits = ConfusionMatrix(2, ignore_index=0), torch.tensor([[3.0], [-1.0]])
    metric.update(logits, torch.tensor([[1], [0]]))
    metric.update(logits, torch.tensor([[1.0], [torch.nan]]))
    metric.update(logits, torch.tensor([[1], [1]]))
    assert metric.state.tolist() == [0, 0, 1, 3, 2, 0]


def test_a_notebook_shows_a_matrix_as_a_table():
    metric = ConfusionMatrix(2, class_names=["<b>", "water"])
    page = metric._repr_html_()
    assert "<table>" in page and "&lt;b&gt;" in page and "<b>" not in page


def test_a_name_of_a_score_is_checked():
    with pytest.raises(ValueError, match="pass a list of some of IoU, F1, precision"):
        ConfusionMatrix(2, scores="IoU")


def test_a_score_in_the_wrong_case_is_told():
    with pytest.raises(ValueError, match=r"Did you mean \['IoU', 'F1'\]"):
        ConfusionMatrix(3, scores=["iou", "f1"])
    with pytest.raises(ValueError, match="kappa[.]$"):
        ConfusionMatrix(3, scores="iou")
