"""Loaders interrupted in the middle of an epoch and continued by another object."""

import gc
import multiprocessing
import random
import sys
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from small import make_batches, make_trainer, same_history, same_state
from ununennium.training.checkpoint import plain
from ununennium.training.loader import ResumableLoader, fingerprint, instrument, owners_of
from ununennium.training.messages import TrainingWarning
from ununennium.training.rng import random_state, seed_all, set_random_state

COUNT, SIZE = 11, 2
BATCHES = 6


class Noisy(Dataset):
    """Sample i is i plus noise from every kind of generator."""

    def __init__(self):
        self.own = [np.random.default_rng(5), random.Random(6), torch.Generator().manual_seed(7)]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        numpy, python, pytorch = self.own
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        noise += numpy.random() + python.random() + torch.rand(1, generator=pytorch).item()
        return index + noise / 10


class Stream(IterableDataset):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        yield from range(worker.id if worker else 0, COUNT, worker.num_workers if worker else 1)


class NoLength:
    """A batch sampler of unknown length."""

    def __iter__(self):
        yield from torch.randperm(COUNT).split(SIZE)


class Stateful:
    """A loader that knows its position, and cannot be continued in another way."""

    def __init__(self):
        self.order = None

    def __iter__(self):
        self.order = torch.rand(BATCHES).tolist() if self.order is None else self.order
        while self.order:
            yield torch.tensor(self.order.pop())
        self.order = None

    def state_dict(self):
        return {"order": list(self.order or [])}

    def load_state_dict(self, state):
        self.order = list(state["order"])


def from_dataset(**options):
    def make(workers=0, persists=False):
        parallel = {"num_workers": workers, "persistent_workers": persists}
        parallel |= {"multiprocessing_context": "fork"} if workers else {}
        data = options.get("dataset", Noisy)()
        rest = {name: value for name, value in options.items() if name != "dataset"}
        return DataLoader(data, **(parallel | rest))

    return make


LOADERS = {
    "shuffled": from_dataset(batch_size=SIZE, shuffle=True),
    "single samples": from_dataset(batch_size=None, shuffle=True),
    "unknown length": from_dataset(batch_sampler=NoLength()),
    "stream": from_dataset(batch_size=SIZE, dataset=Stream),
    "list": lambda: [torch.full((2,), float(i)) for i in range(BATCHES)],
    "stateful": Stateful,
}
WAYS = [(kind, 0, False) for kind in LOADERS]
WAYS += [
    (kind, 2, persists)
    for kind in ("shuffled", "unknown length", "stream")
    for persists in (False, True)
]


def make(kind, workers=0, persists=False, max_ahead=1):
    options = {"workers": workers, "persists": persists} if workers else {}
    return ResumableLoader(LOADERS[kind](**options), max_ahead)


def values(batches):
    return [torch.as_tensor(batch).tolist() for batch in batches]


@pytest.fixture(autouse=True)
def seeded():
    seed_all(0)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Exactly.


@pytest.mark.parametrize(("kind", "workers", "persists"), WAYS)
def test_a_loader_gives_what_the_user_loader_gives(kind, workers, persists):
    if kind == "stateful":
        plainly = values(Stateful())
    else:
        options = {"workers": workers, "persists": persists} if workers else {}
        plainly = values(LOADERS[kind](**options))
    seed_all(0)
    assert values(make(kind, workers, persists)) == plainly


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(("kind", "workers", "persists"), WAYS)
def test_an_epoch_continues_exactly(kind, workers, persists):
    """From any batch of the second epoch, twice, and the third epoch is the same too."""
    for done in (1, 3, 4, BATCHES) if kind != "single samples" else (1, 7, COUNT):
        seed_all(done)
        loader = make(kind, workers, persists)
        list(loader)
        batches = iter(loader)
        start = values(islice(batches, done))
        position, then = plain(loader.state(done)), random_state(*owners_of(loader.loader))
        expected = start + values(batches), values(loader)

        seed_all(99)
        middle = make(kind, workers, persists)
        batches = middle.resume(position)
        set_random_state(then, *owners_of(middle.loader))
        start += values(islice(batches, 1))
        done += len(start) - done
        position, then = plain(middle.state(done)), random_state(*owners_of(middle.loader))

        seed_all(98)
        last = make(kind, workers, persists)
        batches = last.resume(position)
        set_random_state(then, *owners_of(last.loader))
        assert (start + values(batches), values(last)) == expected


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("done", [2, 3])
@pytest.mark.parametrize(("kind", "workers"), [("shuffled", 0), ("shuffled", 2), ("list", 0)])
def test_batches_that_were_read_ahead_are_not_done(kind, workers, done):
    loader = make(kind, workers, max_ahead=3)
    batches = iter(loader)
    start = values(islice(batches, done + 3))
    position, then = loader.state(done), random_state(*owners_of(loader.loader))
    whole = start + values(batches)
    again = make(kind, workers, max_ahead=3)
    remaining = again.resume(position)
    assert position["done"] == done and position["loader"] is None
    set_random_state(then, *owners_of(again.loader))
    rest, expected = values(remaining), whole[done:]
    if not workers:  # the noise of the batches that were read ahead was drawn here, and is gone
        rest, expected = ([[int(x) for x in b] for b in part] for part in (rest, expected))
    assert rest == expected


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("kind", ["shuffled", "stream"])
def test_persistent_workers_carry_their_states_into_the_next_epoch(kind):
    loader = make(kind, 2, persists=True)
    list(loader)
    state, then = plain(loader.state()), random_state()
    expected = values(loader), values(loader), torch.rand(1)
    assert state["workers"].keys() == {0, 1}
    again = make(kind, 2, persists=True)
    again.load(state)
    set_random_state(then)
    assert (values(again), values(again), torch.rand(1)) == expected


