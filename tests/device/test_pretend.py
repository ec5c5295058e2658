"""The pretend GPU itself: it computes, it refuses what a GPU refuses, and its counter counts."""

import pytest
import torch
from torch import nn

from device import on_device


def train(read_at):
    """Train by hand; read the loss on the host in these ways."""
    from device.pretend import WATCH

    model = nn.Linear(3, 2).to("gpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    WATCH.start()
    for _ in range(5):
        loss = nn.functional.cross_entropy(
            model(x.to("gpu", non_blocking=True)), y.to("gpu", non_blocking=True)
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        read_at(loss)
    WATCH.stop()
    return WATCH.count, list(WATCH.waits), loss.item()


def nothing(loss):
    return None


def item(loss):
    return loss.item()


def branch(loss):
    return 1 if loss > 0 else 0


def copy(loss):
    return loss.cpu()


def numbers(loss):
    return loss.reshape(1).tolist()


def into_host(loss):
    return torch.zeros(()).copy_(loss)


def blocking(loss):
    return torch.zeros(3).to("gpu")


def mask(loss):
    return loss.reshape(1)[loss.reshape(1) > 0]


@pytest.mark.parametrize(
    ("read", "count"),
    [(nothing, 0)] + [(r, 5) for r in (item, branch, copy, numbers, into_host, blocking, mask)],
)
def test_the_counter_counts(read, count):
    found, lines, _ = on_device(train, read)
    assert found == count
    assert len(lines) == bool(count)


def test_it_computes_what_the_cpu_computes():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert on_device(train, nothing)[2] == loss.item()


def mix():
    return torch.ones(3).to("gpu") + torch.ones(3)


def fused_state_on_the_host():
    parameter = nn.Parameter(torch.ones(3).to("gpu"))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(3).to("gpu")
    optimizer.step()
    optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].cpu()
    optimizer.step()


@pytest.mark.parametrize("mistake", [mix, fused_state_on_the_host])
def test_it_refuses_to_mix_devices(mistake):
    with pytest.raises(AssertionError, match="same device|illegal memory access"):
        on_device(mistake)
