"""Ranks agree on stops, pauses, shares and the end of an epoch."""

from collections import namedtuple
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from processes import on_ranks
from ununennium import Callback, CheckpointCallback, ConfusionMatrix, Trainer, TrainerConfig
from ununennium.ranks import Ranks, find_ranks
from ununennium.training.batches import MicroBatch
from ununennium.training.lockstep import (
    Lockstep,
    first_reason,
    follow,
    idle_batch,
    next_window,
    share_out,
)
from ununennium.training.state import Progress


def make_batch(weight=1.0, number=0, value=1.0):
    return MicroBatch(f"raw {number}", torch.full((1, 2), value), torch.zeros(1), weight, number)


@dataclass
class Epoch:
    """Windows of batches with these weights."""

    weights: list
    window: list = field(default_factory=list)
    example: MicroBatch | None = None

    def read_window(self):
        if not self.window and self.weights:
            self.window = [make_batch(w, n) for n, w in enumerate(self.weights.pop(0))]
        return self.window

    def close(self):
        self.example = next((b for b in self.window if not b.is_empty), self.example)
        self.window = []


@pytest.mark.parametrize(
    ("reasons", "wanted"),
    [
        ([None, None], None),
        (["patience", "patience"], "patience"),
        ([None, "enough", "later"], "enough (rank 1)"),
        (["interrupted", None], "interrupted (rank 0)"),
        (["enough (rank 1)", "enough (rank 1)"], "enough (rank 1)"),
        (["enough (rank 1)", "later"], "enough (rank 1)"),
    ],
)
def test_the_first_reason_counts(reasons, wanted):
    assert first_reason(reasons) == wanted


def test_idle_batches_are_zero_in_every_structure():
    Pair = namedtuple("Pair", "a b")
    inputs = {"x": torch.ones(2), "pair": Pair([torch.ones(1)], "name"), "n": 3}
    batch = MicroBatch("raw", inputs, torch.ones(1), 4.0, 7, divisor=10.0, is_last=False)
    idle = idle_batch(batch)
    assert torch.equal(idle.inputs["x"], torch.zeros(2)) and idle.inputs["n"] == 3
    assert idle.inputs["pair"].a[0].item() == 0 and idle.inputs["pair"].b == "name"
    assert (idle.weight, idle.share, idle.is_last, idle.is_empty) == (0.0, 0.0, True, False)
    assert batch.inputs["x"].sum() == 2 and idle.target is batch.target
    idle.losses = {"loss": torch.tensor(1.0)}
    assert idle.detach_losses() == {}


def test_shares_are_those_of_all_ranks():
    window = [make_batch(300.0), make_batch(100.0), make_batch(0.0)]
    share_out(window, 1000.0 / 4)
    assert [batch.share for batch in window] == [1.2, 0.4, 0.0]
    assert [batch.is_last for batch in window[:2]] == [False, True]


def test_one_process_needs_no_exchange():
    progress, lockstep = Progress(), Lockstep()
    epoch = Epoch([[1.0]])
    lockstep = Lockstep(Ranks(), progress)
    assert next_window(lockstep, epoch) == epoch.window and len(epoch.window) == 1
    lockstep.at_safepoint(Epoch([[]]))
    assert not lockstep.should_stop() and not lockstep.notes.is_paused
    progress.request_stop("enough")
    progress.pause_requested = True
    assert lockstep.should_stop() and lockstep.notes.is_paused and progress.stop_reason == "enough"
    batches = [1, 2]
    assert follow(lockstep, batches) is batches


def read_all(weights):
    lockstep, seen = Lockstep(find_ranks(), Progress()), []
    epoch = Epoch(weights[lockstep.ranks.rank])
    while window := next_window(lockstep, epoch):
        seen.append([(b.weight, round(b.share, 3), b.is_idle, b.is_last) for b in window])
        assert all(b.raw is None or b.inputs.shape == (1, 2) for b in window)
        epoch.close()
        lockstep.at_safepoint(epoch)
    return seen


def test_ranks_with_unequal_windows_end_together():
    first, second = on_ranks(2, read_all, [[[3.0, 1.0], [2.0], [4.0]], [[4.0], [0.0]]])
    assert first == [
        [(3.0, 0.75, False, False), (1.0, 0.25, False, True)],
        [(2.0, 2.0, False, True)],
        [(4.0, 2.0, False, True)],
    ]
    assert second == [
        [(4.0, 1.0, False, True)],
        [(0.0, 0.0, False, True), (0.0, 0.0, True, True)],  # no valid pixel: an idle batch
        [(0.0, 0.0, True, True)],  # the loader has ended
    ]


def test_a_rank_that_never_had_a_batch_borrows_one():
    first, second = on_ranks(2, read_all, [[[3.0], [1.0]], [[0.0]]])
    assert first == [[(3.0, 2.0, False, True)], [(1.0, 2.0, False, True)]]
    assert second == [[(0.0, 0.0, False, True), (0.0, 0.0, True, True)], [(0.0, 0.0, True, True)]]