def test_an_epoch_that_is_given_up_leaves_no_trace():
    loader = make("shuffled", 2, persists=True)
    list(loader)
    then, state = random_state(*owners_of(loader.loader)), loader.state()
    expected = values(loader)
    again = make("shuffled", 2, persists=True)
    again.load(state)
    next(iter(again))
    assert repr(again.state()["workers"]) == repr(state["workers"])
    set_random_state(then, *owners_of(again.loader))
    assert values(again) == expected


def test_workers_that_do_not_persist_carry_nothing_over():
    loader = make("shuffled", 2)
    list(loader)
    assert loader.state() == {"workers": {}}
    loader.load({"workers": {0: random_state()}})
    assert loader.state() == {"workers": {}}


def test_the_user_loader_is_left_alone():
    user = LOADERS["shuffled"](workers=2)
    before = dict(user.__dict__)
    loader = ResumableLoader(user)
    next(iter(loader))
    loader.resume(loader.state(1))
    assert {name: before[name] is value for name, value in user.__dict__.items()} == dict.fromkeys(
        before, True
    )
    assert instrument(user, 1, {}).copy is not user


def test_workers_of_the_user_loader_are_not_taken():
    user = LOADERS["shuffled"](workers=2, persists=True)
    list(user)
    loader = ResumableLoader(user)
    assert len(list(loader)) == BATCHES and loader.state()["workers"].keys() == {0, 1}


@pytest.mark.usefixtures("no_warnings")
def test_before_the_first_batch_and_after_the_last():
    loader = make("shuffled")
    iter(loader)
    assert len(list(make("shuffled").resume(loader.state(0)))) == BATCHES
    list(loader)
    position = loader.state(BATCHES)
    for _ in range(2):  # an epoch that is over may be saved again before it is read
        loader = make("shuffled")
        remaining = loader.resume(position)
        position = plain(loader.state(BATCHES))
        assert position["is_over"] and not list(remaining)
    assert len(list(loader)) == BATCHES


def test_resuming_leaves_the_random_states_alone():
    loader = make("shuffled")
    list(islice(loader, 2))
    again = make("shuffled")
    before = random_state(*owners_of(again.loader))
    again.resume(loader.state(2))
    assert repr(random_state(*owners_of(again.loader))) == repr(before)


def test_a_position_needs_an_epoch():
    with pytest.raises(RuntimeError, match="No epoch has begun"):
        make("list").state(0)


# Not exactly.


def resume(loader, position):
    with pytest.warns(TrainingWarning, match="The epoch resumes, but not exactly: ") as caught:
        remaining = loader.resume(position)
    return str(caught[0].message), remaining


def test_other_batches_are_noticed():
    loader = make("list")
    next(iter(loader))
    message, _ = resume(ResumableLoader([torch.rand(2)] * 4), loader.state(1))
    assert message.endswith("the loader gave a different batch than before at this position.")


def test_another_number_of_workers_is_noticed():
    loader = make("shuffled", 2)
    list(islice(loader, 3))
    message, remaining = resume(make("shuffled"), loader.state(3))
    assert "num_workers was 2 and is now 0, so random augmentations will differ" in message
    assert len(list(remaining)) == BATCHES - 3


def test_workers_out_of_order_are_noticed():
    def make_loader():
        loader = LOADERS["shuffled"](workers=2)
        loader.in_order = False
        return ResumableLoader(loader)

    loader = make_loader()
    next(iter(loader))
    assert (
        "with in_order=False, batches arrive in any order"
        in resume(make_loader(), loader.state(1))[0]
    )


