"""Samplers continue their order, and workers report their random states."""

import pickle
import random
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from ununennium.training.recording import (
    DrawnIndices,
    PickledState,
    RestoreWorker,
    ResumableSampler,
    StatefulCollate,
    WorkerStates,
    checksum_of,
    is_plain,
    unpickled,
)
from ununennium.training.rng import random_state, set_random_state


class AsItGoes:
    """Draws each index when it is asked for, and has no length."""

    def __iter__(self):
        for _ in range(8):
            yield int(torch.randint(1000, ()))


class Regions:
    """Draws what no file can hold."""

    def __iter__(self):
        for _ in range(8):
            yield slice(int(torch.randint(1000, ())), None)


class AsShuffled:
    """Draws a whole order at once, from a generator of its own."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def __iter__(self):
        yield from self.random.sample(range(8), 8)


SAMPLERS = {
    "shuffled": lambda: RandomSampler(range(8)),
    "batches": lambda: BatchSampler(RandomSampler(range(15)), 2, drop_last=False),
    "weighted": lambda: WeightedRandomSampler([0.1] * 8, 8),
    "own generator": lambda: AsShuffled(3),
    "regions": Regions,
}


def make_sampler(kind):
    sampler = SAMPLERS[kind]()
    return ResumableSampler(sampler, (sampler,))


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_an_order_continues_from_every_position(kind, ahead):
    for done in range(9):
        sampler = make_sampler(kind)
        drawing = iter(sampler)
        whole = list(islice(drawing, max(done + ahead, 1)))
        position, then = sampler.state(done), random_state()
        whole += drawing
        torch.manual_seed(done)
        again = make_sampler(kind)
        next(iter(again))  # what it did before does not matter
        assert again.resume(position) == ""
        set_random_state(then)  # as resuming a run does
        assert list(again) == whole[done:]


def test_an_order_continues_twice():
    torch.manual_seed(3)
    sampler = make_sampler("batches")
    whole = list(sampler)
    for done in range(9):
        position = sampler.state(done)
        sampler = make_sampler("batches")
        assert sampler.resume(position) == ""
        drawing = iter(sampler)
        assert list(islice(drawing, 2)) == whole[done : done + 2]


def test_resuming_leaves_the_random_states_alone():
    sampler = make_sampler("own generator")
    list(islice(sampler, 2))
    position = sampler.state(1)
    again = make_sampler("own generator")
    before = random_state(again.sampler)
    again.resume(position)
    after = random_state(again.sampler)
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before["own"] == after["own"] and before["python"] == after["python"]


def test_nothing_drawn_is_a_position_too():
    """The next epoch then draws its order when it is asked to, as this one would have."""
    position = ResumableSampler(RandomSampler(range(8))).state(0)
    torch.manual_seed(5)
    whole = list(RandomSampler(range(8)))
    torch.manual_seed(5)
    again = ResumableSampler(RandomSampler(range(8)))
    assert again.resume(position) == "" and list(again) == whole


@pytest.mark.parametrize("kind", [AsItGoes, Regions])
def test_a_sampler_that_draws_as_it_goes_is_noticed(kind):
    sampler = ResumableSampler(kind())
    drawing = iter(sampler)
    for _ in range(4):
        index = next(drawing)
        torch.rand(1)
    again = ResumableSampler(kind())
    assert f"{kind.__name__} draws its order as it goes" in again.resume(sampler.state(3))
    assert kind is Regions or next(iter(again)) == index  # a region is not in the file


def test_other_data_are_noticed():
    torch.manual_seed(0)
    sampler = ResumableSampler(RandomSampler(range(8)))
    list(islice(sampler, 3))
    again = ResumableSampler(RandomSampler(range(9)))
    assert "or the data set has changed" in again.resume(sampler.state(2))


def test_the_next_epoch_may_begin_with_a_given_state():
    sampler = ResumableSampler(RandomSampler(range(8)))
    sampler.next_random = random_state()
    torch.manual_seed(1)
    first, second = list(sampler), list(sampler)
    set_random_state(sampler.random)
    assert list(RandomSampler(range(8))) == second != first


@given(st.lists(st.lists(st.integers(), max_size=3)), st.integers(0, 20))
def test_drawn_indices_forget_all_but_a_checksum(indices, before):
    drawn = DrawnIndices()
    for index in indices:
        drawn.append(index)
    drawn.forget(before)
    state = drawn.state()
    assert state["first"] == min(before, len(indices)) and state["indices"] == indices[before:]
    assert state["count"] == len(indices[before:]) and state["end"] == checksum_of(indices)
    assert state["checksum"] == checksum_of(indices[:before])


def test_what_a_file_can_hold():
    assert is_plain([None, True, 1, 0.5, "a", (1, [2])])
    assert not any(map(is_plain, [slice(1), [torch.tensor(1)], {"a": 1}, b"a"]))


# Workers.


def test_states_before_a_batch_are_those_after_the_workers_last():
    states = WorkerStates({0: {"torch": b"first"}}, keep=4)
    for number in range(6):
        changed = {"torch": pickle.dumps(number)} | (
            {"own": pickle.dumps([])} if number < 2 else {}
        )
        states.add(number, number % 2, changed)
    assert unpickled(states.before(4)) == {0: {"torch": 2, "own": []}, 1: {"torch": 3, "own": []}}
    assert unpickled(states.before(2)) == {0: {"torch": b"first"}}  # older ones are forgotten
    assert unpickled(states.latest)[1] == {"torch": 5, "own": []}


@pytest.mark.parametrize("size", [3, 5, 4])
@pytest.mark.parametrize("kind", [RandomSampler, list])
def test_another_batch_size_is_told_with_both_sizes(size, kind):
    sampler = ResumableSampler(BatchSampler(kind(range(24)), 4, False))
    list(islice(sampler, 2))
    problem = ResumableSampler(BatchSampler(kind(range(24)), size, False)).resume(sampler.state(2))
    effect = {3: "repeated", 5: "left out"}.get(size)
    told = f"batch_size was 4 and is now {size}, so samples of this epoch will be {effect}"
    assert problem == (told if effect else "")


def test_a_position_of_an_earlier_version_has_no_batch_size():
    sampler = ResumableSampler(BatchSampler(RandomSampler(range(24)), 4, False))
    list(islice(sampler, 2))
    position = sampler.state(1)
    del position["batch_size"]
    again = ResumableSampler(BatchSampler(RandomSampler(range(24)), 3, False))
    assert "draws its order as it goes" in again.resume(position)


def test_only_what_a_worker_sent_is_unpickled():
    states = {0: {"torch": PickledState(pickle.dumps(7)), "own": pickle.dumps(7)}}
    assert unpickled(states) == {0: {"torch": 7, "own": pickle.dumps(7)}}


class Draws:
    """Draws with a generator of its own; also stands for a `collate_fn`."""

    def __init__(self):
        self.random = random.Random(0)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.random.random()

    def __call__(self, samples):
        return [*samples, self.random.random()]


def test_a_worker_continues_another_one():
    data, calls = Draws(), []
    options = {"batch_size": 1, "num_workers": 1, "multiprocessing_context": "fork"}
    whole, states = [], WorkerStates({}, keep=6)
    collate = Draws()
    for number, (batch, worker, changed) in enumerate(
        torch.utils.data.DataLoader(data, collate_fn=StatefulCollate(collate), **options)
    ):
        states.add(number, worker, changed)
        whole.append(batch)
    restore = RestoreWorker(calls.append, collate, unpickled(states.before(4)))
    rest = torch.utils.data.DataLoader(
        data, collate_fn=collate, sampler=[4, 5], worker_init_fn=restore, **options
    )
    assert list(rest) == whole[4:]
    restore(0)  # the user's function is called, and outside of a worker nothing is restored
    assert calls == [0]
