"""Ranks agree on numbers, exchange gradients once, share buffers and count no sample twice."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from processes import on_ranks
from ununennium.distributed import (
    Exchange,
    Failures,
    OwnSamples,
    RankFailed,
    Ranks,
    begin_after,
    find_ranks,
    is_lost_connection,
    mean_over_ranks,
    own_share,
    samples_done,
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


@given(st.integers(1, 40), st.integers(1, 7), st.booleans(), st.booleans())
def test_every_sample_is_counted_once(count, size, shuffle, drop_last):
    data = range(count)
    samplers = [DistributedSampler(data, size, rank, shuffle, 3, drop_last) for rank in range(size)]
    for sampler in samplers:
        sampler.set_epoch(5)
    found = [list(OwnSamples(sampler)) for sampler in samplers]
    assert [len(part) for part in found] == [len(OwnSamples(s)) for s in samplers]
    assert all(
        part == list(sampler)[: len(part)] for part, sampler in zip(found, samplers, strict=True)
    )
    seen = sorted(index for part in found for index in part)
    assert len(set(seen)) == len(seen)
    assert drop_last or seen == list(data)


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_loader_keeps_its_batches_but_for_the_padding(batch_size):
    sampler = DistributedSampler(range(5), 2, 1, shuffle=False)
    loader = DataLoader(torch.arange(5), batch_size, sampler=sampler)
    own = own_share(loader, 2)
    assert own is not loader and [x.tolist() for x in own] == ([[1, 3]] if batch_size else [1, 3])
    assert len(own) == (1 if batch_size else 2)
    assert [x.tolist() for x in loader] == ([[1, 3], [0]] if batch_size else [1, 3, 0])
    sampler.set_epoch(1)  # the sampler is the same


def test_other_loaders_stay_as_they_are():
    class Own(BatchSampler):
        pass

    data = torch.arange(6)
    distributed = DistributedSampler(data, 2, 0)
    for loader in (
        [data], DataLoader(data), DataLoader(data, sampler=RandomSampler(data)),
        DataLoader(data, batch_sampler=Own(distributed, 2, False)),
    ):  # fmt: skip
        assert own_share(loader, 2) is loader
    assert own_share(None, 1) is None and own_share(None, 2) == []
    fewer = DataLoader(data, sampler=distributed)
    assert own_share(fewer, 4) is fewer  # not the ranks of this run
    assert samples_done(fewer, 3) is None


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("sizes", [(4, 2), (2, 3), (3, 1), (1, 4)])
@pytest.mark.parametrize("count", [1, 10, 11])
def test_other_ranks_finish_an_epoch(count, sizes, drop_last):
    data = torch.arange(count)

    def loaders(size):
        for rank in range(size):
            sampler = DistributedSampler(data, size, rank, seed=3, drop_last=drop_last)
            yield own_share(DataLoader(data, 2, sampler=sampler), size)

    old, new = list(loaders(sizes[0])), list(loaders(sizes[1]))
    for batches in range(4):
        seen = [index for x in old for batch in [*x][:batches] for index in batch.tolist()]
        done = samples_done(old[0], batches)
        assert len(seen) == done and set(seen) == set(old[0].sampler.order()[:done])
        for loader in new:
            begin_after(loader, done)
        seen += [index for loader in new for batch in loader for index in batch.tolist()]
        assert len(set(seen)) == len(seen) and new[0].sampler.end <= count
        assert len(seen) == (new[0].sampler.end if drop_last else count)
    assert samples_done(old[0], 1, is_over=True) == count


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