@pytest.mark.parametrize(
    ("before", "now"),
    [("shuffled", "list"), ("list", "shuffled"), ("stream", "shuffled"), ("stateful", "shuffled")],
)
def test_a_loader_of_another_kind_is_noticed(before, now):
    loader = make(before)
    list(islice(loader, 2))
    message, remaining = resume(make(now), loader.state(2))
    assert "left with a loader of another kind, so samples may be repeated or skipped" in message
    assert "different batch" not in message  # that is not known
    assert len(list(remaining)) == BATCHES - 2


def test_a_sampler_that_draws_as_it_goes_is_noticed():
    def make_loader():
        draws = (int(torch.randint(COUNT, ())) for _ in range(BATCHES))
        return ResumableLoader(DataLoader(range(COUNT), 1, sampler=draws))

    loader = make_loader()
    for _ in islice(loader, 2):
        torch.rand(1)
    assert "generator draws its order as it goes" in resume(make_loader(), loader.state(2))[0]


def test_a_shorter_loader_is_refused():
    loader = make("stream")
    list(islice(loader, 4))
    seed_all(1)
    then, short = random_state(), ResumableLoader([1, 2])
    with pytest.raises(ValueError, match="train_loader gave 2 batches, but 4 of this epoch were"):
        short.resume(loader.state(4))
    assert torch.equal(random_state()["torch"], then["torch"])


# Fingerprints.


def test_a_fingerprint_sees_values_in_any_container():
    image = torch.rand(2, 4, 8, 8)
    first = fingerprint({"image": image, "name": ["a", "b"]})
    assert first == fingerprint([("text", image.clone().requires_grad_())])
    assert first != fingerprint(image + 1) and fingerprint("no tensor") == 0
    assert fingerprint(image.bfloat16()) == fingerprint(image.bfloat16().float())
    sparse = torch.eye(3).to_sparse()
    assert fingerprint([sparse, image]) == first  # without its values, and without an error


# Workers end.


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_workers_end_at_once_when_a_loader_is_dropped(monkeypatch, stops, persistent):
    """A worker that misses the message is killed after PyTorch has waited for it."""
    killed, terminate = [], multiprocessing.process.BaseProcess.terminate
    others = set(multiprocessing.active_children())
    loader = make("shuffled", 2, persistent)
    cycle = {"loader": loader, "iterator": iter(loader)}
    cycle["itself"] = cycle  # as a trainer is part of one
    next(cycle["iterator"])
    workers = set(multiprocessing.active_children()) - others
    if not stops:
        list(cycle["iterator"])
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 2.0)
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess,
        "terminate",
        lambda worker: [killed.append(worker), terminate(worker)],
    )
    del loader, cycle
    gc.collect()
    assert len(workers) == 2 and not killed
    assert not any(worker.is_alive() for worker in workers)


def test_a_worker_leaves_alone_what_a_dropped_loader_left_behind(capfd):
    samples = [(image[0], mask[0]) for image, mask in make_batches(4)]
    loader = ResumableLoader(DataLoader(samples, num_workers=2))
    cycle = [loader, iter(loader)]
    cycle.append(cycle)

    def work():
        sys.unraisablehook = sys.__unraisablehook__  # pytest has its own
        gc.collect()

    gc.disable()
    try:
        del loader, cycle
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        worker.join()
    finally:
        gc.enable()
    assert worker.exitcode == 0
    assert capfd.readouterr().err == ""  # PyTorch says "can only test a child process"


# Loaders that overwrite their batches.


class Ring:
    """A loader that fills the same memory again after some batches."""

    def __init__(self, size, count=8):
        self.batches, self.size = make_batches(count), size
        self.memory = [tuple(torch.empty_like(x) for x in self.batches[0]) for _ in range(size)]

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            place = self.memory[number % self.size]
            for part, value in zip(place, batch, strict=True):
                part.copy_(value)
            yield tuple(torch.from_numpy(part.numpy()) for part in place)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loader_that_overwrites_a_window_is_refused(size):
    with pytest.raises(ValueError, match="overwrites its batches: of 4 .* image.clone"):
        make_trainer(Ring(size), accumulation_steps=4).fit(1)


@pytest.mark.parametrize(("size", "accumulation"), [(1, 1), (4, 4), (5, 3)])
def test_a_loader_may_overwrite_what_was_used(size, accumulation):
    one = make_trainer(Ring(size), accumulation_steps=accumulation)
    other = make_trainer(make_batches(8), accumulation_steps=accumulation)
    assert same_history(one.fit(2), other.fit(2)) and same_state(one, other)


def test_the_same_batch_may_come_again():
    batch = make_batches(1)[0]
    make_trainer([batch] * 4, accumulation_steps=4).fit(1)
