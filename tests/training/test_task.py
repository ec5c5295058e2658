"""A batch becomes its losses; an input that does not fit is explained."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from small import make_batches, small_net
from ununennium import TrainerConfig
from ununennium.training.task import Task, try_on_host


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
    with pytest.raises(TypeError, match="gets the whole output of the model, of type dict"):
        task.forward(batch)


# Losses that cannot be called as the loop calls them.


def forward(loss, target=None, wrap=lambda output: output, **settings):
    class Wrapped(nn.Conv2d):
        def forward(self, image):
            return wrap(super().forward(image))

    task = Task(Wrapped(4, 3, 1), loss, TrainerConfig(device="cpu", **settings))
    target = torch.zeros(2, 8, 8).long() if target is None else target
    batch = task.prepare((torch.randn(2, 4, 8, 8), target), 0)
    task.forward(batch)
    return task, batch


def own_dice(output, target):
    return 1 - output.softmax(1).gather(1, target[:, None]).mean()


def test_a_loss_that_takes_no_data_for_a_class_is_explained():
    target = torch.zeros(2, 8, 8).long()
    target[0, 0, 0] = 255
    with pytest.raises(RuntimeError, match=r"\nThe target has the label 255, .*ignore_index=255\)"):
        forward(own_dice, target, ignore_index=255)
    with pytest.raises(
        RuntimeError, match=r"3 classes 0..2: 255 \(1 time\), and the loss own_dice"
    ):
        forward(own_dice, target)


def test_an_error_about_an_index_of_its_own_is_left_alone():
    def loss(output, target):
        return output[0, 7].mean()

    with pytest.raises(IndexError) as caught:
        forward(loss)
    assert "\n" not in str(caught.value)


def test_the_loss_is_tried_in_host_memory_where_a_device_would_abort():
    task, batch = forward(own_dice)
    task.device = torch.device("meta")  # anything but the CPU
    target = torch.zeros(2, 8, 8).long()
    output = task.model(batch.inputs)
    try_on_host(task, output, target)
    target[1, 0, 0] = 9
    with pytest.raises(ValueError, match=r"9 \(1 time\), and the loss own_dice"):
        try_on_host(task, output, target)

    def careful(output, target):
        return own_dice(output, target.clamp(max=2))

    task.loss_fn = careful
    try_on_host(task, output, target)


def test_a_loss_that_takes_the_target_first_is_explained():
    with pytest.raises(
        RuntimeError, match="\nIt is called as loss_fn.output, target., .* Swap its"
    ):
        forward(lambda y, o: nn.functional.cross_entropy(o, y))


@dataclasses.dataclass
class HuggingFace:
    logits: torch.Tensor


@pytest.mark.parametrize("wrap", [HuggingFace, lambda output: {"logits": output}])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), own_dice])
def test_the_logits_are_given_to_a_loss_that_wants_a_tensor(wrap, loss):
    task, batch = forward(loss, wrap=wrap)
    assert task.takes_prediction
    assert torch.equal(batch.losses["loss"], loss(nn.Conv2d.forward(task.model, batch.inputs),
                                                  batch.target))  # fmt: skip


def test_a_loss_of_ones_own_gets_the_whole_output():
    def loss(output, target):
        return nn.functional.cross_entropy(output.logits, target)

    assert not forward(loss, wrap=HuggingFace)[0].takes_prediction


def test_an_output_without_a_prediction_is_the_business_of_the_loss():
    def wrap(output):
        return SimpleNamespace(scores=output)

    with pytest.raises(
        TypeError, match=r"of type SimpleNamespace. Write a loss that takes output's"
    ):
        forward(nn.CrossEntropyLoss(), wrap=wrap)
