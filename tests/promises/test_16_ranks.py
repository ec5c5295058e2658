"""16 · Several processes: the same steps as one, one decision, one file, every sample once."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from processes import on_ranks
from ununennium import (
    Callback,
    CheckpointCallback,
    RankFailed,
    Trainer,
    TrainerConfig,
    TrainingDiverged,
)

WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


class Chips(Dataset):
    """Numbered chips with nodata; the mask follows from the image."""

    def __init__(self, count, empty=()):
        self.count, self.empty = count, empty

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(4, 6, 6, generator=generator)
        mask = image[:3].argmax(0)
        mask[torch.rand(6, 6, generator=generator) < 0.1 * (index % 5)] = 255
        if index in self.empty:
            mask[:] = 255
        return {"image": image, "mask": mask, "index": index}


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))


def size_and_rank():
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def make_loader(data, batch_size, shuffle=True, **options):
    size, rank = size_and_rank()
    sampler = DistributedSampler(data, size, rank, shuffle)
    return DataLoader(data, batch_size, sampler=sampler, **options)


def make_trainer(train, val=None, callbacks=(), loss=None, model=None, **settings):
    model = model or small_net()
    model = DistributedDataParallel(model) if dist.is_initialized() else model
    loss = loss or nn.CrossEntropyLoss(WEIGHTS, ignore_index=255)
    config = TrainerConfig(device="cpu", progress="none", **settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(model, optimizer, loss, train, val, callbacks=list(callbacks), config=config)


class Gradients(Callback):
    """Keeps each step's gradient, by the difference that SGD makes."""

    def __init__(self):
        self.before, self.kept = None, []

    def on_safepoint(self, trainer, phase):
        if phase == "train":
            vector = nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
            if self.before is not None:
                self.kept.append((self.before - vector) / 0.1)
            self.before = vector

    def on_train_start(self, trainer):
        self.on_safepoint(trainer, "train")


