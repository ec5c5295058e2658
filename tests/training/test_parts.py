"""Parts that cannot be trained together are refused one by one, before anything runs."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from small import make_batches, make_trainer, small_net
from ununennium import Callback, TrainerConfig
from ununennium.training.hook_checks import check_callbacks
from ununennium.training.messages import TrainingWarning
from ununennium.training.parts import check_group, check_loader, check_order, check_parts


def make_parts(**changes):
    model = small_net()
    parts = {
        "model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loss_fn": nn.CrossEntropyLoss(), "train_loader": make_batches(1), "val_loader": None,
        "scheduler": None, "callbacks": None, "config": None,
    }  # fmt: skip
    return parts | changes


class Stream(IterableDataset):
    def __iter__(self):
        yield from make_batches(1)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"loss_fn": lambda output, target: output.mean()}, {"val_loader": make_batches(1)},
        {"callbacks": (Callback(),)}, {"config": TrainerConfig()}, {"train_loader": Stream()},
        {"train_loader": iter(make_batches(1))},
    ],
)  # fmt: skip
def test_good_parts_pass_in_silence(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_parts(**make_parts(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": len}, TypeError, "model is of type builtin_function_or_method; pass a torch.nn"),
        ({"optimizer": 0.1}, TypeError, "optimizer is of type float"),
        ({"loss_fn": nn.CrossEntropyLoss}, TypeError, r"pass an instance: CrossEntropyLoss\(\)"),
        ({"loss_fn": None}, TypeError, "loss_fn is of type NoneType; pass a function"),
        (
            {"train_loader": None},
            TypeError,
            "train_loader is of type NoneType, which gives no batches",
        ),
        ({"val_loader": 5}, TypeError, "val_loader is of type int"),
        ({"scheduler": TrainerConfig()}, TypeError, "TrainerConfig, which has no step.*config="),
        ({"config": {}}, TypeError, r"config is of type dict; pass TrainerConfig\(epochs=...\)"),
        ({"callbacks": Callback()}, TypeError, r"callbacks is of type Callback; pass a list"),
    ],
)
def test_bad_parts_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        check_parts(**make_parts(**changes))


@pytest.mark.parametrize(
    ("loss", "is_told"),
    [
        (lambda y_true, y_pred: y_pred.mean(), True),
        (lambda target, output: output.mean(), True),
        (lambda output, target: output.mean(), False),
        (lambda y_pred, y_true: y_pred.mean(), False),
        (lambda first, second: first.mean(), False),
        (lambda *args: args[0].mean(), False),
        (nn.CrossEntropyLoss(), False),
        (nn.functional.cross_entropy, False),
        (max, False),
    ],
)
def test_a_loss_that_names_the_target_first_is_told(loss, is_told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_order(loss)
    assert len(caught) == is_told
    assert all("it is called as loss_fn(output, target). Swap" in str(w.message) for w in caught)


class Hooked:
    def __init__(self, hook):
        self.on_epoch_end = hook


@pytest.mark.parametrize(
    ("hook", "fits"),
    [
        (lambda trainer, epoch, logs: None, True),
        (lambda *details: None, True),
        (lambda trainer, epoch, logs, more=None: None, True),
        (print, True),
        (lambda trainer, logs: None, False),
        (lambda trainer, epoch, logs, more: None, False),
        (lambda trainer, *, epoch, logs: None, False),
    ],
)
def test_hooks_that_the_loop_could_not_call_are_refused(hook, fits):
    if fits:
        check_parts(**make_parts(callbacks=[Hooked(hook)]))
        return
    with pytest.raises(TypeError, match=r"Hooked.on_epoch_end.* Write def on_epoch_end\(self, tr"):
        check_parts(**make_parts(callbacks=[Hooked(hook)]))


def test_a_data_set_is_no_loader_and_an_empty_one_is_named():
    with pytest.raises(TypeError, match="val_loader is a data set, TensorDataset, .* DataLoader"):
        check_loader("val_loader", TensorDataset(torch.zeros(3)))
    with pytest.raises(ValueError, match="val_loader is empty: its length is 0.*drop_last=True"):
        check_loader("val_loader", [])


def test_parameters_that_the_optimizer_lacks_are_named_unless_frozen():
    model = small_net()
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    with pytest.warns(TrainingWarning, match=r"not hold 4 of .* such as 1.weight"):
        check_parts(**make_parts(model=model, optimizer=optimizer))
    for part in model[1:]:
        part.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_parts(**make_parts(model=model, optimizer=optimizer))


def test_a_callback_needs_one_hook_and_no_base_class():
    check_callbacks([type("Own", (), {"on_batch_end": print})()])
    with pytest.raises(TypeError, match="5 among the callbacks has none of the hooks: on_train_s"):
        check_callbacks([5])


@pytest.mark.parametrize(("count", "is_told"), [("1", False), ("2", True)])
def test_processes_of_torchrun_without_a_group_are_told(count, is_told, monkeypatch, recwarn):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", count)
    check_group()
    texts = [str(warning.message) for warning in recwarn]
    assert len(texts) == is_told and all("has no process group" in text for text in texts)


def test_a_class_of_schedulers_is_no_scheduler():
    from torch.optim.lr_scheduler import StepLR

    with pytest.raises(TypeError, match=r"scheduler is a class; pass an instance: StepLR\("):
        make_trainer(scheduler=lambda optimizer: StepLR)
