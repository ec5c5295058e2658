"""The sentence of advice: the costliest phase with a remedy, and the numbers behind it."""

import types

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from small import make_trainer
from ununennium.training import advice
from ununennium.training.advice import advise, workers_needed
from ununennium.training.phases import (
    BACKWARD,
    CALLBACKS,
    CHECKS,
    FORWARD,
    OPTIMIZER,
    OTHER,
    PHASES,
    WAIT,
    Profile,
)


def profile_of(host=None, **milliseconds):
    names = {
        "wait": WAIT, "checks": CHECKS, "forward": FORWARD, "backward": BACKWARD,
        "optimizer": OPTIMIZER, "callbacks": CALLBACKS, "other": OTHER,
    }  # fmt: skip
    step = dict.fromkeys(PHASES, 0.0)
    step |= {names[name]: value / 1000 for name, value in milliseconds.items()}
    shown = step if host is None else {name: host / 2000 for name in PHASES}
    return Profile([step], [shown], [8.0])


def run_of(loader=None, optimizer=None, on="cpu", **settings):
    """A run's parts, as if it were on a device."""
    run = make_trainer(loader, optimizer=optimizer, **settings).run
    run.task.device = torch.device(on)
    return run


def loader_of(workers):
    """A loader; None for a list."""
    data = [(torch.ones(4, 8, 8), torch.zeros(8, 8).long())]
    return None if workers is None else DataLoader(data, num_workers=workers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("workers", "most", "expected"),
    [
        (0, 16, "62% of the time is spent waiting for data: raise num_workers from 0"),
        (0, 16, "raise num_workers from 0 to 2."),
        (4, 16, "raise num_workers from 4 to 11."),
        (4, 6, "raise num_workers from 4 to 6."),
        (6, 6, "6 workers already share 6 cores"),
        (8, 6, "8 workers already share 6 cores"),
        (None, 16, "let train_loader read ahead"),
    ],
)  # fmt: skip
def test_waiting_for_data(workers, most, expected):
    profile = profile_of(wait=62, forward=20, backward=18)
    assert expected in advise(run_of(loader_of(workers)), profile, most)


def test_the_workers_needed_keep_up():
    for workers in (0, 1, 3):
        for one in (0.05, 0.2, 1.0):  # seconds of a worker for a batch
            step = one if workers == 0 else max(one / workers, 0.04)
            rest = 0.04
            waited = one if workers == 0 else step - rest
            if waited > 0:
                needed = workers_needed(waited, rest, workers)
                assert one / needed <= rest * 1.001 or needed == workers + 1


@pytest.mark.parametrize(
    ("settings", "times", "expected"),
    [
        ({}, {"callbacks": 30}, "30% of the time is spent in callbacks: let them do less"),
        ({}, {"optimizer": 30}, "spent in the optimizer: build it with fused=True."),
        ({"optimizer": lambda p: torch.optim.AdamW(p, fused=True)}, {"optimizer": 30}, "enlarge"),
        ({"optimizer": torch.optim.RMSprop}, {"optimizer": 30}, "in the optimizer: enlarge"),
        ({}, {"other": 30}, "30% of the time is spent between the phases: enlarge the batch."),
        ({}, {"checks": 30}, "70% of the time is forward and backward, so no setting would gain"),
        ({"loader": loader_of(0), "on": "cuda"}, {"checks": 30}, "pass pin_memory=True to"),
        ({"on": "cuda"}, {"checks": 30}, "spent on copies and checks: send fewer"),
        ({}, {"optimizer": 5, "wait": 4}, "91% of the time is forward and backward, so no setting"),
        ({}, {"optimizer": 20, "callbacks": 30}, "in callbacks"),
    ],
)  # fmt: skip
def test_other_phases(settings, times, expected):
    rest = 100 - sum(times.values())
    profile = profile_of(forward=rest / 2, backward=rest / 2, **times)
    text = advise(run_of(**settings), profile)
    assert expected in text and text.count(". ") == 0


def test_checks_that_cost_more_than_the_model():
    text = advise(run_of(), profile_of(checks=60, forward=20, backward=20))
    assert text == "60% of the time is spent on copies and checks, for so small a model."


def test_a_gpu_that_waits_for_python():
    busy = profile_of(host=95, forward=50, backward=50)
    assert "the host needs 95 ms to launch these 100 ms" in advise(run_of(on="cuda"), busy)
    ahead = profile_of(host=20, forward=50, backward=50)
    assert "no setting would gain" in advise(run_of(on="cuda"), ahead)
    slow = run_of(on="cuda", mixed_precision=False)
    assert "in full precision: pass mixed_precision=True" in advise(slow, ahead)


def test_a_gpu_that_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = advise(run_of(), profile_of(forward=50, backward=50))
    assert "on cpu, and PyTorch sees a GPU: pass device='cuda'" in text


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(advice, "os", types.SimpleNamespace(cpu_count=lambda: 12))
    assert advice.cores() == 12
    few = types.SimpleNamespace(sched_getaffinity=lambda pid: {0, 3, 5}, cpu_count=lambda: 12)
    monkeypatch.setattr(advice, "os", few)
    assert advice.cores() == 3


def test_an_optimizer_of_several_groups_is_fused_if_all_are():
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    groups = [{"params": layers[0].parameters(), "fused": True}, {"params": layers[1].parameters()}]
    assert "fused" in advice.optimizer_remedy(torch.optim.SGD(groups))
