"""What a snapshot remembers, and that it restores in place."""

import copy

import pytest
import torch
from torch import nn

from small import assert_same, small_net
from ununennium.training.snapshot import Snapshot

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1),  # keeps lists of tensors
}


def take_a_step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4, 8, 8)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_is_as_it_was_before_and_after_its_first_step(name, steps):
    model = small_net(norm=False)
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(steps):
        take_a_step(model, optimizer)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    attributes, snapshot = set(vars(optimizer)), Snapshot(optimizer)
    take_a_step(model, optimizer)
    scheduler.step()
    snapshot.restore()
    assert_same(before, [model.state_dict(), optimizer.state_dict()])
    assert set(vars(optimizer)) == attributes
    take_a_step(model, optimizer)  # it still works


def test_an_optimizer_inside_an_optimizer():
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner, self.slow = inner, {"steps": 0}

    inner = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    outer = Outer(inner)
    snapshot = Snapshot(outer)
    inner.param_groups[0]["params"][0].grad = torch.ones(2)
    inner.step()
    outer.slow["steps"] = 1
    snapshot.restore()
    assert not inner.state and outer.slow == {"steps": 0}
    assert not inner.param_groups[0]["params"][0].any()


def test_containers_keep_their_identity_and_their_types():
    shared = torch.zeros(2)
    value = {"list": [shared, (shared, 1)], "number": 1}
    snapshot, parts = Snapshot(value), dict(value)
    value["list"].clear()
    value["number"], value["more"] = 2, 3
    shared += 1
    snapshot.restore()
    assert value["list"] is parts["list"] and value["list"][0] is shared
    assert value.keys() == parts.keys() and value["number"] == 1 and not shared.any()


def test_an_expanded_tensor_is_left_alone():
    Snapshot([torch.zeros(1).expand(3)]).restore()