def ten_steps():
    """An epoch of 74 chips in 10 steps of 8, whatever the number of ranks; the last one has 2.

    Chip 3 is all nodata.
    """
    size, _ = size_and_rank()
    steps = Gradients()
    train = make_loader(Chips(74, empty=[3]), 4 // size, shuffle=False)
    val = make_loader(Chips(23), 3, shuffle=False)
    trainer = make_trainer(train, val, [steps], accumulation_steps=2)
    return dict(trainer.fit(1)), steps.kept


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_take_the_steps_of_one_process(size):
    history, wanted = ten_steps()
    assert len(wanted) == 10
    for other, found in on_ranks(size, ten_steps):
        for gradient, own in zip(wanted, found, strict=True):
            assert (gradient - own).norm() <= 1e-5 * gradient.norm()
        assert other.keys() == history.keys()
        for name in history:
            if name != "train_empty_batches":  # which depends on the batch size
                assert other[name] == pytest.approx(history[name], rel=1e-6), name


class Seen(Callback):
    """Keeps the numbers of the samples in steps that were taken."""

    def __init__(self, stop_after=None):
        self.indices, self.stop_after = [], stop_after

    def on_batch_end(self, trainer, batch, logs):
        self.indices += batch["index"].tolist() if batch else []

    def on_safepoint(self, trainer, phase):
        if phase == "train" and self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after == 0:
                trainer.request_stop("enough")


def part_of_run(folder, stop_after, epochs, workers=0):
    seen = Seen(stop_after)
    loader = make_loader(Chips(101), 2, num_workers=workers)
    val = make_loader(Chips(7), 2, shuffle=False)
    callbacks = [seen, CheckpointCallback(folder, "val_loss")]
    trainer = make_trainer(loader, val, callbacks, accumulation_steps=2, epochs=epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.resume(folder)
        trainer.fit()
    texts = [str(warning.message) for warning in caught]
    return seen.indices, trainer.batch, trainer.epoch, texts, dict(trainer.history)


@pytest.mark.parametrize("sizes", [(4, 2, 4), (2, 1, 3)])
def test_another_number_of_ranks_sees_every_sample_once(tmp_path, sizes):
    seen, texts = [], []
    for size, stop_after in zip(sizes, (2, 3, None), strict=True):
        results = on_ranks(size, part_of_run, tmp_path, stop_after, 1)
        seen += [index for result in results for index in result[0]]
        texts.append([text for result in results for text in result[3]])
        assert len({result[1:3] for result in results}) == 1
    assert sorted(seen) == list(range(101))
    assert not texts[0] and all(len(messages) == 1 for messages in texts[1:])
    assert "The open epoch continues with the remaining samples." in texts[1][0]
    assert results[0][2] == 1 and len(results[0][4]["val_loss"]) == 1


def test_the_next_epoch_is_complete_again(tmp_path):
    for size, stop_after in ((4, 2), (2, None)):
        results = on_ranks(size, part_of_run, tmp_path, stop_after, 3)
    counts = torch.bincount(torch.tensor([index for result in results for index in result[0]]))
    first = 4 * 2 * 2 * 3  # samples of the first epoch that four ranks have seen
    assert counts.sum() == 3 * 101 - first and set(counts.tolist()) == {2, 3}


def test_losses_of_an_inherited_epoch_count(tmp_path):
    whole = on_ranks(4, part_of_run, tmp_path / "whole", None, 1)
    on_ranks(4, part_of_run, tmp_path / "parts", 7, 1)  # all its steps, but no validation
    for result in on_ranks(2, part_of_run, tmp_path / "parts", None, 1):
        assert result[0] == []
        for name, values in whole[0][4].items():
            assert result[4][name] == pytest.approx(values, rel=1e-6), name


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_number_of_ranks_resumes_exactly(tmp_path, workers):
    straight = on_ranks(2, part_of_run, tmp_path / "straight", None, 2, workers)
    stopped = on_ranks(2, part_of_run, tmp_path / "stopped", 5, 2, workers)
    resumed = on_ranks(2, part_of_run, tmp_path / "stopped", None, 2, workers)
    for whole, first, second in zip(straight, stopped, resumed, strict=True):
        assert first[0] + second[0] == whole[0] and second[4] == whole[4]
        assert not whole[3] and not second[3]


class At(Callback):
    def __init__(self, rank, act, phase="train"):
        self.rank, self.act, self.phase = rank, act, phase

    def on_safepoint(self, trainer, phase):
        if phase == self.phase and dist.get_rank() == self.rank:
            self.act(trainer)

    def on_epoch_start(self, trainer, epoch):
        self.on_safepoint(trainer, "epoch")


def fail_on_rank_1(where):
    def boom(trainer):
        raise ValueError(f"a bad callback in {where}")

    train, val = (make_loader(Chips(count), 2) for count in (40, 12))
    trainer = make_trainer(train, val, [At(1, boom, where)])
    try:
        trainer.fit()
    except Exception as error:
        return type(error).__name__, str(error), trainer.stop_reason
    return None


@pytest.mark.parametrize("where", ["epoch", "validate"])
def test_a_rank_that_fails_ends_all_with_its_reason(where):
    """The failed process lives on here; the others do not wait for its end."""
    first, second = on_ranks(2, fail_on_rank_1, where)
    text = f"a bad callback in {where}"
    assert second == ("ValueError", text, f"ValueError: {text}")
    name, message, reason = first
    assert name == "RankFailed" and message.startswith(f"Rank 1 failed: ValueError: {text}.\n")
    assert "Rank 0 cannot continue without it" in message
    assert reason == f"RankFailed: Rank 1 failed: ValueError: {text}."


def diverge():
    batches = [(torch.full((1, 4, 6, 6), torch.nan), torch.zeros(1, 6, 6, dtype=torch.int64))]
    good = [(torch.zeros(1, 4, 6, 6), torch.zeros(1, 6, 6, dtype=torch.int64))]
    trainer = make_trainer(8 * (batches if dist.get_rank() == 1 else good), max_skipped_steps=3)
    with contextlib.suppress(RankFailed):
        try:
            trainer.fit(1)
        except TrainingDiverged as error:
            return trainer.global_step, str(error)
    return None


def test_steps_are_skipped_together_and_the_culprit_is_found():
    for step, message in on_ranks(2, diverge):
        assert (
            step == 0
            and "at batch index 0 (sample 0) of rank 1, where the input was not finite" in message
        )


def chips_of(rank, without):
    """Batches of a rank: rank 1 has bad chips, once all of a batch, or batches without them."""
    batches = []
    for number in range(3):
        chips = [Chips(99)[4 * number + 20 * rank + n] for n in range(4)]
        image, mask = (torch.stack([chip[name] for chip in chips]) for name in ("image", "mask"))
        bad = {(1, 0): [2], (1, 2): [0, 1, 2, 3]}.get((rank, number), [])
        image[bad, 0, 0, 0] = torch.nan
        rows = [row for row in range(4) if row not in bad]
        if not without:
            batches.append({"image": image, "mask": mask, "index": list(range(number, number + 4))})
        elif rows:
            batches.append((image[rows], mask[rows]))
    return batches


def train_without_bad_chips(without):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(chips_of(dist.get_rank(), without), drop_bad_samples=not without)
        history = trainer.fit(2)
    vector = nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    told = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    return vector, dict(history), told


def test_bad_samples_of_a_rank_are_left_out_and_named_by_rank_0():
    found, expected = (on_ranks(2, train_without_bad_chips, without) for without in (False, True))
    for (vector, history, _), (other, known, _) in zip(found, expected, strict=True):
        assert torch.equal(vector, other)
        assert history["train_loss"] == known["train_loss"]
        assert history["train_dropped_samples"] == [5.0, 5.0]
    told = [told for _, _, told in found]
    assert told[1] == [] and told[0] == 2 * [
        "5 samples of train_loader were left out, because their input is not finite: index 2, 3, "
        "4, 5."
    ]  # 2 was in two batches


def warnings_of(kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "sampler":
            make_trainer(DataLoader(Chips(12), 2, shuffle=True))
        elif kind == "own":
            make_trainer(DataLoader(Chips(12 + dist.get_rank()), 2, shuffle=True))
        else:
            model = small_net()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            config = TrainerConfig(device="cpu")
            Trainer(model, optimizer, WEIGHTS.dot, make_loader(Chips(12), 2), config=config)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sampler", "Each of 2 processes reads all 12 samples of train_loader"),
        ("model", "2 processes train, and the model is not wrapped"),
        ("own", None),
    ],
)
def test_rank_0_warns_of_ranks_that_share_nothing(kind, text):
    first, second = on_ranks(2, warnings_of, kind)
    assert second == [] and len(first) == (text is not None)
    assert text is None or text in first[0]