def test_a_window_without_a_valid_pixel_anywhere_is_no_step():
    first, second = on_ranks(2, read_all, [[[0.0], [0.0]], [[0.0]]])
    assert first == [[(0.0, 0.0, False, True)]] * 2
    assert second == [[(0.0, 0.0, False, True)]] * 2  # the last one is made up


def step_together(lockstep, epoch, request):
    """Take a window, make a request; return the window's shares, and what all ranks know then."""
    shares = [batch.share for batch in next_window(lockstep, epoch)]
    request()
    epoch.close()
    lockstep.at_safepoint(epoch)
    return shares, lockstep.notes.is_paused, lockstep.notes.is_stopping


def make_request(progress, number):
    if dist.get_rank() == 1:
        progress.pause_requested = number == 0
        if number == 2:
            progress.request_stop("enough")


def stop_and_pause():
    ranks, progress = find_ranks(), Progress()
    lockstep, seen = Lockstep(ranks, progress), []
    epoch = Epoch([[1.0]] * 6)
    for number in range(5):
        seen.append(step_together(lockstep, epoch, partial(make_request, progress, number)))
        while lockstep.notes.is_paused:
            progress.pause_requested = False
            lockstep.at_safepoint()
        if lockstep.notes.is_stopping:
            break
    return seen, progress.stop_reason, len(epoch.weights)


def test_what_one_rank_is_asked_reaches_all_within_a_step():
    """The request of step 0 is known after step 1, and that of step 2 after step 3."""
    step = ([1.0], False, False)
    for seen, reason, left in on_ranks(2, stop_and_pause):
        assert seen == [step, ([1.0], True, False), step, ([1.0], False, True)]
        assert reason == "enough (rank 1)" and left == 2


def begin_before_the_other():
    """Rank 1 sends its note only when rank 0 has begun its step."""
    ranks = find_ranks()
    lockstep, epoch = Lockstep(ranks), Epoch([[3.0], [3.0]] if ranks.is_main else [[1.0], [1.0]])
    next_window(lockstep, epoch)
    epoch.close()
    if not ranks.is_main:
        dist.barrier()
    lockstep.at_safepoint(epoch)
    (batch,) = next_window(lockstep, epoch)
    if ranks.is_main:
        dist.barrier()  # hangs if rank 0 has waited for the note
    return batch.share


def test_a_rank_begins_before_it_knows_what_the_others_windows_weigh():
    assert on_ranks(2, begin_before_the_other) == [1.5, 0.5]


def pause_and_score():
    """A callback scores a loader while the run is held; the window is weighed again."""
    ranks, progress = find_ranks(), Progress()
    lockstep, epoch = Lockstep(ranks, progress), Epoch([[2.0 - ranks.rank]] * 3)
    next_window(lockstep, epoch)
    epoch.close()
    lockstep.at_safepoint(epoch)
    for _ in follow(lockstep, ["a"]):
        lockstep.send()
    lockstep.at_safepoint()
    return [batch.share for batch in next_window(lockstep, epoch)]


def test_a_loader_may_be_scored_between_two_steps():
    assert on_ranks(2, pause_and_score) == [[pytest.approx(4 / 3)], [pytest.approx(2 / 3)]]


def follow_to_the_end(counts):
    ranks = find_ranks()
    lockstep, seen = Lockstep(ranks, Progress()), []
    for raw in follow(lockstep, list(range(counts[ranks.rank]))):
        lockstep.at_safepoint()
        seen.append(raw)
    return seen


def test_ranks_follow_each_other_through_loaders_of_any_length():
    assert on_ranks(3, follow_to_the_end, [2, 0, 3]) == [
        [0, 1, None, None], [None, None, None, None], [0, 1, 2, None],
    ]  # fmt: skip


# Whole runs.


ACCUMULATION = 3
LOSS = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), ignore_index=255)


def batches_of(rank, count):
    """Uneven batches with nodata; rank 1 has a window without a valid pixel."""
    generator, batches = torch.Generator().manual_seed(rank), []
    for number in range(count):
        size = int(torch.randint(1, 4, (), generator=generator))
        image = torch.randn(size, 4, 6, 6, generator=generator, dtype=torch.float64)
        mask = image[:, :3].argmax(1)
        mask[torch.rand(mask.shape, generator=generator) < 0.3] = 255
        if rank == 1 and number < ACCUMULATION:
            mask[:] = 255
        batches.append((image, mask))
    return batches


TRAIN = [batches_of(rank, count) for rank, count in enumerate((7, 10, 1))]
VAL = [batches_of(rank, count) for rank, count in ((5, 3), (6, 5))]


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 1)).double()


