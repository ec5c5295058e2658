"""A loader becomes scores: which metric by default, over what, and what is put back."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from small import Named, make_batches, small_net, spoiled
from ununennium import ConfusionMatrix, MaskedLoss, TrainerConfig
from ununennium.training.evaluate import Evaluator, batch_again, count_classes_of, find_cause
from ununennium.training.loader import ResumableLoader
from ununennium.training.messages import TrainingWarning
from ununennium.training.task import Task

BCE = MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"))


def make_evaluator(model=None, loss=None, metrics=None, **settings):
    loss = nn.CrossEntropyLoss(ignore_index=255) if loss is None else loss
    task = Task(model or small_net(), loss, TrainerConfig(device="cpu", **settings))
    return Evaluator(task, metrics)


@pytest.mark.parametrize(
    ("output", "target", "classes"),
    [
        ((2, 3, 8, 8), (2, 8, 8), 3),
        ((2, 1, 8, 8), (2, 1, 8, 8), 2),
        ((2, 8, 8), (2, 8, 8), 2),
        ((5, 4), (5,), 4),
        ((5,), (5,), 2),
        ((2, 3, 8, 8), (2, 3, 8, 8), None),
        ((2, 3, 8, 8), (2, 4, 4), None),
    ],
)
def test_how_many_classes_an_output_scores(output, target, classes):
    assert count_classes_of(torch.zeros(output), torch.zeros(target)) == classes


@pytest.mark.parametrize(
    ("classes", "loss", "dtype", "scored"),
    [(3, None, torch.long, True), (1, BCE, torch.float, True),
     (1, nn.MSELoss(), torch.float, False), (1, nn.L1Loss(), torch.long, False)],
)  # fmt: skip
def test_only_a_classification_is_scored_by_default(classes, loss, dtype, scored):
    image, mask = make_batches(1, classes=2, nodata=0.0)[0]
    target = mask.to(dtype) if classes == 3 else mask[:, None].to(dtype)
    scores = make_evaluator(small_net(classes), loss).score([(image, target)])
    assert ("val_IoU" in scores) == scored and math.isfinite(scores["val_loss"])


def test_the_loss_is_a_mean_over_all_valid_pixels():
    batches = [*make_batches(2, nodata=0.1), *make_batches(2, nodata=0.9, seed=1)]
    evaluator = make_evaluator(small_net(norm=False))
    image, mask = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        expected = evaluator.task.loss_fn(evaluator.task.model(image), mask).item()
    assert evaluator.score(batches)["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_scoring_puts_modes_and_random_states_back():
    model = nn.Sequential(nn.Dropout(), small_net())
    model[1][1].eval()
    evaluator, before = make_evaluator(model), torch.get_rng_state()

    class Random(list):
        def __iter__(self):
            torch.rand(5)
            return super().__iter__()

    one, two = (evaluator.score(Random(make_batches(2))) for _ in range(2))
    assert one == two and torch.equal(torch.get_rng_state(), before)
    assert model.training and not model[1][1].training


def test_a_request_to_stop_ends_the_pass_without_scores():
    answers = iter([False, True])
    assert make_evaluator().score(make_batches(3), lambda: next(answers)) is None


def test_an_error_says_which_batch_it_was():
    good, bad = make_batches(2)
    with pytest.raises(ValueError, match="This is batch index 1 of the validation loader"):
        make_evaluator().score([good, (bad[0], bad[1] + 3)])
    with pytest.raises(ValueError, match="The validation loader gave no batch"):
        make_evaluator().score([])


def test_losses_that_are_not_finite_are_counted_in_one_warning():
    batches = make_batches(4)
    for number in (1, 3):
        batches[number][0][:] = math.nan
    with pytest.warns(TrainingWarning, match="of 2 batches .* first at batch index 1") as caught:
        make_evaluator().score(batches)
    assert len(caught) == 1


def test_directions_come_from_losses_and_metrics():
    class Error:
        higher_is_better = False

        def update(self, output, target):
            pass

        def compute(self):
            return 0.5

        def reset(self):
            pass

    metrics = {"error": Error(), "": ConfusionMatrix(3, 255)}
    evaluator = make_evaluator(metrics=metrics)
    evaluator.score(make_batches(1))
    assert evaluator.directions["val_loss"] == evaluator.directions["val_error"] == "min"
    assert evaluator.directions["val_IoU"] == evaluator.directions["val_accuracy"] == "max"


def test_a_metric_that_counts_what_the_loss_ignores_is_reported_at_once():
    with pytest.warns(TrainingWarning, match="ignores the label 255, and the metric 'all' does"):
        make_evaluator(metrics={"all": ConfusionMatrix(3, 0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_evaluator(metrics={"all": ConfusionMatrix(3, 255)})


class Score:
    """A metric that computes what it was given."""

    def __init__(self, value):
        self.value = value

    def update(self, output, target): ...
    def reset(self): ...
    def compute(self):
        return self.value


@pytest.mark.parametrize("metrics", [{"loss": Score(0.3)}, {"all": Score({"loss": 0.3})}])
def test_a_score_does_not_take_the_place_of_the_loss(metrics):
    with pytest.raises(ValueError, match="the name of a loss: val_loss. Choose another name"):
        make_evaluator(metrics=metrics).score(make_batches(2))


# The culprit of a loss that is not finite.


def test_a_batch_is_read_again_only_where_nothing_has_to_be_read_before_it():
    tiles = Named()
    for loader in (DataLoader(tiles, 5), DataLoader(tiles, 5, num_workers=2)):
        for again in (loader, ResumableLoader(loader)):
            assert batch_again(again, 2)["filename"] == ["tile_10.tif", "tile_11.tif"]
    assert batch_again([1, 2, 3], 1) == batch_again((1, 2), 1) == 2
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 12, 12)
    for other in (
        DataLoader(tiles, 5, shuffle=True), DataLoader(tiles, 5, sampler=sampler),
        DataLoader(tiles, batch_size=None), iter([1, 2]),
    ):  # fmt: skip
        assert batch_again(other, 1) is None


def test_looking_for_a_culprit_changes_nothing():
    evaluator = make_evaluator()
    task, before = evaluator.task, torch.get_rng_state()
    task.model.train()
    buffers = {name: value.clone() for name, value in task.model.state_dict().items()}
    assert find_cause(task, spoiled(2), 2) == ("sample 0", "input")
    assert find_cause(task, spoiled(2), 1) == find_cause(task, [], 7) == ("", "")
    assert task.model.training and torch.equal(torch.get_rng_state(), before)
    after = task.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in buffers.items())
