"""State comes from the file and settings from the caller; a state that does not fit is refused."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from small import make_trainer, small_net
from ununennium import CheckpointError, Trainer
from ununennium.training.restore import (
    check_tensors,
    group_settings,
    keep_changes,
    load_model,
    load_optimizer,
    load_scheduler,
    load_state,
    model_state,
    unwrap,
)

# Names.


def test_files_hold_bare_names_and_load_into_wrapped_models(tmp_path):
    plain = make_trainer()
    wrapped = make_trainer(model=torch.nn.DataParallel(small_net()))
    compiled = make_trainer(model=torch.compile(small_net(), backend="eager"))
    for index, (one, other) in enumerate(itertools.permutations([plain, wrapped, compiled], 2)):
        one.fit(1)
        path = one.save_checkpoint(tmp_path / f"{index}.pt")
        names = torch.load(path, weights_only=True)["model"]
        assert set(names) == set(small_net().state_dict())
        other.load_checkpoint(path)
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_parts_of_a_model_may_be_compiled(tmp_path):
    inner = small_net()
    trainer = make_trainer(model=nn.Sequential(torch.compile(inner, backend="eager")))
    path = trainer.save_checkpoint(tmp_path / "a.pt")
    assert set(torch.load(path)["model"]) == {f"0.{name}" for name in inner.state_dict()}
    make_trainer(model=nn.Sequential(small_net(seed=4))).load_checkpoint(path)
    trainer.load_checkpoint(path)


def test_wrappers_in_any_order():
    model = small_net()
    twice = nn.DataParallel(torch.compile(model, backend="eager"))
    assert unwrap(twice) is model and unwrap(torch.compile(twice, backend="eager")) is model
    other = small_net(seed=1)
    load_model(twice, model_state(other))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


# Another model.


@pytest.mark.parametrize(
    ("saved", "expected", "message"),
    [
        ({"a": 1}, {"a": 1, "b": 1}, r"model: 1 tensor missing: b\. Nothing was loaded"),
        ({}, {"a": 1, "b": 1}, "2 tensors missing, such as a"),
        ({"a": 1}, {}, "1 tensor that the model does not have: a"),
        ({"a": 1}, {"a": 2}, r"1 tensor of another shape: a is \(1,\) in the file and \(2,\) in"),
        ({"a": 1, "b": 1}, {"a": 2, "c": 2}, "1 tensor missing: c; 1 .* have: b; 1 .* shape: a"),
    ],
)
def test_another_model_is_refused(saved, expected, message):
    saved, expected = (
        {name: torch.zeros(size) for name, size in sizes.items()} for sizes in (saved, expected)
    )
    with pytest.raises(CheckpointError, match=message):
        check_tensors(saved, expected, "a.pt")


# The optimizer.


def test_a_new_trainer_around_an_old_optimizer_keeps_the_rate(tmp_path):
    half = lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5)
    first = make_trainer(scheduler=half)
    first.fit(2)
    path = first.save_checkpoint(tmp_path / "a.pt")
    parts = (first.model, first.optimizer, first.loss_fn, first.train_loader, None)
    again = Trainer(*parts, half(first.optimizer), config=first.config)
    again.load_checkpoint(path)
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def adam(**settings):
    return torch.optim.AdamW(small_net().parameters(), **({"lr": 0.1} | settings))


@pytest.mark.parametrize(
    ("change", "lr", "weight_decay"),
    [
        ({}, 0.01, 0.3),
        ({"lr": 0.4}, 0.04, 0.3),
        ({"weight_decay": 0.5}, 0.01, 0.5),
        ({"lr": 0.4, "weight_decay": 0.5}, 0.04, 0.5),
    ],
)
def test_settings_that_the_caller_changed_are_kept(change, lr, weight_decay):
    old = adam()
    built = group_settings(old)
    old.param_groups[0].update(lr=0.01, weight_decay=0.3)  # by a scheduler and a callback
    new = adam(**change)
    load_optimizer(new, old.state_dict(), built, group_settings(new))
    group = new.param_groups[0]
    assert group["lr"] == pytest.approx(lr) and group["weight_decay"] == weight_decay


def test_state_of_other_shapes_is_refused():
    optimizer = adam()
    saved = optimizer.state_dict() | {"state": {1: {"exp_avg": torch.zeros(3), "step": 1}}}
    built = group_settings(optimizer)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 is \(3,\) .* should be \(8,\)"):
        load_optimizer(optimizer, saved, built, built)
    assert not optimizer.state


# Memory formats.


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("was_last", [False, True])
def test_state_is_laid_out_like_its_parameter(fused, was_last):
    """A fused step reads parameter and state as they lie in memory, without a look at strides."""

    def make(is_last):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        model.to(memory_format=torch.channels_last if is_last else torch.contiguous_format)
        return model, torch.optim.AdamW(model.parameters(), fused=fused)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.arange(75.0).sin().reshape(1, 3, 5, 5)).square().sum().backward()
        optimizer.step()

    (one, first), (other, second) = make(was_last), make(not was_last)
    step(one, first)
    other.load_state_dict(one.state_dict())
    load_state(second, copy.deepcopy(first.state_dict()))
    entry = second.state[other.weight]
    assert entry["exp_avg"].stride() == entry["exp_avg_sq"].stride() == other.weight.stride()
    step(one, first), step(other, second)
    torch.testing.assert_close(other.state_dict(), one.state_dict())


def test_state_of_another_kind_is_loaded_as_it_is():
    model = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.ones(1, 3, 3, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    load_state(optimizer, saved)
    state = optimizer.state_dict()["state"]
    torch.testing.assert_close(state, saved["state"], rtol=0, atol=0)


# The scheduler.


def sequence(optimizer, milestone):
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=milestone)
    after = lr_scheduler.StepLR(optimizer, milestone)
    return lr_scheduler.SequentialLR(optimizer, [warmup, after], [milestone])


def test_schedulers_within_a_scheduler_keep_their_settings():
    old, new = sequence(adam(), 2), sequence(adam(), 3)
    for _ in range(4):
        old.optimizer.step()
        old.step()
    load_scheduler(new, old.state_dict())
    assert new.last_epoch == 4 and new._milestones == [3]
    assert new._schedulers[1].last_epoch == 2 and new._schedulers[1].step_size == 3


def test_a_scheduler_of_another_library_is_loaded_whole():
    class Own:
        def load_state_dict(self, state):
            self.state = state

    scheduler = Own()
    load_scheduler(scheduler, {"anything": 1})
    assert scheduler.state == {"anything": 1}


def test_a_learning_rate_that_was_zero_takes_the_new_one():
    group, then, now = {"lr": 0.0}, {"lr": 0.0}, {"lr": 0.1}
    keep_changes(group, then, now)
    assert group["lr"] == 0.1
