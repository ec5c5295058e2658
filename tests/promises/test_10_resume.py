"""10 · Resume is exact: saved anywhere and finished elsewhere, a run has the same bits."""

import contextlib
import multiprocessing
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from small import (
    SCHEDULERS,
    AtStep,
    assert_same,
    make_batches,
    make_trainer,
    outcome,
    same_history,
    same_state,
    small_net,
    start_process,
    stop,
)
from ununennium import CheckpointCallback, EarlyStopping, Trainer, TrainerConfig

KINDS = ("plain", "generator", "own", "weighted", "batches", "goes", "stream", "stateful",
         "distributed")  # fmt: skip


HOW = ("stop", "exception", "interrupt", "terminate", "kill")


def draw_case(seed):
    draw = random.Random(seed)
    case = {
        "seed": seed,
        "kind": draw.choice(KINDS),
        "workers": draw.choice([0] * 10 + [2, 3]),  # 3: two that persist
        "val_workers": draw.choice([0] * 19 + [3]),
        "count": draw.choice([7, 10, 13]),
        "size": draw.choice([1, 2, 3]),
        "accumulation": draw.choice([1, 1, 2, 3]),
        "optimizer": draw.choice(["sgd", "adam"]),
        "width": draw.choice([2, 8, 12]),
        "norms": draw.choice(["batch", "frozen batch", "group"]),
        "scheduler": draw.choice(["none", "step", "one cycle", "plateau"]),
        "phase": draw.choice(["train", "train", "train", "validate"]),
        "how": draw.choice(HOW),
    }
    count = -(-case["count"] // 2) if case["kind"] == "distributed" else case["count"]
    batches = count // case["size"] if case["kind"] == "batches" else -(-count // case["size"])
    steps = -(-batches // case["accumulation"])
    if case["phase"] == "train":
        case["at"] = sorted(draw.sample(range(1, 3 * steps), draw.choice([1, 1, 2])))
    else:
        case["at"] = [steps * draw.choice([1, 2, 3])]
    return case


class Pixels(Dataset):
    """Samples that are augmented with every kind of random number."""

    def __init__(self, count, own=False):
        self.count = count
        self.own = [np.random.default_rng(5), random.Random(6), torch.Generator().manual_seed(7)]
        self.own = self.own if own else []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        if self.own:
            noise += self.own[0].random() + self.own[1].random()
            noise += torch.rand(1, generator=self.own[2]).item()
        image = torch.full((3, 4, 4), index / self.count)
        image[0] += noise
        mask = torch.full((4, 4), index % 3)
        mask[0, 0] = 255
        return image, mask


class Stateful:
    """A loader that knows its position, as torchdata's does; it cannot be resumed otherwise."""

    def __init__(self, data, size):
        self.data, self.size, self.order, self.at = data, size, None, 0

    def __iter__(self):
        if self.order is None:
            self.order, self.at = torch.randperm(len(self.data)).tolist(), 0
        while self.at < len(self.order):
            rows = self.order[self.at : self.at + self.size]
            self.at += len(rows)
            yield [
                torch.stack(part) for part in zip(*map(self.data.__getitem__, rows), strict=True)
            ]
        self.order = None

    def state_dict(self):
        return {"order": self.order, "at": self.at}

    def load_state_dict(self, state):
        self.order, self.at = state["order"], state["at"]


class Stream(IterableDataset):
    """The same, one after the other."""

    def __init__(self, count):
        self.pixels = Pixels(count)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for index in range(worker.id if worker else 0, len(self.pixels), 2 if worker else 1):
            image, mask = self.pixels[index]
            image[0] = index  # replayed without the numbers that the training has drawn
            yield image, mask


class AsItGoes(Sampler):
    """Draws each index when it is asked for, as torchgeo's samplers do."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            yield int(torch.randint(self.count, ()))


def make_loader(kind, workers, count, size):
    options = {"num_workers": min(workers, 2), "persistent_workers": workers == 3}
    if kind == "stream":
        return DataLoader(Stream(count), batch_size=size, **options)
    data = Pixels(count, own=kind == "own")
    if kind == "generator":
        options["generator"] = torch.Generator().manual_seed(3)
    if kind == "stateful":
        return Stateful(data, size)
    if kind == "distributed":
        options["sampler"] = DistributedSampler(data, num_replicas=2, rank=1, seed=4)
    elif kind == "weighted":
        options["sampler"] = WeightedRandomSampler(torch.rand(count) + 0.1, count)
    elif kind == "batches":
        sampler = BatchSampler(RandomSampler(range(count)), size, drop_last=True)
        return DataLoader(data, batch_sampler=sampler, **options)
    elif kind == "goes":
        options["sampler"] = AsItGoes(count)
    else:
        options["shuffle"] = True
    return DataLoader(data, batch_size=size, **options)


def build(case, folder, *callbacks):
    torch.manual_seed(case["seed"])
    np.random.seed(case["seed"])
    random.seed(case["seed"])
    width, norms = case["width"], case["norms"]
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width) if "batch" in norms else nn.GroupNorm(2, width),
        nn.GELU(), nn.Dropout(0.3), nn.Conv2d(width, 3, 1),
    )  # fmt: skip
    if "frozen" in norms:
        model[1].eval()
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
    }[case["optimizer"]](model.parameters())
    train = make_loader(case["kind"], case["workers"], case["count"], case["size"])
    val = make_loader("plain", case["val_workers"], 5, 2)
    batches = -(-case["count"] // case["size"])
    steps = 3 * -(-batches // case["accumulation"]) + 3
    scheduler = {
        "none": lambda: None,
        "step": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    }[case["scheduler"]]()
    often = 1 if case["how"] == "kill" else None
    keep = CheckpointCallback(folder, "val_loss", "min", save_top_k=2, every_n_steps=often)
    config = TrainerConfig(
        epochs=3, device="cpu", progress="none", accumulation_steps=case["accumulation"]
    )
    loss = nn.CrossEntropyLoss(ignore_index=255)
    return Trainer(
        model, optimizer, loss, train, val, scheduler,
        [*callbacks, keep, EarlyStopping("val_loss", patience=2)], config,
    )  # fmt: skip


class Broken(Exception):
    pass


def leave(how):
    def act(trainer):
        if how == "stop":
            trainer.request_stop("asked")
        elif how == "exception":
            raise Broken
        elif how == "interrupt":
            raise KeyboardInterrupt
        elif how == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            os.killpg(0, signal.SIGKILL)  # workers too, or they would look for it for seconds

    return act


def run_part(case, folder, step):
    """Continue from what is in the folder, up to a step or the end."""
    torch.set_num_threads(1)  # of a new process too: sums depend on it
    end = AtStep(step, leave(case["how"]), case["phase"])
    trainer = build(case, folder, end)
    if trainer.resume(folder) is not None:
        torch.manual_seed(99)  # what was drawn in between is forgotten
    with contextlib.suppress(Broken):
        trainer.fit()
    assert step is None or end.act is None, "the step was not reached"
    return trainer


def run_part_as_leader(*part):
    os.setsid()
    # A process that was itself started otherwise would start its workers like that, and PyTorch
    # cannot send them a data set that holds a generator.
    multiprocessing.set_start_method("fork", force=True)
    run_part(*part)


def run_part_in_a_process(case, folder, step):
    """The same, for an end that takes the process with it."""
    process = start_process(run_part_as_leader, case, folder, step)
    process.join()
    ends = {"terminate": -signal.SIGTERM, "kill": -signal.SIGKILL}
    assert process.exitcode == ends[case["how"]]


CASES = int(os.environ.get("CONTINUATION_CASES", 100))


@pytest.mark.parametrize("seed", range(CASES))
def test_resuming_is_exact(tmp_path, seed):
    case = draw_case(seed)
    whole = build(case, tmp_path / "whole", AtStep(0, None))
    whole.fit()
    expected, folder = outcome(whole), tmp_path / "parts"
    part = run_part if case["how"] in HOW[:3] else run_part_in_a_process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in case["at"]:
            part(case, folder, step)
        assert_same(expected, outcome(run_part(case, folder, None)))
    inexact = {str(w.message) for w in caught if "not exactly" in str(w.message)}
    assert all("draws its order as it goes" in message for message in inexact), inexact
    assert not inexact or case["kind"] == "goes"


def test_a_file_written_during_validation_resumes_exactly(tmp_path):
    """The validation is repeated, with the same random numbers."""
    case = draw_case(0) | {"kind": "plain", "workers": 0, "val_workers": 0, "how": "stop"}
    written = tmp_path / "file.pt"
    save = AtStep(4, lambda trainer: trainer.save_checkpoint(written), "validate")
    whole = build(case | {"count": 10, "size": 3, "accumulation": 1}, tmp_path / "a", save)
    whole.fit()
    expected = outcome(whole)
    resumed = build(case | {"count": 10, "size": 3, "accumulation": 1}, tmp_path / "b")
    resumed.load_checkpoint(written)
    assert (resumed.epoch, resumed.batch) == (0, 4)
    resumed.fit()
    assert_same(expected, outcome(resumed))


class Tiles(Dataset):
    """Notes which samples were given; one of them cannot be read at first."""

    def __init__(self, broken):
        self.broken, self.given = broken, []

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == self.broken:
            self.broken = None
            raise OSError("the archive is gone")
        self.given.append(index)
        return torch.full((3, 4, 4), float(index)), torch.full((4, 4), index % 3)


@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_error_of_the_data_set_costs_no_sample(tmp_path, accumulation, through_a_file):
    def make(data, folder):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 3, 1)
        config = TrainerConfig(device="cpu", progress="none", accumulation_steps=accumulation)
        return Trainer(
            model, torch.optim.SGD(model.parameters(), 0.01), nn.CrossEntropyLoss(),
            DataLoader(data, 2, shuffle=True),
            callbacks=[CheckpointCallback(folder, "train_loss")], config=config,
        )  # fmt: skip

    whole = make(Tiles(None), tmp_path / "whole")
    whole.fit(1)
    for broken in range(0, 12, 5):
        data, folder = Tiles(broken), tmp_path / str(broken)
        trainer = make(data, folder)
        with pytest.raises(OSError, match="the archive is gone"):
            trainer.fit(1)
        if through_a_file:
            trainer = make(data, folder)
            trainer.resume(folder)
        with pytest.warns(UserWarning, match="What followed is read again") as caught:
            trainer.fit(1 - trainer.epoch)
        assert [str(w.message) for w in caught if "may lack" in str(w.message)] == []
        for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_another_kind_of_loader_warns(tmp_path):
    case = draw_case(0) | {"kind": "plain", "workers": 0, "val_workers": 0, "how": "stop"}
    case |= {"accumulation": 1, "scheduler": "none"}
    part = build(case, tmp_path, AtStep(2, leave("stop")))
    part.fit()
    other = build(case | {"kind": "stream"}, tmp_path)
    other.resume(tmp_path)
    with pytest.warns(UserWarning, match="left with a loader of another kind"):
        other.fit()


# At the end of an epoch, with every kind of scheduler.


def make_run(scheduler, own_generator, callbacks=()):
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = torch.utils.data.DataLoader(
        make_batches(6), batch_size=None, shuffle=True, generator=generator
    )
    return make_trainer(
        loader, make_batches(2, seed=1), scheduler=scheduler, callbacks=callbacks,
        model=torch.nn.Sequential(torch.nn.Dropout(0.2), small_net()), seed=5,
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_new_trainer_continues_bit_for_bit(tmp_path, name, own_generator):
    straight = make_run(SCHEDULERS[name], own_generator)
    straight.fit(6)
    first = make_run(SCHEDULERS[name], own_generator)
    first.fit(2)
    path = first.save_checkpoint(tmp_path / "two.pt")
    torch.manual_seed(99)
    second = make_run(SCHEDULERS[name], own_generator)
    second.load_checkpoint(path)
    torch.rand(17)  # something else draws in between
    second.fit(4)
    assert same_state(straight, second) and same_history(straight.history, second.history)


def test_callbacks_remember(tmp_path):
    def callbacks():
        return [
            EarlyStopping("val_loss", patience=3),
            CheckpointCallback(tmp_path / "run", save_top_k=2),
        ]

    first = make_run(None, False, callbacks())
    first.fit(3)
    second = make_run(None, False, callbacks())
    second.load_checkpoint(tmp_path / "run" / "last.pt")
    assert second.callbacks[0].state_dict() == first.callbacks[0].state_dict()
    assert second.callbacks[1].kept == first.callbacks[1].kept and len(first.callbacks[1].kept) == 2
    second.fit(3)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert len(files) == 4 and files[2:] == ["last.pt", "previous.pt"]


@pytest.mark.parametrize("size", [3, 6])
def test_an_epoch_resumed_with_another_batch_size_says_so(tmp_path, size):
    data = [sample for batch in make_batches(12) for sample in zip(*batch, strict=True)]
    stopped = make_trainer(DataLoader(data, 4, shuffle=True), callbacks=[AtStep(1, stop)])
    stopped.fit(1)
    stopped.save_checkpoint(tmp_path / "last.pt")
    trainer = make_trainer(DataLoader(data, size, shuffle=True))
    trainer.resume(tmp_path)
    with pytest.warns(UserWarning, match="batch_size was 4") as caught:
        trainer.fit(1)
    effect = "repeated" if size == 3 else "left out"
    assert [str(warning.message) for warning in caught] == [
        f"The epoch resumes, but not exactly: batch_size was 4 and is now {size}, so samples of "
        f"this epoch will be {effect}."
    ]
