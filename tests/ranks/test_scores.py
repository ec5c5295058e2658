"""Scores of two processes are those of all their data, with ignored elements and absent classes."""

import math

import pytest
import torch
import torch.distributed as dist
import torchmetrics as tm
import torchmetrics.classification as tmc
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from processes import on_ranks
from ununennium import MaskedLoss, Trainer, TrainerConfig
from ununennium.scores import CLASS_SCORES, SCORES

NAMES = ["water", "wood", "town", "field", "snow"]
COUNT = 11  # of samples: the sampler repeats one for the second process


class Scaled(nn.Module):
    """A model whose output is its input."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.factor


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes():
    """Town is predicted and never true, snow is neither; even samples alone have wood."""
    output = noise(COUNT, 5, 6, 6)
    output[:, 4] = -9.0
    target = torch.where(noise(COUNT, 6, 6, seed=1) > 0, output.argmax(1), 0)
    target[target == 2] = 3
    target[1::2][target[1::2] == 1] = 0
    target[noise(COUNT, 6, 6, seed=2) > 1] = 255
    target[[3, 5, 7]] = 255  # a sample and a whole batch of rank 1
    return output, target


def values():
    """Heights: the processes see regions that are far apart."""
    target = noise(COUNT, 1, 6, 6) * 3 + torch.arange(COUNT).view(-1, 1, 1, 1) % 2 * 500.0
    output = target + noise(COUNT, 1, 6, 6, seed=1)
    target[noise(COUNT, 1, 6, 6, seed=2) > 0.8] = math.nan
    target[[3, 5, 7]] = math.nan
    return output, target


def labels():
    """Several labels each; the last one is absent, and odd samples alone have the second."""
    output = noise(COUNT, 5)
    output[:, 4] = -9.0
    target = ((output + noise(COUNT, 5, seed=1)) > 0).float()
    target[:, 4] = 0.0
    target[::2, 1] = 0.0
    target[noise(COUNT, 5, seed=2) > 1] = -1.0
    target[[3, 5, 7]] = -1.0
    return output, target


CASES = {
    "classes": (classes, nn.CrossEntropyLoss(ignore_index=255), SCORES),
    "values": (values, MaskedLoss(nn.MSELoss(reduction="none")), None),
    "labels": (labels, MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"), -1), None),
}


def validate(name):
    """Score a case on this rank's samples, which are all of them without a group."""
    make, loss, scores = CASES[name]
    data, model = TensorDataset(*make()), Scaled()
    if dist.is_initialized():
        sampler, model = DistributedSampler(data, shuffle=False), DistributedDataParallel(model)
    else:
        sampler = None
    loader = DataLoader(data, 2, sampler=sampler)
    config = TrainerConfig(
        device="cpu", progress="none", scores=scores,
        class_names=None if name == "values" else NAMES,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, loss, loader, loader, config=config)
    return trainer.validate()


def means(name, each, present):
    """Return a score's mean and its values, NaN for a class that is in neither."""
    values = [float(value) if k in present else math.nan for k, value in enumerate(each)]
    found = {f"val_{name}/{label}": value for label, value in zip(NAMES, values, strict=True)}
    return found | {f"val_{name}": float(torch.tensor(values).nanmean())}


def theirs(name):
    """Return what torchmetrics says of all samples together."""
    output, target = CASES[name][0]()
    if name == "values":
        valid = target.isfinite()
        output, target = output[valid].double(), target[valid].double()
        kinds = {
            "MAE": tm.MeanAbsoluteError(), "RMSE": tm.MeanSquaredError(squared=False),
            "R2": tm.R2Score(),
        }  # fmt: skip
        return {
            f"val_{name}": float(metric.set_dtype(torch.double)(output, target))
            for name, metric in kinds.items()
        }
    if name == "labels":
        kinds = {
            "F1": tmc.MultilabelF1Score, "precision": tmc.MultilabelPrecision,
            "recall": tmc.MultilabelRecall,
        }  # fmt: skip
        found, options = {}, {"average": None, "ignore_index": -1}
        for score, kind in kinds.items():
            found |= means(score, kind(5, **options)(output, target.long()), range(4))
        return found
    kinds = {
        "IoU": tmc.MulticlassJaccardIndex, "F1": tmc.MulticlassF1Score,
        "precision": tmc.MulticlassPrecision, "recall": tmc.MulticlassRecall,
    }  # fmt: skip
    options, found = {"ignore_index": 255}, {"val_IoU_classes": 4.0}
    predicted = output.argmax(1)
    for score in CLASS_SCORES:
        each = kinds[score](5, average=None, **options)(predicted, target)
        found |= means(score, each, range(4))
    accuracy = tmc.MulticlassAccuracy(5, average="micro", **options)
    kappa = tmc.MulticlassCohenKappa(5, **options)
    found["val_accuracy"] = float(accuracy(predicted, target))
    found["val_kappa"] = float(kappa(predicted, target))
    return found


@pytest.mark.parametrize("name", CASES)
def test_scores_of_two_processes_are_those_of_torchmetrics_on_all_data(name):
    first, second = on_ranks(2, validate, name)
    assert repr(first) == repr(second)
    expected = theirs(name)
    assert first.keys() - {"val_loss"} == expected.keys()
    for score, value in expected.items():
        assert first[score] == pytest.approx(value, abs=1e-6, nan_ok=True), score
    alone = validate(name)
    assert first == pytest.approx(alone, rel=1e-6, abs=1e-9, nan_ok=True)
