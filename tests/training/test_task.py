"""A batch becomes its losses; an input that does not fit is explained."""

import numpy as np
import pytest
import torch
from torch import nn

from small import make_batches, small_net
from ununennium import TrainerConfig
from ununennium.training.task import Task


def make_task(model=None, loss=None, methods=None, **settings):
    model = small_net(norm=False) if model is None else model
    loss = nn.CrossEntropyLoss(ignore_index=255) if loss is None else loss
    return Task(model, loss, TrainerConfig(device="cpu", **settings), methods)


def test_a_batch_becomes_its_losses_and_its_weight():
    task, (image, mask) = make_task(), make_batches(1)[0]
    batch = task.prepare((image, mask), 3)
    output, target = task.forward(batch)
    expected = nn.functional.cross_entropy(task.model(image), mask, ignore_index=255)
    assert batch.losses["loss"] == expected and torch.equal(output, task.model(image))
    assert batch.number == 3 and batch.weight == (mask != 255).sum() and target is mask
    assert type(batch.weight) is float


def test_only_training_checks_for_numbers_that_are_not_finite():
    task = make_task()
    batch = task.prepare(make_batches(1)[0], 0)
    task.forward(batch)
    assert batch.checks.keys() == {"input", "output"}
    task.checks_input = False  # the host will look, if it has to
    task.forward(batch)
    assert batch.checks.keys() == {"output"}
    batch.clear()
    task.model.eval()
    task.forward(batch)
    assert not batch.checks and batch.losses


def test_methods_may_be_those_of_another_object():
    class Own:
        def unpack(self, batch):
            return batch["x"], batch["y"]

        def run_model(self, inputs):
            return task.model(inputs) * 0.0

        def batch_weight(self, target):
            return torch.tensor(7)

    task, (image, mask) = make_task(methods=Own()), make_batches(1)[0]
    batch = task.prepare({"x": image, "y": mask}, 0)
    output, _ = task.forward(batch)
    assert batch.weight == 7 and not output.any()


def test_losses_by_name_keep_their_names():
    task = make_task(loss=lambda output, target: {"loss": output.mean(), "part": output.std()})
    batch = task.prepare(make_batches(1)[0], 0)
    task.forward(batch)
    assert list(batch.losses) == ["loss", "part"]


def test_class_weights_follow_the_model_to_its_device():
    task = make_task(loss=nn.CrossEntropyLoss(torch.ones(3)))
    assert task.loss_fn.weight.device == task.device == torch.device("cpu")
    assert task.ignore_index == -100


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((2, 4, 8, 8), np.float32), TypeError, "input is a numpy array. .*from_numpy"),
        (torch.zeros(2, 6, 8, 8), ValueError, "image has 6 channels and the model takes 4"),
        (torch.zeros(2, 4, 8, 8).double(), TypeError, r"input is torch.float64 .*image.float\(\)"),
    ],
)
def test_an_input_that_does_not_fit_is_explained_and_the_cause_kept(image, error, message):
    task = make_task()
    batch = task.prepare((image, torch.zeros(2, 8, 8, dtype=torch.long)), 0)
    with pytest.raises(error, match=message) as caught:
        task.forward(batch)
    assert isinstance(caught.value.__cause__, (RuntimeError, TypeError))


def test_other_errors_of_a_model_pass_as_they_are():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of ideas")

    task = make_task(Broken())
    with pytest.raises(RuntimeError, match=r"^out of ideas$"):
        task.forward(task.prepare(make_batches(1)[0], 0))


def test_a_target_that_does_not_fit_is_refused():
    image, mask = make_batches(1, nodata=0.0)[0]
    task = make_task()
    for target, message in (
        (mask.numpy(), "target is a numpy array"),
        (mask + 3, "outside the model's 3 classes"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            task.forward(task.prepare((image, target), 0))
    task = make_task(class_names=["a", "b"])
    with pytest.raises(ValueError, match="The model has 3 classes, and .* class_names is 2"):
        task.forward(task.prepare((image, mask), 0))


def test_a_loss_that_cannot_take_a_dictionary_says_what_it_gets():
    class Dictionary(nn.Conv2d):
        def forward(self, image):
            return {"out": super().forward(image)}

    task = Task(Dictionary(4, 3, 1), nn.CrossEntropyLoss(), TrainerConfig(device="cpu"))
    batch = task.prepare((torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 8).long()), 0)
    with pytest.raises(TypeError, match="gets the whole output of the model, a dict"):
        task.forward(batch)
