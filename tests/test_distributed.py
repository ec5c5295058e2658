"""Ranks exchange gradients once, share buffers and notice when their models differ."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from processes import on_ranks
from ununennium.distributed import Exchange, differing, mean_over_ranks, share_buffers
from ununennium.metrics import WeightedMean
from ununennium.ranks import Ranks, find_ranks


def test_one_process_exchanges_nothing(monkeypatch):
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "broadcast"):
        monkeypatch.setattr(dist, name, None)
    ranks, model = Ranks(), nn.BatchNorm1d(2)
    assert ranks == find_ranks() and ranks.is_main
    assert ranks.sum([1, 2.5]) == [1, 2.5] and ranks.gather("a") == ["a"]
    assert ranks.from_main(None) is None and share_buffers(ranks, model) is None
    with Exchange(model).gradients(False), Exchange(model).none():
        pass


class Counted:
    """Counts the exchanges of gradients."""

    def __init__(self, model):
        self.count = 0
        model.register_comm_hook(self, Counted.hook)

    @staticmethod
    def hook(state, bucket):
        state.count += 1
        work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda done: done.value()[0] / dist.get_world_size())


def accumulate(compiled):
    model = DistributedDataParallel(nn.Linear(2, 1, bias=False))
    counted, outer = Counted(model), torch.compile(model, backend="eager") if compiled else model
    exchange = Exchange(outer)
    assert exchange.ddps == [model] and exchange.is_shared
    for number in range(4):
        with exchange.gradients(is_last=number == 3):
            outer(torch.full((1, 2), dist.get_rank() + 1.0)).sum().backward()
    return counted.count, model.module.weight.grad.tolist()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_exchanged_once_per_window(compiled):
    assert on_ranks(2, accumulate, compiled) == [(1, [[6.0, 6.0]])] * 2


def validate_unevenly():
    model = DistributedDataParallel(nn.BatchNorm1d(2))
    model.eval()
    with Exchange(model).none(), torch.no_grad():
        for _ in range(3 * dist.get_rank()):
            model(torch.ones(4, 2))
    assert model.require_forward_param_sync
    model.train()
    return model(torch.ones(4, 2)).sum().item()


def test_ranks_may_validate_unequal_numbers_of_batches():
    assert on_ranks(2, validate_unevenly) == [0.0, 0.0]


def diverge():
    ranks, model = find_ranks(), nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))
    model.register_buffer("nothing", torch.zeros(0))
    model.register_buffer("small", torch.full((2, 2), float(ranks.rank), dtype=torch.float16))
    model[0].running_mean.fill_(ranks.rank + 1.0)
    model[1].num_batches_tracked.fill_(ranks.rank + 5)
    share_buffers(ranks, model)
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


def test_all_ranks_get_the_buffers_of_rank_0():
    first, second = on_ranks(2, diverge)
    assert first == second and first["0.running_mean"] == [1.0, 1.0]
    assert first["1.num_batches_tracked"] == 5 and first["small"] == [[0.0, 0.0], [0.0, 0.0]]


def unfreeze(is_frozen):
    """Train a layer that was unfrozen after DDP had wrapped it, on unequal data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    net[2].requires_grad_(not is_frozen)
    model = DistributedDataParallel(net)
    net[2].requires_grad_(True)
    model(torch.randn(3, 2)[dist.get_rank() :]).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return differing(find_ranks(), net)


def test_what_ddp_does_not_train_alike_is_named():
    assert on_ranks(2, unfreeze, True) == ["2.bias"] * 2
    assert on_ranks(2, unfreeze, False) == [None] * 2


def spoil():
    net = nn.Linear(1, 1)
    nn.init.constant_(net.weight, math.nan)
    nn.init.zeros_(net.bias)
    return differing(find_ranks(), net)


def test_parameters_that_are_nan_everywhere_do_not_differ():
    assert on_ranks(2, spoil) == [None] * 2


def mean_of_some():
    ranks, found = find_ranks(), {"loss": WeightedMean(), "empty": WeightedMean()}
    for value, weight in [((1.0, 3.0), (4.0, 1.0)), ((5.0, 1.0),), ()][ranks.rank]:
        found["loss"].update(torch.tensor(value), weight)
        found.setdefault("part", WeightedMean()).update(torch.tensor(value), torch.tensor(weight))
    return mean_over_ranks(ranks, found)


def test_means_are_those_of_all_values():
    results = on_ranks(3, mean_of_some)
    wanted = (1 * 3 + 4 * 1 + 5 * 1) / 5
    for result in results:
        assert result["loss"] == result["part"] == wanted and math.isnan(result["empty"])
        assert list(result) == ["loss", "empty", "part"]
