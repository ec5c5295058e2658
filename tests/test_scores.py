"""Scores from a table are those of torchmetrics, also with absent classes."""

import math

import pytest
import torch
import torchmetrics.classification as tm

from ununennium.scores import SCORES, chosen_scores, overall, per_class, report_html, report_text


def random_pairs(seed, classes=5):
    """Truth and prediction in which the last class is absent, and another is never predicted."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes - 1, (400,), generator=generator)
    guess = torch.where(torch.rand(400, generator=generator) < 0.6, truth, truth.roll(7))
    return truth, torch.where(guess == 2, 0, guess)


def table_of(truth, predicted, classes=5):
    return (truth * classes + predicted).bincount(minlength=classes**2).view(classes, classes)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_torchmetrics(seed):
    truth, predicted = random_pairs(seed)
    table = table_of(truth, predicted)
    classes, scores = per_class(table), overall(table)
    theirs = {
        "F1": tm.MulticlassF1Score, "precision": tm.MulticlassPrecision,
        "recall": tm.MulticlassRecall,
    }  # fmt: skip
    for name, kind in theirs.items():
        expected = kind(5, average=None)(predicted, truth)
        assert torch.allclose(classes[name][:4].float(), expected[:4], atol=1e-6)
        assert classes[name][4].isnan()  # absent; torchmetrics says 0
        mean = chosen_scores(table, "abcde", [name])[name]
        assert mean == pytest.approx(float(expected[:4].mean()), abs=1e-6)
    iou = tm.MulticlassJaccardIndex(5, average=None)(predicted, truth)
    assert torch.allclose(classes["IoU"][:4].float(), iou[:4], atol=1e-6)
    kappa = tm.MulticlassCohenKappa(5)(predicted, truth)
    assert scores["kappa"] == pytest.approx(float(kappa), abs=1e-6)
    accuracy = tm.MulticlassAccuracy(5, average="micro")(predicted, truth)
    assert scores["accuracy"] == pytest.approx(float(accuracy), abs=1e-6)


def test_only_what_is_chosen_is_there_and_in_this_order():
    table = table_of(*random_pairs(0))
    assert list(chosen_scores(table, "abcde")) == [
        "IoU", "IoU_classes", *(f"IoU/{name}" for name in "abcde"), "accuracy",
    ]  # fmt: skip
    found = chosen_scores(table, "abcde", ("kappa", "F1"))
    assert list(found) == ["kappa", "F1", *(f"F1/{name}" for name in "abcde")]
    assert set(SCORES) <= chosen_scores(table, "abcde", SCORES).keys()


def test_a_class_that_is_only_predicted_counts_with_zero():
    """In neither truth nor prediction it would be NaN, and left out of the means."""
    table = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    classes = per_class(table)
    for name in ("IoU", "F1", "precision", "recall"):
        assert classes[name][1] == 0 and classes[name][2].isnan()
    found = chosen_scores(table, "abc", ("IoU", "F1"))
    assert found["IoU_classes"] == 2
    assert found["IoU"] == pytest.approx(3 / 8) and found["F1"] == pytest.approx(3 / 7)
    means = report_text(table, "abc").splitlines()[-2].split()
    assert means == ["mean", "4", "4", "0.500", "0.375", "0.429", "0.375"]


def test_an_empty_table_has_no_scores():
    empty = torch.zeros(2, 2).long()
    assert all(math.isnan(value) for value in overall(empty).values())
    assert math.isnan(chosen_scores(empty, "ab", ["F1"])["F1"])


def test_the_report_shows_each_class_and_escapes_its_name():
    table = torch.tensor([[8, 2], [1, 9]])
    lines = report_text(table, ["water", "<b>"]).splitlines()
    assert lines[1].split() == ["water", "10", "9", "0.889", "0.800", "0.842", "0.727"]
    assert lines[-2].startswith("mean") and lines[-1] == "accuracy 0.850  kappa 0.700"
    page = report_html(table, ["water", "<b>"])
    assert "&lt;b&gt;" in page and "<b>" not in page and "0.842" in page
