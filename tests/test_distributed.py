"""Ranks agree on numbers, exchange gradients once and share buffers."""

import math
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from processes import on_ranks
from ununennium import distributed
from ununennium.distributed import (
    Exchange,
    Failures,
    RankFailed,
    Ranks,
    differing,
    find_ranks,
    is_lost_connection,
    mean_over_ranks,
    share_buffers,
)
from ununennium.metrics import WeightedMean


def test_one_process_exchanges_nothing(monkeypatch):
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "broadcast"):
        monkeypatch.setattr(dist, name, None)
    ranks, model = Ranks(), nn.BatchNorm1d(2)
    assert ranks == find_ranks() and ranks.is_main
    assert ranks.sum([1, 2.5]) == [1, 2.5] and ranks.gather("a") == ["a"]
    assert ranks.from_main(None) is None and share_buffers(ranks, model) is None
    with Exchange(model).gradients(False), Exchange(model).none():
        pass


def talk():
    ranks = find_ranks()
    assert find_ranks().group is ranks.group  # one group, however many trainers there are
    found = (
        ranks.sum([1.0, ranks.rank, 2.0**60]),
        ranks.gather(ranks.rank),
        ranks.from_main(ranks.rank),
    )
    return ranks.rank, ranks.size, ranks.is_main, *found


def test_numbers_and_objects_reach_all():
    results = on_ranks(3, talk)
    assert [result[:3] for result in results] == [(0, 3, True), (1, 3, False), (2, 3, False)]
    assert all(result[3:] == ([3.0, 3.0, 3 * 2.0**60], [0, 1, 2], 0) for result in results)


def test_a_group_of_one_is_no_group():
    assert on_ranks(1, find_ranks) == [Ranks()]


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


def test_the_first_failure_is_explained():
    store = dist.HashStore()
    one, two, alone = Failures(store, 1), Failures(store, 2), Failures(None, 0)
    assert one.first() == "" and "ended without a word" in str(two.explanation())
    one.report(ValueError("bad.\nmore"))
    two.report(OSError("later"))
    assert one.first() == two.first() == "Rank 1 failed: ValueError: bad."
    assert "This rank, 2, cannot go on" in str(two.explanation())
    two.begin()
    assert two.first() == ""
    two.report(KeyboardInterrupt())
    assert two.first() == "Rank 2 failed: KeyboardInterrupt."
    alone.report(OSError())
    assert alone.first() == ""


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("the socket has timed out"), True),
        (RuntimeError("shapes differ"), False),
        (OSError("gloo"), False),
        (RankFailed("gloo"), False),
    ],
)
def test_lost_connections(error, is_lost):
    assert is_lost_connection(error) == is_lost


def wait_in_vain():
    ranks = find_ranks()
    if ranks.rank == 1:
        ranks.failures.report(OSError("the archive is gone"))
        time.sleep(4)  # its process lives on
        return None
    found = []
    for exchange in (lambda: ranks.gather(1), lambda: ranks.sum([1])):
        try:
            exchange()
        except RankFailed as error:
            found.append(str(error))
    return found


def test_nobody_waits_for_a_rank_that_has_failed():
    found = on_ranks(2, wait_in_vain)[0]
    assert len(found) == 2 and all("Rank 1 failed: OSError: the archive" in text for text in found)


def wait_long():
    """Rank 1 comes late."""
    distributed.PATIENCE = 1
    ranks = find_ranks()
    if ranks.rank == 1:
        time.sleep(2.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ranks.sum([1.0])
    distributed.PATIENCE = 60
    return [str(warning.message) for warning in caught]


def test_a_rank_that_waits_long_says_so_once():
    first, second = on_ranks(2, wait_long)
    assert len(first) == 1 and "Rank 0 has waited for the other ranks for 1 seconds" in first[0]
    assert not second