def make_trainer(rank, callbacks=()):
    model = DistributedDataParallel(small_net())
    config = TrainerConfig(
        device="cpu", progress="none", accumulation_steps=ACCUMULATION, gradient_clip=0
    )
    val = VAL[rank] if rank < len(VAL) else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, LOSS, TRAIN[rank], val, callbacks=callbacks, config=config)


class Vectors(Callback):
    """Keeps the parameters after each step."""

    def __init__(self):
        self.kept = []

    def on_safepoint(self, trainer, phase):
        if phase == "train":
            parameters = trainer.model.parameters()
            self.kept.append(nn.utils.parameters_to_vector(parameters).detach().clone())


def train_ranks():
    vectors = Vectors()
    trainer = make_trainer(dist.get_rank(), [vectors])
    return dict(trainer.fit(2)), vectors.kept


def weight_of(mask):
    return LOSS.weight[mask[mask != 255]].sum().item()


def train_by_hand():
    """One process takes the windows of all ranks together."""
    model, vectors = small_net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for start in range(0, 10, ACCUMULATION):
            window = [pair for each in TRAIN for pair in each[start : start + ACCUMULATION]]
            total = sum(weight_of(mask) for _, mask in window)
            optimizer.zero_grad()
            for image, mask in window:
                if weight_of(mask):
                    (LOSS(model(image), mask) * weight_of(mask) / total).backward()
            optimizer.step()
            vectors.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return model, vectors


def test_three_ranks_take_the_steps_of_one_process():
    """Uneven loaders, nodata, class weights, accumulation, a window that one rank cannot fill."""
    model, wanted = train_by_hand()
    results = on_ranks(3, train_ranks)
    for _, vectors in results:
        assert len(vectors) == len(wanted) == 8
        for own, other in zip(vectors, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)
    histories = [repr(history) for history, _ in results]
    assert len(set(histories)) == 1
    history, pairs = results[0][0], [pair for each in VAL for pair in each]
    with torch.no_grad():
        losses = [LOSS(model(image), mask).item() * weight_of(mask) for image, mask in pairs]
        matrix = ConfusionMatrix(3, 255)
        for image, mask in pairs:
            matrix.update(model(image), mask)
    val_loss = sum(losses) / sum(weight_of(mask) for _, mask in pairs)
    assert history["val_loss"][-1] == pytest.approx(val_loss, rel=1e-12)
    assert history["val_IoU"][-1] == pytest.approx(matrix.compute()["IoU"], rel=1e-6)
    assert history["train_empty_batches"] == [3.0, 3.0]


class At(Callback):
    """Acts on one rank, after a step or before a validation batch."""

    def __init__(self, rank, phase, number, act):
        self.rank, self.phase, self.number, self.act = rank, phase, number, act

    def on_safepoint(self, trainer, phase):
        if phase == self.phase and dist.get_rank() == self.rank:
            self.number -= 1
            if self.number == 0:
                self.act(trainer)


def stop_and_continue(phase, number):
    act = lambda trainer: trainer.request_stop("enough")
    trainer, straight = make_trainer(dist.get_rank(), [At(1, phase, number, act)]), train_ranks()
    trainer.fit(2)
    found = trainer.stop_reason, trainer.epoch, trainer.global_step
    while trainer.epoch < 2:
        trainer.fit(1)
    last = nn.utils.parameters_to_vector(trainer.model.parameters())
    return found, torch.equal(last, straight[1][-1]) and trainer.history == straight[0]


@pytest.mark.parametrize(("phase", "number", "steps"), [("train", 2, 3), ("validate", 2, 4)])
def test_a_stop_on_one_rank_is_a_pause_of_all(phase, number, steps):
    for found, is_same in on_ranks(3, stop_and_continue, phase, number):
        assert found == ("enough (rank 1)", 0, steps) and is_same


def save_and_resume(folder):
    rank = dist.get_rank()
    save = At(2, "train", 3, lambda trainer: trainer.request_stop("enough"))
    keep = CheckpointCallback(folder, "val_loss", every_n_steps=2)
    first, straight = make_trainer(rank, [save, keep]), train_ranks()
    first.fit(2)
    second = make_trainer(rank, [CheckpointCallback(folder, "val_loss")])
    path = second.resume(folder)
    where = second.epoch, second.global_step, second.batch
    while second.epoch < 2:
        second.fit(1)
    last = nn.utils.parameters_to_vector(second.model.parameters())
    is_same = torch.equal(last, straight[1][-1]) and second.history == straight[0]
    return path.name, where, is_same, second.callbacks[0].best_path.name


def test_ranks_share_one_file_and_resume_exactly(tmp_path):
    results = on_ranks(3, save_and_resume, tmp_path)
    assert [result[1] for result in results] == [(0, 4, 7), (0, 4, 10), (0, 4, 1)]
    assert all(result[0] == "last.pt" and result[2] for result in results)
    assert len({result[3] for result in results}) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pt"] * 3
