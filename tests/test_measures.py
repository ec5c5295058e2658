"""Regression and several labels on valid elements only, whatever the batches and the ranks."""

import copy
import math

import pytest
import torch
import torchmetrics as tm
import torchmetrics.classification as tmc

from ununennium.measures import MultiLabelScores, RegressionScores, ValidPixels


def regression(seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(12, 6, 6, generator=generator) * 3 + offset
    output = target + torch.randn(12, 6, 6, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = torch.nan
    return output, target


def scored(metric, output, target, sizes):
    for part, truth in zip(output.split(sizes), target.split(sizes), strict=True):
        metric.update(part, truth)
    return metric


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [[12], [5, 5, 2], [1] * 12])
def test_regression_scores_are_those_of_all_valid_elements(offset, sizes):
    output, target = regression(offset=offset)
    valid = target.isfinite()
    found = scored(RegressionScores(), output, target, sizes).compute()
    wide, truth = output[valid].double(), target[valid].double()
    expected = {
        "MAE": tm.MeanAbsoluteError().set_dtype(torch.double)(wide, truth),
        "RMSE": tm.MeanSquaredError(squared=False).set_dtype(torch.double)(wide, truth),
        "R2": tm.R2Score().set_dtype(torch.double)(wide - offset, truth - offset),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6)


def test_parts_of_several_ranks_and_empty_ones_are_merged():
    output, target = regression()
    whole = scored(RegressionScores(), output, target, [12]).compute()
    parts = [RegressionScores() for _ in range(3)]
    parts[0].update(output[:5], target[:5])
    parts[2].update(output[5:], target[5:])
    parts[2].update(output[:2], torch.full((2, 6, 6), torch.nan))
    parts[0].merge_state(parts[1:])
    assert parts[0].compute() == pytest.approx(whole, abs=1e-9)
    assert all(math.isnan(value) for value in RegressionScores().compute().values())
    constant = RegressionScores(ignore_index=-1)
    constant.update(torch.zeros(2, 1, 2), torch.tensor([[3.0, 3.0], [-1.0, 3.0]]))
    assert constant.compute()["MAE"] == 3 and math.isnan(constant.compute()["R2"])


def test_batches_without_a_valid_element_may_come_first():
    output, target = regression()
    metric, nothing = RegressionScores(), torch.full((2, 6, 6), torch.nan)
    for part, truth in ((output[:2], nothing), (output[:2], nothing), (output, target)):
        metric.update(part, truth)
    expected = scored(RegressionScores(), output, target, [12]).compute()
    assert metric.compute() == pytest.approx(expected, abs=1e-12)


def test_a_reset_forgets_what_was_scored():
    output, target = regression()
    labels = (target > 0).float()
    for metric, truth in ((RegressionScores(), target), (MultiLabelScores(6), labels)):
        expected = scored(copy.deepcopy(metric), output[4:], truth[4:], [8]).compute()
        scored(metric, output[:4], truth[:4], [4]).reset()
        found = scored(metric, output[4:], truth[4:], [8]).compute()
        assert found == pytest.approx(expected, nan_ok=True)


def test_all_sums_move_to_a_device():
    output, target = regression()
    values = scored(RegressionScores(), output, target, [12]).to("meta")
    assert values.errors.is_meta and values.spread.is_meta
    labels = scored(MultiLabelScores(6), output, (target > 0).float(), [12]).to("meta")
    assert labels.counts.is_meta
    assert MultiLabelScores(6).to("meta").counts is None


@pytest.mark.parametrize("shape", [(40, 4), (10, 4, 3, 3)])
def test_scores_of_several_labels_are_those_of_torchmetrics(shape):
    generator = torch.Generator().manual_seed(2)
    output = torch.randn(shape, generator=generator)
    target = ((output + torch.randn(shape, generator=generator)) > 0).float()
    target.view(-1)[::7] = -1
    output[:, 3], target[:, 3] = -5.0, 0.0  # a label that is absent
    metric = MultiLabelScores(4, ignore_index=-1, class_names=list("abcd"))
    found = scored(metric, output, target, [len(output) - 3, 3]).compute()
    for name, kind in (("F1", tmc.MultilabelF1Score), ("precision", tmc.MultilabelPrecision),
                       ("recall", tmc.MultilabelRecall)):  # fmt: skip
        expected = kind(4, average=None, ignore_index=-1)(output, target.long())
        for number, label in enumerate("abc"):
            assert found[f"{name}/{label}"] == pytest.approx(float(expected[number]), abs=1e-6)
        assert math.isnan(found[f"{name}/d"])
        assert found[name] == pytest.approx(float(expected[:3].mean()), abs=1e-6)
    other = copy.deepcopy(metric)
    metric.merge_state([other, MultiLabelScores(4)])
    assert metric.compute()["F1"] == found["F1"]
    parts = [MultiLabelScores(4, -1, list("abcd")) for _ in range(2)]
    for part, own in zip(parts, (slice(0, 5), slice(5, None)), strict=True):
        part.update(output[own], target[own])
    parts[0].merge_state(parts[1:])
    assert parts[0].compute() == pytest.approx(found, nan_ok=True)
    assert math.isnan(MultiLabelScores(2).compute()["F1"])


def test_a_label_of_nan_does_not_count_and_one_half_is_false():
    metric = MultiLabelScores(2)
    metric.update(torch.ones(3, 2), torch.tensor([[1.0, 0.5], [math.nan, 1.0], [0.0, 0.6]]))
    assert metric.counts.tolist() == [[[0, 1], [0, 1]], [[0, 1], [0, 2]]]


class Kept:
    """A metric that keeps what it is given."""

    def reset(self):
        pass

    def update(self, output, target):
        self.output, self.target = output, target


def test_a_metric_gets_whole_rows_of_labels_in_the_type_that_it_wants():
    metric = ValidPixels(Kept(), ignore_index=-1, target_dtype=torch.long)
    output = torch.arange(12.0).view(2, 3, 2)[..., None]  # (N, K, H, W)
    target = torch.ones(2, 3, 2, 1)
    target[0, 1, 0] = -1
    metric.update(output, target)
    assert metric.metric.target.dtype == torch.long and metric.metric.target.shape == (3, 3)
    assert metric.metric.output.tolist() == [[1, 3, 5], [6, 8, 10], [7, 9, 11]]


def test_a_map_without_a_channel_loses_its_invalid_pixels_only():
    metric, target = ValidPixels(Kept()), torch.arange(12.0).view(1, 3, 4)
    target[0, 0, 1] = math.nan
    metric.update(target + 1, target)
    assert metric.metric.target.tolist() == [0, *range(2, 12)]


def test_torchmetrics_sees_valid_pixels_only():
    output, target = regression()
    metric = ValidPixels(tm.MeanSquaredError(squared=False))
    metric.update(output[:, None], target)
    valid = target.isfinite()
    expected = (output - target)[valid].square().mean().sqrt()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-6)
    metric.reset()
    assert not metric.metric.update_called if hasattr(metric.metric, "update_called") else True


def test_torchmetrics_gets_integers_and_rows_of_pixels():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(4, 3, 5, 5, generator=generator)
    labels = torch.randint(3, (4, 5, 5), generator=generator)
    labels[0, 0] = 255
    metric = ValidPixels(tmc.MulticlassAccuracy(3, average="micro"), ignore_index=255)
    metric.update(scores, labels)
    valid = labels != 255
    assert float(metric.compute()) == pytest.approx(
        float((scores.argmax(1) == labels)[valid].float().mean())
    )
    logits = torch.randn(20, 4, generator=generator)
    floats = (logits > 0.3).float()
    labelled = ValidPixels(tmc.MultilabelF1Score(4), target_dtype=torch.long)
    labelled.update(logits, floats)
    expected = tmc.MultilabelF1Score(4)(logits, floats.long())
    assert torch.equal(labelled.compute(), expected)
    again = copy.deepcopy(labelled)
    assert torch.equal(again.compute(), expected) and again.num_labels == 4
