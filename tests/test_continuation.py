"""A run that was left anywhere, and gone on with elsewhere, is the run that never was left."""

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

from conftest import start_process
from ununennium import Callback, CheckpointCallback, EarlyStopping, Trainer, TrainerConfig


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


class Stateful:
    """A loader that says where it is, as torchdata's does; it cannot be gone on with otherwise."""

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


class At(Callback):
    """Does something after a number of steps, or in a validation."""

    def __init__(self, step, act, phase="train"):
        self.step, self.act, self.phase = step, act, phase

    def on_safepoint(self, trainer, phase):
        if self.act and phase == self.phase and trainer.global_step == self.step:
            act, self.act = self.act, None
            act(trainer)


def make_trainer(case, folder, *callbacks):
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


def outcome(trainer):
    """Return everything that has to be the same."""
    names = ("patience", "best", "count")
    memory = {n: getattr(c, n) for c in trainer.callbacks for n in names if hasattr(c, n)}
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "history": trainer.history,
        "scheduler": trainer.run.schedule.scheduler and trainer.run.schedule.scheduler.state_dict(),
        "step": trainer.global_step,
        "memory": memory,
        "random": (torch.rand(1).item(), np.random.rand(), random.random()),
    }


def assert_same(a, b, name=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name}/{i}")
    else:
        assert a == b or (a != a and b != b), (name, a, b)


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


def run_part(case, folder, place):
    """Go on from what is in the folder, up to a place or the end."""
    torch.set_num_threads(1)  # of a new process too: sums depend on it
    stop = At(place, leave(case["how"]), case["phase"])
    trainer = make_trainer(case, folder, stop)
    if trainer.resume(folder) is not None:
        torch.manual_seed(99)  # what came between is forgotten
    with contextlib.suppress(Broken):
        trainer.fit()
    assert place is None or stop.act is None, "the place was not reached"
    return trainer


def run_part_as_leader(*part):
    os.setsid()
    # A process that was itself started otherwise would start its workers like that, and PyTorch
    # cannot send them a data set that holds a generator.
    multiprocessing.set_start_method("fork", force=True)
    run_part(*part)


def run_part_in_a_process(case, folder, place):
    """The same, for an end that takes the process with it."""
    process = start_process(run_part_as_leader, case, folder, place)
    process.join()
    ends = {"terminate": -signal.SIGTERM, "kill": -signal.SIGKILL}
    assert process.exitcode == ends[case["how"]]


CASES = int(os.environ.get("CONTINUATION_CASES", 100))


@pytest.mark.parametrize("seed", range(CASES))
def test_left_and_gone_on_with(tmp_path, seed):
    case = draw_case(seed)
    whole = make_trainer(case, tmp_path / "whole", At(0, None))
    whole.fit()
    expected, folder = outcome(whole), tmp_path / "parts"
    part = run_part if case["how"] in HOW[:3] else run_part_in_a_process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for place in case["at"]:
            part(case, folder, place)
        assert_same(expected, outcome(run_part(case, folder, None)))
    told = {str(w.message) for w in caught if "not exactly" in str(w.message)}
    assert all("draws its order as it goes" in message for message in told), told
    assert not told or case["kind"] == "goes"


def test_a_file_written_during_validation(tmp_path):
    """It is done again, and draws what it had drawn."""
    case = draw_case(0) | {"kind": "plain", "workers": 0, "val_workers": 0, "how": "stop"}
    written = tmp_path / "file.pt"
    save = At(4, lambda trainer: trainer.save_checkpoint(written), "validate")
    whole = make_trainer(case | {"count": 10, "size": 3, "accumulation": 1}, tmp_path / "a", save)
    whole.fit()
    expected = outcome(whole)
    rest = make_trainer(case | {"count": 10, "size": 3, "accumulation": 1}, tmp_path / "b")
    rest.load_checkpoint(written)
    assert (rest.epoch, rest.batch) == (0, 4)
    rest.fit()
    assert_same(expected, outcome(rest))


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
        with pytest.warns(UserWarning, match="That batch is read again") as caught:
            trainer.fit(1 - trainer.epoch)
        assert [str(w.message) for w in caught if "may lack" in str(w.message)] == []
        for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_loader_of_another_kind_is_told(tmp_path):
    case = draw_case(0) | {"kind": "plain", "workers": 0, "val_workers": 0, "how": "stop"}
    case |= {"accumulation": 1, "scheduler": "none"}
    part = make_trainer(case, tmp_path, At(2, leave("stop")))
    part.fit()
    other = make_trainer(case | {"kind": "stream"}, tmp_path)
    other.resume(tmp_path)
    with pytest.warns(UserWarning, match="left with a loader of another kind"):
        other.fit()
