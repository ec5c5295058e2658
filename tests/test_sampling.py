"""No sample is counted twice, and another number of ranks finishes an epoch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from ununennium.sampling import OwnSamples, announce_epoch, begin_after, own_share, samples_done


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


def test_samplers_hear_the_number_of_the_epoch():
    heard = []

    class Part:
        def __init__(self, name):
            self.name = name

        def set_epoch(self, number):
            heard.append((self.name, number))

    loader = Part("loader")
    loader.sampler, loader.batch_sampler = Part("sampler"), object()
    announce_epoch(loader, 4)
    announce_epoch([], 5)
    assert heard == [("loader", 4), ("sampler", 4)]
